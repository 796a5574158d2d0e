"""A checkpoint as a model of lmms-eval (0.7, an optional requirement), started by `evaluation.run_lmms_eval`.

A request has a context (text) and what the task shows. Pictures and clips stand before the text, each on a line of its
own, as in training; where the context has as many `<image>` as there are pictures, they stand there instead. All other
text is plain text.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from dataset.rows import IMAGE_PLACEHOLDER, nearest, shown
from dataset.template import encode_prompt
from evaluation.likelihood import Continuations, continuation
from evaluation.questions import Question
from model import GREEDY, MultiModalModel

MAX_NEW_TOKENS = 1024  # of tasks that don't say
# lmms-eval ends answers there unless a task says otherwise: between examples of a prompt without turns. Ours end with
# their turn, and may have paragraphs.
FEW_SHOT_DELIMITER = "\n\n"
PASSED_ON = ("top_p", "top_k", "num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")
# Settings of other models, or of lmms-eval's own loop, which change nothing here.
WITHOUT_MEANING = ("image_aspect_ratio", "max_agentic_steps", "skip_special_tokens", "seed")
OWN = ("max_new_tokens", "until", "do_sample", "temperature")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
Medium = tuple[str, Any]  # "image" or "video"; a PIL image, or a path


class Prompt(NamedTuple):
    """What is asked: text, and what it shows in the order of its placeholders."""

    question: Question
    media: list[Medium]


class Kanjian(lmms):
    """See the top of this file.

    Args:
        checkpoint_path: folder that training wrote.
        batch_size: prompts at a time.
        device: cuda, cpu, ...; each of several processes takes the GPU of its number.
        dtype, quantization, decoder, encoder: as of `MultiModalModel.from_pretrained`.
        system: text of the system turn, or a file with it; by default that of the training.
    """

    is_simple = True  # requests have text and pictures apart; lmms-eval has its likelihood tasks for such models alone

    def __init__(
        self,
        checkpoint_path: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        decoder: str | None = None,
        encoder: str | None = None,
        system: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"--batch_size must be a positive number, got {batch_size!r}")
        self.batch_size = int(batch_size)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and "LOCAL_RANK" in os.environ:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        options = {"dtype": dtype, "quantization": quantization, "decoder": decoder, "encoder": encoder}
        self.model = MultiModalModel.from_pretrained(checkpoint_path, device=device, **options)
        self.system = self.model.system if system is None else _text_or_file(system)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate_until(self, requests: list) -> list[str]:
        """An answer to each request, up to the first of its `until`; white space around it is left out."""
        grouped = defaultdict(list)  # requests that may share a call of `generate`
        for number, request in enumerate(requests):
            options, until = generation_options(request.args[1])
            grouped[tuple(sorted(options.items())), until].append(number)
        answers = [""] * len(requests)
        with self._bar(len(requests)) as bar:
            for (options, until), numbers in grouped.items():
                for batch in self._batches(numbers, [request.args[0] for request in requests]):
                    asked = [requests[number].args for number in batch]
                    prompts = [self._prompt(context, *shows) for context, _, *shows in asked]
                    for number, text in zip(batch, self._answers(prompts, dict(options)), strict=True):
                        answers[number] = cut(text, until).strip()
                        context, settings, *_ = requests[number].args
                        self.cache_hook.add_partial("generate_until", (context, settings), answers[number])
                    bar.update(len(batch))
        return answers

    def generate_until_multi_round(self, requests: list) -> list[list[str]]:
        """Answers of all rounds of each request. What a round shows and asks, the task makes of the answers before."""
        found = []
        for request in self._bar(requests):
            context, settings, doc_to_visual, doc_to_text, doc_id, task, split = request.args
            options, until = generation_options(settings)
            document = self.task_dict[task][split][doc_id]
            visuals, answers, carried, terminal = doc_to_visual(document), [], None, False
            while not terminal:
                prompt = make_prompt(context, visuals)
                answers.append(cut(self._answers([prompt], options)[0], until).strip())
                visuals, context, terminal, answers, carried = doc_to_text(
                    document, previous_output=answers, round_idx=len(answers), previous_round_info=carried
                )
                answers = list(answers)
            found.append(answers)
        return found

    def loglikelihood(self, requests: list) -> list[GenerationResult]:
        """Of each continuation the mean negative log-probability of its tokens, the end of its turn included, and
        whether it is the greedy answer.

        lmms-eval takes the choice with the least of these numbers: its models return a loss. White space around a
        continuation is left out, as an answer begins right behind the header of its turn. The pair stands in a
        `GenerationResult`, because the evaluator of 0.7.3 makes one text of a bare pair and then fails.
        """
        grouped = defaultdict(list)  # continuations of the same prompt
        for number, request in enumerate(requests):
            if len(request.args) != 6:
                raise ValueError("the metric acc_mutual_info, likelihoods without a prompt, is not supported")
            context, _, _, doc_id, task, split = request.args
            grouped[context, doc_id, task, split].append(number)
        groups = list(grouped.values())
        found: list[Any] = [None] * len(requests)
        with self._bar(len(requests)) as bar:
            for batch in self._batches(range(len(groups)), [requests[group[0]].args[0] for group in groups]):
                members = [groups[number] for number in batch]
                first = [requests[numbers[0]].args for numbers in members]
                prompts = [self._prompt(context, *shows) for context, _, *shows in first]
                texts = [[self._continuation(requests[number].args) for number in numbers] for numbers in members]
                for numbers, results in zip(members, self._losses(prompts, texts), strict=True):
                    for number, result in zip(numbers, results, strict=True):
                        found[number] = GenerationResult(result)
                    bar.update(len(numbers))
        return found

    def _bar(self, work: int | Iterable) -> tqdm:
        options = {"total": work} if isinstance(work, int) else {"iterable": work}
        return tqdm(**options, desc="Kanjian", unit="answer", disable=self.rank != 0 or None)

    def _batches(self, numbers: Iterable[int], contexts: Sequence[str]) -> Iterator[list[int]]:
        """`numbers` in batches of prompts of similar length."""
        ordered = sorted(numbers, key=lambda number: len(contexts[number]))
        for start in range(0, len(ordered), self.batch_size):
            yield ordered[start : start + self.batch_size]

    def _prompt(self, context: str, doc_to_visual: Callable | None, doc_id: int, task: str, split: str) -> Prompt:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else []
        return make_prompt(context, visuals)

    def _continuation(self, arguments: tuple) -> str:
        _, target, _, doc_id, task, split = arguments
        return (target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])).strip()

    @torch.no_grad()
    def _encoded(self, prompts: list[Prompt]) -> tuple[list[list[int]], list[list[int]], Tensor | None]:
        """Ids of prompts, the number of features of each of their media, and all features `[M, H]`."""
        views = [[self.model.media.load(*medium) for medium in prompt.media] for prompt in prompts]
        counts = [[sum(one.features) for one in row] for row in views]
        flat = [one for row in views for one in row]
        features = None
        if flat:
            pixel_values = torch.cat([one.pixel_values for one in flat]).to(self.device)
            features = self.model.encode_images(pixel_values, [count for one in flat for count in one.features])
        tokenizer, system = self.model.tokenizer, self.system
        ids = [
            encode_prompt(prompt.question.turns, tokenizer, row, system)
            for prompt, row in zip(prompts, counts, strict=True)
        ]
        return ids, counts, features

    def _answers(self, prompts: list[Prompt], options: dict) -> list[str]:
        ids, _, features = self._encoded(prompts)
        generated = self.model.generate(ids, features=features, **options)
        return self.model.tokenizer.batch_decode(generated, skip_special_tokens=True)

    def _losses(self, prompts: list[Prompt], texts: list[list[str]]) -> list[list[tuple[float, bool]]]:
        ids, counts, features = self._encoded(prompts)
        wanted = [
            [continuation(prompt.question, row, text, self.model.tokenizer, self.system, len(own)) for text in said]
            for prompt, row, said, own in zip(prompts, counts, texts, ids, strict=True)
        ]
        longest = max(len(tokens) for row in wanted for tokens in row)
        greedy = self.model.generate(
            ids, features=features, return_dict_in_generate=True, **GREEDY, max_new_tokens=longest
        )
        scored = Continuations(self.model, ids, features, greedy.past_key_values)
        totals = scored.of_texts([prompt.question for prompt in prompts], counts, texts, self.system)
        return [
            [
                (-total / count, said[:count] == tokens)
                for (total, count), tokens in zip(of_texts, token_lists, strict=True)
            ]
            for of_texts, token_lists, said in zip(totals, wanted, greedy.sequences.tolist(), strict=True)
        ]


def make_prompt(context: str, visuals: Any) -> Prompt:
    """The prompt that shows `visuals` (of lmms-eval's `doc_to_visual`) with a context."""
    media = [_medium(visual) for visual in visuals or []]
    before, *texts = context.split(IMAGE_PLACEHOLDER)
    if len(texts) != len(media):
        before, texts = ("", ["\n"] * (len(media) - 1) + [f"\n{context}"]) if media else (context, [])
    content = [{"type": "text", "text": before}]
    for (kind, _), text in zip(media, texts, strict=True):
        content += [{"type": kind}, {"type": "text", "text": text}]
    question = Question(
        id=context, turns=({"role": "user", "content": content},), answer="", references=(), choices=(), metric="exact",
        media=tuple((kind, "") for kind, _ in media), meta={},
    )  # fmt: skip
    return Prompt(question, media)


def _medium(visual: Any) -> Medium:
    """("image" or "video", what `visual.media` loads) of an entry of `doc_to_visual`."""
    kind, source = None, visual
    if isinstance(visual, dict):
        kind, source = visual.get("type", "video"), visual.get("url") or visual.get("path")
    if isinstance(source, Image.Image):
        return "image", source
    if isinstance(source, str) and kind in (None, "image", "video"):
        is_image = Path(source).suffix.lower() in IMAGE_SUFFIXES
        return kind or ("image" if is_image else "video"), source
    raise ValueError(f"a task shows {shown(visual)}; pictures (PIL or files) and video files can be shown")


def generation_options(settings: dict) -> tuple[dict, tuple[str, ...]]:
    """Arguments of `generate`, and the texts that end an answer, of a task's `generation_kwargs`.

    Raises:
        ValueError: a setting that is not known here, and might change the answers; names it.
    """
    known = (*OWN, *PASSED_ON, *WITHOUT_MEANING)
    for key in settings:
        if key not in known:
            raise ValueError(f"generation_kwargs: {key!r} is not supported{nearest(key, known)}")
    options = {**GREEDY, "max_new_tokens": settings.get("max_new_tokens", MAX_NEW_TOKENS)}
    options |= {key: settings[key] for key in PASSED_ON if settings.get(key) is not None}
    temperature = settings.get("temperature")
    draws = settings.get("do_sample") if temperature is None else temperature > 0 and settings.get("do_sample", True)
    if draws:
        options |= {"do_sample": True, "temperature": 1.0 if temperature is None else float(temperature)}
    else:
        options |= {key: GREEDY[key] for key in ("top_p", "top_k")}  # of no meaning without drawing
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else until
    return options, tuple(text for text in until if text and text != FEW_SHOT_DELIMITER)


def cut(text: str, until: Iterable[str]) -> str:
    """`text` up to the first place where one of `until` begins."""
    return text[: min((place for end in until if (place := text.find(end)) >= 0), default=len(text))]


def _text_or_file(text: str) -> str:
    return Path(text).read_text(encoding="utf-8").strip() if text and os.path.isfile(text) else text
