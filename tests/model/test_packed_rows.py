"""model/packing.py: a sample of a packed row is the sample alone."""

import pytest
import torch
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from build import build_model
from dataset.collator import Collator
from model.decoder import load_decoder
from model.packing import PACKED_SDPA, enable_packing, packed_arguments
from tests.model.families import FAMILIES, make_decoder

LENGTHS = [30, 1, 9, 24]  # one longer than the windows of the families that have one


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return {family: make_decoder(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def embeddings(decoder, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, sum(LENGTHS), decoder.config.hidden_size, generator=generator).requires_grad_()


def difference(first, second):
    return (first - second).abs().max().item() / second.abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_are_the_samples_alone(places, family, attention):
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("its softcapped attention scores need the eager implementation")
    decoder = load_decoder(places[family], torch.float32, attn_implementation=attention)
    enable_packing(decoder)
    trunk, inputs = decoder.base_model, embeddings(decoder)
    weights = torch.randn(sum(LENGTHS), decoder.config.hidden_size, generator=torch.Generator().manual_seed(1))
    packed = trunk(inputs_embeds=inputs, use_cache=False, **packed_arguments(decoder, LENGTHS, inputs.device))
    packed = packed.last_hidden_state[0]
    (gradient,) = torch.autograd.grad((packed * weights).sum(), inputs)
    start = 0
    for length in LENGTHS:
        own = slice(start, start + length)
        alone_inputs = inputs[:, own].detach().requires_grad_()
        alone = trunk(inputs_embeds=alone_inputs, use_cache=False).last_hidden_state[0]
        (alone_gradient,) = torch.autograd.grad((alone * weights[own]).sum(), alone_inputs)
        assert difference(packed[own], alone) < 1e-5
        assert difference(gradient[:, own], alone_gradient) < 1e-5
        start += length


class Forgetful(torch.nn.Module):
    """A trunk whose states run on from token to token, as those of recurrent decoders do."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, **kwargs):
        output = self.trunk(**kwargs)
        output.last_hidden_state = output.last_hidden_state.cumsum(1)
        return output


def test_decoders_that_mix_samples_are_refused(places, monkeypatch):
    decoder = load_decoder(places["llama"], torch.float32)
    leaking = Forgetful(decoder.base_model)
    monkeypatch.setattr(type(decoder), "base_model", property(lambda self: leaking))
    with pytest.raises(ValueError, match="lets the samples of a packed row see each other"):
        enable_packing(decoder)


def test_padded_rows_and_generation_are_as_before(places):
    ids = torch.arange(3, 43).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    before = load_decoder(places["mistral"], torch.float32, attn_implementation="sdpa")
    after = load_decoder(places["mistral"], torch.float32, attn_implementation="sdpa")
    enable_packing(after)
    assert after.config._attn_implementation == PACKED_SDPA
    with torch.no_grad():
        torch.testing.assert_close(after(ids, attention_mask=mask).logits, before(ids, attention_mask=mask).logits)
        torch.testing.assert_close(after(ids).logits, before(ids).logits)
    for cache in (None, "static"):
        options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
        expected = before.generate(ids, attention_mask=mask, **options)
        assert torch.equal(after.generate(ids, attention_mask=mask, **options), expected)


def test_full_attention_makes_no_mask(places):
    decoder = load_decoder(places["llama"], torch.float32, attn_implementation="sdpa")
    enable_packing(decoder)
    masks = []
    for layer in decoder.base_model.layers:
        layer.register_forward_pre_hook(lambda _, __, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    inputs = embeddings(decoder)
    decoder.base_model(inputs_embeds=inputs, use_cache=False, **packed_arguments(decoder, LENGTHS, inputs.device))
    assert masks == [None, None]


def test_weights_that_are_no_numbers_are_named(places):
    decoder = load_decoder(places["llama"], torch.float32)
    decoder.base_model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="yields states that are no numbers"):
        enable_packing(decoder)


@pytest.fixture(scope="module")
def model(tiny):
    return build_model(tiny.config("unused").model).eval()


def packed_batch(model, views=(1, 0, 2)):
    """Three samples of the model's vocabulary with so many pictures, and the row that they are packed into."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number, count in enumerate(views):
        ids = torch.randint(0, 200, (5 + 3 * number,), generator=generator).tolist()
        ids[2:2] = [model.placeholder_id] * (count * model.media.num_features)
        pixels = torch.randn(count, 3, 16, 16, generator=generator) if count else None
        labels = [-100] * (len(ids) - 4) + ids[-4:]
        features = [model.media.num_features] * count
        samples.append({"input_ids": ids, "labels": labels, "pixel_values": pixels, "view_features": features})
    return samples, Collator(0, packing=True)(samples)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_pictures_give_the_logits_of_the_samples_alone(model, attention):
    model.language_model.set_attn_implementation(attention)
    enable_packing(model.language_model)
    samples, batch = packed_batch(model)
    with torch.no_grad():
        packed = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[0]
        alone = [model(torch.tensor([s["input_ids"]]), s["pixel_values"]).logits[0] for s in samples]
    assert difference(packed, torch.cat(alone)) < 1e-5


def test_a_swapped_placeholder_names_the_sample(model):
    _, batch = packed_batch(model)
    batch["view_counts"] = torch.tensor([2, 0, 1])
    with pytest.raises(ValueError, match="sample 0 has 4 placeholders for 8 feature vectors; sample 2 has 8"):
        model(**batch)


def test_lengths_that_do_not_add_up_are_refused(model):
    _, batch = packed_batch(model)
    batch["sample_lengths"][0] += 1
    with pytest.raises(ValueError, match="sample_lengths add up to"):
        model(**batch)
    _, batch = packed_batch(model)
    batch["view_counts"] = batch["view_counts"][:2]
    with pytest.raises(ValueError, match="view_counts has 2 entries for 3 packed samples"):
        model(**batch)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_masks_and_positions_beside_the_lengths_are_refused(model, name):
    _, batch = packed_batch(model)
    with pytest.raises(ValueError, match="leave out attention_mask and position_ids"):
        model(**batch, **{name: torch.ones_like(batch["input_ids"])})


def test_flash_attention_gets_the_borders_that_transformers_finds_by_positions(places):
    decoder = load_decoder(places["llama"], torch.float32)
    decoder.config._attn_implementation = "flash_attention_2"
    arguments = packed_arguments(decoder, LENGTHS, torch.device("cpu"))
    (borders, _), (longest, _) = prepare_fa_kwargs_from_position_ids(arguments["position_ids"])
    assert torch.equal(arguments["cu_seq_lens_q"], borders) and torch.equal(arguments["cu_seq_lens_k"], borders)
    assert arguments["cu_seq_lens_q"].dtype == borders.dtype == torch.int32
    assert arguments["max_length_q"] == arguments["max_length_k"] == longest
