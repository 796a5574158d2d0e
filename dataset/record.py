"""The record: the one format between `dataprocess/` and `dataset/`, and its files (Parquet, JSON, JSONL, CSV).

    {"id": "detail_23k:7", "source": "detail_23k", "images": ["train2017/000000000294.jpg"], "videos": [], "audios": [],
     "messages": [{"role": "user", "content": "<image>\\nWhat is this?"}, {"role": "assistant", "content": "A cat."}],
     "meta": {"language": "en"}}

`messages` may begin with a `system` turn; then `user` and `assistant` turns alternate. A record whose only message has
role "text" is plain text, every word of which is learned. Each `<image>` in the user turns, or in the plain text,
stands for the next of `images`, each `<video>` for the next of `videos`. `meta` (strings and integers) groups records
in an evaluation. Media paths are relative to a folder that the reader of the record knows (`image_root`).

In a file only `messages` is required: `id` defaults to `<file stem>:<row>` (rows count from 0), `source` to the file
stem. Rows of JSON, JSONL and CSV files may instead have the keys that `dataset.table` explains.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataset.rows import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, RecordError, nearest, read_rows
from dataset.table import TABLE_KEYS, record_of_row

ROLES = ("system", "user", "assistant", "text")
MEDIA = ("images", "videos", "audios")
SCHEMA = pa.schema({
    "id": pa.string(),
    "source": pa.string(),
    **{name: pa.list_(pa.string()) for name in MEDIA},
    "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
    "meta": pa.string(),  # JSON: its keys differ from record to record, which a Parquet struct can't express
})  # fmt: skip
FIELDS = tuple(SCHEMA.names)
PLACEHOLDERS = {"images": IMAGE_PLACEHOLDER, "videos": VIDEO_PLACEHOLDER}
SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")
BLOCK = 10_000  # records that are Python objects at the same time while a file is read or written


class Records(Sequence):
    """Records in an Arrow table [R rows]: one is decoded and validated at each access, so R may be millions.

    A slice is again a `Records`.
    """

    def __init__(self, table: pa.Table):
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return Records(self.table.slice(start, max(stop - start, 0)))
            return self.select(range(start, stop, step))
        position = range(len(self))[index]
        return _decode(self.table.slice(position, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[dict]:
        for batch in self.table.to_batches(max_chunksize=BLOCK):
            yield from map(_decode, batch.to_pylist())

    def select(self, indices: Sequence[int]) -> "Records":
        """The records at `indices`, in that order."""
        return Records(self.table.take(pa.array(indices, pa.int64())))


def _decode(row: dict) -> dict:
    """Row of a table of `SCHEMA` -> validated record."""
    try:
        meta = json.loads(row["meta"] or "{}")
    except json.JSONDecodeError:
        raise RecordError.of(row["id"], "fields", f"meta must be a JSON object, got {row['meta']!r:.80}") from None
    return validate_record({**row, "meta": meta})


def validate_record(record: Any) -> dict:
    """The record with every field present (absent media are `[]`, absent `meta` is `{}`).

    Raises:
        RecordError: unknown field, wrong type, roles out of order, an empty answer or text, or a number of `<image>`
            or `<video>` that differs from the number of images or videos.
    """
    if not isinstance(record, dict):
        raise RecordError.of(None, "fields", f"expected an object with {', '.join(FIELDS)}; got {record!r:.80}")
    name = record.get("id")
    unknown = [key for key in record if key not in FIELDS]
    if unknown:
        raise RecordError.of(name, "fields", f"unknown field {unknown[0]!r}{nearest(unknown[0], FIELDS)}")
    for key in ("id", "source"):
        if not isinstance(record.get(key), str) or not record[key]:
            raise RecordError.of(name, "fields", f"{key} must be a non-empty string, got {record.get(key)!r}")
    complete = {"id": name, "source": record["source"]}
    for key in MEDIA:
        complete[key] = [] if record.get(key) is None else record[key]
        if not isinstance(complete[key], list) or not all(isinstance(path, str) and path for path in complete[key]):
            raise RecordError.of(name, "fields", f"{key} must be a list of paths, got {complete[key]!r:.80}")
    complete["messages"] = _validate_messages(name, record.get("messages"))
    complete["meta"] = record.get("meta") or {}
    if not isinstance(complete["meta"], dict) or not all(
        isinstance(key, str) and isinstance(value, str | int) for key, value in complete["meta"].items()
    ):
        problem = f"meta must map strings to strings or integers, got {complete['meta']!r:.80}"
        raise RecordError.of(name, "fields", problem)
    place = "text" if complete["messages"][0]["role"] == "text" else "user turns"
    for key, placeholder in PLACEHOLDERS.items():
        count = sum(turn["content"].count(placeholder) for turn in complete["messages"])
        if count != len(complete[key]):
            problem = f"{count} {placeholder} in its {place} for {len(complete[key])} {key}"
            raise RecordError.of(name, "placeholders", f"{problem}; write one where each {key[:-1]} belongs")
    return complete


def _validate_messages(name: Any, messages: Any) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise RecordError.of(name, "messages", f"messages must be a non-empty list, got {messages!r:.80}")
    previous = None
    for number, turn in enumerate(messages):
        if not isinstance(turn, dict) or set(turn) != {"role", "content"} or turn["role"] not in ROLES:
            expected = f"{{'role': one of {', '.join(ROLES)}, 'content': text}}"
            raise RecordError.of(name, "messages", f"message {number} must be {expected}, got {turn!r:.80}")
        role, content = turn["role"], turn["content"]
        if not isinstance(content, str) or not _is_unicode(content):
            raise RecordError.of(name, "messages", f"message {number}: content must be valid text, got {content!r:.80}")
        if role == "text" and len(messages) > 1:
            problem = f"message {number} has role 'text', which is for a single message without turns"
            raise RecordError.of(name, "roles", f"{problem}; turns have roles system, user and assistant")
        if role == previous or (role == "system" and number > 0):
            problem = f"message {number} has role {role!r} after {previous!r}"
            order = "at most one system turn first, then user and assistant in turn"
            raise RecordError.of(name, "roles", f"{problem}; expected {order}")
        if role == "assistant" and not content.strip():
            raise RecordError.of(name, "empty answer", f"message {number} is an assistant turn without text")
        if role == "text" and not content.replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "").strip():
            raise RecordError.of(name, "empty text", f"message {number} is a plain text without words")
        for key, placeholder in PLACEHOLDERS.items():
            if role in ("system", "assistant") and placeholder in content:
                problem = f"message {number}: {placeholder} in {'an' if role == 'assistant' else 'a'} {role} turn"
                raise RecordError.of(name, "placeholders", f"{problem}; {key} stand in user turns only")
        previous = role
    return messages


def _is_unicode(text: str) -> bool:
    try:
        text.encode()  # JSON can smuggle in half of a surrogate pair, which no file and no tokenizer takes
    except UnicodeEncodeError:
        return False
    return True


def read_records(paths: str | Path | Sequence[str | Path]) -> Records:
    """Records of a Parquet, JSON (a list), JSONL or CSV file, or of all such files of a folder in order of their names.

    Several paths are read one after the other. Text files are validated whole, rows of a Parquet file when they are
    accessed.

    Raises:
        FileNotFoundError: no such file, or a folder without record files.
        RecordError: a record breaks the format.
        ValueError: the file is not what its name says, or its columns don't fit.
    """
    files = []
    for path in [Path(paths)] if isinstance(paths, str | Path) else map(Path, paths):
        found = [path] if path.is_file() else []
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not found:
            raise FileNotFoundError(f"{path}: expected a file or a folder that holds some ({', '.join(SUFFIXES)})")
        files += found
    if not files:
        raise FileNotFoundError("no record files given")
    return Records(pa.concat_tables([_read_table(file) for file in files]))


def _read_table(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        return _with_defaults(pq.read_table(path, partitioning=None), path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: records are read from {', '.join(SUFFIXES)} files")
    try:
        return to_table(_complete(row, path, number) for number, row in enumerate(read_rows(path)))
    except RecordError as error:
        error.args = (f"{path}: {error}",)
        raise


def _complete(row: Any, path: Path, number: int) -> Any:
    """A row of a text file as a record with id and source; what is no object is left to the validation."""
    if not isinstance(row, dict):
        return row
    name = f"{path.stem}:{number}"
    if path.suffix == ".csv" or "messages" not in row and (row.keys() & TABLE_KEYS or not row.keys() & FIELDS):
        row = record_of_row(row, name)
    return {"id": name, "source": path.stem, **row}


def _with_defaults(table: pa.Table, path: Path) -> pa.Table:
    """`table` with exactly the columns of `SCHEMA`, in its types."""
    unknown = [name for name in table.column_names if name not in FIELDS]
    if unknown or "messages" not in table.column_names:
        problem = f"unknown column {unknown[0]!r}{nearest(unknown[0], FIELDS)}" if unknown else "no 'messages'"
        raise ValueError(f"{path}: {problem}")
    rows, columns = range(table.num_rows), []
    absent = {"id": lambda row: f"{path.stem}:{row}", "source": lambda row: path.stem, "meta": lambda row: "{}"}
    for field in SCHEMA:
        if field.name in table.column_names:
            try:
                columns.append(table.column(field.name).cast(field.type))
            except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
                raise ValueError(f"{path}: column {field.name!r} must be of type {field.type}: {error}") from None
        else:
            columns.append(pa.array([absent.get(field.name, lambda row: [])(row) for row in rows], field.type))
    return pa.table(columns, schema=SCHEMA)


def to_table(records: Iterable[dict]) -> pa.Table:
    """Validates records and packs them into an Arrow table of `SCHEMA`."""
    return pa.Table.from_batches(_batches(records), SCHEMA)


def _batches(records: Iterable[dict]) -> Iterator[pa.RecordBatch]:
    iterator, seen = iter(records), set()
    while block := list(islice(iterator, BLOCK)):
        rows = []
        for record in map(validate_record, block):
            if record["id"] in seen:
                raise RecordError.of(record["id"], "id", "two records have this id")
            seen.add(record["id"])
            rows.append({**record, "meta": json.dumps(record["meta"], ensure_ascii=False, sort_keys=True)})
        yield pa.RecordBatch.from_pylist(rows, SCHEMA)


def write_records(records: Iterable[dict], path: str | Path) -> int:
    """Writes records to a Parquet file and returns their number. Equal records give equal bytes.

    The file appears under its name only when it is whole.

    Raises:
        RecordError: a record breaks the format, or two have the same id; nothing is written then.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        raise ValueError(f"{path}: records are written as .parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        temporary = Path(folder, path.name)
        with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
            for batch in _batches(records):
                writer.write_batch(batch)
                count += batch.num_rows
        os.replace(temporary, path)
    return count
