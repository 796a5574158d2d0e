"""chat/drawing.py: which terminal is given what, and that it shows the picture's colours at a bounded size."""

import base64
import io
import re

import pytest
from PIL import Image

from chat.drawing import KITTY_CHUNK, MOST_COLUMNS, MOST_ROWS, draw, way_of


class Out(io.StringIO):
    encoding = "utf-8"

    def __init__(self, terminal: bool = True, encoding: str = "utf-8"):
        super().__init__()
        self._terminal, self.encoding = terminal, encoding

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(
    ("environ", "way"),
    [
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "true colour"),
        ({"TERM": "xterm-direct"}, "true colour"),
        ({"TERM": "xterm-256color"}, "256 colours"),
        ({"TERM": "xterm"}, None),
        ({"TERM": "vt100"}, None),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, None),
        ({}, None),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor", "NO_COLOR": "1"}, None),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor", "NO_COLOR": ""}, "true colour"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1", "COLORTERM": "truecolor"}, "kitty"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM": "tmux-256color", "TMUX": "/tmp/x,1,0", "TERM_PROGRAM": "iTerm.app"}, "256 colours"),
        ({"TERM": "screen", "KITTY_WINDOW_ID": "1", "COLORTERM": "truecolor"}, "true colour"),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, None),
    ],
)
def test_what_a_terminal_is_given(environ, way):
    assert way_of(Out(), environ) == way
    assert way_of(Out(terminal=False), environ) is None


def test_half_blocks_need_an_encoding_that_has_them():
    environ = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    assert way_of(Out(encoding="latin-1"), environ) is None
    assert way_of(Out(encoding="UTF8"), environ) == "true colour"
    assert way_of(Out(encoding="latin-1"), {**environ, "TERM": "xterm-kitty"}) == "kitty"


@pytest.fixture
def window(monkeypatch):
    def set_size(columns: int, lines: int) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(lines))

    set_size(120, 50)
    return set_size


def cells(text: str) -> list[list[tuple[str, str]]]:
    """Colours of the upper and the lower half of each cell, line by line."""
    assert text.endswith("\x1b[0m\n")
    lines = text.removesuffix("\n").split("\n")
    assert all(line.endswith("\x1b[0m") for line in lines)  # no colour runs over into what follows
    return [re.findall(r"\x1b\[38;([\d;]+);48;([\d;]+)m▀", line) for line in lines]


def test_half_blocks_have_the_colours_of_the_picture(window):
    picture = Image.new("RGB", (32, 32), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 16, 32, 32))
    picture.paste((10, 200, 30), (0, 0, 16, 16))
    shown = cells(draw([picture], "true colour"))
    assert len(shown) == MOST_ROWS and {len(line) for line in shown} == {2 * MOST_ROWS}
    assert shown[0][0] == ("2;10;200;30", "2;10;200;30") and shown[0][-1] == ("2;255;0;0", "2;255;0;0")
    assert shown[7][-1] == ("2;255;0;0", "2;255;0;0") and shown[8][0] == ("2;0;0;255", "2;0;0;255")
    assert cells(draw([picture], "256 colours"))[0][-1] == ("5;196", "5;196")  # the cube's pure red


@pytest.mark.parametrize("colour", [(0, 0, 0), (47, 48, 114), (115, 155, 156), (255, 235, 234), (128, 64, 200)])
def test_256_colours_are_the_nearest_of_the_cube(window, colour):
    levels = (0, 95, 135, 175, 215, 255)
    number = int(cells(draw([Image.new("RGB", (4, 4), colour)], "256 colours"))[0][0][0].removeprefix("5;")) - 16
    for found, value in zip((number // 36, number // 6 % 6, number % 6), colour, strict=True):
        assert abs(levels[found] - value) == min(abs(level - value) for level in levels)


@pytest.mark.parametrize("size", [(1, 1), (3000, 20), (20, 3000), (7, 5)])
@pytest.mark.parametrize("terminal", [(120, 50), (20, 10), (2, 2), (0, 0)])
def test_the_size_is_bounded(window, size, terminal):
    window(*terminal)
    shown = cells(draw([Image.new("RGB", size)], "true colour"))
    columns, lines = terminal if all(terminal) else (80, 24)  # what a pseudo-terminal without a size has
    assert 1 <= len(shown) <= max(1, min(MOST_ROWS, lines // 2))
    assert 1 <= len(shown[0]) <= max(1, min(MOST_COLUMNS, columns - 1))


def test_frames_of_a_clip_stand_side_by_side(window):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue", "black")]
    line = cells(draw(frames, "true colour"))[0]
    assert len(line) == MOST_COLUMNS
    assert [line[at][0] for at in (2, 13, 23, 35)] == ["2;255;0;0", "2;0;255;0", "2;0;0;255", "2;0;0;0"]


def test_iterm_is_sent_the_picture(window):
    sent = draw([Image.new("RGB", (640, 320), "red")], "iterm")
    size, width, height, data = re.fullmatch(
        r"\x1b\]1337;File=inline=1;size=(\d+);width=(\d+);height=(\d+):([A-Za-z0-9+/=]+)\x07\n", sent
    ).groups()
    png = base64.b64decode(data)
    assert len(png) == int(size) and (int(width), int(height)) == (40, 10)
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == (480, 240) and image.convert("RGB").getpixel((9, 9)) == (255, 0, 0)


def test_kitty_is_sent_the_picture_in_pieces_and_does_not_answer(window):
    picture = Image.effect_noise((600, 600), 90).convert("RGB")
    sent = draw([picture], "kitty")
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", sent)
    assert sent == "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in pieces) + "\n"
    assert len(pieces) > 2 and all(len(data) <= KITTY_CHUNK for _, data in pieces)
    assert pieces[0][0] == "a=T,f=100,q=2,c=32,r=16,m=1"
    assert {keys for keys, _ in pieces[1:-1]} == {"m=1"} and pieces[-1][0] == "m=0"
    with Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in pieces)))) as image:
        assert image.size == (384, 384)
