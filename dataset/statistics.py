"""How long the samples of a data set are, what is learned of them, and what padding costs.

Every record is encoded as training would encode it, on all cores, and no weights are needed. Records that training
would refuse are collected instead of stopping at the first.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset.dataset import BadMedium, Medium, RecordDataset
from dataset.mixture import Mixture
from dataset.record import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, RecordError, Records
from dataset.sampler import STRATEGIES, GlobalBatchSampler
from dataset.template import IGNORE_INDEX, TEMPLATES
from visual.image import image_size
from visual.video import count_frames

BLOCK = 1000  # records that a process measures before it reports
FEW = 2000  # so many are measured sooner than processes start


class Size(NamedTuple):
    """Of a sample. The unit is a token, placeholders included, or without a tokenizer a character."""

    length: int  # before it is cut
    kept: int  # of it, after it is cut at `max_length`
    supervised: int  # of `length`
    supervised_kept: int  # of `kept`
    features: int  # of `kept`: placeholders
    images: int
    videos: int
    control: int  # 1 if a text holds what looks like a control token; it is encoded as plain text


class Fault(NamedTuple):
    """A record of which there is no sample."""

    index: int
    id: str
    source: str
    reason: str  # in few words, for counting
    problem: str
    refused: bool  # by training; else it is skipped, as `on_bad_image` and `on_bad_record` say


@dataclass
class Sizes:
    """Of the records that have samples: `values` [N, fields of Size], `indices` [N], `codes` [N] into `sources`."""

    unit: str  # "token" or "character"
    sources: list[str]
    indices: np.ndarray
    codes: np.ndarray
    values: np.ndarray
    faults: list[Fault]

    def column(self, name: str) -> np.ndarray:
        """[N]"""
        return self.values[:, Size._fields.index(name)]


def measure(
    data: RecordDataset | Records,
    indices: Sequence[int] | None = None,
    workers: int | None = None,
    decode: bool = False,
) -> Sizes:
    """Sizes of the samples of a `RecordDataset`, or in characters those of bare records.

    For a `RecordDataset` the headers of all pictures and clips that a sample holds are read, so that missing ones and
    files that are something else are found.

    Args:
        indices: of the records to measure; None for all.
        workers: processes; None for one per core.
        decode: pictures and clips are decoded and preprocessed, too, as training does it, which finds damaged ones.

    Raises:
        OSError, ValueError: what is no fault of a record, such as settings of the encoder that are missing.
    """
    records = data if isinstance(data, Records) else data.records
    size_of = partial(characters, data) if isinstance(data, Records) else partial(sample_size, data, decode=decode)
    sources, codes = records.sources()
    indices = np.arange(len(records)) if indices is None else np.asarray(indices, dtype=np.int64)
    workers = _cores() if workers is None else workers
    workers = 0 if workers < 2 or len(indices) < FEW and not decode else workers
    block = min(BLOCK, -(-len(indices) // (8 * workers)) if workers else BLOCK) or 1
    blocks = _Blocks(size_of, records, sources, codes, indices, block)
    # Samplers and seeds of a loader would be drawn from the global generator; here there is nothing random.
    loader = DataLoader(blocks, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    values, measured, faults = [np.empty((0, len(Size._fields)), np.int64)], [], []
    with tqdm(total=len(indices), desc="Measuring records", unit=" records", disable=None, leave=False) as progress:
        for own, own_values, own_faults in loader:
            measured += own
            values.append(own_values)
            faults += own_faults
            progress.update(len(own) + len(own_faults))
    measured = np.asarray(measured, dtype=np.int64)
    unit = "character" if isinstance(data, Records) else "token"
    return Sizes(unit, sources, measured, codes[measured], np.concatenate(values), faults)


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _as_it_is(block):
    return block


class _Blocks(Dataset):
    """Item n: (indices, values, faults) of the n-th `block` of `indices`."""

    def __init__(
        self,
        size_of: Callable[[int], Size],
        records: Sequence[dict],
        sources: list[str],
        codes: np.ndarray,
        indices: np.ndarray,
        block: int,
    ):
        self.size_of, self.records, self.sources, self.codes = size_of, records, sources, codes
        self.indices, self.block = indices, block

    def __len__(self) -> int:
        return -(-len(self.indices) // self.block)

    def __getitem__(self, number: int) -> tuple[list[int], np.ndarray, list[Fault]]:
        measured, values, faults = [], [], []
        for index in self.indices[number * self.block : (number + 1) * self.block].tolist():
            try:
                values.append(self.size_of(index))
                measured.append(index)
            except RecordError as error:
                refused = getattr(self.size_of.args[0], "on_bad_record", "error") == "error"
                faults.append(self._fault(index, error.reason, str(error), refused))
            except BadMedium as error:
                cause = error.__cause__
                reason = "missing file" if isinstance(cause, FileNotFoundError) else "unreadable file"
                problem = f"record {self.records[index]['id']!r}: {cause}"
                faults.append(self._fault(index, reason, problem, self.size_of.args[0].on_bad_image == "error"))
        return measured, np.array(values, np.int64).reshape(len(values), len(Size._fields)), faults

    def _fault(self, index: int, reason: str, problem: str, refused: bool) -> Fault:
        name = raw_record(self.records, index)["id"]
        return Fault(index, str(name), self.sources[self.codes[index]], reason or "other", problem, refused)


def raw_record(records: Records, index: int) -> dict:
    """A record as it stands in its file: not validated, `meta` as text."""
    return records[index : index + 1].table.to_pylist()[0]


def sample_size(dataset: RecordDataset, index: int, decode: bool = False) -> Size:
    """Of `dataset[index]`. Raises RecordError and BadMedium where that would."""
    record = dataset.records[index]
    media = dataset.open_media(record)
    whole = dataset.encode(record, media)
    kept = dataset.cut(record, whole)
    features = kept["input_ids"].count(dataset.tokenizer.placeholder_id)
    if decode:
        dataset.views(media, kept["input_ids"])
    else:
        check_headers(media, features)
    supervised = [len(labels) - labels.count(IGNORE_INDEX) for labels in (whole["labels"], kept["labels"])]
    texts = [turn["content"] for turn in record["messages"]]
    control = any(token in text for token in control_texts(dataset.tokenizer) for text in texts)
    lengths = len(whole["input_ids"]), len(kept["input_ids"])
    return Size(*lengths, *supervised, features, len(record["images"]), len(record["videos"]), int(control))


def check_headers(media: Sequence[Medium], features: int) -> None:
    """Reads the headers of the first media, which together have so many features; raises BadMedium."""
    for medium in media:
        if features <= 0:
            break
        features -= sum(medium.features)
        try:
            image_size(medium.path) if medium.kind == "image" else count_frames(medium.path, frames=1, fps=1.0)
        except (OSError, ValueError) as error:
            raise BadMedium from error


def control_texts(tokenizer) -> list[str]:
    """What of a text would be a control token of the template if it were not encoded as plain text."""
    texts = [*TEMPLATES[tokenizer.template].control, tokenizer.eos_token]
    return [text for text in texts if text not in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)]


def characters(records: Records, index: int) -> Size:
    """Of a record's text without placeholders; what a model would learn counts as supervised."""
    record = records[index]
    lengths = {"user": 0, "assistant": 0, "system": 0, "text": 0}
    for turn in record["messages"]:
        text = turn["content"].replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "")
        lengths[turn["role"]] += len(text)
    length, supervised = sum(lengths.values()), lengths["assistant"] + lengths["text"]
    if not supervised:
        raise RecordError.of(record["id"], "no supervised token", "no assistant turn, so nothing can be learned")
    return Size(length, length, supervised, supervised, 0, len(record["images"]), len(record["videos"]), 0)


