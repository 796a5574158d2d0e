"""Media of either kind: are they still what is known about them, and if not, what are they?"""

import os
import stat
from collections.abc import Sequence
from typing import NamedTuple

from dataprocess.images import check_image

# Kinds of media. They stand before the digests in the keys by which train and validation are divided.
IMAGE, VIDEO = "", "video:"
KINDS = {"images": IMAGE, "videos": VIDEO}  # by the columns of a record


class Finding(NamedTuple):
    """What is known about a file. Without `size` nothing lasting is known: it has to be looked at again."""

    size: int | None = None  # bytes
    modified: int | None = None  # nanoseconds
    digest: str | None = None  # of a sound file
    reason: str | None = None  # of any other, in few words
    problem: str | None = None  # and in full


class Medium(NamedTuple):
    """A file that has to be sound, and what is known about it from before."""

    kind: str  # IMAGE or VIDEO
    path: str
    known: Finding


def check_media(media: Sequence[Medium]) -> list[Finding]:
    """What each of the files is. One of which size and time of change are known is not opened."""
    return [_check(medium) for medium in media]


def _check(medium: Medium) -> Finding:
    try:
        status = os.stat(medium.path)
        now = (status.st_size, status.st_mtime_ns)
    except (OSError, ValueError):  # a path with a null character can't even be asked about
        now = (None, None)
    if now[0] is not None and now == medium.known[:2]:
        return medium.known
    if now[0] is not None and not stat.S_ISREG(status.st_mode):  # of a pipe, reading would never end
        what = "video" if medium.kind == VIDEO else "image"
        return Finding(reason=f"{what} unreadable", problem=f"{medium.path}: not a file, but a folder, pipe or device")
    if medium.kind == VIDEO:
        from dataprocess.videos import check_video  # it loads FFmpeg's libraries

        checked = check_video(medium.path)
    else:
        checked = check_image(medium.path)
    if checked.digest and now[0] is None:
        return _check(medium)  # it has just appeared
    # A fault may pass: memory was short, a disk away, another version of a decoder reads the file. There are few.
    now = now if checked.digest else (None, None)
    return Finding(*now, checked.digest, checked.reason, checked.problem)
