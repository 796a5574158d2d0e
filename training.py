"""The training loop: `transformers.Trainer` with the optimizer groups, loss, batches and checkpoints of this project.

What is changed, and why:

* Loss: sum over supervised tokens / their number in the global batch (all micro-batches, all processes).
* Batches: their order depends on seed and epoch alone, so that a resumed run sees what it would have seen.
* Checkpoints: only trained weights, written beside and then renamed, so that a folder `checkpoint-N` is complete.
* Logs: samples/s, supervised tokens/s, seconds spent waiting for data and computing.
* Validation: mean over tokens, not over batches.
* A gradient that is not finite ends the run.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from config import Config, ConfigError, save_config
from dataset.mixture import Mixture
from dataset.sampler import ONE_BLOCK, GlobalBatchSampler
from model.checkpoint import load_trained, save_trained
from model.optim import parameter_groups
from run_folder import CONFIG_FILE, PROGRESS, UNFINISHED, RunError

NAMED_RECORDS = 64  # of a step that goes wrong
MAX_LOGGED_SOURCES = 50  # more are no mixture, but records that have each a name of its own


class VLMTrainer(Trainer):
    """Trains what is trainable in a `MultiModalModel`, as `config` says.

    Args:
        model: the model; its parameters with `requires_grad` are trained and saved.
        train_dataset, eval_dataset: `RecordDataset`. `eval_dataset` may be None.
        collator: list of samples -> batch with `input_ids` and `labels` `[B, T]`.
        mixture: how often the sources are drawn; None: every record once per epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        train_dataset,
        eval_dataset,
        collator,
        args: TrainingArguments | None = None,
        mixture: Mixture | None = None,
    ):
        self.config = config
        self.mixture = mixture
        self.speed = Speed()
        self.rates: dict[str, float] = {}  # learning rates of the last optimizer step
        self.sources, self._source_of = train_dataset.sources
        self.drawn = np.zeros(len(self.sources), np.int64)  # samples of each source since the run began
        self.step_samples: list[int] = []  # of the optimizer step in hand
        self.stop_requested = False  # after the step in hand, with a checkpoint
        self.progress: dict | None = None  # of the checkpoint that this run continues
        super().__init__(
            model=model,
            args=args or training_arguments(config),
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )
        self.add_callback(LoopCallback(self))

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            c = self.config.train
            groups = parameter_groups(self.model, learning_rates(self.config), c.weight_decay)
            options = {"betas": (c.adam_beta1, c.adam_beta2), "eps": c.adam_epsilon}
            if c.optimizer == "adamw_8bit":
                self.optimizer = AdamW8bit(groups, **options)
            else:
                self.optimizer = torch.optim.AdamW(groups, **options, fused=True)
        return self.optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(grad_norm):
            names = [repr(self.train_dataset.records.id_at(index)) for index in self.step_samples]
            more = f" and {len(names) - NAMED_RECORDS} more" if len(names) > NAMED_RECORDS else ""
            raise FloatingPointError(
                f"the gradient of step {self.state.global_step + 1} is not finite (norm {float(grad_norm)}, loss "
                f"{float(self._tr_loss)} since the last log line); nothing was updated. Lower train.lora_lr and "
                "train.projector_lr or lengthen train.warmup_steps; the same command with other values starts over "
                "when train.overwrite=true is added. Records of this step, should one of them be the cause: "
                f"{', '.join(names[:NAMED_RECORDS])}{more}"
            )
        return grad_norm

    # Batches

    def get_train_dataloader(self) -> DataLoader:
        c = self.config.train
        by_modality = self.config.data.batches == "by_modality"
        self.batch_sampler = GlobalBatchSampler(
            self.train_dataset.lengths,
            c.per_device_train_batch_size,
            accumulation=c.gradient_accumulation_steps,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            strategy=c.train_sampling_strategy,
            seed=c.seed,
            mixture=self.mixture,
            has_media=self.train_dataset.has_media if by_modality else None,
        )
        return self._loader(self.train_dataset, self.batch_sampler)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Every sample once over all processes, in batches of similar length."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        order = sorted(range(len(dataset)), key=lambda i: -dataset.lengths[i])
        own, size = order[self.args.process_index :: self.args.world_size], self.args.per_device_eval_batch_size
        return self._loader(dataset, [own[start : start + size] for start in range(0, len(own), size)])

    def _loader(self, dataset, batches) -> DataLoader:
        # With a generator of its own the loader takes nothing from the global one, which dropout draws from.
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.device.type == "cuda",
            generator=torch.Generator(),
        )

    def get_batch_samples(self, epoch_iterator, num_batches: int, device):
        start = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Those of all processes: there is no need to ask the others.
        self.step_samples = [sample for _ in batches for sample in self.batch_sampler.handed_out.popleft()]
        self.drawn += np.bincount(self._source_of[self.step_samples], minlength=len(self.drawn))
        num_items = num_items.clamp(min=1)  # 0 only if every record of the batch was skipped for its image
        self.speed.batch(time.perf_counter() - start, sum(len(batch["labels"]) for batch in batches), num_items)
        return batches, num_items

    def stops(self) -> bool:
        """Whether any process was asked to stop: all of them do it after the same step."""
        if self.args.world_size == 1:
            return self.stop_requested
        asked = torch.tensor(float(self.stop_requested), device=self.args.device)
        return bool(self.accelerator.reduce(asked, reduction="sum"))

    # Validation

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Loss per supervised token over the whole data set, whatever its division into batches and processes."""
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        totals = torch.zeros(2, dtype=torch.float64)  # loss, supervised tokens
        for batch in dataloader:
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            with torch.no_grad(), self.accelerator.autocast():
                loss = self.model(**self._prepare_inputs(batch), num_items_in_batch=1).loss
            totals += torch.tensor([float(loss), tokens], dtype=torch.float64)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss, tokens = self.accelerator.reduce(totals.to(self.args.device), reduction="sum").tolist()
        if not tokens:
            raise RunError("no token of data.validation is supervised: none of its images could be read")
        metrics = {f"{metric_key_prefix}_loss": loss / tokens}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and "eval_loss" not in logs:
            del logs["learning_rate"]  # that of the first group alone
            logs.update(self.rates)
            logs.update(self.speed.report(self.args.world_size))
            if 1 < len(self.sources) <= MAX_LOGGED_SOURCES:
                shares = self.drawn / max(self.drawn.sum(), 1)
                named = zip(self.sources, shares.tolist(), strict=True)
                logs.update({f"share_{name}": round(share, 4) for name, share in named})
        super().log(logs, start_time)

    # Checkpoints

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


class LoopCallback(TrainerCallback):
    """Hooks of the loop that the Trainer offers only to callbacks."""

    def __init__(self, trainer: VLMTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.speed = Speed()
        if trainer.progress is not None:
            trainer._tr_loss += trainer.progress["loss_since_log"]
            trainer._globalstep_last_logged = trainer._initial_global_step = trainer.progress["last_logged_step"]
            trainer.drawn[:] = trainer.progress.get("drawn", 0)

    def on_epoch_begin(self, args, state, control, **kwargs):
        steps = math.ceil(len(self.trainer.batch_sampler) / args.gradient_accumulation_steps)
        sampler = self.trainer.batch_sampler
        sampler.epoch, had = divmod(state.global_step, steps)
        sampler.skip = had * args.gradient_accumulation_steps  # of the resumed epoch: accelerate throws them away

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        groups = self.trainer.optimizer.param_groups
        self.trainer.rates = {f"{group['name'].partition('_')[0]}_lr": group["lr"] for group in groups}

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.speed.step_done()
        if self.trainer.stops():
            control.should_save = control.should_training_stop = True


class Speed:
    """Time and amount of work since the last report; validation and checkpoints are not counted."""

    def __init__(self):
        self.waiting = self.computing = 0.0  # seconds
        self.samples, self.tokens = 0, 0  # of this process; of all processes
        self._ready = time.perf_counter()

    def batch(self, seconds: float, samples: int, tokens) -> None:
        """A batch has come after `seconds` of waiting."""
        self.waiting += seconds
        self.samples += samples
        self.tokens += tokens
        self._ready = time.perf_counter()

    def step_done(self) -> None:
        self.computing += time.perf_counter() - self._ready

    def report(self, world_size: int) -> dict[str, float]:
        """Figures since the last call."""
        seconds = max(self.waiting + self.computing, 1e-9)
        figures = {
            "samples_per_second": self.samples * world_size / seconds,
            "supervised_tokens_per_second": float(self.tokens) / seconds,
            "seconds_waiting_for_data": self.waiting,
            "seconds_computing": self.computing,
        }
        self.__init__()
        return {name: round(value, 3) for name, value in figures.items()}


def learning_rates(config: Config) -> dict[str, float]:
    """Peak learning rate of each part that can be trained."""
    c = config.train
    return {"lora": c.lora_lr, "projector": c.projector_lr, "decoder": c.decoder_lr, "encoder": c.encoder_lr}


def training_arguments(config: Config) -> TrainingArguments:
    """Settings of the Trainer. Starts the process group under `torchrun`.

    Raises:
        ConfigError: DeepSpeed is asked for, but it or its settings are not there.
    """
    c = config.train
    if c.deepspeed and find_spec("deepspeed") is None:
        raise ConfigError("train.deepspeed needs a package: pip install -r requirements-deepspeed.txt")
    if c.deepspeed and not Path(c.deepspeed).is_file():
        raise ConfigError(f"train.deepspeed: there is no file {c.deepspeed}, such as configs/deepspeed_zero2.json")
    args = TrainingArguments(
        output_dir=c.output_dir,
        seed=c.seed,
        num_train_epochs=c.num_train_epochs,
        max_steps=c.max_steps,
        per_device_train_batch_size=c.per_device_train_batch_size,
        per_device_eval_batch_size=c.per_device_eval_batch_size,
        gradient_accumulation_steps=c.gradient_accumulation_steps,
        lr_scheduler_type=c.lr_scheduler_type,
        warmup_steps=c.warmup_steps,
        max_grad_norm=c.max_grad_norm,
        bf16=c.bf16,
        fp16=c.fp16 and torch.cuda.is_available(),
        deepspeed=c.deepspeed,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=c.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.data.validation else "no",
        eval_steps=c.eval_steps,
        save_steps=c.save_steps,
        save_total_limit=c.save_total_limit,
        report_to=c.report_to or "none",
        remove_unused_columns=False,
        dataloader_num_workers=config.data.num_workers,
        activation_checkpointing=c.gradient_checkpointing,
        ddp_find_unused_parameters=False,  # the model puts every trainable parameter into the graph of every batch
        ddp_broadcast_buffers=False,  # all processes fill theirs alike
    )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs are for torchrun; DataParallel would cut batches between images
    return args
