"""Maps in colours: each pixel has that of the cell it lies in, and the picture under it is grey."""

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from looking.draw import OPACITY, UNSEEN, colours, figure, overlay, save
from looking.geometry import Box

VALUES = np.array([[0.0, 1.0, -1.0], [0.5, 0.0, -0.5]], dtype=np.float32)


def expected(value: float, signed: bool, limit: float, grey: float) -> np.ndarray:
    share = 0.1 + 0.8 * (value / limit + 1) / 2 if signed else value / limit
    colour = np.array(colormaps["PuOr_r" if signed else "cividis"](share)[:3]) * 255
    return OPACITY * colour + (1 - OPACITY) * grey


def test_every_pixel_has_the_colour_of_its_cell():
    """The map lies on pixels 2 to 8 of 10 and begins above the picture; the rest is not seen."""
    picture = Image.new("RGB", (10, 6), (100, 100, 100))
    drawn = np.asarray(overlay(picture, VALUES, Box(2, -2, 8, 6), True, 1.0)).astype(float)
    assert drawn.shape == (6, 10, 3)
    for y in range(6):
        for x in range(10):
            row, column = int((y + 0.5 + 2) // 4), int((x + 0.5 - 2) // 2)
            inside = 0 <= column < 3
            colour = expected(VALUES[row, column], True, 1.0, 100) if inside else np.full(3, 100 * UNSEEN)
            assert drawn[y, x] == pytest.approx(colour, abs=2.0), (y, x)


def test_scales():
    """A signed map is white at 0 whatever its values are; one of shares is dark there, and ends at its limit."""
    scale, norm = colours(True, 4.0)
    assert norm(0.0) == 0.5 and norm(4.0) == 1 and np.ptp(scale(0.5)[:3]) < 0.02
    orange, violet = scale(1.0), scale(0.0)
    assert orange[0] > orange[2] + 0.4 and violet[2] > violet[1] + 0.2
    scale, norm = colours(False, 0.2)
    assert norm(0.0) == 0 and norm(0.2) == 1
    weights = (0.2126, 0.7152, 0.0722)  # of red, green and blue in what the eye sees as brightness
    brightness = [float(np.dot(scale(share)[:3], weights)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert brightness == sorted(brightness)
    assert colours(False, 0.0)[1].vmax > 0  # a map of zeros


def test_figure_shows_each_picture_beside_its_map_and_a_colour_bar(tmp_path):
    picture = Image.new("RGB", (20, 10), (10, 200, 30))
    over = overlay(picture, VALUES, Box(0, 0, 20, 10), True, 2.0)
    drawn = figure([("a $1.png", picture, over), ("b.png", over, picture)], True, 2.0, "fall", "Where? 红色")
    shown = [np.asarray(axis.get_images()[0].get_array()) for axis in drawn.axes[:4]]
    assert np.array_equal(shown[0], np.asarray(picture)) and np.array_equal(shown[1], np.asarray(over))
    bar = drawn.axes[4]
    assert bar.get_ylabel() == "fall" and bar.get_ylim() == (-2.0, 2.0)
    file = tmp_path / "new" / "map.png"
    save(drawn, file)
    with Image.open(file) as image:
        assert image.width > 400
    assert list(file.parent.iterdir()) == [file]
