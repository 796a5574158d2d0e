"""Kind `open_clip` against open_clip's own towers, and against kind `clip` with equal weights."""

import json
import pickle
import shutil

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from visual import build_encoder

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VISION = {
    "vit": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 2, "mlp_ratio": 2},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 8},
    "timm": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"},
}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}


def make_folder(folder, tower, weights=None, quick_gelu=True):
    """A folder as open_clip publishes it; `weights` replaces names of the randomly initialised model."""
    model_cfg = {"embed_dim": 8, "quick_gelu": quick_gelu, "vision_cfg": VISION[tower], "text_cfg": TEXT}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}")
    if weights:
        model.load_state_dict(model.state_dict() | weights)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return model.eval()


def from_transformers(weights):
    """CLIP's vision tower in the names of open_clip."""
    vision = {n.removeprefix("vision_model."): t for n, t in weights.items() if n.startswith("vision_model.")}
    out = {
        "visual.class_embedding": vision["embeddings.class_embedding"],
        "visual.positional_embedding": vision["embeddings.position_embedding.weight"],
        "visual.conv1.weight": vision["embeddings.patch_embedding.weight"],
        "visual.proj": weights["visual_projection.weight"].T,
    }
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = vision[f"pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = vision[f"post_layernorm.{kind}"]
        for i in range(2):
            theirs, ours = f"encoder.layers.{i}", f"visual.transformer.resblocks.{i}"
            qkv = [vision[f"{theirs}.self_attn.{projection}_proj.{kind}"] for projection in "qkv"]
            out[f"{ours}.attn.in_proj_{kind}"] = torch.cat(qkv)
            out[f"{ours}.attn.out_proj.{kind}"] = vision[f"{theirs}.self_attn.out_proj.{kind}"]
            out[f"{ours}.ln_1.{kind}"] = vision[f"{theirs}.layer_norm1.{kind}"]
            out[f"{ours}.ln_2.{kind}"] = vision[f"{theirs}.layer_norm2.{kind}"]
            out[f"{ours}.mlp.c_fc.{kind}"] = vision[f"{theirs}.mlp.fc1.{kind}"]
            out[f"{ours}.mlp.c_proj.{kind}"] = vision[f"{theirs}.mlp.fc2.{kind}"]
    return out


@pytest.fixture(scope="module")
def vit(folders, tmp_path_factory):
    """(stock model, folder) with the weights of golden case f_clip."""
    folder = tmp_path_factory.mktemp("open_clip_vit")
    return make_folder(folder, "vit", from_transformers(load_file(folders["clip"] / "model.safetensors"))), folder


@pytest.mark.parametrize("layer", ["last", "penultimate"])
@pytest.mark.parametrize("drop_class_token", [None, False])
def test_equals_kind_clip(vit, folders, golden, layer, drop_class_token):
    pixel_values = golden["clip"]["pixel_values"]
    options = {"layer": layer, "drop_class_token": drop_class_token}
    encoder = build_encoder("open_clip", vit[1], **options)
    same = build_encoder("clip", folders["clip"], **options)
    assert (encoder.num_features, encoder.width) == (same.num_features, same.width)
    torch.testing.assert_close(encoder(pixel_values), same(pixel_values), atol=1e-5, rtol=0)


def test_normalised_they_are_open_clips_tokens(vit, golden):
    tower = vit[0].visual
    tower.output_tokens = True
    with torch.no_grad():
        _, tokens = tower(golden["clip"]["pixel_values"])
        features = build_encoder("open_clip", vit[1])(golden["clip"]["pixel_values"])
        torch.testing.assert_close(tower.ln_post(features), tokens, atol=1e-5, rtol=0)


def test_resnet(tmp_path):
    model = make_folder(tmp_path, "resnet")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        *_, before, last = model.visual.forward_intermediates(x)["image_intermediates"]
    for layer, feature_map in (("last", last), ("penultimate", before)):
        encoder = build_encoder("open_clip", tmp_path, layer=layer)
        _, width, rows, columns = feature_map.shape
        assert (encoder.num_features, encoder.width) == (rows * columns, width)
        torch.testing.assert_close(encoder(x).transpose(1, 2).reshape(feature_map.shape), feature_map)
    with pytest.raises(ValueError, match="no class token"):
        build_encoder("open_clip", tmp_path, drop_class_token=True)


def test_timm_tower(tmp_path):
    model = make_folder(tmp_path, "timm")
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        tokens = model.visual.trunk.forward_features(x)
    encoder = build_encoder("open_clip", tmp_path)
    assert encoder.num_features == 100
    torch.testing.assert_close(encoder(x), tokens[:, 1:])
    torch.testing.assert_close(build_encoder("open_clip", tmp_path, drop_class_token=False)(x), tokens)


def test_text_tower_is_not_kept(vit):
    encoder = build_encoder("open_clip", vit[1])
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in vit[0].visual.parameters())


