"""What is known about every file of images and videos: kept on disk, so that no file is decoded twice.

A journal is a SQLite file that lies beside the records. It belongs to one process at a time. What `store` took is on
disk with the next `commit`, at once and whole, whatever becomes of the process after it.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from dataprocess.check import Finding, Medium

# To be raised when files are judged by other rules: a journal of another version is made anew.
VERSION = 1
PAGE = 1024  # media that are taken from the journal at the same time

TABLES = """
CREATE TABLE IF NOT EXISTS media (
    number INTEGER PRIMARY KEY, -- in the order in which they were first named
    run INTEGER NOT NULL, -- the last one that named it
    kind TEXT NOT NULL, path TEXT NOT NULL, size INTEGER, modified INTEGER, digest TEXT, reason TEXT, problem TEXT,
    UNIQUE (kind, path)
);
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, text TEXT);
"""


class Journal:
    """Media that this run has named (`want`), and what is known about them (`store`, `findings`).

    Raises:
        ValueError: the file is not a journal, or another process has it open; names it.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._open()
            if self._one("PRAGMA user_version") not in (0, VERSION):
                self._file.close()
                path.unlink()
                self._open()
            self._file.execute(f"PRAGMA user_version = {VERSION}")
            self._file.executescript(TABLES)
            self._run = self._one("SELECT coalesce(max(run), 0) + 1 FROM media")
            self._file.commit()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise ValueError(f"{path}: {error}") from error
            raise ValueError(f"{path} is in use: another process_image.py writes to this output folder") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and all media are checked anew") from error

    def _open(self) -> None:
        self._file = sqlite3.connect(self.path, timeout=0)
        # The lock lasts as long as the process. A log that is appended to, so that a commit costs little.
        settings = {"locking_mode": "EXCLUSIVE", "journal_mode": "WAL", "synchronous": "NORMAL", "cache_size": -65536}
        for setting, value in settings.items():
            self._file.execute(f"PRAGMA {setting} = {value}")
        self._file.execute("BEGIN EXCLUSIVE")
        self._file.commit()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self.commit()
        self._file.close()

    def commit(self) -> None:
        self._file.commit()

    def want(self, kind: str, paths: Iterable[str]) -> None:
        """Says that this run needs these media."""
        self._file.executemany(
            "INSERT INTO media (run, kind, path) VALUES (?, ?, ?)"
            " ON CONFLICT DO UPDATE SET run = excluded.run WHERE run < excluded.run",
            [(self._run, kind, path) for path in paths],
        )

    def count(self) -> int:
        """Media that this run needs."""
        return self._one("SELECT count(*) FROM media WHERE run = ?", self._run)

    def wanted(self) -> Iterator[Medium]:
        """The media that this run needs, in the order in which they were first named."""
        last = 0
        while True:
            rows = self._file.execute(
                "SELECT number, kind, path, size, modified, digest, reason, problem FROM media"
                " WHERE number > ? AND run = ? ORDER BY number LIMIT ?",
                (last, self._run, PAGE),
            ).fetchall()
            for _, kind, path, *known in rows:
                yield Medium(kind, path, Finding(*known))
            if not rows:
                return
            last = rows[-1][0]

    def store(self, media: Iterable[Medium], findings: Iterable[Finding]) -> None:
        """Replaces what is known about each of the media."""
        self._file.executemany(
            "UPDATE media SET size = ?, modified = ?, digest = ?, reason = ?, problem = ? WHERE kind = ? AND path = ?",
            [
                (*finding, medium.kind, medium.path)
                for medium, finding in zip(media, findings, strict=True)
                if finding != medium.known
            ],
        )

    def findings(self, kind: str, paths: Iterable[str]) -> dict[str, Finding]:
        """What was stored about these media, by path."""
        query = "SELECT size, modified, digest, reason, problem FROM media WHERE kind = ? AND path = ?"
        return {path: Finding(*self._file.execute(query, (kind, path)).fetchone()) for path in paths}

    def note(self, name: str) -> str | None:
        """What `set_note` was given under this name."""
        row = self._file.execute("SELECT text FROM notes WHERE name = ?", (name,)).fetchone()
        return row and row[0]

    def set_note(self, name: str, text: str) -> None:
        self._file.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, text))

    def _one(self, query: str, *values: int) -> int:
        return self._file.execute(query, values).fetchone()[0]
