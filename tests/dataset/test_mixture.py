"""dataset/mixture.py: shares by weight and temperature, and epochs that follow from the seed alone."""

from collections import Counter

import numpy as np
import pytest

from dataset.mixture import Mixture, shares_of

SIZES = {"captions": 600, "questions": 300, "text": 100}
NAMES = list(SIZES)
NUMBERS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], list(SIZES.values())))


def mixture(weights=None, temperature=None, **options) -> Mixture:
    return Mixture(NAMES, NUMBERS, shares_of(SIZES, weights, temperature), **options)


def counts_of(samples: np.ndarray) -> dict[str, int]:
    return {NAMES[number]: count for number, count in Counter(NUMBERS[samples].tolist()).items()}


def test_shares():
    for shares in (shares_of(SIZES), shares_of(SIZES, temperature=1)):
        assert shares == pytest.approx({"captions": 0.6, "questions": 0.3, "text": 0.1})
    assert shares_of(SIZES, {"captions": 1, "questions": 1, "text": 2}) == {
        "captions": 0.25, "questions": 0.25, "text": 0.5
    }  # fmt: skip
    flat = shares_of(SIZES, temperature=2)
    assert flat["captions"] / flat["text"] == pytest.approx((600 / 100) ** 0.5)
    assert max(shares_of(SIZES, temperature=1e9).values()) == pytest.approx(1 / 3)
    assert shares_of(SIZES, {"captions": 3, "questions": 0, "text": 1})["questions"] == 0


def test_an_epoch_without_weights_is_every_record_once():
    assert sorted(mixture().epoch(0)) == sorted(mixture().epoch(5)) == list(range(1000))


def test_an_epoch_has_the_shares_to_the_sample():
    mixed = mixture({"captions": 1, "questions": 1, "text": 1})
    assert len(mixed) == 1000 and sorted(mixed.counts.values()) == [333, 333, 334]
    assert counts_of(mixed.epoch(0)) == counts_of(mixed.epoch(7)) == mixed.counts


def test_a_source_is_gone_through_before_any_of_it_comes_again():
    mixed = mixture({"captions": 4, "questions": 1, "text": 3})
    several = [mixed.epoch(number) for number in range(6)]
    for name, number in (("captions", 0), ("questions", 1), ("text", 2)):
        drawn = np.concatenate([epoch[NUMBERS[epoch] == number] for epoch in several])
        size = SIZES[name]
        passes = [drawn[start : start + size] for start in range(0, len(drawn) - size + 1, size)]
        assert passes, name
        for one in passes:
            assert sorted(one) == np.flatnonzero(NUMBERS == number).tolist()
        assert len(passes) == 1 or passes[0].tolist() != passes[1].tolist()


def test_an_epoch_of_a_named_source_sees_each_of_its_samples_once():
    mixed = mixture({"captions": 2, "questions": 1, "text": 1}, epoch="questions")
    assert len(mixed) == 1200 and mixed.counts == {"captions": 600, "questions": 300, "text": 300}
    epoch = mixed.epoch(4)
    assert sorted(epoch[NUMBERS[epoch] == 1]) == np.flatnonzero(NUMBERS == 1).tolist()
    assert set(Counter(epoch[NUMBERS[epoch] == 2].tolist()).values()) == {3}


def test_the_named_source_is_not_rounded():
    numbers = np.repeat([0, 1, 2], [95, 30, 30])
    mixed = Mixture("abc", numbers, {"a": 0.9, "b": 0.05, "c": 0.05}, epoch="a")
    assert mixed.counts == {"a": 95, "b": 6, "c": 5} or mixed.counts == {"a": 95, "b": 5, "c": 6}
    assert Mixture("a", np.zeros(7, int), {"a": 1.0}, epoch="a").counts == {"a": 7}


def test_sources_of_weight_0_are_left_out_of_total():
    mixed = mixture({"captions": 0, "questions": 1, "text": 1})
    assert mixed.counts == {"questions": 200, "text": 200}


def test_epochs_follow_from_the_seed_alone():
    weights = {"captions": 1, "questions": 1, "text": 1}
    one, same, other = mixture(weights, seed=1), mixture(weights, seed=1), mixture(weights, seed=2)
    _ = same.epoch(0)
    assert one.epoch(3).tolist() == same.epoch(3).tolist() != other.epoch(3).tolist()


@pytest.mark.parametrize(
    "weights, temperature, options, message",
    [
        ({"caption": 1}, None, {}, r"data.weights: there is no source 'caption' \(did you mean 'captions'\?\)"),
        ({"captions": 1}, None, {}, "data.weights: no weight for questions, text; give one to every source or to none"),
        ({"captions": 1, "questions": -1, "text": 1}, None, {}, "questions is -1; a weight is a number from 0 on"),
        ({"captions": 1, "questions": float("nan"), "text": 1}, None, {}, "questions is nan"),
        ({"captions": 0, "questions": 0, "text": 0}, None, {}, "all are 0, or data.temperature is too low"),
        ({"captions": 1, "questions": 1, "text": 1e-9}, None, {}, "source 'text' has a share of 5e-10, less than one"),
        ({"captions": 1}, 2.0, {}, "exclude each other"),
        (None, 0.0, {}, "data.temperature is a number above 0, got 0.0"),
        (None, 1e-2, {}, "source 'questions' has a share of .*, less than one of the 1000 samples"),
        (None, 1e-5, {}, "or data.temperature is too low, so that nothing is left to draw"),
        (None, None, {"epoch": "question"}, r"data.epoch: 'question' is neither 'total' nor a source"),
        ({"captions": 1, "questions": 0, "text": 1}, None, {"epoch": "questions"}, "nor a source that is drawn"),
    ],
)
def test_errors(weights, temperature, options, message):
    with pytest.raises(ValueError, match=message):
        mixture(weights, temperature, **options)
