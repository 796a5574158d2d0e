"""Frozen vision encoders behind one interface: pictures -> feature vectors [N, n, D]."""

import torch

from visual.clip import build_clip
from visual.encoder import VisionEncoder
from visual.image import load_image
from visual.openclip import build_open_clip
from visual.pretrained import kind_of
from visual.siglip import build_siglip
from visual.timm_backbone import build_timm
from visual.vit import build_vit

__all__ = ["ENCODERS", "VisionEncoder", "build_encoder", "load_image"]

ENCODERS = {
    "clip": build_clip,
    "siglip": build_siglip,
    "vit": build_vit,
    "open_clip": build_open_clip,
    "timm": build_timm,
}


def build_encoder(
    kind: str | None,
    path: str,
    *,
    layer: str = "last",
    drop_class_token: bool | None = None,
    drop_first_patch: bool = False,
    dtype: torch.dtype | str | None = None,
    pretrained: str | None = None,
    load_weights: bool = True,
) -> VisionEncoder:
    """A frozen vision encoder with its published weights, in eval mode.

    Args:
        kind: a name in `ENCODERS`; None for `clip`, `siglip` or `vit` as the `config.json` of `path` says.
        path: what to load. `clip`, `siglip`, `vit`: a folder or hub id in the format of transformers; it may be a
            LLaVA's, whose vision tower alone is taken. `open_clip`: a model name, `hf-hub:<id>` or a folder with
            `open_clip_config.json`. `timm`: a model name, `hf-hub:<id>` or a folder with timm's `config.json`.
        layer: "last", or "penultimate" for the output of the layer before it (`hidden_states[-2]`, not normalised).
        drop_class_token: whether class and register tokens are left out; None: left out where there are any.
            True is an error for an encoder that has none.
        drop_first_patch: leave out the top-left patch. Only for `siglip`, only for projectors that were trained so.
        dtype: of weights and features; None is float32.
        pretrained: weights for a model name of `open_clip` (a tag or a file; needed) or of `timm` (a file; None is
            the weights that timm publishes under that name).
        load_weights: False: only configurations are read and the weights are as the architecture initializes them; on
            the meta device (`with torch.device("meta")`) the encoder has shapes and takes no memory.

    Raises:
        ValueError: unknown kind, option that this kind does not have, weights that do not fit exactly.
        OSError: nothing to load under `path`.
    """
    if kind is not None and kind not in ENCODERS:
        raise ValueError(f"unknown encoder kind {kind!r}; known: {', '.join(ENCODERS)}")
    if layer not in ("last", "penultimate"):
        raise ValueError(f'encoder layer is "last" or "penultimate", not {layer!r}')
    kind = kind or kind_of(str(path))
    dtype_name = str(dtype or "float32").removeprefix("torch.")
    options = {
        "layer": layer,
        "drop_class_token": drop_class_token,
        "drop_first_patch": drop_first_patch,
        "pretrained": None if pretrained is None else str(pretrained),
    }
    encoder = ENCODERS[kind](str(path), dtype=_floating_dtype(dtype_name), load_weights=load_weights, **options)
    encoder.spec = {"kind": kind, "path": str(path), **options, "dtype": dtype_name}
    return encoder


def _floating_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"encoder dtype {name!r} is no floating-point type of torch (float32, bfloat16, float16)")
    return dtype
