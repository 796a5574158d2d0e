"""train.py, training/ and run_folder.py: exact loss normalisation, exact resume, and what a run refuses to do."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from config import ConfigError, load_config
from dataset.collator import Collator
from dataset.record import write_records
from model import MultiModalModel
from model.decoder import quantization_of
from model.packing import enable_packing
from run_folder import RunError, complete_checkpoints, resume_point
from tests.conftest import Tiny
from train import build_model, load_dataset, main, train
from training import VLMTrainer

NO_DROPOUT = ("dropout=0", "max_grad_norm=0")


class KeepGradients(TrainerCallback):
    """Copies the gradients of every optimizer step before they are used."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def make_trainer(config) -> VLMTrainer:
    torch.manual_seed(config.train.seed)
    model = build_model(config.model)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # zero at first, which would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.02)
    data = load_dataset(config, config.data.train, model)
    validation = load_dataset(config, config.data.validation, model) if config.data.validation else None
    if config.train.packing:
        enable_packing(model.language_model)
    collator = Collator(model.tokenizer.pad_token_id, packing=config.train.packing)
    return VLMTrainer(model, config, data, validation, collator)


def gradients(tiny, folder, *overrides) -> dict[str, torch.Tensor]:
    """Gradients of the first optimizer step."""
    trainer, keep = make_trainer(tiny.config(folder, *NO_DROPOUT, "max_steps=1", *overrides)), KeepGradients()
    trainer.add_callback(keep)
    trainer.train()
    return keep.steps[0]


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def trajectory(folder: Path) -> list[tuple]:
    keys = ("step", "loss", "grad_norm", "lora_lr", "projector_lr", "eval_loss")
    return [tuple(entry.get(key) for key in keys) for entry in log_of(folder) if "train_runtime" not in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {**load_file(folder / "adapter_model.safetensors"), **load_file(folder / "projector.safetensors")}


def test_micro_batches_give_the_gradient_of_one_batch(tiny, tmp_path):
    whole = gradients(tiny, tmp_path / "a", "per_device_train_batch_size=8")
    halves = gradients(tiny, tmp_path / "b", "per_device_train_batch_size=4", "gradient_accumulation_steps=2")
    ones = gradients(tiny, tmp_path / "c", "per_device_train_batch_size=1", "gradient_accumulation_steps=8")
    assert any(".lora_A." in name for name in whole) and any("projector" in name for name in whole)
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(halves[name], gradient, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(ones[name], gradient, rtol=1e-4, atol=1e-7)


def test_gradient_is_that_of_the_mean_over_supervised_tokens(tiny, tmp_path):
    config = tiny.config(tmp_path, *NO_DROPOUT, "max_steps=1", "train_sampling_strategy=sequential",
                         "per_device_train_batch_size=3", "gradient_accumulation_steps=2")  # fmt: skip
    trainer, keep = make_trainer(config), KeepGradients()
    trainer.add_callback(keep)
    model = trainer.model
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    logits = model(batch["input_ids"], batch["pixel_values"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))
    trainer.train()
    for name, gradient in expected.items():
        torch.testing.assert_close(keep.steps[0][name], gradient, rtol=1e-3, atol=1e-6)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_gradient_checkpointing_changes_nothing(tiny, tmp_path):
    plain = gradients(tiny, tmp_path / "a")
    recomputed = gradients(tiny, tmp_path / "b", "gradient_checkpointing=true")
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-8)


def test_bf16_on_cpu_is_autocast_with_float32_weights(tiny, tmp_path):
    plain = gradients(tiny, tmp_path / "a")
    mixed = gradients(tiny, tmp_path / "b", "bf16=true")
    assert all(gradient.dtype == torch.float32 for gradient in mixed.values())
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (plain, mixed))
    assert not torch.equal(a, b)
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


