"""Kind `vit`, the vision towers of LLaVA folders, and kinds that are read from `config.json`."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from visual import build_encoder
from visual.twin import transformers_tower

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def randomise(model):
    """Biases and norms too, which otherwise begin at 0 and 1."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    return model.eval()


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    model = randomise(ViTForImageClassification(ViTConfig(**SHAPE, num_labels=5)))
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size).save_pretrained(folder)
    return folder, model.vit


def test_vit_features(vit):
    folder, model = vit
    encoder = build_encoder("vit", folder)
    with torch.no_grad():
        expected = model(PIXELS, output_hidden_states=True)
    assert (encoder.grid, encoder.num_features, encoder.width) == ((4, 4), 16, 16)
    torch.testing.assert_close(encoder(PIXELS), expected.last_hidden_state[:, 1:], atol=1e-6, rtol=0)
    whole = build_encoder("vit", folder, drop_class_token=False)
    torch.testing.assert_close(whole(PIXELS), expected.last_hidden_state, atol=1e-6, rtol=0)
    assert whole.grid is None
    before = build_encoder("vit", folder, layer="penultimate")
    torch.testing.assert_close(before(PIXELS), expected.hidden_states[-2][:, 1:], atol=1e-6, rtol=0)
    assert len(before.backbone.layers) == 2


@pytest.mark.parametrize("form", ["published", "with pooler", "without pooler", "bin"])
def test_forms_of_vit(vit, tmp_path, form):
    folder, model = vit
    expected = build_encoder("vit", folder)(PIXELS)
    if form == "published":
        names = load_file(folder / "model.safetensors")
        assert "vit.encoder.layer.0.attention.attention.query.weight" in names  # as google's files have it
        assert "classifier.weight" in names
        return
    if form == "bin":
        shutil.copy(folder / "config.json", tmp_path)
        torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    else:
        other = ViTModel(model.config, add_pooling_layer=form == "with pooler")
        other.load_state_dict(model.state_dict(), strict=False)
        other.save_pretrained(tmp_path)
        assert ("pooler.dense.weight" in load_file(tmp_path / "model.safetensors")) == (form == "with pooler")
    assert torch.equal(build_encoder("vit", tmp_path)(PIXELS), expected)


def test_vit_weights_must_fit_exactly(vit, tmp_path):
    name = "vit.encoder.layer.1.output.dense.bias"
    for number, (change, message) in enumerate(
        [
            (lambda w: {n: t for n, t in w.items() if n != name}, r"missing: layers\.1\.mlp\.fc2\.bias"),
            (lambda w: w | {"vit.adapter": torch.ones(2)}, "unexpected: adapter"),
            (lambda w: w | {name: torch.ones(3)}, r"layers\.1\.mlp\.fc2\.bias \[3\] instead of \[16\]"),
        ]
    ):
        shutil.copytree(vit[0], tmp_path / str(number))
        rewrite(tmp_path / str(number), change)
        with pytest.raises(ValueError, match=message):
            build_encoder("vit", tmp_path / str(number))


def test_vit_is_trainable_and_has_preprocessing(vit):
    folder, _ = vit
    encoder = build_encoder(None, folder)
    assert encoder.preprocess.center_crop is False
    encoder.unfreeze()
    encoder(PIXELS).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    with pytest.raises(ValueError, match="'vit' has no use for drop_first_patch"):
        build_encoder("vit", folder, drop_first_patch=True)
    with pytest.raises(ValueError, match="'vit' has no twin"):
        transformers_tower(encoder)


VISION = {
    "clip": CLIPVisionConfig(**SHAPE),
    "siglip": SiglipVisionConfig(**SHAPE, vision_use_head=False),
}
TEXT = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)


