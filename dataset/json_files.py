"""JSON and JSONL files -> their values one after the other, in memory bounded by the largest value.

Python's decoder works on a buffer that slides over the file. Where it fails because the buffer ends within a value,
more is read and the value decoded again; so a list of any length costs about what `json.load` takes.

What is wrong with one value alone and lets the reading go on (a line that is not JSON, a key that stands twice in an
object, whose first value `json.load` would drop) comes as a ValueError *in place* of the value; all else is raised.
NaN and Infinity are numbers here, as for `json.load`; they are wrong where a text is expected.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

CHUNK = 1 << 20  # characters that are read at once
# Characters behind a value that must be known before it counts as whole: "1" may go on with "e-5", and an escape or a
# literal that is cut off is reported at its first character.
LOOKAHEAD = 16
# No row of a data set nests deeper; Python itself gives up at a thousand levels, and at fewer when rows pass from
# process to process.
DEEPEST = 100
TOO_DEEP = f"nested deeper than {DEEPEST} levels; expected a row of a data set"
SPACE = re.compile(r"[ \t\n\r]*")
KINDS = {"{": "an object", "[": "a list", '"': "a text"}


class JsonBuffer:
    """What has been read of a JSON file and not yet been taken."""

    def __init__(self, file: TextIO, path: str | Path):
        self.file, self.path = file, path
        self.text, self.position, self.ended = "", 0, False
        self.line, self.column = 1, 1  # of the first character of `text`
        self.start = 0  # where the value taken last begins,
        self.repeated: str | None = None  # and a key that stands twice in an object of it
        self.decode = json.JSONDecoder(object_pairs_hook=self._object).raw_decode

    def peek(self) -> str:
        """The next character that is not white space; "" at the end of the file."""
        while True:
            self.position = SPACE.match(self.text, self.position).end()
            if self.position < len(self.text):
                return self.text[self.position]
            if self.ended:
                return ""
            self._read(CHUNK)

    def take(self, expected: str) -> str:
        """The next character, which must be one of `expected`."""
        character = self.peek()
        if not character or character not in expected:
            raise self.error(f"expected {' or '.join(expected)}", self.position)
        self.position += 1
        return character

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        size = CHUNK
        while True:
            self.repeated = None
            try:
                value, end = self.decode(self.text, self.position)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - LOOKAHEAD
                if self.ended or not cut_off:
                    raise self.error(error.msg, error.pos) from None
            except RecursionError:
                raise self.error("nested too deeply", self.position) from None
            except ValueError as error:  # an integer of thousands of digits
                raise self.error(str(error), self.position) from None
            else:
                if self.ended or end <= len(self.text) - LOOKAHEAD:
                    self.start, self.position = self.position, end
                    return value
            self._read(size)
            size *= 2  # so that a value of any length is decoded a few times only

    def row(self) -> Any:
        """The next value, or a ValueError in place of one that is too deep or has a key twice in one object."""
        value = self.value()
        if self.repeated is not None:
            problem = twice(self.repeated)
        elif too_deep(value, self.text, self.start, self.position):
            problem = TOO_DEEP
        else:
            return value
        line, column = self.place(self.start)
        return ValueError(f"{self.path}, line {line}, column {column}: {problem}")

    def elements(self) -> Iterator[Any]:
        """Elements of the list that comes next."""
        self.take("[")
        if self.peek() == "]":
            self.position += 1
            return
        while True:
            yield self.row()
            if self.take(",]") == "]":
                return

    def keys(self) -> Iterator[str]:
        """Keys of the object that comes next; the caller takes the value of each."""
        self.take("{")
        if self.peek() == "}":
            self.position += 1
            return
        while True:
            if self.peek() != '"':
                raise self.error("expected a key in double quotes", self.position)
            key = self.value()
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return

    def finish(self) -> None:
        """Raises ValueError unless the file ends here."""
        if self.peek():
            raise self.error("expected the end of the file", self.position)

    def expect(self, bracket: str, hint: str) -> None:
        """Raises ValueError unless the file's value begins with `bracket`."""
        character = self.peek()
        if character == bracket:
            return
        wanted = {"{": "a JSON object", "[": "a JSON list"}[bracket]
        if not character:
            raise ValueError(f"{self.path}: the file is empty; expected {wanted}")
        if character not in KINDS:
            self.value()  # raises where it is none at all
        kind = KINDS.get(character, "a single value")
        raise ValueError(f"{self.path}: expected {wanted}, got {kind}{hint}")

    def place(self, position: int) -> tuple[int, int]:
        """Line and column, both from 1, of a position in `text`."""
        lines = self.text.count("\n", 0, position)
        before = self.column - 1 if not lines else -1 - self.text.rfind("\n", 0, position)
        return self.line + lines, before + position + 1

    def error(self, problem: str, position: int) -> ValueError:
        line, column = self.place(position)
        if position >= len(self.text):
            problem += "; the file ends here, was its download cut off?"
        return ValueError(f"{self.path}, line {line}, column {column}: not valid JSON: {problem}")

    def _read(self, size: int) -> None:
        self.line, self.column = self.place(self.position)
        try:
            more = self.file.read(size)
        except UnicodeDecodeError:
            raise ValueError(encoding_problem(self.path)) from None
        self.ended = not more
        self.text, self.position = self.text[self.position :] + more, 0

    def _object(self, pairs: list[tuple[str, Any]]) -> dict:
        result = dict(pairs)
        if len(result) < len(pairs):
            self.repeated = repeated_key(pairs)
        return result


