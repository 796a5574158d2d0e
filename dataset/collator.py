"""Samples -> a batch, padded or packed."""

import torch
from torch import Tensor

from dataset.template import IGNORE_INDEX


class Collator:
    """Pads samples to the longest of the batch.

    Returns a dict of tensors:
        input_ids       [B, T] int64, `pad_token_id` where there is no token
        attention_mask  [B, T] int64, 1 for tokens, 0 for padding
        labels          [B, T] int64, -100 for padding and whatever is not supervised
        view_counts     [B]    int64, views (images, tiles, frames) of each sample
        pixel_values    [N, 3, H, W] float32, the N = sum(view_counts) views, those of row 0 first; or, of samples that
                        have them instead,
        vision          [N, n, D], what the encoder made of these views
        view_features   [N]    int64, features (= placeholder tokens) of each view

    The last of these are absent where N = 0.

    Packed, the samples follow each other in one row: ids and labels are `[1, T]`, T the sum of their lengths; there is
    no `attention_mask`, but

        sample_lengths  list of int, tokens of each sample

    and the first label of each sample is -100, since nothing in the row predicts it.

    Args:
        padding_side: "right" for training; "left" puts the ends of all rows at T - 1, as generation needs.
        pad_to_multiple_of: T is rounded up to a multiple of this.
        packing: one row without padding, see above; the two arguments before it then have no effect.
    """

    def __init__(
        self,
        pad_token_id: int,
        padding_side: str = "right",
        pad_to_multiple_of: int | None = None,
        packing: bool = False,
    ):
        if not isinstance(pad_token_id, int):
            raise ValueError(f"pad_token_id must be an integer, got {pad_token_id!r}")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
        self.pad_token_id, self.padding_side = pad_token_id, padding_side
        self.pad_to_multiple_of = pad_to_multiple_of or 1
        self.packing = packing

    def __call__(self, samples: list[dict]) -> dict[str, Tensor | list[int]]:
        batch = self._packed(samples) if self.packing else self._padded(samples)
        name = "vision" if any("vision" in sample for sample in samples) else "pixel_values"
        views = [sample.get(name) for sample in samples]
        batch["view_counts"] = torch.tensor([0 if one is None else len(one) for one in views])
        if any(one is not None for one in views):
            batch[name] = torch.cat([one for one in views if one is not None])
            batch["view_features"] = torch.tensor([count for sample in samples for count in sample["view_features"]])
        return batch

    def _packed(self, samples: list[dict]) -> dict[str, Tensor | list[int]]:
        ids, labels = [], []
        for sample in samples:
            ids += sample["input_ids"]
            labels += [IGNORE_INDEX, *sample["labels"][1:]]
        lengths = [len(sample["input_ids"]) for sample in samples]
        return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]), "sample_lengths": lengths}

    def _padded(self, samples: list[dict]) -> dict[str, Tensor]:
        longest = max(len(sample["input_ids"]) for sample in samples)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        return {
            "input_ids": self._pad([sample["input_ids"] for sample in samples], length, self.pad_token_id),
            "attention_mask": self._pad([[1] * len(sample["input_ids"]) for sample in samples], length, 0),
            "labels": self._pad([sample["labels"] for sample in samples], length, IGNORE_INDEX),
        }

    def _pad(self, rows: list[list[int]], length: int, value: int) -> Tensor:
        """[B, T]"""
        if self.padding_side == "left":
            return torch.tensor([[value] * (length - len(row)) + row for row in rows])
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])
