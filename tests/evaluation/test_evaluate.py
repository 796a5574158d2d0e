"""evaluate.py and its report: conditions, groups, gaps; answers equal to those of single prompts."""

import json
import runpy
import shutil
import sys

import pytest
import torch
from PIL import Image

import evaluate as script
from dataset.record import RecordError, read_records, write_records
from dataset.template import encode_prompt
from evaluation import features as features_module
from evaluation.answering import Asking, answer_questions, check_lengths, evaluate
from evaluation.order import CONDITIONS, chunks, substitutes
from evaluation.questions import Question, make_questions
from evaluation.results import format_report, make_report, markdown
from visual.media import Media


def images(*paths: str) -> tuple[tuple[str, str], ...]:
    return tuple(("image", path) for path in paths)


def question(number: int, *paths: str) -> Question:
    return Question(str(number), (), "a", ("a",), (), "exact", images(*paths), {})


def row(number: int, real: str, blind: str, shuffled: str, answer: str = "a", image: str | None = None, **meta) -> dict:
    """A row with answers under three conditions, each right if it is `answer`."""
    said = {"real": real, "blind": blind, "shuffled": shuffled}
    return {
        "id": str(number), "images": [f"{number}.png" if image is None else image], "videos": [], "meta": meta,
        "turns": [{"role": "user", "content": "<image>\n?"}], "answer": answer, "references": [answer], "choices": [],
        "metric": "exact",
        "conditions": {name: {"answer": text, "score": float(text == answer)} for name, text in said.items()},
    }  # fmt: skip


def rows_in(file) -> dict[str, dict]:
    return {row["id"]: row for row in map(json.loads, file.read_text().splitlines())}


def test_answers_of_batches_equal_those_of_single_prompts(model, tiny, tmp_path):
    evaluate(model, tiny.records(24), tiny.folder / "images", batch_size=7, max_new_tokens=4, output=tmp_path)
    found = rows_in(tmp_path / "rows.jsonl")
    assert list(found) == [record["id"] for record in tiny.records(24)]
    swap = substitutes([question(0, *record["images"]) for record in tiny.records(24)], seed=0)
    differ = set()
    for record in tiny.records(24):
        prompt = encode_prompt(record["messages"][:-1], model.tokenizer, model.media.num_features)
        for condition in CONDITIONS[:3]:
            names = [(swap[medium] if condition == "shuffled" else medium)[1] for medium in images(*record["images"])]
            pixel_values = torch.cat([model.encoder.preprocess([tiny.folder / "images" / name]) for name in names]
                                     ) if names else None  # fmt: skip
            features = None if pixel_values is None else model.encode_images(pixel_values)
            if condition == "blind" and features is not None:
                features = features * 0
            ids = model.generate([prompt], features=features, max_new_tokens=4, do_sample=False)
            expected = model.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
            result = found[record["id"]]["conditions"][condition]
            assert result["answer"] == expected
            assert result.get("images") == (names if condition == "shuffled" and names else None)
            differ.add((condition, expected))
    assert len({answer for _, answer in differ}) > 2  # or the comparison would say little


def test_text_is_asked_once_and_takes_no_part_in_looking(model, tiny, monkeypatch):
    asked = []
    original = script.evaluate.__globals__["respond"]
    monkeypatch.setattr("evaluation.answering.respond", lambda model, questions, *rest: asked.extend(questions)
                        or original(model, questions, *rest))  # fmt: skip
    report = evaluate(model, tiny.records(24), tiny.folder / "images", max_new_tokens=2)
    assert (report["n"], report["looking"]["n"]) == (24, 21)
    assert len(asked) == 3 * 21 + 3
    text = [record for record in tiny.records(24) if not record["images"]]
    report = evaluate(model, text, tiny.folder / "images", max_new_tokens=2, perplexity=True)
    assert report["conditions"] == ["real"] and report["looking"] is None
    assert "no looking score" in format_report(report) and report["metrics"]["perplexity"]["real"]["value"] > 1


