"""The quick parts of `generate()` compute what transformers' own do."""

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qwen.decoding import ROOM, GrowingLayer, decoding_attention, decoding_sdpa, let_grow


def states(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, length, 4)


def both() -> tuple[DynamicCache, DynamicCache]:
    """A cache of two layers as transformers has it, and one that grows."""
    ours, theirs = DynamicCache(), DynamicCache()
    for cache in (ours, theirs):
        cache.update(states(1), states(1), 1)
        for layer in cache.layers:
            layer.reset()
    let_grow(ours)
    assert all(type(layer) is GrowingLayer for layer in ours.layers)
    return ours, theirs


@torch.no_grad()
def test_growing_layers_hold_what_joined_ones_hold():
    caches = both()
    changes = {
        5: lambda cache: cache.crop(-3),
        9: lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        13: lambda cache: cache.batch_repeat_interleave(2),
        17: lambda cache: cache.batch_select_indices(torch.tensor([0, 2, 3])),
        21: lambda cache: cache.crop(-1),
        25: lambda cache: [layer.reset() for layer in cache.layers],
    }
    batch = 2
    for step in range(30):
        for layer in range(2):
            key, value = states(1 + 70 * (step % 4 == 0), batch), states(1 + 70 * (step % 4 == 0), batch)
            ours, theirs = (cache.update(key, value, layer) for cache in caches)
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        if step in changes:
            for cache in caches:
                changes[step](cache)
            batch = {13: 4, 17: 3}.get(step, batch)
        assert caches[0].get_seq_length() == caches[1].get_seq_length()


@torch.no_grad()
def test_a_step_copies_nothing_until_room_is_used_up():
    layer = GrowingLayer()
    keys, _ = layer.update(states(10), states(10))
    places = {layer.update(states(1), states(1))[0].data_ptr() for _ in range(ROOM)}
    assert places == {keys.data_ptr()}
    assert layer.update(states(1), states(1))[0].data_ptr() != keys.data_ptr()


def test_gradients_flow_through_steps():
    layer, parts = GrowingLayer(), [states(2).requires_grad_() for _ in range(3)]
    total = sum((layer.update(part, part)[0] ** 2).sum() for part in parts)
    total.backward()
    for count, part in zip((3, 2, 1), parts, strict=True):
        torch.testing.assert_close(part.grad, 2 * count * part)


@torch.no_grad()
def test_caches_that_are_not_fresh_stay_as_they_are():
    cache = DynamicCache()
    cache.update(states(3), states(3), 0)
    layer = cache.layers[0]
    let_grow(cache)
    let_grow(None)
    assert cache.layers == [layer]


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_token_is_that_of_float32(masked):
    torch.manual_seed(0)
    module = torch.nn.Module()
    query, key, value = (torch.randn(2, 3, length, 8).bfloat16() for length in (1, 9, 9))
    mask = torch.rand(2, 1, 1, 9) > 0.3 if masked else None
    found, _ = decoding_sdpa(module, query, key, value, mask)
    exact, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask)
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16())
    fused, _ = sdpa_attention_forward(module, query, key, value, mask)
    torch.testing.assert_close(found, fused, atol=2e-2, rtol=2e-2)


def test_only_generations_in_16_bits_on_a_cpu_attend_otherwise(llm):
    assert llm.config._attn_implementation == "sdpa"
    with decoding_attention(llm):
        assert llm.config._attn_implementation == "sdpa"
    llm.bfloat16()
    with decoding_attention(llm):
        assert llm.config._attn_implementation == "decoding_sdpa"
    assert llm.config._attn_implementation == "sdpa"
    ids = torch.arange(12).view(2, 6)
    found = llm.generate(ids, do_sample=False, max_new_tokens=9, return_dict_in_generate=True, output_logits=True)
    logits = llm(found.sequences).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(found.logits, 1), logits.float(), atol=0.1, rtol=0.05)
    assert all(isinstance(layer, GrowingLayer) for layer in found.past_key_values.layers)
