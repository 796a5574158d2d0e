import re

import pytest
import torch

from model.lora import add_lora
from qwen import MultimodalQWenLMHeadModel


@pytest.fixture
def decoder(golden):
    return MultimodalQWenLMHeadModel.from_pretrained(golden / "llm")


def test_starts_as_the_decoder_and_adds_the_low_rank_product(decoder):
    ids = torch.arange(12).view(1, 12)
    before = decoder(ids).logits
    linear = decoder.transformer.h[0].mlp.w1
    wrapped = add_lora(decoder, r=4, alpha=6, targets=["w1"])
    assert torch.equal(decoder(ids).logits, before)
    layer = decoder.transformer.h[0].mlp.w1
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), linear(x) + 6 / 4 * x @ a.T @ b.T, atol=1e-5, rtol=1e-5)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained and all(".mlp.w1.lora_" in name for name in trained)


@pytest.mark.parametrize(
    "targets,modules",
    [(["c_proj"], {"attn.c_proj", "mlp.c_proj"}), (["attn.c_proj", "w2"], {"attn.c_proj", "mlp.w2"})],
)
def test_targets_are_ends_of_module_names(decoder, targets, modules):
    add_lora(decoder, r=2, alpha=2, targets=targets)
    adapted = {".".join(n.split(".")[3:5]) for n, p in decoder.named_parameters() if p.requires_grad}
    assert adapted == modules


def test_float32_on_a_bfloat16_decoder(decoder):
    add_lora(decoder.to(torch.bfloat16), r=2, alpha=2, targets=["c_attn"])
    assert {p.dtype for p in decoder.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("targets,named", [(["w1", "q_proj"], "['q_proj']"), (["_proj"], "['_proj']")])
def test_targets_that_match_nothing(decoder, targets, named):
    message = f"{named} match no linear layer of MultimodalQWenLMHeadModel; these are named c_attn, c_proj"
    with pytest.raises(ValueError, match=re.escape(message)):
        add_lora(decoder, r=2, alpha=2, targets=targets)
