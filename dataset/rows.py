"""What records and the tables they are made of share: placeholders, errors, and files of rows (JSON, JSONL, CSV)."""

import csv
import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
LONGEST_CELL = 2**31 - 1  # characters in a cell of a CSV file: as many as the library allows


class RecordError(ValueError):
    """A record can't be used. `reason` is the kind of fault in a few words, for counting."""

    # One argument suffices, so that data loaders can raise again what a worker raised.
    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason

    @classmethod
    def of(cls, record_id: Any, reason: str, problem: str) -> "RecordError":
        return cls(f"record {record_id!r}: {problem}", reason)


def nearest(key: Any, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known key that is spelled most like `key`; otherwise the list of known keys."""
    known = list(known)
    match = difflib.get_close_matches(str(key), known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else f"; known are {', '.join(known)}"


def read_rows(path: str | Path) -> Iterator[Any]:
    """Rows of a .json, .jsonl or .csv file. Raises ValueError for other names, and what the functions below raise."""
    suffix = Path(path).suffix
    if suffix not in (".json", ".jsonl", ".csv"):
        raise ValueError(f"{path}: rows are read from .json, .jsonl and .csv files")
    return read_csv_rows(path) if suffix == ".csv" else read_json_rows(path)


def read_csv_rows(path: str | Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV file (UTF-8, commas, names of the columns in the first line) as `{column: cell}`.

    Raises:
        ValueError: not such a file: a row with more or fewer cells than there are columns, a column without a name or
            with that of another, quotes that do not end, other bytes than UTF-8. Names the file and the line.
    """
    csv.field_size_limit(LONGEST_CELL)  # a whole text may stand in a cell; the library's own limit is 128 KiB
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            columns = next(reader, [])
            if not columns or not all(columns) or len(set(columns)) < len(columns):
                raise ValueError(f"{path}: each column has a name of its own in the first line, got {columns!r:.120}")
            for cells in reader:
                if cells and len(cells) != len(columns):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells for {len(columns)} columns; a text with "
                        'commas or line breaks stands in double quotes ("), a quote within it is doubled'
                    )
                if cells:
                    yield dict(zip(columns, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error}); save it in that encoding") from None


def read_json_rows(path: str | Path) -> Iterator[Any]:
    """Values of a JSONL file, one a line, or the elements of the list that a JSON file holds.

    Raises:
        ValueError: not JSON (names the file and the line), or a JSON file that holds no list.
    """
    path = Path(path)
    with open(path, encoding="utf-8-sig") as file:
        try:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield parse_json(line, f"{path}, line {number}")
                return
            rows = parse_json(file.read(), str(path))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error}); save it in that encoding") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a JSON list, got a {type(rows).__name__}; JSON lines end in .jsonl")
    yield from rows


def parse_json(text: str, where: str) -> Any:
    """`json.loads` whose error says where."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
