import random
from collections.abc import Sequence

import numpy as np
import pytest

from dataprocess.split import Links, last_rank, rank

UNITS = [[f"k{i}"] for i in range(200)]


def validation_units(units: Sequence[Sequence[str]], share: float, seed: int) -> set[str]:
    """Keys that go to validation, when each unit holds the keys of a record."""
    links = Links()
    for keys in units:
        if len(keys) > 1:
            links.join(keys)

    def group_ranks(keys: list[str]) -> np.ndarray:
        return links.group_ranks(np.array([rank(key, seed) for key in keys], dtype=np.uint64), seed)

    last = last_rank(group_ranks([keys[0] for keys in units]), share)
    keys = sorted({key for keys in units for key in keys})
    return {key for key, own in zip(keys, group_ranks(keys), strict=True) if own <= last}


def plainly(units: Sequence[Sequence[str]], share: float, seed: int) -> set[str]:
    """The same in a few slow lines: groups are sets that are merged until none meet."""
    groups: list[set[str]] = []
    for keys in units:
        meeting = [group for group in groups if group & set(keys)]
        groups = [group for group in groups if group not in meeting] + [set(keys).union(*meeting)]
    groups.sort(key=lambda group: rank(min(group), seed))
    count = max(round(share * len(groups)), 1) if share > 0 else 0
    return set().union(*groups[:count])


def test_ranks_are_those_of_the_hash():
    """Of blake2b with 16 bytes, by `b2sum --length 128`: a set that was divided once stays divided so."""
    assert rank("k1", 0) == 0xFE06548E042D4A9A


def test_share_is_exact_and_seeded():
    assert len(validation_units(UNITS, 0.1, 0)) == 20
    assert validation_units(UNITS, 0.1, 0) == validation_units(UNITS, 0.1, 0)
    assert validation_units(UNITS, 0.1, 0) != validation_units(UNITS, 0.1, 1)
    assert validation_units(UNITS, 0.0, 0) == set()
    assert len(validation_units(UNITS[:3], 0.01, 0)) == 1


def test_order_does_not_matter_and_growth_hardly():
    units = [*UNITS, ["k1", "k2"], ["k3", "k4", "k5"], ["k5", "k6"]]
    expected = validation_units(units, 0.2, 3)
    for seed in range(3):
        shuffled = random.Random(seed).sample(units, len(units))
        assert validation_units([unit[::-1] for unit in shuffled], 0.2, 3) == expected
    grown = validation_units([*UNITS, *([f"new{i}"] for i in range(200))], 0.2, 3)
    stayed = validation_units(UNITS, 0.2, 3)
    assert len(stayed - grown) <= 8  # of 40


@pytest.mark.parametrize("seed", range(20))
def test_units_that_share_a_key_stay_together(seed):
    rng = random.Random(seed)
    keys = [f"k{i}" for i in range(rng.choice([20, 300]))]
    units = [rng.sample(keys, rng.choice([1, 1, 1, 2, 3])) for _ in range(200)]
    for share in (0.05, 0.5):
        chosen = validation_units(units, share, seed)
        assert chosen and all(len({key in chosen for key in unit}) == 1 for unit in units)
        assert chosen == plainly(units, share, seed)


def test_long_chains():
    chain = [[f"{i:06d}", f"{i + 1:06d}"] for i in range(20_000)]
    assert len(validation_units(chain, 0.1, 0)) == 20_001
    assert validation_units(chain[::-1], 0.1, 0) == validation_units(chain, 0.1, 0)


def test_nothing_to_divide():
    assert last_rank(np.array([], dtype=np.uint64), 0.5) == -1
    assert Links().group_ranks(np.array([], dtype=np.uint64), 0).size == 0
