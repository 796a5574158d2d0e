"""Published downloads -> checked records on disk.

    python -m dataprocess.process_image --config dataprocess/config.yaml
    python -m dataprocess.process_image --config dataprocess/config.yaml seed=1 sources.0.images=/data/coco
    python dataprocess/process_image.py --config dataprocess/config.yaml       the same

Run it in the repository's root folder; `dataprocess/config.py` explains the keys. It writes `train.parquet`,
`validation.parquet` and, last of all, `report.json`. The same files and the same seed give the same bytes.
"""

import os
import sys

# Started as a file it would look for packages in its own folder; started again as a module it finds those beside it.
if __name__ == "__main__" and not __package__:
    os.execv(sys.executable, [sys.executable, "-m", "dataprocess.process_image", *sys.argv[1:]])

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from dataprocess.config import Config, ConfigError, load_config
from dataprocess.images import Checked, check_images
from dataprocess.readers import read_source
from dataprocess.report import Tally, table
from dataprocess.split import validation_units
from dataprocess.videos import check_videos
from dataset.record import RecordError, Records, to_table, write_records

# Of what a record's keys are made: the digest of each image (hexadecimal), of each video, or the id of a text.
IMAGE, VIDEO, TEXT_ONLY = "", "video:", "text:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="dataprocess/config.yaml", help="YAML file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the file")
    arguments = parser.parse_args()
    try:
        process(load_config(arguments.config, arguments.overrides))
    except (ConfigError, OSError, ValueError) as error:
        sys.exit(f"process_image.py: {error}")


def process(config: Config) -> dict:
    """Reads all sources, checks their media, divides train from validation, writes all and returns the report.

    Raises:
        ValueError: a file that is not in its format, an image or a video outside `image_root`, or a source of which
            nothing can be used; nothing is written then.
    """
    tallies = {source.name: Tally() for source in config.sources}
    records = Records(to_table(readable(config, tallies)))
    images, videos = (sorted({path for record in records for path in record[key]}) for key in ("images", "videos"))
    checked = {
        IMAGE: check_images(images, config.workers) if images else {},
        VIDEO: check_videos(videos, config.workers) if videos else {},
    }
    keys = [media_keys(record, checked, tallies[record["source"]]) for record in records]
    print(table(tallies))
    for name, tally in tallies.items():
        if tally.kept == 0:
            raise ValueError(f"source {name!r}: no record is usable{first_fault(tally)}")
    root = image_root(config, records)
    for path, medium in (*checked[IMAGE].items(), *checked[VIDEO].items()):
        if medium.digest:
            relative_path(path, root)
    held_out = validation_units(filter(None, keys), config.validation, config.seed)
    splits = {
        "train": [index for index, own in enumerate(keys) if own and own[0] not in held_out],
        "validation": [index for index, own in enumerate(keys) if own and own[0] in held_out],
    }
    if not splits["train"]:
        raise ValueError(f"validation={config.validation} leaves no record for training")
    report = {
        "image_root": root,
        "seed": config.seed,
        "records": {name: len(indices) for name, indices in splits.items()},
        "images": {name: count_media(keys, indices, IMAGE) for name, indices in splits.items()},
        "videos": {name: count_media(keys, indices, VIDEO) for name, indices in splits.items()},
        "sources": {name: tally.as_dict() for name, tally in tallies.items()},
    }
    write(Path(config.output), records, splits, root, report)
    return report


def readable(config: Config, tallies: dict[str, Tally]) -> Iterator[dict]:
    """Valid records of all sources, paths absolute; faulty ones are counted."""
    for source in config.sources:
        tally = tallies[source.name]
        for record in tqdm(read_source(source, config.seed), f"Reading {source.name}", unit=" records", disable=None):
            tally.read += 1
            if isinstance(record, RecordError):
                tally.drop(record.reason, str(record))
            else:
                yield record


def media_keys(record: dict, checked: dict[str, dict[str, Checked]], tally: Tally) -> list[str] | None:
    """Keys of a record's media, or None if one of them is unusable; a record without any has a key of its own."""
    keys = []
    for kind, paths in ((IMAGE, record["images"]), (VIDEO, record["videos"])):
        for path in paths:
            medium = checked[kind][path]
            if medium.reason:
                tally.drop(medium.reason, f"record {record['id']!r}: {medium.problem}")
                return None
            keys.append(kind + medium.digest)
    tally.kept += 1
    return keys or [TEXT_ONLY + record["id"]]


def count_media(keys: list[list[str] | None], indices: list[int], kind: str) -> int:
    """Different images, or videos, of the records at `indices`."""
    return len({key for index in indices for key in keys[index] if key[: key.find(":") + 1] == kind})


def first_fault(tally: Tally) -> str:
    if not tally.dropped:
        return "; its file is empty"
    reason = max(tally.dropped, key=tally.dropped.get)
    return f". Most frequent: {reason} ({tally.dropped[reason]} times), as in\n  {tally.examples[reason][0]}"


def image_root(config: Config, records: Records) -> str:
    """Absolute path of the folder that paths of images and videos are written relative to."""
    if config.image_root:
        return os.path.abspath(config.image_root)
    folders = {os.path.abspath(source.images) for source in config.sources if source.images}
    loose = {source.name for source in config.sources if not source.images}
    folders |= {
        os.path.dirname(path)
        for record in records
        if record["source"] in loose
        for path in (*record["images"], *record["videos"])
    }
    return os.path.commonpath(folders) if folders else os.getcwd()


def relative_path(path: str, root: str) -> str:
    if os.path.commonpath([path, root]) != root:
        raise ValueError(f"{path} is not in image_root {root}; set image_root to a folder that holds all media")
    return Path(path).relative_to(root).as_posix()


def with_relative_paths(record: dict, root: str) -> dict:
    return {**record, **{key: [relative_path(path, root) for path in record[key]] for key in ("images", "videos")}}


def write(folder: Path, records: Records, splits: dict[str, list[int]], root: str, report: dict) -> None:
    """Replaces what an earlier run left. `report.json` goes first and comes last: it stands beside whole sets only."""
    folder.mkdir(parents=True, exist_ok=True)
    report_file = folder / "report.json"
    report_file.unlink(missing_ok=True)
    for name, indices in splits.items():
        file = folder / f"{name}.parquet"
        file.unlink(missing_ok=True)
        if indices:
            rows = tqdm(records.select(indices), f"Writing {name}", unit=" records", disable=None)
            write_records((with_relative_paths(record, root) for record in rows), file)
            media = " and ".join(f"{report[key][name]} {key}" for key in ("images", "videos") if report[key][name])
            print(f"{file}: {len(indices)} records{f' on {media}' if media else ''}, paths relative to {root}")
    temporary = folder / ".report.json.tmp"
    temporary.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, report_file)


if __name__ == "__main__":
    main()
