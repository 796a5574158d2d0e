"""Sets evaluated models against each other, question by question.

    python -m evaluation.compare outputs/a/evaluation outputs/b/evaluation
    python -m evaluation.compare outputs/*/evaluation --output comparison.html

Each folder is one that `evaluate.py --output` has finished. All runs answer the same questions, so that what is hard
about a question is hard for all: the interval of a difference is that of the mean difference per question, from a
bootstrap over pictures (`evaluation.statistics`). The first run is compared with each of the others.

McNemar's test asks whether as many questions are right in the first run alone as in the other alone, of which the
binomial distribution tells exactly (Q. McNemar, 1947, doi:10.1007/BF02295996). It takes questions for independent,
which those about one picture are not; the interval doesn't. A score of 0.5 or more counts as right.

    --condition   which answers: real (default), blind, shuffled or reordered
    --common      compares the questions that all runs have, where they don't have the same ones
    --output      writes the comparison as comparison.html (with a gallery of all questions) or comparison.md
    --image_root  folder of the pictures, for the gallery; by default the one of the first run's evaluation
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dataset.files import write_text
from dataset.text_table import text_table
from evaluation.comparison import compare
from evaluation.runs import columns_of, read_runs
from page.figures import p_clause, p_text
from page.text import plain

LISTED = 20  # questions on which two runs differ, in texts
MARKED = "* The interval does not hold 0. Of groups without any difference about one in twenty is marked, too."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="of finished evaluations, two or more")
    parser.add_argument("--condition", default="real")
    parser.add_argument("--common", action="store_true", help="compare the questions that all have")
    parser.add_argument("--output", type=Path, help=".html or .md file")
    parser.add_argument("--image_root", type=Path)
    arguments = parser.parse_args()
    if arguments.output is not None and arguments.output.suffix not in (".html", ".md"):
        raise ValueError(f"--output names a .html or a .md file, got {arguments.output}")
    runs = read_runs(arguments.folders, arguments.common)
    comparison = compare(runs, arguments.condition)
    print(text_of(comparison))
    if arguments.output is None:
        return
    if arguments.output.suffix == ".md":
        write_text(markdown_of(comparison), arguments.output)
    else:
        from page.comparison import write_comparison

        root = arguments.image_root or Path(runs[0].settings.get("image_root") or ".")
        lines = [pair_lines(pair) for pair in comparison["pairs"]]
        rows = columns_of(runs, arguments.condition)
        write_comparison(comparison, rows, root, arguments.output, headline(comparison), lines)
    print(f"Written: {arguments.output}")


# Text


def text_of(comparison: dict) -> str:
    """The comparison for a terminal."""
    parts = [headline(comparison), text_table(run_rows(comparison), right=range(1, 5))]
    for pair in comparison["pairs"]:
        parts += ["\n".join(pair_lines(pair)), text_table(group_rows(pair, crossed=False), right=range(1, 9)), MARKED]
        parts.append("\n".join(_listed(pair)))
    return "\n\n".join(part for part in parts if part)


def markdown_of(comparison: dict) -> str:
    """The comparison as Markdown."""
    parts = ["# Comparison of evaluations", _escaped(headline(comparison)), _markdown_table(run_rows(comparison))]
    for pair in comparison["pairs"]:
        said = "\n".join(f"- {_escaped(line)}" for line in pair_lines(pair))
        parts += [f"## {_escaped(pair['first'])} and {_escaped(pair['second'])}", said,
                  _markdown_table(group_rows(pair)), _escaped(MARKED)]  # fmt: skip
        listed = [_escaped(line) for line in _listed(pair)]
        parts.append("\n".join([listed[0], "", *(f"- {line.strip()}" for line in listed[1:])]) if listed else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(comparison: dict) -> str:
    """What is compared, how sure the figures are, and whether runs were asked alike."""
    text = f"{comparison['n']:,} questions that all runs answered, under the condition {comparison['condition']}."
    if comparison["unscored"]:
        text += f" {comparison['unscored']:,} captions have no score of their own and are left out."
    text += (
        " In brackets: 95 % intervals, from a bootstrap over pictures; they are about other questions of this kind, "
        "not about another training run."
    )
    if differing := [_setting(key, values) for key, values in comparison["settings"].items()]:
        text += f" The runs have other settings: {'; '.join(differing)}."
    return text


def _setting(key: str, values: dict) -> str:
    given = ", ".join(f"{json.dumps(value, ensure_ascii=False)} in {name}" for name, value in values.items())
    return f"{_one_line(key)} {_one_line(given, 200)}"


def run_rows(comparison: dict) -> list[list[str]]:
    rows = [["run", "score", "real - blind", "real - shuffled", "looking score"]]
    for run in comparison["runs"]:
        looking = run["looking"]
        gains = [_points(looking[name]) if looking.get(name) else "-" for name in ("gain", "gain_over_shuffled")]
        ratio = looking.get("looking_score")
        rows.append([run["name"], _share(run["score"]), *gains,
                     f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "-"])  # fmt: skip
    return rows


def pair_lines(pair: dict) -> list[str]:
    """What the difference of two runs is, in words that say no more than the figures."""
    cell, first, second = pair["all"], pair["first"], pair["second"]
    counts = (f"Right in both: {cell['both']:,}, only in {first}: {cell['only_first']:,}, only in {second}: "
              f"{cell['only_second']:,}, in neither: {cell['neither']:,}.")  # fmt: skip
    lines = [verdict(pair), f"{counts} McNemar's exact test: {p_clause(cell['p'])}."]
    if gain := pair["gain_difference"]:
        lines.append(f"Real - blind, {first} minus {second}: {_points(gain)} points.")
    return lines


def verdict(pair: dict) -> str:
    """Which of two runs is better, if that can be told."""
    cell, first, second = pair["all"], pair["first"], pair["second"]
    difference, span = cell["difference"], _points(cell["difference"])
    if difference["low"] > 0:
        return f"{first} is better than {second}: {span} points."
    if difference["high"] < 0:
        return f"{first} is worse than {second}: {span} points."
    return f"{first} and {second} can't be told apart by these questions: {span} points."


def group_rows(pair: dict, crossed: bool = True) -> list[list[str]]:
    """The table of a pair by groups, `crossed` also by those of two keys. Intervals that don't hold 0 are marked."""
    header = ["", "n", pair["first"], pair["second"], "difference", "", "only first", "only second", "p"]
    rows = [header, ["all", *_cells(pair["all"])]]
    for name, groups in pair["groups"].items():
        if " x " in name and not crossed:
            continue
        rows += [[f"{_one_line(name)}: {_one_line(key)}", *_cells(cell)] for key, cell in groups.items()]
    return rows


