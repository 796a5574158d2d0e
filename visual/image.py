"""Any image file -> RGB."""

import os

import numpy as np
from PIL import Image, ImageOps


def load_image(source: str | os.PathLike | Image.Image) -> Image.Image:
    """An image of any mode and format that Pillow reads, upright and in RGB.

    - EXIF orientation is applied; of an animation the first frame is taken.
    - Transparent pixels (alpha channel, palette entry, colour key) are composited on white.
    - 16-bit grey ("I;16", and "I" within 0..65535) is divided by 257. Wider integers, and floats outside [0, 1],
      have no fixed range: their smallest value becomes 0 and their largest 255. Floats within [0, 1] are
      multiplied by 255.
    - CMYK becomes RGB by Pillow's formula, without a colour profile.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: empty, truncated, corrupt or no image; more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
            The message names the file.
    """
    if isinstance(source, Image.Image):
        return _decode(source, getattr(source, "filename", "") or f"image of mode {source.mode}")
    name = os.fspath(source)
    try:
        with Image.open(name) as image:
            return _decode(image, name)
    except FileNotFoundError:
        raise FileNotFoundError(f"no image file {name}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: {_bomb_hint()} ({error})") from error
    except Image.UnidentifiedImageError as error:
        what = "is empty" if os.path.getsize(name) == 0 else "is not an image in a format that Pillow reads"
        raise ValueError(f"{name} {what}") from error
    except OSError as error:
        raise ValueError(f"{name} can't be read: {error}") from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{name}: {width}x{height} pixels, {_bomb_hint()}")
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    # On corrupt data Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise ValueError(f"{name} can't be decoded: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError("it has no pixels")
    if image.mode.startswith(("I", "F")):
        image = _to_8_bit(image)
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or float -> "L"; Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and 0 <= low and high <= 1:
        low, high = 0.0, 1.0
    elif image.mode != "F" and 0 <= low and high <= 65535:
        low, high = 0.0, 65535.0
    scaled = (values - low) * (255 / ((high - low) or 1))
    return Image.fromarray(np.round(scaled).astype(np.uint8))


def _bomb_hint() -> str:
    return (
        f"above the limit of {Image.MAX_IMAGE_PIXELS} pixels against decompression bombs; "
        "raise PIL.Image.MAX_IMAGE_PIXELS if the file is to be trusted"
    )
