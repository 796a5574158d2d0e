"""Do images exist and decode, and which of them are the same picture?"""

import hashlib
import io
import os
import warnings
from typing import NamedTuple

from PIL import ExifTags, Image, ImageOps

# Formats that training reads, as in `visual.image`.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF", "JPEG2000", "ICO", "TGA")
LARGEST = 1 << 30  # bytes of a file; with Pillow's limit of pixels, no image needs as many


class Checked(NamedTuple):
    """`digest` of the file's bytes, the same for copies under several names, or what is wrong with the file."""

    digest: str | None
    reason: str | None = None
    problem: str | None = None


def check_image(path: str) -> Checked:
    """Reads and decodes an image whole. A JPEG is read to its end, but put together at an eighth of its size."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > LARGEST:
                return Checked(None, "image too large", f"{path}: the file has more than {LARGEST >> 20} MiB")
            content = file.read()
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        problem = f"{path}: {getattr(error, 'strerror', None) or error}"
        return Checked(None, "image missing" if missing else "image unreadable", problem)
    if not content:
        return Checked(None, "image unreadable", f"{path}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # just above the limit Pillow only warns
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                image.draft(None, (1, 1))
                image.load()
                if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                    ImageOps.exif_transpose(image)  # as training will do; it fails where the metadata are damaged
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        hint = "if the file is to be trusted, scale it down"
        return Checked(None, "image too large", f"{path}: {error}; {hint}")
    except Image.UnidentifiedImageError:
        return Checked(None, "image unreadable", f"{path}: not an image in a format that is read")
    except Exception as error:  # on corrupt data Pillow raises nearly anything, SyntaxError and IndexError included
        return Checked(None, "image unreadable", f"{path}: {str(error) or type(error).__name__}")
    return Checked(hashlib.blake2b(content, digest_size=16).hexdigest())
