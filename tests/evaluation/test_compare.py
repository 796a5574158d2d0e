"""Comparison of evaluations: figures, errors of the command line, and what it writes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluation import compare as command
from evaluation.comparison import compare, mcnemar, paired_cell
from evaluation.journal import as_lines
from evaluation.runs import columns_of, read_runs, short_names
from evaluation.statistics import wilson
from page.text import plain
from tests.page.evaluated import HOSTILE, Page, answered, draw_media, question, questions, report_of


def write_run(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_bytes(as_lines(rows))
    (folder / "report.json").write_text(json.dumps(report_of(rows)), encoding="utf-8")
    return folder


def better(rows: list[dict], every: int) -> list[dict]:
    """The same questions, every so many of which are answered rightly."""
    for row in rows[::every]:
        row["conditions"]["real"] = answered(row["answer"], True)
    return rows


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Two runs on 60 questions about 8 pictures: `b` is right wherever `a` is, and at 6 of the other 12."""
    first, second = ([question(number) for number in range(60)] for _ in "ab")
    return [write_run(tmp_path / "a" / "evaluation", first),
            write_run(tmp_path / "b" / "evaluation", better(second, 10))]  # fmt: skip


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
    command.main()


# Figures


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 0), (0, 5), (3, 9), (40, 41)])
def test_mcnemar_is_the_binomial_test_of_a_fair_coin(first, second):
    n = first + second
    likely = [math.comb(n, k) / 2**n for k in range(n + 1)]
    expected = sum(p for p in likely if p <= likely[first] * (1 + 1e-9))
    assert mcnemar(first, second) == pytest.approx(expected)


def test_counts_of_a_cell():
    first, second = np.array([1.0, 1.0, 0.0, 0.0, 0.6, 0.4]), np.array([1.0, 0.0, 1.0, 0.0, 0.4, 0.3])
    cell = paired_cell(first, second, list("abcdef"))
    assert [cell[name] for name in ("both", "only_first", "only_second", "neither")] == [1, 2, 1, 2]
    assert cell["difference"]["value"] == pytest.approx((first - second).mean())
    assert cell["difference"]["low"] <= 0 <= cell["difference"]["high"] and cell["p"] == 1.0


def test_comparison(folders):
    found = compare(read_runs(folders))
    assert found["n"] == 60 and found["unscored"] == 0
    assert [run["name"] for run in found["runs"]] == ["a", "b"]
    assert [run["score"]["value"] for run in found["runs"]] == [48 / 60, 54 / 60]
    (pair,) = found["pairs"]
    cell = pair["all"]
    assert cell["difference"]["value"] == pytest.approx(-0.1)
    assert cell["difference"]["low"] < cell["difference"]["high"] == 0  # six about four pictures: 2 / 2^4 > 0.05
    assert [cell[name] for name in ("both", "only_first", "only_second", "neither")] == [48, 0, 6, 6]
    assert cell["p"] == pytest.approx(2 / 2**6)
    assert pair["gain_difference"]["value"] == pytest.approx(-0.1)  # both answer the same when blind
    assert [row["id"] for row in pair["differing"]] == [f"q{number:03}" for number in range(0, 60, 10)]
    for groups in pair["groups"].values():
        if "name" not in groups:
            assert sum(cell["n"] for cell in groups.values()) == 60
            assert sum(cell["only_second"] for cell in groups.values()) == 6
    assert set(pair["groups"]) >= {"type", "language", "type x language"}


def test_looking_scores_are_those_of_the_reports(folders):
    for run_, folder in zip(compare(read_runs(folders))["runs"], folders, strict=True):
        report = json.loads((folder / "report.json").read_text())
        assert run_["looking"] == {name: value for name, value in report["looking"].items() if name != "n"}
        assert run_["score"] == report["score"]["real"]


def test_other_conditions_and_three_runs(folders, tmp_path):
    third = write_run(tmp_path / "c" / "evaluation", better([question(number) for number in range(60)], 1))
    found = compare(read_runs([*folders, third]), "blind")
    assert [(pair["first"], pair["second"]) for pair in found["pairs"]] == [("a", "b"), ("a", "c")]
    assert all(pair["all"]["difference"]["value"] == 0 and pair["all"]["p"] == 1 for pair in found["pairs"])
    with pytest.raises(ValueError, match=r"a/evaluation has no answers under 'reordered', but under real, blind"):
        compare(read_runs(folders), "reordered")


