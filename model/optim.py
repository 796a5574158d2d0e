"""Optimizer groups: LoRA and projector, each with its learning rate, with and without weight decay."""

from torch import nn


def parameter_groups(model: nn.Module, lora_lr: float, projector_lr: float, weight_decay: float) -> list[dict]:
    """Sorts every trainable parameter of a `MultiModalModel` into up to four groups; empty ones are left out.

    In order: `lora_decay`, `lora_no_decay`, `projector_decay`, `projector_no_decay`. Biases, norms and position vectors
    are not decayed. Frozen parameters stand in no group.

    Returns:
        Groups for a torch optimizer: `{"name", "params", "lr", "weight_decay"}`.

    Raises:
        ValueError: a trainable parameter belongs neither to an adapter nor to the projector, or nothing is trainable.
    """
    rates = {"lora": lora_lr, "projector": projector_lr}
    groups = {
        f"{part}_{suffix}": {"name": f"{part}_{suffix}", "params": [], "lr": rate, "weight_decay": decay}
        for part, rate in rates.items()
        for suffix, decay in (("decay", weight_decay), ("no_decay", 0.0))
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and not name.endswith("position_embedding")
        groups[f"{trained_part(name)}_{'decay' if decayed else 'no_decay'}"]["params"].append(parameter)
    groups = [group for group in groups.values() if group["params"]]
    if not groups:
        raise ValueError("nothing to train: add LoRA to the decoder or leave the projector trainable")
    return groups


def trained_part(name: str) -> str:
    """"lora" or "projector", from the name of a trainable parameter of a `MultiModalModel`."""
    if name.startswith("projector."):
        return "projector"
    if name.startswith("decoder.") and ".lora_" in name:
        return "lora"
    raise ValueError(f"{name} is trainable but neither LoRA nor projector; freeze it with requires_grad_(False)")
