"""What a page knows of a question and its answers: cards, and the pictures that they share."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from dataset.shards import open_medium
from dataset.template import MEDIA, media_of
from page.pictures import pictures_of
from page.text import natural, plain

MOST_VALUES = 32  # of a meta key; one with more is an identifier, by which nobody filters
FRAMES = 8  # of a clip
LEAST = 192  # pixels on the page that the longest side of an image has at least, or nearly

Medium = tuple[str, str]  # "image" or "video", and its path


class Album:
    """The pictures and frames of a page: each once, however many questions show it.

    Args:
        image_root: folder that the paths of the rows are relative to.
        sampling: which frames of a clip the model was shown (`frames`, `fps`, `max_seconds`).
    """

    def __init__(self, image_root: str | Path, sampling: dict | None = None):
        self.image_root, self.sampling = image_root, sampling or {"frames": FRAMES}
        self.media: list[dict] = []
        self._places: dict[Medium, int] = {}

    def __contains__(self, medium: Medium) -> bool:
        return medium in self._places

    def load(self, medium: Medium) -> dict:
        """What a page shows of it: its pictures as data URIs, or why there are none."""
        kind, path = medium
        shown = {"kind": kind, "path": plain(path), "facts": [], "error": None, "pictures": []}
        try:
            _check_relative(path)
            file = open_medium(self.image_root, path)
            pictures, shown["facts"] = pictures_of(kind, file, self.sampling, FRAMES, LEAST)
            shown["pictures"] = [{key: picture[key] for key in ("uri", "width", "height", "small", "alt")}
                                 for picture in pictures]  # fmt: skip
        except (OSError, ValueError) as error:
            shown["error"] = plain(str(error))
        return shown

    def add(self, medium: Medium, shown: dict) -> None:
        self._places[medium] = len(self.media)
        self.media.append(shown)

    def drop(self, latest: Sequence[Medium]) -> None:
        """Takes back what was added last."""
        for medium in reversed(latest):
            assert self._places.pop(medium) == len(self.media) - 1
            self.media.pop()

    def place(self, medium: Medium) -> int:
        """Its index in `media`."""
        return self._places[medium]


def _check_relative(path: str) -> None:
    """Rows may come from elsewhere; they must not put other files of this machine on a page. Raises ValueError."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{path} is absolute or climbs with ..; paths are relative to the image root")


def order(rows: Sequence[dict], is_urgent: Callable[[dict], bool]) -> Iterator[int]:
    """Indices of the rows: those that are urgent first, then the others; the groups take turns in both."""
    names = [name for name, _ in filters_of(rows) if name != "metric"]
    key = "type" if "type" in names else names[0] if names else None
    rng = random.Random(0)
    for wanted in (True, False):
        pools: dict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            if is_urgent(row) == wanted:
                pools[str(row["meta"].get(key))].append(index)
        turns = [pools[name] for name in sorted(pools)]
        for pool in turns:
            rng.shuffle(pool)  # neighbours often show the same picture
        for turn in range(max(map(len, turns), default=0)):
            yield from (pool[turn] for pool in turns if turn < len(pool))


def filters_of(rows: Iterable[dict]) -> list[tuple[str, list[str]]]:
    """(key of `meta`, its values) of each key that makes few groups; "metric" is one where there are several."""
    values: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for key, value in {"metric": row["metric"], **row["meta"]}.items():
            values[plain(key)].add(plain(str(value)))
    return [(key, sorted(found, key=natural)) for key, found in sorted(values.items()) if 1 < len(found) <= MOST_VALUES]


def media_of_row(row: dict, columns: Sequence[str]) -> list[Medium]:
    """What the row shows, and what was shown instead in some columns."""
    instead = (_instead(row["conditions"].get(column)) for column in columns)
    return [*_own_media(row), *(medium for media in instead for medium in media)]


def _own_media(row: dict) -> list[Medium]:
    return media_of({"images": row["images"], "videos": row["videos"], "messages": row["turns"]})


def _instead(answer: dict | None) -> list[Medium]:
    if answer is None:
        return []
    return [(kind[:-1], path) for kind in ("images", "videos") for path in answer.get(kind, [])]


def card_of(row: dict, number: int, columns: Sequence[str], album: Album) -> dict:
    """A question as page and script show it; every text is ready to be shown, media are indices in the album."""
    given = [(column, row["conditions"][column]) for column in columns if column in row["conditions"]]
    references = Counter(map(plain, row["references"] or [row["answer"]]))
    instead = [(column, _instead(answer)) for column, answer in given]
    return {
        "n": number,
        "id": plain(row["id"]),
        "metric": row["metric"],
        "meta": [[plain(key), plain(str(value))] for key, value in row["meta"].items()],
        "turns": list(_turns(row)),
        "references": [list(pair) for pair in references.most_common()],
        "choices": [plain(choice) for choice in row["choices"]],
        "right_choice": row["choices"].index(row["answer"]) if row["answer"] in row["choices"] else None,
        "answers": [_answer(row["conditions"].get(column)) for column in columns],
        "likelihoods": [[column, [round(value, 2) for value in answer["likelihoods"]]]
                        for column, answer in given if answer.get("likelihoods")],
        "perplexities": [[column, _perplexity(answer)] for column, answer in given if answer.get("tokens")],
        "media": [album.place(medium) for medium in _own_media(row)],
        "instead": [[column, [album.place(medium) for medium in media]] for column, media in instead if media],
    }  # fmt: skip


def _turns(row: dict) -> Iterator[list]:
    """[role, parts]: texts, and the number, from 1, of a picture or clip where it stands."""
    numbers = iter(range(1, len(row["images"]) + len(row["videos"]) + 1))
    for turn in row["turns"]:
        parts = MEDIA.split(turn["content"]) if turn["role"] == "user" else [turn["content"]]
        yield [turn["role"], [next(numbers) if MEDIA.fullmatch(part) else plain(part) for part in parts if part]]


def _answer(given: dict | None) -> dict | None:
    if given is None:
        return None
    return {"text": plain(given["answer"]), "score": None if given["score"] is None else round(given["score"], 3)}


def _perplexity(given: dict) -> float:
    """Of the reference, per token, to three digits."""
    return float(f"{math.exp(min(given['nll'] / given['tokens'], 100)):.3g}")
