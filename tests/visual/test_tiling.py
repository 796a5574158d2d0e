"""The grid of tiles against a search in floating point, and tiles against a canvas of their own."""

import random

import numpy as np
import pytest
from PIL import Image

from visual.tiling import best_grid, cut, fit


def naive_quality(size, grid, tile):
    """(pixels shown, minus padding) as published."""
    width, height = size
    full_width, full_height = grid[1] * tile[1], grid[0] * tile[0]
    scale = min(full_width / width, full_height / height)
    shown = min(width * scale * height * scale, width * height)
    return shown, shown - full_width * full_height


def test_equals_a_search():
    numbers = random.Random(0)
    for _ in range(300):
        size = numbers.randint(20, 3000), numbers.randint(20, 3000)
        tile = numbers.choice([(224, 224), (336, 336), (32, 48)])
        most = numbers.randint(1, 12)
        found = best_grid(size, tile, most)
        assert found[0] * found[1] <= most
        grids = [(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if r * c <= most]
        best = max(naive_quality(size, grid, tile) for grid in grids)
        shown, waste = naive_quality(size, found, tile)
        # Sides are whole pixels here.
        assert shown >= best[0] - sum(fit(size, found, tile)) - sum(size)
        if shown == best[0]:
            assert waste >= best[1] - sum(fit(size, found, tile)) - sum(size)


@pytest.mark.parametrize(
    "size, most, grid",
    [
        ((1000, 1000), 4, (2, 2)),
        ((1000, 500), 4, (1, 2)),
        ((500, 1000), 4, (2, 1)),
        ((3000, 300), 6, (1, 6)),
        ((300, 3000), 6, (6, 1)),
        ((1200, 800), 6, (2, 3)),
        ((100, 100), 6, (1, 1)),  # a small one gains nothing
        ((1, 5000), 3, (3, 1)),
        ((5000, 5000), 1, (1, 1)),
    ],
)
def test_known_grids(size, most, grid):
    assert best_grid(size, (224, 224), most) == grid


def test_no_tile():
    with pytest.raises(ValueError, match="at least 1 tile"):
        best_grid((10, 10), (4, 4), 0)


@pytest.mark.parametrize("size, grid", [((100, 60), (2, 3)), ((60, 100), (1, 2)), ((1, 300), (3, 1)), ((7, 7), (2, 2))])
def test_tiles_are_parts_of_a_padded_canvas(size, grid):
    tile = (32, 48)
    values = np.random.default_rng(0).integers(1, 256, (size[1], size[0], 3), dtype=np.uint8)
    tiles = cut(Image.fromarray(values), grid, tile)
    assert len(tiles) == grid[0] * grid[1] and all(part.size == (48, 32) and part.mode == "RGB" for part in tiles)
    rows = [np.hstack([np.asarray(t) for t in tiles[r * grid[1] : (r + 1) * grid[1]]]) for r in range(grid[0])]
    canvas = np.vstack(rows)
    width, height = fit(size, grid, tile)
    assert width == canvas.shape[1] or height == canvas.shape[0]
    assert abs(width * size[1] - height * size[0]) <= max(size)  # the aspect ratio, to a pixel
    top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    inside = np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(canvas[top : top + height, left : left + width], inside)
    assert canvas.sum(dtype=int) == inside.sum(dtype=int)  # black around it
