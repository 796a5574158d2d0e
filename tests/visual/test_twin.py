"""Twins of open_clip's towers against the towers themselves, and against the architectures as published."""

import json

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import VisionTransformer, build_model_with_cfg, register_model
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from visual import build_encoder, twin
from visual.twin import convert, transformers_tower

LAYERS = pytest.mark.parametrize("layer", ["last", "penultimate"])
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 3, "mlp_ratio": 2.5}
SIGLIP = {"image_size": 32, "timm_model_name": "vit_small_siglip", "timm_pool": "map", "timm_proj": "none"}
SHORTEST = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}
SQUASH = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}


@register_model
def vit_small_siglip(pretrained=False, **kwargs):
    """SigLIP's ViT; timm registers it only at its published sizes."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.5}
    options = sizes | {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"} | kwargs
    return build_model_with_cfg(VisionTransformer, "vit_small_siglip", pretrained, **options)


def make_folder(folder, vision, preprocess=SHORTEST, quick_gelu=False):
    """A folder as open_clip publishes it, with random weights and biases that are not zero."""
    model_cfg = {"embed_dim": 32, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": TEXT}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}")
    for parameter in model.visual.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def check_twin(encoder, folder, kind, dropped):
    """Features and preprocessing of the twin, as it is and as a folder of `kind`, are the encoder's."""
    model, processor = transformers_tower(encoder)
    pixel_values = torch.randn(2, 3, *encoder.image_size)
    with torch.no_grad():
        hidden = model(pixel_values, output_hidden_states=True).hidden_states
    index = -1 if encoder.spec["layer"] == "last" else -2
    features = encoder(pixel_values)
    torch.testing.assert_close(hidden[index][:, dropped:], features, atol=1e-5, rtol=0)

    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    again = build_encoder(kind, folder, layer=encoder.spec["layer"])
    torch.testing.assert_close(again(pixel_values), features, atol=1e-5, rtol=0)
    for size in ((71, 50), (50, 73), (20, 24)):
        image = Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 20).convert("RGB")
        assert torch.equal(again.preprocess([image]), encoder.preprocess([image]))
    return model


@LAYERS
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_clip_of_open_clip(tmp_path, layer, quick_gelu):
    encoder = build_encoder("open_clip", make_folder(tmp_path, VIT, quick_gelu=quick_gelu), layer=layer)
    model = check_twin(encoder, tmp_path / "twin", "clip", dropped=1)
    assert type(model) is CLIPVisionModel and len(model.encoder.layers) == 3
    assert model.config.hidden_act == ("quick_gelu" if quick_gelu else "gelu")