def test_each_image_is_encoded_once_and_memory_is_bounded(model, tiny, monkeypatch):
    encoded = []
    original = Media.load
    monkeypatch.setattr(Media, "load", lambda *args: encoded.append(args[2].name) or original(*args))
    one = evaluate(model, tiny.records(24), tiny.folder / "images", max_new_tokens=2)
    assert sorted(encoded) == ["blue.png", "green.png", "red.png", "white.png"]
    monkeypatch.setattr(features_module, "FEATURE_BYTES", 2 * 4 * 32 * 4)  # two images at a time
    two = evaluate(model, tiny.records(24), tiny.folder / "images", max_new_tokens=2)
    assert len(encoded) == 4 + 4 * 2
    assert one["score"] == two["score"] and one["groups"] == two["groups"]


def test_chunks_keep_questions_about_an_image_together():
    questions = [question(i, f"{i % 10}.png") for i in range(50)] + [question(50)]
    made = list(chunks(questions, 0, 6))
    assert sorted(len(c) for c in made) == [5, 15, 15, 16]
    assert sum(len({q.media for q in c if q.media}) for c in made) == 10


def test_substitutes_are_a_derangement_fixed_by_the_seed():
    questions = [question(i, f"{i}.png", f"{i + 1}.png") for i in range(20)]
    first = substitutes(questions, 0)
    assert sorted(first) == sorted(first.values()) and all(a != b for a, b in first.items())
    assert first == substitutes(questions[::-1], 0) != substitutes(questions, 1)
    with pytest.raises(ValueError, match="all records show a.png; the condition 'shuffled' needs a second image"):
        substitutes([question(i, "a.png") for i in range(3)], 0)


def test_a_picture_is_not_replaced_by_one_beside_it():
    """Where any other will do: of these pairs each would still show one of its own in the place of the other."""
    for seed in range(20):
        questions = [question(i, f"{2 * i}.png", f"{2 * i + 1}.png") for i in range(3)]
        found = substitutes(questions, seed)
        assert sorted(found) == sorted(found.values())
        assert all(found[medium] not in q.media for q in questions for medium in q.media)
    always = substitutes([question(0, "a.png", "b.png")], 0)
    assert always == dict(zip(images("a.png", "b.png"), images("b.png", "a.png"), strict=True))


# Reports


def test_report_counts():
    rows = [
        row(0, "red", "blue", "blue", "red", type="colour", language="en"),
        row(1, "red", "red", "blue", "red", type="colour", language="zh"),
        row(2, "3", "2", "3", "2", type="count", language="en"),
        row(3, "3", "2", "3", "3", type="count", language="en"),
    ]
    report = make_report(rows)
    assert {name: report["score"][name]["value"] for name in CONDITIONS[:3]} == {
        "real": 0.75, "blind": 0.5, "shuffled": 0.25}  # fmt: skip
    assert (report["n"], report["score"]["n"], report["score"]["majority"]) == (4, 4, 0.5)
    assert report["metrics"]["exact"]["real"] == report["score"]["real"]
    assert report["score"]["real"]["low"] <= 0.75 <= report["score"]["real"]["high"]
    count = report["groups"]["type"]["count"]
    assert {name: count[name]["value"] for name in CONDITIONS[:3]} == {"real": 0.5, "blind": 0.5, "shuffled": 0.5}
    assert (count["majority"], count["n"], count["looking_score"]) == (0.5, 2, None)
    assert report["groups"]["language"]["zh"]["real"]["value"] == 1 and report["groups"]["language"]["en"]["n"] == 3
    assert set(report["groups"]["type x language"]) == {"colour x en", "colour x zh", "count x en"}
    assert report["looking"]["gain"]["value"] == 0.25 and report["looking"]["gain_over_shuffled"]["value"] == 0.5
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    table = format_report({**report, "seconds": {"real": 1.0}})
    assert "type: count" in table and "real minus blind: 25.0 points" in table


