"""Our loss is that of LlavaForConditionalGeneration, on an assembled folder and the same batch."""

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dataset.collator import Collator
from dataset.template import encode_record
from model.assemble import assemble
from model.export_llava import export_llava
from model.model import MultiModalModel
from tests.model.families import make_decoder
from visual import build_encoder

SQUARE = {"height": 16, "width": 16}
SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
TEXTS = [
    ("<image>\n<image>\nWhich of them is red?", "The first. 是的。", 2),
    ("Name a colour.", "Blue", 0),
    ("Look: <image> What do you see? And here <image>, <image>?", "Nothing at all, I fear", 3),
    ("<image>\nRed?", "Yes", 1),
]


def make_tower(folder, kind: str):
    torch.manual_seed(3)
    if kind == "clip":
        tower, processor = CLIPVisionModel(CLIPVisionConfig(**SMALL)), CLIPImageProcessorPil
        processor = processor(size={"shortest_edge": 16}, crop_size=SQUARE)
    else:
        tower, processor = SiglipVisionModel(SiglipVisionConfig(**SMALL)), SiglipImageProcessorPil(size=SQUARE)
    for parameter in tower.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tower.save_pretrained(folder)
    processor.save_pretrained(folder)


def batch_of(model: MultiModalModel) -> dict:
    samples = []
    for number, (question, answer, count) in enumerate(TEXTS):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        record = {"id": f"r{number}", "images": ["x.png"] * count, "videos": [], "messages": messages}
        noise = torch.rand(count, 20, 30, 3, generator=torch.Generator().manual_seed(number)) * 255
        pictures = [Image.fromarray(one.to(torch.uint8).numpy()) for one in noise]
        pixel_values = model.encoder.preprocess(pictures) if pictures else None
        features = [model.encoder.num_features] * count
        encoded = encode_record(record, model.tokenizer, model.encoder.num_features, "Be brief.")
        samples.append({**encoded, "pixel_values": pixel_values, "view_features": features})
    return Collator(model.tokenizer.pad_token_id)(samples)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("kind,layer", [
    ("clip", "penultimate"), ("clip", "last"), ("siglip", "penultimate"), ("siglip", "last"),
])  # fmt: skip
def test_loss_and_gradient_are_those_of_llava(tmp_path, kind, layer, family):
    make_tower(tmp_path / "tower", kind)
    decoder = make_decoder(family, tmp_path / "decoder", "<|im_start|>", "<|im_end|>")
    model = assemble(decoder, tmp_path / "tower", feature_layer="penultimate")
    if (kind, layer) == ("siglip", "last"):  # no part of a fresh LLaVA, but exported with its norm as a layer
        encoder = build_encoder(kind, str(tmp_path / "tower"))
        model = MultiModalModel(encoder, model.projector, model.decoder, model.placeholder_id, model.tokenizer).eval()
    elif layer == "last":
        model = assemble(decoder, tmp_path / "tower", feature_layer="last")
    export_llava(model, tmp_path / "out")
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    batch = batch_of(model)
    ours = model(**batch).loss
    names = ("input_ids", "attention_mask", "labels", "pixel_values")
    theirs = llava(**{name: batch[name] for name in names}).loss
    assert abs(ours.item() - theirs.item()) < 1e-5
    ours.backward()
    theirs.backward()
    found = model.projector.layers[2].weight.grad
    torch.testing.assert_close(found, llava.model.multi_modal_projector.linear_2.weight.grad, atol=1e-6, rtol=1e-4)
    texts = {name: batch[name][1:2] for name in names if name != "pixel_values"}  # no picture at all
    assert abs(model(**texts).loss.item() - llava(**texts).loss.item()) < 1e-5
    assert abs(model(**batch).loss.item() - model(**texts).loss.item()) > 1e-3
