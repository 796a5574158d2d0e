"""What an evaluation has done so far, on disk: `rows.jsonl`, and `settings.json`, which says of what.

Rows are appended a batch at a time and reach the disk before the next one is begun. Whatever ends the process, an
unfinished last line is dropped and all others are kept: their questions are not answered again.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dataset.files import write_text
from run_folder import held

ROWS_FILE = "rows.jsonl"
SETTINGS_FILE = "settings.json"
BREAKS = {ord(letter): f"\\u{ord(letter):04x}" for letter in "\x85\u2028\u2029"}
RESULTS = ("report.json", "report.md", "report.html")


class Journal:
    """Rows of answered questions, by id; `folder` None keeps them in memory alone."""

    def __init__(self, folder: Path | None = None):
        self.file = None if folder is None else folder / ROWS_FILE
        self.rows: dict[str, dict] = {}
        if self.file is not None and self.file.exists():
            self._read()

    def _read(self) -> None:
        data = self.file.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                self.rows[row["id"]] = row
            except (ValueError, KeyError, TypeError):
                problem = f"{self.file}, line {number}: this is no row of an evaluation; start over with --overwrite"
                raise ValueError(problem) from None
        if whole < len(data):
            os.truncate(self.file, whole)

    def append(self, rows: Sequence[dict]) -> None:
        """Adds rows; when it returns they are on the disk."""
        self.rows.update((row["id"], row) for row in rows)
        if self.file is not None:
            with self.file.open("ab") as file:
                file.write(as_lines(rows))
                file.flush()
                os.fsync(file.fileno())

    def finish(self, ids: Sequence[str]) -> list[dict]:
        """Rows of all questions in the order of `ids`, which the file then has too."""
        rows = [self.rows[id] for id in ids]
        if self.file is not None and self.file.read_bytes() != (lines := as_lines(rows)):
            write_text(lines.decode(), self.file)
        return rows


def as_lines(rows: Sequence[dict]) -> bytes:
    """A line of JSON for each row; no text in it breaks a line, for readers that know more breaks than JSON's."""
    return "".join(json.dumps(row, ensure_ascii=False).translate(BREAKS) + "\n" for row in rows).encode()


@contextmanager
def opened(folder: str | Path | None, settings: dict, described: dict, overwrite: bool = False) -> Iterator[Journal]:
    """The journal of an evaluation with these settings, begun or continued; no other process has it meanwhile.

    Args:
        folder: where its files lie; None: nowhere.
        settings: what rows depend on (JSON), which can't be another one in the same folder.
        described: what else is noted of the run, such as paths.
        overwrite: start over, whatever evaluation is there.

    Raises:
        ValueError: the folder holds an evaluation with other settings (lists them), or results that none wrote.
        RunError: another process holds the folder, or it can't be written.
    """
    if folder is None:
        yield Journal()
        return
    folder = Path(folder)
    with held(folder, "--output"):
        _check(folder, json.loads(json.dumps({**settings, "described": described})), overwrite)
        write_text(json.dumps({**settings, "described": described}, indent=2, ensure_ascii=False) + "\n",
                   folder / SETTINGS_FILE)  # fmt: skip
        yield Journal(folder)


def _check(folder: Path, settings: dict, overwrite: bool) -> None:
    """Raises ValueError unless the folder may hold an evaluation with these settings; `overwrite` clears it."""
    present = [name for name in (ROWS_FILE, *RESULTS) if (folder / name).exists()]
    if not (folder / SETTINGS_FILE).exists():
        if present:
            raise ValueError(f"{folder} holds a {present[0]} of something else; choose another --output")
        return
    if overwrite:
        for name in (*present, SETTINGS_FILE):
            (folder / name).unlink()
        return
    try:
        before = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        changed = _differences({**before, "described": 0}, {**settings, "described": 0})
        if changed:  # a digest says that there is a difference, the paths beside it perhaps which
            changed += _differences(before["described"], settings["described"])
    except (ValueError, AttributeError, TypeError, KeyError):
        raise ValueError(f"{folder / SETTINGS_FILE} is damaged; start over with --overwrite") from None
    if changed:
        raise ValueError(
            f"{folder} holds an evaluation with other settings:\n  " + "\n  ".join(changed)
            + "\nChoose another --output, or start over with --overwrite"
        )  # fmt: skip


def _differences(before: dict, now: dict) -> list[str]:
    """`key: value there, value now` of each key whose values differ."""
    return [
        f"{key}: {_shown(before.get(key))} there, {_shown(now.get(key))} now"
        for key in dict.fromkeys([*now, *before])
        if before.get(key) != now.get(key)
    ]


def _shown(value: object) -> str:
    is_digest = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return f"{value[:12]}..." if is_digest else json.dumps(value, ensure_ascii=False)
