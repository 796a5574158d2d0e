"""Golden case f: encoder, projector, LoRA decoder, gradients, optimizer steps and generation of the recorded system."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from model.optim import parameter_groups

KINDS = ["siglip", "clip"]
LOGITS = {"atol": 2e-4, "rtol": 0}
RATES = {"wd0": (3e-5, 1e-4, 0.0), "wd0.01": (3e-5, 1e-4, 0.01), "big": (1e-2, 5e-2, 0.3)}
CASES = [
    ("siglip", "wd0", 1),
    ("siglip", "wd0.01", 1),
    ("siglip", "big", 1),
    ("siglip", "big", 3),
    ("clip", "wd0.01", 1),
    ("clip", "big", 1),
]


def _expand(ids: list[int], model) -> list[int]:
    """The recorded rows hold one placeholder per picture."""
    n = model.encoder.num_features
    return [token for i in ids for token in ([i] * n if i == model.placeholder_id else [i])]


def _batch(golden, kind, model):
    io = load_file(golden / f"f_{kind}" / "io.safetensors")
    input_ids = torch.tensor([_expand(row, model) for row in io["input_ids"].tolist()])
    return {"input_ids": input_ids, "pixel_values": io["pixel_values"], "labels": io["labels"]}, io


def _recorded_name(name: str) -> str:
    return name.replace("decoder.", "LLM.", 1).replace("projector.layers.", "feature_proj.", 1)


def _trained(model) -> dict:
    return {_recorded_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def _assert_equals_recorded(model, recorded: dict, case: str, rate: float) -> None:
    """Adam's update is about lr * sign(grad), which rounding decides where the gradient is about zero."""
    trained = _trained(model)
    names = {name.removeprefix(f"{case}.") for name in recorded if name.startswith(f"{case}.")}
    assert names == trained.keys()
    for name, parameter in trained.items():
        clear = recorded[f"grad.{name}"].abs() >= 1e-5
        torch.testing.assert_close(
            parameter.detach()[clear], recorded[f"{case}.{name}"][clear], atol=0.02 * rate, rtol=1e-4, msg=name
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_logits_and_loss(golden, legacy_model, kind, mode):
    model = legacy_model(kind).train(mode == "train")
    if mode == "train":
        model.gradient_checkpointing_enable()
    batch, io = _batch(golden, kind, model)
    features = model.encode_images(batch["pixel_values"])
    torch.testing.assert_close(features.view_as(io["feature_proj_out"]), io["feature_proj_out"], atol=1e-5, rtol=0)
    output = model(**batch)
    assert output.logits is None
    torch.testing.assert_close(output.loss, io[f"{mode}.loss"][0], atol=1e-5, rtol=0)
    del batch["labels"]
    torch.testing.assert_close(model(**batch).logits, io[f"{mode}.logits"], **LOGITS)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(golden, legacy_model, kind):
    model = legacy_model(kind).train()
    batch, _ = _batch(golden, kind, model)
    recorded = load_file(golden / f"f_{kind}" / "optim.safetensors")
    model(**batch).loss.backward()
    trained = _trained(model)
    assert {f"grad.{name}" for name in trained} == {name for name in recorded if name.startswith("grad.")}
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, recorded[f"grad.{name}"], atol=1e-5, rtol=1e-3, msg=name)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("kind,case,steps", CASES)
def test_optimizer_steps(golden, legacy_model, kind, case, steps):
    model = legacy_model(kind).train()
    batch, _ = _batch(golden, kind, model)
    facts = json.loads((golden / f"f_{kind}" / "facts.json").read_text())["optimizer"][case]
    lora_lr, projector_lr, weight_decay = RATES[case]
    optimizer = torch.optim.AdamW(parameter_groups(model, {"lora": lora_lr, "projector": projector_lr}, weight_decay))
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == pytest.approx(facts["losses_before_each_step"][:steps], abs=2e-3 if steps > 1 else 1e-5)
    recorded = load_file(golden / f"f_{kind}" / "optim.safetensors")
    _assert_equals_recorded(model, recorded, f"{case}.step{steps}", lora_lr)


def test_trainer_steps(golden, legacy_model, tmp_path):
    """Three steps of transformers' Trainer: gradient clipping at 1 and a linear schedule without warm-up."""
    model = legacy_model("siglip")
    batch, _ = _batch(golden, "siglip", model)

    class GoldenTrainer(Trainer):
        def create_optimizer(self, model=None):
            lora_lr, projector_lr, weight_decay = RATES["big"]
            groups = parameter_groups(self.model, {"lora": lora_lr, "projector": projector_lr}, weight_decay)
            self.optimizer = torch.optim.AdamW(groups)
            return self.optimizer

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=3,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{key: batch[key][i] for key in batch} for i in range(3)]
    trainer = GoldenTrainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    recorded = json.loads((golden / "f_siglip" / "facts.json").read_text())["hftrainer"]
    assert losses == pytest.approx(recorded["losses"], abs=2e-3)
    weights = load_file(golden / "f_siglip" / "optim.safetensors")
    _assert_equals_recorded(model, weights, "hftrainer.step3", RATES["big"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_generate(golden, legacy_model, kind):
    """The recorded system cut the last token when generation ended by length; here none is lost."""
    model = legacy_model(kind)
    model.language_model.config.ntk_alpha_mode = "frozen"
    recorded = load_file(golden / f"f_{kind}" / "generate.safetensors")
    _, io = _batch(golden, kind, model)
    ids = torch.tensor([_expand(recorded["gen.prompt_ids"].tolist(), model)])
    picture = io["pixel_values"][recorded["gen.image_row"]]
    new = model.generate(ids, pixel_values=picture)
    whole = recorded["gen.no_eos.raw_sequences"][:, len(recorded["gen.prompt_ids"]) :]
    assert new.tolist() == whole.tolist()
    assert new[:, :-1].tolist() == recorded["gen.no_eos.out_ids"].tolist()
    eos = int(recorded["gen.with_eos.eos_id"])
    stopped = model.generate(ids, pixel_values=picture, eos_token_id=eos)
    assert stopped.tolist() == [[*recorded["gen.with_eos.out_ids"][0].tolist(), eos]]
