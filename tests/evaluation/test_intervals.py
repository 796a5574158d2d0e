"""Bootstrap over images, Wilson's interval, the looking score."""

from itertools import product

import numpy as np
import pytest

from evaluation.statistics import Resampled, flip_p, paired, perplexity, resampled_sums, wilson


def test_wilson_interval():
    """Against the published example of 81 successes in 263 trials at z = 1.96: 0.2553 to 0.3662 (Newcombe, 1998)."""
    assert wilson(81 / 263, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson(0, 10)[0] == 0 and wilson(1, 10)[1] == pytest.approx(1)


def test_sums_are_those_of_drawn_clusters():
    clusters, columns = ["a", "b", "a", "c"], np.array([[1, 1], [10, 1], [2, 1], [100, 1]])
    drawn = resampled_sums(clusters, columns, draws=2000)
    assert drawn.shape == (2000, 2)
    # Three clusters drawn of a (3, twice), b (10, once), c (100, once): all sums that there can be.
    possible = {(3 * a + 10 * b + 100 * (3 - a - b), 2 * a + b + 3 - a - b) for a in range(4) for b in range(4 - a)}
    assert set(map(tuple, drawn.tolist())) == possible
    assert drawn[:, 0].mean() == pytest.approx(113, rel=0.05)
    assert np.array_equal(drawn, resampled_sums(clusters, columns, draws=2000))
    assert not np.array_equal(drawn, resampled_sums(clusters, columns, draws=2000, seed=1))


def test_memory_is_bounded_and_changes_nothing(monkeypatch):
    clusters, columns = list(range(50)), np.random.default_rng(0).random((50, 1))
    whole = resampled_sums(clusters, columns)
    monkeypatch.setattr("evaluation.statistics.COUNTS", 170)  # three draws at a time
    np.testing.assert_allclose(resampled_sums(clusters, columns), whole)


def test_the_interval_of_independent_questions_is_that_of_the_normal_law():
    scores = np.random.default_rng(1).random(1000) < 0.3
    found = Resampled({"real": scores.astype(float)}, range(1000)).share("real")
    half = 1.96 * scores.std() / 1000**0.5
    assert [found["low"], found["high"]] == pytest.approx([scores.mean() - half, scores.mean() + half], abs=0.004)


def test_questions_about_an_image_count_as_one():
    """Twenty questions about each of ten images, right or wrong together, say no more than ten questions."""
    images = [i % 10 for i in range(200)]
    scores = {"real": np.array([float(image < 5) for image in images]), "blind": np.zeros(200)}
    drawn = Resampled(scores, images)
    gain = drawn.looking()["gain"]
    assert gain["value"] == 0.5
    # Five pictures that all say the same: signs fall like that by chance in 2 of 2^5 cases.
    assert gain["low"] == 0 and gain["high"] == pytest.approx(0.8, abs=0.11)
    six = Resampled({"real": np.array([float(image < 6) for image in images]), "blind": np.zeros(200)}, images)
    assert six.looking()["gain"]["low"] == pytest.approx(0.3, abs=0.11)
    # All wrong: every draw is 0, and Wilson's interval of ten images tells how little that is.
    assert drawn.share("blind")["high"] == pytest.approx(wilson(0, 10)[1])
    nothing = Resampled({"real": np.zeros(200), "blind": np.zeros(200)}, images).difference("real", "blind")
    assert nothing == {"value": 0, "low": pytest.approx(-wilson(0, 10)[1]), "high": pytest.approx(wilson(0, 10)[1])}


@pytest.mark.parametrize("count", [0, 1, 2, 5, 9])
def test_flipped_signs_are_all_gone_through(count):
    differences = np.random.default_rng(count).normal(0.5, 1, count)
    sums = [abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
            for signs in product((1, -1), repeat=count)]  # fmt: skip
    expected = sum(one >= abs(differences.sum()) - 1e-9 for one in sums) / len(sums)
    assert flip_p(np.append(differences, [0, 0])) == pytest.approx(expected)


def test_few_that_differ_among_many_are_not_enough():
    """Four of a thousand, all in one direction: drawn pictures nearly always hold one of them."""
    better = Resampled({"a": np.arange(1000) < 4, "b": np.zeros(1000)}, range(1000)).difference("a", "b")
    assert better["low"] == 0 < better["value"]
    assert Resampled({"a": np.arange(1000) < 9, "b": np.zeros(1000)}, range(1000)).difference("a", "b")["low"] > 0


def test_a_looking_score_of_few_pictures_is_unsure():
    scores = {"real": np.ones(8), "blind": np.zeros(8), "shuffled": np.zeros(8)}
    assert Resampled(scores, range(8)).looking()["looking_score"] == {
        "value": 1, "low": pytest.approx(wilson(1, 8)[0]), "high": 1
    }  # fmt: skip
    assert Resampled({name: values[:2] for name, values in scores.items()}, range(2)).looking()["looking_score"] is None


def made(real: float, blind: float, shuffled: float, n: int = 400) -> Resampled:
    shares = {"real": real, "blind": blind, "shuffled": shuffled}
    return Resampled({name: (np.arange(n) < share * n).astype(float) for name, share in shares.items()}, range(n))


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((0.9, 0.3, 0.3), 1),  # another picture helps no more than none
        ((0.9, 0.3, 0.9), 0),  # any picture does
        ((0.9, 0.3, 0.6), 0.5),
        ((0.9, 0.3, 0.1), 1),  # another picture misleads; clipped
        ((0.9, 0.3, 0.95), 0),
        ((0.5, 0.5, 0.1), None),  # nothing gained, nothing to explain
        ((0.5, 0.9, 0.1), None),
    ],
)
def test_looking_score(shares, expected):
    found = made(*shares).looking()["looking_score"]
    if expected is None:
        assert found is None
    else:
        assert found["value"] == pytest.approx(expected)
        assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1


