"""Curves of runs, from their logs: loss, learning rates, gradient norms, speed.

    python -m training.curves outputs/mine                        outputs/mine/loss_curves.png
    python -m training.curves outputs/a outputs/b --output ab.png        several runs in one picture

The log of an unfinished run is that of its newest checkpoint. Training itself leaves `loss_curves.png` in its folder
at its end, and when it is interrupted.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot, whose state and backend belong to whoever imports this
from transformers.trainer import TRAINER_STATE_NAME

from run_folder import CURVES_FILE, RunError, checkpoint_folders

PICTURES = (".png", ".pdf", ".svg")
SMOOTHING = 0.1  # of the points of a curve, which the window of its mean spans
History = Sequence[Mapping[str, float]]  # `log_history` of a run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run")
    parser.add_argument("--output", type=Path, help=f"picture; default: {CURVES_FILE} in the (first) run's folder")
    arguments = parser.parse_args()
    output = arguments.output or arguments.runs[0] / CURVES_FILE
    if output.suffix not in PICTURES:
        parser.error(f"--output {output}: a picture's name ends in one of {', '.join(PICTURES)}")
    histories = {legend(run): read_history(run) for run in arguments.runs}
    try:
        draw(histories, output)
    except OSError as error:
        raise RunError(f"{output} can't be written: {error}") from error
    print(output)


def legend(run: Path) -> str:
    """The name of a run as a picture shows it: matplotlib reads `$` as mathematics, and hides what begins with `_`."""
    return "./" * str(run).startswith("_") + str(run).replace("$", r"\$")


def read_history(run: Path) -> History:
    """The log of a run: that of its end, or of its newest checkpoint.

    Raises:
        RunError: there is neither, or the log can't be read.
    """
    newest_first = sorted(checkpoint_folders(run), key=lambda path: -int(path.name.removeprefix("checkpoint-")))
    for file in (folder / TRAINER_STATE_NAME for folder in (run, *newest_first)):
        if file.exists():
            try:
                history = json.loads(file.read_text(encoding="utf-8"))["log_history"]
                return [{"step": entry["step"], **entry} for entry in history]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise RunError(f"{file} is no log of a run: {error!r}") from error
    raise RunError(f"{run} holds no log: neither {TRAINER_STATE_NAME} nor a checkpoint with one")


def draw(histories: Mapping[str, History], path: Path) -> None:
    """Writes a picture of one or several runs, by name; it appears under `path` when it is complete."""
    figure = Figure(figsize=(13, 8))
    figure.subplots_adjust(left=0.06, right=0.94, bottom=0.07, top=0.95, wspace=0.2, hspace=0.28)
    loss, rates, norms, speed = axes = list(figure.subplots(2, 2).flat)
    for name, history in histories.items():
        draw_loss(loss, history, name if len(histories) > 1 else "")
    loss.set(title="Loss per supervised token", ylabel="loss")
    draw_parts(rates, histories, "_lr")
    rates.set(title="Learning rate")
    draw_parts(norms, histories, "_grad_norm")
    norms.set(title="Gradient norm before clipping")
    for axis in (loss, rates, norms):
        use_log_if_wide(axis)
    draw_speed(speed, histories)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    save_figure(figure, path)


def draw_loss(axis: Axes, history: History, name: str = "", colour: str | None = None) -> None:
    """Training loss as it was logged (light) and its running mean, and validation loss; `name` leads the labels."""
    steps, losses = points(history, "loss")
    label = f"{name} training".strip()
    if len(steps):
        (line,) = axis.plot(steps, smoothed(losses), label=label, color=colour)
        colour = line.get_color()
        axis.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
    steps, losses = points(history, "eval_loss")
    if len(steps):
        options = {"color": colour, "linestyle": "--"} if name else {}
        axis.plot(steps, losses, marker=".", label=f"{name} validation".strip(), **options)


def draw_parts(axis: Axes, histories: Mapping[str, History], ending: str) -> None:
    """What was logged of each part of the model: `lora_lr`, `projector_lr`, or the norms of gradients."""
    styles = ("-", "--", ":", "-.")
    colours = rcParams["axes.prop_cycle"].by_key()["color"]
    for number, (name, history) in enumerate(histories.items()):
        logged = dict.fromkeys(key for entry in history for key in entry)
        # A run of former times, or under DeepSpeed, has the norm of the whole gradient alone.
        keys = [key for key in logged if key.endswith(ending)] or [ending.removeprefix("_")]
        for style, key in enumerate(keys):
            steps, values = points(history, key)
            own = name if len(histories) > 1 else ""
            look = (number, style) if own else (style, 0)  # a colour per run, or per part of the only one
            axis.plot(steps, values, label=f"{own} {key.removesuffix(ending)}".strip() if key.endswith(ending) else own,
                      color=colours[look[0] % len(colours)], linestyle=styles[look[1] % len(styles)])  # fmt: skip


def draw_speed(axis: Axes, histories: Mapping[str, History]) -> None:
    """Supervised tokens per second, and MFU on an axis of its own, from zero."""
    share = None
    colours = rcParams["axes.prop_cycle"].by_key()["color"]
    for number, (name, history) in enumerate(histories.items()):
        own, colour = (f"{name} ", colours[number % len(colours)]) if len(histories) > 1 else ("", colours[0])
        steps, values = points(history, "supervised_tokens_per_second")
        axis.plot(steps, values, color=colour, label=f"{own}tokens/s")
        steps, values = points(history, "mfu")
        if len(steps):
            share = share or axis.twinx()
            share.plot(steps, 100 * values, color=colour if own else colours[1], linestyle="--")
            axis.plot([], [], color=colour if own else colours[1], linestyle="--", label=f"{own}MFU")
    axis.set(title="Speed", ylabel="supervised tokens/s")
    axis.set_ylim(bottom=0)
    if share:
        share.set_ylabel("MFU (%)")
        share.set_ylim(bottom=0)


def use_log_if_wide(axis: Axes) -> None:
    """A logarithmic axis where what is plotted is positive and of several magnitudes."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines] or [np.empty(0)])
    if len(values) and values.min() > 0 and values.max() > 10 * values.min():
        axis.set_yscale("log")


def points(history: History, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the entries that have `key` and a finite value."""
    found = np.array([(entry["step"], entry[key]) for entry in history if key in entry], dtype=float).reshape(-1, 2)
    found = found[np.isfinite(found[:, 1])]
    return found[:, 0], found[:, 1]


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means over windows of about `SMOOTHING` of the points, centred, narrower at both ends."""
    reach = int(len(values) * SMOOTHING / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    own = np.minimum(reach, np.minimum(place, len(values) - 1 - place))
    return (sums[place + own + 1] - sums[place - own]) / (2 * own + 1)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes beside, then renames."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"curves: {error}")
