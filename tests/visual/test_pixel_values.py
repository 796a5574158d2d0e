"""Preprocessing: equal to each library's own, whatever the image."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPImageProcessorPil, SiglipImageProcessor, SiglipImageProcessorPil

from visual import build_encoder, load_image
from visual.preprocess import MAX_ASPECT, _trim

PIL = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}
TORCHVISION = {"clip": CLIPImageProcessor, "siglip": SiglipImageProcessor}
KINDS = ["clip", "siglip"]


@pytest.fixture(scope="module")
def preprocess(folders):
    return {kind: build_encoder(kind, folders[kind]).preprocess for kind in KINDS}


def gradient(width, height):
    y, x = np.mgrid[:height, :width]
    values = np.stack([255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 127 + 0 * x], -1)
    return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(80, 50), (33, 90), (32, 32), (7, 9), (1, 1)])
def test_equals_transformers(folders, preprocess, kind, size):
    expected = PIL[kind].from_pretrained(folders[kind])(gradient(*size), return_tensors="pt")["pixel_values"]
    pixel_values = preprocess[kind]([gradient(*size)])
    assert pixel_values.shape == (1, 3, 32, 32) and pixel_values.dtype == torch.float32
    assert torch.equal(pixel_values, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_photographs_equal_transformers(folders, preprocess, photos, kind):
    images = [load_image(path) for path in photos]
    pixel_values = preprocess[kind](images)
    expected = PIL[kind].from_pretrained(folders[kind])(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixel_values, expected)
    assert torch.equal(preprocess[kind](photos), expected)  # files as well as images
    # The other backend rounds between its two passes otherwise: grey levels apart, no more.
    other = TORCHVISION[kind].from_pretrained(folders[kind])(images, return_tensors="pt")["pixel_values"]
    grey_level = 1 / (255 * min(PIL[kind].image_std if kind == "siglip" else [0.26130258]))
    assert (other - expected).abs().mean() < 0.05 * grey_level


@pytest.mark.parametrize("kind", KINDS)
def test_transparency_is_white(preprocess, kind):
    assert torch.equal(
        preprocess[kind]([Image.new("RGBA", (9, 9), (10, 20, 30, 0))]),
        preprocess[kind]([Image.new("RGB", (9, 9), "white")]),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (2, 60_000)])
def test_extreme_aspect_ratio(preprocess, kind, size):
    image = gradient(*size)
    pixel_values = preprocess[kind]([image])
    assert pixel_values.shape == (1, 3, 32, 32) and pixel_values.isfinite().all()


@pytest.mark.parametrize("size", [(4, 100), (101, 4), (4, 4 * MAX_ASPECT + 2)])
def test_trimming_a_strip_does_not_change_its_middle(folders, preprocess, size):
    values = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    assert _trim(image).size != image.size
    expected = CLIPImageProcessorPil.from_pretrained(folders["clip"])(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(preprocess["clip"]([image]), expected)


def test_no_trimming_within_the_ratio():
    image = gradient(4, 4 * MAX_ASPECT)
    assert _trim(image) is image


def test_no_images(preprocess):
    with pytest.raises(ValueError, match="no images"):
        preprocess["clip"]([])


@pytest.mark.parametrize("kind", KINDS)
def test_picklable_and_without_weights(preprocess, kind):
    data = pickle.dumps(preprocess[kind])
    assert len(data) < 20_000
    image = gradient(50, 40)
    assert torch.equal(pickle.loads(data)([image]), preprocess[kind]([image]))
