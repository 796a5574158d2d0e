import hashlib
import random
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from dataprocess import images
from dataprocess.images import FORMATS, check_image
from visual import image


@pytest.fixture
def folder(tmp_path) -> Path:
    noise = Image.effect_noise((200, 120), 80)
    noise.save(tmp_path / "grey.jpg", quality=90)
    noise.convert("P").save(tmp_path / "palette.gif")
    noise.convert("CMYK").save(tmp_path / "cmyk.jpg")
    noise.convert("RGBA").save(tmp_path / "alpha.png")
    content = (tmp_path / "grey.jpg").read_bytes()
    (tmp_path / "copy.jpg").write_bytes(content)
    (tmp_path / "cut.jpg").write_bytes(content[:-200])
    (tmp_path / "cut.png").write_bytes((tmp_path / "alpha.png").read_bytes()[:-200])
    noise.save(tmp_path / "eps.png", format="EPS")  # a program, which Ghostscript would run
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    return tmp_path


def test_sound_images_have_the_digest_of_their_bytes(folder):
    for name in ("grey.jpg", "palette.gif", "cmyk.jpg", "alpha.png"):
        digest = hashlib.blake2b((folder / name).read_bytes(), digest_size=16).hexdigest()
        assert check_image(str(folder / name))[:3] == (digest, None, None)
    assert check_image(str(folder / "copy.jpg")) == check_image(str(folder / "grey.jpg"))


@pytest.mark.parametrize(
    ("name", "reason", "problem"),
    [
        ("absent.jpg", "image missing", "No such file"),
        ("cut.jpg", "image unreadable", "image file is truncated"),
        ("cut.png", "image unreadable", "truncated"),
        ("page.jpg", "image unreadable", "not an image in a format that is read"),
        ("eps.png", "image unreadable", "not an image in a format that is read"),
        ("empty.jpg", "image unreadable", "the file is empty"),
        ("folder.jpg", "image unreadable", "Is a directory"),
        ("a\0b.jpg", "image unreadable", "null"),
        ("x" * 300, "image unreadable", "name too long"),
    ],
)
def test_bad_images(folder, name, reason, problem):
    checked = check_image(str(folder / name))
    assert checked.digest is None and checked.reason == reason
    assert checked.problem.startswith(f"{folder}/{name}: ") and problem in checked.problem


def test_formats_are_those_that_training_reads():
    assert FORMATS == image.FORMATS


def test_images_above_pillows_limit(folder, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 120)
    assert check_image(str(folder / "grey.jpg")).reason is None
    for limit, stated in ((200 * 119, 200 * 119), (1000, 2000)):  # Pillow warns above it, and refuses above twice it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        checked = check_image(str(folder / "grey.jpg"))
        assert checked.reason == "image too large" and f"limit of {stated} pixels" in checked.problem
    assert not recwarn.list


def test_files_that_are_too_large_are_not_read_whole(folder, monkeypatch):
    monkeypatch.setattr(images, "LARGEST", 1000)
    assert "grey.jpg: the file has more than" in check_image(str(folder / "grey.jpg")).problem


def test_decompression_bomb(folder):
    """A PNG of a few bytes that says to be 60,000 pixels wide and high."""
    header = b"IHDR" + struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    checked = check_image(str(folder / "bomb.png"))
    assert checked.reason == "image too large" and "3600000000 pixels" in checked.problem


def test_every_cut_of_a_file_is_found(folder):
    """No prefix of an image passes for the whole, but where only the end marker of a JPEG is missing."""
    for name in ("grey.jpg", "alpha.png"):
        content = (folder / name).read_bytes()
        for length in random.Random(0).sample(range(len(content) - 20), 60):
            (folder / "part").write_bytes(content[:length])
            assert check_image(str(folder / "part")).reason == "image unreadable", (name, length)