# Figures


def summary(sizes: Sizes, source: str | None = None) -> dict:
    """Figures of a source, or of all; JSON-able. Lengths are those before samples are cut, tokens those after.

    A share is None where its whole is 0.
    """
    own = slice(None) if source is None else sizes.codes == sizes.sources.index(source)
    faults = [fault for fault in sizes.faults if source in (None, fault.source)]
    values = dict(zip(Size._fields, sizes.values[own].T, strict=True))
    length, kept, cut = values["length"], values["kept"], values["kept"] < values["length"]
    total = {name: int(column.sum()) for name, column in values.items()}
    return {
        "records": len(length) + len(faults),
        "samples": len(length),
        "images": total["images"],
        "videos": total["videos"],
        "length": _distribution(length),
        "units": total["kept"],
        "supervised": total["supervised_kept"],
        "supervised_share": _share(total["supervised_kept"], total["kept"]),
        "features_share": _share(total["features"], total["kept"]),
        "cut": int(cut.sum()),
        "cut_share": _share(int(cut.sum()), len(kept)),
        "supervised_lost": total["supervised"] - total["supervised_kept"],
        "supervised_lost_share": _share(total["supervised"] - total["supervised_kept"], total["supervised"]),
        "control_texts": total["control"],
        "refused": _reasons([fault for fault in faults if fault.refused]),
        "skipped": _reasons([fault for fault in faults if not fault.refused]),
    }


