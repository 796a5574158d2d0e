"""Folders in the published formats, made from the golden vision towers (32 px, patch 8, 2 layers, width 32)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "data" / "golden"
PHOTOS = TESTS.parents[1] / "shared" / "coco_mini" / "train2017"

PREPROCESSOR = {
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
    },
    "siglip": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "do_resize": True,
        "do_normalize": True,
    },
}


def make_folder(kind: str, folder: Path) -> Path:
    shutil.copytree(GOLDEN / f"f_{kind}" / "vision", folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR[kind]))
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders as published for the kinds `clip` and `siglip`. Not to be changed by a test."""
    root = tmp_path_factory.mktemp("published")
    return {kind: make_folder(kind, root / kind) for kind in PREPROCESSOR}


@pytest.fixture(scope="session")
def golden() -> dict[str, dict[str, torch.Tensor]]:
    return {kind: load_file(GOLDEN / f"f_{kind}" / "io.safetensors") for kind in PREPROCESSOR}


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    paths = sorted(PHOTOS.glob("*.jpg"))[:12]
    if not paths:
        pytest.skip(f"no photographs in {PHOTOS}")
    return paths
