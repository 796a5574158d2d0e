"""Train and validation, divided by image.

Every record has keys: those of its images and videos, or one of its own. Records that share a key, directly or through
others, form a group, which goes to one side as a whole. Groups are ranked by a hash of the seed and their smallest key,
and the first `round(share * groups)` of them go to validation, at least one if `share` is above 0. So the outcome does
not depend on the order of the records, and hardly changes when data are added.

For millions of records, numbers stand for keys: the first 8 of the 16 bytes of the hash. (That two of 10^7 keys have
the same number happens once in 10^5 runs; they would then be one group.)
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def rank(key: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()[:8], "big")


class Links:
    """Which keys belong together. Only keys of records with several of them are held in memory."""

    def __init__(self):
        self._parent: dict[str, str] = {}

    def join(self, keys: Sequence[str]) -> None:
        """Puts the groups of all these keys together."""
        first = self._smallest(keys[0])
        for key in keys[1:]:
            low, high = sorted((first, self._smallest(key)))
            self._parent[high] = first = low

    def _smallest(self, key: str) -> str:
        """The smallest key of its group."""
        while self._parent.setdefault(key, key) != key:
            self._parent[key] = key = self._parent[self._parent[key]]  # halves the path, so that long chains stay fast
        return key

    def group_ranks(self, ranks: np.ndarray, seed: int) -> np.ndarray:
        """Ranks of keys -> ranks of their groups, [N] uint64."""
        joined = [(rank(key, seed), rank(self._smallest(key), seed)) for key in list(self._parent)]
        if not joined or not len(ranks):
            return ranks
        own, of_group = np.array(sorted(joined), dtype=np.uint64).T
        places = np.minimum(np.searchsorted(own, ranks), len(own) - 1)
        return np.where(own[places] == ranks, of_group[places], ranks)


def last_rank(group_ranks: np.ndarray, share: float) -> int:
    """The groups up to this rank go to validation; -1 for none.

    Args:
        group_ranks: [R] uint64, one for each record.
    """
    groups = np.unique(group_ranks)
    if share <= 0 or not len(groups):
        return -1
    return int(groups[max(round(share * len(groups)), 1) - 1])
