import base64
from pathlib import Path

import pytest
from PIL import Image

from qwen import QWenTokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> QWenTokenizer:
    """A small ranks file: the 256 bytes and a few merges, one of which joins two line breaks."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens = [bytes([byte]) for byte in range(256)] + [b"us", b"er", b"user", b"an", b"\n\n", "图".encode()[:2]]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_text("".join(lines))
    return QWenTokenizer.from_pretrained(folder)


@pytest.fixture
def image_root(tmp_path) -> Path:
    for value, name in enumerate(("a.png", "b.png", "c.png"), start=1):
        Image.new("RGB", (4, 4), (value, value, value)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "v.mp4").write_text("10 11 12")
    (tmp_path / "w.mp4").write_text("20 21")
    (tmp_path / "broken.mp4").write_text("30 broken")
    return tmp_path
