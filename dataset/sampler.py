"""Which samples form a batch: the order is a function of seed and epoch alone, the same on one process or many."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

STRATEGIES = ("group_by_length", "random", "sequential")


class GlobalBatchSampler(Sampler[list[int]]):
    """Micro-batches of one process, cut from global batches of `batch_size * accumulation * world_size` samples.

    The order of an epoch depends on `(seed, epoch)` and on the size of the global batch, not on how a global batch is
    divided into micro-batches and processes. All processes get the same number of micro-batches. The last global batch
    of an epoch may be smaller; of its last micro-batch every process gets an equal share, give or take one sample,
    and fewer samples than processes are left out of this epoch.

    Set `epoch` before iterating.

    Raises:
        ValueError: unknown strategy, or fewer samples than processes.
    """

    def __init__(
        self,
        lengths: list[int],
        batch_size: int,
        *,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        strategy: str = "group_by_length",
        seed: int = 0,
    ):
        if strategy not in STRATEGIES:
            raise ValueError(f"unknown sampling strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
        if len(lengths) < world_size:
            raise ValueError(f"{len(lengths)} training samples are too few for {world_size} processes")
        self.lengths, self.batch_size, self.strategy, self.seed = lengths, batch_size, strategy, seed
        self.rank, self.world_size = rank, world_size
        self.global_batch_size = batch_size * accumulation * world_size
        self.epoch = 0

    def __len__(self) -> int:
        """Micro-batches per epoch and process."""
        full, rest = divmod(len(self.lengths), self.batch_size * self.world_size)
        return full + (rest >= self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        step = self.batch_size * self.world_size
        for start in range(0, len(order), step):
            samples = order[start : start + step]
            if len(samples) == step:
                yield samples[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            elif len(samples) >= self.world_size:
                yield samples[self.rank :: self.world_size]

    def order(self) -> list[int]:
        """Sample indices of the current epoch, global batch after global batch, the smaller one last."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.strategy == "sequential":
            return list(range(len(self.lengths)))
        if self.strategy == "random":
            return torch.randperm(len(self.lengths), generator=generator).tolist()
        order = get_length_grouped_indices(self.lengths, self.global_batch_size, generator=generator)
        return shuffle_batches(order, self.global_batch_size, generator)


def shuffle_batches(order: list[int], batch_size: int, generator: torch.Generator) -> list[int]:
    """Permutes whole batches. Without it lengths would fall steadily within each stretch that was sorted.

    The first batch, which holds the longest sample, stays first: memory is exceeded at once or never.
    """
    full = len(order) // batch_size
    batches = [order[i * batch_size : (i + 1) * batch_size] for i in range(full)]
    shuffled = [1 + i for i in torch.randperm(max(full - 1, 0), generator=generator).tolist()]
    return [i for batch in [0, *shuffled][:full] for i in batches[batch]] + order[full * batch_size :]
