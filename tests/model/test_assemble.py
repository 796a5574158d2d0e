"""model.assemble: a LLaVA of parts, and the training that starts from it."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from build import build_model
from config import EncoderConfig, ModelConfig, ProjectorConfig
from model import MultiModalModel, assemble
from model.decoder import load_decoder
from model.llava import read_projector
from model.projector import build_projector
from tests.model.families import make_decoder

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
CHATML = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folder with `clip`, `siglip`, `qwen2` and `gpt2`."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(3)
    clip, siglip = CLIPVisionModel(CLIPVisionConfig(**SMALL)), SiglipVisionModel(SiglipVisionConfig(**SMALL))
    for tower in (clip, siglip):
        for parameter in tower.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    clip.save_pretrained(folder / "clip")
    siglip.save_pretrained(folder / "siglip")
    square = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square).save_pretrained(folder / "clip")
    SiglipImageProcessorPil(size=square).save_pretrained(folder / "siglip")
    for family in ("qwen2", "qwen2-tied", "gpt2", "llama"):
        make_decoder(family, folder / family, *CHATML)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    def command(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["assemble", *map(str, arguments)])
        assemble.main()
        return capsys.readouterr().out

    return command


@pytest.mark.parametrize("tower,layer,settings", [
    ("clip", "penultimate", ("default", 1, -2)),
    ("clip", "last", ("default", 1, -1)),
    ("siglip", "penultimate", ("full", 0, -2)),
])  # fmt: skip
@pytest.mark.parametrize("family", ["qwen2", "qwen2-tied", "gpt2", "llama"])
def test_all_weights_and_logits_are_those_of_the_parts(parts, run, tmp_path, family, tower, layer, settings):
    folder = tmp_path / "out"
    run("--decoder", parts / family, "--encoder", parts / tower, "--output", folder, "--feature_layer", layer)
    llava = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    decoder = AutoModelForCausalLM.from_pretrained(parts / family).eval()
    found, old = llava.model.language_model.state_dict(), decoder.base_model.state_dict()
    assert found.keys() == old.keys()
    for name, weight in old.items():
        assert torch.equal(found[name][: len(weight)], weight), name
    assert torch.equal(llava.lm_head.weight[: len(decoder.lm_head.weight)], decoder.lm_head.weight)
    vision = type(llava.model.vision_tower).from_pretrained(parts / tower)
    for name, weight in llava.model.vision_tower.state_dict().items():
        assert torch.equal(weight, vision.state_dict()[name]), name
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        logits = decoder(ids).logits
        torch.testing.assert_close(llava(ids).logits[..., : logits.shape[-1]], logits, atol=1e-5, rtol=0)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "LlavaProcessor" and processor.patch_size == 8
    assert (processor.vision_feature_select_strategy, processor.num_additional_image_tokens) == settings[:2]
    assert llava.config.vision_feature_select_strategy == settings[0]
    assert llava.config.vision_feature_layer == settings[2]
    assert processor.image_token_id == llava.config.image_token_id
    assert GenerationConfig.from_pretrained(folder).eos_token_id[0] == 260  # <|im_end|>
    message = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (30, 20), "red")},
                                            {"type": "text", "text": "Red?"}]}]  # fmt: skip
    inputs = processor.apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == llava.config.image_token_id).sum() == 4
    assert llava.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_the_well_known_recipe_reads_random_weights_and_ours_does_not(parts, run, tmp_path):
    """Parts set on the class by hand, where it had them once, lie beside its own when it is saved."""
    decoder = AutoModelForCausalLM.from_pretrained(parts / "qwen2")
    vision = CLIPVisionModel.from_pretrained(parts / "clip")
    recipe = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision.config, text_config=decoder.config, image_token_index=260)
    )
    recipe.vision_tower = vision
    recipe.language_model = decoder
    recipe.save_pretrained(tmp_path / "recipe")
    by_hand = LlavaForConditionalGeneration.from_pretrained(tmp_path / "recipe")
    expected = decoder.model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(by_hand.model.language_model.layers[0].self_attn.q_proj.weight, expected)
    run("--decoder", parts / "qwen2", "--encoder", parts / "clip", "--output", tmp_path / "ours")
    ours = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert torch.equal(ours.model.language_model.layers[0].self_attn.q_proj.weight, expected)


def test_output_says_what_was_written(parts, run, tmp_path):
    places = ("--decoder", parts / "qwen2", "--encoder", parts / "clip", "--dtype", "bfloat16")
    text = run(*places, "--output", tmp_path / "a")
    assert "1,600 parameters  projector" in text and "an image of 16 x 16 pixels has 4 of them" in text
    assert "model.safetensors" in text and "Every weight was read again" in text
    run(*places, "--output", tmp_path / "b")
    run(*places, "--output", tmp_path / "c", "--seed", "1", "--template", "plain")
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert {weight.dtype for weight in a.values()} == {torch.bfloat16}
    assert all(torch.equal(a[name], b[name]) for name in a)
    differing = {name for name in a if not torch.equal(a[name], c[name])}
    assert differing == {f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert "User:" in (tmp_path / "c" / "chat_template.jinja").read_text()


def test_size_of_the_projector():
    projector = build_projector("mlp", 1024, 1536, init_std=None)
    assert sum(parameter.numel() for parameter in projector.parameters()) == 3_935_232


@pytest.mark.parametrize("arguments,message", [
    (("qwen2", "siglip", "--feature_layer", "last"), "take --feature_layer penultimate"),
    (("qwen2", "gpt2"), "model_type 'gpt2'"),
    (("clip", "clip"), "expected a decoder"),
    (("nowhere", "clip"), "there is no folder"),
    (("qwen2", "clip", "--template", "gemma"), "needs the tokens <start_of_turn>"),
])  # fmt: skip
def test_what_does_not_fit_leaves_nothing(parts, run, tmp_path, arguments, message):
    decoder, encoder, *rest = arguments
    with pytest.raises((ValueError, OSError), match=message):
        run("--decoder", parts / decoder, "--encoder", parts / encoder, "--output", tmp_path / "out", *rest)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("saved_by", ["assemble", "transformers"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "qwen2-tied"])
def test_training_starts_from_a_llava_folder(parts, run, tmp_path, family, saved_by):
    folder = tmp_path / "llava"
    run("--decoder", parts / family, "--encoder", parts / "clip", "--output", folder)
    if saved_by == "transformers":
        llava = LlavaForConditionalGeneration.from_pretrained(folder)
        llava.save_pretrained(tmp_path / "again")
        AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "again")
        folder = tmp_path / "again"
    config = ModelConfig(
        decoder=str(folder),
        encoder=EncoderConfig(kind="clip", path=str(folder), layer="penultimate"),
        projector=ProjectorConfig(kind="mlp"),
        checkpoint=str(folder),
        tune="projector",
    )
    model = build_model(config).eval()
    assert model.tokenizer.placeholder == "<image>" and model.added_rows == 0
    llava = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    ids = torch.tensor([[5, *[model.placeholder_id] * 4, 6, 7], [*[model.placeholder_id] * 4, 9, 8, 7]])
    with torch.no_grad():
        expected = llava(input_ids=ids, pixel_values=pixel_values).logits
        torch.testing.assert_close(model(ids, pixel_values=pixel_values).logits, expected, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "run")
    again = MultiModalModel.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        torch.testing.assert_close(again(ids, pixel_values=pixel_values).logits, expected, atol=1e-5, rtol=0)

    config.tune = "all"
    whole = build_model(config).eval()
    whole.save_pretrained(tmp_path / "whole")  # under the decoder's own names, whatever those in the LLaVA were
    with torch.no_grad():
        for found in (MultiModalModel.from_pretrained(tmp_path / "whole"), continued(config, tmp_path / "whole")):
            torch.testing.assert_close(found(ids, pixel_values=pixel_values).logits, expected, atol=1e-5, rtol=0)


def continued(config: ModelConfig, checkpoint) -> MultiModalModel:
    """The model of a run that goes on from a checkpoint of its own."""
    return build_model(replace(config, checkpoint=str(checkpoint))).eval()


def test_a_projector_of_other_features_is_refused(parts, run, tmp_path):
    run("--decoder", parts / "qwen2", "--encoder", parts / "clip", "--output", tmp_path / "llava")
    model = assemble.assemble(parts / "qwen2", parts / "clip", feature_layer="last")
    with pytest.raises(ValueError, match="vision_feature_layer -2 is model.encoder.layer=penultimate, not last"):
        read_projector(model, tmp_path / "llava")
    model = assemble.assemble(parts / "qwen2", parts / "clip")
    file = tmp_path / "llava" / "config.json"
    settings = json.loads(file.read_text())
    changes = {"vision_feature_select_strategy": "full", "projector_hidden_act": "relu", "vision_feature_layer": -3}
    file.write_text(json.dumps(settings | changes))
    with pytest.raises(ValueError, match="(?s)vision_feature_layer -3.*drop_class_token=false.*activation is relu"):
        read_projector(model, tmp_path / "llava")
    file.write_text(json.dumps(settings))
    for weights in (tmp_path / "llava").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match="has no multi_modal_projector"):
        read_projector(model, tmp_path / "llava")


def test_a_decoder_that_is_cut_off_is_refused(parts, run, tmp_path):
    run("--decoder", parts / "qwen2", "--encoder", parts / "clip", "--output", tmp_path / "llava")
    weights = tmp_path / "llava" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors can't be read"):
        load_decoder(tmp_path / "llava", "float32")
