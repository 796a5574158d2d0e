"""Greedy answers on records and how often they are right: with the real pictures and clips, blind, with other ones.

    python evaluate.py --checkpoint_path outputs/run --data test.parquet --image_root data --output report.json

The last turn of each record, an assistant turn, is predicted; all turns before it are given as they are. An answer is
right if it equals the record's after both are normalised: case, runs of white space and full stops at the end are
ignored (`normalise`). The conditions tell whether the model looks:

    real       the record's own images and clips
    blind      feature vectors of zeros
    shuffled   each image or clip replaced by another one of the set, never by itself, the same in all records
    reordered  only where all records show clips: their frames in a random order, never the real one

The report gives accuracy per condition, over all and by every key of the records' `meta` (`type`, `language`, ...).
`majority` is what the most frequent answer of a group would reach, `real_interval` the 95 % Wilson interval of `real`,
and `looks` holds the gaps between real and the others with 95 % intervals from a bootstrap over images.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from dataset.record import read_records
from dataset.shards import open_medium
from dataset.template import encode_prompt, media_of
from inference import GREEDY, add_model_arguments, load_model
from model import MultiModalModel

CONDITIONS = ("real", "blind", "shuffled", "reordered")
FEATURE_BYTES = 2**30  # features held at a time; more media than fit are worked off in chunks
ENCODE_BATCH = 32  # images or clips that go through the encoder at once
MOST_GROUPS = 32  # a meta key with more different values than this is an identifier, not a group


def evaluate(
    model: MultiModalModel,
    records: Iterable[dict],
    image_root: str | Path,
    *,
    system: str | None = None,
    conditions: Sequence[str] | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    seed: int = 0,
    predictions_file: str | Path | None = None,
) -> dict:
    """Report on `model` over `records`; see the top of this file.

    Args:
        model: in eval mode, with its tokenizer.
        records: validated records that end in an assistant turn.
        image_root: folder that the records' image paths are relative to.
        system: text of the system turn where a record has none; None for no system turn.
        conditions: any of `CONDITIONS`; None: those that the records allow.
        batch_size: questions per call of `generate`.
        max_new_tokens: longest answer.
        seed: of the order in which media replace each other, and of the order of frames.
        predictions_file: JSON lines `{"id", "answer", "real", "blind", "shuffled", ...}`, one per record.

    Raises:
        ValueError: no records, a record that does not end in an assistant turn, `shuffled` with only one image, or
            `reordered` with a record without a clip.
    """
    start = time.perf_counter()
    model.eval()
    questions = [make_question(record) for record in records]
    if not questions:
        raise ValueError("no records to evaluate")
    without = [q["id"] for q in questions if all(kind != "video" for kind, _ in q["media"])]
    if conditions is None:
        conditions = CONDITIONS[:3] if without else CONDITIONS
    if "reordered" in conditions and without:
        raise ValueError(f"record {without[0]!r} shows no clip; leave the condition 'reordered' out")
    substitute = substitutes(questions, seed) if "shuffled" in conditions else {}
    seconds = {"encode": 0.0, **{condition: 0.0 for condition in conditions}}
    bar = tqdm(total=len(questions) * len(conditions), desc="evaluating", unit="answer", disable=None)
    clips = any(kind == "video" for q in questions for kind, _ in q["media"])
    for chunk in chunks(questions, seed, media_per_chunk(model, clips)):
        lap = time.perf_counter()
        shown = {medium for q in chunk for medium in q["media"]}
        features = encode(model, sorted(shown | {substitute[medium] for medium in shown if substitute}), image_root)
        seconds["encode"] += time.perf_counter() - lap
        for condition in conditions:
            lap = time.perf_counter()
            for batch in batches(chunk, batch_size):
                rows = [features_of(q, condition, features, substitute, seed) for q in batch]
                answers = answer_batch(model, batch, rows, max_new_tokens, system)
                for q, answer in zip(batch, answers, strict=True):
                    q[condition] = answer
                bar.update(len(batch))
            seconds[condition] += time.perf_counter() - lap
    bar.close()
    if predictions_file is not None:
        write_predictions(questions, conditions, predictions_file)
    report = make_report(questions, conditions)
    report["seconds"] = {**seconds, "total": time.perf_counter() - start}
    return report


def make_question(record: dict) -> dict:
    """The turns of the prompt, the answer that is right, the record's media in the order of the text, and `meta`."""
    if record["messages"][-1]["role"] != "assistant" or len(record["messages"]) < 2:
        problem = "has no assistant turn at its end, hence nothing to compare with; leave such records out of the file"
        raise ValueError(f"record {record['id']!r} {problem}")
    turns, answer = record["messages"][:-1], record["messages"][-1]["content"]
    return {"id": record["id"], "turns": turns, "answer": answer, "media": media_of(record), "meta": record["meta"]}


def media_order(questions: list[dict], seed: int) -> list[tuple[str, str]]:
    """All different (kind, path) in an order that depends on `seed` alone."""
    media = sorted({medium for q in questions for medium in q["media"]})
    random.Random(seed).shuffle(media)
    return media


