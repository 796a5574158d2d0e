"""Exports of models whose decoder is not Qwen-1: every family, every template."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    CohereConfig,
    GraniteConfig,
    PreTrainedTokenizerFast,
)

from dataset.template import TEMPLATES, encode_prompt
from model import MultiModalModel
from model.decoder import add_rows, load_decoder
from model.export import export_merged, export_qwen2, save_weights
from model.export_llava import export_llava
from model.llava import is_llava
from model.lora import add_lora
from model.projector import build_projector
from model.tokenizer import ChatTokenizer, load_tokenizer
from tests.model.families import FAMILIES, SHAPE, byte_tokenizer, make_decoder
from visual import build_encoder
from visual.media import Media

CHATML = ("<|im_start|>", "<|im_end|>")
EXPORTED = sorted(FAMILIES.keys() - {"phi", "gemma2"})


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(1)
    CLIPVisionModel(
        CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         image_size=16, patch_size=8)
    ).save_pretrained(folder)  # fmt: skip
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def build(tower, tmp_path):
    def make(family: str, *special: str, lora: bool = True, media: dict | None = None, **options) -> MultiModalModel:
        folder = make_decoder(family, tmp_path / f"decoder_{family}", *special)
        decoder = load_decoder(folder, "float32")
        tokenizer = load_tokenizer(folder, decoder.config.model_type)
        rows = add_rows(decoder, tokenizer.placeholder_id + 1)
        encoder = build_encoder("clip", str(tower), layer="penultimate")
        torch.manual_seed(2)
        projector = build_projector(
            **{"kind": "mlp", "in_width": 16, "out_width": 32, "init_std": 0.3, "num_features": 4, **options}
        )
        if lora:
            decoder = add_lora(decoder, r=4, alpha=8)
            for name, parameter in decoder.named_parameters():
                if ".lora_B." in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        media = Media(encoder, **(media or {}), pixel_shuffle=projector.spec["pixel_shuffle"])
        return MultiModalModel(
            encoder, projector, decoder, tokenizer.placeholder_id, tokenizer, media=media, added_rows=rows
        ).eval()

    return make


def answer(model: MultiModalModel, pictures: list) -> tuple[list[int], torch.Tensor]:
    """Ids and logits `[1, T, V]` of a prompt of two pictures."""
    prompt = [{"role": "user", "content": "<image>\n<image>\nWhich is red?"}]
    ids = encode_prompt(prompt, model.tokenizer, model.encoder.num_features)
    with torch.no_grad():
        return ids, model(torch.tensor([ids]), pixel_values=model.encoder.preprocess(pictures)).logits


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (30, 20), "red"), Image.new("RGB", (20, 20), "navy")]


@pytest.mark.parametrize("family", EXPORTED)
def test_llava_of_every_family(build, tmp_path, family):
    model = build(family, *CHATML)
    assert model.added_rows >= 1
    ids, expected = answer(model, pictures())
    (tmp_path / "out").mkdir()
    export_llava(model, tmp_path / "out")
    llava = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    parts = [*[{"type": "image"}] * 2, {"type": "text", "text": "Which is red?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(text=text, images=pictures(), return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == ids
    with torch.no_grad():
        torch.testing.assert_close(llava(**inputs).logits, expected, atol=1e-4, rtol=0)
    assert llava.config.image_token_id == model.placeholder_id == processor.image_token_id


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_merged_of_every_family_is_read_by_transformers(build, tmp_path, family):
    model = build(family, *CHATML)
    ids, expected = answer(model, pictures())
    (tmp_path / "out").mkdir()
    export_merged(model, tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "elsewhere" / "out")
    again = MultiModalModel.from_pretrained(tmp_path / "elsewhere" / "out")
    torch.testing.assert_close(answer(again, pictures())[1], expected, atol=1e-4, rtol=0)
    assert again.added_rows == 0
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere" / "out" / "decoder").eval()
    text = torch.tensor([[id for id in ids if id != model.placeholder_id]])
    with torch.no_grad():
        torch.testing.assert_close(alone(text).logits, again(text).logits, atol=1e-5, rtol=0)
    assert "placeholder_id" not in (tmp_path / "elsewhere/out/decoder/config.json").read_text()


def test_weights_have_the_published_names(build, tmp_path):
    export_llava(build("gpt2", *CHATML), tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert {".".join(name.split(".")[:2]) for name in names} == {
        "language_model.lm_head", "language_model.model", "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2", "vision_tower.vision_model",
    }  # fmt: skip
    assert is_llava(tmp_path) and not is_llava(tmp_path / "nowhere")


def test_tied_embeddings_are_written_once(build, tmp_path):
    export_llava(build("qwen2-tied", *CHATML), tmp_path)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")


CONVERSATIONS = [
    [{"role": "user", "content": "Red?"}],
    [{"role": "user", "content": "<image>\nWhat colour, 'this' \"one\"?"}],
    [
        {"role": "system", "content": "Be {{ brief }}.\n- 简短"},
        {"role": "user", "content": "<image>\n<image>\nA?\n\nB?"},
        {"role": "assistant", "content": "红 A. "},
        {"role": "user", "content": "See <image>"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": " Why\t?"},
    ],
    [{"role": "system", "content": ""}, {"role": "user", "content": "e\u0301 \U0001f600"}],
]


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("system", [None, "", 'It\'s "so"\n\U0001f600'])
@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_write_the_prompts_of_the_training(build, tmp_path, template, system, begin):
    model = build("llama", *TEMPLATES[template].control, lora=False)
    backend = model.tokenizer.hf.backend_tokenizer
    if begin:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert (model.tokenizer.template, model.tokenizer.begin_ids) == (template, [1] if begin else [])
    export_llava(model, tmp_path / "out", system)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    for messages in CONVERSATIONS:
        count = sum(turn["content"].count("<image>") for turn in messages)
        expected = encode_prompt(messages, model.tokenizer, 4, system)
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [Image.new("RGB", (20, 20))] * count or None
        assert processor(text=text, images=images, add_special_tokens=False)["input_ids"][0] == expected
        if not count:
            found = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert found == expected
    reloaded = ChatTokenizer.from_pretrained(tmp_path / "out")
    assert (reloaded.begin_ids, reloaded.template) == (model.tokenizer.begin_ids, template)
    assert (reloaded.placeholder, reloaded.placeholder_id) == ("<image>", model.placeholder_id)
    assert reloaded.stop_ids == model.tokenizer.stop_ids


def test_a_placeholder_of_another_name_becomes_image(build, tmp_path):
    model = build("qwen2", *CHATML, "<|image_pad|>")
    assert (model.tokenizer.placeholder, model.added_rows) == ("<|image_pad|>", 0)
    export_llava(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<image>") == model.placeholder_id
    assert tokenizer.decode([model.placeholder_id]) == "<image>"


def test_a_template_that_no_text_can_stand_for_is_refused(build, tmp_path):
    """A token joins the end of a question and the line break behind it."""
    model = build("llama", lora=False)
    backend = json.loads(byte_tokenizer("<image>").backend_tokenizer.to_str())
    words = backend["model"]["vocab"]
    words["?Ċ"] = words.pop("ÿ")
    backend["model"]["merges"] = [["?", "Ċ"]]
    backend["pre_tokenizer"]["use_regex"] = False
    hf = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="</s>")
    model.tokenizer = ChatTokenizer(hf)
    with pytest.raises(ValueError, match="no chat template makes the prompts of template 'plain'"):
        export_llava(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


REFUSED = [
    ("phi", {}, {}, "LLaVA's head has no bias, that of this phi has"),
    ("gemma2", {}, {}, "LLaVA does not squash logits, this gemma2 does"),
    ("llama", {"pixel_shuffle": 2}, {}, "no pixel shuffle, this model's projector joins 2 x 2"),
    ("llama", {"kind": "linear"}, {}, "'linear'"),
    ("llama", {"position_embedding": True}, {}, "no position_embedding"),
    ("llama", {}, {"max_tiles": 4}, "as up to 4 tiles beside it"),
]


@pytest.mark.parametrize("family,projector,media,message", REFUSED)
def test_what_llava_cannot_compute_is_refused(build, tmp_path, family, projector, media, message):
    with pytest.raises(ValueError, match=message):
        export_llava(build(family, *CHATML, media=media, **projector), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [CohereConfig(**SHAPE, logit_scale=0.3), GraniteConfig(**SHAPE, logits_scaling=3)])
def test_logits_that_are_scaled_are_refused(build, tmp_path, monkeypatch, config):
    monkeypatch.setitem(FAMILIES, "scaled", lambda: config)
    with pytest.raises(ValueError, match=f"LLaVA does not scale logits, this {config.model_type} does, by 0.3"):
        export_llava(build("scaled", *CHATML), tmp_path / "out")


def test_frame_pooling_concerns_clips_alone(build, tmp_path):
    model = build("llama", *CHATML, media={"frame_pooling": 2})
    export_llava(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["image_seq_length"] == 4


def test_qwen2_is_for_qwen1(build, tmp_path):
    with pytest.raises(ValueError, match="format qwen2 converts Qwen-1; this decoder is a llama.*take format merged"):
        export_qwen2(build("llama", *CHATML), tmp_path)


def test_a_weight_that_reads_otherwise_is_an_error(build, tmp_path, monkeypatch):
    monkeypatch.setattr("model.export_llava.PROJECTOR_NAMES", {"layers.0": "linear_2", "layers.2": "linear_1"})
    with pytest.raises(ValueError, match="multi_modal_projector.linear"):
        export_llava(build("llama", *CHATML), tmp_path)
    monkeypatch.undo()

    def save_damaged(state, folder):
        name = "language_model.model.norm.weight"
        save_weights(state | {name: state[name] + 1}, folder)

    monkeypatch.setattr("model.export_llava.save_weights", save_damaged)
    with pytest.raises(ValueError, match="of other values: model.language_model.norm.weight"):
        export_llava(build("llama", *CHATML), tmp_path)
