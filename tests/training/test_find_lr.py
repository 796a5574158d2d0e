"""find_lr.py: a range test on the training's own loop that leaves nothing behind but its answer."""

import json
import math
import sys

import numpy as np
import pytest
import torch

import find_lr
from config import ConfigError
from find_lr import RangeTest, chosen_parts, find, has_diverged, judge, smooth
from train import make_trainer, train
from training import training_arguments


def test_smoothing_weighs_all_that_came_so_far():
    losses = [4.0, 2.0, 5.0, 1.0]
    weights = [find_lr.SMOOTHING**age for age in range(4)]
    for count, mean in enumerate(smooth(losses), start=1):
        assert mean == pytest.approx(np.average(losses[:count], weights=weights[:count][::-1]))


def test_divergence():
    assert not has_diverged([5.0, 1.0, 3.9])
    assert has_diverged([5.0, 1.0, 4.1]) and has_diverged([5.0, math.nan])


def test_a_valley_is_found():
    """A loss that is lowest at a rate of 1e-2 and falls fastest at 1e-4."""
    rates = np.geomspace(1e-6, 1, 601)
    decades = np.log10(rates)
    losses = 3 - np.tanh(2 * (decades + 4)) + np.where(decades > -2.5, 0.3 * (decades + 2) ** 2 - 0.075, 0)
    finding = judge({"lora": 1.0, "projector": 2.0}, rates, losses)
    assert finding.problem is None
    assert finding.rates == list(rates[:-1]) and finding.losses == list(losses[1:])  # what a rate did comes after it
    assert 0.8e-2 < finding.lowest < 1.5e-2 and 0.8e-4 < finding.steepest < 1.5e-4
    assert finding.suggested == finding.lowest / 10
    assert finding.line == f"lora_lr={finding.suggested:.2g} projector_lr={2 * finding.suggested:.2g}"


@pytest.mark.parametrize("losses,problem", [
    (np.linspace(5, 1, 100), "still falls at the end of the range"),
    (np.linspace(1, 5, 100), "no rate lowers the loss"),
])  # fmt: skip
def test_a_range_without_a_valley_gives_no_suggestion(losses, problem):
    finding = judge({"lora": 1.0}, np.geomspace(1e-6, 1, 100), losses)
    assert problem in finding.problem and finding.suggested is None


def test_what_is_not_finite_is_left_out():
    losses = [*np.linspace(5, 2, 60), *np.linspace(2, 6, 20), math.inf, math.nan]
    finding = judge({"lora": 1.0}, np.geomspace(1e-6, 1, 82), losses)
    assert len(finding.losses) == 79 and finding.problem is None
    with pytest.raises(ConfigError, match="begin lower"):
        judge({"lora": 1.0}, [1, 2, 3], [5.0, math.nan, math.nan])


@pytest.mark.parametrize("part,expected", [
    ("all", {"lora_lr": 1e-4, "projector_lr": 3e-4}),  # the ratio of the configuration
    ("projector", {"lora_lr": 0.0, "projector_lr": 1e-4}),
])  # fmt: skip
def test_rates_grow_by_a_constant_factor_and_the_training_does_the_rest(tiny, tmp_path, part, expected):
    """Steps are those of the training: the first loss is its first loss, the batches are its batches."""
    overrides = ("lora_lr=1e-2", "projector_lr=3e-2", "max_steps=5", "dropout=0", "save_steps=100")
    config = tiny.config(tmp_path / "run", *overrides)
    seen = []

    class Seen(RangeTest):
        def log(self, logs, start_time=None):
            super().log(logs, start_time)
            if "loss" in logs:
                seen.append((dict(self.rates), sorted(sum(self.step_batches, []))))

    trainer = make_trainer(config, training_arguments(config), kind=lambda *a, **k: Seen(
        *a, tested=chosen_parts(config, part), first=1e-4, last=1e-2, **k
    ))  # fmt: skip
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    growth = 100 ** (1 / 4)
    for step, (rates, _) in enumerate(seen):
        assert rates == pytest.approx({key: rate * growth**step for key, rate in expected.items()})
    for name, parameter in before.items():
        moved = not torch.equal(dict(trainer.model.named_parameters())[name], parameter)
        assert moved == (part == "all" or name.startswith("projector")), name

    reference = train(tiny.config(tmp_path / "reference", *overrides))
    losses = [entry["loss"] for entry in reference.state.log_history if "loss" in entry]
    assert trainer.step_losses[0] == losses[0]
    reference.get_train_dataloader()
    batches = iter(reference.batch_sampler)
    assert [samples for _, samples in seen] == [sorted(next(batches)) for _ in range(5)]


def test_script_writes_its_answer_and_no_weights(tiny, tmp_path, monkeypatch, capsys):
    arguments = tiny.arguments(tmp_path, "--from", "1e-4", "--to", "100", "--steps", "60", "tune=decoder",
                               "decoder_lr=1e-2", "projector_lr=1e-2")  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["find_lr.py", *arguments])
    find_lr.main()
    assert {path.name for path in tmp_path.iterdir()} == {"find_lr_all.json", "find_lr_all.png"}
    found = json.loads((tmp_path / "find_lr_all.json").read_text())
    assert 30 < len(found["losses"]) < 59  # it diverged
    assert found["smoothed"][-1] > 4 * min(found["smoothed"]) > 4 * max(found["smoothed"][:-1]) / 4
    assert found["parts"] == {"decoder": 1.0, "projector": 1.0}
    assert found["lowest"] == found["rates"][int(np.argmin(found["smoothed"]))]
    suggested = f"{found['lowest'] / 10:.2g}"
    assert f"Suggested: decoder_lr={suggested} projector_lr={suggested}" in capsys.readouterr().out
    train(tiny.config(tmp_path, "max_steps=1"))  # a run may use the folder afterwards


def test_what_is_not_finite_ends_the_test(tiny, tmp_path):
    finding = find(tiny.config(tmp_path), last=1e38, steps=20)
    assert 5 <= len(finding.losses) < 19 and all(map(math.isfinite, finding.losses))


def test_settings_that_can_not_be_tested(tiny, tmp_path):
    config = tiny.config(tmp_path, "tune=projector")
    assert chosen_parts(config, "all") == ["projector"]
    for call, message in (
        (lambda: find(config, "lora"), "--part lora: model.tune=projector trains projector"),
        (lambda: find(config, first=1.0, last=0.1), "from low to high"),
        (lambda: find(config, steps=3), "at least 10"),
        (lambda: find(tiny.config(tmp_path, "projector_lr=0")), "train.projector_lr is 0; set it above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
