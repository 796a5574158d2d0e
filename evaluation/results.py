"""What rows of answered questions say together: the report, as a dict, as text and as files.

    {"n", "conditions": ["real", ...], "settings": {...}, "seconds": {...},
     "metrics": {"exact": {"n", "real": {"value", "low", "high"}, "blind": {...}, ...}, "perplexity": ...},
     "score": {"n", "majority", "real": {...}, ...},
     "looking": {"n", "gain": {...}, "gain_over_shuffled": {...}, "looking_score": {...} or None} or None,
     "groups": {"type": {"colour": {"n", "majority", "real": {...}, ..., "looking_score"}}, "type x language": {...}},
     "benchmark_scores": {"real": {...}, ...}}

`score` is the mean score, by each question's own metric, of all questions but captions; `looking` is about those that
show something (`evaluation.statistics.Resampled.looking`); a group is one of the values of a key of `meta`. `low` and
`high` bound a 95 % interval (`evaluation.statistics`), `majority` is what the most frequent answer of a group would
reach if it were always given. `benchmark_scores` are what MME and MMBench publish beside accuracy
(`evaluation.benchmarks.scores`); whole benchmarks alone have them.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from dataset.files import write_text
from dataset.text_table import text_table
from evaluation.benchmarks.scores import SCORES, published_scores, score_rows
from evaluation.language import language_of
from evaluation.metrics import choose, constant_score, normalise, score
from evaluation.order import CONDITIONS
from evaluation.polarity import polarity
from evaluation.questions import METRICS, Question, question_of_row
from evaluation.statistics import Resampled, perplexity
from page.figures import OWN_UNITS
from page.text import plain

MOST_GROUPS = 32  # a meta key with more different values than this is an identifier, not a group


def make_report(
    rows: Sequence[dict],
    metrics: Sequence[str] = (),
    settings: dict | None = None,
    seconds: dict[str, float] | None = None,
) -> dict:
    """Report on rows of `rows.jsonl`.

    Args:
        metrics: which to report, for all questions that allow them ("choice": those with choices, "yes_no": those whose
            reference says yes or no); by default each for the questions whose own it is. Scores, and with them groups
            and looking score, stay those of each question's own metric.

    Raises:
        ValueError: no rows, or what `check_metrics` raises.
    """
    if not rows:
        raise ValueError("no answered questions to report on")
    questions = [question_of_row(row) for row in rows]
    check_metrics(questions, metrics)
    conditions = [name for name in CONDITIONS if name in rows[0]["conditions"]]
    scored = [number for number, q in enumerate(questions) if q.metric != "caption"]
    table = _Table(rows, questions, conditions)
    report = {
        "n": len(rows),
        "conditions": conditions,
        "settings": settings or {},
        "seconds": seconds or {},
        "metrics": table.metrics(metrics),
        "score": {"n": len(scored), **(table.cell(scored) if scored else {})},
        "looking": table.looking([number for number in scored if questions[number].media]),
        "groups": {
            name: {key: table.group(members) for key, members in groups.items()}
            for name, groups in groupings(questions, scored).items()
        },
    }
    if scores := _benchmark_scores(rows, report["settings"]):
        report["benchmark_scores"] = scores
    return report


def _benchmark_scores(rows: Sequence[dict], settings: dict) -> dict[str, dict] | None:
    name = settings.get("benchmark")
    return published_scores(name, rows) if name in SCORES and not {"limit", "sample"} & settings.keys() else None


class _Table:
    """Rows as arrays; `members` are numbers of rows."""

    def __init__(self, rows: Sequence[dict], questions: list[Question], conditions: list[str]):
        self.rows, self.questions, self.conditions = rows, questions, conditions
        # Questions without a picture are independent of each other.
        self.clusters: list[Hashable] = [q.media or q.id for q in questions]
        self.own = {name: self._scores(name) for name in conditions}  # NaN for captions

    def _scores(self, condition: str) -> np.ndarray:
        scores = [row["conditions"][condition]["score"] for row in self.rows]
        return np.array([np.nan if value is None else value for value in scores], dtype=float)

    def _resampled(self, members: Sequence[int], scores: dict[str, np.ndarray] | None = None) -> Resampled:
        scores = scores or {name: values[members] for name, values in self.own.items()}
        return Resampled(scores, [self.clusters[number] for number in members])

    def cell(self, members: Sequence[int]) -> dict:
        """Mean scores with their intervals, and what the most frequent answer would reach."""
        return self._figures(members, self._resampled(members))

    def _figures(self, members: Sequence[int], drawn: Resampled) -> dict:
        return {"majority": self._majority(members), **{name: drawn.share(name) for name in self.conditions}}

    def group(self, members: Sequence[int]) -> dict:
        """As `cell`, with the number of questions and, where all show something, the looking score."""
        drawn = self._resampled(members)
        found = {"n": len(members), **self._figures(members, drawn)}
        if all(self.questions[number].media for number in members):
            found |= {name: value for name, value in drawn.looking().items() if name == "looking_score"}
        return found

    def looking(self, members: Sequence[int]) -> dict | None:
        found = self._resampled(members).looking() if members else {}
        return {"n": len(members), **found} if found else None

    def _majority(self, members: Sequence[int]) -> float:
        counts = Counter(normalise(self.questions[number].answer) for number in members)
        wanted = counts.most_common(1)[0][0]
        answer = next(q.answer for q in map(self.questions.__getitem__, members) if normalise(q.answer) == wanted)
        return float(np.mean([constant_score(self.questions[number], answer) for number in members]))

    def metrics(self, wanted: Sequence[str]) -> dict[str, dict]:
        """Figures of each metric over the questions that have it, and the perplexity of references."""
        found = {}
        for name in [name for name in METRICS if name in wanted or not wanted]:
            members = [number for number, q in enumerate(self.questions) if _allows(q, name, forced=name in wanted)]
            if members:
                found |= self._captions(members) if name == "caption" else self._metric(name, members)
        return found | self._perplexity()

    def _metric(self, name: str, members: list[int]) -> dict[str, dict]:
        questions = [self.questions[number] for number in members]
        results = {
            condition: [self.rows[number]["conditions"][condition] for number in members]
            for condition in self.conditions
        }
        scores = {
            condition: np.array([
                score(q, name, result["answer"], result.get("likelihoods"))
                for q, result in zip(questions, found, strict=True)
            ])
            for condition, found in results.items()
        }  # fmt: skip
        drawn = self._resampled(members, scores)
        figures = {"n": len(members), **{condition: drawn.share(condition) for condition in self.conditions}}
        if name == "yes_no":
            for condition, found in results.items():
                figures[condition] |= yes_no_figures(questions, [result["answer"] for result in found])
        if name != "choice":
            return {name: figures}
        sums = {
            condition: np.array([
                float(q.choices[choose(result["likelihood_sums"])] == q.answer)
                for q, result in zip(questions, found, strict=True)
            ])
            for condition, found in results.items()
        }  # fmt: skip
        drawn = self._resampled(members, sums)
        by_sum = {"n": len(members), **{condition: drawn.share(condition) for condition in self.conditions}}
        return {"choice": figures, "choice_by_sum": by_sum}

    def _captions(self, members: list[int]) -> dict[str, dict]:
        from evaluation.captions import caption_figures, caption_scores

        questions = [self.questions[number] for number in members]
        references = [q.references for q in questions]
        languages = [q.meta.get("language") for q in questions]
        found: dict[str, dict] = {}
        for condition in self.conditions:
            answers = [self.rows[number]["conditions"][condition]["answer"] for number in members]
            scores = caption_scores(answers, references, languages)
            for language, own in scores.items():
                clusters = [self.clusters[members[row]] for row in own.rows]
                for name, figure in caption_figures(own, clusters).items():
                    name = name if len(scores) == 1 else f"{name}_{language}"
                    found.setdefault(name, {"n": len(own.rows)})[condition] = figure
        return found

    def _perplexity(self) -> dict[str, dict]:
        if any("nll" not in row["conditions"][name] for row in self.rows for name in self.conditions):
            return {}
        figures = {"n": len(self.rows)}
        for name in self.conditions:
            nll, tokens = (
                np.array([row["conditions"][name][key] for row in self.rows], dtype=float) for key in ("nll", "tokens")
            )
            figures[name] = perplexity(nll, tokens, self.clusters)
        return {"perplexity": figures}


def check_metrics(questions: Sequence[Question], wanted: Sequence[str]) -> None:
    """Raises ValueError for a metric that there is not, that no question allows, or whose packages are missing."""
    if unknown := [name for name in wanted if name not in METRICS]:
        raise ValueError(f"there is no metric {unknown[0]!r}, there are {', '.join(METRICS)}")
    for name, needed in (("choice", "meta.choices"), ("yes_no", "references that say yes or no")):
        if name in wanted and not any(_allows(q, name, forced=True) for q in questions):
            raise ValueError(f"the metric {name!r} needs {needed}, which no record has")
    captions = questions if "caption" in wanted else [q for q in questions if q.metric == "caption" and not wanted]
    if captions:
        from evaluation.captions import caption_scores

        languages = {}  # of each one question that is in it
        for q in captions:
            languages.setdefault(q.meta.get("language") or language_of(" ".join(q.references)), q.id)
            if not any(map(str.isalnum, "".join(q.references))):
                raise ValueError(f"record {q.id!r}: none of its references has a word; drop it, or give it a caption")
        for language, owner in languages.items():
            try:
                caption_scores(["a", "b"], [["a"], ["b"]], [language] * 2)
            except ValueError as error:
                raise ValueError(f"record {owner!r}: {error}") from error


def _allows(q: Question, metric: str, forced: bool) -> bool:
    """Whether a question counts for a metric: it is its own, or was asked for and can be computed."""
    if metric == "choice" and forced:
        return bool(q.choices)
    if metric == "yes_no" and forced:
        return polarity(q.references[0]) is not None
    return q.metric == metric or forced


def yes_no_figures(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float | None]:
    """Precision, recall and F1 of "yes", its share among the answers, and the share that says neither yes nor no.

    As POPE reports them (Li et al., https://arxiv.org/abs/2305.10355). None for 0 / 0.
    """
    said = [polarity(answer) for answer in answers]
    truth = [polarity(q.references[0]) for q in questions]
    hits = sum(a is True and b is True for a, b in zip(said, truth, strict=True))
    yes, positives = said.count(True), truth.count(True)

    def ratio(top: int, bottom: int) -> float | None:
        return top / bottom if bottom else None

    return {
        "precision": ratio(hits, yes),
        "recall": ratio(hits, positives),
        "f1": ratio(2 * hits, yes + positives),
        "yes_ratio": yes / len(said),
        "neither": said.count(None) / len(said),
    }


def groupings(questions: Sequence[Question], rows: Sequence[int]) -> dict[str, dict[str, list[int]]]:
    """Name of a grouping -> group -> rows: one grouping per meta key, and `type` crossed with each other key."""
    single: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    crossed: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        meta = questions[row].meta
        for key, value in meta.items():
            single[key][str(value)].append(row)
            if "type" in meta and key != "type":
                crossed[key][f"{meta['type']} x {value}"].append(row)
    groups = {key for key, members in single.items() if len(members) <= MOST_GROUPS}
    found = {key: single[key] for key in sorted(groups, key=lambda key: (key != "type", key))}
    if "type" in groups:
        found |= {f"type x {key}": crossed[key] for key in sorted(crossed.keys() & groups)}
    return {name: dict(sorted(members.items(), key=lambda item: _natural(item[0]))) for name, members in found.items()}


def _natural(text: str) -> list[tuple[int, int, str]]:
    """What sorts "2" before "10"."""
    parts = re.split(r"([0-9]+)", text)
    return [(0, int(part), "") if part.isdecimal() and part.isascii() else (1, 0, part) for part in parts]


# Text


def format_report(report: dict) -> str:
    """The report as a table for a terminal: metrics, score, groups; then what the looking score is made of."""
    conditions = report["conditions"]
    lines = [["", *conditions, "majority", "n"]]
    for name, figures in report["metrics"].items():
        lines.append([name, *(_shown(figures[c], name) for c in conditions), "", f"{figures['n']:,}"])
    for name, figures in score_rows(report.get("benchmark_scores", {})).items():
        lines.append([_one_line(name), *figures, "", ""])
    if report["score"]["n"]:
        lines.append(["score", *_cells(report["score"], conditions)])
    for grouping, groups in report["groups"].items():
        if " x " in grouping and grouping != "type x language":
            continue  # all of them stand in report.md
        lines += [[_one_line(f"{grouping}: {key}"), *_cells(figures, conditions)] for key, figures in groups.items()]
    text = [text_table(lines, right=range(1, len(lines[0])))]
    text += ["", *looking_lines(report)]
    if report["seconds"]:
        text.append("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items()))
    return "\n".join(text)


def _one_line(text: str) -> str:
    """A name of the data in a table for a terminal."""
    return " ".join(plain(text).split())


def looking_lines(report: dict) -> list[str]:
    """Gains and looking score in words, with their intervals."""
    looking = report["looking"]
    if looking is None:
        return ["no looking score: it needs questions with a picture and a score, and the conditions real and blind"]
    lines = []
    for name, others in (("gain", "blind"), ("gain_over_shuffled", "shuffled"), ("gain_over_reordered", "reordered")):
        if name in looking:
            low, value, high = (f"{100 * looking[name][key]:.1f}" for key in ("low", "value", "high"))
            lines.append(f"real minus {others}: {value} points [{low}, {high}]")
    if ratio := looking.get("looking_score"):
        lines.append(f"looking score: {ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]")
    elif "looking_score" in looking:
        lines.append("looking score: none, as the pictures may well gain nothing (the interval of the gain holds 0)")
    else:
        lines.append("looking score: none, as it needs the conditions blind and shuffled, and so a second picture")
    return lines


def _cells(figures: dict, conditions: Sequence[str]) -> list[str]:
    shares = [f"{100 * figures[c]['value']:.1f}%" for c in conditions]
    return [*shares, f"{100 * figures['majority']:.1f}%", f"{figures['n']:,}"]


def _shown(figure: dict, metric: str) -> str:
    if metric.startswith(OWN_UNITS):
        return f"{figure['value']:.3f}"
    return f"{100 * figure['value']:.1f}%"


def markdown(report: dict, title: str) -> str:
    """The report as Markdown, each figure with its interval."""
    conditions = report["conditions"]

    def table(first: str, rows: dict[str, dict], majority: bool) -> list[str]:
        header = [first, *conditions, *(["majority"] if majority else []), "questions"]
        lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
        for name, figures in rows.items():
            cells = [_with_interval(figures[c], name) for c in conditions]
            if majority:
                cells.append(f"{100 * figures['majority']:.1f} %")
            lines.append(f"| {_escaped(name)} | " + " | ".join([*cells, f"{figures['n']:,}"]) + " |")
        return [*lines, ""]

    lines = [f"# {title}", "", *table("metric", report["metrics"], majority=False)]
    if published := score_rows(report.get("benchmark_scores", {})):
        lines += ["| " + " | ".join([report["settings"]["benchmark"], *conditions]) + " |"]
        lines += ["|---" + "|---:" * len(conditions) + "|"]
        lines += ["| " + " | ".join([_escaped(name), *figures]) + " |" for name, figures in published.items()] + [""]
    if report["score"]["n"]:
        lines += table("score", {"all": report["score"]}, majority=True)
    lines += [f"- {line}" for line in looking_lines(report)]
    lines.append("")
    for grouping, groups in report["groups"].items():
        lines += table(grouping, groups, majority=True)
    lines += ["Intervals hold 95 %: bootstrap over images.", ""]
    for name, value in report["settings"].items():
        lines.append(f"- {name}: `{json.dumps(value, ensure_ascii=False)}`")
    if report["seconds"]:
        lines += ["", "Seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items())]
    return "\n".join(lines) + "\n"


def _with_interval(figure: dict, name: str) -> str:
    if name.startswith(OWN_UNITS):
        return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"
    value, low, high = (f"{100 * figure[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} % [{low}, {high}]"


def _escaped(text: str) -> str:
    """A name of the data in a cell of a table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


# Files


def write_results(
    folder: str | Path,
    report: dict,
    rows: Sequence[dict],
    image_root: str | Path,
    title: str,
    sampling: dict | None = None,
) -> None:
    """Writes `report.md`, `report.html` and, as a sign that all is there, `report.json`.

    Args:
        sampling: which frames of a clip the model sees, for the page.
    """
    from page.evaluation import write_page

    folder = Path(folder)
    write_text(markdown(report, title), folder / "report.md")
    write_page(report, rows, image_root, folder / "report.html", title, sampling=sampling)
    write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", folder / "report.json")
