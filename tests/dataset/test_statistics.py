import json

import numpy as np
import pytest
from PIL import Image
from samples import FRAME_FEATURES, IMAGE_FEATURES, StubMedia, plain, record

from dataset import statistics
from dataset.advice import advice
from dataset.dataset import RecordDataset
from dataset.mixture import Mixture
from dataset.record import Records, to_table
from dataset.sampler import GlobalBatchSampler
from dataset.statistics import Size, Sizes, measure, padding, summary
from dataset.template import IGNORE_INDEX, encode_record

N = IMAGE_FEATURES


@pytest.fixture
def headers(monkeypatch):
    """The clips of `StubMedia` are text files, of which no header can be read: of clips none is."""
    monkeypatch.setattr(statistics, "count_frames", lambda path, **options: path.stat())


def build(records, tokenizer, image_root, media=None, **options) -> RecordDataset:
    return RecordDataset(records, tokenizer, media or StubMedia(), image_root, **options)


def of(source: str, one: dict) -> dict:
    return {**one, "source": source}


def test_sizes_are_those_of_the_samples(tokenizer, image_root, headers):
    records = [
        record("<image><video>?", "x", images=["a.png"], videos=["v.mp4"], name="media"),
        record("q", "a" * 9, "more", "b" * 40, name="long"),
        plain("<image>one", images=["b.png"], name="plain"),
        record("say <|im_end|>", "no", name="control"),
    ]
    dataset = build(records, tokenizer, image_root, max_length=60, system="S")
    sizes = measure(dataset)
    assert sizes.indices.tolist() == [0, 1, 2, 3] and sizes.faults == [] and sizes.unit == "token"
    for index, item in enumerate(records):
        counts = {0: [N, 3 * FRAME_FEATURES], 2: [N]}.get(index, [])
        whole, sample = encode_record(item, tokenizer, counts, "S"), dataset[index]
        size = Size(*sizes.values[index].tolist())
        assert size.length == len(whole["input_ids"]) and size.kept == len(sample["input_ids"])
        assert size.supervised == sum(label != IGNORE_INDEX for label in whole["labels"])
        assert size.supervised_kept == sum(label != IGNORE_INDEX for label in sample["labels"])
        assert size.features == sum(counts)
        assert (size.images, size.videos) == (len(item["images"]), len(item["videos"]))
        assert size.control == (item["id"] == "control")
    assert sizes.column("kept")[1] == 60 < sizes.column("length")[1]


def test_every_faulty_record_is_found_and_named(tokenizer, image_root):
    Image.new("RGB", (4, 4)).save(image_root / "whole.bmp")
    (image_root / "header.png").write_bytes((image_root / "a.png").read_bytes()[:45])  # pixels are missing
    (image_root / "nothing.jpg").write_bytes(b"no image")
    bad = [
        record("no answer", name="mute"),
        record("<image>", "x", images=["gone.png"], name="gone"),
        record("<image>", "x", images=["nothing.jpg"], name="nothing"),
        record("y" * 90, "x", name="huge"),
        {**record("listen", "ok", name="song"), "audios": ["a.wav"]},
    ]
    fine = [record("<image>", "x", images=["a.png"], name="fine"), record("?", "!", name="text")]
    damaged = [record("<image>", "x", images=["header.png"], name="damaged")]
    beyond = [record("?", "!", "<image>", "x" * 80, images=["gone.png"], name="beyond")]  # cut before the image
    records = [*fine, *bad, *damaged, *beyond]
    dataset = build(records, tokenizer, image_root, max_length=30)
    sizes = measure(dataset)
    reasons = {fault.id: fault.reason for fault in sizes.faults}
    assert reasons == {
        "mute": "no supervised token", "gone": "missing file", "nothing": "unreadable file", "huge": "too long",
        "song": "media",
    }  # fmt: skip
    assert all(repr(fault.id) in fault.problem and fault.refused for fault in sizes.faults)
    for fault in sizes.faults:
        with pytest.raises((ValueError, FileNotFoundError), match=f"'{fault.id}'"):
            dataset[fault.index]
    for index in set(range(len(records))) - {fault.index for fault in sizes.faults} - {7}:
        assert len(dataset[index]["input_ids"]) == sizes.column("kept")[sizes.indices.tolist().index(index)]
    decoded = {fault.id: fault.reason for fault in measure(dataset, decode=True).faults}
    assert decoded == {**reasons, "damaged": "unreadable file"}
    skipping = measure(build(records, tokenizer, image_root, max_length=30, on_bad_image="skip"))
    assert {fault.id for fault in skipping.faults if not fault.refused} == {"gone", "nothing"}
    figures = summary(skipping, "test")
    assert {reason: entry["count"] for reason, entry in figures["refused"].items()} == {
        "no supervised token": 1, "too long": 1, "media": 1
    }  # fmt: skip
    assert "'gone'" in figures["skipped"]["missing file"]["example"]
    assert figures["records"] == len(records) and figures["samples"] == len(records) - 5


