"""Images of several views, frames that are pooled, and features that are joined by pixel shuffle, in one model."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from build import build_model
from config import EncoderConfig, LoraConfig, MediaConfig, ModelConfig, ProjectorConfig
from dataset.collator import Collator
from dataset.dataset import RecordDataset
from dataset.template import encode_prompt
from model import MultiModalModel
from model.projector import build_projector
from tests.model.families import make_decoder
from tests.visual.clips import write_clip

NEW = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An encoder with a grid of 4 x 4 features, a decoder, a wide image, a square one and a clip."""
    folder = tmp_path_factory.mktemp("views")
    torch.manual_seed(1)
    shape = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    CLIPVisionModel(shape).save_pretrained(folder / "encoder")
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder / "encoder")
    make_decoder("qwen2", folder / "decoder", spare_rows=4)
    Image.effect_noise((64, 20), 90).convert("RGB").save(folder / "wide.png")
    Image.effect_noise((16, 16), 90).convert("RGB").save(folder / "square.png")
    write_clip(folder / "clip.mp4")
    return folder


def build(folder, pixel_shuffle=1, position_embedding=False, **media) -> MultiModalModel:
    model = build_model(
        ModelConfig(
            decoder=str(folder / "decoder"),
            encoder=EncoderConfig(path=str(folder / "encoder")),
            projector=ProjectorConfig(
                init_std=0.3, pixel_shuffle=pixel_shuffle, position_embedding=position_embedding
            ),
            lora=LoraConfig(r=4, dropout=0.0),
            media=MediaConfig(**media),
        )
    )
    return model.eval()


RECORD = {
    "id": "r", "source": "s", "images": ["wide.png", "square.png"], "videos": ["clip.mp4"], "audios": [], "meta": {},
    "messages": [
        {"role": "user", "content": "<image> then <video> then <image>?"}, {"role": "assistant", "content": "yes"},
    ],
}  # fmt: skip
TEXT = {**RECORD, "id": "t", "images": [], "videos": [], "messages": [
    {"role": "user", "content": "So?"}, {"role": "assistant", "content": "yes"},
]}  # fmt: skip

# settings -> features of the wide image, of a frame, of the square image
CASES = [
    ({"frames": 3, "frame_pooling": 1}, (16, 16, 16)),
    ({"frames": 3, "frame_pooling": 2}, (16, 4, 16)),
    ({"frames": 3, "frame_pooling": 3}, (16, 4, 16)),
    ({"frames": 3, "frame_pooling": 2, "max_tiles": 4}, (16 * 5, 4, 16)),  # the whole, and 1 x 4 tiles
    ({"frames": 3, "frame_pooling": 2, "pixel_shuffle": 2}, (4, 1, 4)),
    ({"frames": 3, "frame_pooling": 1, "pixel_shuffle": 2, "max_tiles": 4}, (4 * 5, 4, 4)),
]


@pytest.mark.parametrize("settings,counts", CASES)
def test_placeholders_features_and_views_agree(folder, tmp_path, settings, counts):
    model = build(folder, **settings)
    data = RecordDataset([RECORD, TEXT], model.tokenizer, model.media, folder)
    wide, frame, square = counts
    assert data[0]["input_ids"].count(model.placeholder_id) == wide + 3 * frame + square
    batch = Collator(model.tokenizer.pad_token_id)([data[0], data[1]])
    assert sum(batch["view_features"].tolist()) == wide + 3 * frame + square
    loss = model.train()(**batch).loss
    loss.backward()
    assert model.projector.layers[0].weight.grad.abs().sum() > 0

    # A fresh process knows from the checkpoint how media become views.
    model.eval().save_pretrained(tmp_path / "run")
    loaded = MultiModalModel.from_pretrained(tmp_path / "run")
    assert loaded.media.spec == model.media.spec
    prompt = encode_prompt(RECORD["messages"][:1], model.tokenizer, [wide, 3 * frame, square])
    inputs = {name: batch[name] for name in ("pixel_values", "view_features")}
    expected = model.generate([prompt], **inputs, **NEW)
    assert loaded.generate([prompt], **inputs, **NEW).tolist() == expected.tolist()


def test_features_of_mixed_views_equal_those_of_each_alone(folder):
    model = build(folder, frames=2, frame_pooling=2)
    views = [
        model.media.load_video(folder / "clip.mp4"),
        model.media.load_image(folder / "square.png"),
        model.media.load_video(folder / "clip.mp4"),
    ]
    with torch.no_grad():
        together = model.encode_images(
            torch.cat([one.pixel_values for one in views]), [count for one in views for count in one.features]
        )
        parts = []
        for one, is_clip in zip(views, (True, False, True), strict=True):
            for pixels in one.pixel_values:
                features = model.encoder(pixels[None])  # [1, 16, D]
                if is_clip:
                    maps = features.transpose(1, 2).unflatten(2, (4, 4))
                    features = F.avg_pool2d(maps, 2).flatten(2).transpose(1, 2)
                parts.append(model.projector(features)[0])
    torch.testing.assert_close(together, torch.cat(parts), atol=1e-5, rtol=1e-4)


def test_pixel_shuffle_joins_neighbours(folder):
    projector = build_projector("linear", 2, 3, pixel_shuffle=2)
    features = torch.randn(1, 16, 2)
    grid = features.view(4, 4, 2)
    blocks = [grid[r : r + 2, c : c + 2].reshape(-1) for r in (0, 2) for c in (0, 2)]
    expected = projector.layers(torch.stack(blocks))
    torch.testing.assert_close(projector(features, (4, 4))[0], expected)
    with pytest.raises(ValueError, match="pixel_shuffle=3|pixel shuffle"):
        build(folder, pixel_shuffle=3)


def test_a_row_whose_views_do_not_fit_is_named(folder):
    model = build(folder, frames=3, frame_pooling=2)
    batch = Collator(0)([RecordDataset([RECORD, TEXT], model.tokenizer, model.media, folder)[i] for i in (0, 1)])
    batch["view_counts"] = torch.tensor([4, 1])
    with pytest.raises(ValueError, match="row 0 has 44 placeholders for 28 feature vectors; row 1 has 0 placeholders"):
        model(**batch)
    batch["view_features"][0] = 5
    with pytest.raises(ValueError, match=r"view_features holds \[5\], but an image has 16 features and a frame"):
        model(**batch)
