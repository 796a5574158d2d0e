"""Qwen-7B with SigLIP so400m on one GPU: memory and speed of training and generation, with random weights.

    python -m benchmarks.qwen7b                                  # adds to benchmarks/results.md; minutes on one GPU
    python -m benchmarks.qwen7b --folder /scratch/qwen7b         # keeps the 16 GB of random weights for the next run
    python -m benchmarks.qwen7b --batches 1 --quantizations nf4 int8
    python -m benchmarks.qwen7b --small                          # trial in small shapes; without a GPU always so

Weights are written once in the published layouts (sharded safetensors, bfloat16) and loaded from there by each
combination, in a process of its own. Settings are those of `configs/qwen7b_siglip.yaml`: LoRA r 128 on c_attn, w1, w2
and the projector in float32, the frozen rest in bfloat16, autocast. What runs is the code of `train.py` (`build_model`,
`VLMTrainer`: gradient clipping and AdamW included) on random samples of one picture each, without padding.

Measured are, weights included, `torch.cuda.max_memory_allocated`, or on a CPU the largest running total of torch's
allocator (`torch.profiler`). A training peak is that of the first steps, the second of which has the optimizer's
state; the time of a step is the median of those that follow. The plan is that of `train.py --plan`, which takes all
tokens beside the picture for supervised. Generation is greedy and never stops early; its rate counts new tokens alone
but its time includes picture and prompt. Loading is `load_decoder` alone, with the growth of resident host memory
(VmHWM of Linux' /proc) and of what no file backs (RssAnon); a CPU reads weights that need no conversion at first use.

What does not fit is a row that says "out of memory".
"""

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel, TrainerCallback, set_seed

from benchmarks.measure import RESULTS, append_results, circumstances, now, peak_memory, reset_peak, run_worker
from benchmarks.plan_accuracy import allocator_peak
from config import Config, load_config
from dataset.collator import Collator
from dataset.template import IGNORE_INDEX
from model import MultiModalModel
from model.decoder import load_decoder
from plan import build_empty_model, make_plan
from qwen import MultimodalQWenLMHeadModel, QWenConfig
from qwen.tokenization_qwen import write_ranks
from train import build_model
from training import VLMTrainer, training_arguments

