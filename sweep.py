"""Every combination of several values of keys, each a run of its own, and a table of how they did.

    bash train.sh --config configs/scenes.yaml output_dir=outputs/rates train.learning_rate=1e-3,2e-3 lora.r=8,16
    NPROC=2 bash train.sh --config ... lora_lr=1e-4,3e-4            each run on two GPUs
    python train.py --config ... lora_lr=1e-4,3e-4                  likewise, in one process
    python train.py --config ... lora_lr=1e-4,3e-4 --dry_run        only lists the runs

A key has several values where they stand on the command line with commas between them; keys whose value is a list
(`data.train`), free text (`data.system`) and folders of the run keep their commas. The runs follow each other, each in
a new process and in a folder of its own below `train.output_dir`, such as `learning_rate=1e-3,lora.r=8`. The same
command goes on after an interruption: what is finished is left out, what is not continues. A run that fails does not
end the sweep. Ctrl-C and SIGTERM end it when the run in hand has written a checkpoint; a second time, at once.

`train.output_dir` then holds sweep.md (the table, by validation loss), sweep.json and sweep.png (validation losses).
"""

import codecs
import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from config import ConfigError, leaves, load_config, resolve_keys, split_arguments
from dataset.text_table import text_table

ROOT = Path(__file__).parent
# Texts in which a comma is nothing but a comma: they are written for a reader, or name a place.
ONE_VALUE = {"data.system", "data.image_root", "data.feature_cache", "data.epoch", "train.output_dir"}
LAST_SHARE = 0.1  # of the steps: over their training losses the one of the table is the mean
REASON = re.compile(r"^(?:\[rank\d+\]: *)?((?:train\.py: |[\w.]*(?:Error|Exception)\w*: ).*\S)", re.MULTILINE)
TAIL = 16_384  # characters of a run's error output that are kept, to find the reason of a failure in


@dataclass
class Run:
    """One combination of values."""

    values: dict[str, str]  # what is varied -> text of the value
    arguments: list[str]  # of train.py, the output folder among them
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass
class Outcome:
    """How a run did."""

    values: dict[str, str]
    folder: str
    status: str = "waiting"  # or "begun", "finished", "failed", "interrupted"
    reason: str | None = None  # of a failure
    seconds: float | None = None  # wall clock, of all attempts
    train_loss: float | None = None  # mean of the losses of the last tenth of the steps
    validation_loss: float | None = None  # the last one
    best_validation_loss: float | None = None
    best_step: int | None = None
    samples_per_second: float | None = None  # median over the log lines
    validation: list[tuple[int, float]] = field(default_factory=list)  # step, loss


# What is to run


def is_sweep(argv: Sequence[str]) -> bool:
    """Whether arguments of train.py give any key several values; False where they are faulty otherwise."""
    if "--help" in argv or "-h" in argv:
        return False
    try:
        return any(len(_values(key, text)) > 1 for key, text in split_arguments(_without_flags(argv)))
    except ConfigError:  # which load_config will tell
        return False


def plan_runs(argv: Sequence[str]) -> list[Run]:
    """The runs of a command line, the values of its last key varying fastest.

    Raises:
        ConfigError: a value that its key can't take, or two combinations that are the same run.
    """
    pairs = split_arguments(_without_flags(argv))
    choices = [_values(key, text) for key, text in pairs]
    runs, seen = [], {}
    for chosen in product(*choices):
        arguments = [f"--{key}={text}" for (key, _), text in zip(pairs, chosen, strict=True)]
        values = {
            _label(key): text
            for (key, _), text, choice in zip(pairs, chosen, choices, strict=True)
            if len(choice) > 1
        }
        config = load_config(arguments)
        if (same := seen.setdefault(repr(config), values)) is not values:
            raise ConfigError(f"{_named(same)} and {_named(values)} are the same run: leave one of the values out")
        folder = Path(config.train.output_dir, safe_name(_named(values)))
        runs.append(Run(values, [*arguments, f"--train.output_dir={folder}"], folder))
    return runs


