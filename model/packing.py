"""Several samples in one row, none of which sees another: no position of a batch is padding.

A packed batch is a row `[1, T]` of samples that follow each other, with `position_ids` that start again at each of
them. From these transformers' masks tell the samples apart, for every attention implementation. With "sdpa" such a mask
would be `[1, 1, T, T]`, and attention would cost T^2 for what needs the sum of the squares of the samples' lengths. So
packed training uses "packed_sdpa" in its place, which attends to one sample at a time. "flash_attention_2" has kernels
for packed rows (`cu_seq_lens`); "eager" and "flex_attention" take the mask.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED_SDPA = "packed_sdpa"


def packed_sdpa(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sample_lengths: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' "sdpa" on one sample after the other, `[1, heads, T, d]` -> `[1, T, heads, d]`.

    Without `sample_lengths` `[N]`, on the CPU, it is "sdpa" itself.
    """
    if sample_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return _one_by_one(module, query, key, value, attention_mask, sample_lengths, **kwargs), None


@torch.compiler.disable  # it would compile anew for each number of samples
def _one_by_one(module, query, key, value, attention_mask, sample_lengths: Tensor, **kwargs) -> Tensor:
    lengths, outputs, start = sample_lengths.tolist(), [], 0
    samples = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    for states, length in zip(samples, lengths, strict=True):
        own = slice(start, start + length)
        mask = None if attention_mask is None else attention_mask[..., own, own]
        outputs.append(sdpa_attention_forward(module, *states, mask, **kwargs)[0])
        start += length
    return torch.cat(outputs, dim=1)


def packed_sdpa_mask(config, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs):
    """Nothing where a sample's own causal attention needs no mask, else transformers' mask for "sdpa".

    Layers with a window need it, and padded rows and caches do.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    is_full = kinds == {"full_attention"} and getattr(config, "sliding_window", None) is None
    if is_full and attention_mask is None and q_length == kv_length and "allow_is_bidirectional_skip" not in kwargs:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, packed_sdpa_mask)


def packed_arguments(decoder: PreTrainedModel, sample_lengths: list[int], device: torch.device) -> dict:
    """What a decoder's forward needs for a packed row `[1, T]`, beside its ids or embeddings."""
    lengths = torch.tensor(sample_lengths, dtype=torch.int32)
    ends = lengths.cumsum(0, dtype=torch.int32)
    positions = torch.arange(int(ends[-1])) - (ends - lengths).repeat_interleave(lengths)
    arguments = {"position_ids": positions.unsqueeze(0).to(device)}
    kind = decoder.config._attn_implementation
    if kind == PACKED_SDPA:
        arguments["sample_lengths"] = lengths
    elif "flash" in kind:
        cumulative = torch.cat([ends.new_zeros(1), ends]).to(device)
        longest = max(sample_lengths)
        arguments |= {"cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative}
        arguments |= {"max_length_q": longest, "max_length_k": longest}
    return arguments


def check_packed(
    input_ids: Tensor, sample_lengths: Sequence[int], feature_counts: list[int] | None, placeholder_id: int
) -> None:
    """Raises ValueError if the samples of a row `[1, T]` have other lengths, or other numbers of placeholders."""
    if feature_counts is not None and len(feature_counts) != len(sample_lengths):
        raise ValueError(f"view_counts has {len(feature_counts)} entries for {len(sample_lengths)} packed samples")
    if input_ids.shape != (1, sum(sample_lengths)):
        raise ValueError(
            f"sample_lengths add up to {sum(sample_lengths)} tokens, but input_ids have shape {list(input_ids.shape)}; "
            "a packed batch is one row [1, T]"
        )
    if feature_counts is None:
        return
    ends = torch.tensor(sample_lengths).cumsum(0)
    totals = (input_ids[0] == placeholder_id).cumsum(0).cpu()[ends - 1]
    found = totals.diff(prepend=totals.new_zeros(1)).tolist()
    if found != feature_counts:
        samples = "; ".join(
            f"sample {index} has {has} placeholders for {count} feature vectors"
            for index, (has, count) in enumerate(zip(found, feature_counts, strict=True))
            if has != count
        )
        raise ValueError(f"placeholders (id {placeholder_id}) and features don't match: {samples}")


def enable_packing(decoder: PreTrainedModel) -> None:
    """Makes a decoder ready for packed rows; those with padding it takes as before.

    Raises:
        ValueError: a sample of a packed row comes out otherwise than alone, as it does in decoders that carry a state
            from token to token instead of attending.
    """
    if decoder.config._attn_implementation == "sdpa":
        decoder.set_attn_implementation(PACKED_SDPA)
    trained = decoder.training
    decoder.eval()
    try:
        difference = _difference_to_alone(decoder)
    finally:
        decoder.train(trained)
    if math.isnan(difference):
        raise ValueError(f"{type(decoder).__name__} yields states that are no numbers: are its weights damaged?")
    # A neighbour that is seen changes everything; another shape of the products only roundings.
    if difference > 0.05:
        raise ValueError(
            f"{type(decoder).__name__} lets the samples of a packed row see each other (states differ by "
            f"{difference:.1%} from those of a sample alone): leave out train.packing"
        )


@torch.no_grad()
def _difference_to_alone(decoder: PreTrainedModel) -> float:
    """How far the last of three packed samples is from itself alone, relative to its size."""
    lengths = [7, 4, 6]
    table = decoder.get_input_embeddings().weight
    ids = torch.linspace(0, len(table) - 1, sum(lengths)).long()[None].to(table.device)
    embeddings = decoder.get_input_embeddings()(ids)
    trunk = decoder.base_model

    def states(own: slice, arguments: dict) -> Tensor:
        return trunk(inputs_embeds=embeddings[:, own], use_cache=False, **arguments).last_hidden_state[:, -6:].float()

    packed = states(slice(0, 17), packed_arguments(decoder, lengths, table.device))
    alone = states(slice(11, 17), {})
    return float((packed - alone).norm() / alone.norm())
