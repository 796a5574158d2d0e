"""What a run logs of itself, what it prints, and how it ends when its numbers are no longer finite."""

import json

import pytest
import torch

from config import ConfigError
from model.flops import TrainingFlops
from model.optim import trained_part
from tests.test_train import KeepGradients, make_trainer
from tests.training.launch import accelerate_environment, launch
from train import train
from training.console import cells, clock, width
from training.peak import TERA, known_peak, measured_peak, peak_flops
from training.watch import peak_memory, quoted


def first_log(trainer) -> dict:
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("clip", [0, 1e-3])
def test_norms_are_those_of_the_parts_before_clipping(tiny, tmp_path, clip):
    keep = KeepGradients()
    reference = make_trainer(tiny.config(tmp_path / "a", "max_steps=1", "max_grad_norm=0"))
    reference.add_callback(keep)
    reference.train()
    squares = {"lora": 0.0, "projector": 0.0}
    for name, gradient in keep.steps[0].items():
        squares[trained_part(name)] += float(gradient.double().square().sum())
    trainer = make_trainer(tiny.config(tmp_path / "b", "max_steps=1", f"max_grad_norm={clip}"))
    trainer.train()
    log = first_log(trainer)
    assert log["grad_norm"] > 10 * clip and squares["lora"] > 0 and squares["projector"] > 0
    for part, square in squares.items():
        assert log[f"{part}_grad_norm"] == pytest.approx(square**0.5, rel=1e-5)
    assert log["grad_norm"] == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-5)


def test_norms_of_each_trained_part_are_made_only_for_logs(tiny, tmp_path, monkeypatch):
    made = []
    from training import watching

    monkeypatch.setattr(watching, "gradient_norms", lambda *args: made.append(args) or {"encoder_grad_norm": 7.0})
    trainer = make_trainer(tiny.config(tmp_path, "tune=all", "max_steps=6", "logging_steps=3"))
    trainer.train()
    assert len(made) == 2 and first_log(trainer)["encoder_grad_norm"] == 7
    monkeypatch.undo()
    trainer = make_trainer(tiny.config(tmp_path, "tune=all", "max_steps=1"))
    trainer.train()
    assert {"decoder_grad_norm", "encoder_grad_norm", "projector_grad_norm"} <= first_log(trainer).keys()


def test_speed_counts_tokens_and_operations(tiny, tmp_path):
    config = tiny.config(tmp_path, "max_steps=2", "logging_steps=2", "gradient_accumulation_steps=2",
                         "train_sampling_strategy=sequential", "peak_tflops=1e-3")  # fmt: skip
    trainer = make_trainer(config)
    trainer.train()
    log = first_log(trainer)
    batches = [trainer.data_collator([trainer.train_dataset[i] for i in (j, j + 1)]) for j in (0, 2, 4, 6)]
    seconds = log["seconds_waiting_for_data"] + log["seconds_computing"]
    assert log["samples_per_second"] * seconds == pytest.approx(8, rel=0.05)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert log["tokens_per_second"] * seconds == pytest.approx(tokens, rel=0.05)
    flops = sum(TrainingFlops(trainer.model).of_batch(batch) for batch in batches)
    assert trainer.state.total_flos == flops
    assert log["mfu"] * seconds * 1e9 == pytest.approx(flops, rel=0.05)
    assert log["data_wait"] == pytest.approx(log["seconds_waiting_for_data"] / seconds, abs=0.02)
    assert 0.05 < log["memory_gib"] < 50


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_log_what_one_logs(tiny, tmp_path, kind):
    settings = ["dropout=0", "max_steps=2", "logging_steps=2", "max_grad_norm=0.1", "peak_tflops=1e-4",
                f"validation={tiny.folder}/validation.parquet", "per_device_eval_batch_size=2"]  # fmt: skip
    config = tiny.config(tmp_path / "one", *settings, "per_device_train_batch_size=4")
    train(config)
    statuses, output = launch(tiny.arguments(tmp_path / "two", *settings), 2, accelerate_environment(kind))
    assert statuses == [0, 0], output
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("one", "two")]
    # Of five records one process has two batches and the other only one.
    one, two = (state["log_history"][1]["eval_loss"] for state in states)
    assert two == pytest.approx(one, rel=1e-5)
    one, two = (state["log_history"][0] for state in states)
    assert one.keys() == two.keys() and two["mfu"] > 0
    for key in ("grad_norm", "lora_grad_norm", "projector_grad_norm"):
        assert two[key] == pytest.approx(one[key], rel=1e-3)
    per_sample = [log["tokens_per_second"] / log["samples_per_second"] for log in (one, two)]
    assert per_sample[1] == pytest.approx(per_sample[0], rel=1e-3)
    assert states[1]["total_flos"] == states[0]["total_flos"] > 0


