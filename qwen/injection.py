"""The patched forward, for any decoder of transformers: feature vectors stand where the placeholders stood.

    multimodal(LlamaForCausalLM)     the class with the patch: same name, same parameters, `features` beside `input_ids`

The patch has two halves. `InjectsFeatures` stands before the class of the decoder without its head and swaps
embeddings; `PassesFeatures` stands before the class with the head and hands features through it, in `generate()` too.
"""

from functools import cache

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .decoding import decoding_attention, let_grow


def count_placeholders(
    input_ids: torch.Tensor, features: torch.Tensor, placeholder_id: int, counts: list[int] | None = None
) -> list[int]:
    """Placeholders in each row of `input_ids` `[B, T]`, after a check that `features` `[M, H]` has one vector for each.

    `counts` says how many of the features belong to each row, so that an error can name the row.

    Raises `ValueError` if the numbers differ, in a row (with `counts`) or in total.
    """
    found = (input_ids == placeholder_id).sum(-1).tolist()
    if counts is None and len(found) == 1:
        counts = [len(features)]
    if counts is not None and len(counts) != len(found):
        raise ValueError(f"counts has {len(counts)} entries for a batch of {len(found)} rows")
    if counts is not None and list(counts) != found:
        rows = "; ".join(
            f"row {row} has {found[row]} placeholders for {counts[row]} feature vectors"
            for row in range(len(found))
            if found[row] != counts[row]
        )
        raise ValueError(f"placeholders (id {placeholder_id}) and features don't match: {rows}")
    if sum(found) != len(features):
        rows = ", ".join(f"row {row}: {count}" for row, count in enumerate(found))
        raise ValueError(
            f"placeholders (id {placeholder_id}) and features don't match: {sum(found)} placeholders ({rows}) "
            f"for {len(features)} feature vectors"
        )
    return found


def inject(
    inputs_embeds: torch.Tensor,
    input_ids: torch.Tensor,
    features: torch.Tensor,
    placeholder_id: int,
    counts: list[int] | None = None,
) -> torch.Tensor:
    """Puts the rows of `features` `[M, H]` where `input_ids` `[B, T]` has the placeholder, in row-major order.

    Returns new embeddings `[B, T, H]` in the dtype of `inputs_embeds`; gradients flow to both inputs. `counts`
    (features of each row) lets an error name the row.

    Raises `ValueError` if placeholders and features differ in number (`count_placeholders`) or in width.
    """
    if features.ndim != 2 or features.shape[1] != inputs_embeds.shape[-1]:
        raise ValueError(
            f"features must be [M, {inputs_embeds.shape[-1]}], one row per placeholder, got {list(features.shape)}"
        )
    count_placeholders(input_ids, features, placeholder_id, counts)
    return inputs_embeds.masked_scatter((input_ids == placeholder_id).unsqueeze(-1), features.to(inputs_embeds))


class InjectsFeatures:
    """For a decoder without head (`class Patched(InjectsFeatures, LlamaModel)`): its forward takes `features`."""

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        feature_counts: list[int] | None = None,
        prompt_length: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[B, T, H]` of `input_ids` `[B, T]`, already expanded, with `features` `[M, H]` injected.

        `feature_counts` (features per row) lets an error name the row. Beyond the first `prompt_length` columns, and in
        cached steps without features, a placeholder is an ordinary token: the model wrote it itself. Without
        `position_ids`, those of a row count its tokens, so that padding on the left shifts nothing.

        Raises `ValueError` where placeholders and features don't match, none included.
        """
        placeholder_id = getattr(self.config, "placeholder_id", None)
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            prompt_ids = input_ids if prompt_length is None else input_ids[:, :prompt_length]
            continues = past_key_values is not None and past_key_values.get_seq_length() > 0
            if features is None and placeholder_id is not None and not continues:
                features = inputs_embeds.new_zeros(0, inputs_embeds.shape[-1])
            if features is not None:
                inputs_embeds = self._inject(inputs_embeds, prompt_ids, features, placeholder_id, feature_counts)
            input_ids = None
        elif features is not None:
            raise ValueError("features need input_ids, which say where they stand; got inputs_embeds")
        counts_tokens = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if position_ids is None and counts_tokens and inputs_embeds is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    @staticmethod
    def _inject(inputs_embeds, prompt_ids, features, placeholder_id, feature_counts):
        if placeholder_id is None:
            raise ValueError("config.placeholder_id is not set: set it to the id that stands for a feature")
        length = prompt_ids.shape[1]
        prompt = inject(inputs_embeds[:, :length], prompt_ids, features, placeholder_id, counts=feature_counts)
        return prompt if length == inputs_embeds.shape[1] else torch.cat((prompt, inputs_embeds[:, length:]), dim=1)


class PassesFeatures:
    """For a decoder with its head, over an `InjectsFeatures`; parameter names are those of the class behind it."""

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        feature_counts: list[int] | None = None,
        prompt_length: int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits and loss as the class without the patch, features as `InjectsFeatures.forward`."""
        return super().forward(
            input_ids=input_ids,
            features=features,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            feature_counts=feature_counts,
            prompt_length=prompt_length,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        features=None,
        feature_counts=None,
        inputs_embeds=None,  # generate() looks for this name here before it accepts embeddings
        is_first_iteration=False,
        use_cache=True,
        **kwargs,
    ) -> dict:
        """Hands `features` to the forwards that see the prompt: the first, and without a cache all of them."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            use_cache=use_cache,
            **kwargs,
        )
        if is_first_iteration or not use_cache:
            inputs.update(features=features, feature_counts=feature_counts)
        return inputs

    def generate(self, *args, **kwargs):
        """transformers' `generate`, quicker (`qwen.decoding`)."""
        with decoding_attention(self):
            return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        is_given = model_kwargs.get("past_key_values") is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if not is_given:
            let_grow(model_kwargs.get("past_key_values"))

    def _expand_inputs_for_generation(
        self, expand_size=1, input_ids=None, features=None, feature_counts=None, **kwargs
    ) -> tuple[torch.Tensor, dict]:
        """Repeats each row `expand_size` times (beams, several samples), and the features of a row as a block."""
        if features is not None and expand_size > 1:
            counts = count_placeholders(input_ids, features, self.config.placeholder_id, feature_counts)
            features = torch.cat([block.repeat(expand_size, 1) for block in features.split(counts)])
            feature_counts = [count for count in counts for _ in range(expand_size)]
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        kwargs.update(features=features, feature_counts=feature_counts, prompt_length=input_ids.shape[1])
        return input_ids, kwargs


@cache
def multimodal(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A decoder class with head (`LlamaForCausalLM`) with the patch; it has the same name, which configurations record.

    Instances have the same parameters by the same names.
    """

    def __init__(self, config):
        super(patched, self).__init__(config)
        self.base_model.__class__ = _injecting(type(self.base_model))

    members = {"__init__": __init__, "__module__": model_class.__module__}
    patched = type(model_class.__name__, (PassesFeatures, model_class), members)
    return patched


@cache
def _injecting(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(model_class.__name__, (InjectsFeatures, model_class), {"__module__": model_class.__module__})
