"""SigLIP's vision transformer through transformers; SigLIP 2 at fixed resolution is the same architecture."""

from functools import partial

import torch
from torch import Tensor, nn
from transformers import SiglipVisionModel

from visual.encoder import VisionEncoder, refuse
from visual.pretrained import BESIDE_TOWER, TEXT_HALF, load_processor, load_vision_config, load_vision_model, on_grid


class _VisionHalf(SiglipVisionModel):
    # The attention-pooling head makes the one vector of the contrastive loss.
    _keys_to_ignore_on_load_unexpected = [*TEXT_HALF, *BESIDE_TOWER, r"^head\."]


def build_siglip(
    path: str,
    *,
    layer: str,
    drop_class_token: bool | None,
    drop_first_patch: bool,
    pretrained: str | None,
    dtype: torch.dtype,
    load_weights: bool,
) -> VisionEncoder:
    """Features are all patches: after the final norm for the last layer, as they are for the one before.

    Raises:
        ValueError: NaFlex checkpoints of SigLIP 2, whose number of patches varies with the image.
    """
    refuse("siglip", drop_class_token=drop_class_token, pretrained=pretrained)
    config = load_vision_config(path, "siglip")
    config.vision_use_head = False
    model = load_vision_model(_VisionHalf, path, config, dtype, load_weights)
    if layer == "penultimate":
        del model.encoder.layers[-1]
        model.post_layernorm = nn.Identity()
    features = partial(_features, drop_first_patch=drop_first_patch)
    return VisionEncoder(model, features, (config.image_size, config.image_size), partial(load_processor, path))


def _features(model: SiglipVisionModel, pixel_values: Tensor, drop_first_patch: bool) -> Tensor:
    hidden = model(pixel_values).last_hidden_state  # [N, n, D]
    return hidden[:, 1:] if drop_first_patch else on_grid(hidden, model.config)
