"""How likely a model finds an answer that is given, and what it would have said in its place."""

from typing import NamedTuple

import torch
from torch import Tensor

from model import MultiModalModel
from model.decoder import Head
from model.loss import CHUNK_LOGITS


class Scores(NamedTuple):
    """Of each of K variants of the features, and each of the A tokens of an answer.

    Attributes:
        log_p: [K, A] log-probability of the token after those before it, natural logarithm.
        top: [K, A] id of the likeliest token in its place.
    """

    log_p: Tensor
    top: Tensor


@torch.no_grad()  # and not inference mode: what the decoder keeps must serve training as well
def score(model: MultiModalModel, prompt: list[int], answer: list[int], features: Tensor) -> Scores:
    """Scores of `answer` after `prompt` with each variant of its features `[K, M, H]`."""
    rows = torch.tensor([[*prompt, *answer]], device=model.device).expand(len(features), -1)
    hidden = model.language_model.base_model(
        input_ids=rows, features=features.flatten(0, 1), use_cache=False
    ).last_hidden_state[:, len(prompt) - 1 : -1]  # [K, A, H]
    head, target = Head(model.language_model), rows[:, len(prompt) :].flatten()
    log_p, top = [], []
    at_once = max(1, CHUNK_LOGITS // head.out_features)  # logits of a long answer would not fit into memory
    for states, ids in zip(hidden.flatten(0, 1).split(at_once), target.split(at_once), strict=True):
        logits = head(states).float()
        log_p.append(logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0])
        top.append(logits.argmax(-1))
    shape = len(features), len(answer)
    return Scores(torch.cat(log_p).view(shape), torch.cat(top).view(shape))


def words(model: MultiModalModel, ids: list[int]) -> list[int]:
    """Generated ids without those that end an answer, and without placeholders.

    A model that has hardly been trained may say a placeholder; in a prompt it would stand for a picture.
    """
    return [id for id in ids if id not in model.tokenizer.stop_ids and id != model.placeholder_id]


def answer_tokens(answer: list[int], token: int | None) -> list[int]:
    """Which tokens of an answer a map is about: the one asked for, or all.

    Raises:
        ValueError: the answer is empty, or has no such token.
    """
    if not answer:
        raise ValueError("the answer is empty: there is no token to explain")
    if token is not None and not 0 <= token < len(answer):
        raise ValueError(f"token {token} was asked for, but the answer has {len(answer)}, numbered from 0")
    return list(range(len(answer))) if token is None else [token]
