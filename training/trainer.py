"""The training loop: `transformers.Trainer` with the optimizer groups, loss, batches and checkpoints of this project.

What is changed, and why:

* Loss: sum over supervised tokens / their number in the global batch (all micro-batches, all processes).
* Batches: their order depends on seed and epoch alone, so that a resumed run sees what it would have seen.
* Checkpoints: only trained weights, written beside and then renamed, so that a folder `checkpoint-N` is complete.
* Logs: samples/s, supervised tokens/s, seconds spent waiting for data and computing.
* Validation: mean over tokens, not over batches.
* A gradient that is not finite ends the run.
"""

import math
import time

import numpy as np
import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from config import Config
from dataset.mixture import Mixture
from dataset.sampler import GlobalBatchSampler
from model.optim import parameter_groups
from run_folder import RunError
from training.arguments import learning_rates, training_arguments
from training.checkpoints import Checkpoints
from training.watch import Speed

NAMED_RECORDS = 64  # of a step that goes wrong
MAX_LOGGED_SOURCES = 50  # more are no mixture, but records that have each a name of its own


class VLMTrainer(Checkpoints, Trainer):
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
