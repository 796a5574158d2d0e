import json

import pytest
import torch
from safetensors.torch import load_file
from samples import GOLDEN

from dataset.collator import Collator

PAD = 99


def sample(length: int, views: int, value: float = 0.0, features: int = 1) -> dict:
    pixels = torch.full((views, 3, 2, 2), value) if views else None
    labels = [-100] * (length - 1) + [length]
    ids = list(range(1, length + 1))
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "view_features": [features] * views}


@pytest.mark.parametrize(("side", "multiple", "width"), [("right", None, 5), ("left", None, 5), ("left", 4, 8)])
def test_padding(side, multiple, width):
    batch = Collator(PAD, side, multiple)([sample(3, 0), sample(5, 0)])
    fill = {"input_ids": PAD, "labels": -100, "attention_mask": 0}
    for row, length in enumerate((3, 5)):
        span = slice(0, length) if side == "right" else slice(width - length, width)
        expected = {**sample(length, 0), "attention_mask": [1] * length}
        for name, value in fill.items():
            assert batch[name].shape == (2, width) and batch[name].dtype == torch.int64
            assert batch[name][row, span].tolist() == expected[name]
            rest = torch.ones(width, dtype=torch.bool)
            rest[span] = False
            assert (batch[name][row, rest] == value).all()


def test_views_are_concatenated_row_by_row():
    batch = Collator(PAD)([sample(2, 2, 1.0, 7), sample(2, 0), sample(2, 3, 3.0, 5)])
    assert batch["view_counts"].tolist() == [2, 0, 3] and batch["view_counts"].dtype == torch.int64
    assert batch["view_features"].tolist() == [7, 7, 5, 5, 5] and batch["view_features"].dtype == torch.int64
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1.0, 1.0, 3.0, 3.0, 3.0]


def test_batch_without_views_has_no_pixel_values():
    batch = Collator(PAD)([sample(2, 0), sample(3, 0)])
    assert batch["view_counts"].tolist() == [0, 0]
    assert set(batch) == {"input_ids", "attention_mask", "labels", "view_counts"}


def test_vision_takes_the_place_of_pixel_values():
    def seen(length: int, views: int, value: float) -> dict:
        vision = torch.full((views, 5, 3), value, dtype=torch.bfloat16) if views else None
        return {key: value for key, value in sample(length, views, features=5).items() if key != "pixel_values"} | {
            "vision": vision
        }

    skipped = sample(1, 0)  # has `pixel_values`, which is None
    batch = Collator(PAD)([seen(2, 2, 1.0), seen(2, 0, 0.0), skipped, seen(2, 1, 3.0)])
    assert "pixel_values" not in batch and batch["view_counts"].tolist() == [2, 0, 0, 1]
    assert batch["vision"].shape == (3, 5, 3) and batch["vision"].dtype == torch.bfloat16
    assert batch["vision"][:, 0, 0].tolist() == [1.0, 1.0, 3.0] and batch["view_features"].tolist() == [5, 5, 5]
    assert "vision" not in Collator(PAD)([seen(2, 0, 0.0), skipped])


def test_packed_samples_follow_each_other():
    samples = [
        {"input_ids": [1, 2, 3], "labels": [1, -100, 3], "pixel_values": None, "view_features": []},
        {"input_ids": [4, 5], "labels": [4, 5], "pixel_values": torch.ones(1, 3, 2, 2), "view_features": [2]},
    ]
    batch = Collator(0, packing=True)(samples)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[-100, -100, 3, -100, 5]]
    assert batch["sample_lengths"] == [3, 2] and batch["view_counts"].tolist() == [0, 1]
    assert "attention_mask" not in batch and batch["pixel_values"].shape == (1, 3, 2, 2)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="padding_side"):
        Collator(PAD, "both")
    with pytest.raises(ValueError, match="pad_token_id"):
        Collator(None)


@pytest.mark.parametrize(("case", "n"), [("f_siglip", 15), ("f_clip", 16)])
def test_golden_batches(case, n):
    """Rows of golden case f, expanded and with their end token, give its labels, and its ids where n stand for one."""
    folder = GOLDEN / case
    facts = json.loads((folder / "facts.json").read_text())
    io, eod, placeholder = load_file(folder / "io.safetensors"), facts["eod_id"], facts["placeholder_id"]
    samples = []
    for row in facts["collate_example_inputs"]:
        at = row["tokens"].index(placeholder)
        ids = [*row["tokens"][:at], *[placeholder] * n, *row["tokens"][at + 1 :], eod]
        answer = row["answer_len"] + 1
        samples.append({
            "input_ids": ids,
            "labels": [-100] * (len(ids) - answer) + ids[-answer:],
            "pixel_values": torch.zeros(1, 3, 2, 2),
            "view_features": [n],
        })  # fmt: skip
    batch = Collator(eod)(samples)
    assert torch.equal(batch["labels"], io["labels"])
    for ids, golden in zip(batch["input_ids"].tolist(), io["input_ids"].tolist(), strict=True):
        at = golden.index(placeholder)
        assert ids[:at] + [placeholder] + ids[at + n :] == golden
