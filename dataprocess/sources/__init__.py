"""Published annotation files: a function for each format, and the table that names them.

To add a format, write a function `(row, context) -> [part of a record]` in the module of its subject and a line in
FORMATS. A row is an element of the file's list, a line, or a row of a CSV or Parquet file; a part has `messages` and
perhaps `images` and `videos`, whose names are relative to `images` of the source. All else (ids, checks, errors, paths,
splits, samples) is `dataprocess.readers`'. A file of another shape needs a second function, source -> rows.
"""

from dataprocess.sources import captions, conversations, questions, texts
from dataprocess.sources.source import Format, Source

__all__ = ["FORMATS", "Format", "Source"]

CAPTIONS = {"prompts": "caption", "several": True}
IMAGE_MAP = {"images": None, "several": True, "own": ("image_map",)}

FORMATS = {
    "ai_challenger": Format(captions.ai_challenger, language="zh", **CAPTIONS),
    "coco": Format(captions.coco, captions.coco_rows, **CAPTIONS),
    "karpathy": Format(captions.karpathy, captions.karpathy_rows, splits=("train", "restval"), **CAPTIONS),
    "lavis": Format(captions.lavis, **CAPTIONS),
    "minigpt4": Format(captions.minigpt4, captions.minigpt4_rows, prompts="description"),
    "image_map": Format(captions.image_map, captions.image_map_rows, **IMAGE_MAP),
    "a_okvqa": Format(questions.a_okvqa, prompts="question", splits=("train",), several=True, own=("choices",)),
    "ocr_vqa": Format(questions.ocr_vqa, questions.ocr_vqa_rows, prompts="question", splits=("train",)),
    "llava": Format(conversations.llava),
    "sharegpt4o": Format(conversations.llava),
    "zero_nlp": Format(conversations.llava),
    "messages": Format(conversations.messages, images=None),
    "baize": Format(conversations.baize, images=False),
    "dolly": Format(texts.dolly, images=False),
    "alpaca": Format(texts.alpaca, images=False),
    "table": Format(texts.table, images=None),
}
