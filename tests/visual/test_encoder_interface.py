"""What holds for every kind of encoder."""

import copy
import json
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from visual import ENCODERS, VisionEncoder, build_encoder


@pytest.fixture(scope="module")
def arguments(folders, tmp_path_factory):
    """Arguments of `build_encoder` for encoders with dropout, batch norm and a class token among them."""
    folder = tmp_path_factory.mktemp("timm")
    for name in ("test_vit", "test_resnet"):
        save_file(timm.create_model(name).state_dict(), folder / f"{name}.safetensors")
    return {
        "clip": {"kind": "clip", "path": folders["clip"], "layer": "penultimate"},
        "siglip": {"kind": "siglip", "path": folders["siglip"], "drop_first_patch": True},
        "vit": {"kind": "timm", "path": "test_vit", "pretrained": folder / "test_vit.safetensors"},
        "resnet": {"kind": "timm", "path": "test_resnet", "pretrained": folder / "test_resnet.safetensors"},
    }


NAMES = ["clip", "siglip", "vit", "resnet"]


def pixels(encoder, n=2):
    return torch.randn(n, 3, *encoder.image_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_a_real_forward(arguments, name):
    encoder = build_encoder(**arguments[name])
    for n in (1, 3):
        assert encoder(pixels(encoder, n)).shape == (n, encoder.num_features, encoder.width)


@pytest.mark.parametrize("name", NAMES)
def test_frozen(arguments, name):
    encoder = build_encoder(**arguments[name])
    assert not any(p.requires_grad for p in encoder.parameters())
    before = {n: t.clone() for n, t in encoder.state_dict().items()}
    outer = torch.nn.Sequential(encoder).train()
    assert outer.training and not any(m.training for m in encoder.modules())
    x = pixels(encoder).requires_grad_()
    assert not outer(x).requires_grad
    for n, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[n]), n  # batch statistics too


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch(arguments, name):
    encoder = build_encoder(**arguments[name])
    x = pixels(encoder, 3)
    torch.testing.assert_close(encoder(x)[1:2], encoder(x[1:2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_operations_of_a_view_are_those_of_a_real_pass(arguments, name):
    encoder = build_encoder(**arguments[name])
    with FlopCounterMode(display=False) as forward:
        encoder(pixels(encoder, 1))
    assert encoder.count_flops() == forward.get_total_flops() > 0
    encoder.unfreeze()
    with FlopCounterMode(display=False) as both:
        encoder(pixels(encoder, 1)).sum().backward()
    # The CPU's attention computes its scores again in the backward pass.
    assert encoder.count_flops() == pytest.approx(both.get_total_flops(), rel=0.05)
    assert encoder.count_flops() > 2.5 * forward.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_spec_is_json_and_rebuilds_the_encoder(arguments, name):
    encoder = build_encoder(**arguments[name])
    again = build_encoder(**json.loads(json.dumps(encoder.spec)))
    assert again.spec == encoder.spec
    assert torch.equal(again(pixels(encoder)), encoder(pixels(encoder)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtype(arguments, name, dtype):
    encoder = build_encoder(**arguments[name], dtype=dtype)
    assert all(p.dtype == torch.bfloat16 for p in encoder.parameters())
    assert encoder.spec["dtype"] == "bfloat16"
    features = encoder(pixels(encoder))
    assert features.dtype == torch.bfloat16
    full = build_encoder(**arguments[name])(pixels(encoder))
    assert torch.nn.functional.cosine_similarity(features.float().flatten(), full.flatten(), dim=0) > 0.99


def test_float32_is_the_default_whatever_the_file_holds(folders, tmp_path):
    half = build_encoder("siglip", folders["siglip"], dtype="float16")
    half.backbone.save_pretrained(tmp_path)
    encoder = build_encoder("siglip", tmp_path)
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(arguments, name):
    encoder = build_encoder(**arguments[name])
    expected = encoder(pixels(encoder))
    for again in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert again.num_features == encoder.num_features
        assert torch.equal(again(pixels(encoder)), expected)


@pytest.mark.parametrize("shape", [(2, 3, 40, 32), (2, 1, 32, 32), (3, 32, 32)])
def test_pixel_values_of_another_shape(arguments, shape):
    encoder = build_encoder(**arguments["siglip"])
    with pytest.raises(ValueError, match=r"expected \[N, 3, H, W\].*\(32, 32\)"):
        encoder(torch.zeros(shape))


def test_kinds():
    assert list(ENCODERS) == ["clip", "siglip", "vit", "open_clip", "timm"]
    with pytest.raises(ValueError, match="unknown encoder kind 'clipp'; known: clip, siglip, vit, open_clip, timm"):
        build_encoder("clipp", "x")


def test_options_that_a_kind_does_not_have(folders):
    for kind, option in [
        ("siglip", {"drop_class_token": True}),
        ("siglip", {"pretrained": "x"}),
        ("clip", {"drop_first_patch": True}),
        ("clip", {"pretrained": "x"}),
    ]:
        with pytest.raises(ValueError, match=f"{kind!r} has no use for {next(iter(option))}"):
            build_encoder(kind, folders[kind], **option)
    with pytest.raises(ValueError, match='"last" or "penultimate"'):
        build_encoder("clip", folders["clip"], layer="second")
    for dtype in ("float33", "int8", "nn"):
        with pytest.raises(ValueError, match="floating-point"):
            build_encoder("clip", folders["clip"], dtype=dtype)


def test_a_backbone_without_features_is_an_error():
    with pytest.raises(ValueError, match="Identity gives no features"):
        VisionEncoder(torch.nn.Identity(), lambda backbone, x: backbone(x), (8, 8), lambda: None)


@pytest.mark.parametrize("name", NAMES)
def test_unfrozen_features_are_the_same(arguments, name):
    encoder = build_encoder(**arguments[name])
    expected = encoder(pixels(encoder))
    assert not encoder.trainable
    assert encoder.unfreeze() is encoder and encoder.trainable
    features = encoder(pixels(encoder))
    assert features.requires_grad and torch.equal(features, expected)
    with torch.no_grad():
        assert not encoder(pixels(encoder)).requires_grad
    encoder.requires_grad_(False)
    assert not encoder.trainable and not encoder(pixels(encoder)).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_what_is_trainable_is_what_gets_a_gradient(arguments, name):
    encoder = build_encoder(**arguments[name]).unfreeze()
    trainable = {n for n, parameter in encoder.named_parameters() if parameter.requires_grad}
    encoder.requires_grad_(True)
    x = pixels(encoder)
    encoder(x).square().sum().backward()
    assert trainable == {n for n, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert len(trainable) > 3


def test_the_final_norm_of_clip_stays_frozen(arguments):
    encoder = build_encoder(**arguments["clip"]).unfreeze()
    frozen = [n for n, parameter in encoder.backbone.named_parameters() if not parameter.requires_grad]
    assert frozen == ["post_layernorm.weight", "post_layernorm.bias"]
    with torch.device("meta"):
        empty = build_encoder(**arguments["clip"], load_weights=False).unfreeze()
    assert [n for n, parameter in empty.backbone.named_parameters() if not parameter.requires_grad] == frozen


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_no_image_is_zero(arguments, name):
    encoder = build_encoder(**arguments[name]).unfreeze()
    features = encoder(torch.zeros(0, 3, *encoder.image_size))
    assert features.shape == (0, encoder.num_features, encoder.width)
    features.sum().backward()
    gradients = [parameter.grad for parameter in encoder.parameters() if parameter.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_training_mode_of_a_trainable_encoder(arguments):
    encoder = build_encoder(**arguments["resnet"]).unfreeze().train()
    assert encoder.training and not any(
        module.training for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)
    )
    before = {n: buffer.clone() for n, buffer in encoder.named_buffers()}
    x = pixels(encoder, 3)
    torch.testing.assert_close(encoder(x)[1:2], encoder(x[1:2]), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(buffer, before[n]) for n, buffer in encoder.named_buffers())
    assert not any(module.training for module in encoder.eval().modules())


GRIDS = {"clip": (4, 4), "siglip": None, "vit": (10, 10), "resnet": (5, 5)}


@pytest.mark.parametrize("name", NAMES)
def test_grid(arguments, name):
    encoder = build_encoder(**arguments[name])
    assert encoder.grid == GRIDS[name]
    if encoder.grid:
        assert encoder.grid[0] * encoder.grid[1] == encoder.num_features
    whole = build_encoder("siglip", arguments["siglip"]["path"])
    assert whole.grid == (4, 4)
    with_class = build_encoder("clip", arguments["clip"]["path"], drop_class_token=False)
    assert with_class.grid is None and with_class.num_features == 17


def test_features_follow_each_other_row_by_row():
    """Of a picture whose upper right corner is bright, that corner of the grid differs from a dark one's."""
    encoder = build_encoder("timm", "test_resnet", load_weights=False)
    rows, columns = encoder.grid
    dark = torch.zeros(1, 3, *encoder.image_size)
    bright = dark.clone()
    bright[:, :, :32, -32:] = 5
    difference = (encoder(bright) - encoder(dark)).norm(dim=-1).unflatten(1, (rows, columns))[0]
    assert difference.argmax().item() == columns - 1


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_grids_of_transformers_of_timm(name):
    with torch.device("meta"):
        encoder = build_encoder("timm", name, load_weights=False)
    assert encoder.grid == ((7, 7) if name.startswith("swin") else (14, 14))
