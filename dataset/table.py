"""Rows of a table -> parts of records: the simplest form in which data can be brought.

A row of a JSON list, a JSONL or a CSV file has any of the keys `text`, `image`, `video`, `instruction` and `answer`:

| row has | record |
|---|---|
| `instruction`, `answer`, perhaps `text` | user turn: media, instruction, text below it; assistant turn: the answer |
| `answer`, and media or `text` or both | user turn: media, text; assistant turn: the answer |
| `text`, perhaps media | plain text (role "text"), media first: every token of it is learned |

`image` and `video` are a path or, in JSON, a list of paths. Where they stand is written `<image>` and `<video>` in the
instruction or the text, once for each; of a kind that is not written there, all stand first, images before videos.
A cell that is empty or blank, and null in JSON, is absent.
"""

from typing import Any

from dataset.rows import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, RecordError, nearest, shown

MEDIA_KEYS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}
TABLE_KEYS = ("text", "image", "video", "instruction", "answer")


def record_of_row(row: dict[str, Any], name: str) -> dict:
    """`{"images", "videos", "messages"}` of a row; `name` is the id of its record.

    Raises:
        RecordError: an unknown key, a value that is no text (or path), or a row of which nothing can be learned.
    """
    unknown = [key for key in row if key not in TABLE_KEYS]
    if unknown:
        problem = f"unknown key {unknown[0]!r} in a row without messages{nearest(unknown[0], TABLE_KEYS)}"
        raise RecordError.of(name, "fields", problem)
    media = {key: _paths(row.get(key), key, name) for key in MEDIA_KEYS}
    text, instruction, answer = (_text(row.get(key), key, name) for key in ("text", "instruction", "answer"))
    _require_lesson(text, instruction, answer, any(media.values()), name)
    words = "\n".join(part for part in (instruction, text) if part)
    first = "".join(MEDIA_KEYS[key] * len(paths) for key, paths in media.items() if MEDIA_KEYS[key] not in words)
    if answer:
        question = "\n".join(part for part in (first, words) if part)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    else:
        messages = [{"role": "text", "content": first + words}]  # no line break before what is to be learned
    return {"images": media["image"], "videos": media["video"], "messages": messages}


def _require_lesson(text: str, instruction: str, answer: str, media: bool, name: str) -> None:
    """Raises `RecordError` for a row of which nothing can be learned, and says what it lacks."""
    if instruction and not answer:
        problem = "an instruction without an answer; fill in `answer`, or call the words `text` to learn them"
    elif answer and not (instruction or text or media):
        problem = "an answer to nothing; fill in `instruction`, `image`, `video` or `text`, or call the words `text`"
    elif not answer and not text:
        problem = f"{'media without words' if media else 'an empty row'}; fill in `answer` or `text`, or drop the row"
    else:
        return
    raise RecordError.of(name, "nothing to learn", f"nothing can be learned from {problem}")


def _text(value: Any, key: str, name: str) -> str:
    """The text as it is, "" if there is none."""
    if value is None or isinstance(value, str) and not value.strip():
        return ""
    if not isinstance(value, str):
        problem = f"{key} must be text, got {shown(value)}; write it in quotes, or null for none"
        raise RecordError.of(name, "fields", problem)
    return value


def _paths(value: Any, key: str, name: str) -> list[str]:
    paths = value if isinstance(value, list) else [value] if _text(value, key, name) else []
    if not all(isinstance(path, str) and path.strip() for path in paths):
        raise RecordError.of(name, "fields", f"{key} must be a path or a list of paths, got {shown(value)}")
    return paths
