"""CIDEr, BLEU and ROUGE-L: against pycocoevalcap called by hand, and small cases worked out on paper."""

import builtins
import math
import shutil
import subprocess

import numpy as np
import pytest

from evaluation import captions
from evaluation.captions import caption_figures, caption_scores, figures, split_chinese, split_english
from evaluation.language import language_of
from evaluation.statistics import wilson

pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed (requirements-evaluation.txt)")
jieba = pytest.importorskip("jieba", reason="jieba is not installed (requirements-evaluation.txt)")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Java, which splits English, is not installed")

ANSWERS = ["A brown dog is running on grass.", "Two cats sleep on a red sofa", "", "A man rides a horse, on a beach!"]
REFERENCES = [
    ["A dog runs on grass.", "A brown dog is running outside.", "The dog runs."],
    ["Two cats sleeping on a sofa.", "Cats on a red couch"],
    ["A bowl of soup.", "Soup in a white bowl, with a spoon -- and it's hot"],
    ["A man on a horse rides along the beach", 'The "rider" (a café owner) is on a beach.', "Horse and rider"],
]
CHINESE_ANSWERS = ["一只狗在草地上奔跑。", "两只猫睡在沙发上"]
CHINESE_REFERENCES = [["一只棕色的狗在草地上奔跑", "草地上有一只狗。"], ["两只猫在红色的沙发上睡觉", "沙发上的猫"]]


def total(scores: captions.CaptionScores) -> dict[str, float]:
    return {name: float(value) for name, value in figures(scores.columns.sum(0)).items()}


@needs_java
def test_english_equals_the_library_called_by_hand():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    found = caption_scores(ANSWERS, REFERENCES)["en"]
    wanted = {row: [{"caption": text} for text in texts] for row, texts in enumerate(REFERENCES)}
    wanted = PTBTokenizer().tokenize(wanted)
    said = PTBTokenizer().tokenize({row: [{"caption": text}] for row, text in enumerate(ANSWERS)})
    bleu, _ = Bleu(4).compute_score(wanted, said, verbose=0)
    cider, each_cider = Cider().compute_score(wanted, said)
    rouge, each_rouge = Rouge().compute_score(wanted, said)
    expected = {"cider": cider, **{f"bleu_{n}": value for n, value in enumerate(bleu, start=1)}, "rouge_l": rouge}
    assert total(found) == pytest.approx(expected, rel=1e-12)
    assert min(bleu) > 0.1 and cider > 0.1  # the set tells something
    np.testing.assert_array_equal(found.columns[:, captions.CIDER], each_cider)
    np.testing.assert_array_equal(found.columns[:, captions.ROUGE_L], each_rouge)
    assert found.rows.tolist() == [0, 1, 2, 3]


@needs_java
def test_one_word_captions_by_hand():
    """Images 1 to 3: references "cat", "dog", "cat"; answers "cat", "dog dog", "dog".

    Unigrams: 2 of 4 words are found (of "dog dog" one), so BLEU-1 is 1/2: the answers are longer than the references.
    CIDEr has unigrams only, of n = 1..4: cat is in 2 references of 3, dog in 1. Answer 1 is its reference: 10 / 4.
    Answer 2 is clipped to one dog: its vector is (2 idf), the reference's (idf), hence idf * idf / (2 idf * idf) = 1/2.
    CIDEr's length is the number of bigrams, 1 against 0: the penalty is exp(-1 / 72).
    ROUGE-L: 1; with precision 1/2 and recall 1 (1 + 1.44) / 2 / (1 + 1.44 / 2); 0.
    """
    found = caption_scores(["cat", "dog dog", "dog"], [["Cat."], ["dog"], ["cat"]])["en"]
    assert found.columns[:, captions.CIDER] == pytest.approx([2.5, 1.25 * math.exp(-1 / 72), 0])
    assert found.columns[:, captions.ROUGE_L] == pytest.approx([1, 1.22 / 1.72, 0])
    assert total(found)["bleu_1"] == pytest.approx(1 / 2)
    assert total(found)["cider"] == pytest.approx((2.5 + 1.25 * math.exp(-1 / 72)) / 3)


def test_brevity_penalty_by_hand():
    """3 words against 4: all unigrams and bigrams are found, so BLEU-1 and BLEU-2 are exp(1 - 4 / 3)."""
    found = caption_scores(["草地 狗 猫", "人"], [["草地 狗 猫 人"], ["人"]], ["zh", "zh"])["zh"]
    shorter = figures(found.columns[0])
    assert shorter["bleu_1"] == pytest.approx(math.exp(1 - 4 / 3)) and "cider" not in shorter
    assert shorter["bleu_2"] == pytest.approx(math.exp(1 - 4 / 3))
    assert total(found)["bleu_1"] == pytest.approx(math.exp(1 - 5 / 4))


