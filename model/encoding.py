"""The frozen encoder's share of an optimizer step, done at once before its micro-batches."""

from contextlib import AbstractContextManager

import torch

from visual.encoder import VisionEncoder

VIEWS = 16  # that go through the encoder at a time, if a micro-batch has not more: enough to keep a GPU busy


def encode_ahead(
    encoder: VisionEncoder, batches: list[dict], device: torch.device, autocast: AbstractContextManager
) -> None:
    """Replaces `pixel_values` `[N, 3, H, W]` by `vision` `[N, n, D]`, on `device`, in the micro-batches of a step.

    Micro-batches are small where memory is short, and the encoder is fast only on many images: it takes those of all of
    them together.
    """
    having = [batch for batch in batches if "pixel_values" in batch]
    if not having:
        return
    pixels = [batch.pop("pixel_values") for batch in having]
    size = max(VIEWS, *map(len, pixels))
    with torch.inference_mode(), autocast:
        chunks = [encoder(views.to(device, non_blocking=True)) for views in torch.cat(pixels).split(size)]
    # A copy, made outside: autograd can't save inference tensors, and the projector's backward pass needs its input.
    vision = torch.cat(chunks)
    for batch, own in zip(having, vision.split([len(views) for views in pixels]), strict=True):
        batch["vision"] = own