def _values(key: str, text: str) -> list[str]:
    """The values in an argument's text: one, unless its key takes one and the text has commas.

    Raises:
        ConfigError: unknown key, or nothing between two commas.
    """
    if key == "config" or "," not in text:
        return [text]
    paths = resolve_keys(key)
    if any(path in ONE_VALUE or _holds_several(leaves()[path]) for path in paths) or os.path.exists(text):
        return [text]
    values = [value.strip() for value in text.split(",")]
    if not all(values):
        raise ConfigError(f"command line: {key}={text} has nothing between two commas, or at an end")
    return values


def _holds_several(kind: Any) -> bool:
    return typing.get_origin(kind) in (list, dict)


def _without_flags(argv: Sequence[str]) -> list[str]:
    return [argument for argument in argv if argument != "--dry_run"]


def _label(key: str) -> str:
    """`lora.r` for any way to write model.lora.r; an alias as it is."""
    paths = resolve_keys(key)
    return key.rpartition(".")[2] if len(paths) > 1 else paths[0].partition(".")[2]


def _named(values: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in values.items())


def safe_name(text: str) -> str:
    """`text` as the name of a folder on any file system, still different for different texts."""
    name = re.sub(r"[^\w.,+=-]", "_", text)
    if name == text and len(name.encode()) <= 200:
        return name
    shortened = name.encode()[:190].decode(errors="ignore")
    return f"{shortened}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def progress_of(run: Run, processes: int) -> str:
    """"finished", "begun" if there is a checkpoint to go on from, or "waiting".

    Raises:
        RunError: its folder holds a run with another configuration.
    """
    config = load_config(run.arguments)
    if config.train.overwrite:
        return "waiting"
    files = _run_folder()
    try:
        return "begun" if files.resume_point(config, main_process=False, processes=processes) else "waiting"
    except files.RunError as error:
        if error.status == 0:
            return "finished"
        raise


def _run_folder():
    import run_folder  # it imports torch, which whoever only asks `is_sweep` need not wait for

    return run_folder


# Running


def sweep(argv: Sequence[str], command: Sequence[str], processes: int = 1) -> int:
    """Runs all combinations of the arguments `argv` of train.py, each by `command`; returns the exit status.

    Args:
        processes: that `command` trains with.

    Raises:
        ConfigError, RunError: something is wrong with any of the runs, found before the first one starts.
    """
    runs = plan_runs(argv)
    return run_all(runs, runs[0].folder.parent, command, processes, only_list="--dry_run" in argv)


def run_all(
    runs: Sequence[Run], folder: Path, command: Sequence[str], processes: int = 1, only_list: bool = False
) -> int:
    """Does what is left of `runs`, one after the other, and prints and writes into `folder` how they did.

    Returns:
        0; 1 where a run failed; 128 + the signal that ended it.

    Raises:
        RunError: the folder of a run holds another one.
    """
    outcomes = [_outcome(run, folder, progress_of(run, processes)) for run in runs]
    print(f"{len(runs)} runs in {folder}:")
    for run, outcome in zip(runs, outcomes, strict=True):
        print(f"  {run.name}  ({outcome.status})", flush=True)
    if only_list:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    with Runner(command) as runner:
        for number, run in enumerate(runs):
            if outcomes[number].status == "finished":
                continue
            print(f"\n== {run.name}: {number + 1} of {len(runs)}{_time_left(outcomes)}", flush=True)
            begin = time.monotonic()
            reason = runner.run(run.arguments)
            known = outcomes[number].seconds or 0.0
            status = "finished" if reason is None else "interrupted" if runner.signal else "failed"
            outcomes[number] = _outcome(run, folder, status, reason if status == "failed" else None)
            outcomes[number].seconds = known + time.monotonic() - begin
            _write_json(outcomes, folder)
            if status == "failed":
                print(f"== {run.name} failed: {reason}", flush=True)
            if runner.signal:
                break
    print(f"\n{write_results(outcomes, folder)}")
    if runner.signal and any(outcome.status != "finished" for outcome in outcomes):
        print("The sweep was stopped; the same command goes on")
        return 128 + runner.signal
    return int(any(outcome.status == "failed" for outcome in outcomes))


