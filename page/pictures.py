"""Pictures and frames of clips as parts of a page: small, and within it."""

import base64
import io

import numpy as np
from PIL import Image

from visual.image import File, load_image
from visual.video import load_frames

PICTURE, FRAME = 320, 128  # longest side of what is embedded, in pixels
SHOWN_FRAMES = 32  # of a clip
LEAST = 96  # pixels of the page on the longest side: a few would be a dot
DRAWN_BYTES = 6000  # of a PNG that is taken for a small drawing


def pictures_of(
    kind: str, file: File, sampling: dict, most_frames: int = SHOWN_FRAMES, least: int = LEAST
) -> tuple[list[dict], list[str]]:
    """What a page shows of an image or a clip, and in words how that differs from the file.

    Args:
        kind: "image" or "video".
        sampling: of a clip, what `visual.video.load_frames` takes: `frames`, `fps`, `max_seconds`.
        most_frames: of more, as many are shown, evenly.
        least: pixels on the page that the longest side of an image has at least, if an integer multiple is near.

    Raises:
        FileNotFoundError, ValueError: the file is missing, or can't be read; names it.
    """
    if kind == "image":
        image = load_image(file)
        pictures = [_picture(image, PICTURE, "image", least)]
        return pictures, [_scaled(image, pictures[0])]
    frames = list(load_frames(file, **sampling))
    every = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), most_frames)).round().astype(int)).tolist()
    pictures = [_picture(frames[place], FRAME, f"frame {place + 1} of {len(frames)}", LEAST) for place in every]
    facts = [_scaled(frames[0], pictures[0])]
    if len(every) < len(frames):
        facts.append(f"{len(every)} of {len(frames)} frames are shown")
    return pictures, facts


def data_uri(image: Image.Image, longest: int) -> tuple[str, tuple[int, int]]:
    """An RGB image as a data URI, and the size that it has there: at most `longest` pixels on its longest side."""
    image = image.copy()
    image.thumbnail((longest, longest))
    kind, data = "png", b""
    if max(image.size) <= FRAME:
        data = _encoded(image, "png", optimize=True)
    # On a few pixels, and on drawings, JPEG's blocks would be seen.
    if max(image.size) > 64 and not 0 < len(data) <= DRAWN_BYTES:
        kind, data = "jpeg", _encoded(image, "jpeg", quality=82, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", image.size


def _encoded(image: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def _picture(image: Image.Image, longest: int, alt: str, least: int) -> dict:
    uri, (width, height) = data_uri(image, longest)
    enlarge = max(1, least // max(width, height))
    return {"uri": uri, "width": width * enlarge, "height": height * enlarge, "small": enlarge > 1, "alt": alt,
            "embedded": (width, height)}  # fmt: skip


def _scaled(image: Image.Image, picture: dict) -> str:
    """The size of an image, and that of the embedded one where it is another."""
    (width, height), embedded = image.size, picture["embedded"]
    text = f"{width} x {height} pixels"
    return text if (width, height) == embedded else f"{text}, here {embedded[0]} x {embedded[1]}"
