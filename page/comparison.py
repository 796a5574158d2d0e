"""The HTML page of a comparison: what runs reach on the same questions, where they differ, and every question."""

import math
from collections.abc import Sequence
from pathlib import Path

from dataset.files import write_text
from page.figures import FEW, RIGHT, any_partial, crossing, p_text, points, split_groups
from page.gallery import MOST_BYTES, MOST_ROWS, Words, make_gallery, render_gallery
from page.questions import Album


def write_comparison(
    comparison: dict,
    rows: Sequence[dict],
    image_root: str | Path,
    path: str | Path,
    headline: str,
    lines: Sequence[Sequence[str]],
    *,
    most_rows: int = MOST_ROWS,
    most_bytes: int = MOST_BYTES,
) -> None:
    """Writes the page.

    Args:
        comparison: what `evaluation.comparison.compare` returns.
        rows: as in `rows.jsonl`, their `conditions` being the answers of the runs, by name.
        image_root: folder that the paths of the rows are relative to.
        headline: what is compared.
        lines: of each pair of runs, what is to be said of it.
        most_rows, most_bytes: as in `page.evaluation.write_page`; questions on which scores differ come first.

    Raises:
        OSError: the file can't be written.
    """
    names = [run["name"] for run in comparison["runs"]]
    words = _words(*names[:2])
    gallery = make_gallery(rows, names, words, _differs, Album(image_root), most_rows, most_bytes)
    pairs = [
        {**pair, **split_groups(pair["groups"]), "lines": said, "extent": _extent(pair),
         "crossing": crossing(rows, (pair["first"], pair["second"]))}
        for pair, said in zip(comparison["pairs"], lines, strict=True)
    ]  # fmt: skip
    text = render_gallery(
        "comparison.html",
        gallery,
        {"forest": forest, "p_text": p_text},
        title=f"Comparison of {', '.join(names)}",
        facts=[],
        headline=headline,
        runs=comparison["runs"],
        pairs=pairs,
        caution=_caution(comparison["pairs"][0], any_partial(rows)),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(text, path)


def forest(figure: dict, extent: float) -> dict:
    """Where a difference and its interval lie between -extent and +extent, in percent of the width."""
    place = {key: f"{50 + 50 * min(max(figure[key] / extent, -1), 1):.2f}" for key in ("value", "low", "high")}
    side = "c0" if figure["low"] > 0 else "c1" if figure["high"] < 0 else "undecided"
    label = f"{points(figure['value'])} points ({points(figure['low'])} to {points(figure['high'])})"
    return {**place, "class": side, "label": label}


def _extent(pair: dict) -> float:
    """The axis of a pair's differences: the widest interval of its groups but the small, rounded up to 5 points."""
    cells = [cell for groups in pair["groups"].values() for cell in groups.values() if cell["n"] >= FEW]
    cells.append(pair["all"])
    widest = max(abs(cell["difference"][key]) for cell in cells for key in ("low", "high"))
    return max(math.ceil(20 * widest) / 20, 0.05)


def _differs(row: dict) -> bool:
    return len({answer["score"] for answer in row["conditions"].values()}) > 1


def _words(first: str, second: str) -> Words:
    return Words(
        pair=(first, second),
        looks={"more": f"{first} better", "less": f"{second} better", "both": "both right", "same": "same answer"},
        orders={"first": "where scores differ first", "file": "as in the file", "score": f"lowest score of {first}",
                "more": f"{first} better by most", "less": f"{second} better by most",
                "surprise": f"most surprising reference to {first}"},
        urgent="questions on which scores differ",
    )  # fmt: skip


def _caution(pair: dict, partial: bool) -> str:
    groups = sum(map(len, pair["groups"].values()))
    parts = ["Intervals are of 95 %: they tell how far a difference would move with other questions of this kind, not "
             "with another training run. p is that of McNemar's exact test, which takes questions for independent; "
             "those about one picture are not, and the intervals allow for that."]  # fmt: skip
    if groups:
        parts.append(f"Of {groups} groups without any difference about one in twenty would have an interval beside 0.")
    if partial:
        parts.append(f"A score of {RIGHT} or more counts as right.")
    return " ".join(parts)