def test_rows_that_break_the_format_are_listed_one_by_one(tokenizer, image_root):
    table = to_table([record(f"q{number}", "a", name=f"r{number}") for number in range(4)])
    rows = table.to_pylist()
    rows[1]["messages"], rows[3]["meta"] = [{"role": "user", "content": "<image>"}], "{"
    records = Records(table.from_pylist(rows, table.schema))
    for data in (build(records, tokenizer, image_root), records):
        sizes = measure(data)
        assert sizes.indices.tolist() == [0, 2]
        assert [(fault.id, fault.reason) for fault in sizes.faults] == [("r1", "placeholders"), ("r3", "fields")]


def test_several_processes_find_what_one_finds(tokenizer, image_root, monkeypatch):
    monkeypatch.setattr(statistics, "FEW", 0)
    records = [of("ab"[number % 2], record("q" * (number % 7), "a" * (number % 5), name=f"r{number}"))
               for number in range(60) if number % 5 and number % 7]  # fmt: skip
    records += [record("mute", name="mute")]
    dataset = build(records, tokenizer, image_root)
    one, two = measure(dataset, workers=0), measure(dataset, workers=2)
    assert (one.values == two.values).all() and (one.indices == two.indices).all() and (one.codes == two.codes).all()
    assert one.faults == two.faults and len(one.faults) == 1
    some = measure(dataset, [3, 9, len(records) - 1], workers=2)
    assert some.indices.tolist() == [3, 9] and (some.values == one.values[[3, 9]]).all() and some.faults == one.faults


def test_faults_of_the_settings_are_raised(tokenizer, image_root, headers):
    class Unfit(StubMedia):
        @property
        def frame_features(self):
            raise ValueError("frame_pooling=2 needs a grid")

    with pytest.raises(ValueError, match="frame_pooling"):
        measure(build([record("<video>", "x", videos=["v.mp4"])], tokenizer, image_root, Unfit()))


def test_characters_without_a_tokenizer():
    records = Records(to_table([
        record("<image>红色?", "是", images=["a.png"]), plain("abc<video>", name="p", videos=["v.mp4"]),
        record("no answer", name="mute"),
    ]))  # fmt: skip
    sizes = measure(records)
    assert sizes.unit == "character"
    assert sizes.column("length").tolist() == [4, 3] and sizes.column("supervised").tolist() == [1, 3]
    assert (sizes.column("images").tolist(), sizes.column("videos").tolist()) == ([1, 0], [0, 1])
    assert [fault.id for fault in sizes.faults] == ["mute"]


