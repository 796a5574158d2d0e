import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dataprocess import pipeline
from dataprocess.config import check_config
from dataprocess.moving import write_clip
from dataprocess.process_image import process
from dataset.record import read_records

PROJECT = Path(__file__).parents[2]
COCO_MINI = PROJECT.parent / "shared" / "coco_mini"


def caption(image: str, *captions: str) -> dict:
    return {"image": image, "caption": list(captions)}


@pytest.fixture
def data(tmp_path) -> Path:
    """Twelve pictures, a copy of one under another name, a broken one; two files of captions and one of messages."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "one" / f"{number}.png")
    (tmp_path / "two" / "copy.png").write_bytes((tmp_path / "one" / "3.png").read_bytes())
    (tmp_path / "one" / "broken.png").write_bytes(b"no image")
    first = [caption(f"{number}.png", f"first {number}", f"again {number}") for number in range(12)]
    first += [caption("broken.png", "x"), caption("absent.png", "y", "z"), caption("1.png", " ")]
    (tmp_path / "first.json").write_text(json.dumps(first))
    second = [caption(f"one/{number}.png", f"second {number}") for number in range(12)]
    second.append(caption("two/copy.png", "copy"))
    (tmp_path / "second.json").write_text(json.dumps(second))
    pair = {
        "messages": [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "pair"}],
        "images": ["one/0.png", "one/7.png"],
    }
    text = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<|im_start|>"}]}
    (tmp_path / "messages.json").write_text(json.dumps([pair, text]))
    return tmp_path


def config(data: Path, **changes):
    sources = [
        {"format": "lavis", "annotations": f"{data}/first.json", "images": f"{data}/one"},
        {"format": "lavis", "annotations": f"{data}/second.json", "images": str(data)},
        {"format": "messages", "annotations": f"{data}/messages.json", "images": f"{data}"},
    ]
    values = {"output": f"{data}/out", "validation": 0.25, "on_error": "skip", "sources": sources, **changes}
    return check_config(values)


def outputs(data: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (data / "out").iterdir() if file.is_file()}


def records_of(data: Path) -> dict[str, list[dict]]:
    return {name: list(read_records(data / "out" / f"{name}.parquet")) for name in ("train", "validation")}


def test_report_says_what_was_dropped_and_why(data, capsys):
    report = process(config(data))
    assert report == json.loads((data / "out" / "report.json").read_text())
    counts = {name: (s["read"], s["kept"]) for name, s in report["sources"].items()}
    assert counts == {"first": (28, 24), "second": (13, 13), "messages": (2, 2)}
    dropped = {reason: entry["count"] for reason, entry in report["sources"]["first"]["dropped"].items()}
    assert dropped == {"image missing": 2, "image unreadable": 1, "empty answer": 1}
    assert "absent.png" in report["sources"]["first"]["dropped"]["image missing"]["examples"][0]
    assert sum(report["records"].values()) == 39 == sum(map(len, records_of(data).values()))
    assert sum(report["images"].values()) == 12  # different pictures
    assert "image unreadable" in capsys.readouterr().out


def test_an_image_in_two_files_keeps_the_records_of_both(data):
    process(config(data))
    texts = [r["messages"][1]["content"] for r in sum(records_of(data).values(), [])]
    expected = [f"{kind} {number}" for kind in ("first", "again", "second") for number in range(12)]
    assert sorted(texts) == sorted([*expected, "copy", "pair", "<|im_start|>"])


@pytest.mark.parametrize("seed", range(5))
def test_no_picture_is_in_train_and_validation(data, seed):
    process(config(data, seed=seed))
    pixels = {
        name: {Image.open(data / path).getpixel((0, 0)) for record in records for path in record["images"]}
        for name, records in records_of(data).items()
    }
    assert pixels["train"] | pixels["validation"] == {(number, 0, 0) for number in range(12)}
    assert not pixels["train"] & pixels["validation"]


def test_bytes_depend_on_the_seed_and_not_on_workers(data, monkeypatch):
    def outcome(**changes) -> dict[str, bytes]:
        shutil.rmtree(data / "out" / ".work", ignore_errors=True)
        process(config(data, **changes))
        return outputs(data)

    monkeypatch.setattr(pipeline, "FILES", 2)  # so that there is something to divide among workers
    monkeypatch.setattr(pipeline, "ROWS", 3)
    first = outcome(workers=1)
    assert set(first) == {"train.parquet", "validation.parquet", "report.json", "dropped.jsonl"}
    assert outcome(workers=4) == first
    other = outcome(workers=4, seed=1)
    assert other["train.parquet"] != first["train.parquet"]


def test_videos_and_texts(data, capsys):
    """Of three clips, two of which are copies, one is no video; a table of texts needs no folder."""
    (data / "films").mkdir()
    frames = [Image.new("RGB", (16, 16), (number, 0, 0)) for number in (0, 120, 240)]
    write_clip(frames, 4, data / "films" / "a.mp4")
    write_clip(frames[::-1], 4, data / "films" / "b.mp4")
    (data / "films" / "copy.mp4").write_bytes((data / "films" / "a.mp4").read_bytes())
    (data / "films" / "bad.mp4").write_text("no video")
    names = ["a.mp4", "b.mp4", "copy.mp4", "bad.mp4", "gone.mp4"]
    rows = [{"video": name, "instruction": "What happens?", "answer": str(n)} for n, name in enumerate(names)]
    (data / "films.json").write_text(json.dumps(rows))
    (data / "texts.csv").write_text("text\nOnce.\nTwice.\n")
    sources = [
        {"format": "table", "annotations": f"{data}/films.json", "images": f"{data}/films"},
        {"format": "table", "annotations": f"{data}/texts.csv"},
    ]
    report = process(config(data, sources=sources, image_root=str(data)))
    films = report["sources"]["films"]
    assert (films["read"], films["kept"]) == (5, 3)
    assert {reason: entry["count"] for reason, entry in films["dropped"].items()} == {
        "video missing": 1, "video unreadable": 1,
    }  # fmt: skip
    assert sum(report["videos"].values()) == 2 and sum(report["images"].values()) == 0
    records = records_of(data)
    seen = {name: {path for record in records[name] for path in record["videos"]} for name in records}
    assert seen["train"] | seen["validation"] == {"films/a.mp4", "films/b.mp4", "films/copy.mp4"}
    assert any({"films/a.mp4", "films/copy.mp4"} <= paths for paths in seen.values())  # copies stay on one side
    assert sum(len(r) for r in records.values()) == 5
    assert " videos, paths relative to" in capsys.readouterr().out


def test_image_root(data):
    report = process(config(data))
    assert report["image_root"] == str(data)  # what the folders have in common
    assert all((data / path).exists() for r in records_of(data)["train"] for path in r["images"])
    report = process(config(data, image_root=str(data.parent)))
    assert records_of(data)["train"][0]["images"][0].startswith(f"{data.name}/one/")
    before = (data / "out" / "report.json").read_bytes()
    with pytest.raises(ValueError, match="is not in image_root"):
        process(config(data, image_root=f"{data}/one"))
    assert (data / "out" / "report.json").read_bytes() == before


def test_validation_of_an_earlier_run_does_not_stay(data):
    process(config(data))
    report = process(config(data, validation=0))
    assert report["records"] == {"train": 39, "validation": 0}
    assert not (data / "out" / "validation.parquet").exists()


def test_source_of_which_nothing_is_usable_ends_the_run(data):
    misplaced = {"format": "lavis", "annotations": f"{data}/first.json", "images": f"{data}/two"}
    fault = r"source 'first': no record is usable. Most frequent: image missing \(27 times\).*\n.*two/0.png"
    with pytest.raises(ValueError, match=fault):
        process(config(data, sources=[misplaced]))
    (data / "first.json").write_text("[]")
    with pytest.raises(ValueError, match="source 'first': no record is usable; its file is empty"):
        process(config(data))
    assert outputs(data) == {}


def test_validation_may_not_take_all(data):
    with pytest.raises(ValueError, match="leaves no record for training"):
        process(config(data, validation=0.99))


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=PROJECT, capture_output=True, text=True)


@pytest.mark.parametrize("start", [["-m", "dataprocess.process_image"], ["dataprocess/process_image.py"]])
def test_command_line(data, start):
    yaml = data / "c.yaml"
    yaml.write_text(f"sources: [{{format: lavis, annotations: {data}/first.json, images: {data}/one}}]\n")
    result = run(*start, "--config", str(yaml), f"output={data}/out", "validation=0.3", "on_error=skip", "workers=2")
    assert result.returncode == 0, result.stderr
    assert "total" in result.stdout and (data / "out" / "report.json").exists()
    result = run(*start, "--config", str(yaml), "ouput=x")
    assert result.returncode == 1
    assert "unknown key 'ouput' (did you mean 'output'?)" in result.stderr and "Traceback" not in result.stderr


def test_no_torch_is_imported():
    code = "import sys, dataprocess.process_image; sys.exit('torch' in sys.modules)"
    assert run("-c", code).returncode == 0


def test_shipped_config_names_what_is_missing():
    result = run("-m", "dataprocess.process_image", "sources.0.annotations=absent.json")
    assert result.returncode == 1 and "there is no file absent.json" in result.stderr


@pytest.mark.skipif(not COCO_MINI.exists(), reason=f"the photographs are not here: {COCO_MINI}")
def test_coco_mini(tmp_path):
    """Real photographs, with annotation files in four formats."""
    images = str(COCO_MINI / "train2017")
    files = {
        "caption_train_annotations_20170902.json": "ai_challenger",
        "complex_reasoning_77k.json": "llava",
        "detail_23k.json": "llava",
        "captions_train2017.json": "coco",
    }
    sources = [{"format": kind, "annotations": str(COCO_MINI / file), "images": images} for file, kind in files.items()]
    sources.append({"format": "messages", "annotations": str(COCO_MINI / "messages.jsonl"), "images": str(COCO_MINI)})
    report = process(check_config({"output": str(tmp_path), "validation": 0.1, "sources": sources}))
    assert [source["kept"] for source in report["sources"].values()] == [320, 64, 64, 128, 64]
    assert not any(source["dropped"] for source in report["sources"].values())
    assert report["image_root"] == str(COCO_MINI)
    assert report["images"] == {"train": 58, "validation": 6} and report["records"] == {"train": 580, "validation": 60}
    train, validation = (list(read_records(tmp_path / f"{name}.parquet")) for name in ("train", "validation"))
    for image in {record["images"][0] for record in train}:
        assert (COCO_MINI / image).exists()
        assert sum(record["images"] == [image] for record in train) == 10
    published = json.loads((COCO_MINI / "complex_reasoning_77k.json").read_text())
    ours = {r["id"]: r for r in [*train, *validation] if r["source"] == "complex_reasoning_77k"}
    for row, item in enumerate(published):
        turns = [turn["content"] for turn in ours[f"complex_reasoning_77k:{row}"]["messages"]]
        assert turns == [turn["value"] for turn in item["conversations"]]


@pytest.mark.parametrize("name", ["train.parquet", "validation.parquet", "report.json", "dropped.jsonl"])
def test_files_of_somebody_else_are_not_written_over(data, name):
    (data / "out").mkdir()
    (data / "out" / name).write_text("mine")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name} is there and was not written by process_image.py"):
            process(config(data, on_error="skip"))
    assert (data / "out" / name).read_text() == "mine"


def test_a_set_without_a_journal_is_replaced(data):
    process(config(data, on_error="skip"))
    shutil.rmtree(data / "out" / ".work")
    process(config(data, on_error="skip", validation=0))
    assert not (data / "out" / "validation.parquet").exists()


def test_a_source_in_the_output_folder_under_a_name_of_the_output(data):
    process(config(data, on_error="skip"))
    source = {"format": "messages", "annotations": f"{data}/out/train.parquet", "images": str(data), "name": "again"}
    before = (data / "out" / "train.parquet").read_bytes()
    with pytest.raises(ValueError, match=r"source 'again' reads .*/out/train.parquet, which a run replaces"):
        process(config(data, on_error="skip", sources=[source]))
    assert (data / "out" / "train.parquet").read_bytes() == before
