"""The plan of `train.py --plan` against measured peak memory of real training.

    python -m benchmarks.plan_accuracy                  # all cases; minutes
    python -m benchmarks.plan_accuracy --cases logits   # some of them

Each case is a small random model in the published format, trained for three optimizer steps by the code of `train.py`
in a process of its own, on samples of `max_length` tokens with one picture each. Measured is the largest running total
of what torch's CPU allocator handed out (`torch.profiler`, `profile_memory=True`), or the GPU's where there is one
(`max_memory_allocated`), weights included. Loading is not part of it: on a CPU bitsandbytes takes some 80 bytes per
weight while it quantizes a matrix. Exits with 1 if an estimate is off by more than 15 %.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from config import load_config
from dataset.collator import Collator
from dataset.record import write_records
from plan import build_empty_model, make_plan
from qwen import MultimodalQWenLMHeadModel, QWenConfig
from qwen.tokenization_qwen import write_ranks
from train import build_model, load_dataset
from training import VLMTrainer

MIB = 2**20
LIMIT = 15.0  # percent
STEPS = 3
IMAGE = 64  # pixels
DECODER = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "kv_channels": 32, "vocab_size": 512}
CASES = {  # name -> (shape of the decoder where it is not DECODER, encoder, overrides; {folder} is that of the case)
    "logits": ({"vocab_size": 40000}, "clip", ["max_length=256"]),
    "activations": ({}, "siglip", ["max_length=512"]),
    "checkpointing": (
        {"num_hidden_layers": 12, "hidden_size": 256, "num_attention_heads": 8}, "clip",
        ["max_length=512", "gradient_checkpointing=true"],
    ),
    "bf16": ({"hidden_size": 256, "num_attention_heads": 8}, "siglip", ["max_length=512", "bf16=true"]),
    "bf16_frozen": (
        {"hidden_size": 256, "num_attention_heads": 8}, "clip",
        ["max_length=512", "bf16=true", "model.dtype=bfloat16", "encoder.dtype=bfloat16",
         "gradient_checkpointing=true"],
    ),
    "weights": (
        {"hidden_size": 512, "num_attention_heads": 16, "num_hidden_layers": 6}, "clip",
        ["max_length=96", "per_device_train_batch_size=1"],
    ),
    "accumulation": (
        {"hidden_size": 256, "num_attention_heads": 8}, "siglip",
        ["max_length=128", "gradient_accumulation_steps=3", "lora.r=128"],
    ),
    "rank": ({"hidden_size": 256, "num_attention_heads": 8}, "clip", ["max_length=128", "lora.r=256"]),
    "dora": ({"hidden_size": 512, "num_attention_heads": 16}, "clip", ["max_length=128", "lora.dora=true"]),
    "dora_nf4": (
        {"hidden_size": 512, "num_attention_heads": 16}, "clip",
        ["max_length=128", "lora.dora=true", "lora.dropout=0", "quantization=nf4", "model.dtype=bfloat16", "bf16=true"],
    ),
    "nf4": (
        {"hidden_size": 512, "num_attention_heads": 16}, "clip",
        ["max_length=256", "bf16=true", "model.dtype=bfloat16", "quantization=nf4", "gradient_checkpointing=true"],
    ),
    "int8": ({"hidden_size": 512, "num_attention_heads": 16}, "clip", ["max_length=256", "quantization=int8"]),
    "adamw_8bit": (
        {"hidden_size": 512, "num_attention_heads": 16}, "siglip",
        ["max_length=64", "optimizer=adamw_8bit", "lora.r=128"],
    ),
    "eager": ({}, "clip", ["max_length=384", "attn_implementation=eager"]),
    "validation": (
        {"hidden_size": 256, "num_attention_heads": 8}, "siglip",
        ["max_length=256", "bf16=true", "gradient_checkpointing=true", "per_device_train_batch_size=1",
         "per_device_eval_batch_size=12", "data.validation={folder}/train.parquet", "eval_steps=2"],
    ),
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        print(json.dumps(measure(args.worker)))
        return 0
    print("| case | plan (MiB) | measured (MiB) | error | worst phase |\n|---|---:|---:|---:|---|")
    errors = []
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            arguments = write_case(name, Path(folder))
            planned, phase = planned_peak(arguments)
            measured = measure_apart(arguments)
        errors.append(100 * (planned / measured - 1))
        row = f"| {name} | {planned / MIB:.1f} | {measured / MIB:.1f} | {errors[-1]:+.1f} % | {phase} |"
        print(row, flush=True)
    return int(max(map(abs, errors)) > LIMIT)


def planned_peak(arguments: list[str]) -> tuple[int, str]:
    """Planned bytes and the phase that takes most."""
    config = load_config(arguments)
    used = config.train.gradient_checkpointing
    model = build_empty_model(config.model)
    plan = make_plan(config, model, gpu=torch.cuda.is_available(), checkpointing=(used,))
    return plan.peak(used), plan.phase(used)


def measure_apart(arguments: list[str]) -> int:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.plan_accuracy", "--worker", *arguments]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"training failed: {' '.join(arguments)}\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(arguments: list[str]) -> int:
    """Peak while training of the bytes that torch's allocator has handed out, weights included."""
    config = load_config(arguments)
    gc.collect()  # what is freed from now on shall be what was allocated from now on
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build_model(config.model)
        for parameter in model.parameters():
            # Weights that are mapped from a file, or read by another thread, would not be seen.
            parameter.data = parameter.data.clone()
        data = load_dataset(config, config.data.train, model)
        validation = load_dataset(config, config.data.validation, model) if config.data.validation else None
        trainer = VLMTrainer(model, config, data, validation, Collator(model.tokenizer.pad_token_id))
        with torch.profiler.record_function("training"):
            trainer.train()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return allocator_peak(profiler, since="training")


