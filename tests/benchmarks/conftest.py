import io
import json
import sys
from collections import deque
from contextlib import redirect_stdout

import pytest


class InProcess:
    """Stands for `benchmarks.measure.run_worker`: the worker runs here, which saves it the start."""

    def __init__(self, module):
        self.module = module

    def __call__(self, name: str, *arguments: str) -> dict:
        assert name == self.module.__name__
        output = io.StringIO()
        with redirect_stdout(output):
            self.module.main(list(arguments))
        return json.loads(output.getvalue().splitlines()[-1])


class TalkInProcess:
    """Stands for `benchmarks.measure.Conversation`; a worker reads all of its questions at once."""

    def __init__(self, module, questions: list):
        self.module, self.questions = module, questions

    def __call__(self, name: str, *arguments: str) -> "TalkInProcess":
        assert name == self.module.__name__
        talk = TalkInProcess(self.module, self.questions)
        before, output = sys.stdin, io.StringIO()
        sys.stdin = io.StringIO("".join(f"{question}\n" for question in self.questions))
        try:
            with redirect_stdout(output):
                self.module.main(list(arguments))
        finally:
            sys.stdin = before
        talk.lines = deque(json.loads(line) for line in output.getvalue().splitlines() if line.startswith("{"))
        return talk

    def answer(self) -> dict:
        return self.lines.popleft()

    def ask(self, question) -> dict:
        return self.answer()

    def end(self) -> None:
        assert not self.lines


@pytest.fixture
def in_process(monkeypatch):
    """`in_process(module)`: its workers run in this process; with `questions`, those that hold conversations."""

    def replace(module, questions: list | None = None) -> None:
        name = "run_worker" if questions is None else "Conversation"
        stand_in = InProcess(module) if questions is None else TalkInProcess(module, questions)
        monkeypatch.setattr(module, name, stand_in)

    return replace
