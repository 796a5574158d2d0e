"""The figures of an evaluation as a page shows them: bars with intervals, and sentences that say what they mean."""

import math
from collections.abc import Sequence
from urllib.parse import urlencode

from page.text import natural

RIGHT = 0.5  # the score from which on an answer counts as right where answers are counted
FEW = 30  # questions; of fewer a share is hardly more than an anecdote
BAR, GAP = 9, 3  # pixels
METRICS = {
    "exact": "share of answers that equal a reference",
    "vqa": "VQA accuracy: how many of the annotators agree",
    "choice": "share of questions whose right choice is the likeliest, per token",
    "choice_by_sum": "the same by the likelihood of the whole choice, which favours short ones",
    "yes_no": "share of right answers to yes-or-no questions",
    "anls": "average normalised Levenshtein similarity; below 0.5 it counts as 0",
    "cider": "CIDEr: agreement with captions, in units of its own",
    "perplexity": "of the references, per token; lower is better",
}
OWN_UNITS = ("perplexity", "cider")  # metrics that are no shares


def is_right(score: float) -> bool:
    return score >= RIGHT


def points(value: float) -> str:
    """A difference of shares: `+12.3`"""
    return f"{100 * value:+.1f}".replace("-", "−")


def in_unit(name: str, value: float | None) -> str:
    """A figure of a metric: a percentage, or a number where the metric has units of its own."""
    if value is None or not math.isfinite(value):
        return "–"
    if name.startswith(OWN_UNITS):
        return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
    return f"{100 * value:.1f}"


def bars(cell: dict, conditions: Sequence[str]) -> dict:
    """What the template draws of shares with intervals: one bar per condition, lengths in percent of the width."""
    drawn = []
    for place, condition in enumerate(conditions):
        figure = cell.get(condition)
        if figure is None:
            continue
        top = place * (BAR + GAP) + 2
        drawn.append({
            "place": place, "y": top, "middle": top + BAR / 2, "name": condition, "value": _percent(figure["value"]),
            "low": _percent(figure["low"]), "high": _percent(figure["high"]), "title": figure_text(condition, figure),
        })  # fmt: skip
    height = len(conditions) * (BAR + GAP) + 1
    majority = cell.get("majority")
    return {"bars": drawn, "height": height, "bar": BAR, "majority": None if majority is None else _percent(majority),
            "label": "; ".join(bar["title"] for bar in drawn)}  # fmt: skip


def figure_text(name: str, figure: dict) -> str:
    """`real 98.7 % (98.4 to 99.0)`"""
    value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
    return f"{name} {value:.1f} % ({low:.1f} to {high:.1f})"


def _percent(value: float) -> str:
    return f"{100 * min(max(value, 0.0), 1.0):.2f}"


def meaning(report: dict) -> list[str]:
    """What the headline figures say about the model, no more than they do."""
    score, looking = report.get("score"), report.get("looking") or {}
    if not score or not score.get("n"):
        return ["No question has a score of its own; the figures of the whole set are in the table of metrics."]
    if "real" not in score:
        return ["Without the condition real it can't be told what the picture is worth."]
    sentences = [f"With its picture the model scores {_with_interval(score['real'])}."]
    gain = looking.get("gain")
    if gain is None:
        return [*sentences, "Without the condition blind it can't be told whether the picture matters."]
    sentences.append(_gain_text(gain, score))
    if looking.get("n", score["n"]) < score["n"]:
        sentences.append(f"That difference is of the {looking['n']:,} questions that show something.")
    if ratio := looking.get("looking_score"):
        sentences.append(
            f"Looking score {ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}): of what the picture "
            f"adds, {100 * ratio['value']:.0f} % is lost when another picture of the set stands in its place. That "
            "part comes from what this very picture shows; the rest needs no more than some picture."
        )
    elif gain["low"] > 0:
        sentences.append("Without the condition shuffled it can't be told whether any picture would have done.")
    return sentences