def test_captions_have_no_scores(folders, tmp_path):
    rows = [question(number, metric="caption") for number in range(4)]
    for row in rows:
        for answer in row["conditions"].values():
            answer["score"] = None
    runs = []
    for name in "ab":
        folder = write_run(tmp_path / f"captions_{name}", [question(number) for number in range(4)])
        (folder / "rows.jsonl").write_bytes(as_lines(rows))
        runs.append(folder)
    with pytest.raises(ValueError, match="captions are compared by the metrics of their reports"):
        compare(read_runs(runs))


# Which runs can be compared


@pytest.mark.parametrize(("paths", "names"), [
    (["outputs/a/evaluation", "outputs/b/evaluation"], ["a", "b"]),
    (["outputs/a", "outputs/b"], ["a", "b"]),
    (["outputs/a/test", "outputs/b/other"], ["a/test", "b/other"]),
    (["outputs/a/x", "outputs/a/y", "outputs/b/x"], ["a/x", "a/y", "b/x"]),
    (["outputs", "outputs/evaluation"], ["outputs", "outputs/evaluation"]),
])  # fmt: skip
def test_names_are_what_tells_the_paths_apart(paths, names):
    assert short_names([Path(path) for path in paths]) == names


def test_other_questions_are_an_error_unless_the_common_ones_are_asked_for(folders, tmp_path):
    rows = [question(number) for number in range(10, 65)]
    rows[5]["turns"] = [{"role": "user", "content": "<image>Another question"}]
    other = write_run(tmp_path / "c", rows)
    with pytest.raises(ValueError) as error:
        read_runs([folders[0], other])
    text = str(error.value)
    assert f"10 only in {folders[0]} (first 'q000')" in text and f"5 only in {other} (first 'q060')" in text
    assert "1 that have the same id and not the same content (first 'q015': turns)" in text and "--common" in text
    runs = read_runs([folders[0], other], common=True)
    assert [list(run.rows) for run in runs] == [[f"q{n:03}" for n in range(10, 60) if n != 15]] * 2
    foreign = write_run(tmp_path / "d", [question(100)])
    with pytest.raises(ValueError, match="no question in common"):
        read_runs([folders[0], foreign], common=True)


def test_what_is_no_finished_evaluation_is_named(folders, tmp_path):
    with pytest.raises(ValueError, match="two folders or more"):
        read_runs(folders[:1])
    with pytest.raises(ValueError, match="named twice"):
        read_runs([folders[0], folders[0] / ".." / "evaluation"])
    with pytest.raises(FileNotFoundError, match="holds no finished evaluation"):
        read_runs([folders[0], tmp_path])
    whole = (folders[1] / "rows.jsonl").read_text()
    for line in ('{"id": "x"}', "[1]", '{"id": "x", "conditions": []}', '{"id": "x", "conditions": {"real": {}}}', "{"):
        (folders[1] / "rows.jsonl").write_text(f"{whole}{line}\n")
        with pytest.raises(ValueError, match=r"rows.jsonl, line 61: this is no row"):
            read_runs(folders)
    for text in ("[]", "{", "{}", '{"settings": [1]}'):
        (folders[1] / "report.json").write_text(text)
        with pytest.raises(ValueError, match=r"report.json is no report"):
            read_runs(folders)


