"""What is exported computes what the model does; LLaVA and Qwen2 in a process that can't import the project."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from dataset.template import encode_prompt
from model import MultiModalModel
from model.chat_template import chat_template
from model.export import export_merged, export_qwen2, exported_tokenizer
from model.export_llava import export_llava
from model.lora import add_lora
from model.projector import build_projector
from qwen import MultimodalQWenLMHeadModel, QWenConfig, QWenTokenizer
from qwen.tokenization_qwen import read_ranks, write_ranks
from tests.model.toy import PLACEHOLDER
from visual import build_encoder

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
PREPROCESSOR = {
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
    },
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}},
}
SYSTEM = "Be 'brief' {{ and }} \"clear\"\n请简短。"
CASES = {
    "clip_last": {"kind": "clip"},
    "clip_penultimate": {"kind": "clip", "layer": "penultimate"},
    "clip_class_token": {"kind": "clip", "drop_class_token": False},
    "siglip_last": {"kind": "siglip"},
    "siglip_penultimate": {"kind": "siglip", "layer": "penultimate"},
    "legacy": {"kind": "siglip"},  # the first system's checkpoint, without the first patch
}
FRESH = """
import importlib.util, json, sys
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

assert not [name for name in ("qwen", "model", "visual", "dataset") if importlib.util.find_spec(name)]
jobs, out = json.load(open(sys.argv[1])), {}
for name, job in jobs["llava"].items():
    model, report = AutoModelForImageTextToText.from_pretrained(job["folder"], output_loading_info=True)
    assert type(model).__name__ == "LlavaForConditionalGeneration" and not any(report.values()), report
    for backend in ("pil", "torchvision"):
        processor = AutoProcessor.from_pretrained(job["folder"], backend=backend)
        prompt = processor.apply_chat_template(job["messages"], add_generation_prompt=True)
        assert prompt.count("<image>") == len(jobs["pictures"])
        pictures = [Image.open(path) for path in jobs["pictures"]]
        inputs = processor(text=prompt, images=pictures, return_tensors="pt")
        with torch.no_grad():
            out[f"{name}.{backend}.logits"] = model(**inputs).logits
        out[f"{name}.{backend}.input_ids"] = inputs["input_ids"]
        ids = model.generate(**inputs, max_new_tokens=8)
        out[f"{name}.{backend}.greedy"] = ids[:, inputs["input_ids"].shape[1] :]
save_file(out, sys.argv[2])

