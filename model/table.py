"""The table of modules that a run prints at its start."""

from collections.abc import Sequence

from torch import nn

from dataset.text_table import text_table
from model.lora import adapted_layers


def module_table(model: nn.Module, groups: Sequence[dict] = ()) -> str:
    """Rows `module, parameters, trainable, dtype, LR` of a `MultiModalModel`, and which layers LoRA adapts.

    Args:
        groups: optimizer groups (`model.optim.parameter_groups`); without them the LR column is empty.
    """
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    parts = model_parts(model)
    parts["total"] = [parameter for parameters in parts.values() for parameter in parameters]
    rows = [("module", "parameters", "trainable", "dtype", "LR")]
    rows += [_row(name, parameters, rates) for name, parameters in parts.items()]
    table = text_table(rows, right=(1, 2))
    return f"{table}\nLoRA: {', '.join(adapted_layers(model.decoder))}" if "LoRA" in parts else table


def model_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters of a `MultiModalModel` by "encoder", "projector", "decoder" and "LoRA"; parts without any left out."""
    parts: dict[str, list[nn.Parameter]] = {"encoder": [], "projector": [], "decoder": [], "LoRA": []}
    for name, parameter in model.named_parameters():
        parts["LoRA" if ".lora_" in name else name.partition(".")[0]].append(parameter)
    return {name: parameters for name, parameters in parts.items() if parameters}


def _row(name: str, parameters: list[nn.Parameter], rates: dict[int, float]) -> tuple[str, ...]:
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    dtypes = sorted({_dtype(parameter) for parameter in parameters})
    lrs = sorted({rates[id(parameter)] for parameter in parameters if id(parameter) in rates})
    return (
        name,
        f"{sum(map(_count, parameters)):,}",
        f"{trainable:,}",
        ", ".join(dtypes),
        ", ".join(f"{lr:g}" for lr in lrs),
    )


def _count(parameter: nn.Parameter) -> int:
    """Numbers in a parameter; bitsandbytes packs two 4-bit ones into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()


def _dtype(parameter: nn.Parameter) -> str:
    packed = getattr(parameter, "quant_state", None)
    return str(parameter.dtype).removeprefix("torch.") if packed is None else packed.quant_type
