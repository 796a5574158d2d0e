"""What memory a configuration needs, before anything is loaded.

    python train.py --config configs/qwen7b_siglip.yaml --plan
    python train.py --config configs/qwen7b_siglip.yaml --plan --gpu_memory 24 --gpus 8 quantization=nf4

`--gpu_memory` (GiB) asks whether it fits, `--gpus` replaces 1, 2, 4, 8. Of encoder and decoder only `config.json` is
read. The figures come from a step of the real modules on fake tensors, see `model/memory.py`.
"""

import argparse
import copy
import math
from dataclasses import dataclass

import torch
from torch import nn

from build import build_empty_model, max_length
from config import Config, ConfigError, load_config
from dataset.text_table import text_table
from model import MultiModalModel
from model.memory import (
    StepMemory,
    fake_weights,
    loss_memory,
    most_views,
    quantize_meta,
    step_memory,
    validation_memory,
)
from model.table import model_parts

GIB = 2**30
RESERVED = GIB  # of a GPU: CUDA context and workspaces of cuBLAS and NCCL, which are no tensors
USABLE = 0.9  # share of the rest that is taken for safe; fragmentation may need what is beyond it
STAGES = {  # what is divided among the GPUs: weights, gradients, optimizer state
    "DDP": (False, False, False),
    "ZeRO-1": (False, False, True),
    "ZeRO-2": (False, True, True),
    "ZeRO-3": (True, True, True),
}


@dataclass
class Plan:
    """Memory of training on one GPU, in bytes."""

    weights: dict[str, int]  # by module
    gradients: int
    optimizer: int
    largest_layer: int  # weights that ZeRO-3 gathers at a time
    largest_gradient: int  # gradients of one layer, before ZeRO-2 and ZeRO-3 divide them
    steps: dict[bool, StepMemory]  # without and with activation checkpointing
    loss: dict[str, int]  # the loss alone: "ours" and "naive"
    validation: dict[str, int]  # beside weights and optimizer state, with either loss; 0 where nothing is validated

    def peak(self, checkpointing: bool, stage: str = "DDP", gpus: int = 1) -> int:
        """The worst moment: in the forward or backward pass, when the optimizer steps, or between steps in validation.

        Data parallelism keeps a bucket beside each gradient (DDP, ZeRO-1) or the gradients of one layer (ZeRO-2 and 3).
        """
        weights, gradients, optimizer = (1 / gpus if divided else 1 for divided in STAGES[stage])
        fixed = weights * sum(self.weights.values()) + optimizer * self.optimizer
        if gpus > 1:
            fixed += self.largest_gradient if gradients < 1 else self.gradients
            fixed += self.largest_layer if weights < 1 else 0
        moments = [worst.working + gradients * worst.gradients for worst in self.steps[checkpointing].phases.values()]
        return math.ceil(fixed + max(*moments, gradients * self.gradients, self.validation["ours"]))

    def phase(self, checkpointing: bool) -> str:
        """Where one GPU reaches its peak."""
        step = self.steps[checkpointing]
        return "validation" if self.validation["ours"] > step.peak.total else step.phase

    def naive_peak(self, checkpointing: bool) -> int:
        """Peak on one GPU with the logits of all positions at once."""
        step = self.steps[checkpointing]
        loss = step.saved + step.phases["loss"].gradients + self.loss["naive"]
        fixed = sum(self.weights.values()) + self.optimizer
        return max(self.peak(checkpointing), fixed + max(loss, self.validation["naive"]))


def main(argv: list[str]) -> None:
    """Prints the plan for the arguments of `train.py`.

    Raises:
        ConfigError: a bad argument, no configuration of encoder or decoder, or one of another architecture.
    """
    options, rest = parse_options(argv)
    print(report(load_config(rest), options.gpu_memory, options.gpus))