def test_every_metric_has_its_conditions_and_its_questions():
    rows = [row(number, "a", "b", "a") for number in range(7)]
    rows[0] |= {"metric": "vqa", "references": ["a1"] * 7 + ["x"] * 3}
    for condition, likelihoods in (("real", [-2.0, -1.0]), ("blind", [-1.0, -2.0]), ("shuffled", [-2.0, -1.0])):
        rows[1]["conditions"][condition] |= {"likelihoods": likelihoods, "likelihood_sums": [-3.0, -4.0]}
    rows[1] |= {"metric": "choice", "choices": ["b", "a"]}
    for number, answer in ((2, "yes"), (3, "no"), (4, "no")):
        rows[number] |= {"metric": "yes_no", "answer": answer, "references": [answer]}
        for condition, said in (("real", "Yes."), ("blind", "是"), ("shuffled", "perhaps")):
            rows[number]["conditions"][condition]["answer"] = said
    rows[5] |= {"metric": "anls", "references": ["a"]}
    metrics = make_report(rows)["metrics"]
    assert {name: figures["n"] for name, figures in metrics.items()} == {
        "exact": 1, "vqa": 1, "anls": 1, "choice": 1, "choice_by_sum": 1, "yes_no": 3}  # fmt: skip
    assert metrics["choice"]["real"]["value"] == 1 and metrics["choice"]["blind"]["value"] == 0
    assert metrics["choice_by_sum"]["real"]["value"] == 0
    real = metrics["yes_no"]["real"]
    assert [real[key] for key in ("value", "precision", "recall", "f1", "yes_ratio", "neither")] == [
        pytest.approx(x) for x in (1 / 3, 1 / 3, 1, 0.5, 1, 0)]  # fmt: skip
    assert metrics["yes_no"]["shuffled"]["precision"] is None and metrics["yes_no"]["shuffled"]["neither"] == 1
    forced = make_report(rows, ["exact", "choice"])["metrics"]
    assert forced["exact"]["n"] == 7 and forced["choice"]["n"] == 1 and set(forced) == {
        "exact", "choice", "choice_by_sum"}  # fmt: skip
    with pytest.raises(ValueError, match="'choice' needs meta.choices"):
        make_report(rows[3:], ["choice"])
    assert make_report(rows, ["yes_no"])["metrics"]["yes_no"]["n"] == 3  # "a" says neither yes nor no
    with pytest.raises(ValueError, match="'yes_no' needs references that say yes or no, which no record has"):
        make_report(rows[5:], ["yes_no"])
    with pytest.raises(ValueError, match="there is no metric 'bleu'"):
        make_report(rows, ["bleu"])


def test_captions_have_no_score_of_their_own(monkeypatch):
    figure = {"value": 1.2, "low": 1.0, "high": 1.4}
    asked = []

    class Scores:
        rows = [0, 1]

    monkeypatch.setattr("evaluation.captions.caption_scores", lambda *given: asked.append(given) or {"en": Scores})
    monkeypatch.setattr("evaluation.captions.caption_figures", lambda scores, clusters: {"cider": figure})
    rows = [row(number, "a cat", "a", "b", "a cat", type="t") for number in range(2)]
    for one in rows:
        one |= {"metric": "caption", "references": ["a cat", "the cat"]}
        for result in one["conditions"].values():
            result["score"] = None
    report = make_report(rows)
    assert report["metrics"] == {"cider": {"n": 2, "real": figure, "blind": figure, "shuffled": figure}}
    assert asked[-1] == (["b", "b"], [("a cat", "the cat")] * 2, [None, None])
    assert report["score"] == {"n": 0} and report["looking"] is None and report["groups"] == {}
    assert "1.200" in format_report(report) and "1.200 [1.000, 1.400]" in markdown(report, "t")


def test_identifiers_are_no_groups_and_numbers_are_in_order():
    rows = [row(i, "a", "b", "b", type="t", scene=i, objects=i % 11) for i in range(40)]
    groups = make_report(rows)["groups"]
    assert list(groups) == ["type", "objects", "type x objects"]
    assert list(groups["objects"]) == [str(i) for i in range(11)]
    assert groups["type"]["t"]["looking_score"]["value"] == 1


def test_names_from_data_stay_within_their_cell():
    report = make_report([row(0, "a", "b", "b", type="x | y\n<b>")])
    assert "| x \\| y &lt;b> |" in markdown(report, "t")
    report = make_report([row(0, "a", "b", "b", type="x\n\x1b[31m")])
    assert "\x1b" not in format_report(report) and "type: x" in format_report(report)


# Faults


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (0, "no records to evaluate"),
        (1, "all records show red.png; the condition 'shuffled' needs a second image.*--conditions real blind"),
    ],
)
def test_too_few_records(records, message, model, tiny):
    with pytest.raises(ValueError, match=message):
        evaluate(model, tiny.records(records), tiny.folder / "images", conditions=CONDITIONS[:3])


