"""Runs that are stopped, killed or repeated: nothing is decoded twice, and nothing half-written is taken for whole."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from dataprocess import check, pipeline
from dataprocess.config import check_config
from dataprocess.process_image import process
from dataset.record import read_records

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(6):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    write_captions(tmp_path, "a.json", range(4))
    write_captions(tmp_path, "b.json", range(2, 6))
    return tmp_path


def write_captions(data: Path, name: str, numbers) -> None:
    rows = [{"image": f"{number}.png", "caption": f"{name} {number}"} for number in numbers]
    (data / name).write_text(json.dumps(rows))


def config(data: Path, *names: str, **changes):
    sources = [{"format": "lavis", "annotations": f"{data}/{name}", "images": f"{data}/images"} for name in names]
    return check_config({"output": f"{data}/out", "validation": 0.3, "workers": 1, "sources": sources, **changes})


def outputs(data: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (data / "out").iterdir() if file.is_file()}


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the images that are decoded from here on."""
    names, really = [], check.check_image

    def count(path: str):
        names.append(Path(path).name)
        return really(path)

    monkeypatch.setattr(check, "check_image", count)
    return names


def test_only_what_is_new_or_changed_is_decoded(data, decoded):
    process(config(data, "a.json"))
    assert decoded == ["0.png", "1.png", "2.png", "3.png"]
    first = outputs(data)
    decoded.clear()
    process(config(data, "a.json"))
    assert decoded == [] and outputs(data) == first
    process(config(data, "a.json", "b.json"))
    assert decoded == ["4.png", "5.png"]
    decoded.clear()
    Image.new("RGB", (9, 9), (77, 0, 0)).save(data / "images" / "1.png")
    os.utime(data / "images" / "5.png", ns=(1, 1))
    process(config(data, "b.json", "a.json"))
    assert decoded == ["1.png", "5.png"]


def test_the_journal_changes_no_result(data):
    process(config(data, "b.json"))
    process(config(data, "a.json", "b.json"))
    repeated = outputs(data)
    process(config(data, "a.json", "b.json", output=str(data / "fresh")))
    assert {name: (data / "fresh" / name).read_bytes() for name in repeated} == repeated


def test_faulty_and_missing_files_are_looked_at_again(data, decoded):
    """What was wrong may have been the machine's: its memory, its disk, a decoder that it lacked."""
    (data / "images" / "0.png").write_bytes(b"no image")
    (data / "images" / "1.png").unlink()
    for expected in (["0.png", "1.png", "2.png", "3.png"], ["0.png", "1.png"]):
        decoded.clear()
        with pytest.raises(ValueError, match="'a:0': .*0.png: not an image"):
            process(config(data, "a.json"))
        assert decoded == expected
    Image.new("RGB", (8, 8), (0, 0, 0)).save(data / "images" / "0.png")
    Image.new("RGB", (8, 8), (1, 0, 0)).save(data / "images" / "1.png")
    assert process(config(data, "a.json"))["sources"]["a"]["kept"] == 4


def test_stop_names_file_record_and_remedy_and_leaves_the_old_set(data):
    process(config(data, "a.json"))
    before = outputs(data)
    (data / "images" / "4.png").write_bytes(b"")
    message = r"b.json: record 'b:2': .*4.png: the file is empty\n.*on_error=skip"
    with pytest.raises(ValueError, match=message):
        process(config(data, "a.json", "b.json"))
    assert outputs(data) == before
    report = process(config(data, "a.json", "b.json", on_error="skip"))
    assert report["sources"]["b"]["dropped"]["image unreadable"]["count"] == 1
    (line,) = map(json.loads, (data / "out" / "dropped.jsonl").read_text().splitlines())
    assert (line["source"], line["record"], line["reason"]) == ("b", "b:2", "image unreadable")
    assert "4.png: the file is empty" in line["problem"]
    write_captions(data, "b.json", [3])
    process(config(data, "b.json", validation=0))
    assert not (data / "out" / "dropped.jsonl").exists()


def test_stop_at_a_faulty_record(data, decoded):
    (data / "a.json").write_text(json.dumps([{"image": "0.png", "caption": "x"}, {"image": "1.png", "caption": " "}]))
    with pytest.raises(ValueError, match="(?s)'a:1'.*on_error=skip"):
        process(config(data, "a.json"))
    assert decoded == [] and outputs(data) == {}


