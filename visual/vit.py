"""The vision transformer of ImageNet classifiers (ViT) through transformers."""

from functools import partial

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from visual.encoder import VisionEncoder, refuse
from visual.pretrained import BESIDE_TOWER, load_processor, load_vision_config, load_vision_model, on_grid, sides

# Names in published files -> names in transformers, which has no mapping of its own for classes of others.
NAMES = {
    r"^vit\.": "",
    r"encoder\.layer\.": "layers.",
    r"attention\.attention\.query": "attention.q_proj",
    r"attention\.attention\.key": "attention.k_proj",
    r"attention\.attention\.value": "attention.v_proj",
    r"attention\.output\.dense": "attention.o_proj",
    r"intermediate\.dense": "mlp.fc1",
    r"output\.dense": "mlp.fc2",
}


class _Trunk(ViTModel):
    """Without the pooler, which some files have: it makes the one vector of a classifier."""

    _keys_to_ignore_on_load_unexpected = [*BESIDE_TOWER, r"^classifier\.", r"^pooler\."]

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config, add_pooling_layer=False)


def build_vit(
    path: str,
    *,
    layer: str,
    drop_class_token: bool | None,
    drop_first_patch: bool,
    pretrained: str | None,
    dtype: torch.dtype,
    load_weights: bool,
) -> VisionEncoder:
    """Features are the patches after the final norm, or before it where they are those of the layer before."""
    refuse("vit", drop_first_patch=drop_first_patch, pretrained=pretrained)
    config = load_vision_config(path, "vit")
    model = load_vision_model(_Trunk, path, config, dtype, load_weights, NAMES)
    if layer == "penultimate":
        del model.layers[-1]
        model.layernorm = nn.Identity()
    features = partial(_features, drop_class_token=drop_class_token is not False)
    return VisionEncoder(model, features, sides(config.image_size), partial(load_processor, path))


def _features(model: ViTModel, pixel_values: Tensor, drop_class_token: bool) -> Tensor:
    hidden = model(pixel_values).last_hidden_state  # [N, 1+n, D]
    return on_grid(hidden[:, 1:], model.config) if drop_class_token else hidden
