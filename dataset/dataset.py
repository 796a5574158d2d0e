"""Records -> samples, one at a time: text encoded, images opened and preprocessed."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from dataset.record import RecordError, Records, validate_record
from dataset.template import IGNORE_INDEX, encode_record
from visual.image import load_image

logger = logging.getLogger(__name__)


class RecordDataset(Dataset):
    """Map-style data set: index -> {"input_ids": [T] list, "labels": [T] list, "pixel_values": [k, 3, H, W] or None}.

    A conversation of more than `max_length` tokens is cut there, and on back to the end of the last answer that it
    then holds: nothing is ever cut inside an image, and images whose placeholders are gone are not opened.

    With `on_bad_image="skip"` a record with an image that can't be read yields an empty sample in its place: one
    padding token, no label, no image. So the order of all other samples, and the size of every batch, are as they
    would have been, no sample is used twice, and the loss, which counts supervised tokens, does not notice it.
    `skipped` tells which records that befell; each is also logged as a warning.

    Args:
        records: `dataset.record.Records`, which decodes one at each access, or a list of records.
        tokenizer: has `encode_plain`, `im_start_id`, `im_end_id`, `placeholder_id` and `pad_token_id`.
        preprocess: list of PIL images -> pixel_values [N, 3, H, W].
        num_features: feature vectors that the encoder makes of an image = placeholders per image.
        image_root: folder that the image paths of the records are relative to.
        max_length: longest sample in tokens, image placeholders included; None for no limit.
        system: text of a system turn before records that have none; None or "" for none.
        on_bad_image: "error" or "skip".
    """

    def __init__(
        self,
        records: Sequence[dict],
        tokenizer,
        preprocess: Callable[[list[Image.Image]], Tensor],
        num_features: int,
        image_root: str | os.PathLike,
        max_length: int | None = None,
        system: str | None = None,
        on_bad_image: str = "error",
    ):
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image must be 'error' or 'skip', got {on_bad_image!r}")
        self.records = records if isinstance(records, Records) else [validate_record(record) for record in records]
        self.tokenizer, self.preprocess = tokenizer, preprocess
        self.num_features, self.image_root, self.max_length = num_features, Path(image_root), max_length
        self.system, self.on_bad_image = system, on_bad_image
        # One flag per record in shared memory: what worker processes skip is seen here, and seen once.
        self._skipped = torch.zeros(len(records), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
            RecordError: a record that can't be encoded or has no supervised token within `max_length`.
            FileNotFoundError, ValueError: with `on_bad_image="error"`, an image that can't be read; names both image
                and record.
        """
        record = self.records[index]
        sample = self._cut(record, self._encode(record))
        try:
            return {**sample, "pixel_values": self._pixel_values(record, sample["input_ids"])}
        except (OSError, ValueError) as error:
            if self.on_bad_image == "error":
                kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
                hint = "data.on_bad_image=skip leaves such records out"
                raise kind(f"record {record['id']!r}: {error} ({hint})") from error
            if not self._skipped[index]:
                logger.warning("skipped record %r: %s", record["id"], error)
            self._skipped[index] = True
            return {"input_ids": [self.tokenizer.pad_token_id], "labels": [IGNORE_INDEX], "pixel_values": None}

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sample, image placeholders included. Reads all texts once and opens no image.

        Since every record is encoded, this also finds all records that `__getitem__` would refuse for their text.
        """
        lengths, too_long = [], 0
        for record in tqdm(self.records, desc="Measuring samples", unit=" records", disable=None, leave=False):
            whole = self._encode(record)
            lengths.append(len(self._cut(record, whole)["input_ids"]))
            too_long += len(whole["input_ids"]) > lengths[-1]
        if too_long:
            shares = f"{too_long} of {len(lengths)} records"
            logger.warning("%s are longer than max_length=%d and were cut", shares, self.max_length)
        return lengths

    def _encode(self, record: dict) -> dict[str, list[int]]:
        if record.get("videos") or record.get("audios"):
            raise RecordError.of(record["id"], "media", "videos and audios can't be encoded; only images can")
        return encode_record(record, self.tokenizer, self.num_features, self.system)

    def _cut(self, record: dict, sample: dict[str, list[int]]) -> dict[str, list[int]]:
        """The sample, ended by its last supervised token within `max_length` if it is longer than that."""
        length = len(sample["input_ids"])
        if self.max_length is None or length <= self.max_length:
            return sample
        end = self.max_length
        while end > 0 and sample["labels"][end - 1] == IGNORE_INDEX:
            end -= 1
        if end == 0:
            problem = f"none of its first {self.max_length} tokens (of {length}) is supervised"
            raise RecordError.of(record["id"], "too long", f"{problem}; raise data.max_length or drop the record")
        return {name: values[:end] for name, values in sample.items()}

    @property
    def skipped(self) -> list[str]:
        """Ids of the records skipped so far, by this process and by the workers of its data loaders."""
        return [self.records[index]["id"] for index in self._skipped.nonzero().flatten().tolist()]

    def _pixel_values(self, record: dict, input_ids: list[int]) -> Tensor | None:
        """[k, 3, H, W] of the images whose placeholders are in `input_ids`."""
        count = input_ids.count(self.tokenizer.placeholder_id) // self.num_features
        if count == 0:
            return None
        return self.preprocess([load_image(self.image_root / path) for path in record["images"][:count]])
