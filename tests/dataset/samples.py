"""What several tests of this room build their cases from."""

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from visual.media import Media

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
SHARED = Path(__file__).resolve().parents[3] / "shared"  # beside the repository; tests that need it skip without it
IMAGE_FEATURES = 4
FRAME_FEATURES = 2


class StubViews(NamedTuple):
    pixel_values: torch.Tensor
    features: list[int]


class StubMedia:
    """Stands for `visual.media.Media`: views are [3, 2, 2], filled with one value that tells where they come from.

    An image has one view, its first pixel, and with `tiles` as many more as it is pixels wide. A clip is a text file
    of numbers, its frames; its views are as many as `frames` says, or all, for which its header is read.
    """

    preprocess = None
    frame_features = FRAME_FEATURES
    features, load = Media.features, Media.load

    def __init__(self, tiles: bool = False, frames: int | None = None):
        self.tiles, self.frames = tiles, frames
        self.decoded: list[str] = []

    def image_features(self, path) -> list[int]:
        if not self.tiles:
            return [IMAGE_FEATURES]
        with Image.open(path) as image:
            return [IMAGE_FEATURES] * (1 + image.width)

    def video_features(self, path) -> list[int]:
        return [FRAME_FEATURES] * (self.frames or len(Path(path).read_text().split()))

    def load_image(self, path) -> StubViews:
        self.decoded.append(Path(path).name)
        try:
            with Image.open(path) as image:
                value = image.getpixel((0, 0))[0]
        except FileNotFoundError:
            raise FileNotFoundError(f"no image file {path}") from None
        except OSError as error:
            raise ValueError(f"{path} can't be read: {error}") from error
        return self._views([value] * len(self.image_features(path)), IMAGE_FEATURES)

    def load_video(self, path) -> StubViews:
        self.decoded.append(Path(path).name)
        values = [float(value) for value in Path(path).read_text().split()]  # "broken" raises ValueError
        values = values[: self.frames]
        return self._views(values, FRAME_FEATURES)

    def _views(self, values: list[float], features: int) -> StubViews:
        pixels = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        return StubViews(pixels, [features] * len(values))


def record(*contents: str, images: tuple[str, ...] = (), name: str = "r", **fields) -> dict:
    """Turns of user and assistant, the user's first."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    media = {"images": list(images), "videos": list(fields.pop("videos", ())), "audios": []}
    return {"id": name, "source": "test", **media, "messages": messages, **fields}


def plain(text: str, name: str = "r", **fields) -> dict:
    """A record of plain text."""
    return {**record(name=name, **fields), "messages": [{"role": "text", "content": text}]}
