"""dataset/table.py and dataset/rows.py: rows of tables become records, or an error that says what they lack."""

import json

import pytest

from dataset.record import RecordError, read_records
from dataset.rows import read_csv_rows
from dataset.table import record_of_row


def made(**row) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    record = record_of_row(row, "r")
    turns = [(turn["role"], turn["content"]) for turn in record["messages"]]
    return turns, record["images"], record["videos"]


def chat(question: str, answer: str) -> list[tuple[str, str]]:
    return [("user", question), ("assistant", answer)]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"instruction": "Q", "answer": "A"}, chat("Q", "A")),
        ({"instruction": "Q", "text": "T", "answer": "A"}, chat("Q\nT", "A")),
        ({"instruction": "Q", "image": "i", "answer": "A"}, chat("<image>\nQ", "A")),
        ({"instruction": "Q", "text": "T", "image": "i", "video": "v", "answer": "A"},
         chat("<image><video>\nQ\nT", "A")),
        ({"instruction": "Q", "image": ["i", "j"], "answer": "A"}, chat("<image><image>\nQ", "A")),
        ({"instruction": "Is <image> red?", "image": "i", "answer": "A"}, chat("Is <image> red?", "A")),
        ({"instruction": "Q", "text": "T <image>", "image": "i", "video": "v", "answer": "A"},
         chat("<video>\nQ\nT <image>", "A")),
        ({"image": "i", "answer": "A"}, chat("<image>", "A")),
        ({"video": "v", "text": "T", "answer": "A"}, chat("<video>\nT", "A")),
        ({"text": "T", "answer": " A "}, chat("T", " A ")),
        ({"text": " T\n"}, [("text", " T\n")]),
        ({"text": "T", "image": "i"}, [("text", "<image>T")]),
        ({"text": "T<video>T", "video": "v", "image": "i"}, [("text", "<image>T<video>T")]),
        ({"text": "T", "image": "", "instruction": "  ", "answer": None, "video": []}, [("text", "T")]),
    ],
)  # fmt: skip
def test_rows(row, turns):
    def paths(key):
        value = row.get(key)
        return value if isinstance(value, list) else [value] if value else []

    assert made(**row) == (turns, paths("image"), paths("video"))


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({"instruction": "Q"}, "nothing to learn", "an instruction without an answer; fill in `answer`, or call"),
        ({"instruction": "Q", "image": "i", "text": "T", "answer": " "}, "nothing to learn", "without an answer"),
        ({"answer": "A"}, "nothing to learn", "an answer to nothing; fill in `instruction`"),
        ({"image": "i"}, "nothing to learn", "media without words; fill in `answer` or `text`"),
        ({}, "nothing to learn", "an empty row"),
        ({"txt": "T"}, "fields", "unknown key 'txt' in a row without messages .did you mean 'text'"),
        ({"text": "T", "Image": "i"}, "fields", "unknown key 'Image'.*did you mean 'image'"),
        ({"text": "T", "question": "Q"}, "fields", "unknown key 'question'.*known are text, image, video"),
        ({"instruction": "Q", "answer": 7}, "fields", "answer must be text, got 7; write it in quotes"),
        ({"text": ["T"]}, "fields", "text must be text"),
        ({"text": "T", "image": 7}, "fields", "image must be text, got 7"),
        ({"text": "T", "image": ["i", ""]}, "fields", "image must be a path or a list of paths"),
    ],
)
def test_faults(row, reason, message):
    with pytest.raises(RecordError, match=message) as caught:
        record_of_row(row, "r")
    assert caught.value.reason == reason and "'r'" in str(caught.value)


ROWS = [
    {"instruction": "What, then?", "image": "a.png", "answer": 'A "cat".'},
    {"text": "Line one.\nLine two."},
    {"video": "v.mp4", "text": "红色", "answer": "left"},
]
CSV = """\
instruction,image,video,text,answer
"What, then?",a.png,,,"A ""cat""."

,,,"Line one.
Line two.",
,,v.mp4,红色,left
"""


