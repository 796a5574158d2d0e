"""rsLoRA and DoRA in a run: from the configuration to the checkpoint, and on from there."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from build import build_model
from tests.conftest import Tiny
from train import train

BOTH = ("lora.rslora=true", "lora.dora=true")


def log_of(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    keys = ("step", "loss", "grad_norm", "lora_lr")
    return [tuple(entry.get(key) for key in keys) for entry in log if "loss" in entry]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_with_both_resumes_bit_for_bit(tiny: Tiny, tmp_path):
    overrides = ("max_steps=4", "save_steps=2", "weight_decay=0.1", *BOTH)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(tiny.config(whole, *overrides))
    recorded = json.loads((whole / "adapter_config.json").read_text())
    assert recorded["use_rslora"] and recorded["use_dora"]
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(whole / "config.yaml", resumed)
    train(tiny.config(resumed, *overrides))
    assert log_of(resumed) == log_of(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name
    start = {name: p for name, p in build_model(tiny.config(whole, *BOTH).model).decoder.named_parameters()}
    lengths = [name for name in weights(whole) if name.endswith(".lora_magnitude_vector")]
    assert len(lengths) == 6  # c_attn, w1 and w2 of two layers
    for name in lengths:
        assert not torch.equal(weights(whole)[name], start[f"{name}.default.weight"]), name


@pytest.mark.parametrize("rslora,scale", [("false", 8 / 4), ("true", 8 / 4**0.5)])
def test_scale_of_the_configuration(tiny: Tiny, tmp_path, rslora, scale):
    decoder = build_model(tiny.config(tmp_path, f"lora.rslora={rslora}").model).language_model
    assert decoder.transformer.h[0].mlp.w1.scaling == {"default": scale}