def test_frozen_weights_stay_and_trained_ones_move(tiny, tmp_path):
    trainer = make_trainer(tiny.config(tmp_path, "max_steps=3", "bf16=true"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_validation_loss_is_the_mean_over_tokens(tiny, tmp_path):
    trainer = make_trainer(tiny.config(tmp_path, f"validation={tiny.folder}/validation.parquet"))
    total, tokens = 0.0, 0
    trainer.model.eval()
    for i in range(len(trainer.eval_dataset)):
        batch = trainer.data_collator([trainer.eval_dataset[i]])
        count = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            total += trainer.model(**batch).loss.item() * count
        tokens += count
    for size in (1, 2, 8):
        trainer.args.per_device_eval_batch_size = size
        assert trainer.evaluate()["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_logs_say_how_fast_and_with_which_rates(tiny, tmp_path):
    trainer = make_trainer(tiny.config(tmp_path, "max_steps=4", "logging_steps=2", "projector_lr=3e-3"))
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["projector_lr"] == pytest.approx(3e-3 * 3 / 4)  # the second of four steps, linear to zero
    assert first["lora_lr"] == pytest.approx(1e-2 * 3 / 4)
    seconds = first["seconds_waiting_for_data"] + first["seconds_computing"]
    assert first["samples_per_second"] * seconds == pytest.approx(4, rel=0.05)
    assert first["supervised_tokens_per_second"] > first["samples_per_second"]


def test_tensorboard_gets_the_log(tiny, tmp_path):
    make_trainer(tiny.config(tmp_path, "max_steps=2", "report_to=tensorboard")).train()
    events = EventAccumulator(str(next(tmp_path.glob("runs/*/")))).Reload()
    assert {"train/loss", "train/projector_lr", "train/seconds_computing"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


def test_gradient_that_is_not_finite_stops_the_run(tiny, tmp_path):
    trainer = make_trainer(tiny.config(tmp_path))
    trainer.model.projector.layers[0].bias.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match="gradient of step 1 is not finite") as caught:
        trainer.train()
    ids = {record["id"] for record in Tiny.records(24)}
    named = str(caught.value).rpartition("cause: ")[2].split(", ")
    assert len(named) == 2 and {name.strip("'") for name in named} < ids


def test_batch_of_skipped_records_does_not_divide_by_zero(tiny, tmp_path):
    config = tiny.config(tmp_path, "on_bad_image=skip", f"image_root={tmp_path}", "max_steps=2",
                         "per_device_train_batch_size=4", "train_sampling_strategy=sequential")  # fmt: skip
    trainer = make_trainer(config)
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history[:1]] == [0.0]
    assert "r0" in trainer.train_dataset.skipped


def test_unreadable_image_stops_the_run_with_its_name(tiny, tmp_path):
    trainer = make_trainer(tiny.config(tmp_path, f"image_root={tmp_path}"))
    with pytest.raises(FileNotFoundError, match=r"record 'r\d+'.*\.png"):
        trainer.train()


def test_workers_do_not_change_the_run(tiny, tmp_path):
    for name, workers in (("a", 0), ("b", 2)):
        trainer = make_trainer(tiny.config(tmp_path / name, f"num_workers={workers}", "max_steps=3"))
        trainer.train()
        trainer.finish()
    assert trajectory(tmp_path / "a") == trajectory(tmp_path / "b")


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory) -> Path:
    """An uninterrupted run over three epochs with validation."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    train(tiny.config(folder, *long_run(tiny)))
    return folder


def long_run(tiny) -> list[str]:
    return ["max_steps=30", "logging_steps=3", "save_steps=4", "eval_steps=7", "gradient_accumulation_steps=2",
            "per_device_train_batch_size=1", f"validation={tiny.folder}/validation.parquet"]  # fmt: skip


def test_killed_run_continues_bit_for_bit(tiny, reference, tmp_path):
    folder = tmp_path / "run"
    command = ["train.py", *tiny.arguments(folder, *long_run(tiny))]
    kill_after(folder / "checkpoint-4", [sys.executable, *command], tiny.project)
    assert not (folder / "trainer_state.json").exists()
    killed_at = complete_checkpoints(folder)[-1]
    (folder / "checkpoint-999").mkdir()  # remains of a copy that was broken off
    (folder / ".unfinished").mkdir(exist_ok=True)
    (folder / ".unfinished/optimizer.pt").write_bytes(b"half")

    output = tiny.run(*command, "num_workers=1").stdout
    assert f"Continuing from {killed_at}" in output
    assert len(trajectory(reference)) == 30 // 3 + 30 // 7 + 1
    assert trajectory(folder) == trajectory(reference)
    for name, tensor in weights(reference).items():
        assert torch.equal(weights(folder)[name], tensor), name
    assert not (folder / ".unfinished").exists()


def test_sigterm_ends_the_run_with_a_checkpoint(tiny, reference, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "train.py", *tiny.arguments(folder, *long_run(tiny), "num_workers=1")]
    process = subprocess.Popen(command, cwd=tiny.project, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for(folder / "checkpoint-4", process)
    process.terminate()
    problem = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 128 + signal.SIGTERM
    (stopped_at,) = [path for path in complete_checkpoints(folder) if f"after step {path.name[11:]} with" in problem]
    assert stopped_at == complete_checkpoints(folder)[-1]
    assert "the same command continues" in problem and not (folder / "trainer_state.json").exists()
    assert f"Continuing from {stopped_at}" in tiny.run(*command[1:]).stdout
    assert trajectory(folder) == trajectory(reference)
    assert all(torch.equal(weights(folder)[name], tensor) for name, tensor in weights(reference).items())


def wait_for(path: Path, process: subprocess.Popen, timeout: float = 90) -> None:
    end = time.time() + timeout
    while not path.exists():
        assert process.poll() is None and time.time() < end, f"{path} did not appear"
        time.sleep(0.002)


def kill_after(path: Path, command: list[str], cwd: Path, timeout: float = 90) -> None:
    """Starts a process and kills it as soon as `path` exists."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(path, process, timeout)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def test_resume_at_the_end_of_an_epoch_and_at_the_last_step(tiny, reference, tmp_path):
    """From each checkpoint the rest of the run is the same; from the last one nothing is left but to write."""
    for step in (12, 24, 30):  # 12 steps are an epoch
        folder = tmp_path / f"run{step}"
        shutil.copytree(reference / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copy(reference / "config.yaml", folder)
        train(tiny.config(folder, *long_run(tiny)))
        assert trajectory(folder) == trajectory(reference)
        assert all(torch.equal(weights(folder)[name], tensor) for name, tensor in weights(reference).items())


def test_checkpoint_holds_what_is_trained_and_no_pickle_of_ours(reference):
    names = {path.name for path in (reference / "checkpoint-12").iterdir()}
    assert {"adapter_model.safetensors", "projector.safetensors", "kanjian.json", "config.yaml", "optimizer.pt",
            "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names  # fmt: skip
    assert "training_args.bin" not in names and not any(name.startswith("model") for name in names)
    assert all(".lora_" in name or name.startswith("layers.") for name in weights(reference / "checkpoint-12"))
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(reference / "checkpoint-12" / name, weights_only=True)


def test_table_of_modules_is_printed_first(tiny, tmp_path, capsys):
    train(tiny.config(tmp_path / "run", "max_steps=1"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["module", "encoder", "projector", "decoder", "LoRA", "total"]
    assert lines[6] == "LoRA: c_attn, w1, w2"
    assert lines[7] == f"Starting a new run in {tmp_path}/run"


def test_finished_run_says_so(tiny, reference, monkeypatch, capsys):
    before = (reference / "trainer_state.json").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny.arguments(reference, *long_run(tiny))])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    assert "holds a finished run of this configuration; train.overwrite=true trains again" in capsys.readouterr().err
    assert (reference / "trainer_state.json").stat().st_mtime_ns == before


def test_other_configuration_is_refused_and_overwrite_starts_over(tiny, reference, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"another configuration:\n  train.lora_lr: 0.01 -> 0.5\n"):
        resume_point(tiny.config(folder, *long_run(tiny), "lora_lr=0.5"))
    (folder / "trainer_state.json").unlink()
    assert resume_point(tiny.config(folder, *long_run(tiny))) == folder / "checkpoint-30"
    assert resume_point(tiny.config(folder, *long_run(tiny), "lora_lr=0.5", "overwrite=true")) is None
    assert sorted(os.listdir(folder / "..")) == ["run"]
    assert not list(folder.glob("checkpoint-*")) and not (folder / "kanjian.json").exists()
    assert (folder / "notes.txt").exists()


def test_other_records_under_the_same_name_are_refused(tiny, reference, tmp_path):
    data = tmp_path / "train.parquet"
    shutil.copy(tiny.folder / "train.parquet", data)
    config = tiny.config(tmp_path / "run", f"data.train={data}", "max_steps=4")
    train(config)
    (tmp_path / "run/trainer_state.json").unlink()
    write_records(tiny.records(25), data)
    with pytest.raises(RunError, match="checkpoint-4 can't be continued: records then .*, now "):
        train(config)


def test_checkpoints_without_configuration_are_refused(tiny, reference, tmp_path):
    shutil.copytree(reference / "checkpoint-4", tmp_path / "checkpoint-4")
    with pytest.raises(RunError, match="checkpoints but no config.yaml"):
        resume_point(tiny.config(tmp_path))


def test_only_the_newest_checkpoints_are_kept(tiny, tmp_path):
    make_trainer(tiny.config(tmp_path, "save_total_limit=2")).train()
    assert sorted(path.name for path in complete_checkpoints(tmp_path)) == ["checkpoint-6", "checkpoint-8"]


def test_two_processes_equal_one(tiny, tmp_path):
    """24 samples, three epochs' worth of steps; text-only samples leave a process without an image now and then."""
    shared = ["dropout=0", "max_steps=10", "save_steps=100", f"validation={tiny.folder}/validation.parquet"]
    alone = tiny.arguments(tmp_path / "one", "per_device_train_batch_size=4", "gradient_accumulation_steps=2", *shared)
    both = tiny.arguments(tmp_path / "two", "per_device_train_batch_size=2", "gradient_accumulation_steps=2", *shared)
    train(load_config(alone))
    tiny.run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py", *both,
             env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    one, two = trajectory(tmp_path / "one"), trajectory(tmp_path / "two")
    assert len(one) == len(two) == 10 + 3
    for a, b in zip(one, two, strict=True):
        assert [value is None for value in a] == [value is None for value in b]
        assert [v for v in a if v is not None] == pytest.approx([v for v in b if v is not None], rel=1e-3)
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_training_with_8_bit_adamw_resumes_bit_for_bit(tiny, tmp_path, capsys, quantization):
    # Tensors of fewer than 4096 numbers keep moments of 32 bits: rank 128 makes matrices that are large enough.
    settings = [f"quantization={quantization}", "optimizer=adamw_8bit", "lora.r=128", "max_steps=4", "eval_steps=2",
                f"validation={tiny.folder}/validation.parquet"]  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(tiny.config(whole, *settings))
    decoder = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("decoder")).split()
    assert decoder[1:3] == ["45,408", "0"] and quantization in decoder[3:]
    moments = torch.load(whole / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    assert any(value.dtype == torch.uint8 for value in tensors(moments))
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(whole / "config.yaml", resumed)
    train(tiny.config(resumed, *settings))
    assert trajectory(resumed) == trajectory(whole)
    assert all(torch.equal(weights(resumed)[name], tensor) for name, tensor in weights(whole).items())
    model = MultiModalModel.from_pretrained(resumed)
    assert quantization_of(model.language_model) == quantization


def tensors(value) -> list[torch.Tensor]:
    """All tensors in nested dicts."""
    if isinstance(value, dict):
        return [tensor for inner in value.values() for tensor in tensors(inner)]
    return [value] if isinstance(value, torch.Tensor) else []


def test_a_run_can_start_from_trained_weights(tiny, reference, tmp_path):
    trained = weights(reference)
    model = build_model(tiny.config(tmp_path, f"model.checkpoint={reference}").model)
    adapter = get_peft_model_state_dict(model.decoder)
    assert all(torch.equal(adapter[name], trained[name]) for name in adapter)
    assert torch.equal(model.projector.layers[0].weight, trained["layers.0.weight"])
    with pytest.raises(ConfigError, match=r"LoRA r: 4 in the checkpoint, 2 in the model"):
        train(tiny.config(tmp_path / "run", f"model.checkpoint={reference}", "lora.r=2"))
    plain = build_model(tiny.config(tmp_path, "tune=projector").model)
    plain.save_pretrained(tmp_path / "projector_only")
    second = build_model(tiny.config(tmp_path, f"model.checkpoint={tmp_path}/projector_only").model)
    assert torch.equal(second.projector.layers[0].weight, plain.projector.layers[0].weight)
    assert any(".lora_" in name for name, _ in second.named_parameters())
    with pytest.raises(ValueError, match="adapter: True in the checkpoint, False in the model"):
        build_model(tiny.config(tmp_path, f"model.checkpoint={reference}", "tune=projector").model)
    with pytest.raises(ConfigError, match="model.checkpoint: there is no folder .*/gone"):
        train(tiny.config(tmp_path / "run", "model.checkpoint=gone"))


def test_training_goes_on_from_an_adapter_of_the_first_system(tiny, golden, tmp_path):
    shutil.copytree(golden / "llm", tmp_path / "decoder")
    shutil.copy(tiny.folder / "decoder" / "qwen.tiktoken", tmp_path / "decoder")
    vision, saved = golden / "f_siglip" / "vision", golden / "f_siglip" / "saved"
    settings = [f"model.decoder={tmp_path}/decoder", "encoder.kind=siglip", f"encoder.path={vision}", "lora.r=8",
                "lora.alpha=32", f"model.checkpoint={saved}"]  # fmt: skip
    model = build_model(tiny.config(tmp_path, *settings, "drop_first_patch=true").model)
    published = torch.load(saved / "adapter_model.bin", weights_only=True)
    adapter = get_peft_model_state_dict(model.decoder)
    assert adapter.keys() == published.keys()
    assert all(torch.equal(adapter[name], tensor) for name, tensor in published.items())
    with pytest.raises(ValueError, match="encoder drop_first_patch: True in the checkpoint, False in the model"):
        build_model(tiny.config(tmp_path, *settings).model)
    with pytest.raises(ValueError, match="encoder layer: 'last' in the checkpoint, 'penultimate' in the model"):
        build_model(tiny.config(tmp_path, *settings, "drop_first_patch=true", "layer=penultimate").model)
    # One that was trained with all patches goes through a checkpoint of this project.
    whole = MultiModalModel.from_pretrained(saved, decoder=tmp_path / "decoder", encoder=vision, num_features=16)
    whole.save_pretrained(tmp_path / "converted")
    settings[-1] = f"model.checkpoint={tmp_path}/converted"
    assert build_model(tiny.config(tmp_path, *settings).model).encoder.num_features == 16


@pytest.mark.parametrize("name", ["run", "run/checkpoint-8"])
def test_a_run_does_not_overwrite_what_it_starts_from(tiny, tmp_path, name):
    config = tiny.config(tmp_path / "run", f"model.checkpoint={tmp_path}/{name}", "overwrite=true")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kanjian.json").write_text("{}")
    with pytest.raises(RunError, match="model.checkpoint=.* lies in train.output_dir"):
        train(config)
    with pytest.raises(RunError, match="holds a model that no run wrote there"):
        train(tiny.config(tmp_path / "run", "overwrite=true"))
    assert (tmp_path / "run" / "kanjian.json").exists()


@pytest.mark.parametrize("tune", ["lora", "decoder"])
def test_a_decoder_in_the_output_folder_stays(tiny, tmp_path, tune):
    """As in the default run, whose stages share a folder."""
    shutil.copytree(tiny.folder / "decoder", tmp_path / "run" / "decoder")
    before = (tmp_path / "run" / "decoder" / "model.safetensors").read_bytes()
    settings = [f"model.decoder={tmp_path}/run/decoder", "max_steps=2", f"tune={tune}"]
    train(tiny.config(tmp_path / "run", *settings))
    train(tiny.config(tmp_path / "run", *settings, "overwrite=true"))
    assert (tmp_path / "run" / "decoder" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "run" / "trained_decoder").exists() == (tune == "decoder")
    MultiModalModel.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("key", ["decoder", "encoder.path"])
@pytest.mark.parametrize("place", ["trained_decoder", "checkpoint-4/trained_decoder"])
def test_a_run_does_not_overwrite_its_weights(tiny, tmp_path, key, place):
    shutil.copytree(tiny.folder / key.partition(".")[0], tmp_path / "run" / place)
    with pytest.raises(RunError, match=f"model.{key}=.* lies in train.output_dir"):
        train(tiny.config(tmp_path / "run", f"model.{key}={tmp_path}/run/{place}", "overwrite=true"))
    assert (tmp_path / "run" / place / "config.json").exists()


def test_a_run_goes_on_when_its_start_is_gone(tiny, tmp_path):
    folder, start = tmp_path / "run", tmp_path / "run" / "stage1"  # no run touches a folder of that name
    settings = [f"model.checkpoint={start}", "max_steps=4"]
    build_model(tiny.config(folder).model).save_pretrained(start)
    train(tiny.config(folder, *settings))
    (folder / "trainer_state.json").unlink()
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(start)
    whole = weights(folder)
    train(tiny.config(folder, *settings))
    assert all(torch.equal(weights(folder)[name], tensor) for name, tensor in whole.items())


def test_a_damaged_checkpoint_is_named_when_resuming(tiny, reference, tmp_path):
    shutil.copytree(reference / "checkpoint-12", tmp_path / "checkpoint-12")
    shutil.copy(reference / "config.yaml", tmp_path)
    for name, reason in (("progress.json", ""), ("optimizer.pt", ""), ("projector.safetensors", ".*can't be read")):
        file = tmp_path / "checkpoint-12" / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] if name != "optimizer.pt" else content[:500])
        with pytest.raises(RunError, match=f"checkpoint-12 can't be continued: {reason}"):
            train(tiny.config(tmp_path, *long_run(tiny)))
        file.write_bytes(content)


def test_incomplete_weights_end_the_run_with_one_line(tiny, tmp_path):
    decoder = shutil.copytree(tiny.folder / "decoder", tmp_path / "decoder")
    file = decoder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f"{file} can't be read: it is cut off or damaged"):
        train(tiny.config(tmp_path / "run", f"model.decoder={decoder}"))


def test_mistakes_in_the_configuration_end_the_script_with_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny.arguments(tmp_path, "lora_rl=1")])
    with pytest.raises(SystemExit, match="^train.py: command line: unknown key 'lora_rl' .did you mean train.lora_lr"):
        main()


@pytest.mark.parametrize("key", ["model.decoder", "model.encoder.path"])
def test_local_folder_that_is_not_there_is_named(tiny, tmp_path, key):
    gone = str(tmp_path / "gone")
    with pytest.raises(ConfigError, match=f"{key}: there is no folder {gone}"):
        build_model(tiny.config(tmp_path, f"{key}={gone}").model)
