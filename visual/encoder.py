"""The interface that all vision encoders share."""

from collections.abc import Callable
from copy import deepcopy
from functools import cached_property, partial
from math import prod

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visual.preprocess import Preprocess


class VisionEncoder(nn.Module):
    """A backbone: `forward(pixel_values [N, 3, H, W]) -> features [N, n, D]`.

    It is frozen: it stays in eval mode under `.train()`, none of its parameters requires a gradient and `forward`
    builds no graph. `unfreeze` ends all three.

    Args:
        backbone: holds the weights.
        features: `features(backbone, pixel_values [N, 3, H, W])` -> `[N, rows, columns, D]`, or `[N, n, D]` where the
            features do not fill a grid.
        image_size: the (H, W) that the backbone takes.
        load_preprocess: returns the preprocessing that was published with the weights. This and `features` are
            functions of a module or partials of them, so that an encoder can be pickled.

    Attributes:
        num_features: n, feature vectors per image.
        width: D.
        grid: (rows, columns) of the features, which follow each other row by row; None where they do not fill a grid,
            because a class token is among them or a patch is missing.
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
        *grid, self.width = self._feature_shape()
        self.grid: tuple[int, int] | None = tuple(grid) if len(grid) == 2 else None
        self.num_features = prod(grid)

    @property
    def preprocess_loader(self) -> Callable[[], Preprocess]:
        """What reads `preprocess`: picklable and free of weights, so that other processes can do it themselves."""
        return partial(read_preprocess, self._load_preprocess, self.image_size, str(self.spec.get("path")))

    @cached_property
    def preprocess(self) -> Preprocess:
        """`preprocess(list of images) -> pixel_values [N, 3, H, W]` float32; picklable and free of weights.

        Read at first use: an encoder whose folder has no preprocessing settings still takes `pixel_values`.

        Raises:
            FileNotFoundError: no preprocessing settings beside the weights.
            ValueError: they yield another size than the backbone takes.
        """
        return self.preprocess_loader()

    @property
    def trainable(self) -> bool:
        """Whether any parameter requires a gradient: after `unfreeze`, until `requires_grad_(False)`."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def unfreeze(self) -> "VisionEncoder":
        """Makes trainable what the features depend on, and returns the encoder.

        Other parameters, such as CLIP's final norm, which is for the class token alone, stay frozen: distributed
        training waits in vain for the gradient of a parameter that has none.
        """
        for name in self._needed_parameters():
            self.backbone.get_parameter(name).requires_grad_(True)
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values` [N, 3, H, W] -> features [N, n, D] in the encoder's dtype.

        There is a graph only where gradients are enabled and the encoder is trainable.

        Raises:
            ValueError: `pixel_values` of another shape.
        """
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}, expected [N, 3, H, W] with "
                f"H, W = {self.image_size}; make them with encoder.preprocess"
            )
        n = len(pixel_values)
        if n == 0:  # which backbones can't reshape, but a batch without images still needs its graph
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            features = self._features(self.backbone, pixel_values.to(next(self.parameters()).dtype))[:n]
            return features.flatten(1, 2) if features.ndim == 4 else features

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Switches dropout of a trainable encoder; a frozen one stays in eval mode.

        Batch norm stays in eval mode in either: with statistics of the batch an image's features would depend on its
        neighbours, and several small batches would not give the gradient of one large.
        """
        super().train(mode and self.trainable)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def count_flops(self) -> int:
        """Floating point operations for one view: forward, and where the encoder is trained backward as well."""
        with torch.set_grad_enabled(self.trainable), FlopCounterMode(display=False) as counter:
            features, parameters = self._meta_pass()
            if self.trainable:
                torch.autograd.grad(features.sum(), list(parameters.values()), allow_unused=True)
        return counter.get_total_flops()

    def _feature_shape(self) -> tuple[int, ...]:
        """(rows, columns, D), or (n, D) without a grid."""
        with torch.no_grad():
            return tuple(self._meta_pass()[0].shape[1:])

    def _needed_parameters(self) -> list[str]:
        """Names within the backbone of the parameters to which a backward pass from the features leads."""
        with torch.enable_grad():
            features, parameters = self._meta_pass()
            gradients = torch.autograd.grad(features.sum(), list(parameters.values()), allow_unused=True)
        return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None]

    def _meta_pass(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(features, parameters) of one view on the meta device, which has shapes and graphs but computes nothing."""
        # A copy that has these in place of the tensors takes no memory, and what it does leaves the encoder alone.
        memo: dict = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in self.parameters()}
        memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in self.buffers()}
        backbone = deepcopy(self.backbone, memo)
        try:
            dtype = next(backbone.parameters()).dtype
            pixel_values = torch.empty(1, 3, *self.image_size, device="meta", dtype=dtype)
            return self._features(backbone, pixel_values), dict(backbone.named_parameters())
        # What an unfit backbone raises here is its library's affair: AssertionError, RuntimeError, TypeError, ...
        except Exception as error:
            name = type(self.backbone).__name__
            raise ValueError(f"{name} gives no features for images of {self.image_size}: {error}") from error


def read_preprocess(load: Callable[[], Preprocess], image_size: tuple[int, int], name: str) -> Preprocess:
    """What `load` reads, after a check that it makes images of the encoder's size; `name` is for errors."""
    preprocess = load()
    for size in ((64, 48), (48, 64)):
        shape = tuple(preprocess([Image.new("RGB", size)]).shape)
        if shape != (1, 3, *image_size):
            raise ValueError(
                f"{name}: its preprocessing makes {shape[1:]} of a {size[0]}x{size[1]} image, "
                f"but the encoder takes (3, H, W) = {(3, *image_size)}; mend the sizes in its settings"
            )
    return preprocess


def refuse(kind: str, **options: object) -> None:
    """Raises ValueError for every option of `build_encoder` that was asked for and that this kind does not have."""
    for name, value in options.items():
        if value:
            raise ValueError(f"encoder kind {kind!r} has no use for {name}={value!r}; leave it out")