def test_chinese_is_split_by_jieba_without_java(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    found = caption_scores(CHINESE_ANSWERS, CHINESE_REFERENCES)
    assert list(found) == ["zh"] and total(found["zh"])["bleu_1"] > 0.5
    text = "一只COCO狗，在草地上奔跑。(3.5米) 😀"
    words = [word for word in jieba.lcut(text.lower()) if any(character.isalnum() for character in word)]
    assert split_chinese([text, "。"]) == [" ".join(words), ""] and "coco" in words


@needs_java
def test_languages_are_scored_apart():
    mixed = [ANSWERS[0], CHINESE_ANSWERS[0], ANSWERS[1], CHINESE_ANSWERS[1]]
    references = [REFERENCES[0], CHINESE_REFERENCES[0], REFERENCES[1], CHINESE_REFERENCES[1]]
    found = caption_scores(mixed, references)
    assert {name: scores.rows.tolist() for name, scores in found.items()} == {"en": [0, 2], "zh": [1, 3]}
    assert total(found["zh"]) == total(caption_scores(CHINESE_ANSWERS, CHINESE_REFERENCES)["zh"])
    named = caption_scores(mixed, references, ["en", None, None, "zh"])
    assert {name: scores.rows.tolist() for name, scores in named.items()} == {"en": [0, 2], "zh": [1, 3]}


def test_the_language_of_a_text():
    assert [language_of(text) for text in ("a dog", "一只狗", "COCO 狗", "", "été")] == ["en", "zh", "zh", "en", "en"]


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="captions in en and zh can be split into words, got meta.language 'de'"):
        caption_scores(["Hund"], [["Ein Hund"]], ["de"])


@needs_java
def test_texts_keep_their_places():
    """Empty texts, line breaks of every kind, and letters beyond ASCII; the same words as the library makes."""
    texts = ["", "A café.", " ".join("one\u2028two\r\nthree\x85four".split()), "“Quoted” it's", "", ""]
    assert split_english(texts) == ["", "a café", "one two three four", "quoted it 's", "", ""]
    scores = caption_scores(["one\u2028two\r\nthree", "\n"], [["one two three"], ["x"]])["en"]
    assert scores.columns[:, captions.ROUGE_L].tolist() == [1, 0]


def test_bootstrap_draws_whole_images():
    """Each draw's figures are those of the drawn captions together."""
    scores = caption_scores(CHINESE_ANSWERS * 3, CHINESE_REFERENCES * 3)["zh"]
    found = caption_figures(scores, ["a", "b"] * 3)
    assert set(found) == {"cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"}
    both = [float(figures(3 * scores.columns[rows].sum(0))["bleu_4"]) for rows in ([0, 0], [1, 1])]
    assert found["bleu_4"]["low"] == pytest.approx(min(both)) and found["bleu_4"]["high"] == pytest.approx(max(both))
    assert found["bleu_4"]["value"] == pytest.approx(total(scores)["bleu_4"])


def test_captions_of_pictures_that_agree_are_unsure():
    """Equal captions leave nothing to chance, and draws say nothing: Wilson's interval, CIDEr's on its scale."""
    found = caption_figures(caption_scores(CHINESE_ANSWERS[:1] * 4, CHINESE_REFERENCES[:1] * 4)["zh"], [1, 2, 3, 4])
    for name, figure in found.items():
        most = 10 if name == "cider" else 1
        bounds = [most * bound for bound in wilson(figure["value"] / most, 4)]
        assert [figure["low"], figure["high"]] == pytest.approx(bounds) and figure["low"] < figure["high"]


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="program in Java, which is not installed: install a Java runtime"):
        split_english(["a dog"])
    install = builtins.__import__

    def without(name, *arguments):
        if name.startswith(("pycocoevalcap", "jieba")):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return install(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    captions._jieba.cache_clear()
    for split in (split_english, split_chinese):
        with pytest.raises(ValueError, match="pip install -r requirements-evaluation.txt"):
            split(["a dog"])
    with pytest.raises(ValueError, match="CIDEr, BLEU and ROUGE-L need pycocoevalcap"):
        captions._columns([("a", ["a"])])


def test_a_tokenizer_that_fails_is_an_error(monkeypatch, tmp_path):
    """A Java that can't start, as on a Mac without one, must not give empty captions."""
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'Unable to locate a Java Runtime.' >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(ValueError, match="0 of 2 texts came back, exit status 1: Unable to locate a Java Runtime."):
        split_english(["a dog", "a cat"])
