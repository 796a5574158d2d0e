"""The HTML page of the preview: one file without scripts that loads nothing, whatever stands in the data.

What comes from data reaches the page through Jinja's or markupsafe's escaping alone. As a second wall the page forbids
its browser scripts and all that isn't in it (Content-Security-Policy).
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from page.pieces import Piece
from page.text import number, plain, share, text_markup, visible_markup

SHOWN_TOKENS = 3000  # of a sample; of what is longer the middle is left out
BINS, WIDTH, HEIGHT = 48, 640, 120  # of a histogram


def render(**values) -> str:
    """`page.html` with these values; raises UndefinedError for one that is missing."""
    return environment(tokens=tokens_markup).get_template("page.html").render(**values)


def environment(**filters) -> Environment:
    """The templates of this folder with the filters that all pages have, and these; all values are escaped."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters.update(text=text_markup, plain=plain, share=share, number=number, **filters)
    return made


def tokens_markup(pieces: Sequence[Piece], most: int = SHOWN_TOKENS) -> Markup:
    """Tokens one by one: `<b>` is supervised, `<i>` is not."""
    left_out = len(pieces) - most
    if left_out <= most // 4:
        return Markup().join(map(_piece_markup, pieces))
    half = most // 2
    gap = Markup("<i class=gap> … {:,} tokens … </i>").format(left_out)
    first, last = (Markup().join(map(_piece_markup, part)) for part in (pieces[:half], pieces[-half:]))
    return first + gap + last


def _piece_markup(piece: Piece) -> Markup:
    if piece.kind in ("image", "video"):
        return Markup("<i class=m>{} {}: {}</i> ").format(piece.kind, piece.number, piece.parts[0].text)
    tag = Markup("b") if piece.supervised else Markup("i")
    kind = Markup(" class=c") if piece.kind == "control" else ""
    text = Markup().join(
        visible_markup(part.text, True) + (Markup("<sub>{}</sub>").format(part.bytes) if part.bytes else "")
        for part in piece.parts
    )
    return Markup("<{0}{1} title={2}>{3}</{0}><wbr>").format(tag, kind, piece.ids[0], text)


def upper_end(lengths: Sequence[np.ndarray]) -> int:
    """Where histograms end, so that a few outliers don't press all else together; the last bar holds what is longer."""
    lengths = [own for own in lengths if len(own)]
    if not lengths:
        return BINS
    longest = max(int(own.max()) for own in lengths)
    typical = max(1.25 * float(np.quantile(own, 0.99)) for own in lengths)
    end = min(longest, max(typical, BINS))
    step = 10 ** max(0, math.floor(math.log10(end)) - 1)
    return max(BINS, math.ceil(end / step) * step)


def histogram(lengths: np.ndarray, end: int, limit: int | None, unit: str) -> dict:
    """How many samples have what length, in `BINS` bins up to `end`, and where `limit` cuts: what the page draws."""
    edges = [place * end // BINS for place in range(BINS + 1)]  # a bin holds what is above its first and up to its last
    counts = np.bincount(np.clip(np.searchsorted(edges, lengths) - 1, 0, BINS - 1), minlength=BINS)
    longest, top = int(lengths.max(initial=0)), max(int(counts.max()), 1)
    bars = []
    for place, count in enumerate(counts.tolist()):
        low, high = edges[place] + 1, edges[place + 1]
        span = f"{low:,} or more" if place == BINS - 1 and longest > end else f"{low:,} to {high:,}"
        if count:
            bars.append({
                "x": place * WIDTH / BINS + 0.5, "width": WIDTH / BINS - 1, "height": max(count / top * HEIGHT, 1.5),
                "over": limit is not None and low > limit, "title": f"{span} {unit}s: {count:,}",
            })  # fmt: skip
    return {
        "bars": bars, "top": top, "end": end, "longer": longest > end, "unit": unit, "width": WIDTH, "height": HEIGHT,
        "count": len(lengths), "limit": limit if limit is not None and limit <= end else None,
    }  # fmt: skip
