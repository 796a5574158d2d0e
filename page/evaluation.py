"""The HTML page of an evaluation: its figures with their intervals, what they mean, and a gallery of its questions."""

import json
from collections.abc import Sequence
from pathlib import Path

from dataset.files import write_text
from page.figures import FEW, any_partial, caution, crossing, meaning, metric_rows, split_groups, wrong_with_picture
from page.gallery import MOST_BYTES, MOST_ROWS, Words, make_gallery, render_gallery
from page.questions import Album

CONDITIONS = {
    "real": "its own picture",
    "blind": "no picture",
    "shuffled": "another picture of the set",
    "reordered": "its frames in another order",
}  # fmt: skip
WORDS = Words(
    pair=("real", "blind"),
    looks={"more": "picture helped", "both": "right blind, too", "less": "picture misled",
           "same": "same answer whatever is shown"},
    orders={"first": "mistakes first, groups in turn", "file": "as in the file", "score": "lowest score first",
            "more": "picture helped most", "less": "picture misled most", "surprise": "most surprising reference"},
    urgent="wrong answers",
)  # fmt: skip


def write_page(
    report: dict,
    rows: Sequence[dict],
    image_root: str | Path,
    path: str | Path,
    title: str,
    *,
    sampling: dict | None = None,
    most_rows: int = MOST_ROWS,
    most_bytes: int = MOST_BYTES,
) -> None:
    """Writes the page of an evaluation.

    A picture that can't be read is named in its place on the page; the figures don't depend on it.

    Args:
        report: content of `report.json`.
        rows: those of `rows.jsonl`, all that the report is about.
        image_root: folder that the paths of the rows are relative to.
        sampling: which frames of a clip the model was shown: `frames`, `fps` and `max_seconds` of `visual.video`.
        most_rows: questions in the gallery; of more, wrong answers first, evenly from all groups.
        most_bytes: of the gallery's texts and pictures together.

    Raises:
        ValueError: `rows` aren't those of the report.
        OSError: the file can't be written.
    """
    if len(rows) != report["n"]:
        raise ValueError(f"the report is about {report['n']:,} questions and there are {len(rows):,} rows; "
                         "take report.json and rows.jsonl from the same folder")  # fmt: skip
    columns = report["conditions"]
    gallery = make_gallery(
        rows, columns, WORDS, wrong_with_picture, Album(image_root, sampling), most_rows, most_bytes
    )
    text = render_gallery(
        "evaluation.html",
        gallery,
        classes=list(CONDITIONS),
        title=title,
        facts=_facts(report, rows),
        explained=CONDITIONS,
        score=report["score"] if report.get("score", {}).get("n") else None,
        looking=report.get("looking") or {},
        sentences=meaning(report),
        caution=caution(asked(rows), report["groups"]),
        crossing=crossing(rows, ("real", "blind")),
        partial=any_partial(rows),
        few=FEW,
        metrics=metric_rows(report["metrics"], columns),
        **split_groups(report["groups"]),
        settings=[(key, _setting(value)) for key, value in report.get("settings", {}).items()],
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(text, path)


def asked(rows: Sequence[dict]) -> str:
    """`4,378 questions about 400 pictures`"""
    counts = {name: len({path for row in rows for path in row[key]})
              for name, key in (("picture", "images"), ("clip", "videos"))}  # fmt: skip
    media = [_count(count, name) for name, count in counts.items() if count]
    return _count(len(rows), "question") + (f" about {' and '.join(media)}" if media else "")


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _facts(report: dict, rows: Sequence[dict]) -> list[str]:
    settings = report.get("settings", {})
    named = [f"{key.removesuffix('_path')} {_setting(settings[key])}"
             for key in ("checkpoint_path", "benchmark", "data") if settings.get(key)]  # fmt: skip
    seconds = report.get("seconds", {}).get("total")
    return [*named, asked(rows), *([] if seconds is None else [f"{seconds:,.0f} seconds"])]


def _setting(value) -> str:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
