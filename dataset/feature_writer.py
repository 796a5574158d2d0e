"""Fills the folder of precomputed features that `dataset.feature_cache` describes and reads."""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dataset.feature_cache import ANOTHER, FORMAT, INDEX, KEY_FILE, FileState, medium_hash, read_key

PART_BYTES = 1 << 30
PART_SECONDS = 600  # after which a part is closed, so that an interruption never costs more work


class NewEntry(NamedTuple):
    """A medium to be added."""

    medium: str
    state: FileState
    ends: int
    views: int
    problem: str | None = None


class FeatureWriter:
    """Adds features to a cache, which it makes if need be; a context manager.

    What `add` was given is kept when the block is left, by an error or an interruption too. A process that is killed
    loses the part that it was writing, at most `PART_BYTES` or the work of `PART_SECONDS`.

    Args:
        folder, key: as of `FeatureCache`.
        shape, dtype: of the features of a view: (n, D).

    Raises:
        ValueError: the folder holds a cache with another key, or other files.
        BlockingIOError: another process is writing to it.
    """

    def __init__(self, folder: str | os.PathLike, key: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype):
        self.folder, self.view_bytes = Path(folder), prod(shape) * dtype.itemsize
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / KEY_FILE).exists():
            _check_empty(self.folder)
        self._lock = _lock(self.folder)
        if (self.folder / KEY_FILE).exists():
            recorded = read_key(self.folder, key)
            if recorded != (tuple(shape), dtype):
                raise ValueError(f"{self.folder} holds features {recorded}, not {(tuple(shape), dtype)}; {ANOTHER}")
        else:
            name = str(dtype).removeprefix("torch.")
            description = {"format": FORMAT, "shape": list(shape), "dtype": name, "key": dict(key)}
            _write_whole(self.folder / KEY_FILE, json.dumps(description, indent=1).encode())
        for file in [*self.folder.glob("part-*.bin"), *self.folder.glob("*.tmp")]:  # of a process that was killed
            if not file.with_suffix(".arrow").exists():
                file.unlink()
        numbers = [int(file.stem.removeprefix("part-")) for file in self.folder.glob("part-*.arrow")]
        self._next = max(numbers, default=-1) + 1
        self._file: IO[bytes] | None = None
        self._entries: list[NewEntry] = []
        self._begun = 0.0  # when the part was

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, *error) -> None:
        try:
            self._close_part()
        finally:
            self._lock.close()

    def add(self, entries: Iterable[NewEntry], vision: Tensor) -> None:
        """Adds media with the features `[V, n, D]` of their views, V being the sum of `views`.

        Raises:
            OSError: no space is left. What was added before is kept.
        """
        entries = list(entries)
        if self._file is None:
            self._file = open(self._part(".bin"), "wb", buffering=0)
            self._begun = time.monotonic()
        if len(vision):
            _write_all(self._file, memoryview(vision.detach().cpu().flatten().view(torch.uint8).numpy()))
        self._entries += entries
        if self._file.tell() >= PART_BYTES or time.monotonic() - self._begun >= PART_SECONDS:
            self._close_part()

    def _part(self, suffix: str) -> Path:
        return self.folder / f"part-{self._next:05d}{suffix}"

    def _close_part(self) -> None:
        if self._file is None:
            return
        file, entries, self._file, self._entries = self._file, self._entries, None, []
        ends = np.cumsum([0, *(entry.views for entry in entries)])
        if not entries:  # interrupted before the first was there
            file.close()
            os.unlink(file.name)
            return
        with file:
            file.truncate(int(ends[-1]) * self.view_bytes)  # without what an interrupted `add` wrote
            os.fsync(file.fileno())
        table = pa.table(
            {
                "hash": np.array([medium_hash(entry.medium) for entry in entries], np.uint64),
                "medium": [entry.medium for entry in entries],
                "size": [entry.state.size for entry in entries],
                "mtime_ns": [entry.state.mtime_ns for entry in entries],
                "ends": np.array([entry.ends for entry in entries], np.uint64),
                "first": ends[:-1],
                "views": [entry.views for entry in entries],
                "problem": [entry.problem for entry in entries],
            },
            schema=INDEX.with_metadata({"views": str(ends[-1])}),
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        _write_whole(self._part(".arrow"), sink.getvalue())
        self._next += 1


def _lock(folder: Path) -> IO[str]:
    file = open(folder / "lock", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BlockingIOError(f"another process is adding to the feature cache {folder}; wait for it") from None
    return file


def _check_empty(folder: Path) -> None:
    others = [file.name for file in folder.iterdir() if file.name not in ("lock", f"{KEY_FILE}.tmp")]
    if others:
        raise ValueError(f"{folder} holds other files ({', '.join(sorted(others)[:3])}); {ANOTHER}")


def _write_all(file: IO[bytes], data: memoryview) -> None:
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"no space left for {file.name}; make room, and the same command goes on"
            raise OSError(error.errno, problem) from error
        raise


def _write_whole(path: Path, data: Any) -> None:
    """A file that appears under its name only when it is on the disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb", buffering=0) as file:
        _write_all(file, memoryview(data).cast("B"))
        os.fsync(file.fileno())
    os.replace(temporary, path)
