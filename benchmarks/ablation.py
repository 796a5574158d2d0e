"""What each part of the training engine brings: from a plain loop to ours, step by step, beside LLaVA + peft + Trainer.

    python -m benchmarks.ablation                              # adds to benchmarks/results.md
    python -m benchmarks.ablation --image-tokens 576 --batch 4
    python -m benchmarks.ablation --rows peer packing --rounds 3
    python -m benchmarks.ablation --rows peer_bf16 grouping packing bf16 compile --warmup 3
    python -m benchmarks.ablation --small --output /tmp/results.md

The peer is what one would write today: `LlavaForConditionalGeneration` with peft's LoRA in `transformers.Trainer` with
its default machinery and a collator that pads; float32, and once more with bf16=True and base weights in bfloat16. Ours
is `train.py` itself: each row is a configuration of it, and has what those of our rows above it have. *naive* is that
same run with the decoder's own loss, which makes logits for all positions.

Both begin with equal weights (`benchmarks.train_step` writes them: CLIP encoder, projector, decoder, LoRA) and learn
from equal records with equal optimizer, learning rates and schedule; what is trained is the same. Data is read by the
same code in the same process (`RecordDataset`: a JPEG file is opened, decoded and preprocessed for each sample).
Lengths are drawn as real mixtures have them, log-normal: half of the answers are captions with a mean of 15 tokens,
half long answers with a mean of 120. Records stand in random order, and the peer, *naive* and *supervised logits* take
them as they stand, so that they see the same batches.

Measured, each row in a process of its own: the time from the end of the last warm-up step to the end of the last step,
data included; as many steps lie between as an epoch has, so that all rows see the same mix of lengths. Peak memory is
that of the process during all steps (on a GPU that of its tensors). *Loss* is the validation loss per token after the
last step, computed by one function for all; *largest difference* that between the losses of a step and those of the
first row above that had the same batches. `--rounds` repeats everything in turn, and takes medians.

Exits with 1 if two float32 rows with equal batches differ by more than 1e-4 in the loss of a step.
"""

import argparse
import json
import statistics
import sys
import tempfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.modeling_outputs import CausalLMOutputWithPast

from benchmarks.measure import (
    RESULTS,
    add_shapes,
    append_results,
    markdown_table,
    now,
    peak_memory,
    report,
    reset_peak,
    run_worker,
)
from benchmarks.train_step import PATCH, load_llava, write_weights
from build import build_views, load_dataset
from cache_features import fill
from config import Config, load_config
from dataset.collator import Collator
from dataset.record import write_records
from dataset.template import IGNORE_INDEX
from model import MultiModalModel
from model.decoder import Head
from model.export import LINEAR_NAMES
from model.tokenizer import load_tokenizer
from qwen import QWenTokenizer
from qwen.tokenization_qwen import write_ranks
from train import make_trainer
from train import run as train
from training import training_arguments

TOLERANCE = 1e-4  # between the losses of a step in float32
SEED = 0
SHORT, LONG = 15, 120  # mean number of tokens of an answer, its end included
SPREAD = 0.5  # standard deviation of the logarithm of a length
LONGEST = 512  # tokens of an answer
WORDS = 500  # that text is made of, a token each
SMALL = {
    "hidden": 64, "layers": 2, "vocabulary": 1000, "image_tokens": 16, "encoder_width": 32, "encoder_layers": 2,
    "rank": 4, "batch": 4, "steps": 3, "validation": 4,
}  # fmt: skip
TRAIN, VALIDATION, FEATURES = "train.parquet", "validation.parquet", "features"


class Row(NamedTuple):
    """A line of the table: a system, and what its configuration has beyond that of the row above."""

    title: str
    overrides: tuple[str, ...] = ()
    bf16: bool = False  # of the peer; ours has it in its configuration
    peer: bool = False
    naive: bool = False
    default: bool = True  # without --rows


