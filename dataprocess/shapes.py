"""What the drawn data sets have in common: coloured shapes, how they are painted, and how a data set is written."""

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

IMAGE_SIZE = 96  # pixels a side
COLOURS = {
    "red": (215, 40, 40), "green": (40, 160, 60), "blue": (45, 85, 215),
    "yellow": (240, 205, 40), "purple": (140, 50, 170), "orange": (245, 130, 25),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross")
CHUNK = 100  # pictures or clips that a process draws at a time


def background(rng: random.Random) -> Image.Image:
    """Light grey, `IMAGE_SIZE` pixels a side."""
    grey = rng.randint(225, 255)
    return Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (grey, grey, grey))


def shade(colour: str, rng: random.Random) -> tuple[int, int, int]:
    """A colour of `COLOURS`, a little off."""
    return tuple(min(255, max(0, channel + rng.randint(-14, 14))) for channel in COLOURS[colour])


@cache
def stencil(shape: str) -> Image.Image:
    """Where a shape of `SHAPES` is: mode "L", 128 pixels a side."""
    side = 128
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if shape == "circle":
        pen.ellipse((4, 4, side - 4, side - 4), fill=255)
    elif shape == "square":
        pen.rectangle((12, 12, side - 12, side - 12), fill=255)
    elif shape == "triangle":
        pen.polygon([(side / 2, 4), (side - 4, side - 10), (4, side - 10)], fill=255)
    elif shape == "cross":
        pen.rectangle((side * 0.36, 4, side * 0.64, side - 4), fill=255)
        pen.rectangle((4, side * 0.36, side - 4, side * 0.64), fill=255)
    elif shape == "star":
        angles = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 0.5, 0.2) * (side - 4)
        points = zip(side / 2 + radii * np.sin(angles), side / 2 - radii * np.cos(angles), strict=True)
        pen.polygon(list(points), fill=255)
    return mask


def draw_all(
    draw: Callable[..., list[dict]], jobs: Sequence[tuple[str, int]], unit: str, **options
) -> Iterator[tuple[str, list[dict]]]:
    """(split, records of `draw((split, index), **options)`) for each (split, index) in order, made by all cores."""
    chunks = [tuple(jobs[start : start + CHUNK]) for start in range(0, len(jobs), CHUNK)]
    with ProcessPoolExecutor() as pool, tqdm(total=len(jobs), desc="Drawing", unit=f" {unit}") as bar:
        for chunk, drawn in zip(chunks, pool.map(partial(_draw_chunk, draw, options), chunks), strict=True):
            for (split, _), records in zip(chunk, drawn, strict=True):
                yield split, records
            bar.update(len(chunk))


def _draw_chunk(draw: Callable[..., list[dict]], options: dict, jobs: tuple[tuple[str, int], ...]) -> list[list[dict]]:
    return [draw(job, **options) for job in jobs]


@contextmanager
def replaced(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write to, which takes its place when all is written."""
    staged = output.with_name(output.name + ".tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    yield staged
    shutil.rmtree(output, ignore_errors=True)
    os.replace(staged, output)


def require_own(output: Path, folder: str, what: str) -> None:
    """Raises ValueError if `output` holds anything else than a drawn data set, whose media are in `folder`."""
    if output.exists() and not ((output / "words.txt").is_file() and (output / folder).is_dir()):
        raise ValueError(f"{output} exists and holds no {what}: choose another --output or remove it")
