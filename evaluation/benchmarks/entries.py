"""What the readers of benchmarks share: their arguments, checked entries of published files, a question's record."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dataset.rows import IMAGE_PLACEHOLDER, shown

KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object", int | str: "a number or a text"}


class Files(NamedTuple):
    """What a reader reads, and how it asks."""

    data: Path
    annotations: Path | None
    image_root: Path | None
    suffix: dict[str, str]  # language -> what follows the question, or for captions the whole of it; "" for nothing
    split: str | None

    def name(self, number: int | str) -> str:
        """Id of a question's record."""
        return f"{self.data.stem}:{number}"


def field(entry: Any, key: str, kind: Any, where: str) -> Any:
    """The value under `key` of an entry, of a kind in `KINDS`; a text has at least one word.

    Raises:
        ValueError: names `where` (file and entry), the key, what was expected and what stands there.
    """
    if isinstance(entry, ValueError):  # what a row that can't be read comes as
        named = str(entry).startswith(where.partition(",")[0])
        raise entry if named else ValueError(f"{where}: {entry}")
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with the key {key!r}, got {shown(entry)}")
    if key not in entry:
        keys = ", ".join(map(str, entry))
        raise ValueError(f"{where}: expected {KINDS[kind]} under {key!r}, which is not among its keys: {keys:.200}")
    value = entry[key]
    blank = isinstance(value, str) and not value.strip()
    if not isinstance(value, kind) or isinstance(value, bool) or blank:
        raise ValueError(f"{where}: expected {KINDS[kind]} under {key!r}, got {shown(value)}")
    return value


def texts(entry: Any, key: str, where: str) -> list[str]:
    """The list of texts under `key`, one of which at least is not blank; raises as `field` does."""
    values = field(entry, key, list, where)
    if not all(isinstance(value, str) for value in values) or not any(value.strip() for value in values):
        raise ValueError(f"{where}: expected a list of texts under {key!r}, got {shown(values)}")
    return values


def most_frequent(answers: Iterable[str]) -> str:
    """The answer given most often, the first of those; blank ones don't count."""
    return Counter(answer for answer in answers if answer.strip()).most_common(1)[0][0]


def record(name: str, source: str, image: str, question: str, suffix: str, answer: str, /, **meta: Any) -> dict:
    """A question on an image: `<image>`, question and suffix on lines of their own; None among `meta` is left out."""
    lines = [IMAGE_PLACEHOLDER, question.strip(), suffix.strip()]
    return {
        "id": name,
        "source": source,
        "images": [image],
        "messages": [
            {"role": "user", "content": "\n".join(line for line in lines if line)},
            {"role": "assistant", "content": answer.strip()},
        ],
        "meta": {key: value for key, value in meta.items() if value is not None},
    }
