"""Which part of a picture the encoder sees: what is measured, against the arithmetic of the preprocessing."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import CLIPImageProcessor, SiglipImageProcessor

from looking.geometry import Box, planes, seen
from visual.media import Media
from visual.preprocess import MAX_ASPECT, Preprocess
from visual.pretrained import load_processor
from visual.tiling import best_grid, cut

SIDE = 48


@pytest.fixture(scope="module")
def crop(tmp_path_factory) -> Preprocess:
    folder = tmp_path_factory.mktemp("crop")
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return load_processor(str(folder))


@pytest.fixture(scope="module")
def squash(tmp_path_factory) -> Preprocess:
    folder = tmp_path_factory.mktemp("squash")
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return load_processor(str(folder))


def cropped(width: int, height: int) -> Box:
    """Strips trimmed to 16 : 1, the short side scaled to SIDE (the long one rounded down), the middle cut out."""
    keep = MAX_ASPECT * min(width, height)
    x0, y0 = max(0, width - keep) // 2, max(0, height - keep) // 2
    inner = width - 2 * x0, height - 2 * y0
    scaled = [int(SIDE * side / min(inner)) for side in inner]
    left, top = ((side - SIDE) // 2 for side in scaled)
    x, y = inner[0] / scaled[0], inner[1] / scaled[1]
    return Box(x0 + left * x, y0 + top * y, x0 + (left + SIDE) * x, y0 + (top + SIDE) * y)


@pytest.mark.parametrize(
    "size", [(96, 96), (640, 480), (480, 641), (333, 100), (30, 70), (7, 5), (1500, 40), (3000, 2500)]
)
def test_middle_that_is_cut_out(crop, size):
    found, expected = seen(crop, size), cropped(*size)
    encoder_pixel = (expected.right - expected.left) / SIDE
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 0.2 * encoder_pixel


@pytest.mark.parametrize("size", [(96, 96), (640, 480), (50, 300), (3, 4), (3000, 20)])
def test_squashed_picture_is_seen_as_a_whole(squash, size):
    assert seen(squash, size) == Box(0, 0, *size)


def test_padding_lies_outside_of_the_picture():
    def transform(image: Image.Image) -> torch.Tensor:
        image = ImageOps.pad(image, (SIDE, SIDE), color=(120, 130, 140))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    found = seen(Preprocess(transform, False, transform), (200, 100))
    assert found == pytest.approx(Box(0, -50, 200, 150), abs=0.5)


def test_mirrored_pictures_are_refused():
    def transform(image: Image.Image) -> torch.Tensor:
        image = ImageOps.mirror(image.resize((SIDE, SIDE)))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    with pytest.raises(ValueError, match="mirrors or turns"):
        seen(Preprocess(transform, False, transform), (60, 60))


class _Encoder:
    """What `Media` reads of one."""

    def __init__(self, preprocess):
        self.num_features, self.grid, self.image_size = 16, (4, 4), (SIDE, SIDE)
        self.preprocess_loader = partial(lambda one: one, preprocess)


@pytest.mark.parametrize("size", [(200, 90), (90, 200), (150, 140)])
def test_tiles_lie_where_they_were_cut(crop, size):
    """A bright spot of the picture is found in the tiles, and leads back to where it is."""
    media = Media(_Encoder(crop), max_tiles=4)
    grid = best_grid(size, (SIDE, SIDE), 4)
    count = 1 + grid[0] * grid[1]
    (plane,) = planes(media, (SIDE, SIDE), (4, 4), count, size)
    place = plane.place(media, size)
    spot = (size[0] * 7 // 10, size[1] // 4)
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (spot[0] - 4, spot[1] - 4, spot[0] + 4, spot[1] + 4))
    canvas = np.zeros((plane.size[1], plane.size[0]))
    for view, tile in enumerate(cut(image, grid, (SIDE, SIDE)), start=1):
        box = plane.views[view]
        canvas[int(box.top) : int(box.bottom), int(box.left) : int(box.right)] = np.asarray(tile.convert("L"))
    rows, columns = np.nonzero(canvas > 128)
    x = place.left + (columns.mean() + 0.5) * place.size[0] / plane.size[0]
    y = place.top + (rows.mean() + 0.5) * place.size[1] / plane.size[1]
    assert (x, y) == pytest.approx(spot, abs=1.0)
    # The overview shows the middle of the picture, which is the middle of the canvas.
    whole, picture = plane.views[0], seen(crop, size)
    x, y = plane.size[0] / place.size[0], plane.size[1] / place.size[1]
    assert whole == pytest.approx(
        ((picture.left - place.left) * x, (picture.top - place.top) * y,
         (picture.right - place.left) * x, (picture.bottom - place.top) * y)
    )  # fmt: skip


def test_other_numbers_of_views_are_refused(crop):
    media = Media(_Encoder(crop), max_tiles=4)
    with pytest.raises(ValueError, match="90x200 pixels has 3 x 1 tiles, but 5 views are given"):
        planes(media, (SIDE, SIDE), (4, 4), 5, (90, 200))
    frames = planes(media, (SIDE, SIDE), (4, 4), 5, None)
    assert [plane.frame for plane in frames] == [0, 1, 2, 3, 4] and all(len(plane.views) == 1 for plane in frames)
