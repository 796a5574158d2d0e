"""Maps in colours, over the picture that they belong to.

Colours are told apart by people with any kind of colour vision: a map of shares goes from dark blue to yellow
("cividis"), a signed one from violet (against the answer) over white to orange (for it; "PuOr"). The picture under them
is grey, so that all colour is the map's.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps, font_manager, rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure  # without pyplot, whose state and backend belong to whoever imports this
from PIL import Image

from looking.geometry import Box

PICTURES = (".png", ".pdf", ".svg")
# With characters of all of Chinese, Japanese or Korean; the first that is installed is used.
FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Serif CJK SC", "Noto Serif CJK JP", "WenQuanYi Zen Hei",
         "WenQuanYi Micro Hei", "PingFang SC", "Microsoft YaHei", "SimHei")  # fmt: skip
SIGNED = ListedColormap(colormaps["PuOr_r"](np.linspace(0.1, 0.9, 256)))  # without its ends, nearly black and brown
OPACITY = 0.6  # of the map
UNSEEN = 0.35  # brightness of what the encoder does not see


def colours(signed: bool, limit: float) -> tuple[Colormap, Normalize]:
    """The colour scale of a map: from -limit to limit if it is signed, else from 0."""
    limit = limit or 1.0  # a map of zeros
    return (SIGNED, Normalize(-limit, limit)) if signed else (colormaps["cividis"], Normalize(0, limit))


def overlay(picture: Image.Image, values: np.ndarray, place: Box, signed: bool, limit: float) -> Image.Image:
    """A picture with a map over it, RGB and of its size.

    Args:
        values: [h, w].
        place: what part of the picture they cover, in its pixels; what lies outside of it is darkened.
        limit: end of the colour scale.
    """
    grey = np.repeat(np.asarray(picture.convert("L"), dtype=np.float64)[..., None], 3, axis=2)
    scale, norm = colours(signed, limit)
    painted = 255 * scale(norm(values))[..., :3]  # [h, w, 3]
    rows = _cells(picture.height, place.top, place.bottom, values.shape[0])
    columns = _cells(picture.width, place.left, place.right, values.shape[1])
    inside = (rows >= 0)[:, None] & (columns >= 0)[None, :]
    heat = painted[rows[:, None], columns[None, :]]
    mixed = np.where(inside[..., None], (1 - OPACITY) * grey + OPACITY * heat, UNSEEN * grey)
    return Image.fromarray(np.round(mixed).astype(np.uint8))


def _cells(pixels: int, start: float, end: float, count: int) -> np.ndarray:
    """For each pixel the number of the cell that its middle lies in, of `count` between `start` and `end`; -1: none."""
    number = np.floor((np.arange(pixels) + 0.5 - start) / (end - start) * count).astype(int)
    return np.where((number >= 0) & (number < count), number, -1)


def figure(
    panels: Sequence[tuple[str, Image.Image, Image.Image]], signed: bool, limit: float, label: str, title: str = ""
) -> Figure:
    """Pictures with their maps beside them, and the colour bar of all maps.

    Args:
        panels: (title, picture, the picture under its map) for each row.
        label: what the colours stand for.
    """
    font = [name for name in FONTS if name in {font.name for font in font_manager.fontManager.ttflist}][:1]
    with rc_context({"font.family": ["DejaVu Sans", *font]}):
        drawn = Figure(figsize=(7, 0.6 + 3 * len(panels)), layout="constrained")
        axes = drawn.subplots(len(panels), 2, squeeze=False)
        for row, (name, picture, map_) in zip(axes, panels, strict=True):
            for axis, image in zip(row, (picture, map_), strict=True):
                axis.imshow(image)
                axis.set_axis_off()
            row[0].set_title(_literal(name), fontsize=9)
        scale, norm = colours(signed, limit)
        bar = drawn.colorbar(ScalarMappable(norm, scale), ax=axes[:, 1].tolist(), fraction=0.05)
        bar.set_label(label, fontsize=8)
        if title:
            drawn.suptitle(_literal(title), fontsize=10)
    return drawn


def save(drawn: Figure, file: Path) -> None:
    """Writes a figure aside, then renames; makes the folder where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.stem}.tmp{file.suffix}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # without a font of `FONTS` there are boxes
        drawn.savefig(beside, dpi=120)
    os.replace(beside, file)


def _literal(text: str) -> str:
    return text.replace("$", r"\$")  # by which matplotlib would set mathematics
