"""How sure figures are: bootstrap over images, Wilson's interval, the looking score, paired comparison.

Questions about one picture are not independent: whole pictures are drawn, with all of their questions (the cluster
bootstrap, A. C. Davison and D. V. Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). Intervals are
percentiles of `DRAWS` draws and hold 95 %. Where all pictures agree, draws don't differ and say nothing: then it is
Wilson's interval over the pictures.
"""

import math
from collections.abc import Hashable, Sequence

import numpy as np

DRAWS = 1000
COUNTS = 2**22  # numbers of drawn clusters that exist at a time
SAME = 1e-12  # draws that differ by less are one
MOST_NLL = 700.0  # nats; exp of 710 is beyond floats
FLIPPED = 16  # differences whose 2^16 combinations of signs are gone through


def resampled_sums(clusters: Sequence[Hashable], columns: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Column sums `[draws, m]` over as many clusters as there are, drawn with replacement.

    Args:
        clusters: of each of N rows; rows of the same cluster are drawn together.
        columns: `[N, m]`.
        seed: the same seed draws the same clusters, in the order in which they first occur.
    """
    index, count = numbered(clusters)
    sums = np.stack([np.bincount(index, column, minlength=count) for column in columns.T.astype(float)], axis=1)
    rng, found = np.random.default_rng(seed), []
    at_once = max(1, COUNTS // count)
    for start in range(0, draws, at_once):
        rows = min(at_once, draws - start)
        drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        found.append(times.astype(float) @ sums)
    return np.concatenate(found)


def numbered(clusters: Sequence[Hashable]) -> tuple[np.ndarray, int]:
    """`[N]` number of each row's cluster, in the order in which clusters first occur, and how many there are."""
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    return index, len(numbers)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """Bounds of the middle 95 % of `draws`."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


class Resampled:
    """Means of scores under several conditions, of the questions and of draws of their pictures.

    Args:
        scores: condition -> `[N]` scores in [0, 1], of the same N questions.
        clusters: what each question shows; questions that show the same are drawn together.
    """

    def __init__(self, scores: dict[str, np.ndarray], clusters: Sequence[Hashable]):
        index, count = numbered(clusters)
        self.sums = {name: np.bincount(index, values, minlength=count) for name, values in scores.items()}
        drawn = resampled_sums(clusters, np.stack([*scores.values(), np.ones(len(clusters))], axis=1))
        self.draws = dict(zip(scores, (drawn[:, :-1] / drawn[:, -1:]).T, strict=True))  # each [DRAWS]
        self.means = {name: float(np.mean(values)) for name, values in scores.items()}
        self.clusters = len(set(clusters))

    def share(self, name: str) -> dict[str, float]:
        """Mean score under a condition: `{"value", "low", "high"}`."""
        return estimate_of_share(self.means[name], self.draws[name], self.clusters)

    def difference(self, first: str, second: str, most: float = 1.0) -> dict[str, float]:
        """Mean of first - second, which lies in [-most, most].

        A single picture says nothing of others: its interval is [-most, most]. Draws of few pictures vary too little:
        the interval holds 0 wherever signs could fall as unevenly by chance (`flip_p`).
        """
        value, (low, high) = self.means[first] - self.means[second], interval(self.draws[first] - self.draws[second])
        if self.clusters == 1:
            low, high = -most, most
        elif high - low < SAME:  # as unsure as a share of 1 of these pictures
            unsure = most * (1 - wilson(1, self.clusters)[0])
            low, high = max(value - unsure, -most), min(value + unsure, most)
        if flip_p(self.sums[first] - self.sums[second]) >= 0.05:
            low, high = min(low, 0.0), max(high, 0.0)
        return estimate(value, low, high)

    def looking(self) -> dict[str, dict | None]:
        """How much of what "real" gains above "blind" comes from the record's own picture.

        `gain` is real - blind, `gain_over_shuffled` real - shuffled, `gain_over_reordered` real - reordered, and

            looking_score = (real - shuffled) / (real - blind), clipped to [0, 1]

        It is 1 where a wrong picture helps no more than none, and 0 where any picture does what the right one does: the
        model then uses that there is a picture, not what is on it. None where the interval of the gain is not above 0,
        for there is nothing to explain. What needs a condition that is missing is left out.
        """
        names = {"blind": "gain", "shuffled": "gain_over_shuffled", "reordered": "gain_over_reordered"}
        found: dict[str, dict | None] = {
            name: self.difference("real", other)
            for other, name in names.items()
            if {"real", other} <= self.means.keys()
        }
        if {"gain", "gain_over_shuffled"} <= found.keys():
            found["looking_score"] = self._looking_score() if found["gain"]["low"] > 0 else None
        return found

    def _looking_score(self) -> dict[str, float]:
        tops, bottoms = (self.draws["real"] - self.draws[other] for other in ("shuffled", "blind"))
        gained = bottoms > 0  # of nearly all draws
        low, high = interval(np.clip(tops[gained] / bottoms[gained], 0, 1))
        ratio = (self.means["real"] - self.means["shuffled"]) / (self.means["real"] - self.means["blind"])
        value = min(max(ratio, 0.0), 1.0)
        if high - low < SAME:
            unsure = 1 - wilson(1, self.clusters)[0]
            low, high = max(value - unsure, 0.0), min(value + unsure, 1.0)
        return estimate(value, low, high)


def flip_p(differences: np.ndarray) -> float:
    """Two-sided p-value of a sum of differences `[C]`, one of each picture, if either sign were as likely for each.

    The permutation test of paired samples (R. A. Fisher, The Design of Experiments, 1935, section 21): exact for up to
    `FLIPPED` differences that are not 0; of more, draws of pictures vary enough, and 0 is returned.
    """
    differences = differences[np.abs(differences) > SAME]
    if len(differences) > FLIPPED:
        return 0.0
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    return float(np.mean(np.abs(sums) >= abs(differences.sum()) - SAME))


def estimate(value: float, low: float, high: float) -> dict[str, float]:
    """A figure with its interval, which holds it."""
    return {"value": value, "low": min(low, value), "high": max(high, value)}


def estimate_of_share(value: float, draws: np.ndarray, clusters: int) -> dict[str, float]:
    """A figure in [0, 1] with the interval of its draws, or Wilson's over the clusters where draws agree."""
    low, high = interval(draws)
    return estimate(value, *(wilson(value, clusters) if high - low < SAME else (low, high)))


def paired(first: np.ndarray, second: np.ndarray, clusters: Sequence[Hashable]) -> dict:
    """Two models on the same N questions: `first`, `second` (`[N]` scores in [0, 1]) and `difference`, first - second.

    Each is `{"value", "low", "high"}`. `first_better` and `second_better` count questions.
    """
    drawn = Resampled({"first": first, "second": second}, clusters)
    return {
        "n": len(first),
        "first": drawn.share("first"),
        "second": drawn.share("second"),
        "difference": drawn.difference("first", "second"),
        "first_better": int((first > second).sum()),
        "second_better": int((first < second).sum()),
    }


def perplexity(nll: np.ndarray, tokens: np.ndarray, clusters: Sequence[Hashable]) -> dict[str, float]:
    """`exp(sum(nll) / sum(tokens))` of `[N]` negative log-likelihoods in nats, with its interval."""
    drawn = resampled_sums(clusters, np.stack([nll, tokens], axis=1))
    mean, (low, high) = float(nll.sum() / tokens.sum()), interval(drawn[:, 0] / drawn[:, 1])
    if high - low < SAME:  # 1 / perplexity, the geometric mean of the tokens' probabilities, is a share
        shares = wilson(math.exp(-mean), len(set(clusters)))
        high, low = (-math.log(max(share, 1e-300)) for share in shares)
    return estimate(*(math.exp(min(bound, MOST_NLL)) for bound in (mean, low, high)))


def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share `p` of `n` (E. B. Wilson, 1927, doi:10.1080/01621459.1927.10502953)."""
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max((centre - half) / (1 + z * z / n), 0.0), min((centre + half) / (1 + z * z / n), 1.0)
