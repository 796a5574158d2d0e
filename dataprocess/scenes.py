"""Drawn scenes with questions and answers: the built-in data set, made from nothing and offline.

    python -m dataprocess.scenes --output data/scenes --seed 0

A scene holds one to four objects on a 3 x 3 grid: shapes, and at most one handwritten digit (scikit-learn's bundled
copy of the UCI optical digits, 8 x 8 pixels). Size, place within the cell and shade vary from picture to picture. Every
question has one right answer, and exists in English and in Chinese.

What keeps the splits honest:

* A layout (which object stands in which cell) belongs to one split only, by its hash: no test layout occurs in
  training, in no picture and in no text.
* Handwritten digits of validation and test are other pieces of writing than those of training.
* `HELD_OUT` pairs of colour and shape never occur outside the `compositional` split, whose scenes each hold one.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from dataset.record import write_records

IMAGE_SIZE = 96  # pixels a side
CELL = IMAGE_SIZE // 3
COLOURS = {
    "red": (215, 40, 40), "green": (40, 160, 60), "blue": (45, 85, 215),
    "yellow": (240, 205, 40), "purple": (140, 50, 170), "orange": (245, 130, 25),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross")
DIGIT = "digit"
CELLS = ("northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast")
HELD_OUT = {("red", "star"), ("green", "circle"), ("blue", "triangle"), ("yellow", "cross"), ("purple", "square")}
SPLITS = ("train", "validation", "test", "compositional")
LANGUAGES = ("en", "zh")
CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "orange": "橙色",
    "circle": "圆形", "square": "方形", "triangle": "三角", "star": "星形", "cross": "十字", DIGIT: "数字",
    "northwest": "左上", "north": "上方", "northeast": "右上", "west": "左边", "center": "中间", "east": "右边",
    "southwest": "左下", "south": "下方", "southeast": "右下", "yes": "是", "no": "否",
}  # fmt: skip
TEMPLATES = {
    "en": {
        "colour_of": "What color is the {}?", "colour_at": "What color is {}?",
        "shape_of": "What shape is {}?", "shape_at": "What shape is {}?",
        "position_of": "Where is the {}?", "position_colour": "Where is {}?",
        "exists": "Is there a {} {}?", "exists_at": "Is there a {} {}?",
        "count": "How many objects?", "count_colour": "How many {} objects?",
        "digit": "What digit is there?", "caption": "Describe the picture.",
        "object": " {} {} {}", "join": ",",
    },
    "zh": {
        "colour_of": "{}是什么颜色?", "colour_at": "{}是什么颜色?",
        "shape_of": "{}是什么形状?", "shape_at": "{}是什么形状?",
        "position_of": "{}在哪里?", "position_colour": "{}在哪里?",
        "exists": "有{}{}吗?", "exists_at": "有{}{}吗?",
        "count": "有几个物体?", "count_colour": "有几个{}物体?",
        "digit": "是什么数字?", "caption": "描述图片。",
        "object": "{}{}{}", "join": ",",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One object: `cell` 0-8 in reading order, `colour`, `shape` (a name of `SHAPES`, or `DIGIT` with its `digit`)."""

    cell: int
    colour: str
    shape: str
    digit: int | None = None


Scene = tuple[Thing, ...]  # in reading order


def split_of(scene: Scene) -> str:
    """The one split that a layout belongs to: `compositional` if it holds a held-out pair, else by its hash."""
    if any((thing.colour, thing.shape) in HELD_OUT for thing in scene):
        return "compositional"
    layout = ";".join(f"{thing.cell} {thing.colour} {thing.shape}" for thing in scene)
    bucket = hashlib.sha256(layout.encode()).digest()[0] % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


def draw_scene(rng: random.Random, split: str, num_objects: int | None = None) -> Scene:
    """A random layout of `split` with one to four objects (`num_objects` fixes how many)."""
    while True:
        count = num_objects or rng.randint(1, 4)
        with_digit = rng.random() < 0.5
        things = []
        for index, cell in enumerate(rng.sample(range(9), count)):
            colour = rng.choice(tuple(COLOURS))
            if with_digit and index == 0:
                things.append(Thing(cell, colour, DIGIT, rng.randrange(10)))
            else:
                things.append(Thing(cell, colour, rng.choice(SHAPES)))
        scene = tuple(sorted(things, key=lambda thing: thing.cell))
        if split_of(scene) == split:
            return scene


# ------------------------------------------------------------------------------------------------------- pictures


