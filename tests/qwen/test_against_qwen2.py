"""Below `seq_length` Qwen-1 is transformers' Qwen2 with `c_attn` split, `w2` as gate and `w1` as up projection."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen import QWenLMHeadModel


def as_qwen2(model: QWenLMHeadModel) -> Qwen2ForCausalLM:
    config = model.config
    qwen2 = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size // 2,
            rms_norm_eps=config.layer_norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.rotary_emb_base},
        )
    )
    weights = {
        "model.embed_tokens.weight": model.transformer.wte.weight,
        "model.norm.weight": model.transformer.ln_f.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for index, block in enumerate(model.transformer.h):
        prefix = f"model.layers.{index}."
        for kind in ("weight", "bias"):
            parts = getattr(block.attn.c_attn, kind).chunk(3)
            weights |= {f"{prefix}self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
        weights |= {
            f"{prefix}self_attn.o_proj.weight": block.attn.c_proj.weight,
            f"{prefix}mlp.gate_proj.weight": block.mlp.w2.weight,
            f"{prefix}mlp.up_proj.weight": block.mlp.w1.weight,
            f"{prefix}mlp.down_proj.weight": block.mlp.c_proj.weight,
            f"{prefix}input_layernorm.weight": block.ln_1.weight,
            f"{prefix}post_attention_layernorm.weight": block.ln_2.weight,
        }
    qwen2.load_state_dict(weights, strict=True)
    return qwen2.eval()


@pytest.fixture
def pair(small_config) -> tuple[QWenLMHeadModel, Qwen2ForCausalLM]:
    torch.manual_seed(0)
    model = QWenLMHeadModel(small_config(rotary_emb_base=500)).eval()
    for name, parameter in model.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("ln_" in name), std=0.3)
    return model, as_qwen2(model)


def test_logits_loss_and_gradients(pair):
    ids = torch.randint(0, 97, (3, 16))
    outputs = [model(ids, labels=ids, output_hidden_states=True) for model in pair]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(outputs[0].hidden_states, outputs[1].hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for output in outputs:
        output.loss.backward()
    ours, theirs = pair[0].transformer.h[0], pair[1].model.layers[0]
    projections = [getattr(theirs.self_attn, f"{name}_proj").weight.grad for name in "qkv"]
    torch.testing.assert_close(ours.attn.c_attn.weight.grad, torch.cat(projections), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours.mlp.w2.weight.grad, theirs.mlp.gate_proj.weight.grad, atol=1e-6, rtol=1e-4)


def test_beyond_seq_length_with_the_extrapolations_off(pair):
    model, qwen2 = pair
    model.config.use_dynamic_ntk = model.config.use_logn_attn = False
    ids = torch.randint(0, 97, (2, 40))
    torch.testing.assert_close(model(ids).logits, qwen2(ids).logits, atol=1e-5, rtol=1e-5)
    model.config.use_logn_attn = True
    assert (model(ids).logits[:, 16:] - qwen2(ids).logits[:, 16:]).abs().amax(-1).min() > 1e-4


def test_generation_with_beams_and_padding(pair):
    ids = torch.randint(1, 97, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 9, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    sequences = [model.generate(ids, **arguments) for model in pair]
    assert torch.equal(*sequences)
