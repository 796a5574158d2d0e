"""Pictures and clips -> views, and how many features each view contributes."""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from visual.encoder import VisionEncoder
from visual.grid import feature_count
from visual.image import File, image_size, load_image
from visual.preprocess import Preprocess
from visual.tiling import best_grid, cut
from visual.video import count_frames, load_frames


class Views(NamedTuple):
    """What goes through the encoder of one image or clip.

    Attributes:
        pixel_values: [V, 3, H, W] float32.
        features: how many features, and so placeholder tokens, each of the V views contributes.
    """

    pixel_values: Tensor
    features: list[int]


class Media:
    """How images and clips become views. It is picklable and has no weights: workers of a data loader take it along.

    An image is one view, the whole of it as the encoder's preprocessing makes it. With tiles there follow, row by row,
    those of the grid that suits it best (`visual.tiling`), unless that is a single tile. A clip is one view per frame.

    Args:
        encoder: whose views they will be. Its preprocessing is read when the first view is made.
        max_tiles: how many tiles of an image there may be at most; 0: none.
        frames: how many frames of a clip: as many, evenly over the clip; with `fps`, at most as many.
        fps: frames per second of the clip (see `visual.video`).
        max_seconds: how much of a clip is looked at, from its beginning; None: all.
        frame_pooling: k, so that the mean of k x k neighbouring features of a frame becomes one.
        pixel_shuffle: r of the projector, which makes one of r x r neighbouring features, of a frame after pooling.

    Raises:
        ValueError: a setting out of range, or a `pixel_shuffle` that does not suit the encoder's features.

    Attributes:
        spec: the settings but `pixel_shuffle` (which the projector records), JSON-able.
        sampling: those of them that say which frames of a clip are taken, arguments of `visual.video.load_frames`.
        num_features: how many features an image's view has, after pixel shuffle.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        *,
        max_tiles: int = 0,
        frames: int = 8,
        fps: float | None = None,
        max_seconds: float | None = None,
        frame_pooling: int = 1,
        pixel_shuffle: int = 1,
    ) -> None:
        self.spec = {
            "max_tiles": max_tiles,
            "frames": frames,
            "fps": fps,
            "max_seconds": max_seconds,
            "frame_pooling": frame_pooling,
        }
        for name, least in (("max_tiles", 0), ("frames", 1), ("frame_pooling", 1)):
            if not isinstance(self.spec[name], int) or self.spec[name] < least:
                raise ValueError(f"{name} is a whole number from {least} on, not {self.spec[name]!r}")
        for name in ("fps", "max_seconds"):
            if self.spec[name] is not None and not 0 < self.spec[name] < float("inf"):
                raise ValueError(f"{name} is a number above 0, or None, not {self.spec[name]!r}")
        self.num_features = feature_count(encoder.num_features, encoder.grid, shuffle=pixel_shuffle)
        self._encoder_features, self._grid = encoder.num_features, encoder.grid
        self._pixel_shuffle = pixel_shuffle
        self._image_size = encoder.image_size
        self._load_preprocess: Callable[[], Preprocess] = encoder.preprocess_loader
        self.sampling = {name: self.spec[name] for name in ("frames", "fps", "max_seconds")}

    @cached_property
    def preprocess(self) -> Preprocess:
        """The encoder's preprocessing, read at first use; raises what `VisionEncoder.preprocess` raises."""
        return self._load_preprocess()

    @property
    def frame_features(self) -> int:
        """How many features a frame has, after pooling and pixel shuffle.

        Raises:
            ValueError: `frame_pooling`, or `pixel_shuffle` after it, does not suit the encoder's features.
        """
        try:
            pooling = self.spec["frame_pooling"]
            return feature_count(self._encoder_features, self._grid, pooling, self._pixel_shuffle)
        except ValueError as error:
            raise ValueError(f"frames of a clip (frame_pooling={self.spec['frame_pooling']}): {error}") from error

    def features(self, kind: str, file: File) -> list[int]:
        """`image_features` or `video_features`, as `kind` says: "image" or "video"."""
        return self.image_features(file) if kind == "image" else self.video_features(file)

    def load(self, kind: str, file: File) -> Views:
        """`load_image` or `load_video`, as `kind` says: "image" or "video"."""
        return self.load_image(file) if kind == "image" else self.load_video(file)

    def image_features(self, image: File | Image.Image) -> list[int]:
        """Features of each view that `load_image` will give. Without tiles the file is not opened.

        Raises:
            FileNotFoundError, ValueError: with tiles, a file that is missing or no image; names it.
        """
        return [self.num_features] * (1 + self._tiles(image_size(image) if self.spec["max_tiles"] else None))

    def video_features(self, file: File) -> list[int]:
        """Features of each frame that `load_video` will give. Without `fps` the file is not opened.

        Raises:
            FileNotFoundError, ValueError: with `fps`, a file that is missing or no video; names it.
        """
        count = self.spec["frames"] if self.spec["fps"] is None else count_frames(file, **self.sampling)
        return [self.frame_features] * count

    def load_image(self, image: File | Image.Image) -> Views:
        """The views of an image: the whole, then its tiles.

        Raises:
            FileNotFoundError, ValueError: the file is missing, or can't be read as an image; names it.
        """
        image = load_image(image)
        pixel_values = self.preprocess([image])
        if self._tiles(image.size):
            tiles = cut(image, best_grid(image.size, self._image_size, self.spec["max_tiles"]), self._image_size)
            pixel_values = torch.cat([pixel_values, self.preprocess.exact(tiles)])
        return Views(pixel_values, [self.num_features] * len(pixel_values))

    def load_video(self, file: File) -> Views:
        """The frames of a clip, in the order of time.

        Raises:
            FileNotFoundError, ValueError: the file is missing, or can't be read as a video; names it.
        """
        views: list[Tensor] = []
        before = None
        for frame in load_frames(file, **self.sampling):
            # The same picture again, where a clip has fewer of them than are asked for.
            views.append(views[-1] if frame is before else self.preprocess([frame])[0])
            before = frame
        return Views(torch.stack(views), [self.frame_features] * len(views))

    def _tiles(self, size: tuple[int, int] | None) -> int:
        """How many tiles an image of `size` (width, height) has."""
        if size is None or not self.spec["max_tiles"]:
            return 0
        rows, columns = best_grid(size, self._image_size, self.spec["max_tiles"])
        return rows * columns if rows * columns > 1 else 0