def test_the_order_of_the_rows_does_not_matter(folders):
    lines = (folders[1] / "rows.jsonl").read_text().splitlines()
    before = compare(read_runs(folders))
    (folders[1] / "rows.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    assert compare(read_runs(folders)) == before


# What is written


def test_text(folders, monkeypatch, capsys):
    run(monkeypatch, *folders)
    text = capsys.readouterr().out
    assert "60 questions that all runs answered, under the condition real" in text
    assert "a and b can't be told apart by these questions: -10.0 [" in text and "p = 0.031" in text
    assert "Right in both: 48, only in a: 0, only in b: 6, in neither: 6." in text
    assert "type: colour" in text and "type x language" not in text
    assert "q000: <image> Question 0: which colour? -> 'red'; a 'black', b 'red'" in text


def test_the_better_run_is_named(folders, tmp_path, monkeypatch, capsys):
    third = write_run(tmp_path / "c" / "evaluation", better([question(number) for number in range(60)], 5))
    run(monkeypatch, folders[0], third)
    assert "a is worse than c: -20.0 [" in capsys.readouterr().out
    run(monkeypatch, third, folders[0])
    assert "c is better than a: +20.0 [" in capsys.readouterr().out


def test_a_bound_beside_0_does_not_read_as_0():
    assert command._points({"value": 0.003, "low": 0.0002, "high": 0.0051}) == "+0.30 [+0.02, +0.51]"
    assert command._points({"value": 0.003, "low": 0.0, "high": 0.0051}) == "+0.3 [+0.0, +0.5]"


def test_what_can_not_be_told_is_not_told(folders, monkeypatch, capsys):
    run(monkeypatch, *folders, "--condition", "blind")
    text = capsys.readouterr().out
    assert "a and b can't be told apart by these questions: +0.0 [-" in text and "p = 1.000" in text


def test_markdown(tmp_path, monkeypatch):
    rows = questions()
    folders = [write_run(tmp_path / "a|b", rows), write_run(tmp_path / "c", better(questions(), 3))]
    run(monkeypatch, *folders, "--output", tmp_path / "x.md")
    text = (tmp_path / "x.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 2  # of runs, of groups
    assert "a\\|b" in text and "type x language: colour x en" in text
    assert "<script" not in text.replace("\\<", "") and "\u2028" not in text and "\u202e" not in text


def test_page(tmp_path, monkeypatch):
    draw_media(tmp_path)
    evil = tmp_path / HOSTILE.replace("/", "")
    folders = [write_run(tmp_path / "a", questions()), write_run(evil, better(questions(), 3))]
    run(monkeypatch, *folders, "--image_root", tmp_path, "--output", tmp_path / "x.html")
    page = Page(tmp_path / "x.html")
    names = short_names(folders)
    assert page.data["columns"] == names and page.data["words"]["pair"] == names
    assert len(page.data["rows"]) == 60 and page.tags.count("script") == 2 and "\u202e" not in page.source
    differ = [row for row in page.data["rows"] if len({answer["score"] for answer in row["answers"]}) > 1]
    assert page.data["rows"][: len(differ)] == differ and 0 < len(differ) < 30
    found = compare(read_runs(folders))["pairs"][0]["all"]
    assert f"right in both{found['both']}" in page.text and f"right in a alone{found['only_first']}" in page.text
    assert any(medium["pictures"] for medium in page.data["media"])
    assert page.data["words"]["looks"]["less"] == f"{plain(evil.name)} better"


def test_answers_stand_in_columns_by_run(folders):
    rows = columns_of(read_runs(folders), "real")
    assert list(rows[0]["conditions"]) == ["a", "b"]
    assert [answer["score"] for answer in rows[0]["conditions"].values()] == [0.0, 1.0]


def test_other_settings_are_named(folders, monkeypatch, capsys, tmp_path):
    for number, folder in enumerate(folders):
        report = json.loads((folder / "report.json").read_text())
        report["settings"] |= {"model": str(number), "checkpoint_path": str(number), "max_new_tokens": 4}
        report["settings"] |= {"dtype": "float16"} if number else {}
        (folder / "report.json").write_text(json.dumps(report))
    assert compare(read_runs(folders))["settings"] == {"dtype": {"a": None, "b": "float16"}}
    run(monkeypatch, *folders, "--output", tmp_path / "x.md")
    said = 'The runs have other settings: dtype null in a, "float16" in b.'
    assert said in capsys.readouterr().out and said in (tmp_path / "x.md").read_text()


def test_gains_are_compared_on_their_own_scale(tmp_path):
    """One run is right where it sees, the other where it does not: the largest difference that there can be."""
    runs = []
    for name, right in (("a", "real"), ("b", "blind")):
        rows = [question(number) for number in range(8)]
        for row in rows:
            row["conditions"] = {condition: answered("x", condition == right) for condition in ("real", "blind")}
        runs.append(write_run(tmp_path / name, rows))
    gain = compare(read_runs(runs))["pairs"][0]["gain_difference"]
    assert gain == {"value": 2, "low": pytest.approx(2 - 2 * (1 - wilson(1, 8)[0])), "high": 2}


def test_the_command_needs_no_torch_and_errors_are_one_line(folders, request):
    """Two figures of JSON should not wait for what a model needs."""
    started = [sys.executable, "-X", "importtime", "-m", "evaluation.compare", *map(str, folders)]
    done = subprocess.run(started, cwd=request.config.rootpath, capture_output=True, text=True)
    assert done.returncode == 0 and "60 questions" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported and not imported & {"torch", "transformers"}
    started = [sys.executable, "-m", "evaluation.compare", *map(str, folders), "--output", "x.pdf"]
    done = subprocess.run(started, cwd=request.config.rootpath, capture_output=True, text=True)
    assert done.stderr == "evaluation.compare: --output names a .html or a .md file, got x.pdf\n"
    assert done.returncode == 1