model, report = AutoModelForCausalLM.from_pretrained(jobs["qwen2"]["folder"], output_loading_info=True)
assert type(model).__name__ == "Qwen2ForCausalLM" and not any(report.values()), report
tokenizer = AutoTokenizer.from_pretrained(jobs["qwen2"]["folder"])
inputs = tokenizer.apply_chat_template(
    jobs["qwen2"]["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
with torch.no_grad():
    logits = model(**inputs).logits
greedy = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
save_file({"logits": logits, "input_ids": inputs["input_ids"], "greedy": greedy}, sys.argv[3])

ask = pipeline("image-text-to-text", jobs["llava"]["siglip_last"]["folder"], device="cpu")
parts = [{"type": "image", "path": path} for path in jobs["pictures"]]
messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "红 red?"}]}]
answer = ask(text=messages, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> QWenTokenizer:
    """307 tokens, so that the recorded model's placeholder 310 is `<|extra_0|>`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens = [bytes([byte]) for byte in range(256)] + [b"us", b"er", b"user", b"re", b"red", b" red", b"\n\n"]
    tokens += ["红".encode()[:2]]
    tokens += [b"a" + bytes([byte]) for byte in range(307 - len(tokens))]
    write_ranks({token: rank for rank, token in enumerate(tokens)}, folder / "qwen.tiktoken")
    return QWenTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def build(tmp_path_factory, tokenizer):
    """`build("clip_last")`: a model of `CASES` on recorded weights, with an adapter that is not zero."""
    folder = tmp_path_factory.mktemp("weights")
    shutil.copytree(GOLDEN / "llm", folder / "decoder")
    shutil.copy(Path(tokenizer.name_or_path, "qwen.tiktoken"), folder / "decoder")
    config = json.loads((folder / "decoder" / "config.json").read_text())
    (folder / "decoder" / "config.json").write_text(json.dumps(config | {"seq_length": 512}))
    for kind in PREPROCESSOR:
        shutil.copytree(GOLDEN / f"f_{kind}" / "vision", folder / kind)
        (folder / kind / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR[kind]))

    def make(case: str, dtype: torch.dtype = torch.float32, **projector) -> MultiModalModel:
        torch.manual_seed(0)
        options = dict(CASES[case])
        kind = options.pop("kind")
        if case == "legacy":
            places = {"decoder": folder / "decoder", "encoder": folder / kind}
            return MultiModalModel.from_pretrained(GOLDEN / "f_siglip" / "saved", dtype=dtype, **places)
        encoder = build_encoder(kind, str(folder / kind), dtype=dtype, **options)
        decoder = MultimodalQWenLMHeadModel.from_pretrained(folder / "decoder", dtype=dtype)
        decoder = add_lora(decoder, r=4, alpha=8, targets=["c_attn", "w1", "w2"])
        for name, parameter in decoder.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
        options = {"kind": "mlp", "num_features": encoder.num_features, "init_std": 0.3, **projector}
        projector = build_projector(in_width=encoder.width, out_width=decoder.config.hidden_size, **options)
        return MultiModalModel(encoder, projector, decoder, PLACEHOLDER, tokenizer).eval()

    return make


def _answers(model: MultiModalModel, ids: list[int], pictures: list[Path]) -> dict[str, torch.Tensor]:
    """Logits and greedy ids of the model itself."""
    pixel_values = model.encoder.preprocess(pictures) if pictures else None
    with torch.no_grad():
        logits = model(torch.tensor([ids]), pixel_values=pixel_values).logits
    greedy = model.generate([ids], pixel_values=pixel_values, do_sample=False, max_new_tokens=8)
    return {"input_ids": torch.tensor([ids]), "logits": logits, "greedy": greedy}


def _parts(pictures: int, text: str) -> list[dict]:
    return [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]


@pytest.fixture(scope="module")
def fresh(build, tokenizer, tmp_path_factory):
    """Everything exported, and what a fresh process with nothing but transformers computes with it."""
    folder = tmp_path_factory.mktemp("exported")
    pictures = [folder / "a.png", folder / "b.png"]
    noise = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for path, pixels in zip(pictures, noise, strict=True):
        Image.fromarray(pixels.numpy()).resize((52, 41), Image.Resampling.BICUBIC).save(path)
    jobs, expected = {"llava": {}, "pictures": [str(path) for path in pictures]}, {}
    for case in CASES:
        model = build(case)
        prompt = [{"role": "user", "content": "<image>\n<image>\n红 red?"}]
        ids = encode_prompt(prompt, tokenizer, model.encoder.num_features, SYSTEM)
        expected[case] = _answers(model, ids, pictures)
        expected[f"{case}_swapped"] = _answers(model, ids, pictures[::-1])
        (folder / case).mkdir()
        export_llava(model, folder / case, SYSTEM)
        messages = [{"role": "user", "content": _parts(2, "红 red?")}]
        jobs["llava"][case] = {"folder": str(folder / case), "messages": messages}
    model, prompt = build("clip_last"), [{"role": "user", "content": "红 red?"}]
    expected["qwen2"] = _answers(model, encode_prompt(prompt, tokenizer, 0), [])
    (folder / "qwen2").mkdir()
    export_qwen2(model, folder / "qwen2")
    jobs["qwen2"] = {"folder": str(folder / "qwen2"), "messages": prompt}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    files = [folder / name for name in ("jobs.json", "llava.safetensors", "qwen2.safetensors")]
    command = [sys.executable, "-I", "-c", FRESH, *map(str, files)]
    run = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder, expected, load_file(files[1]), load_file(files[2]), json.loads(run.stdout)


@pytest.mark.parametrize("case", CASES)
def test_llava_in_a_fresh_process(fresh, case):
    _, expected, found, _, _ = fresh
    swapped, expected = expected[f"{case}_swapped"], expected[case]
    assert found[f"{case}.pil.input_ids"].tolist() == expected["input_ids"].tolist()
    torch.testing.assert_close(found[f"{case}.pil.logits"], expected["logits"], atol=1e-4, rtol=0)
    assert (swapped["logits"] - expected["logits"]).abs().max() > 1e-2  # the pictures matter, and their order
    # The default backend of transformers interpolates to other grey levels.
    torch.testing.assert_close(found[f"{case}.torchvision.logits"], expected["logits"], atol=0.05, rtol=0)
    for backend in ("pil", "torchvision"):
        assert found[f"{case}.{backend}.greedy"].tolist() == expected["greedy"].tolist()


def test_pipeline_in_a_fresh_process(fresh, tokenizer):
    expected = fresh[1]["siglip_last"]["greedy"][0]
    assert fresh[4] == tokenizer.decode(expected, skip_special_tokens=True) != ""


def test_qwen2_in_a_fresh_process(fresh):
    folder, expected, _, found, _ = fresh
    assert found["input_ids"].tolist() == expected["qwen2"]["input_ids"].tolist()
    torch.testing.assert_close(found["logits"], expected["qwen2"]["logits"], atol=1e-4, rtol=0)
    assert found["greedy"].tolist() == expected["qwen2"]["greedy"].tolist()
    config = json.loads((folder / "qwen2" / "config.json").read_text())
    assert config["max_position_embeddings"] == 512


def test_files_are_those_of_the_published_layout(fresh):
    """What other readers of this layout go by."""
    folder = fresh[0] / "siglip_penultimate"
    names = load_file(folder / "model.safetensors").keys()
    assert {re.sub(r"layers\.\d+\..*", "layers", name) for name in names} == {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers",
        "language_model.model.norm.weight",
        *(f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
        *(f"vision_tower.vision_model.embeddings.patch_embedding.{kind}" for kind in ("weight", "bias")),
        "vision_tower.vision_model.embeddings.position_embedding.weight",
        "vision_tower.vision_model.encoder.layers",
        *(f"vision_tower.vision_model.post_layernorm.{kind}" for kind in ("weight", "bias")),
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["architectures"] == ["Qwen2ForCausalLM"]
    assert config["text_config"]["rope_theta"] == 10000
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"] == (
        "SiglipImageProcessor"
    )
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == ([309, 307], 307)


@pytest.mark.parametrize("case", ["clip_last", "siglip_last"])
def test_bfloat16_is_as_near_to_float32_as_the_model_itself(build, tokenizer, tmp_path, case):
    """LLaVA rounds at other places than Qwen-1 (rotation, projector), so logits are near each other, not equal."""
    reference, model = build(case), build(case, torch.bfloat16)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    ids = encode_prompt([{"role": "user", "content": "<image>\nred?"}], tokenizer, model.encoder.num_features)
    exact, ours = (_answers(m, ids, [tmp_path / "a.png"])["logits"].float() for m in (reference, model))
    pixel_values = model.encoder.preprocess([tmp_path / "a.png"])
    export_llava(model, tmp_path / "out")
    llava = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert llava.dtype == torch.bfloat16
    with torch.no_grad():
        theirs = llava(input_ids=torch.tensor([ids]), pixel_values=pixel_values).logits.float()
    error = (ours - exact).square().mean().sqrt()
    assert 0 < (theirs - exact).square().mean().sqrt() < 2 * error


def test_tied_embeddings_stay_one_matrix(build, tokenizer, tmp_path):
    config = QWenConfig.from_pretrained(GOLDEN / "llm", tie_word_embeddings=True, seq_length=512)
    MultimodalQWenLMHeadModel(config).save_pretrained(tmp_path / "tied")
    given, decoder = build("clip_last"), MultimodalQWenLMHeadModel.from_pretrained(tmp_path / "tied")
    model = MultiModalModel(given.encoder, given.projector, decoder, PLACEHOLDER, tokenizer).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = model(ids).logits
        export_qwen2(model, tmp_path / "qwen2")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen2")
        torch.testing.assert_close(found(ids).logits, expected, atol=1e-4, rtol=0)
    assert "lm_head.weight" not in load_file(tmp_path / "qwen2" / "model.safetensors")
    assert found.lm_head.weight is found.get_input_embeddings().weight


CONVERSATIONS = [
    ([{"role": "user", "content": "<image>\nred?"}], [{"role": "user", "content": _parts(1, "red?")}]),
    ([{"role": "user", "content": "<image>\n<image>\n红的?"}], [{"role": "user", "content": _parts(2, "红的?")}]),
    (
        [
            {"role": "user", "content": "<image>\nOne?  "},
            {"role": "assistant", "content": "Red.\n\nYes!\n"},
            {"role": "user", "content": "<image>\n两 tabs\t?"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": " Sure\r\n?"},
        ],
        [
            {"role": "user", "content": _parts(1, "One?  ")},
            {"role": "assistant", "content": "Red.\n\nYes!\n"},
            {"role": "user", "content": _parts(1, "两 tabs\t?")},
            {"role": "assistant", "content": [{"type": "text", "text": ""}]},
            {"role": "user", "content": " Sure\r\n?"},
        ],
    ),
    ([{"role": "system", "content": "Other."}, {"role": "user", "content": "What <image> is\n<image>?"}], None),
    ([{"role": "system", "content": ""}, {"role": "user", "content": "e\u0301 ﷺ 12345 it's  \n\n  x"}], None),
]


@pytest.mark.parametrize("system", [SYSTEM, "", None])
@pytest.mark.parametrize("ours,theirs", CONVERSATIONS)
def test_prompts_are_those_of_the_training(fresh, tokenizer, ours, theirs, system):
    processor = AutoProcessor.from_pretrained(fresh[0] / "legacy")
    processor.chat_template = chat_template("chatml", system, "<image>\n")
    text = processor.apply_chat_template(theirs or ours, add_generation_prompt=True)
    pictures = [Image.new("RGB", (20, 30))] * text.count("<image>") or None
    ids = processor(text=text, images=pictures)["input_ids"][0]
    assert ids == encode_prompt(ours, tokenizer, 15, system)


def test_text_of_qwen2_holds_no_pictures(fresh):
    text_only = AutoTokenizer.from_pretrained(fresh[0] / "qwen2")
    with pytest.raises(Exception, match="user turn can't hold a part of type 'image'"):
        text_only.apply_chat_template([{"role": "user", "content": _parts(1, "red?")}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["clip_penultimate", "legacy"])
def test_merged_checkpoint_is_complete_and_can_be_moved(build, tokenizer, tmp_path, case, dtype):
    model = build(case, dtype)
    ids = encode_prompt([{"role": "user", "content": "<image>\nred?"}], tokenizer, model.encoder.num_features)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    before = _answers(model, ids, [tmp_path / "a.png"])
    (tmp_path / "merged").mkdir()
    export_merged(model, tmp_path / "merged")
    after = _answers(model, ids, [tmp_path / "a.png"])
    shutil.move(tmp_path / "merged", tmp_path / "elsewhere" / "far" / "away")
    again = MultiModalModel.from_pretrained(tmp_path / "elsewhere" / "far" / "away")
    found = _answers(again, ids, [tmp_path / "a.png"])
    assert torch.equal(found["logits"], after["logits"])
    if dtype == torch.float32:  # otherwise the merged weights are rounded to the decoder's dtype
        torch.testing.assert_close(found["logits"], before["logits"], atol=1e-4, rtol=0)
    assert again.language_model.dtype == dtype


def test_merged_decoder_is_in_the_published_format(build, tokenizer, tmp_path):
    model = build("siglip_last")
    export_merged(model, tmp_path)
    spec = json.loads((tmp_path / "kanjian.json").read_text())
    assert (spec["decoder"]["path"], spec["encoder"]["path"], spec["adapter"]) == ("./decoder", "./encoder", False)
    decoder = tmp_path / "decoder"
    config = json.loads((decoder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen", ["QWenLMHeadModel"])
    published = load_file(GOLDEN / "llm" / "model.safetensors")
    saved = load_file(decoder / "model.safetensors")
    assert {name: weight.shape for name, weight in saved.items()} == {n: w.shape for n, w in published.items()}
    assert read_ranks(decoder / "qwen.tiktoken") == read_ranks(Path(tokenizer.name_or_path, "qwen.tiktoken"))
    assert (decoder / "generation_config.json").exists()


def _without_tokenizer(model):
    model.tokenizer = None


def _of_timm(model):
    model.encoder.spec["kind"] = "timm"


def _other_placeholder(model):
    model.placeholder_id = 5


def _setting(name, value):
    return lambda model: setattr(model.language_model.config, name, value)


REFUSED = [
    ({"kind": "linear"}, None, "two layers .*this model's is of kind 'linear'"),
    ({"position_embedding": True}, None, "no position_embedding"),
    ({}, _without_tokenizer, "the checkpoint has no tokenizer"),
    ({}, _of_timm, "'timm' has no twin in transformers"),
    ({}, _other_placeholder, "placeholder_id 5 is no special token"),
    ({}, _setting("no_bias", False), "no_bias=False, but Qwen2 has no bias"),
    ({}, _setting("scale_attn_weights", False), "scale_attn_weights=False, but Qwen2 always scales"),
    ({}, _setting("emb_dropout_prob", 0.1), "emb_dropout_prob=0.1, but Qwen2"),
    ({"dtype": torch.float16}, None, "float16 overflows"),
]


@pytest.mark.parametrize("options,change,message", REFUSED)
def test_what_llava_cannot_compute_is_refused(build, tmp_path, options, change, message):
    model = build("siglip_last", **options)
    if change:
        change(model)
    with pytest.raises(ValueError, match=message):
        export_llava(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_narrow_siglip_is_refused(build, tmp_path, monkeypatch):
    model = build("siglip_last")
    model.encoder.backbone.config.intermediate_size = 63
    monkeypatch.setattr("model.export_llava.transformers_tower", lambda encoder: (encoder.backbone, None))
    with pytest.raises(ValueError, match=r"at least twice as wide as the tower \(32\), this one's has 63"):
        export_llava(model, tmp_path)


def test_a_token_that_no_merge_makes_is_refused(build, tmp_path):
    """transformers reads the tokenizer of a Qwen2 as a Qwen2Tokenizer, which knows no other way to a token."""
    (tmp_path / "tokenizer").mkdir()
    tokens = [*(bytes([byte]) for byte in range(256)), b"user"]
    write_ranks({token: rank for rank, token in enumerate(tokens)}, tmp_path / "tokenizer" / "qwen.tiktoken")
    model = build("clip_last")
    model.tokenizer = QWenTokenizer.from_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="1 tokens .*such as 'user'"):
        export_qwen2(model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_heads_of_another_width(build, tokenizer, tmp_path):
    """`kv_channels` times heads need not be the hidden size; rotary base and epsilon are those of the decoder."""
    config = build("clip_last").language_model.config
    config.kv_channels, config.rotary_emb_base, config.layer_norm_epsilon = 6, 500, 1e-3
    torch.manual_seed(0)
    decoder = MultimodalQWenLMHeadModel(config).eval()
    for name, parameter in decoder.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("ln_" in name), std=0.3)
    model = build("clip_last")
    model.decoder = decoder
    export_qwen2(model, tmp_path)
    ids = torch.randint(0, 300, (2, 40))
    found = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    torch.testing.assert_close(found, decoder(ids).logits, atol=1e-4, rtol=0)


def test_tokenizer_without_pictures_keeps_its_tokens(build, tokenizer):
    exported = exported_tokenizer(build("clip_last"), None)
    assert exported.get_vocab() == tokenizer.get_vocab()
