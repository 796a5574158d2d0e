"""Scores of single answers, on cases computed by hand from the published definitions."""

import itertools
from statistics import mean

import pytest

from evaluation.metrics import (
    anls,
    choose,
    constant_score,
    exact,
    levenshtein,
    normalise,
    polarity,
    score,
    vqa_accuracy,
    vqa_normalise,
    yes_no,
)
from evaluation.questions import Question


def question(answer: str, metric: str = "exact", references=None, choices=()) -> Question:
    return Question("q", (), answer, tuple(references or [answer]), tuple(choices), metric, (), {})


def test_normalise():
    assert normalise("  Two  red\nCUBES. ") == "two red cubes"
    assert normalise("红色。") == normalise("红色") == "红色"
    assert normalise("yes. .") == "yes"
    assert normalise("3.5") == "3.5" and normalise("no") != normalise("not")


def test_exact_takes_any_reference():
    assert exact("Red.", ["blue", "red"]) == 1 and exact("reddish", ["blue", "red"]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"),
        ("two", "2"), ("None", "0"), ("eleven", "eleven"),
        ("a man and an owl", "man and owl"),
        ("100,978", "100978"), ("red, white", "red white"),
        ("3.5 m.", "3.5 m"), ("U.S.A.", "usa"), (".5", ".5"),
        ("black-and/white", "black and white"), ("(left)!", "left"), ("\"stop\"?", "stop"),
        ("dont", "don't"), ("man's", "man's"), ("10:30", "10:30"), ("youre", "you're"),
        ("were", "were"), ("its", "its"), ("well", "well"), ("ill", "ill"),
        ("line\nbreak\tand  spaces ", "line break and spaces"),
        ("", ""), ("红色", "红色"), ("$5", "$5"), ("50%", "50%"),
    ],
)  # fmt: skip
def test_vqa_normalisation(text, expected):
    assert vqa_normalise(text) == expected and vqa_normalise(expected) == expected


def by_the_rule(answer: str, references: list[str]) -> float:
    """The published sentence word for word: the mean over all sets of nine of the ten."""
    return mean(min(left.count(answer) / 3, 1) for left in map(list, itertools.combinations(references, 9)))


def test_vqa_accuracy_is_the_mean_over_all_nines_of_ten():
    # By hand: with 1 match 9 of 10 sets hold it, 0.9 / 3; with 2: (2 * 1/3 + 8 * 2/3) / 10; with 3: (3 * 2/3 + 7) / 10.
    for matches, expected in enumerate([0, 0.3, 0.6, 0.9, *[1] * 7]):
        references = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
        assert vqa_accuracy("red", references) == pytest.approx(expected)
        assert by_the_rule("red", references) == pytest.approx(expected)
    assert vqa_accuracy("a Red", ["red."] * 4 + ["the red"] * 6) == 1


def test_vqa_accuracy_of_fewer_than_ten_answers():
    assert vqa_accuracy("red", ["red"]) == 1 and vqa_accuracy("red", ["blue"]) == 0
    assert vqa_accuracy("red", ["red", "red"]) == 1
    assert vqa_accuracy("red", ["red", "blue"]) == pytest.approx(1 / 2)  # one of the two sets of one is ["red"]
    assert vqa_accuracy("red", ["red", "red", "blue"]) == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert vqa_accuracy("red", ["red"] * 4) == 1  # each set of three is unanimous
    assert vqa_accuracy("red", ["red"] * 3 + ["blue"] * 2) == pytest.approx((3 * 2 / 3 + 2) / 5)


def test_levenshtein():
    assert levenshtein("kitten", "sitting") == 3 and levenshtein("flaw", "lawn") == 2
    assert levenshtein("", "abc") == levenshtein("abc", "") == 3 and levenshtein("红色", "红") == 1


def test_anls():
    assert anls("Hello  World", ["hello world"]) == 1
    assert anls("helo world", ["hello world", "bye"]) == pytest.approx(1 - 1 / 11)
    assert anls("ab", ["abc"]) == pytest.approx(2 / 3)
    assert anls("ab", ["abcd"]) == 0.5 and anls("a", ["abc"]) == 0  # a distance of one half counts, a longer one not
    assert anls("", ["abc"]) == 0 and anls("", [""]) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Yes.", True), ("no", False), ("No, there isn't. Yes?", False), ("There is not", False),
        ("I think yes", True), ("It isn't", False), ("nothing to say", None), ("noon", None),
        ("eyes", None), ("", None),
        ("是", True), ("是的，有一个", True), ("不是", False), ("没有", False), ("否", False), ("有", True),
        ("对", True), ("不对", False), ("没错", True), ("图中没有猫，是狗", False),
        ("答案是没有", False), ("答案是否定的", False), ("答案是no", False), ("答案是yes。", True),
        ("是没有狗", False), ("对不起，图中没有狗", False), ("对不起，有", True), ("对面没有人", False),
        ("对面", None), ("绝对不是", False), ("对的", True), ("对了，有", True), ("这是一只猫，不是狗", False),
        ("图中有狗", True), ("不错，有狗", True), ("我想是的", True), ("是的，没有问题", True), ("有，不多", True),
        ("图中是否有狗？没有", False), ("有没有", None), ("沒有", False), ("不过有狗", True), ("所有", None),
        ("noël", None),
    ],
)  # fmt: skip
def test_polarity(text, says):
    assert polarity(text) is says


def test_yes_no():
    assert yes_no("Yes, it is.", ["yes"]) == 1 == yes_no("没有", ["no"])
    assert yes_no("maybe", ["no"]) == 0 == yes_no("no", ["yes"])


def test_choices():
    q = question("B", "choice", choices=["A", "B", "C"])
    assert choose([-2, -1, -1]) == 1
    assert score(q, "choice", "anything", [-3.0, -0.1, -2.0]) == 1 and score(q, "choice", "B", [-1, -2, -3]) == 0


def test_what_a_constant_answer_reaches():
    assert constant_score(question("a", "choice", choices=["a", "b"]), "a") == 1
    assert constant_score(question("2", "vqa", ["two"] * 3 + ["3"] * 7), "2") == pytest.approx(0.9)
    assert score(question("a cat", "caption"), "caption", "a cat") is None
