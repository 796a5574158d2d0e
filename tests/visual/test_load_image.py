"""Every mode, format and defect of an image file that load_image promises to handle."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from visual import load_image
from visual.image import FORMATS, image_size

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def save(image, path, **options):
    image.save(path, **options)
    return path


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb_is_unchanged(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = save(Image.fromarray(values), tmp_path / "a.png")
    for source in (path, str(path), Image.fromarray(values)):
        np.testing.assert_array_equal(pixels(load_image(source)), values)


def test_given_image_is_not_changed_in_place():
    image = Image.new("RGB", (2, 2), "red")
    load_image(image).putpixel((0, 0), (0, 0, 255))
    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_grey_and_one_bit(tmp_path):
    grey = load_image(save(Image.fromarray(RAMP), tmp_path / "l.png"))
    np.testing.assert_array_equal(pixels(grey), np.repeat(RAMP[..., None], 3, 2))
    bits = Image.fromarray(RAMP > 127)
    assert bits.mode == "1"
    loaded = pixels(load_image(save(bits, tmp_path / "1.png")))
    np.testing.assert_array_equal(loaded[..., 0], np.where(RAMP > 127, 255, 0))


def test_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([250, 10, 20, 30, 240, 50])
    image.putdata([0, 1])
    assert pixels(load_image(save(image, tmp_path / "p.png"))).tolist() == [[[250, 10, 20], [30, 240, 50]]]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_palette_with_transparency_is_on_white(tmp_path, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([250, 10, 20, 30, 240, 50])
    image.putdata([0, 1])
    path = save(image, tmp_path / "p.png", transparency=transparency)
    assert pixels(load_image(path)).tolist() == [[[250, 10, 20], [255, 255, 255]]]


def test_alpha_is_composited_on_white(tmp_path):
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(200, 0, 100, 255), (200, 0, 100, 0), (200, 0, 100, 51)])
    expected = [[[200, 0, 100], [255, 255, 255], [244, 204, 224]]]  # 0.2 * colour + 0.8 * 255
    assert pixels(load_image(save(rgba, tmp_path / "rgba.png"))).tolist() == expected
    la = Image.new("LA", (2, 1))
    la.putdata([(100, 255), (100, 51)])
    assert pixels(load_image(save(la, tmp_path / "la.png"))).tolist() == [[[100] * 3, [224] * 3]]


def test_colour_key_is_on_white(tmp_path):
    image = Image.new("RGB", (2, 1))
    image.putdata([(1, 2, 3), (4, 5, 6)])
    path = save(image, tmp_path / "key.png", transparency=(1, 2, 3))
    assert pixels(load_image(path)).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_cmyk_jpeg_as_adobe_writes_it(tmp_path):
    # Pillow writes CMYK JPEG inverted and marked by Adobe, as Photoshop does: cyan ink 255 is stored as 0.
    path = save(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), tmp_path / "cmyk.jpg", quality=100)
    assert b"Adobe" in path.read_bytes()
    with Image.open(path) as raw:
        assert raw.mode == "CMYK"
    np.testing.assert_allclose(pixels(load_image(path)), np.full((16, 16, 3), (0, 255, 255)), atol=2)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_is_scaled_not_clipped(tmp_path, suffix):
    path = save(Image.fromarray(RAMP.astype(np.uint16) * 257), tmp_path / f"deep.{suffix}")
    with Image.open(path) as raw:
        assert raw.mode == "I;16"
    np.testing.assert_array_equal(pixels(load_image(path))[..., 0], RAMP)


def test_16_bit_big_endian():
    image = Image.frombytes("I;16B", (16, 16), (RAMP.astype(">u2") * 257).astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(load_image(image))[..., 0], RAMP)


def test_32_bit_integers(tmp_path):
    within_16 = save(Image.fromarray(RAMP.astype(np.int32) * 257), tmp_path / "i.tif")
    beyond = save(Image.fromarray((RAMP.astype(np.int32) - 128) * 100_000), tmp_path / "i32.tif")
    for path in (within_16, beyond):
        with Image.open(path) as raw:
            assert raw.mode == "I"
        np.testing.assert_array_equal(pixels(load_image(path))[..., 0], RAMP)


@pytest.mark.parametrize("scale, offset", [(1 / 255, 0.0), (1.0, 0.0), (3.5, -200.0)])
def test_float(tmp_path, scale, offset):
    path = save(Image.fromarray(RAMP.astype(np.float32) * scale + offset), tmp_path / "f.tif")
    np.testing.assert_array_equal(pixels(load_image(path))[..., 0], RAMP)


def test_float_within_unit_range_keeps_its_brightness(tmp_path):
    path = save(Image.fromarray(np.full((2, 2), 0.2, np.float32)), tmp_path / "f.tif")
    assert (pixels(load_image(path)) == 51).all()


def test_float_not_finite_is_an_error(tmp_path):
    path = save(Image.fromarray(np.array([[0.0, np.nan]], np.float32)), tmp_path / "nan.tif")
    with pytest.raises(ValueError, match="nan.tif.*not finite"):
        load_image(path)


@pytest.mark.parametrize("mode", ["HSV", "YCbCr", "LAB", "RGBX", "RGBa", "PA"])
def test_other_modes(mode):
    source = Image.new("RGB", (3, 2), (255, 0, 0))
    image = Image.new("LAB", (3, 2), (138, 209, 198)) if mode == "LAB" else _to(source, mode)
    red = pixels(load_image(image)).reshape(-1, 3)[0].astype(int)
    assert red[0] > 220 and red[1] < 60 and red[2] < 60


def _to(image, mode):
    through = {"RGBa": "RGBA", "PA": "P"}.get(mode)
    return (image.convert(through) if through else image).convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste((255, 0, 0), (0, 0, 8, 8))
    # The stored image is what a viewer must turn by `orientation` to see the upright one.
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(stored, tmp_path / "r.png", exif=exif)
    np.testing.assert_array_equal(pixels(load_image(path)), np.asarray(upright))
    with Image.open(path) as opened:
        again = load_image(load_image(opened))
    np.testing.assert_array_equal(pixels(again), np.asarray(upright))


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(load_image(path)) == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_tiny_and_extreme_sizes(tmp_path, size):
    image = load_image(save(Image.new("RGB", size, "teal"), tmp_path / "s.png"))
    assert image.size == size and image.getpixel((0, 0)) == (0, 128, 128)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [99, 40])  # Pillow warns above its limit and raises above twice the limit
def test_more_pixels_than_the_limit(tmp_path, monkeypatch, limit):
    path = save(Image.new("RGB", (10, 10)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=rf"bomb\.png: .*limit of {limit} pixels"):
        load_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert load_image(path).size == (10, 10)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "webp", "bmp"])
def test_truncated(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(Image.fromarray(noise), tmp_path / f"cut.{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"cut\.{suffix}"):
        load_image(path)


def test_corrupt_png(tmp_path):
    path = save(Image.fromarray(RAMP), tmp_path / "bits.png")
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT") + 10
    data[at : at + 20] = bytes(20)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"bits\.png"):
        load_image(path)


@pytest.mark.parametrize("data, what", [(b"", "empty"), (b"<html>404</html>", "not an image")])
def test_no_image(tmp_path, data, what):
    path = tmp_path / "no.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"no\.jpg is {what}"):
        load_image(path)


@pytest.mark.parametrize("format, suffix", [
    *((format, "png") for format in FORMATS), ("MPO", "jpg"),
])  # fmt: skip
def test_formats_that_are_read_whatever_the_name(tmp_path, format, suffix):
    picture = Image.new("RGB", (16, 16), (200, 100, 50))
    path = save(picture, tmp_path / f"a.{suffix}", format=format, **({"save_all": True} if format == "MPO" else {}))
    assert image_size(path) == load_image(path).size == (16, 16)


@pytest.mark.parametrize("format", ["EPS", "PCX", "SGI"])
def test_formats_that_are_not_read(tmp_path, format):
    """EPS above all: it is a program."""
    path = save(Image.new("RGB", (4, 4)), tmp_path / "x.png", format=format)
    assert Image.open(path).format == format
    for read in (load_image, image_size):
        with pytest.raises(ValueError, match=r"x\.png is not an image in a format that is read \(JPEG, "):
            read(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        load_image(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match="can't be read"):
        load_image(tmp_path)


def test_no_pixels():
    with pytest.raises(ValueError, match="no pixels"):
        load_image(Image.new("RGB", (0, 5)))


def test_photographs_equal_pillow(photos):
    for path in photos:
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        np.testing.assert_array_equal(pixels(load_image(path)), expected)
