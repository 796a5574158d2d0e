"""Which picture replaces which, and which questions are worked off together: all fixed by records and seed alone."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import permutations

from evaluation.questions import Medium, Question

CONDITIONS = ("real", "blind", "shuffled", "reordered")


def media_order(questions: Sequence[Question], seed: int) -> list[Medium]:
    """All different (kind, path) in an order that depends on `seed` alone."""
    media = sorted({medium for q in questions for medium in q.media})
    random.Random(seed).shuffle(media)
    return media


def substitutes(questions: Sequence[Question], seed: int) -> dict[Medium, Medium]:
    """Image -> the image that replaces it, clip -> clip: the one so many places on in a random circle, never itself.

    So many that as few media as possible are replaced by one that the same question shows: one, where none shows two.

    Raises:
        ValueError: there is only one image, or only one clip.
    """
    found = {}
    for kind in ("image", "video"):
        media = [medium for medium in media_order(questions, seed) if medium[0] == kind]
        if len(media) == 1:
            problem = f"all records show {media[0][1]}; the condition 'shuffled' needs a second {kind}"
            raise ValueError(f"{problem}: take more records, or --conditions real blind")
        places = {medium: place for place, medium in enumerate(media)}
        shown = ([places[medium] for medium in set(q.media) if medium[0] == kind] for q in questions)
        meetings = Counter((b - a) % len(media) for own in shown for a, b in permutations(own, 2))
        step = min(range(1, len(media)), key=meetings.__getitem__, default=1)
        found.update(zip(media, media[step:] + media[:step], strict=True))
    return found


def chunks(questions: Sequence[Question], seed: int, most_media: int) -> Iterable[list[Question]]:
    """Runs of questions that need at most `most_media` media, their replacements included; one with more is alone."""
    place = {medium: i for i, medium in enumerate(media_order(questions, seed))}
    ordered = sorted(questions, key=lambda q: min((place[medium] for medium in q.media), default=-1))
    chunk, shown = [], set()
    for q in ordered:
        if chunk and 2 * len(shown | set(q.media)) > most_media:
            yield chunk
            chunk, shown = [], set()
        chunk.append(q)
        shown |= set(q.media)
    yield chunk


def batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Batches of questions with as many choices and prompts of similar length, which need little padding."""
    ordered = sorted(
        questions, key=lambda q: (len(q.choices), len(q.media), sum(len(turn["content"]) for turn in q.turns))
    )
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def reordered(views: list, seed: str) -> list:
    """The views in a random order that is not theirs, if there is another."""
    order = list(range(len(views)))
    while len(order) > 1 and order == sorted(order):
        random.Random(seed).shuffle(order)
        seed += "+"
    return [views[index] for index in order]