SEQUENTIAL = "train_sampling_strategy=sequential"
ROWS = {
    "peer": Row("LLaVA + peft + Trainer", peer=True),
    "peer_bf16": Row("LLaVA + peft + Trainer, bf16", peer=True, bf16=True),
    "naive": Row("Kanjian, naive", (SEQUENTIAL,), naive=True),
    "supervised": Row("+ supervised logits", (SEQUENTIAL,)),
    "grouping": Row("+ length grouping", ("train_sampling_strategy=group_by_length",)),
    "packing": Row("+ packing", ("train.packing=true",)),
    "bf16": Row("+ bf16", ("model.dtype=bfloat16", "model.encoder.dtype=bfloat16", "train.bf16=true")),
    "cached": Row("+ cached features", (f"data.feature_cache={FEATURES}",)),
    "compile": Row("+ compiled blocks", ("train.compile=true",), default=False),
    "checkpointing": Row("+ gradient checkpointing", ("train.gradient_checkpointing=true",)),
}
OURS = [name for name, row in ROWS.items() if not row.peer]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes, for tests")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[name for name, row in ROWS.items() if row.default])
    parser.add_argument("--rounds", type=int, default=1)
    add_shapes(parser)
    parser.add_argument("--image-tokens", type=int, default=196, help="a square number: 196, 576 or 729, say")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="measured steps, an epoch")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--validation", type=int, default=16, help="records")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="file that the result is added to")
    parser.add_argument("--worker", choices=["write", "cache", *ROWS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    if "--small" in (sys.argv if argv is None else argv):
        parser.set_defaults(**SMALL)
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


# What all rows start from


def write_experiment(args: argparse.Namespace) -> dict:
    """Writes weights of both systems, tokenizer, JPEG files and records into `args.folder`."""
    folder = args.folder
    (folder / "decoder").mkdir()
    pieces = [bytes([byte]) for byte in range(256)] + [f" {word}".encode() for word in words()]
    write_ranks({piece: rank for rank, piece in enumerate(pieces)}, folder / "decoder" / "qwen.tiktoken")
    tokenizer = QWenTokenizer.from_pretrained(folder / "decoder")
    write_weights(args, folder, tokenizer.placeholder_id)
    side = PATCH * int(args.image_tokens**0.5)
    crop = {"height": side, "width": side}
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop).save_pretrained(folder / "encoder")
    (folder / "images").mkdir()
    random = np.random.default_rng(SEED)
    for name, count in ((TRAIN, args.batch * args.steps), (VALIDATION, args.validation)):
        drawn = records(random, count)
        for record in drawn:
            coarse = Image.fromarray(random.integers(0, 256, (48, 64, 3), np.uint8))
            picture = folder / "images" / record["images"][0]
            coarse.resize((640, 480), Image.Resampling.BICUBIC).save(picture, quality=90)
        write_records(drawn, folder / name)
        if name == TRAIN:
            answers = [len(tokenizer.encode_plain(record["messages"][1]["content"])) + 1 for record in drawn]
    return {"mean_answer": statistics.mean(answers)}


def records(random: np.random.Generator, count: int) -> list[dict]:
    """Half of them with a short answer, half with a long one, in random order; a picture each."""
    vocabulary, likely = words(), 1 / np.arange(1, WORDS + 1)  # Zipf's law
    means = random.permutation([SHORT, LONG] * (count // 2 + 1))[:count]
    made = []
    for mean in means:
        # The mean of a log-normal variable is exp(mu + sigma^2 / 2).
        length = random.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD)
        length = int(np.clip(round(length), 2, LONGEST))
        question, answer = (
            "".join(f" {word}" for word in random.choice(vocabulary, size, p=likely / likely.sum()))
            for size in (8, length - 1)
        )
        name = f"{random.integers(1 << 60):x}"
        made.append({
            "id": name, "source": "drawn", "images": [f"{name}.jpg"],
            "messages": [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}],
        })  # fmt: skip
    return made


def words() -> list[str]:
    """Distinct made-up words of letters."""
    syllables = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
    return [one + other for one in syllables for other in syllables][:WORDS]


def experiment(args: argparse.Namespace, name: str) -> Config:
    """The configuration of one of our rows: overrides of the chosen ones down to it, where later replace earlier."""
    above = [] if ROWS[name].peer else [row for row in OURS[: OURS.index(name) + 1] if row in args.rows]
    overrides = dict(pair.split("=", 1) for row in above for pair in ROWS[row].overrides)
    if "data.feature_cache" in overrides:
        overrides["data.feature_cache"] = str(args.folder / FEATURES)
    return load_config([
        f"decoder={args.folder}/decoder", f"encoder.path={args.folder}/encoder", "encoder.kind=clip",
        f"model.checkpoint={args.folder}/kanjian", f"lora.r={args.rank}", f"lora.alpha={2 * args.rank}",
        "lora.dropout=0", f"lora.targets=[{','.join(LINEAR_NAMES)}]",
        f"data.train={args.folder}/{TRAIN}", f"image_root={args.folder}/images", f"output_dir={args.folder}/run/{name}",
        f"per_device_train_batch_size={args.batch}", f"max_steps={args.warmup + args.steps}", f"seed={SEED}",
        f"lora_lr={args.lr}", f"projector_lr={args.lr}", "logging_steps=1", "overwrite=true",
        *(f"{key}={value}" for key, value in overrides.items()),
    ])  # fmt: skip


# Watching a run of either system


class Watch(TrainerCallback):
    """When steps end, the peak of memory over all of them, and what was in their batches."""

    def __init__(self, device: str):
        self.device = device
        self.ends: list[float] = []
        self.peak = 0.0  # MiB
        self.batches: list[dict] = []

    def on_train_begin(self, args, state, control, **kwargs):
        reset_peak(self.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(now())
        self.peak = peak_memory(self.device)

    def collator(self, collate: Callable[[list[dict]], dict]) -> Callable[[list[dict]], dict]:
        """`collate`, noting what it is given and what it makes."""

        def noting(samples: list[dict]) -> dict:
            batch = collate(samples)
            rows = sorted(str(sample["input_ids"]) for sample in samples)
            self.batches.append({
                "samples": zlib.crc32("".join(rows).encode()),
                "supervised": int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()),
                "positions": batch["input_ids"].numel(),
            })  # fmt: skip
            return batch

        return noting

    def figures(self, args: argparse.Namespace, log: list[dict]) -> dict:
        """What the steps after the warm-up took and had, and the losses of all steps."""
        measured = self.batches[args.warmup : args.warmup + args.steps]
        return {
            "seconds": self.ends[-1] - self.ends[args.warmup - 1],
            "samples": args.batch * args.steps,
            "supervised": sum(batch["supervised"] for batch in measured),
            "positions": sum(batch["positions"] for batch in measured),
            "peak": self.peak,
            "batches": [batch["samples"] for batch in self.batches[: args.warmup + args.steps]],
            "losses": [entry["loss"] for entry in log if "loss" in entry],
        }


def validation_loss(model: nn.Module, samples, collate: Callable[[list[dict]], dict], bf16: bool, device: str) -> float:
    """Mean over all supervised tokens; one sample at a time, for the peer makes logits of all positions."""
    model.eval()
    total, tokens = 0.0, 0
    for index in range(len(samples)):
        batch = {key: value.to(device) for key, value in collate([samples[index]]).items()}
        count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            total += float(model(**batch).loss) * count
        tokens += count
    return total / tokens


# Ours


def run_ours(args: argparse.Namespace) -> dict:
    """What `train.py` does for the row's configuration, with a callback and a collator that take notes."""
    row, config, watch = ROWS[args.worker], experiment(args, args.worker), Watch(args.device)
    with patch.object(MultiModalModel, "forward", naive_forward) if row.naive else nullcontext():
        trainer = make_trainer(config, training_arguments(config))
        trainer.data_collator = watch.collator(trainer.data_collator)
        trainer.add_callback(watch)
        train(trainer, checkpoint=None)
    model = trainer.model
    pictures = replace(config, data=replace(config.data, feature_cache=None))  # the cache has those of training alone
    held_out = load_dataset(pictures, [str(args.folder / VALIDATION)], model)
    collate = Collator(model.tokenizer.pad_token_id)
    loss = validation_loss(model, held_out, collate, config.train.bf16, args.device)
    return {**watch.figures(args, trainer.state.log_history), "loss": loss, "bf16": config.train.bf16}


def naive_forward(
    model: MultiModalModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    pixel_values: Tensor | None = None,
    vision: Tensor | None = None,
    num_items_in_batch: Tensor | None = None,
    **kwargs,
) -> CausalLMOutputWithPast:
    """The loss as one would write it: that of transformers for causal language models, from logits `[B, T, V]`."""
    decoder = model.language_model
    features = model.encode_images(pixel_values) if vision is None else model.project(vision)
    hidden = decoder.base_model(input_ids, features=features, attention_mask=attention_mask, use_cache=False)
    logits = Head(decoder)(hidden.last_hidden_state)
    loss = decoder.loss_function(
        logits=logits, labels=labels, vocab_size=decoder.config.vocab_size, num_items_in_batch=num_items_in_batch
    )
    return CausalLMOutputWithPast(loss=loss, logits=logits)


# The peer


def run_peer(args: argparse.Namespace) -> dict:
    """`transformers.Trainer` over LLaVA with peft's adapter."""
    row, config, watch = ROWS[args.worker], experiment(args, args.worker), Watch(args.device)
    set_seed(SEED)
    model = load_llava(args.folder, torch.bfloat16 if row.bf16 else torch.float32)
    reads = sample_reader(config)
    data = load_dataset(config, config.data.train, reads)
    c = config.train
    settings = TrainingArguments(
        output_dir=c.output_dir, seed=c.seed, max_steps=c.max_steps, learning_rate=args.lr,
        per_device_train_batch_size=c.per_device_train_batch_size, weight_decay=c.weight_decay,
        lr_scheduler_type=c.lr_scheduler_type, max_grad_norm=c.max_grad_norm, bf16=row.bf16,
        train_sampling_strategy="sequential", remove_unused_columns=False, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=args.device == "cpu",
    )  # fmt: skip
    collate = PaddingCollator(reads.tokenizer.pad_token_id)
    trainer = Trainer(model, settings, data_collator=watch.collator(collate), train_dataset=data, callbacks=[watch])
    trainer.train()
    held_out = load_dataset(config, [str(args.folder / VALIDATION)], reads)
    loss = validation_loss(trainer.model, held_out, collate, row.bf16, args.device)
    return {**watch.figures(args, trainer.state.log_history), "loss": loss, "bf16": row.bf16}


def sample_reader(config: Config) -> SimpleNamespace:
    """What `load_dataset` asks of a model, without one."""
    _, media = build_views(config.model)
    tokenizer = load_tokenizer(config.model.decoder, "qwen", config.model.template)
    return SimpleNamespace(tokenizer=tokenizer, media=media, num_positions=None)


class PaddingCollator:
    """A batch with what LLaVA's forward takes, padded on the right to the longest sample."""

    def __init__(self, pad_token_id: int):
        self.padding = {"input_ids": pad_token_id, "labels": IGNORE_INDEX, "attention_mask": 0}

    def __call__(self, samples: list[dict]) -> dict[str, Tensor]:
        samples = [{**sample, "attention_mask": [1] * len(sample["input_ids"])} for sample in samples]
        batch = {
            name: nn.utils.rnn.pad_sequence([torch.tensor(s[name]) for s in samples], True, value)
            for name, value in self.padding.items()
        }
        return {**batch, "pixel_values": torch.cat([sample["pixel_values"] for sample in samples])}


# All rows


def write_features(args: argparse.Namespace) -> dict:
    filled = fill(experiment(args, "cached"))
    return {"seconds": filled.seconds, "encoded": filled.encoded}


def worker_of(name: str) -> Callable[[argparse.Namespace], dict]:
    if name in ROWS:
        return run_peer if ROWS[name].peer else run_ours
    return {"write": write_experiment, "cache": write_features}[name]


def measure_all(args: argparse.Namespace, argv: list[str]) -> tuple[str, bool]:
    """Runs every row in every round; returns the text of the results, and whether losses differ that should not."""

    def run(worker: str) -> dict:
        found = run_worker("benchmarks.ablation", *argv, "--folder", str(args.folder), "--worker", worker)
        print(json.dumps({"row": worker, **found}), flush=True)
        return found

    written = run("write")
    cache = run("cache") if "cached" in args.rows else None
    rounds = [{name: run(name) for name in args.rows} for _ in range(args.rounds)]
    results = {name: combined([measured[name] for measured in rounds]) for name in args.rows}
    compare_losses(results)
    notes = [
        f"Hidden {args.hidden}, {args.layers} layers, vocabulary {args.vocabulary:,}, encoder of width "
        f"{args.encoder_width} with {args.encoder_layers} layers; {args.image_tokens} image tokens, answers of "
        f"{written['mean_answer']:.0f} tokens in the mean; batches of {args.batch}, {args.steps} measured steps after "
        f"{args.warmup}, {args.rounds} round(s)."
    ]
    if cache:
        rate = 1000 * cache["seconds"] / cache["encoded"]
        notes.append(f"The cache of features took {rate:.1f} ms per picture, once, which no row contains.")
    problems = unequal(results)
    return "\n\n".join([*notes, table(results), *problems]), bool(problems)


def combined(found: list[dict]) -> dict:
    """The first round's figures with the medians of time and memory."""
    medians = {name: statistics.median(one[name] for one in found) for name in ("seconds", "peak")}
    return {**found[0], **medians}


def compare_losses(results: dict[str, dict]) -> None:
    """Adds `difference`: the largest between the losses of a step and those of the first row with equal batches."""
    first: dict[tuple, str] = {}
    for name, result in results.items():
        reference = first.setdefault(tuple(result["batches"]), name)
        pairs = zip(result["losses"], results[reference]["losses"], strict=True)
        result["reference"] = reference
        result["difference"] = max(abs(one - other) for one, other in pairs)


def unequal(results: dict[str, dict]) -> list[str]:
    """A line for each float32 row whose losses are not those of its reference."""
    return [
        f"**The losses of {ROWS[name].title} are not those of {ROWS[result['reference']].title}.**"
        for name, result in results.items()
        if not result["bf16"] and not results[result["reference"]]["bf16"] and result["difference"] > TOLERANCE
    ]


def table(results: dict[str, dict]) -> str:
    """Markdown; the ratios are to the first row."""
    base = next(iter(results.values()))
    rows = []
    for name, result in results.items():
        rate = result["samples"] / result["seconds"]
        same = result["reference"] != name
        rows.append((
            ROWS[name].title,
            f"{rate:.2f}",
            f"{result['supervised'] / result['seconds']:.0f}",
            f"{rate * base['seconds'] / base['samples']:.2f}",
            f"{result['peak']:.0f}",
            f"{result['peak'] / base['peak']:.2f}",
            f"{result['positions'] / result['samples']:.0f}",
            f"{result['loss']:.4f}",
            f"{result['difference']:.1e} ({ROWS[result['reference']].title})" if same else "",
        ))  # fmt: skip
    header = ("", "samples/s", "supervised tokens/s", "ratio", "peak (MiB)", "ratio", "positions/sample", "loss",
              "largest difference")  # fmt: skip
    return markdown_table(header, rows)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    if args.worker:
        print(json.dumps(worker_of(args.worker)(args)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = Path(temporary)
        text, failed = measure_all(args, argv)
    text = report("Ablation of a training step", "benchmarks.ablation", argv, args.device, text)
    print(f"\n{text}")
    append_results(text, args.output)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