PROJECT = Path(__file__).parents[1]
MIB, GIB = 2**20, 2**30
WARMUP = 2  # steps before the timed ones; the second is the first with optimizer state
GENERATIONS = 3  # timed ones
DISK = 17  # GB, for the weights in full size
SETTINGS = ["--config", str(PROJECT / "configs" / "qwen7b_siglip.yaml")]
SIGLIP = {  # google/siglip-so400m-patch14-384
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14,
}  # fmt: skip
SMALL_QWEN = {
    "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "kv_channels": 64,
    "intermediate_size": 1408,
}  # fmt: skip
SMALL_SIGLIP = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 112,
    "patch_size": 14,
}  # fmt: skip
SMALL_LOADING = (
    "At this size host memory is mostly what loading takes whatever it loads, such as libraries imported on the way; "
    "the ratio\nhas meaning for Qwen-7B alone."
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few million parameters, seconds per combination")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--quantizations", nargs="+", default=["none", "nf4"], choices=["none", "nf4", "int8"])
    parser.add_argument("--checkpointing", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--length", type=int, help="tokens of a sample, picture included; 1024, small 128")
    parser.add_argument("--supervised", type=int, help="of these, at the end; the rest is the prompt; 128, small 60")
    parser.add_argument("--new-tokens", type=int, default=64, help="per generation")
    parser.add_argument("--steps", type=int, default=5, help="timed training steps")
    parser.add_argument("--folder", type=Path, help="where the random weights stay; default: a temporary folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.small |= args.device == "cpu"
    if args.length is None:
        args.length = 128 if args.small else 1024
    if args.supervised is None:
        args.supervised = 60 if args.small else 128
    shape = SMALL_SIGLIP if args.small else SIGLIP
    args.image_tokens = (shape["image_size"] // shape["patch_size"]) ** 2
    if min(*args.batches, args.steps, args.new_tokens, args.supervised) < 1:
        parser.error("--batches, --steps, --new-tokens and --supervised are positive numbers")
    if args.length <= args.image_tokens + args.supervised:
        parser.error(f"--length is more than the {args.image_tokens} tokens of a picture and the --supervised ones")
    if not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")
    return args


def experiment(args: argparse.Namespace, quantization: str, batch: int = 1, checkpointing: bool = False) -> Config:
    """The configuration of `train.py` for a combination."""
    overrides = [
        f"decoder={weights_folder(args)}/decoder",
        f"encoder.path={weights_folder(args)}/encoder",
        f"quantization={quantization}",
        f"per_device_train_batch_size={batch}",
        f"gradient_checkpointing={str(checkpointing).lower()}",
        f"max_length={args.length}",
        f"max_steps={WARMUP + args.steps}",
        f"output_dir={args.folder}/output",
        "num_workers=0",
        "validation=[]",
        "report_to=[]",
        "logging_steps=1",
    ]
    return load_config([*SETTINGS, *overrides, *(["lora.r=16"] if args.small else [])])


# Inputs


def weights_folder(args: argparse.Namespace) -> Path:
    return args.folder / ("small" if args.small else "qwen7b")


def decoder_config(args: argparse.Namespace) -> QWenConfig:
    return QWenConfig(**SMALL_QWEN if args.small else {})


def encoder_config(args: argparse.Namespace) -> SiglipVisionConfig:
    return SiglipVisionConfig(**SMALL_SIGLIP if args.small else SIGLIP, hidden_act="gelu_pytorch_tanh")


def write_weights(args: argparse.Namespace) -> dict:
    """Random decoder and encoder, drawn on the device and written shard by shard."""
    folder = weights_folder(args)
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    torch.manual_seed(0)
    with torch.device(args.device):
        decoder = MultimodalQWenLMHeadModel._from_config(decoder_config(args), dtype=torch.bfloat16)
    decoder.save_pretrained(unfinished / "decoder", max_shard_size="4MB" if args.small else "2GB")
    write_ranks({bytes([byte]): byte for byte in range(256)}, unfinished / "decoder" / "qwen.tiktoken")
    del decoder
    with torch.device(args.device):
        encoder = SiglipVisionModel._from_config(encoder_config(args), dtype=torch.bfloat16)
    encoder.save_pretrained(unfinished / "encoder")
    os.replace(unfinished, folder)
    return {}


def check_disk(args: argparse.Namespace) -> None:
    args.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.folder).free
    if not args.small and free < DISK * 10**9:
        raise OSError(f"{args.folder} has {free / 1e9:.0f} GB free, the weights need {DISK}; choose another --folder")


class Samples:
    """What `RecordDataset` yields: a picture, random ids behind it, and labels for the last of them.

    Drawn at each access: on a CPU, samples that are kept would count as memory of the step.
    """

    def __init__(self, args: argparse.Namespace, model: MultiModalModel, count: int):
        self.length, self.supervised, self.count = args.length, args.supervised, count
        self.placeholder, self.num_features = model.placeholder_id, model.encoder.num_features
        self.vocabulary, self.image_size = model.language_model.config.vocab_size, model.encoder.image_size

    @property
    def lengths(self) -> list[int]:
        return [self.length] * self.count

    @property
    def sources(self) -> tuple[list[str], np.ndarray]:
        return ["random"], np.zeros(self.count, np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        text = (self.length - self.num_features,)
        ids = torch.randint(self.placeholder + 1, self.vocabulary, text, generator=generator).tolist()
        ids = [self.placeholder] * self.num_features + ids
        unsupervised = self.length - self.supervised
        return {
            "input_ids": ids,
            "labels": [IGNORE_INDEX] * unsupervised + ids[unsupervised:],
            "pixel_values": torch.randn(1, 3, *self.image_size, generator=generator),
            "view_features": [self.num_features],
        }


# Measurements, each in a process of its own


def train(args: argparse.Namespace) -> dict:
    config = experiment(args, args.quantizations[0], args.batches[0], args.checkpointing[0] == "on")
    set_seed(config.train.seed)
    settings = training_arguments(config)
    settings.save_strategy, settings.disable_tqdm = "no", True
    with PeakMemory(args.device) as memory:
        model = load_model(config, settings.device)
        samples = Samples(args, model, args.batches[0] * config.train.max_steps)
        trainer = VLMTrainer(model, config, samples, None, Collator(model.tokenizer.pad_token_id), settings)
        watch = StepWatch(memory)
        trainer.add_callback(watch)
        trainer.train()
    return {
        "peak": watch.peak,
        "seconds": statistics.median(watch.seconds[WARMUP:]),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


class StepWatch(TrainerCallback):
    """Seconds of each step, from the batch on the host to the updated weights, and the peak of the first steps."""

    def __init__(self, memory: "PeakMemory"):
        self.memory = memory
        self.peak, self.seconds = 0, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.memory.start()

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(now() - self._started)
        if state.global_step == WARMUP:
            self.peak = self.memory.stop()


def generate(args: argparse.Namespace) -> dict:
    set_seed(0)
    with PeakMemory(args.device) as memory:
        model = load_model(experiment(args, args.quantizations[0]), args.device).to(args.device).eval()
        samples = Samples(args, model, args.batches[0])
        batch = Collator(model.tokenizer.pad_token_id)([samples[index] for index in range(len(samples))])
        prompt = batch["input_ids"][:, : -args.supervised].to(args.device)
        pixel_values = batch["pixel_values"].to(args.device)

        def answer() -> Tensor:
            length = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
            return model.generate(prompt, pixel_values=pixel_values, do_sample=False, **length)

        memory.start()
        new_tokens = answer().numel()
        peak = memory.stop()
    seconds = []
    for _ in range(GENERATIONS):
        start = now()
        answer()
        seconds.append(now() - start)
    return {"peak": peak, "seconds": statistics.median(seconds), "new_tokens": new_tokens}


def load(args: argparse.Namespace) -> dict:
    """Seconds and growth of host memory (bytes), resident and thereof not backed by files, of `load_decoder`."""
    path = weights_folder(args) / "decoder"
    torch.zeros(1, device=args.device)  # a GPU's context takes host memory too
    reset_peak("cpu")
    resident, anonymous, done = peak_memory("cpu"), [resident_anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            anonymous.append(resident_anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = now()
    try:
        decoder = load_decoder(path, torch.bfloat16, quantization=args.quantizations[0], device=args.device)
        seconds = now() - start
    finally:
        done.set()
        watcher.join()
    return {
        "seconds": seconds,
        "resident": (peak_memory("cpu") - resident) * MIB,
        "anonymous": max(anonymous) - anonymous[0],
        "checkpoint": sum(file.stat().st_size for file in path.glob("*.safetensors")),
        "footprint": decoder.get_memory_footprint(),
    }


def load_model(config: Config, device: torch.device | str) -> MultiModalModel:
    model = build_model(config.model, device)
    if model.device.type == "cpu":
        for parameter in model.parameters():
            # Weights that are mapped from a file, or read by another thread, would not be seen.
            parameter.data = parameter.data.clone()
    return model


class PeakMemory:
    """Largest number of bytes in tensors between `start` and `stop`, those made since `with` included."""

    def __init__(self, device: str):
        self.profiler = None
        if device == "cpu":
            activities = [torch.profiler.ProfilerActivity.CPU]
            self.profiler = torch.profiler.profile(activities=activities, profile_memory=True)
        self.running = False

    def __enter__(self) -> "PeakMemory":
        if self.profiler is not None:
            self.profiler.start()
            self.running = True
        return self

    def __exit__(self, *exception) -> None:
        if self.running:  # out of memory, say; a process that ends with a running profiler crashes
            self.profiler.stop()

    def start(self) -> None:
        if self.profiler is None:
            torch.cuda.reset_peak_memory_stats()
        else:
            with torch.profiler.record_function("measured"):
                pass

    def stop(self) -> int:
        if self.profiler is None:
            return torch.cuda.max_memory_allocated()
        self.profiler.stop()
        self.running = False
        return allocator_peak(self.profiler, since="measured")


def resident_anonymous() -> int:
    """Bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status).group(1)) * 2**10


WORKERS = {"write": write_weights, "load": load, "train": train, "generate": generate}


def outcome(worker: Callable[[argparse.Namespace], dict], args: argparse.Namespace) -> dict:
    """What `worker` measures, or that memory is too small for it."""
    try:
        return worker(args)
    except RuntimeError as error:  # allocations of torch, of cuBLAS and of the driver fail in different words
        if re.search("out of memory|ALLOC_FAILED|can't allocate memory", str(error)):
            return {"out_of_memory": True}
        raise


# All combinations


def run(argv: list[str], args: argparse.Namespace, worker: str, **combination) -> dict:
    """Result of a worker process, which is also printed, so that an interrupted run leaves what it measured."""
    options = [text for name, value in combination.items() for text in (f"--{name}", str(value))]
    options = [*argv, "--folder", str(args.folder), "--worker", worker, *options]
    measured = run_worker("benchmarks.qwen7b", *options)
    print(json.dumps({"worker": worker, **combination, **measured}), flush=True)
    return {**combination, **measured}


def measure_all(argv: list[str], args: argparse.Namespace) -> str:
    """Runs every combination; returns the text of the results."""
    if not weights_folder(args).is_dir():
        check_disk(args)
        if "out_of_memory" in run(argv, args, "write"):
            raise RuntimeError(f"the random decoder is made on the GPU, which takes {DISK} GB there; this one has less")
    loads, trainings, generations = [], [], []
    for quantization in args.quantizations:
        loads.append(run(argv, args, "load", quantizations=quantization))
        for batch in args.batches:
            combination = {"quantizations": quantization, "batches": batch}
            for checkpointing in args.checkpointing:
                planned = plan_peak(args, quantization, batch, checkpointing == "on")
                measured = run(argv, args, "train", **combination, checkpointing=checkpointing)
                trainings.append({**measured, "plan": planned})
            generations.append(run(argv, args, "generate", **combination))
    sections = [
        heading(argv, args),
        "## Training",
        training_table(args, trainings),
        "## Generation",
        generation_table(args, generations),
        "## Loading",
        loading_table(args, loads),
    ]
    if args.small:
        sections.append(SMALL_LOADING)
    return "\n\n".join(sections) + "\n"


def plan_peak(args: argparse.Namespace, quantization: str, batch: int, checkpointing: bool) -> int:
    """Bytes that `train.py --plan` foresees."""
    config = experiment(args, quantization, batch, checkpointing)
    model = build_empty_model(config.model)
    plan = make_plan(config, model, gpu=args.device == "cuda", checkpointing=(checkpointing,))
    return plan.peak(checkpointing)


# Text


def heading(argv: list[str], args: argparse.Namespace) -> str:
    model = build_empty_model(experiment(args, "none").model)
    named = list(model.named_parameters())
    trained = sum(parameter.numel() for _, parameter in named if parameter.requires_grad)
    encoder = sum(parameter.numel() for parameter in model.encoder.parameters())
    decoder = sum(parameter.numel() for _, parameter in named) - trained - encoder
    title, warning = "# Qwen-7B with SigLIP so400m on one GPU", "Random weights, published shapes."
    if args.small:
        title = "# GPU trial at small size: Qwen-7B has not been measured"
        warning = "**These figures come from a model of a few million parameters and say nothing about Qwen-7B.**"
    if args.device == "cpu":
        title = "# CPU trial at small size: no GPU figure has been measured"
        warning += " On a machine with a GPU\nthe command `python -m benchmarks.qwen7b` measures Qwen-7B itself."
    peak = "`torch.cuda.max_memory_allocated`" if args.device == "cuda" else "largest total of torch's CPU allocator"
    command = shlex.join(["python", "-m", "benchmarks.qwen7b", *argv])
    return (
        f"{title}\n\n{warning}\n\n    {command}\n\n"
        f"- {circumstances(args.device)}\n"
        f"- decoder {decoder:,} parameters, encoder {encoder:,}, trained (LoRA and projector) {trained:,}\n"
        f"- samples of {args.length} tokens: {args.image_tokens} of a picture, {args.supervised} supervised; "
        f"generation of {args.new_tokens} tokens after {args.length - args.supervised}\n"
        f"- peak: {peak}, weights included; plan: what `train.py --plan` foresees\n"
        "- how all of it is measured: head of `benchmarks/qwen7b.py`"
    )


def training_table(args: argparse.Namespace, rows: list[dict]) -> str:
    lines = [
        f"| weights | batch | checkpointing | peak ({unit(args)}) | plan ({unit(args)}) | error of the plan | s/step "
        "| tokens/s | supervised tokens/s |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [weights_name(row), row["batches"], row["checkpointing"]]
        if "out_of_memory" in row:
            cells += ["out of memory", size(args, row["plan"]), "", "", "", ""]
        else:
            rate = row["batches"] / row["seconds"]
            error = 100 * (row["plan"] / row["peak"] - 1)
            cells += [size(args, row["peak"]), size(args, row["plan"]), f"{error:+.1f} %", f"{row['seconds']:.3f}"]
            cells += [f"{rate * args.length:,.0f}", f"{rate * args.supervised:,.0f}"]
        lines.append(table_row(cells))
    return "\n".join(lines)


def generation_table(args: argparse.Namespace, rows: list[dict]) -> str:
    lines = [f"| weights | batch | peak ({unit(args)}) | s | new tokens/s |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        cells = [weights_name(row), row["batches"]]
        if "out_of_memory" in row:
            cells += ["out of memory", "", ""]
        else:
            rate = row["new_tokens"] / row["seconds"]
            cells += [size(args, row["peak"]), f"{row['seconds']:.2f}", f"{rate:,.1f}"]
        lines.append(table_row(cells))
    return "\n".join(lines)


def loading_table(args: argparse.Namespace, rows: list[dict]) -> str:
    lines = [
        f"| weights | s | files ({unit(args)}) | loaded ({unit(args)}) | host memory, resident ({unit(args)}) | "
        f"thereof anonymous ({unit(args)}) | resident / files |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "out_of_memory" in row:
            cells = [weights_name(row), "out of memory", "", "", "", "", ""]
        else:
            sizes = [size(args, row[name]) for name in ("checkpoint", "footprint", "resident", "anonymous")]
            cells = [weights_name(row), f"{row['seconds']:.2f}", *sizes, f"{row['resident'] / row['checkpoint']:.2f}"]
        lines.append(table_row(cells))
    return "\n".join(lines)


def weights_name(row: dict) -> str:
    return "bf16" if row["quantizations"] == "none" else row["quantizations"]


def table_row(cells: list) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def unit(args: argparse.Namespace) -> str:
    return "MiB" if args.small else "GiB"


def size(args: argparse.Namespace, count: int) -> str:
    return f"{count / MIB:.1f}" if args.small else f"{count / GIB:.2f}"


def main(argv: list[str]) -> None:
    args = arguments(argv)
    if args.worker:
        print(json.dumps(outcome(WORKERS[args.worker], args)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = (args.folder or Path(temporary)).absolute()
        text = measure_all(argv, args)
    append_results(text, args.output)
    print(f"\n{text}")


if __name__ == "__main__":
    main(sys.argv[1:])
