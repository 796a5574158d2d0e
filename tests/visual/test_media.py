"""Views of images and clips, and that there are always as many as was promised."""

import io
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
import timm
import torch
from clips import write_clip
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil

from visual import build_encoder, load_image
from visual.image import image_size
from visual.media import Media
from visual.tiling import best_grid, cut
from visual.video import load_frames


@pytest.fixture(scope="module")
def encoder(folders):
    return build_encoder("clip", folders["clip"])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("media") / "a.mp4", 75)


def photo(size=(90, 60)):
    return Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 20).convert("RGB")


def test_image_without_tiles(encoder, tmp_path):
    media = Media(encoder)
    path = tmp_path / "a.png"
    photo().save(path)
    for source in (path, str(path), photo()):
        views = media.load_image(source)
        assert torch.equal(views.pixel_values, encoder.preprocess([photo()])) and views.features == [16]
    assert media.image_features("/nowhere.png") == [16]  # no file is opened
    assert media.num_features == media.frame_features == 16
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        media.load_image("/nowhere.png")


def test_spec(encoder):
    given = {"max_tiles": 4, "frames": 3, "fps": 1.5, "max_seconds": 60.0, "frame_pooling": 2}
    media = Media(encoder, **given, pixel_shuffle=2)
    assert media.spec == given
    assert (media.num_features, media.frame_features) == (4, 1)
    assert Media(encoder).spec == {
        "max_tiles": 0, "frames": 8, "fps": None, "max_seconds": None, "frame_pooling": 1
    }  # fmt: skip


def test_tiles(encoder, folders):
    media = Media(encoder, max_tiles=6, pixel_shuffle=2)
    views = media.load_image(photo())
    assert best_grid((90, 60), (32, 32), 6) == (2, 3)
    assert views.pixel_values.shape == (7, 3, 32, 32) and views.features == [4] * 7
    assert torch.equal(views.pixel_values[:1], encoder.preprocess([photo()]))
    processor = CLIPImageProcessorPil.from_pretrained(folders["clip"])
    expected = processor(cut(photo(), (2, 3), (32, 32)), return_tensors="pt", do_resize=False, do_center_crop=False)
    assert torch.equal(views.pixel_values[1:], expected["pixel_values"])
    assert len(media.load_image(photo((30, 30))).features) == 1  # a grid of one tile is the whole image


def test_tiles_keep_their_margin_where_images_lose_it(tmp_path):
    """timm's settings crop 5 to 12 percent off every image, which would leave gaps between tiles."""
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    encoder = build_encoder("timm", "test_vit", pretrained=tmp_path / "w.safetensors")
    assert timm.data.resolve_model_data_config(encoder.backbone)["crop_pct"] < 1
    image = photo((320, 160))
    tiles = Media(encoder, max_tiles=2).load_image(image).pixel_values[1:]
    mean, std = (torch.tensor(timm.data.resolve_model_data_config(encoder.backbone)[k]) for k in ("mean", "std"))
    shown = (tiles * std[:, None, None] + mean[:, None, None]).permute(0, 2, 3, 1) * 255  # [2, 160, 160, 3]
    np.testing.assert_allclose(torch.cat([*shown], dim=1), np.asarray(image), atol=0.01)


