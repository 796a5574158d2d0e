"""What an evaluation asks: records -> questions, and the row that says how a question was answered.

The last turn of a record, an assistant turn, is predicted; the turns before it are the prompt. Keys of the record's
`meta` that have a meaning here:

    references   list of accepted answers or captions (VQA v2: the ten answers, duplicates kept); default: the last turn
    choices      list of the answers among which likelihood chooses; the last turn is one of them
    metric       a name in `METRICS`; default: "choice" where there are choices, otherwise "exact"

All other keys are groupings: figures are given for each of their values.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from dataset.record import RecordError
from dataset.rows import nearest
from dataset.template import media_of
from evaluation.polarity import polarity

METRICS = ("exact", "vqa", "anls", "choice", "yes_no", "caption")
RESERVED = ("references", "choices", "metric")

Medium = tuple[str, str]  # "image" or "video", and its path


@dataclass(frozen=True)
class Question:
    """A record as an evaluation sees it.

    Attributes:
        turns: the prompt `{"role", "content"}`, placeholders included; ends in a user turn.
        answer: the last turn, which is the reference of the perplexity.
        references: accepted answers, at least one.
        choices: answers among which likelihood chooses, or none.
        metric: what makes the question's score, a name in `METRICS`.
        media: images and clips in the order of their placeholders.
        meta: groupings, without the reserved keys.
    """

    id: str
    turns: tuple[dict[str, str], ...]
    answer: str
    references: tuple[str, ...]
    choices: tuple[str, ...]
    metric: str
    media: tuple[Medium, ...]
    meta: dict[str, str | int]

    def paths(self, kind: str) -> list[str]:
        """Paths of its media of a kind, "image" or "video"."""
        return [path for of, path in self.media if of == kind]

    def row(self) -> dict:
        """Its line of `rows.jsonl` before it is answered: `conditions` is empty."""
        return {
            "id": self.id,
            "images": self.paths("image"),
            "videos": self.paths("video"),
            "meta": self.meta,
            "turns": list(self.turns),
            "answer": self.answer,
            "references": list(self.references),
            "choices": list(self.choices),
            "metric": self.metric,
            "conditions": {},
        }


def make_question(record: dict) -> Question:
    """The question that a validated record asks.

    Raises:
        RecordError: it does not end in an assistant turn, or its reserved keys of `meta` don't fit; names the record.
    """
    messages, meta = record["messages"], record["meta"]
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        problem = "has no assistant turn at its end, hence nothing to compare with; leave such records out of the file"
        raise RecordError(f"record {record['id']!r} {problem}", "no answer")
    answer = messages[-1]["content"]
    references, choices = (meta.get(key, []) for key in ("references", "choices"))
    for key, value in (("references", references), ("choices", choices)):
        if not isinstance(value, list) or key in meta and not value:
            raise _fault(record, f"meta.{key} must be a list of at least one text, got {value!r:.80}")
    if "" in choices:
        raise _fault(record, "one of meta.choices is empty; drop it")
    if choices and answer not in choices:
        raise _fault(record, f"the answer {answer!r:.80} is none of meta.choices; write it exactly as it stands there")
    if len(set(choices)) < len(choices):
        raise _fault(record, "two of meta.choices are the same; likelihood could not tell them apart")
    metric = meta.get("metric", "choice" if choices else "exact")
    if metric not in METRICS:
        raise _fault(record, f"meta.metric is {metric!r:.80}{nearest(metric, METRICS)}")
    if metric == "choice" and not choices:
        raise _fault(record, "meta.metric is 'choice' without meta.choices; list the answers there")
    references = references or [answer]
    if metric == "yes_no" and polarity(references[0]) is None:
        problem = f"meta.metric is 'yes_no', but the reference {references[0]!r:.80} says neither yes nor no"
        raise _fault(record, problem)
    groups = {key: meta[key] for key in sorted(meta.keys() - set(RESERVED))}
    return Question(
        id=record["id"],
        turns=tuple(messages[:-1]),
        answer=answer,
        references=tuple(references),
        choices=tuple(choices),
        metric=metric,
        media=tuple(media_of(record)),
        meta=groups,
    )


def question_of_row(row: dict) -> Question:
    """The question of a line of `rows.jsonl`."""
    return Question(
        id=row["id"],
        turns=tuple(row["turns"]),
        answer=row["answer"],
        references=tuple(row["references"]),
        choices=tuple(row["choices"]),
        metric=row["metric"],
        media=tuple(media_of({**row, "messages": row["turns"]})),
        meta=row["meta"],
    )


def make_questions(records: Iterable[dict]) -> list[Question]:
    """Questions of validated records, in their order.

    Raises:
        ValueError: no records; two with the same id, by which rows are told apart; or what `make_question` raises.
    """
    questions, ids = [], set()
    for record in records:
        if record["id"] in ids:
            raise RecordError(f"two records have the id {record['id']!r}; give each its own, or drop one", "id")
        ids.add(record["id"])
        questions.append(make_question(record))
    if not questions:
        raise ValueError("no records to evaluate")
    return questions


def fingerprint(questions: Iterable[Question]) -> str:
    """Tells these questions, in their order, from others."""
    rows = hashlib.sha256()
    for q in questions:
        rows.update(json.dumps([q.row(), q.media]).encode())
    return rows.hexdigest()


def _fault(record: dict, problem: str) -> RecordError:
    return RecordError.of(record["id"], "meta", problem)
