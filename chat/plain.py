"""Text from outside, without what a terminal would take for commands."""

import re

# C0, DEL and C1: an escape sequence begins with one of them, and so do the ways to move the cursor, ring, or answer.
# The others break lines, or turn the direction of writing of all that follows.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """`text` without control characters, but for line breaks and tabs; halves of surrogate pairs become `?`.

    What a model says, or a file is called, could otherwise move the cursor, change the title or write to the clipboard
    of the terminal that shows it.
    """
    return CONTROLS.sub("", text.encode("utf-8", "replace").decode())


def one_line(text: object) -> str:
    """`plain` text with each run of white space as one blank; of an error for example."""
    return " ".join(plain(str(text)).split())
