"""Records -> samples, one at a time: text encoded, images and clips opened and preprocessed."""

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from dataset.feature_cache import FeatureCache, StaleFeatures
from dataset.record import RecordError, Records, to_table
from dataset.shards import open_medium
from dataset.template import IGNORE_INDEX, encode_record, media_of
from visual.media import Media

logger = logging.getLogger(__name__)


class Medium(NamedTuple):
    """An image or a clip of a record."""

    kind: str  # "image" or "video"
    path: Path | BinaryIO  # or the file, where it lies in a shard
    features: list[int]  # of each of its views, as the file's header promises
    name: str  # as the record has it


class BadMedium(Exception):
    """A file of a record can't be read."""


class RecordDataset(Dataset):
    """Map-style data set: index -> sample.

        input_ids     [T] list of int
        labels        [T] list of int, -100 for whatever is not supervised
        pixel_values  [V, 3, H, W] float32, views of images and clips in the order of their placeholders; None if V = 0
        view_features [V] list of int: features of each view, which together are the placeholders in `input_ids`

    With a feature cache there is, in place of `pixel_values`,

        vision        [V, n, D] what the encoder made of these views, one medium's straight from the memory map

    A sample of more than `max_length` tokens is cut there, and on back to the last supervised token that it then
    holds: nothing is ever cut inside an image or a clip, and media whose placeholders are gone are not decoded.

    With `on_bad_image="skip"` a record with an image or a video that can't be read yields an empty sample in its
    place, and with `on_bad_record="skip"` one that is not valid or has nothing to learn within `max_length`: one
    padding token, no label, no view. So the order of all other samples, and the size of every batch, are as they would
    have been, no sample is used twice, and the loss, which counts supervised tokens, does not notice it.
    `skipped` tells which records that befell; each is also logged as a warning.

    Args:
        records: `dataset.record.Records`, which decodes one at each access, or a list of records.
        tokenizer: see `dataset.template`; has `pad_token_id` besides.
        media: `visual.media.Media`, which opens images and clips and knows beforehand how many features they have.
        image_root: folder that the media paths of the records are relative to.
        max_length: longest sample in tokens, placeholders included; None for no limit.
        system: text of a system turn before records that have none; None or "" for none.
        on_bad_image: "error" or "skip"; for videos as for images.
        on_bad_record: "error" or "skip".
        feature_cache: precomputed features, for which no image and no video is decoded.
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
        on_bad_record: str = "error",
        feature_cache: FeatureCache | None = None,
    ):
        for name, choice in (("on_bad_image", on_bad_image), ("on_bad_record", on_bad_record)):
            if choice not in ("error", "skip"):
                raise ValueError(f"{name} must be 'error' or 'skip', got {choice!r}")
        self.records = records if isinstance(records, Records) else Records(to_table(records))
        self.tokenizer, self.media = tokenizer, media
        self.image_root, self.max_length = Path(image_root), max_length
        self.system, self.on_bad_image, self.on_bad_record = system, on_bad_image, on_bad_record
        self.feature_cache = feature_cache
        # One flag per record in shared memory: what worker processes skip is seen here, and seen once.
        self._skipped = torch.zeros(len(records), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
            RecordError: with `on_bad_record="error"`, a record that can't be encoded or has no supervised token within
                `max_length`.
            FileNotFoundError, ValueError: with `on_bad_image="error"`, an image or a video that can't be read; names
                both file and record.
            StaleFeatures: an image or a video that the feature cache lacks, or whose file has changed since.
        """
        try:
            record = self.records[index]
            media = self.open_media(record)
            sample = self.cut(record, self.encode(record, media))
            return {**sample, **self.views(media, sample["input_ids"])}
        except (BadMedium, RecordError) as error:
            return self._skip(index, error)

    @property
    def sources(self) -> tuple[list[str], np.ndarray]:
        """Names of the sources, and [N] the number of each sample's."""
        return self.records.sources()

    @property
    def has_media(self) -> np.ndarray:
        """[N] bool: whether a record has images or videos, or is text alone."""
        return (self.records.media_counts("images") + self.records.media_counts("videos")) > 0

    @cached_property
    def lengths(self) -> "Lengths":
        """Tokens of each sample, placeholders included; measured when asked for."""
        return Lengths(self)

    def _length(self, index: int) -> tuple[int, bool]:
        """Tokens of a sample, and whether it was cut. No image and no video is decoded.

        Headers of media files are read where the number of their features depends on them.
        """
        try:
            record = self.records[index]
            whole = self.encode(record, self.open_media(record))
            length = len(self.cut(record, whole)["input_ids"])
        except (BadMedium, RecordError) as error:
            return len(self._skip(index, error)["input_ids"]), False
        return length, length < len(whole["input_ids"])

    def open_media(self, record: dict) -> list[Medium]:
        """Images and clips in the order in which their placeholders stand in the text."""
        if record["audios"]:
            problem = "audios can't be encoded; only images and videos can"
            raise RecordError.of(record["id"], "media", problem)
        if record["videos"]:
            _ = self.media.frame_features  # what it raises is no fault of this record, and not to be skipped
        media = []
        for kind, name in media_of(record):
            path = open_medium(self.image_root, name)
            try:
                media.append(Medium(kind, path, list(self.media.features(kind, path)), name))
            except (OSError, ValueError) as error:
                raise BadMedium from error
        return media

    def encode(self, record: dict, media: list[Medium]) -> dict[str, list[int]]:
        return encode_record(record, self.tokenizer, [sum(medium.features) for medium in media], self.system)

    def cut(self, record: dict, sample: dict[str, list[int]]) -> dict[str, list[int]]:
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
        return [self.records.id_at(index) for index in self._skipped.nonzero().flatten().tolist()]

    def views(self, media: list[Medium], input_ids: list[int]) -> dict:
        """`pixel_values`, or `vision`, and `view_features` of the media whose placeholders are in `input_ids`."""
        placeholders = input_ids.count(self.tokenizer.placeholder_id)
        if placeholders and self.feature_cache is None:
            _ = self.media.preprocess  # same
        tensors, features = [], []
        for medium in media:
            if sum(features) == placeholders:
                break
            try:
                tensor = self.load(medium)
            except StaleFeatures:
                raise
            except (OSError, ValueError) as error:
                raise BadMedium from error
            tensors.append(tensor)
            features += medium.features
        name = "pixel_values" if self.feature_cache is None else "vision"
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors) if tensors else None
        return {name: whole, "view_features": features}

    def load(self, medium: Medium) -> torch.Tensor:
        """Pixels `[V, 3, H, W]` of a medium's views, or what the encoder made of them, `[V, n, D]`.

        Raises:
            StaleFeatures: the cache doesn't know the medium as it is now.
            FileNotFoundError, ValueError: it can't be read.
        """
        if self.feature_cache is None:
            tensor, features = self.media.load(medium.kind, medium.path)
            is_same = list(features) == medium.features
        else:
            tensor = self.feature_cache.load(medium.kind, medium.name, self.image_root)
            is_same = len(tensor) == len(medium.features)
        if not is_same:
            raise ValueError(f"{medium.name} changed while it was read")
        return tensor

    def _skip(self, index: int, error: BadMedium | RecordError) -> dict:
        """The empty sample that stands for a bad record or one with a bad file, or the error that names it."""
        if isinstance(error, RecordError):
            if self.on_bad_record == "error":
                problem = f"{error} (data.on_bad_record=skip leaves such records out)"
                raise RecordError(problem, error.reason) from error
            problem = str(error)
        else:
            cause = error.__cause__
            problem = f"record {self.records.id_at(index)!r}: {cause}"
            if self.on_bad_image == "error":
                kind = FileNotFoundError if isinstance(cause, FileNotFoundError) else ValueError
                raise kind(f"{problem} (data.on_bad_image=skip leaves such records out)") from cause
        if not self._skipped[index]:
            logger.warning("skipped: %s", problem)
        self._skipped[index] = True
        return {
            "input_ids": [self.tokenizer.pad_token_id],
            "labels": [IGNORE_INDEX],
            "pixel_values": None,
            "view_features": [],
        }


