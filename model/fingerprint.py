"""A sample of frozen weights, by which a checkpoint recognises the encoder and decoder it was trained with."""

import torch
from torch import nn

TENSORS, VALUES = 16, 8  # how many tensors of a module, and values of each, are recorded
TOLERANCE = 0.01  # relative; a rounding to bfloat16 changes a value by 0.4 % at most


def weight_sample(module: nn.Module) -> dict[str, list[float]]:
    """Values at fixed places of some parameters, by name; the same whatever dtype the module has.

    Adapters, and matrices that are quantized, are left out.
    """
    names = [name for name, _ in module.named_parameters() if ".lora_" not in name]
    picked = {names[len(names) * place // TENSORS] for place in range(TENSORS)} if names else set()
    return {
        name.replace(".base_layer", ""): _values(parameter)
        for name, parameter in module.named_parameters()
        if name in picked and parameter.dtype.is_floating_point
    }


def _values(parameter: nn.Parameter) -> list[float]:
    flat = parameter.detach().flatten()
    places = torch.arange(VALUES) * (len(flat) // VALUES) + len(flat) // (2 * VALUES)
    return [float(f"{value:.6g}") for value in flat[places.to(flat.device)].float().tolist()]


def sample_differences(found: dict[str, list[float]], recorded: dict[str, list[float]]) -> list[str]:
    """Names of the parameters in both samples whose values differ by more than a rounding."""
    return [
        name
        for name in found.keys() & recorded.keys()
        if len(found[name]) != len(recorded[name])
        or any(
            abs(ours - theirs) > TOLERANCE * max(abs(ours), abs(theirs)) + 1e-6
            for ours, theirs in zip(found[name], recorded[name], strict=True)
        )
    ]
