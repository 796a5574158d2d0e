import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset.record import RecordError, read_records, validate_record, write_records


def make(number: int = 0, **fields) -> dict:
    return {
        "id": f"r{number}",
        "source": "test",
        "images": ["a/1.jpg"],
        "messages": [{"role": "user", "content": "<image>\n这是什么？"}, {"role": "assistant", "content": "A cat."}],
        **fields,
    }


def complete(record: dict) -> dict:
    return {"videos": [], "audios": [], "meta": {}, **record}


def turns(*roles_and_contents: str) -> list[dict]:
    pairs = zip(roles_and_contents[::2], roles_and_contents[1::2], strict=True)
    return [{"role": role, "content": content} for role, content in pairs]


LONG = ("system", "Be brief.", "user", "<image> or <image>?", "assistant", "One.", "user", "Why?", "assistant", "😀")
RECORDS = [
    make(0, meta={"language": "zh", "objects": 3}),
    make(1, images=[], messages=turns("user", "hi", "assistant", "<|im_start|> ok")),
    make(2, images=["x.png", "y.png"], messages=turns(*LONG)),
    make(3, videos=["v.mp4"], messages=turns("user", "<video> <image>", "assistant", "Yes.")),
    make(4, messages=turns("text", "A cat <image> sleeps.")),
]


def test_record_needs_no_torch():
    code = "import sys, dataset.record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_parquet_round_trip(tmp_path):
    assert write_records(iter(RECORDS), tmp_path / "new" / "r.parquet") == 5
    records = read_records(tmp_path / "new" / "r.parquet")
    assert list(records) == [complete(record) for record in RECORDS]
    assert [records[i] for i in (0, 1, 2, -1)] == [complete(RECORDS[i]) for i in (0, 1, 2, -1)]
    assert [r["id"] for r in records[3:]] == ["r3", "r4"] and [r["id"] for r in records[::-2]] == ["r4", "r2", "r0"]
    assert len(records[2:1]) == 0
    with pytest.raises(IndexError):
        records[5]


def test_lists_that_an_evaluation_reads(tmp_path):
    meta = {"references": ["a", "a", ""], "choices": ["a", "b"], "metric": "vqa"}
    write_records([make(0, meta=meta)], tmp_path / "r.parquet")
    assert read_records(tmp_path / "r.parquet")[0]["meta"] == meta


def test_many_blocks_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.record.BLOCK", 4)
    rows = [make(i, meta={"i": i}) for i in range(11)]
    write_records(rows, tmp_path / "r.parquet")
    records = read_records(tmp_path / "r.parquet")
    assert list(records) == [complete(row) for row in rows] == [records[i] for i in range(11)]


def test_equal_records_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_records(RECORDS, tmp_path / f"{name}.parquet")
    swapped = make(0, meta={"objects": 3, "language": "zh"})
    write_records([swapped, *RECORDS[1:]], tmp_path / "c.parquet")
    contents = {(tmp_path / f"{name}.parquet").read_bytes() for name in "abc"}
    assert len(contents) == 1


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_text_files_take_defaults_from_the_file(tmp_path, suffix):
    rows = [{key: RECORDS[1][key] for key in ("messages",)}, RECORDS[2]]
    lines = json.dumps(rows) if suffix == "json" else "\n\n".join(map(json.dumps, rows))
    (tmp_path / f"mine.{suffix}").write_text(lines)
    first, second = read_records(tmp_path / f"mine.{suffix}")
    assert first == complete({**RECORDS[1], "id": "mine:0", "source": "mine", "images": []})
    assert second == complete(RECORDS[2])


def test_parquet_of_others_takes_defaults_and_casts(tmp_path):
    turn = pa.struct({"content": pa.string(), "role": pa.string()})  # the other way round
    messages = pa.array([RECORDS[1]["messages"]], pa.large_list(turn))
    pq.write_table(pa.table({"messages": messages}), tmp_path / "other.parquet")
    assert list(read_records(tmp_path / "other.parquet")) == [
        complete({**RECORDS[1], "id": "other:0", "source": "other", "images": []})
    ]


