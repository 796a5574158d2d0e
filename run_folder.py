"""What the output folder of a run holds, and where an interrupted run continues.

    checkpoint-<step>/     complete checkpoints: trained weights, optimizer, schedule, random numbers, log
    .unfinished/           a checkpoint that is being written
    config.yaml            configuration of the run
    adapter_..., projector.safetensors, kanjian.json, tokenizer files     the result, written at the end
    trainer_state.json     the log, written last: its presence says that the run is finished
"""

import operator
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from config import Config, config_differences, save_config
from model.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    DECODER_FOLDER,
    ENCODER_FILE,
    PROJECTOR_FILE,
    ROWS_FILE,
    SPEC_FILE,
)

UNFINISHED = ".unfinished"
PROGRESS = "progress.json"  # in a checkpoint: what resuming needs beside the Trainer's own files
CONFIG_FILE = "config.yaml"


class RunError(RuntimeError):
    """The output folder doesn't allow this run; the message says why. `status` is the exit status of the script."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def resume_point(config: Config, main_process: bool = True) -> Path | None:
    """Newest checkpoint of an unfinished run in `train.output_dir`, or None for a fresh start.

    The main process also clears the folder if `train.overwrite` is set and records the configuration there.

    Raises:
        RunError: the folder holds a finished run, a run with another configuration, or checkpoints of nobody knows
            what.
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
        if changed := config_differences(config, saved):
            raise RunError(
                f"{folder} holds a run with another configuration:\n  " + "\n  ".join(changed)
                + "\nChoose another train.output_dir, or start over with train.overwrite=true"
            )
        if finished:
            raise RunError(f"{folder} holds a finished run of this configuration; train.overwrite=true trains again", 0)
    if main_process:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, saved)
    return checkpoints[-1] if checkpoints else None


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
        if all((path / name).exists() for name in needed) and any((path / name).exists() for name in optimizers)
    ]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def checkpoint_folders(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]


def remove_run(folder: Path) -> None:
    """Deletes what a run writes into its output folder and nothing else."""
    for path in [folder / UNFINISHED, *checkpoint_folders(folder)]:
        shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder / DECODER_FOLDER, ignore_errors=True)
    weights = (ADAPTER_FILE, ADAPTER_CONFIG_FILE, PROJECTOR_FILE, ENCODER_FILE, ROWS_FILE)
    for name in (TRAINER_STATE_NAME, SPEC_FILE, *weights, CONFIG_FILE):
        (folder / name).unlink(missing_ok=True)
