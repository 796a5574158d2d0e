"""Kinds `clip` and `siglip` against the golden files and transformers' own models."""

import json
import shutil
from functools import partial

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Siglip2Config,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from visual import VisionEncoder, build_encoder, clip, siglip

DUAL = {"clip": CLIPModel, "siglip": SiglipModel}
HALF = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
KINDS = ["clip", "siglip"]


def rewrite(source, folder, change):
    """A copy of `source` whose weights `change` has altered in place."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_golden_hidden_state(folders, golden, kind):
    encoder = build_encoder(kind, folders[kind], drop_class_token=False)
    features = encoder(golden[kind]["pixel_values"])
    torch.testing.assert_close(features, golden[kind]["vision_last_hidden_state"], atol=1e-5, rtol=0)
    assert (encoder.num_features, encoder.width) == features.shape[1:]


def test_clip_drops_its_class_token_by_default(folders, golden):
    encoder = build_encoder("clip", folders["clip"])
    features = encoder(golden["clip"]["pixel_values"])
    assert encoder.num_features == 16
    torch.testing.assert_close(features, golden["clip"]["vision_last_hidden_state"][:, 1:], atol=1e-5, rtol=0)


def test_siglip_uses_every_patch_unless_told(folders, golden):
    expected = golden["siglip"]["vision_last_hidden_state"]
    encoder = build_encoder("siglip", folders["siglip"])
    assert encoder.num_features == 16
    torch.testing.assert_close(encoder(golden["siglip"]["pixel_values"]), expected, atol=1e-5, rtol=0)
    without_first = build_encoder("siglip", folders["siglip"], drop_first_patch=True)
    assert without_first.num_features == 15
    torch.testing.assert_close(without_first(golden["siglip"]["pixel_values"]), expected[:, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("image_size, n", [(224, 256), (336, 576)])
def test_numbers_of_clip_vit_large_patch14(image_size, n):
    config = CLIPVisionConfig(hidden_size=1024, patch_size=14, image_size=image_size, num_attention_heads=16)
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    encoder = VisionEncoder(model, partial(clip._features, drop_class_token=True), (image_size,) * 2, None)
    assert (encoder.num_features, encoder.width) == (n, 1024)


@pytest.mark.parametrize("drop_first_patch, n", [(False, 729), (True, 728)])
def test_numbers_of_siglip_so400m_patch14_384(drop_first_patch, n):
    config = SiglipVisionConfig(hidden_size=1152, patch_size=14, image_size=384, num_attention_heads=16)
    with torch.device("meta"):
        model = SiglipVisionModel(config)
    encoder = VisionEncoder(model, partial(siglip._features, drop_first_patch=drop_first_patch), (384, 384), None)
    assert (encoder.num_features, encoder.width) == (n, 1152)


@pytest.mark.parametrize("kind", KINDS)
def test_penultimate_is_hidden_states_minus_two(folders, golden, kind):
    pixel_values = golden[kind]["pixel_values"]
    stock = DUAL[kind].from_pretrained(folders[kind], dtype=torch.float32).vision_model.eval()
    with torch.no_grad():
        expected = stock(pixel_values, output_hidden_states=True).hidden_states[-2]
    encoder = build_encoder(kind, folders[kind], layer="penultimate", drop_class_token=False)
    torch.testing.assert_close(encoder(pixel_values), expected, atol=1e-6, rtol=0)
    assert len(encoder.backbone.encoder.layers) == 1  # the last layer is neither computed nor kept


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_vision_half_is_in_memory(folders, kind):
    weights = load_file(folders[kind] / "model.safetensors")
    needed = [n for n in weights if n.startswith("vision_model.") and not n.startswith("vision_model.head.")]
    encoder = build_encoder(kind, folders[kind])
    assert {f"vision_model.{n}" for n, _ in encoder.backbone.named_parameters()} == set(needed)
    for name, tensor in encoder.backbone.named_parameters():
        assert torch.equal(tensor, weights[f"vision_model.{name}"]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["half", "half without prefix", "shards", "bin"])
def test_published_forms(folders, golden, tmp_path, kind, form):
    folder = tmp_path / "published"
    if form == "half":
        HALF[kind].from_pretrained(folders[kind]).save_pretrained(folder)
    elif form == "half without prefix":
        HALF[kind].from_pretrained(folders[kind]).save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        weights = {n.removeprefix("vision_model."): tensor for n, tensor in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif form == "shards":
        DUAL[kind].from_pretrained(folders[kind]).save_pretrained(folder, max_shard_size="30KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    else:
        folder.mkdir()
        shutil.copy(folders[kind] / "config.json", folder)
        torch.save(load_file(folders[kind] / "model.safetensors"), folder / "pytorch_model.bin")
    pixel_values = golden[kind]["pixel_values"]
    expected = build_encoder(kind, folders[kind])(pixel_values)
    assert torch.equal(build_encoder(kind, folder)(pixel_values), expected)


def test_old_position_ids_are_no_error(folders, golden, tmp_path):
    def add(weights):
        weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]

    folder = rewrite(folders["clip"], tmp_path / "old", add)
    features = build_encoder("clip", folder, drop_class_token=False)(golden["clip"]["pixel_values"])
    torch.testing.assert_close(features, golden["clip"]["vision_last_hidden_state"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_must_fit_exactly(folders, tmp_path, kind):
    name = "vision_model.encoder.layers.1.mlp.fc1.bias"
    missing = rewrite(folders[kind], tmp_path / "missing", lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=r"missing: .*layers\.1\.mlp\.fc1\.bias"):
        build_encoder(kind, missing)
    extra = rewrite(folders[kind], tmp_path / "extra", lambda w: w.update({"vision_model.adapter": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"unexpected: .*adapter"):
        build_encoder(kind, extra)
    shape = rewrite(folders[kind], tmp_path / "shape", lambda weights: weights.update({name: torch.ones(3)}))
    with pytest.raises(ValueError, match=r"of another shape: .*layers\.1\.mlp\.fc1\.bias \[3\] instead of \[64\]"):
        build_encoder(kind, shape)


def test_a_pickle_with_code_is_refused(folders, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    shutil.copy(folders["clip"] / "config.json", tmp_path)
    torch.save({"vision_model.x": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="nothing of it was run"):
        build_encoder("clip", tmp_path)
    assert not (tmp_path / "run").exists()


def test_remote_code_is_refused(folders, tmp_path):
    config = json.loads((folders["clip"] / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(ValueError):
        build_encoder("clip", tmp_path)
    assert not (tmp_path / "run").exists()


def test_other_architecture(folders):
    with pytest.raises(ValueError, match="'siglip_vision_model'; encoder kind 'clip'"):
        build_encoder("clip", folders["siglip"])
    with pytest.raises(ValueError, match="'clip_vision_model'; encoder kind 'siglip'"):
        build_encoder("siglip", folders["clip"])


def test_a_decoder_is_no_encoder(tiny):
    message = "decoder holds a model of type 'qwen', expected a clip or a clip_vision_model$"
    with pytest.raises(ValueError, match=message):
        build_encoder("clip", tiny.folder / "decoder")


def test_a_bad_value_in_the_config_is_named(folders, tmp_path):
    shutil.copytree(folders["clip"], tmp_path / "bad")
    file = tmp_path / "bad" / "config.json"
    config = json.loads(file.read_text())
    part = config.get("vision_config", config)
    for wrong in ("32", None):
        part["hidden_size"] = wrong
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"^{file}: .*'hidden_size' expected int") as error:
            build_encoder("clip", tmp_path / "bad")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip", "timm"])
@pytest.mark.parametrize("place", ["/nowhere", "./nowhere", "~/nowhere", "a/b/nowhere"])
def test_a_path_with_nothing_there(kind, place):
    with pytest.raises(FileNotFoundError, match=f"^there is no folder {place}$"):
        build_encoder(kind, place)


@pytest.mark.parametrize("name", ["nowhere", "nobody/nowhere"])
def test_a_name_that_is_not_at_hand(name, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=f"^{name} is neither a folder here nor a model that the hub") as error:
        build_encoder("clip", name)
    assert "\n" not in str(error.value)


def test_naflex_is_refused(tmp_path):
    Siglip2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="NaFlex.*fixed resolution"):
        build_encoder("siglip", tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        build_encoder("clip", tmp_path / "nowhere")


def test_no_preprocessing_settings(folders, golden, tmp_path):
    shutil.copytree(folders["clip"], tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    encoder = build_encoder("clip", tmp_path / "bare")
    assert encoder(golden["clip"]["pixel_values"]).shape == (3, 16, 32)
    with pytest.raises(FileNotFoundError, match=r"bare has no usable preprocessor_config\.json"):
        encoder.preprocess  # noqa: B018


def test_preprocessing_of_another_size(folders, tmp_path):
    shutil.copytree(folders["siglip"], tmp_path / "wrong")
    settings = tmp_path / "wrong" / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("32", "48"))
    encoder = build_encoder("siglip", tmp_path / "wrong")
    with pytest.raises(ValueError, match=r"wrong: its preprocessing makes \(3, 48, 48\).*\(3, 32, 32\)"):
        encoder.preprocess  # noqa: B018
