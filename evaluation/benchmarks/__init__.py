"""Published benchmark files -> records that `evaluate.py` reads: POPE, VQAv2, GQA, TextVQA, MME, MMBench, captions.

    python -m evaluation.benchmarks vqav2 --data v2_OpenEnded_mscoco_val2014_questions.json \\
        --annotations v2_mscoco_val2014_annotations.json --output vqav2.parquet

writes them to a file, which `preview.py` shows. To add a benchmark, write a function `Files -> records` in the module
of its subject and a line in BENCHMARKS.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dataset.record import validate_record
from dataset.rows import nearest
from evaluation.benchmarks import captions, mmbench, vqa, yes_no
from evaluation.benchmarks.entries import Files

# What follows the question, as LLaVA-1.5 was trained and evaluated with it.
WORD = {"en": "Answer the question using a single word or phrase."}
LETTER = {
    "en": "Answer with the option's letter from the given choices directly.",
    "zh": "请直接回答选项字母。",
}
CAPTION = {"en": "Provide a one-sentence caption for the provided image.", "zh": "用一句话描述这张图片。"}


class Benchmark(NamedTuple):
    """How a benchmark is read.

    Attributes:
        read: files -> records.
        data: the published file that `data` is.
        suffix: language -> what follows a question.
        annotations: the published file that `annotations` is; "" where there is no second file.
        needs: further arguments of `read_benchmark` without which it can't be read.
        may: those that it may have.
        max_new_tokens: longest answer, by default; what it cuts off would count as an answer that ends there.
    """

    read: Callable[[Files], Iterator[dict]]
    data: str
    suffix: dict[str, str]
    annotations: str = ""
    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()
    max_new_tokens: int = 16


BENCHMARKS = {
    "pope": Benchmark(yes_no.pope, "coco_pope_random.json, coco_pope_popular.json or coco_pope_adversarial.json", WORD),
    "vqav2": Benchmark(
        vqa.vqav2,
        "v2_OpenEnded_mscoco_val2014_questions.json",
        WORD,
        annotations="v2_mscoco_val2014_annotations.json",
    ),
    "gqa": Benchmark(vqa.gqa, "testdev_balanced_questions.json", WORD),
    "textvqa": Benchmark(vqa.textvqa, "TextVQA_0.5.1_val.json", WORD),
    "mme": Benchmark(yes_no.mme, "the folder MME_Benchmark_release_version", WORD),
    "mmbench": Benchmark(mmbench.mmbench, "MMBench_DEV_EN.tsv or MMBench_DEV_CN.tsv", LETTER, needs=("image_root",)),
    "coco_captions": Benchmark(captions.coco_captions, "captions_val2014.json", CAPTION, max_new_tokens=64),
    "karpathy": Benchmark(captions.karpathy, "dataset_coco.json", CAPTION, may=("split",), max_new_tokens=64),
    "ai_challenger": Benchmark(
        captions.ai_challenger, "caption_validation_annotations_20170910.json", CAPTION, max_new_tokens=64
    ),
}


def read_benchmark(
    name: str,
    data: str | Path,
    annotations: str | Path | None = None,
    *,
    image_root: str | Path | None = None,
    suffix: str | None = None,
    split: str | None = None,
) -> Iterator[dict]:
    """Validated records of a benchmark; their `meta` has the keys that `evaluation.questions` explains.

    Args:
        name: a key of `BENCHMARKS`.
        data: the published file, for MME the folder.
        annotations: the second file of VQAv2.
        image_root: folder that names of images are relative to. Of use to MMBench, which writes its images there, and
            to Karpathy's split, whose names may begin with the folder's own.
        suffix: what follows each question on a line of its own, "" for nothing; None: the ending that LLaVA-1.5 was
            evaluated with, in the language of the question. For captions it is the whole request. Questions of MME end
            with "Please answer yes or no.", which a suffix takes the place of.
        split: part of Karpathy's split; None: test.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an argument, or an entry of a file, which the message names with the key and what was expected.
            Those about arguments come at once, those about entries when their record would have come.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark is called {name!r:.80}{nearest(name, BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    if benchmark.annotations and annotations is None:
        raise ValueError(f"{name} needs a second file, annotations: {benchmark.annotations}")
    if annotations is not None and not benchmark.annotations:
        raise ValueError(f"{name} is read from one file, leave annotations out: {annotations}")
    given = {"image_root": image_root, "split": split}
    for key in benchmark.needs:
        if given[key] is None:
            raise ValueError(f"{name} needs {key}, a folder for its images, which {data} holds")
    if split is not None and "split" not in benchmark.may:
        raise ValueError(f"{name} has no parts in its file, leave split out: {split!r:.80}")
    paths = [None if path is None else Path(path) for path in (data, annotations, image_root)]
    for path, published in zip(paths[:2], (benchmark.data, benchmark.annotations), strict=True):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file; {name} expects {published}")
    texts = benchmark.suffix if suffix is None else dict.fromkeys(benchmark.suffix, suffix)
    return map(validate_record, benchmark.read(Files(*paths, texts, split)))
