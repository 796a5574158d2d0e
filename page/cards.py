"""Which records the preview shows, and what it shows of each."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dataset.dataset import BadMedium, Medium, RecordDataset
from dataset.record import RecordError, Records
from dataset.shards import open_medium
from dataset.statistics import Sizes, raw_record
from dataset.template import IGNORE_INDEX, MEDIA, media_of
from page.pictures import pictures_of
from page.pieces import pieces_of, views_text

FRAMES = {"frames": 8}  # of a clip where no model says how many
SHOWN_MEDIA = 24  # of a record


def choose(sizes: Sizes, count: int, seed: int) -> dict[int, list[str]]:
    """Index of each record that is shown -> labels that say why; those of a source follow each other.

    `count` records are drawn evenly from all sources, but at least one of each. Beside them stand the longest, one
    that is cut and one that is refused, where there are such.
    """
    rng = random.Random(seed)
    chosen: dict[int, list[str]] = {}
    if len(sizes.indices):
        lengths, cut = sizes.column("length"), sizes.indices[sizes.column("kept") < sizes.column("length")]
        longest = int(sizes.indices[lengths.argmax()])
        chosen[longest] = ["the longest"]
        others = [index for index in cut.tolist() if index != longest] or cut.tolist()
        if others:
            chosen.setdefault(rng.choice(others), []).append("cut")
    for label, refused in (("refused", True), ("left out", False)):
        if faulty := [fault.index for fault in sizes.faults if fault.refused == refused]:
            chosen.setdefault(rng.choice(faulty), []).append(label)
    pools = []
    for code, name in enumerate(sizes.sources):
        usable = sizes.indices[sizes.codes == code].tolist()
        pool = usable or [fault.index for fault in sizes.faults if fault.source == name]
        if pool:
            pools.append(rng.sample(pool, min(count or 1, len(pool))))
    drawn = [pool[turn] for turn in range(max(count, 1)) for pool in pools if turn < len(pool)]
    for index in drawn[: max(count, len(pools))]:
        chosen.setdefault(index, []).append("drawn")
    return chosen


def card(data: RecordDataset | Records, index: int, labels: Sequence[str], image_root: str | Path) -> dict:
    """What `page.html` shows of a record, as far as it can be read and encoded; what can't be says why."""
    records = data if isinstance(data, Records) else data.records
    shown = {"id": "", "labels": list(labels), "fault": None, "facts": [f"record {index:,}"], "media": [], "turns": [],
             "raw": None, "meta": None, "kept": [], "off": [], "off_tokens": 0}  # fmt: skip
    try:
        record = records[index]
    except RecordError as error:
        raw = raw_record(records, index)
        text = json.dumps(raw, ensure_ascii=False, indent=1)
        return {**shown, "id": str(raw["id"]), "fault": str(error), "raw": text}
    meta = json.dumps(record["meta"], ensure_ascii=False) if record["meta"] else None
    shown |= {"id": record["id"], "meta": meta, "turns": list(_turns(record, getattr(data, "system", None)))}
    media = []
    if isinstance(data, Records):
        characters = sum(len(turn["content"]) for turn in record["messages"])
        shown["facts"].append(f"{characters:,} characters")
    else:
        media = _encode(data, record, shown)
    sampling = FRAMES if isinstance(data, Records) else data.media.spec
    named = media_of(record)
    if len(named) > SHOWN_MEDIA:
        shown["facts"].append(f"the first {SHOWN_MEDIA} of {len(named)} images and clips are shown")
    for number, (kind, name) in enumerate(named[:SHOWN_MEDIA], start=1):
        # Without features: nothing is encoded, or those of one of them can't be told.
        views = [views_text(media[number - 1])] if media else []
        shown["media"].append(_medium(number, kind, image_root, name, views, sampling))
    return shown


def _encode(dataset: RecordDataset, record: dict, shown: dict) -> list[Medium]:
    """Fills in tokens, counts and faults; returns the media, or none where their features can't be told."""
    try:
        media = dataset.open_media(record)
        whole = dataset.encode(record, media)
    except (RecordError, BadMedium) as error:
        shown["fault"] = str(error.__cause__ if isinstance(error, BadMedium) else error)
        return []
    length, end = len(whole["input_ids"]), len(whole["input_ids"])
    supervised = length - whole["labels"].count(IGNORE_INDEX)
    try:
        end = len(dataset.cut(record, whole)["input_ids"])
    except RecordError as error:
        shown["fault"], end = str(error), 0
    pieces = pieces_of(whole["input_ids"], whole["labels"], media, dataset.tokenizer)
    sizes = iter([sum(medium.features) for medium in media])
    ends = np.cumsum([next(sizes) if piece.kind in ("image", "video") else 1 for piece in pieces])
    kept = int(np.searchsorted(ends, end, side="right"))
    shown |= {"kept": pieces[:kept], "off": pieces[kept:], "off_tokens": length - end}
    shown["facts"] += [f"{length:,} tokens", f"{supervised:,} supervised"]
    if end < length:
        lost = supervised - (end - whole["labels"][:end].count(IGNORE_INDEX))
        shown["facts"].append(f"cut to {end:,}, {lost:,} supervised ones lost")
    return media


def _turns(record: dict, system: str | None) -> Iterator[dict]:
    """Turns with their texts divided where images and clips stand."""
    if system and record["messages"][0]["role"] not in ("system", "text"):
        yield {"role": "system (data.system)", "learned": False, "parts": [{"kind": "text", "text": system}]}
    number = 0
    for turn in record["messages"]:
        parts = []
        for text in MEDIA.split(turn["content"]):
            if MEDIA.fullmatch(text):
                number += 1
                parts.append({"kind": "place", "text": f"{text[1:-1]} {number}"})
            elif text:
                parts.append({"kind": "text", "text": text})
        yield {"role": turn["role"], "learned": turn["role"] in ("assistant", "text"), "parts": parts}


def _medium(number: int, kind: str, root: str | Path, name: str, facts: list[str], settings: dict) -> dict:
    """A picture, or the frames of a clip, embedded; or what is wrong with it."""
    shown = {"kind": kind, "number": number, "path": name, "facts": facts, "pictures": [], "error": None}
    sampling = {key: settings[key] for key in ("frames", "fps", "max_seconds") if key in settings}
    try:
        shown["pictures"], own = pictures_of(kind, open_medium(root, name), sampling)
        facts += own
        for picture in shown["pictures"] if kind == "image" else []:
            picture["alt"] = f"image {number}"
    except (OSError, ValueError) as error:
        shown["error"] = str(error)
    return shown
