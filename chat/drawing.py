"""Pictures in a terminal: by its image protocol where it has one, else as coloured half blocks.

- iTerm2 and WezTerm: https://iterm2.com/documentation-images.html
- kitty and Ghostty: https://sw.kovidgoyal.net/kitty/graphics-protocol/
- others with 24-bit or 256 colours: U+2580, whose upper half has the colour of one pixel and lower half that of another
"""

import base64
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Literal, TextIO

from PIL import Image

Way = Literal["iterm", "kitty", "true colour", "256 colours"]

MOST_COLUMNS, MOST_ROWS = 40, 16  # character cells; one is taken to be twice as high as wide
CELL_PIXELS = 12  # width of a cell in what is sent by a protocol, which the terminal scales to its own
KITTY_CHUNK = 4096  # characters of one escape sequence, at most
GAP = 2  # pixels between frames of a clip


def way_of(out: TextIO, environ: Mapping[str, str] = os.environ) -> Way | None:
    """How `out` shows pictures, by what terminals say of themselves in the environment; None: not at all."""
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if not out.isatty() or term in ("", "dumb") or environ.get("NO_COLOR"):  # https://no-color.org
        return None
    multiplexed = bool(environ.get("TMUX")) or term.startswith(("tmux", "screen"))
    if not multiplexed:  # tmux and screen swallow the protocols, and hand on the environment of what they run in
        if program in ("iTerm.app", "WezTerm") or environ.get("LC_TERMINAL") == "iTerm2":
            return "iterm"
        if environ.get("KITTY_WINDOW_ID") or program == "ghostty" or term in ("xterm-kitty", "xterm-ghostty"):
            return "kitty"
    if (out.encoding or "").lower().replace("-", "") != "utf8":
        return None
    if environ.get("COLORTERM") in ("truecolor", "24bit") or term.endswith("-direct"):
        return "true colour"
    return "256 colours" if "256color" in term or multiplexed else None


def draw(pictures: Sequence[Image.Image], way: Way) -> str:
    """What shows RGB pictures side by side when it is written to a terminal; it ends with a line break.

    They take at most `MOST_COLUMNS` x `MOST_ROWS` cells, and at most half of the terminal's height.
    """
    picture = side_by_side(pictures)
    window = shutil.get_terminal_size()
    columns, rows = min(MOST_COLUMNS, window.columns - 1), min(MOST_ROWS, window.lines // 2)
    scale = min(columns / picture.width, 2 * rows / picture.height)
    columns, rows = (max(1, round(side * scale)) for side in (picture.width, picture.height / 2))
    if way in ("iterm", "kitty"):
        png = io.BytesIO()
        picture.thumbnail((columns * CELL_PIXELS, 2 * rows * CELL_PIXELS))
        picture.save(png, "png")
        send = _iterm if way == "iterm" else _kitty
        return send(png.getvalue(), columns, rows) + "\n"
    pixels = picture.resize((columns, 2 * rows), Image.Resampling.BOX).load()
    colour = _true_colour if way == "true colour" else _of_256
    return "".join(
        "".join(f"\x1b[38;{colour(pixels[x, y])};48;{colour(pixels[x, y + 1])}m▀" for x in range(columns)) + "\x1b[0m\n"
        for y in range(0, 2 * rows, 2)
    )


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """One picture of all, on white, each as high as the first; a copy."""
    height = pictures[0].height
    scaled = [one.resize((max(1, round(one.width * height / one.height)), height)) for one in pictures]
    whole = Image.new("RGB", (sum(one.width for one in scaled) + GAP * (len(scaled) - 1), height), "white")
    left = 0
    for one in scaled:
        whole.paste(one, (left, 0))
        left += one.width + GAP
    return whole


def _true_colour(pixel: tuple[int, int, int]) -> str:
    return "2;{};{};{}".format(*pixel)


def _of_256(pixel: tuple[int, int, int]) -> str:
    """The nearest of xterm's colour cube, whose six levels are 0, 95, 135, 175, 215 and 255."""
    red, green, blue = (0 if value < 48 else 1 if value < 115 else (value - 35) // 40 for value in pixel)
    return f"5;{16 + 36 * red + 6 * green + blue}"


def _iterm(png: bytes, columns: int, rows: int) -> str:
    data = base64.b64encode(png).decode()
    return f"\x1b]1337;File=inline=1;size={len(png)};width={columns};height={rows}:{data}\x07"


def _kitty(png: bytes, columns: int, rows: int) -> str:
    data = base64.b64encode(png).decode()
    chunks = [data[start : start + KITTY_CHUNK] for start in range(0, len(data), KITTY_CHUNK)]
    parts = []
    for number, chunk in enumerate(chunks):
        # q=2: without it the terminal answers, which would be read as typed.
        keys = f"a=T,f=100,q=2,c={columns},r={rows}," if number == 0 else ""
        parts.append(f"\x1b_G{keys}m={int(number < len(chunks) - 1)};{chunk}\x1b\\")
    return "".join(parts)
