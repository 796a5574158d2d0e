"""Drawn clips with questions and answers about what happens in them: the built-in video data set, made offline.

    python -m dataprocess.moving --output data/moving --seed 0

writes clips and records for training and testing, text for a language model, and the words that both use:

    clips/<split>/*.mp4                 96 x 96 pixels, 8 to 16 frames at 4 to 12 frames a second
    train.parquet, validation.parquet   conversations about a clip
    test.parquet                        one question a record; `meta` has type, language, number of objects
    text.parquet                        conversations with a description of four moments in place of the clip
    words.txt                           every word of the templates, one a line

A coloured shape moves left, right, up or down, appears, vanishes, changes its colour, or stays as it is; in a part of
the clips there is a second shape that stays. Every question has one right answer of one word, in English and Chinese.

What keeps the answers honest: they are in the motion, and nowhere else.

* A path lies anywhere in the picture. The first frame alone then hints at the way (what is at the left edge does not
  move left), and is right in about two of five cases; who wants to be right has to look at the others, in their order.
* A path and its reverse are equally frequent: the frames without their order tell the axis of a motion, not its sense;
  of a change of colour which two, not which was first; and not whether a shape appears or vanishes.
* The second shape stands anywhere, over the path, under it or beside it: a single frame does not tell which of two
  moves. (Where neither moves they keep apart, so that nothing that happens is hidden.)
* Lengths, frame rates, sizes and speeds are drawn without regard to what happens. All frames are encoded with one
  quantizer and without a look ahead, so that artefacts of a frame know nothing of the frames after it.
* What happens is asked so often about moving shapes that each answer is equally frequent.

What keeps the splits honest: a layout (which shapes in which colours are to be seen) belongs to one split only, by its
hash, in clips and in text. Where they are and what happens is no part of it, or memorised layouts would tell it. The
pairs of colour and shape that `dataprocess.scenes` holds out never occur, so that both data sets may be learned
together.
"""

import argparse
import hashlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
from PIL import Image
from tqdm import tqdm

