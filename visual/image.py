"""Any image file -> RGB.

A file is given by its path, or open for reading in binary mode, as a part of a larger one is; its `name` then stands in
the messages. An open file is read from its beginning and stays open.
"""

import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

# Formats whose header says how large the decoded image is; of others only decoding tells (an icon holds several).
FORMATS_WITH_SIZE = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "PPM")
# Formats that are read, whatever a file is called; "JPEG" reads MPO too. Of others that Pillow knows, EPS is a program,
# which Ghostscript would run, and most are met so rarely that errors in their decoders stay.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF", "JPEG2000", "ICO", "TGA")


File = str | os.PathLike | BinaryIO


def load_image(source: File | Image.Image) -> Image.Image:
    """An image of any mode, from a file in one of `FORMATS`, upright and in RGB.

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
    name = name_of(source)
    with _errors(source), opened(source) as file, Image.open(file, formats=FORMATS) as image:
        return _decode(image, name)


def image_size(source: File | Image.Image) -> tuple[int, int]:
    """(width, height) of what `load_image` makes of it, from the header of the file where its format allows that.

    Pixels behind a good header may still be damaged, which `load_image` finds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: empty or no image; more pixels than `PIL.Image.MAX_IMAGE_PIXELS`. The message names the file.
    """
    if isinstance(source, Image.Image):
        return load_image(source).size
    name = name_of(source)
    with _errors(source), opened(source) as file, Image.open(file, formats=FORMATS) as image:
        if image.format not in FORMATS_WITH_SIZE:
            return _decode(image, name).size
        check_pixels(*image.size, name)
        try:
            exif = _png_exif(source) if image.format == "PNG" else image.getexif()
        except Exception as error:  # as in `_decode`
            raise ValueError(f"{name} can't be decoded: {error}") from error
    turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by 90 degrees, mirrored or not
    return image.size[::-1] if turned else image.size


def _png_exif(source: File) -> Image.Exif:
    """What `getexif` would return; Pillow decodes the pixels first, as the metadata may stand behind them."""
    parts = []
    with opened(source) as file:
        parts.append(file.read(8))
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind in (b"IDAT", b"fdAT"):
                file.seek(length + 4, os.SEEK_CUR)
            else:
                parts += [header, file.read(length + 4)]
            if kind == b"IEND":
                break
        else:
            parts.append(b"\0\0\0\0IEND\xaeB`\x82")  # a file that is cut off
    with Image.open(io.BytesIO(b"".join(parts))) as image:
        return Image.Image.getexif(image)


def name_of(source: File) -> str:
    """What a file is called in messages."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else str(source.name)


@contextmanager
def opened(source: File) -> Iterator[BinaryIO]:
    """The file, open and at its beginning. Only what was opened here is closed in the end."""
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            yield file
    else:
        source.seek(0)
        yield source


def is_empty(source: File) -> bool:
    with opened(source) as file:
        return not file.read(1)


@contextmanager
def _errors(source: File) -> Iterator[None]:
    """What Pillow raises while it opens a file, as one line that names it."""
    name = name_of(source)
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"no image file {name}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: {_bomb_hint()} ({error})") from error
    except Image.UnidentifiedImageError as error:
        what = "is empty" if is_empty(source) else f"is not an image in a format that is read ({', '.join(FORMATS)})"
        raise ValueError(f"{name} {what}") from error
    except Exception as error:  # OSError; of a damaged TIFF TypeError, ValueError and others as well
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise  # it was told below
        raise ValueError(f"{name} can't be read: {error}") from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    check_pixels(*image.size, name)
    try:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    # On corrupt data Pillow's decoders raise nearly anything: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise ValueError(f"{name} can't be decoded: {error}") from error


def check_pixels(width: int, height: int, name: str) -> None:
    """Raises ValueError for more pixels than `PIL.Image.MAX_IMAGE_PIXELS`; `name` is for the message."""
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{name}: {width}x{height} pixels, {_bomb_hint()}")


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode in RGB, transparent pixels on white; raises ValueError where it has no pixels."""
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
