"""Rows and pictures for the models of `conftest.py`."""

import torch

from model import MultiModalModel

PLACEHOLDER = 310


def prompt(model: MultiModalModel, *parts: int | list[int]) -> list[int]:
    """Ids of one row: a list stands for itself, a number for so many pictures."""
    ids = []
    for part in parts:
        ids += [PLACEHOLDER] * (part * model.encoder.num_features) if isinstance(part, int) else part
    return ids


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