def json_elements(path: str | Path) -> Iterator[Any]:
    """Elements of the list that a JSON file holds.

    Raises:
        ValueError: not JSON (names file, line and column), not UTF-8 (names line and byte), no list.
    """
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        buffer = JsonBuffer(file, path)
        buffer.expect("[", "; JSON lines end in .jsonl")
        yield from buffer.elements()
        buffer.finish()


def json_items(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(key, value) of the object that a JSON file holds, those with equal keys too. Raises as `json_elements` does."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        buffer = JsonBuffer(file, path)
        buffer.expect("{", "")
        for key in buffer.keys():
            yield key, buffer.row()
        buffer.finish()


def first_bracket(path: str | Path) -> str:
    """The character that a JSON file begins with after white space: "{", "[", or whatever else stands there."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        return JsonBuffer(file, path).peek()


def json_lists(path: str | Path, keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(key, element) of the lists under `keys` of the object that a JSON file holds, in the order of the file.

    Raises:
        ValueError: as `json_elements`, and where one of the keys is absent, stands twice or holds no list.
    """
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        buffer = JsonBuffer(file, path)
        buffer.expect("{", "")
        seen, missing = [], list(keys)
        for key in buffer.keys():
            seen.append(key)
            is_list = buffer.peek() == "["
            if key in keys and not is_list:
                raise ValueError(f"{path}: expected a list under {key!r}")
            if key in keys and key not in missing:
                raise ValueError(f"{path}: the key {key!r} stands twice; expected one list under it")
            if key in keys:
                missing.remove(key)
                yield from ((key, element) for element in buffer.elements())
            elif is_list:
                for _ in buffer.elements():  # not of use, and perhaps long
                    pass
            else:
                buffer.value()
        buffer.finish()
    if missing:
        raise ValueError(f"{path}: expected a list under {missing[0]!r}; its keys are {', '.join(seen)!r:.200}")


def json_lines(path: str | Path) -> Iterator[Any]:
    """Values of a JSONL file, one a line, blank lines left out; a ValueError in place of each that can't be read."""
    with open(path, "rb") as file:
        start = 0  # bytes before the line
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if content.strip():
                yield _line_value(content, f"{path}, line {number}", start + len(line) - len(content))
            start += len(line)


def _line_value(content: bytes, where: str, start: int) -> Any:
    """The value of a line that begins at byte `start` of its file, or a ValueError that says what is wrong with it."""
    try:
        text = content.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        return ValueError(not_utf8(where, start + error.start))
    try:
        return parse_json(text, where)
    except ValueError as error:
        return error


def parse_json(text: str, where: str) -> Any:
    """`json.loads` of a line, whose errors (ValueError) begin with `where` and name the column."""
    try:
        value = STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, column {error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{where}: not valid JSON: nested too deeply") from None
    except ValueError as error:  # of `unique_keys`, or an integer of thousands of digits
        raise ValueError(f"{where}: {error}") from None
    if too_deep(value, text, 0, len(text)):
        raise ValueError(f"{where}: {TOO_DEEP}")
    return value


def too_deep(value: Any, text: str, start: int, end: int) -> bool:
    """Whether a value, read from `text[start:end]`, nests deeper than DEEPEST."""
    if text.count("[", start, end) + text.count("{", start, end) <= DEEPEST:
        return False
    level = [value]
    for _ in range(DEEPEST):
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for items in children for child in items if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(twice(repeated_key(pairs)))
    return result


STRICT = json.JSONDecoder(object_pairs_hook=unique_keys)


def repeated_key(pairs: list[tuple[str, Any]]) -> str:
    seen = set()
    return next(key for key, _ in pairs if key in seen or seen.add(key))


def twice(key: str) -> str:
    return f"the key {key!r:.80} stands twice in one object; remove one of them"


def not_utf8(where: str, byte: int) -> str:
    return f"{where}: not UTF-8 at byte {byte} of the file; save it in that encoding"


def encoding_problem(path: str | Path) -> str:
    """Says where the bytes of a file stop being UTF-8: line from 1, byte from 0."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start, line = 0, 1
    with open(path, "rb") as file:
        while True:
            chunk = file.read(CHUNK)
            kept = len(decoder.getstate()[0])  # bytes of a character whose rest is in this chunk
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += chunk[: max(error.start - kept, 0)].count(b"\n")
                return not_utf8(f"{path}, line {line}", start - kept + error.start)
            if not chunk:
                return f"{path}: not UTF-8; save it in that encoding"
            start, line = start + len(chunk), line + chunk.count(b"\n")
