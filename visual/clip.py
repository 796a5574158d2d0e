"""CLIP's vision transformer through transformers."""

from functools import partial

import torch
from torch import Tensor
from transformers import CLIPVisionModel

from visual.encoder import VisionEncoder, refuse
from visual.pretrained import BESIDE_TOWER, TEXT_HALF, load_processor, load_vision_config, load_vision_model, on_grid


class _VisionHalf(CLIPVisionModel):
    _keys_to_ignore_on_load_unexpected = [*TEXT_HALF, *BESIDE_TOWER]


def build_clip(
    path: str,
    *,
    layer: str,
    drop_class_token: bool | None,
    drop_first_patch: bool,
    pretrained: str | None,
    dtype: torch.dtype,
    load_weights: bool,
) -> VisionEncoder:
    """Features are the outputs of the last or last but one block; CLIP's final norm is for the class token only."""
    refuse("clip", drop_first_patch=drop_first_patch, pretrained=pretrained)
    config = load_vision_config(path, "clip")
    model = load_vision_model(_VisionHalf, path, config, dtype, load_weights)
    if layer == "penultimate":
        del model.encoder.layers[-1]
    features = partial(_features, drop_class_token=drop_class_token is not False)
    return VisionEncoder(model, features, (config.image_size, config.image_size), partial(load_processor, path))


def _features(model: CLIPVisionModel, pixel_values: Tensor, drop_class_token: bool) -> Tensor:
    hidden = model(pixel_values).last_hidden_state  # [N, 1+n, D]
    return on_grid(hidden[:, 1:], model.config) if drop_class_token else hidden
