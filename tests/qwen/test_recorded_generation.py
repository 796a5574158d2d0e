"""Greedy decoding against the original: its uncached numbers in general, its cached ones with the frozen alpha."""

import pytest
import torch

LOGITS = {"atol": 2e-4, "rtol": 0}


def greedy(model, input_ids: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """24 new tokens: sequences `[B, T + 24]` and the logits that chose them `[B, 24, V]`."""
    output = model.generate(
        input_ids, max_new_tokens=24, do_sample=False, return_dict_in_generate=True, output_logits=True, **kwargs
    )
    return output.sequences, torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("prompt", ["P20", "P50", "P8"])
def test_present_alpha_gives_the_recorded_uncached_decoding(llm, recorded, prompt, use_cache):
    data = recorded("d_generate")
    sequences, logits = greedy(llm, data[f"{prompt}.prompt"], use_cache=use_cache)
    assert torch.equal(sequences, data[f"{prompt}.uncached.sequences"])
    if prompt != "P8":
        torch.testing.assert_close(logits, data[f"{prompt}.uncached.logits"], **LOGITS)


@pytest.mark.parametrize("prompt", ["P20", "P50", "P8"])
def test_frozen_alpha_gives_the_recorded_cached_decoding(llm, recorded, prompt):
    llm.config.ntk_alpha_mode = "frozen"
    data = recorded("d_generate")
    sequences, logits = greedy(llm, data[f"{prompt}.prompt"])
    assert torch.equal(sequences, data[f"{prompt}.cached.sequences"])
    torch.testing.assert_close(logits, data[f"{prompt}.cached.logits"], **LOGITS)


@pytest.mark.parametrize("prompt", ["P20", "P50"])
def test_cached_steps_on_recorded_ids_equal_recorded_full_forwards(llm, recorded, prompt):
    data = recorded("d_generate")
    sequence, start = data[f"{prompt}.cached.sequences"], data[f"{prompt}.prompt"].shape[1]
    output, logits = llm(sequence[:, :start], use_cache=True), []
    for end in range(start, start + 24):
        logits.append(output.logits[:, -1])
        output = llm(sequence[:, end : end + 1], past_key_values=output.past_key_values)
    recorded_logits = data[f"{prompt}.uncached_on_cached_ids.logits"]
    torch.testing.assert_close(torch.stack(logits, dim=1), recorded_logits, **LOGITS)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("P20.nontk", {"use_dynamic_ntk": False}),
        ("P20.nontk_nologn", {"use_dynamic_ntk": False, "use_logn_attn": False}),
    ],
)
def test_extrapolations_off(llm, recorded, case, changes):
    for name, value in changes.items():
        setattr(llm.config, name, value)
    data = recorded("d_generate")
    sequences, logits = greedy(llm, data["P20.prompt"])
    assert torch.equal(sequences, data[f"{case}.cached.sequences"])
    torch.testing.assert_close(logits, data[f"{case}.cached.logits"], **LOGITS)


def test_a_foreign_forward_changes_nothing(llm, recorded):
    # In the original the alpha of the last full forward, of whatever text, rotated the next cached step.
    llm.config.ntk_alpha_mode = "frozen"
    data = recorded("d_generate")
    output = llm(data["P20.prompt"], use_cache=True)
    llm(data["P50.prompt"])
    token = data["P20.cached.sequences"][:, 20:21]
    logits = llm(token, past_key_values=output.past_key_values).logits[:, -1]
    torch.testing.assert_close(logits, data["P20.cached.logits"][:, 1], **LOGITS)
    assert (logits - data["hazard.step1_logits_after_foreign_full_forward"]).abs().max() > 1


def test_a_chunk_is_causal(llm, recorded):
    # In the original every query of a cached chunk saw all keys.
    data = recorded("d_generate")
    ids = data["chunk.input_ids"]
    past = llm(ids[:, :20], use_cache=True).past_key_values
    logits = llm(ids[:, 20:], past_key_values=past).logits
    torch.testing.assert_close(logits, data["chunk.full_forward_logits"][:, 20:], **LOGITS)
    assert ((logits - data["chunk.second_part_logits"]).abs().amax(-1) > 0.5).all()


def test_batch_of_two(llm, recorded):
    # The original's generate() failed for more than one row.
    llm.config.ntk_alpha_mode = "frozen"
    data = recorded("d_generate")
    sequences, logits = greedy(llm, data["batch2.prompt"])
    assert torch.equal(sequences, data["batch2.cached_nomask.sequences"])
    torch.testing.assert_close(logits, data["batch2.cached_nomask.logits"], **LOGITS)


@pytest.mark.parametrize(
    ("mode", "file", "case"),
    [
        ("length", "d_generate", "batch2.leftpad.uncached"),
        ("frozen", "d_generate_stock_batch", "leftpad.cached"),
    ],
)
def test_left_padded_batch(llm, recorded, mode, file, case):
    llm.config.ntk_alpha_mode = mode
    prompts, data = recorded("d_generate"), recorded(file)
    ids, mask = prompts["batch2.leftpad.prompt"], prompts["batch2.leftpad.attention_mask"]
    sequences, logits = greedy(llm, ids, attention_mask=mask)
    assert torch.equal(sequences[0], data[f"{case}.sequences"][0])
    torch.testing.assert_close(logits[0], data[f"{case}.logits"][0], **LOGITS)
    # Row 1 has six pads. Beyond seq_length the original took its log-n factor from the padded index, and its alpha from
    # the batch; up to there it is right. Ours equals the row alone throughout.
    torch.testing.assert_close(logits[1, :13], data[f"{case}.logits"][1, :13], **LOGITS)
    alone_sequences, alone_logits = greedy(llm, ids[1:, mask[1].bool()])
    assert torch.equal(sequences[1, 6:], alone_sequences[0])
    torch.testing.assert_close(logits[1], alone_logits[0], **LOGITS)


@pytest.mark.parametrize("case", ["e3", "e4"])
def test_images_with_frozen_alpha(llm, recorded, expand, case):
    llm.config.ntk_alpha_mode = "frozen"
    data = recorded("e_inject")
    features = data[f"{case}.images"][0]
    prompt = expand(data[f"{case}.prompt"], len(features))
    sequences, logits = greedy(llm, prompt, features=features)
    # Recorded with the one placeholder not expanded.
    assert torch.equal(sequences[:, prompt.shape[1] :], data[f"{case}.cached.sequences"][:, 12:])
    torch.testing.assert_close(logits, data[f"{case}.cached.logits"], **LOGITS)


@pytest.mark.parametrize("case", ["e3", "e4"])
def test_images_with_present_alpha(llm, recorded, expand, case):
    data = recorded("e_inject")
    features, new = data[f"{case}.images"][0], data[f"{case}.cached.sequences"][:, 12:]
    output, logits = llm(expand(data[f"{case}.prompt"], len(features)), features, use_cache=True), []
    for step in range(24):
        logits.append(output.logits[:, -1])
        output = llm(new[:, step : step + 1], past_key_values=output.past_key_values)
    recorded_logits = data[f"{case}.uncached_on_cached_ids.logits"]
    torch.testing.assert_close(torch.stack(logits, dim=1), recorded_logits, **LOGITS)
