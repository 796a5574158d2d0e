"""Kind `timm` against timm's own features."""

import json
import pickle

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from visual import build_encoder


def make(tmp_path, name, **options):
    """(stock model of random weights in eval mode, file with its weights)."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return model, tmp_path / "model.safetensors"


def pixels(model):
    return torch.randn(2, *timm.data.resolve_model_data_config(model)["input_size"])


@pytest.mark.parametrize("name, prefix", [("vit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2)])
def test_vision_transformer(tmp_path, name, prefix):
    model, file = make(tmp_path, name)
    x = pixels(model)
    with torch.no_grad():
        tokens = model.forward_features(x)
        (patches, prefix_tokens), _ = model.forward_intermediates(
            x, indices=2, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
    encoder = build_encoder("timm", name, pretrained=file)
    assert (encoder.num_features, encoder.width) == (196, 192)
    torch.testing.assert_close(encoder(x), tokens[:, prefix:])
    whole = build_encoder("timm", name, pretrained=file, drop_class_token=False)
    assert whole.num_features == 196 + prefix
    torch.testing.assert_close(whole(x), tokens)
    before = build_encoder("timm", name, pretrained=file, layer="penultimate")
    torch.testing.assert_close(before(x), patches)
    before = build_encoder("timm", name, pretrained=file, layer="penultimate", drop_class_token=False)
    torch.testing.assert_close(before(x), torch.cat([prefix_tokens, patches], 1))


@pytest.mark.parametrize("name", ["resnet50", "test_resnet", "test_convnext"])
def test_feature_map_is_flattened_row_by_row(tmp_path, name):
    model, file = make(tmp_path, name)
    x = pixels(model)
    with torch.no_grad():
        feature_map = model.forward_features(x)  # [N, D, h, w]
        earlier = model.forward_intermediates(x, indices=2, intermediates_only=True)[0]
    _, width, rows, columns = feature_map.shape
    encoder = build_encoder("timm", name, pretrained=file)
    features = encoder(x)
    assert features.shape == (2, rows * columns, width) == (2, encoder.num_features, encoder.width)
    torch.testing.assert_close(features[:, columns + 2], feature_map[:, :, 1, 2])
    torch.testing.assert_close(features.transpose(1, 2).reshape(feature_map.shape), feature_map)
    before = build_encoder("timm", name, pretrained=file, layer="penultimate")
    torch.testing.assert_close(before(x), earlier.flatten(2).transpose(1, 2))


def test_channels_last_feature_map(tmp_path):
    model, file = make(tmp_path, "swin_tiny_patch4_window7_224")
    x = pixels(model)[:1]
    with torch.no_grad():
        feature_map = model.forward_features(x)  # [N, h, w, D]
    encoder = build_encoder("timm", "swin_tiny_patch4_window7_224", pretrained=file)
    torch.testing.assert_close(encoder(x), feature_map.reshape(1, 49, 768))


def test_tokens_without_a_stated_prefix(tmp_path):
    model, file = make(tmp_path, "gmlp_ti16_224")
    x = pixels(model)[:1]
    with torch.no_grad():
        tokens = model.forward_features(x)
    encoder = build_encoder("timm", "gmlp_ti16_224", pretrained=file)
    torch.testing.assert_close(encoder(x), tokens)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """(stock model, folder as timm publishes it) of DINOv2 at 70 px."""
    folder = tmp_path_factory.mktemp("dinov2")
    model, _ = make(folder, "vit_small_patch14_dinov2", img_size=70)
    settings = {"input_size": [3, 70, 70], "crop_pct": 1.0, "interpolation": "bicubic", "num_classes": 0}
    settings |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    config = {"architecture": "vit_small_patch14_dinov2", "num_classes": 0, "num_features": 384}
    config |= {"model_args": {"img_size": 70}, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return model, folder


def test_dinov2_from_a_folder(dinov2):
    model, folder = dinov2
    encoder = build_encoder("timm", folder)
    assert (encoder.num_features, encoder.width, encoder.image_size) == (25, 384, (70, 70))
    image = Image.effect_mandelbrot((90, 80), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    x = encoder.preprocess([image])
    settings = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 1.0, "interpolation": "bicubic"}
    own = timm.data.create_transform(input_size=(3, 70, 70), is_training=False, **settings)
    assert torch.equal(x[0], own(image))
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), model.forward_features(x)[:, 1:])


def test_an_incomplete_folder_is_an_error(dinov2, tmp_path):
    _, folder = dinov2
    weights = load_file(folder / "model.safetensors")
    del weights["blocks.3.mlp.fc1.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=rf"(?s)timm {tmp_path}.*Missing key.*blocks\.3\.mlp\.fc1\.bias"):
        build_encoder("timm", tmp_path)


def test_photographs_equal_timm(tmp_path, photos):
    model, file = make(tmp_path, "test_vit")
    encoder = build_encoder("timm", "test_vit", pretrained=file)
    own = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    expected = torch.stack([own(Image.open(path).convert("RGB")) for path in photos])
    assert torch.equal(encoder.preprocess(photos), expected)
    strip = Image.new("RGB", (1, 3000), "teal")
    assert encoder.preprocess([strip]).shape == (1, 3, 160, 160)
    restored = pickle.loads(pickle.dumps(encoder.preprocess))
    assert torch.equal(restored(photos[:2]), expected[:2])


@pytest.mark.parametrize("classes, suffix", [(0, "safetensors"), (7, "safetensors"), (1000, "pth")])
def test_file_with_any_classifier_or_none(tmp_path, classes, suffix):
    model, file = make(tmp_path, "test_vit", num_classes=classes)
    if suffix == "pth":
        file = tmp_path / "model.pth"
        torch.save({"state_dict": model.state_dict()}, file)
    x = pixels(model)
    with torch.no_grad():
        expected = model.forward_features(x)[:, 1:]
    encoder = build_encoder("timm", "test_vit", pretrained=file)
    torch.testing.assert_close(encoder(x), expected)
    assert "state_dict" not in encoder.backbone.pretrained_cfg
    assert sum(p.numel() for n, p in encoder.named_parameters() if "head" in n) == 0


def test_file_must_fit_exactly(tmp_path):
    model, file = make(tmp_path, "test_vit")
    missing = model.state_dict()
    del missing["blocks.0.attn.qkv.weight"]
    save_file(missing, file)
    with pytest.raises(ValueError, match=r"(?s)timm test_vit, .*model\.safetensors.*blocks\.0\.attn\.qkv\.weight"):
        build_encoder("timm", "test_vit", pretrained=file)
    save_file(model.state_dict() | {"blocks.9.x": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"blocks\.9\.x"):
        build_encoder("timm", "test_vit", pretrained=file)


def test_wrong_arguments(tmp_path):
    _, file = make(tmp_path, "test_resnet")
    with pytest.raises(ValueError, match="no class token"):
        build_encoder("timm", "test_resnet", pretrained=file, drop_class_token=True)
    with pytest.raises(ValueError, match="drop_first_patch"):
        build_encoder("timm", "test_resnet", pretrained=file, drop_first_patch=True)
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        build_encoder("timm", "test_resnet", pretrained=tmp_path / "gone.pth")
    with pytest.raises(ValueError, match="timm knows no model"):
        build_encoder("timm", file, pretrained=file)
    with pytest.raises(ValueError, match="carries its weights"):
        build_encoder("timm", tmp_path, pretrained=file)
    with pytest.raises(ValueError, match="Unknown model.*resnet18_of_nobody"):
        build_encoder("timm", "resnet18_of_nobody")
