"""What comes from a browser: which texts and files are taken into a conversation."""

import mimetypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import UnidentifiedImageError

from chat.session import Session
from chat.texts import Problem
from visual.image import is_empty
from visual.video import count_frames


@dataclass(frozen=True)
class Limits:
    """What one question may bring along, so that it holds the model, which all share, only for so long.

    Attributes:
        prompt_tokens: of the conversation with its pictures and clips.
        characters: of a question, or of a system prompt; more are not even split into tokens.
        files: how many pictures and clips.
        megapixels: of a picture, or of a frame of a clip, in millions; `chat.web.Page` sets it for the whole process.
        seconds: length of a clip.
        upload_mb: of a file, in millions of bytes; the server refuses larger ones while they are being sent.
    """

    prompt_tokens: int = 8192
    characters: int = 50_000
    files: int = 16
    megapixels: float = 50.0
    seconds: float = 600.0
    upload_mb: float = 100.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise ValueError(f"max_{name} is a number above 0, not {value}")


def kind_of(file: Path) -> str:
    """Whether a file is a "video" or an "image", by its name."""
    return "video" if (mimetypes.guess_type(file.name)[0] or "").startswith("video/") else "image"


def check_length(text: str, limits: Limits) -> None:
    """Raises Problem for a text that is too long whatever its tokens are."""
    if len(text) > limits.characters:
        raise Problem("long_text", count=len(text), most=limits.characters)


def add_files(session: Session, files: list[str], limits: Limits, stopping: Callable[[], bool] = lambda: False) -> None:
    """Shows files with the next question, in place of those that waited for it.

    Args:
        stopping: whether to give up; asked before each file.

    Raises:
        Problem: more of them, or larger ones, than `limits` allow; one of them can't be read; or `stopping`. None is
            shown then.
    """
    session.waiting = []
    if len(files) > limits.files:
        raise Problem("many_files", count=len(files), most=limits.files)
    try:
        for file in files:
            if stopping():
                raise Problem("stopped")
            _add(session, Path(file), limits)
    except Exception:
        session.waiting = []
        raise


def _add(session: Session, file: Path, limits: Limits) -> None:
    kind = kind_of(file)
    try:
        if is_empty(file):
            raise Problem("empty_file", name=file.name)
        if kind == "image":
            session.add_image(file, file.name)
            return
        # At one frame per second the header tells; nothing is decoded for it.
        if count_frames(file, int(limits.seconds) + 2, fps=1) > limits.seconds:
            raise Problem("long_clip", name=file.name, most=limits.seconds)
        session.add_video(file, file.name)
    except Problem:
        raise
    except (OSError, ValueError) as error:
        if "decompression bombs" in str(error):  # of `visual.image`, whose advice is for who runs the server
            raise Problem("many_pixels", name=file.name, most=limits.megapixels) from error
        raise Problem(_fault(kind, error), name=file.name) from error


def _fault(kind: str, error: Exception) -> str:
    """What is wrong with a file, as a key of `TEXTS`: what libraries say is English and too special for who sent it."""
    if isinstance(error, FileNotFoundError):
        return "no_file"
    if kind == "video":
        return "bad_clip"
    return "no_image" if isinstance(error.__cause__, UnidentifiedImageError) else "bad_image"