def parse_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The plan's own options and the arguments that are left for `load_config`."""
    if valued := [argument for argument in argv if argument.startswith(("--plan=", "plan="))]:
        raise ConfigError(f"--plan takes no value, got {valued[0]}; write --plan alone, or leave it out to train")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--gpu_memory", type=float)
    parser.add_argument("--gpus", type=int)
    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"--plan: {error}; as in --gpu_memory 24 --gpus 8 (GiB, number)") from None
    if options.gpu_memory is not None and not 0 < options.gpu_memory < math.inf:
        raise ConfigError(f"--gpu_memory is the memory of a GPU in GiB, got {options.gpu_memory:g}")
    if options.gpus is not None and options.gpus < 1:
        raise ConfigError(f"--gpus is a number of GPUs, at least 1, got {options.gpus}")
    return options, rest


# Figures


def make_plan(
    config: Config, model: MultiModalModel, gpu: bool = True, checkpointing: tuple[bool, ...] = (False, True)
) -> Plan:
    """Memory of training with `config` on a GPU, or with `gpu=False` on a CPU.

    Args:
        model: of `build_empty_model`; quantized here, and of no use afterwards.
        checkpointing: the settings of it that are worth the time.

    Raises:
        ConfigError: samples of `data.max_length` have no room for a picture.
    """
    c, length, n = config.train, max_length(config, model), most_views(model) * model.media.num_features
    if length <= n:
        raise ConfigError(f"data.max_length is {length}, but a picture alone takes {n} tokens; raise it")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.model.quantization != "none":
        quantize_meta(model, config.model.quantization)
    layers = [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]
    layers += [module for module in model.modules() if next(module.children(), None) is None]
    with fake_weights(model, gpu):
        batch, eval_batch = c.per_device_train_batch_size, c.per_device_eval_batch_size
        options = {"length": length, "bf16": c.bf16}
        accumulation, every = c.gradient_accumulation_steps, c.gradient_checkpointing_every
        steps = {
            on: step_memory(model, batch, checkpointing=on and every, accumulation=accumulation, **options)
            for on in checkpointing
        }
        dtype = steps[checkpointing[0]].hidden_dtype
        loss = {
            name: loss_memory(model, batch, dtype=dtype, naive=name == "naive", **options)
            for name in ("ours", "naive")
        }
        validation = dict.fromkeys(loss, 0)
        if config.data.validation:
            validation = {
                name: validation_memory(model, eval_batch, naive=name == "naive", **options) for name in loss
            }
    return Plan(
        weights={name: _bytes(parameters) for name, parameters in model_parts(model).items()},
        gradients=_bytes(trained),
        optimizer=optimizer_bytes([parameter.numel() for parameter in trained], c.optimizer),
        largest_layer=max(_bytes(layer.parameters()) for layer in layers),
        largest_gradient=max(_bytes(p for p in layer.parameters() if p.requires_grad) for layer in layers),
        steps=steps,
        loss=loss,
        validation=validation,
    )


