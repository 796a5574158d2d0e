"""The tokens of a sample in a form that can be read: text of each token, media folded."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from transformers.convert_slow_tokenizer import bytes_to_unicode

from dataset.dataset import Medium
from dataset.template import IGNORE_INDEX

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how sentencepiece writes a token that is one byte


class Part(NamedTuple):
    """Of a token's text: characters, or one of which the token has but some bytes (`"1/3"`: the first of three)."""

    text: str
    bytes: str = ""


class Piece(NamedTuple):
    """A token, or the placeholders of an image or a clip."""

    kind: str  # "text", "control", "image" or "video"
    supervised: bool
    parts: list[Part]
    ids: list[int]  # of a medium that of the placeholder, once
    number: int = 0  # of an image or a clip: which one of the record, from 1


def pieces_of(input_ids: Sequence[int], labels: Sequence[int], media: Sequence[Medium], tokenizer) -> list[Piece]:
    """Of a whole sample; `media` in the order of their placeholders. Pieces and tokens are one to one but for media.

    Raises:
        ValueError: the placeholders are not those of the media.
    """
    # Templates write single-purpose tokens, and `begin_ids` too; texts never hold any.
    control = {id for id, token in _hf(tokenizer).added_tokens_decoder.items() if token.special}
    control -= {_hf(tokenizer).unk_token_id}  # what unknown characters of a text become
    control |= {tokenizer.placeholder_id}
    pieces: list[Piece] = []
    rest, position = list(media), 0
    for is_control, run in groupby(input_ids, key=control.__contains__):
        run = list(run)
        own = labels[position : position + len(run)]
        position += len(run)
        if not is_control:
            texts = token_parts(run, tokenizer)
            pieces += [
                Piece("text", label != IGNORE_INDEX, parts, [id])
                for id, label, parts in zip(run, own, texts, strict=True)
            ]
            continue
        for id, tokens in groupby(zip(run, own, strict=True), key=lambda token: token[0]):
            tokens = list(tokens)
            if id == tokenizer.placeholder_id:
                pieces += _media(len(tokens), rest, len(media), id)
            else:
                name = _hf(tokenizer).convert_ids_to_tokens(id)
                pieces += [Piece("control", label != IGNORE_INDEX, [Part(name)], [id]) for _, label in tokens]
    if any(sum(medium.features) for medium in rest):
        raise ValueError(f"{len(rest)} images and clips have no placeholders")
    return pieces


def _media(placeholders: int, rest: list[Medium], total: int, id: int) -> Iterator[Piece]:
    """Takes the media that so many placeholders stand for from the beginning of `rest`."""
    while placeholders > 0 and rest:
        medium = rest.pop(0)
        placeholders -= sum(medium.features)
        yield Piece(medium.kind, False, [Part(features_text(medium))], [id], total - len(rest))
    if placeholders:
        raise ValueError(f"there are {abs(placeholders)} placeholders too {'many' if placeholders > 0 else 'few'}")


def features_text(medium: Medium) -> str:
    """`<image> x 980`: features of all views of an image or a clip."""
    return f"<{medium.kind}> x {sum(medium.features):,}"


def views_text(medium: Medium) -> str:
    """`5 views (the whole and 4 tiles): 5 x 196 features`"""
    views = len(medium.features)
    sizes = " + ".join(f"{len(list(group))} x {features:,}" for features, group in groupby(medium.features))
    if medium.kind == "video":
        return f"{views} frame{'s' if views > 1 else ''}: {sizes} features"
    return f"{views} views (the whole and {views - 1} tiles): {sizes} features" if views > 1 else f"{sizes} features"


def token_parts(ids: Sequence[int], tokenizer) -> list[list[Part]]:
    """The text of each of these tokens, which follow each other.

    A character whose bytes are divided among tokens is shown in each of them. Bytes that form no character at all are
    written `\\xe7`.
    """
    pieces = [token_bytes(id, tokenizer) for id in ids]
    parts: list[list[Part]] = [[] for _ in pieces]
    ends, end = [], 0
    for piece in pieces:
        end += len(piece)
        ends.append(end)
    token, start = 0, 0
    for character in b"".join(pieces).decode("utf-8", "surrogateescape"):
        stray = "\udc80" <= character <= "\udcff"
        size = 1 if stray else len(character.encode())
        text = f"\\x{ord(character) - 0xDC00:02x}" if stray else character
        while ends[token] <= start:
            token += 1
        if start + size <= ends[token]:
            _append(parts[token], text)
        else:
            first, place = token, start
            while place < start + size:
                if ends[first] > place:
                    last = min(ends[first], start + size)
                    numbers = f"{place - start + 1}" + (f"-{last - start}" if last - place > 1 else "")
                    parts[first].append(Part(text, f"{numbers}/{size}"))
                    place = last
                first += 1
        start += size
    return parts


def _append(parts: list[Part], text: str) -> None:
    if parts and not parts[-1].bytes:
        parts[-1] = Part(parts[-1].text + text)
    else:
        parts.append(Part(text))


def token_bytes(id: int, tokenizer) -> bytes:
    """What a token stands for, as UTF-8 that may begin or end within a character."""
    token, hf = _hf(tokenizer).convert_ids_to_tokens(id), _hf(tokenizer)
    if id in _added(hf):
        return token.encode()
    if _is_byte_level(hf):
        table = _byte_of()
        return b"".join(bytes([table[letter]]) if letter in table else letter.encode() for letter in token)
    if match := BYTE.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()


@lru_cache(maxsize=8)
def _added(hf) -> frozenset[int]:
    """Ids of tokens that are written as they are."""
    return frozenset(hf.added_tokens_decoder)


@lru_cache(maxsize=8)
def _is_byte_level(hf) -> bool:
    """Whether tokens are written in the 256 letters that stand for bytes."""
    decoder = hf.backend_tokenizer.decoder
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    return "ByteLevel" in [state.get("type"), *(step["type"] for step in state.get("decoders", []))]


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def _hf(tokenizer):
    """The tokenizer of transformers within."""
    return getattr(tokenizer, "hf", tokenizer)
