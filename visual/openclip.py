"""Image towers of open_clip."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from visual.encoder import VisionEncoder, refuse
from visual.preprocess import Preprocess
from visual.timm_backbone import check_timm_model, timm_features
from visual.weights import check_place, loading_errors


def build_open_clip(
    path: str,
    *,
    layer: str,
    drop_class_token: bool | None,
    drop_first_patch: bool,
    pretrained: str | None,
    dtype: torch.dtype,
    load_weights: bool,
) -> VisionEncoder:
    """Features are patch tokens, never the pooled vector.

    A transformer of open_clip gives them before its final norm, which CLIP trains on the class token only: equal to
    those of kind `clip` for equal weights. A tower that is a timm model gives those of kind `timm`, a ResNet its last
    (or last but one) feature map.
    """
    refuse("open_clip", drop_first_patch=drop_first_patch)
    tower = _load(path, pretrained, load_weights).to(dtype)
    size = (tower.image_size,) * 2 if isinstance(tower.image_size, int) else tower.image_size
    backbone, features = _features_of(tower, path, layer, drop_class_token)
    backbone.preprocess_cfg = tower.preprocess_cfg  # which a timm trunk does not have
    return VisionEncoder(backbone, features, size, partial(_load_preprocess, tower.preprocess_cfg))


def _load_preprocess(settings: dict) -> Preprocess:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    # All its modes leave an image that has the wanted size as it is.
    return Preprocess(transform, settings["resize_mode"] == "shortest", transform)


def _load(path: str, pretrained: str | None, load_weights: bool) -> nn.Module:
    """The image tower of a dual tower that open_clip loads whole and strictly."""
    import open_clip  # takes seconds, and only this kind needs it

    check_place(path.removeprefix("local-dir:"))
    name = f"local-dir:{path}" if Path(path).is_dir() else path
    carries_weights = name.startswith(("local-dir:", "hf-hub:"))
    if carries_weights and pretrained is not None:
        raise ValueError(f"open_clip {path} carries its weights; leave pretrained={pretrained!r} out")
    if not carries_weights and pretrained is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(path)) or "none"
        raise ValueError(f"open_clip {path} needs pretrained=<file or tag>; tags published for it: {tags}")
    # OpenAI's weights were trained with QuickGELU, which open_clip otherwise only warns about.
    tag = open_clip.get_pretrained_cfg(path.replace("/", "-"), pretrained) if pretrained else {}
    with loading_errors("open_clip", path, pretrained):
        model = open_clip.create_model(
            name,
            device=torch.get_default_device(),
            pretrained=pretrained if load_weights else None,
            load_weights=load_weights,
            force_quick_gelu=bool(tag.get("quick_gelu")),
            require_pretrained=load_weights,
        )
    return model.visual


def _features_of(tower: nn.Module, path: str, layer: str, drop_class_token: bool | None) -> tuple[nn.Module, partial]:
    """(backbone, features) for `VisionEncoder`."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    drop = drop_class_token is not False
    if isinstance(tower, TimmModel):
        check_timm_model(tower.trunk, path, layer, drop_class_token)
        return tower.trunk, partial(timm_features, layer=layer, drop_prefix=drop)
    index = -1 if layer == "last" else -2
    if isinstance(tower, VisionTransformer):
        return tower, partial(_patch_tokens, index=index, drop_class_token=drop)
    if drop_class_token:
        raise ValueError(f"open_clip {path} has no class token; leave drop_class_token out")
    return tower, partial(_feature_map, index=index)


def _patch_tokens(tower: nn.Module, pixel_values: Tensor, index: int, drop_class_token: bool) -> Tensor:
    out = tower.forward_intermediates(
        pixel_values,
        indices=[index],
        stop_early=True,
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    patches = out["image_intermediates"][0]  # [N, n, D]
    if drop_class_token:
        return patches.unflatten(1, tower.grid_size)
    return torch.cat([out["image_intermediates_prefix"][0], patches], dim=1)


def _feature_map(tower: nn.Module, pixel_values: Tensor, index: int) -> Tensor:
    out = tower.forward_intermediates(pixel_values, indices=[index], intermediates_only=True)
    return out["image_intermediates"][0].permute(0, 2, 3, 1)  # [N, D, h, w] -> [N, h, w, D]
