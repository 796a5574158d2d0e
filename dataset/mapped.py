"""Parquet files as Arrow tables: small ones in memory, large ones memory-mapped from an uncompressed copy.

A row of a Parquet file can't be reached without decompressing thousands of others. So of a large file an Arrow copy is
made once, in `.arrow` beside it or, where that can't be written, in `$XDG_CACHE_HOME/kanjian`. A mapped table costs
nothing to open, takes no memory that the system couldn't take back, and is shared by all processes of a machine.
A copy belongs to the size and time of its Parquet file: another file under the same name gets another copy.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

LARGE = 1 << 24  # bytes of a Parquet file from which on it is mapped; decompressed it has several times as many
ROWS = 65_536  # of a batch of the copy

Convert = Callable[[pa.Table, int], pa.Table]


def read_parquet(path: Path, convert: Convert, schema: pa.Schema) -> pa.Table:
    """The table of a Parquet file, in `schema`.

    Args:
        convert: (some rows of the file, number of the first) -> the same in `schema`.

    Raises:
        ValueError: not a Parquet file, and what `convert` raises.
        OSError: no such file, or no space for its copy.
    """
    try:
        if path.stat().st_size < LARGE:
            return convert(pq.read_table(path, partitioning=None), 0)
        with pq.ParquetFile(path) as file:
            return _mapped(path, file, convert, schema)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from None


def _mapped(path: Path, file: pq.ParquetFile, convert: Convert, schema: pa.Schema) -> pa.Table:
    """The table of the file's copy, which is made if it isn't there or was damaged."""
    stat = path.stat()
    state = f"{path.name} {stat.st_size} {stat.st_mtime_ns} {schema}"
    name = f"{path.stem}-{hashlib.blake2b(state.encode(), digest_size=8).hexdigest()}.arrow"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kanjian")
    of_this_place = hashlib.blake2b(str(path.parent.resolve()).encode(), digest_size=8).hexdigest()
    folders = [path.parent / ".arrow", cache / of_this_place]
    for folder in folders:
        try:
            return _open(folder / name)
        except (OSError, pa.ArrowInvalid):
            continue
    problems = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / name, file, convert, schema)
        except OSError as error:
            problems.append(f"{folder}: {error.strerror or error}")
            continue
        for stale in folder.glob(f"{path.stem}-{'[0-9a-f]' * 16}.arrow"):
            if stale.name != name:  # of an earlier file of this name; who has it open keeps it
                stale.unlink(missing_ok=True)
        return _open(folder / name)
    size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))
    raise OSError(
        f"{path}: there is no place for its uncompressed copy of about {size >> 20} MiB ({'; '.join(problems)}); make "
        "room, or let XDG_CACHE_HOME name a folder that has some"
    )


def _open(copy: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(copy))).read_all()


def _write(copy: Path, file: pq.ParquetFile, convert: Convert, schema: pa.Schema) -> None:
    """Writes the copy under a temporary name, to the disk, and renames it."""
    with tempfile.TemporaryDirectory(dir=copy.parent, prefix=".writing-") as temporary:
        unfinished = Path(temporary, copy.name)
        with open(unfinished, "wb") as sink:
            with pa.ipc.new_file(sink, schema) as writer:
                rows = 0
                for batch in file.iter_batches(ROWS):
                    table = convert(pa.Table.from_batches([batch]), rows)
                    writer.write_table(table.combine_chunks(), max_chunksize=ROWS)
                    rows += batch.num_rows
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(unfinished, copy)
