"""What all formats share: ids, paths, splits, samples, errors, streaming."""

import json
import os
import pickle
import tracemalloc

import pytest
from reading import Reader, answers, dialogue, faults, talk

from dataprocess.readers import read_source, row_records, source_rows
from dataprocess.sources import FORMATS, Source
from dataprocess.sources.source import Context, Format


@pytest.fixture
def read(tmp_path) -> Reader:
    return Reader(tmp_path)


def test_rows_and_records_are_read_source(read):
    """Both pass from process to process."""
    rows = [talk("<image>", str(number), image="a.jpg") for number in range(3)] + ["text"]
    (read.folder / "file.json").write_text(json.dumps(rows))
    source = pickle.loads(pickle.dumps(Source("llava", str(read.folder / "file.json"), read.images, name="src")))
    numbered = pickle.loads(pickle.dumps(list(source_rows(source, 0))))
    results = pickle.loads(pickle.dumps([row_records(row, number, source, 0) for number, row in numbered]))
    expected = list(read_source(source, 0))
    assert [r for part in results for r in part][:3] == expected[:3] and [r["id"] for r in expected[:3]] == [
        "src:0", "src:1", "src:2",
    ]  # fmt: skip
    assert str(results[3][0]) == str(expected[3]) and results[3][0].reason == expected[3].reason == "malformed row"


def test_a_format_of_ones_own(read, monkeypatch):
    """One function; splits, prompts and answers to choose from are a word each in the table."""

    def riddles(row: dict, context: Context) -> list[dict]:
        turns = [{"role": "user", "content": context.prompt() + row["q"]}, {"role": "assistant", "content": row["a"]}]
        return [{"images": [row["img"]], "messages": turns}]

    monkeypatch.setitem(FORMATS, "riddles", Format(riddles, prompts="caption", splits=("train",)))
    rows = [{"img": "a.jpg", "q": " Who?", "a": "I", "split": split} for split in ("train", "val", "train")]
    first, second = read("riddles", [*rows[:2], {**rows[2], "split": "train"}])
    assert dialogue(first) == [("user", "<image>\nDescribe the image in one sentence. Who?"), ("assistant", "I")]
    assert (first["id"], second["id"]) == ("src:0", "src:2")
    (fault,) = read("riddles", [{"img": "a.jpg"}])
    assert fault.reason == "malformed row" and "the key 'q' is missing, it has 'img'; mend the row" in str(fault)


def test_samples_are_drawn_by_seed(read):
    rows = [talk("<image>", str(number), image="a.jpg") for number in range(40)]

    def drawn(samples, seed=0):
        return answers(read("llava", rows, seed=seed, samples=samples))

    assert len(drawn(10)) == 10 and set(drawn(10)) < {str(number) for number in range(40)}
    assert drawn(10) == drawn(10) != drawn(10, seed=1)
    assert drawn(10) == sorted(drawn(10), key=int)  # in the order of the file
    assert drawn(40) == drawn(1000) == [str(number) for number in range(40)]
    one = read("llava", rows, samples=1)[0]
    assert one["id"] == f"src:{one['messages'][1]['content']}"  # the number that it has without `samples`


def test_samples_count_rows_of_the_splits(read):
    rows = [
        {"filename": f"{n}.jpg", "questions": ["Q"], "answers": [str(n)], "split": split}
        for n, split in enumerate([1, 2, 3, 1, 1, 2] * 5)
    ]
    assert len(read("ocr_vqa", rows, samples=7)) == 7
    assert {int(answer) % 6 for answer in answers(read("ocr_vqa", rows, samples=7))} <= {0, 3, 4}
    assert len(read("ocr_vqa", rows, samples=100, splits=["val", "test"])) == 15


