import hashlib
from pathlib import Path

import pytest
from PIL import Image

from dataprocess.images import check_image, check_images


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
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    return tmp_path


def test_sound_images_have_the_digest_of_their_bytes(folder):
    for name in ("grey.jpg", "palette.gif", "cmyk.jpg", "alpha.png"):
        digest = hashlib.blake2b((folder / name).read_bytes(), digest_size=16).hexdigest()
        assert check_image(str(folder / name)) == (digest, None, None)
    assert check_image(str(folder / "copy.jpg")) == check_image(str(folder / "grey.jpg"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.jpg", "image missing"),
        ("cut.jpg", "image unreadable"),
        ("cut.png", "image unreadable"),
        ("page.jpg", "image unreadable"),
        ("empty.jpg", "image unreadable"),
        ("folder.jpg", "image unreadable"),
    ],
)
def test_bad_images(folder, name, reason):
    checked = check_image(str(folder / name))
    assert checked.digest is None and checked.reason == reason and name in checked.problem


def test_images_above_pillows_limit(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 120)
    assert check_image(str(folder / "grey.jpg")).reason is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 119)
    with pytest.warns(Image.DecompressionBombWarning):
        assert check_image(str(folder / "grey.jpg")).reason == "image too large"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # above the double limit Pillow itself refuses
    assert check_image(str(folder / "grey.jpg")).reason == "image too large"


@pytest.mark.parametrize("workers", [1, 4])
def test_many(folder, workers):
    paths = sorted(str(path) for path in folder.iterdir()) * 5
    assert check_images(paths, workers) == {path: check_image(path) for path in paths}
