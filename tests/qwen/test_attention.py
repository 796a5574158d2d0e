"""Attention implementations, packing, dtypes, gradient checkpointing."""

import pytest
import torch
from transformers import DynamicCache

from qwen import MultimodalQWenLMHeadModel, QWenLMHeadModel

CLOSE = {"atol": 2e-4, "rtol": 0}


@pytest.fixture(autouse=True)
def no_compilation():
    """Flex attention is compiled by default; on CPUs that takes minutes, and torch 2.13 fails on cached steps."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three rows of ids with padding on the left, on the right and none; two rows are longer than seq_length (32)."""
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[0, :11] = 0
    mask[1, 36:] = 0
    ids = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_implementations_agree_with_eager(llm, batch, implementation):
    results = {}
    for name in ("eager", implementation):
        llm.set_attn_implementation(name)
        with torch.no_grad():
            prompt = llm(batch["input_ids"][:, :30], attention_mask=batch["attention_mask"][:, :30], use_cache=True)
            step = llm(
                batch["input_ids"][:, 30:],
                attention_mask=batch["attention_mask"],
                past_key_values=prompt.past_key_values,
            )
            results[name] = (llm(**batch).logits[batch["attention_mask"].bool()], step.logits[::2])
    for value, expected in zip(results[implementation], results["eager"], strict=True):
        torch.testing.assert_close(value, expected, **CLOSE)


def test_eager_returns_attention_weights(llm, batch):
    llm.set_attn_implementation("eager")
    weights = llm(**batch, output_attentions=True).attentions
    assert [list(layer.shape) for layer in weights] == [[3, 4, 40, 40]] * 3
    torch.testing.assert_close(weights[0][2].sum(-1), torch.ones(4, 40))
    assert weights[0][2].triu(1).abs().max() == 0
    assert weights[0][0, :, 11:, :11].abs().max() == 0


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("cache", [None, "empty"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_packed_samples_equal_each_alone(llm, implementation, cache, mode):
    # Samples of 50, 3 and 35 tokens: each has the alpha and the log-n factors of its own length.
    llm.set_attn_implementation(implementation)
    llm.train(mode == "train")
    samples = torch.randint(0, 300, (1, 88), generator=torch.Generator().manual_seed(0)).split([50, 3, 35], dim=1)
    positions = torch.cat([torch.arange(sample.shape[1]) for sample in samples])[None]
    cache = DynamicCache(config=llm.config) if cache else None
    with torch.no_grad():
        logits = llm(torch.cat(samples, dim=1), position_ids=positions, past_key_values=cache).logits
        alone = torch.cat([llm(sample).logits for sample in samples], dim=1)
    torch.testing.assert_close(logits, alone, **CLOSE)


def test_packed_rows_of_a_batch(llm):
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.arange(40), torch.cat([torch.arange(5), torch.arange(35)])])
    with torch.no_grad():
        logits = llm(ids, position_ids=positions).logits
        torch.testing.assert_close(logits[:1], llm(ids[:1]).logits, **CLOSE)
        torch.testing.assert_close(logits[1:, 5:], llm(ids[1:, 5:]).logits, **CLOSE)


def test_gradient_checkpointing_changes_no_gradient(llm):
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    ids[:, 3:6] = 310
    features = torch.randn(6, 64, requires_grad=True)
    gradients = []
    llm.train()
    for checkpointing in (False, True):
        llm.activation_checkpointing_enable() if checkpointing else llm.activation_checkpointing_disable()
        llm.zero_grad()
        features.grad = None
        llm(ids, features, labels=ids).loss.backward()
        gradients.append([features.grad] + [parameter.grad for parameter in llm.parameters()])
    assert llm.transformer.h[0].gradient_checkpointing
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-7, rtol=1e-5)


def test_bfloat16_keeps_norm_rotation_and_softmax_in_float32(golden, recorded):
    # Rounding weights and states to 8 bits of mantissa moves logits of size ~8 by a few hundredths; positions or
    # frequencies in bfloat16 would move them by units.
    model = MultimodalQWenLMHeadModel.from_pretrained(golden / "llm", dtype=torch.bfloat16).eval()
    data = recorded("c_long")
    with torch.no_grad():
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            logits = model(data["L100.input_ids"]).logits
            assert logits.dtype == torch.bfloat16
            assert (logits.float() - data["L100.eval.logits"]).abs().mean() < 0.1


def test_bfloat16_steps_follow_full_forwards(golden):
    model = MultimodalQWenLMHeadModel.from_pretrained(golden / "llm", dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        past = model(ids[:, :30], use_cache=True).past_key_values
        for end in range(31, 41):
            step = model(ids[:, end - 1 : end], past_key_values=past).logits[:, -1]
            full = model(ids[:, :end]).logits[:, -1]
            assert (step - full).abs().mean() < 0.1


def test_dropout_acts_in_training_only(small_config):
    torch.manual_seed(0)
    ids = torch.randint(0, 97, (2, 12))
    for option in ("emb_dropout_prob", "attn_dropout_prob"):
        model = QWenLMHeadModel(small_config(**{option: 0.5}))
        assert not torch.equal(model.train()(ids).logits, model(ids).logits)
        assert torch.equal(model.eval()(ids).logits, model(ids).logits)
