"""Finished evaluations that are set against each other: the folders of several runs, with the same questions."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from page.text import plain

SAME_FIELDS = ("turns", "images", "videos", "answer", "references", "choices", "metric")


@dataclass
class Run:
    """A finished evaluation: its rows by id, in their order."""

    name: str
    folder: Path
    rows: dict[str, dict]
    settings: dict


def read_runs(folders: Sequence[Path], common: bool = False) -> list[Run]:
    """The runs of two or more folders, all with the same questions in the same order.

    Args:
        common: leave out what not all of them have; otherwise that is an error.

    Raises:
        FileNotFoundError: a folder without a finished evaluation.
        ValueError: fewer than two folders, the same one twice, rows that can't be read, or other questions.
    """
    if len(folders) < 2:
        raise ValueError("two folders or more are compared; name those that evaluate.py --output has written")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a folder is named twice; a run does not differ from itself")
    runs = [read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    first = runs[0]
    for other in runs[1:]:
        problem = _difference(first, other)
        if problem and not common:
            raise ValueError(f"{problem}; --common compares only what all of them have")
    ids = [id for id, row in first.rows.items() if all(_same(row, run.rows.get(id)) for run in runs[1:])]
    if not ids:
        raise ValueError(f"{', '.join(str(run.folder) for run in runs)} have no question in common")
    for run in runs:
        run.rows = {id: run.rows[id] for id in ids}
    return runs


def read_run(folder: Path, name: str) -> Run:
    """Raises FileNotFoundError where no evaluation was finished, ValueError for rows that can't be read."""
    for file in (folder / "report.json", folder / "rows.jsonl"):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {folder} holds no finished evaluation; run evaluate.py with "
                                    f"--output {folder}")  # fmt: skip
    try:
        settings = dict(json.loads((folder / "report.json").read_text(encoding="utf-8"))["settings"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'report.json'} is no report of an evaluation; run evaluate.py again") from None
    rows = {}
    for number, line in enumerate((folder / "rows.jsonl").read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if any("score" not in answer for answer in row["conditions"].values()) or not set(SAME_FIELDS) <= set(row):
                raise KeyError(row["id"])
            rows[row["id"]] = row
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{folder / 'rows.jsonl'}, line {number}: this is no row of an evaluation") from None
    return Run(name, folder, rows, settings)


def short_names(folders: Sequence[Path]) -> list[str]:
    """`outputs/a/evaluation`, `outputs/b/evaluation` -> `a`, `b`: what tells the paths apart."""
    parts = [folder.resolve().parts for folder in folders]
    shortest = min(map(len, parts))
    start = next((place for place in range(shortest) if len({own[place] for own in parts}) > 1), shortest - 1)
    ends = range(shortest - start - 1)
    end = next((place for place in ends if len({own[-1 - place] for own in parts}) > 1), len(ends))
    return [plain("/".join(own[start : len(own) - end])) for own in parts]


def _same(row: dict, other: dict | None) -> bool:
    return other is not None and all(row[key] == other[key] for key in SAME_FIELDS)


def _difference(first: Run, other: Run) -> str | None:
    """How the questions of two runs differ, with an example of each."""
    parts = []
    for run, against in ((first, other), (other, first)):
        if own := [id for id in run.rows if id not in against.rows]:
            parts.append(f"{len(own):,} only in {run.folder} (first {plain(own[0])!r})")
    shared = [id for id in first.rows if id in other.rows]
    changed = [id for id in shared if not _same(first.rows[id], other.rows[id])]
    if changed:
        row, against = first.rows[changed[0]], other.rows[changed[0]]
        fields = ", ".join(key for key in SAME_FIELDS if row[key] != against[key])
        parts.append(f"{len(changed):,} that have the same id and not the same content (first {plain(changed[0])!r}: "
                     f"{fields})")  # fmt: skip
    return "the runs did not answer the same questions: " + ", ".join(parts) if parts else None


def columns_of(runs: Sequence[Run], condition: str) -> list[dict]:
    """Rows as in `rows.jsonl`, whose `conditions` are the answers of the runs, by name."""
    rows = []
    for id, row in runs[0].rows.items():
        given = {run.name: dict(run.rows[id]["conditions"][condition]) for run in runs}
        rows.append({**row, "conditions": given})
    return rows
