"""What a model answers: with the real pictures and clips, blind, and with other ones.

    real       the record's own images and clips
    blind      feature vectors of zeros
    shuffled   each image or clip replaced by another one of the set, never by itself, the same in all records
    reordered  frames of each clip in a random order, never the real one; where all that show something show a clip

Under each condition a question is answered greedily; if it has choices, each gets its likelihood, and the reference
can have its own. A question without images and clips is asked once and has the same result under all conditions.

Which questions are worked off together depends on records, conditions, batch size and seed alone. Results don't depend
on the batch size except by what floats are rounded to: the other rows of a batch change the order of sums in matrix
products, and so an answer only where two tokens are as likely.
"""

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.cache_utils import Cache

from dataset.record import RecordError
from dataset.template import encode_prompt
from evaluation.features import check_media, encode, feature_count, features_of, media_per_chunk, most_features
from evaluation.journal import opened
from evaluation.likelihood import Continuations, continuation
from evaluation.metrics import score
from evaluation.order import CONDITIONS, batches, chunks, substitutes
from evaluation.questions import Medium, Question, fingerprint, make_questions
from evaluation.results import check_metrics, make_report, write_results
from model import GREEDY, MultiModalModel
from model.fingerprint import digest


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
        conditions: any of `CONDITIONS`.
        max_new_tokens: longest answer.
        system: text of the system turn where a record has none; None for no system turn.
        perplexity: whether references get their likelihood.
        seed: of the order in which media replace each other, and of the order of frames.
        batch_size: questions at a time.
    """

    conditions: tuple[str, ...]
    max_new_tokens: int = 16
    system: str | None = None
    perplexity: bool = False
    seed: int = 0
    batch_size: int = 64

    def settings(self) -> dict:
        """All that the answers depend on; the batch size is not among it."""
        return {name: value for name, value in asdict(self).items() if name != "batch_size"}


@dataclass
class Work:
    """What is measured while questions are answered: seconds of the encoder and of each condition."""

    seconds: dict[str, float] = field(default_factory=dict)

    def count(self, name: str, since: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - since


def fitting_conditions(questions: Sequence[Question], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """`wanted` conditions in the order of `CONDITIONS`, or by default all that these questions allow.

    Raises:
        ValueError: an unknown one, or one that does not fit the questions.
    """
    shown = [q for q in questions if q.media]
    without = [q.id for q in shown if not q.paths("video")]
    if wanted is None:
        media = {medium for q in shown for medium in q.media}
        left_out = {"reordered"} if without else set()
        if 1 in [sum(of == kind for of, _ in media) for kind in ("image", "video")]:
            left_out.add("shuffled")  # there is nothing that could take its place
        return tuple(name for name in CONDITIONS if name not in left_out) if shown else ("real",)
    if unknown := [name for name in wanted if name not in CONDITIONS]:
        raise ValueError(f"there is no condition {unknown[0]!r}, there are {', '.join(CONDITIONS)}")
    if not wanted:
        raise ValueError(f"no condition given, there are {', '.join(CONDITIONS)}")
    if "reordered" in wanted and (without or not shown):
        name = (without or [questions[0].id])[0]
        raise ValueError(f"record {name!r} shows no clip; leave the condition 'reordered' out")
    return tuple(name for name in CONDITIONS if name in wanted)


def evaluate(
    model: MultiModalModel,
    records: Iterable[dict],
    image_root: str | Path,
    *,
    system: str | None = None,
    conditions: Sequence[str] | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    seed: int = 0,
    perplexity: bool = False,
    metrics: Sequence[str] = (),
    output: str | Path | None = None,
    overwrite: bool = False,
    described: dict | None = None,
) -> dict:
    """Asks a model all questions of `records` and reports on its answers (`evaluation.results.make_report`).

    Args:
        model: with its tokenizer; it is put into eval mode.
        records: validated records that end in an assistant turn.
        image_root: folder that the records' image paths are relative to.
        system: text of the system turn where a record has none; None for no system turn.
        conditions: any of `CONDITIONS`; None: those that the records allow.
        batch_size: questions at a time.
        max_new_tokens: longest answer.
        seed: of the order in which media replace each other, and of the order of frames.
        perplexity: also that of the references.
        metrics: see `make_report`.
        output: folder for `rows.jsonl`, `report.json`, `report.md` and `report.html`. What an interrupted evaluation
            with the same settings answered there is kept.
        overwrite: start over, whatever evaluation `output` holds.
        described: what else the report's settings say, such as where the model lies.

    Raises:
        ValueError, FileNotFoundError: records, conditions or media don't fit; names the record. Or `output` holds an
            evaluation with other settings, which are listed.
        RunError: another process works in `output`, or it can't be written.
    """
    start = time.perf_counter()
    model.eval()
    questions = make_questions(records)
    asking = Asking(
        fitting_conditions(questions, conditions), max_new_tokens, system, perplexity, seed, batch_size
    )
    check_metrics(questions, metrics)
    settings = {
        "dtype": str(model.language_model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "image_root": str(Path(image_root).resolve()),
        **asking.settings(),
    }
    if output is not None:
        settings = {"model": digest(model), "questions": fingerprint(questions), **settings}
    with opened(output, settings, described or {}, overwrite) as journal:
        work = Work()
        for rows in answer_questions(model, questions, image_root, asking, journal.rows.keys(), work):
            journal.append(rows)
        rows = journal.finish([q.id for q in questions])
        seconds = {**work.seconds, "total": time.perf_counter() - start}
        report = make_report(rows, metrics, {**(described or {}), **settings}, seconds)
        if output is not None:
            title = f"Evaluation of {(described or {}).get('checkpoint_path', 'a model')}"
            write_results(output, report, rows, image_root, title, model.media.sampling)
    return report


def answer_questions(
    model: MultiModalModel,
    questions: Sequence[Question],
    image_root: str | Path,
    asking: Asking,
    done: Collection[str] = (),
    work: Work | None = None,
) -> Iterator[list[dict]]:
    """Rows (`rows.jsonl`) of questions that are not `done`, a batch at a time.

    A batch of which some questions are done is answered whole, and its other rows come: what is answered after an
    interruption is then, bit for bit, what would have been.

    Args:
        model: in eval mode, with its tokenizer.
        image_root: folder that paths of images and clips are relative to.
        done: ids.
        work: gets the seconds.

    Raises:
        ValueError: `shuffled` with a single image or clip; a prompt that is too long; a medium that can't be read.
            Names the record.
        FileNotFoundError: an image or a clip is missing; names record and file.
    """
    work = work or Work()
    check_media([q for q in questions if q.id not in done], image_root)
    substitute = substitutes(questions, asking.seed) if "shuffled" in asking.conditions else {}
    check_lengths(model, questions, image_root, asking, substitute)
    clips = any(kind == "video" for q in questions for kind, _ in q.media)
    bar = tqdm(total=len(questions) * len(asking.conditions), initial=len(done) * len(asking.conditions),
               desc="evaluating", unit="answer", disable=None)  # fmt: skip
    with bar:
        for chunk in chunks(questions, asking.seed, media_per_chunk(model, clips)):
            made = batches(chunk, asking.batch_size)
            if all(q.id in done for q in chunk):
                continue
            lap = time.perf_counter()
            shown = {medium for q in chunk for medium in q.media}
            needed = sorted(shown | {substitute[medium] for medium in shown if substitute})
            features = encode(model, needed, image_root, questions)
            work.count("encode", lap)
            for batch in made:
                if all(q.id in done for q in batch):
                    continue
                results = {}
                for condition in asking.conditions:
                    lap = time.perf_counter()
                    first = results.get(asking.conditions[0])
                    results[condition] = _under(condition, model, batch, features, substitute, asking, first)
                    work.count(condition, lap)
                rows = [_row(q, number, results) for number, q in enumerate(batch) if q.id not in done]
                bar.update(len(rows) * len(asking.conditions))
                yield rows


def _under(
    condition: str,
    model: MultiModalModel,
    batch: list[Question],
    features: dict,
    substitute: dict,
    asking: Asking,
    first: list[dict] | None,
) -> list[dict]:
    """Result of each question of a batch under a condition; `first` are those under the first condition."""
    asked = [number for number, q in enumerate(batch) if q.media or first is None]
    questions = [batch[number] for number in asked]
    shown = [features_of(q, condition, features, substitute, asking.seed) for q in questions]
    results = list(first) if first is not None else [{}] * len(batch)
    answered = respond(model, questions, shown, asking) if questions else []
    for number, result in zip(asked, answered, strict=True):
        results[number] = result
        if condition == "shuffled":
            for kind in ("image", "video"):
                if paths := batch[number].paths(kind):
                    result[f"{kind}s"] = [substitute[kind, path][1] for path in paths]
    return results


def _row(q: Question, number: int, results: dict[str, list[dict]]) -> dict:
    return {**q.row(), "conditions": {condition: found[number] for condition, found in results.items()}}


def respond(
    model: MultiModalModel, questions: list[Question], features: list[list[Tensor]], asking: Asking
) -> list[dict]:
    """`{"answer", "score", "likelihoods", "likelihood_sums", "nll", "tokens"}` of each question.

    `likelihoods` are the choices' mean log-probabilities per token, `likelihood_sums` the sums; `nll` is the negative
    log-probability of the reference, of `tokens` tokens. Tokens are those that training supervises: the text's and the
    one that ends it. What was not asked for is left out.

    Args:
        features: of each question, `[n, H]` of each of its images and clips.
    """
    texts = [list(q.choices) or [q.answer] * asking.perplexity for q in questions]
    prompts, joined = _asked(model, questions, features, asking.system)
    answers, cache = _generate(model, prompts, joined, asking.max_new_tokens, keep_cache=any(texts))
    likelihoods: list[list[tuple[float, int]]] = [[] for _ in questions]
    if any(texts):
        counts = [[len(one) for one in row] for row in features]
        scored = Continuations(model, prompts, joined, cache)
        likelihoods = scored.of_texts(questions, counts, texts, asking.system)
    return [
        _result(q, answer, found, asking) for q, answer, found in zip(questions, answers, likelihoods, strict=True)
    ]


def _result(q: Question, answer: str, found: list[tuple[float, int]], asking: Asking) -> dict:
    """`found` are the sum of log-probabilities, and the number of tokens, of each choice or of the reference alone."""
    if not all(math.isfinite(total) for total, _ in found):
        problem = "the model's likelihood of a text is not a finite number; in float16 try --dtype bfloat16"
        raise RecordError(f"record {q.id!r}: {problem}", "likelihood")
    means = [round(total / tokens, 6) for total, tokens in found]
    result = {"answer": answer, "score": score(q, q.metric, answer, means)}
    if q.choices:
        result["likelihoods"] = means
        result["likelihood_sums"] = [round(total, 6) for total, _ in found]
    if asking.perplexity:
        total, tokens = found[q.choices.index(q.answer) if q.choices else 0]
        result |= {"nll": round(-total, 6), "tokens": tokens}
    return result


def answer_batch(
    model: MultiModalModel,
    questions: Sequence[Question],
    features: list[list[Tensor]],
    max_new_tokens: int,
    system: str | None,
) -> list[str]:
    """Greedy answers to questions with features `[n, H]` of their images and clips."""
    answers, _ = _generate(model, *_asked(model, questions, features, system), max_new_tokens)
    return answers


def _asked(
    model: MultiModalModel, questions: Sequence[Question], features: list[list[Tensor]], system: str | None
) -> tuple[list[list[int]], Tensor | None]:
    """Ids of the prompts, and features `[M, H]` of all that they show."""
    prompts = [
        encode_prompt(q.turns, model.tokenizer, [len(one) for one in row], system)
        for q, row in zip(questions, features, strict=True)
    ]
    flat = [feature for row in features for feature in row]
    return prompts, torch.cat(flat) if flat else None


@torch.no_grad()  # and not inference mode: what the decoder keeps must serve training as well
def _generate(
    model: MultiModalModel, prompts: list[list[int]], features: Tensor | None, max_new_tokens: int, keep_cache=False
) -> tuple[list[str], Cache | None]:
    """Greedy answers, and what the decoder keeps of the prompts (and answers) if that is asked for."""
    options = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": keep_cache, **GREEDY}
    output = model.generate(prompts, features=features, **options)
    ids, cache = (output.sequences, output.past_key_values) if keep_cache else (output, None)
    return [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)], cache


def check_lengths(
    model: MultiModalModel,
    questions: Sequence[Question],
    root: str | Path,
    asking: Asking,
    substitute: Mapping[Medium, Medium] | None = None,
) -> None:
    """Raises RecordError, which names the record, where prompt and answer are longer than the decoder's texts.

    Args:
        substitute: medium -> the one that `shuffled` shows in its place, which may have more features.
    """
    longest = model.num_positions or getattr(model.language_model.config, "max_position_embeddings", None)
    if longest is None:
        return
    most = {kind: most_features(model, kind) for kind in {kind for q in questions for kind, _ in q.media}}
    for q in questions:
        texts = [*q.choices, q.answer]
        # A token has a byte at least, and what surrounds a turn fewer than 100 tokens. Most questions are far from
        # the limit, and need neither tokenizer nor files.
        written = [asking.system or "", *(turn["content"] for turn in q.turns), max(texts, key=len)]
        at_most = sum(most[kind] for kind, _ in q.media) + sum(4 * len(text) + 100 for text in written)
        if at_most + asking.max_new_tokens <= longest:
            continue
        shown = {"": q.media}
        if substitute:
            others = [substitute[medium] for medium in q.media]
            shown[f" with {', '.join(path for _, path in others)} in the place of its own (shuffled)"] = others
        for instead, media in shown.items():
            counts = [feature_count(model, medium, root, q.id) for medium in media]
            prompt = len(encode_prompt(q.turns, model.tokenizer, counts, asking.system))
            answer = max(len(continuation(q, counts, text, model.tokenizer, asking.system, prompt)) for text in texts)
            answer = max(answer, asking.max_new_tokens)
            if prompt + answer > longest:
                problem = f"its prompt{instead} has {prompt} tokens, of which {sum(counts)} for images and clips, its "
                problem += f"answer up to {answer}; the decoder reads {longest} at most; leave it out, or lower "
                problem += "--max_new_tokens"
                raise RecordError(f"record {q.id!r}: {problem}", "too long")
