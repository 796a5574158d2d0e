"""Images and videos -> tar files of a chosen size, so that a cluster reads few large files.

    shards/train-00000.tar
        000000000.jpg       the bytes of a medium
        000000000.json      {"records": [...]}: those of which it is the first medium
        ...

That is the layout of WebDataset: files whose names differ in the suffix alone are a sample. In these records media are
named like the members; in train.parquet, by shard and place (`dataset.shards`), which is also where records without
media are. Each medium is stored once, an image also where it has several names; the order is that of the records. So
the bytes of the shards depend on the records alone, and places are known before a byte is written.
"""

import hashlib
import io
import json
import os
import re
import sqlite3
import tarfile
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

from dataprocess.check import IMAGE, Finding
from dataprocess.journal import Journal

FOLDER = "shards"
NAME = re.compile(r"(train|validation)-\d{5,}\.tar")
BLOCK = tarfile.BLOCKSIZE
TABLES = """
CREATE TABLE members (
    number INTEGER PRIMARY KEY, -- from 1
    split TEXT, identity TEXT UNIQUE, name TEXT, path TEXT, size INTEGER, modified INTEGER, digest TEXT, location TEXT
);
CREATE TABLE paths (kind TEXT, path TEXT, number INTEGER, PRIMARY KEY (kind, path)) WITHOUT ROWID;
CREATE TABLE records (number INTEGER, text TEXT); -- of the first of a record's media
"""


class Member(NamedTuple):
    """A medium and the records that stand beside it."""

    name: str
    path: str
    size: int  # bytes of the file, and
    modified: int  # its time, as they were when it was checked
    digest: str
    text: bytes  # JSON


class Shard(NamedTuple):
    path: str
    members: list[Member]

    @property
    def name(self) -> str:
        """In the output folder."""
        return f"{FOLDER}/{Path(self.path).name}"

    def fingerprint(self) -> str:
        """Differs between shards of different content. Times count, as the digest of a video is of its ends alone."""
        digest = hashlib.blake2b(digest_size=16)
        for member in self.members:
            digest.update(repr((member.name, member.size, member.modified, member.digest)).encode())
            digest.update(member.text)
        return digest.hexdigest()


