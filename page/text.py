"""How texts and numbers are written on a page: short, and with nothing in them that is invisible."""

import unicodedata
from collections.abc import Iterator
from itertools import groupby

from markupsafe import Markup, escape

SHOWN_CHARACTERS = 2000  # of a turn or an answer; of what is longer the middle is left out
SPACES = {" ": "·", "\n": "¶", "\t": "→"}
JOINERS = "\u200c\u200d"  # of letters and emoji; harmless, and part of how a text looks


def share(value: float | None) -> str:
    """`12.3 %`"""
    return "–" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """`1,234`"""
    return "–" if value is None else f"{value:,.0f}"


def natural(value: str) -> tuple:
    """Sort key under which whole numbers are in the order of their size, before all else."""
    return (0, int(value), "") if value.isdecimal() and value.isascii() and len(value) < 19 else (1, 0, value)


def text_markup(text: str) -> Markup:
    """A text of a record, without its middle if it is long; what can't be seen in it is written as escapes."""
    first, left_out, last = shortened(text)
    if not left_out:
        return visible_markup(first, spaces=False)
    gap = Markup("<i class=gap> … {:,} characters … </i>").format(left_out)
    return visible_markup(first, False) + gap + visible_markup(last, False)


def plain(text: str) -> str:
    """`text_markup` without markup, for scripts, attributes and other places that take nothing but text."""
    first, left_out, last = shortened(text)
    kept = first if not left_out else f"{first} … {left_out:,} characters … {last}"
    if kept.isascii() and kept.replace("\n", "").isprintable():  # as nearly all are, and there are many
        return kept
    return "".join(part for _, part in visible(kept, spaces=False))


def shortened(text: str) -> tuple[str, int, str]:
    """(beginning, how many characters are left out, end); (text, 0, "") for one that is not much too long."""
    left_out = len(text) - SHOWN_CHARACTERS
    if left_out <= SHOWN_CHARACTERS // 4:
        return text, 0, ""
    half = SHOWN_CHARACTERS // 2
    return text[:half], left_out, text[-half:]


def visible_markup(text: str, spaces: bool) -> Markup:
    """`visible`, with `<em>` around what stands for something invisible."""
    return Markup().join(
        Markup("<em>{}</em>{}").format(part, Markup("<br>") if part == SPACES["\n"] else "") if hidden else escape(part)
        for hidden, part in visible(text, spaces)
    )


def visible(text: str, spaces: bool = True) -> Iterator[tuple[bool, str]]:
    """(whether it stands for something invisible, text) of the pieces of a text.

    Spaces, line breaks and tabs are written as `SPACES` says, unless `spaces` is False, which leaves them, and what
    joins letters, as they are. All other characters without a shape of their own are written as escapes: what turns the
    direction of writing must not act on the page.
    """
    for is_hidden, run in groupby(text, key=lambda letter: _is_hidden(letter, spaces)):
        if is_hidden:
            yield from ((True, SPACES.get(letter) or _escape(letter)) for letter in run)
        else:
            yield False, "".join(run)


def _is_hidden(letter: str, spaces: bool) -> bool:
    if letter in SPACES or letter in JOINERS:
        return spaces
    if letter.isascii():
        return not letter.isprintable()
    return unicodedata.category(letter) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs")


def _escape(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
