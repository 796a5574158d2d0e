"""Published annotation files -> records.

Each format is a function that gives the rows of a file and one that makes records of a row. A row that can't be used
is reported and left out; a file that isn't what its format says ends the run.
"""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from dataset.record import validate_record
from dataset.rows import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, RecordError, parse_json, read_json_rows, read_rows
from dataset.table import record_of_row

# AI Challenger comes with two questions of fixed wording and place of the image.
CHINESE_PROMPTS = [f"这幅图像描述了什么？{IMAGE_PLACEHOLDER}", f"{IMAGE_PLACEHOLDER}这幅图像中有什么？"]
ENGLISH_PROMPTS = [f"{IMAGE_PLACEHOLDER}\nDescribe the image in one sentence."]
QWEN_PLACEHOLDER = "<|extra_0|>"  # stands for the image in the texts of `image_map`
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass
class Source:
    """One annotation file and the folder of its images and videos."""

    format: str  # key of FORMATS
    annotations: str  # file
    images: str | None = None  # folder that names of images and videos are relative to
    name: str | None = None  # first part of the ids of its records
    captions: str = "all"  # all: a record per caption; one: a single one per image, drawn by seed
    prompts: list[str] | None = None  # questions that take turns; null: those of the format
    splits: list[str] | None = None  # parts of the file to read; null: train and restval
    image_map: str | None = None  # second file of the format image_map


class Format(NamedTuple):
    """How a kind of annotation file is read.

    rows: source -> rows of its file.
    records: (row, its number, source, seed) -> [{"messages": [...], and perhaps "images", "videos", "meta"}].
    options: keys of a source that only some formats have.
    """

    rows: Callable[[Source], Iterator[Any]]
    records: Callable[[Any, int, Source, int], list[dict]]
    options: tuple[str, ...] = ()


def read_source(source: Source, seed: int = 0) -> Iterator[dict | RecordError]:
    """Valid records of a source, and an error in place of each that is not usable.

    The id of a record is `<source name>:<row>`, with `.<number>` after it where a row makes several records. Paths of
    images and videos are absolute.

    Raises:
        ValueError: the file as a whole is not in the source's format.
    """
    form = FORMATS[source.format]
    for number, row in enumerate(source_rows(source)):
        name = f"{source.name}:{number}"
        try:
            parts = form.records(row, number, source, seed)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            problem = f"not a row of format {source.format} ({error!r}): {row!r:.200}"
            yield RecordError.of(name, "malformed row", problem)
            continue
        except RowError as error:
            yield RecordError.of(name, error.reason, str(error))
            continue
        except RecordError as error:
            yield error
            continue
        for k, part in enumerate(parts):
            record_id = name if len(parts) == 1 else f"{name}.{k}"
            try:
                record = validate_record({**part, "id": record_id, "source": source.name})
            except RecordError as error:
                yield error
                continue
            if record["audios"]:
                yield RecordError.of(record_id, "media", "it has audios; only images and videos are read")
                continue
            if all(turn["role"] not in ("assistant", "text") for turn in record["messages"]):
                yield RecordError.of(record_id, "no answer", "it has no assistant turn to learn from")
                continue
            yield {**record, **{key: absolute(record[key], source) for key in ("images", "videos")}}


def source_rows(source: Source) -> Iterator[Any]:
    """Rows of a source's file; a file of another build is an error that names it."""
    try:
        yield from FORMATS[source.format].rows(source)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source.annotations}: not a file of format {source.format} ({error!r})") from error


def absolute(paths: list[str], source: Source) -> list[str]:
    return [os.path.abspath(os.path.join(source.images or "", path)) for path in paths]


class RowError(ValueError):
    """A row can't become a record; `reason` in a few words, for counting."""

    def __init__(self, reason: str, problem: str):
        super().__init__(problem)
        self.reason = reason


# Captions


def caption_records(row: dict, number: int, source: Source, seed: int) -> list[dict]:
    """Row {"image", "captions"} -> a record per caption, or with `captions: one` a single one drawn by seed and row.

    The prompts take turns from caption to caption and from row to row.
    """
    captions = row["captions"]
    prompts = source.prompts or (CHINESE_PROMPTS if source.format == "ai_challenger" else ENGLISH_PROMPTS)
    return [
        exchange([row["image"]], prompts[(number + k) % len(prompts)], caption)
        for k, caption in enumerate(choose(captions, number, source, seed))
    ]


def choose(answers: list[str], number: int, source: Source, seed: int) -> list[str]:
    """All answers, or one, as `source.captions` says."""
    if not answers:
        raise RowError("empty answer", "no caption")
    if source.captions == "all":
        return answers
    return [random.Random(f"{seed}:{source.name}:{number}").choice(answers)]


def exchange(images: list[str], question: str, answer: str) -> dict:
    if not isinstance(answer, str):
        raise TypeError(f"an answer must be text, got {answer!r:.80}")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]
    return {"images": images, "messages": turns}


def ai_challenger_rows(source: Source) -> Iterator[dict]:
    """`[{"image_id": "<name>.jpg", "caption": [str]}]`"""
    for row in read_json_rows(source.annotations):
        yield renamed(row, "image_id", "caption")


def lavis_rows(source: Source) -> Iterator[dict]:
    """`[{"image": "val2014/<name>.jpg", "caption": str or [str]}]`"""
    for row in read_json_rows(source.annotations):
        yield renamed(row, "image", "caption")


def renamed(row: Any, image: str, captions: str) -> Any:
    """The row with keys "image" and "captions"; a row without them as it is, to be reported as malformed."""
    if not isinstance(row, dict) or image not in row or captions not in row:
        return row
    return {"image": row[image], "captions": as_list(row[captions])}


