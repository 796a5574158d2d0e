"""What makes a training step fast must not change it: packing, the encoder ahead, checkpointing, casts of LoRA."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from build import build_model
from config import ConfigError
from dataset.record import write_records
from model import encoding
from model.decoder import compile_blocks
from tests.conftest import Tiny
from tests.test_train import NO_DROPOUT, KeepGradients, log_of, make_trainer
from train import train

STEP = (*NO_DROPOUT, "train_sampling_strategy=random", "per_device_train_batch_size=4", "gradient_accumulation_steps=2")


def gradients(tiny, folder, *overrides):
    """Gradients of two optimizer steps."""
    trainer = make_trainer(tiny.config(folder, *STEP, "max_steps=2", *overrides))
    keep = KeepGradients()
    trainer.add_callback(keep)
    trainer.train()
    return trainer, keep.steps


def assert_equal(found, expected, rtol=1e-4, atol=1e-7):
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def padded(tiny, tmp_path_factory):
    return gradients(tiny, tmp_path_factory.mktemp("padded"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_changes_no_gradient(tiny, padded, tmp_path, attention):
    trainer, packed = gradients(tiny, tmp_path, "packing=true", f"attn_implementation={attention}")
    assert_equal(packed, padded[1])
    assert trainer.state.log_history[0]["loss"] == pytest.approx(padded[0].state.log_history[0]["loss"], rel=1e-5)


def test_packed_run_from_start_to_end(tiny, tmp_path):
    """With validation, workers, an incomplete last batch and bfloat16."""
    options = ("packing=true", "bf16=true", f"validation={tiny.folder}/validation.parquet", "num_workers=1",
               "per_device_train_batch_size=5", "gradient_accumulation_steps=2")  # fmt: skip
    train(tiny.config(tmp_path, *options))
    log = log_of(tmp_path)
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 9))
    assert any("eval_loss" in entry for entry in log)


def test_validation_loss_of_packed_batches(tiny, tmp_path):
    options = ("max_steps=1", f"validation={tiny.folder}/validation.parquet")
    padded = make_trainer(tiny.config(tmp_path / "a", *options)).evaluate()
    packed = make_trainer(tiny.config(tmp_path / "b", *options, "packing=true")).evaluate()
    assert packed["eval_loss"] == pytest.approx(padded["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("views", [1, 3, 16])
def test_encoder_ahead_changes_no_gradient(tiny, padded, tmp_path, monkeypatch, views):
    monkeypatch.setattr(encoding, "VIEWS", views)
    _, ahead = gradients(tiny, tmp_path / "a")
    assert_equal(ahead, padded[1])


def test_encoder_sees_all_pictures_of_a_step_at_once(tiny, tmp_path):
    trainer = make_trainer(tiny.config(tmp_path, *STEP, "max_steps=1"))
    sizes, modes = [], []

    def note(_, inputs):
        sizes.append(len(inputs[0]))
        modes.append(torch.is_inference_mode_enabled())

    trainer.model.encoder.register_forward_pre_hook(note)
    trainer.train()
    assert len(sizes) == 1 and 4 < sizes[0] <= 8 and modes == [True]


def test_trained_encoder_runs_within_the_model(tiny, tmp_path):
    trainer = make_trainer(tiny.config(tmp_path, *STEP, "max_steps=1", "tune=all", "encoder_lr=1e-3"))
    before = {name: p.clone() for name, p in trainer.model.encoder.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.encoder.named_parameters())
    assert before and not any(torch.equal(after[name], parameter) for name, parameter in before.items())


def test_checkpointing_of_every_second_block(tiny, padded, tmp_path):
    trainer, some = gradients(tiny, tmp_path, "gradient_checkpointing=true", "gradient_checkpointing_every=2")
    assert_equal(some, padded[1])
    blocks = trainer.model.language_model.transformer.h
    assert sorted(block.gradient_checkpointing for block in blocks) == [False, True]


def test_checkpointing_of_some_blocks_needs_checkpointing(tiny, tmp_path):
    with pytest.raises(ConfigError, match="gradient_checkpointing_every needs"):
        tiny.config(tmp_path, "gradient_checkpointing_every=2")


class Casts(TorchDispatchMode):
    """Counts copies of activations from bfloat16 to float32."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += args[0].dtype == torch.bfloat16 and result.dtype == torch.float32
        return result


def test_lora_under_autocast_makes_no_float32_copy_of_its_input(tiny, tmp_path):
    model = build_model(tiny.config(tmp_path, "model.dtype=bfloat16").model)
    layer = model.language_model.transformer.h[0].mlp.w1
    hidden = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), Casts(hidden.shape) as casts:
        under_autocast = layer(hidden)
    assert casts.count == 0
    with Casts(hidden.shape) as casts:  # which float32 matrices need without autocast
        plain = layer(hidden)
    assert casts.count == 1
    torch.testing.assert_close(under_autocast, plain, rtol=0.02, atol=0.02)


def test_a_step_makes_no_tensor_of_all_logits(tiny, tmp_path):
    """Nor one of a padded row of them: the largest with the vocabulary has as many rows as tokens are supervised."""
    write_records(Tiny.records(8), tmp_path / "some.parquet")
    trainer = make_trainer(tiny.config(tmp_path / "run", *STEP, "max_steps=1", f"train={tmp_path}/some.parquet"))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    supervised, vocabulary = int((batch["labels"][:, 1:] != -100).sum()), trainer.model.language_model.config.vocab_size

    class Logits(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple | list) else [result]:
                if isinstance(value, torch.Tensor) and value.ndim and value.shape[-1] == vocabulary:
                    Logits.rows = max(Logits.rows, value.numel() // vocabulary)
            return result

    with Logits():
        trainer.model(**batch).loss.backward()
    assert 0 < Logits.rows <= supervised < batch["labels"].numel() // 2


@pytest.mark.parametrize("packing", ["false", "true"])
def test_compiled_blocks_change_no_gradient_and_are_compiled_once(tiny, padded, tmp_path, packing):
    config = tiny.config(tmp_path, *STEP, "max_steps=2", f"packing={packing}")
    trainer, keep = make_trainer(config), KeepGradients()
    trainer.add_callback(keep)
    torch._dynamo.reset()
    compile_blocks(trainer.model.language_model, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        trainer.train()
    assert_equal(keep.steps, padded[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
