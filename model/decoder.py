"""The frozen decoder, from disk or hub."""

from pathlib import Path

import torch

from qwen import MultimodalQWenLMHeadModel

NAMED = 5  # weights of a kind that an error names


def load_decoder(path: str | Path, dtype: torch.dtype | str, **kwargs) -> MultimodalQWenLMHeadModel:
    """A Qwen-1 decoder with the weights of the folder or hub id `path`, every one of them.

    transformers only warns about a weight that is missing and draws it at random. No checkpoint holds frozen weights,
    so it would be drawn anew at each load.

    Args:
        kwargs: further arguments of transformers' `from_pretrained`, such as `attn_implementation`.

    Raises:
        OSError: nothing to load under `path`.
        ValueError: weights are missing, unexpected or of another shape than the configuration says.
    """
    model, report = MultimodalQWenLMHeadModel.from_pretrained(
        path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    problems = []
    for what, found in report.items():
        if found:
            names = sorted(map(str, found))
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            problems.append(f"{what.replace('_', ' ')}: {', '.join(names[:NAMED])}{more}")
    if problems:
        raise ValueError(f"{path}: the weights are not those of a Qwen-1 decoder; " + "; ".join(problems))
    return model
