"""The record: the one format between `dataprocess/` and `dataset/`, and its files (Parquet, JSON, JSONL, CSV).

    {"id": "detail_23k:7", "source": "detail_23k", "images": ["train2017/000000000294.jpg"], "videos": [], "audios": [],
     "messages": [{"role": "user", "content": "<image>\\nWhat is this?"}, {"role": "assistant", "content": "A cat."}],
     "meta": {"language": "en"}}

`messages` may begin with a `system` turn; then `user` and `assistant` turns alternate. A record whose only message has
role "text" is plain text, every word of which is learned. Each `<image>` in the user turns, or in the plain text,
stands for the next of `images`, each `<video>` for the next of `videos`. `meta` (strings and integers) groups records
in an evaluation; its keys `references` and `choices` may be lists of strings (`evaluation.questions`). Media paths are
relative to a folder that the reader of the record knows (`image_root`).

In a file only `messages` is required: `id` defaults to `<file stem>:<row>` (rows count from 0), `source` to the file
stem. Rows of JSON, JSONL and CSV files may instead have the keys that `dataset.table` explains.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataset.mapped import read_parquet
from dataset.rows import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, RecordError, nearest, read_rows, shown
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
META_LISTS = ("references", "choices")  # accepted answers, and answers to choose from, of an evaluation
PLACEHOLDERS = {"images": IMAGE_PLACEHOLDER, "videos": VIDEO_PLACEHOLDER}
SUFFIXES = (".parquet", ".json", ".jsonl", ".csv")
WEIGHTS_KEY = "kanjian.weights"  # in the metadata of a Parquet file: JSON, source -> weight
BLOCK = 10_000  # records that are Python objects at the same time while a file is read or written


class Records(Sequence):
    """Records in an Arrow table [R rows]: one is decoded and validated at each access, so R may be millions.

    A slice is again a `Records`.

    Args:
        table: of `SCHEMA`.
        weights: how often each source is to be drawn in training, as the files say; empty where they don't.
    """

    def __init__(self, table: pa.Table, weights: dict[str, float] | None = None):
        self.table, self.weights = table, weights or {}
        self._batches = table.to_batches()
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return Records(self.table.slice(start, max(stop - start, 0)), self.weights)
            return self.select(range(start, stop, step))
        position = range(len(self))[index]
        number = int(np.searchsorted(self._ends, position, side="right"))
        batch = self._batches[number]  # found here, as a table's own slice goes through all of them
        return _decode(batch.slice(position - int(self._ends[number]) + batch.num_rows, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[dict]:
        for batch in self.table.to_batches(max_chunksize=BLOCK):
            yield from map(_decode, batch.to_pylist())

    def select(self, indices: Sequence[int]) -> "Records":
        """The records at `indices`, in that order."""
        return Records(self.table.take(pa.array(indices, pa.int64())), self.weights)

    def id_at(self, index: int) -> str:
        """Id of a record, which may not be valid otherwise."""
        return self.table["id"][index].as_py()

    def media_counts(self, kind: str) -> np.ndarray:
        """[R] how many `kind` ("images", "videos" or "audios") each record has; no record is decoded for it."""
        return pc.fill_null(pc.list_value_length(self.table[kind]), 0).to_numpy()

    def sources(self) -> tuple[list[str], np.ndarray]:
        """Names of the sources in the order of their first records, and [R] the number of each record's source."""
        encoded = self.table["source"].fill_null("").combine_chunks().dictionary_encode()  # null is refused later
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.unify_dictionaries().combine_chunks()
        return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()

    def fingerprint(self) -> str:
        """Tells these records from others: a digest of their number, of their texts' lengths and of 10,000 of them."""
        characters = {name: pc.sum(pc.binary_length(self.table[name])).as_py() for name in ("id", "source", "meta")}
        turns = pc.list_flatten(self.table["messages"])
        characters["messages"] = pc.sum(pc.binary_length(pc.struct_field(turns, "content"))).as_py()
        rows = [self[index] for index in range(0, len(self), max(len(self) // 10_000, 1))]
        return hashlib.sha256(json.dumps([len(self), characters, rows]).encode()).hexdigest()


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
        RecordError: unknown field, wrong type, a path that may lead out of its folder, roles out of order, an empty
            turn, answer or text, or a number of `<image>` or `<video>` that differs from the number of images or
            videos.
    """
    if not isinstance(record, dict):
        raise RecordError.of(None, "fields", f"expected an object with {', '.join(FIELDS)}; got {shown(record)}")
    name = record.get("id")
    unknown = [key for key in record if key not in FIELDS]
    if unknown:
        raise RecordError.of(name, "fields", f"unknown field {shown(unknown[0])}{nearest(unknown[0], FIELDS)}")
    for key in ("id", "source"):
        if not record.get(key) or not _is_text(record[key]):
            raise RecordError.of(name, "fields", f"{key} must be a non-empty string, got {shown(record.get(key))}")
    complete = {"id": name, "source": record["source"]}
    for key in MEDIA:
        complete[key] = [] if record.get(key) is None else record[key]
        if not isinstance(complete[key], list) or not all(path and _is_text(path) for path in complete[key]):
            raise RecordError.of(name, "fields", f"{key} must be a list of paths, got {shown(complete[key])}")
        for path in complete[key]:
            if path.startswith("/") or ".." in re.split(r"[/\\]", path) or "\0" in path:
                problem = f"{key}: {shown(path)} is absolute or climbs with .."
                raise RecordError.of(name, "path", f"{problem}; name files relative to their folder")
    complete["messages"] = _validate_messages(name, record.get("messages"))
    complete["meta"] = {} if record.get("meta") is None else record["meta"]
    if not isinstance(complete["meta"], dict) or not all(
        _is_text(key) and (isinstance(value, int) or _is_text(value) or key in META_LISTS and _is_texts(value))
        for key, value in complete["meta"].items()
    ):
        lists = " and ".join(META_LISTS)
        problem = f"meta must map strings to strings or integers ({lists}: to lists of strings)"
        raise RecordError.of(name, "fields", f"{problem}, got {shown(complete['meta'])}")
    place = "text" if complete["messages"][0]["role"] == "text" else "user turns"
    for key, placeholder in PLACEHOLDERS.items():
        count = sum(turn["content"].count(placeholder) for turn in complete["messages"])
        if count != len(complete[key]):
            problem = f"{count} {placeholder} in its {place} for {len(complete[key])} {key}"
            raise RecordError.of(name, "placeholders", f"{problem}; write one where each {key[:-1]} belongs")
    return complete


def _validate_messages(name: Any, messages: Any) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise RecordError.of(name, "messages", f"messages must be a non-empty list, got {shown(messages)}")
    previous = None
    for number, turn in enumerate(messages):
        if not isinstance(turn, dict) or set(turn) != {"role", "content"} or turn["role"] not in ROLES:
            expected = f"{{'role': one of {', '.join(ROLES)}, 'content': text}}"
            raise RecordError.of(name, "messages", f"message {number} must be {expected}, got {shown(turn)}")
        role, content = turn["role"], turn["content"]
        if not _is_text(content):
            problem = f"message {number}: content must be valid text, got {shown(content)}"
            raise RecordError.of(name, "messages", f"{problem}; fill it in, or drop the record")
        if role == "text" and len(messages) > 1:
            problem = f"message {number} has role 'text', which is for a single message without turns"
            raise RecordError.of(name, "roles", f"{problem}; turns have roles system, user and assistant")
        if role == "assistant" and previous in (None, "system"):
            problem = f"the conversation starts with the assistant (message {number})"
            raise RecordError.of(name, "roles", f"{problem}; put the question before it, or drop the turn")
        if role == previous or (role == "system" and number > 0):
            problem = f"message {number} has role {role!r} after {previous!r}"
            order = "at most one system turn first, then user and assistant in turn"
            raise RecordError.of(name, "roles", f"{problem}; expected {order}")
        if role == "user" and not content.strip():
            problem = f"message {number} is a user turn without words, image or video"
            raise RecordError.of(name, "empty turn", f"{problem}; write the question, or drop it and its answer")
        if role == "assistant" and not content.strip():
            problem = f"message {number} is an assistant turn without text"
            raise RecordError.of(name, "empty answer", f"{problem}; write the answer, or drop it and its question")
        if role == "text" and not content.replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "").strip():
            problem = f"message {number} is a plain text without words"
            raise RecordError.of(name, "empty text", f"{problem}; write some, or drop the record")
        for key, placeholder in PLACEHOLDERS.items():
            if role in ("system", "assistant") and placeholder in content:
                problem = f"message {number}: {placeholder} in {'an' if role == 'assistant' else 'a'} {role} turn"
                hint = f"{key} stand in user turns only; where a text means the word, write it as < {key[:-1]} >"
                raise RecordError.of(name, "placeholders", f"{problem}; {hint}")
        previous = role
    return messages


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_text, value))


def _is_text(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    try:
        text.encode()  # JSON can smuggle in half of a surrogate pair, which no file and no tokenizer takes
    except UnicodeEncodeError:
        return False
    return True


def read_records(paths: str | Path | Sequence[str | Path]) -> Records:
    """Records of a Parquet, JSON (a list), JSONL or CSV file, or of all such files of a folder in order of their names.

    Several paths are read one after the other. Text files are validated whole, rows of a Parquet file when they are
    accessed; large Parquet files are memory-mapped (`dataset.mapped`), so that millions of records open at once and
    processes share them.

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
    return Records(pa.concat_tables([_read_table(file) for file in files]), _weights(files))


def _weights(files: Sequence[Path]) -> dict[str, float]:
    """Weights of sources in the metadata of Parquet files."""
    weights: dict[str, float] = {}
    for file in files:
        if file.suffix != ".parquet":
            continue
        written = (pq.read_schema(file).metadata or {}).get(WEIGHTS_KEY.encode())
        for source, weight in (json.loads(written) if written else {}).items():
            if weights.setdefault(source, weight) != weight:
                raise ValueError(
                    f"{file}: source {source!r} has weight {weight} here and {weights[source]} in an earlier file; "
                    "make both with one configuration, or set data.weights"
                )
    return weights


def _read_table(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        return read_parquet(path, partial(_with_defaults, path=path), SCHEMA)
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


def _with_defaults(table: pa.Table, first_row: int, path: Path) -> pa.Table:
    """`table` with exactly the columns of `SCHEMA`, in its types; `first_row` is the number of its first row."""
    unknown = [name for name in table.column_names if name not in FIELDS]
    if unknown or "messages" not in table.column_names:
        problem = f"unknown column {unknown[0]!r}{nearest(unknown[0], FIELDS)}" if unknown else "no 'messages'"
        raise ValueError(f"{path}: {problem}")
    rows, columns = range(first_row, first_row + table.num_rows), []
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
    iterator, ids = iter(records), []
    while block := list(islice(iterator, BLOCK)):
        rows = [
            {**record, "meta": json.dumps(record["meta"], ensure_ascii=False, sort_keys=True)}
            for record in map(validate_record, block)
        ]
        batch = pa.RecordBatch.from_pylist(rows, SCHEMA)
        ids.append(batch["id"])  # as Arrow strings, which take a fifth of the memory of Python's
        yield batch
    if ids:
        counts = pc.value_counts(pa.chunked_array(ids))
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(repeated):
            raise RecordError.of(repeated[0]["values"].as_py(), "id", "two records have this id; rename or drop one")


def parquet_writer(path: str | Path, weights: dict[str, float] | None = None) -> pq.ParquetWriter:
    """Writes batches of `SCHEMA`, of `BLOCK` rows each but the last; `weights` as in `write_records`."""
    schema = SCHEMA.with_metadata({WEIGHTS_KEY: json.dumps(weights, sort_keys=True)}) if weights else SCHEMA
    return pq.ParquetWriter(path, schema, compression="zstd")


def write_records(records: Iterable[dict], path: str | Path, weights: dict[str, float] | None = None) -> int:
    """Writes records to a Parquet file and returns their number. Equal records give equal bytes.

    The file appears under its name only when it is whole. `weights` are how often each source is to be drawn in
    training (see `dataset.mixture`); they stand in the file's metadata.

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
        with parquet_writer(temporary, weights) as writer:
            for batch in _batches(records):
                writer.write_batch(batch)
                count += batch.num_rows
        os.replace(temporary, path)
    return count