def test_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "c.csv").write_text("\ufeff" + CSV)
    (tmp_path / "d.csv").write_text(CSV.replace("\n", "\r\n"), newline="")
    expected = [
        {"images": ["a.png"], "videos": [], "messages": chat("<image>\nWhat, then?", 'A "cat".')},
        {"images": [], "videos": [], "messages": [("text", "Line one.\nLine two.")]},
        {"images": [], "videos": ["v.mp4"], "messages": chat("<video>\n红色", "left")},
    ]
    for name in ("a.json", "b.jsonl", "c.csv"):
        records = list(read_records(tmp_path / name))
        assert [record["id"] for record in records] == [f"{name[0]}:{row}" for row in range(3)]
        for record, part in zip(records, expected, strict=True):
            assert [(turn["role"], turn["content"]) for turn in record["messages"]] == part["messages"]
            assert {key: record[key] for key in ("images", "videos")} == {k: part[k] for k in ("images", "videos")}
            assert record["source"] == name[0] and record["meta"] == {}
    assert len(read_records(tmp_path)) == 12
    assert read_records(tmp_path / "d.csv")[1]["messages"][0]["content"] == "Line one.\r\nLine two."


def test_rows_and_records_in_one_file(tmp_path):
    record = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    (tmp_path / "mixed.json").write_text(json.dumps([record, ROWS[1]]))
    assert [r["messages"][0]["role"] for r in read_records(tmp_path / "mixed.json")] == ["user", "text"]


def test_a_very_long_cell(tmp_path):
    (tmp_path / "long.csv").write_text("text\n" + "x" * 200_000)
    assert len(read_records(tmp_path / "long.csv")[0]["messages"][0]["content"]) == 200_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,image\nT,\n,a.png\n", "t.csv: record 't:1': nothing can be learned from media without words"),
        ("text,image\nT <image> <image>,a.png\n", "t.csv: record 't:0': 2 <image> in its text for 1 images"),
        ("instruction,answer\nWhat is <image>?,A\n", "t.csv: record 't:0': 1 <image> in its user turns for 0 images"),
        ("text,images\nT,\n", "t.csv: record 't:0': unknown key 'images'.*did you mean 'image'"),
        ("text,messages\nT,x\n", "t.csv: record 't:0': unknown key 'messages'"),
        ("text,answer\nT\n", "t.csv, line 2: 1 cells for 2 columns; a text with commas"),
        ('text\n"T\n', "t.csv, line 2: not valid CSV"),
        ("text,text\nT,T\n", "t.csv: each column has a name of its own"),
        ("text,\nT,T\n", "t.csv: each column has a name of its own"),
        ("", "t.csv: each column has a name of its own"),
    ],
)
def test_faulty_csv_files(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "t.csv")


@pytest.mark.parametrize(("name", "line", "byte"), [("t.csv", 2, 5), ("t.json", 1, 2), ("t.jsonl", 1, 2)])
def test_other_encodings_name_the_place(tmp_path, name, line, byte):
    (tmp_path / name).write_bytes(b"text\n\xff\xfe" if name == "t.csv" else b'["\xff"]')
    with pytest.raises(ValueError, match=f"{name}, line {line}: not UTF-8 at byte {byte} of the file; save it"):
        read_records(tmp_path / name)


def test_csv_rows_are_read_one_by_one(tmp_path):
    (tmp_path / "t.csv").write_text("text\nfirst\n" + '"second')
    rows = read_csv_rows(tmp_path / "t.csv")
    assert next(rows) == {"text": "first"}


def test_a_record_without_messages_is_not_taken_for_a_row(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps([{"id": "x", "images": ["a.png"]}]))
    with pytest.raises(RecordError, match="'x': messages must be a non-empty list"):
        read_records(tmp_path / "r.json")
