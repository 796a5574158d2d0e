"""How good an answer is: scores of single questions in [0, 1]. Figures of many stand in `evaluation.statistics`.

    exact    1 if the answer equals a reference after `normalise`
    vqa      VQA accuracy: agreement with several people's answers (`vqa_accuracy`)
    anls     similarity of spelling to the nearest reference (`anls`)
    yes_no   1 if the first word that affirms or denies says what the reference says (`polarity`)
    choice   1 if the right choice is the likeliest (`choose`)
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from evaluation.polarity import polarity
from evaluation.questions import Question

# Exact match


def normalise(text: str) -> str:
    """Lower case, single spaces, no white space around, no full stop (`.`, `。`) at the end."""
    return " ".join(text.casefold().split()).rstrip(".。 ")


def exact(answer: str, references: Sequence[str]) -> float:
    """1 if `answer` is one of `references` once both are normalised, else 0."""
    return float(normalise(answer) in map(normalise, references))


# VQA accuracy

ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
# Replaced by a space. The apostrophe tells a possessive from a plural, the colon stands in times of day.
PUNCTUATION = re.compile(r"""[;/\[\]"{}()=+\\_\-><@`,?!]""")
COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
PERIOD = re.compile(r"\.(?!\d)")  # one that begins no decimals


def _contractions() -> dict[str, str]:
    """Contractions without their apostrophe -> with it, but for those that are words of their own (`were`, `its`)."""
    negated = "ai are ca could did does do had has have is might must need ought sha should was were wo would".split()
    found = {f"{verb}nt": f"{verb}n't" for verb in negated}
    endings = {
        "d": "he how it she they there we who where you somebody someone something everybody everyone that what",
        "ll": "how it they what who why you somebody someone something everyone that there",
        "re": "there they what why you",
        "s": "he how she somebody someone something everyone that there what when where who why",
        "ve": "could how i might must should there they we what where who would you",
        "m": "i",
    }
    for ending, subjects in endings.items():
        found |= {f"{subject}{ending}": f"{subject}'{ending}" for subject in subjects.split()}
    found |= {"lets": "let's", "maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all"}
    return {plain: written for plain, written in found.items() if plain not in ("shed", "wed")}


CONTRACTIONS = _contractions()


@lru_cache(maxsize=2**16)
def vqa_normalise(text: str) -> str:
    """An answer as VQA evaluation compares it (https://visualqa.org/evaluation.html, "processing steps").

    Lower case; periods are dropped unless they stand in a number, commas within numbers too; other punctuation but
    apostrophe and colon becomes a space; number words up to ten become digits; articles are dropped; contractions get
    the apostrophe that they lack.
    """
    text = COMMA_IN_NUMBER.sub("", text.lower())
    words = PERIOD.sub("", PUNCTUATION.sub(" ", text)).split()
    words = (NUMBERS.get(word, word) for word in words)
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy of VQA (Antol et al., https://arxiv.org/abs/1505.00468; Goyal et al., https://arxiv.org/abs/1612.00837).

    The mean, over all sets that leave one of the references out, of min(matches / 3, 1): for ten references, of which m
    match, (m * min((m - 1) / 3, 1) + (10 - m) * min(m / 3, 1)) / 10. Three people are asked to agree only where so many
    are left: of fewer than four references all the others must.

    Unlike the official vqaEval.py, answers are normalised also where all references are the same.
    """
    matches = Counter(map(vqa_normalise, references))[vqa_normalise(answer)]
    n = len(references)
    if n == 1:
        return float(matches)
    asked = min(3, n - 1)
    return (matches * min((matches - 1) / asked, 1) + (n - matches) * min(matches / asked, 1)) / n


# ANLS

ANLS_THRESHOLD = 0.5


def anls(answer: str, references: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest reference (Biten et al., https://arxiv.org/abs/1905.13648).

    1 - NL, where NL is the edit distance divided by the length of the longer text, or 0 where NL is more than 0.5. Case
    and runs of white space don't count. An NL of exactly 0.5, which is wrong by the paper's formula, scores 0.5, as in
    the evaluators that published figures come from (https://rrc.cvc.uab.es, lmms-eval).
    """
    answer = " ".join(answer.lower().split())
    best = 0.0
    for reference in {" ".join(reference.lower().split()) for reference in references}:
        longest = max(len(answer), len(reference))
        distance = levenshtein(answer, reference) / longest if longest else 0.0
        if distance <= ANLS_THRESHOLD:
            best = max(best, 1 - distance)
    return best


def levenshtein(first: str, second: str) -> int:
    """Least number of characters to insert, delete or replace that makes one text of the other."""
    distances = list(range(len(second) + 1))  # from the part of `first` so far to each beginning of `second`
    for row, own in enumerate(first, 1):
        diagonal, distances[0] = distances[0], row
        for column, other in enumerate(second, 1):
            step = min(distances[column] + 1, distances[column - 1] + 1, diagonal + (own != other))
            diagonal, distances[column] = distances[column], step
    return distances[-1]


# Yes or no


def yes_no(answer: str, references: Sequence[str]) -> float:
    """1 if `answer` affirms or denies as the first reference does, else 0; an answer that does neither is wrong."""
    said = polarity(answer)
    return float(said is not None and said == polarity(references[0]))


# Choices


def choose(likelihoods: Sequence[float]) -> int:
    """Index of the likeliest choice, the first of equal ones."""
    return max(range(len(likelihoods)), key=likelihoods.__getitem__)


# All of them

SCORES = {"exact": exact, "vqa": vqa_accuracy, "anls": anls, "yes_no": yes_no}


def score(question: Question, metric: str, answer: str, likelihoods: Sequence[float] | None = None) -> float | None:
    """Score of an answer by a metric; None for captions, which are scored together.

    Args:
        likelihoods: of `question.choices`, for the metric "choice".
    """
    if metric == "caption":
        return None
    if metric == "choice":
        return float(question.choices[choose(likelihoods)] == question.answer)
    return SCORES[metric](answer, question.references)


def constant_score(question: Question, answer: str) -> float | None:
    """Score of a fixed answer to a question, by the question's own metric: what a model reaches that always says it."""
    if question.metric == "choice":
        return float(answer == question.answer)
    return score(question, question.metric, answer)
