"""Sources -> checked records: read, check the media, divide, write.

    read     rows of the sources -> valid records -> a staging file; the paths of their media -> the journal
    check    media that the journal does not know yet are decoded
    divide   records with faulty media are dropped; train and validation are told apart
    pack     with `shard_mb`, the bytes of the media -> tar files
    write    the staging file -> train.parquet and validation.parquet

Reading and checking are done by all workers, in blocks; an image is decoded once, whatever number of records has it.
Memory holds a few blocks and, for each record and each of its media, some bytes.
"""

import json
import os
import shutil
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice, tee
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from dataprocess.check import KINDS, Finding, Medium, check_media
from dataprocess.config import Config
from dataprocess.engines import Apply, open_engine
from dataprocess.journal import Journal
from dataprocess.output import RecordFile, prefix_of, with_locations, with_relative_paths
from dataprocess.readers import source_rows
from dataprocess.report import Drops, table
from dataprocess.shards import FOLDER, Shard, ShardPlan, remove_others, shards_in, write_shard
from dataprocess.split import Links, last_rank, rank
from dataprocess.staging import Rows, Staging, read_block

TEXT_ONLY = "text:"  # before the id of a record without media, which is its key
SPLITS = ("train", "validation")
OUTPUTS = ("report.json", *(f"{split}.parquet" for split in SPLITS), "dropped.jsonl")  # in the output folder
ROWS = 500  # of a source that are read at once
FILES = 32  # that are checked at once
COMMIT = 1.0  # seconds of work that a killed process loses at most, besides what is under way

T = TypeVar("T")


class Division(NamedTuple):
    """Where each of R records goes.

    Attributes:
        kept: [R] bool.
        validation: [R] bool.
        media: column -> split -> different images, or videos, of its records.
    """

    kept: np.ndarray
    validation: np.ndarray
    media: dict[str, dict[str, int]]


def process(config: Config) -> dict:
    """Reads all sources, checks their media, divides train from validation, writes all and returns the report.

    Raises:
        ValueError: a file that is not in its format, an image or a video outside `image_root`, a source of which
            nothing can be used or, with `on_error="stop"`, a faulty record or medium. Nothing is written then but the
            journal of the media, in `.work` of the output folder.
        WorkerDied: a process was ended from outside.
    """
    work = Path(config.output, ".work")
    with ExitStack() as stack:
        apply = stack.enter_context(open_engine(config.engine, config.workers))
        work.mkdir(parents=True, exist_ok=True)
        journal = stack.enter_context(Journal(work / "journal.sqlite"))
        staging = stack.enter_context(Staging(work / "records.arrow"))
        drops = stack.enter_context(Drops(work / "dropped.jsonl", config.on_error, [s.name for s in config.sources]))
        refuse_foreign(config, journal)
        root = read(config, apply, journal, staging, drops)
        check(config, apply, journal, staging, drops)
        division = divide(config, journal, staging, drops)
        print(table(drops.tallies))
        for name, tally in drops.tallies.items():
            if tally.kept == 0:
                raise ValueError(f"source {name!r}: no record is usable{tally.first_fault()}")
        if not (division.kept & ~division.validation).any():
            raise ValueError(f"validation={config.validation} leaves no record for training")
        plan = None
        if config.shard_mb:
            plan = stack.enter_context(ShardPlan(work / "shards.sqlite"))
            plan_shards(staging, journal, division, plan)
            check_space(config, journal, plan)
            clear(config, journal)  # records of an earlier run point into shards that are about to change
        shards = pack(config, apply, journal, plan)
        return write(config, journal, staging, drops, division, root, plan, shards, work)


