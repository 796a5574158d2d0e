"""ChatML with images: messages -> token ids, and labels for what the assistant says.

    <|im_start|>system\\n{system}<|im_end|>\\n
    <|im_start|>user\\n{question}<|im_end|>\\n
    <|im_start|>assistant\\n{answer}<|im_end|>\\n

without the line breaks of this page. Control tokens are written as ids; all text, from data or users, is encoded as
plain text. Headers and contents are encoded apart, as Qwen-7B-Chat was trained, so that a prompt is an exact prefix of
the conversation that continues it.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

from dataset.record import IMAGE_PLACEHOLDER, RecordError

IGNORE_INDEX = -100  # label of a token without loss: the default `ignore_index` of torch's cross entropy


def encode_record(record: dict, tokenizer, num_features: int, system: str | None = None) -> dict[str, list[int]]:
    """Token ids [T] of a conversation and, in the same coordinates, labels [T].

    Every assistant turn is labelled with its own ids, its `<|im_end|>` included; all else is `IGNORE_INDEX`. The shift
    by one is left to the loss. Each `<image>` of a user turn becomes `num_features` times `tokenizer.placeholder_id`.

    Args:
        record: see `dataset.record`. A system turn of its own replaces `system`.
        system: text of the system turn; None or "" for none.

    Returns:
        {"input_ids": list of int, "labels": list of int}

    Raises:
        RecordError: no assistant turn (the sample would teach nothing), or the number of `<image>` differs from
            the number of images.
    """
    input_ids, labels, images = [], [], 0
    for role, content in _turns(record["messages"], system):
        header = _header(role, tokenizer)
        body, count = _encode_content(role, content, tokenizer, num_features)
        body.append(tokenizer.im_end_id)
        tail = list(_constant(tokenizer, "\n"))
        input_ids += header + body + tail
        supervised = body if role == "assistant" else [IGNORE_INDEX] * len(body)
        labels += [IGNORE_INDEX] * len(header) + supervised + [IGNORE_INDEX] * len(tail)
        images += count
    if images != len(record["images"]):
        problem = f"{images} {IMAGE_PLACEHOLDER} in its user turns for {len(record['images'])} images"
        raise RecordError.of(record["id"], "placeholders", problem)
    if all(label == IGNORE_INDEX for label in labels):
        raise RecordError.of(record["id"], "no supervised token", "no assistant turn, so no token is supervised")
    return {"input_ids": input_ids, "labels": labels}


def encode_prompt(
    messages: Sequence[dict], tokenizer, num_features: int, system: str | None = None
) -> list[int]:
    """Token ids [T] of a conversation that ends where the assistant's next answer begins.

    The content of a user turn is a string, where `<image>` stands for an image, or a list of parts
    `{"type": "image"}` and `{"type": "text", "text": str}`, where no text can stand for an image.

    Raises:
        ValueError: the last message is not a user's.
    """
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"a prompt ends with a user turn, got roles {[turn['role'] for turn in messages]}")
    ids = []
    for role, content in _turns(messages, system):
        body, _ = _encode_content(role, content, tokenizer, num_features)
        ids += [*_header(role, tokenizer), *body, tokenizer.im_end_id, *_constant(tokenizer, "\n")]
    return ids + _header("assistant", tokenizer)


def _turns(messages: Sequence[dict], system: str | None) -> Iterator[tuple[str, str | list]]:
    """(role, content) of each turn; `system` comes first unless the messages bring their own."""
    if system and messages[0]["role"] != "system":
        yield "system", system
    for turn in messages:
        if turn["role"] != "system" or turn["content"]:
            yield turn["role"], turn["content"]


def _header(role: str, tokenizer) -> list[int]:
    return [tokenizer.im_start_id, *_constant(tokenizer, f"{role}\n")]


@lru_cache(maxsize=32)
def _constant(tokenizer, text: str) -> tuple[int, ...]:
    """Ids of text that is the same in every conversation: half the time of encoding short turns would go there."""
    return tuple(tokenizer.encode_plain(text))


def _encode_content(role: str, content: str | list, tokenizer, num_features: int) -> tuple[list[int], int]:
    """Ids of a turn's content and the number of images in it. Only a user's content holds images."""
    ids, images = [], 0
    for text in _parts(content) if role == "user" else [content]:
        if text is None:
            ids += [tokenizer.placeholder_id] * num_features
            images += 1
        else:
            ids += tokenizer.encode_plain(text)
    return ids, images


def _parts(content: str | list) -> Iterator[str | None]:
    """Pieces of text, with None for an image."""
    if isinstance(content, str):
        for number, text in enumerate(content.split(IMAGE_PLACEHOLDER)):
            if number > 0:
                yield None
            if text:
                yield text
        return
    for part in content:
        if part["type"] not in ("image", "text"):
            raise ValueError(f"a part of a message is of type 'image' or 'text', got {part!r:.80}")
        yield part["text"] if part["type"] == "text" else None