@pytest.fixture(scope="module", params=VISION)
def llava(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    config = LlavaConfig(vision_config=VISION[request.param], text_config=TEXT, image_token_index=40)
    model = randomise(LlavaForConditionalGeneration(config))
    model.save_pretrained(folder)
    return request.param, folder, model


OLD, NEW = "vision_tower.vision_model.", "model.vision_tower."
FORMS = {
    "as saved": None,
    "llava-hf": lambda name: name.replace("vision_tower.", OLD),
    "newer": lambda name: f"model.{name.replace('language_model.model.', 'language_model.')}",
}


@pytest.mark.parametrize("form", FORMS)
def test_tower_of_llava(llava, tmp_path, form):
    kind, folder, model = llava
    if FORMS[form]:
        folder = shutil.copytree(folder, tmp_path / "form")
        rewrite(folder, lambda weights: {FORMS[form](name): tensor for name, tensor in weights.items()})
        names = load_file(folder / "model.safetensors")
        assert any(name.startswith(OLD if form == "llava-hf" else NEW) for name in names)
    tower = model.model.vision_tower
    with torch.no_grad():
        hidden = tower(PIXELS, output_hidden_states=True).hidden_states
    for layer, index in (("last", -1), ("penultimate", -2)):
        encoder = build_encoder(None, folder, layer=layer)
        assert encoder.spec["kind"] == kind and encoder.grid == (4, 4)
        assert {n for n, _ in encoder.backbone.named_parameters()} <= {n for n, _ in tower.named_parameters()}
        if (kind, layer) == ("siglip", "last"):
            with torch.no_grad():
                expected = tower(PIXELS).last_hidden_state
        else:
            expected = hidden[index][:, 1:] if kind == "clip" else hidden[index]
        torch.testing.assert_close(encoder(PIXELS), expected, atol=1e-6, rtol=0)
        again = build_encoder(**json.loads(json.dumps(encoder.spec)))
        assert torch.equal(again(PIXELS), encoder(PIXELS)) and again.spec == encoder.spec


def test_tower_of_llava_is_strict(llava, tmp_path):
    kind, folder, _ = llava
    folder = shutil.copytree(folder, tmp_path / "bad")
    name = "vision_tower.encoder.layers.1.mlp.fc1.bias"
    rewrite(folder, lambda weights: {n: t for n, t in weights.items() if n != name} | {"vision_tower.x": torch.ones(1)})
    with pytest.raises(ValueError, match=r"missing: encoder\.layers\.1\.mlp\.fc1\.bias; unexpected: x"):
        build_encoder(kind, folder)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_preprocessing_of_llava(llava, folders, tmp_path, file):
    kind, folder, _ = llava
    folder = shutil.copytree(folder, tmp_path / "f")
    settings = json.loads((folders[kind] / "preprocessor_config.json").read_text())
    if file == "processor_config.json":
        settings = {"processor_class": "LlavaProcessor", "patch_size": 8, "image_processor": settings}
    (folder / file).write_text(json.dumps(settings))
    image = torch.arange(40 * 50 * 3, dtype=torch.uint8).view(40, 50, 3).numpy()
    expected = build_encoder(kind, folders[kind]).preprocess([Image.fromarray(image)])
    assert torch.equal(build_encoder(None, folder).preprocess([Image.fromarray(image)]), expected)


def test_twin_of_a_llava_tower(llava, folders, tmp_path):
    kind, folder, model = llava
    folder = shutil.copytree(folder, tmp_path / "f")
    shutil.copy(folders[kind] / "preprocessor_config.json", folder)
    twin, _ = transformers_tower(build_encoder(None, folder, layer="penultimate"))
    for name, tensor in model.model.vision_tower.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor), name


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_twin_has_trained_weights(folders, layer):
    encoder = build_encoder("siglip", folders["siglip"], layer=layer).unfreeze()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.01)
    twin, _ = transformers_tower(encoder)  # which compares features
    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_kind_of_folders(folders, tmp_path, kind):
    assert build_encoder(None, folders[kind]).spec["kind"] == kind
    half = build_encoder(kind, folders[kind]).backbone
    half.save_pretrained(tmp_path)
    assert build_encoder(None, tmp_path).spec["kind"] == kind


def test_kinds_that_must_be_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224"}))
    with pytest.raises(ValueError, match="has model_type None, .*timm or open_clip, name its kind"):
        build_encoder(None, tmp_path)
    with pytest.raises(ValueError, match="has model_type 'qwen', which is none of clip,"):
        build_encoder(None, tiny.folder / "decoder")
    (tmp_path / "open_clip").mkdir()
    for name in ("ViT-B-32", "hf-hub:timm/x", "timm/vit_base_patch16_224.augreg_in21k", tmp_path / "open_clip"):
        with pytest.raises(OSError, match="timm or open_clip .*name its kind") as error:
            build_encoder(None, name)
        assert "\n" not in str(error.value)
