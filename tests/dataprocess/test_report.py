import json

import pytest

from dataprocess.report import EXAMPLES, Drops, Tally, table


def test_counts_and_first_examples():
    tally = Tally(read=10, kept=2)
    for number in range(7):
        tally.drop("image missing", f"record {number}")
    tally.drop("empty answer", "record x")
    assert tally.as_dict() == {
        "read": 10,
        "kept": 2,
        "dropped": {
            "empty answer": {"count": 1, "examples": ["record x"]},
            "image missing": {"count": 7, "examples": [f"record {number}" for number in range(EXAMPLES)]},
        },
    }


def test_stop_and_skip(tmp_path):
    strict = Drops(tmp_path / "d.jsonl", "stop", ["s"])
    with strict, pytest.raises(ValueError, match="(?s)no cat.*on_error=skip"):
        strict.add("s", "s:1", "cat", "record 's:1': no cat")
    with Drops(tmp_path / "d.jsonl", "skip", ["s"]) as drops:
        assert not drops.publish(tmp_path / "dropped.jsonl")
        drops.add("s", "s:1", "cat", "record 's:1': no 猫, but \udc80")
        assert drops.publish(tmp_path / "dropped.jsonl")
    assert drops.tallies["s"].dropped == {"cat": 1}
    (line,) = map(json.loads, (tmp_path / "dropped.jsonl").read_text(encoding="utf-8").splitlines())
    assert line["record"] == "s:1" and "猫" in line["problem"]
    with Drops(tmp_path / "d.jsonl", "skip", ["s"]) as drops:  # a run that ends before anything is published
        drops.add("s", "s:1", "cat", "x")
    assert not (tmp_path / "d.jsonl").exists()


def test_table():
    clean, mixed = Tally(read=100, kept=100), Tally(read=3, kept=1)
    mixed.drop("image missing", "x")
    mixed.drop("empty answer", "y")
    assert table({"clean": clean, "mixed_source": mixed}).splitlines() == [
        "source        read  kept  empty answer  image missing",
        "clean          100   100             0              0",
        "mixed_source     3     1             1              1",
        "total          103   101             1              1",
    ]
