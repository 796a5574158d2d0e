"""Optimizer groups: each trained part with its learning rate, with and without weight decay."""

from torch import nn


def parameter_groups(model: nn.Module, rates: dict[str, float], weight_decay: float) -> list[dict]:
    """Sorts every trainable parameter of a `MultiModalModel` into groups; empty ones are left out.

    Each part of `rates` ("lora", "projector", "decoder", "encoder": learning rates) has a group `<part>_decay` and a
    group `<part>_no_decay`, for biases, norms and position vectors. Frozen parameters stand in no group.

    Returns:
        Groups for a torch optimizer: `{"name", "params", "lr", "weight_decay"}`.

    Raises:
        ValueError: a trainable parameter belongs to no part of `rates`, or nothing is trainable.
    """
    groups = {
        f"{part}_{suffix}": {"name": f"{part}_{suffix}", "params": [], "lr": rate, "weight_decay": decay}
        for part, rate in rates.items()
        for suffix, decay in (("decay", weight_decay), ("no_decay", 0.0))
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and not name.endswith("position_embedding")
        part = trained_part(name)
        if part not in rates:
            raise ValueError(f"{name} is trainable, but there is no learning rate for the {part}")
        groups[f"{part}_{'decay' if decayed else 'no_decay'}"]["params"].append(parameter)
    groups = [group for group in groups.values() if group["params"]]
    if not groups:
        raise ValueError("nothing to train: add LoRA to the decoder or leave the projector trainable")
    return groups


def part_of(group: dict) -> str:
    """"lora", "projector", "decoder" or "encoder", of a group of `parameter_groups`."""
    return group["name"].partition("_")[0]


def trained_part(name: str) -> str:
    """"lora", "projector", "decoder" or "encoder", from the name of a parameter of a `MultiModalModel`."""
    return "lora" if ".lora_" in name else name.partition(".")[0]