class Lengths(Sequence):
    """Lengths of the samples of a data set, in tokens `[N]`. Each is measured once, when it is asked for.

    Measuring encodes the record, and so finds whatever `RecordDataset` would refuse for its text.
    """

    def __init__(self, dataset: RecordDataset):
        self._dataset = dataset
        self._known = np.full(len(dataset), -1, np.int32)
        self._warned = False

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, index: int) -> int:
        """Raises `RecordError` as `RecordDataset.__getitem__` does."""
        if self._known[index] < 0:
            self._known[index], cut = self._dataset._length(index)
            if cut and not self._warned:
                self._warned = True
                record, most = self._dataset.records[index]["id"], self._dataset.max_length
                logger.warning("record %r is longer than max_length=%d and was cut; others may follow", record, most)
        return int(self._known[index])

    def measure(self, indices: Sequence[int] | None = None) -> None:
        """Those of the samples at `indices`, or all, at once, with a bar that shows how far it is.

        Raises:
            RecordError: as `RecordDataset.__getitem__` does, and if all of them are skipped.
        """
        indices = range(len(self)) if indices is None else indices
        cut = 0
        for index in tqdm(indices, desc="Measuring samples", unit=" records", disable=None, leave=False):
            self._known[index], was_cut = self._dataset._length(index)
            cut += was_cut
        if len(indices) and self._dataset._skipped[indices].all():
            raise RecordError("no record can be used: all of them were skipped, for the reasons above")
        if cut:
            self._warned = True
            most = self._dataset.max_length
            logger.warning("%d of %d records are longer than max_length=%d and were cut", cut, len(indices), most)
