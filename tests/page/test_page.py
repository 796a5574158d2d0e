import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from dataset.dataset import Medium
from dataset.template import IGNORE_INDEX, TEMPLATES, encode_record
from model.tokenizer import ChatTokenizer
from page.pieces import Part, pieces_of, token_bytes, token_parts, views_text
from page.render import histogram, tokens_markup, upper_end
from page.text import text_markup, visible
from qwen import QWenTokenizer
from tests.dataset.samples import SHARED, plain, record
from tests.model.families import byte_tokenizer

TEXTS = ("The red car.\n\n  Two\tspaces", "红色的汽车是什么？",
         "龘 😀👨‍👩‍👧 é ß", "<|im_end|> </s> <image", "a\u202eb\x00c")  # fmt: skip


def medium(kind: str, *features: int) -> Medium:
    return Medium(kind=kind, path=Path("x"), features=list(features), name="x")


def sentencepiece_tokenizer() -> ChatTokenizer:
    """As Llama 2's: pieces with "▁" for a space, and bytes for characters that it does not know."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", *"Tthercad.o红", "▁r", "▁re", "▁red"):
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [("▁", "r"), ("▁r", "e"), ("▁re", "d")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<unk>")])
    return ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>",
                                                 unk_token="<unk>"))  # fmt: skip


@pytest.fixture(params=["tiny", "qwen", "bytes", "sentencepiece"])
def any_tokenizer(request, tokenizer, tmp_path):
    if request.param == "qwen":
        if not SHARED.is_dir():
            pytest.skip(f"needs {SHARED}/tokenizer/qwen.tiktoken")
        return QWenTokenizer.from_pretrained(SHARED / "tokenizer")
    makers = {"tiny": lambda: tokenizer, "bytes": lambda: ChatTokenizer(byte_tokenizer()),
              "sentencepiece": sentencepiece_tokenizer}  # fmt: skip
    return makers[request.param]()


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_the_tokens_are_those_of_the_text(any_tokenizer, text):
    ids = any_tokenizer.encode_plain(text)
    assert b"".join(token_bytes(id, any_tokenizer) for id in ids).decode() == text
    parts = token_parts(ids, any_tokenizer)
    assert len(parts) == len(ids)
    seen = ""
    for part in (part for token in parts for part in token):
        if not part.bytes or part.bytes.startswith("1"):  # a character that is divided counts where it begins
            seen += part.text
    assert seen == text


def test_a_character_is_shown_in_each_token_that_has_bytes_of_it(tokenizer):
    first, last = tokenizer.encode_plain("图")  # the small vocabulary holds its first two bytes as one token
    assert token_parts([first, last], tokenizer) == [[Part("图", "1-2/3")], [Part("图", "3/3")]]
    assert token_parts([last, first], tokenizer) == [[Part("\\xbe")], [Part("\\xe5\\x9b")]]
    (a,) = tokenizer.encode_plain("a")
    assert token_parts([a, first, a], tokenizer) == [[Part("a")], [Part("\\xe5\\x9b")], [Part("a")]]
    letters = token_parts(tokenizer.encode_plain("😀"), tokenizer)
    assert letters == [[Part("😀", f"{number}/4")] for number in (1, 2, 3, 4)]


CONTROL = sorted({token for template in TEMPLATES.values() for token in template.control})


@pytest.mark.parametrize("template", TEMPLATES)
def test_pieces_are_the_tokens_of_the_sample(template):
    tokenizer = ChatTokenizer(byte_tokenizer(*CONTROL), template)
    media = [medium("image", 4, 4), medium("video", 2, 2, 2), medium("image", 4)]
    item = record("<image><video>什么?", "红 <|im_end|>", "and <image>", "x", images=["a", "b"], videos=["v"])
    sample = encode_record(item, tokenizer, [8, 6, 4], "Be kind.")
    pieces = pieces_of(sample["input_ids"], sample["labels"], media, tokenizer)
    features = {1: 8, 2: 6, 3: 4}
    shown = [(piece.ids[0], piece.supervised) for piece in pieces for _ in range(features.get(piece.number, 1))]
    labels = [label != IGNORE_INDEX for label in sample["labels"]]
    assert shown == list(zip(sample["input_ids"], labels, strict=True))
    numbered = [(piece.kind, piece.number) for piece in pieces if piece.number]
    assert numbered == [("image", 1), ("video", 2), ("image", 3)]
    control = [piece.parts[0].text for piece in pieces if piece.kind == "control"]
    allowed = {*TEMPLATES[template].control, "</s>"}
    assert control and set(control) <= allowed
    ends = tokenizer.stop_ids[0]
    assert sum(piece.supervised for piece in pieces if piece.kind == "control" and piece.ids == [ends]) == 2
    answer = "".join(part.text for piece in pieces if piece.supervised and piece.kind == "text" for part in piece.parts
                     if not part.bytes or part.bytes[0] == "1")  # fmt: skip
    assert answer.startswith("红 <|im_end|>")  # what data says is no control token


def test_media_and_placeholders_must_agree(tokenizer):
    sample = encode_record(plain("<image>a<image>", images=["a", "b"]), tokenizer, [4, 4])
    for media in ([medium("image", 4)], [medium("image", 4)] * 3, [medium("image", 4), medium("image", 3)]):
        with pytest.raises(ValueError, match="placeholders"):
            pieces_of(sample["input_ids"], sample["labels"], media, tokenizer)


def test_views():
    assert views_text(medium("image", 196)) == "1 x 196 features"
    assert views_text(medium("image", 9, 9, 9)) == "3 views (the whole and 2 tiles): 3 x 9 features"
    assert views_text(medium("video", 4, 4)) == "2 frames: 2 x 4 features"


def test_nothing_stays_invisible():
    assert list(visible("a b\n\tc")) == [
        (False, "a"), (True, "·"), (False, "b"), (True, "¶"), (True, "→"), (False, "c")
    ]  # fmt: skip
    assert list(visible("a b\n", spaces=False)) == [(False, "a b\n")]
    hidden = "".join(text for _, text in visible("\x00\u202e\u200b\u3000\U000e0001\xa0", spaces=False))
    assert hidden == "\\x00\\u202e\\u200b\\u3000\\U000e0001\\xa0"
    assert list(visible("é红ǘ")) == [(False, "é红ǘ")]


# Markup


def test_markup_escapes_and_shortens(tokenizer):
    assert str(text_markup("<b>&\"'</b>\u202e")) == "&lt;b&gt;&amp;&#34;&#39;&lt;/b&gt;<em>\\u202e</em>"
    long = str(text_markup("x" * 50_000))
    assert len(long) < 3000 and "48,000 characters" in long
    sample = encode_record(record("q", "y" * 9000), tokenizer, 0)
    pieces = pieces_of(sample["input_ids"], sample["labels"], [], tokenizer)
    markup = str(tokens_markup(pieces))
    assert f"{len(pieces) - 3000:,} tokens" in markup and markup.count("<wbr>") == 3000
    assert str(tokens_markup(pieces[:200])).count("<wbr>") == 200
    assert str(tokens_markup(pieces_of(tokenizer.encode_plain("<s>"), [1] * 3, [], tokenizer))) == (
        "".join(f"<b title={id}>{text}</b><wbr>" for id, text in
                zip(tokenizer.encode_plain("<s>"), ("&lt;", "s", "&gt;"), strict=True))
    )  # fmt: skip


def test_histogram_counts_every_length():
    rng = random.Random(0)
    lengths = np.array([rng.randint(1, 90) for _ in range(500)] + [5000])
    end = upper_end([lengths, np.array([], int)])
    assert 90 <= end < 500
    drawn = histogram(lengths, end, 60, "token")
    counts = [int(bar["title"].rsplit(": ")[1].replace(",", "")) for bar in drawn["bars"]]
    assert sum(counts) == 501 and drawn["top"] == max(counts) and drawn["longer"]
    for bar in drawn["bars"]:
        span = bar["title"].split(" tokens")[0]
        low, _, high = span.replace(" or more", " to 9999").partition(" to ")
        inside = int(((lengths >= int(low)) & (lengths <= int(high))).sum())
        assert inside == int(bar["title"].rsplit(": ")[1])
        assert bar["over"] == (int(low) > 60)
    assert histogram(lengths, end, end + 1, "token")["limit"] is None
    assert histogram(np.array([], int), upper_end([]), None, "token")["bars"] == []
