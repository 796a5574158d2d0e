"""Trains a small CLIP vision tower on drawn scenes and their captions, contrastively, and saves it for `clip`.

    python -m pretrain.tower tokenizer=outputs/scenes/tokenizer output=outputs/scenes/tower

A batch consists of groups of near twins: scenes that differ in one attribute, or by a swap between two objects. Only an
embedding that says which colour, shape and place belong together tells them apart.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import MISSING
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from config import ConfigError, load_config
from dataprocess.scenes import Scene, caption, draw_scene, paint, twin
from model.contrastive import DualTower, recall_at_1
from pretrain.loop import LoopConfig, compare, is_done, optimise, save_folder
from qwen import QWenTokenizer

EXPECTED = {"recall at 1": 0.7, "colour": 0.99, "shape": 0.97, "digit": 0.88}
TEST_SCENES, PROBE_SCENES = 500, 2000


@dataclass
class TowerConfig(LoopConfig):
    tokenizer: str = MISSING  # folder of the tokenizer
    output: str = MISSING  # folder for the vision tower
    steps: int = 900  # optimizer steps
    muon_lr: float = 0.01  # peak learning rate of matrices inside the layers (Muon)
    adam_lr: float = 2e-3  # peak learning rate of embeddings, heads, norms and biases (AdamW)
    batch_size: int = 128  # pictures and captions a step
    group_size: int = 4  # near twins that stand in a batch together
    image_size: int = 48  # pixels a side, after preprocessing
    patch_size: int = 16  # pixels a side of a patch
    hidden_size: int = 128  # width of the vision tower
    num_layers: int = 3  # layers of the vision tower
    text_hidden_size: int = 96  # width of the text tower, which has two layers
    projection_dim: int = 64  # width of the shared embedding


def build(config: TowerConfig, tokenizer: QWenTokenizer) -> DualTower:
    """Both towers with fresh weights."""
    vision = CLIPVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=4 * config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=4,
        image_size=config.image_size,
        patch_size=config.patch_size,
        projection_dim=config.projection_dim,
        attn_implementation="eager",  # on short sequences in bfloat16 a CPU is faster with it
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eod_id,  # no text begins or ends with it: the mean over all tokens is what is used
        eos_token_id=tokenizer.eod_id,
        hidden_size=config.text_hidden_size,
        intermediate_size=4 * config.text_hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        attn_implementation="eager",
    )
    return DualTower(vision, text)


def processor(image_size: int) -> CLIPImageProcessorPil:
    """CLIP's preprocessing at a small size, colours scaled to [-1, 1]."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def twin_groups(rng: random.Random, batch_size: int, group_size: int) -> list[Scene]:
    """Distinct training layouts in groups of near twins."""
    scenes: dict[Scene, None] = {}
    while len(scenes) < batch_size:
        group = [draw_scene(rng, "train")]
        while len(group) < group_size:
            group.append(twin(rng.choice(group), rng))
        scenes.update(dict.fromkeys(group))
    return list(scenes)[:batch_size]


def encode_captions(scenes: list[Scene], tokenizer: QWenTokenizer) -> tuple[Tensor, Tensor]:
    """English captions as ids and mask `[N, T]`."""
    rows = [torch.tensor(tokenizer.encode_plain(" " + caption(scene, "en"))) for scene in scenes]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return ids, pad([torch.ones_like(row) for row in rows], batch_first=True)


@torch.no_grad()
def measure(model: DualTower, preprocess, tokenizer: QWenTokenizer) -> dict[str, float]:
    """Retrieval among test scenes, and what a linear classifier reads from the patches where objects stand.

    The classifier is fitted on patches of training scenes and tested on those of test scenes.
    """
    from sklearn.linear_model import RidgeClassifier

    model.eval()
    rng = random.Random("measure tower")
    scenes = list(dict.fromkeys(draw_scene(rng, "test") for _ in range(2 * TEST_SCENES)))[:TEST_SCENES]
    images = model.embed_images(preprocess([paint(scene, rng, "test") for scene in scenes]))
    figures = {"recall at 1": recall_at_1(images, model.embed_texts(*encode_captions(scenes, tokenizer)))}
    seen, tested = (probe_data(model, preprocess, rng, split) for split in ("train", "test"))
    for name in ("colour", "shape", "digit"):
        x, y = zip(*((vector, labels[name]) for vector, labels in seen if name in labels), strict=True)
        probe = RidgeClassifier(alpha=1.0).fit(torch.stack(x).numpy(), y)
        x, y = zip(*((vector, labels[name]) for vector, labels in tested if name in labels), strict=True)
        figures[name] = float(probe.score(torch.stack(x).numpy(), y))
    return figures


def probe_data(model: DualTower, preprocess, rng: random.Random, split: str) -> list[tuple[Tensor, dict]]:
    """(mean vector of the patches of its cell, labels) of every object of fresh scenes."""
    found = []
    for _ in range(PROBE_SCENES // 100):
        scenes = [draw_scene(rng, split) for _ in range(100)]
        patches = model.vision(preprocess([paint(scene, rng, split) for scene in scenes])).last_hidden_state[:, 1:]
        side = int(patches.shape[1] ** 0.5)
        cells = patches.unflatten(1, (3, side // 3, 3, side // 3)).mean((2, 4)).flatten(1, 2)  # [N, 9, D]
        for row, scene in enumerate(scenes):
            for thing in scene:
                labels = {"colour": thing.colour, "shape": thing.shape}
                if thing.digit is not None:
                    labels["digit"] = thing.digit
                found.append((cells[row, thing.cell], labels))
    return found


def main(config: TowerConfig) -> None:
    if is_done(config.output, config):
        return
    torch.manual_seed(config.seed)
    tokenizer = QWenTokenizer.from_pretrained(config.tokenizer)
    model, image_processor = build(config, tokenizer), processor(config.image_size)
    rng = random.Random(config.seed)

    def preprocess(pictures: list[Image.Image]) -> Tensor:
        return image_processor(pictures, return_tensors="pt").pixel_values

    def loss_of_step(step: int) -> Tensor:
        scenes = twin_groups(rng, config.batch_size, config.group_size)
        return model(preprocess([paint(scene, rng, "train") for scene in scenes]), *encode_captions(scenes, tokenizer))

    history = optimise(model, loss_of_step, config, "Tower")
    figures = measure(model, preprocess, tokenizer)
    compare("The vision tower on test scenes (colour, shape, digit: a linear probe of one patch):", figures, EXPECTED)

    def write(folder: Path) -> None:
        model.vision.save_pretrained(folder)
        image_processor.save_pretrained(folder)

    save_folder(config.output, config, {"reached": figures, "history": history}, write)


if __name__ == "__main__":
    try:
        main(load_config(sys.argv[1:], TowerConfig))
    except (ConfigError, OSError, ValueError) as error:
        sys.exit(f"pretrain.tower: {error}")
