"""Adapters published by the first system: `adapter_model.bin`, `adapter_config.json`, `other_params.bin`."""

from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn

from model.checkpoint import load_states
from model.lora import wrap_with_lora
from model.model import MultiModalModel
from model.projector import build_projector
from qwen import MultimodalQWenLMHeadModel, QWenTokenizer


def load_legacy(
    folder: str | Path,
    encoder: nn.Module,
    decoder: MultimodalQWenLMHeadModel,
    placeholder_id: int,
    tokenizer: QWenTokenizer | None = None,
) -> MultiModalModel:
    """Builds a model in eval mode from a frozen encoder, a plain decoder and a legacy adapter folder.

    `adapter_model.bin` holds LoRA matrices under peft's names, `other_params.bin` the projector as an
    `nn.Sequential(Linear, GELU, Linear)` (`0.weight`, `0.bias`, `2.weight`, `2.bias`). Adapters trained with SigLIP
    want an encoder with `drop_first_patch=True`. `save_pretrained` of the result writes the present format.

    Raises:
        FileNotFoundError: one of the three files is missing.
        ValueError: names or shapes are not those of such a model; lists all of them.
    """
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.bin", "other_params.bin"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no legacy adapter folder: it has no {name}")
    adapter = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    projector = torch.load(folder / "other_params.bin", map_location="cpu", weights_only=True)
    config = LoraConfig.from_pretrained(str(folder))
    model = MultiModalModel(
        encoder,
        build_projector("mlp", encoder.width, decoder.config.hidden_size),
        wrap_with_lora(decoder, config),
        placeholder_id,
        tokenizer,
    )
    load_states(model, adapter, {f"layers.{name}": weight for name, weight in projector.items()}, source=str(folder))
    return model.eval()
