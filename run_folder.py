"""What the output folder of a run holds, and where an interrupted run continues.

    checkpoint-<step>/     complete checkpoints: trained weights, optimizer, schedule, random numbers, log
    .unfinished/           a checkpoint that is being written
    .saving-.../           the result that is being written
    .lock                  which keeps other runs out while one is at work
    config.yaml            configuration of the run
    loss_curves.png        its course so far, drawn when it ends in whichever way
    answers.jsonl          what the model said while it learned, with train.answers
    adapter_..., projector.safetensors, kanjian.json, tokenizer files     the result, written at the end
    trainer_state.json     the log, written last: its presence says that the run is finished
"""

import errno
import fcntl
import json
import operator
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from transformers.trainer import TRAINER_STATE_NAME

from config import Config, ConfigError, config_differences, read_values, save_config
from model.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    DECODER_FOLDER,
    ENCODER_FILE,
    PROJECTOR_FILE,
    ROWS_FILE,
    SPEC_FILE,
    STAGING,
)

UNFINISHED = ".unfinished"
PROGRESS = "progress.json"  # in a checkpoint: what resuming needs beside the Trainer's own files
CONFIG_FILE = "config.yaml"
RESULT = (SPEC_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE, PROJECTOR_FILE, ENCODER_FILE, ROWS_FILE, CONFIG_FILE)
CURVES_FILE = "loss_curves.png"
ANSWERS_FILE = "answers.jsonl"
LOCK = ".lock"


