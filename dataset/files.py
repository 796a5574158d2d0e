"""Files that are whole or not there."""

import os
from pathlib import Path


def write_text(text: str, path: str | Path) -> None:
    """Writes aside, then renames; makes the folder where there is none.

    Raises:
        OSError: the file can't be written; names it.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise type(error)(error.errno, f"{path} can't be written: {error.strerror}") from error