class Runner:
    """Starts runs, and while it is entered takes SIGINT and SIGTERM: the run in hand ends with a checkpoint.

    Attributes:
        signal: the number of the signal that came, or 0.
    """

    def __init__(self, command: Sequence[str]):
        self.command = list(command)
        self.signal = 0
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Runner":
        self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame) -> None:
        again, self.signal = bool(self.signal), number
        if self._process is not None:
            _send(self._process, signal.SIGKILL if again else signal.SIGTERM)

    def run(self, arguments: list[str]) -> str | None:
        """Waits for a run; returns None once it is finished, else why it is not."""
        if self.signal:
            return "not begun"
        # A process group of its own: Ctrl-C reaches the run through `_stop` alone, as a SIGTERM, which it obeys.
        process = subprocess.Popen([*self.command, *arguments], stderr=subprocess.PIPE, process_group=0)
        tail: list[str] = [""]
        copying = threading.Thread(target=_copy, args=(process.stderr, tail), daemon=True)
        copying.start()
        self._process = process
        if self.signal:  # it came before there was a process to tell
            _send(process, signal.SIGTERM)
        status = process.wait()
        self._process = None
        copying.join(timeout=10)  # a process that a run left behind may hold the pipe open
        if status == 0:
            return None
        found = REASON.findall(tail[0])
        ended = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return found[-1].removeprefix("train.py: ") if found else ended


def _send(process: subprocess.Popen, number: int) -> None:
    try:
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    except ProcessLookupError:
        pass  # it has just ended


