"""Checkpoints of a run: only trained weights, all that exact resuming needs, whole or not there."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from config import save_config
from dataset.sampler import ONE_BLOCK
from model.checkpoint import load_trained, save_trained
from run_folder import CONFIG_FILE, PROGRESS, UNFINISHED, RunError


class Checkpoints:
    """The half of `VLMTrainer` that writes and reads checkpoints; stands before `transformers.Trainer`."""

    def _save_checkpoint(self, model: nn.Module, trial=None) -> None:
        """Writes all that resuming needs into a folder beside and renames it to `checkpoint-<step>` when complete."""
        output_dir = Path(self.args.output_dir)
        unfinished, folder = output_dir / UNFINISHED, output_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        progress = {
            "loss_since_log": self.accelerator.gather(self._tr_loss.reshape(1)).mean().item(),
            "last_logged_step": self._globalstep_last_logged,
            "drawn": self.drawn.tolist(),
            **self.circumstances,
        }
        self.accelerator.wait_for_everyone()
        self.save_model(str(unfinished), _internal_call=True)
        self._save_optimizer_and_scheduler(str(unfinished))
        self._save_rng_state(str(unfinished))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (unfinished / PROGRESS).write_text(json.dumps(progress))
            self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)
            rotate_checkpoints(str(output_dir), self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Writes trained weights, tokenizer and configuration; the frozen weights stay where they came from."""
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            os.makedirs(folder, exist_ok=True)
            save_trained(self.model, folder)
            save_config(self.config, os.path.join(folder, CONFIG_FILE))

    @cached_property
    def circumstances(self) -> dict[str, int | str | dict | None]:
        """What the sequence of batches depends on beside the configuration."""
        drawn = self.mixture.samples.tolist() if self.mixture else range(len(self.train_dataset))
        # Of a long epoch they are not known yet.
        every = 1 if len(self.mixture or drawn) <= ONE_BLOCK else max(len(drawn) // 1000, 1)
        measured = json.dumps([self.train_dataset.lengths[index] for index in drawn[::every]])
        return {
            "processes": self.args.world_size,
            "records": self.train_dataset.records.fingerprint(),
            "sample_lengths": hashlib.sha256(measured.encode()).hexdigest(),
            "mixture": self.mixture.counts if self.mixture else None,
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with _unusable(resume_from_checkpoint):
            progress = json.loads(Path(resume_from_checkpoint, PROGRESS).read_text())
        for name, value in self.circumstances.items():
            if name in progress and progress[name] != value:  # an older checkpoint has fewer of them
                raise RunError(
                    f"{resume_from_checkpoint} can't be continued: {name.replace('_', ' ')} then {progress[name]}, now "
                    f"{value}; restore it, or start over with train.overwrite=true"
                )
        with _unusable(resume_from_checkpoint):
            load_trained(self.model, resume_from_checkpoint)
        self.progress = progress

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _unusable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def finish(self) -> None:
        """Writes the trained weights into the output folder itself and, last, the log, which marks it as finished."""
        self.save_model()
        if self.args.should_save:
            log = Path(self.args.output_dir, TRAINER_STATE_NAME)
            self.state.save_to_json(f"{log}.tmp")
            os.replace(f"{log}.tmp", log)
        self.accelerator.wait_for_everyone()


@contextmanager
def _unusable(checkpoint: str | None) -> Iterator[None]:
    """Errors while a checkpoint is read, as a `RunError` that says which one it is."""
    try:
        yield
    except (OSError, ValueError, EOFError, RuntimeError, UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).split(" In PyTorch 2.6")[0]
        raise RunError(
            f"{checkpoint} can't be continued: {reason}\n"
            "If a file in it is damaged, delete it: the run then goes on from the checkpoint before"
        ) from error