def coco_rows(source: Source) -> Iterator[dict]:
    """`{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`: a row per image with captions."""
    images, annotations = read_keys(source.annotations, "images", "annotations")
    captions: dict[Any, list[str]] = {}
    for annotation in annotations:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    for image in images:
        if image["id"] in captions:
            yield {"image": image["file_name"], "captions": captions.pop(image["id"])}
    for image_id, texts in captions.items():
        yield {"problem": f"{len(texts)} captions for image_id {image_id}, which is not among the file's images"}


def karpathy_rows(source: Source) -> Iterator[dict]:
    """`{"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}`; other splits are left out."""
    splits = source.splits or ["train", "restval"]
    for image in read_keys(source.annotations, "images")[0]:
        if image["split"] in splits:
            sentences = [sentence["raw"] for sentence in image["sentences"]]
            yield {"image": os.path.join(image.get("filepath", ""), image["filename"]), "captions": sentences}


# Conversations


def json_rows(source: Source) -> Iterator[Any]:
    return read_json_rows(source.annotations)


def llava_records(row: dict, number: int, source: Source, seed: int) -> list[dict]:
    """`{"image": str, "conversations": [{"from": "human" or "gpt", "value": str}]}`: all turns.

    `image` may be a list; beside it or in its place there may be `video`. Rows without either are conversations in
    text. Where a row has videos alone, `<image>` in its turns stands for them, as some published files have it.
    """
    turns = [{"role": SPEAKERS[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    images, videos = as_list(row.get("image")), as_list(row.get("video"))
    if videos and not images:
        for turn in turns:
            if turn["role"] == "user" and isinstance(turn["content"], str):
                turn["content"] = turn["content"].replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)
    return [{"images": images, "videos": videos, "messages": turns}]


def messages_rows(source: Source) -> Iterator[Any]:
    """Rows of a JSON, JSONL or Parquet file."""
    if Path(source.annotations).suffix != ".parquet":
        yield from read_json_rows(source.annotations)
        return
    for batch in pq.ParquetFile(source.annotations).iter_batches(batch_size=10_000):
        yield from batch.to_pylist()


def messages_records(row: dict, number: int, source: Source, seed: int) -> list[dict]:
    """`{"messages": [{"role", "content"}], "images": [str], "videos": [str]}`: as it is.

    An `id` or `source` of its own gives way.
    """
    meta = row.get("meta")
    if isinstance(meta, str):  # in Parquet, records keep it as JSON
        meta = parse_json(meta, f"{source.annotations}, row {number}, meta")
    media = {key: as_list(row.get(key)) for key in ("images", "videos")}
    return [{**row, "messages": row["messages"], **media, "meta": meta}]


# Tables


def table_rows(source: Source) -> Iterator[Any]:
    return read_rows(source.annotations)


def table_records(row: dict, number: int, source: Source, seed: int) -> list[dict]:
    """`{"text", "image", "video", "instruction", "answer"}`, all optional: see `dataset.table`."""
    if not isinstance(row, dict):
        raise TypeError("a row must be an object with keys")
    record = record_of_row(row, f"{source.name}:{number}")
    if not source.images and (record["images"] or record["videos"]):
        raise RowError("media", "it has images or videos; set `images` of the source to the folder that holds them")
    return [record]


# image_map.json and captions.json


def image_map_rows(source: Source) -> Iterator[dict]:
    """`{<file name>: {"image_file", "ID", "path"}}` and `{"<ID>": {"q": str, "a": str or [str]}}`: a row per ID.

    A folder in `source.images` stands for every `path` of the file.
    """
    files = {}
    for name, image in read_mapping(source.image_map).items():
        folder = source.images or image["path"]
        files[str(image["ID"])] = os.path.join(folder, image.get("image_file") or name)
    for image_id, answered in read_mapping(source.annotations).items():
        if image_id in files:
            yield {"image": files[image_id], "exchange": answered}
        else:
            yield {"problem": f"ID {image_id} is not in {source.image_map}"}


def image_map_records(row: dict, number: int, source: Source, seed: int) -> list[dict]:
    question = row["exchange"]["q"].replace(QWEN_PLACEHOLDER, IMAGE_PLACEHOLDER)
    answers = choose(as_list(row["exchange"]["a"]), number, source, seed)
    return [exchange([row["image"]], question, answer) for answer in answers]


# Files


def read_mapping(path: str) -> dict:
    with open(path, encoding="utf-8-sig") as file:
        content = parse_json(file.read(), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def read_keys(path: str, *keys: str) -> list[list[dict]]:
    """Lists under the given keys of a JSON object."""
    content = read_mapping(path)
    for key in keys:
        if not isinstance(content.get(key), list):
            raise ValueError(f"{path}: expected a list under {key!r}; its keys are {', '.join(map(str, content))[:80]}")
    return [content[key] for key in keys]


def as_list(value: Any) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


FORMATS = {
    "ai_challenger": Format(ai_challenger_rows, caption_records, ("captions", "prompts")),
    "llava": Format(json_rows, llava_records),
    "coco": Format(coco_rows, caption_records, ("captions", "prompts")),
    "karpathy": Format(karpathy_rows, caption_records, ("captions", "prompts", "splits")),
    "lavis": Format(lavis_rows, caption_records, ("captions", "prompts")),
    "messages": Format(messages_rows, messages_records),
    "table": Format(table_rows, table_records),
    "image_map": Format(image_map_rows, image_map_records, ("captions", "image_map")),
}
