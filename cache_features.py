"""Computes the features of a frozen encoder once, so that training need not do it in every epoch.

    python cache_features.py --config configs/scenes.yaml data.feature_cache=data/features/scenes
    python train.py --config configs/scenes.yaml data.feature_cache=data/features/scenes

Encodes every image and every clip of data.train and data.validation as the training would, on a GPU if there is one;
data.num_workers processes decode them. The same command goes on after an interruption and adds what is new or was
changed. A file that can't be read ends it or, with data.on_bad_image=skip, is noted as such. Arguments are those of
train.py.
"""

import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from build import autocast_dtype, build_views
from config import Config, ConfigError, load_config
from dataset.feature_cache import FeatureCache, FileState, digest_of_ends, file_state, kind_and_name, media_ids
from dataset.feature_key import feature_key
from dataset.feature_writer import FeatureWriter, NewEntry
from dataset.record import read_records
from dataset.shards import open_medium
from visual import VisionEncoder
from visual.media import Media

BATCH = 64  # views that go through the encoder together


class Job(NamedTuple):
    """A medium to be encoded."""

    medium: str  # its `medium_id`
    state: FileState
    ends: int  # see `digest_of_ends`
    views: int  # as its header promises; 0 where that can't be read


class Loaded(NamedTuple):
    """A medium that was opened: its pixels `[V, 3, H, W]`, or what is wrong with it."""

    job: Job
    pixel_values: Tensor | None
    problem: str | None


class Filled(NamedTuple):
    """What was done."""

    cache: FeatureCache
    encoded: int  # media
    seconds: float  # which that took
    unreadable: list[str]


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # by which batch systems end a job
    try:
        print_result(fill(load_config(sys.argv[1:])))
    except (OSError, ValueError) as error:
        sys.exit(f"cache_features.py: {error}")
    except KeyboardInterrupt:
        sys.exit("cache_features.py: interrupted; what was done is kept, and the same command goes on from there")


def fill(config: Config) -> Filled:
    """Brings `data.feature_cache` up to date with the records and media files of a configuration.

    Raises:
        ConfigError: no folder is named.
        OSError: records or encoder are not there, the disk has too little space, or another process is at it.
        ValueError: the folder holds other features or other files; a medium can't be read.
    """
    c = config.data
    if not c.feature_cache:
        raise ConfigError("no folder to put features in: add data.feature_cache=FOLDER, here and for train.py")
    tables = [read_records(files).table for files in (c.train, c.validation) if files]
    wanted = pa.concat_arrays([media_ids(table) for table in tables]).unique()
    encoder, media = build_views(config.model)
    key = feature_key(encoder, media, autocast_dtype(config))
    encode = Encode(encoder, autocast_dtype(config))
    dtype = encode(torch.zeros(1, 3, *encoder.image_size)).dtype
    with FeatureWriter(c.feature_cache, key, (encoder.num_features, encoder.width), dtype) as writer:
        known = FeatureCache(c.feature_cache, key)
        jobs = find_jobs(known, wanted.to_pylist(), media, c.image_root)
        announce(jobs, len(wanted), known)
        begin = time.perf_counter()
        bad = run(MediaFiles(jobs, media, c.image_root), encode, writer, known, config)
        seconds = time.perf_counter() - begin
    return Filled(FeatureCache(c.feature_cache, key), len(jobs), seconds, bad)


def print_result(filled: Filled) -> None:
    if filled.encoded:
        rate = filled.encoded / filled.seconds
        print(f"{filled.encoded:,} encoded in {filled.seconds:,.1f} s, {rate:,.1f} per second")
    if bad := filled.unreadable:
        more = ", ..." if len(bad) > 5 else ""
        print(f"{len(bad):,} can't be read, and training leaves out their records: {', '.join(bad[:5])}{more}")
    print(f"{filled.cache.folder} is complete")


class Encode:
    """Pixels `[V, 3, H, W]` -> features `[V, n, D]`, computed as in training, on a GPU if there is one."""

    def __init__(self, encoder: VisionEncoder, autocast: str | None):
        self.device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.device = torch.device(self.device)
        self._encoder, self._dtype = encoder.to(self.device), getattr(torch, autocast or "float32")

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            return torch.cat([self._encoder(views.to(self.device)) for views in pixel_values.split(BATCH)])


