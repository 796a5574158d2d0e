"""benchmarks/learning_rates.py: its tables, and that its runs are those of the default configuration."""

import argparse
import json

import pytest

from benchmarks import learning_rates as benchmark
from config import load_config, read_config

GRID = {(1e-3, 1.0): 0.5, (1e-3, 4.0): 0.4, (2e-3, 1.0): 0.3}  # the run at (2e-3, 4) failed


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_grid_table_names_the_best_of_each_row():
    table = cells(benchmark.grid_table(GRID, [1e-3, 2e-3], [1.0, 4.0]))
    assert table[0] == ["LoRA rate", "ratio 1", "ratio 4"]
    assert table[2:] == [["0.001", "0.5000", "**0.4000**"], ["0.002", "**0.3000**", "failed"]]


def test_ratio_table_has_mean_and_range_over_the_seeds():
    rows = {0: {(2e-3, 1.0): 0.3}, 1: {(2e-3, 1.0): 0.2, (2e-3, 4.0): 0.1}}
    shares = {(0, 1.0): 0.95, (1, 1.0): 0.97}
    table = cells(benchmark.ratio_table(rows, shares, 2e-3, [1.0, 4.0]))
    assert table[2:] == [
        ["1", "0.002", "0.2500", "0.2000 to 0.3000", "96.0", "95.0 to 97.0"],
        ["4", "0.008", "0.1000", "0.1000 to 0.1000", "", ""],
    ]  # fmt: skip


def test_picture_of_a_grid_with_a_hole(tmp_path):
    benchmark.draw(GRID, {0: {}, 1: {(2e-3, 1.0): 0.31}}, 2e-3, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_runs_are_the_default_run_but_shorter(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    asked = []

    def run_all(runs, folder, command) -> int:
        asked.extend(runs)
        for run in runs[:1]:  # the second one fails
            run.folder.mkdir(parents=True)
            log = [{"step": 50, "eval_loss": 0.9}, {"step": 100, "eval_loss": 0.7}]
            (run.folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        return 1

    monkeypatch.setattr(benchmark, "run_all", run_all)
    options = argparse.Namespace(output=tmp_path, steps=100)
    grid = benchmark.train_grid(options, [(1e-3, 0.25), (2e-3, 4.0)], seed=3)
    assert grid == {(1e-3, 0.25): 0.7}
    config, default = load_config(asked[1].arguments), read_config("configs/scenes.yaml")
    assert (config.train.lora_lr, config.train.projector_lr, config.train.seed) == (2e-3, 8e-3, 3)
    assert config.train.output_dir == str(tmp_path / "lora_lr=0.002,ratio=4,seed=3") == str(asked[1].folder)
    assert config.model == default.model
    assert config.train.per_device_train_batch_size == 2 * default.train.per_device_train_batch_size  # two processes
    shared = ("lr_scheduler_type", "warmup_steps", "weight_decay", "bf16", "adam_beta2", "max_grad_norm")
    assert all(getattr(config.train, name) == getattr(default.train, name) for name in shared)


def test_a_signal_ends_the_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "run_all", lambda *_: 130)
    with pytest.raises(SystemExit) as caught:
        benchmark.train_grid(argparse.Namespace(output=tmp_path, steps=1), [], seed=0)
    assert caught.value.code == 130