def _distribution(lengths: np.ndarray) -> dict[str, float | int]:
    if not len(lengths):
        return {}
    p95, p99 = map(int, np.quantile(lengths, (0.95, 0.99), method="higher"))
    middle = {"mean": float(lengths.mean()), "median": float(np.median(lengths)), "p95": p95, "p99": p99}
    return {"min": int(lengths.min()), **middle, "max": int(lengths.max())}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _reasons(faults: Sequence[Fault]) -> dict[str, dict]:
    """Reason -> number and first example; the most frequent first."""
    found: dict[str, dict] = {}
    for fault in faults:
        entry = found.setdefault(fault.reason, {"count": 0, "example": fault.problem})
        entry["count"] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1]["count"]))


def padding(
    lengths: Sequence[int],
    batch_size: int,
    accumulation: int,
    strategy: str,
    seed: int,
    mixture: Mixture | None = None,
    has_media: np.ndarray | None = None,
    packing: bool = False,
) -> dict:
    """What the batches of the first epoch of one process hold beside tokens.

    Args:
        lengths: of the samples, as cut; not empty.
        mixture, has_media: see `GlobalBatchSampler`, which makes the batches and raises ValueError for what it refuses.

    Returns:
        `strategies`: of each strategy of the sampler `{"positions", "padding_share"}`, positions being what batches
        hold when each is padded to its longest sample, and the same of "packing", which leaves none in any order;
        `current`: the one in use; `tokens`: what all of them hold.
    """
    lengths = [int(length) for length in lengths]
    strategies, drawn = {}, {}
    for name in STRATEGIES:
        options = {"mixture": mixture, "has_media": has_media if name == "group_by_length" else None}
        if name == "sequential" != strategy and mixture is not None:
            continue  # the sampler refuses it
        sampler = GlobalBatchSampler(
            lengths, batch_size, accumulation=accumulation, strategy=name, seed=seed, **options
        )
        batches = [[lengths[index] for index in batch] for batch in sampler]
        drawn[name] = [length for batch in batches for length in batch]
        strategies[name] = _cost(sum(len(batch) * max(batch) for batch in batches), sum(drawn[name]))
    tokens = sum(drawn[strategy])
    strategies["packing"] = _cost(tokens, tokens)
    return {"tokens": tokens, "current": "packing" if packing else strategy, "strategies": strategies}


def _cost(positions: int, tokens: int) -> dict:
    return {"positions": positions, "padding_share": 1 - tokens / positions}
