"""Pictures and clips handed to `MultiModalModel.generate` beside prompts that are already token ids."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from visual.media import Views

if TYPE_CHECKING:
    from model.model import MultiModalModel

# Of an image: a path, a PIL image, preprocessed pixels `[3, H, W]` or `[N, 3, H, W]` (N images); of a clip: a path. One
# or a list of them; for several prompts a list with one entry for each: one of these, a list of them, or None.
MediaInput = Any


def expand_prompts(
    model: "MultiModalModel",
    input_ids: Tensor | Sequence[Sequence[int]],
    attention_mask: Tensor | None,
    image: MediaInput,
    video: MediaInput,
) -> tuple[list[list[int]], Views]:
    """Prompts with a placeholder per feature, and the views of all pictures and clips in the order of their features.

    A prompt has one placeholder token (`model.placeholder_id`) for each picture and, after those, each clip; or none,
    and they stand at its beginning.

    Raises:
        ValueError: another number of placeholders, or of entries for several prompts; a file that can't be read.
        FileNotFoundError: a file is missing.
    """
    rows = _rows(input_ids, attention_mask)
    expanded, views = [], []
    for row, images, clips in zip(
        rows, _per_row(image, len(rows), "image"), _per_row(video, len(rows), "video"), strict=True
    ):
        media = [_image_views(model, one) for one in images] + [_clip_views(model, clip) for clip in clips]
        expanded.append(_expand(model, row, [sum(one.features) for one in media], len(expanded)))
        views += media
    if not views:
        raise ValueError("image and video are given but hold nothing")
    return expanded, Views(torch.cat([one.pixel_values for one in views]), [n for one in views for n in one.features])


def _rows(input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None) -> list[list[int]]:
    """Prompts without padding."""
    if not isinstance(input_ids, Tensor):
        return [list(row) for row in input_ids]
    if attention_mask is None:
        return input_ids.tolist()
    return [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]


def _per_row(media: MediaInput, rows: int, name: str) -> list[list]:
    if media is None:
        return [[] for _ in range(rows)]
    if isinstance(media, str | os.PathLike | Image.Image) or isinstance(media, Tensor) and media.ndim == 3:
        media = [media]
    if rows == 1 and list(media) == [None]:
        return [[]]
    if rows == 1:
        nested = len(media) == 1 and isinstance(media[0], list | tuple)
        return [list(media[0] if nested else media)]
    if len(media) != rows:
        raise ValueError(f"{name} has {len(media)} entries for {rows} prompts; give one, a list, or None for each")
    return [[] if one is None else list(one) if isinstance(one, list | tuple) else [one] for one in media]


def _image_views(model: "MultiModalModel", image: str | os.PathLike | Image.Image | Tensor) -> Views:
    if isinstance(image, Tensor):
        return Views(image.unsqueeze(0).float(), [model.media.num_features])
    if not isinstance(image, str | os.PathLike | Image.Image):
        raise ValueError(f"an image is a path, a PIL image or a tensor of pixels, got a {type(image).__name__}")
    return model.media.load_image(image)


def _clip_views(model: "MultiModalModel", clip: str | os.PathLike) -> Views:
    if not isinstance(clip, str | os.PathLike):
        raise ValueError(f"a video is the path of a file, got a {type(clip).__name__}")
    return model.media.load_video(clip)


def _expand(model: "MultiModalModel", row: list[int], counts: list[int], number: int) -> list[int]:
    places = [index for index, token in enumerate(row) if token == model.placeholder_id]
    if not places:
        begin = list(model.tokenizer.begin_ids) if model.tokenizer else []
        start = len(begin) if begin and row[: len(begin)] == begin else 0
        return row[:start] + [model.placeholder_id] * sum(counts) + row[start:]
    if len(places) != len(counts):
        raise ValueError(
            f"prompt {number} has {len(places)} placeholders (id {model.placeholder_id}) for {len(counts)} images and "
            "videos; write one for each, or none"
        )
    size = dict(zip(places, counts, strict=True))
    return [token for index, token in enumerate(row) for _ in range(size.get(index, 1))]
