"""Images with several captions each: COCO in its official form and in Karpathy's, AI Challenger."""

from collections.abc import Iterator
from typing import Any

from dataprocess.sources.captions import coco_rows, karpathy_rows
from dataprocess.sources.source import Source, within
from dataset.json_files import json_elements
from evaluation.benchmarks.entries import Files, field, record, texts
from evaluation.language import language_of

PARTS = ("train", "restval", "val", "test")  # of Karpathy's split


def coco_captions(files: Files) -> Iterator[dict]:
    """`captions_val2014.json` of cocodataset.org: `{"images": [{"id", "file_name"}], "annotations": [{"image_id",
    "caption"}]}`, in any order."""
    for number, row in enumerate(coco_rows(Source("coco", str(files.data)))):
        where = f"{files.data}, image {number}"
        yield _captioned(files, "coco_captions", field(row, "file_name", str, where), texts(row, "captions", where))


def karpathy(files: Files) -> Iterator[dict]:
    """`dataset_coco.json` of Karpathy's split, of which `split` is read (test by default).

    `{"images": [{"filepath": "val2014", "filename", "split": "test", "sentences": [{"raw"}]}]}`; data sets in one
    folder (Flickr) have no `filepath`. Where `image_root` is the folder `filepath` itself, names are relative to it.
    """
    wanted = files.split or "test"
    if wanted not in PARTS:
        raise ValueError(f"split must be one of {', '.join(PARTS)}, got {wanted!r:.80}")
    source = Source("karpathy", str(files.data), images=str(files.image_root) if files.image_root else None)
    found = False
    for number, row in enumerate(karpathy_rows(source)):
        where = f"{files.data}, images[{number}]"
        if field(row, "split", str, where) != wanted:
            continue
        found = True
        sentences = [field(one, "raw", str, f"{where}, sentences") for one in field(row, "sentences", list, where)]
        folder = field(row, "filepath", str, where) if "filepath" in row else ""
        name = within(folder, field(row, "filename", str, where), source)
        yield _captioned(files, "karpathy", name, texts({"sentences": sentences}, "sentences", where))
    if not found:
        raise ValueError(f"{files.data}: no image has the split {wanted!r}")


def ai_challenger(files: Files) -> Iterator[dict]:
    """`caption_validation_annotations_20170910.json` of AI Challenger 2017, with five Chinese captions an image.

    `[{"url", "image_id": "<name>.jpg", "caption": [five]}]`
    """
    for number, row in enumerate(json_elements(files.data)):
        where = f"{files.data}, entry {number}"
        yield _captioned(files, "ai_challenger", field(row, "image_id", str, where), texts(row, "caption", where))


def _captioned(files: Files, source: str, image: str, captions: list[str]) -> dict[str, Any]:
    captions = [caption.strip() for caption in captions if caption.strip()]
    language = language_of(captions[0])
    return record(
        files.name(image), source, image, "", files.suffix[language], captions[0],
        references=captions, metric="caption", language=language,
    )  # fmt: skip
