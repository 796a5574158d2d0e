"""How often each source is drawn: weights or a temperature instead of the sources' own sizes.

An epoch then is no longer "every record once". Each epoch draws a fixed number of samples of each source. A source is
gone through in a random order of its own, all of it before any of it comes again, on from epoch to epoch; so the n-th
epoch follows from the seed alone, whether or not the ones before it were run.
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from dataset.rows import nearest

TOTAL = "total"


def shares_of(
    sizes: Mapping[str, int], weights: Mapping[str, float] | None = None, temperature: float | None = None
) -> dict[str, float]:
    """Share of each source in the samples, which sum to 1; those of size if neither weights nor temperature are given.

    With temperature T the share of a source of n records is proportional to `n ** (1 / T)`: 1 is the share of its
    size, and the higher T, the more even are the sources (as in multilingual BERT and mT5).

    Raises:
        ValueError: both are given, a weight below 0, a source without a weight, a weight without a source, or nothing
            left to draw.
    """
    if weights and temperature is not None:
        raise ValueError("weights and a temperature exclude each other: set data.weights or data.temperature")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ValueError(f"data.temperature is a number above 0, got {temperature}")
    if weights:
        unknown = [source for source in weights if source not in sizes]
        if unknown:
            raise ValueError(f"data.weights: there is no source {unknown[0]!r}{nearest(unknown[0], sizes)}")
        if missing := [source for source in sizes if source not in weights]:
            problem = f"no weight for {', '.join(missing)}"
            raise ValueError(f"data.weights: {problem}; give one to every source or to none (0 leaves a source out)")
        if bad := [source for source in weights if not 0 <= weights[source] < float("inf")]:
            raise ValueError(f"data.weights: {bad[0]} is {weights[bad[0]]}; a weight is a number from 0 on")
        amounts = {source: float(weights[source]) for source in sizes}
    else:
        whole = sum(sizes.values())  # powers of shares stay below 1, whatever T
        amounts = {source: (size / whole) ** (1 / (temperature or 1.0)) for source, size in sizes.items()}
    total = sum(amounts.values())
    if total == 0:
        raise ValueError("data.weights: all are 0, or data.temperature is too low, so that nothing is left to draw")
    return {source: amount / total for source, amount in amounts.items()}


class Mixture:
    """Which samples an epoch has.

    Args:
        names, numbers: the sources, and `[N]` the number of each sample's source (`Records.sources`).
        shares: see `shares_of`; sources of share 0 are left out.
        epoch: "total" for epochs of as many samples as the sources that are drawn have, or the name of a source,
            which an epoch then draws as often as it has samples: once each.
        seed: decides the orders.

    Attributes:
        counts: {source: samples per epoch}.
        sizes: {source: records}, of those that are drawn.

    Raises:
        ValueError: `epoch` names no source that is drawn, or a share is less than one sample per epoch.
    """

    def __init__(
        self,
        names: Sequence[str],
        numbers: np.ndarray,
        shares: Mapping[str, float],
        epoch: str = TOTAL,
        seed: int = 0,
    ):
        self.seed = seed
        self._samples = {name: np.flatnonzero(numbers == number) for number, name in enumerate(names) if shares[name]}
        self.sizes = drawn = {name: len(samples) for name, samples in self._samples.items()}
        if epoch == TOTAL:
            length = sum(drawn.values())
            self.counts = _apportion({name: shares[name] for name in drawn}, length)
        elif epoch in drawn:
            length = round(drawn[epoch] / shares[epoch])
            others = {name: shares[name] / (1 - shares[epoch]) for name in drawn if name != epoch}
            rest = _apportion(others, length - drawn[epoch])
            self.counts = {name: rest.get(name, drawn[epoch]) for name in drawn}  # of that source each exactly once
        else:
            known = nearest(epoch, [TOTAL, *drawn])
            raise ValueError(f"data.epoch: {epoch!r} is neither {TOTAL!r} nor a source that is drawn{known}")
        if too_rare := [name for name, count in self.counts.items() if count == 0]:
            name = too_rare[0]
            problem = f"source {name!r} has a share of {shares[name]:.2g}, less than one of the {length} samples"
            raise ValueError(f"data.weights: {problem} of an epoch; draw it more often, or leave it out with weight 0")

    def __len__(self) -> int:
        """Samples per epoch."""
        return sum(self.counts.values())

    @property
    def samples(self) -> np.ndarray:
        """Indices of all samples that are ever drawn."""
        return np.sort(np.concatenate(list(self._samples.values())))

    def epoch(self, number: int) -> np.ndarray:
        """Indices of the samples of epoch `number` (from 0), `[len(self)]`, source after source."""
        return np.concatenate([self._draw(name, number * count, count) for name, count in self.counts.items()])

    def _draw(self, name: str, start: int, count: int) -> np.ndarray:
        """`count` samples of a source, from the `start`-th of the endless series of its passes."""
        samples = self._samples[name]
        drawn = []
        while count > 0:
            number, position = divmod(start, len(samples))
            order = np.random.default_rng((self.seed, zlib.crc32(name.encode()), number)).permutation(samples)
            drawn.append(order[position : position + count])
            start, count = start + len(drawn[-1]), count - len(drawn[-1])
        return np.concatenate(drawn)


def _apportion(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers that sum to `total`, each next to its share of it: largest remainders are rounded up."""
    exact = {name: share * total for name, share in shares.items()}
    counts = {name: int(amount) for name, amount in exact.items()}
    ranked = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in ranked[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
