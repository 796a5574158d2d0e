"""Attention and rollout against transformers' own weights and a naive product."""

import pytest
import torch
from seeing import DECODER, PLACEHOLDER, make_model, noise, prompt_of
from transformers import GPT2Config, Qwen3NextConfig

from looking import explain
from looking.attention import answer_attention, rollout, with_weights
from qwen import QWenConfig
from visual.media import Views

QWEN = QWenConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, kv_channels=8, intermediate_size=64,
    seq_length=128, initializer_range=0.3,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0, attn_pdrop=0)
ANSWER = [11, 12, 13]
CONFIGS = {"qwen1": QWEN, "qwen2": DECODER, "gpt2": GPT2}


@pytest.fixture(params=CONFIGS)
def model(request, tmp_path):
    model = make_model(tmp_path, config=CONFIGS[request.param])
    model.language_model.set_attn_implementation("sdpa")
    return model


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(3))


def weights(model, ids, features) -> list[torch.Tensor]:
    """[heads, T, T] of each layer, as transformers returns them."""
    model.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(torch.tensor([ids]), features=features, output_attentions=True)
    return [layer[0] for layer in output.attentions]


def test_attention_is_that_of_transformers(model, features):
    prompt = prompt_of(16)
    found = answer_attention(model, prompt, ANSWER, features, token=1)
    whole = answer_attention(model, prompt, ANSWER, features)
    expected = torch.stack(weights(model, prompt + ANSWER, features))
    places = [i for i, token in enumerate(prompt) if token == PLACEHOLDER]
    # The position before the answer's second token predicts it.
    torch.testing.assert_close(found, expected[:, :, len(prompt)][..., places])
    torch.testing.assert_close(whole, expected[:, :, len(prompt) - 1 : -1][..., places].mean(2))
    assert found.shape == (len(expected), 4, 16) and (found.sum(-1) < 1).all() and (found > 0).all()


def test_rollout_is_a_product_of_mixtures(model, features):
    prompt = prompt_of(16)
    found = rollout(model, prompt, ANSWER, features, token=2)
    mostly_itself = rollout(model, prompt, ANSWER, features, token=2, residual=0.9)
    product = {0.5: None, 0.9: None}
    for residual in product:
        for layer in weights(model, prompt + ANSWER, features):
            mixture = residual * torch.eye(layer.shape[-1]) + (1 - residual) * layer.mean(0)
            torch.testing.assert_close(mixture.sum(-1), torch.ones(len(mixture)))
            product[residual] = mixture if product[residual] is None else mixture @ product[residual]
    row, places = len(prompt) + 1, [i for i, token in enumerate(prompt) if token == PLACEHOLDER]
    torch.testing.assert_close(found, product[0.5][row, places])
    torch.testing.assert_close(mostly_itself, product[0.9][row, places])


def test_the_decoder_stays_as_it_was(model, features):
    """Another thread may be generating with it: neither its settings nor its outputs change, nor does memory double."""
    prompt = prompt_of(16)
    ids = torch.tensor([prompt])
    before = model(ids, features=features).logits
    answer_attention(model, prompt, ANSWER, features)
    assert model.language_model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids, features=features).logits, before)
    own = with_weights(model.language_model)
    assert all(a is b for a, b in zip(own.parameters(), model.language_model.parameters(), strict=True))


def test_shares_of_pooled_features_are_spread_over_their_patches(tmp_path):
    """A frame's 2 x 2 features stand for 4 x 4 patches; shares add up to the attention that the features get."""
    model = make_model(tmp_path, frame_pooling=2)
    pixels = noise(3)
    clip, image = Views(pixels[:2], [4, 4]), Views(pixels[2:], [16])
    maps = explain(model, prompt_of(8, 16), [clip, image], ANSWER, "attention")
    assert [(one.picture, one.frame) for one in maps] == [(0, 0), (0, 1), (1, None)]
    features = model.encode_images(pixels, [4, 4, 16])
    expected = answer_attention(model, prompt_of(8, 16), ANSWER, features).mean((0, 1))
    for one, own in zip(maps, expected.split([4, 4, 16]), strict=True):
        assert one.values.sum() == pytest.approx(float(own.sum()), rel=1e-5)
    frame = torch.from_numpy(maps[1].values)
    assert torch.equal(frame[:2, 2:], frame[0, 2].expand(2, 2))
    torch.testing.assert_close(frame[::2, ::2].flatten() * 4, expected[4:8])
    torch.testing.assert_close(torch.from_numpy(maps[2].values).flatten(), expected[8:])
    assert len({one.limit for one in maps}) == 1 and maps[0].limit == max(one.values.max() for one in maps)


def test_shares_after_pixel_shuffle(tmp_path):
    model = make_model(tmp_path, shuffle=2)
    views = Views(noise(1), [4])
    (found,) = explain(model, prompt_of(4), [views], ANSWER, "rollout")
    expected = rollout(model, prompt_of(4), ANSWER, model.encode_images(views.pixel_values))
    assert found.values[::2, ::2].flatten() * 4 == pytest.approx(expected.numpy(), rel=1e-5)


def test_tiles_and_overview_share_the_picture(tmp_path):
    """A patch of the overview is as wide as two of the tiles, which have half of its share each."""
    model = make_model(tmp_path, squash=True, max_tiles=2)
    views = Views(noise(3), [16, 16, 16])
    prompt = prompt_of(48)
    (found,) = explain(model, prompt, [views], ANSWER, "attention", sizes=[(64, 32)])
    features = model.encode_images(views.pixel_values)
    expected = answer_attention(model, prompt, ANSWER, features).mean((0, 1)).split(16)
    assert found.values.shape == (4, 8)
    whole, left, right = (one.view(4, 4) for one in expected)
    stretched = whole.repeat_interleave(2, dim=1) / 2
    torch.testing.assert_close(torch.from_numpy(found.values), torch.cat([left, right], dim=1) + stretched)


def test_what_gives_no_weights_says_so(tmp_path):
    """Every other layer of this decoder is a recurrent one."""
    config = Qwen3NextConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, intermediate_size=32,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    model = make_model(tmp_path, config=config)
    with pytest.raises(ValueError, match="Qwen3NextForCausalLM gives no .*1 of its 2 layers.*occlusion"):
        answer_attention(model, prompt_of(16), ANSWER, torch.zeros(16, 32))


def test_features_without_a_grid_say_so(tmp_path):
    model = make_model(tmp_path)
    model.encoder.grid = None
    for method in ("attention", "rollout", "features"):
        with pytest.raises(ValueError, match="do not fill a grid .*occlusion maps need none"):
            explain(model, prompt_of(16), [Views(noise(1), [16])], ANSWER, method)
