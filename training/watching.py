"""How `VLMTrainer` watches its run: logs, gradient norms, and the end of a run whose numbers are not finite."""

import math

import torch
from accelerate import DistributedType
from torch import Tensor, nn

from model import MultiModalModel
from model.flops import TrainingFlops, sample_lengths
from training.peak import TERA, peak_flops
from training.watch import Speed, gradient_norms, quoted, whole

MAX_LOGGED_SOURCES = 50  # more are no mixture, but records that have each a name of its own
SMALLEST_SCALE = 1.0  # of a loss in float16; where gradients overflow even with a smaller one, that is not the cause


class Watching:
    """The half of `VLMTrainer` that watches the run; stands before `transformers.Trainer`.

    Attributes:
        rates, norms: learning rates and gradient norms of the last optimizer step; norms only where they are logged.
        losses: of the micro-batches of the step in hand, as far as they are done, on the device.
        step_batches: samples of all processes in each micro-batch of the step in hand.
        flops: counts operations; None where they are not known, for the reason `uncounted`.
        peak: operations per second that the device can do at most.
    """

    def prepare_watching(self, model: MultiModalModel) -> None:
        """Sets the attributes; before anything wraps or divides the model."""
        self.speed = Speed()
        self.rates: dict[str, float] = {}
        self.norms: dict[str, float] = {}
        self.losses: list[Tensor] = []
        self.step_batches: list[list[int]] = []
        self.peak: float | None = None
        self.dtype = model.language_model.dtype
        self.flops, self.uncounted = None, ""
        try:
            self.flops = TrainingFlops(model)
        except ValueError as error:
            self.uncounted = str(error)

    def begin_watching(self) -> None:
        """Finds what MFU is a share of, and says so."""
        self.speed = Speed()
        line = f"MFU is not logged: {self.uncounted}"
        if self.flops:
            dtype = torch.bfloat16 if self.config.train.bf16 else torch.float16 if self.args.fp16 else self.dtype
            self.peak, origin = peak_flops(self.args.device, dtype, self.config.train.peak_tflops)
            line = f"MFU is a share of {self.peak / TERA:,.3g} TFLOP/s per process ({origin})"
        if self.is_world_process_zero():
            print(line, flush=True)

    def note_batches(self, batches: list[dict], seconds: float, supervised: Tensor) -> None:
        """The micro-batches of a step have come, after `seconds` of waiting."""
        samples = sum(map(len, self.step_batches))
        tokens = sum(sum(sample_lengths(batch)) for batch in batches)
        flops = sum(self.flops.of_batch(batch) for batch in batches) if self.flops else 0
        self.current_flos += flops
        self.speed.step_begins(seconds, samples, supervised, tokens, flops)

    def compute_loss(self, model: nn.Module, inputs: dict, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:  # whose backward pass ends with the step
            self._check_losses(torch.stack(self.losses).tolist())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm=None) -> float | None:
        """Norm of the whole gradient before clipping; waits for the device, and so looks at the losses as well.

        Raises:
            FloatingPointError: it is not finite, or a loss isn't; names the records.
        """
        grad_norm = whole(super()._get_grad_norm(model, grad_norm))
        losses, self.losses = self.losses, []
        if grad_norm is None:  # DeepSpeed has none before its first step
            return None
        norm = torch.as_tensor(grad_norm, device=losses[0].device)
        *losses, norm = torch.stack([value.float() for value in (*losses, norm)]).tolist()
        if not math.isfinite(norm):  # and so it is in all processes
            self._check_losses(losses, gathered=True)
            if not self._scale_is_too_large():
                self._stop(f"the gradient of step {self.state.global_step + 1} is not finite (norm {norm})",
                           sum(self.step_batches, []))  # fmt: skip
            return norm
        self._check_losses(losses)
        if (self.state.global_step + 1) % self.state.logging_steps == 0:
            self.norms = gradient_norms(self.optimizer.param_groups, norm)
        return norm

    def _scale_is_too_large(self) -> bool:
        """Whether float16 overflowed for the factor of the loss: the optimizer leaves out the step and halves it."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() > SMALLEST_SCALE

    def _check_losses(self, losses: list[float], gathered: bool = False) -> None:
        """Raises FloatingPointError if the loss of a micro-batch is not finite; `gathered`: of any process."""
        if gathered:
            table = self.accelerator.gather(torch.tensor([losses], device=self.args.device))  # one row per process
            losses = table.sum(0).tolist()
        for number, loss in enumerate(losses):
            if not math.isfinite(loss):
                problem = f"the loss of step {self.state.global_step + 1} is not finite ({loss}"
                self._stop(f"{problem} in micro-batch {number + 1} of {len(self.step_batches)})",
                           self.step_batches[number])  # fmt: skip

    def _stop(self, problem: str, samples: list[int]) -> None:
        names = [self.train_dataset.records.id_at(index) for index in samples]
        # DeepSpeed's backward pass includes the step.
        done = "" if self.accelerator.distributed_type == DistributedType.DEEPSPEED else "; nothing was updated"
        raise FloatingPointError(
            f"{problem}{done}. Lower train.lora_lr and train.projector_lr or lengthen "
            "train.warmup_steps; the same command with other values starts over when train.overwrite=true is added. "
            f"Records, should one of them be the cause: {quoted(names)}"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and "eval_loss" not in logs:
            del logs["learning_rate"]  # that of the first group alone
            logs.update(self.rates)
            logs.update(self.norms)
            logs.update(self.speed.report(self.accelerator, self.peak))
            self.norms = {}
            if 1 < len(self.sources) <= MAX_LOGGED_SOURCES:
                shares = self.drawn / max(self.drawn.sum(), 1)
                named = zip(self.sources, shares.tolist(), strict=True)
                logs.update({f"share_{name}": round(share, 4) for name, share in named})
        super().log(logs, start_time)
