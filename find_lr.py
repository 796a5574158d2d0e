"""Looks for a learning rate: the range test of L. N. Smith (https://arxiv.org/abs/1506.01186, section 3.3).

    python find_lr.py --config configs/scenes.yaml                     all parts together
    python find_lr.py --config configs/scenes.yaml --part projector    one part, the others at rest
    torchrun --nproc_per_node 2 find_lr.py --config configs/x.yaml --from 1e-6 --to 1 --steps 200

Trains for `--steps` optimizer steps on the batches and with the loss of train.py, at rates that grow from `--from` to
`--to` by a constant factor. Parts together keep the ratios that the configuration gives them; `--from` and `--to` are
then rates of the first of them. The test ends early once the smoothed loss is DIVERGED times its minimum. All other
arguments are those of train.py; with another batch size than that of the run the answer is for another run.

Suggested is a tenth of the rate with the lowest smoothed loss; printed beside it is the rate at which the loss fell
fastest. Both are where a sweep (sweep.py) may begin, not results: the test sees few steps, all of them of a model that
has learned little.

No weights are written. `train.output_dir` gets find_lr_<part>.png and find_lr_<part>.json and nothing else.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from config import Config, ConfigError, load_config
from dataset.feature_cache import StaleFeatures
from dataset.rows import RecordError
from model.optim import part_of
from run_folder import RunError
from sweep import write_text
from train import make_trainer
from training import VLMTrainer, learning_rates, training_arguments
from training.curves import save_figure

SMOOTHING = 0.9  # of the loss: weight of what was, in an exponential mean
DIVERGED = 4.0  # times the lowest smoothed loss
SETTLED = 10  # steps after which the mean is one of more than a few losses
BELOW_LOWEST = 10.0  # so many times smaller than the rate of the lowest loss is the suggested one
ALL = "all"


@dataclass
class Finding:
    """What a range test found; rates are those of the first of `parts`."""

    parts: dict[str, float]  # part -> its rate as a multiple of the first one's
    rates: list[float]
    losses: list[float]  # after a step at each rate
    smoothed: list[float]
    lowest: float  # rate with the lowest smoothed loss
    steepest: float  # rate at which the smoothed loss fell fastest, over the logarithm of the rate
    suggested: float | None  # None: the range does not show one
    problem: str | None  # why

    @property
    def line(self) -> str:
        """Arguments of train.py."""
        return " ".join(f"{part}_lr={self.suggested * ratio:.2g}" for part, ratio in self.parts.items())


class RangeTest(VLMTrainer):
    """The training loop with rates that grow, and with nothing written.

    Args:
        tested: parts whose rates grow, in the ratios that they are configured with; the others rest.
        first, last: rates of the first of them, in the first and in the last step.
        arguments: of `VLMTrainer`.

    Attributes:
        step_losses: of each step, over its whole global batch.
    """

    def __init__(self, *arguments, tested: Sequence[str], first: float, last: float, **named):
        self.tested, self.first, self.last = tuple(tested), first, last
        self.step_losses: list[float] = []
        super().__init__(*arguments, **named)
        self.args.save_strategy, self.args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO

    def rate(self, step: int) -> float:
        """Of the first part in the step of this number, from 0."""
        return self.first * (self.last / self.first) ** (step / (self.args.max_steps - 1))

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        optimizer = optimizer or self.optimizer
        configured = learning_rates(self.config)[self.tested[0]]
        factors = [
            (lambda step: self.rate(step) / configured) if part_of(group) in self.tested else (lambda step: 0.0)
            for group in optimizer.param_groups
        ]
        self.lr_scheduler = LambdaLR(optimizer, factors)
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.step_losses.append(logs["loss"])
            self.control.should_training_stop |= has_diverged(smooth(self.step_losses))


def find(config: Config, part: str = ALL, first: float = 1e-6, last: float = 1.0, steps: int = 100) -> Finding | None:
    """The range test of a part, or of all that `config` trains; None in all processes but the first.

    Raises:
        ConfigError: settings that the test can't be made with, or that the model can't be built of.
    """
    if not 0 < first < last < math.inf:
        raise ConfigError(f"--from and --to are rates from low to high, above 0, got {first:g} and {last:g}")
    if steps < 10:
        raise ConfigError(f"--steps must be at least 10, or there is nothing to smooth; got {steps}")
    tested = chosen_parts(config, part)
    settings = replace(config.train, max_steps=steps, logging_steps=1, report_to=[])
    config = replace(config, train=settings, data=replace(config.data, validation=[]))
    kind = partial(RangeTest, tested=tested, first=first, last=last)
    trainer = make_trainer(config, training_arguments(config), kind=kind)
    try:
        trainer.train()
    except FloatingPointError:
        pass  # the loss or a gradient is not finite: it has diverged
    finally:
        trainer.console.close()
    if trainer.args.process_index != 0:
        return None
    rates = [trainer.rate(step) for step in range(len(trainer.step_losses))]
    configured = learning_rates(config)
    return judge({name: configured[name] / configured[tested[0]] for name in tested}, rates, trainer.step_losses)


def chosen_parts(config: Config, part: str) -> list[str]:
    """The parts that the test trains.

    Raises:
        ConfigError: the configuration does not train the part, or trains one of them at the rate zero.
    """
    trained = {
        "projector": ["projector"],
        "lora": ["lora", "projector"],
        "decoder": ["decoder", "projector"],
        "all": ["decoder", "encoder", "projector"],
    }[config.model.tune]
    if part != ALL and part not in trained:
        raise ConfigError(f"--part {part}: model.tune={config.model.tune} trains {', '.join(trained)}; or take all")
    tested = trained if part == ALL else [part]
    rates = learning_rates(config)
    if resting := [name for name in tested if rates[name] <= 0]:
        raise ConfigError(f"train.{resting[0]}_lr is {rates[resting[0]]:g}; set it above 0 to test its part")
    return tested


def judge(parts: dict[str, float], rates: Sequence[float], losses: Sequence[float]) -> Finding:
    """What rates and losses of the steps of a test say. `losses[i]` was measured before the step at `rates[i]`."""
    rates, losses = list(rates[: len(losses) - 1]), list(losses[1:])
    if len(losses) < 5 or not all(map(math.isfinite, losses[:5])):
        raise ConfigError("the loss is not finite from the first steps on: begin lower (--from)")
    losses = list(itertools.takewhile(math.isfinite, losses))
    rates, smoothed = rates[: len(losses)], smooth(losses)
    lowest = int(np.argmin(smoothed))
    slopes = np.gradient(smoothed, np.log(rates))[: lowest + 1]
    slopes[: min(SETTLED, lowest)] = np.inf
    problem = None
    if lowest == len(smoothed) - 1:
        problem = f"the loss still falls at the end of the range, {rates[-1]:.2g}: go on with --to"
    elif smoothed[lowest] > 0.98 * smoothed[0]:
        problem = "no rate lowers the loss: take more --steps, another --from, or look at the data (preview.py)"
    return Finding(
        parts,
        rates,
        losses,
        smoothed,
        lowest=rates[lowest],
        steepest=rates[int(np.argmin(slopes))],
        suggested=None if problem else rates[lowest] / BELOW_LOWEST,
        problem=problem,
    )


def smooth(losses: Sequence[float]) -> list[float]:
    """Exponential means of what has come so far, each divided by the sum of its weights."""
    means, mean = [], 0.0
    for count, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        means.append(mean / (1 - SMOOTHING**count))
    return means


def has_diverged(smoothed: Sequence[float]) -> bool:
    return not smoothed[-1] <= DIVERGED * min(smoothed)  # a loss that is no number included


def draw(finding: Finding, path: Path) -> None:
    """Loss over the rate, with the rates that stand out."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(finding.rates, finding.losses, color="0.75", label="loss")
    axis.plot(finding.rates, finding.smoothed, label="smoothed")
    marks = {"lowest": finding.lowest, "fell fastest": finding.steepest, "suggested": finding.suggested}
    for number, (name, rate) in enumerate(marks.items(), start=1):
        if rate is not None:
            axis.axvline(rate, color=f"C{number}", linestyle="--", label=f"{name}: {rate:.2g}")
    names = [f"rate of {part}" + ("" if ratio == 1 else f" / {ratio:g}") for part, ratio in finding.parts.items()]
    axis.set(xscale="log", xlabel=" and ".join(names), ylabel="training loss")
    axis.set_ylim(0.95 * min(finding.losses), 1.2 * finding.smoothed[0])  # what diverges leaves the picture
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--part", choices=(ALL, "lora", "projector", "decoder", "encoder"), default=ALL)
    parser.add_argument("--from", type=float, default=1e-6, dest="first", help="lowest rate (1e-6)")
    parser.add_argument("--to", type=float, default=1.0, dest="last", help="highest rate (1)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (100)")
    options, rest = parser.parse_known_args()
    try:
        config = load_config(rest)
        finding = find(config, options.part, options.first, options.last, options.steps)
    except (ConfigError, RunError, RecordError, StaleFeatures) as error:
        sys.exit(f"find_lr.py: {error}")
    if finding is None:
        return
    folder = Path(config.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"find_lr_{options.part}.json", json.dumps(asdict(finding), indent=2) + "\n")
    draw(finding, folder / f"find_lr_{options.part}.png")
    first = next(iter(finding.parts))
    print(f"Lowest loss with {first}_lr={finding.lowest:.2g}; it fell fastest at {finding.steepest:.2g}")
    print(f"No suggestion: {finding.problem}" if finding.problem else f"Suggested: {finding.line}")
    print(f"Written to {folder}: find_lr_{options.part}.png, find_lr_{options.part}.json")


if __name__ == "__main__":
    main()
