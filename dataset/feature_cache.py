"""Precomputed features of a frozen encoder on disk: a folder that `cache_features.py` fills and training reads.

    key.json            what the features depend on (dataset.feature_key), their shape [n, D] and dtype
    part-00000.bin      [views, n, D], nothing else; read through a memory map, whose pages all processes share
    part-00000.arrow    for each medium of the part, in the columns of `INDEX`: its name, size and time, and where its
                        views lie; Arrow IPC, memory-mapped as well

A part is complete when its `.arrow` is there, which is written last. Of a medium that stands in several parts, as its
file was changed meanwhile, the newest part counts.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from dataset.feature_key import key_differences
from dataset.shards import LOCATION, open_medium

FORMAT = 1
ENDS = 1 << 14  # bytes at either end of a medium by which it is told from another
CHECKED = 10_000  # files that are looked at beforehand
KEY_FILE = "key.json"
INDEX = pa.schema({
    "hash": pa.uint64(),  # of `medium`, by which it is found
    "medium": pa.string(),  # kind:name, with the name as records have it
    "size": pa.int64(),  # bytes of its file, or of the shard that it lies in; -1: there was none
    "mtime_ns": pa.int64(),  # when that file was last changed
    "ends": pa.uint64(),  # digest of its first and last bytes: another file may have equal name, size and time
    "first": pa.int64(),  # number of its first view in the part
    "views": pa.int32(),
    "problem": pa.string(),  # why it can't be read; such a medium has no views
})  # fmt: skip
MAKE = "python cache_features.py --config <the configuration of the training>"


class StaleFeatures(ValueError):
    """A medium is not in the cache, or its file has changed since: not to be skipped as a bad one is."""


class FileState(NamedTuple):
    """By which a changed file is recognised."""

    size: int
    mtime_ns: int


class Entry(NamedTuple):
    """A medium in the cache."""

    part: int
    first: int
    views: int
    state: FileState
    ends: int
    problem: str | None


def medium_id(kind: str, name: str) -> str:
    """By which a medium is found. An animation may be used both as image and as clip, with other views."""
    return f"{kind}:{name}"


def kind_and_name(medium: str) -> tuple[str, str]:
    """The opposite of `medium_id`."""
    kind, _, name = medium.partition(":")
    return kind, name


def media_ids(table: pa.Table) -> pa.StringArray:
    """`medium_id` of each medium in a table of records, once."""
    columns = [
        pc.binary_join_element_wise(f"{kind}:", pc.unique(pc.list_flatten(table[column])).drop_null(), "")
        for kind, column in (("image", "images"), ("video", "videos"))
    ]
    return pa.concat_arrays([pa.array([], pa.string()), *columns])


def file_state(root: str | os.PathLike, name: str) -> FileState:
    """State of the file that holds a medium; of the shard, where it lies in one. (-1, -1): there is none."""
    path = os.path.join(root, name)
    shard = LOCATION.fullmatch(path)
    try:
        stat = os.stat(shard[1] if shard else path)
    except (FileNotFoundError, NotADirectoryError):
        return FileState(-1, -1)
    return FileState(stat.st_size, stat.st_mtime_ns)


def digest_of_ends(root: str | os.PathLike, name: str) -> int:
    """Of the first and the last `ENDS` bytes of a medium; 0 for a file that can't be read."""
    try:
        medium = open_medium(root, name)
        with open(medium, "rb") if isinstance(medium, Path) else medium as file:
            first = file.read(ENDS)
            file.seek(max(file.seek(0, os.SEEK_END) - ENDS, 0))
            return digest_64(first + file.read(ENDS))
    except (OSError, ValueError):
        return 0


