"""Likelihoods of answers: those of the training loss, behind a kept prompt or read anew, in any batch."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from build import build_model
from dataset.template import IGNORE_INDEX, encode_record
from evaluation.answering import Asking, answer_batch, respond
from evaluation.likelihood import can_be_cut
from evaluation.questions import make_question
from tests.model.families import make_decoder


def question(number: int, tiny, **meta):
    record = tiny.records(24)[number]
    return make_question({**record, "videos": [], "audios": [], "meta": meta})


def features(model, tiny, questions) -> list[list[torch.Tensor]]:
    with torch.no_grad():
        return [
            [model.encode_images(model.media.load("image", tiny.folder / "images" / path).pixel_values)
             for path in q.paths("image")] for q in questions
        ]  # fmt: skip


def by_the_loss(model, q, text: str, shown: list[torch.Tensor]) -> tuple[float, int]:
    """Log-probability of `text` and number of its tokens, from the loss that training takes."""
    record = {"id": q.id, "images": q.paths("image"), "videos": [],
              "messages": [*q.turns, {"role": "assistant", "content": text}]}  # fmt: skip
    sample = encode_record(record, model.tokenizer, [len(one) for one in shown])
    labels = torch.tensor([sample["labels"]])
    ids = torch.tensor([sample["input_ids"]])
    # Former answers of the conversation are supervised in training, here they are given.
    header = torch.where(labels[0] == IGNORE_INDEX)[0]
    last = max(int(place) for place in header if labels[0, int(place) + 1 : int(place) + 2].ne(IGNORE_INDEX).any())
    labels[0, : last + 1] = IGNORE_INDEX
    tokens = int((labels != IGNORE_INDEX).sum())
    with torch.no_grad():
        loss = model(ids, features=torch.cat(shown) if shown else None, labels=labels).loss
    return -loss.item() * tokens, tokens


@pytest.mark.parametrize("kept", [True, False])
def test_likelihoods_are_those_of_the_loss(model, tiny, kept, monkeypatch):
    """Prompts of different lengths, with and without pictures, several turns, choices of different lengths."""
    if not kept:
        monkeypatch.setattr("evaluation.likelihood.can_be_cut", lambda cache: False)
    choices = {0: ["red", "a very dark green", "b"], 1: ["Yes, green.", "No"]}
    questions = [question(n, tiny, **({"choices": choices[n]} if n in choices else {})) for n in (0, 1, 2, 4, 7)]
    shown = features(model, tiny, questions)
    results = respond(model, questions, shown, Asking(("real",), max_new_tokens=3, perplexity=True))
    for q, own, result in zip(questions, shown, results, strict=True):
        total, tokens = by_the_loss(model, q, q.answer, own)
        assert result["nll"] == pytest.approx(-total, abs=2e-5) and result["tokens"] == tokens
        expected = [by_the_loss(model, q, text, own) for text in q.choices]
        assert result.get("likelihood_sums", []) == pytest.approx([total for total, _ in expected], abs=2e-5)
        assert result.get("likelihoods", []) == pytest.approx([total / n for total, n in expected], abs=2e-5)
        alone = respond(model, [q], [own], Asking(("real",), max_new_tokens=3, perplexity=True))[0]
        assert alone["nll"] == pytest.approx(result["nll"], abs=2e-5) and alone["answer"] == result["answer"]


@pytest.mark.parametrize(("family", "is_kept"), [("qwen2", True), ("gpt2", True), ("gemma2", False)])
def test_other_decoders(family, is_kept, tiny, tmp_path, monkeypatch):
    """With position vectors, with windows shorter than the texts, with squashed logits."""
    make_decoder(family, tmp_path / "decoder")
    torch.manual_seed(0)
    options = (f"model.decoder={tmp_path}/decoder", "model.lora.targets=[]", "projector.init_std=1")
    model = build_model(tiny.config(tmp_path / "run", *options).model).eval()
    kept = []
    monkeypatch.setattr("evaluation.likelihood.can_be_cut", lambda cache: kept.append(can_be_cut(cache)) or kept[-1])
    questions = [question(0, tiny, choices=["red", "a dark green"]), question(4, tiny), question(7, tiny)]
    shown = features(model, tiny, questions)
    results = respond(model, questions, shown, Asking(("real",), max_new_tokens=3, perplexity=True))
    assert kept == [is_kept]
    for q, own, result in zip(questions, shown, results, strict=True):
        assert result["nll"] == pytest.approx(-by_the_loss(model, q, q.answer, own)[0], abs=5e-5)
        expected = [by_the_loss(model, q, text, own)[0] for text in q.choices]
        assert result.get("likelihood_sums", []) == pytest.approx(expected, abs=5e-5)


def test_likelihoods_change_no_answer(model, tiny):
    questions = [question(n, tiny) for n in range(8)]
    shown = features(model, tiny, questions)
    results = respond(model, questions, shown, Asking(("real",), max_new_tokens=5, perplexity=True))
    assert [result["answer"] for result in results] == answer_batch(model, questions, shown, 5, None)


def test_the_prompt_is_read_once(model, tiny, monkeypatch):
    lengths = []
    base = model.language_model.base_model
    original = base.forward
    monkeypatch.setattr(base, "forward", lambda input_ids, **kw: lengths.append(input_ids.shape[1])
                        or original(input_ids=input_ids, **kw))  # fmt: skip
    q = question(0, tiny, choices=["red", "blue"])
    respond(model, [q], features(model, tiny, [q]), Asking(("real",), max_new_tokens=2, perplexity=True))
    assert lengths[0] > 20 and max(lengths[1:]) < 8


def test_which_caches_can_be_cut():
    assert can_be_cut(DynamicCache()) and not can_be_cut(None)
    sliding = DynamicCache()
    sliding.layers = [DynamicSlidingWindowLayer(sliding_window=4)]
    assert not can_be_cut(sliding)
