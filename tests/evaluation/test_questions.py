"""Records -> questions, and back from rows."""

import json

import pytest

from dataset.record import RecordError, read_records, write_records
from evaluation.questions import fingerprint, make_question, make_questions, question_of_row


def record(answer: str = "red", name: str = "a", **meta) -> dict:
    turns = [{"role": "user", "content": "<image> or <image>?"}, {"role": "assistant", "content": answer}]
    return {"id": name, "source": "s", "images": ["b.png", "a.png"], "videos": [], "audios": [], "messages": turns,
            "meta": meta}  # fmt: skip


def test_only_the_last_turn_is_predicted(tiny):
    found = make_question(tiny.records(2)[1])
    assert found.answer == "Yes, green." and [turn["content"] for turn in found.turns[1:]] == ["green", "Sure?"]
    with pytest.raises(RecordError, match="record 'r1' has no assistant turn at its end"):
        made = tiny.records(2)[1]
        make_question({**made, "messages": made["messages"][:3]})


def test_reserved_keys_of_meta(tmp_path):
    """Through a file, as a reader of a benchmark would write them."""
    records = [
        record(name="plain", type="colour", number=3),
        record("2", name="vqa", metric="vqa", references=["2", "two", "two", ""]),
        record("B", name="choice", choices=["A", "B"]),
    ]
    write_records(records, tmp_path / "records.parquet")
    plain, vqa, choice = make_questions(read_records(tmp_path / "records.parquet"))
    assert (plain.metric, plain.references, plain.choices) == ("exact", ("red",), ())
    assert plain.meta == {"type": "colour", "number": 3} and vqa.meta == choice.meta == {}
    assert (vqa.metric, vqa.references) == ("vqa", ("2", "two", "two", ""))
    assert (choice.metric, choice.choices) == ("choice", ("A", "B"))
    assert plain.media == (("image", "b.png"), ("image", "a.png"))


def test_a_row_keeps_all_of_a_question():
    question = make_question(record("B", choices=["A", "B"], references=["B", "b"], metric="exact", type="t"))
    row = json.loads(json.dumps(question.row()))
    assert question_of_row(row) == question
    assert list(row) == ["id", "images", "videos", "meta", "turns", "answer", "references", "choices", "metric",
                         "conditions"]  # fmt: skip


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"choices": ["blue", "green"]}, "record 'a': the answer 'red' is none of meta.choices"),
        ({"choices": ["red", "red"]}, "two of meta.choices are the same"),
        ({"choices": ["red", ""]}, "one of meta.choices is empty"),
        ({"choices": []}, "meta.choices must be a list of at least one text"),
        ({"references": "red"}, "meta.references must be a list of at least one text, got 'red'"),
        ({"metric": "vqb"}, "meta.metric is 'vqb'.*did you mean 'vqa'"),
        ({"metric": "choice"}, "meta.metric is 'choice' without meta.choices"),
        ({"metric": 3}, "meta.metric is 3"),
        ({"metric": "yes_no"}, "meta.metric is 'yes_no', but the reference 'red' says neither yes nor no"),
        ({"metric": "yes_no", "references": ["B", "yes"]}, "the reference 'B' says neither"),
    ],
)
def test_faults_name_the_record(meta, message):
    with pytest.raises(RecordError, match=message):
        make_question(record(**meta))


def test_ids_tell_rows_apart():
    with pytest.raises(RecordError, match="two records have the id 'a'"):
        make_questions([record(), record()])
    with pytest.raises(ValueError, match="no records"):
        make_questions([])


def test_fingerprint():
    def of(*records) -> str:
        return fingerprint(make_questions(records))

    assert of(record()) == of(record()) != of(record("blue"))
    assert of(record(), record(name="b")) != of(record(name="b"), record())
    assert of(record(metric="vqa")) != of(record()) != of(record(type="x"))
