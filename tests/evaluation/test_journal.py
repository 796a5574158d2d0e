"""rows.jsonl: whatever ends an evaluation, what was answered is kept, and the result is what it would have been."""

import json
import os
import signal
import time
from collections.abc import Callable

import pytest
import torch

from evaluation.answering import evaluate
from evaluation.journal import Journal, opened
from run_folder import RunError, held

OPTIONS = dict(max_new_tokens=3, batch_size=5, perplexity=True)


@pytest.fixture(scope="module")
def whole(model, tiny, tmp_path_factory):
    """Folder of an evaluation without an interruption."""
    folder = tmp_path_factory.mktemp("journal") / "whole"
    evaluate(model, tiny.records(24), tiny.folder / "images", output=folder, **OPTIONS)
    return folder


def comparable(folder) -> tuple:
    report = json.loads((folder / "report.json").read_text())
    return (folder / "rows.jsonl").read_bytes(), {**report, "seconds": None}


def interrupt(monkeypatch, after: int) -> None:
    """Makes the third call of `append` write only so many bytes of its rows and fail."""
    original, calls = Journal.append, []

    def append(self, rows):
        calls.append(rows)
        original(self, rows)
        if len(calls) == 3:
            os.truncate(self.file, self.file.stat().st_size - after)
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", append)


@pytest.mark.parametrize("lost", [0, 1, 700])
def test_an_interrupted_evaluation_goes_on(lost, whole, model, tiny, tmp_path, monkeypatch):
    arguments = (model, tiny.records(24), tiny.folder / "images")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, lost)
        evaluate(*arguments, output=tmp_path, **OPTIONS)
    kept = (tmp_path / "rows.jsonl").read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert not (tmp_path / "report.json").exists() and 0 < len(kept.splitlines()) <= 15
    answered = []
    original = Journal.append
    monkeypatch.setattr(Journal, "append", lambda self, rows: answered.extend(rows) or original(self, rows))
    evaluate(*arguments, output=tmp_path, **OPTIONS)
    assert len(answered) == 24 - len(kept.splitlines())
    assert comparable(tmp_path) == comparable(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock", "report.html", "report.json", "report.md", "rows.jsonl", "settings.json"]  # fmt: skip


def test_a_finished_evaluation_asks_nothing(whole, model, tiny, monkeypatch):
    before = comparable(whole)
    monkeypatch.setattr("evaluation.answering.respond", lambda *a: pytest.fail("a question was asked again"))
    monkeypatch.setattr("evaluation.answering.encode", lambda *a: pytest.fail("a picture was encoded again"))
    evaluate(model, tiny.records(24), tiny.folder / "images", output=whole, **OPTIONS)
    assert comparable(whole) == before


def test_the_batch_size_may_change_but_nothing_else(whole, model, tiny):
    records, root = tiny.records(24), tiny.folder / "images"
    evaluate(model, records, root, output=whole, **{**OPTIONS, "batch_size": 3})
    with pytest.raises(ValueError) as error:
        evaluate(model, records[:20], root, output=whole, **{**OPTIONS, "max_new_tokens": 4}, seed=1)
    message = str(error.value)
    assert "holds an evaluation with other settings" in message and "--overwrite" in message
    assert "max_new_tokens: 3 there, 4 now" in message and "seed: 0 there, 1 now" in message
    assert "questions: " in message and "model" not in message and "batch_size" not in message
    embedding = model.language_model.get_input_embeddings().weight
    kept = embedding.data.clone()
    try:
        embedding.data += 1
        with pytest.raises(ValueError, match="model: "):
            evaluate(model, records, root, output=whole, **OPTIONS)
    finally:
        embedding.data.copy_(kept)


def test_overwrite_starts_over_but_only_where_an_evaluation_was(model, tiny, tmp_path):
    records, root = tiny.records(4), tiny.folder / "images"
    (tmp_path / "notes.txt").write_text("mine")
    for tokens in (2, 1):
        evaluate(model, records, root, output=tmp_path, max_new_tokens=tokens, overwrite=True)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4 and (tmp_path / "notes.txt").exists()
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match="holds a rows.jsonl of something else; choose another --output"):
        evaluate(model, records, root, output=tmp_path, max_new_tokens=1, overwrite=True)


def test_damaged_files_are_named(tmp_path):
    with opened(tmp_path, {"a": 1}, {}) as journal:
        journal.append([{"id": "1"}])
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"{}\n" + file.read_bytes())
    with pytest.raises(ValueError, match="rows.jsonl, line 1: this is no row"), opened(tmp_path, {"a": 1}, {}):
        pass
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json is damaged"), opened(tmp_path, {"a": 1}, {}):
        pass


def test_a_row_is_one_line_whatever_its_text(tmp_path):
    row = {"id": "a\n\r\x0b\x1c\x85\u2028\u2029漢"}
    with opened(tmp_path, {}, {}) as journal:
        journal.append([row, row])
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row, row] and "漢" in lines[0]


def in_another_process(work: Callable[[], None]) -> int:
    """Starts `work` in a copy of this process and returns its id; it never comes back here."""
    if process := os.fork():
        return process
    try:
        torch.set_num_threads(1)  # the threads of the original are not in the copy
        work()
    finally:
        os._exit(0)


def test_two_processes_do_not_write_one_folder(tmp_path):
    reading, writing = os.pipe()

    def hold() -> None:
        with held(tmp_path):
            os.write(writing, b"held")
            time.sleep(600)

    other = in_another_process(hold)
    try:
        assert os.read(reading, 4) == b"held"
        with pytest.raises(RunError, match="another run is at work in .* choose another --output"):
            with opened(tmp_path, {}, {}):
                pass
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    with opened(tmp_path, {}, {}):
        pass


@pytest.mark.parametrize("rows", [1, 8, 14])
def test_killed_at_any_moment(rows, whole, model, tiny, tmp_path):
    """Killed once so many rows are there, wherever it is by then; then to its end."""
    arguments = (model, tiny.records(24), tiny.folder / "images")
    file = tmp_path / "rows.jsonl"
    process = in_another_process(lambda: evaluate(*arguments, output=tmp_path, **OPTIONS))
    ended = False
    while not ended and not (file.exists() and file.read_bytes().count(b"\n") >= rows):
        ended = os.waitpid(process, os.WNOHANG)[0] != 0
    if not ended:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert file.exists()
    evaluate(*arguments, output=tmp_path, **OPTIONS)
    assert comparable(tmp_path) == comparable(whole)
