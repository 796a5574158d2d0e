"""A page with a gallery of questions: one file that loads nothing, whose answers can be filtered, searched and sorted.

What comes from data reaches the page through Jinja's escaping, or as JSON in a script element that isn't executed and
of which the page's one script makes text nodes. That script is the only one that a browser may run there: the page
names its digest (Content-Security-Policy), so that nothing else would run, should it ever break out of its place.
Without JavaScript all figures and the first questions can be read.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode

from jinja2 import Environment
from markupsafe import Markup

from page.figures import RIGHT, bars, in_unit, is_right, points
from page.questions import Album, card_of, filters_of, media_of_row, order
from page.render import environment

FIRST = 24  # questions in the markup, which need no script
MOST_ROWS = 5000
MOST_BYTES = 16_000_000
MISSES = 20  # questions with new pictures that did not fit, after which no more pictures are read


class Words(NamedTuple):
    """What a gallery calls things.

    Attributes:
        pair: the two columns that are set against each other.
        looks: labels of "more" (the first of the pair has the higher score), "both" (are right), "less", and "same"
            (all answers are the same); what is missing is not offered.
        orders: labels of "first", "file", "score", "more", "less" and "surprise".
        urgent: what those questions are that come first, in the plural.
    """

    pair: tuple[str, str]
    looks: dict[str, str]
    orders: dict[str, str]
    urgent: str


class Gallery(NamedTuple):
    """Cards in the order in which they are of interest, what they can be filtered by, and what is left out, and why."""

    columns: Sequence[str]
    words: Words
    album: Album
    cards: list[dict]
    filters: list[tuple[str, list[str]]]
    total: int
    left_out: str | None


def make_gallery(
    rows: Sequence[dict],
    columns: Sequence[str],
    words: Words,
    is_urgent: Callable[[dict], bool],
    album: Album,
    most_rows: int = MOST_ROWS,
    most_bytes: int = MOST_BYTES,
) -> Gallery:
    """Takes what is urgent first, and evenly from all groups, until a limit is reached.

    Args:
        rows: as in `rows.jsonl`; their `conditions` are by column.
        most_rows, most_bytes: of questions, and of their texts and pictures together.
    """
    cards, size, urgent, misses = [], 0, 0, 0
    for number in order(rows, is_urgent):
        if len(cards) == most_rows:
            break
        row = rows[number]
        new = [medium for medium in dict.fromkeys(media_of_row(row, columns)) if medium not in album]
        if misses == MISSES and new:
            continue  # others may show what is embedded already
        loaded = [(medium, album.load(medium)) for medium in new]
        for medium, shown in loaded:
            album.add(medium, shown)
        card = card_of(row, number, columns, album)
        cost = sum(map(_bytes, [card, *(shown for _, shown in loaded)]))
        if size + cost > most_bytes:
            album.drop(new)
            if not new:
                break
            misses += 1
            continue
        size += cost
        urgent += is_urgent(row)
        cards.append(card)
    left_out = None
    if len(cards) < len(rows):
        limit = f"{most_rows:,} questions" if len(cards) == most_rows else f"{most_bytes / 1e6:,.3g} MB"
        all_urgent = sum(map(is_urgent, rows))
        those = "all" if urgent == all_urgent else f"{urgent:,} of the"
        left_out = (
            f"{len(rows) - len(cards):,} of the {len(rows):,} questions are left out here, since the gallery holds at "
            f"most {limit}. It has {those} {all_urgent:,} {words.urgent}, which were taken first, and evenly from all "
            "groups. The figures above count every question."
        )
    return Gallery(columns, words, album, cards, filters_of(rows), len(rows), left_out)


def render_gallery(
    template: str,
    gallery: Gallery,
    filters: dict[str, Callable] | None = None,
    classes: Sequence[str] = (),
    **values,
) -> str:
    """A template that extends `gallery.html`, with these values and those of the gallery.

    Args:
        filters: of the template, beside those that all have.
        classes: names of columns whose colours are fixed, in their order; otherwise columns have them in theirs.
    """
    style, script = (Markup("".join(map(_file, names))) for names in (("common.css", "gallery.css"), ("gallery.js",)))
    static = gallery.cards[:FIRST]
    return _environment(gallery, classes or gallery.columns, filters or {}).get_template(template).render(
        columns=gallery.columns,
        left_out=gallery.left_out,
        static=static,
        shown=len(gallery.cards),
        media=gallery.album.media,
        new_set=set,
        right=RIGHT,
        style=style,
        style_hash=digest(style),
        script=script,
        script_hash=digest(script),
        data=script_data({
            "columns": gallery.columns, "filters": gallery.filters, "words": gallery.words._asdict(), "right": RIGHT,
            "total": gallery.total, "rows": gallery.cards, "media": _media_without(gallery.album, static),
        }),
        **values,
    )  # fmt: skip


def script_data(value) -> Markup:
    """JSON within a script element: it can't end the element, begin a comment or end a line of a script."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def digest(text: str) -> str:
    """How a Content-Security-Policy names a script or a style (W3C, CSP Level 3, section 2.3.1, `hash-source`)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def link_to(**chosen: str) -> str:
    """The part of the address that has the gallery show what is chosen."""
    return "#" + urlencode(chosen)


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _bytes(value) -> int:
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def _environment(gallery: Gallery, classes: Sequence[str], filters: dict[str, Callable]) -> Environment:
    values_of, media = dict(gallery.filters), gallery.album.media

    def group_link(group: tuple[str, str]) -> str | None:
        """To the questions of ("type", "colour") or ("type x language", "colour x en"); None where no filter does."""
        keys, values = (part.split(" x ") for part in group)
        if len(keys) != len(values):
            return None
        chosen = dict(zip(keys, values, strict=True))
        if any(value not in values_of.get(key, []) for key, value in chosen.items()):
            return None
        return link_to(**{f"g.{key}": value for key, value in chosen.items()})

    return environment(
        bars=lambda cell: bars(cell, [name for name in gallery.columns if cell.get(name)]),
        column_class=lambda name: f"c{min(classes.index(name), 4) if name in classes else 4}",
        group_link=group_link,
        in_unit=lambda value, name: in_unit(name, value),
        kind=lambda place: media[place]["kind"],
        mark=_mark,
        points=points,
        **filters,
        verdict=lambda score: "unscored" if score is None else "right" if is_right(score) else "wrong",
    )


def _mark(score: float | None) -> str:
    if score is None:
        return ""
    sign = "✓ right" if is_right(score) else "✗ wrong"
    return f"{sign}, {round(score, 2):g}" if 0 < score < 1 else sign


def _media_without(album: Album, static: Sequence[dict]) -> list[dict]:
    """The album without the pictures that stand in the markup, from where the script takes them."""
    there = {place for card in static for places in (card["media"], *(places for _, places in card["instead"]))
             for place in places}  # fmt: skip
    media = list(album.media)
    for place in there:
        media[place] = {**media[place], "pictures": [{**one, "uri": None} for one in media[place]["pictures"]]}
    return media
