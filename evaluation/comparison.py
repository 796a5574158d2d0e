"""How runs differ on the same questions: differences with intervals, and who is right where the other is wrong.

What is hard about a question is hard for all runs: the interval of a difference is that of the mean difference per
question, from a bootstrap over pictures (`evaluation.statistics`).
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest

from evaluation.questions import question_of_row
from evaluation.results import groupings
from evaluation.runs import Run, columns_of
from evaluation.statistics import Resampled, paired
from page.figures import is_right

OWN = ("model", "checkpoint_path", "questions")  # settings that tell runs apart, or that their rows show


def compare(runs: Sequence[Run], condition: str = "real") -> dict:
    """The first run against each of the others.

    Returns:
        `{"n", "unscored", "condition", "settings": {"dtype": {"a": "float32", "b": "float16"}},
        "runs": [{"name", "folder", "score", "looking": {"gain", "looking_score"}}],
        "pairs": [{"first", "second", "all": cell, "gain_difference", "groups": {"type": {"colour": cell}},
        "differing": [row]}]}`. A cell is that of `paired_cell`; `score` and the others are `{"value", "low", "high"}`.
        `settings` are those that differ between runs, beside the model. `gain_difference` is by how much more the
        picture gains in the first run; None without blind answers.

    Raises:
        ValueError: a run was not evaluated under the condition, or no question has a score.
    """
    for run in runs:
        missing = [id for id, row in run.rows.items() if condition not in row["conditions"]]
        if missing:
            known = ", ".join(run.rows[missing[0]]["conditions"])
            raise ValueError(f"{run.folder} has no answers under {condition!r}, but under {known}; choose --condition")
    rows = [row for row in columns_of(runs, condition)
            if all(answer["score"] is not None for answer in row["conditions"].values())]  # fmt: skip
    if not rows:
        raise ValueError("no question has a score of its own; captions are compared by the metrics of their reports")
    questions = [question_of_row(row) for row in rows]
    clusters = [question.media or question.id for question in questions]
    scores = {run.name: _scores(run, rows, condition) for run in runs}
    grouped = groupings(questions, range(len(rows)))
    return {
        "n": len(rows),
        "unscored": len(runs[0].rows) - len(rows),
        "condition": condition,
        "settings": differing_settings(runs),
        "runs": [_run_figures(run, rows, scores[run.name], clusters) for run in runs],
        "pairs": [
            {
                "first": runs[0].name,
                "second": other.name,
                "all": paired_cell(scores[runs[0].name], scores[other.name], clusters),
                "gain_difference": _gain_difference(runs[0], other, rows, clusters),
                "groups": {
                    name: {
                        key: paired_cell(scores[runs[0].name][members], scores[other.name][members],
                                         [clusters[member] for member in members])
                        for key, members in sorted(groups.items())
                    }
                    for name, groups in grouped.items()
                },
                "differing": _differing(rows, runs[0].name, other.name),
            }
            for other in runs[1:]
        ],
    }  # fmt: skip


def differing_settings(runs: Sequence[Run]) -> dict[str, dict]:
    """Setting -> its value in each run (None: not given), of those that are not the same in all."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in OWN)
    values = {key: {run.name: run.settings.get(key) for run in runs} for key in keys}
    return {key: own for key, own in values.items() if any(value != own[runs[0].name] for value in own.values())}


def paired_cell(first: np.ndarray, second: np.ndarray, clusters: Sequence) -> dict:
    """`evaluation.statistics.paired`, and how many questions are right in both runs, in one or in neither.

    Args:
        first, second: scores `[N]` in [0, 1] of the same questions.

    Returns:
        what `paired` does, with "both", "only_first", "only_second", "neither", and "p", of McNemar's exact test.
    """
    right = [np.array([is_right(score) for score in scores]) for scores in (first, second)]
    only_first, only_second = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    return {
        **paired(first, second, clusters),
        "both": int((right[0] & right[1]).sum()),
        "only_first": only_first,
        "only_second": only_second,
        "neither": int((~right[0] & ~right[1]).sum()),
        "p": mcnemar(only_first, only_second),
    }


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of so uneven a division of the questions on which two runs differ; 1 where none do."""
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


def _scores(run: Run, rows: Sequence[dict], condition: str) -> np.ndarray:
    return np.array([run.rows[row["id"]]["conditions"][condition]["score"] for row in rows], dtype=float)


def _all_have(run: Run, rows: Sequence[dict], conditions: Sequence[str]) -> bool:
    return all(run.rows[row["id"]]["conditions"].get(name, {}).get("score") is not None
               for row in rows for name in conditions)  # fmt: skip


def _run_figures(run: Run, rows: Sequence[dict], scores: np.ndarray, clusters: Sequence) -> dict:
    """The run's score and, of the questions that show something, the gain of the picture and the looking score."""
    figures = {"name": run.name, "folder": str(run.folder), "score": Resampled({"own": scores}, clusters).share("own")}
    shown = [(row, cluster) for row, cluster in zip(rows, clusters, strict=True) if row["images"] or row["videos"]]
    with_pictures = [row for row, _ in shown]
    conditions = ("real", "blind", "shuffled")
    if not shown or not _all_have(run, with_pictures, conditions):
        return {**figures, "looking": {}}
    values = {name: _scores(run, with_pictures, name) for name in conditions}
    return {**figures, "looking": Resampled(values, [cluster for _, cluster in shown]).looking()}


def _gain_difference(first: Run, second: Run, rows: Sequence[dict], clusters: Sequence) -> dict | None:
    if not all(_all_have(run, rows, ("real", "blind")) for run in (first, second)):
        return None
    gains = {name: _scores(run, rows, "real") - _scores(run, rows, "blind")
             for name, run in (("first", first), ("second", second))}  # fmt: skip
    return Resampled(gains, clusters).difference("first", "second", most=2.0)  # gains lie in [-1, 1]


def _differing(rows: Sequence[dict], first: str, second: str) -> list[dict]:
    """Questions that are right in one run alone: the two sides in turn, each in the order of the file."""
    sides = ([], [])
    for row in rows:
        right = [is_right(row["conditions"][name]["score"]) for name in (first, second)]
        if right[0] != right[1]:
            sides[right[1]].append(row)
    longest = max(map(len, sides))
    return [side[place] for place in range(longest) for side in sides if place < len(side)]
