"""Records -> samples, one at a time: text encoded, images and clips opened and preprocessed."""

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from dataset.record import RecordError, Records, validate_record
from dataset.template import IGNORE_INDEX, encode_record, media_of
from visual.media import Media

logger = logging.getLogger(__name__)


class Medium(NamedTuple):
    """An image or a clip of a record."""

    kind: str  # "image" or "video"
    path: Path
    features: list[int]  # of each of its views, as the file's header promises


class BadMedium(Exception):
    """A file of a record can't be read."""


class RecordDataset(Dataset):
    """Map-style data set: index -> sample.

        input_ids     [T] list of int
        labels        [T] list of int, -100 for whatever is not supervised
        pixel_values  [V, 3, H, W] float32, views of images and clips in the order of their placeholders; None if V = 0
        view_features [V] list of int: features of each view, which together are the placeholders in `input_ids`

    A sample of more than `max_length` tokens is cut there, and on back to the last supervised token that it then
    holds: nothing is ever cut inside an image or a clip, and media whose placeholders are gone are not decoded.

    With `on_bad_image="skip"` a record with an image or a video that can't be read yields an empty sample in its place:
    one padding token, no label, no view. So the order of all other samples, and the size of every batch, are as they
    would have been, no sample is used twice, and the loss, which counts supervised tokens, does not notice it.
    `skipped` tells which records that befell; each is also logged as a warning.

    Args:
        records: `dataset.record.Records`, which decodes one at each access, or a list of records.
        tokenizer: see `dataset.template`; has `pad_token_id` besides.
        media: `visual.media.Media`, which opens images and clips and knows beforehand how many features they have.
        image_root: folder that the media paths of the records are relative to.
        max_length: longest sample in tokens, placeholders included; None for no limit.
        system: text of a system turn before records that have none; None or "" for none.
        on_bad_image: "error" or "skip"; for videos as for images.
    """

    def __init__(
        self,
        records: Sequence[dict],
        tokenizer,
        media: Media,
        image_root: str | os.PathLike,
        max_length: int | None = None,
        system: str | None = None,
        on_bad_image: str = "error",
    ):
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"on_bad_image must be 'error' or 'skip', got {on_bad_image!r}")
        self.records = records if isinstance(records, Records) else [validate_record(record) for record in records]
        self.tokenizer, self.media = tokenizer, media
        self.image_root, self.max_length = Path(image_root), max_length
        self.system, self.on_bad_image = system, on_bad_image
        # One flag per record in shared memory: what worker processes skip is seen here, and seen once.
        self._skipped = torch.zeros(len(records), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
            RecordError: a record that can't be encoded or has no supervised token within `max_length`.
            FileNotFoundError, ValueError: with `on_bad_image="error"`, an image or a video that can't be read; names
                both file and record.
        """
        record = self.records[index]
        try:
            media = self._media(record)
            sample = self._cut(record, self._encode(record, media))
            return {**sample, **self._views(media, sample["input_ids"])}
        except BadMedium as error:
            return self._skip(index, record, error.__cause__)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sample, placeholders included. Reads all texts once and decodes no image and no video.

        Headers of media files are read where the number of their features depends on them. Since every record is
        encoded, this also finds all records that `__getitem__` would refuse for their text.
        """
        lengths, too_long = [], 0
        progress = tqdm(self.records, desc="Measuring samples", unit=" records", disable=None, leave=False)
        for index, record in enumerate(progress):
            try:
                whole = self._encode(record, self._media(record))
            except BadMedium as error:
                lengths.append(len(self._skip(index, record, error.__cause__)["input_ids"]))
                continue
            lengths.append(len(self._cut(record, whole)["input_ids"]))
            too_long += len(whole["input_ids"]) > lengths[-1]
        if too_long:
            shares = f"{too_long} of {len(lengths)} records"
            logger.warning("%s are longer than max_length=%d and were cut", shares, self.max_length)
        return lengths

    def _media(self, record: dict) -> list[Medium]:
        """Images and clips in the order in which their placeholders stand in the text."""
        if record["audios"]:
            problem = "audios can't be encoded; only images and videos can"
            raise RecordError.of(record["id"], "media", problem)
        if record["videos"]:
            _ = self.media.frame_features  # what it raises is no fault of this record, and not to be skipped
        count_features = {"image": self.media.image_features, "video": self.media.video_features}
        media = []
        for kind, name in media_of(record):
            path = self.image_root / name
            try:
                media.append(Medium(kind, path, list(count_features[kind](path))))
            except (OSError, ValueError) as error:
                raise BadMedium from error
        return media

    def _encode(self, record: dict, media: list[Medium]) -> dict[str, list[int]]:
        return encode_record(record, self.tokenizer, [sum(medium.features) for medium in media], self.system)

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

    def _views(self, media: list[Medium], input_ids: list[int]) -> dict:
        """`pixel_values` and `view_features` of the media whose placeholders are in `input_ids`."""
        placeholders = input_ids.count(self.tokenizer.placeholder_id)
        if placeholders:
            _ = self.media.preprocess  # same
        load = {"image": self.media.load_image, "video": self.media.load_video}
        pixels, features = [], []
        for medium in media:
            if sum(features) == placeholders:
                break
            try:
                views = load[medium.kind](medium.path)
                if list(views.features) != medium.features:
                    raise ValueError(f"{medium.path} changed while it was read")
            except (OSError, ValueError) as error:
                raise BadMedium from error
            pixels.append(views.pixel_values)
            features += views.features
        return {"pixel_values": torch.cat(pixels) if pixels else None, "view_features": features}

    def _skip(self, index: int, record: dict, error: Exception) -> dict:
        """The empty sample that stands for a record with a bad file, or the error that names both."""
        if self.on_bad_image == "error":
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            hint = "data.on_bad_image=skip leaves such records out"
            raise kind(f"record {record['id']!r}: {error} ({hint})") from error
        if not self._skipped[index]:
            logger.warning("skipped record %r: %s", record["id"], error)
        self._skipped[index] = True
        return {
            "input_ids": [self.tokenizer.pad_token_id],
            "labels": [IGNORE_INDEX],
            "pixel_values": None,
            "view_features": [],
        }