def _bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def optimizer_bytes(sizes: list[int], optimizer: str) -> int:
    """AdamW's two moments of tensors of these sizes: float32, or 8 bits with a float32 factor per block of 256.

    bitsandbytes keeps tensors of fewer than 4096 elements in float32.
    """
    if optimizer == "adamw":
        return sum(2 * 4 * size for size in sizes)
    return sum(2 * (size + 4 * -(-size // 256)) if size >= 4096 else 2 * 4 * size for size in sizes)


def fit(peak: int, gpu_memory: float) -> str:
    """Whether a peak in bytes fits a GPU of `gpu_memory` GiB: "yes", "tight" or "no"."""
    room = gpu_memory * GIB - RESERVED
    return "yes" if peak <= USABLE * room else "tight" if peak <= room else "no"


# Report


def report(config: Config, gpu_memory: float | None = None, gpus: int | None = None) -> str:
    """The text that `--plan` prints."""
    model = build_empty_model(config.model)
    counted = {name: _counts(parameters) for name, parameters in model_parts(model).items()}
    plan = make_plan(config, model)
    parts = [
        _assumptions(config, model),
        _module_text(counted, plan, config.model.quantization),
        _memory_text(plan, config),
        _stage_text(plan, config.train.gradient_checkpointing, gpus, gpu_memory),
    ]
    if gpu_memory is not None:
        parts.append(_verdict(config, plan, gpu_memory))
    return "\n\n".join(parts)


def _assumptions(config: Config, model: MultiModalModel) -> str:
    c, length = config.train, max_length(config, model)
    lines = [
        f"Assumed, as the worst case: samples of {length:,} tokens (data.max_length), each with one picture of "
        f"{most_views(model) * model.media.num_features} features, all other",
        f"tokens supervised. Samples per micro-batch: {c.per_device_train_batch_size}; micro-batches per optimizer "
        f"step: {c.gradient_accumulation_steps}; {'bfloat16' if c.bf16 else 'no'} autocast; "
        f"{config.model.attn_implementation or 'sdpa'} attention.",
    ]
    if config.data.validation:
        lines.append(f"Validation between the steps: {c.per_device_eval_batch_size} such samples at a time.")
    if c.packing and config.model.attn_implementation == "eager":
        lines.append("Packing with eager attention takes more than is planned here: scores of a whole row, not of each "
                     "sample.")  # fmt: skip
    if config.model.attn_implementation in (None, "sdpa") and not c.packing:
        layers, batch = model.language_model.config.num_hidden_layers, c.per_device_train_batch_size
        masks = {"": (batch, layers), " with checkpointing": (batch, 1)}
        if config.data.validation:
            masks[" in validation"] = (c.per_device_eval_batch_size, 1)
        costs = [f"{_mask_bytes(config, length, *of) / GIB:.2f} GiB{where}" for where, of in masks.items() if of[0] > 1]
        lines += [f"Padding in a batch costs more, for masks: {', '.join(costs)}."] if costs else []
    return "\n".join(lines)


def _mask_bytes(config: Config, length: int, batch: int, layers: int) -> int:
    """The boolean mask `[B, 1, T, T]` and its copies in the dtype of the queries, one of each layer that keeps it."""
    size = 2 if config.train.bf16 else getattr(torch, config.model.dtype).itemsize
    return batch * length**2 * (1 + size * layers)


def _counts(parameters: list[nn.Parameter]) -> tuple[int, int, str]:
    """Parameters, trainable ones, dtypes."""
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return sum(parameter.numel() for parameter in parameters), trainable, ", ".join(dtypes)


def _module_text(counted: dict[str, tuple[int, int, str]], plan: Plan, quantization: str) -> str:
    rows = [("module", "parameters", "trainable", "weights (GiB)", "dtype")]
    for name, (count, trainable, dtype) in counted.items():
        dtype = f"{quantization}, {dtype}" if name == "decoder" and quantization != "none" else dtype
        rows.append((name, f"{count:,}", f"{trainable:,}", f"{plan.weights[name] / GIB:.2f}", dtype))
    total, trainable = (sum(column) for column in list(zip(*counted.values(), strict=True))[:2])
    rows.append(("total", f"{total:,}", f"{trainable:,}", f"{sum(plan.weights.values()) / GIB:.2f}", ""))
    return text_table(rows, right=(1, 2, 3))


def _memory_text(plan: Plan, config: Config) -> str:
    used = config.train.gradient_checkpointing
    title = {on: f"{'with' if on else 'without'} checkpointing{' *' if on == used else ''}" for on in plan.steps}
    rows = [("one GPU (GiB)", *title.values())]

    def row(name: str, values) -> None:
        rows.append((name, *(f"{value / GIB:.2f}" for value in values)))

    row("weights", [sum(plan.weights.values())] * 2)
    row("gradients", [plan.gradients] * 2)
    row(f"optimizer state ({config.train.optimizer})", [plan.optimizer] * 2)
    row("activations kept for the backward pass", [step.saved for step in plan.steps.values()])
    row("logits and loss", [plan.loss["ours"]] * 2)
    row("logits and loss, naive [B, T, V]", [plan.loss["naive"]] * 2)
    if config.data.validation:
        row("validation: activations and loss", [plan.validation["ours"]] * 2)
    row("peak", [plan.peak(on) for on in plan.steps])
    rows.append(("  reached in", *map(plan.phase, plan.steps)))
    row("peak with naive logits", [plan.naive_peak(on) for on in plan.steps])
    return text_table(rows, right=(1, 2)) + "\n* this configuration. Not all of these exist at the time of the peak."


def _stage_text(plan: Plan, checkpointing: bool, gpus: int | None, gpu_memory: float | None) -> str:
    counts = [1, 2, 4, 8] if gpus is None else sorted({1, gpus})
    rows = [("peak per GPU (GiB)", *(f"{count} GPU{'s' if count > 1 else ''}" for count in counts))]
    for stage in STAGES:
        cells = []
        for count in counts:
            peak = plan.peak(checkpointing, stage, count)
            cells.append(f"{peak / GIB:.2f}" + (f" {fit(peak, gpu_memory)}" if gpu_memory is not None else ""))
        rows.append((stage, *cells))
    return text_table(rows, right=tuple(range(1, len(counts) + 1))) + (
        "\nEach GPU has its own micro-batch. train.py runs DDP; the rest is what an engine that divides optimizer state"
        "\n(ZeRO-1), gradients too (ZeRO-2, FSDP SHARD_GRAD_OP) or weights too (ZeRO-3, FSDP FULL_SHARD) would need."
    )


def _verdict(config: Config, plan: Plan, gpu_memory: float) -> str:
    """Whether one GPU is enough, and if not, the least invasive changes that make it so, with the peak of each."""
    used = config.train.gradient_checkpointing
    peak = plan.peak(used)
    lines = [
        f"Does it fit {gpu_memory:g} GiB? On one GPU it takes {peak / GIB:.2f} GiB: {fit(peak, gpu_memory)}",
        f"(yes: {USABLE:.0%} of what is left beside {RESERVED / GIB:g} GiB for CUDA are enough; "
        "tight: all of it is, if fragmentation allows).",
    ]
    if fit(peak, gpu_memory) == "yes":
        return "\n".join(lines)
    lines.append("Changes that need less, each on top of those before it:")
    changed = copy.deepcopy(config)
    while text := _change(changed, plan.phase(used)):
        used = changed.train.gradient_checkpointing
        plan = make_plan(changed, build_empty_model(changed.model), checkpointing=(used,))
        peak = plan.peak(used)
        lines.append(f"  {text}: {peak / GIB:.2f} GiB, {fit(peak, gpu_memory)}")
        if fit(peak, gpu_memory) == "yes":
            return "\n".join(lines)
    lines.append("  beyond that: a smaller data.max_length or lora.r, or weights divided among GPUs (ZeRO-3)")
    return "\n".join(lines)


def _change(config: Config, phase: str) -> str | None:
    """Makes the next change in `config`, whose peak is in `phase`: as arguments of train.py, None where none is left.

    A smaller batch in validation touches no result but helps only where that is the peak.
    """
    c = config.train
    if phase == "validation" and c.per_device_eval_batch_size > 1:
        c.per_device_eval_batch_size = 1
        return "per_device_eval_batch_size=1"
    if not c.gradient_checkpointing:
        c.gradient_checkpointing = True
        return "gradient_checkpointing=true"
    if c.gradient_checkpointing_every > 1:
        c.gradient_checkpointing_every = 1
        return "gradient_checkpointing_every=1"
    if c.per_device_train_batch_size > 1:
        c.gradient_accumulation_steps *= c.per_device_train_batch_size
        c.per_device_train_batch_size = 1
        return f"per_device_train_batch_size=1 gradient_accumulation_steps={c.gradient_accumulation_steps}"
    if c.optimizer == "adamw":
        c.optimizer = "adamw_8bit"
        return "optimizer=adamw_8bit"
    if config.model.quantization != "nf4":
        config.model.quantization = "nf4"
        return "quantization=nf4"
    return None