def allocator_peak(profiler: torch.profiler.profile, since: str) -> int:
    """Largest running total of the bytes that torch's CPU allocator has handed out, from the event `since` on.

    Args:
        profiler: stopped, with `profile_memory=True`. What was allocated before it started is not seen.
    """
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    total = peak = 0
    started = False
    for event in events:
        started |= event.name() == since
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total) if started else 0
    return peak


def write_case(name: str, folder: Path) -> list[str]:
    """Writes weights, tokenizer, pictures and records of a case; returns the arguments of `train.py` for it."""
    shape, encoder, overrides = CASES[name]
    shape = DECODER | shape
    decoder = QWenConfig(**shape, intermediate_size=2 * 11 * shape["hidden_size"] // 4)
    torch.manual_seed(0)
    MultimodalQWenLMHeadModel(decoder).save_pretrained(folder / "decoder")
    write_ranks({bytes([byte]): byte for byte in range(256)}, folder / "decoder" / "qwen.tiktoken")
    write_encoder(encoder, folder / "encoder")
    Image.new("RGB", (IMAGE, IMAGE), "red").save(folder / "red.png")
    long = [{"role": "user", "content": "<image>\nDescribe."}, {"role": "assistant", "content": "red " * 500}]
    record = {"source": "plan", "images": ["red.png"], "messages": long}
    write_records([{"id": f"r{number}", **record} for number in range(36)], folder / "train.parquet")
    return [
        f"decoder={folder}/decoder", f"encoder.kind={encoder}", f"encoder.path={folder}/encoder", "lora.r=16",
        f"data.train={folder}/train.parquet", f"image_root={folder}", f"output_dir={folder}/out", f"max_steps={STEPS}",
        "per_device_train_batch_size=4", *(override.format(folder=folder) for override in overrides),
    ]  # fmt: skip


def write_encoder(kind: str, folder: Path) -> None:
    """16 features of a picture."""
    shape = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": IMAGE, "patch_size": 16,
    }  # fmt: skip
    size = {"height": IMAGE, "width": IMAGE}
    if kind == "clip":
        CLIPVisionModel(CLIPVisionConfig(**shape)).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size=size).save_pretrained(folder)
    else:
        SiglipVisionModel(SiglipVisionConfig(**shape)).save_pretrained(folder)
        SiglipImageProcessor(size=size).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
