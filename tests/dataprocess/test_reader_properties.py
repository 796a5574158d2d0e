"""Rows and images that nobody thought of."""

import io
import os
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dataprocess.images import check_image
from dataprocess.readers import row_records
from dataprocess.sources import FORMATS, Source
from dataset.record import RecordError
from visual.image import image_size, load_image

FAST = settings(
    derandomize=True, max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(st.characters(), max_size=6) | st.sampled_from(
    ["<image>", "a.jpg", "../a", "human", "gpt", "user", "assistant", "[|Human|] q [|AI|] a", "\0", "\ud800"]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
SPEECH = st.lists(st.fixed_dictionaries({"from": TEXT | ANYTHING, "value": TEXT | ANYTHING}), max_size=3)
TURNS = st.lists(st.fixed_dictionaries({"role": TEXT | ANYTHING, "content": TEXT | ANYTHING}), max_size=3)
# Keys that readers ask for, so that their depths are reached.
KEYS = {
    "ai_challenger": ["image_id", "caption"],
    "lavis": ["image", "caption"],
    "coco": ["file_name", "captions"],
    "karpathy": ["filepath", "filename", "sentences", "split"],
    "minigpt4": ["image_id", "caption"],
    "image_map": ["q", "a", "name", "folder"],
    "a_okvqa": ["image", "image_id", "question", "choices", "correct_choice_idx", "direct_answers", "rationales"],
    "ocr_vqa": ["key", "filename", "imageURL", "questions", "answers"],
    **dict.fromkeys(("llava", "sharegpt4o", "zero_nlp"), ["image", "video", "conversations"]),
    "messages": ["messages", "images", "videos", "audios", "meta"],
    "baize": ["input"],
    "dolly": ["instruction", "context", "response"],
    "alpaca": ["instruction", "input", "output"],
    "table": ["text", "image", "video", "instruction", "answer"],
}
DEEP = {"conversations": SPEECH, "messages": TURNS, "sentences": st.lists(st.fixed_dictionaries({"raw": TEXT}))}


def row_of(format: str):
    values = {key: DEEP.get(key, st.lists(TEXT, max_size=3)) | TEXT | ANYTHING for key in KEYS[format]}
    if format == "image_map":  # its reader of files sees to these two
        values |= {"name": TEXT | ANYTHING, "folder": st.just("/images")}
    return st.fixed_dictionaries({}, optional=values)


@pytest.mark.parametrize("format", FORMATS)
def test_any_row_makes_records_or_record_errors(format, tmp_path):
    source = Source(format, str(tmp_path / "f.json"), str(tmp_path), name="s", choices=True)

    @FAST
    @given(row_of(format) | ANYTHING)
    def holds(row):
        if format == "image_map" and isinstance(row, dict):
            row = {"folder": "/images", "name": "a.jpg", **row}
        for result in row_records(row, 3, source, 0):
            if isinstance(result, RecordError):
                assert result.reason and "'s:3" in str(result) and "f.json" in str(result)
                str(result).encode()
            else:
                assert result["id"].startswith("s:3") and result["source"] == "s"
                assert all(os.path.isabs(path) for path in result["images"] + result["videos"])

    holds()


def encoded(format: str) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((24, 16), 40).convert("RGB").save(file, format)
    return file.getvalue()


IMAGES = {format: encoded(format) for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")}


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Some bytes changed, or the end cut off, or a piece taken out."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    start, length = draw(st.integers(0, len(content))), draw(st.integers(0, 40))
    if draw(st.booleans()):
        del content[start : start + length]
    return bytes(content[: draw(st.sampled_from([len(content), start]))])


def looked_at(path: str, content: bytes) -> None:
    """Neither the check nor the loading raises anything but what its docstring says; the check passes what loads."""
    with open(path, "wb") as file:
        file.write(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about metadata that are damaged too
        checked = check_image(path)
        assert (checked.digest is None) == (checked.reason is not None)
        assert checked.reason is None or path in checked.problem
        try:
            size = load_image(path).size
        except ValueError as error:
            assert path in str(error)
            size = None
        try:
            assert image_size(path) == size or size is None
        except ValueError as error:
            assert path in str(error) and size is None
    assert (size is None) == (checked.digest is None)


@FAST
@given(st.binary(max_size=200) | st.sampled_from([b"GIF89a", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"BM"]))
def test_any_bytes(tmp_path, content):
    looked_at(str(tmp_path / "image"), content)


@pytest.mark.parametrize("format", IMAGES)
def test_damaged_images(format, tmp_path):
    @FAST
    @given(damaged(IMAGES[format]))
    def holds(content):
        looked_at(str(tmp_path / "image"), content)

    holds()


def test_a_tiff_whose_width_is_no_number(tmp_path):
    content = bytearray(IMAGES["TIFF"])
    assert content[10:14] == b"\x00\x01\x04\x00"  # tag 256, the width, is a number of 32 bits
    content[12] = 1  # a single byte: Pillow raises ValueError when it opens the file
    looked_at(str(tmp_path / "image"), bytes(content))