def test_what_is_not_counted_is_not_logged(tiny, tmp_path, monkeypatch, capsys):
    def unknown(model):
        raise ValueError("no count of operations for mamba")

    monkeypatch.setattr("training.watching.TrainingFlops", unknown)
    trainer = make_trainer(tiny.config(tmp_path, "max_steps=1"))
    trainer.train()
    assert "mfu" not in first_log(trainer) and first_log(trainer)["tokens_per_second"] > 0
    assert "MFU is not logged: no count of operations for mamba" in capsys.readouterr().out


@pytest.mark.parametrize("change", [lambda loss: loss * float("nan"), lambda loss: loss + float("inf")])
@pytest.mark.parametrize("clip", [1, 0])
def test_loss_that_is_not_finite_stops_the_run_and_names_its_micro_batch(tiny, tmp_path, change, clip):
    """A loss to which infinity is added has a finite gradient."""
    trainer = make_trainer(tiny.config(tmp_path, "gradient_accumulation_steps=3", f"max_grad_norm={clip}"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    forward, calls = trainer.model.forward, []

    def broken(*args, **kwargs):
        output = forward(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            output.loss = change(output.loss)
        return output

    trainer.model.forward = broken
    problem = r"loss of step 1 is not finite \(\w+ in micro-batch 2 of 3\)"
    with pytest.raises(FloatingPointError, match=problem) as caught:
        trainer.train()
    named = str(caught.value).rpartition("cause: ")[2]
    assert named == ", ".join(repr(trainer.train_dataset.records.id_at(i)) for i in trainer.step_batches[1])
    assert len(trainer.step_batches[1]) == 2
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_loss_of_validation_that_is_not_finite_names_its_records(tiny, tmp_path):
    trainer = make_trainer(tiny.config(tmp_path, f"validation={tiny.folder}/validation.parquet"))
    trainer.args.per_device_eval_batch_size = 2
    with torch.no_grad():
        trainer.model.projector.layers[0].bias[0] = float("nan")
    problem = r"loss of data.validation is not finite \(nan\) after step 0"
    with pytest.raises(FloatingPointError, match=problem) as caught:
        trainer.evaluate()
    first = next(iter(trainer.get_eval_dataloader().batch_sampler))
    assert str(caught.value).endswith(": " + ", ".join(f"'r{i}'" for i in first))


def test_float16_that_overflows_for_its_scale_goes_on(tiny, tmp_path):
    """The loss scale begins far too high on purpose: the optimizer leaves out such steps and lowers it."""
    for scale, stops in ((2.0**16, False), (1.0, True)):
        trainer = make_trainer(tiny.config(tmp_path, "max_steps=1"))
        trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.model.projector.layers[0].bias.register_hook(lambda gradient: gradient * float("inf"))
        if stops:
            with pytest.raises(FloatingPointError, match="gradient of step 1 is not finite"):
                trainer.train()
        else:
            before = trainer.model.projector.layers[0].bias.detach().clone()
            trainer.train()
            assert torch.equal(trainer.model.projector.layers[0].bias, before) and scaler.get_scale() == scale / 2


def test_a_run_prints_lines_that_a_file_can_hold(tiny, tmp_path, capsys):
    trainer = make_trainer(tiny.config(tmp_path, "max_steps=4", "logging_steps=2", "peak_tflops=2",
                                       f"validation={tiny.folder}/validation.parquet"))  # fmt: skip
    capsys.readouterr()
    trainer.train()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "\r" not in out + err and not err.strip()
    assert lines[0] == "MFU is a share of 2 TFLOP/s per process (train.peak_tflops)"
    assert lines[1].split() == ["step", "loss", "lora", "lr", "proj", "lr", "lora", "|g|", "proj", "|g|", "tok/s",
                                "superv.", "MFU", "wait", "GiB", "left"]  # fmt: skip
    assert [line.split()[0] for line in lines[2:5]] == ["2/4", "4/4", "4/4"]
    assert len(lines[1]) == len(lines[2]) == len(lines[3]) <= 120
    assert lines[2].split()[1] == f"{first_log(trainer)['loss']:.4f}"
    assert lines[4].split()[1:4] == [f"{trainer.state.log_history[2]['eval_loss']:.4f}", "validation", "loss,"]
    assert lines[5].startswith("4 steps in 0:00:0")


def test_columns_follow_what_is_logged():
    logs = {"loss": 1.0, "decoder_lr": 2e-5, "grad_norm": 12345.6, "tokens_per_second": 1e6,
            "supervised_tokens_per_second": 1e5, "data_wait": 0.004, "memory_gib": 70.25}  # fmt: skip
    found = cells(logs, 90061)
    assert list(found) == ["loss", "decoder lr", "all |g|", "tok/s", "superv.", "wait", "GiB", "left"]
    assert found["left"] == "25:01:01" and found["all |g|"] == "1.23e+04" and found["wait"] == "0%"
    assert all(len(text) <= width(name) for name, text in found.items())
    assert clock(59.6) == "0:01:00"


def test_tensorboard_and_the_file_get_the_numbers(tiny, tmp_path):
    train(tiny.config(tmp_path, "max_steps=2", "report_to=tensorboard"))
    (entry, *_) = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    for key in ("mfu", "memory_gib", "data_wait", "tokens_per_second", "lora_grad_norm", "projector_grad_norm"):
        assert isinstance(entry[key], float), key
    assert next(tmp_path.glob("runs/*/*")).stat().st_size > 0


def test_peak_of_a_device():
    cpu = torch.device("cpu")
    assert peak_flops(cpu, torch.float32, 3.5) == (3.5 * TERA, "train.peak_tflops")
    state = torch.get_rng_state()
    peak, origin = peak_flops(cpu, torch.float32)
    assert 1e9 < peak < 1e14 and origin == "measured by a product of float32 matrices"
    assert measured_peak(cpu, torch.bfloat16) > 1e8
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("name", "tflops"), [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989.4),
    ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.4), ("NVIDIA L40S", 362.05),
    ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA A10", 125),
    ("Tesla V100-SXM2-32GB", 125), ("Tesla V100-PCIE-16GB", 112), ("Tesla V100S-PCIE-32GB", 130), ("Tesla T4", 65),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA RTX A1000", None), ("NVIDIA A10G", None),
    ("NVIDIA GeForce GTX 1080", None),
])  # fmt: skip
def test_peaks_of_data_sheets(name, tflops):
    assert known_peak(name) == tflops


def test_settings_out_of_range_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="train.peak_tflops is positive, or null"):
        tiny.config(tmp_path, "peak_tflops=0")


def test_memory_and_names():
    held = torch.ones(2**25)  # 128 MiB
    assert peak_memory(torch.device("cpu")) > 4 * len(held)
    assert quoted(["a", "b"]) == "'a', 'b'" and quoted(list("x" * 70)).endswith("'x' and 6 more")
