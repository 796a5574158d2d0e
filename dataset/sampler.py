"""Which samples form a batch: the order is a function of seed and epoch alone, the same on one process or many."""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from dataset.mixture import Mixture

STRATEGIES = ("group_by_length", "random", "sequential")
ONE_BLOCK = 32_768  # samples of an epoch up to which all their lengths are known before its first batch
BLOCK = 8_192  # samples of a longer epoch that are measured, grouped and shuffled together


class GlobalBatchSampler(Sampler[list[int]]):
    """Micro-batches of one process, cut from global batches of `batch_size * accumulation * world_size` samples.

    The order of an epoch depends on `(seed, epoch)` and on the size of the global batch, not on how a global batch is
    divided into micro-batches and processes. All processes get the same number of micro-batches. The last global batch
    of an epoch may be smaller; of its last micro-batch every process gets an equal share, give or take one sample,
    and fewer samples than processes are left out of this epoch.

    With "group_by_length" samples of similar length come together. A long epoch is shuffled first and then grouped in
    blocks of `BLOCK` samples, so that only the lengths of the block in hand need to be known.

    Set `epoch` before iterating, and `skip` to the number of micro-batches that whoever iterates will throw away, as
    a resumed run does with those that it has had: they are then empty, and nothing is measured for them.

    Args:
        lengths: tokens of each sample; asked for one at a time, when they are needed.
        mixture: which samples an epoch has; None: every sample once.
        has_media: `[N]` bool. If given, global batches are of samples with media alone or of text alone, but for the
            one at the end of each block that takes what is left of both.
        balanced: the micro-batches of a global batch get about equally many tokens, and so unequal numbers of samples
            that don't follow each other: for packed batches, whose time and memory are those of their tokens.

    Attributes:
        handed_out: samples of all processes for each micro-batch since iterating began, oldest first; whoever takes a
            batch may take its entry.

    Raises:
        ValueError: unknown strategy, a mixture in sequential order, or fewer samples than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        strategy: str = "group_by_length",
        seed: int = 0,
        mixture: Mixture | None = None,
        has_media: np.ndarray | None = None,
        balanced: bool = False,
    ):
        if strategy not in STRATEGIES:
            raise ValueError(f"unknown sampling strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
        if strategy == "sequential" and (mixture or has_media is not None):
            raise ValueError("weights, temperature and batches by modality need another sampling strategy than "
                             "'sequential', which keeps the order of the records")  # fmt: skip
        if strategy == "random" and has_media is not None:
            raise ValueError("batches by modality need the sampling strategy 'group_by_length'")
        self.num_samples = len(mixture) if mixture else len(lengths)
        if self.num_samples < world_size:
            raise ValueError(f"{self.num_samples} training samples are too few for {world_size} processes")
        self.lengths, self.batch_size, self.strategy, self.seed = lengths, batch_size, strategy, seed
        self.rank, self.world_size = rank, world_size
        self.global_batch_size = batch_size * accumulation * world_size
        self.mixture, self.has_media, self.balanced = mixture, has_media, balanced
        self.epoch = self.skip = 0
        self.handed_out: deque[list[int]] = deque()

    def __len__(self) -> int:
        """Micro-batches per epoch and process."""
        full, rest = divmod(self.num_samples, self.batch_size * self.world_size)
        return full + (rest >= self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        self.handed_out.clear()
        step = self.batch_size * self.world_size
        skip, self.skip = self.skip, 0
        for _ in range(skip):
            yield []
        if self.balanced:
            yield from self._balanced(skip)
            return
        for block in self._blocks(skip * step):
            for samples in (block[start : start + step] for start in range(0, len(block), step)):
                if len(samples) < self.world_size:
                    continue
                self.handed_out.append(samples)
                if len(samples) == step:
                    yield samples[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
                else:
                    yield samples[self.rank :: self.world_size]

    def _balanced(self, skip: int) -> Iterator[list[int]]:
        """Micro-batches of this process from number `skip` on, each global batch divided by tokens."""
        step, size = self.batch_size * self.world_size, self.global_batch_size
        skipped_batches, skipped_here = divmod(skip * step, size)
        number = skipped_here // step
        for block in self._blocks(skipped_batches * size):
            for samples in (block[start : start + size] for start in range(0, len(block), size)):
                rounds, rest = divmod(len(samples), step)
                if rest < self.world_size:
                    samples = samples[: rounds * step]
                rounds += rest >= self.world_size
                lengths = [self.lengths[sample] for sample in samples]
                groups = divided_by_tokens(samples, lengths, rounds * self.world_size)
                for turn in range(number, rounds):
                    own = groups[turn * self.world_size : (turn + 1) * self.world_size]
                    self.handed_out.append([sample for group in own for sample in group])
                    yield own[self.rank]
                number = 0

    def order(self) -> list[int]:
        """Sample indices of the current epoch, global batch after global batch, the smaller one last."""
        return [sample for samples in self._blocks(0) for sample in samples]

    def _blocks(self, first: int) -> Iterator[list[int]]:
        """Sample indices of the current epoch from position `first` on; blocks before it are not looked at.

        All blocks but the last have whole global batches.
        """
        samples, size = self._samples()
        for number, start in enumerate(range(0, len(samples), size)):
            if start + size > first:
                block = samples[start : start + size].tolist()
                if self.strategy == "group_by_length":
                    block = self._grouped(block, self._generator(number))
                yield block[max(first - start, 0) :]

    def _samples(self) -> tuple[np.ndarray, int]:
        """Indices of an epoch's samples before they are grouped, and how many of them form a block."""
        samples = self.mixture.epoch(self.epoch) if self.mixture else np.arange(self.num_samples)
        grouped = self.strategy == "group_by_length"
        # Grouping shuffles a block by itself.
        if self.strategy == "random" or grouped and len(samples) > ONE_BLOCK:
            samples = samples[torch.randperm(len(samples), generator=self._generator(0)).numpy()]
        if grouped and len(samples) <= ONE_BLOCK:
            return samples, ONE_BLOCK
        return samples, -(-BLOCK // self.global_batch_size) * self.global_batch_size

    def _generator(self, block: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch + (block << 40))

    def _grouped(self, samples: list[int], generator: torch.Generator) -> list[int]:
        """The samples of a block, those of similar length together, in shuffled batches."""
        size = self.global_batch_size
        parts = [samples]
        if self.has_media is not None:
            parts = [[sample for sample in samples if self.has_media[sample] == kind] for kind in (True, False)]
        orders, rest = [], []
        for part in filter(None, parts):
            lengths = [self.lengths[sample] for sample in part]
            order = [part[i] for i in get_length_grouped_indices(lengths, size, generator=generator)]
            end = len(order) // size * size
            orders.append(order[:end])
            rest += order[end:]
        orders.sort(key=lambda order: -max((self.lengths[sample] for sample in order[:size]), default=0))
        return shuffle_batches([sample for order in orders for sample in order], size, generator) + rest


def divided_by_tokens(samples: list[int], lengths: list[int], parts: int) -> list[list[int]]:
    """`samples` in so many parts, none empty, whose sums of `lengths` are about equal.

    The longest goes first, each to the part that has the fewest tokens yet (Graham, "Bounds on multiprocessing timing
    anomalies", 1969: the largest sum is at most 4/3 of the best). Within a part samples keep their order.
    """
    tokens, members = [0] * parts, [[] for _ in range(parts)]
    for position in sorted(range(len(samples)), key=lambda position: -lengths[position]):
        # Ties go to a part with fewer samples, so that none stays empty for samples without tokens.
        part = min(range(parts), key=lambda part: (tokens[part], len(members[part]), part))
        tokens[part] += lengths[position]
        members[part].append(position)
    return [[samples[position] for position in sorted(part)] for part in members]


def shuffle_batches(order: list[int], batch_size: int, generator: torch.Generator) -> list[int]:
    """Permutes whole batches. Without it lengths would fall steadily within each stretch that was sorted.

    The first batch stays first. It holds the longest sample of its block; so in an epoch of a single block memory is
    exceeded at once or never.
    """
    full = len(order) // batch_size
    batches = [order[i * batch_size : (i + 1) * batch_size] for i in range(full)]
    shuffled = [1 + i for i in torch.randperm(max(full - 1, 0), generator=generator).tolist()]
    return [i for batch in [0, *shuffled][:full] for i in batches[batch]] + order[full * batch_size :]
