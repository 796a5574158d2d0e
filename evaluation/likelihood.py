"""How likely texts are as the answer to a prompt."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from dataset.template import IGNORE_INDEX, encode_record
from evaluation.questions import Question
from model import MultiModalModel
from model.decoder import Head
from model.loss import CHUNK_LOGITS
from qwen.decoding import GrowingLayer


class Continuations:
    """Log-probabilities of what may follow B prompts.

    Prompts are read once: what the decoder keeps of them after a generation is cut back to them, and each text is read
    behind it. Where that can't be cut (sliding windows, recurrent states), prompt and text are read anew.

    Args:
        prompts: ids of each.
        features: `[M, H]` of their images and clips, or None.
        cache: what `generate` kept of these prompts, padded on the left, and of the answers; or None.
    """

    def __init__(
        self, model: MultiModalModel, prompts: list[list[int]], features: Tensor | None, cache: Cache | None = None
    ):
        self.model, self.prompts, self.features = model, prompts, features
        self.length = max(map(len, prompts))
        self.cache = cache if can_be_cut(cache) else None

    def of_texts(
        self, questions: Sequence[Question], counts: list[list[int]], texts: list[list[str]], system: str | None
    ) -> list[list[tuple[float, int]]]:
        """Sum of the log-probabilities, and number of tokens, of each of the texts that may answer each question.

        Args:
            counts: features of each image and clip of each question.
            texts: of each question; rows with fewer than others wait.
        """
        ids = [
            [continuation(q, row, text, self.model.tokenizer, system, len(prompt)) for text in own]
            for q, row, own, prompt in zip(questions, counts, texts, self.prompts, strict=True)
        ]
        found: list[list[tuple[float, int]]] = [[] for _ in questions]
        for turn in range(max(map(len, ids))):
            # A row without further texts stays in the batch, of which the cache is, and has no id to predict.
            rows = [own[turn] if turn < len(own) else [] for own in ids]
            for number, total in enumerate(self.log_probabilities(rows)):
                if turn < len(ids[number]):
                    found[number].append((total, len(rows[number])))
        return found

    @torch.no_grad()
    def log_probabilities(self, rows: list[list[int]]) -> list[float]:
        """Sum of the log-probabilities, in float32, of the ids of each row behind its prompt; 0 of no ids."""
        hidden = self._hidden_behind(rows) if self.cache is not None else self._hidden(rows)
        return summed(hidden, rows, Head(self.model.language_model))

    def _hidden_behind(self, rows: list[list[int]]) -> list[Tensor]:
        """As `_hidden`, reading but the last id of the prompts and what follows it."""
        device, longest = self.model.device, max(1, *map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), self.length - 1 + longest, dtype=torch.long)
        for number, (prompt, row) in enumerate(zip(self.prompts, rows, strict=True)):
            given = [prompt[-1], *row[:-1]]
            ids[number, : len(given)] = torch.tensor(given)
            mask[number, self.length - len(prompt) : self.length - 1 + len(given)] = 1
        cut(self.cache, self.length - 1)
        output = self.model.language_model.base_model(
            input_ids=ids.to(device), attention_mask=mask.to(device), past_key_values=self.cache, use_cache=True
        )
        return [hidden[: len(row)] for hidden, row in zip(output.last_hidden_state, rows, strict=True)]

    def _hidden(self, rows: list[list[int]]) -> list[Tensor]:
        """Of each row the hidden states `[n, H]` that predict its n ids."""
        device = self.model.device
        given = [[*prompt, *row[:-1]] for prompt, row in zip(self.prompts, rows, strict=True)]
        ids = torch.zeros(len(rows), max(map(len, given)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, own in enumerate(given):
            ids[number, : len(own)] = torch.tensor(own)
            mask[number, : len(own)] = 1
        ids[mask == 0] = given[0][-1]  # padding that is no placeholder
        output = self.model.language_model.base_model(
            input_ids=ids.to(device), features=self.features, attention_mask=mask.to(device), use_cache=False
        ).last_hidden_state
        return [
            hidden[len(prompt) - 1 : len(prompt) - 1 + len(row)]
            for hidden, prompt, row in zip(output, self.prompts, rows, strict=True)
        ]


def continuation(
    q: Question, counts: list[int], text: str, tokenizer, system: str | None, prompt_length: int
) -> list[int]:
    """Ids that training supervises in the turn that answers a question with `text`: its own and the one that ends it.

    Args:
        counts: features of each image and clip.
        prompt_length: ids of the question's prompt, with which the conversation begins.
    """
    record = {
        "id": q.id,
        "images": q.paths("image"),
        "videos": q.paths("video"),
        "messages": [*q.turns, {"role": "assistant", "content": text}],
    }
    labels = encode_record(record, tokenizer, counts, system)["labels"][prompt_length:]
    return [label for label in labels if label != IGNORE_INDEX]


def summed(hidden: list[Tensor], rows: list[list[int]], head: Head) -> list[float]:
    """Summed log-probabilities of the ids of each row, predicted from hidden states `[n, H]`; some logits at a time."""
    states = torch.cat(hidden)  # [S, H]
    targets = torch.tensor([id for row in rows for id in row], device=states.device)
    at_once = max(CHUNK_LOGITS // head.out_features, 1)
    losses = [
        F.cross_entropy(head(part).float(), target, reduction="none")
        for part, target in zip(states.split(at_once), targets.split(at_once), strict=True)
    ]
    return [-math.fsum(row.tolist()) for row in torch.cat(losses).split([len(row) for row in rows])]


def can_be_cut(cache: Cache | None) -> bool:
    """Whether a cache keeps all tokens in all layers, so that the last ones can be removed."""
    return type(cache) is DynamicCache and all(type(layer) in (DynamicLayer, GrowingLayer) for layer in cache.layers)


def cut(cache: DynamicCache, length: int) -> None:
    """Makes the cache that of its first `length` tokens."""
    cache.crop(-(cache.get_seq_length() - length))