def made(lengths, max_length=10**6, supervised=None, sources=("s",), codes=None, **columns) -> Sizes:
    """Sizes with these lengths, cut as far as `max_length` says, a tenth supervised unless told otherwise."""
    lengths = np.asarray(lengths)
    supervised = np.maximum(lengths // 10, 1) if supervised is None else np.asarray(supervised)
    values = {name: np.zeros(len(lengths), np.int64) for name in Size._fields}
    values |= {"length": lengths, "kept": np.minimum(lengths, max_length), "supervised": supervised}
    values["supervised_kept"] = np.maximum(supervised - (lengths - values["kept"]), 1)
    values |= columns
    codes = np.zeros(len(lengths), np.int64) if codes is None else np.asarray(codes)
    return Sizes("token", list(sources), np.arange(len(lengths)), codes, np.stack(list(values.values()), 1), [])


def test_summary_by_hand():
    images = np.array([1, 2, 0, 0, 0])
    sizes = made([10, 20, 30, 40, 100], 50, [5, 5, 5, 5, 80], ("a", "b"), [0, 0, 1, 1, 1], images=images)
    total, b = summary(sizes), summary(sizes, "b")
    assert total["length"] == {"min": 10, "mean": 40.0, "median": 30, "p95": 100, "p99": 100, "max": 100}
    assert (total["units"], total["supervised"]) == (150, 50) and total["supervised_share"] == pytest.approx(1 / 3)
    assert (total["cut"], total["cut_share"]) == (1, 0.2)
    assert (total["supervised_lost"], total["supervised_lost_share"]) == (50, 0.5)
    assert (total["images"], b["images"], b["samples"]) == (3, 0, 3)
    assert b["cut_share"] == pytest.approx(1 / 3) and b["supervised_lost_share"] == pytest.approx(50 / 90)
    empty = summary(made([]))
    assert empty["length"] == {} and empty["supervised_share"] is empty["cut_share"] is None
    assert json.loads(json.dumps(total)) == total


def test_padding_by_hand():
    figures = padding([1, 9, 2, 8, 5], 2, 1, "sequential", seed=0)
    assert figures["strategies"]["sequential"] == {"positions": 39, "padding_share": 1 - 25 / 39}  # 18 + 16 + 5
    assert figures["strategies"]["group_by_length"]["positions"] < 39
    assert (figures["tokens"], figures["current"]) == (25, "sequential")
    assert figures["strategies"]["packing"] == {"positions": 25, "padding_share": 0}
    assert padding([1, 9], 2, 1, "random", seed=0, packing=True)["current"] == "packing"


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_padding_is_that_of_the_batches_of_training(strategy):
    lengths = np.random.default_rng(0).integers(1, 300, 1003).tolist()
    figures = padding(lengths, 8, 4, strategy, seed=3)
    batches = list(GlobalBatchSampler(lengths, 8, accumulation=4, strategy=strategy, seed=3))
    positions = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert figures["strategies"][strategy] == {"positions": positions, "padding_share": 1 - sum(lengths) / positions}


def test_padding_of_a_mixture_counts_what_is_drawn():
    lengths, numbers = [10] * 90 + [100] * 10, np.array([0] * 90 + [1] * 10)
    mixture = Mixture(["short", "long"], numbers, {"short": 0.5, "long": 0.5}, seed=0)
    figures = padding(lengths, 4, 1, "random", seed=0, mixture=mixture)
    assert figures["tokens"] == pytest.approx(50 * 10 + 50 * 100, rel=0.1)  # not 90 * 10 + 10 * 100
    assert "sequential" not in figures["strategies"]
    with pytest.raises(ValueError, match="another sampling strategy than 'sequential'"):
        padding(lengths, 4, 1, "sequential", seed=0, mixture=mixture)
    by_modality = padding(lengths, 4, 1, "group_by_length", 0, mixture, np.array([True, False] * 50))
    assert set(by_modality["strategies"]) == {"group_by_length", "random", "packing"}


# Advice


def advise(sizes: Sizes, max_length: int = 2048, strategy: str = "random", packing: bool = False) -> str:
    cost = padding(sizes.column("kept"), 8, 1, strategy, 0, packing=packing) if len(sizes.indices) else None
    sources = {name: summary(sizes, name) for name in sizes.sources}
    return "\n".join(advice(sizes, {"sources": sources, "total": summary(sizes), "padding": cost}, max_length))


def test_advice_on_max_length():
    lengths = [100] * 990 + [500] * 8 + [3000, 5000]
    text = advise(made(lengths, 300), 300)
    assert "max_length=300 cuts 1.0 % of the samples (10)" in text
    assert "512 would hold 99.8 % of the samples whole; the longest has 5,000." in text
    text = advise(made(lengths, 4000), 4000)
    assert "cuts 0.1 % of the samples (1)" in text
    assert "512 would hold 99.8 % of the samples whole and 4,000 holds 99.9 %; the longest has 5,000." in text
    text = advise(made(lengths), 8192)
    assert "Nothing is cut: the longest sample has 5,000 of max_length=8,192 tokens." in text
    assert "512 would hold 99.8 %; more than that is for the last 0.2 %." in text
    assert "max_length=5,056 would change no sample" in text
    assert "Nothing is cut: the longest sample has 64" in (text := advise(made([64] * 10), 64))
    assert "would change no sample" not in text
    two = made([100] * 90 + [700] * 10, 300, None, ("short", "long"), [0] * 90 + [1] * 10)
    assert "Most concerned is 'long': 100.0 % of its samples." in advise(two, 300)
    assert "All would fit into 700." in advise(two, 300)


def test_advice_on_batches():
    mixed, even = [100, 900] * 200, [100] * 400
    assert "padding (train_sampling_strategy=random). group_by_length would have" in advise(made(mixed), 1000)
    assert "That is well chosen." in advise(made(mixed), 1000, "group_by_length")
    assert "sorting by length gains nothing here" in advise(made(even), 100, "group_by_length")
    assert "packing=true would have none, in random order either: " in advise(made(mixed), 1000)
    assert "packing=true" not in advise(made(even), 100, "group_by_length")
    assert "Batches are packed" in (text := advise(made(mixed), 1000, packing=True)) and "padding (" not in text


def test_advice_on_sources_and_answers():
    sizes = made([300] * 100, supervised=[2] * 50 + [200] * 50, sources=("short", "long"), codes=[0] * 50 + [1] * 50)
    assert "Source 'short' has 50.0 % of the samples but 1.0 % of the supervised tokens" in advise(sizes)
    assert "'long' has" not in advise(sizes)
    text = advise(made([100] * 199 + [2000], 500, [20] * 199 + [1900]), 500)
    assert "cuts off more than half of the supervised tokens of 1 sample." in text
    assert "Very long answers: 1 sample has up to 1,900 supervised tokens, where 99 % have at most 20." in text
    assert "Very long" not in advise(made([100] * 200))
    features = made([100] * 20, features=np.full(20, 90))
    assert "90.0 % of all tokens are features" in advise(features)
    assert "3 records hold text that looks like a control token" in advise(made([9] * 3, control=np.ones(3, np.int64)))


def test_advice_on_faults(tokenizer, image_root):
    records = [of("mute", record("q", name=f"m{number}")) for number in range(3)]
    records += [of("fine", record("q", "a", name="f")), of("fine", record("<image>", "a", images=["g.png"], name="g"))]
    for option, expected in (
        ("error", ["4 records are refused (3 no supervised token, 1 missing file)", "on_bad_image=skip leaves out"]),
        ("skip", ["3 records are refused (3 no supervised token)", "1 record is left out for files"]),
    ):
        text = advise(measure(build(records, tokenizer, image_root, on_bad_image=option)))
        assert all(part in text for part in expected)
        assert "Nothing is learned from source 'mute': none of its records (3) can be used (no supervised" in text
    text = advise(measure(build(records[4:], tokenizer, image_root)))
    assert "is data.image_root right?" in text and "padding" not in text
