"""Captions against several references: CIDEr, BLEU and ROUGE-L as COCO's evaluation computes them.

The figures are those of `pycocoevalcap` (COCO's own evaluation code), an optional requirement:

    pip install -r requirements-evaluation.txt

English is split into words by the tokenizer that comes with it (Stanford's, in Java), Chinese by jieba, without Java;
punctuation is left out of both, and case ignored. Each language is scored on its own.

    cider      CIDEr-D (Vedantam et al., https://arxiv.org/abs/1411.5726), times 10 as usual: it may exceed 1
    bleu_1..4  BLEU of the whole set, of n-grams up to that length (Papineni et al., doi:10.3115/1073083.1073135)
    rouge_l    ROUGE-L (Lin, 2004), the mean over captions

What a word is worth to CIDEr depends on how many images of the set have it in their references. For intervals these
numbers are those of the whole set, in every draw: they say how sure the figure is on such images, with that scale.
METEOR and SPICE are left out: the library has both for English alone, and SPICE fetches Java models at its first use.
"""

import shutil
import subprocess
import unicodedata
from collections.abc import Hashable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluation.language import language_of
from evaluation.statistics import estimate_of_share, resampled_sums

INSTALL = "pip install -r requirements-evaluation.txt"
ORDERS = 4  # n-grams up to this length
MOST_CIDER = 10
# Columns of `CaptionScores`.
CIDER, ROUGE_L, LENGTH, REFERENCE_LENGTH, ONE = range(5)
POSSIBLE, FOUND = slice(5, 5 + ORDERS), slice(5 + ORDERS, 5 + 2 * ORDERS)
# Of pycocoevalcap's BLEU: they keep 0 / 0 from being an error.
SMALL, TINY = 1e-9, 1e-15


class CaptionScores(NamedTuple):
    """Scores of n captions in one language.

    Attributes:
        rows: `[n]` which of the answers these are.
        columns: `[n, 13]` whose sums, over all or over drawn captions, `figures` makes figures of: CIDEr, ROUGE-L,
            words of the answer and of the reference nearest in length, 1, n-grams of the answer (n = 1..4), and those
            of them that a reference has.
    """

    rows: np.ndarray
    columns: np.ndarray


def caption_scores(
    answers: Sequence[str], references: Sequence[Sequence[str]], languages: Sequence[str | None] | None = None
) -> dict[str, CaptionScores]:
    """language -> scores of the answers whose references are in it.

    Args:
        answers: N captions to be scored, which may be empty.
        references: of each the captions by people, at least one.
        languages: of each "en" or "zh"; where it is None, a Chinese character among the references tells.

    Raises:
        ValueError: another language; a package or Java is missing, or fails. The message says what to install.
    """
    groups: dict[str, list[int]] = {}
    for row, texts in enumerate(references):
        language = (languages[row] if languages else None) or language_of(" ".join(texts))
        if language not in SPLITTERS:
            known = " and ".join(SPLITTERS)
            raise ValueError(f"captions in {known} can be split into words, got meta.language {language!r:.40}")
        groups.setdefault(language, []).append(row)
    found = {}
    for language in sorted(groups):
        rows = groups[language]
        texts = [text for row in rows for text in (answers[row], *references[row])]
        words = iter(SPLITTERS[language]([" ".join(text.split()) for text in texts]))
        split = [(next(words), [next(words) for _ in references[row]]) for row in rows]
        found[language] = CaptionScores(np.array(rows), _columns(split))
    return found


def _columns(captions: list[tuple[str, list[str]]]) -> np.ndarray:
    """Columns of `CaptionScores` of (answer, references), split into words with spaces between."""
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ValueError(f"CIDEr, BLEU and ROUGE-L need pycocoevalcap ({error}): {INSTALL}") from error
    said = {row: [answer] for row, (answer, _) in enumerate(captions)}
    wanted = {row: references for row, (_, references) in enumerate(captions)}
    columns = np.ones((len(captions), FOUND.stop))
    _, columns[:, CIDER] = Cider(n=ORDERS).compute_score(wanted, said)
    _, columns[:, ROUGE_L] = Rouge().compute_score(wanted, said)
    bleu = BleuScorer(n=ORDERS)
    for caption in captions:
        bleu += caption
    for row, counts in enumerate(bleu.ctest):
        columns[row, LENGTH] = counts["testlen"]
        columns[row, REFERENCE_LENGTH] = min(counts["reflen"], key=lambda n: (abs(n - counts["testlen"]), n))
        columns[row, POSSIBLE], columns[row, FOUND] = counts["guess"], counts["correct"]
    return columns


