"""Backbones of timm: transformers and convolutional networks, their last feature map as a row of vectors."""

from functools import partial
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from visual.encoder import VisionEncoder, refuse
from visual.preprocess import Preprocess
from visual.weights import check_place, loading_errors


def build_timm(
    path: str,
    *,
    layer: str,
    drop_class_token: bool | None,
    drop_first_patch: bool,
    pretrained: str | None,
    dtype: torch.dtype,
    load_weights: bool,
) -> VisionEncoder:
    """Features are `forward_features` of timm, or the feature level before (block of a ViT, stage of a ResNet)."""
    import timm.data  # takes seconds, and only this kind needs it

    refuse("timm", drop_first_patch=drop_first_patch)
    model = _load(path, pretrained, load_weights).to(dtype)
    check_timm_model(model, path, layer, drop_class_token)
    settings = timm.data.resolve_model_data_config(model)
    features = partial(timm_features, layer=layer, drop_prefix=drop_class_token is not False)
    return VisionEncoder(model, features, settings["input_size"][1:], partial(_load_preprocess, settings))


def _load_preprocess(settings: dict) -> Preprocess:
    import timm.data

    transform = timm.data.create_transform(**settings, is_training=False)
    # Without a margin to cut off, an image that has the wanted size stays as it is.
    exact = timm.data.create_transform(**settings | {"crop_pct": 1.0, "crop_mode": "center"}, is_training=False)
    return Preprocess(transform, settings["crop_mode"] == "center", exact)


def _load(path: str, pretrained: str | None, load_weights: bool) -> nn.Module:
    import timm

    check_place(path.removeprefix("local-dir:"))
    name = f"local-dir:{path}" if Path(path).is_dir() else path
    with loading_errors("timm", path, pretrained):
        # Built with the published classifier and cut after: asked for 0 classes, timm would load without strictness.
        if pretrained is None or not load_weights:
            model = timm.create_model(name, pretrained=load_weights)
        else:
            model = _load_file(name, pretrained)
    model.reset_classifier(0)
    return model


def _load_file(name: str, file: str) -> nn.Module:
    """Weights of a file, with or without a classifier, into the architecture `name`."""
    import timm

    if name.startswith(("local-dir:", "hf-hub:")):
        raise ValueError(f"timm {name} carries its weights; leave pretrained={file!r} out")
    if not timm.is_model(name):
        raise ValueError(f"timm knows no model {name!r} that pretrained={file!r} could be loaded into")
    if not Path(file).is_file():
        raise FileNotFoundError(f"timm {name}: no file {file}")
    weights = timm.models.load_state_dict(file, weights_only=True)
    if not weights:  # in whose place timm would download its own
        raise ValueError(f"timm {name}: {file} holds no weights")
    classifier = timm.models.get_pretrained_cfg(name).classifier or ()
    for layer in (classifier,) if isinstance(classifier, str) else classifier:
        weights.pop(f"{layer}.weight", None)
        weights.pop(f"{layer}.bias", None)
    # Equal numbers of classes on both sides make timm's comparison of names strict.
    source = {"state_dict": weights, "num_classes": 0}
    model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=source)
    del model.pretrained_cfg["state_dict"]
    return model


def check_timm_model(model: nn.Module, name: str, layer: str, drop_class_token: bool | None) -> None:
    """Raises ValueError where `timm_features` could not do what was asked for."""
    if drop_class_token and not getattr(model, "num_prefix_tokens", 0):
        raise ValueError(f"timm {name} has no class token; leave drop_class_token out")
    if layer == "penultimate" and not hasattr(model, "forward_intermediates"):
        raise ValueError(f"timm {name} gives no intermediate features; use layer: last")


def timm_features(model: nn.Module, pixel_values: Tensor, layer: str, drop_prefix: bool) -> Tensor:
    """[N, 3, H, W] -> feature map [N, h, w, D]; or [N, n, D] with prefix tokens (if kept) before its rows."""
    if layer == "penultimate":
        return _level(model, pixel_values, -2, drop_prefix, norm=False)
    features = model.forward_features(pixel_values)
    if isinstance(features, Tensor) and features.ndim == 4:
        if getattr(model, "output_fmt", "NCHW") == "NHWC":
            return features
        return features.permute(0, 2, 3, 1)
    if isinstance(features, Tensor) and hasattr(model, "num_prefix_tokens"):
        if not drop_prefix and model.num_prefix_tokens:
            return features
        return _on_grid(features[:, model.num_prefix_tokens :], pixel_values.shape[2:])
    # Several outputs, or tokens of which the model doesn't say how many are no patches: only its feature levels tell.
    return _level(model, pixel_values, -1, drop_prefix, norm=True)


def _level(model: nn.Module, pixel_values: Tensor, index: int, drop_prefix: bool, norm: bool) -> Tensor:
    """One level of a model's feature hierarchy as `timm_features` gives it; `norm` applies the final norm to it."""
    options = {"indices": [index], "norm": norm, "intermediates_only": True, "output_fmt": "NCHW", "stop_early": True}
    if drop_prefix or not getattr(model, "num_prefix_tokens", 0):
        return model.forward_intermediates(pixel_values, **options)[0].permute(0, 2, 3, 1)  # from [N, D, h, w]
    feature_map, prefix = model.forward_intermediates(pixel_values, **options, return_prefix_tokens=True)[0]
    return torch.cat([prefix, feature_map.flatten(2).transpose(1, 2)], dim=1)


def _on_grid(patches: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Patches [N, n, D] as [N, h, w, D] where squares of one size, cut from images of `image_size`, can be n."""
    # timm has no one name for the grid of all its transformers, but all of them step equally far in both directions.
    height, width = image_size
    rows = isqrt(patches.shape[1] * height // width)
    columns = patches.shape[1] // max(rows, 1)
    fits = rows * columns == patches.shape[1] and rows * width == columns * height
    return patches.unflatten(1, (rows, columns)) if fits else patches
