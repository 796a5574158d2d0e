"""Trains a small decoder on the text of the drawn scenes and saves it with its tokenizer.

    python -m pretrain.decoder scenes=data/scenes tokenizer=outputs/scenes/tokenizer output=outputs/scenes/decoder
    python -m pretrain.decoder ... output=outputs/decoders/gpt2 architecture=gpt2

It learns to copy first: an answer about a described scene is a word looked up in the description, and looking up is
made of the attention heads that copying grows. Without them training stays at "any colour that occurs" for very long.
"""

import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from omegaconf import MISSING
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from config import ConfigError, load_config
from dataprocess.scenes import LANGUAGES, caption, conversation, draw_scene, questions
from dataset.collator import Collator
from dataset.record import read_records
from dataset.template import encode_record
from model.loss import supervised_cross_entropy
from pretrain.loop import LoopConfig, compare, is_done, optimise, save_folder
from qwen import QWenConfig, QWenLMHeadModel, QWenTokenizer
from qwen.tokenization_qwen import as_transformers

# What suffices for the stage after this one, which goes on learning to look up; existence may still be at chance.
EXPECTED = {"copy": 0.9, "colour": 0.75, "shape": 0.8, "position": 0.8, "existence": 0.5, "count": 0.75}
EXPECTED_OF_CLIPS = {"copy": 0.9, "all": 0.9}
TEST_CONVERSATIONS = 400


@dataclass
class DecoderConfig(LoopConfig):
    scenes: str = MISSING  # folder that dataprocess.scenes wrote
    moving: str | None = None  # folder that dataprocess.moving wrote; whose conversations are learned instead
    tokenizer: str = MISSING  # folder of the tokenizer
    output: str = MISSING  # folder for the decoder
    architecture: Literal["qwen", "qwen2", "gpt2"] = "qwen"  # Qwen-1, or a class of transformers
    steps: int = 540  # optimizer steps, those of copying included
    batch_size: int = 96  # conversations a step
    copy_steps: int = 100  # steps at the start in which only sequences are copied
    copy_share: float = 0.15  # share of sequences to copy in the steps after those
    hidden_size: int = 128  # width
    num_layers: int = 4  # layers
    num_heads: int = 4  # attention heads
    seq_length: int = 512  # tokens; beyond, Qwen-1 extrapolates positions


def _qwen(config: DecoderConfig) -> dict:
    return {
        "kv_channels": config.hidden_size // config.num_heads,
        "intermediate_size": 2 * _mlp_rows(config),
        "seq_length": config.seq_length,
        "max_position_embeddings": 4 * config.seq_length,
    }


def _qwen2(config: DecoderConfig) -> dict:
    return {
        "num_key_value_heads": config.num_heads,
        "intermediate_size": _mlp_rows(config),
        "max_position_embeddings": config.seq_length,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _gpt2(config: DecoderConfig) -> dict:
    return {
        "n_positions": config.seq_length,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
        "resid_pdrop": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }


# Configuration, class, and what each calls in its own way.
ARCHITECTURES = {
    "qwen": (QWenConfig, QWenLMHeadModel, _qwen),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, _qwen2),
    "gpt2": (GPT2Config, GPT2LMHeadModel, _gpt2),
}


def _mlp_rows(config: DecoderConfig) -> int:
    return config.hidden_size * 8 // 3 // 16 * 16  # as wide as Qwen-7B's in proportion


def build(config: DecoderConfig, tokenizer: QWenTokenizer) -> PreTrainedModel:
    """A decoder with fresh weights."""
    config_class, model_class, own = ARCHITECTURES[config.architecture]
    shape = config_class(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        **own(config),
    )
    model = model_class(shape)
    model.set_attn_implementation("eager")  # on short sequences in bfloat16 a CPU is faster with it
    return model


def mean_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Loss of the answers. Padding stands on the right, where a causal model needs no mask to ignore it."""
    hidden = model.base_model(batch["input_ids"], use_cache=False).last_hidden_state
    return supervised_cross_entropy(hidden, model.get_output_embeddings(), batch["labels"], chunk_tokens=4096)


def unseen_conversations() -> Iterator[dict]:
    """Described layouts of the test split; `meta` has the type of each question and the language."""
    rng = random.Random("measure decoder")
    for _ in range(TEST_CONVERSATIONS):
        scene, language = draw_scene(rng, "test"), rng.choice(LANGUAGES)
        asked = questions(scene, rng, language)[:3]
        messages = conversation(asked, caption(scene, language) + "\n")
        meta = {"types": [question.type for question in asked], "language": language}
        yield {"id": "", "images": [], "videos": [], "messages": messages, "meta": meta}


@torch.no_grad()
def measure(
    model: PreTrainedModel, tokenizer: QWenTokenizer, copies: Iterable[dict], described: Iterable[dict]
) -> dict[str, float]:
    """Share of right first tokens of answers about descriptions, by question type where known, and of copied tokens."""
    model.eval()
    right = defaultdict(list)
    for record in described:
        hits = [hit[0] for hit in correct(model, encode_record(record, tokenizer, 0))]
        right["all"] += hits
        if record["meta"]:
            right[record["meta"]["language"]] += hits
            for name, hit in zip(record["meta"]["types"], hits, strict=True):
                right[name].append(hit)
    for record in copies:
        (hit,) = correct(model, encode_record(record, tokenizer, 0))
        right["copy"] += hit[:-1]
    return {name: sum(hits) / len(hits) for name, hits in right.items()}


def correct(model: PreTrainedModel, sample: dict) -> list[list[bool]]:
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
    model, collate = build(config, tokenizer), Collator(tokenizer.pad_token_id)
    copies = read_records(Path(config.scenes, "copy.parquet"))
    texts = read_records(Path(config.moving or config.scenes, "text.parquet"))
    held_out = TEST_CONVERSATIONS if config.moving else 0  # layouts of test scenes are in no text
    learned = texts[held_out:]
    rng = random.Random(config.seed)

    def loss_of_step(step: int) -> Tensor:
        share = 1.0 if step < config.copy_steps else config.copy_share
        drawn = rng.choices((copies, learned), (share, 1 - share), k=config.batch_size)
        samples = [encode_record(source[rng.randrange(len(source))], tokenizer, 0) for source in drawn]
        return mean_loss(model, collate([{**sample, "pixel_values": None, "view_features": []} for sample in samples]))

    history = optimise(model, loss_of_step, config, "Decoder")
    if config.moving:
        figures = measure(model, tokenizer, copies[:100], texts[:held_out])
        compare("The decoder on descriptions of clips it has not read:", figures, EXPECTED_OF_CLIPS)
    else:
        figures = measure(model, tokenizer, copies[:100], unseen_conversations())
        compare("The decoder on descriptions of test scenes:", figures, EXPECTED)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        (tokenizer if config.architecture == "qwen" else as_transformers(tokenizer)).save_pretrained(folder)

    save_folder(config.output, config, {"reached": figures, "history": history}, write)


if __name__ == "__main__":
    try:
        main(load_config(sys.argv[1:], DecoderConfig))
    except (ConfigError, OSError, ValueError) as error:
        sys.exit(f"pretrain.decoder: {error}")