class MediaFiles(Dataset):
    """index -> `Loaded`. It is picklable and has no weights."""

    def __init__(self, jobs: list[Job], media: Media, root: str):
        self.jobs, self.media, self.root = jobs, media, Path(root)

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Loaded:
        job = self.jobs[index]
        kind, name = kind_and_name(job.medium)
        try:
            pixel_values = self.media.load(kind, open_medium(self.root, name)).pixel_values
        except (OSError, ValueError) as error:
            return Loaded(job, None, str(error))
        if len(pixel_values) != job.views:
            return Loaded(job, None, f"{self.root / name} changed while it was read")
        return Loaded(job, pixel_values, None)


def find_jobs(known: FeatureCache, wanted: list[str], media: Media, root: str) -> list[Job]:
    """Media that the cache lacks, whose files were changed, or that could not be read before."""
    if any(medium.startswith("video:") for medium in wanted):
        _ = media.frame_features  # what it raises is no fault of a file
    jobs = []
    for medium in tqdm(wanted, desc="Looking at files", unit=" media", disable=None, leave=False):
        kind, name = kind_and_name(medium)
        entry, state, ends = known.lookup(medium), file_state(root, name), digest_of_ends(root, name)
        if entry is not None and (entry.state, entry.ends) == (state, ends) and entry.problem is None:
            continue
        try:
            jobs.append(Job(medium, state, ends, len(media.features(kind, open_medium(root, name)))))
        except (OSError, ValueError):  # as opening it will say
            jobs.append(Job(medium, state, ends, 0))
    return jobs


def announce(jobs: list[Job], wanted: int, known: FeatureCache) -> None:
    """Says what there is to do and what it takes on disk.

    Raises:
        OSError: there is less space.
    """
    views = sum(job.views for job in jobs)
    size, free = views * known.view_bytes, shutil.disk_usage(known.folder).free
    shape, dtype = " x ".join(map(str, known.shape)), str(known.dtype).removeprefix("torch.")
    print(f"{wanted:,} images and clips, {len(jobs):,} of them to be encoded: {views:,} views of {shape} {dtype}, "
          f"{amount(size)} in {known.folder}, where {amount(free)} are free", flush=True)  # fmt: skip
    if size > free:
        raise OSError(
            f"{known.folder} needs {amount(size)} where {amount(free)} are free; make room, or name a folder "
            "on another disk (data.feature_cache)"
        )


def amount(size: int) -> str:
    """Bytes in a unit that suits their number."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size / 1024:,.1f} KiB"


def run(files: MediaFiles, encode: Encode, writer: FeatureWriter, known: FeatureCache, config: Config) -> list[str]:
    """Encodes media and writes their features; returns those that can't be read.

    Raises:
        ValueError: one of them, with `data.on_bad_image=error`.
        OSError: no space is left.
    """
    bad = []
    every = 0.2 if sys.stderr.isatty() else 30  # seconds between two lines of a log
    progress = tqdm(total=len(files), desc="Encoding", unit=" media", mininterval=every, smoothing=0.05)
    with progress:
        for batch in batches(files, config.data.num_workers):
            entries = []
            for job, _, problem in batch:
                if problem is None:
                    entries.append(NewEntry(job.medium, job.state, job.ends, job.views))
                    continue
                if config.data.on_bad_image == "error":
                    raise ValueError(f"{problem} (data.on_bad_image=skip leaves out the records that have it)")
                bad.append(job.medium)
                entry = known.lookup(job.medium)
                if entry is None or (entry.state, entry.problem) != (job.state, problem):
                    entries.append(NewEntry(job.medium, job.state, job.ends, 0, problem))
            pixels = [loaded.pixel_values for loaded in batch if loaded.pixel_values is not None]
            if entries:
                writer.add(entries, encode(torch.cat(pixels)) if pixels else torch.zeros(0, *known.shape))
            progress.update(len(batch))
    return bad


def batches(files: MediaFiles, workers: int) -> Iterator[list[Loaded]]:
    """Media in order, so many together that they have `BATCH` views or more."""
    batch, views = [], 0
    for loaded in DataLoader(files, batch_size=None, num_workers=workers):
        batch.append(loaded)
        views += 0 if loaded.pixel_values is None else len(loaded.pixel_values)
        if views >= BATCH or len(batch) >= 1000:
            yield batch
            batch, views = [], 0
    if batch:
        yield batch


if __name__ == "__main__":
    main()
