"""Cached decoding equals plain forwards across `seq_length` (32) and its double, for every way of filling a cache."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

CLOSE = {"atol": 2e-4, "rtol": 0}
GREEDY = {"do_sample": False, "max_new_tokens": 40}


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids `[B, total]` and a mask with so many tokens in each row, at the right."""
    mask = torch.stack([torch.arange(total) >= total - length for length in lengths]).long()
    return random_ids(len(lengths), total) * mask, mask


@torch.no_grad()
def test_steps_of_padded_rows_equal_each_row_alone(llm):
    # Rows cross 32 and 64 at different steps; one never does.
    ids, mask = left_padded([70, 51, 25], 70)
    output = llm(ids[:, :20], attention_mask=mask[:, :20], use_cache=True)
    for end in range(21, 71):
        cache = output.past_key_values
        output = llm(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
        for row in range(3):
            if mask[row, end - 1]:
                alone = llm(ids[row, :end][mask[row, :end].bool()][None]).logits[0, -1]
                torch.testing.assert_close(output.logits[row, -1], alone, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("mask_given", [True, False])
@pytest.mark.parametrize("size", [1, 7, 33])
def test_chunks_equal_the_full_forward_up_to_their_end(llm, size, mask_given):
    ids = random_ids(2, 70)
    cache = DynamicCache(config=llm.config)
    for start in range(0, 70, size):
        chunk = ids[:, start : start + size]
        end = start + chunk.shape[1]
        mask = torch.ones(2, end, dtype=torch.long) if mask_given else None
        logits = llm(chunk, attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(logits, llm(ids[:, :end]).logits[:, start:], **CLOSE)
    assert cache.get_seq_length() == 70


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prefill_chunk_size": 9},
        {"cache_implementation": "static"},
        {"max_new_tokens": 12, "prompt_lookup_num_tokens": 4},
    ],
    ids=str,
)
def test_generate_equals_generate_without_cache(llm, arguments):
    ids, mask = left_padded([28, 28 if "prompt_lookup_num_tokens" in arguments else 17], 28)
    if "prompt_lookup_num_tokens" in arguments:  # takes one row; a repeated text makes it guess, also across 32
        ids, mask = random_ids(1, 7).repeat(1, 4), mask[:1]
    cached = llm.generate(ids, attention_mask=mask, **{**GREEDY, **arguments})
    searching = ("num_beams", "num_return_sequences", "max_new_tokens")
    plain = {key: value for key, value in arguments.items() if key in searching}
    uncached = llm.generate(ids, attention_mask=mask, use_cache=False, **{**GREEDY, **plain})
    assert torch.equal(cached, uncached)


@torch.no_grad()
def test_a_cropped_cache_goes_back_to_the_alpha_of_its_length(llm):
    ids = random_ids(1, 40)
    cache = llm(ids, use_cache=True).past_key_values
    cache.crop(-12)
    logits = llm(ids[:, 28:31], past_key_values=cache).logits
    torch.testing.assert_close(logits, llm(ids[:, :31]).logits[:, 28:], **CLOSE)


@torch.no_grad()
def test_two_generations_in_turn_share_nothing(llm):
    first, second = random_ids(1, 45), random_ids(2, 75, seed=1)
    caches = [DynamicCache(config=llm.config) for _ in range(2)]
    for end in range(30, 45):
        for ids, cache, offset in ((first, caches[0], 0), (second, caches[1], 30)):
            start = cache.get_seq_length()
            logits = llm(ids[:, start : end + offset], past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(logits, llm(ids[:, : end + offset]).logits[:, -1], **CLOSE)


@torch.no_grad()
def test_a_static_cache_follows_alpha(llm):
    ids = random_ids(2, 40)
    cache = StaticCache(config=llm.config, max_cache_len=48)
    llm(ids[:, :30], past_key_values=cache)
    for end in range(31, 41):
        logits = llm(ids[:, end - 1 : end], past_key_values=cache).logits
        torch.testing.assert_close(logits[:, -1], llm(ids[:, :end]).logits[:, -1], **CLOSE)


@torch.no_grad()
def test_a_step_across_the_boundary_returns_only_its_own_states(llm):
    ids = random_ids(1, 33)
    past = llm(ids[:, :32], use_cache=True).past_key_values
    output = llm(ids[:, 32:], past_key_values=past, output_hidden_states=True)
    assert [list(states.shape) for states in output.hidden_states] == [[1, 1, 64]] * 4
    full = llm(ids, output_hidden_states=True)
    for states, expected in zip(output.hidden_states, full.hidden_states, strict=True):
        torch.testing.assert_close(states, expected[:, -1:], **CLOSE)


def test_frozen_alpha_is_that_of_the_first_forward(llm):
    llm.config.ntk_alpha_mode = "frozen"
    ids = random_ids(1, 50)
    with torch.no_grad():
        cache = llm(ids[:, :20], use_cache=True).past_key_values
        stepped = torch.cat([llm(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 50)], dim=1)
        llm.config.use_dynamic_ntk = False  # alpha 1 throughout, as at length 20
        expected = llm(ids).logits[:, 20:]
    torch.testing.assert_close(stepped, expected, **CLOSE)


@pytest.mark.parametrize("trained", [slice(0, 20), slice(20, 30)])
def test_a_cache_without_embeddings_is_refused_beyond_seq_length(llm, trained):
    ids, past = random_ids(1, 40), DynamicCache(config=llm.config)
    for part in (slice(0, 20), slice(20, 30)):
        llm.train(part == trained)(ids[:, part], past_key_values=past)
    llm.eval()(ids[:, 30:32], past_key_values=past)
    with pytest.raises(ValueError, match="holds 32 tokens without their embeddings.*seq_length=32"):
        llm(ids[:, 32:], past_key_values=past)


def test_a_mask_of_the_wrong_length_is_refused(llm):
    ids = random_ids(1, 10)
    past = llm(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"1 columns, expected 11 \(10 cached \+ 1 new"):
        llm(ids[:, :1], attention_mask=torch.ones(1, 1), past_key_values=past)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        llm()


def test_generate_with_a_cache_goes_on_where_it_ended(llm):
    ids = random_ids(1, 25)
    first = llm.generate(ids, do_sample=False, max_new_tokens=10, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, random_ids(1, 3, seed=2)], dim=1)
    again = llm.generate(longer, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(again, llm.generate(longer, **GREEDY))
