"""What several rooms test with; above all a tiny random experiment on disk: weights, images, records, configuration."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: more threads only wait for each other
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is compared bit for bit, or with recorded numbers, is the CPU's

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from config import Config, load_config
from dataset.record import write_records
from qwen import QWenConfig, QWenLMHeadModel, QWenTokenizer
from qwen.tokenization_qwen import write_ranks

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


@dataclass
class Tiny:
    """Where the tiny experiment lies, and how to run a script of the project on it."""

    folder: Path
    project: Path

    def arguments(self, output_dir: Path | str, *overrides: str) -> list[str]:
        return ["--config", str(self.folder / "tiny.yaml"), f"output_dir={output_dir}", *overrides]

    def config(self, output_dir: Path | str, *overrides: str) -> Config:
        return load_config(self.arguments(output_dir, *overrides))

    def run(self, *command: str, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
        """Runs `python <command>` in the project; standard output and error are text."""
        result = subprocess.run(
            [sys.executable, *map(str, command)], cwd=self.project, capture_output=True, text=True, **kwargs
        )
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    @staticmethod
    def records(count: int) -> list[dict]:
        """Questions of different length about the colour of an image, in one or two turns, some without an image."""
        names, made = list(COLOURS), []
        for number in range(count):
            colour = names[number % 4]
            messages = [
                {"role": "user", "content": "<image>\nWhat colour is it?" + " Say it." * (number % 5)},
                {"role": "assistant", "content": colour},
            ]
            if number % 3 == 1:
                messages += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": f"Yes, {colour}."}]
            text_only = number % 8 == 7
            if text_only:
                messages[0]["content"] = "Name a colour."
            made.append({
                "id": f"r{number}", "source": "tiny", "images": [] if text_only else [f"{colour}.png"], "videos": [],
                "messages": messages, "meta": {"type": "text" if text_only else "colour", "language": "en"},
            })  # fmt: skip
        return made


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the recorded reference data."""
    return Path(__file__).parent / "data" / "golden"


@pytest.fixture(scope="session")
def shared(request) -> Path:
    """Folder with the published ranks file and photographs, which are not part of the repository."""
    folder = request.config.rootpath.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which holds files that may not be copied into the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> QWenTokenizer:
    """A tokenizer of the 256 bytes, a few merges, and the special tokens behind them."""
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    merges = [b"re", b"red", b" re", b" red", b"er", b"us", b"user", "红".encode()[:2], "红".encode()]
    tokens = [bytes([byte]) for byte in range(256)] + merges
    write_ranks({token: rank for rank, token in enumerate(tokens)}, folder / "qwen.tiktoken")
    return QWenTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> QWenTokenizer:
    """A small ranks file: the 256 bytes and a few merges, one of which joins two line breaks."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens = [bytes([byte]) for byte in range(256)] + [b"us", b"er", b"user", b"an", b"\n\n", "图".encode()[:2]]
    write_ranks({token: rank for rank, token in enumerate(tokens)}, folder / "qwen.tiktoken")
    return QWenTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, request) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    make_decoder(folder / "decoder")
    make_encoder(folder / "encoder")
    (folder / "images").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 20), colour).save(folder / "images" / f"{name}.png")
    write_records(Tiny.records(24), folder / "train.parquet")
    write_records(Tiny.records(5), folder / "validation.parquet")
    (folder / "tiny.yaml").write_text(
        f"""
model:
  decoder: {folder}/decoder
  encoder: {{kind: clip, path: {folder}/encoder}}
  lora: {{r: 4, alpha: 8, dropout: 0.1, targets: [c_attn, w1, w2]}}
data: {{train: {folder}/train.parquet, image_root: {folder}/images, max_length: 200}}
train:
  per_device_train_batch_size: 2
  max_steps: 8
  lora_lr: 1e-2
  projector_lr: 1e-2
  logging_steps: 1
  save_steps: 2
  eval_steps: 4
  save_total_limit: null
"""
    )
    return Tiny(folder, request.config.rootpath)


def make_decoder(folder: Path) -> None:
    """A random Qwen-1 of two layers, and a ranks file of the 256 bytes and a few words."""
    folder.mkdir()
    pieces = [bytes([byte]) for byte in range(256)] + [b"re", b"ed", b"red", b"gr", b"bl", b"wh"]
    write_ranks({piece: rank for rank, piece in enumerate(pieces)}, folder / "qwen.tiktoken")
    torch.manual_seed(0)
    config = QWenConfig(
        vocab_size=480, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, kv_channels=16,
        intermediate_size=64, seq_length=256,
    )  # fmt: skip
    QWenLMHeadModel(config).save_pretrained(folder)


def make_encoder(folder: Path) -> None:
    """A random CLIP vision tower: four features of a 16-pixel image."""
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
