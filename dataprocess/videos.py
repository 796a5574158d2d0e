"""Do videos exist and decode, and which of them are the same file?"""

import hashlib
import os
from collections.abc import Iterable
from itertools import islice

import av
from PIL import Image

from dataprocess.images import Checked, check_files

ENDS = 1 << 20  # bytes at either end of a file by which it is recognised, beside its length


def check_videos(paths: Iterable[str], workers: int) -> dict[str, Checked]:
    """Opens every video and decodes its first frame; what comes after it costs neither time nor memory."""
    return check_files(paths, check_video, workers, "videos")


def check_video(path: str) -> Checked:
    """`digest` is of the file's length and both of its ends: whole videos are large, and differ there if at all."""
    try:
        with av.open(path) as container:
            if not container.streams.video:
                return Checked(None, "video unreadable", f"{path}: it has no video stream")
            stream = container.streams.video[0]
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and stream.width * stream.height > limit:
                problem = f"{path}: {stream.width}x{stream.height} pixels, above the limit of {limit}"
                return Checked(None, "video too large", problem)
            if not list(islice(container.decode(stream), 1)):
                return Checked(None, "video unreadable", f"{path}: it has no frame")
        return Checked(_digest(path))
    except FileNotFoundError as error:
        return Checked(None, "video missing", f"{path}: {error.strerror}")
    except Exception as error:  # on corrupt data the library raises OSError, ValueError and others besides
        return Checked(None, "video unreadable", f"{path}: {error}")


def _digest(path: str) -> str:
    length = os.path.getsize(path)
    digest = hashlib.blake2b(str(length).encode(), digest_size=16)
    with open(path, "rb") as file:
        digest.update(file.read(ENDS))
        file.seek(max(length - ENDS, 0))
        digest.update(file.read(ENDS))
    return digest.hexdigest()
