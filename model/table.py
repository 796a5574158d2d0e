"""The table of modules that a run prints at its start."""

from collections.abc import Sequence

from torch import nn


def module_table(model: nn.Module, groups: Sequence[dict] = ()) -> str:
    """Rows `module, parameters, trainable, dtype, LR` of a `MultiModalModel`.

    Args:
        groups: optimizer groups (`model.optim.parameter_groups`); without them the LR column is empty.
    """
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    parts: dict[str, list[nn.Parameter]] = {"encoder": [], "projector": [], "decoder": [], "LoRA": []}
    for name, parameter in model.named_parameters():
        parts["LoRA" if ".lora_" in name else name.partition(".")[0]].append(parameter)
    parts["total"] = [parameter for parameters in parts.values() for parameter in parameters]
    rows = [("module", "parameters", "trainable", "dtype", "LR")]
    rows += [_row(name, parameters, rates) for name, parameters in parts.items() if parameters]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in (1, 2) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _row(name: str, parameters: list[nn.Parameter], rates: dict[int, float]) -> tuple[str, ...]:
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    lrs = sorted({rates[id(parameter)] for parameter in parameters if id(parameter) in rates})
    return (
        name,
        f"{sum(parameter.numel() for parameter in parameters):,}",
        f"{trainable:,}",
        ", ".join(dtypes),
        ", ".join(f"{lr:g}" for lr in lrs),
    )
