"""Conversations -> token ids, and labels for what the assistant says. `TEMPLATES` says how turns are delimited.

In the template "chatml", which Qwen-1, Qwen2 and Qwen3 use, a conversation is

    <|im_start|>system\\n{system}<|im_end|>\\n
    <|im_start|>user\\n{question}<|im_end|>\\n
    <|im_start|>assistant\\n{answer}<|im_end|>\\n

without the line breaks of this page. Only what stands in a template can be a control token; all text, from data or
users, is encoded as plain text. Headers and contents are encoded apart, as Qwen-7B-Chat was trained, so that a prompt
is an exact prefix of the conversation that continues it.

A tokenizer has, beside `template` (a name in `TEMPLATES`), `encode_plain` and `encode_control` (text -> ids, the latter
reads control tokens), `begin_ids` (what a text begins with), `eos_token` and `placeholder_id`.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from typing import NamedTuple

from dataset.record import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, RecordError

IGNORE_INDEX = -100  # label of a token without loss: the default `ignore_index` of torch's cross entropy
MEDIA = re.compile(f"({re.escape(IMAGE_PLACEHOLDER)}|{re.escape(VIDEO_PLACEHOLDER)})")


class Turn(NamedTuple):
    """What surrounds a content: `header content end tail`. Of an assistant's turn content and end are supervised."""

    header: str
    end: str
    tail: str = ""


class Template(NamedTuple):
    """Turns by role; `{eos}` in them is the tokenizer's end-of-sequence token. `control` are the tokens it needs."""

    control: tuple[str, ...]
    user: Turn
    assistant: Turn
    system: Turn | None  # None: the system's text stands before that of the first user turn


def _turns_of(header: str, end: str, tail: str, assistant: str = "assistant") -> dict[str, Turn]:
    names = {"user": "user", "assistant": assistant, "system": "system"}
    return {role: Turn(header.format(name), end, tail) for role, name in names.items()}


# The first whose control tokens a tokenizer has is the one that its decoder was trained with (`choose_template`).
TEMPLATES = {
    "chatml": Template(("<|im_start|>", "<|im_end|>"), **_turns_of("<|im_start|>{}\n", "<|im_end|>", "\n")),
    "llama3": Template(
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        **_turns_of("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", ""),
    ),
    "gemma": Template(
        ("<start_of_turn>", "<end_of_turn>"),
        **{**_turns_of("<start_of_turn>{}\n", "<end_of_turn>", "\n", assistant="model"), "system": None},
    ),
    "phi3": Template(("<|user|>", "<|assistant|>", "<|end|>"), **_turns_of("<|{}|>\n", "<|end|>", "\n")),
    "mistral": Template(("[INST]", "[/INST]"), Turn("[INST]", "[/INST]"), Turn("", "{eos}"), None),
    "plain": Template((), Turn("User:\n", "\n"), Turn("Assistant:\n", "{eos}", "\n"), Turn("System:\n", "\n")),
}

PLAIN_TEXT = Turn("", "{eos}")  # of a message of role "text", in every template


def media_of(record: dict) -> list[tuple[str, str]]:
    """("image" or "video", path) of each medium of a validated record, in the order of their placeholders."""
    paths = {"image": iter(record["images"]), "video": iter(record["videos"])}
    texts = [turn["content"] for turn in record["messages"] if turn["role"] in ("user", "text")]
    kinds = [part["type"] for text in texts for part in _parts(text) if part["type"] != "text"]
    return [(kind, next(paths[kind])) for kind in kinds]


def choose_template(special_tokens: Sequence[str]) -> str:
    """Name of the template for a tokenizer with these special tokens; "plain" needs none."""
    return next(name for name, template in TEMPLATES.items() if set(template.control) <= set(special_tokens))


def encode_record(
    record: dict, tokenizer, num_features: int | Sequence[int], system: str | None = None
) -> dict[str, list[int]]:
    """Token ids [T] of a conversation and, in the same coordinates, labels [T].

    Every assistant turn is labelled with its own ids, its end token included; all else is `IGNORE_INDEX`. The shift by
    one is left to the loss. Each `<image>` or `<video>` becomes so many times `tokenizer.placeholder_id` as it has
    features. Of a plain text (its only message has role "text") all but the placeholders is labelled.

    Args:
        record: see `dataset.record`. A system turn of its own replaces `system`.
        num_features: features of every image and clip, or of each in the order in which they stand in the text.
        system: text of the system turn; None or "" for none.

    Returns:
        {"input_ids": list of int, "labels": list of int}

    Raises:
        RecordError: nothing supervised (the sample would teach nothing), or the number of `<image>` and `<video>` is
            not that of the media.
    """
    media = len(record["images"]) + len(record["videos"])
    counts = [num_features] * media if isinstance(num_features, int) else num_features
    if len(counts) != media:
        raise ValueError(f"record {record['id']!r} has {media} images and videos, num_features {len(counts)} entries")
    input_ids, labels = list(tokenizer.begin_ids), [IGNORE_INDEX] * len(tokenizer.begin_ids)
    try:
        for role, header, body, tail in _encoded_turns(record["messages"], tokenizer, counts, system):
            input_ids += [*header, *body, *tail]
            supervised = role in ("assistant", "text")
            labels += [IGNORE_INDEX] * len(header)
            labels += [IGNORE_INDEX if not supervised or id == tokenizer.placeholder_id else id for id in body]
            labels += [IGNORE_INDEX] * len(tail)
    except ValueError as error:
        raise RecordError.of(record["id"], "placeholders", str(error)) from error
    if all(label == IGNORE_INDEX for label in labels):
        raise RecordError.of(record["id"], "no supervised token", "no assistant turn, so no token is supervised")
    return {"input_ids": input_ids, "labels": labels}


