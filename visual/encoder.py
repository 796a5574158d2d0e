"""The interface that all vision encoders share."""

from collections.abc import Callable
from functools import cached_property
from itertools import chain

import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from visual.preprocess import Preprocess


class VisionEncoder(nn.Module):
    """A frozen backbone: `forward(pixel_values [N, 3, H, W]) -> features [N, n, D]`, without a graph.

    It stays in eval mode under `.train()` and none of its parameters requires a gradient.

    Args:
        backbone: holds the weights.
        features: `features(backbone, pixel_values [N, 3, H, W]) -> [N, n, D]`.
        image_size: the (H, W) that the backbone takes.
        load_preprocess: returns the preprocessing that was published with the weights. This and `features` are
            functions of a module or partials of them, so that an encoder can be pickled.

    Attributes:
        num_features: n, feature vectors per image.
        width: D.
        image_size: (H, W) in pixels.
        spec: JSON-able arguments of `visual.build_encoder` that rebuild this encoder; set by it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        features: Callable[[nn.Module, Tensor], Tensor],
        image_size: tuple[int, int],
        load_preprocess: Callable[[], Preprocess],
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.image_size = tuple(image_size)
        self.spec: dict = {}
        self._features = features
        self._load_preprocess = load_preprocess
        self.eval()
        self.num_features, self.width = self._feature_shape()

    @cached_property
    def preprocess(self) -> Preprocess:
        """`preprocess(list of images) -> pixel_values [N, 3, H, W]` float32; picklable and free of weights.

        Read at first use: an encoder whose folder has no preprocessing settings still takes `pixel_values`.

        Raises:
            FileNotFoundError: no preprocessing settings beside the weights.
            ValueError: they yield another size than the backbone takes.
        """
        preprocess = self._load_preprocess()
        for size in ((64, 48), (48, 64)):
            shape = tuple(preprocess([Image.new("RGB", size)]).shape)
            if shape != (1, 3, *self.image_size):
                raise ValueError(
                    f"{self.spec.get('path')}: its preprocessing makes {shape[1:]} of a {size[0]}x{size[1]} image, "
                    f"but the encoder takes (3, H, W) = {(3, *self.image_size)}; mend the sizes in its settings"
                )
        return preprocess

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values` [N, 3, H, W] -> features [N, n, D] in the encoder's dtype.

        Raises:
            ValueError: `pixel_values` of another shape.
        """
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}, expected [N, 3, H, W] with "
                f"H, W = {self.image_size}; make them with encoder.preprocess"
            )
        return self._features(self.backbone, pixel_values.to(next(self.parameters()).dtype))

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Does nothing but return: a frozen encoder has no dropout and no batch statistics to learn."""
        return super().train(False)

    def _feature_shape(self) -> tuple[int, int]:
        """(n, D) of a forward pass on the meta device, which has shapes but computes nothing."""
        state = {
            name: torch.empty_like(tensor, device="meta")
            for name, tensor in chain(self.named_parameters(), self.named_buffers())
        }
        pixel_values = torch.empty(1, 3, *self.image_size, device="meta")
        try:
            return tuple(functional_call(self, state, (pixel_values,)).shape[1:])
        # What an unfit backbone raises here is its library's affair: AssertionError, RuntimeError, TypeError, ...
        except Exception as error:
            name = type(self.backbone).__name__
            raise ValueError(f"{name} gives no features for images of {self.image_size}: {error}") from error


def refuse(kind: str, **options: object) -> None:
    """Raises ValueError for every option of `build_encoder` that was asked for and that this kind does not have."""
    for name, value in options.items():
        if value:
            raise ValueError(f"encoder kind {kind!r} has no use for {name}={value!r}; leave it out")