def test_an_interruption_anywhere_leaves_nothing_half_written(data, monkeypatch, decoded):
    """Stopped while media are checked and while files are written; then the same command ends like one from nothing."""
    process(config(data, "a.json", output=str(data / "fresh")))
    expected = {file.name: file.read_bytes() for file in (data / "fresh").iterdir() if file.is_file()}

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    monkeypatch.setattr(pipeline, "FILES", 2)
    for place in ("pipeline.divide", "output.RecordFile.close", "report.Drops.publish"):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(f"dataprocess.{place}", stop)
            process(config(data, "a.json"))
        assert not (data / "out" / "report.json").exists()
        for name in ("train.parquet", "validation.parquet"):
            if (data / "out" / name).exists():
                assert len(read_records(data / "out" / name))
    decoded.clear()
    process(config(data, "a.json"))
    assert decoded == [] and outputs(data) == expected
    assert [file.name for file in (data / "out" / ".work").iterdir()] == ["journal.sqlite"]


SLOW = """
import sys, time
from dataprocess import check, pipeline
from dataprocess.config import load_config
really = check.check_image
def slow(path):
    time.sleep(0.05)
    return really(path)
check.check_image = slow
pipeline.FILES, pipeline.COMMIT = 1, 0
if __name__ == "__main__":
    pipeline.process(load_config(sys.argv[1], sys.argv[2:]))
"""


def known(data: Path) -> int:
    journal = data / "out" / ".work" / "journal.sqlite"
    with closing(sqlite3.connect(journal)) as file:
        return file.execute("SELECT count(*) FROM media WHERE size IS NOT NULL").fetchone()[0]


def test_killed_with_its_workers_at_work(data, decoded):
    for number in range(6, 200):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(data / "images" / f"{number}.png")
    write_captions(data, "a.json", range(200))
    (data / "slow.py").write_text(SLOW)
    (data / "c.yaml").write_text(
        f"output: {data}/out\nworkers: 2\nsources: [{{format: lavis, annotations: {data}/a.json, "
        f"images: {data}/images}}]\n"
    )
    command = [sys.executable, str(data / "slow.py"), str(data / "c.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    process_group = subprocess.Popen(command, env=environment, start_new_session=True)
    log = data / "out" / ".work" / "journal.sqlite-wal"
    deadline = time.monotonic() + 60
    while (not log.exists() or log.stat().st_size < 300_000) and time.monotonic() < deadline:
        assert process_group.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.kill(process_group.pid, signal.SIGKILL)  # the process alone: its workers have to notice
    process_group.wait()
    assert {file.name for file in (data / "out").iterdir()} == {".work"}
    while has_members(process_group.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not has_members(process_group.pid)
    before = known(data)
    assert 5 < before < 200
    report = process(config(data, "a.json"))
    assert len(decoded) == 200 - before and sum(report["records"].values()) == 200


def has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_is_no_file_is_not_opened(data):
    """Reading a pipe would wait for ever."""
    (data / "images" / "0.png").unlink()
    os.mkfifo(data / "images" / "0.png")
    (data / "images" / "1.png").unlink()
    (data / "images" / "1.png").mkdir()
    report = process(config(data, "a.json", on_error="skip"))
    assert report["sources"]["a"]["dropped"]["image unreadable"]["count"] == 2
    assert "0.png: not a file, but a folder, pipe" in (data / "out" / "dropped.jsonl").read_text()


def test_every_phase_says_how_much_there_is_to_do(data, monkeypatch):
    """But the first reading, since rows are counted by reading them."""
    totals = {}

    class Progress:
        def __init__(self, total, desc, **_):
            self.n, self.total, self.desc = 0, total, desc

        def update(self, count):
            self.n += count

        def close(self):
            totals[self.desc] = (self.n, self.total)

    monkeypatch.setattr(pipeline, "tqdm", Progress)
    process(config(data, "a.json", shard_mb=1))
    packed = sum((data / "images" / f"{number}.png").stat().st_size for number in range(4))
    later = {"Checking media": (4, 4), "Dividing": (4, 4), "Planning shards": (4, 4), "Packing": (packed, packed)}
    assert totals == {"Reading a": (4, None), **later, "Writing": (4, 4)}
    process(config(data, "a.json"))
    assert totals["Reading a"] == (4, 4)


def test_one_run_at_a_time(data):
    with pipeline.Journal(start_journal(data)), pytest.raises(ValueError, match="journal.sqlite is in use: another"):
        process(config(data, "a.json"))
    process(config(data, "a.json"))


def start_journal(data: Path) -> Path:
    (data / "out" / ".work").mkdir(parents=True)
    return data / "out" / ".work" / "journal.sqlite"


def test_damaged_and_foreign_journals(data, decoded):
    path = start_journal(data)
    path.write_bytes(b"something else" * 100)
    with pytest.raises(ValueError, match="journal.sqlite is damaged .*; delete it"):
        process(config(data, "a.json"))
    path.unlink()
    process(config(data, "a.json"))
    with closing(sqlite3.connect(path)) as file:
        file.execute("PRAGMA user_version = 99")
    decoded.clear()
    process(config(data, "a.json"))
    assert len(decoded) == 4
