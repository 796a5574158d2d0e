"""dataset/mapped.py: large Parquet files are mapped from a copy that belongs to the file as it is."""

import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset import mapped
from dataset.record import Records, read_records, write_records


def some_records(count: int, word: str = "cat") -> list[dict]:
    return [
        {
            "id": f"s:{number}",
            "source": f"source {number % 3}",
            "images": [f"{number}.jpg"] if number % 2 else [],
            "messages": [
                {"role": "user", "content": "<image>\nwhat?" if number % 2 else "你好"},
                {"role": "assistant", "content": f"{word} {number}"},
            ],
        }
        for number in range(count)
    ]


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that counts as large, of several batches."""
    monkeypatch.setattr(mapped, "LARGE", 1)
    monkeypatch.setattr(mapped, "ROWS", 70)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "records"
    write_records(some_records(250), folder / "train.parquet")
    return folder / "train.parquet"


def test_equals_the_table_in_memory(large, monkeypatch):
    records = read_records(large)
    allocated = pa.total_allocated_bytes()
    again = read_records(large)
    assert pa.total_allocated_bytes() - allocated < 10_000  # it lies in the file's pages, not in memory
    monkeypatch.setattr(mapped, "LARGE", 1 << 30)
    plain = read_records(large)
    assert list(records) == list(again) == list(plain)
    assert [records[i] for i in (0, 69, 70, 139, 249, -1)] == [plain[i] for i in (0, 69, 70, 139, 249, -1)]
    assert list(records[65:75]) == list(plain)[65:75] and list(records[::50]) == list(plain)[::50]
    assert records.fingerprint() == plain.fingerprint()
    assert records.sources()[0] == ["source 0", "source 1", "source 2"]
    assert records.sources()[1].tolist() == plain.sources()[1].tolist() == [number % 3 for number in range(250)]
    assert records.media_counts("images").tolist() == [number % 2 for number in range(250)]
    with pytest.raises(IndexError):
        records[250]


def test_another_file_gets_another_copy_and_the_old_one_goes(large):
    _ = read_records(large)
    (copy,) = (large.parent / ".arrow").iterdir()
    write_records(some_records(250, "dog"), large)
    assert read_records(large)[0]["messages"][1]["content"] == "dog 0"
    (other,) = (large.parent / ".arrow").iterdir()
    assert other != copy
    before = other.stat().st_mtime_ns
    _ = read_records(large)
    assert other.stat().st_mtime_ns == before


def test_a_folder_that_can_not_be_written(large, tmp_path):
    (large.parent / ".arrow").touch()  # a file, so that there can be no folder of this name, not even for root
    assert len(read_records(large)) == 250
    (copy,) = (tmp_path / "cache/kanjian").glob("*/train-*.arrow")
    other = tmp_path / "elsewhere" / "train.parquet"
    write_records(some_records(250, "dog"), other)
    os.utime(other, ns=(large.stat().st_atime_ns, large.stat().st_mtime_ns))
    assert read_records(other)[0]["messages"][1]["content"] == "dog 0"


def test_no_place_for_a_copy(large, tmp_path):
    for place in (large.parent / ".arrow", tmp_path / "cache"):
        place.touch()
    with pytest.raises(OSError, match=r"train.parquet: there is no place for its uncompressed copy of about \d+ MiB"):
        read_records(large)


def test_a_damaged_copy_is_made_again(large):
    _ = read_records(large)
    (copy,) = (large.parent / ".arrow").iterdir()
    copy.write_bytes(copy.read_bytes()[:-100])
    assert len(read_records(large)) == 250


def test_an_interrupted_copy_is_not_taken_for_whole(large):
    code = """
import os, sys
from dataset import mapped, record
mapped.LARGE, mapped.ROWS = 1, 70
os.replace = lambda *names: os._exit(9)
record.read_records(sys.argv[1])
"""
    assert subprocess.run([sys.executable, "-c", code, str(large)], check=False).returncode == 9
    assert not list((large.parent / ".arrow").glob("*.arrow"))
    assert len(read_records(large)) == 250


def test_absent_columns_have_their_defaults_in_every_batch(tmp_path, large):
    file = tmp_path / "mine.parquet"
    rows = [{"messages": record["messages"], "images": record["images"]} for record in some_records(200)]
    pq.write_table(pa.Table.from_pylist(rows), file)
    records = read_records(file)
    assert [record["id"] for record in records] == [f"mine:{row}" for row in range(200)]
    assert records[150]["source"] == "mine" and records[150]["meta"] == {}


def test_errors_name_the_file(tmp_path, large):
    for content in (b"", b"PAR1 but nothing of the kind", large.read_bytes()[:2000]):
        file = tmp_path / "bad.parquet"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.parquet: not a Parquet file"):
            read_records(file)
    pq.write_table(pa.table({"massages": ["?"]}), file)
    with pytest.raises(ValueError, match=r"bad.parquet: unknown column 'massages' \(did you mean 'messages'\?\)"):
        read_records(file)


def test_records_in_a_list_and_weights(tmp_path):
    records = read_records(write_and_path(tmp_path / "a.parquet", {"source 0": 2.0, "source 1": 1, "source 2": 0}))
    assert records.weights == {"source 0": 2.0, "source 1": 1, "source 2": 0}
    assert records[3:9].weights == records.select([1, 5]).weights == records.weights
    assert Records(records.table).weights == {}
    write_and_path(tmp_path / "b.parquet", {"source 0": 3.0})
    with pytest.raises(ValueError, match=r"b.parquet: source 'source 0' has weight 3.0 here and 2.0 in an earlier"):
        read_records(tmp_path)


def write_and_path(path, weights):
    write_records(some_records(12), path, weights)
    return path