def test_where_the_crop_is_one_pixel_off(tmp_path):
    encoder = build_encoder("open_clip", make_folder(tmp_path, VIT))
    image = Image.effect_mandelbrot((35, 32), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    _, processor = transformers_tower(encoder)
    shifted = processor(image.crop((1, 0, 35, 32)), return_tensors="pt")["pixel_values"]
    assert torch.equal(shifted, encoder.preprocess([image]))


@LAYERS
def test_siglip_of_open_clip(tmp_path, layer):
    encoder = build_encoder("open_clip", make_folder(tmp_path, SIGLIP, SQUASH), layer=layer)
    model = check_twin(encoder, tmp_path / "twin", "siglip", dropped=0)
    assert type(model) is SiglipVisionModel and len(model.encoder.layers) == 3
    assert model.config.hidden_act == "gelu_pytorch_tanh" and not model.config.vision_use_head


@LAYERS
@pytest.mark.parametrize("kind, model_class", [("clip", CLIPVisionModel), ("siglip", SiglipVisionModel)])
def test_of_transformers_own(folders, tmp_path, kind, model_class, layer):
    encoder = build_encoder(kind, folders[kind], layer=layer)
    model = check_twin(encoder, tmp_path, kind, dropped=int(kind == "clip"))
    assert type(model) is model_class and len(model.encoder.layers) == 2
    published = load_file(folders[kind] / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, published[f"vision_model.{name}"]), name


def test_dropped_patch_and_dtype(folders):
    encoder = build_encoder("siglip", folders["siglip"], drop_first_patch=True, dtype="bfloat16")
    model, _ = transformers_tower(encoder)
    assert model.dtype == torch.bfloat16
    pixel_values = torch.randn(2, 3, 32, 32).bfloat16()
    assert torch.equal(model(pixel_values).last_hidden_state[:, 1:], encoder(pixel_values))


def test_converted_weights_are_its_own(tmp_path):
    encoder = build_encoder("open_clip", make_folder(tmp_path, VIT))
    pixel_values = torch.randn(1, 3, 32, 32)
    before = encoder(pixel_values)
    for parameter in transformers_tower(encoder)[0].parameters():
        parameter.data.zero_()
    assert torch.equal(encoder(pixel_values), before)


@pytest.mark.parametrize(
    "vision, reason",
    [
        (VIT | {"ls_init_value": 0.1}, r"layers\.0\.ls_1\.gamma"),
        (VIT | {"no_ln_pre": True}, r"lacks .*pre_layrnorm"),
        (VIT | {"attentional_pool": True}, "attn_pool"),
        (VIT | {"qk_norm": True}, "CustomResidualAttentionBlock"),
        (VIT | {"norm_kwargs": {"eps": 1e-3, "bias": False}}, r"lacks .*bias"),
        (VIT | {"image_size": [32, 64]}, r"no single side of the image, but \[32, 64\]"),
        (VIT | {"patch_size": [8, 16]}, "no single side of a patch"),
        (VIT | {"layers": [1, 1, 1, 1], "width": 16}, "ModifiedResNet"),
        (SIGLIP | {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "avg"}, "cls_token"),
        (SIGLIP | {"image_size": 160, "timm_model_name": "test_vit3"}, "ls1.gamma"),
        (SIGLIP | {"timm_pool": "avg"}, "fc_norm"),
        (SIGLIP | {"image_size": 160, "timm_model_name": "test_convnext", "timm_pool": "avg"}, "ConvNeXt"),
    ],
)
def test_refused(tmp_path, vision, reason):
    encoder = build_encoder("open_clip", make_folder(tmp_path, vision))
    with pytest.raises(ValueError, match=f"{tmp_path} has no twin in transformers: .*{reason}"):
        transformers_tower(encoder)


def test_timm_is_refused():
    with pytest.raises(ValueError, match="'timm' has no twin"):
        transformers_tower(build_encoder("timm", "test_vit", load_weights=False))


def test_letterbox_is_refused(tmp_path):
    encoder = build_encoder("open_clip", make_folder(tmp_path, VIT, SHORTEST | {"resize_mode": "longest"}))
    with pytest.raises(ValueError, match="resize_mode 'longest'"):
        transformers_tower(encoder)


def test_mixed_activations_are_refused(tmp_path):
    encoder = build_encoder("open_clip", make_folder(tmp_path, VIT))
    encoder.backbone.transformer.resblocks[1].mlp.gelu = open_clip.transformer.QuickGELU()
    with pytest.raises(ValueError, match=r"no single activation, but \['gelu', 'quick_gelu'\]"):
        transformers_tower(encoder)


def test_features_are_compared(tmp_path, monkeypatch):
    """What no look at the modules has found, such as another function behind a known name, shows in the features."""
    encoder = build_encoder("open_clip", make_folder(tmp_path, SIGLIP, SQUASH))
    monkeypatch.setattr(twin, "_activation", lambda module: "gelu")
    with pytest.raises(ValueError, match="differ by"):
        transformers_tower(encoder)


CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
PUBLISHED = {
    # openai/clip-vit-{base-patch32,base-patch16,large-patch14}, google/siglip-{base-patch16-224,so400m-patch14-384},
    # google/siglip2-so400m-patch16-384. What is not named is the default of transformers.
    "ViT-B-32-quickgelu": CLIPVisionConfig(patch_size=32),
    "ViT-B-16-quickgelu": CLIPVisionConfig(patch_size=16),
    "ViT-L-14-quickgelu": CLIPVisionConfig(**CLIP_L, patch_size=14),
    "ViT-B-32": CLIPVisionConfig(patch_size=32, hidden_act="gelu"),
    "ViT-L-14": CLIPVisionConfig(**CLIP_L, patch_size=14, hidden_act="gelu"),
    # timm has exact GELU where Google's SigLIP (and transformers) approximate it by tanh.
    "ViT-B-16-SigLIP": SiglipVisionConfig(vision_use_head=False, hidden_act="gelu"),
    "ViT-SO400M-14-SigLIP-384": SiglipVisionConfig(
        **SO400M, image_size=384, patch_size=14, vision_use_head=False, hidden_act="gelu"
    ),
    "ViT-SO400M-16-SigLIP2-384": SiglipVisionConfig(**SO400M, image_size=384, vision_use_head=False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures(name):
    with torch.device("meta"):
        encoder = build_encoder("open_clip", name, pretrained="unused", load_weights=False)
        model_class, config, state = convert(encoder.backbone)
        expected = model_class(PUBLISHED[name]).state_dict()
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in expected.items()}
    assert config.to_dict() == PUBLISHED[name].to_dict()