class FeatureCache:
    """Reads a cache. It can be pickled; the copy opens the files anew.

    Args:
        folder: of the cache.
        key: `dataset.feature_key.feature_key` of the encoder whose features are wanted.

    Raises:
        FileNotFoundError: no cache in `folder`.
        ValueError: it is of another encoder or other settings (lists them), of another format, or damaged.

    Attributes:
        shape: (n, D) of a view's features.
        dtype: of the features.
    """

    def __init__(self, folder: str | os.PathLike, key: Mapping[str, Any]):
        self.folder, self.key = Path(folder), key
        self._open()

    def _open(self) -> None:
        self.shape, self.dtype = read_key(self.folder, self.key)
        self.files = sorted(self.folder.glob("part-*.arrow"))
        self._indices = [_read_index(file, self.view_bytes) for file in self.files]
        self._maps: dict[int, Tensor] = {}
        self._starts = np.cumsum([0, *(index.num_rows for index in self._indices)])
        hashes = [index["hash"].to_numpy() for index in self._indices]
        hashes = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
        self._order = np.argsort(hashes, kind="stable").astype(np.int32)
        self._hashes = hashes[self._order]

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "key": self.key}

    def __setstate__(self, state: dict) -> None:
        self.folder, self.key = state["folder"], state["key"]
        self._open()

    def __len__(self) -> int:
        """Media in all parts."""
        return len(self._order)

    @property
    def view_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def lookup(self, medium: str) -> Entry | None:
        """What is known of a `medium_id`; no file is looked at."""
        wanted = np.uint64(medium_hash(medium))
        place = int(np.searchsorted(self._hashes, wanted, side="right")) - 1
        while place >= 0 and self._hashes[place] == wanted:  # from the newest part on
            part = int(np.searchsorted(self._starts, self._order[place], side="right")) - 1
            row = self._indices[part].slice(int(self._order[place] - self._starts[part]), 1).to_pylist()[0]
            if row["medium"] == medium:
                state = FileState(row["size"], row["mtime_ns"])
                return Entry(part, row["first"], row["views"], state, row["ends"], row["problem"])
            place -= 1
        return None

    def find(self, kind: str, name: str, root: str | os.PathLike) -> Entry:
        """The entry of a medium whose file is still what it was.

        Raises:
            StaleFeatures: it isn't in the cache, or its file was changed.
            FileNotFoundError: there is no such file.
            ValueError: the file can't be read, as was found when its features were to be computed.
        """
        entry, path = self.lookup(medium_id(kind, name)), os.path.join(root, name)
        if entry is None:
            raise StaleFeatures(f"the {kind} {path} is not in the feature cache {self.folder}; add it: {MAKE}")
        state = file_state(root, name)
        if state.size < 0:
            raise FileNotFoundError(f"no {kind} file {path}")
        if state != entry.state:
            raise StaleFeatures(
                f"{path} has changed since its features were computed ({self.folder}); compute them again: {MAKE}, or "
                "restore the file with its time of change (cp -p, rsync -a)"
            )
        if entry.problem is not None:
            raise ValueError(entry.problem)
        return entry

    def read(self, entry: Entry) -> Tensor:
        """Features `[V, n, D]` of a medium's views: a view of the memory map; writing to it never reaches the file."""
        if entry.part not in self._maps:
            views = os.path.getsize(features_file(self.files[entry.part])) // self.view_bytes
            path = str(features_file(self.files[entry.part]))
            flat = torch.from_file(path, shared=False, size=views * prod(self.shape), dtype=self.dtype)
            self._maps[entry.part] = flat.view(views, *self.shape)
        return self._maps[entry.part][entry.first : entry.first + entry.views]

    def load(self, kind: str, name: str, root: str | os.PathLike) -> Tensor:
        """Features `[V, n, D]` of the views of a medium; raises what `find` raises."""
        return self.read(self.find(kind, name, root))

    def check(self, media: pa.Array | pa.ChunkedArray, root: str | os.PathLike) -> None:
        """Raises `StaleFeatures` unless all of these `medium_id`s are in the cache and their files are unchanged.

        Of more than `CHECKED` files as many are looked at, evenly over all: a copy without times is found at once, a
        single file that was changed when it is read.
        """
        known = pa.chunked_array([index["medium"] for index in self._indices], pa.string())
        absent = media.filter(pc.invert(pc.is_in(media, value_set=known)))
        if len(absent):
            raise StaleFeatures(
                f"{len(absent):,} of {len(media):,} media of the records are not in the feature cache {self.folder}, "
                f"the first is the {' '.join(kind_and_name(absent[0].as_py()))}; add them: {MAKE}"
            )
        for index in range(0, len(media), -(-len(media) // CHECKED) or 1):
            kind, name = kind_and_name(media[index].as_py())
            try:
                is_same = self.find(kind, name, root).ends == digest_of_ends(root, name)
            except StaleFeatures:
                raise
            except (OSError, ValueError):  # a bad medium, which may be skipped when it is read
                continue
            if not is_same:
                raise StaleFeatures(f"{os.path.join(root, name)} is another file than the one in the feature cache "
                                    f"{self.folder}; compute its features: {MAKE}")  # fmt: skip


ANOTHER = "choose another folder (data.feature_cache), or remove this one"


def features_file(index: Path) -> Path:
    return index.with_suffix(".bin")


def medium_hash(medium: str) -> int:
    return digest_64(medium.encode())


def digest_64(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def read_key(folder: Path, key: Mapping[str, Any]) -> tuple[tuple[int, int], torch.dtype]:
    """(shape, dtype) of the features of a cache, if it is that of `key`."""
    file = folder / KEY_FILE
    if not file.is_file():
        raise FileNotFoundError(f"there is no feature cache in {folder}; make it: {MAKE}")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise ValueError(f"format {description['format']!r}, this code reads format {FORMAT}")
        recorded, shape, dtype = description["key"], description["shape"], getattr(torch, description["dtype"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no description of a feature cache ({error}); {ANOTHER}") from error
    if differences := key_differences(recorded, key):
        raise ValueError(
            f"the feature cache {folder} is not for this configuration: {'; '.join(differences)}. Take the one that it "
            f"was made with, or {ANOTHER}"
        )
    return tuple(shape), dtype


def _read_index(file: Path, view_bytes: int) -> pa.RecordBatch:
    """The index of a part, memory-mapped, after a check that its features are whole."""
    remedy = f"remove {file} and compute that part again: {MAKE}"
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        if not reader.schema.equals(INDEX):
            raise ValueError(f"{file} is no index of features; {remedy}")
        views, batch = int(reader.schema.metadata[b"views"]), reader.get_batch(0)
    except (pa.ArrowInvalid, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}); {remedy}") from error
    features = features_file(file)
    size = features.stat().st_size if features.exists() else 0
    if size != views * view_bytes:
        raise ValueError(f"{features} has {size:,} bytes, expected {views * view_bytes:,}; {remedy}")
    return batch
