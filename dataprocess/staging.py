"""Valid records between reading and writing: in a file, so that memory does not grow with their number."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from dataprocess.readers import Source, row_records
from dataset.record import SCHEMA, RecordError


class Rows(NamedTuple):
    """Rows of a source's file that follow each other."""

    source: Source
    seed: int
    rows: list[tuple[int, Any]]  # (number, row)


class Fault(NamedTuple):
    """Why something did not become a record."""

    row: int
    reason: str  # in few words
    problem: str  # in full


class ReadRows(NamedTuple):
    """What became of `Rows`."""

    batch: bytes  # of `SCHEMA`, as Arrow writes it between processes; paths of media are absolute
    faults: list[Fault]


def read_block(block: Rows) -> ReadRows:
    records, faults = [], []
    for number, row in block.rows:
        for made in row_records(row, number, block.source, block.seed):
            if isinstance(made, RecordError):
                faults.append(Fault(number, made.reason, str(made)))
            else:
                records.append({**made, "meta": json.dumps(made["meta"], ensure_ascii=False, sort_keys=True)})
    return ReadRows(pa.RecordBatch.from_pylist(records, SCHEMA).serialize().to_pybytes(), faults)


class Staging:
    """Batches of records, written one after the other and then read as often as needed, each of a single source.

    The file belongs to one run: it goes when the `with` block ends, and what a killed run left is written over.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records = 0
        self._writer = pa.ipc.new_file(str(path), SCHEMA, options=pa.ipc.IpcWriteOptions(compression="lz4"))

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *_) -> None:
        try:
            self._writer.close()
        finally:  # on a full disk there is no closing it
            self.path.unlink(missing_ok=True)

    def append(self, written: bytes) -> pa.RecordBatch:
        """Stores a batch that `read_block` has made, and returns it."""
        batch = pa.ipc.read_record_batch(written, SCHEMA)
        if batch.num_rows:
            self._writer.write_batch(batch)
            self.records += batch.num_rows
        return batch

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All batches in order; nothing can be appended any more."""
        self._writer.close()
        with pa.OSFile(str(self.path)) as file:  # not mapped: what was read is given back at once
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)
