import json
import math
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, MixtralConfig, Qwen2ForCausalLM

from config import ConfigError, load_config
from model import MultiModalModel
from model.decoder import decoder_class, load_decoder
from model.export import export_merged, export_qwen2
from model.lora import add_lora
from model.optim import parameter_groups
from model.projector import build_projector
from qwen import MultimodalQWenLMHeadModel, QWenTokenizer
from tests.model.toy import PLACEHOLDER, pictures, prompt
from visual import build_encoder

RANK, ALPHA = 4, 6
VARIANTS = [{"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}]


@pytest.fixture
def decoder(golden):
    return MultimodalQWenLMHeadModel.from_pretrained(golden / "llm")


def randomize(decoder: nn.Module) -> None:
    """What an adapter may have learned: B, and DoRA's lengths."""
    torch.manual_seed(0)
    for name, parameter in decoder.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
        elif ".lora_magnitude_vector." in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)


def effective_weight(weight: Tensor, layer: nn.Module, rslora: bool = False, dora: bool = False) -> Tensor:
    """`[out, in]`, written out from the papers; `weight` is the frozen one."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    adapted = weight + ALPHA / (math.sqrt(RANK) if rslora else RANK) * b @ a
    if not dora:
        return adapted
    lengths = layer.lora_magnitude_vector["default"].weight
    return lengths[:, None] * adapted / adapted.pow(2).sum(1, keepdim=True).sqrt()


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_what_the_papers_say(decoder, variant):
    names = ("attn.c_attn", "mlp.w1")  # with and without a bias
    frozen = [decoder.transformer.h[1].get_submodule(name) for name in names]
    add_lora(decoder, RANK, ALPHA, targets=["c_attn", "w1"], **variant)
    randomize(decoder)
    x = torch.randn(3, 64)
    for name, linear in zip(names, frozen, strict=True):
        layer = decoder.transformer.h[1].get_submodule(name)
        expected = nn.functional.linear(x, effective_weight(linear.weight, layer, **variant), linear.bias)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
        assert (layer(x) - linear(x)).abs().max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_compute_what_peft_computes(golden, decoder, variant):
    ours = add_lora(decoder, RANK, ALPHA, targets=["c_attn", "c_proj", "w1", "w2"], **variant)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["c_attn", "c_proj", "w1", "w2"],
        use_rslora=variant.get("rslora", False), use_dora=variant.get("dora", False),
    )  # fmt: skip
    theirs = get_peft_model(MultimodalQWenLMHeadModel.from_pretrained(golden / "llm"), config)
    randomize(ours)
    report = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not report.missing_keys and not report.unexpected_keys
    ids = torch.arange(24).view(2, 12)
    outputs = [model.train()(ids, labels=ids) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-5, rtol=1e-5)
    for output in outputs:
        output.loss.backward()
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("quantization,dtype", [("none", "float32"), ("none", "bfloat16"), ("nf4", "bfloat16")])
def test_dora_starts_as_the_decoder_to_the_last_bit(golden, quantization, dtype):
    decoder = load_decoder(golden / "llm", dtype, quantization=quantization)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        before = decoder(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            before_mixed = decoder(ids).logits
        add_lora(decoder, RANK, ALPHA, dora=True)
        assert torch.equal(decoder(ids).logits, before)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(decoder(ids).logits, before_mixed)


def test_dora_learns_on_quantized_matrices_before_and_after_evaluation(golden):
    decoder = load_decoder(golden / "llm", "bfloat16", quantization="nf4")
    add_lora(decoder, RANK, ALPHA, dora=True)
    randomize(decoder)
    ids, found = torch.arange(12).view(1, 12), []
    for _ in range(2):
        decoder.zero_grad()
        decoder.train()(ids, labels=ids).loss.backward()
        found.append({name: p.grad.clone() for name, p in decoder.named_parameters() if p.requires_grad})
        with torch.no_grad():
            decoder.eval()(ids)
    assert any(".lora_magnitude_vector." in name for name in found[0])
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0 and torch.equal(gradient, found[1][name]), name


def test_dora_on_int8_is_refused(golden, tmp_path):
    decoder = load_decoder(golden / "llm", "float32", quantization="int8")
    with pytest.raises(ValueError, match="DoRA can't be put on int8 matrices; take nf4 or none"):
        add_lora(decoder, RANK, ALPHA, dora=True)
    arguments = ["decoder=d", "encoder.path=e", "data.train=t", f"output_dir={tmp_path}", "dora=true"]
    with pytest.raises(ConfigError, match="set model.quantization to nf4 or none"):
        load_config([*arguments, "quantization=int8"])
    assert load_config([*arguments, "quantization=int8", "tune=projector"]).model.lora.dora  # there is no adapter


def test_dora_takes_the_lengths_of_what_makes_an_output_in_gpt_2():
    """Whose weights are stored the other way around, `[in, out]`."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    decoder = decoder_class(config)._from_config(config)
    frozen = decoder.transformer.h[0].attn.c_attn
    nn.init.normal_(frozen.bias)
    add_lora(decoder, RANK, ALPHA, targets=["c_attn"], dora=True)
    randomize(decoder)
    layer, x = decoder.transformer.h[0].attn.c_attn, torch.randn(3, 16)
    expected = nn.functional.linear(x, effective_weight(frozen.weight.T, layer, dora=True), frozen.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_dora_on_experts_is_refused():
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        decoder = decoder_class(config)._from_config(config)
    with pytest.raises(ValueError, match=re.escape("(experts.down_proj) knows no DoRA; set model.lora.dora=false")):
        add_lora(decoder, r=2, alpha=2, targets=["q_proj", "experts.down_proj"], dora=True)


@pytest.fixture
def make_adapted(golden, tmp_path):
    """`make_adapted(dora=True)`: a whole model whose adapter has learned something, of folders that it can name."""
    shutil.copytree(golden / "llm", tmp_path / "decoder")
    config = json.loads((tmp_path / "decoder/config.json").read_text())
    (tmp_path / "decoder/config.json").write_text(json.dumps(config | {"seq_length": 512}))
    shutil.copytree(golden / "f_siglip/vision", tmp_path / "encoder")
    preprocessor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "encoder/preprocessor_config.json").write_text(json.dumps(preprocessor))

    def build(tokenizer: QWenTokenizer | None = None, dtype: torch.dtype = torch.float32, **variant) -> MultiModalModel:
        torch.manual_seed(0)
        encoder = build_encoder("siglip", tmp_path / "encoder")
        decoder = MultimodalQWenLMHeadModel.from_pretrained(tmp_path / "decoder", dtype=dtype)
        decoder = add_lora(decoder, RANK, ALPHA, targets=["c_attn", "c_proj", "w1", "w2"], **variant)
        randomize(decoder)
        projector = build_projector("mlp", 32, 64, init_std=0.1)
        return MultiModalModel(encoder, projector, decoder, PLACEHOLDER, tokenizer).eval()

    return build


@torch.no_grad()
def logits_of(model: MultiModalModel) -> Tensor:
    ids = torch.tensor([prompt(model, [5, 6], 1, [7, 8, 9])])
    return model(ids, pixel_values=pictures(1)).logits.float()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_remembers_the_variant(make_adapted, variant, tmp_path):
    model = make_adapted(**variant)
    model.save_pretrained(tmp_path / "run")
    recorded = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert recorded["use_rslora"] == ("rslora" in variant) and recorded["use_dora"] == ("dora" in variant)
    again = MultiModalModel.from_pretrained(tmp_path / "run")
    assert torch.equal(logits_of(again), logits_of(model))
    plain = PeftModel.from_pretrained(MultimodalQWenLMHeadModel.from_pretrained(tmp_path / "decoder"), tmp_path / "run")
    ids = torch.arange(12).view(1, 12)
    torch.testing.assert_close(plain(ids).logits, again.decoder(ids).logits, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_variant_is_refused(make_adapted, tmp_path):
    from model.checkpoint import load_trained

    make_adapted(dora=True).save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError) as caught:
        load_trained(make_adapted(rslora=True), tmp_path / "run")
    for line in ("LoRA use_dora: True in the checkpoint, False in the model", "LoRA use_rslora: False",
                 "adapter: unexpected base_model.model.transformer.h.0.attn.c_attn.lora_magnitude_vector"):  # fmt: skip
        assert line in str(caught.value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_or_exported_model_computes_the_same(make_adapted, small_tokenizer, variant, tmp_path):
    expected = logits_of(make_adapted(**variant))
    torch.testing.assert_close(logits_of(make_adapted(**variant).merge()), expected, atol=1e-4, rtol=1e-4)
    export_qwen2(model := make_adapted(small_tokenizer, **variant), tmp_path / "qwen2")
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        exported = Qwen2ForCausalLM.from_pretrained(tmp_path / "qwen2")(ids).logits
        torch.testing.assert_close(exported, make_adapted(**variant).decoder(ids).logits, atol=1e-4, rtol=1e-4)
    assert not isinstance(model.decoder, PeftModel)
    export_merged(make_adapted(small_tokenizer, **variant), tmp_path / "merged")
    torch.testing.assert_close(
        logits_of(MultiModalModel.from_pretrained(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4
    )


def test_a_merged_bfloat16_decoder_is_rounded_once(make_adapted):
    model = make_adapted(dtype=torch.bfloat16, dora=True, rslora=True)
    layer = model.language_model.transformer.h[1].mlp.w2
    expected = effective_weight(layer.get_base_layer().weight.float(), layer, rslora=True, dora=True).to(torch.bfloat16)
    merged = model.merge().language_model.transformer.h[1].mlp.w2.weight
    differ = (merged != expected).float().mean()  # where float32 rounds the other way between two of bfloat16
    assert merged.dtype == torch.bfloat16 and differ < 0.01


def test_lengths_are_float32_learned_with_lora_and_not_decayed(make_adapted):
    model = make_adapted(dtype=torch.bfloat16, dora=True)
    rates = {"lora": 1e-3, "projector": 1e-2}
    groups = {group["name"]: group for group in parameter_groups(model, rates, weight_decay=0.1)}
    lengths = [p for n, p in model.named_parameters() if ".lora_magnitude_vector." in n]
    assert len(lengths) == 5 * model.language_model.config.num_hidden_layers
    assert all(p.dtype == torch.float32 and p.requires_grad and p.ndim == 1 for p in lengths)
    assert {id(p) for p in groups["lora_no_decay"]["params"]} == {id(p) for p in lengths}
    assert groups["lora_no_decay"]["lr"] == 1e-3 and groups["lora_no_decay"]["weight_decay"] == 0
