"""Questions with pictures that the interface offers to begin with: `{"text": str, "files": [path, ...]}`."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from config import ConfigError, read_values
from dataset.record import read_records
from dataset.shards import open_medium
from dataset.template import MEDIA, media_of
from run_folder import CONFIG_FILE

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".mp4", ".webm", ".mov")
SEARCHED = 2000  # records at most


def of_run(folder: str | Path, most: int = 8) -> list[dict]:
    """From the records that a run was validated with; none where they, or its configuration, are not to be read."""
    try:
        values = read_values(Path(folder, CONFIG_FILE))
        records = read_records(values["data.validation"] or [])
        order = random.Random(0).sample(range(len(records)), min(SEARCHED, len(records)))  # they may be sorted
        return of_records(records.select(order), values["data.image_root"], most)
    except (OSError, ValueError, ConfigError):  # a checkpoint may have been moved away from its data
        return []


def of_path(path: str | Path, image_root: str | Path | None = None, most: int = 8) -> list[dict]:
    """From a file of records, or the pictures and clips of a folder, without questions.

    Raises:
        OSError, ValueError: there is no such file or folder, it holds no records, or nothing that can be shown.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        found = [{"text": "", "files": [str(file)]} for file in files[:most]]
    else:
        found = of_records(read_records(path)[:SEARCHED], image_root or path.parent, most)
    if not found:
        raise ValueError(f"--examples {path}: nothing in it shows a picture or a clip that is there")
    return found


def of_records(records: Sequence[dict], image_root: str | Path, most: int = 8) -> list[dict]:
    """First questions of records about different pictures, in turn from each language that their `meta` names."""
    languages = dict.fromkeys(str(record["meta"].get("language")) for record in records)
    sources = [_examples(records, language, image_root) for language in languages]
    found: list[dict] = []
    shown: set[str] = set()
    while sources and len(found) < most:
        source = sources.pop(0)
        example = next((example for example in source if shown.isdisjoint(example["files"])), None)
        if example is not None:
            shown.update(example["files"])
            found.append(example)
            sources.append(source)
    return found


def _examples(records: Sequence[dict], language: str, image_root: str | Path) -> Iterator[dict]:
    """Of records in one language, those whose first question shows files that are there."""
    for record in records:
        question = next((turn["content"] for turn in record["messages"] if turn["role"] == "user"), "")
        media = list(islice(media_of(record), len(MEDIA.findall(question))))
        files = [open_medium(image_root, name) for _, name in media]
        fits = str(record["meta"].get("language")) == language
        if fits and files and all(isinstance(file, Path) and file.is_file() for file in files):
            yield {"text": MEDIA.sub("", question).strip(), "files": [str(file) for file in files]}