def _gain_text(gain: dict, score: dict) -> str:
    value, low, high = (f"{100 * gain[key]:.1f}".replace("-", "−") for key in ("value", "low", "high"))
    span = f"{value} points ({low} to {high})"
    blind = f"{100 * score['blind']['value']:.1f} %"
    if gain["low"] > 0:
        return f"Blind it scores {blind}: the picture is worth {span}, so answers depend on it."
    if gain["high"] < 0:
        return f"Blind it scores {blind}, which is more: the picture misleads the model (real − blind: {span})."
    return (
        f"Blind it scores {blind}. The difference of {span} may well be none: these questions don't show that the "
        "model uses its picture, and there is no looking score."
    )


def _with_interval(figure: dict) -> str:
    value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % (95 % interval {low:.1f} to {high:.1f})"


def caution(asked: str, groups: dict[str, dict]) -> str:
    """How far the intervals carry, with the numbers that they rest on."""
    cells = [cell for grouping in groups.values() for cell in grouping.values()]
    few = sum(cell["n"] < FEW for cell in cells)
    parts = [
        f"Intervals are of 95 %: they tell how far a figure would move with other questions of this kind "
        f"(here {asked}), not with another training run or other data."
    ]
    if len(cells) > 1:
        parts.append(f"Of the intervals of the {len(cells)} groups about one in twenty is expected to miss the truth.")
    if few:
        parts.append(f"{few} {'group has' if few == 1 else 'groups have'} fewer than {FEW} questions (marked *): there "
                     "read the interval, not the value.")  # fmt: skip
    return " ".join(parts)


def metric_rows(metrics: dict[str, dict], columns: Sequence[str]) -> list[tuple[str, dict, str]]:
    """(name, figures by column and `n`, what it is) of each metric; parts of one, as F1, have rows of their own."""
    rows = []
    for name, figures in metrics.items():
        meaning = next((text for known, text in METRICS.items() if name == known or name.startswith(f"{known}_")), "")
        rows.append((name, figures, METRICS.get(name, meaning)))
        parts = {part for column in columns for part in figures.get(column, {}) if part not in ("value", "low", "high")}
        for part in sorted(parts):
            own = {column: {"value": figures[column].get(part), "low": None} for column in columns if column in figures}
            rows.append((f"{name}: {part}", {"n": figures["n"], **own}, ""))
    return rows


def wrong_with_picture(row: dict) -> bool:
    real = row["conditions"].get("real")
    return real is not None and real["score"] is not None and not is_right(real["score"])


def crossing(rows: Sequence[dict], pair: tuple[str, str]) -> dict | None:
    """How many questions are right in both of two columns, in one or in neither; None where nothing has both."""
    counts = {(first, second): 0 for first in (True, False) for second in (True, False)}
    for row in rows:
        scores = [row["conditions"].get(name, {}).get("score") for name in pair]
        if None not in scores:
            counts[is_right(scores[0]), is_right(scores[1])] += 1
    total = sum(counts.values())
    if not total:
        return None
    words = {True: "right", False: "wrong"}
    order = ((True, False), (True, True), (False, True), (False, False))
    return {"n": total, "cells": [
        {"right": right, "count": counts[right], "share": counts[right] / total,
         "link": "#" + urlencode({f"is.{name}": words[one] for name, one in zip(pair, right, strict=True)})}
        for right in order
    ]}  # fmt: skip


def any_partial(rows: Sequence[dict]) -> bool:
    """Whether an answer has a score between 0 and 1."""
    scores = (answer["score"] for row in rows for answer in row["conditions"].values())
    return any(score is not None and 0 < score < 1 for score in scores)


def split_groups(groups: dict[str, dict]) -> dict[str, list]:
    """`groups`, by one key, and `crossed`, by two, which are many: (name, [(value, cell)]) of each grouping."""
    ordered = [(name, sorted(cells.items(), key=lambda cell: natural(cell[0]))) for name, cells in groups.items()]
    return {"groups": [pair for pair in ordered if " x " not in pair[0]],
            "crossed": [pair for pair in ordered if " x " in pair[0]]}  # fmt: skip


def p_text(p: float) -> str:
    """A p-value: `0.031`, `< 0.001`"""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def p_clause(p: float) -> str:
    return f"p {p_text(p)}" if p < 0.001 else f"p = {p_text(p)}"
