"""Configuration, initialization, loading and saving."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import GenerationConfig

from qwen import MultimodalQWenLMHeadModel, QWenConfig, QWenLMHeadModel

QWEN_7B_PARAMETERS = 7_721_324_544


def test_qwen_7b_has_the_published_parameters():
    with torch.device("meta"):
        model = QWenLMHeadModel(QWenConfig())
    expected = {"transformer.wte.weight": (151936, 4096), "lm_head.weight": (151936, 4096)}
    expected["transformer.ln_f.weight"] = (4096,)
    for layer in range(32):
        shapes = {
            "ln_1.weight": (4096,),
            "ln_2.weight": (4096,),
            "attn.c_attn.weight": (12288, 4096),
            "attn.c_attn.bias": (12288,),
            "attn.c_proj.weight": (4096, 4096),
            "mlp.w1.weight": (11008, 4096),
            "mlp.w2.weight": (11008, 4096),
            "mlp.c_proj.weight": (4096, 11008),
        }
        expected |= {f"transformer.h.{layer}.{name}": shape for name, shape in shapes.items()}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert len(expected) == 259
    assert model.num_parameters() == QWEN_7B_PARAMETERS


@pytest.mark.parametrize("model_class", [QWenLMHeadModel, MultimodalQWenLMHeadModel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_the_one_on_disk(golden, model_class, dtype):
    model, info = model_class.from_pretrained(golden / "llm", dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    on_disk = load_file(golden / "llm" / "model.safetensors")
    loaded = model.state_dict()
    assert loaded.keys() == on_disk.keys()
    for name, tensor in on_disk.items():
        assert torch.equal(loaded[name], tensor.to(dtype)), name


def test_fresh_parameters(small_config):
    torch.manual_seed(0)
    model = QWenLMHeadModel(small_config(hidden_size=64, initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if "ln_" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert abs(parameter.std().item() - 0.05) < 0.005, name
            assert abs(parameter.mean().item()) < 0.005, name


def test_a_parameter_missing_on_disk_is_initialized_and_reported(small_config, tmp_path):
    model = QWenLMHeadModel(small_config())
    weights = {name: tensor for name, tensor in model.state_dict().items() if "h.1.mlp.w2" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded, info = QWenLMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"transformer.h.1.mlp.w2.weight"}
    assert abs(loaded.transformer.h[1].mlp.w2.weight.std().item() - 0.2) < 0.02
    assert torch.equal(loaded.transformer.h[0].mlp.w2.weight, model.transformer.h[0].mlp.w2.weight)


def test_sharded_round_trip(llm, tmp_path):
    llm.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    loaded = MultimodalQWenLMHeadModel.from_pretrained(tmp_path)
    assert loaded.config.to_diff_dict() == llm.config.to_diff_dict()
    for name, tensor in llm.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_sharded_pickle_files(llm, golden, tmp_path):
    # The layout in which Qwen-7B was first published: .bin shards and an index.
    names = list(llm.state_dict())
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, part in shards.items():
        torch.save({name: llm.state_dict()[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text((golden / "llm" / "config.json").read_text())
    loaded, info = QWenLMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in llm.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_published_config_keys_survive(golden, tmp_path):
    published = json.loads((golden / "llm" / "config.json").read_text())
    config = QWenConfig.from_pretrained(golden / "llm")
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del published["transformers_version"], saved["transformers_version"]
    assert {key: saved[key] for key in published} == published


def test_config_does_not_name_remote_code(tmp_path):
    QWenConfig(auto_map={"AutoConfig": "configuration_qwen.QWenConfig"}, use_flash_attn="auto").save_pretrained(
        tmp_path
    )
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_pct": 0.5}, "rotary_pct must be 1.0"),
        ({"use_cache_quantization": True}, "use_cache_quantization=True is not supported"),
        ({"kv_channels": 15}, "kv_channels=15 must be even"),
        ({"seq_length": 1}, "seq_length=1 must be at least 2"),
        ({"ntk_alpha_mode": "thawed"}, "ntk_alpha_mode"),
        ({"hidden_size": "64"}, "hidden_size"),
    ],
)
def test_config_values_without_meaning_are_refused(change, message):
    with pytest.raises(StrictDataclassError, match=message):
        QWenConfig(**change)


def test_biases_and_tied_head(small_config, tmp_path):
    model = QWenLMHeadModel(small_config(no_bias=False, tie_word_embeddings=True))
    names = [name for name, _ in model.transformer.h[0].named_parameters() if name.endswith("bias")]
    assert names == ["attn.c_attn.bias", "attn.c_proj.bias", "mlp.w1.bias", "mlp.w2.bias", "mlp.c_proj.bias"]
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    loaded = QWenLMHeadModel.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    ids = torch.randint(0, 97, (1, 9))
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_resized_embeddings(small_config):
    model = QWenLMHeadModel(small_config())
    old = model.lm_head.weight.clone()
    model.resize_token_embeddings(110)
    assert model.transformer.wte.weight.shape == model.lm_head.weight.shape == (110, 32)
    assert torch.equal(model.lm_head.weight[:97], old)


def test_loss(small_config):
    torch.manual_seed(0)
    model = QWenLMHeadModel(small_config()).eval()
    ids = torch.randint(0, 97, (2, 12))
    labels = ids.clone()
    labels[0, :5] = labels[1, 8:] = -100
    output = model(ids, labels=labels)
    logits, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    summed = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    torch.testing.assert_close(output.loss, summed / (targets != -100).sum())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=50).loss, summed / 50)


def test_logits_to_keep(small_config):
    model = QWenLMHeadModel(small_config()).eval()
    ids = torch.randint(0, 97, (2, 12))
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])
    assert torch.equal(model(ids, return_dict=False)[0], logits)


def test_generation_config_is_read(golden):
    model = QWenLMHeadModel.from_pretrained(golden / "llm")
    assert isinstance(model.generation_config, GenerationConfig)
    assert (model.generation_config.max_new_tokens, model.generation_config.pad_token_id) == (12, 319)
