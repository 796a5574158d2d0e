"""Frozen matrices in 4 and 8 bits under float32 LoRA (QLoRA), on the CPU."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from model import MultiModalModel
from model.decoder import load_decoder, quantization_of
from model.lora import add_lora
from model.projector import build_projector
from tests.model.toy import PLACEHOLDER, pictures, prompt
from visual import build_encoder

LAYERS = {"nf4": Linear4bit, "int8": Linear8bitLt}
# Quantiles of the normal distribution, QLoRA (https://arxiv.org/abs/2305.14314), appendix E.
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


@pytest.fixture
def folders(golden, tmp_path) -> Path:
    shutil.copytree(golden / "llm", tmp_path / "decoder")
    shutil.copytree(golden / "f_siglip" / "vision", tmp_path / "encoder")
    return tmp_path


@pytest.fixture
def make_quantized(folders):
    """A model with LoRA (B not zero) on a quantized decoder."""

    def build(quantization: str, dtype: str = "float32") -> MultiModalModel:
        torch.manual_seed(0)
        encoder = build_encoder("siglip", folders / "encoder")
        decoder = load_decoder(folders / "decoder", dtype, quantization=quantization)
        decoder = add_lora(decoder, r=4, alpha=8, targets=["c_attn", "w1", "w2"])
        for name, parameter in decoder.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.1)
        return MultiModalModel(encoder, build_projector("mlp", 32, 64, init_std=0.1), decoder, PLACEHOLDER).eval()

    return build


def _ids(model: MultiModalModel) -> Tensor:
    return torch.tensor([prompt(model, [5, 6], 1, [7, 8, 9])])


def _logits(model: MultiModalModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(_ids(model), pixel_values=pictures(1)).logits.float()


def _effective_weight(layer: nn.Module) -> Tensor:
    with torch.no_grad():
        product = layer.train()(torch.eye(layer.in_features))
        layer.eval()
        return (product if layer.bias is None else product - layer.bias).T


def test_nf4_weights_are_the_nearest_levels_of_their_block(folders):
    plain, quantized = (load_decoder(folders / "decoder", "float32", quantization=q) for q in ("none", "nf4"))
    for layer in ("attn.c_attn", "mlp.c_proj"):
        weight = plain.transformer.h[1].get_submodule(layer).weight
        blocks = weight.detach().reshape(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        nearest = NF4[(blocks / scale)[..., None].sub(NF4).abs().argmin(-1)] * scale
        found = _effective_weight(quantized.transformer.h[1].get_submodule(layer)).reshape(-1, 64)
        # Double quantization rounds the scales themselves to 8 bits.
        torch.testing.assert_close(found, nearest, atol=0.02 * float(scale.max()), rtol=0)
        assert (found - blocks).abs().max() > 0.05 * float(scale.max())


def test_int8_weights_are_rounded_by_row(folders):
    plain, quantized = (load_decoder(folders / "decoder", "float32", quantization=q) for q in ("none", "int8"))
    weight = plain.transformer.h[0].mlp.w1.weight.detach()
    step = weight.abs().amax(1, keepdim=True) / 127
    found = _effective_weight(quantized.transformer.h[0].mlp.w1)
    torch.testing.assert_close(found / step, (found / step).round(), atol=0.1, rtol=0)  # 255 levels of each row
    error = ((found - weight) / step).abs()  # half a step, but bitsandbytes rounds to float16 before
    assert error.max() < 1 and 0.2 < error.mean() < 0.3


@pytest.mark.parametrize("quantization", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_matrices_of_the_layers_are_quantized(make_quantized, quantization, dtype):
    model = make_quantized(quantization, str(dtype).removeprefix("torch."))
    decoder = model.language_model
    quantized = {name for name, module in decoder.named_modules() if isinstance(module, LAYERS[quantization])}
    assert {name.removesuffix(".base_layer").partition(".h.")[2][2:] for name in quantized} == {
        "attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"
    }  # fmt: skip
    assert len(quantized) == 5 * decoder.config.num_hidden_layers
    assert decoder.lm_head.weight.dtype == decoder.transformer.wte.weight.dtype == decoder.dtype == dtype
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(p.dtype == torch.float32 for p in trainable.values())
    assert quantization_of(decoder) == quantization


def test_a_quantized_model_computes_with_its_rounded_weights(make_quantized):
    model, reference = make_quantized("nf4"), make_quantized("none")
    for name, layer in model.language_model.named_modules():
        if isinstance(layer, Linear4bit):
            reference.language_model.get_submodule(name).weight.data = _effective_weight(layer)
    torch.testing.assert_close(_logits(model), _logits(reference), atol=1e-4, rtol=1e-4)
    assert (_logits(model) - _logits(make_quantized("none"))).abs().max() > 0.1


@pytest.mark.parametrize("quantization", LAYERS)
def test_training_goes_on_after_evaluation(make_quantized, quantization):
    def gradients(evaluate: bool) -> dict[str, Tensor]:
        model = make_quantized(quantization)
        if evaluate:
            model.generate(_ids(model), pixel_values=pictures(1), max_new_tokens=2, do_sample=False)
        ids = _ids(model)
        model.train()(ids, pixel_values=pictures(1), labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    without, after = gradients(False), gradients(True)
    for name, gradient in without.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(after[name], gradient), name


@pytest.mark.parametrize("quantization", LAYERS)
def test_a_checkpoint_remembers_the_quantization(make_quantized, folders, quantization):
    model = make_quantized(quantization, "bfloat16")
    model.save_pretrained(folders / "run")
    again = MultiModalModel.from_pretrained(folders / "run")
    assert quantization_of(again.language_model) == quantization and again.language_model.dtype == torch.bfloat16
    assert torch.equal(_logits(again), _logits(model))
    assert again.generate(_ids(model), pixel_values=pictures(1), max_new_tokens=3).shape == (1, 3)
    plain = MultiModalModel.from_pretrained(folders / "run", quantization="none")
    assert quantization_of(plain.language_model) == "none"


def test_adapters_are_merged_into_unquantized_weights_alone(make_quantized, folders):
    model = make_quantized("nf4")
    model.save_pretrained(folders / "run")
    with pytest.raises(ValueError, match='not merged into nf4 weights; load the model with quantization="none"'):
        model.merge()
    plain = MultiModalModel.from_pretrained(folders / "run", quantization="none")
    before = _logits(plain)
    torch.testing.assert_close(_logits(plain.merge()), before, atol=1e-4, rtol=1e-4)


def test_int8_does_not_speak_of_casts_at_every_layer(make_quantized, caplog):
    with caplog.at_level(logging.WARNING):
        _logits(make_quantized("int8", "bfloat16"))
    assert not [record for record in caplog.records if "will be cast" in record.getMessage()]


def test_unknown_quantization_is_refused(folders):
    with pytest.raises(ValueError, match="unknown quantization 'int3'; choose one of none, nf4, int8"):
        load_decoder(folders / "decoder", "float32", quantization="int3")
