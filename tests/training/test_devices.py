"""Two processes train what one trains (DDP, FSDP2, DeepSpeed ZeRO), and any of them continues what another began."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from config import ConfigError, config_differences, read_config, save_config
from model import MultiModalModel
from run_folder import RunError
from tests.training.launch import accelerate_environment, launch
from training import VLMTrainer
from training.devices import check_launch, check_shared

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed (requirements-deepspeed.txt)"
)
KINDS = ["fsdp2", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)]
STEPS = ["dropout=0", "max_steps=4", "save_steps=2", "lora_lr=1e-3", "projector_lr=1e-3", "decoder_lr=1e-3",
         "encoder_lr=1e-3", "per_device_train_batch_size=2", "eval_steps=2",
         "per_device_eval_batch_size=1"]  # fmt: skip
ALONE, BOTH = "gradient_accumulation_steps=4", "gradient_accumulation_steps=2"


def run(tiny, kind: str, folder: Path, *settings: str) -> Path:
    """Trains four steps of the same eight samples each on two processes, or on one (`kind` "one")."""
    alone = kind == "one"
    # Five records: one process has a batch more than the other.
    validation = f"validation={tiny.folder}/validation.parquet"
    arguments = tiny.arguments(folder, *STEPS, validation, ALONE if alone else BOTH, *settings)
    environment = {} if alone else accelerate_environment(kind)
    codes, output = launch(arguments, 1 if alone else 2, environment, before=print_units)
    assert set(codes) == {0}, output
    assert output.count("units: FSDPMultiModalModel, FSDPQWenBlock, FSDPQWenBlock") == 2 * (kind == "fsdp2")
    return folder


def print_units() -> None:
    """Has a run say at its end which modules FSDP2 puts together, whose parameters are all divided."""
    finish = VLMTrainer.finish

    def finish_and_say(trainer):
        units = [module for module in trainer.model.modules() if isinstance(module, FSDPModule)]
        whole = [name for name, p in trainer.model.named_parameters() if not isinstance(p, DTensor)]
        if units and all(name.startswith("encoder.") for name in whole):
            names = sorted(type(module).__name__ for module in units)
            print("units:", ", ".join(name for name in names if "CLIP" not in name))
        finish(trainer)

    VLMTrainer.finish = finish_and_say
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        divide_small_weights()


def divide_small_weights() -> None:
    """Has ZeRO-3 divide weights that it would leave whole for being small: here all are."""
    import deepspeed

    initialize = deepspeed.initialize

    def initialize_without_threshold(**kwargs):
        kwargs["config_params"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return initialize(**kwargs)

    deepspeed.initialize = initialize_without_threshold


def losses(folder: Path) -> list[float]:
    """Of training and validation."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found = [entry.get("loss", entry.get("eval_loss")) for entry in log]
    return [loss for loss in found if loss is not None]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}: {name}": tensor
        for file in sorted(folder.rglob("*.safetensors")) if "checkpoint-" not in str(file.relative_to(folder))
        for name, tensor in load_file(file).items()
    }  # fmt: skip


def assert_equal_runs(found: Path, expected: Path, tolerance: float) -> None:
    assert losses(found) == pytest.approx(losses(expected), rel=tolerance)
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Folder of the run of a kind with such settings, made when it is first asked for."""
    made = {}

    def get(kind: str, *settings: str) -> Path:
        if (kind, settings) not in made:
            made[kind, settings] = run(tiny, kind, tmp_path_factory.mktemp(kind) / "run", *settings)
        return made[kind, settings]

    return get


def test_ddp_equals_one_process(runs):
    assert_equal_runs(runs("ddp"), runs("one"), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_divided_equals_one_process(runs, kind):
    assert_equal_runs(runs(kind), runs("one"), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_decoder_and_encoder_are_trained_divided(runs, kind):
    assert_equal_runs(runs(kind, "tune=all"), runs("one", "tune=all"), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_in_bfloat16_and_recomputed_blocks(runs, kind):
    settings = ("model.dtype=bfloat16", "bf16=true", "gradient_checkpointing=true")
    found, expected = runs(kind, *settings), runs("one", *settings)
    assert losses(found) == pytest.approx(losses(expected), rel=2e-3)
    assert all(tensor.dtype == torch.float32 for tensor in weights(found).values())


PAIRS = ["one ddp", "ddp one", "fsdp2 one", "fsdp2 fsdp2"]
PAIRS += [
    pytest.param(pair, marks=needs_deepspeed)
    for pair in ("zero2 zero2", "zero3 zero3", "one zero2", "zero2 one", "fsdp2 zero3", "zero3 fsdp2", "zero2 zero3")
]


@pytest.mark.parametrize("pair", PAIRS)
def test_any_continues_what_another_began(tiny, runs, tmp_path, pair):
    """On another number of processes, too, and in the middle of an epoch (of three steps), without dropout."""
    before, after = pair.split()
    folder = tmp_path / "run"
    shutil.copytree(runs(before) / "checkpoint-2", folder / "checkpoint-2")
    shutil.copy(runs(before) / "config.yaml", folder)
    assert_equal_runs(run(tiny, after, folder), runs("one"), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_of_divided_weights_loads_in_one_process(runs, kind):
    logits = []
    for folder in (runs(kind) / "checkpoint-2", runs("one") / "checkpoint-2"):
        model = MultiModalModel.from_pretrained(folder)
        ids = torch.tensor([[5, *[model.placeholder_id] * 4, 7, 9]])
        pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
        with torch.no_grad():
            logits.append(model(ids, pixels).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("environment", "settings", "problem"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, [], "FSDP is supported in version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, ["quantization=nf4"], "nf4 is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, ["optimizer=adamw_8bit"], "adamw_8bit is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, ["fp16=true"], "fp16 is not supported under FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["fp16=true"], "DeepSpeed"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_start(tiny, tmp_path, monkeypatch, environment, settings, problem):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=problem):
        check_launch(tiny.config(tmp_path, *settings))


def test_deepspeed_by_key_is_gone_and_says_what_does_it_now(tiny, tmp_path):
    config = tiny.config(tmp_path)
    with pytest.raises(ConfigError, match=r"no key train.deepspeed any more; .*configs/accelerate/zero2.yaml"):
        tiny.config(tmp_path, "deepspeed=configs/deepspeed_zero2.json")
    save_config(config, tmp_path / "config.yaml")
    old = (tmp_path / "config.yaml").read_text().replace("\ntrain:\n", "\ntrain:\n  deepspeed: null\n")
    (tmp_path / "config.yaml").write_text(old)
    assert read_config(tmp_path / "config.yaml") == config
    assert config_differences(config, tmp_path / "config.yaml") == []


def test_a_folder_that_machines_do_not_share_is_an_error(tmp_path, monkeypatch):
    def gather(found, own):
        found[:] = [own, "checkpoint-4"]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    check_shared(str(tmp_path), tmp_path / "checkpoint-4")
    with pytest.raises(RunError, match="not the same for all processes, which find None, checkpoint-4"):
        check_shared(str(tmp_path), None)