def png_with_trailing_exif(image, path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path)
    data = path.read_bytes()
    payload = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = b"eXIf" + payload
    chunk = struct.pack(">I", len(payload)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    end = data.rindex(b"IEND") - 4
    path.write_bytes(data[:end] + chunk + data[end:])


@pytest.mark.parametrize("suffix", ["jpg", "png", "trailing.png", "webp", "tif", "gif", "bmp", "ico", "ppm"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_counts_are_exact(encoder, tmp_path, suffix, orientation):
    media = Media(encoder, max_tiles=6)
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photo((128, 40))
    if suffix == "trailing.png":
        png_with_trailing_exif(image, path)
    elif suffix in ("gif", "bmp", "ico", "ppm"):
        image.save(path)
    else:
        image.save(path, exif=exif)
    assert image_size(path) == load_image(path).size
    assert media.image_features(path) == media.load_image(path).features
    turned = suffix == "trailing.png" or orientation > 4 and suffix in ("jpg", "png", "webp", "tif")
    if suffix != "ico":
        assert image_size(path) == ((40, 128) if turned else (128, 40))


def test_only_the_header_is_read(encoder, tmp_path):
    for suffix in ("jpg", "png"):
        path = tmp_path / f"half.{suffix}"
        photo((200, 100)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        media = Media(encoder, max_tiles=6)
        assert len(media.image_features(path)) > 1
        with pytest.raises(ValueError, match=f"half.{suffix} can't be"):
            media.load_image(path)


def test_no_image(encoder, tmp_path, monkeypatch):
    media = Media(encoder, max_tiles=6)
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.jpg is not an image"):
        media.image_features(tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError, match="no image file"):
        media.image_features(tmp_path / "b.jpg")
    photo().save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"big\.png: .*limit of 100"):
        media.image_features(tmp_path / "big.png")
    assert media.image_features(io_image()) == [16]


def io_image():
    data = io.BytesIO()
    Image.new("RGB", (9, 9)).save(data, "png")
    return Image.open(data)


def test_video(encoder, clip):
    media = Media(encoder, frames=5, frame_pooling=3)
    views = media.load_video(clip)
    assert media.video_features("/nowhere.mp4") == views.features == [4] * 5
    assert torch.equal(views.pixel_values, encoder.preprocess(list(load_frames(clip, 5))))
    assert media.num_features == 16


def test_video_by_the_second(encoder, clip, tmp_path):
    media = Media(encoder, frames=4, fps=1)
    assert media.video_features(clip) == media.load_video(clip).features == [16] * 3
    short = write_clip(tmp_path / "a.gif", 3, codec="gif", pixels="rgb8")
    assert media.video_features(short) == media.load_video(short).features == [16]
    with pytest.raises(FileNotFoundError, match="no video file"):
        media.video_features(tmp_path / "b.mp4")


def test_repeated_frames_are_preprocessed_once(folders, tmp_path):
    encoder = build_encoder("siglip", folders["siglip"])
    path = write_clip(tmp_path / "a.mp4", 2)
    media = Media(encoder, frames=8)
    calls, original = [], media.preprocess
    media.preprocess = lambda images: calls.append(images) or original(images)
    pixel_values = media.load_video(path).pixel_values
    assert len(pixel_values) == 8 and len(calls) == 2
    assert torch.equal(pixel_values[0], pixel_values[3]) and not torch.equal(pixel_values[3], pixel_values[4])


def test_pickles_without_weights_and_reads_preprocessing_late(folders, golden, tmp_path):
    shutil.copytree(folders["clip"], tmp_path / "bare")
    settings = tmp_path / "bare" / "preprocessor_config.json"
    content = settings.read_text()
    settings.unlink()
    encoder = build_encoder("clip", tmp_path / "bare")
    media = Media(encoder, max_tiles=2)
    with pytest.raises(FileNotFoundError, match=r"no usable preprocessor_config\.json"):
        media.load_image(photo())
    settings.write_text(content)
    data = pickle.dumps(media)
    assert len(data) < 3000
    expected = media.load_image(photo())
    for again in (pickle.loads(data), pickle.loads(pickle.dumps(media))):
        views = again.load_image(photo())
        assert torch.equal(views.pixel_values, expected.pixel_values) and views.features == expected.features
        assert again.spec == media.spec


def test_settings_that_do_not_fit(encoder, folders):
    with pytest.raises(ValueError, match="pixel_shuffle=3 does not divide both sides of a grid of 4 x 4"):
        Media(encoder, pixel_shuffle=3)
    media = Media(encoder, frame_pooling=3, pixel_shuffle=4)  # images are fine
    with pytest.raises(ValueError, match=r"frames of a clip \(frame_pooling=3\): pixel_shuffle=4 .* 2 x 2"):
        media.video_features("a.mp4")
    no_grid = build_encoder("clip", folders["clip"], drop_class_token=False)
    assert Media(no_grid, frame_pooling=2).num_features == 17
    assert Media(no_grid).frame_features == 17
    with pytest.raises(ValueError, match="needs features that fill a grid"):
        Media(no_grid, frame_pooling=2).frame_features  # noqa: B018
    for setting in ({"max_tiles": -1}, {"frames": 0}, {"frames": 2.5}, {"frame_pooling": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} is a whole number"):
            Media(encoder, **setting)
    for setting in ({"fps": 0}, {"fps": float("nan")}, {"max_seconds": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} is a number above 0"):
            Media(encoder, **setting)
