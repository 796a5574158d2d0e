"""Images -> pixel_values, by the settings published with an encoder."""

from collections.abc import Callable, Sequence
from os import PathLike

import torch
from PIL import Image
from torch import Tensor

from visual.image import load_image

# Beyond this aspect ratio the long side is trimmed before an image is scaled by its short side.
MAX_ASPECT = 16


class Preprocess:
    """`preprocess(images) -> pixel_values [N, 3, H, W]` float32: images are loaded by `load_image`, then transformed.

    Args:
        transform: RGB image -> [3, H, W]; picklable, so that workers of a data loader can have it.
        center_crop: whether `transform` scales the short side and cuts out the middle. Scaled so, a strip of
            1x3000 pixels would have 224x672,000 before the cut; it is trimmed to its middle first, of which the
            cut keeps all that it needs.
        transform_exact: like `transform`, for images that already have the encoder's size: it neither scales nor cuts.
    """

    def __init__(
        self,
        transform: Callable[[Image.Image], Tensor],
        center_crop: bool,
        transform_exact: Callable[[Image.Image], Tensor],
    ) -> None:
        self.transform = transform
        self.center_crop = center_crop
        self.transform_exact = transform_exact

    def __call__(self, images: Sequence[str | PathLike | Image.Image]) -> Tensor:
        """Raises ValueError for an empty list or an image that can't be scaled, and what `load_image` raises."""
        if not images:
            raise ValueError("no images to preprocess")
        return torch.stack([self._one(load_image(image)) for image in images]).float()

    def exact(self, images: Sequence[Image.Image]) -> Tensor:
        """pixel_values [N, 3, H, W] float32 of RGB images that have W x H pixels; every pixel stays where it is.

        `preprocess(images)` may cut off their margin, as many settings do with all images.
        """
        return torch.stack([self.transform_exact(image) for image in images]).float()

    def _one(self, image: Image.Image) -> Tensor:
        width, height = image.size
        if self.center_crop:
            image = _trim(image)
        try:
            return self.transform(image)
        except ValueError as error:
            raise ValueError(f"an image of {width}x{height} pixels can't be preprocessed: {error}") from error


def _trim(image: Image.Image) -> Image.Image:
    """The middle of an image whose aspect ratio is beyond MAX_ASPECT."""
    width, height = image.size
    keep = MAX_ASPECT * min(width, height)
    left, top = max(0, width - keep) // 2, max(0, height - keep) // 2
    # As much goes from either end, so that the middle stays where it was.
    return image.crop((left, top, width - left, height - top)) if left or top else image
