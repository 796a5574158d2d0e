import logging
import pickle
import random
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from PIL import Image
from samples import FRAME_FEATURES, IMAGE_FEATURES, StubMedia, plain, record
from torch.utils.data import DataLoader

from dataprocess import moving
from dataset.collator import Collator
from dataset.dataset import RecordDataset
from dataset.record import RecordError, read_records, write_records
from dataset.template import IGNORE_INDEX, encode_record
from visual import build_encoder
from visual.media import Media

N = IMAGE_FEATURES


def build(records, tokenizer, image_root, media=None, **options) -> RecordDataset:
    return RecordDataset(records, tokenizer, media or StubMedia(), image_root, **options)


def values(sample: dict) -> list[float]:
    """Where the views of a sample come from."""
    return [] if sample["pixel_values"] is None else sample["pixel_values"][:, 0, 0, 0].tolist()


def test_samples_hold_their_images_in_order(tokenizer, image_root, tmp_path):
    records = [
        record("<image> and <image>?", "x", images=["b.png", "a.png"], name="two"),
        record("words", "only", name="none"),
        record("one", "1", "<image>", "2", images=["c.png"], name="later"),
    ]
    write_records(records, tmp_path / "r.parquet")
    for source in (records, read_records(tmp_path / "r.parquet")):
        dataset = build(source, tokenizer, image_root, system="S")
        assert len(dataset) == 3
        samples = [dataset[i] for i in range(3)]
        assert samples[0]["pixel_values"].shape == (2, 3, 2, 2)
        assert samples[0]["pixel_values"][:, 0, 0, 0].tolist() == [2, 1]
        assert samples[1]["pixel_values"] is None
        assert samples[2]["pixel_values"][:, 0, 0, 0].tolist() == [3]
        assert [sample["view_features"] for sample in samples] == [[N, N], [], [N]]
        for sample, item in zip(samples, records, strict=True):
            text = {name: sample[name] for name in ("input_ids", "labels")}
            assert text == encode_record(item, tokenizer, N, "S")


def test_images_and_clips_stand_in_the_order_of_their_placeholders(tokenizer, image_root):
    questions = ("<video> and <image> and <video>?", "x", "<image>", "y")
    mixed = record(*questions, images=["b.png", "c.png"], videos=["w.mp4", "v.mp4"])
    dataset = build([mixed], tokenizer, image_root)
    sample = dataset[0]
    assert values(sample) == [20, 21, 2, 10, 11, 12, 3]
    assert sample["view_features"] == [2, 2, 4, 2, 2, 2, 4]
    assert sample["input_ids"] == encode_record(mixed, tokenizer, [4, 4, 6, 4])["input_ids"]
    assert sample["input_ids"].count(tokenizer.placeholder_id) == sum(sample["view_features"])
    assert list(dataset.lengths) == [len(sample["input_ids"])]


def test_an_image_of_several_views(tokenizer, image_root):
    dataset = build([record("<image>", "x", images=["b.png"])], tokenizer, image_root, StubMedia(tiles=True))
    assert values(dataset[0]) == [2] * 5 and dataset[0]["view_features"] == [N] * 5  # 4 pixels wide
    assert list(dataset.lengths) == [len(dataset[0]["input_ids"])]


def test_plain_text_is_cut_before_the_image_that_does_not_fit(tokenizer, image_root):
    text = plain("<image>one<video>two<image>", images=["a.png", "b.png"], videos=["v.mp4"])
    whole = build([text], tokenizer, image_root)[0]
    assert values(whole) == [1, 10, 11, 12, 2]
    last = len(tokenizer.encode_plain("one")) + N
    for limit, end, views in (
        (len(whole["input_ids"]), len(whole["input_ids"]), [1, 10, 11, 12, 2]),
        (len(whole["input_ids"]) - 2, last + 9, [1, 10, 11, 12]),  # within the last image
        (last + 6, last, [1]),  # at the end of the clip, of which nothing follows
        (last + 3, last, [1]),  # within the clip
        (last, last, [1]),
        (N + 1, N + 1, [1]),
    ):
        dataset = build([text], tokenizer, image_root, max_length=limit)
        sample = dataset[0]
        assert sample["input_ids"] == whole["input_ids"][:end] and values(sample) == views, limit
        assert sample["labels"] == whole["labels"][:end] and list(dataset.lengths) == [end]
    with pytest.raises(RecordError, match=f"none of its first {N} tokens"):
        _ = build([text], tokenizer, image_root, max_length=N)[0]


def test_media_that_are_cut_away_are_not_decoded(tokenizer, image_root):
    long = record("<image>", "x", "<video>", "y" * 50, images=["a.png"], videos=["broken.mp4"])
    limit = len(build([record("<image>", "x", images=["a.png"])], tokenizer, image_root)[0]["input_ids"])
    media = StubMedia(frames=2)
    dataset = build([long], tokenizer, image_root, media, max_length=limit)
    assert dataset.lengths[0] <= limit and media.decoded == []
    assert values(dataset[0]) == [1] and media.decoded == ["a.png"]


