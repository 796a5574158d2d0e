"""Batches of checked records -> train.parquet and validation.parquet, with paths that are relative."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from dataprocess.check import KINDS
from dataprocess.shards import ShardPlan
from dataset.record import BLOCK, SCHEMA, parquet_writer


class RecordFile:
    """A Parquet file like those of `dataset.record.write_records`, written batch by batch.

    Its bytes depend on the records alone, and not on how they are divided into batches.
    """

    def __init__(self, path: Path, weights: dict[str, float]):
        self.path, self.records = path, 0
        self._writer = parquet_writer(path, weights)
        self._waiting: list[pa.RecordBatch] = []
        self._rows = 0

    def append(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        self._rows += batch.num_rows
        self.records += batch.num_rows
        while self._rows >= BLOCK:
            self._write(BLOCK)

    def close(self) -> None:
        if self._rows:
            self._write(self._rows)
        self._writer.close()

    def _write(self, rows: int) -> None:
        table = pa.Table.from_batches(self._waiting, SCHEMA)
        self._writer.write_batch(table.slice(0, rows).combine_chunks().to_batches()[0])
        self._waiting, self._rows = table.slice(rows).to_batches(), self._rows - rows


def with_relative_paths(batch: pa.RecordBatch, root: str) -> pa.RecordBatch:
    """The batch with paths of images and videos relative to `root`, in which they all lie."""
    for column in KINDS:
        batch = with_paths(batch, column, pc.utf8_slice_codeunits(batch[column].values, len(prefix_of(root))))
    return batch


def with_locations(batch: pa.RecordBatch, plan: ShardPlan) -> pa.RecordBatch:
    """The batch with the places in shards of its images and videos."""
    for column, kind in KINDS.items():
        paths = batch[column].values.to_pylist()
        places = plan.locations(kind, set(paths))
        batch = with_paths(batch, column, pa.array([places[path] for path in paths], pa.string()))
    return batch


def with_paths(batch: pa.RecordBatch, column: str, paths: pa.Array) -> pa.RecordBatch:
    """The batch with other paths in its lists of images, or of videos."""
    lists = pa.ListArray.from_arrays(batch[column].offsets, paths)
    return batch.set_column(batch.schema.get_field_index(column), SCHEMA.field(column), lists)


def prefix_of(root: str) -> str:
    """How the absolute path of everything in a folder begins."""
    return root if root.endswith("/") else f"{root}/"