def test_a_single_picture_is_not_shuffled_unless_that_is_asked_for(model, tiny):
    report = evaluate(model, tiny.records(1), tiny.folder / "images", max_new_tokens=2)
    assert report["conditions"] == ["real", "blind"]
    assert "looking score: none, as it needs the conditions blind and shuffled" in format_report(report)


def test_an_evaluation_that_is_finished_needs_no_pictures(model, tiny, tmp_path):
    shutil.copytree(tiny.folder / "images", tmp_path / "images")
    given = {"max_new_tokens": 2, "output": tmp_path / "out"}
    before = evaluate(model, tiny.records(4), tmp_path / "images", **given)
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "images").mkdir()
    again = evaluate(model, tiny.records(4), tmp_path / "images", metrics=["vqa"], **given)
    assert again["score"] == before["score"] and list(again["metrics"]) == ["vqa"]


def test_captions_without_words_are_refused_first(model, tiny):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed (requirements-evaluation.txt)")
    records = tiny.records(2)
    records[1]["messages"][-1]["content"] = "..."
    for record in records:
        record["meta"] = {"metric": "caption", "language": "zh"}
    with pytest.raises(ValueError, match="record 'r1': none of its references has a word"):
        evaluate(model, records, tiny.folder / "images")
    records[1]["messages"][-1]["content"], records[1]["meta"]["language"] = "a", "fr"
    with pytest.raises(ValueError, match="record 'r1': captions in en and zh can be split into words.*'fr'"):
        evaluate(model, records, tiny.folder / "images")


def test_one_question_without_shuffled(model, tiny):
    report = evaluate(model, tiny.records(1), tiny.folder / "images", conditions=["blind", "real"], max_new_tokens=2)
    assert report["conditions"] == ["real", "blind"] and report["n"] == 1
    with pytest.raises(ValueError, match="there is no condition 'deaf'"):
        evaluate(model, tiny.records(1), tiny.folder / "images", conditions=["deaf"])


def test_pictures_that_are_missing_or_broken(model, tiny, tmp_path):
    shutil.copytree(tiny.folder / "images", tmp_path / "images")
    (tmp_path / "images" / "green.png").write_bytes(b"no picture")
    with pytest.raises(RecordError, match="^record 'r1': .*green.png"):
        evaluate(model, tiny.records(4), tmp_path / "images")
    (tmp_path / "images" / "green.png").unlink()
    with pytest.raises(FileNotFoundError, match="^record 'r1': there is no image .*green.png; check .*--image_root"):
        evaluate(model, tiny.records(4), tmp_path / "images")


def test_a_prompt_that_is_too_long(model, tiny, monkeypatch):
    records = tiny.records(4)
    records[2]["messages"][0]["content"] += "?" * 50
    questions = make_questions(records)
    monkeypatch.setattr(type(model), "num_positions", 95)
    with pytest.raises(RecordError, match="^record 'r2': its prompt has .* tokens, of which 4 for images and clips"):
        check_lengths(model, questions, tiny.folder / "images", Asking(("real",), max_new_tokens=4))
    check_lengths(model, questions[:2], tiny.folder / "images", Asking(("real",), max_new_tokens=4))
    with pytest.raises(RecordError, match="^record 'r0'.*its answer up to 60; .* lower --max_new_tokens"):
        check_lengths(model, questions[:2], tiny.folder / "images", Asking(("real",), max_new_tokens=60))


def test_a_substitute_that_is_too_long(tiny, tmp_path, model, monkeypatch):
    """With tiles the picture that `shuffled` shows may have more features than the own one."""
    records = tiny.records(2)
    questions = make_questions(records)
    own, other = (images(*record["images"])[0] for record in records)
    monkeypatch.setattr("evaluation.answering.feature_count",
                        lambda model, medium, root, owner: 80 if medium == other else 4)  # fmt: skip
    monkeypatch.setattr(type(model), "num_positions", 95)
    asking = Asking(("real", "shuffled"), max_new_tokens=4)
    check_lengths(model, questions[:1], tmp_path, asking)
    message = f"^record 'r0': its prompt with {other[1]} in the place of its own .* 80 for images"
    with pytest.raises(RecordError, match=message):
        check_lengths(model, questions[:1], tmp_path, asking, {own: other})
    monkeypatch.setattr("evaluation.answering.check_lengths", lambda *given: asked.append(given))
    asked = []
    list(answer_questions(model, questions, tiny.folder / "images", Asking(CONDITIONS[:3], max_new_tokens=1)))
    assert asked[0][-1] == {own: other, other: own}


