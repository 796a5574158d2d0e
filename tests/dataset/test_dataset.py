import logging
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from samples import Pixels, record
from torch.utils.data import DataLoader

from dataset.collator import Collator
from dataset.dataset import RecordDataset
from dataset.record import RecordError, read_records, write_records
from dataset.template import IGNORE_INDEX, encode_record

N = 4  # features per image


def build(records, tokenizer, image_root, **options) -> RecordDataset:
    return RecordDataset(records, tokenizer, Pixels(), N, image_root, **options)


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
        for sample, item in zip(samples, records, strict=True):
            text = {name: sample[name] for name in ("input_ids", "labels")}
            assert text == encode_record(item, tokenizer, N, "S")


def test_lengths_open_no_image(tokenizer, tmp_path):
    records = [record("<image>", "abc", images=["absent.jpg"]), record("?", "!", name="s")]
    dataset = build(records, tokenizer, tmp_path / "absent", max_length=100)
    assert dataset.lengths == [len(encode_record(r, tokenizer, N)["input_ids"]) for r in records]
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
        assert dataset.lengths == [end]
        assert len(sample["input_ids"]) <= limit
    assert "1 of 1 records are longer than max_length" in caplog.text


@pytest.mark.parametrize("limit", [1, 12])
def test_record_without_supervised_token_within_the_limit(tokenizer, image_root, limit):
    dataset = build([record("<image>", "yes", images=["a.png"], name="huge")], tokenizer, image_root, max_length=limit)
    for attempt in (lambda: dataset[0], lambda: dataset.lengths):
        with pytest.raises(RecordError, match=f"'huge': none of its first {limit} tokens .* is supervised"):
            attempt()


def test_faults_in_texts_name_the_record(tokenizer, image_root):
    with pytest.raises(RecordError, match="'mute'"):
        _ = build([record("no answer", name="mute")], tokenizer, image_root).lengths
    with pytest.raises(RecordError, match="'film'.*only images"):
        build([record("watch", "ok", name="film", videos=["v.mp4"])], tokenizer, image_root)[0]
    with pytest.raises(RecordError, match="'odd'"):
        build([record("<image>", "ok", name="odd")], tokenizer, image_root)
    with pytest.raises(ValueError, match="on_bad_image"):
        build([], tokenizer, image_root, on_bad_image="ignore")


@pytest.mark.parametrize(("name", "error"), [("broken.png", ValueError), ("gone.png", FileNotFoundError)])
def test_bad_image_is_an_error_that_names_file_and_record(tokenizer, image_root, name, error):
    dataset = build([record("<image>", "yes", images=[name], name="bad")], tokenizer, image_root)
    with pytest.raises(error, match=f"'bad'.*{name}.*on_bad_image=skip"):
        dataset[0]


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
        assert torch.cat([batch["image_counts"] for batch in batches]).tolist() == [int(i not in bad) for i in range(8)]
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
    assert copy.lengths == dataset.lengths
    for ours, theirs in zip(copy, dataset, strict=True):
        assert ours["input_ids"] == theirs["input_ids"]
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_skips_are_shared_with_processes_that_are_sent_a_copy(tokenizer, image_root):
    dataset = build(rows(4, {2}), tokenizer, image_root, on_bad_image="skip")
    sent = pickle.loads(ForkingPickler.dumps(dataset))  # as a data loader with spawned workers does
    assert sent[2]["pixel_values"] is None
    assert dataset.skipped == ["r2"]
