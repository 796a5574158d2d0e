"""What part of a picture the encoder sees, in pixels of the picture."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from visual.media import Media
from visual.preprocess import Preprocess
from visual.tiling import best_grid, fit

LEAST, MOST = 256, 2048  # pixels along the longer side of the pictures by which a preprocessing is measured
PHASES = 4  # of their shades


class Box(NamedTuple):
    """A rectangle in pixels, edges included: pixel i lies between i and i + 1. It may reach beyond the picture."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def size(self) -> tuple[float, float]:
        return self.right - self.left, self.bottom - self.top


@lru_cache(maxsize=64)
def seen(preprocess: Preprocess, size: tuple[int, int]) -> Box:
    """The part of a picture of `size` (width, height) that `preprocess` gives to the encoder.

    Smaller than the picture where its margin is cut off, larger where it is padded, the whole where it is squashed.

    It is measured on pictures whose red grows from left to right and whose green from top to bottom, so that it holds
    for whatever preprocessing was published with an encoder: to within a fifth of a pixel of the encoder. Edges that
    near to those of the picture are taken to be the same.

    Raises:
        ValueError: the preprocessing mirrors or turns pictures.
    """
    # A small picture has too few pixels to tell, a large one takes long, and others of its shape go the same way.
    factor = -(-LEAST // max(size)) if max(size) < LEAST else min(1.0, MOST / max(size))
    width, height = (max(1, round(side * factor)) for side in size)
    box = _measured(preprocess, (width, height), Box(0, 0, width, height))
    if box.size[0] < width / 4 or box.size[1] < height / 4:  # few shades fell on it: once more, with all around it
        x, y = width / 64 + box.size[0] / 4, height / 64 + box.size[1] / 4
        around = Box(box.left - x, box.top - y, box.right + x, box.bottom + y)
        box = _measured(preprocess, (width, height), around)
    left, right = (_snapped(edge, width, box.size[0]) * size[0] / width for edge in (box.left, box.right))
    top, bottom = (_snapped(edge, height, box.size[1]) * size[1] / height for edge in (box.top, box.bottom))
    return Box(left, top, right, bottom)


def _snapped(edge: float, full: int, length: float) -> float:
    return next((own for own in (0.0, float(full)) if abs(edge - own) < length / 500), edge)


def _measured(preprocess: Preprocess, size: tuple[int, int], ramp: Box) -> Box:
    """What is seen of pictures of `size`, by shades that grow from end to end of `ramp`."""
    plain = [Image.new("RGB", size, (grey,) * 3) for grey in (0, 255)]
    black, white = (preprocess([image])[0].double().numpy() for image in plain)
    contrast = (white - black)[0]
    inside = contrast > contrast.max() / 2  # what is padded has the same colour in both
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    found = []
    for phase in range(PHASES):  # shades are whole numbers; rounded at other places each time, errors average out
        shift = phase / PHASES / 255
        shares = preprocess([_ramps(size, ramp, shift)])[0].double().numpy() - black
        shares = (shares / np.maximum(white - black, 1e-6))[:, rows][:, :, columns] - shift
        across = _ends(np.median(shares[0], axis=0), columns, inside.shape[1], ramp.left, ramp.size[0])
        down = _ends(np.median(shares[1], axis=1), rows, inside.shape[0], ramp.top, ramp.size[1])
        found.append((across[0], down[0], across[1], down[1]))
    return Box(*np.mean(found, axis=0).tolist())


def _ramps(size: tuple[int, int], ramp: Box, shift: float) -> Image.Image:
    """Red from 0 to 1 along the width of `ramp` and green along its height, `shift` more everywhere."""
    width, height = size
    shades = np.zeros((height, width, 3), dtype=np.uint8)
    x = (np.arange(width) + 0.5 - ramp.left) / ramp.size[0] + shift
    y = (np.arange(height) + 0.5 - ramp.top) / ramp.size[1] + shift
    shades[..., 0] = np.round(255 * x.clip(0, 1))
    shades[..., 1] = np.round(255 * y.clip(0, 1))[:, None]
    return Image.fromarray(shades)


def _ends(shares: np.ndarray, places: np.ndarray, count: int, start: float, length: float) -> tuple[float, float]:
    """Where the first of `count` encoder pixels begins and the last ends.

    Args:
        shares: how far from `start` along `length` pixels of the picture each encoder pixel of `places` lies.
    """
    for margin in (min(0.3, max(0.06, 3 / len(shares))), 0.0):  # near its ends resampling bends the ramp
        within = (shares > margin) & (shares < 1 - margin)
        if within.any() and np.ptp(shares[within]) > 0:
            slope, offset = np.polyfit(places[within] + 0.5, start + length * shares[within], 1)
            if slope > 0:
                return float(offset), float(offset + slope * count)
            raise ValueError("this encoder's preprocessing mirrors or turns pictures: no map can be laid over them")
    middle = start + length * float(shares.mean())  # so narrow that all of it has one shade
    return middle - length / 512, middle + length / 512


class Plane(NamedTuple):
    """What a map is drawn on: a view, or the canvas of all tiles of a picture.

    Attributes:
        size: (width, height) in pixels of views.
        grid: (rows, columns) of the encoder's patches on it.
        views: index of each view that shows part of it -> that part, in pixels of the plane.
        tiles: (rows, columns) of tiles; None for a view.
        frame: number of the frame of a clip; None for a picture.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    views: dict[int, Box]
    tiles: tuple[int, int] | None = None
    frame: int | None = None

    def place(self, media: Media, size: tuple[int, int]) -> Box:
        """Where the plane lies on its picture of `size` (width, height), in pixels of the picture."""
        if self.tiles is None:
            return seen(media.preprocess, size)
        return _canvas(size, self.tiles, (self.size[1] // self.tiles[0], self.size[0] // self.tiles[1]))

    def shifted(self, start: int) -> "Plane":
        """With views counted from `start` on."""
        return self._replace(views={start + view: box for view, box in self.views.items()})


def planes(
    media: Media, image_size: tuple[int, int], grid: tuple[int, int], count: int, picture: tuple[int, int] | None
) -> list[Plane]:
    """The planes of a picture or clip: one of a picture, one per frame of a clip.

    Args:
        media: as which it was made views.
        image_size: (height, width) of a view.
        grid: (rows, columns) of the patches of a view.
        count: how many views it has.
        picture: (width, height) of a picture; None for a clip, or a picture of one view.

    Raises:
        ValueError: a picture of this size has another number of views.
    """
    height, width = image_size
    if picture is None or count == 1:
        frames = [None] if count == 1 else range(count)
        return [Plane((width, height), grid, {i: Box(0, 0, width, height)}, frame=f) for i, f in enumerate(frames)]
    rows, columns = best_grid(picture, image_size, max(1, media.spec["max_tiles"]))
    if count != 1 + rows * columns or count == 2:
        raise ValueError(
            f"a picture of {picture[0]}x{picture[1]} pixels has {rows} x {columns} tiles, but {count} views are given"
        )
    canvas, whole = _canvas(picture, (rows, columns), image_size), seen(media.preprocess, picture)
    x, y = columns * width / canvas.size[0], rows * height / canvas.size[1]
    views = {0: Box((whole.left - canvas.left) * x, (whole.top - canvas.top) * y,
                    (whole.right - canvas.left) * x, (whole.bottom - canvas.top) * y)}  # fmt: skip
    for tile in range(rows * columns):
        left, top = tile % columns * width, tile // columns * height
        views[1 + tile] = Box(left, top, left + width, top + height)
    return [Plane((columns * width, rows * height), (rows * grid[0], columns * grid[1]), views, (rows, columns))]


def _canvas(picture: tuple[int, int], tiles: tuple[int, int], tile: tuple[int, int]) -> Box:
    """Where the canvas of `visual.tiling.cut` lies on a picture of (width, height), in pixels of the picture."""
    shown = fit(picture, tiles, tile)
    full = tiles[1] * tile[1], tiles[0] * tile[0]
    place = (full[0] - shown[0]) // 2, (full[1] - shown[1]) // 2
    x, y = picture[0] / shown[0], picture[1] / shown[1]
    return Box(-place[0] * x, -place[1] * y, (full[0] - place[0]) * x, (full[1] - place[1]) * y)
