"""Media inside of tar files: `shards/train-00000.tar#1536+48213` is 48,213 bytes from byte 1,536 on.

`dataprocess.shards` writes such files and names. A reader seeks to the place, so that records are read in any order.
"""

import io
import os
import re
import tarfile
from pathlib import Path

LOCATION = re.compile(r"(.+\.tar)#(\d+)\+(\d+)", re.DOTALL | re.ASCII)
BUFFER = 1 << 16  # bytes that are read at once


def open_medium(root: str | os.PathLike, name: str) -> Path | io.BufferedReader:
    """What `visual` takes for a medium of a record: its path or, in a shard, a file that is opened when it is read.

    Reading it raises FileNotFoundError where there is no such shard, and ValueError where no member of that length
    begins there: the shard is cut off, or another one. Both name shard and place, which are the file's `name`.

    Args:
        root: folder that the media paths of the records are relative to.
        name: path of a file, or of a shard with the place in it.
    """
    path = Path(root, name)
    location = LOCATION.fullmatch(str(path))
    if location is None:
        return path
    return io.BufferedReader(_Member(location[1], int(location[2]), int(location[3])), BUFFER)


class _Member(io.RawIOBase):
    """`length` bytes of a tar file from `offset` on, as a file of their own."""

    def __init__(self, shard: str, offset: int, length: int):
        super().__init__()
        self.name = f"{shard}#{offset}+{length}"
        self._shard, self._offset, self._length, self._position = shard, offset, length, 0
        self._descriptor = None

    def readinto(self, buffer: memoryview) -> int:
        if self._descriptor is None:
            self._open()
        count = min(len(buffer), max(self._length - self._position, 0))
        got = os.preadv(self._descriptor, [memoryview(buffer)[:count]], self._offset + self._position) if count else 0
        self._position += got
        return got

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError(f"{self.name}: there is nothing before its beginning")
        self._position = start + offset
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        super().close()

    def _open(self) -> None:
        try:
            self._descriptor = os.open(self._shard, os.O_RDONLY)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.name}: there is no such shard") from None
        size, remedy = os.fstat(self._descriptor).st_size, "copy the shard again, or make records and shards anew"
        if size < self._offset + self._length:
            raise ValueError(f"{self.name}: the shard is cut off, it has {size} bytes; {remedy}")
        if self._length_in_header() != self._length:
            raise ValueError(f"{self.name}: no member of that length begins there, it is another shard; {remedy}")

    def _length_in_header(self) -> int | None:
        """What the tar file says right before the bytes; None where it says nothing of a file."""
        if self._offset < tarfile.BLOCKSIZE:
            return None
        block = os.pread(self._descriptor, tarfile.BLOCKSIZE, self._offset - tarfile.BLOCKSIZE)
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return None
        return header.size if header.isfile() else None
