"""Trains a small Qwen-1 decoder on the text of the drawn scenes and saves it with its tokenizer.

    python -m pretrain.decoder scenes=data/scenes tokenizer=outputs/scenes/tokenizer output=outputs/scenes/decoder

It learns to copy first: an answer about a described scene is a word looked up in the description, and looking up is
made of the attention heads that copying grows. Without them training stays at "any colour that occurs" for very long.
"""

import random
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING
from torch import Tensor

from config import ConfigError, load_config
from dataprocess.scenes import LANGUAGES, caption, conversation, draw_scene, questions
from dataset.collator import Collator
from dataset.record import read_records
from dataset.template import encode_record
from model.loss import supervised_cross_entropy
from pretrain.loop import LoopConfig, compare, is_done, optimise, save_folder
from qwen import QWenConfig, QWenLMHeadModel, QWenTokenizer

# What suffices for the stage after this one, which goes on learning to look up; existence may still be at chance.
EXPECTED = {"copy": 0.9, "colour": 0.75, "shape": 0.8, "position": 0.8, "existence": 0.5, "count": 0.75}
TEST_CONVERSATIONS = 400


@dataclass
class DecoderConfig(LoopConfig):
    scenes: str = MISSING  # folder that dataprocess.scenes wrote
    tokenizer: str = MISSING  # folder of the tokenizer
    output: str = MISSING  # folder for the decoder
    steps: int = 540  # optimizer steps, those of copying included
    batch_size: int = 96  # conversations a step
    copy_steps: int = 100  # steps at the start in which only sequences are copied
    copy_share: float = 0.15  # share of sequences to copy in the steps after those
    hidden_size: int = 128  # width
    num_layers: int = 4  # layers
    num_heads: int = 4  # attention heads
    seq_length: int = 512  # tokens; beyond, positions are extrapolated


def build(config: DecoderConfig, vocab_size: int) -> QWenLMHeadModel:
    """A decoder with fresh weights."""
    rows = config.hidden_size * 8 // 3 // 16 * 16  # as wide as Qwen-7B's in proportion
    shape = QWenConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        kv_channels=config.hidden_size // config.num_heads,
        intermediate_size=2 * rows,
        seq_length=config.seq_length,
        max_position_embeddings=4 * config.seq_length,
    )
    model = QWenLMHeadModel(shape)
    model.set_attn_implementation("eager")  # on short sequences in bfloat16 a CPU is faster with it
    return model


def mean_loss(model: QWenLMHeadModel, batch: dict[str, Tensor]) -> Tensor:
    """Loss of the answers. Padding stands on the right, where a causal model needs no mask to ignore it."""
    hidden = model.transformer(batch["input_ids"], use_cache=False).last_hidden_state
    return supervised_cross_entropy(hidden, model.lm_head, batch["labels"], chunk_tokens=4096)


@torch.no_grad()
def measure(model: QWenLMHeadModel, tokenizer: QWenTokenizer, copies: list[dict]) -> dict[str, float]:
    """Share of right first tokens of answers by question type, on layouts of the test split, and of copied tokens."""
    model.eval()
    rng, right = random.Random("measure decoder"), defaultdict(list)
    for _ in range(TEST_CONVERSATIONS):
        scene, language = draw_scene(rng, "test"), rng.choice(LANGUAGES)
        asked = questions(scene, rng, language)[:3]
        messages = conversation(asked, caption(scene, language) + "\n")
        hits = correct(model, encode_record({"id": "", "images": [], "messages": messages}, tokenizer, 0))
        for question, hit in zip(asked, hits, strict=True):
            right[question.type].append(hit[0])
            right[language].append(hit[0])
    for record in copies:
        (hit,) = correct(model, encode_record(record, tokenizer, 0))
        right["copy"] += hit[:-1]
    return {name: sum(hits) / len(hits) for name, hits in right.items()}


def correct(model: QWenLMHeadModel, sample: dict) -> list[list[bool]]:
    """For each answer of a conversation, which of its tokens the model predicts from the tokens before."""
    predicted = model(torch.tensor([sample["input_ids"]])).logits[0].argmax(-1).tolist()
    answers, inside = [], False
    for position, label in enumerate(sample["labels"]):
        if label >= 0 and not inside:
            answers.append([])
        inside = label >= 0
        if inside:
            answers[-1].append(predicted[position - 1] == label)
    return answers


def main(config: DecoderConfig) -> None:
    if is_done(config.output, config):
        return
    torch.manual_seed(config.seed)
    tokenizer = QWenTokenizer.from_pretrained(config.tokenizer)
    model, collate = build(config, len(tokenizer)), Collator(tokenizer.pad_token_id)
    texts, copies = (read_records(Path(config.scenes, f"{name}.parquet")) for name in ("text", "copy"))
    rng = random.Random(config.seed)

    def loss_of_step(step: int) -> Tensor:
        share = 1.0 if step < config.copy_steps else config.copy_share
        sources = rng.choices((copies, texts), (share, 1 - share), k=config.batch_size)
        samples = [encode_record(source[rng.randrange(len(source))], tokenizer, 0) for source in sources]
        return mean_loss(model, collate([{**sample, "pixel_values": None} for sample in samples]))

    history = optimise(model, loss_of_step, config, "Decoder")
    figures = measure(model, tokenizer, [copies[index] for index in range(100)])
    compare("The decoder on descriptions of test scenes:", figures, EXPECTED)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    save_folder(config.output, config, {"reached": figures, "history": history}, write)


if __name__ == "__main__":
    try:
        main(load_config(sys.argv[1:], DecoderConfig))
    except (ConfigError, OSError, ValueError) as error:
        sys.exit(f"pretrain.decoder: {error}")