def test_preprocessing_is_open_clips(vit):
    _, _, own = open_clip.create_model_and_transforms(f"local-dir:{vit[1]}")
    preprocess = build_encoder("open_clip", vit[1]).preprocess
    image = Image.effect_mandelbrot((70, 50), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    assert torch.equal(preprocess([image])[0], own(image))
    assert torch.equal(pickle.loads(pickle.dumps(preprocess))([image])[0], own(image))


@pytest.fixture
def named(vit, tmp_path):
    """A model name known to open_clip, and a file with its weights."""
    config = json.loads((vit[1] / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "ViT-kanjian-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    file = tmp_path / "weights.safetensors"
    save_file({n: t.contiguous() for n, t in vit[0].state_dict().items()}, file)
    return "ViT-kanjian-test", file


def test_name_and_file(vit, named, golden):
    pixel_values = golden["clip"]["pixel_values"]
    name, file = named
    expected = build_encoder("open_clip", vit[1])(pixel_values)
    torch.testing.assert_close(build_encoder("open_clip", name, pretrained=file)(pixel_values), expected)


def test_weights_must_fit_exactly(named):
    name, file = named
    weights = load_file(file)
    del weights["visual.ln_pre.bias"]
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"visual\.ln_pre\.bias"):
        build_encoder("open_clip", name, pretrained=file)


def test_wrong_arguments(vit, named):
    name, file = named
    with pytest.raises(ValueError, match="needs pretrained=.*openai"):
        build_encoder("open_clip", "ViT-B-32")
    with pytest.raises(ValueError, match="no_such_tag"):
        build_encoder("open_clip", name, pretrained="no_such_tag")
    with pytest.raises(ValueError, match="ViT-of-nobody"):
        build_encoder("open_clip", "ViT-of-nobody", pretrained=file)
    with pytest.raises(ValueError, match="carries its weights"):
        build_encoder("open_clip", vit[1], pretrained=file)
    with pytest.raises(ValueError, match="drop_first_patch"):
        build_encoder("open_clip", vit[1], drop_first_patch=True)


def test_folder_without_weights(vit, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((vit[1] / "open_clip_config.json").read_text())
    with pytest.raises(ValueError, match="weights"):
        build_encoder("open_clip", tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_a_file_without_weights(vit, named, tmp_path, suffix):
    """Of open_clip and of timm, which load files themselves."""
    file = tmp_path / f"text{suffix}"
    file.write_text("hello")
    for kind, name in (("open_clip", named[0]), ("timm", "test_vit")):
        with pytest.raises(ValueError, match=f"^{file} can't be read: .* copy it again") as error:
            build_encoder(kind, name, pretrained=file)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], torch.ones(2), {}, {3: torch.ones(2)}], ids=["list", "tensor", "empty", "numbered"]
)
def test_a_file_of_something_else(named, tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    for kind, name in (("open_clip", named[0]), ("timm", "test_vit")):
        with pytest.raises(ValueError, match=r"other\.pt holds a (list|Tensor|dict) without tensors by name"):
            build_encoder(kind, name, pretrained=tmp_path / "other.pt")


def test_a_damaged_folder(vit, tmp_path):
    shutil.copytree(vit[1], tmp_path / "damaged")
    file = tmp_path / "damaged" / "open_clip_pytorch_model.bin"
    file.write_text("hello")
    with pytest.raises(ValueError, match=f"^{file} can't be read"):
        build_encoder("open_clip", tmp_path / "damaged")


@pytest.mark.parametrize("name, tag, quick", [("ViT-B-32", "openai", True), ("ViT-B-32", "laion2b_s34b_b79k", False)])
def test_activation_is_that_of_the_tag(monkeypatch, name, tag, quick):
    seen = {}

    def create_model(name, **options):
        seen.update(options)
        raise RuntimeError("no download in tests")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(ValueError, match="no download"):
        build_encoder("open_clip", name, pretrained=tag)
    assert seen["force_quick_gelu"] is quick and seen["pretrained"] == tag
