"""Images with captions: a prompt asks for each."""

from collections.abc import Iterator
from typing import Any

from dataprocess.sources.source import Context, RowError, Source, as_list, exchanges, text, within
from dataset.json_files import json_items, json_lists
from dataset.rows import IMAGE_PLACEHOLDER, shown

QWEN_PLACEHOLDER = "<|extra_0|>"  # stands for the image in the texts of `image_map`


def captioned(image: str, captions: list, context: Context) -> list[dict]:
    """A record per caption, or the one that is drawn."""
    return [exchanges([image], (context.prompt(k), answer)) for k, answer in enumerate(context.choose(captions))]


def ai_challenger(row: dict, context: Context) -> list[dict]:
    """`caption_train_annotations_20170902.json`: `[{"url", "image_id": "<name>.jpg", "caption": [five]}]`"""
    return captioned(row["image_id"], as_list(row["caption"]), context)


def lavis(row: dict, context: Context) -> list[dict]:
    """`[{"image": "val2014/COCO_val2014_000000328757.jpg", "caption": str or [str], "image_id": "coco_328757"}]`"""
    return captioned(row["image"], as_list(row["caption"]), context)


def karpathy_rows(source: Source) -> Iterator[Any]:
    for _, image in json_lists(source.annotations, ["images"]):
        yield image


def karpathy(row: dict, context: Context) -> list[dict]:
    """`dataset_coco.json`: `{"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}`

    Data sets in one folder (Flickr) have no `filepath`.
    """
    captions = [sentence["raw"] for sentence in row["sentences"]]
    return captioned(within(row.get("filepath", ""), row["filename"], context.source), captions, context)


def minigpt4_rows(source: Source) -> Iterator[Any]:
    for _, annotation in json_lists(source.annotations, ["annotations"]):
        yield annotation


def minigpt4(row: dict, context: Context) -> list[dict]:
    """`filter_cap.json` of cc_sbu_align: `{"annotations": [{"image_id": "2", "caption": str}]}`, `image/2.jpg`"""
    name = f"{text(row['image_id'], 'image_id')}.jpg"
    return captioned(within("image", name, context.source), [row["caption"]], context)


def coco_rows(source: Source) -> Iterator[dict | RowError]:
    """`{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`: a row per image with captions.

    The names of all images and all captions are in memory at the same time: they stand in the file in any order.
    """
    names: dict[Any, Any] = {}
    captions: dict[Any, list] = {}
    for key, entry in json_lists(source.annotations, ["images", "annotations"]):
        field, value = {"images": ("id", "file_name"), "annotations": ("image_id", "caption")}[key]
        if isinstance(entry, ValueError):
            yield entry
        elif not isinstance(entry, dict) or not isinstance(entry.get(field), int | str):
            yield RowError(f"expected an entry of {key!r} with a number under {field!r}, got {shown(entry)}")
        elif key == "annotations":
            captions.setdefault(entry[field], []).append(entry.get(value))
        elif entry[field] in names:
            yield RowError(f"two of 'images' have the id {entry[field]!r}; remove one", "duplicated id")
        else:
            names[entry[field]] = entry.get(value)
    for image_id, name in names.items():
        if image_id in captions:
            yield {"file_name": name, "captions": captions.pop(image_id)}
    for image_id, texts in captions.items():
        yield RowError(
            f"{len(texts)} captions for image_id {image_id!r}, which is not among 'images'; add it there or remove them"
        )


def coco(row: dict, context: Context) -> list[dict]:
    return captioned(row["file_name"], row["captions"], context)


def image_map_rows(source: Source) -> Iterator[dict | ValueError]:
    """`{<file name>: {"image_file", "ID", "path"}}` and `{"<ID>": {"q": str, "a": str or [str]}}`: a row per ID.

    The names of all images are in memory at the same time. A folder in `images` of the source stands for every `path`.
    """
    files = {}
    for name, image in json_items(source.image_map):
        if isinstance(image, ValueError):
            raise image
        known = isinstance(image, dict) and "ID" in image and (source.images or isinstance(image.get("path"), str))
        if not known:
            raise ValueError(f"{source.image_map}: expected 'ID' and 'path' under {name!r:.80}, got {shown(image)}")
        if str(image["ID"]) in files:
            raise ValueError(f"{source.image_map}: two images have the ID {image['ID']}; give each one of its own")
        files[str(image["ID"])] = (source.images or image["path"], image.get("image_file") or name)
    for image_id, answered in json_items(source.annotations):
        if isinstance(answered, ValueError):
            yield answered
        elif image_id not in files:
            yield RowError(f"ID {image_id} is not in {source.image_map}; add it there or remove it here")
        elif not isinstance(answered, dict):
            yield RowError(f"expected an object with q and a under {image_id!r:.80}, got {shown(answered)}")
        else:
            folder, name = files[image_id]
            yield {**answered, "folder": folder, "name": name}


def image_map(row: dict, context: Context) -> list[dict]:
    question = row["q"].replace(QWEN_PLACEHOLDER, IMAGE_PLACEHOLDER)
    answers = context.choose(as_list(row["a"]))
    return [{"folder": row["folder"], **exchanges([row["name"]], (question, answer))} for answer in answers]
