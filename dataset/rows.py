"""What records and the tables they are made of share: placeholders, errors, and files of rows."""

import csv
import difflib
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataset.json_files import encoding_problem, json_elements, json_lines

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
ROWS_AT_ONCE = 1000  # of a Parquet file, as Python objects
LONGEST_CELL = 2**31 - 1  # characters in a cell of a CSV file: as many as the library allows


class RecordError(ValueError):
    """A record can't be used. `reason` is the kind of fault in a few words, for counting."""

    # One argument suffices, so that data loaders can raise again what a worker raised.
    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason

    @classmethod
    def of(cls, record_id: Any, reason: str, problem: str) -> "RecordError":
        return cls(f"record {shown(record_id)}: {problem}", reason)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlist = _short.maxtuple = _short.maxdict = 4


def shown(value: Any) -> str:
    """A value in a message: its `repr`, shortened, whatever its length and depth."""
    return _short.repr(value)


def nearest(key: Any, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known key that is spelled most like `key`; otherwise the list of known keys."""
    known = list(known)
    match = difflib.get_close_matches(str(key), known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else f"; known are {', '.join(known)}"


def read_rows(path: str | Path) -> Iterator[Any]:
    """Rows of a file, as `stream_rows`; the first faulty row raises the ValueError that stands for it there."""
    for row in stream_rows(path):
        if isinstance(row, ValueError):
            raise row
        yield row


def stream_rows(path: str | Path) -> Iterator[Any]:
    """Rows of a JSON (a list), JSONL, CSV or Parquet file, one after the other; memory does not grow with the file.

    A row that can't be read, but leaves the ones after it readable, comes as a ValueError in its place, which names the
    file and the line.

    Raises:
        ValueError: another suffix, or not such a file; names the file, and the line if there are lines.
    """
    suffix = Path(path).suffix
    if suffix not in READERS:
        *most, last = READERS
        raise ValueError(f"{path}: rows are read from {', '.join(most)} and {last} files")
    return READERS[suffix](path)


def read_csv_rows(path: str | Path, delimiter: str = ",") -> Iterator[dict[str, str] | ValueError]:
    """Rows of a CSV file (UTF-8, names of the columns in the first line) as `{column: cell}`.

    A row with more or fewer cells than there are columns comes as a ValueError in its place.

    Raises:
        ValueError: not such a file: a column without a name or with that of another, quotes that do not end, other
            bytes than UTF-8. Names the file and the line.
    """
    csv.field_size_limit(LONGEST_CELL)  # a whole text may stand in a cell; the library's own limit is 128 KiB
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            columns = next(reader, [])
            if not columns or not all(columns) or len(set(columns)) < len(columns):
                raise ValueError(f"{path}: each column has a name of its own in the first line, got {columns!r:.120}")
            for cells in reader:
                if cells and len(cells) != len(columns):
                    yield ValueError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells for {len(columns)} columns; a text with "
                        f"{'commas' if delimiter == ',' else 'tabs'} or line breaks stands in double quotes (\"), a "
                        "quote within it is doubled"
                    )
                elif cells:
                    yield dict(zip(columns, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None
        except UnicodeDecodeError:
            raise ValueError(encoding_problem(path)) from None


def read_parquet_rows(path: str | Path) -> Iterator[dict]:
    """Rows of a Parquet file as `{column: value}`. Raises ValueError, which names the file, where it is none."""
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: not a Parquet file, or a damaged one: {error}") from None


READERS = {".json": json_elements, ".jsonl": json_lines, ".csv": read_csv_rows, ".parquet": read_parquet_rows}
