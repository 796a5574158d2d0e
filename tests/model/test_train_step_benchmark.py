"""The benchmark's two systems are the same model, and its command runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import train_step as benchmark

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    args, folder = benchmark.arguments(["--small"]), tmp_path_factory.mktemp("weights")
    benchmark.write_weights(args, folder)
    return args, folder


def test_losses_stay_equal_while_training(weights):
    args, folder = weights
    models = [benchmark.load_kanjian(folder, torch.float32), benchmark.load_llava(folder, torch.float32)]
    trained = [[p for p in model.parameters() if p.requires_grad] for model in models]
    assert sorted(p.numel() for p in trained[0]) == sorted(p.numel() for p in trained[1])
    optimizers = [torch.optim.AdamW(parameters, lr=1e-3) for parameters in trained]
    batch, losses = benchmark.batch_of_step(args, 0), []
    for _ in range(4):
        systems = zip(models, optimizers, strict=True)
        losses.append([benchmark.train_step(*system, batch, torch.float32) for system in systems])
    assert losses[-1][0] < losses[0][0] - 0.01
    assert max(abs(ours - theirs) for ours, theirs in losses) < 1e-5


def test_bfloat16_differs_by_the_places_of_rounding_alone(weights):
    args, folder = weights
    ours, llava = benchmark.load_kanjian(folder, torch.bfloat16), benchmark.load_llava(folder, torch.bfloat16)
    for model in (ours, llava):
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    theirs = llava.get_base_model().model
    theirs.multi_modal_projector.register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
    theirs.language_model.rotary_emb.register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))
    for step in range(4):
        batch = benchmark.batch_of_step(args, step)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert ours(**batch).loss.item() == pytest.approx(llava(**batch).loss.item(), abs=1e-5)


def test_command():
    command = [sys.executable, "-m", "benchmarks.train_step", "--small", "--steps", "1", "--dtypes", "float32"]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    measured = json.loads(lines[0])
    assert len(measured["losses"]) == 2 and measured["loss_difference"] < 1e-5
    assert min(measured["seconds"].values()) > 0 and min(measured["peak_mib"].values()) > 100
    assert lines[-1].startswith("| float32 |")
