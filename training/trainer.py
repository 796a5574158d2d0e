"""The training loop: `transformers.Trainer` with the optimizer groups, loss, batches and checkpoints of this project.

What is changed, and why:

* Loss: sum over supervised tokens / their number in the global batch (all micro-batches, all processes).
* Batches: their order depends on seed and epoch alone, so that a resumed run sees what it would have seen.
* Checkpoints: only trained weights, written beside and then renamed, so that a folder `checkpoint-N` is complete.
* Logs: speed, MFU, memory, waiting for data, rates and gradient norms of each part (`training/watching.py`).
* Validation: mean over tokens, not over batches.
* A loss or a gradient that is not finite ends the run.
"""

import math
import os
import time

import numpy as np
import torch
from accelerate import DistributedType
from bitsandbytes.optim import AdamW8bit
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from config import Config, ConfigError
from dataset.mixture import Mixture
from dataset.sampler import GlobalBatchSampler
from model.encoding import encode_ahead
from model.flops import supervised_tokens
from model.optim import parameter_groups, part_of
from run_folder import RunError
from training.answers import SHOWN, Answers
from training.arguments import learning_rates, training_arguments
from training.checkpoints import Checkpoints
from training.console import Console, shortened
from training.devices import Devices, Filler, equally_many
from training.watch import quoted
from training.watching import Watching