def test_one_faulty_row_leaves_the_others(read):
    good = json.dumps(talk("<image>", "fine", image="a.jpg"))
    lines = [good, "{oops", good, '{"id": 1, "id": 2}', '["\\ud800"]', good[:-5]]
    results = read("llava", "\n\n".join(lines).encode() + b'\n{"id": "\xff"}\n' + good.encode(), "f.jsonl")
    assert [r["id"] for r in results if isinstance(r, dict)] == ["src:0", "src:2", "src:7"]
    assert [reason for reason, _ in faults(results)] == [
        "unreadable row", "unreadable row", "malformed row", "unreadable row", "unreadable row",
    ]  # fmt: skip
    assert "record 'src:1'" in str(results[1]) and "f.jsonl, line 3, column 2: not valid JSON" in str(results[1])
    assert "f.jsonl, line 7: the key 'id' stands twice in one object; remove one" in str(results[3])
    assert f"f.jsonl, line 12: not UTF-8 at byte {sum(len(line) + 2 for line in lines) + 7} of" in str(results[6])


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("llava", "[{]", "file.json, line 1, column 3: not valid JSON"),
        ("llava", "", "file.json: the file is empty; expected a JSON list"),
        ("llava", {"a": 1}, "file.json: expected a JSON list, got an object; JSON lines end in .jsonl"),
        ("llava", '"a"', "file.json: expected a JSON list, got a text"),
        ("coco", [], "file.json: expected a JSON object, got a list"),
        ("coco", {"images": []}, "file.json: expected a list under 'annotations'; its keys are 'images'"),
        ("coco", {"images": {}, "annotations": []}, "file.json: expected a list under 'images'"),
        ("karpathy", {"annotations": []}, "file.json: expected a list under 'images'; its keys are 'annotations'"),
        ("minigpt4", {"images": []}, "file.json: expected a list under 'annotations'"),
        ("ocr_vqa", "7", "file.json: expected a JSON list, got a single value"),
    ],
)
def test_a_file_of_another_format_is_an_error_that_names_it(read, format, content, message):
    with pytest.raises(ValueError, match=message):
        read(format, content)


def test_names_that_climb_out_of_the_folder(read):
    outside = read.folder / "outside"
    outside.mkdir()
    (outside / "x.jpg").touch()
    os.mkdir(read.images)
    os.mkdir(f"{read.images}/sub")
    os.symlink(outside, f"{read.images}/door")
    os.symlink(outside / "x.jpg", f"{read.images}/sub/file.jpg")
    os.symlink("sub", f"{read.images}/inner")
    names = ["../x.jpg", "/etc/x.jpg", "sub/../../x.jpg", "..\\x.jpg", "door/x.jpg", "sub/file.jpg", "a\0b"]
    *errors, inner = read("llava", [talk("<image>", "A", image=name) for name in [*names, "inner/b.jpg"]])
    assert [reason for reason, _ in faults(errors)] == ["path"] * 7
    assert "file.json: record 'src:0': images: '../x.jpg' is absolute or climbs with ..; name files" in str(errors[0])
    assert "'door/x.jpg' is a link that leads out of" in str(errors[4]) and "set `follow_links: true`" in str(errors[4])
    assert inner["images"] == [f"{read.images}/inner/b.jpg"]
    os.symlink(read.images, read.folder / "link")  # the folder itself may be one
    (record,) = read("llava", [talk("<image>", "A", image="a.jpg")], images=str(read.folder / "link"))
    assert record["images"] == [f"{read.folder}/link/a.jpg"]
    rows = [talk("<image>", "A", image=name) for name in ("door/x.jpg", "../x.jpg")]
    trusted = read("llava", rows, follow_links=True)
    assert trusted[0]["images"] == [f"{read.images}/door/x.jpg"] and trusted[1].reason == "path"
    (fault,) = read("llava", [talk("<image>", "A", image="a.tar#1+2")])
    assert "'a.tar#1+2' means a place in a tar file here; rename the file" in str(fault)
    (fault,) = read("llava", [talk("<image>", "A", image=".")])
    assert "'.' names no file" in str(fault)


def test_neighbours_with_the_same_beginning_are_outside(read):
    os.mkdir(read.images)
    os.mkdir(f"{read.images}-private")
    (read.folder / "images-private" / "x.jpg").touch()
    os.symlink(f"{read.images}-private/x.jpg", f"{read.images}/x.jpg")
    (fault,) = read("llava", [talk("<image>", "A", image="x.jpg")])
    assert fault.reason == "path"


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_memory_does_not_grow_with_the_file(read, suffix):
    """16 MB of rows pass through a few MB of memory."""
    line = json.dumps(talk("<image>\n" + "words " * 100, "more words " * 20, image="a.jpg"))
    rows = 16_000_000 // len(line)
    with open(read.folder / f"big.{suffix}", "w") as file:
        file.write(("[" + ",\n".join([line] * rows) + "]") if suffix == "json" else "\n".join([line] * rows))
    source = Source("llava", str(read.folder / f"big.{suffix}"), read.images, name="src")
    tracemalloc.start()
    count = sum(1 for _ in source_rows(source))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == rows and peak < 8_000_000
