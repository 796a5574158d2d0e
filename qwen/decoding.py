"""What makes a step of `generate()` quick, for any decoder: a cache that copies nothing, attention of a single token.

A step of transformers' `DynamicCache` joins the keys and values of all former tokens with those of one more, and so
copies all of them. `GrowingLayer` keeps them in memory that has room for more.

On a CPU, torch's fused attention in bfloat16 takes several times as long for a single query as in float32. In a
generation "sdpa" therefore attends in float32 there: no product is rounded that was not before.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ROOM = 128  # tokens that memory is taken for beyond those that are there
DECODING_SDPA = "decoding_sdpa"


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values `[B, heads, T, d]` are the beginning of larger tensors.

    New tokens are written behind them in place. Where gradients are recorded it joins as a `DynamicLayer` does: a
    backward pass needs what earlier steps saw.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._buffers: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        self.keys = self._appended("keys", self.keys, length, key_states)
        self.values = self._appended("values", self.values, length, value_states)
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._buffers.clear()

    def _appended(self, name: str, held: torch.Tensor, length: int, new: torch.Tensor) -> torch.Tensor:
        """`held` with `length` tokens and behind them `new`, all in the buffer of this name."""
        total = length + new.shape[-2]
        buffer = self._buffers.get(name)
        # Beams, crops and the like put other tensors in the place of `keys` and `values`.
        begins = buffer is not None and held.data_ptr() == buffer.data_ptr() and held.shape[:-2] == buffer.shape[:-2]
        if not begins or total > buffer.shape[-2]:
            buffer = new.new_empty(*new.shape[:-2], total + ROOM, new.shape[-1])
            if length:
                buffer[..., :length, :] = held
            self._buffers[name] = buffer
        buffer[..., length:total, :] = new
        return buffer[..., :total, :]


def let_grow(cache: Cache | None) -> None:
    """Makes the layers of a `DynamicCache` that is still empty `GrowingLayer`s; leaves all else as it is."""
    if type(cache) is DynamicCache and not cache.offloading and not cache.get_seq_length():
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]


@contextmanager
def decoding_attention(decoder: PreTrainedModel) -> Iterator[None]:
    """Within it a decoder that has "sdpa" has "decoding_sdpa", where that makes a difference."""
    config, before = decoder.config, decoder.config._attn_implementation
    if before == "sdpa" and decoder.device.type == "cpu" and decoder.dtype != torch.float32:
        config._attn_implementation = DECODING_SDPA
    try:
        yield
    finally:
        config._attn_implementation = before


def decoding_sdpa(
    module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa", `[B, heads, T, d]` -> `[B, T, heads, d]`; in float32 for a single query on a CPU."""
    dtype = query.dtype
    if query.shape[2] == 1 and query.device.type == "cpu" and dtype != torch.float32:
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output.to(dtype), None


AttentionInterface.register(DECODING_SDPA, decoding_sdpa)
AttentionMaskInterface.register(DECODING_SDPA, sdpa_mask)