class VLMTrainer(Checkpoints, Devices, Watching, Trainer):
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
        self.sources, self._source_of = train_dataset.sources
        self.drawn = np.zeros(len(self.sources), np.int64)  # samples of each source since the run began
        self.stop_signal: int | None = None  # that has come; the run ends after the step in hand, with a checkpoint
        self.progress: dict | None = None  # of the checkpoint that this run continues
        self.prepare_watching(model)
        super().__init__(
            model=model,
            args=args or training_arguments(config),
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )
        for printer in (ProgressCallback, PrinterCallback):
            self.remove_callback(printer)
        self.console = Console()
        self.answers = self._answers()
        self.add_callback(LoopCallback(self))
        self.add_callback(self.console)

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
            balanced=c.packing,
        )
        return self._loader(self.train_dataset, self.batch_sampler)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Every sample once over all processes, in batches of similar length."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        order = sorted(range(len(dataset)), key=lambda i: -dataset.lengths[i])
        own, size = order[self.args.process_index :: self.args.world_size], self.args.per_device_eval_batch_size
        batches = [own[start : start + size] for start in range(0, len(own), size)]
        most = math.ceil(len(order) / self.args.world_size / size)
        return self._loader(dataset, equally_many(batches, most, order[0]))

    def _loader(self, dataset, batches) -> DataLoader:
        # With a generator of its own the loader takes nothing from the global one, which dropout draws from.
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.device.type == "cuda",
            worker_init_fn=leave_group,
            generator=torch.Generator(),
        )

    def get_batch_samples(self, epoch_iterator, num_batches: int, device):
        start = time.perf_counter()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        # Those of all processes: there is no need to ask the others.
        self.step_batches = [self.batch_sampler.handed_out.popleft() for _ in batches]
        samples = [sample for batch in self.step_batches for sample in batch]
        self.drawn += np.bincount(self._source_of[samples], minlength=len(self.drawn))
        num_items = num_items.clamp(min=1)  # 0 only if every record of the batch was skipped for its image
        self.note_batches(batches, time.perf_counter() - start, num_items)
        if self._encodes_ahead:
            autocast = self.accelerator.autocast()
            encode_ahead(self.model.encoder, batches, self.args.device, autocast)
        return batches, num_items

    @property
    def _encodes_ahead(self) -> bool:
        """Whether the encoder may run outside of the model's forward: frozen and whole in every process."""
        divided = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        return not (divided or self.model.encoder.trainable)

    def stops(self) -> bool:
        """Whether any process was asked to stop: all of them do it after the same step."""
        if self.args.world_size == 1:
            return self.stop_signal is not None
        asked = torch.tensor(float(self.stop_signal is not None), device=self.args.device)
        return bool(self.accelerator.reduce(asked, reduction="sum"))

    # Validation

    def _answers(self) -> Answers | None:
        """What asks the model about validation records.

        Raises:
            ConfigError: the model is divided among the processes.
        """
        c = self.config
        if not c.train.answers or self.eval_dataset is None:
            return None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError("train.answers needs the whole model in each process, which FSDP and DeepSpeed divide: "
                              "leave it out, and ask checkpoints with evaluate.py")  # fmt: skip
        return Answers(self.eval_dataset, c.train.answers, c.train.seed, c.train.output_dir, c.data.system)

    def ask(self) -> None:
        """Has the model answer the records of `train.answers`, if there are any, and prints a few answers."""
        if self.answers is not None:
            lines = self.answers.ask(self.model, self.accelerator, self.state.global_step)
            for line in lines[:SHOWN]:
                said, right = shortened(line["answer"]), shortened(line["reference"])
                self.console.write(f"{'':>13} {line['id']}: {said}, reference {right}")

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Loss per supervised token over the whole data set, whatever its division into batches and processes.

        Raises:
            RunError: nothing in it is supervised.
            FloatingPointError: the loss of a batch is not finite; names its records.
        """
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        totals = torch.zeros(2, dtype=torch.float64)  # loss, supervised tokens
        for samples, batch in zip(dataloader.batch_sampler, dataloader, strict=True):
            tokens = supervised_tokens(batch)
            with torch.no_grad(), self.accelerator.autocast():
                loss = float(self.model(**self._prepare_inputs(batch), num_items_in_batch=1).loss)
            if not math.isfinite(loss):
                names = [dataloader.dataset.records.id_at(index) for index in samples]
                problem = f"the loss of data.validation is not finite ({loss}) after step {self.state.global_step}"
                raise FloatingPointError(f"{problem}, in a batch of these records: {quoted(names)}")
            if not isinstance(samples, Filler):
                totals += torch.tensor([loss, tokens], dtype=torch.float64)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss, tokens = self.accelerator.reduce(totals.to(self.args.device), reduction="sum").tolist()
        if not tokens:
            raise RunError("no token of data.validation is supervised: none of its images could be read")
        metrics = {f"{metric_key_prefix}_loss": loss / tokens}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))


def leave_group(worker: int) -> None:
    """Takes a data loader's process out of the run's process group.

    torchrun and terminals send their signals to the whole group, and the step in hand still needs its data.
    """
    os.setpgid(0, 0)


class LoopCallback(TrainerCallback):
    """Hooks of the loop that the Trainer offers only to callbacks."""

    def __init__(self, trainer: VLMTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.begin_watching()
        if trainer.progress is not None:
            trainer._tr_loss += trainer.progress["loss_since_log"]
            trainer._globalstep_last_logged = trainer._initial_global_step = trainer.progress["last_logged_step"]
            trainer.drawn[:] = trainer.progress.get("drawn", 0)
        if trainer.answers is not None and args.process_index == 0:
            trainer.answers.begin(state.global_step)
        if state.global_step == 0:
            trainer.ask()

    def on_evaluate(self, args, state, control, **kwargs):
        self.trainer.ask()

    def on_epoch_begin(self, args, state, control, **kwargs):
        steps = math.ceil(len(self.trainer.batch_sampler) / args.gradient_accumulation_steps)
        sampler = self.trainer.batch_sampler
        sampler.epoch, had = divmod(state.global_step, steps)
        sampler.skip = had * args.gradient_accumulation_steps  # of the resumed epoch: accelerate throws them away

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        groups = self.trainer.optimizer.param_groups
        self.trainer.rates = {f"{part_of(group)}_lr": group["lr"] for group in groups}

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.speed.step_done()
        if self.trainer.stops():
            control.should_save = control.should_training_stop = True
