"""Files that processes write together: all of them, or an error that all processes raise."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError

from run_folder import RunError

FAILURES = (OSError, RuntimeError, SafetensorError)  # when a write fails, of Python, torch.save and safetensors


def is_failed_write(error: Exception) -> bool:
    return isinstance(error, FAILURES) or type(error) is Exception  # the latter is what tokenizers raises


class Writing:
    """Writes of one checkpoint into `folder`.

    A write that fails is remembered and those after it are left out, but nothing is raised before `agree`: the process
    still takes part in what all of them do together between two writes, and nobody waits for it in vain.

    Args:
        name: of what is written, for the message.
        kept: what says that a former state is safe, for the message.
    """

    def __init__(self, folder: Path, name: str, kept: str):
        self.folder, self.name, self.kept = folder, name, kept
        self.bytes = 0  # of all that was to be written
        self.problem: Exception | None = None

    def __call__(self, write: Callable, *args, size: int = 0) -> None:
        """Calls `write(*args)`, which writes about `size` bytes."""
        self.bytes += size
        if self.problem is None:
            try:
                write(*args)
            except Exception as error:
                if not is_failed_write(error):
                    raise
                self.problem = error

    def agree(self) -> None:
        """Raises RunError in every process if a write failed in one of them; the folder is then gone."""
        messages = [self._message() if self.problem else None]
        if dist.is_initialized():
            messages = [None] * dist.get_world_size()
            dist.all_gather_object(messages, self._message() if self.problem else None)
        if message := next(filter(None, messages), None):
            shutil.rmtree(self.folder, ignore_errors=True)
            raise RunError(message) from self.problem

    def _message(self) -> str:
        free = shutil.disk_usage(existing(self.folder)).free
        reason = " ".join(str(self.problem).split()) or type(self.problem).__name__
        return (
            f"{self.name} can't be written: {reason}. It takes about {size_text(self.bytes)}, and "
            f"{size_text(free)} are free where {self.folder.parent} lies. {self.kept} Free space there (or mind a "
            "quota, or lower train.save_total_limit); the same command then continues"
        )


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    while not os.path.exists(folder):
        folder = folder.parent
    return folder


def size_text(size: float) -> str:
    """Bytes as a reader would say them: `1.2 GB`."""
    units = ["B", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{size:,.1f} {units[0]}"
