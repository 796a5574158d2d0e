"""Drawn scenes with questions and answers: the built-in data set, made from nothing and offline.

    python -m dataprocess.scenes --output data/scenes --seed 0

writes pictures and records for training and testing, text for a language model, and the words that both use:

    images/<split>/*.png                          96 x 96 pixels
    train.parquet, validation.parquet             conversations about a picture
    test.parquet, compositional.parquet           one question a record; `meta` has type, language, number of objects
    text.parquet                                  the same conversations with a description in place of the picture
    copy.parquet                                  sequences of words to repeat, by which looking up is learned
    words.txt                                     every word of the templates, one a line

A scene holds one to four objects on a 3 x 3 grid: shapes, and at most one handwritten digit (scikit-learn's bundled
copy of the UCI optical digits, 8 x 8 pixels). Size, place within the cell and shade vary from picture to picture. Every
question has one right answer, and exists in English and in Chinese.

What keeps the splits honest:

* A layout (which object stands in which cell) belongs to one split only, by its hash: no test layout occurs in
  training, neither in a picture nor in text.
* Handwritten digits of validation and test are other pieces of writing than those of training.
* `HELD_OUT` pairs of colour and shape never occur outside the `compositional` split, neither shown nor asked after.
  Every scene of that split holds one.
"""

import argparse
import hashlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataprocess.shapes import COLOURS, IMAGE_SIZE, SHAPES, background, draw_all, replaced, require_own, shade, stencil
from dataset.record import write_records

