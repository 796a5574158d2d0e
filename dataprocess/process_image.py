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
from dataprocess.images import check_images
from dataprocess.readers import read_source
from dataprocess.report import Tally, table
from dataprocess.split import validation_units
from dataset.record import RecordError, Records, to_table, write_records

TEXT_ONLY = "text:"  # begins the key of a record without images; digests of images are hexadecimal


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
    """Reads all sources, checks their images, divides train from validation, writes all and returns the report.

    Raises:
        ValueError: a file that is not in its format, an image outside `image_root`, or a source of which nothing can
            be used; nothing is written then.
    """
    tallies = {source.name: Tally() for source in config.sources}
    records = Records(to_table(readable(config, tallies)))
    checked = check_images(sorted({path for record in records for path in record["images"]}), config.workers)
    keys = [image_keys(record, checked, tallies[record["source"]]) for record in records]
    print(table(tallies))
    for name, tally in tallies.items():
        if tally.kept == 0:
            raise ValueError(f"source {name!r}: no record is usable{first_fault(tally)}")
    root = image_root(config, records)
    for path, image in checked.items():
        if image.digest:
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
        "images": {name: count_images(keys, indices) for name, indices in splits.items()},
        "sources": {name: tally.as_dict() for name, tally in tallies.items()},
    }
    write(Path(config.output), records, splits, root, report)
    return report


def readable(config: Config, tallies: dict[str, Tally]) -> Iterator[dict]:
    """Valid records of all sources, image paths absolute; faulty ones are counted."""
    for source in config.sources:
        tally = tallies[source.name]
        for record in tqdm(read_source(source, config.seed), f"Reading {source.name}", unit=" records", disable=None):
            tally.read += 1
            if isinstance(record, RecordError):
                tally.drop(record.reason, str(record))
            else:
                yield record


def image_keys(record: dict, checked: dict, tally: Tally) -> list[str] | None:
    """Digests of a record's images, or None if one of them is unusable; a record without any has a key of its own."""
    for path in record["images"]:
        if checked[path].reason:
            tally.drop(checked[path].reason, f"record {record['id']!r}: {checked[path].problem}")
            return None
    tally.kept += 1
    return [checked[path].digest for path in record["images"]] or [TEXT_ONLY + record["id"]]


def count_images(keys: list[list[str] | None], indices: list[int]) -> int:
    """Different pictures of the records at `indices`."""
    return len({key for index in indices for key in keys[index] if not key.startswith(TEXT_ONLY)})


def first_fault(tally: Tally) -> str:
    if not tally.dropped:
        return "; its file is empty"
    reason = max(tally.dropped, key=tally.dropped.get)
    return f". Most frequent: {reason} ({tally.dropped[reason]} times), as in\n  {tally.examples[reason][0]}"


def image_root(config: Config, records: Records) -> str:
    """Absolute path of the folder that image paths are written relative to."""
    if config.image_root:
        return os.path.abspath(config.image_root)
    folders = {os.path.abspath(source.images) for source in config.sources if source.images}
    loose = {source.name for source in config.sources if not source.images}
    folders |= {os.path.dirname(path) for record in records if record["source"] in loose for path in record["images"]}
    return os.path.commonpath(folders) if folders else os.getcwd()


def relative_path(path: str, root: str) -> str:
    if os.path.commonpath([path, root]) != root:
        raise ValueError(f"image {path} is not in image_root {root}; set image_root to a folder that holds all images")
    return Path(path).relative_to(root).as_posix()


def with_relative_paths(record: dict, root: str) -> dict:
    return {**record, "images": [relative_path(path, root) for path in record["images"]]}


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
            print(f"{file}: {len(indices)} records on {report['images'][name]} images, paths relative to {root}")
    temporary = folder / ".report.json.tmp"
    temporary.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, report_file)


if __name__ == "__main__":
    main()