def figures(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> figure `[...]` of sums `[..., 13]` of the columns of `CaptionScores`.

    BLEU's brevity penalty and precisions are made of the sums, hence it is that of the whole set or draw. A single
    caption has no CIDEr: which words are rare shows only among several.
    """
    found = {}
    if np.all(sums[..., ONE] > 1):
        found["cider"] = sums[..., CIDER] / sums[..., ONE]
    precisions = (sums[..., FOUND] + TINY) / (sums[..., POSSIBLE] + SMALL)
    ratio = (sums[..., LENGTH] + TINY) / (sums[..., REFERENCE_LENGTH] + SMALL)
    penalty = np.exp(np.minimum(1 - 1 / ratio, 0))
    products = np.cumprod(precisions, axis=-1)
    for n in range(1, ORDERS + 1):
        found[f"bleu_{n}"] = products[..., n - 1] ** (1 / n) * penalty
    found["rouge_l"] = sums[..., ROUGE_L] / sums[..., ONE]
    return found


def caption_figures(scores: CaptionScores, clusters: Sequence[Hashable]) -> dict[str, dict[str, float]]:
    """Name -> `{"value", "low", "high"}` of captions in one language.

    Args:
        clusters: of each of the n captions its image: those of one image are drawn together.
    """
    values = figures(scores.columns.sum(0))
    draws = figures(resampled_sums(clusters, scores.columns))
    found = {}
    for name, value in values.items():
        most = MOST_CIDER if name == "cider" else 1
        share = estimate_of_share(min(float(value) / most, 1.0), draws[name] / most, len(set(clusters)))
        found[name] = {key: most * bound for key, bound in share.items()}
    return found


def split_english(texts: list[str]) -> list[str]:
    """Words of each text, which has no line breaks, with spaces between: lower case, Penn Treebank's conventions.

    As pycocoevalcap's PTBTokenizer does it, with its jar; but texts go through a pipe where that one writes them into
    the folder of the package, and where Java fails this is an error and no empty text.

    Raises:
        ValueError: pycocoevalcap or Java is missing, or the tokenizer fails.
    """
    try:
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError as error:
        raise ValueError(f"CIDEr, BLEU and ROUGE-L need pycocoevalcap ({error}): {INSTALL}") from error
    if shutil.which("java") is None:
        raise ValueError(
            "English captions are split into words by a program in Java, which is not installed: install a Java "
            "runtime (Debian, Ubuntu: apt-get install default-jre-headless; conda: conda install openjdk)"
        )
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input="".join(f"{text}\n" for text in texts).encode(), capture_output=True)
    lines = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode or len(lines) != len(texts):
        said = (done.stderr.decode(errors="replace").strip() or "it says nothing").splitlines()[0]
        problem = f"{len(lines)} of {len(texts)} texts came back, exit status {done.returncode}: {said:.200}"
        raise ValueError(f"the tokenizer of English captions ({command[0]} -cp {jar}) failed: {problem}")
    punctuation = {"", *ptbtokenizer.PUNCTUATIONS}
    return [" ".join(word for word in line.split(" ") if word not in punctuation) for line in lines]


def split_chinese(texts: list[str]) -> list[str]:
    """Words of each text with spaces between: as jieba finds them, in lower case, without punctuation and symbols.

    Raises:
        ValueError: jieba is missing.
    """
    tokenizer = _jieba()
    found = ([word.strip() for word in tokenizer.cut(text.lower())] for text in texts)
    return [" ".join(word for word in words if any(map(_is_letter, word))) for words in found]


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LNM"  # letters, digits, marks


@cache
def _jieba():
    """jieba with its own dictionary, and without its cache: that lies where every user of the machine may write."""
    try:
        import jieba
    except ImportError as error:
        raise ValueError(f"Chinese captions are split into words by jieba ({error}): {INSTALL}") from error
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer


SPLITTERS = {"en": split_english, "zh": split_chinese}
