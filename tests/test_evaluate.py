"""evaluate.py: conditions, exact match, groups, gaps; answers equal to those of single prompts."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate as script
from dataset.record import write_records
from dataset.template import encode_prompt
from evaluate import CONDITIONS, chunks, evaluate, gaps, make_report, normalise, substitutes, wilson
from inference import MultiModalModel
from train import train
from visual.media import Media


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    train(tiny.config(folder, "max_steps=40", "save_steps=100", "per_device_train_batch_size=4", "dropout=0"))
    return folder


@pytest.fixture(scope="module")
def model(checkpoint) -> MultiModalModel:
    return MultiModalModel.from_pretrained(checkpoint)


def images(*paths: str) -> list[tuple[str, str]]:
    return [("image", path) for path in paths]


def fake(answers: list[dict]) -> list[dict]:
    """Answered questions: `{"answer", "real", "blind", "shuffled", "image", meta...}`."""
    keys = ("answer", *CONDITIONS[:3])
    return [
        {**{k: a[k] for k in keys}, "id": str(i), "media": [("image", a.get("image", str(i)))],
         "meta": {k: v for k, v in a.items() if k not in (*keys, "image")}}
        for i, a in enumerate(answers)
    ]  # fmt: skip


def test_normalise():
    assert normalise("  Two  red\nCUBES. ") == "two red cubes"
    assert normalise("红色。") == normalise("红色") == "红色"
    assert normalise("3.5") == "3.5" and normalise("no") != normalise("not")


def test_answers_of_batches_equal_those_of_single_prompts(model, tiny, tmp_path):
    file = tmp_path / "answers.jsonl"
    evaluate(model, tiny.records(24), tiny.folder / "images", batch_size=7, max_new_tokens=4, predictions_file=file)
    found = {line["id"]: line for line in map(json.loads, file.read_text().splitlines())}
    assert len(found) == 24
    swap = substitutes([{"media": images(*record["images"])} for record in tiny.records(24)], seed=0)
    for record in tiny.records(24):
        prompt = encode_prompt(record["messages"][:-1], model.tokenizer, model.media.num_features)
        for condition in CONDITIONS[:3]:
            media = images(*record["images"])
            names = [(swap[medium] if condition == "shuffled" else medium)[1] for medium in media]
            pixel_values = torch.cat([model.encoder.preprocess([tiny.folder / "images" / name]) for name in names]
                                     ) if names else None  # fmt: skip
            features = None if pixel_values is None else model.encode_images(pixel_values)
            if condition == "blind" and features is not None:
                features = features * 0
            ids = model.generate([prompt], features=features, max_new_tokens=4, do_sample=False)
            assert found[record["id"]][condition] == model.tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def test_only_the_last_turn_is_predicted(model, tiny):
    record = tiny.records(2)[1]
    q = script.make_question(record)
    assert q["answer"] == "Yes, green." and [turn["content"] for turn in q["turns"]][1:] == ["green", "Sure?"]
    with pytest.raises(ValueError, match="record 'r1' has no assistant turn at its end"):
        script.make_question({**record, "messages": record["messages"][:3]})


def test_each_image_is_encoded_once_and_memory_is_bounded(model, tiny, monkeypatch):
    encoded = []
    original = Media.load
    monkeypatch.setattr(Media, "load", lambda *args: encoded.append(args[2].name) or original(*args))
    one = evaluate(model, tiny.records(24), tiny.folder / "images", max_new_tokens=2)
    assert sorted(encoded) == ["blue.png", "green.png", "red.png", "white.png"]
    monkeypatch.setattr(script, "FEATURE_BYTES", 2 * 4 * 32 * 4)  # two images at a time
    two = evaluate(model, tiny.records(24), tiny.folder / "images", max_new_tokens=2)
    assert len(encoded) == 4 + 4 * 2
    assert one["accuracy"] == two["accuracy"] and one["by_type"] == two["by_type"]


def test_chunks_keep_questions_about_an_image_together():
    questions = [{"turns": [], "media": images(f"{i % 10}.png")} for i in range(50)] + [{"turns": [], "media": []}]
    made = list(chunks(questions, 0, 6))
    assert sorted(len(c) for c in made) == [5, 15, 15, 16]
    assert sum(len({str(q["media"]) for q in c if q["media"]}) for c in made) == 10


def test_substitutes_are_a_derangement_fixed_by_the_seed():
    questions = [{"media": images(f"{i}.png", f"{i + 1}.png")} for i in range(20)]
    first = substitutes(questions, 0)
    assert sorted(first) == sorted(first.values()) and all(a != b for a, b in first.items())
    assert first == substitutes(questions[::-1], 0) != substitutes(questions, 1)
    with pytest.raises(ValueError, match="all records show a.png; the condition 'shuffled' needs a second image"):
        substitutes([{"media": images("a.png")}] * 3, 0)


def test_report_counts():
    rows = [
        {"answer": "red", "real": "Red.", "blind": "blue", "shuffled": "blue", "type": "colour", "language": "en"},
        {"answer": "red", "real": "red", "blind": "red", "shuffled": "blue", "type": "colour", "language": "zh"},
        {"answer": "2", "real": "3", "blind": "2", "shuffled": "3", "type": "count", "language": "en"},
        {"answer": "3", "real": "3", "blind": "2", "shuffled": "3", "type": "count", "language": "en"},
    ]
    report = make_report(fake(rows), CONDITIONS[:3])
    assert report["accuracy"] == {"real": 0.75, "blind": 0.5, "shuffled": 0.25}
    assert (report["n"], report["majority"]) == (4, 0.5)
    count = report["by_type"]["count"]
    assert {k: count[k] for k in ("real", "blind", "shuffled", "majority", "n")} == {
        "real": 0.5, "blind": 0.5, "shuffled": 0.5, "majority": 0.5, "n": 2}  # fmt: skip
    assert report["by_language"]["zh"]["real"] == 1 and report["by_language"]["en"]["n"] == 3
    assert set(report["by_type_language"]) == {"colour/en", "colour/zh", "count/en"}
    assert report["looks"]["real_minus_blind"] == 0.25 and report["looks"]["real_minus_shuffled"] == 0.5
    assert json.loads(json.dumps(report)) == report
    table = script.format_report({**report, "seconds": {"real": 1.0}})
    assert "type count" in table and "real minus blind: 25.0 points" in table


def test_identifiers_are_no_groups():
    rows = [dict(answer="a", real="a", blind="b", shuffled="b", type="t", scene=i) for i in range(40)]
    report = make_report(fake(rows), CONDITIONS[:3])
    assert "by_type" in report and not any("scene" in key for key in report)


def test_wilson_interval():
    """Against the published example of 81 successes in 263 trials at z = 1.96: 0.2553 to 0.3662 (Newcombe, 1998)."""
    assert wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == pytest.approx(1)


def test_gap_interval_resamples_images():
    """Twenty questions about each of ten images, right or wrong together, say no more than ten questions."""
    rows = [dict(answer="a", real="a" if i % 10 < 5 else "b", blind="b", shuffled="b", image=str(i % 10))
            for i in range(200)]  # fmt: skip
    questions = fake(rows)
    right = {c: np.array([q[c] == "a" for q in questions]) for c in CONDITIONS[:3]}
    low, high = gaps(questions, right)["real_minus_blind_interval"]
    assert low == pytest.approx(0.2, abs=0.11) and high == pytest.approx(0.8, abs=0.11)


def test_script_writes_report_and_predictions(checkpoint, tiny, tmp_path, monkeypatch, capsys):
    write_records(tiny.records(24), tmp_path / "test.parquet")
    report_file, answers = tmp_path / "out/report.json", tmp_path / "out/answers.jsonl"
    arguments = ["--checkpoint_path", checkpoint, "--data", tmp_path / "test.parquet", "--image_root",
                 tiny.folder / "images", "--limit", 12, "--output", report_file, "--predictions", answers]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    script.main()
    report = json.loads(report_file.read_text())
    assert set(report["accuracy"]) == set(CONDITIONS[:3]) and report["n"] == 12
    assert set(report["by_type"]) == {"colour", "text"}
    assert report["seconds"]["total"] > 0
    assert len(answers.read_text().splitlines()) == 12
    assert "real minus shuffled" in capsys.readouterr().out
    assert sorted(path.name for path in report_file.parent.iterdir()) == ["answers.jsonl", "report.json"]


def test_no_records():
    with pytest.raises(ValueError, match="no records"):
        evaluate(torch.nn.Linear(1, 1), [], ".")
