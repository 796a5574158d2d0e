"""Where does a model look when it gives an answer? One call for all methods, from a prompt to maps of its pictures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from looking.attention import answer_attention, rollout
from looking.draw import overlay
from looking.geometry import Box, Plane, planes
from looking.grid import feature_cells, patch_grid, spread
from looking.occlusion import ablation, occlusion
from model import MultiModalModel
from visual.media import Media, Views

METHODS = {
    "occlusion": "fall of log p(answer) where pixels are hidden",
    "features": "fall of log p(answer) where a feature vector is zero",
    "attention": "attention from the answer, mean over layers and heads",
    "rollout": "attention from the answer, followed through all layers",
}
SIGNED = ("occlusion", "features")  # a place may also speak against the answer
LEAST_LIMIT = math.log(2)  # a fall of less, to no less than half the probability, stays pale


@dataclass(frozen=True, eq=False)
class Map:
    """What one picture, or one frame of a clip, has to do with an answer.

    Attributes:
        values: [h, w] float32. Of "occlusion" and "features" the fall of the log-probability (natural logarithm) when
            the place is hidden, below zero where the answer then becomes likelier; of "attention" and "rollout" shares
            of all attention, text included, which add up to at most 1 over all maps of an answer.
        method: key of `METHODS`.
        picture: number of the picture or clip in the prompt, from 0 on.
        frame: number of the frame of a clip; None for a picture.
        limit: the end of the common colour scale of all maps of the answer: their largest absolute value, but of
            "occlusion" and "features" no less than `LEAST_LIMIT`.
        changed: [h, w] bool, of "occlusion" alone: whether the model says something else when the place is hidden.
    """

    values: np.ndarray
    method: str
    picture: int
    frame: int | None
    limit: float
    changed: np.ndarray | None
    plane: Plane = field(repr=False)
    media: Media = field(repr=False)

    @property
    def signed(self) -> bool:
        return self.method in SIGNED

    @property
    def peak(self) -> tuple[int, int]:
        """(row, column) of the largest value; of several the first."""
        row, column = np.unravel_index(int(self.values.argmax()), self.values.shape)
        return int(row), int(column)

    @property
    def share(self) -> float:
        """The part that the peak has of all that is positive; 0 where nothing is."""
        positive = self.values.clip(min=0).astype(np.float64)
        return float(positive[self.peak] / positive.sum()) if positive.any() else 0.0

    def place(self, size: tuple[int, int]) -> Box:
        """What part of its picture, of `size` (width, height), the map covers, in pixels of the picture."""
        return self.plane.place(self.media, size)

    def peak_box(self, size: tuple[int, int]) -> Box:
        """The cell of the peak in pixels of the picture."""
        box, (row, column), (rows, columns) = self.place(size), self.peak, self.values.shape
        x, y = box.size[0] / columns, box.size[1] / rows
        left, top = box.left + column * x, box.top + row * y
        return Box(left, top, left + x, top + y)

    def draw(self, picture: Image.Image) -> Image.Image:
        """The map over its picture or frame, RGB and of its size. What the encoder does not see is darkened."""
        return overlay(picture, self.values, self.place(picture.size), self.signed, self.limit)


def explain(
    model: MultiModalModel,
    prompt: list[int],
    media: Sequence[Views],
    answer_ids: list[int],
    method: str = "occlusion",
    token: int | None = None,
    *,
    sizes: Sequence[tuple[int, int] | None] | None = None,
    features: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options,
) -> list[Map]:
    """Maps of all pictures of a prompt, and of all frames of its clips, in their order.

    Args:
        model: in eval mode.
        prompt: ids up to where the answer begins, expanded to one placeholder per feature (`encode_prompt`).
        media: views of each picture and clip, in the order of the prompt.
        answer_ids: ids of the answer, with the token that ends it if that is to count.
        method: key of `METHODS`.
        token: number of the answer's token that is asked about; None: the whole answer.
        sizes: (width, height) of each picture, None for a clip; needed only for pictures that have tiles.
        features: [M, H] of the views if they are known already.
        progress: is told (steps done, steps in all); what it raises ends the computation.
        options: of `looking.occlusion.occlusion` (`window`, `stride`, `fill`, `batch_size`), of `ablation`
            (`batch_size`) or of `rollout` (`residual`).

    Raises:
        ValueError: an unknown method, a setting out of range, no picture, placeholders that don't match, or a model
            that can't do it: no attention weights, features that fill no grid.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    if not media:
        raise ValueError("the prompt shows no picture, so there is nowhere to look")
    where = _planes(model, media, sizes, method)
    counts = [count for views in media for count in views.features]
    if method == "occlusion":
        pixels = torch.cat([views.pixel_values for views in media])
        every = [plane for _, plane in where]
        found = occlusion(model, prompt, answer_ids, pixels, counts, every, token=token, progress=progress, **options)
        values, changed = [one.fall for one in found], [one.changed.numpy() for one in found]
    else:
        if features is None:
            pixels = torch.cat([views.pixel_values for views in media]).to(model.device)
            with torch.no_grad():
                features = model.encode_images(pixels, counts)
        if method == "features":
            maps = ablation(model, prompt, answer_ids, features, counts, token=token, progress=progress, **options)
            values = [_laid(plane, maps) for _, plane in where]
        else:
            if method == "rollout":
                shares = rollout(model, prompt, answer_ids, features, token, **options)
            else:
                shares = answer_attention(model, prompt, answer_ids, features, token, **options).mean((0, 1))
            maps = [spread(own, feature_cells(model, len(own))) for own in shares.cpu().split(counts)]
            values = [_laid(plane, maps) for _, plane in where]
            if progress is not None:
                progress(1, 1)
        changed = [None] * len(values)
    limit = max(float(one.abs().max()) for one in values)
    if method in SIGNED:
        limit = max(limit, LEAST_LIMIT)
    return [
        Map(one.numpy(), method, picture, plane.frame, limit, other, plane, model.media)
        for (picture, plane), one, other in zip(where, values, changed, strict=True)
    ]


