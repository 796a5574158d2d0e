import random

from dataprocess.split import validation_units

UNITS = [[f"k{i}"] for i in range(200)]


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


def test_units_that_share_a_key_stay_together():
    rng = random.Random(0)
    units = [rng.sample([f"k{i}" for i in range(300)], rng.choice([1, 1, 1, 2, 3])) for _ in range(200)]
    for share in (0.05, 0.5):
        chosen = validation_units(units, share, 0)
        assert chosen and all(len({key in chosen for key in unit}) == 1 for unit in units)


def test_long_chains():
    chain = [[f"{i:06d}", f"{i + 1:06d}"] for i in range(20_000)]
    assert len(validation_units(chain, 0.1, 0)) == 20_001
    assert validation_units(chain[::-1], 0.1, 0) == validation_units(chain, 0.1, 0)
