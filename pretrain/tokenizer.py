"""Makes a small Qwen-1 tokenizer in which every word of the drawn scenes is one token.

    python -m pretrain.tokenizer scenes=data/scenes output=outputs/scenes/tokenizer
    python -m pretrain.tokenizer scenes=[data/scenes,data/moving] output=outputs/moving/tokenizer
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from config import ConfigError, load_config
from qwen import QWenTokenizer
from qwen.tokenization_qwen import RANKS_FILE, pre_tokenizer, write_ranks


@dataclass
class TokenizerConfig:
    scenes: list[str] = MISSING  # folders that dataprocess.scenes and dataprocess.moving wrote
    output: str = MISSING  # folder for the tokenizer, replaced as a whole


def train_ranks(words: list[str]) -> dict[bytes, int]:
    """Byte-level BPE ranks by which each word of the list, standing alone or in a text, is one token.

    The characters of Chinese words come first and often, so that bytes join into characters before characters into
    words: a text without spaces then falls into the words of the list.
    """
    characters = sorted({character for word in words for character in word if not character.isascii()})
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,  # no limit: merging ends when every word is whole
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*words * 2, *characters * 1000], trainer)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    by_rank = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    return {bytes(byte_of[character] for character in token): rank for rank, (token, _) in enumerate(by_rank)}


def make_tokenizer(config: TokenizerConfig) -> None:
    """Writes the ranks file and what `QWenTokenizer.from_pretrained` wants beside it."""
    files = [Path(folder, "words.txt") for folder in config.scenes]
    words = sorted({word for file in files for word in file.read_text(encoding="utf-8").rstrip("\n").split("\n")})
    output = Path(config.output)
    staged = output.with_name(output.name + ".tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    write_ranks(train_ranks(words), staged / RANKS_FILE)
    tokenizer = QWenTokenizer.from_pretrained(staged)
    tokenizer.save_pretrained(staged)
    shutil.rmtree(output, ignore_errors=True)
    os.replace(staged, output)
    print(f"{output}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    try:
        make_tokenizer(load_config(sys.argv[1:], TokenizerConfig))
    except (ConfigError, OSError, ValueError) as error:
        sys.exit(f"pretrain.tokenizer: {error}")
