from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen import MultimodalQWenLMHeadModel, QWenConfig

PLACEHOLDER = 310


@pytest.fixture
def llm(golden) -> MultimodalQWenLMHeadModel:
    """The recorded model (seq_length 32, three layers), fresh for each test, in eval mode."""
    return MultimodalQWenLMHeadModel.from_pretrained(golden / "llm", placeholder_id=PLACEHOLDER).eval()


@pytest.fixture(scope="session")
def recorded(golden) -> Callable[[str], dict[str, torch.Tensor]]:
    """`recorded("a_plain")`: the tensors of one file of recorded data."""

    def load(name: str) -> dict[str, torch.Tensor]:
        return load_file(Path(golden) / f"{name}.safetensors")

    return load


@pytest.fixture
def small_config() -> Callable[..., QWenConfig]:
    """A decoder of two narrow layers; keyword arguments override."""

    def build(**overrides) -> QWenConfig:
        shape = {
            "vocab_size": 97,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "kv_channels": 8,
            "intermediate_size": 96,
            "seq_length": 16,
            "initializer_range": 0.2,
        }
        return QWenConfig(**{**shape, **overrides})

    return build


@pytest.fixture(scope="session")
def expand() -> Callable[[torch.Tensor, int], torch.Tensor]:
    """`expand(input_ids [B, T], n)`: the one placeholder of each row `n` times, `[B, T - 1 + n]`."""

    def repeat_placeholder(input_ids: torch.Tensor, count: int) -> torch.Tensor:
        rows = []
        for row in input_ids:
            place = int((row == PLACEHOLDER).nonzero())
            rows.append(torch.cat([row[:place], row.new_full((count,), PLACEHOLDER), row[place + 1 :]]))
        return torch.stack(rows)

    return repeat_placeholder
