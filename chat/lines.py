"""Lines that a user types, edited, remembered and completed by readline, and paths as shells and desktops write them.

A text of several lines stands between two lines of three quotes; pasted lines stay together by themselves where the
terminal marks what is pasted.
"""

import os
import shlex
from collections.abc import Collection
from pathlib import Path
from urllib.parse import unquote, urlsplit

QUOTES = '"""'
KEPT = 1000  # lines of the history file
SPECIAL = set(" \t\"'\\$&|;<>()*?[]{}!#`~")  # what a shell's user, and so the completion, writes a backslash before


def history_file() -> Path:
    """Where typed lines are kept: the place for state that https://specifications.freedesktop.org/basedir/ names."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home, "kanjian", "history")


class Lines:
    """Reads from standard input, a terminal.

    Args:
        commands: what completion knows at the beginning of a line.
        with_paths: those of them that paths follow.
        history: file of what was typed in earlier conversations; None: none is kept.
    """

    def __init__(self, commands: Collection[str], with_paths: Collection[str], history: Path | None = None):
        self.commands, self.with_paths, self.history = sorted(commands), set(with_paths), history
        self._matches: list[str] = []
        try:
            import readline  # not at the top: it may write to the terminal, which is for conversations alone
        except ImportError:  # Windows
            self._readline = None
            return
        self._readline = readline
        readline.set_completer(self._complete)
        readline.set_completer_delims(" /")  # what is listed is then the last part of a path, not all of it
        is_libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
        if history is not None:
            try:
                readline.read_history_file(history)
            except OSError:  # none yet, or a home that can't be read: the conversation does without
                pass

    def read(self, prompt: str, begin: str = "") -> str:
        """A line, or the text between two lines of `QUOTES`, without them.

        Args:
            begin: what already stands there, to be changed.

        Raises:
            EOFError: the input has ended.
            KeyboardInterrupt: Ctrl-C.
        """
        line = self._line(prompt, begin)
        if not line.strip().startswith(QUOTES):
            return line
        text = line.strip().removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + self._line("... ")
        return text.rstrip().removesuffix(QUOTES).strip("\n")

    def _line(self, prompt: str, begin: str = "") -> str:
        if self._readline is not None:
            self._readline.set_startup_hook(lambda: self._readline.insert_text(begin))
        line = input(prompt)
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # bytes that are no UTF-8

    def close(self) -> None:
        """Writes the history, for its owner alone to read."""
        if self._readline is None or self.history is None:
            return
        try:
            self.history.parent.mkdir(parents=True, exist_ok=True)
            self.history.touch(mode=0o600)
            self._readline.set_history_length(KEPT)
            self._readline.write_history_file(self.history)
        except OSError:  # as in reading it
            pass

    def _complete(self, _: str, number: int) -> str | None:
        """What readline calls with 0, 1, 2, ... until None: what may stand from `get_begidx` on."""
        if number == 0:
            before = self._readline.get_line_buffer()[: self._readline.get_endidx()]
            done = self._readline.get_begidx() - last_word(before)[0]
            self._matches = [match[done:] for match in self.completions(before)]
        return self._matches[number] if number < len(self._matches) else None

    def completions(self, before: str) -> list[str]:
        """What the last word of a line may become; each begins with the word as it is."""
        if " " not in before:
            return [f"{command} " for command in self.commands if before and command.startswith(before)]
        if before.split(" ")[0] not in self.with_paths:
            return []
        start, quote, escapes = last_word(before)
        if escapes:
            return []
        word = before[start:]
        value = "".join(shlex.split(word + quote))
        folder, _, stem = value.rpartition("/")
        folder = os.path.expanduser(f"{folder}/") if "/" in value else "."
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except (OSError, ValueError):
            return []
        found = []
        for entry in entries:
            name = entry.name
            if name.startswith(stem) and name.isprintable() and (stem or not name.startswith(".")):
                end = "/" if entry.is_dir() else f"{quote} "
                found.append(word + _quoted(name[len(stem) :], quote) + end)
        return found


def last_word(line: str) -> tuple[int, str, bool]:
    """Where the last word of a line begins, as a shell sees words, the quote that is open, and an escape likewise."""
    start, quote, escapes = 0, "", False
    for position, letter in enumerate(line):
        if escapes:
            escapes = False
        elif letter == "\\" and quote != "'":
            escapes = True
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter == " ":
            start = position + 1
    return start, quote, escapes


def _quoted(text: str, quote: str) -> str:
    if quote == "'":
        return text.replace("'", "'\\''")
    special = SPECIAL if not quote else set('"\\')
    return "".join(f"\\{letter}" if letter in special else letter for letter in text)


def paths_in(text: str) -> list[str]:
    """Paths as they are typed, completed, or dropped on a terminal: quoted, escaped, `~`, `file://`.

    What names a file as it stands needs no quotes.

    Raises:
        ValueError: no path, or a quote without its partner.
    """
    text = text.strip()
    if os.path.isfile(whole := os.path.expanduser(text)):
        return [whole]
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{text}: {error}; write a backslash before a quote that belongs to a name") from None
    if not words:
        raise ValueError("name a file")
    return [_path(word) for word in words]


def path_in(text: str) -> str:
    """The one path of `text`; otherwise as `paths_in`."""
    paths = paths_in(text)
    if len(paths) > 1:
        raise ValueError(f"{text}: that is more than one file; put a name with blanks in quotes")
    return paths[0]


def _path(word: str) -> str:
    if word.startswith("file://"):
        return unquote(urlsplit(word).path)
    return os.path.expanduser(word)
