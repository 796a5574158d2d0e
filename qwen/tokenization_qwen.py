"""Tokenizer of Qwen-1: byte-level BPE read from a ranks file (`qwen.tiktoken`), on the `tokenizers` backend.

A ranks file has one token per line, its bytes in base64 and its rank: `IQ== 0`. Ranks count up from 0 without gaps; all
256 single bytes are among the tokens. Two neighbours in a word are joined when their concatenation is a token, lowest
rank first. The 208 special tokens take the ids behind the ranks.
"""

import base64
import binascii
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

RANKS_FILE = "qwen.tiktoken"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, TURN_START, TURN_END, PLACEHOLDER = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END, *(f"<|extra_{number}|>" for number in range(205))]
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message.role not in ('system', 'user', 'assistant') -%}
        {{- raise_exception("role must be 'system', 'user' or 'assistant', got '" ~ message.role ~ "'") -}}
    {%- endif -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
    {{- message.content | replace('<image>', '<|extra_0|>') if message.role == 'user' else message.content -}}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Tokens and ranks of a ranks file.

    Raises `ValueError` that names the file, and the line where there is one, if a line is not `base64 rank`, if a token
    occurs twice, if ranks don't count up from 0, or if one of the 256 bytes is missing.
    """
    ranks = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}, line {number}: expected `base64 rank`, got {line[:80]!r}") from error
        if token in ranks or rank != len(ranks):
            raise ValueError(
                f"{path}, line {number}: expected a new token of rank {len(ranks)}, got {token!r} of rank {rank}"
            )
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{path}: all 256 single bytes must be tokens, {len(missing)} are missing: {missing[:8]} ...")
    return ranks


def write_ranks(ranks: dict[bytes, int], path: str | Path) -> None:
    """Writes a ranks file that `read_ranks` reads, through a temporary file beside it."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    tokens = sorted(ranks, key=ranks.get)
    temporary.write_text("".join(f"{base64.b64encode(token).decode()} {ranks[token]}\n" for token in tokens))
    temporary.replace(path)


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Divides text by the published pattern and writes its bytes as characters, as byte-level BPE wants them."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def backend_from_ranks(ranks: dict[bytes, int]) -> Tokenizer:
    """Backend that encodes as the ranks say: NFC, the published pattern, byte-level BPE, the special tokens."""
    characters = bytes_to_unicode()
    names = {token: "".join(characters[byte] for byte in token) for token in ranks}
    # BPE joins the pair that stands first in `merges`, so all pairs that make a token stand there in its rank's place.
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in sorted(ranks, key=ranks.get)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocab = {names[token]: rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=True, special=True) for token in SPECIAL_TOKENS])
    return backend


class QWenTokenizer(PreTrainedTokenizerFast):
    """Tokenizer of Qwen-1, `QWenTokenizer.from_pretrained(folder)`; the folder holds `tokenizer.json` or a ranks file.

    Calling it parses special tokens; `encode_plain` never does, and is the way for text of users and data sets. Chats
    are ChatML. The pad token is `<|endoftext|>`, the end-of-sequence token `<|im_end|>`; generation should stop at
    either (`stop_ids`).
    """

    vocab_files_names = {"vocab_file": RANKS_FILE, "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    template = "chatml"  # how `dataset.template` delimits turns
    begin_ids = ()  # nothing precedes a text

    def __init__(self, vocab_file: str | None = None, tokenizer_file: str | None = None, **kwargs):
        if tokenizer_file is not None:
            self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        elif vocab_file is not None:
            self._tokenizer = backend_from_ranks(read_ranks(vocab_file))
        else:
            raise ValueError(f"QWenTokenizer needs a ranks file ({RANKS_FILE}) or a tokenizer.json, found neither")
        # Published folders name a remote class and leave these tokens open.
        kwargs.pop("auto_map", None)
        defaults = {"eos_token": TURN_END, "pad_token": END_OF_TEXT, "chat_template": CHAT_TEMPLATE}
        kwargs.update({key: value for key, value in defaults.items() if kwargs.get(key) is None})
        super().__init__(**kwargs)

    @classmethod
    def convert_to_native_format(cls, **kwargs) -> dict:
        """Leaves the files to `__init__`, which reads either of them."""
        return kwargs

    @cached_property
    def _plain_backend(self) -> Tokenizer:
        """The same model and normalization without special tokens; shares the vocabulary's memory."""
        plain = Tokenizer(self._tokenizer.model)
        plain.normalizer = self._tokenizer.normalizer
        plain.pre_tokenizer = self._tokenizer.pre_tokenizer
        return plain

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` in which nothing is a special token: `<|im_start|>` is the characters it is made of."""
        return self._plain_backend.encode(text, add_special_tokens=False).ids

    def encode_control(self, text: str) -> list[int]:
        """Ids of `text` in which control tokens are what they stand for; for texts of templates alone."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_without_added_tokens(self, text: str) -> list[int]:
        # The inherited method switches the parsing of special tokens off and on in the backend all threads share.
        return self.encode_plain(text)

    def apply_chat_template(self, conversation, *, tokenize: bool = True, **kwargs):
        """As in transformers, but when tokenizing, control tokens inside messages are plain text by default."""
        kwargs.setdefault("sanitize_control_tokens", tokenize)
        return super().apply_chat_template(conversation, tokenize=tokenize, **kwargs)

    @property
    def eod_id(self) -> int:
        """Id of `<|endoftext|>`."""
        return self.convert_tokens_to_ids(END_OF_TEXT)

    @property
    def im_start_id(self) -> int:
        """Id of `<|im_start|>`."""
        return self.convert_tokens_to_ids(TURN_START)

    @property
    def im_end_id(self) -> int:
        """Id of `<|im_end|>`."""
        return self.convert_tokens_to_ids(TURN_END)

    @property
    def placeholder_id(self) -> int:
        """Id of `<|extra_0|>`, the token that stands for one feature vector."""
        return self.convert_tokens_to_ids(PLACEHOLDER)

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer, for `generate(eos_token_id=...)`."""
        return [self.im_end_id, self.eod_id]


def as_transformers(tokenizer: QWenTokenizer) -> PreTrainedTokenizerFast:
    """The same vocabulary as a class of transformers, for decoders that are not Qwen-1."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_input_names=["input_ids", "attention_mask"],
    )