def refuse_foreign(config: Config, journal: Journal) -> None:
    """Raises ValueError if this run would write over what it reads, or over what no earlier run has written.

    What runs have written the journal notes by its name in the output folder, and of shards the report says it, too:
    the folder may have been moved, and its journal deleted.
    """
    folder = Path(config.output)
    report = read_report(folder / "report.json")
    for name in report.get("shards", []):
        if journal.note(name) is None:
            journal.set_note(name, "reported")
    for name in (*OUTPUTS, *(shards_in(folder) if config.shard_mb else ())):
        path = folder / name
        if not path.exists():
            continue
        for source in config.sources:
            if any(file and path.samefile(file) for file in (source.annotations, source.image_map)):
                raise ValueError(f"source {source.name!r} reads {path}, which a run replaces; set another output")
        if journal.note(name) is None and not (report and name in OUTPUTS):
            problem = f"{path} is there and was not written by process_image.py, or the journal of that run is gone"
            raise ValueError(f"{problem}; move it, or set another output")


def read_report(path: Path) -> dict:
    """The report of an earlier run; empty where there is none, or a file of somebody else."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) and {"image_root", "records", "sources"} <= report.keys() else {}


def check_space(config: Config, journal: Journal, plan: ShardPlan) -> None:
    """Raises OSError if the disk has no room for the shards."""
    folder = Path(config.output)
    known = ((folder / name).stat().st_size for name in shards_in(folder) if journal.note(name) is not None)
    needed, free = plan.size() - sum(known), shutil.disk_usage(config.output).free
    if needed > free:
        sizes = f"{needed >> 20:,} MiB, {free >> 20:,} are free"
        raise OSError(f"{config.output}: the shards need {sizes}; make room, set another output or leave out shard_mb")


def batched(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while block := list(islice(items, size)):
        yield block


def read(config: Config, apply: Apply, journal: Journal, staging: Staging, drops: Drops) -> str:
    """Valid records go to the staging file, their media to the journal; returns what paths will be relative to."""
    given = os.path.abspath(config.image_root) if config.image_root and not config.shard_mb else None
    folders = [os.path.abspath(source.images) for source in config.sources if source.images]
    for source in config.sources:
        blocks = (Rows(source, config.seed, rows) for rows in batched(source_rows(source, config.seed), ROWS))
        # How many there are is known from an earlier run alone: rows are counted by reading them.
        status = os.stat(source.annotations)
        note = repr((source, config.seed, status.st_size, status.st_mtime_ns))
        total = int(journal.note(note) or 0) or None
        progress = tqdm(total=total, desc=f"Reading {source.name}", unit=" records", disable=None)
        for read_rows in apply(read_block, blocks):
            batch = staging.append(read_rows.batch)
            for fault in read_rows.faults:
                drops.add(source.name, f"{source.name}:{fault.row}", fault.reason, fault.problem)
            for column, kind in KINDS.items():
                paths = batch[column].values.unique().to_pylist()
                if given:
                    check_root(paths, given)
                elif not source.images and paths:
                    folders = [os.path.commonpath([*folders, *map(os.path.dirname, paths)])]
                journal.want(kind, paths)
            drops.tallies[source.name].read += batch.num_rows + len(read_rows.faults)
            progress.update(batch.num_rows + len(read_rows.faults))
        progress.close()
        journal.set_note(note, str(drops.tallies[source.name].read))
        journal.commit()
    if config.shard_mb:
        return os.path.abspath(config.output)
    return given or (os.path.commonpath(folders) if folders else os.getcwd())


def check_root(paths: list[str], root: str) -> None:
    prefix = prefix_of(root)
    for path in paths:
        if not path.startswith(prefix):
            raise ValueError(f"{path} is not in image_root {root}; set image_root to a folder that holds all media")


def check(config: Config, apply: Apply, journal: Journal, staging: Staging, drops: Drops) -> None:
    """What the journal does not know yet about the media, or no longer, is found out."""
    progress = tqdm(total=journal.count(), desc="Checking media", unit=" files", disable=None)
    blocks, sent = tee(batched(journal.wanted(), FILES))
    committed = time.monotonic()
    for block, findings in zip(blocks, apply(check_media, sent), strict=True):
        journal.store(block, findings)
        if time.monotonic() - committed > COMMIT:
            journal.commit()
            committed = time.monotonic()
        progress.update(len(block))
        for medium, finding in zip(block, findings, strict=True):
            if finding.reason and config.on_error == "stop":
                source, record = first_record_with(medium, staging)
                drops.add(source, record, finding.reason, described(config, source, record, finding.problem))
    progress.close()
    journal.commit()


def first_record_with(medium: Medium, staging: Staging) -> tuple[str, str]:
    """(source, id) of the first record that has this medium."""
    column = {kind: column for column, kind in KINDS.items()}[medium.kind]
    return next(
        (batch["source"][row].as_py(), batch["id"][row].as_py())
        for batch in staging.batches()
        for row, paths in enumerate(batch[column].to_pylist())
        if medium.path in paths
    )


def described(config: Config, source: str, record: str, problem: str) -> str:
    annotations = next(each.annotations for each in config.sources if each.name == source)
    return f"{annotations}: record {record!r}: {problem}"


def findings_of(batch: pa.RecordBatch, journal: Journal) -> dict[str, dict[str, Finding]]:
    """column -> path -> what was found of that medium."""
    return {c: journal.findings(kind, batch[c].values.unique().to_pylist()) for c, kind in KINDS.items()}


def divide(config: Config, journal: Journal, staging: Staging, drops: Drops) -> Division:
    """Drops the records with faulty media, and tells train from validation by the media of the others."""
    links, kept, ranks = Links(), bytearray(), array("Q")
    media_ranks = {column: array("Q") for column in KINDS}
    progress = tqdm(total=staging.records, desc="Dividing", unit=" records", disable=None)
    for batch in staging.batches():
        source = batch["source"][0].as_py()
        found = findings_of(batch, journal)
        columns = (batch[column].to_pylist() for column in KINDS)
        for record, *lists in zip(batch["id"].to_pylist(), *columns, strict=True):
            media = [(column, found[column][path]) for column, own in zip(KINDS, lists, strict=True) for path in own]
            fault = next((finding for _, finding in media if finding.reason), None)
            kept.append(fault is None)
            if fault:
                drops.add(source, record, fault.reason, described(config, source, record, fault.problem))
                ranks.append(0)
                continue
            drops.tallies[source].kept += 1
            keys = [KINDS[column] + finding.digest for column, finding in media] or [TEXT_ONLY + record]
            numbers = [rank(key, config.seed) for key in keys]
            for (column, _), number in zip(media, numbers, strict=False):  # a text has a key, but no medium
                media_ranks[column].append(number)
            if len(set(keys)) > 1:
                links.join(keys)
            ranks.append(numbers[0])
        progress.update(batch.num_rows)
    progress.close()
    kept, groups = np.frombuffer(kept, dtype=bool), links.group_ranks(np.array(ranks, dtype=np.uint64), config.seed)
    last = last_rank(groups[kept], config.validation)
    media = {}
    for column, numbers in media_ranks.items():
        of_validation = links.group_ranks(np.unique(np.array(numbers, dtype=np.uint64)), config.seed) <= last
        media[column] = {"train": int((~of_validation).sum()), "validation": int(of_validation.sum())}
    return Division(kept, kept & (groups <= last), media)


def pack(config: Config, apply: Apply, journal: Journal, plan: ShardPlan | None) -> list[str]:
    """Images and videos go into tar files as planned; those that are there already are left as they are.

    Returns their names in the output folder.
    """
    folder = Path(config.output, FOLDER)
    names: set[str] = set()
    if plan:
        folder.mkdir(exist_ok=True)
        progress = tqdm(total=plan.size(), desc="Packing", unit="B", unit_scale=True, disable=None)
        shards, sent = tee(missing_shards(config, journal, plan, folder, names, progress))
        for shard, written in zip(shards, apply(write_shard, sent), strict=True):
            journal.set_note(shard.name, note_of(shard, *written))
            journal.commit()
            progress.update(sum(member.size for member in shard.members))
        progress.close()
    remove_others(Path(config.output), names, journal)
    return sorted(names)


def plan_shards(staging: Staging, journal: Journal, division: Division, plan: ShardPlan) -> None:
    progress = tqdm(total=staging.records, desc="Planning shards", unit=" records", disable=None)
    first = 0
    for batch in staging.batches():
        found = findings_of(batch, journal)
        for row, record in enumerate(batch.to_pylist(), start=first):
            if division.kept[row]:
                media = {c: [(kind, path, found[c][path]) for path in record[c]] for c, kind in KINDS.items()}
                plan.add(SPLITS[int(division.validation[row])], record, media)
        first += batch.num_rows
        progress.update(batch.num_rows)
    progress.close()


def missing_shards(
    config: Config, journal: Journal, plan: ShardPlan, folder: Path, names: set[str], progress: tqdm
) -> Iterator[Shard]:
    """Shards that are not there yet as they have to be. The names of all are added to `names`."""
    for split in SPLITS:
        for shard in plan.shards(folder, split, config.shard_mb * 1_000_000):
            path = Path(shard.path)
            names.add(shard.name)
            status = path.stat() if path.is_file() else None
            if status and journal.note(shard.name) == note_of(shard, status.st_size, status.st_mtime_ns):
                progress.update(sum(member.size for member in shard.members))
            else:
                journal.set_note(shard.name, "begun")  # from here on the file is known to be ours
                journal.commit()
                yield shard


def note_of(shard: Shard, size: int, modified: int) -> str:
    return f"{shard.fingerprint()} {size} {modified}"


def clear(config: Config, journal: Journal) -> None:
    """Removes what an earlier run left. `report.json` goes first and comes last: it stands beside whole sets only."""
    for name in OUTPUTS:
        journal.set_note(name, "ours")
        journal.commit()
        Path(config.output, name).unlink(missing_ok=True)


def write(
    config: Config,
    journal: Journal,
    staging: Staging,
    drops: Drops,
    division: Division,
    root: str,
    plan: ShardPlan | None,
    shards: list[str],
    work: Path,
) -> dict:
    """Writes the files of records and, when they are whole, the report."""
    folder = Path(config.output)
    weights = {source.name: source.weight for source in config.sources if source.weight is not None}
    files = {split: RecordFile(work / f"{split}.parquet", weights) for split in SPLITS}
    progress = tqdm(total=staging.records, desc="Writing", unit=" records", disable=None)
    first = 0
    for batch in staging.batches():
        rows = slice(first, first + batch.num_rows)
        kept, validation = division.kept[rows], division.validation[rows]
        for split, mask in zip(SPLITS, (kept & ~validation, validation), strict=True):
            part = batch.filter(pa.array(mask))
            files[split].append(with_locations(part, plan) if plan else with_relative_paths(part, root))
        first += batch.num_rows
        progress.update(batch.num_rows)
    progress.close()
    report = {
        "image_root": root,
        "seed": config.seed,
        "records": {split: file.records for split, file in files.items()},
        **division.media,
        "sources": {name: tally.as_dict() for name, tally in drops.tallies.items()},
        **({"shards": shards} if shards else {}),
    }
    for file in files.values():
        file.close()
    clear(config, journal)
    for split, file in files.items():
        if not file.records:
            file.path.unlink()
        else:
            file.path.replace(folder / file.path.name)
            counts = [f"{division.media[column][split]} {column}" for column in KINDS if division.media[column][split]]
            on_media = f" on {' and '.join(counts)}" if counts else ""
            print(f"{folder / file.path.name}: {file.records} records{on_media}, paths relative to {root}")
    if drops.publish(folder / "dropped.jsonl"):
        print(f"{folder / 'dropped.jsonl'}: the records that were left out, and why")
    temporary = work / "report.json"
    text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(folder / "report.json")
    return report