def _copy(stream, tail: list[str]) -> None:
    """Passes a run's error output on and keeps its end in `tail[0]`."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may come in two pieces
    while chunk := stream.read1(4096):
        text = decoder.decode(chunk)
        tail[0] = (tail[0] + text.replace("\r", "\n"))[-TAIL:]
        sys.stderr.write(text)
        sys.stderr.flush()


def _time_left(outcomes: list[Outcome]) -> str:
    """`, 3 left, about 12 min`, as long as those that are finished took."""
    left = sum(outcome.status in ("waiting", "begun") for outcome in outcomes)
    known = [outcome.seconds for outcome in outcomes if outcome.status == "finished" and outcome.seconds]
    about = f", about {duration(left * statistics.mean(known))}" if known else ""
    return f" ({left} left{about})"


# Results


def _outcome(run: Run, folder: Path, status: str, reason: str | None = None) -> Outcome:
    """What the log of a run tells, and how long it has taken according to `sweep.json`."""
    outcome = Outcome(run.values, str(run.folder), status, reason)
    outcome.seconds = _known_seconds(folder).get(str(run.folder))
    log = _history(run.folder)
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    if losses:
        first = (1 - LAST_SHARE) * losses[-1][0]
        outcome.train_loss = statistics.mean(loss for step, loss in losses if step > first)
    if speeds := [entry["samples_per_second"] for entry in log if "samples_per_second" in entry]:
        outcome.samples_per_second = statistics.median(speeds)
    outcome.validation = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    if outcome.validation:
        outcome.validation_loss = outcome.validation[-1][1]
        outcome.best_step, outcome.best_validation_loss = min(outcome.validation, key=lambda point: point[1])
    return outcome


def _history(folder: Path) -> Sequence[dict]:
    """The log of a run, or of the newest checkpoint of one that is not finished; empty if there is none."""
    from training.curves import read_history

    try:
        return read_history(folder)
    except _run_folder().RunError:
        return []


def _known_seconds(folder: Path) -> dict[str, float]:
    file = folder / "sweep.json"
    if not file.is_file():
        return {}
    return {run["folder"]: run["seconds"] for run in json.loads(file.read_text(encoding="utf-8"))["runs"]}


def _write_json(outcomes: Sequence[Outcome], folder: Path) -> None:
    text = json.dumps({"runs": [asdict(outcome) for outcome in outcomes]}, indent=2, ensure_ascii=False)
    write_text(folder / "sweep.json", text + "\n")


def write_results(outcomes: Sequence[Outcome], folder: Path) -> str:
    """Writes sweep.json, sweep.md and, where there are validation losses, sweep.png; returns the table as text."""
    ordered = sorted(outcomes, key=_rank)
    rows = result_rows(ordered)
    right = range(len(ordered[0].values), len(rows[0]))
    failures = [f"{_named(run.values)} failed: {run.reason}" for run in ordered if run.reason]
    rules = ["---:" if column in right else "---" for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(row) + " |" for row in (rows[0], rules, *rows[1:])]
    _write_json(ordered, folder)
    write_text(folder / "sweep.md", "\n".join([*lines, "", *(f"{line}\n" for line in failures)]))
    curves = {_named(run.values): run.validation for run in ordered if run.validation}
    if curves:
        plot_validation(curves, folder / "sweep.png")
    names = "sweep.md, sweep.json" + (", sweep.png" if curves else "")
    return "\n".join([text_table(rows, right), *failures, f"Written to {folder}: {names}"])


def _rank(outcome: Outcome) -> tuple:
    """The lowest validation loss first, without validation the lowest training loss; unfinished runs last."""
    loss = outcome.train_loss if outcome.validation_loss is None else outcome.validation_loss
    return outcome.status != "finished", loss is None, loss or 0.0


def result_rows(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Header and one row per run: values, status unless all are finished, losses, time, speed."""
    statuses = any(outcome.status != "finished" for outcome in outcomes)
    columns = ("validation loss", "best validation loss", "at step", "training loss", "time", "samples/s")
    rows = [(*outcomes[0].values, *(("status",) if statuses else ()), *columns)]
    for run in outcomes:
        figures = (
            _figure(run.validation_loss, ".4f"),
            _figure(run.best_validation_loss, ".4f"),
            _figure(run.best_step, "d"),
            _figure(run.train_loss, ".4f"),
            "" if run.seconds is None else duration(run.seconds),
            _figure(run.samples_per_second, ".1f"),
        )
        rows.append((*run.values.values(), *((run.status,) if statuses else ()), *figures))
    return rows


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plot_validation(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Validation loss over the steps, one line per run; the legend has the order of the table."""
    from matplotlib.figure import Figure

    from training.curves import save_figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for name, points in curves.items():
        axis.plot(*zip(*points, strict=True), marker=".", label=name)
    axis.set(xlabel="step", ylabel="validation loss")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", ncols=1 + len(curves) // 13)
    save_figure(figure, path)


def write_text(path: Path, text: str) -> None:
    """Writes aside, then renames."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main(argv: list[str], command: Sequence[str], processes: int = 1) -> None:
    """`sweep` as a script, which ends with its exit status."""
    if "RANK" in os.environ:
        raise ConfigError(
            "several values of a key are several runs, each of which needs a torchrun of its own; train.sh takes care "
            "of that: NPROC=2 bash train.sh ..."
        )
    sys.exit(sweep(argv, command, processes))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--is_sweep"]:
        sys.exit(0 if is_sweep(sys.argv[2:]) else 1)
    try:
        main(sys.argv[1:], ["bash", str(ROOT / "train.sh")], int(os.environ.get("NPROC") or 1))
    except (ConfigError, RuntimeError) as error:  # RunError is one
        sys.exit(f"sweep.py: {error}")
