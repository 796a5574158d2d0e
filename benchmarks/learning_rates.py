"""Learning rates of LoRA and projector on the built-in scenes: which are best, and what does their ratio do?

    python -m benchmarks.learning_rates                # all that is missing, then tables and docs/learning_rates.png
    python -m benchmarks.learning_rates --lora_lr 2e-3 --ratio 1 4 --steps 50 --output outputs/trial --picture trial.png

A grid of runs as `configs/scenes.yaml` says, but shorter: `--steps` steps, and so a steeper schedule, of the same
global batch of 64, in one process, with features that were computed once. Then, for the LoRA rate of the best of them,
the runs of all ratios again with `--seeds` other seeds, whose spread says what a difference is worth, and the questions
of the test split that these answer right. Needs `outputs/scenes` with tower and decoder and `data/scenes` (`bash
train.sh`). Finished runs in the output folder are kept, so the same command goes on after an interruption.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import RESULTS, append_results, markdown_table, report
from cache_features import fill
from config import load_config
from dataset.files import write_text
from dataset.record import read_records
from evaluation.answering import evaluate
from model import MultiModalModel
from sweep import Run, run_all
from training.curves import read_history, save_figure

SCENES = Path("data/scenes")
CONFIG = "configs/scenes.yaml"
LORA_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
RATIOS = (0.5, 1.0, 2.0, 4.0, 8.0)
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
Grid = dict[tuple[float, float], float]  # LoRA rate, ratio -> validation loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora_lr", type=float, nargs="+", default=LORA_RATES, help="rates of the LoRA weights")
    parser.add_argument("--ratio", type=float, nargs="+", default=RATIOS, help="projector rate / LoRA rate")
    parser.add_argument("--steps", type=int, default=300, help="of each run (300)")
    parser.add_argument("--seeds", type=int, default=2, help="further seeds for the best LoRA rate (2)")
    parser.add_argument("--questions", type=int, default=2000, help="of the test split, 0 for none (2000)")
    parser.add_argument("--output", type=Path, default=Path("outputs/learning_rates"), help="folder of the runs")
    parser.add_argument("--picture", type=Path, default=Path("docs/learning_rates.png"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that the tables are added to")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    make_features(options.output)
    grid = train_grid(options, [(lora, ratio) for lora in options.lora_lr for ratio in options.ratio], seed=0)
    best_lora = min(grid, key=grid.get)[0]
    seeds = range(1 + options.seeds)
    rows = {seed: train_grid(options, [(best_lora, ratio) for ratio in options.ratio], seed) for seed in seeds}
    shares = {
        (seed, ratio): right_answers(folder_of(options.output, best_lora, ratio, seed), options.questions)
        for seed in seeds
        for ratio in options.ratio
        if options.questions and (best_lora, ratio) in rows[seed]
    }
    draw(grid, rows, best_lora, options.picture)
    parts = (
        f"Validation loss after {options.steps} steps, seed 0:",
        grid_table(grid, options.lora_lr, options.ratio),
        f"LoRA rate {best_lora:g}, {len(seeds)} seeds: mean and range of the validation loss, and of the share of "
        f"{options.questions:,} test questions that are answered right:",
        ratio_table(rows, shares, best_lora, options.ratio),
    )
    text = report("Learning rates of LoRA and projector", "benchmarks.learning_rates", sys.argv[1:], "cpu", *parts)
    print(f"\n{text}")
    append_results(text, options.results)


# Runs


def make_features(output: Path) -> None:
    """Encodes the pictures, once for all runs."""
    fill(load_config(["--config", CONFIG, f"data.feature_cache={output / 'features'}", f"output_dir={output}"]))


def folder_of(output: Path, lora: float, ratio: float, seed: int) -> Path:
    return output / (f"lora_lr={lora:g},ratio={ratio:g}" + (f",seed={seed}" if seed else ""))


def train_grid(options: argparse.Namespace, points: Sequence[tuple[float, float]], seed: int) -> Grid:
    """Trains where that is not done; a run that fails has no entry."""
    runs = []
    for lora, ratio in points:
        folder = folder_of(options.output, lora, ratio, seed)
        arguments = [
            "--config", CONFIG, f"data.feature_cache={options.output / 'features'}", f"max_steps={options.steps}",
            "per_device_train_batch_size=64", "eval_steps=50", f"save_steps={options.steps}", "save_total_limit=1",
            "logging_steps=10", f"seed={seed}", f"lora_lr={lora:g}", f"projector_lr={lora * ratio:g}",
            f"output_dir={folder}",
        ]  # fmt: skip
        runs.append(Run({"lora_lr": f"{lora:g}", "ratio": f"{ratio:g}", "seed": str(seed)}, arguments, folder))
    if (status := run_all(runs, options.output, [sys.executable, "train.py"])) > 1:
        sys.exit(status)  # stopped by a signal
    return {
        point: validation_loss(run.folder)
        for point, run in zip(points, runs, strict=True)
        if (run.folder / "trainer_state.json").exists()
    }


def validation_loss(folder: Path) -> float:
    return [entry["eval_loss"] for entry in read_history(folder) if "eval_loss" in entry][-1]


def right_answers(folder: Path, questions: int) -> float:
    """Share of the first test questions that a run answers right; kept beside it."""
    file = folder / f"right_of_{questions}.json"
    if not file.exists():
        model = MultiModalModel.from_pretrained(folder, attn_implementation="eager")
        records = read_records(SCENES / "test.parquet")[:questions]
        found = evaluate(model, records, SCENES / "images", conditions=("real",), batch_size=128, max_new_tokens=4)
        write_text(json.dumps(found["score"]["real"]["value"]), file)
    return json.loads(file.read_text())


# Tables and picture


def grid_table(grid: Grid, loras: Sequence[float], ratios: Sequence[float]) -> str:
    """LoRA rate by ratio; the best of each row in bold."""
    rows = []
    for lora in loras:
        losses = {ratio: grid[lora, ratio] for ratio in ratios if (lora, ratio) in grid}
        best = min(losses, key=losses.get, default=None)
        cells = [f"{losses[ratio]:.4f}" if ratio in losses else "failed" for ratio in ratios]
        rows.append((f"{lora:g}", *(f"**{c}**" if r == best else c for r, c in zip(ratios, cells, strict=True))))
    return markdown_table(("LoRA rate", *(f"ratio {ratio:g}" for ratio in ratios)), rows)


def ratio_table(
    rows: dict[int, Grid], shares: dict[tuple[int, float], float], lora: float, ratios: Sequence[float]
) -> str:
    table = []
    for ratio in ratios:
        losses = [row[lora, ratio] for row in rows.values() if (lora, ratio) in row]
        right = [shares[seed, ratio] for seed in rows if (seed, ratio) in shares]
        if losses:
            table.append((f"{ratio:g}", f"{lora * ratio:g}", *spread(losses, 1, 4), *spread(right, 100, 1)))
    return markdown_table(("ratio", "projector rate", "validation loss", "range", "right (%)", "range"), table)


def spread(values: Sequence[float], factor: float, digits: int) -> tuple[str, str]:
    """Mean, and least to most."""
    if not values:
        return "", ""
    low, mean, high = (f"{factor * v:.{digits}f}" for v in (min(values), statistics.mean(values), max(values)))
    return mean, f"{low} to {high}"


def draw(grid: Grid, rows: dict[int, Grid], lora: float, path: Path) -> None:
    """The grid as a map, and the loss over the ratio, with all seeds of the best LoRA rate."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_map(left, grid)
    loras = sorted({rate for rate, _ in grid})
    for rate in loras:
        points = sorted((ratio, loss) for (own, ratio), loss in grid.items() if own == rate)
        right.plot(*zip(*points, strict=True), marker="o", label=f"LoRA {rate:g}")
    again = [(ratio, loss) for seed, row in rows.items() if seed for (_, ratio), loss in row.items()]
    if again:
        colour = f"C{loras.index(lora)}"
        right.plot(*zip(*again, strict=True), "x", color=colour, label=f"LoRA {lora:g}, other seeds")
    right.set(xscale="log", xlabel="projector rate / LoRA rate", ylabel="validation loss", title="Loss over the ratio")
    right.set_xticks(sorted({ratio for _, ratio in grid}))
    right.minorticks_off()
    right.xaxis.set_major_formatter("{x:g}")
    right.grid(alpha=0.3)
    right.legend(fontsize="small")
    save_figure(figure, path)


def draw_map(axis: Axes, grid: Grid) -> None:
    loras, ratios = (sorted({point[place] for point in grid}) for place in (0, 1))
    losses = [[grid.get((lora, ratio), float("nan")) for ratio in ratios] for lora in loras]
    axis.imshow(losses, cmap="viridis_r", aspect="auto", origin="lower")
    middle = (min(grid.values()) + max(grid.values())) / 2
    for row, values in enumerate(losses):
        for column, loss in enumerate(values):
            colour = "white" if loss > middle else "black"
            axis.text(column, row, f"{loss:.3f}", ha="center", va="center", color=colour)
    axis.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
    axis.set_yticks(range(len(loras)), [f"{lora:g}" for lora in loras])
    axis.set(xlabel="projector rate / LoRA rate", ylabel="LoRA rate", title="Validation loss")


if __name__ == "__main__":
    main()