def test_looking_leaves_out_what_was_not_asked():
    scores = {"real": np.ones(5), "reordered": np.zeros(5)}
    found = Resampled(scores, range(5)).looking()
    assert list(found) == ["gain_over_reordered"] and found["gain_over_reordered"]["value"] == 1
    assert Resampled({"blind": np.ones(5)}, range(5)).looking() == {}


def test_one_image_says_nothing():
    found = Resampled({"real": np.ones(7), "blind": np.zeros(7), "shuffled": np.zeros(7)}, ["a"] * 7)
    assert found.looking()["gain"] == {"value": 1, "low": -1, "high": 1} and found.looking()["looking_score"] is None
    assert found.share("real")["low"] == pytest.approx(wilson(1, 1)[0])


def test_perplexity():
    nll, tokens = np.array([2.0, 4.0, 6.0]), np.array([2, 2, 4])
    found = perplexity(nll, tokens, "abc")
    assert found["value"] == pytest.approx(np.exp(12 / 8))
    assert np.exp(1) <= found["low"] <= found["value"] <= found["high"] <= np.exp(2)


def test_perplexity_of_pictures_that_agree():
    """1 / perplexity is a share: then it is Wilson's interval, as for scores."""
    found = perplexity(np.array([2.0, 2.0, 4.0]), np.array([2, 2, 4]), "aab")
    low, high = wilson(np.exp(-1), 2)
    assert [found[key] for key in ("low", "value", "high")] == pytest.approx([1 / high, np.e, 1 / low])
    assert perplexity(np.array([2000.0]), np.array([1]), "a")["high"] > 1e300  # and no error


def test_differences_of_gains_have_a_longer_scale():
    gains = {"a": np.ones(10), "b": -np.ones(10)}
    assert Resampled(gains, range(10)).difference("a", "b", most=2.0) == {
        "value": 2, "low": pytest.approx(2 - 2 * (1 - wilson(1, 10)[0])), "high": 2
    }  # fmt: skip
    one = Resampled(gains, [0] * 10).difference("a", "b", most=2.0)
    assert (one["low"], one["high"]) == (-2, 2)


def test_two_models_on_the_same_questions():
    first, second = np.array([1.0, 1, 1, 0, 1] * 20), np.array([1.0, 0, 1, 1, 0] * 20)
    found = paired(first, second, range(100))
    assert (found["n"], found["first_better"], found["second_better"]) == (100, 40, 20)
    assert found["difference"]["value"] == pytest.approx(0.2) and found["difference"]["low"] > 0