def encode_prompt(
    messages: Sequence[dict], tokenizer, num_features: int | Sequence[int], system: str | None = None
) -> list[int]:
    """Token ids [T] of a conversation that ends where the assistant's next answer begins.

    The content of a user turn is a string, where `<image>` and `<video>` stand for an image and a clip, or a list of
    parts `{"type": "image"}`, `{"type": "video"}` and `{"type": "text", "text": str}`, where no text can stand for one.
    A single message of role "text" is a plain text to be continued.

    Args:
        num_features: features of every image and clip, or of each in their order.

    Raises:
        ValueError: the last message is not a user's, or `num_features` has not as many entries as there are media.
    """
    if not messages or messages[-1]["role"] not in ("user", "text"):
        raise ValueError(f"a prompt ends with a user turn, got roles {[turn['role'] for turn in messages]}")
    ids = list(tokenizer.begin_ids)
    for role, header, body, tail in _encoded_turns(messages, tokenizer, num_features, system):
        if role == "text":
            return [*ids, *body[: -len(_control(tokenizer, PLAIN_TEXT.end))]]
        ids += [*header, *body, *tail]
    return [*ids, *_control(tokenizer, _turn("assistant", tokenizer).header)]


def _encoded_turns(
    messages: Sequence[dict], tokenizer, num_features: int | Sequence[int], system: str | None
) -> Iterator[tuple[str, tuple[int, ...], list[int], tuple[int, ...]]]:
    """(role, ids of the header, of content and end, of the tail) of each turn.

    Raises:
        ValueError: placeholders and entries of `num_features` differ in number.
    """
    counts = repeat(num_features) if isinstance(num_features, int) else iter(num_features)
    for role, content in _turns(messages, tokenizer.template, system):
        turn = _turn(role, tokenizer)
        body = [*_encode_content(role, content, tokenizer, counts), *_control(tokenizer, turn.end)]
        yield role, _control(tokenizer, turn.header), body, _control(tokenizer, turn.tail)
    if not isinstance(num_features, int) and next(counts, None) is not None:
        raise ValueError(
            f"the text has fewer {IMAGE_PLACEHOLDER} and {VIDEO_PLACEHOLDER} than there are images and videos "
            f"({len(num_features)})"
        )


def _turns(messages: Sequence[dict], template: str, system: str | None) -> Iterator[tuple[str, str | list]]:
    """(role, content) of each turn; `system` comes first unless the messages bring their own."""
    roles = [turn["role"] for turn in messages]
    if system and roles[0] not in ("system", "text"):
        messages = [{"role": "system", "content": system}, *messages]
    before = ""
    for turn in messages:
        role, content = turn["role"], turn["content"]
        if role == "system":
            if content and TEMPLATES[template].system is None:
                before = f"{content}\n\n"
            elif content:
                yield role, content
        elif before and role == "user":
            parts = [{"type": "text", "text": before}]
            yield role, [*parts, *_parts(content)]
            before = ""
        else:
            yield role, content


def _turn(role: str, tokenizer) -> Turn:
    return PLAIN_TEXT if role == "text" else getattr(TEMPLATES[tokenizer.template], role)


@lru_cache(maxsize=64)
def _control(tokenizer, text: str) -> tuple[int, ...]:
    """Ids of text of a template: half the time of encoding short turns would go there."""
    return tuple(tokenizer.encode_control(text.replace("{eos}", tokenizer.eos_token or ""))) if text else ()


def _encode_content(role: str, content: str | list, tokenizer, counts: Iterator[int]) -> list[int]:
    """Ids of a turn's content. Only a user's, and a plain text, hold images and clips, which take the next counts."""
    if role not in ("user", "text"):
        return tokenizer.encode_plain(content)
    ids = []
    for number, part in enumerate(_parts(content)):
        if part["type"] == "text":
            ids += tokenizer.encode_plain(part["text"])
        elif (count := next(counts, None)) is not None:
            ids += [tokenizer.placeholder_id] * count
        else:
            raise ValueError(
                f"the text has more {IMAGE_PLACEHOLDER} and {VIDEO_PLACEHOLDER} than there are images and videos "
                f"(piece {number} of a {role} turn)"
            )
    return ids


def _parts(content: str | list) -> Iterator[dict]:
    """Pieces of a content: `{"type": "text", "text": ...}`, `{"type": "image"}`, `{"type": "video"}`."""
    if isinstance(content, str):
        kinds = {IMAGE_PLACEHOLDER: "image", VIDEO_PLACEHOLDER: "video"}
        for piece in MEDIA.split(content):
            if piece in kinds:
                yield {"type": kinds[piece]}
            elif piece:
                yield {"type": "text", "text": piece}
        return
    for part in content:
        if part["type"] not in ("image", "video", "text"):
            raise ValueError(f"a part of a message is of type 'image', 'video' or 'text', got {part!r:.80}")
        yield part
