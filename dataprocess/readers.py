"""Published annotation files -> records. `dataprocess.sources` has a function for each format.

A row that can't be used gives a RecordError in place of its records, and the reading goes on; a file that isn't what
its format says raises ValueError.
"""

import os
import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from dataprocess.sources import FORMATS, Source
from dataprocess.sources.source import SPLIT_NAMES, Context, RowError
from dataset.record import validate_record
from dataset.rows import RecordError, shown
from dataset.shards import LOCATION


def read_source(source: Source, seed: int = 0) -> Iterator[dict | RecordError]:
    """Valid records of a source, and an error in place of each that is not usable: `row_records` of `source_rows`."""
    for number, row in source_rows(source, seed):
        yield from row_records(row, number, source, seed)


def source_rows(source: Source, seed: int = 0) -> Iterator[tuple[int, Any]]:
    """(number, row) of the rows of a source's file that its `splits` and `samples` leave; numbers count all from 0.

    A row is what `row_records` takes: a ValueError in place of one that can't be read. `samples` reads the file twice,
    first to count.

    Raises:
        ValueError: a file that is not in the source's format (of malformed JSON it names line and column), or one
            without rows of these splits.
    """
    if source.samples is None:
        yield from rows_of_splits(source)
        return
    numbers = [number for number, _ in rows_of_splits(source)]
    if source.samples < len(numbers):
        numbers = random.Random(f"{seed}:{source.name}:samples").sample(numbers, source.samples)
    chosen = set(numbers)
    yield from ((number, row) for number, row in rows_of_splits(source) if number in chosen)


def rows_of_splits(source: Source) -> Iterator[tuple[int, Any]]:
    """(number, row) of all rows, or of those in the source's splits and those that name no split."""
    form = FORMATS[source.format]
    wanted = source.splits or form.splits
    kept, others = 0, set()
    for number, row in enumerate(form.rows(source)):
        split = row.get("split") if form.splits and isinstance(row, dict) else None
        if isinstance(split, str | int):
            split = str(SPLIT_NAMES.get(split, split))
            if split not in wanted:
                others.add(split)
                continue
        kept += 1
        yield number, row
    if others and not kept:
        problem = f"no row is of split {' or '.join(wanted)}, but of {', '.join(sorted(others)):.200}"
        raise ValueError(f"{source.annotations}: {problem}; set `splits` of source {source.name!r}")


def row_records(row: Any, number: int, source: Source, seed: int = 0) -> list[dict | RecordError]:
    """Valid records of a row, or an error in place of each that is not usable.

    Ids are `<source name>:<number>`, with `.<k>` after them where a row makes several records. Paths of images and
    videos are absolute.
    """
    name = f"{source.name}:{number}"
    try:
        if isinstance(row, ValueError):
            raise row
        if not isinstance(row, dict):
            raise RowError(f"expected an object with the keys of format {source.format}, got {shown(row)}")
        parts = FORMATS[source.format].records(row, Context(source, FORMATS[source.format], number, seed))
    except Exception as error:
        return [row_error(error, row, name, source)]
    several = sum(isinstance(part, dict) for part in parts) > 1
    ids = [f"{name}.{k}" if several else name for k in range(len(parts))]
    return [
        finished(part, record_id, source) if isinstance(part, dict) else row_error(part, row, record_id, source)
        for part, record_id in zip(parts, ids, strict=True)
    ]


def row_error(error: Exception, row: Any, name: str, source: Source) -> RecordError:
    """What a format's function raised, as an error that names the file and the record; bugs are raised again."""
    if isinstance(error, RecordError):
        return RecordError(f"{source.annotations}: {error}", error.reason)
    if isinstance(error, RowError):
        return RecordError(f"{source.annotations}: record {name!r}: {error}", error.reason)
    if error is row:  # it names the file and the line
        return RecordError(f"record {name!r}: {error}", "unreadable row")
    if isinstance(error, KeyError):
        problem = f"the key {error} is missing, it has {', '.join(map(str, row))!r:.120}"
    elif isinstance(error, TypeError | AttributeError | LookupError | ArithmeticError | ValueError):
        problem = f"{error}: {shown(row)}"
    else:
        raise error
    hint = f"mend the row, or set `format` of the source to what the file is (now {source.format})"
    return RecordError(f"{source.annotations}: record {name!r}: {problem}; {hint}", "malformed row")


def finished(part: dict, record_id: str, source: Source) -> dict | RecordError:
    """The record that a part of a row becomes, with absolute paths, or what is wrong with it."""
    folder = part.get("folder", source.images)
    part = {key: value for key, value in part.items() if key != "folder"}
    try:
        record = validate_record({**part, "id": record_id, "source": source.name})
        if record["audios"]:
            raise RecordError.of(record_id, "media", "it has audios; only images and videos are read, so drop them")
        if (record["images"] or record["videos"]) and not folder:
            problem = "it has images or videos; set `images` of the source to the folder that holds them"
            raise RecordError.of(record_id, "media", problem)
        if all(turn["role"] not in ("assistant", "text") for turn in record["messages"]):
            raise RecordError.of(record_id, "no answer", "it has no assistant turn to learn from; add one, or drop it")
        return {
            **record,
            **{key: [located(path, folder, source, record_id) for path in record[key]] for key in ("images", "videos")},
        }
    except RecordError as error:
        return RecordError(f"{source.annotations}: {error}", error.reason)


def located(name: str, folder: str, source: Source, record_id: str) -> str:
    """Absolute path of a file; raises RecordError where links lead out of the folder, which may itself be a link."""
    path = os.path.abspath(os.path.join(folder, name))
    if path == os.path.abspath(folder):
        raise RecordError.of(record_id, "path", f"{shown(name)} names no file; mend it, or drop the record")
    if LOCATION.fullmatch(name):
        raise RecordError.of(record_id, "path", f"{shown(name)} means a place in a tar file here; rename the file")
    if source.follow_links:
        return path
    try:
        path.encode()
        real = os.path.realpath(path) if os.path.islink(path) else real_folder(os.path.dirname(path))
        root = real_folder(os.path.abspath(folder))
    except ValueError:  # half a character or a null character in a folder that the file names
        raise RecordError.of(record_id, "path", f"{shown(path)} is no path; mend the names in the file") from None
    if real != root and not real.startswith(os.path.join(root, "")):
        problem = f"{shown(name)} is a link that leads out of {folder}"
        hint = "set `follow_links: true` of the source if all its links are to be trusted"
        raise RecordError.of(record_id, "path", f"{problem}; {hint}")
    return path


@lru_cache(maxsize=10_000)  # a link in the path of a folder is looked up once, not for each of its files
def real_folder(path: str) -> str:
    return os.path.realpath(path)
