"""Formats of text alone and tables, each on a small file written exactly as it is published."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import Reader, dialogue, faults


@pytest.fixture
def read(tmp_path) -> Reader:
    return Reader(tmp_path)


DOLLY = [
    {
        "instruction": "When did Virgin Australia start operating?",
        "context": "Virgin Australia commenced services on 31 August 2000.",
        "response": "On 31 August 2000.",
        "category": "closed_qa",
    },
    {"instruction": "Name a fish.", "context": "", "response": "Tope", "category": "classification"},
]


def test_dolly(read):
    first, second = read("dolly", "\n".join(map(json.dumps, DOLLY)), "databricks-dolly-15k.jsonl", images=None)
    question = "When did Virgin Australia start operating?\nVirgin Australia commenced services on 31 August 2000."
    assert dialogue(first) == [("user", question), ("assistant", "On 31 August 2000.")]
    assert dialogue(second) == [("user", "Name a fish."), ("assistant", "Tope")]
    assert first["images"] == [] and (first["id"], first["source"]) == ("src:0", "src")


def test_alpaca(read):
    rows = [
        {"instruction": "Give three tips.", "input": "", "output": "1. Eat."},
        {"instruction": "Sort the words.", "input": "b, a", "output": "a, b"},
        {"instruction": "Sort the words.", "input": "b, a", "output": ""},
    ]
    first, second, empty = read("alpaca", rows, "alpaca_gpt4_data.json", images=None)
    assert dialogue(first) == [("user", "Give three tips."), ("assistant", "1. Eat.")]
    assert dialogue(second) == [("user", "Sort the words.\nb, a"), ("assistant", "a, b")]
    assert empty.reason == "empty answer"
    assert "alpaca_gpt4_data.json: record 'src:2': output is empty; fill it in, or drop the row" in str(empty)


def test_baize(read):
    head = "The conversation between human and AI assistant.\n"
    rows = [
        {"topic": "t", "input": f"{head}[|Human|] Hi!\n[|AI|] Hello.\nYou?\n[|Human|] Bye.\n[|AI|] Bye!\n[|Human|] "},
        {"topic": "t", "input": f"{head}[|Human|] Hi!\n[|AI|] Hello."},
        {"topic": "t", "input": f"{head}[|AI|] Hello.\n[|Human|] "},
        {"topic": "t", "input": f"{head}[|Human|] \n[|AI|] Hello."},
        {"topic": "t", "input": head},
        {"topic": "t", "input": f"{head}[|Human|] a\n[|Human|] b\n[|AI|] c"},
        {"topic": "t", "input": 7},
    ]
    first, second, *_ = results = read("baize", rows, "alpaca_chat_data.json", images=None)
    assert dialogue(first) == [("user", "Hi!"), ("assistant", "Hello.\nYou?"), ("user", "Bye."), ("assistant", "Bye!")]
    assert dialogue(second) == [("user", "Hi!"), ("assistant", "Hello.")]
    assert [reason for reason, _ in faults(results)] == [
        "roles", "empty turn", "malformed row", "roles", "malformed row"
    ]  # fmt: skip


TABLE = """image,instruction,answer,text
a.jpg,What is it?,A cat.,
,,,Once upon a time.
a.jpg,What is it?,,
"""


def test_table(read):
    cat, text, fault = read("table", TABLE, "t.csv")
    assert dialogue(cat) == [("user", "<image>\nWhat is it?"), ("assistant", "A cat.")]
    assert (cat["id"], cat["source"], cat["images"]) == ("src:0", "src", [f"{read.images}/a.jpg"])
    assert dialogue(text) == [("text", "Once upon a time.")] and text["id"] == "src:1"
    assert fault.reason == "nothing to learn" and "'src:2'" in str(fault)
    rows = [{"video": ["v.mp4", "w.mp4"], "text": "left", "answer": "right"}, "text", {"picture": "a.jpg"}]
    film, *errors = read("table", rows)
    assert film["videos"] == [f"{read.images}/v.mp4", f"{read.images}/w.mp4"]
    assert [error.reason for error in errors] == ["malformed row", "fields"]


def test_table_in_parquet(read):
    rows = [{"image": "a.jpg", "instruction": "What?", "answer": "A cat.", "text": None}, {"text": "Once."}]
    pq.write_table(pa.Table.from_pylist(rows), read.folder / "t.parquet")
    cat, text = read("table", None, "t.parquet")
    assert dialogue(cat) == [("user", "<image>\nWhat?"), ("assistant", "A cat.")] and not text["images"]


def test_missing_numbers_of_pandas_are_wrong_where_text_is_expected(read):
    (fault,) = read("table", '[{"image": NaN, "text": "T"}]')
    assert "image must be text, got nan; write it in quotes, or null for none" in str(fault)


def test_table_without_a_folder(read):
    cat, text, _ = read("table", TABLE, "t.csv", images=None)
    assert cat.reason == "media" and "set `images` of the source" in str(cat)
    assert dialogue(text) == [("text", "Once upon a time.")]


def test_a_faulty_row_of_a_table_names_its_line(read):
    short, good = read("table", "text,answer\nx\ny,z\n", "file.csv")
    assert short.reason == "unreadable row" and "file.csv, line 2: 1 cells for 2 columns" in str(short)
    assert good["id"] == "src:1"
    with pytest.raises(ValueError, match="file.txt: rows are read from"):
        read("table", "x", "file.txt")
