"""A model for evaluations: random, with a projector whose features change what is said."""

import pytest
import torch

from build import build_model
from model import MultiModalModel


@pytest.fixture(scope="session")
def checkpoint(tiny, tmp_path_factory):
    """Folder of an untrained tiny model."""
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    torch.manual_seed(0)
    build_model(tiny.config(folder, "projector.init_std=1").model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint) -> MultiModalModel:
    return MultiModalModel.from_pretrained(checkpoint)