def test_lengths_open_no_image(tokenizer, tmp_path):
    records = [record("<image>", "abc", images=["absent.jpg"]), record("?", "!", name="s")]
    dataset = build(records, tokenizer, tmp_path / "absent", max_length=100)
    assert list(dataset.lengths) == [len(encode_record(r, tokenizer, N)["input_ids"]) for r in records]
    assert dataset.lengths[0] == dataset.lengths[1] + N - 1 + 2


def test_cut_ends_with_the_last_supervised_token(tokenizer, image_root, caplog):
    long = record("<image>", "first", "<image>", "second", images=["a.png", "b.png"], name="long")
    whole = encode_record(long, tokenizer, N)
    first_end = whole["labels"].index(tokenizer.im_end_id) + 1
    second_image = whole["input_ids"].index(tokenizer.placeholder_id, first_end)
    second_answer = next(i for i in range(first_end, len(whole["labels"])) if whole["labels"][i] != IGNORE_INDEX)
    for limit, end, images in (
        (len(whole["input_ids"]), len(whole["input_ids"]), [1, 2]),
        (len(whole["input_ids"]) - 1, len(whole["input_ids"]) - 1, [1, 2]),
        (second_answer + 3, second_answer + 3, [1, 2]),  # within the second answer
        (second_answer, first_end, [1]),
        (second_image + N // 2, first_end, [1]),  # within the second image
        (second_image, first_end, [1]),
        (first_end - 2, first_end - 2, [1]),
    ):
        dataset = build([long], tokenizer, image_root, max_length=limit)
        sample = dataset[0]
        assert sample["input_ids"] == whole["input_ids"][:end], limit
        assert sample["labels"] == whole["labels"][:end]
        assert sample["pixel_values"][:, 0, 0, 0].tolist() == images
        assert list(dataset.lengths) == [end]
        assert len(sample["input_ids"]) <= limit
    assert caplog.text.count("record 'long' is longer than max_length=52 and was cut; others may follow") == 1
    dataset.lengths.measure()
    assert "1 of 1 records are longer than max_length" in caplog.text


@pytest.mark.parametrize("limit", [1, 12])
def test_record_without_supervised_token_within_the_limit(tokenizer, image_root, limit):
    dataset = build([record("<image>", "yes", images=["a.png"], name="huge")], tokenizer, image_root, max_length=limit)
    for attempt in (lambda: dataset[0], dataset.lengths.measure):
        with pytest.raises(RecordError, match=f"'huge': none of its first {limit} tokens .* is supervised"):
            attempt()


def test_faults_in_texts_name_the_record(tokenizer, image_root):
    with pytest.raises(RecordError, match="'mute'"):
        build([record("no answer", name="mute")], tokenizer, image_root).lengths.measure()
    heard = {**record("listen", "ok", name="song"), "audios": ["a.wav"]}
    with pytest.raises(RecordError, match="'song'.*audios can't be encoded"):
        build([heard], tokenizer, image_root)[0]
    with pytest.raises(RecordError, match="'odd'"):
        build([record("<image>", "ok", name="odd")], tokenizer, image_root)
    with pytest.raises(ValueError, match="on_bad_image"):
        build([], tokenizer, image_root, on_bad_image="ignore")


@pytest.mark.parametrize(
    ("name", "error"),
    [("broken.png", ValueError), ("gone.png", FileNotFoundError), ("broken.mp4", ValueError),
     ("gone.mp4", FileNotFoundError)],
)  # fmt: skip
def test_bad_media_are_errors_that_name_file_and_record(tokenizer, image_root, name, error):
    if name.endswith("png"):
        bad = record("<image>", "yes", images=[name], name="bad")
    else:
        bad = record("<video>", "yes", videos=[name], name="bad")
    with pytest.raises(error, match="'bad'.*on_bad_image=skip") as caught:
        build([bad], tokenizer, image_root)[0]
    assert name.removeprefix("broken.mp4") in str(caught.value)


def test_files_whose_headers_can_not_be_read(tokenizer, image_root):
    records = [record("<video>", "x", videos=[name], name=name) for name in ("v.mp4", "gone.mp4")]
    with pytest.raises(FileNotFoundError, match="'gone.mp4'"):
        build(records, tokenizer, image_root).lengths.measure()
    dataset = build(records, tokenizer, image_root, on_bad_image="skip")
    assert list(dataset.lengths) == [len(dataset[0]["input_ids"]), 1]
    assert dataset.skipped == ["gone.mp4"]


def test_missing_settings_of_the_encoder_are_never_skipped(tokenizer, image_root):
    class Unset(StubMedia):
        @property
        def preprocess(self):
            raise FileNotFoundError("no preprocessor_config.json")

    class Unfit(StubMedia):
        @property
        def frame_features(self):
            raise ValueError("frame_pooling=2 needs a grid")

    for media, message in ((Unset(), "preprocessor_config"), (Unfit(), "frame_pooling")):
        films = [record("<video>", "x", videos=["v.mp4"])]
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            _ = build(films, tokenizer, image_root, media, on_bad_image="skip")[0]


def test_a_file_that_changed_since_its_header_was_read(tokenizer, image_root):
    class Changing(StubMedia):
        def video_features(self, path) -> list[int]:
            return [FRAME_FEATURES]

    with pytest.raises(ValueError, match="'r'.*v.mp4 changed while it was read"):
        build([record("<video>", "x", videos=["v.mp4"])], tokenizer, image_root, Changing())[0]


def test_errors_come_through_from_workers(tokenizer, image_root):
    dataset = build([record("no answer", name="mute")], tokenizer, image_root)
    with pytest.raises(RecordError, match="'mute'"):
        list(DataLoader(dataset, collate_fn=Collator(tokenizer.pad_token_id), num_workers=1))


def rows(count: int, bad: set[int]) -> list[dict]:
    names = ["broken.png" if i in bad else "a.png" for i in range(count)]
    return [record("<image>", "x" * (i + 1), images=[names[i]], name=f"r{i}") for i in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_records_leave_a_hole_and_nothing_else(tokenizer, image_root, workers, caplog):
    bad = {1, 4, 5}
    dataset = build(rows(8, bad), tokenizer, image_root, on_bad_image="skip")
    sound = build(rows(8, set()), tokenizer, image_root)
    loader = DataLoader(dataset, batch_size=2, collate_fn=Collator(tokenizer.pad_token_id), num_workers=workers)
    for _ in range(2):  # a second epoch counts nothing twice
        batches = list(loader)
        assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 2, 2]
        assert torch.cat([batch["view_counts"] for batch in batches]).tolist() == [int(i not in bad) for i in range(8)]
        assert "pixel_values" not in batches[2]
        for i in range(8):
            batch, row = batches[i // 2], i % 2
            labels = batch["labels"][row]
            expected = [] if i in bad else [label for label in sound[i]["labels"] if label != IGNORE_INDEX]
            assert labels[labels != IGNORE_INDEX].tolist() == expected
            assert batch["attention_mask"][row].sum() == (1 if i in bad else len(sound[i]["input_ids"]))
        assert dataset.skipped == ["r1", "r4", "r5"]
    if workers == 0:
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warnings) == 3 and "'r1'" in warnings[0] and "broken.png" in warnings[0]


def test_pickles(tokenizer, image_root, tmp_path):
    write_records(rows(3, set()), tmp_path / "r.parquet")
    dataset = build(read_records(tmp_path / "r.parquet"), tokenizer, image_root, max_length=50)
    copy = pickle.loads(pickle.dumps(dataset))
    assert list(copy.lengths) == list(dataset.lengths)
    for ours, theirs in zip(copy, dataset, strict=True):
        assert ours["input_ids"] == theirs["input_ids"]
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_skips_are_shared_with_processes_that_are_sent_a_copy(tokenizer, image_root):
    dataset = build(rows(4, {2}), tokenizer, image_root, on_bad_image="skip")
    sent = pickle.loads(ForkingPickler.dumps(dataset))  # as a data loader with spawned workers does
    assert sent[2]["pixel_values"] is None
    assert dataset.skipped == ["r2"]


@pytest.mark.parametrize("settings", [{"max_tiles": 4, "fps": 2.0, "frames": 4}, {"frames": 3, "frame_pooling": 2}])
def test_real_images_and_clips(tokenizer, tiny, tmp_path, settings):
    """The built-in clips, and images of several shapes, as `visual.media` opens them, in worker processes too."""
    media = Media(build_encoder("clip", str(tiny.folder / "encoder")), **settings)
    clip = moving.draw_clip(random.Random(0), "train")
    moving.write_clip(moving.paint(clip, random.Random(0)), 4, tmp_path / "clip.mp4")
    Image.new("RGB", (64, 16), (250, 10, 10)).save(tmp_path / "wide.png")
    Image.new("RGB", (10, 10), (10, 250, 10)).save(tmp_path / "small.png")
    images, films = ("wide.png", "small.png"), ("clip.mp4",)
    records = [
        record("<image><video><image>", "x", images=images, videos=films),
        record("?", "!", name="s"),
        plain("<video>moves", name="p", videos=films),
    ]
    dataset = build(records, tokenizer, tmp_path, media)
    wide, small, film = (load(tmp_path / name) for load, name in (
        (media.load_image, "wide.png"), (media.load_image, "small.png"), (media.load_video, "clip.mp4"),
    ))  # fmt: skip
    collate = Collator(tokenizer.pad_token_id)
    (batch,) = list(DataLoader(dataset, batch_size=3, collate_fn=collate, num_workers=1, timeout=60))
    assert batch["view_counts"].tolist() == [len(wide.features + small.features + film.features), 0, len(film.features)]
    assert torch.equal(
        batch["pixel_values"], torch.cat([views.pixel_values for views in (wide, film, small, film)])
    )
    assert batch["view_features"].tolist() == wide.features + film.features + small.features + film.features
    placeholders = (batch["input_ids"] == tokenizer.placeholder_id).sum(1)
    assert placeholders.tolist() == [sum(wide.features + small.features + film.features), 0, sum(film.features)]
    assert batch["attention_mask"].sum(1).tolist() == list(dataset.lengths)
