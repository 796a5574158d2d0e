"""MMBench: questions with up to four options, whose images stand in the file itself."""

import base64
import binascii
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dataset.rows import read_csv_rows, shown
from evaluation.benchmarks.entries import Files, field, record
from evaluation.language import language_of

OPTIONS = "ABCDEFGH"
REFERENCE = 64  # an image no longer than this is the index of the row that holds it
ROTATION = 1_000_000  # the k-th rotation of a question's options has its index and so many times k
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}


def mmbench(files: Files) -> Iterator[dict]:
    """`MMBench_DEV_EN.tsv`, `MMBench_DEV_CN.tsv`, `mmbench_dev_20230712.tsv` and the like.

    Tab-separated columns `index question hint A B C D answer category image l2-category split ...`, where `image` is
    the base64 of a file or the index of an earlier row with the same one. Rows whose index is a million or a multiple
    of it higher ask the same question with its options rotated; `meta.question` is the index that they share.

    Images are written to `image_root` under a digest of their bytes, each once, before their record comes.
    """
    names: dict[str, str] = {}
    for number, row in enumerate(read_csv_rows(files.data, delimiter="\t"), start=1):
        where = f"{files.data}, row {number}"
        index = field(row, "index", str, where)
        if not index.isdecimal():
            raise ValueError(f"{where}: expected a whole number under 'index', got {shown(index)}")
        where = f"{where} (index {index})"
        names[index] = _image(field(row, "image", str, where), names, files.image_root, where)
        options = {letter: row[letter].strip() for letter in OPTIONS if not absent(row.get(letter))}
        answer = _answer(row, list(options), where)
        question = field(row, "question", str, where)
        hint = [] if absent(row.get("hint")) else [row["hint"].strip()]
        lines = [*hint, question.strip(), *(f"{letter}. {option}" for letter, option in options.items())]
        language = language_of(question)
        yield record(
            files.name(index),
            "mmbench",
            names[index],
            "\n".join(lines),
            files.suffix[language],
            answer,
            choices=list(options),
            metric="choice",
            language=language,
            question=int(index) % ROTATION,
            **{key.replace("-", "_"): row[key] for key in ("category", "l2-category", "split") if row.get(key)},
        )


def absent(cell: str | None) -> bool:
    """Whether a cell holds nothing; "nan" is how pandas writes that."""
    return cell is None or cell.strip().lower() in ("", "nan")


def _answer(row: dict, letters: list[str], where: str) -> str:
    if len(letters) < 2 or letters != list(OPTIONS[: len(letters)]):
        raise ValueError(f"{where}: expected two options or more, A, B, ... without a gap, got {letters}")
    if absent(row.get("answer")):
        problem = "there is no answer; MMBench keeps those of its test part to itself"
        raise ValueError(f"{where}: expected one of {', '.join(letters)} under 'answer', but {problem}: take dev")
    answer = row["answer"].strip()
    if answer not in letters:
        raise ValueError(f"{where}: expected one of {', '.join(letters)} under 'answer', got {shown(answer)}")
    return answer


def _image(cell: str, names: dict[str, str], folder: Path, where: str) -> str:
    """Name of a row's image in `folder`, where it lies from now on."""
    if len(cell) <= REFERENCE:
        if cell.strip() not in names:
            problem = f"expected base64 of an image, or the index of an earlier row, under 'image', got {shown(cell)}"
            raise ValueError(f"{where}: {problem}")
        return names[cell.strip()]
    try:
        content = base64.b64decode(cell, validate=True)
        with Image.open(io.BytesIO(content)) as image:
            suffix = SUFFIXES[image.format]
    except (binascii.Error, UnidentifiedImageError, KeyError):
        raise ValueError(f"{where}: expected base64 of an image under 'image', got {shown(cell)}") from None
    name = hashlib.sha256(content).hexdigest()[:24] + suffix
    path = folder / name
    if not path.exists():
        _write(content, path)
    return name


def _write(content: bytes, path: Path) -> None:
    """Writes aside and renames, so that what stands under a name is whole, after a power failure too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