@cache
def handwriting(split: str) -> dict[int, np.ndarray]:
    """Handwritten digits of a split: digit -> uint8 [K, 8, 8]. Training holds four fifths; the other splits share the rest."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * (255 / 16)).astype(np.uint8)
    held_back = np.arange(len(images)) % 5 == 4
    chosen = ~held_back if split == "train" else held_back
    return {digit: images[chosen & (bunch.target == digit)] for digit in range(10)}


@cache
def _stencil(shape: str) -> Image.Image:
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
        pen.polygon([(side / 2 + r * np.sin(a), side / 2 - r * np.cos(a)) for a, r in zip(angles, radii)], fill=255)
    return mask


def paint(scene: Scene, rng: random.Random, split: str) -> Image.Image:
    """The picture of a scene, RGB, `IMAGE_SIZE` pixels a side; `split` chooses the handwriting."""
    grey = rng.randint(225, 255)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (grey, grey, grey))
    for thing in scene:
        if thing.shape == DIGIT:
            pieces = handwriting(split)[thing.digit]
            mask = Image.fromarray(pieces[rng.randrange(len(pieces))])
            size = rng.randint(CELL - 4, CELL)
        else:
            mask = _stencil(thing.shape)
            size = rng.randint(20, CELL - 4)
        mask = mask.resize((size, size), Image.Resampling.BICUBIC if thing.shape == DIGIT else Image.Resampling.BOX)
        x = thing.cell % 3 * CELL + rng.randint(0, CELL - size)
        y = thing.cell // 3 * CELL + rng.randint(0, CELL - size)
        colour = tuple(min(255, max(0, channel + rng.randint(-14, 14))) for channel in COLOURS[thing.colour])
        image.paste(colour, (x, y), mask)
    return image


# ------------------------------------------------------------------------------------------------------ questions


def word(english: str, language: str) -> str:
    """A content word in `language`."""
    return CHINESE.get(english, english) if language == "zh" else english


def caption(scene: Scene, language: str) -> str:
    """All objects in reading order: colour, shape (or the digit), place."""
    templates = TEMPLATES[language]
    parts = [
        templates["object"].format(
            word(thing.colour, language),
            word(thing.shape, language) if thing.digit is None else str(thing.digit),
            word(CELLS[thing.cell], language),
        )
        for thing in scene
    ]
    return templates["join"].join(parts).strip()


def questions(scene: Scene, rng: random.Random, language: str) -> list[tuple[str, str, str]]:
    """Every unambiguous question about a scene, shuffled: `(type, question, answer)` in `language`."""
    shapes = [thing.shape for thing in scene]
    colours = [thing.colour for thing in scene]
    asked: list[tuple[str, str, tuple[str, ...], str]] = []
    for thing in scene:
        cell = CELLS[thing.cell]
        asked.append(("colour", "colour_at", (cell,), thing.colour))
        asked.append(("shape", "shape_at", (cell,), thing.shape))
        if shapes.count(thing.shape) == 1:
            asked.append(("colour", "colour_of", (thing.shape,), thing.colour))
            asked.append(("position", "position_of", (thing.shape,), cell))
        if colours.count(thing.colour) == 1:
            asked.append(("shape", "shape_of", (thing.colour,), thing.shape))
            asked.append(("position", "position_colour", (thing.colour,), cell))
        asked.append(("existence", "exists", (thing.colour, thing.shape), "yes"))
        if thing.digit is not None:
            asked.append(("digit", "digit", (), str(thing.digit)))
    # As many questions to be denied as affirmed, and half of them about colours and shapes that do occur, but apart.
    present = set(zip(colours, shapes))
    for index in range(len(scene)):
        mixed = index % 2 == 0 and len(scene) > 1
        pairs = [
            (colour, shape)
            for colour in (set(colours) if mixed else COLOURS)
            for shape in (set(shapes) if mixed else SHAPES)
            if (colour, shape) not in present
        ]
        if pairs:
            asked.append(("existence", "exists", rng.choice(sorted(pairs)), "no"))
    asked.append(("count", "count", (), str(len(scene))))
    for colour in sorted(rng.sample(sorted(COLOURS), 1) + rng.sample(sorted(set(colours)), 1)):
        asked.append(("count", "count_colour", (colour,), str(colours.count(colour))))
    rng.shuffle(asked)
    return [
        (kind, TEMPLATES[language][template].format(*(word(slot, language) for slot in slots)), word(answer, language))
        for kind, template, slots, answer in asked
    ]
