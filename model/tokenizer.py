"""Tokenizers of decoders, as the rooms of this project use them."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dataset.template import TEMPLATES, choose_template
from qwen import QWenConfig, QWenTokenizer
from visual.weights import check_place

# The first that a tokenizer has stands for a feature; one that has none gets the first.
PLACEHOLDERS = ("<image>", "<|image_pad|>", "<|extra_0|>")


class ChatTokenizer:
    """A fast tokenizer of transformers with what `dataset.template` and generation need beside.

    Args:
        tokenizer: of any decoder; it gets a placeholder token if it has none, and where it has no pad token the
            end-of-sequence token serves as one.
        template: a name in `dataset.template.TEMPLATES`; None is the one whose control tokens the tokenizer has.

    Raises:
        ValueError: the tokenizer is not a fast one, has no end-of-sequence token, lacks a control token of the
            template, or makes a control token of plain text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None):
        name = tokenizer.name_or_path
        if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
            raise ValueError(f"{name}: a {type(tokenizer).__name__} has no tokenizer.json; convert it to a fast one")
        tokenizer._tokenizer = _without_prefix(tokenizer.backend_tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{name}: its tokenizer has no end-of-sequence token; set eos_token in its settings")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        vocabulary = tokenizer.get_vocab()
        self.placeholder = next((token for token in PLACEHOLDERS if token in vocabulary), PLACEHOLDERS[0])
        tokenizer.add_tokens([self.placeholder], special_tokens=True)  # nothing where it is one already
        self.hf = tokenizer
        self.template = template or choose_template(list(vocabulary))
        if self.template not in TEMPLATES:
            raise ValueError(f"unknown template {template!r}; choose one of {', '.join(TEMPLATES)}")
        if lacking := [token for token in TEMPLATES[self.template].control if token not in vocabulary]:
            raise ValueError(
                f"{name}: template {self.template!r} needs the tokens {', '.join(lacking)}, which its tokenizer lacks; "
                f'"plain" needs none'
            )
        self._check_plain()

    @classmethod
    def from_pretrained(cls, path: str | Path, template: str | None = None) -> Self:
        """Tokenizer of a folder or hub id; raises OSError where there is none, ValueError where it is unusable."""
        check_place(path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no usable tokenizer there: {' '.join(str(error).split())}") from error
        return cls(tokenizer, template)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` in which nothing is a control token."""
        return self._plain_backend.encode(text, add_special_tokens=False).ids

    def encode_control(self, text: str) -> list[int]:
        """Ids of `text` in which control tokens are what they stand for."""
        return self.hf.encode(text, add_special_tokens=False)

    @cached_property
    def _plain_backend(self) -> Tokenizer:
        """The same model and normalization without special tokens; shares the vocabulary's memory."""
        backend = self.hf.backend_tokenizer
        plain = Tokenizer(backend.model)
        if backend.normalizer is not None:
            plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            plain.pre_tokenizer = backend.pre_tokenizer
        return plain

    def _check_plain(self) -> None:
        special = {id: token.content for id, token in self.hf.added_tokens_decoder.items() if token.special}
        special.pop(self.hf.unk_token_id, None)  # which is what unknown characters become
        for text in special.values():
            if special.keys() & set(self.encode_plain(text)):
                raise ValueError(
                    f"{self.hf.name_or_path}: its tokenizer makes a control token of the plain text {text!r}, so that "
                    "texts could smuggle it in; this kind of tokenizer is not supported"
                )

    @cached_property
    def begin_ids(self) -> list[int]:
        """What every text begins with: the beginning-of-sequence token where the tokenizer sets one."""
        ids = self.hf.encode("")
        return ids[:1] if ids[:1] == [self.hf.bos_token_id] else []

    @property
    def placeholder_id(self) -> int:
        """Id of the token that stands for one feature vector."""
        return self.hf.convert_tokens_to_ids(self.placeholder)

    @property
    def eos_token(self) -> str:
        return self.hf.eos_token

    @property
    def pad_token_id(self) -> int:
        return self.hf.pad_token_id

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: what ends an assistant's turn, and the end of the sequence."""
        end = self.encode_control(TEMPLATES[self.template].assistant.end.replace("{eos}", self.eos_token))
        return list(dict.fromkeys([end[-1], self.hf.eos_token_id]))

    def __len__(self) -> int:
        """One more than the highest id."""
        return max(self.hf.get_vocab().values()) + 1

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **kwargs) -> str:
        return self.hf.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in rows]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the files that `AutoTokenizer` reads, the placeholder included."""
        self.hf.save_pretrained(folder)


def _without_prefix(backend: Tokenizer) -> Tokenizer:
    """The same tokenizer without the "▁" that sentencepiece puts before a text: pieces of a prompt are no texts."""
    settings = json.loads(backend.to_str())
    normalizer, pre_tokenizer = settings["normalizer"] or {}, settings["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kept = [step for step in steps if step["type"] != "Prepend"]
    metaspaces = [s for s in pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if s.get("type") == "Metaspace"]
    if kept == steps and not metaspaces:
        return backend
    settings["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for step in metaspaces:
        step["prepend_scheme"] = "never"
    return Tokenizer.from_str(json.dumps(settings))


def load_tokenizer(path: str | Path, model_type: str, template: str | None = None) -> QWenTokenizer | ChatTokenizer:
    """The tokenizer of a decoder of `model_type` (in its `config.json`), from a folder or hub id.

    Raises:
        OSError: no tokenizer there.
        ValueError: it can't be used, see `ChatTokenizer`; or a template that Qwen-1 does not have.
    """
    if model_type != QWenConfig.model_type:
        return ChatTokenizer.from_pretrained(path, template)
    if template not in (None, QWenTokenizer.template):
        raise ValueError(f"Qwen-1 knows the template {QWenTokenizer.template!r} alone, got {template!r}")
    return QWenTokenizer.from_pretrained(path)


def rows_needed(tokenizer: QWenTokenizer | ChatTokenizer) -> int:
    """Rows that embeddings need for every token that a sample can have: text, and control tokens of the template.

    A tokenizer may have further special tokens, of which no text is made.
    """
    turns = [turn for turn in TEMPLATES[tokenizer.template][1:] if turn is not None]
    texts = [part.replace("{eos}", tokenizer.eos_token) for turn in turns for part in turn]
    control = [token for text in texts for token in tokenizer.encode_control(text)]
    special = [tokenizer.placeholder_id, tokenizer.pad_token_id, *tokenizer.stop_ids, *tokenizer.begin_ids]
    return 1 + max([*control, *special])
