"""`shard_mb`: media in tar files that WebDataset reads, and records that point into them."""

import json
import os
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset
from PIL import Image

from dataprocess import pipeline, shards
from dataprocess.config import check_config
from dataprocess.moving import write_clip
from dataprocess.process_image import process
from dataset.record import read_records
from dataset.shards import open_medium


@pytest.fixture
def data(tmp_path) -> Path:
    """Six pictures of noise, a copy of one, a clip, a text; three records of a picture, one of two, one of a clip."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.png")
    (tmp_path / "in" / "copy.PNG").write_bytes((tmp_path / "in" / "3.png").read_bytes())
    frames = [Image.new("RGB", (16, 16), (number, 0, 0)) for number in (0, 120, 240)]
    write_clip(frames, 4, tmp_path / "in" / "clip.mp4")
    rows = [talk("<image>", f"first {number}", images=[f"{number}.png"]) for number in range(6)]
    rows += [talk("<image>", "copy", images=["copy.PNG"]), talk("<image>", "again 0", images=["0.png"])]
    rows += [talk("<image><image>", "两", images=["4.png", "5.png"]), talk("<video>", "clip", videos=["clip.mp4"])]
    rows += [talk("hi", "ho")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


def talk(question: str, answer: str, **media) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "meta": {"answer": answer}, **media}


def config(data: Path, **changes):
    source = {"format": "messages", "annotations": f"{data}/rows.json", "images": f"{data}/in"}
    values = {"output": f"{data}/out", "validation": 0.3, "shard_mb": 1, "workers": 1, "sources": [source]}
    return check_config({**values, **changes})


def records_of(data: Path) -> list[dict]:
    return [r for split in ("train", "validation") for r in read_records(data / "out" / f"{split}.parquet")]


def tars(data: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((data / "out" / "shards").iterdir())}


def test_records_point_to_the_bytes_of_their_media(data):
    plain = process(config(data, shard_mb=None))
    originals = {r["id"]: [*r["images"], *r["videos"]] for r in records_of(data)}
    report = process(config(data, image_root="elsewhere"))
    assert report["image_root"] == str(data / "out") and report["records"] == plain["records"]
    places = {}
    for record in records_of(data):
        media = [*record["images"], *record["videos"]]
        for place, original in zip(media, originals[record["id"]], strict=True):
            with open_medium(report["image_root"], place) as file:
                assert file.read() == (data / "in" / original).read_bytes()
            places.setdefault(place, set()).add(original)
    assert {"3.png", "copy.PNG"} in places.values() and len(places) == 7  # each picture is stored once
    sizes = [len(content) for content in tars(data).values()]
    assert len(sizes) > 2 and max(sizes) < 1_000_000 + tarfile.RECORDSIZE


def test_webdataset_reads_them(data):
    process(config(data))
    records = {r["id"]: r for r in records_of(data)}
    seen, media = {}, {}
    for split in ("train", "validation"):
        files = [str(data / "out" / "shards" / name) for name in tars(data) if name.startswith(split)]
        for sample in webdataset.WebDataset(files, shardshuffle=False):
            (suffix,) = {key for key in sample if not key.startswith("__")} - {"json"}
            media[f"{sample['__key__']}.{suffix}"] = sample[suffix]
            for record in json.loads(sample["json"])["records"]:
                assert record["id"] not in seen
                seen[record["id"]] = record
    assert sorted(media) == [f"{n:09d}.{'png' if n < 6 else 'mp4'}" for n in range(7)]
    assert set(records) - set(seen) == {"rows:10"}  # the text
    for name, record in seen.items():
        ours = records[name]
        assert {**record, "images": [], "videos": []} == {**ours, "images": [], "videos": []}
        for column in ("images", "videos"):
            for member, place in zip(record[column], ours[column], strict=True):
                assert media[member] == open_medium(data / "out", place).read()


def test_bytes_do_not_depend_on_workers_and_whole_shards_stay(data, monkeypatch):
    process(config(data))
    first = tars(data)
    process(config(data, workers=3, output=str(data / "other")))
    assert {path.name: path.read_bytes() for path in (data / "other" / "shards").iterdir()} == first
    times = {name: (data / "out" / "shards" / name).stat().st_mtime_ns for name in first}
    damaged, gone = list(first)[:2]
    (data / "out" / "shards" / damaged).write_bytes(first[damaged][:-512])
    (data / "out" / "shards" / gone).unlink()
    process(config(data))
    assert tars(data) == first
    after = {name: (data / "out" / "shards" / name).stat().st_mtime_ns for name in first}
    assert {name for name in first if after[name] != times[name]} == {damaged, gone}


def test_shards_of_an_earlier_run_do_not_stay(data):
    process(config(data))
    many = set(tars(data))
    (data / "out" / "shards" / "train-00001.tar.part").touch()  # what a killed run leaves
    (data / "out" / "shards" / "mine.tar").touch()
    process(config(data, shard_mb=100))
    assert set(tars(data)) == {"train-00000.tar", "validation-00000.tar", "mine.tar"} < many | {"mine.tar"}
    (data / "out" / "shards" / "train-00077.tar").touch()
    process(config(data, shard_mb=None))
    assert set(tars(data)) == {"mine.tar", "train-00077.tar"}


def test_shards_of_somebody_else_are_not_written_over(data):
    (data / "out" / "shards").mkdir(parents=True)
    (data / "out" / "shards" / "train-00000.tar").write_text("mine")
    process(config(data, shard_mb=None))
    before = (data / "out" / "train.parquet").read_bytes()
    with pytest.raises(ValueError, match=r"train-00000.tar is there and was not written by process_image.py.*move"):
        process(config(data))
    assert (data / "out" / "shards" / "train-00000.tar").read_text() == "mine"
    assert (data / "out" / "train.parquet").read_bytes() == before and (data / "out" / "report.json").exists()


@pytest.mark.parametrize("change", ["move", "journal", "relative"])
def test_shards_of_a_moved_folder_are_known(data, change, monkeypatch):
    process(config(data))
    before, output = tars(data), data / "out"
    if change == "move":
        output = output.rename(data / "elsewhere")
    if change == "journal":
        shutil.rmtree(output / ".work")
    if change == "relative":
        monkeypatch.chdir(data)
        output = Path("out")
    process(config(data, output=str(output)))
    assert {path.name: path.read_bytes() for path in (output / "shards").iterdir()} == before
    process(config(data, output=str(output), shard_mb=100))
    assert {path.name for path in (output / "shards").iterdir()} == {"train-00000.tar", "validation-00000.tar"}


def test_a_disk_without_room_is_told_beforehand(data, monkeypatch):
    process(config(data))
    before = tars(data), (data / "out" / "report.json").read_bytes()
    (data / "in" / "6.png").write_bytes((data / "in" / "5.png").read_bytes() + b"more")
    rows = json.loads((data / "rows.json").read_text())
    (data / "rows.json").write_text(json.dumps([*rows, talk("<image>", "one more", images=["6.png"])]))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"out: the shards need 0 MiB, 0 are free; make room, set another output"):
        process(config(data))
    assert (tars(data), (data / "out" / "report.json").read_bytes()) == before


def test_changed_contents_make_other_shards(data):
    """A picture of the same length in the place of another."""
    process(config(data))
    first = tars(data)
    content = bytearray((data / "in" / "2.png").read_bytes())
    Image.open(data / "in" / "2.png").transpose(Image.Transpose.ROTATE_180).save(data / "in" / "2.png")
    changed = (data / "in" / "2.png").read_bytes()
    (data / "in" / "2.png").write_bytes(changed.ljust(len(content), b"\0"))
    process(config(data))
    assert tars(data) != first
    assert any(changed in content for content in tars(data).values())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_changes_on_the_way(data, monkeypatch, workers):
    def plan_and_change(*args):
        really(*args)
        os.utime(data / "in" / "5.png", ns=(1, 1))

    really = pipeline.plan_shards
    monkeypatch.setattr(pipeline, "plan_shards", plan_and_change)
    with pytest.raises(ValueError, match="5.png has changed since it was checked; run the same command again"):
        process(config(data, workers=workers))
    assert not any((data / "out" / name).exists() for name in ("report.json", "train.parquet"))
    monkeypatch.undo()
    process(config(data, workers=workers))
    assert not [name for name in tars(data) if name.endswith(".part")]


@pytest.mark.parametrize(
    ("path", "suffix"), [("a.JPG", ".jpg"), ("a", ".bin"), ("a.b c", ".bin"), ("x/a.json", ".bin"), ("a.tar.gz", ".gz")]
)
def test_suffixes(path, suffix):
    assert shards.suffix(path) == suffix
