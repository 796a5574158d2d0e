from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def image_root(tmp_path) -> Path:
    for value, name in enumerate(("a.png", "b.png", "c.png"), start=1):
        Image.new("RGB", (4, 4), (value, value, value)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "v.mp4").write_text("10 11 12")
    (tmp_path / "w.mp4").write_text("20 21")
    (tmp_path / "broken.mp4").write_text("30 broken")
    return tmp_path