def substitutes(questions: list[dict], seed: int) -> dict[tuple[str, str], tuple[str, str]]:
    """Image -> the image that replaces it, clip -> clip: the next in a random circle, hence never itself.

    Raises:
        ValueError: there is only one image, or only one clip.
    """
    found = {}
    for kind in ("image", "video"):
        media = [medium for medium in media_order(questions, seed) if medium[0] == kind]
        if len(media) == 1:
            raise ValueError(f"all records show {media[0][1]}; the condition 'shuffled' needs a second {kind}")
        found.update(zip(media, media[1:] + media[:1], strict=True))
    return found


def media_per_chunk(model: MultiModalModel, clips: bool) -> int:
    """Media whose features `[n, H]` fit in `FEATURE_BYTES`, if all were as large as the larger kind."""
    embeddings = model.language_model.get_input_embeddings().weight
    most = model.media.num_features * (1 + model.media.spec["max_tiles"])
    if clips:
        most = max(most, model.media.frame_features * model.media.spec["frames"])
    return max(1, FEATURE_BYTES // (most * embeddings.shape[1] * embeddings.element_size()))


def chunks(questions: list[dict], seed: int, most_media: int) -> Iterable[list[dict]]:
    """Runs of questions that need at most `most_media` media, their replacements included; one with more is alone."""
    place = {medium: i for i, medium in enumerate(media_order(questions, seed))}
    ordered = sorted(questions, key=lambda q: min((place[medium] for medium in q["media"]), default=-1))
    chunk, shown = [], set()
    for q in ordered:
        if chunk and 2 * len(shown | set(q["media"])) > most_media:
            yield chunk
            chunk, shown = [], set()
        chunk.append(q)
        shown |= set(q["media"])
    yield chunk


def batches(questions: list[dict], size: int) -> list[list[dict]]:
    """Batches of prompts of similar length, which need little padding."""
    ordered = sorted(questions, key=lambda q: (len(q["media"]), sum(len(turn["content"]) for turn in q["turns"])))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


@torch.inference_mode()
def encode(model: MultiModalModel, media: list[tuple[str, str]], root: str | Path) -> dict[tuple, list[torch.Tensor]]:
    """(kind, path) -> features of each of its views, `[n, H]`."""
    features = {}
    for start in range(0, len(media), ENCODE_BATCH):
        part = media[start : start + ENCODE_BATCH]
        views = [model.media.load(kind, open_medium(root, path)) for kind, path in part]
        counts = [count for one in views for count in one.features]
        pixel_values = torch.cat([one.pixel_values for one in views])
        encoded = iter(model.encode_images(pixel_values.to(model.device), counts).split(counts))
        for medium, one in zip(part, views, strict=True):
            features[medium] = list(islice(encoded, len(one.features)))
    return features


def features_of(q: dict, condition: str, features: dict, substitute: dict, seed: int) -> list[torch.Tensor]:
    """Features `[n, H]` of each image and clip of a question under a condition."""
    found = []
    for medium in q["media"]:
        views = features[substitute[medium] if condition == "shuffled" else medium]
        if condition == "reordered" and medium[0] == "video":
            views = reordered(views, f"{seed} {q['id']}")
        elif condition == "blind":
            views = [torch.zeros_like(view) for view in views]
        found.append(torch.cat(views))
    return found


def reordered(views: list, seed: str) -> list:
    """The views in a random order that is not theirs, if there is another."""
    order = list(range(len(views)))
    while len(order) > 1 and order == sorted(order):
        random.Random(seed).shuffle(order)
        seed += "+"
    return [views[index] for index in order]


@torch.no_grad()  # and not inference mode: what the decoder keeps must serve training as well
def answer_batch(
    model: MultiModalModel, batch: list[dict], features: list[list], max_new_tokens: int, system: str | None
) -> list[str]:
    """Greedy answers to prompts with features `[n, H]` of their images and clips."""
    flat = [feature for row in features for feature in row]
    prompts = [
        encode_prompt(q["turns"], model.tokenizer, [len(one) for one in row], system)
        for q, row in zip(batch, features, strict=True)
    ]
    ids = model.generate(
        prompts, features=torch.cat(flat) if flat else None, max_new_tokens=max_new_tokens, **GREEDY
    )
    return [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def normalise(text: str) -> str:
    """Lower case, single spaces, no white space around, no full stop (`.`, `。`) at the end."""
    return " ".join(text.casefold().split()).rstrip(".。").rstrip()


def make_report(questions: list[dict], conditions: Sequence[str]) -> dict:
    """Accuracies of answered questions, over all and by group, and the gaps between conditions."""
    right = {c: np.array([normalise(q[c]) == normalise(q["answer"]) for q in questions]) for c in conditions}
    everything = np.arange(len(questions))
    overall = cell(questions, right, everything)
    report = {"accuracy": {c: overall[c] for c in conditions}, "n": overall["n"], "majority": overall["majority"]}
    if "real" in conditions:
        report["real_interval"] = overall["real_interval"]
        report["looks"] = gaps(questions, right)
    for name, members in groupings(questions).items():
        report[f"by_{name}"] = {key: cell(questions, right, np.array(rows)) for key, rows in sorted(members.items())}
    return report


def groupings(questions: list[dict]) -> dict[str, dict[str, list[int]]]:
    """Name of a grouping -> group -> rows: one grouping per meta key, and `type` crossed with each other key."""
    keys = sorted({key for q in questions for key in q["meta"]})
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, q in enumerate(questions):
        for key, value in q["meta"].items():
            found[key][str(value)].append(row)
            if "type" in q["meta"] and key != "type":
                found[f"type_{key}"][f"{q['meta']['type']}/{value}"].append(row)
    identifiers = {key for key in keys if len(found[key]) > MOST_GROUPS}
    return {name: groups for name, groups in found.items() if name.removeprefix("type_") not in identifiers}


def cell(questions: list[dict], right: dict[str, np.ndarray], rows: np.ndarray) -> dict:
    """Figures of one group."""
    answers = Counter(normalise(questions[row]["answer"]) for row in rows)
    figures = {condition: float(correct[rows].mean()) for condition, correct in right.items()}
    if "real" in right:
        figures["real_interval"] = wilson(int(right["real"][rows].sum()), len(rows))
    return {**figures, "majority": answers.most_common(1)[0][1] / len(rows), "n": len(rows)}


def wilson(successes: int, n: int, z: float = 1.96) -> list[float]:
    """Wilson score interval of a share (E. B. Wilson, 1927)."""
    p = successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max((centre - half) / (1 + z * z / n), 0.0), min((centre + half) / (1 + z * z / n), 1.0)]


def gaps(questions: list[dict], right: dict[str, np.ndarray], draws: int = 1000) -> dict:
    """Accuracy lost without the images. Questions about one image aren't independent: whole images are resampled."""
    cluster = {media: i for i, media in enumerate(dict.fromkeys(str(q["media"]) for q in questions))}
    index = np.array([cluster[str(q["media"])] for q in questions])
    counts, found = np.bincount(index), {}
    for other in CONDITIONS[1:]:
        if other in right:
            difference = right["real"].astype(float) - right[other]
            sums, random_state = np.bincount(index, difference), np.random.default_rng(0)
            resampled = (random_state.integers(len(counts), size=len(counts)) for _ in range(draws))
            means = [sums[rows].sum() / counts[rows].sum() for rows in resampled]
            found[f"real_minus_{other}"] = float(difference.mean())
            found[f"real_minus_{other}_interval"] = np.percentile(means, [2.5, 97.5]).tolist()
    return found


def format_report(report: dict) -> str:
    """The report as a table: all, by type, and by type and language where records have them."""
    conditions = list(report["accuracy"])
    lines = [f"{'':24}" + "".join(f"{c:>10}" for c in [*conditions, "majority", "n"])]
    rows = {"all": {**report["accuracy"], **report}}
    for grouping in ("by_type", "by_language", "by_type_language", "by_num_objects", "by_split"):
        rows.update({f"{grouping[3:]} {key}": figures for key, figures in report.get(grouping, {}).items()})
    for name, figures in rows.items():
        shares = "".join(f"{100 * figures[c]:>9.1f}%" for c in [*conditions, "majority"])
        lines.append(f"{name:24}{shares}{figures['n']:>10}")
    for name, gap in report.get("looks", {}).items():
        if not name.endswith("_interval"):
            low, high = report["looks"][f"{name}_interval"]
            lines.append(f"{name.replace('_', ' ')}: {100 * gap:.1f} points [{100 * low:.1f}, {100 * high:.1f}]")
    lines.append("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items()))
    return "\n".join(lines)


def write_predictions(questions: list[dict], conditions: Sequence[str], path: str | Path) -> None:
    keys = ("id", "images", "videos", "meta", "answer", *conditions)
    lines = []
    for q in questions:
        paths = {f"{kind}s": [path for of, path in q["media"] if of == kind] for kind in ("image", "video")}
        lines.append(json.dumps({key: (q | paths)[key] for key in keys}, ensure_ascii=False))
    write_text("\n".join(lines) + "\n", path)


def write_text(text: str, path: str | Path) -> None:
    """Writes aside, then renames."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, help="records: a Parquet, JSON, JSONL or CSV file, or a folder")
    parser.add_argument("--image_root", default=".", help="folder that image paths are relative to")
    parser.add_argument("--limit", type=int, help="only the first records")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, help="default: all that fit the data")
    parser.add_argument("--seed", type=int, default=0, help="of the images that replace each other")
    parser.add_argument("--output", help="JSON file for the report")
    parser.add_argument("--predictions", help="JSONL file for all answers")
    arguments = parser.parse_args()
    model, system = load_model(arguments)
    report = evaluate(
        model,
        read_records(arguments.data)[: arguments.limit],
        arguments.image_root,
        system=system,
        conditions=arguments.conditions,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        predictions_file=arguments.predictions,
    )
    print(format_report(report))
    if arguments.output:
        write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", arguments.output)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # files and settings of the user: the message says what to mend
        sys.exit(f"evaluate.py: {error}")
