"""The decoder under PEFT's LoRA."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

PLACEHOLDER = 310


@pytest.fixture
def adapted(llm):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "w1", "w2", "c_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llm, config)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def sample() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (2, 24), generator=generator)
    ids[:, 3:6] = PLACEHOLDER
    return {"input_ids": ids, "features": torch.randn(6, 64, generator=generator), "labels": ids}


def test_only_adapters_learn(adapted, sample):
    features = sample["features"].requires_grad_()
    adapted.train()
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable({"use_reentrant": False})
    adapted(**sample).loss.backward()
    assert features.grad.abs().sum() > 0
    with_gradient = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert len(with_gradient) == 3 * 5 * 2  # c_proj occurs twice in a block


def test_merged_equals_added(adapted, sample):
    added = adapted.eval()(**sample).logits
    sequences = adapted.generate(
        input_ids=sample["input_ids"], features=sample["features"], num_beams=2, do_sample=False, max_new_tokens=12
    )
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**sample).logits, added, atol=2e-4, rtol=0)
    expected = merged.generate(
        sample["input_ids"], features=sample["features"], num_beams=2, do_sample=False, max_new_tokens=12
    )
    assert torch.equal(sequences, expected)
