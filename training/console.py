"""What a person sees of a run: a line per log and validation, in a terminal with a bar below, in a file without."""

import time
from collections.abc import Mapping

from tqdm.auto import tqdm
from transformers import TrainerCallback

LINES_PER_HEADER = 20
SHOWN_LETTERS = 80  # of an answer
SHORT = {"projector": "proj"}  # names of parts at the head of narrow columns


class Console(TrainerCallback):
    """Prints one line per log on the main process:

             step    loss  lora lr  proj lr  lora |g|  proj |g|   tok/s  superv.    MFU  wait    GiB     left
          20/1060  1.2345  2.0e-03  4.0e-03     0.712     1.204  12,345    1,204  41.2%    0%   12.3  0:12:34

    `|g|` is the norm of the gradient before clipping, `superv.` supervised tokens per second, `wait` the share of the
    time spent waiting for data, `left` hours, minutes and seconds, validation included.
    """

    def __init__(self):
        self.bar: tqdm | None = None
        self.lines = 0  # since the last header

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first, self.lines = time.perf_counter(), state.global_step, 0
        if state.is_world_process_zero:
            # Without a terminal, as in a log file, it is disabled.
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", leave=False, disable=None,
                            dynamic_ncols=True)  # fmt: skip

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.bar is None:
            return
        place = f"{state.global_step}/{state.max_steps}"
        if "loss" in logs:
            columns = cells(logs, left(self.start, self.first, state.global_step, state.max_steps))
            if self.lines % LINES_PER_HEADER == 0:
                self.write(" ".join([f"{'step':>13}", *(f"{name:>{width(name)}}" for name in columns)]))
            self.lines += 1
            self.write(" ".join([f"{place:>13}", *(f"{text:>{width(name)}}" for name, text in columns.items())]))
        elif "eval_loss" in logs:
            self.write(f"{place:>13} {logs['eval_loss']:>8.4f}  validation loss, {logs['eval_runtime']:.1f} s")
        elif "train_runtime" in logs:
            steps = state.global_step - self.first
            self.write(f"{steps:,} steps in {clock(logs['train_runtime'])} (hours:minutes:seconds)")

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def write(self, line: str) -> None:
        """Prints a line above the bar."""
        if self.bar is None or self.bar.disable:
            print(line, flush=True)
        else:
            tqdm.write(line)

    def close(self) -> None:
        """Removes the bar, also of a run that was broken off."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def cells(logs: Mapping[str, float], seconds_left: float) -> dict[str, str]:
    """Name of a column -> its text, for one log of `VLMTrainer`."""
    parts = [name.removesuffix("_lr") for name in logs if name.endswith("_lr")]
    found = {"loss": f"{logs['loss']:.4f}"}
    found |= {f"{SHORT.get(part, part)} lr": f"{logs[f'{part}_lr']:.1e}" for part in parts}
    norms = {SHORT.get(part, part): logs[f"{part}_grad_norm"] for part in parts if f"{part}_grad_norm" in logs}
    if not norms and "grad_norm" in logs:
        norms = {"all": logs["grad_norm"]}
    found |= {f"{part} |g|": f"{norm:.3g}" for part, norm in norms.items()}
    found["tok/s"] = f"{logs['tokens_per_second']:,.0f}"
    found["superv."] = f"{logs['supervised_tokens_per_second']:,.0f}"
    if "mfu" in logs:
        found["MFU"] = f"{logs['mfu']:.1%}"
    found["wait"] = f"{logs['data_wait']:.0%}"
    found["GiB"] = f"{logs['memory_gib']:.1f}"
    return found | {"left": clock(seconds_left)}


def shortened(text: str) -> str:
    """The beginning of a text, quoted."""
    return repr(text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}...")


def width(column: str) -> int:
    """Letters of a column: of its name, and of what may come."""
    return max(len(column), {"loss": 8, "tok/s": 9, "superv.": 8, "MFU": 6, "wait": 4, "GiB": 5}.get(column, 8))


def left(start: float, first: int, step: int, steps: int) -> float:
    """Seconds that a run needs from `step` on, if it stays as fast as since it began with `first` at `start`."""
    return (time.perf_counter() - start) / max(step - first, 1) * (steps - step)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