CELL = IMAGE_SIZE // 3
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
# Templates are short and fixed, and a content word is one token: the run that learns from them starts from nothing.
TEMPLATES = {
    "en": {
        "colour of": "What color is the {}?", "colour at": "What color is {}?",
        "shape of": "What shape is {}?", "position of": "Where is the {}?", "position colour": "Where is {}?",
        "existence": "Is there a {} {}?", "count": "How many objects?", "count colour": "How many {} objects?",
        "digit": "What digit is there?", "caption": "Describe the picture.", "thing": " {} {} {}",
    },
    "zh": {
        "colour of": "{}是什么颜色?", "colour at": "{}是什么颜色?",
        "shape of": "{}是什么形状?", "position of": "{}在哪里?", "position colour": "{}在哪里?",
        "existence": "有{}{}吗?", "count": "有几个物体?", "count colour": "有几个{}物体?",
        "digit": "是什么数字?", "caption": "描述图片。", "thing": "{}{}{}",
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


@dataclass(frozen=True)
class Question:
    """A question about a scene with its one right answer.

    Attributes:
        pair: the colour and shape it turns on, if it is one.
        thing: the object that it asks about, if it is exactly one.
    """

    type: str
    text: str
    answer: str
    pair: tuple[str, str] | None = None
    thing: Thing | None = None


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
    """Handwritten digits of a split: digit -> uint8 [K, 8, 8]. Training has four fifths, all other splits the rest."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * (255 / 16)).astype(np.uint8)
    held_back = np.arange(len(images)) % 5 == 4
    chosen = ~held_back if split == "train" else held_back
    return {digit: images[chosen & (bunch.target == digit)] for digit in range(10)}


def paint(scene: Scene, rng: random.Random, split: str) -> Image.Image:
    """The picture of a scene, RGB, `IMAGE_SIZE` pixels a side; `split` chooses the handwriting."""
    return paint_with_boxes(scene, rng, split)[0]


def paint_with_boxes(
    scene: Scene, rng: random.Random, split: str
) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """The picture, and (left, top, right, bottom) in pixels of the square that each object is painted in."""
    image, boxes = background(rng), []
    for thing in scene:
        if thing.shape == DIGIT:
            pieces = handwriting(split)[thing.digit]
            mask = Image.fromarray(pieces[rng.randrange(len(pieces))])
            size = rng.randint(CELL - 4, CELL)
        else:
            mask = stencil(thing.shape)
            size = rng.randint(20, CELL - 4)
        mask = mask.resize((size, size), Image.Resampling.BICUBIC if thing.shape == DIGIT else Image.Resampling.BOX)
        x = thing.cell % 3 * CELL + rng.randint(0, CELL - size)
        y = thing.cell // 3 * CELL + rng.randint(0, CELL - size)
        image.paste(shade(thing.colour, rng), (x, y), mask)
        boxes.append((x, y, x + size, y + size))
    return image, boxes


# ------------------------------------------------------------------------------------------------------ questions

def word(english: str, language: str) -> str:
    """A content word in `language`."""
    return CHINESE.get(english, english) if language == "zh" else english


def caption(scene: Scene, language: str) -> str:
    """All objects in reading order: colour, shape (or the digit itself), place."""
    things = [
        TEMPLATES[language]["thing"].format(
            word(thing.colour, language),
            word(thing.shape, language) if thing.digit is None else thing.digit,
            word(CELLS[thing.cell], language),
        )
        for thing in scene
    ]
    return ",".join(things).strip()


def questions(scene: Scene, rng: random.Random, language: str) -> list[Question]:
    """Unambiguous questions about a scene, shuffled; as many existence questions are denied as affirmed."""

    def ask(
        kind: str,
        template: str,
        slots: tuple[str, ...],
        answer: str,
        pair: tuple[str, str] | None = None,
        thing: Thing | None = None,
    ) -> None:
        text = TEMPLATES[language][template].format(*(word(slot, language) for slot in slots))
        asked.append(Question(kind, text, word(answer, language), pair, thing))

    asked: list[Question] = []
    shapes, colours = [thing.shape for thing in scene], [thing.colour for thing in scene]
    present = set(zip(colours, shapes, strict=True))
    for thing in scene:
        cell, pair = CELLS[thing.cell], (thing.colour, thing.shape)
        ask("colour", "colour at", (cell,), thing.colour, pair, thing)
        ask("shape", "shape of", (cell,), thing.shape, pair, thing)
        if shapes.count(thing.shape) == 1:
            ask("colour", "colour of", (thing.shape,), thing.colour, pair, thing)
            ask("position", "position of", (thing.shape,), cell, pair, thing)
        if colours.count(thing.colour) == 1:
            ask("shape", "shape of", (thing.colour,), thing.shape, pair, thing)
            ask("position", "position colour", (thing.colour,), cell, pair, thing)
        if thing.digit is not None:
            ask("digit", "digit", (), str(thing.digit), pair, thing)
        alone = list(zip(colours, shapes, strict=True)).count(pair) == 1
        ask("existence", "existence", pair, "yes", pair, thing if alone else None)
        # Half of what is denied is made of a colour and a shape that do occur, but apart. Held-out pairs are never
        # asked after where they are absent, or training would teach that they don't exist; beside one that is present,
        # which occurs in testing alone, another one is denied.
        apart = rng.random() < 0.5
        pools = [
            [(colour, shape) for colour in some_colours for shape in some_shapes
             if (colour, shape) not in present and (colour, shape) not in HELD_OUT]
            for some_colours, some_shapes in ((sorted(set(colours)), sorted(set(shapes))), (COLOURS, (*SHAPES, DIGIT)))
        ]  # fmt: skip
        pool = sorted(HELD_OUT - present) if pair in HELD_OUT else pools[0] if apart and pools[0] else pools[1]
        denied = rng.choice(pool)
        ask("existence", "existence", denied, "no", denied)
    ask("count", "count", (), str(len(scene)))
    absent = [colour for colour in COLOURS if colour not in colours]
    for colour in sorted({*rng.sample(colours, min(2, len(colours))), rng.choice(absent)}):
        ask("count", "count colour", (colour,), str(colours.count(colour)))
    rng.shuffle(asked)
    return asked


def twin(scene: Scene, rng: random.Random) -> Scene:
    """A training layout that differs from `scene` in one attribute of one object, or in one swapped between two."""
    while True:
        things = list(scene)
        index = rng.randrange(len(things))
        thing, change = things[index], rng.choice(("colour", "shape", "cell", "swap"))
        if change == "colour":
            things[index] = replace(thing, colour=rng.choice(tuple(COLOURS)))
        elif change == "shape" and thing.digit is None:
            things[index] = replace(thing, shape=rng.choice(SHAPES))
        elif change == "shape":
            things[index] = replace(thing, digit=rng.randrange(10))
        elif change == "cell":
            things[index] = replace(thing, cell=rng.choice(sorted(set(range(9)) - {other.cell for other in scene})))
        elif len(things) > 1:
            other = rng.choice([i for i in range(len(things)) if i != index])
            names = rng.choice((("colour",), ("shape", "digit"), ("cell",)))
            things[index] = replace(thing, **{name: getattr(scene[other], name) for name in names})
            things[other] = replace(scene[other], **{name: getattr(thing, name) for name in names})
        changed = tuple(sorted(things, key=lambda thing: thing.cell))
        if changed != scene and split_of(changed) == "train":
            return changed


# -------------------------------------------------------------------------------------------------------- records


def conversation(asked: list[Question], opening: str) -> list[dict]:
    """Turns of a conversation; `opening` (the image, or a description) stands before the first question."""
    turns = []
    for question in asked:
        turns.append({"role": "user", "content": (opening if not turns else "") + question.text})
        turns.append({"role": "assistant", "content": question.answer})
    return turns


def picture_record(name: str, split: str, asked: list[Question], **meta: str | int) -> dict:
    """Record of a conversation about picture `<split>/<name>.png`."""
    image = f"{split}/{name.split('.')[0]}.png"
    turns = conversation(asked, "<image>\n")
    return {"id": f"{split}/{name}", "source": "scenes", "images": [image], "messages": turns, "meta": meta}


def training_records(name: str, split: str, scene: Scene, rng: random.Random, turns: int) -> Iterator[dict]:
    """Two conversations in each language, of at most `turns` questions each."""
    for language in LANGUAGES:
        asked = questions(scene, rng, language)
        for part, chosen in enumerate((asked[:turns], asked[turns : 2 * turns])):
            if chosen:
                yield picture_record(f"{name}.{language}{part}", split, chosen, language=language)


def test_questions(split: str, scene: Scene, rng: random.Random) -> dict[tuple[str, str], Question]:
    """(language, type) -> a question; in the compositional split only about held-out pairs."""
    asked: dict[tuple[str, str], Question] = {}
    for language in LANGUAGES:
        for question in questions(scene, rng, language):
            if split != "compositional" or question.pair in HELD_OUT:
                asked.setdefault((language, question.type), question)
    return asked


def test_records(name: str, split: str, scene: Scene, rng: random.Random) -> Iterator[dict]:
    """One question of each type in each language."""
    for (language, kind), question in test_questions(split, scene, rng).items():
        meta = {"type": kind, "language": language, "num_objects": len(scene)}
        yield picture_record(f"{name}.{language}-{kind}", split, [question], **meta)


def text_record(index: int, rng: random.Random, turns: int) -> dict:
    """A conversation about a training layout that is described in words."""
    scene, language = draw_scene(rng, "train"), rng.choice(LANGUAGES)
    messages = conversation(questions(scene, rng, language)[:turns], caption(scene, language) + "\n")
    return {"id": f"text/{index}", "source": "scenes_text", "images": [], "messages": messages}


def copy_record(index: int, rng: random.Random) -> dict:
    """A random sequence of content words that the answer repeats twice."""
    content = [*COLOURS, *SHAPES, DIGIT, *CELLS]
    pieces = [f" {name}" for name in content] + [CHINESE[name] for name in content] + list("0123456789")
    sequence = "".join(rng.choices(pieces, k=rng.randint(3, 8) if rng.random() < 0.7 else rng.randint(9, 16)))
    messages = [{"role": "user", "content": sequence}, {"role": "assistant", "content": sequence * 2}]
    return {"id": f"copy/{index}", "source": "scenes_copy", "images": [], "messages": messages}


def words() -> list[str]:
    """Every piece of text that should be one token: words with and without a space before them, Chinese words."""
    pieces = [piece for texts in TEMPLATES.values() for text in texts.values() for piece in text.split("{}")]
    content = [*COLOURS, *SHAPES, DIGIT, *CELLS, "yes", "no"]
    pieces += [form for english in content for form in (english, f" {english}", CHINESE[english])]
    return sorted({piece for piece in pieces if piece.strip()} | {"user", "assistant", "system"})


# ----------------------------------------------------------------------------------------------------------- files


def start_of(split: str, index: int, seed: int) -> tuple[random.Random, Scene]:
    """The layout of picture `index` of a split, and the generator that goes on to paint it and to ask about it."""
    rng = random.Random(f"{seed} {split} {index}")  # each picture has its own
    return rng, draw_scene(rng, split, index % 4 + 1)


def draw_one(job: tuple[str, int], folder: Path, seed: int, turns: int) -> list[dict]:
    """Draws picture `index` of a split and returns its records."""
    split, index = job
    rng, scene = start_of(split, index, seed)
    name = f"{index:05d}"
    paint(scene, rng, split).save(folder / split / f"{name}.png")
    if split in ("train", "validation"):
        return list(training_records(name, split, scene, rng, turns))
    return list(test_records(name, split, scene, rng))


def write_scenes(output: Path, seed: int, counts: dict[str, int], texts: int, copies: int, turns: int) -> None:
    """Writes everything into a folder beside `output` and renames it when complete."""
    jobs = [(split, index) for split in SPLITS for index in range(counts[split])]
    records: dict[str, list[dict]] = {split: [] for split in SPLITS}
    with replaced(output) as staged:
        for split in SPLITS:
            (staged / "images" / split).mkdir(parents=True)
        for split, own in draw_all(draw_one, jobs, "pictures", folder=staged / "images", seed=seed, turns=turns):
            records[split] += own
        for split in SPLITS:
            write_records(records[split], staged / f"{split}.parquet")
        rng = random.Random(f"{seed} text")
        write_records([text_record(i, rng, turns) for i in tqdm(range(texts), desc="Text")], staged / "text.parquet")
        write_records([copy_record(i, rng) for i in tqdm(range(copies), desc="Copies")], staged / "copy.parquet")
        (staged / "words.txt").write_text("\n".join(words()) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/scenes"), help="folder, replaced as a whole")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=6000, help="training pictures (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--test", type=int, default=400)
    parser.add_argument("--compositional", type=int, default=200)
    parser.add_argument("--texts", type=int, default=60000, help="conversations in text alone (default: %(default)s)")
    parser.add_argument("--copies", type=int, default=20000, help="sequences to repeat (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="questions a conversation (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        require_own(arguments.output, "images", "drawn scenes")
    except ValueError as error:
        sys.exit(str(error))
    counts = {split: getattr(arguments, split) for split in SPLITS}
    if min(counts.values()) < 1 or arguments.turns < 1:
        sys.exit("every split needs a picture and every conversation a question: give numbers of at least 1")
    write_scenes(arguments.output, arguments.seed, counts, arguments.texts, arguments.copies, arguments.turns)


if __name__ == "__main__":
    main()