def test_folder_and_several_paths(tmp_path):
    write_records([make(1)], tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(make(0)))
    (tmp_path / "notes.txt").write_text("not a record")
    assert [r["id"] for r in read_records(tmp_path)] == ["r0", "r1"]
    assert [r["id"] for r in read_records([tmp_path / "b.parquet", str(tmp_path)])] == ["r1", "r0", "r1"]


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_records(tmp_path / "nowhere.parquet")
    with pytest.raises(FileNotFoundError, match="holds some"):
        read_records(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps(make(0)) + "\n{oops\n")
    with pytest.raises(ValueError, match="a.jsonl, line 2"):
        read_records(tmp_path / "a.jsonl")
    (tmp_path / "b.json").write_text(json.dumps(make(0)))
    with pytest.raises(ValueError, match="expected a JSON list"):
        read_records(tmp_path / "b.json")
    (tmp_path / "c.jsonl").write_text(json.dumps(make(0, image=["x"])))
    with pytest.raises(RecordError, match="c.jsonl: record 'r0': unknown field 'image' .did you mean 'images'"):
        read_records(tmp_path / "c.jsonl")
    pq.write_table(pa.table({"mesages": ["x"]}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match="d.parquet: unknown column 'mesages' .did you mean 'messages'"):
        read_records(tmp_path / "d.parquet")
    pq.write_table(pa.table({"messages": ["x"]}), tmp_path / "e.parquet")
    with pytest.raises(ValueError, match="e.parquet: column 'messages' must be of type"):
        read_records(tmp_path / "e.parquet")


@pytest.mark.parametrize(
    ("change", "reason", "message"),
    [
        ({"images": []}, "placeholders", "1 <image> in its user turns for 0 images"),
        ({"images": ["a", "b"]}, "placeholders", "1 <image> in its user turns for 2 images"),
        ({"images": "a.jpg"}, "fields", "images must be a list"),
        ({"id": ""}, "fields", "id must be"),
        ({"source": None}, "fields", "source must be"),
        ({"meta": {"a": 1.5}}, "fields", "meta must map"),
        ({"meta": {"a": ["b"]}}, "fields", "meta must map .*references and choices: to lists of strings"),
        ({"meta": {"references": ["b", 2]}}, "fields", "meta must map"),
        ({"meta": {"choices": {"b": "c"}}}, "fields", "meta must map"),
        ({"message": []}, "fields", "did you mean 'messages'"),
        ({"messages": []}, "messages", "non-empty list"),
        ({"messages": turns("human", "<image>")}, "messages", "message 0 must be"),
        ({"messages": [{"role": "user", "content": "<image>", "name": "x"}]}, "messages", "message 0 must be"),
        ({"messages": turns("user", "<image>\ud83d", "assistant", "x")}, "messages", "valid text"),
        ({"messages": turns("user", "<image>", "user", "again")}, "roles", "'user' after 'user'"),
        ({"messages": turns("user", "<image>", "system", "x")}, "roles", "'system' after 'user'"),
        ({"messages": turns("user", "<image>", "assistant", " \n")}, "empty answer", "message 1"),
        ({"messages": turns("user", "x", "assistant", "<image>")}, "placeholders", "images stand in user turns only"),
        ({"messages": turns("system", "<video>")}, "placeholders", "<video> in a system turn; videos stand in user"),
        ({"videos": ["v.mp4"]}, "placeholders", "0 <video> in its user turns for 1 videos; .* each video belongs"),
        ({"messages": turns("user", "<image><video>")}, "placeholders", "1 <video> in its user turns for 0 videos"),
        ({"messages": turns("assistant", "Hello.", "user", "<image>")}, "roles", "starts with the assistant .message"),
        ({"messages": turns("system", "S", "assistant", "x")}, "roles", "starts with the assistant .message 1.; put"),
        ({"messages": turns("user", " \n", "assistant", "x")}, "empty turn", "message 0 is a user turn without words"),
        ({"images": ["/a/1.jpg"]}, "path", "images: '/a/1.jpg' is absolute or climbs"),
        ({"images": ["a/../../1.jpg"]}, "path", "climbs with ..; name files relative to their folder"),
        ({"videos": ["..\\\\v.mp4"]}, "path", "videos: .* climbs"),
        ({"audios": ["\0"]}, "path", "audios"),
        ({"images": ["\ud800"]}, "fields", "images must be a list"),
        ({"id": "\udfff"}, "fields", "id must be"),
        ({"meta": {"a": "\ud800"}}, "fields", "meta must map"),
        ({"meta": []}, "fields", "meta must map"),
        ({"messages": turns("text", "no picture")}, "placeholders", "0 <image> in its text for 1 images"),
        ({"messages": turns("text", " <image> ")}, "empty text", "message 0 is a plain text without words"),
        ({"messages": turns("text", "<image>", "assistant", "x")}, "roles", "message 0 has role 'text', which is for"),
        ({"messages": turns("user", "<image>", "text", "x")}, "roles", "message 1 has role 'text', which is for"),
    ],
)
def test_broken_records_are_refused(change, reason, message):
    with pytest.raises(RecordError, match=message) as caught:
        validate_record(make(0, **change))
    assert caught.value.reason == reason
    if "id" not in change:
        assert "'r0'" in str(caught.value)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.record.BLOCK", 2)
    file = tmp_path / "r.parquet"
    write_records([make(0)], file)
    before = file.read_bytes()
    with pytest.raises(RecordError, match="'r1'.*two records have this id"):
        write_records([make(1), make(2), make(3), make(1)], file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_parquet_rows_are_validated_at_access(tmp_path):
    write_records([make(0), make(1)], tmp_path / "r.parquet")
    table = pq.read_table(tmp_path / "r.parquet")
    column = table.schema.get_field_index("images")
    table = table.set_column(column, "images", pa.array([["a"], ["a", "b"]]))
    pq.write_table(table, tmp_path / "r.parquet")
    records = read_records(tmp_path / "r.parquet")
    assert records[0]["images"] == ["a"]
    with pytest.raises(RecordError, match="'r1'"):
        records[1]
