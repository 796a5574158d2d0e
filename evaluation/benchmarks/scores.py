"""Figures that some benchmarks publish beside accuracy, from the rows of a finished evaluation (`rows.jsonl`).

    python -m evaluation.benchmarks.scores mme outputs/run/mme/rows.jsonl

The report of `evaluate.py --benchmark` has them, too. Those of POPE (precision, recall, F1, share of "yes") stand in
the report of every evaluation with the metric "yes_no".
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence

from dataset.rows import nearest, read_rows

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme_scores(rows: Iterable[dict], condition: str = "real") -> dict:
    """MME's own figures (Fu et al., 2023, arXiv:2306.13394).

    `acc` is the share of right questions of a task in percent, `acc_plus` that of images whose two questions are both
    right, `score` their sum (at most 200). `perception` sums up ten tasks, `cognition` four; None where one is missing.

    Returns:
        {"tasks": {task: {"acc", "acc_plus", "score", "images"}}, "perception", "cognition"}

    Raises:
        ValueError: a row is none of MME, or an image has not two questions in a task; names it.
    """
    pairs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        image = row["images"][0] if row["images"] else ""
        pairs[_meta(row, "category", "mme")][image].append(row["conditions"][condition]["score"])
    tasks = {}
    for task, images in pairs.items():
        for image, scores in images.items():
            if len(scores) != 2:
                raise ValueError(f"{image}: {len(scores)} questions, expected the two that MME asks about an image")
        acc = 100 * sum(map(sum, images.values())) / (2 * len(images))
        acc_plus = 100 * sum(min(scores) for scores in images.values()) / len(images)
        tasks[task] = {"acc": acc, "acc_plus": acc_plus, "score": acc + acc_plus, "images": len(images)}
    return {"tasks": tasks, "perception": _sum(tasks, PERCEPTION), "cognition": _sum(tasks, COGNITION)}


def _meta(row: dict, key: str, benchmark: str) -> str | int:
    if key not in row["meta"]:
        problem = f"it has no meta.{key}; take rows of evaluate.py --benchmark {benchmark}"
        raise ValueError(f"row {row['id']!r:.80}: {problem}")
    return row["meta"][key]


def _sum(tasks: dict[str, dict], names: Sequence[str]) -> float | None:
    return sum(tasks[name]["score"] for name in names) if tasks.keys() >= set(names) else None


def circular_scores(rows: Iterable[dict], condition: str = "real") -> dict:
    """MMBench's circular accuracy (Liu et al., 2023, arXiv:2307.06281): a question is right if all its rotations are.

    Files without rotated rows have one row a question; then both figures are the same.

    Returns:
        {"accuracy": share of right rows, "circular": share of right questions, "rows", "questions"}

    Raises:
        ValueError: a row is none of MMBench; names it.
    """
    rotations: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        key = (row["id"].rpartition(":")[0], _meta(row, "question", "mmbench"))
        rotations[key].append(row["conditions"][condition]["score"])
    count = sum(map(len, rotations.values()))
    return {
        "accuracy": _share(sum(map(sum, rotations.values())), count),
        "circular": _share(sum(map(min, rotations.values())), len(rotations)),
        "rows": count,
        "questions": len(rotations),
    }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


SCORES = {"mme": mme_scores, "mmbench": circular_scores}


def published_scores(name: str, rows: Sequence[dict]) -> dict[str, dict]:
    """condition -> figures that a benchmark of `SCORES` publishes."""
    if name not in SCORES:
        raise ValueError(f"no further figures are published for {name!r:.80}{nearest(name, SCORES)}")
    return {condition: SCORES[name](rows, condition) for condition in (rows[0]["conditions"] if rows else [])}


def score_rows(scores: dict[str, dict]) -> dict[str, list[str]]:
    """Name -> figure under each condition, as texts, of what `published_scores` returns; "-" where there is none."""
    rows: dict[str, list[str]] = {}
    for figures in scores.values():
        if "tasks" in figures:
            sums = {name: figures[name] for name in ("perception", "cognition")}
            tasks = {f"{name} (acc + acc+)": task["score"] for name, task in figures["tasks"].items()}
            texts = {name: "-" if value is None else f"{value:.1f}" for name, value in {**sums, **tasks}.items()}
        else:
            texts = {"circular accuracy": "-" if figures["circular"] is None else f"{100 * figures['circular']:.1f} %"}
        for name, text in texts.items():
            rows.setdefault(name, []).append(text)
    return rows


def main() -> None:
    if len(sys.argv) != 3:
        raise ValueError(f"usage: python -m evaluation.benchmarks.scores {'|'.join(SCORES)} rows.jsonl")
    print(json.dumps(published_scores(sys.argv[1], list(read_rows(sys.argv[2]))), indent=2))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"evaluation.benchmarks.scores: {error}")
