"""Checkpoints of a run: only trained weights, all that exact resuming needs, whole or not there.

A checkpoint says nothing of how the weights lay among processes: whatever wrote it (one process, several, FSDP2,
ZeRO), any of them continues it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from config import save_config
from dataset.sampler import ONE_BLOCK
from model.checkpoint import describe, load_trained, trained_weights, write_trained
from model.optim import parameter_groups
from model.sharded import num_bytes
from run_folder import (
    CONFIG_FILE,
    PROGRESS,
    UNFINISHED,
    Division,
    RunError,
    damaged,
    keep_newest,
    sync,
    sync_file,
    sync_result,
)
from training.arguments import learning_rates
from training.optimizer_state import restore, restore_zero, whole_state, whole_zero_state
from training.writing import Writing


class Checkpoints:
    """The half of `VLMTrainer` that writes and reads checkpoints; stands before `transformers.Trainer`."""

    # Writing

    def _save_checkpoint(self, model: nn.Module, trial=None) -> None:
        """Writes all that resuming needs into a folder beside and renames it to `checkpoint-<step>` when complete.

        At every moment the folder of a complete checkpoint is untouched, or whole under its new name; the files are on
        the disk before they get it. Older checkpoints go last.

        Raises:
            RunError: a write fails, such as on a full disk; what was written of this checkpoint is removed.
        """
        output_dir = Path(self.args.output_dir)
        unfinished, folder = output_dir / UNFINISHED, output_dir / f"checkpoint-{self.state.global_step}"
        main = self.args.should_save
        writing = Writing(unfinished, folder.name, "The checkpoints before it are whole.")
        self.store_flos()
        progress = {
            "loss_since_log": self.accelerator.gather(self._tr_loss.reshape(1)).mean().item(),
            "last_logged_step": self._globalstep_last_logged,
            "drawn": self.drawn.tolist(),
            "processes": self.args.world_size,
            **self.circumstances,
        }
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._write_weights(unfinished, writing)
        self._write_optimizer(unfinished, writing)
        writing(self._save_rng_state, str(unfinished))
        if main:
            writing(torch.save, self.lr_scheduler.state_dict(), unfinished / SCHEDULER_NAME)
            writing(self._save_scaler, str(unfinished))
            writing((unfinished / PROGRESS).write_text, json.dumps(progress))
            writing(self.state.save_to_json, str(unfinished / TRAINER_STATE_NAME))
        writing.agree()
        if main:
            writing(sync, unfinished)
            # Remains of a copy that was broken off: no run makes a checkpoint again that is complete.
            writing(shutil.rmtree, folder, True)
            writing(os.replace, unfinished, folder)
            writing(sync_file, output_dir)
        writing.agree()
        if main:
            keep_newest(output_dir, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes trained weights, tokenizer and configuration; the frozen weights stay where they came from.

        All processes come here.

        Raises:
            RunError: a write fails.
        """
        folder = Path(output_dir or self.args.output_dir)
        staging = folder / UNFINISHED
        writing = Writing(staging, f"the result in {folder}", "The checkpoints are whole.")
        self._write_weights(folder, writing)
        writing.agree()

    def _write_weights(self, folder: Path, writing: Writing) -> None:
        weights = trained_weights(self.model)
        if self.args.should_save:
            writing(write_trained, self.model, folder, self.description, weights, size=num_bytes(weights))
            writing(save_config, self.config, folder / CONFIG_FILE)

    def _write_optimizer(self, folder: Path, writing: Writing) -> None:
        if self.is_deepspeed_enabled:
            state = whole_zero_state(self.deepspeed, self._groups)
        else:
            state = whole_state(self.optimizer)
        if self.args.should_save:
            writing(torch.save, state, folder / OPTIMIZER_NAME, size=num_bytes(state))

    def finish(self) -> None:
        """Writes the trained weights into the output folder itself and, last, the log, which marks it as finished."""
        self.save_model()
        folder = Path(self.args.output_dir)
        log = folder / TRAINER_STATE_NAME
        writing = Writing(folder / UNFINISHED, str(log), "The checkpoints are whole.")
        if self.args.should_save:
            writing(self.state.save_to_json, f"{log}.tmp")
            writing(sync_result, folder)
            writing(os.replace, f"{log}.tmp", log)
        writing.agree()

    # Reading

    def _prepare_for_training(self, max_steps: int, train_dataloader, resume_from_checkpoint: str | None):
        """Weights are loaded before the model is divided among processes, the optimizer's state after it."""
        self.description  # noqa: B018  computed while weights lie whole in this process, as
        if self.is_deepspeed_enabled:
            self._groups  # noqa: B018  these are, which go by shape
        if resume_from_checkpoint is not None:
            self.load_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the Trainer calls this at a moment that depends on how the model is divided; see above."""

    def load_checkpoint(self, checkpoint: str | Path) -> None:
        """Loads trained weights into the model, and what the run needs to know of its past.

        Raises:
            RunError: files are damaged, or the data are not those of the run.
        """
        with unusable(checkpoint):
            progress = json.loads(Path(checkpoint, PROGRESS).read_text())
        for name, value in self.circumstances.items():
            if name in progress and progress[name] != value:  # an older checkpoint has fewer of them
                raise RunError(
                    f"{checkpoint} can't be continued: {name.replace('_', ' ')} then {progress[name]}, now "
                    f"{value}; restore it, or start over with train.overwrite=true"
                )
        self._check_division(Path(checkpoint))
        with unusable(checkpoint):
            load_trained(self.model, checkpoint)
        self.progress = progress

    def _check_division(self, checkpoint: Path) -> None:
        """Raises RunError where another number of processes would change which samples an epoch has."""
        samples = len(self.mixture or self.train_dataset)
        before, now = Division.of_checkpoint(checkpoint), Division.of(self.config, self.args.world_size)
        then, today = before.left_out(samples), now.left_out(samples)
        if then != today:
            raise RunError(
                f"{checkpoint} can't be continued on {now.processes} processes: of an epoch's {samples} samples the "
                f"last {then} were left out on {before.processes}, which were too few to give each one, and {today} "
                f"would be now; continue on {before.processes} processes, or start over with train.overwrite=true"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        on_cpu = self.args.device.type == "cpu"
        with unusable(checkpoint):
            # Mapped, the processes of a machine share one copy. Not on a CPU, where the state would stay in the file.
            state = torch.load(
                Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True, mmap=not on_cpu
            )
            if self.is_deepspeed_enabled:
                restore_zero(self.deepspeed, self._groups, state)
            else:
                restore(self.optimizer, state)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with unusable(checkpoint):
            super()._load_rng_state(checkpoint)

    @cached_property
    def description(self) -> dict:
        """What `kanjian.json` says of the model."""
        return describe(self.model)

    @cached_property
    def _groups(self) -> list[dict]:
        """Groups of the optimizer, with the model's own parameters."""
        return parameter_groups(self.model, learning_rates(self.config), self.config.train.weight_decay)

    @cached_property
    def circumstances(self) -> dict[str, str | dict | None]:
        """What the sequence of samples depends on beside the configuration."""
        drawn = self.mixture.samples.tolist() if self.mixture else range(len(self.train_dataset))
        # Of a long epoch they are not known yet.
        every = 1 if len(self.mixture or drawn) <= ONE_BLOCK else max(len(drawn) // 1000, 1)
        measured = json.dumps([self.train_dataset.lengths[index] for index in drawn[::every]])
        return {
            "records": self.train_dataset.records.fingerprint(),
            "sample_lengths": hashlib.sha256(measured.encode()).hexdigest(),
            "mixture": self.mixture.counts if self.mixture else None,
        }


@contextmanager
def unusable(checkpoint: str | Path | None) -> Iterator[None]:
    """Errors while a checkpoint is read, as a `RunError` that says which one it is."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, UnpicklingError) as error:
        if isinstance(error, RunError):
            raise
        raise damaged(checkpoint, error) from error
