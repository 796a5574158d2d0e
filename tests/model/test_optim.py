import pytest
import torch

from model.lora import wrap_with_lora
from model.optim import parameter_groups
from model.table import module_table

RATES = {"lora": 1, "projector": 1}


def _names(model, group) -> set[str]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return {by_id[id(p)] for p in group["params"]}


def test_groups(make_model):
    model = make_model(position_embedding=True)
    groups = {group["name"]: group for group in parameter_groups(model, {"lora": 1e-4, "projector": 1e-3}, 0.1)}
    assert list(groups) == ["lora_decay", "projector_decay", "projector_no_decay"]
    assert _names(model, groups["projector_decay"]) == {"projector.layers.0.weight", "projector.layers.2.weight"}
    assert _names(model, groups["projector_no_decay"]) == {
        "projector.layers.0.bias",
        "projector.layers.2.bias",
        "projector.position_embedding",
    }
    assert all(".lora_" in name for name in _names(model, groups["lora_decay"]))
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "lora_decay": (1e-4, 0.1),
        "projector_decay": (1e-3, 0.1),
        "projector_no_decay": (1e-3, 0.0),
    }
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_one_dimensional_adapter_weights_are_not_decayed(make_model):
    """DoRA's magnitudes are vectors."""
    model = make_model()
    config = model.decoder.peft_config["default"]
    base = model.decoder.unload()
    config.use_dora = True
    model.decoder = wrap_with_lora(base, config)
    groups = {group["name"]: group for group in parameter_groups(model, {"lora": 1e-4, "projector": 1e-3}, 0.1)}
    names = _names(model, groups["lora_no_decay"])
    assert names and all("lora_magnitude_vector" in name for name in names)


def test_without_lora_or_projector(make_model):
    model = make_model(lora=False)
    assert [group["name"] for group in parameter_groups(model, RATES, 0)] == ["projector_decay", "projector_no_decay"]
    model.projector.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(model, RATES, 0)


def test_anything_else_trainable_is_an_error(make_model):
    model = make_model()
    model.language_model.transformer.wte.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="decoder.*wte.weight is trainable, but there is no learning rate"):
        parameter_groups(model, RATES, 0)


def test_table(make_model):
    model = make_model(dtype=torch.bfloat16)
    table = module_table(model, parameter_groups(model, {"lora": 3e-5, "projector": 1e-4}, 0.0))
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    count = {
        "encoder": sum(p.numel() for p in model.encoder.parameters()),
        "projector": sum(p.numel() for p in model.projector.parameters()),
        "LoRA": sum(p.numel() for name, p in model.decoder.named_parameters() if ".lora_" in name),
        "decoder": sum(p.numel() for name, p in model.decoder.named_parameters() if ".lora_" not in name),
    }
    assert rows["module"] == ["parameters", "trainable", "dtype", "LR"]
    assert rows["encoder"] == [f"{count['encoder']:,}", "0", "bfloat16"]
    assert rows["projector"] == [f"{count['projector']:,}", f"{count['projector']:,}", "float32", "0.0001"]
    assert rows["LoRA"] == [f"{count['LoRA']:,}", f"{count['LoRA']:,}", "float32", "3e-05"]
    assert rows["decoder"] == [f"{count['decoder']:,}", "0", "bfloat16"]
    assert rows["total"][:2] == [f"{sum(count.values()):,}", f"{count['projector'] + count['LoRA']:,}"]
    assert "LR" in module_table(model).splitlines()[0]
