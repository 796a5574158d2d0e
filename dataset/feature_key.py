"""What precomputed features depend on: the encoder, its weights, the preprocessing, and how media become views."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visual.encoder import VisionEncoder
from visual.media import Media
from visual.preprocess import Preprocess

MEDIA_SETTINGS = ("max_tiles", "frames", "fps", "max_seconds")  # frame_pooling comes after the encoder
# (width, height) of the pictures by which preprocessings are compared: wide, high, and smaller than most encoders take.
PROBES = ((640, 360), (333, 517), (60, 60))
VALUES = 16  # of each that are compared
PIXEL_TOLERANCE = 2e-3  # a grey level is 0.0136 or more where pixels have a standard deviation of 1
# Of the features' root mean square: machines compute the same picture with other roundings.
FEATURE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


def feature_key(encoder: VisionEncoder, media: Media, autocast: str | None = None) -> dict[str, Any]:
    """JSON-able description; features with equal keys are equal but for rounding.

    Where the encoder's files lie does not count, what is in them does.

    Args:
        autocast: name of the dtype that the encoder computes in, as `train.bf16` has it; None: that of its weights.

    Raises:
        FileNotFoundError, ValueError: the encoder's preprocessing can't be read.
    """
    return {
        "encoder": {name: value for name, value in encoder.spec.items() if name not in ("path", "pretrained")},
        "weights": weight_digest(encoder.backbone.state_dict()),
        "preprocessing": preprocess_probe(media.preprocess, encoder.image_size),
        "features": feature_probe(encoder, media.preprocess),
        "media": {name: media.spec[name] for name in MEDIA_SETTINGS},
        "autocast": autocast,
    }


def key_differences(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """`setting: then, now` for all in which two keys differ."""
    differences = []
    for part in ("encoder", "media"):
        then, now = recorded.get(part, {}), wanted[part]
        differences += [
            f"{part} {name}: {then.get(name)!r} then, {now.get(name)!r} now"
            for name in {**then, **now}
            if then.get(name) != now.get(name)
        ]
    if recorded.get("autocast") != wanted["autocast"]:
        names = [autocast or "none" for autocast in (recorded.get("autocast"), wanted["autocast"])]
        differences.append(f"autocast (train.bf16, train.fp16): {names[0]} then, {names[1]} now")
    if recorded.get("weights") != wanted["weights"]:
        differences.append("the encoder has other weights")
    if not _agree(recorded.get("preprocessing", []), wanted["preprocessing"], PIXEL_TOLERANCE):
        differences.append("the encoder's preprocessing makes other pixels of a picture")
    if not differences:
        rms = float(np.sqrt(np.mean(np.square(wanted["features"]))))
        tolerance = FEATURE_TOLERANCE[wanted["encoder"]["dtype"]] * rms
        if not _agree(recorded.get("features", []), wanted["features"], tolerance):
            differences.append("the encoder makes other features of a picture with the same weights: its config.json")
    return differences


def weight_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of all tensors with their names, shapes and dtypes.

    A sample such as `model.fingerprint` takes would not do: it is meant to overlook a rounding, and so overlooks what
    an encoder learns in a few steps at a low rate.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def preprocess_probe(preprocess: Preprocess, image_size: tuple[int, int]) -> list[float]:
    """Some pixels of drawn pictures after preprocessing: whatever its settings are called, others give other pixels."""
    pixels = [preprocess([_drawn(size)])[0] for size in PROBES]
    pixels.append(preprocess.exact([_drawn(image_size[::-1])])[0])
    return [value for one in pixels for value in (*_some(one), one.mean().item(), one.std().item())]


def feature_probe(encoder: VisionEncoder, preprocess: Preprocess) -> list[float]:
    """Some features of a drawn picture: they depend on what no weight shows, such as an activation function."""
    device = next(encoder.parameters()).device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return _some(encoder(preprocess([_drawn(PROBES[0])]).to(device)))


def _some(tensor: Tensor) -> list[float]:
    """`VALUES` entries at fixed places all over a tensor."""
    flat = tensor.detach().cpu().float().flatten()
    places = (torch.arange(VALUES, dtype=torch.float64) * 0.6180339887 % 1 * len(flat)).long()
    return flat[places].tolist()


def _drawn(size: tuple[int, int]) -> Image.Image:
    """A picture with smooth parts and fine ones, so that both size and filter of a resampling show."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    channels = (x * 255 // size[0], y * 255 // size[1], (x * x + 7 * y * y + 3 * x * y) % 256)
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def _agree(then: list[float], now: list[float], tolerance: float) -> bool:
    return len(then) == len(now) and all(abs(a - b) <= tolerance for a, b in zip(then, now, strict=True))
