"""What the formats share: a source, what a format consists of, and small helpers to write one with."""

import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dataset.rows import shown, stream_rows

LANGUAGES = ("en", "zh")  # files of dataprocess/prompts/
# How parts of a data set are called in files that number them.
SPLIT_NAMES = {1: "train", 2: "val", 3: "test"}


@dataclass
class Source:
    """One annotation file and the folder of its images and videos."""

    format: str  # key of FORMATS
    annotations: str  # file
    images: str | None = None  # folder that names of images and videos are relative to
    name: str | None = None  # first part of the ids of its records
    samples: int | None = None  # so many of its rows, drawn by seed; null: all
    weight: float | None = None  # its share in training, against the weights of the others; null: its size
    captions: str = "all"  # all: a record for each of several answers; one: a single one, drawn by seed
    prompts: list[str] | None = None  # questions that take turns; null: those of the language
    language: str | None = None  # en or zh: language of the prompts; null: that of the format
    splits: list[str] | None = None  # parts of the file to read; null: those for training
    follow_links: bool = False  # names in `images` may be links that lead out of it
    choices: bool = False  # a_okvqa: the options stand in the question
    image_map: str | None = None  # second file of the format image_map


class RowError(ValueError):
    """A row can't become a record; `reason` in a few words, for counting."""

    def __init__(self, problem: str, reason: str = "malformed row"):
        super().__init__(problem)
        self.reason = reason


class Format(NamedTuple):
    """How a kind of annotation file is read.

    A row that a reader of files yields may be a ValueError (RowError): it stands for one that can't be used.
    """

    # (row, its context) -> [{"messages": [...], and perhaps "images", "videos", "meta"}]; raises RowError, or has it in
    # place of what could not be made. Names of media are relative to `images` of the source, or to a "folder" beside
    # them. Missing keys may raise KeyError.
    records: Callable[[dict, "Context"], list[dict | RowError]]
    # source -> rows of its file.
    rows: Callable[[Source], Iterator[Any]] = lambda source: stream_rows(source.annotations)
    images: bool | None = True  # `images` of the source is required; None: may be given; False: there are none
    prompts: str | None = None  # list in the files of prompts
    language: str = "en"  # of the prompts, where the source names none
    splits: tuple[str, ...] = ()  # parts that are read where the source names none; (): the format has no parts
    several: bool = False  # a question may have several answers, of which the source may want one
    own: tuple[str, ...] = ()  # keys of a source that only this format has

    @property
    def options(self) -> list[str]:
        """Keys that a source of this format may have, beside those of every source."""
        has = {
            ("images", "follow_links"): self.images is not False,
            ("captions",): self.several,
            ("prompts", "language"): self.prompts,
            ("splits",): self.splits,
        }
        return [*(key for keys, given in has.items() if given for key in keys), *self.own]


class Context(NamedTuple):
    """Which row of which source: prompts and drawings depend on it."""

    source: Source
    form: Format
    number: int
    seed: int

    def phrases(self) -> dict[str, Any]:
        """The file of prompts of the source's language."""
        return load_prompts(self.source.language or self.form.language)

    def prompt(self, k: int = 0) -> str:
        """A question of the source; they take turns from one of a row's records to the next, and from row to row."""
        prompts = self.source.prompts or self.phrases()[self.form.prompts]
        return prompts[(self.number + k) % len(prompts)]

    def choose(self, answers: list) -> list:
        """All answers, or a single one, as `captions` of the source says."""
        if not answers:
            raise RowError("there is no answer; fill one in, or drop the row", "empty answer")
        if self.source.captions == "all":
            return answers
        usable = [answer for answer in answers if isinstance(answer, str) and answer.strip()]
        return [random.Random(f"{self.seed}:{self.source.name}:{self.number}").choice(usable or answers)]


@cache
def load_prompts(language: str) -> dict[str, Any]:
    """`dataprocess/prompts/<language>.yaml`"""
    path = Path(__file__).parents[1] / "prompts" / f"{language}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def fill(phrase: str, **values: str) -> str:
    """The phrase with values in place of `{name}`; what looks like a name within a value stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), phrase)


def exchanges(images: list[str], *pairs: tuple[str, Any]) -> dict:
    """Part of a record: images, and turns of (question, answer).

    An answer that is no text stays what it is: it is refused with its record, and not with all that its row makes.
    """
    turns = []
    for question, answer in pairs:
        turns.append({"role": "user", "content": text(question, "a question")})
        turns.append({"role": "assistant", "content": answer.strip() if isinstance(answer, str) else answer})
    return {"images": images, "messages": turns}


def text(value: Any, what: str) -> str:
    """The value, which must be a text; `what` is for the message."""
    if not isinstance(value, str):
        raise RowError(f"{what} must be text, got {shown(value)}; write it in quotes")
    return value


def as_list(value: Any) -> list:
    """A list as it is, any other value as its only element; null and "", as merged files have them, as none."""
    return [] if value is None or value == "" else value if isinstance(value, list) else [value]


def within(folder: str, name: str, source: Source) -> str:
    """`folder/name`, or `name` alone where `images` of the source is that folder already."""
    last = os.path.basename(os.path.normpath(source.images)) if source.images else None
    return name if folder == last else os.path.join(folder, name)
