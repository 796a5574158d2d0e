import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.decoder import load_decoder


@pytest.fixture
def folder(golden, tmp_path):
    return shutil.copytree(golden / "llm", tmp_path / "llm")


def test_complete_weights_load(folder):
    decoder = load_decoder(folder, "bfloat16", attn_implementation="eager")
    assert decoder.dtype == torch.bfloat16 and decoder.config._attn_implementation == "eager"
    on_disk = load_file(folder / "model.safetensors")
    assert torch.equal(decoder.lm_head.weight, on_disk["lm_head.weight"].bfloat16())


def test_every_kind_of_wrong_weight_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.0.attn.c_proj.weight"]
    weights["transformer.h.1.ln_1.weight"] = torch.ones(3)
    weights["transformer.h.9.ln_1.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights are not those of a Qwen-1 decoder") as error:
        load_decoder(folder, "float32")
    for name in ("h.0.attn.c_proj.weight", "h.1.ln_1.weight", "h.9.ln_1.weight"):
        assert f"transformer.{name}" in str(error.value)


def test_a_model_of_another_family_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen2", "num_hidden_layers": 30}))
    with pytest.raises(ValueError, match="missing keys: .* and .* more"):
        load_decoder(folder, "float32")
