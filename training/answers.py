"""Answers to the same few validation records, again and again while a model learns: `answers.jsonl`."""

import json
import os
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dataset.dataset import BadMedium, RecordDataset
from dataset.feature_cache import StaleFeatures
from dataset.record import RecordError
from evaluation.answering import answer_batch
from evaluation.questions import Question, make_question
from model import MultiModalModel
from run_folder import ANSWERS_FILE

MAX_NEW_TOKENS = 128
BATCH = 8  # prompts per call of `generate`
SHOWN = 3  # of these are printed


class Answers:
    """Has a model answer the last turn of some validation records, greedily, and writes down what it says.

    Takes no random number and leaves the model in the mode that it had: the run goes on as if nothing had been asked.
    With several processes each answers some of the records.

    Args:
        dataset: validation records.
        count: how many of them; fewer if not so many end in an answer.
        seed: which of them, evenly from all sources.
        folder: where `answers.jsonl` goes: lines `{"step", "id", "source", "question", "reference", "answer"}`.
        system: text of the system turn, or None.
    """

    def __init__(self, dataset: RecordDataset, count: int, seed: int, folder: str | Path, system: str | None = None):
        self.dataset, self.system = dataset, system
        self.file = Path(folder, ANSWERS_FILE)
        self.questions = list(islice(fitting_questions(dataset, seed), count))

    def ask(self, model: MultiModalModel, accelerator: Accelerator, step: int) -> list[dict]:
        """Writes and returns the lines of this step; on other processes than the first nothing. All have to call it."""
        own = self.questions[accelerator.process_index :: accelerator.num_processes]
        trained = model.training
        model.eval()
        try:
            with torch.no_grad(), accelerator.autocast():
                said = [answer for start in range(0, len(own), BATCH)
                        for answer in self._answers(model, own[start : start + BATCH])]  # fmt: skip
        finally:
            model.train(trained)
        said = gather_object([(q.index, answer) for q, answer in zip(own, said, strict=True)])
        if not accelerator.is_main_process:
            return []
        answers = dict(said)
        lines = [{"step": step, **shown(q), "answer": answers[q.index]} for q in self.questions]
        with self.file.open("a", encoding="utf-8") as file:  # one write, so that a line is rarely cut
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return lines

    def _answers(self, model: MultiModalModel, asked: list["Asked"]) -> list[str]:
        features = [self._features(model, q) for q in asked]
        return answer_batch(model, [q.question for q in asked], features, MAX_NEW_TOKENS, self.system)

    def _features(self, model: MultiModalModel, asked: "Asked") -> list[torch.Tensor]:
        """Features `[n, H]` of each of its images and clips."""
        found = []
        for medium in self.dataset.open_media(self.dataset.records[asked.index]):
            tensor = self.dataset.load(medium).to(model.device)
            make = model.encode_images if self.dataset.feature_cache is None else model.project
            found.append(make(tensor, medium.features))
        return found

    def begin(self, step: int) -> None:
        """Makes the file that of a run which goes on from `step`: without later lines, or a line that was cut."""
        if step == 0:
            self.file.unlink(missing_ok=True)
        if not self.file.exists():
            return
        lines = [line for line in self.file.read_text(encoding="utf-8").splitlines() if is_until(line, step)]
        beside = self.file.with_name(f".{self.file.name}")
        beside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(beside, self.file)


def is_until(line: str, step: int) -> bool:
    """Whether a line is whole and of no later step."""
    try:
        return json.loads(line)["step"] <= step
    except ValueError:
        return False


def shown(asked: "Asked") -> dict[str, str]:
    """What `answers.jsonl` says of a question."""
    q = asked.question
    turns = "\n".join(turn["content"] for turn in q.turns)
    return {"id": q.id, "source": asked.source, "question": turns, "reference": q.answer}


class Asked(NamedTuple):
    """A question, the number of its record in the data set, and the record's source."""

    question: Question
    index: int
    source: str


def fitting_questions(dataset: RecordDataset, seed: int) -> Iterator[Asked]:
    """Questions of records that end in an answer and can be read, one of each source in turn."""
    names, source_of = dataset.sources
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(np.flatnonzero(source_of == source)).tolist() for source in range(len(names))]
    for round_ in zip_longest(*orders):
        for index in round_:
            if index is not None and (question := fitting(dataset, index)):
                yield Asked(question, index, names[source_of[index]])


def fitting(dataset: RecordDataset, index: int) -> Question | None:
    """The question of a record, or None if it can't be asked.

    Raises:
        StaleFeatures: an image or a clip that the feature cache lacks, or whose file has changed since.
    """
    try:
        record = dataset.records[index]
        question = make_question(record)
        for medium in dataset.open_media(record):
            dataset.load(medium)
    except StaleFeatures:
        raise
    except (BadMedium, RecordError, OSError, ValueError):
        return None
    return question
