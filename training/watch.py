"""What a run tells of itself while it works: speed, use of the machine, norms of gradients, names of records."""

import resource
import sys
import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from model.optim import part_of

NAMED_RECORDS = 64  # of a batch that goes wrong


class Speed:
    """Time and amount of work since the last report; validation and checkpoints are not counted."""

    def __init__(self):
        self.waiting = self.computing = 0.0  # seconds
        self.samples = self.supervised = 0  # of all processes
        self.tokens, self.flops = 0, 0.0  # of this process; padding is no token
        self._ready = time.perf_counter()

    def step_begins(self, waited: float, samples: int, supervised: int | Tensor, tokens: int, flops: float) -> None:
        """The micro-batches of a step have come after `waited` seconds; what is in them, as above."""
        self.waiting += waited
        self.samples += samples
        self.supervised += supervised
        self.tokens += tokens
        self.flops += flops
        self._ready = time.perf_counter()

    def step_done(self) -> None:
        self.computing += time.perf_counter() - self._ready

    def report(self, accelerator: Accelerator, peak: float | None) -> dict[str, float]:
        """Figures since the last call. All processes have to call it.

            samples_per_second, tokens_per_second, supervised_tokens_per_second
            seconds_waiting_for_data, seconds_computing   of the process that waits most
            data_wait     share of the first of these in their sum
            mfu           share of `peak`, operations per second of this process's device, that the model needed
            memory_gib    most of the device's memory that was allocated at a time since the run began, on a CPU that of
                          the whole process; in the process that has most

        `mfu` is absent where `peak` is None.
        """
        own = [self.waiting, self.computing, self.tokens, self.flops, peak or 0, peak_memory(accelerator.device)]
        table = accelerator.gather(torch.tensor([own], dtype=torch.float32, device=accelerator.device)).cpu().double()
        waiting, computing = table[table[:, 0].argmax(), :2].tolist()
        tokens, flops, peaks = table[:, 2:5].sum(0).tolist()
        seconds = max(waiting + computing, 1e-9)
        figures = {
            "samples_per_second": self.samples / seconds,
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": float(self.supervised) / seconds,
            "seconds_waiting_for_data": waiting,
            "seconds_computing": computing,
            "data_wait": waiting / seconds,
            "memory_gib": float(table[:, 5].max()) / 2**30,
        }
        if peak is not None:
            figures["mfu"] = flops / seconds / peaks
        self.__init__()
        return {name: round(value, 4 if name in ("mfu", "data_wait") else 3) for name, value in figures.items()}


def peak_memory(device: torch.device) -> int:
    """Bytes: most that was allocated at a time on an accelerator, or by this process, since it began."""
    if device.type == "cpu":
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return torch.accelerator.max_memory_allocated(device)


def whole(norm: Tensor | float) -> Tensor | float:
    """A norm over sharded gradients as a plain tensor. All processes have to call it."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gradient_norms(groups: Sequence[dict], total: float) -> dict[str, float]:
    """`<part>_grad_norm` of each part (`lora`, `projector`, ...) of the optimizer's groups, before clipping.

    Clipping has scaled all gradients alike by now, so the norms are scaled until they make up `total`, the norm of all
    of them before. Parts whose gradients are not at hand, as under DeepSpeed, are left out. All processes have to call
    it.
    """
    parts: dict[str, list[Tensor]] = {}
    for group in groups:
        gradients = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        parts.setdefault(part_of(group), []).extend(gradients)
    norms = {part: whole(get_total_norm(gradients)) for part, gradients in parts.items() if gradients}
    if not norms:
        return {}
    values = torch.stack(list(norms.values())).float()
    scale = total / values.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return {f"{part}_grad_norm": value for part, value in zip(norms, (values * scale).tolist(), strict=True)}


def quoted(names: Sequence[str]) -> str:
    """The first of many names, for an error."""
    more = f" and {len(names) - NAMED_RECORDS} more" if len(names) > NAMED_RECORDS else ""
    return ", ".join(map(repr, names[:NAMED_RECORDS])) + more