def _cells(cell: dict) -> list[str]:
    difference = cell["difference"]
    mark = "*" if difference["low"] > 0 or difference["high"] < 0 else ""
    shares = [f"{100 * cell[name]['value']:.1f}" for name in ("first", "second")]
    counts = [f"{cell[name]:,}" for name in ("only_first", "only_second")]
    return [f"{cell['n']:,}", *shares, _points(difference), mark, *counts, p_text(cell["p"])]


def _listed(pair: dict) -> list[str]:
    """The first questions on which two runs differ."""
    found = pair["differing"]
    if not found:
        return []
    more = f", the first {LISTED}" if len(found) > LISTED else ""
    lines = [f"Right in one of the two alone ({len(found):,}{more}):"]
    for row in found[:LISTED]:
        given = ", ".join(f"{name} {_one_line(answer['answer'])!r}" for name, answer in row["conditions"].items()
                          if name in (pair["first"], pair["second"]))  # fmt: skip
        asked = _one_line(row["turns"][-1]["content"], 100)
        lines.append(f"  {_one_line(row['id'], 100)}: {asked} -> {_one_line(row['answer'])!r}; {given}")
    return lines


def _one_line(text: str, most: int = 60) -> str:
    line = " ".join(plain(text).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _share(figure: dict) -> str:
    return f"{100 * figure['value']:.1f} % [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def _points(figure: dict) -> str:
    numbers = [100 * figure[key] for key in ("value", "low", "high")]
    digits = 2 if any(number and not round(number, 1) for number in numbers) else 1  # a bound that only looks like 0
    value, low, high = (f"{number:+.{digits}f}" for number in numbers)
    return f"{value} [{low}, {high}]"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def _escaped(text: str) -> str:
    """A text of the data in Markdown."""
    for letter in "\\|<*_`[":
        text = text.replace(letter, f"\\{letter}")
    return text


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # files and settings of the user: the message says what to mend
        sys.exit(f"evaluation.compare: {error}")