def _planes(
    model: MultiModalModel, media: Sequence[Views], sizes: Sequence[tuple[int, int] | None] | None, method: str
) -> list[tuple[int, Plane]]:
    """(number of the picture or clip, plane) of all that is seen; views are numbered through all media."""
    sizes = [None] * len(media) if sizes is None else sizes
    if len(sizes) != len(media):
        raise ValueError(f"{len(sizes)} sizes are given for {len(media)} pictures and clips; None stands for a clip")
    grid = model.encoder.grid if method == "occlusion" else patch_grid(model)
    if grid is None:  # windows need no patches, but a size
        side = round(model.encoder.num_features**0.5)
        grid = (side, side)
    found, start = [], 0
    for number, (views, size) in enumerate(zip(media, sizes, strict=True)):
        own = planes(model.media, model.encoder.image_size, grid, len(views.features), size)
        found += [(number, plane.shifted(start)) for plane in own]
        start += len(views.features)
    return found


def _laid(plane: Plane, maps: Sequence[Tensor]) -> Tensor:
    """Maps `[h, w]` of all views -> `[rows, columns]` of a plane: what its views have at a place, added up.

    A patch of the overview of a picture with tiles is larger than one of a tile: its value is shared among those.
    """
    total = torch.zeros(plane.grid, dtype=torch.float64)
    for view, box in plane.views.items():
        rows = _overlap(maps[view].shape[0], box.top, box.bottom, plane.grid[0], plane.size[1])
        columns = _overlap(maps[view].shape[1], box.left, box.right, plane.grid[1], plane.size[0])
        total += rows.T @ maps[view].double() @ columns
    return total.float()


def _overlap(count: int, start: float, end: float, cells: int, length: float) -> Tensor:
    """`[count, cells]`: the share of each of `count` patches between `start` and `end` in each cell of `length`."""
    edges = torch.linspace(start, end, count + 1, dtype=torch.float64)
    bounds = torch.linspace(0, length, cells + 1, dtype=torch.float64)
    low = torch.maximum(edges[:-1, None], bounds[None, :-1])
    high = torch.minimum(edges[1:, None], bounds[None, 1:])
    return (high - low).clamp(min=0) / ((end - start) / count)