# The script


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    script.main()


def test_script_writes_a_folder(checkpoint, tiny, tmp_path, monkeypatch, capsys):
    for number in range(2):
        write_records(tiny.records(24)[12 * number : 12 * number + 12], tmp_path / f"{number}.parquet")
    output = tmp_path / "out"
    run(monkeypatch, "--checkpoint_path", checkpoint, "--data", tmp_path / "0.parquet", tmp_path / "1.parquet",
        "--image_root", tiny.folder / "images", "--limit", 14, "--output", output)  # fmt: skip
    report = json.loads((output / "report.json").read_text())
    assert report["conditions"] == list(CONDITIONS[:3]) and report["n"] == 14
    assert report["settings"]["checkpoint_path"] == str(checkpoint) and report["settings"]["limit"] == 14
    assert set(report["groups"]["type"]) == {"colour", "text"} and report["seconds"]["total"] > 0
    assert set(report["metrics"]) == {"exact", "perplexity"}
    assert len(rows_in(output / "rows.jsonl")) == 14
    assert "real minus shuffled" in capsys.readouterr().out
    assert "Evaluation of" in (output / "report.md").read_text() and "<html" in (output / "report.html").read_text()


def test_a_sample_is_drawn_by_the_seed(tiny, tmp_path, monkeypatch):
    write_records(tiny.records(24), tmp_path / "test.parquet")

    def ids(*arguments) -> list[str]:
        given = ["evaluate.py", "--checkpoint_path", "x", "--data", str(tmp_path / "test.parquet"), *arguments]
        monkeypatch.setattr(sys, "argv", given)
        return [record["id"] for record in script.read_questions(script.parse_arguments())]

    assert ids("--limit", "3") == ["r0", "r1", "r2"]
    drawn = ids("--sample", "5")
    assert len(set(drawn)) == 5 and drawn == ids("--sample", "5") != ids("--sample", "5", "--seed", "1")
    everything = [record["id"] for record in read_records(tmp_path / "test.parquet")]
    assert ids("--sample", "99") == ids() == everything and [name for name in everything if name in drawn] == drawn


def test_a_benchmark_is_asked(checkpoint, tmp_path, monkeypatch, capsys):
    for number in range(2):
        Image.new("RGB", (20, 20), (200 * number, 0, 0)).save(tmp_path / f"{number}.png")
    lines = [{"question_id": n, "image": f"{n % 2}.png", "text": "Is it red?", "label": ["no", "yes"][n % 2]}
             for n in range(4)]  # fmt: skip
    (tmp_path / "coco_pope_random.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(monkeypatch, "--checkpoint_path", checkpoint, "--benchmark", "pope", "--data",
        tmp_path / "coco_pope_random.json", "--image_root", tmp_path, "--max_new_tokens", 2)  # fmt: skip
    assert "yes_no" in capsys.readouterr().out


def test_captions_get_more_room(monkeypatch):
    assert [script.longest_answer(name) for name in (None, "pope", "karpathy", "ai_challenger")] == [16, 16, 64, 64]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "a", "--annotations", "b"], "--annotations is for a --benchmark"),
        (["--data", "a", "--limit", "0"], "must be a whole number and at least 1, got 0"),
        (["--data", "a", "--limit", "x"], "must be a whole number and at least 1, got x"),
        (["--data", "a", "--limit", "2", "--sample", "2"], "not allowed with"),
        (["--data", "a", "--output", "report.json"], "--output is a folder"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint_path", "x", *arguments])
    with pytest.raises(SystemExit):
        script.parse_arguments()
    assert message in capsys.readouterr().err


def test_the_script_ends_with_one_line(checkpoint, tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    arguments = ["--checkpoint_path", checkpoint, "--data", tiny.folder / "train.parquet",
                 "--image_root", tiny.folder / "images", "--output", tmp_path / "file"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    with pytest.raises(SystemExit, match="^evaluate.py: --output=.*file can't be written"):
        runpy.run_path(script.__file__, run_name="__main__")
