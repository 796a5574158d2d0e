"""Samples of weights: a checkpoint recognises by them its encoder and decoder, an evaluation the model it is of."""

import hashlib
import re
from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn

VALUES = 4  # of each sampled tensor
TOLERANCE = 0.01  # relative; a rounding to bfloat16 changes a value by 0.4 % at most


def weight_sample(module: nn.Module) -> dict[str, str]:
    """Values at fixed places of parameters and buffers, by name; about the same whatever dtype the module has.

    Of tensors that every layer has, those of the first and the last one are taken. Left out are adapters and matrices
    that are quantized.
    """
    tensors = _tensors(module)
    kinds: dict[str, list[str]] = {}
    for name in tensors:
        kinds.setdefault(re.sub(r"\.\d+\.", ".N.", name), []).append(name)
    picked = dict.fromkeys(name for names in kinds.values() for name in (names[0], names[-1]))
    return {name: " ".join(f"{value:.6g}" for value in _values(tensors[name])) for name in picked}


def sample_differences(module: nn.Module, recorded: dict[str, str]) -> list[str]:
    """Names of sampled tensors that the module lacks or whose values differ by more than a rounding."""
    tensors = _tensors(module)
    quantized = {_plain(name) for name, parameter in module.named_parameters() if not parameter.is_floating_point()}
    return [
        name
        for name, values in recorded.items()
        if name not in quantized
        and not (name in tensors and _agree(_values(tensors[name]), [float(value) for value in values.split()]))
    ]


def digest(module: nn.Module) -> str:
    """Tells this module's weights from others', adapters among them: a digest of some values of every tensor.

    It is the same on every device, and another one in another dtype. Left out are matrices that are quantized.
    """
    parts = [
        f"{name} {list(tensor.shape)} {' '.join(map(str, _values(tensor)))}"
        for name, tensor in sorted(chain(module.named_parameters(), module.named_buffers()))
        if tensor.is_floating_point() and tensor.numel()
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        _plain(name): tensor
        for name, tensor in chain(module.named_parameters(), module.named_buffers())
        if ".lora_" not in name and tensor.is_floating_point() and tensor.numel()
    }


def _plain(name: str) -> str:
    """The name without peft's wrapper of the layer."""
    return name.replace(".base_layer", "")


def _values(tensor: Tensor) -> list[float]:
    flat = tensor.detach().flatten()
    places = (2 * torch.arange(VALUES, device=flat.device) + 1) * len(flat) // (2 * VALUES)
    return flat[places].float().tolist()


def _agree(found: Iterable[float], recorded: list[float]) -> bool:
    # Written so that a value that is not a number agrees with none.
    return len(recorded) == VALUES and all(
        abs(ours - theirs) <= TOLERANCE * max(abs(ours), abs(theirs)) + 1e-6
        for ours, theirs in zip(found, recorded, strict=True)
    )