class RunError(RuntimeError):
    """The output folder doesn't allow this run; the message says why. `status` is the exit status of the script."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Division:
    """How the samples of an optimizer step are divided. A run may go on with another one of the same `global_batch`."""

    processes: int
    batch_size: int  # samples per process and micro-batch
    accumulation: int  # micro-batches per step

    KEYS = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")

    @classmethod
    def of(cls, config: Config, processes: int) -> Self:
        c = config.train
        return cls(processes, c.per_device_train_batch_size, c.gradient_accumulation_steps)

    @classmethod
    def of_checkpoint(cls, folder: Path) -> Self:
        """That of the run that wrote a checkpoint.

        Raises:
            RunError: its files can't be read.
        """
        try:
            processes = json.loads((folder / PROGRESS).read_text())["processes"]
            values = read_values(folder / CONFIG_FILE)
            return cls(processes, *(values[key] for key in cls.KEYS))
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise damaged(folder, error) from error

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step."""
        return self.processes * self.batch_size * self.accumulation

    def left_out(self, samples: int) -> int:
        """How many of an epoch's samples are too few to give each process one (`GlobalBatchSampler`)."""
        rest = samples % (self.processes * self.batch_size)
        return rest if rest < self.processes else 0

    def __str__(self) -> str:
        return f"{self.global_batch} ({self.processes} processes x {self.batch_size} x {self.accumulation})"

    def remedy(self, wanted: int) -> str:
        """Which settings give a global batch of `wanted` samples on as many processes."""
        share, rest = divmod(wanted, self.processes)
        if rest:
            possible = [str(number) for number in range(1, wanted + 1) if wanted % number == 0]
            return f"continue on a number of processes that divides {wanted}: {', '.join(possible)}"
        batch_size = self.batch_size if share % self.batch_size == 0 else share
        return f"to continue on {self.processes} process{'es' * (self.processes > 1)} set " + " ".join(
            f"{key}={value}" for key, value in zip(self.KEYS, (batch_size, share // batch_size), strict=True)
        )


@contextmanager
def held(folder: Path, setting: str = "train.output_dir") -> Iterator[None]:
    """Keeps other runs out of an output folder within it; the lock ends with this process, however that ends.

    `setting` is where the user named the folder, for messages.

    Raises:
        RunError: another run holds the folder, or it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "w")  # noqa: SIM115  closed below
    except OSError as error:
        raise RunError(f"{setting}={folder} can't be written: {error}") from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                problem = f"another run is at work in {folder}: wait for it, or choose another {setting}"
                raise RunError(problem) from None
            # A file system without locks; there nothing keeps two runs apart.
        yield


def resume_point(config: Config, main_process: bool = True, processes: int = 1) -> Path | None:
    """Newest checkpoint of an unfinished run in `train.output_dir`, or None for a fresh start.

    The main process also clears the folder if `train.overwrite` is set and records the configuration there.

    Args:
        processes: that will train. Their number may be another one than before, and with it batch size and
            accumulation, if the global batch stays.

    Raises:
        RunError: the folder holds a finished run, a run with another configuration, or checkpoints of nobody knows
            what; or it can't be written.
    """
    folder = Path(config.train.output_dir)
    for key in ("checkpoint", "decoder", "encoder.path"):
        _check_not_needed(folder, f"model.{key}", operator.attrgetter(key)(config.model))
    if (folder / SPEC_FILE).exists() and not (folder / CONFIG_FILE).exists():
        raise RunError(f"{folder} holds a model that no run wrote there; choose another train.output_dir")
    if main_process and config.train.overwrite:
        remove_run(folder)
    checkpoints = complete_checkpoints(folder)
    saved = folder / CONFIG_FILE
    finished = (folder / TRAINER_STATE_NAME).exists()
    if checkpoints or finished:
        if not saved.exists():
            raise RunError(f"{folder} holds checkpoints but no {CONFIG_FILE}; choose another train.output_dir")
        changed = config_differences(config, saved)
        if checkpoints:
            changed = [line for line in changed if line.partition(":")[0] not in Division.KEYS]
        if changed:
            raise RunError(
                f"{folder} holds a run with another configuration:\n  " + "\n  ".join(changed)
                + "\nChoose another train.output_dir, or start over with train.overwrite=true"
            )
        if finished:
            raise RunError(f"{folder} holds a finished run of this configuration; train.overwrite=true trains again", 0)
        if checkpoints:
            _check_global_batch(checkpoints[-1], Division.of(config, processes))
    if main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(f"{STAGING}*"):  # of a run that was killed while it wrote its result
                shutil.rmtree(path, ignore_errors=True)
            save_config(config, saved)
        except OSError as error:
            raise RunError(f"train.output_dir={folder} can't be written: {error}") from error
    return checkpoints[-1] if checkpoints else None


def _check_global_batch(checkpoint: Path, now: Division) -> None:
    """Raises RunError if a step would no longer have the samples that it had in the run of a checkpoint."""
    before = Division.of_checkpoint(checkpoint)
    if before.global_batch != now.global_batch:
        raise RunError(
            f"{checkpoint} was trained with a global batch (processes x train.per_device_train_batch_size x "
            f"train.gradient_accumulation_steps) of {before}, now it would be {now}; "
            f"{now.remedy(before.global_batch)}, or start over with train.overwrite=true"
        )


def damaged(checkpoint: Path | str, error: Exception) -> RunError:
    """What to say of a checkpoint that can't be read."""
    reason = (str(error).strip() or type(error).__name__).split(" In PyTorch 2.6")[0]
    return RunError(
        f"{checkpoint} can't be continued: {reason}\n"
        "If a file in it is damaged, delete it: the run then goes on from the checkpoint before"
    )


def _check_not_needed(folder: Path, key: str, start: str | None) -> None:
    """Raises RunError if a run in `folder` would write over what it starts from."""
    if start and Path(start).resolve().is_relative_to(folder.resolve()):
        inside = Path(start).resolve().relative_to(folder.resolve()).parts
        if not inside or inside[0] in (UNFINISHED, DECODER_FOLDER) or inside[0].startswith("checkpoint-"):
            raise RunError(f"{key}={start} lies in train.output_dir={folder}, where this run writes its own")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints from oldest to newest, those left out that lack a file that resuming needs."""
    needed = (TRAINER_STATE_NAME, PROGRESS, "scheduler.pt", SPEC_FILE, CONFIG_FILE)
    optimizers = ("optimizer.pt", "latest")  # the latter names the folder of DeepSpeed's own state
    complete = [
        path
        for path in checkpoint_folders(folder)
        if all((path / name).exists() for name in needed)
        and any((path / name).exists() for name in optimizers)
        and any(path.glob("rng_state*.pth"))
    ]
    return sorted(complete, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoint_folders(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]


def keep_newest(folder: Path, limit: int | None) -> None:
    """Deletes all complete checkpoints but the newest `limit`, and remains of others that are older than these."""
    complete = complete_checkpoints(folder)
    if not limit or len(complete) <= limit:
        return
    kept = complete[-limit:]
    for path in checkpoint_folders(folder):
        if _step(path) < _step(kept[0]):
            # First what makes it complete, so that nothing half deleted is taken for a checkpoint.
            (path / PROGRESS).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def sync(folder: Path) -> None:
    """Waits until the files of a folder are on the disk, so that losing power later can't lose their content."""
    for path in [*folder.rglob("*"), folder]:
        sync_file(path)


def sync_result(folder: Path) -> None:
    """Waits until the result of a run is on the disk."""
    for path in folder.iterdir():
        if path.name in (*RESULT, f"{TRAINER_STATE_NAME}.tmp"):
            sync_file(path)
    if (folder / DECODER_FOLDER).is_dir():
        sync(folder / DECODER_FOLDER)
    sync_file(folder)


def sync_file(path: Path) -> None:
    """Waits until a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_run(folder: Path) -> None:
    """Deletes what a run writes into its output folder and nothing else."""
    for path in [folder / UNFINISHED, *folder.glob(f"{STAGING}*"), *checkpoint_folders(folder)]:
        shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder / DECODER_FOLDER, ignore_errors=True)
    for name in (TRAINER_STATE_NAME, *RESULT, CURVES_FILE, ANSWERS_FILE):
        (folder / name).unlink(missing_ok=True)