def write_shard(shard: Shard) -> tuple[int, int]:
    """Writes a shard, which appears under its name when it is whole; returns its size and time.

    Raises:
        ValueError: a file has changed since it was checked; names it.
    """
    temporary = f"{shard.path}.part"
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member in shard.members:
            with open(member.path, "rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != (member.size, member.modified):
                    raise ValueError(f"{member.path} has changed since it was checked; run the same command again")
                tar.addfile(header(member.name, member.size), file)
            tar.addfile(header(described(member.name), len(member.text)), io.BytesIO(member.text))
    os.replace(temporary, shard.path)
    status = os.stat(shard.path)
    return status.st_size, status.st_mtime_ns


def shards_in(output: Path, suffix: str = "") -> Iterator[str]:
    """Names in the output folder of all files that may be shards; with `suffix` ".part" of unfinished ones."""
    for path in output.glob(f"{FOLDER}/*.tar{suffix}"):
        if NAME.fullmatch(path.name.removesuffix(suffix)):
            yield f"{FOLDER}/{path.name}"


def remove_others(output: Path, names: set[str], journal: Journal) -> None:
    """Removes shards that an earlier run has written, whole or not, and that are not among `names`."""
    for suffix in ("", ".part"):
        for name in list(shards_in(output, suffix)):
            if name not in names and journal.note(name.removesuffix(suffix)) is not None:
                (output / name).unlink()


def header(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def described(name: str) -> str:
    """Name of the file beside a medium."""
    return f"{Path(name).stem}.json"


class ShardPlan:
    """What goes where. Kept in a file, so that memory does not grow with the number of media."""

    def __init__(self, path: Path):
        path.unlink(missing_ok=True)
        self._path = path
        self._file = sqlite3.connect(path)
        self._file.execute("PRAGMA journal_mode = OFF")  # of no use to another run
        self._file.executescript(TABLES)

    def __enter__(self) -> "ShardPlan":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def add(self, split: str, record: dict, media: dict[str, list[tuple[str, str, Finding]]]) -> None:
        """Plans the media of a record, (kind, path, finding) under their column, and puts it beside the first."""
        numbers = {column: [self._number(split, *medium) for medium in own] for column, own in media.items()}
        first = next((number for own in numbers.values() for number in own), None)
        if first is None:
            return
        named = {column: [self._name(number) for number in own] for column, own in numbers.items()}
        text = json.dumps({**record, **named, "meta": json.loads(record["meta"])}, ensure_ascii=False)
        self._file.execute("INSERT INTO records VALUES (?, ?)", (first, text))

    def _number(self, split: str, kind: str, path: str, finding: Finding) -> int:
        known = self._file.execute("SELECT number FROM paths WHERE kind = ? AND path = ?", (kind, path)).fetchone()
        if known:
            return known[0]
        # The digest of an image is of all its bytes; that of a video is not.
        identity = finding.digest if kind == IMAGE else f"{kind}{path}"
        same = self._file.execute("SELECT number FROM members WHERE identity = ?", (identity,)).fetchone()
        number = same[0] if same else self._one("SELECT coalesce(max(number), 0) + 1 FROM members")
        if not same:
            name = f"{number - 1:09d}{suffix(path)}"
            values = (number, split, identity, name, path, finding.size, finding.modified, finding.digest)
            self._file.execute("INSERT INTO members VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL)", values)
        self._file.execute("INSERT INTO paths VALUES (?, ?, ?)", (kind, path, number))
        return number

    def _name(self, number: int) -> str:
        return self._one("SELECT name FROM members WHERE number = ?", number)

    def size(self) -> int:
        """Bytes of all media together."""
        return self._one("SELECT coalesce(sum(size), 0) FROM members")

    def shards(self, folder: Path, split: str, limit: int) -> Iterator[Shard]:
        """The shards of a split, of at most `limit` bytes but for those of a single medium."""
        self._file.execute("CREATE INDEX IF NOT EXISTS by_number ON records (number)")
        names = (f"{split}-{number:05d}.tar" for number in count())
        path, members, end = next(names), [], 0
        for number, member in self._members(split):
            needed = 2 * BLOCK + padded(member.size) + padded(len(member.text))
            if members and end + needed > limit:
                yield Shard(str(folder / path), members)
                path, members, end = next(names), [], 0
            location = f"{FOLDER}/{path}#{end + BLOCK}+{member.size}"
            self._file.execute("UPDATE members SET location = ? WHERE number = ?", (location, number))
            members.append(member)
            end += needed
        if members:
            yield Shard(str(folder / path), members)

    def _members(self, split: str) -> Iterator[tuple[int, Member]]:
        query = "SELECT number, name, path, size, modified, digest FROM members WHERE number > ? AND split = ? LIMIT 1"
        last = 0
        while row := self._file.execute(query, (last, split)).fetchone():
            last = row[0]
            texts = self._file.execute("SELECT text FROM records WHERE number = ? ORDER BY rowid", (last,)).fetchall()
            text = f'{{"records": [{", ".join(text for (text,) in texts)}]}}'
            yield last, Member(*row[1:], text.encode())

    def locations(self, kind: str, paths: Iterable[str]) -> dict[str, str]:
        """Where each of the media stands, for records."""
        query = "SELECT location FROM members NATURAL JOIN (SELECT number FROM paths WHERE kind = ? AND path = ?)"
        return {path: self._one(query, kind, path) for path in paths}

    def _one(self, query: str, *values: int | str) -> int | str:
        return self._file.execute(query, values).fetchone()[0]


def suffix(path: str) -> str:
    """By which readers of WebDataset know what a member is."""
    own = Path(path).suffix.lower()
    return own if re.fullmatch(r"\.[a-z0-9]{1,8}", own) and own != ".json" else ".bin"


def padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
