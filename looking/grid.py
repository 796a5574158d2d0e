"""Values per feature -> values per patch of the encoder."""

import torch
from torch import Tensor

from model import MultiModalModel
from visual.grid import pooled_grid


def patch_grid(model: MultiModalModel) -> tuple[int, int]:
    """(rows, columns) of the encoder's patches.

    Raises:
        ValueError: its features do not fill a grid.
    """
    if model.encoder.grid is None:
        raise ValueError(
            f"the encoder's {model.encoder.num_features} features do not fill a grid (a class token is kept, or the "
            "first patch is dropped), so they have no place in the picture; occlusion maps need none"
        )
    return model.encoder.grid


def feature_cells(model: MultiModalModel, count: int) -> Tensor:
    """Which feature of a view that has `count` of them stands for each patch: `[h, w]` indices.

    Pooling and pixel shuffle make one feature of a block of patches.

    Raises:
        ValueError: the encoder's features fill no grid, or a view has another number of features.
    """
    rows, columns = patch_grid(model)
    shuffle = model.projector.spec["pixel_shuffle"]
    pooling = 1 if count == model.media.num_features else model.media.spec["frame_pooling"]
    pooled = pooled_grid((rows, columns), pooling)
    if count * shuffle**2 != pooled[0] * pooled[1]:
        raise ValueError(
            f"a view has {count} features, but an image of this model {model.media.num_features} and a frame "
            f"{model.media.frame_features}"
        )
    block = pooling * shuffle
    row, column = torch.arange(rows) // block, torch.arange(columns) // block
    return row[:, None] * (pooled[1] // shuffle) + column


def spread(shares: Tensor, cells: Tensor) -> Tensor:
    """Shares `[..., n]` of features -> `[..., h, w]` of patches: those of a block have equal parts of its share."""
    return (shares / torch.bincount(cells.flatten(), minlength=shares.shape[-1]))[..., cells]
