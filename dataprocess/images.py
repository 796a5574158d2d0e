"""Do images exist and decode, and which of them are the same picture?"""

import hashlib
import io
from collections.abc import Callable, Iterable
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm


class Checked(NamedTuple):
    """`digest` of the file's bytes, the same for copies under several names, or what is wrong with the file."""

    digest: str | None
    reason: str | None = None
    problem: str | None = None


def check_images(paths: Iterable[str], workers: int) -> dict[str, Checked]:
    """Reads and decodes every image whole."""
    return check_files(paths, check_image, workers, "images")


def check_files(
    paths: Iterable[str], check: Callable[[str], Checked], workers: int, what: str
) -> dict[str, Checked]:
    """What `check` finds of each path. Threads do: decoders of images and videos leave Python's lock to others."""
    paths = list(paths)
    with ThreadPool(workers) as pool:
        results = pool.imap(check, paths, chunksize=16)
        results = tqdm(results, f"Checking {what}", len(paths), unit=f" {what}", disable=None)
        return dict(zip(paths, results, strict=True))


def check_image(path: str) -> Checked:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return Checked(None, "image missing" if missing else "image unreadable", f"{path}: {error.strerror}")
    try:
        with Image.open(io.BytesIO(content)) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                problem = f"{path}: {image.width}x{image.height} pixels, above the limit of {limit}"
                return Checked(None, "image too large", problem)
            image.draft(None, (1, 1))  # a JPEG is still read to its end, but put together at an eighth of its size
            image.load()
    except Image.DecompressionBombError as error:
        return Checked(None, "image too large", f"{path}: {error}")
    except Image.UnidentifiedImageError:
        return Checked(None, "image unreadable", f"{path}: not an image in a format that Pillow reads")
    except Exception as error:  # on corrupt data Pillow raises nearly anything, SyntaxError and IndexError included
        return Checked(None, "image unreadable", f"{path}: {error}")
    return Checked(hashlib.blake2b(content, digest_size=16).hexdigest())
