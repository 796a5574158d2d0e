"""Projectors: small modules that map the vectors of a vision encoder to the width of the language model."""

import torch
from torch import Tensor, nn

from visual.grid import pixel_shuffle as shuffle


def _mlp(in_width: int, out_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))


def _linear(in_width: int, out_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_width, out_width))


PROJECTORS = {"mlp": _mlp, "linear": _linear}


class Projector(nn.Module):
    """`layers(shuffle(features + position_embedding))`, in float32 parameters whatever dtype the features have.

    With pixel shuffle (InternVL 1.5, https://arxiv.org/abs/2404.16821) r x r neighbouring features become one of r * r
    times the width before the layers.

    Attributes:
        spec: arguments of `build_projector` that rebuild it.
        position_embedding: learned vector per feature index `[n, D]`, or None.
    """

    def __init__(self, layers: nn.Sequential, position_embedding: nn.Parameter | None, spec: dict):
        super().__init__()
        self.layers = layers
        self.register_parameter("position_embedding", position_embedding)
        self.spec = spec

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Projects features `[N, n, D]` to `[N, n / r^2, H]`; float32 outside autocast.

        Args:
            grid: rows and columns in which the n features lie; needed for pixel shuffle.

        Raises:
            ValueError: width or number of features differ from those the projector was built for, or r does not divide
                both sides of the grid.
        """
        expected = [self.spec["num_features"] if self.position_embedding is not None else features.shape[1],
                    self.spec["in_width"]]
        if list(features.shape[1:]) != expected:
            raise ValueError(f"projector takes features [N, {expected[0]}, {expected[1]}], got {list(features.shape)}")
        features = features.to(self.layers[0].weight.dtype)
        if self.position_embedding is not None:
            features = features + self.position_embedding
        if self.spec["pixel_shuffle"] > 1:
            features = shuffle(features, grid, self.spec["pixel_shuffle"])
        return self.layers(features)


def build_projector(
    kind: str,
    in_width: int,
    out_width: int,
    *,
    num_features: int | None = None,
    position_embedding: bool = False,
    pixel_shuffle: int = 1,
    init_std: float | None = 0.01,
) -> Projector:
    """Builds a projector from width `in_width` (D) to `out_width` (H) in float32.

    Args:
        kind: key of `PROJECTORS`: "mlp" (Linear, exact GELU, Linear) or "linear".
        num_features: feature vectors per image (n); needed with `position_embedding`.
        position_embedding: add a learned vector per feature index, zero at first, before the layers.
        pixel_shuffle: r, so that r x r neighbouring features become one; 1: none does.
        init_std: weights are drawn from N(0, init_std) and biases are zero; None keeps PyTorch's own initialization.

    Raises:
        ValueError: unknown kind, or `position_embedding` without `num_features`.
    """
    if kind not in PROJECTORS:
        raise ValueError(f"unknown projector {kind!r}; choose one of {', '.join(PROJECTORS)}")
    if position_embedding and not num_features:
        raise ValueError("position_embedding needs num_features, the number of feature vectors per image")
    layers = PROJECTORS[kind](in_width * pixel_shuffle**2, out_width).float()
    if init_std is not None:
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=init_std)
                nn.init.zeros_(layer.bias)
    position = nn.Parameter(torch.zeros(num_features, in_width)) if position_embedding else None
    spec = {
        "kind": kind,
        "in_width": in_width,
        "out_width": out_width,
        "num_features": num_features,
        "position_embedding": position_embedding,
        "pixel_shuffle": pixel_shuffle,
    }
    return Projector(layers, position, spec)
