"""Train and validation, divided by image."""

import hashlib
from collections.abc import Iterable, Sequence


def validation_units(units: Iterable[Sequence[str]], share: float, seed: int) -> set[str]:
    """Keys that go to validation, when each unit (the keys of a record's images) must stay on one side.

    Units that share a key, directly or through others, form a group; groups are ranked by a hash of the seed and their
    smallest key, and the first `round(share * groups)` of them are taken, at least one if `share` is above 0. So the
    outcome does not depend on the order of the units, and hardly changes when data are added.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]  # halves the path, so that long chains stay fast
        return key

    for keys in units:
        first = root(keys[0])
        for key in keys[1:]:
            low, high = sorted((first, root(key)))
            parent[high] = first = low
    groups = sorted((key for key in parent if root(key) == key), key=lambda key: rank(key, seed))
    count = max(round(share * len(groups)), 1) if share > 0 else 0
    chosen = set(groups[:count])
    return {key for key in parent if root(key) in chosen}


def rank(key: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()