from dataprocess import scenes
from dataprocess.scenes import CELLS, HELD_OUT, LANGUAGES, Question, conversation
from dataprocess.shapes import COLOURS, IMAGE_SIZE, SHAPES, background, draw_all, replaced, require_own, shade, stencil
from dataset.record import write_records

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # in x and y
EVENTS = ("moves", "appears", "vanishes", "changes", "nothing")
SPLITS = ("train", "validation", "test")
FRAMES = (8, 16)  # fewest, most
RATES = (4, 5, 6, 8, 10, 12)  # frames a second
SIZES = (20, 26)  # pixels
REACH = (0.36, 0.46)  # of the way from edge to edge: more than a third
CLEAR = 0.2  # of that way: how far apart two shapes that stay are at least, so that neither hides the other
MOMENTS = 4  # that a description tells of
CHINESE = {
    **scenes.CHINESE, "left": "左", "right": "右", "up": "上", "down": "下",
    "moves": "移动", "appears": "出现", "vanishes": "消失", "changes": "变色", "nothing": "没有",
}  # fmt: skip
TEMPLATES = {
    "en": {
        "direction": "Which way does it move?", "event": "What happens?",
        "before": "What color was it?", "after": "What color is it now?",
        "colour": "What color moves?", "shape": "What shape moves?", "thing": " {} {} {}", "empty": " {}",
    },
    "zh": {
        "direction": "它往哪边移动?", "event": "发生了什么?",
        "before": "它原来是什么颜色?", "after": "它现在是什么颜色?",
        "colour": "什么颜色在移动?", "shape": "什么形状在移动?", "thing": "{}{}{}", "empty": "{}",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A shape of `SHAPES` in a colour of `COLOURS`; x and y in [0, 1) lead from edge to edge."""

    colour: str
    shape: str
    x: float
    y: float

    @property
    def cell(self) -> int:
        """0-8 in reading order."""
        return int(3 * self.y) * 3 + int(3 * self.x)


@dataclass(frozen=True)
class Clip:
    """What happens to `subject`, given as it is at the beginning (or, if it appears, when it is there)."""

    event: str  # of EVENTS
    subject: Figure
    still: Figure | None  # a second shape, which stays
    direction: str  # of DIRECTIONS, if it moves
    later_colour: str  # if it changes
    reach: float  # how far it moves: 1 is from edge to edge
    frames: int
    moment: int  # the first frame in which it has appeared, vanished or changed

    def figures(self, frame: int) -> list[Figure]:
        """What is to be seen in a frame, the subject last."""
        figures = [self.still] if self.still else []
        passed, own = frame >= self.moment, self.subject
        if self.event == "moves":
            (x, y), way = DIRECTIONS[self.direction], self.reach * frame / (self.frames - 1)
            figures.append(Figure(own.colour, own.shape, own.x + x * way, own.y + y * way))
        elif self.event == "changes" and passed:
            figures.append(Figure(self.later_colour, own.shape, own.x, own.y))
        elif self.event in ("changes", "nothing") or passed == (self.event == "appears"):
            figures.append(own)
        return figures

    @property
    def layout(self) -> str:
        """All that is to be seen, at whatever place and time: nothing of what happens, nor to which of two shapes."""
        things = {(figure.colour, figure.shape) for number in range(self.frames) for figure in self.figures(number)}
        return "; ".join(sorted(f"{colour} {shape}" for colour, shape in things))


def split_of(clip: Clip) -> str:
    """The one split that a layout belongs to, by its hash."""
    bucket = hashlib.sha256(clip.layout.encode()).digest()[0] % 8
    return {0: "test", 1: "validation"}.get(bucket, "train")


def start(rng: random.Random, direction: str, reach: float) -> tuple[float, float]:
    """x and y from which a move of `reach` in a direction stays within the picture."""
    return tuple(
        max(0.0, -step) * reach + rng.random() * (1 - abs(step) * reach) for step in DIRECTIONS[direction]
    )


def draw_clip(rng: random.Random, split: str) -> Clip:
    """A random clip of `split`; one in two moves, one in three has a second shape."""
    # Drawn once, so that what a split accepts changes none of their frequencies.
    event = "moves" if rng.random() < 0.5 else rng.choice(EVENTS[1:])
    direction, has_still = rng.choice(tuple(DIRECTIONS)), rng.random() < 1 / 3
    while True:
        frames = rng.randint(*FRAMES)
        first, second, third = rng.sample(tuple(COLOURS), 3)
        shape, other_shape = rng.sample(SHAPES, 2)
        reach = rng.uniform(*REACH)
        subject = Figure(first, shape, *start(rng, direction, reach))
        # As if it moved as well, so that its place doesn't tell that it stays.
        still = Figure(third, other_shape, *start(rng, rng.choice(tuple(DIRECTIONS)), rng.uniform(*REACH)))
        pairs = {(first, shape), (second, shape) if event == "changes" else (first, shape), (third, other_shape)}
        near = max(abs(subject.x - still.x), abs(subject.y - still.y)) < CLEAR
        clip = Clip(
            event=event,
            subject=subject,
            still=still if has_still else None,
            direction=direction,
            later_colour=second,
            reach=reach,
            frames=frames,
            moment=rng.randint(-(-frames // 4), frames - -(-frames // 4)),
        )
        if split_of(clip) == split and not pairs & HELD_OUT and not (near and has_still and event != "moves"):
            return clip


# ---------------------------------------------------------------------------------------------------------- clips


def paint(clip: Clip, rng: random.Random) -> list[Image.Image]:
    """The frames, RGB, `IMAGE_SIZE` pixels a side."""
    empty = background(rng)
    sizes = {figure.shape: rng.randint(*SIZES) for figure in (clip.subject, clip.still) if figure}
    shades = {colour: shade(colour, rng) for colour in COLOURS}
    # Of two shapes that stay the one that does something is on top; of one that moves that would betray it.
    below = rng.random() < 0.5 and clip.event == "moves"
    frames = []
    for number in range(clip.frames):
        image, figures = empty.copy(), clip.figures(number)
        for figure in reversed(figures) if below else figures:
            size = sizes[figure.shape]
            mask = stencil(figure.shape).resize((size, size), Image.Resampling.BOX)
            room = IMAGE_SIZE - size + 1
            image.paste(shades[figure.colour], (int(figure.x * room), int(figure.y * room)), mask)
        frames.append(image)
    return frames


def write_clip(frames: list[Image.Image], rate: int, file: Path) -> None:
    """An mp4 file of `rate` frames a second: H.264 if PyAV comes with libx264, else MPEG-4."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(file), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=rate)
        (stream.width, stream.height), stream.pix_fmt = frames[0].size, "yuv420p"
        stream.codec_context.thread_count = 1  # clips are drawn by as many processes as there are cores
        if codec == "libx264":
            stream.options = {"qp": "18", "preset": "veryfast", "tune": "zerolatency"}
        else:
            stream.codec_context.qmin = stream.codec_context.qmax = 2
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


# ------------------------------------------------------------------------------------------------------ questions


def word(english: str, language: str) -> str:
    """A content word in `language`."""
    return CHINESE[english] if language == "zh" else english


def description(clip: Clip, language: str) -> str:
    """What is to be seen at `MOMENTS` moments from the first frame to the last: colour, shape and place of each."""
    moments = []
    for moment in range(MOMENTS):
        figures = clip.figures(round(moment * (clip.frames - 1) / (MOMENTS - 1)))
        things = [
            TEMPLATES[language]["thing"].format(
                word(figure.colour, language), word(figure.shape, language), word(CELLS[figure.cell], language)
            )
            for figure in sorted(figures, key=lambda figure: figure.cell)
        ]
        moments.append(",".join(things) or TEMPLATES[language]["empty"].format(word("nothing", language)))
    return ";".join(moments).strip()


def questions(clip: Clip, rng: random.Random, language: str) -> list[Question]:
    """Questions about a clip, shuffled; what happens is asked about one in four of those in which something moves."""
    answers = {}
    if clip.event != "moves" or rng.random() < 1 / (len(EVENTS) - 1):
        answers["event"] = clip.event
    if clip.event == "moves":
        answers["direction"] = clip.direction
    if clip.event == "moves" and clip.still:
        answers |= {"colour": clip.subject.colour, "shape": clip.subject.shape}
    if clip.event == "changes":
        answers |= {"before": clip.subject.colour, "after": clip.later_colour}
    asked = [
        Question(kind, TEMPLATES[language][kind], word(answer, language)) for kind, answer in sorted(answers.items())
    ]
    rng.shuffle(asked)
    return asked


# -------------------------------------------------------------------------------------------------------- records


def clip_record(name: str, split: str, asked: list[Question], **meta: str | int) -> dict:
    """Record of a conversation about clip `<split>/<name>.mp4`."""
    video = f"{split}/{name.split('.')[0]}.mp4"
    turns = conversation(asked, "<video>\n")
    return {"id": f"{split}/{name}", "source": "moving", "videos": [video], "messages": turns, "meta": meta}


def clip_records(name: str, split: str, clip: Clip, rng: random.Random, turns: int) -> Iterator[dict]:
    """In each language a conversation of at most `turns` questions; in testing each question on its own."""
    for language in LANGUAGES:
        asked = questions(clip, rng, language)
        if split != "test":
            yield clip_record(f"{name}.{language}", split, asked[:turns], language=language)
            continue
        for question in asked:
            meta = {"type": question.type, "language": language, "num_objects": 2 if clip.still else 1}
            yield clip_record(f"{name}.{language}-{question.type}", split, [question], **meta)


def text_record(index: int, rng: random.Random, turns: int) -> dict:
    """A conversation about a training clip that is described in words."""
    clip, language = draw_clip(rng, "train"), rng.choice(LANGUAGES)
    messages = conversation(questions(clip, rng, language)[:turns], description(clip, language) + "\n")
    return {"id": f"text/{index}", "source": "moving_text", "messages": messages}


def words() -> list[str]:
    """Every piece of text that should be one token: words with and without a space before them, Chinese words."""
    pieces = [piece for texts in TEMPLATES.values() for text in texts.values() for piece in text.split("{}")]
    content = [*COLOURS, *SHAPES, *CELLS, *DIRECTIONS, *EVENTS]
    pieces += [form for english in content for form in (english, f" {english}", CHINESE[english])]
    return sorted({piece for piece in pieces if piece.strip()} | {"user", "assistant", "system"})


# ----------------------------------------------------------------------------------------------------------- files


def draw_one(job: tuple[str, int], folder: Path, seed: int, turns: int) -> list[dict]:
    """Draws clip `index` of a split and returns its records. Each clip has a generator of its own."""
    split, index = job
    rng = random.Random(f"{seed} moving {split} {index}")
    clip = draw_clip(rng, split)
    name = f"{index:05d}"
    write_clip(paint(clip, rng), rng.choice(RATES), folder / split / f"{name}.mp4")
    return list(clip_records(name, split, clip, rng, turns))


def write_moving(output: Path, seed: int, counts: dict[str, int], texts: int, turns: int) -> None:
    """Writes everything into a folder beside `output` and renames it when complete."""
    jobs = [(split, index) for split in SPLITS for index in range(counts[split])]
    records: dict[str, list[dict]] = {split: [] for split in SPLITS}
    with replaced(output) as staged:
        for split in SPLITS:
            (staged / "clips" / split).mkdir(parents=True)
        for split, own in draw_all(draw_one, jobs, "clips", folder=staged / "clips", seed=seed, turns=turns):
            records[split] += own
        for split in SPLITS:
            write_records(records[split], staged / f"{split}.parquet")
        rng = random.Random(f"{seed} moving text")
        write_records([text_record(i, rng, turns) for i in tqdm(range(texts), desc="Text")], staged / "text.parquet")
        (staged / "words.txt").write_text("\n".join(words()) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/moving"), help="folder, replaced as a whole")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=8000, help="training clips (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--test", type=int, default=800)
    parser.add_argument("--texts", type=int, default=40000, help="conversations in text alone (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="questions a conversation (default: %(default)s)")
    arguments = parser.parse_args()
    counts = {split: getattr(arguments, split) for split in SPLITS}
    if min(counts.values()) < 1 or arguments.turns < 1:
        sys.exit("every split needs a clip and every conversation a question: give numbers of at least 1")
    try:
        require_own(arguments.output, "clips", "drawn clips")
    except ValueError as error:
        sys.exit(str(error))
    write_moving(arguments.output, arguments.seed, counts, arguments.texts, arguments.turns)


if __name__ == "__main__":
    main()
