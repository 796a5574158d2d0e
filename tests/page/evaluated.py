"""Rows of an evaluation as `evaluate.py` writes them, with all that a page has to bear, and a reader of such pages."""

import json
import random
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from dataprocess import moving
from evaluation.results import make_report

HOSTILE = (
    '</script><img src=http://evil/x.png onerror="window.broken=1"><!--<script>window.broken=1</script>'
    "\u2028\u202e{{ 7 * 7 }}'"
)
COLOURS = ("red", "green", "blue", "white")
CONDITIONS = ("real", "blind", "shuffled")


def answered(answer: str, right: bool | float | None, **more) -> dict:
    return {"answer": answer, "score": None if right is None else float(right), "nll": 0.5, "tokens": 2, **more}


def question(number: int, **more) -> dict:
    """One about the colour of one of eight pictures; every fifth is answered wrongly, every fourth right when blind."""
    colour, picture = COLOURS[number % 4], f"{number % 8}.png"
    kind = ("colour", "shape", "count")[number % 3]
    conditions = {
        "real": answered("black" if number % 5 == 0 else colour, number % 5 != 0),
        "blind": answered("red", number % 4 == 0),
        "shuffled": answered("green", number % 4 == 1, images=[f"{(number + 1) % 8}.png"]),
    }
    row = {"id": f"q{number:03}", "images": [picture], "videos": [],
           "meta": {"type": kind, "language": ("en", "zh")[number % 2], "objects": number % 11, "name": f"n{number}"},
           "turns": [{"role": "user", "content": f"<image>\nQuestion {number}: which colour?"}], "answer": colour,
           "references": [colour], "choices": [], "metric": "exact", "conditions": conditions}  # fmt: skip
    return {**row, **more}


def questions(count: int = 60) -> list[dict]:
    """Plain ones, and those that differ: hostile, of clips, with choices, partly right, missing, of text alone."""
    rows = [question(number) for number in range(count)]
    rows[0] = question(0, id="clip", images=[], videos=["clip.mp4"],
                       turns=[{"role": "user", "content": "<video>什么在动?"}])
    rows[0]["conditions"]["shuffled"] = answered("green", False, videos=["clip.mp4"])
    rows[1] = question(1, id="choices", metric="choice", answer="indoors", references=["indoors"],
                       choices=["indoors", "outdoors"])
    for name, likelihoods in (("real", [-0.1, -2.0]), ("blind", [-3.0, -0.25]), ("shuffled", [-1.0, -0.5])):
        rows[1]["conditions"][name] |= {"likelihoods": likelihoods, "likelihood_sums": likelihoods}
        rows[1]["conditions"][name]["answer"] = rows[1]["choices"][likelihoods[0] < likelihoods[1]]
        rows[1]["conditions"][name]["score"] = float(likelihoods[0] > likelihoods[1])
    rows[2] = question(2, id="votes", metric="vqa", references=["blue"] * 7 + ["navy"] * 3)
    for name, text, score in (("real", "blue", 1.0), ("blind", "navy", 0.9), ("shuffled", "no", 0.0)):
        rows[2]["conditions"][name] |= {"answer": text, "score": score}
    rows[3] = question(3, id="gone", images=["gone.png"])
    rows[4] = question(4, id="text", images=[], turns=[{"role": "system", "content": "Be kind."},
                                                       {"role": "user", "content": "红色的反义词?"}])
    rows[4]["conditions"]["shuffled"] = answered("绿色", False)
    rows[6] = question(6, id=f"evil {HOSTILE}", images=[f"{HOSTILE.replace('/', '')}.png"], answer=HOSTILE,
                       references=[HOSTILE, "x"], meta={"type": "colour", HOSTILE: HOSTILE, "__proto__": "constructor"},
                       turns=[{"role": "user", "content": f"{HOSTILE}<image>{HOSTILE}"}])
    for answer in rows[6]["conditions"].values():
        answer |= {"answer": HOSTILE, "score": 0.0}
    rows[7] = question(7, id="partly")
    rows[7]["conditions"]["real"]["score"] = 0.3
    return rows  # fmt: skip


def report_of(rows: list[dict]) -> dict:
    settings = {"checkpoint_path": "outputs/x", "data": ["test.parquet"], HOSTILE: HOSTILE}
    return make_report(rows, settings=settings, seconds={"total": 61.0})


def draw_media(folder: Path) -> Path:
    """Eight pictures, of which one is a photograph in size and noise, and a clip."""
    rng = random.Random(0)
    for number in range(8):
        image = Image.new("RGB", (24, 24), (number * 30, 200 - number * 20, 90))
        if number == 7:
            image = Image.effect_noise((800, 500), 60).convert("RGB")
        image.putpixel((rng.randrange(24), 3), (255, 255, 255))
        image.save(folder / f"{number}.png")
    frames = [Image.new("RGB", (32, 32), (value, 0, 0)) for value in range(0, 240, 20)]
    moving.write_clip(frames, 4, folder / "clip.mp4")
    return folder


class Page(HTMLParser):
    """Tags, attributes and texts of a page; the texts of its scripts and styles apart."""

    RAW = ("script", "style")

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.raw = {"script": [], "style": []}
        self.cards = []
        self.feed(self.source)
        self.close()
        (self.policy,) = [value for _, name, value in self.attributes if name == "content" and "default-src" in value]
        self.data = json.loads(self.raw["script"][0])

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag in self.RAW:
            self.raw[tag].append("")
            self.open.append(tag)
        if tag == "article":
            self.cards.append("")

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.raw[self.open[-1]][-1] += data
        else:
            self.text += data
            if self.cards:
                self.cards[-1] += data
