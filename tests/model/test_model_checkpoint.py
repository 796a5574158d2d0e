import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from model import MultiModalModel
from model.checkpoint import FORMAT, load_trained, save_trained
from model.fingerprint import sample_differences, weight_sample
from model.lora import add_lora, language_model
from qwen import MultimodalQWenLMHeadModel, QWenConfig
from tests.model.toy import PLACEHOLDER, pictures, prompt
from visual import build_encoder

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def outputs(golden, tmp_path) -> Path:
    """`outputs/decoder` and `outputs/encoder`, copies of the golden weights."""
    shutil.copytree(golden / "llm", tmp_path / "outputs" / "decoder")
    shutil.copytree(golden / "f_siglip" / "vision", tmp_path / "outputs" / "encoder")
    return tmp_path / "outputs"


def _model(outputs: Path, make_model, lora: bool = True, dtype: torch.dtype = torch.float32) -> MultiModalModel:
    """A trained model whose frozen weights lie in `outputs`."""
    given = make_model(lora=lora, dtype=dtype, position_embedding=True)
    torch.nn.init.normal_(given.projector.position_embedding)
    decoder = MultimodalQWenLMHeadModel.from_pretrained(outputs / "decoder", dtype=dtype)
    if lora:
        decoder = add_lora(decoder, r=4, alpha=8, targets=["c_attn", "w1", "w2"])
        decoder.load_state_dict(given.decoder.state_dict())
    encoder = build_encoder("siglip", str(outputs / "encoder"), dtype=dtype)
    return MultiModalModel(encoder, given.projector, decoder, PLACEHOLDER).eval()


@torch.no_grad()
def _logits(model: MultiModalModel) -> torch.Tensor:
    return model(torch.tensor([prompt(model, [3, 4], 1, [5, 6, 7])]), pixel_values=pictures(1)).logits


def _files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(outputs, make_model, lora, dtype):
    model = _model(outputs, make_model, lora, dtype)
    model.save_pretrained(outputs / "run")
    adapter = {"adapter_model.safetensors", "adapter_config.json"} if lora else set()
    assert _files(outputs / "run") == {"kanjian.json", "projector.safetensors"} | adapter
    again = MultiModalModel.from_pretrained(outputs / "run")
    assert torch.equal(_logits(again), _logits(model))
    assert {p.dtype for p in again.parameters() if p.requires_grad} == {torch.float32}
    assert again.language_model.dtype == dtype
    trained = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert trained[0] == trained[1]


def test_holds_what_is_trained_and_nothing_else(outputs, make_model):
    model = _model(outputs, make_model)
    model.save_pretrained(outputs / "run")
    saved = {}
    for name in ("adapter_model.safetensors", "projector.safetensors"):
        saved |= load_file(outputs / "run" / name)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(saved) == len(trained)
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in trained)


def test_fresh_process_gives_equal_logits(outputs, make_model):
    model = _model(outputs, make_model)
    folder = outputs / "run" / "checkpoint-2"
    save_trained(model, folder)
    ids = prompt(model, [3, 4], 1, [5, 6, 7])
    save_file({"input_ids": torch.tensor([ids]), "pixel_values": pictures(1)}, outputs / "in.safetensors")
    script = (
        "import sys; from safetensors.torch import load_file, save_file; from model import MultiModalModel\n"
        "model = MultiModalModel.from_pretrained(sys.argv[1])\n"
        "save_file({'logits': model(**load_file(sys.argv[2])).logits.detach()}, sys.argv[3])\n"
    )
    arguments = [folder, outputs / "in.safetensors", outputs / "out.safetensors"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True, cwd="/", env=environment)
    assert torch.equal(load_file(outputs / "out.safetensors")["logits"], _logits(model))


def test_plain_peft_loads_the_adapter(outputs, make_model):
    model = _model(outputs, make_model)
    model.save_pretrained(outputs / "run")
    base = MultimodalQWenLMHeadModel.from_pretrained(outputs / "decoder")
    base.config.placeholder_id = PLACEHOLDER
    plain = PeftModel.from_pretrained(base, outputs / "run").eval()
    ids = torch.tensor([prompt(model, [3, 4], 1, [5, 6, 7])])
    features = model.encode_images(pictures(1))
    assert torch.equal(plain(input_ids=ids, features=features).logits, model(ids, features=features).logits)


@pytest.mark.parametrize("name", ["run", "run/checkpoint-2"])
def test_outputs_can_be_moved_as_a_whole(outputs, make_model, name):
    model = _model(outputs, make_model)
    model.save_pretrained(outputs / name)
    logits = _logits(model)
    shutil.move(outputs, outputs.parent / "elsewhere")
    assert torch.equal(_logits(MultiModalModel.from_pretrained(outputs.parent / "elsewhere" / name)), logits)


def test_a_checkpoint_moved_alone_says_what_it_misses(outputs, make_model):
    model = _model(outputs, make_model)
    model.save_pretrained(outputs / "run")
    moved = outputs.parent / "somewhere" / "else" / "run"
    shutil.copytree(outputs / "run", moved)
    with pytest.raises(FileNotFoundError, match=r"kanjian.json names \.\./encoder as encoder path.*pass encoder="):
        MultiModalModel.from_pretrained(moved)
    with pytest.raises(FileNotFoundError, match=r"names \.\./decoder as decoder path.*pass decoder="):
        MultiModalModel.from_pretrained(moved, encoder=outputs / "encoder")
    again = MultiModalModel.from_pretrained(moved, encoder=outputs / "encoder", decoder=outputs / "decoder")
    assert torch.equal(_logits(again), _logits(model))


def test_far_away_weights_are_recorded_absolute(outputs, make_model, tmp_path):
    model = _model(outputs, make_model)
    far = tmp_path / "a" / "b" / "c"
    model.save_pretrained(far)
    spec = json.loads((far / "kanjian.json").read_text())
    assert spec["decoder"]["path"] == str((outputs / "decoder").resolve())
    model.encoder.spec["path"] = "google/siglip-base-patch16-224"  # a name on the hub, no place on disk
    model.save_pretrained(far)
    assert json.loads((far / "kanjian.json").read_text())["encoder"]["path"] == "google/siglip-base-patch16-224"
    model.encoder.spec["path"] = str(tmp_path / "gone")
    with pytest.raises(ValueError, match="gone, where frozen weights came from, but it does not exist"):
        model.save_pretrained(far)


def _edit(file: Path, **changes) -> None:
    """Removes (None) or replaces tensors of a safetensors file."""
    state = load_file(file) | changes
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, file)


def test_every_difference_stands_in_one_error(outputs, make_model):
    model = _model(outputs, make_model)
    folder = outputs / "run"
    model.save_pretrained(folder)
    lora_a = "base_model.model.transformer.h.0.mlp.w1.lora_A.weight"
    lora_b = "base_model.model.transformer.h.1.mlp.w2.lora_B.weight"
    _edit(folder / "adapter_model.safetensors", **{lora_a: None, lora_b: torch.zeros(3, 3), "more": torch.zeros(1)})
    _edit(folder / "projector.safetensors", **{"layers.0.bias": None, "layers.1.bias": torch.zeros(2)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_trained(model, folder)
    message = str(caught.value)
    for part in (
        str(folder),
        f"adapter: missing {lora_a}",
        "adapter: unexpected more",
        f"adapter: {lora_b} has shape [3, 3], expected [128, 4]",
        "projector: missing layers.0.bias",
        "projector: unexpected layers.1.bias",
    ):
        assert part in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_other_settings_are_an_error(outputs, make_model):
    folder = outputs / "run"
    _model(outputs, make_model).save_pretrained(folder)
    decoder = MultimodalQWenLMHeadModel.from_pretrained(outputs / "decoder")
    other = _model(outputs, make_model)
    other.decoder = add_lora(decoder, r=4, alpha=16, targets=["c_attn", "w1", "w2"])
    other.placeholder_id = 311
    other.encoder.spec["drop_first_patch"] = True
    with pytest.raises(ValueError) as caught:
        load_trained(other, folder)
    assert "LoRA lora_alpha: 8 in the checkpoint, 16 in the model" in str(caught.value)
    assert "placeholder_id: 310 in the checkpoint, 311 in the model" in str(caught.value)
    assert "encoder drop_first_patch: False in the checkpoint, True in the model" in str(caught.value)
    plain = _model(outputs, make_model, lora=False)
    with pytest.raises(ValueError, match="adapter: True in the checkpoint, False in the model"):
        load_trained(plain, folder)


def test_an_interrupted_save_is_seen(outputs, make_model, monkeypatch):
    folder = outputs / "run"
    model = _model(outputs, make_model)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        MultiModalModel.from_pretrained(folder)
    model.save_pretrained(folder)
    assert not [name for name in _files(folder) if name.startswith(".")]
    assert torch.equal(_logits(MultiModalModel.from_pretrained(folder)), _logits(model))


def test_saving_again_replaces_and_leaves_other_files(outputs, make_model):
    folder = outputs / "run"
    _model(outputs, make_model).save_pretrained(folder)
    (folder / "config.yaml").write_text("other: file\n")
    _model(outputs, make_model, lora=False).save_pretrained(folder)
    assert _files(folder) == {"config.yaml", "kanjian.json", "projector.safetensors"}
    first = (folder / "kanjian.json").read_bytes()
    _model(outputs, make_model, lora=False).save_pretrained(folder)
    assert (folder / "kanjian.json").read_bytes() == first


def test_unknown_format_is_an_error(outputs, make_model):
    model = _model(outputs, make_model)
    model.save_pretrained(outputs / "run")
    file = outputs / "run" / "kanjian.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": FORMAT + 1}))
    with pytest.raises(ValueError, match=f"format {FORMAT + 1}, this code reads format {FORMAT}; take the version"):
        MultiModalModel.from_pretrained(outputs / "run")


def test_what_a_checkpoint_cannot_hold_is_not_saved(outputs, make_model):
    model = _model(outputs, make_model)
    model.language_model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="the decoder is trainable, but not by model.tune"):
        model.save_pretrained(outputs / "run")
    assert not (outputs / "run").exists()


def test_a_merged_model_is_saved_after_its_decoder(outputs, make_model):
    model = _model(outputs, make_model).merge()
    with pytest.raises(ValueError, match="language_model.save_pretrained"):
        model.save_pretrained(outputs / "merged")
    model.language_model.save_pretrained(outputs / "merged_decoder")
    decoder = MultimodalQWenLMHeadModel.from_pretrained(outputs / "merged_decoder")
    MultiModalModel(model.encoder, model.projector, decoder, PLACEHOLDER).save_pretrained(outputs / "merged")
    assert torch.equal(_logits(MultiModalModel.from_pretrained(outputs / "merged")), _logits(model))


def test_tokenizer_travels_with_the_checkpoint(outputs, make_model, small_tokenizer):
    model = _model(outputs, make_model)
    model.tokenizer = small_tokenizer
    model.save_pretrained(outputs / "run")
    again = MultiModalModel.from_pretrained(outputs / "run")
    assert again.tokenizer.encode_plain("一只猫 and a cat") == small_tokenizer.encode_plain("一只猫 and a cat")
    assert again._stop_tokens() == model._stop_tokens()


def test_legacy_folder_converts(golden, outputs, legacy_model):
    model = legacy_model("siglip")
    model.save_pretrained(outputs / "converted")
    again = MultiModalModel.from_pretrained(outputs / "converted")
    assert again.encoder.spec["drop_first_patch"] is True
    assert torch.equal(_logits(again), _logits(model))
    keys = json.loads((golden / "f_siglip" / "keys.json").read_text())
    assert keys  # the published names are those under which the adapter is saved
    published = torch.load(golden / "f_siglip" / "saved" / "adapter_model.bin", weights_only=True)
    saved = load_file(outputs / "converted" / "adapter_model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], published[name]) for name in published)


def test_legacy_folder_is_read_strictly(golden, tmp_path):
    folder = tmp_path / "saved"
    shutil.copytree(golden / "f_siglip" / "saved", folder)
    state = torch.load(folder / "other_params.bin", weights_only=True)
    state["2.weight"] = state["2.weight"][:, :7]
    state["x"] = state.pop("2.bias")
    torch.save(state, folder / "other_params.bin")
    with pytest.raises(ValueError) as caught:
        _legacy(golden, folder)
    assert "missing layers.2.bias" in str(caught.value)
    assert "unexpected layers.x" in str(caught.value)
    assert "layers.2.weight has shape [64, 7], expected [64, 64]" in str(caught.value)
    torch.save({"0.weight": state["0.weight"]}, folder / "other_params.bin")
    with pytest.raises(ValueError, match=r"holds no projector: 2.weight"):
        _legacy(golden, folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="it has no adapter_model.bin"):
        _legacy(golden, folder)


def test_the_first_patch_of_a_legacy_adapter_follows_the_number_of_features(golden):
    folder = golden / "f_siglip" / "saved"
    assert _legacy(golden, folder).encoder.num_features == 15  # as the first system: the first of 16 is left out
    assert _legacy(golden, folder, num_features=15).encoder.spec["drop_first_patch"] is True
    model = _legacy(golden, folder, num_features=16)
    assert model.encoder.num_features == 16 and model.encoder.spec["drop_first_patch"] is False
    with pytest.raises(ValueError, match="yields 15 or 16 features per picture, not 14"):
        _legacy(golden, folder, num_features=14)
    clip = golden / "f_clip"
    assert _legacy(golden, clip / "saved", encoder=clip / "vision").encoder.num_features == 16
    with pytest.raises(ValueError, match="yields 16 features per picture, not 15"):
        _legacy(golden, clip / "saved", encoder=clip / "vision", num_features=15)


def test_a_legacy_adapter_needs_to_be_told_where_the_frozen_weights_lie(golden):
    with pytest.raises(ValueError, match="pass decoder .* and encoder"):
        MultiModalModel.from_pretrained(golden / "f_siglip" / "saved", decoder=golden / "llm")


def test_adapters_for_other_shapes_are_refused(golden, tmp_path):
    for name, change in (("wide", {"hidden_size": 96}), ("mlp", {"intermediate_size": 100})):
        config = QWenConfig.from_pretrained(golden / "llm", **change)
        MultimodalQWenLMHeadModel(config).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="the projector maps vectors of width 32 to 64, but .* takes 96"):
        _legacy(golden, golden / "f_siglip" / "saved", decoder=tmp_path / "wide")
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.w1\.lora_B\.weight has shape \[128, 8\], expected \[50, 8\]"):
        _legacy(golden, golden / "f_siglip" / "saved", decoder=tmp_path / "mlp")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "projector.safetensors"])
def test_a_truncated_file_of_a_checkpoint_is_named(outputs, make_model, name):
    _model(outputs, make_model).save_pretrained(outputs / "run")
    file = outputs / "run" / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{name} can't be read: it is cut off or damaged"):
        MultiModalModel.from_pretrained(outputs / "run")


def test_code_in_a_legacy_file_is_not_run(golden, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    shutil.copytree(golden / "f_siglip" / "saved", tmp_path / "saved")
    torch.save({"0.weight": Payload()}, tmp_path / "saved" / "other_params.bin")
    with pytest.raises(ValueError, match="other_params.bin holds code or objects .* nothing of it was run"):
        _legacy(golden, tmp_path / "saved")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_saved_into_a_legacy_folder_is_what_counts(golden, tmp_path):
    folder = shutil.copytree(golden / "f_siglip" / "saved", tmp_path / "saved")
    model = _legacy(golden, folder)
    torch.nn.init.normal_(model.projector.layers[0].weight)
    model.save_pretrained(folder)
    again = MultiModalModel.from_pretrained(folder)
    assert torch.equal(again.projector.layers[0].weight, model.projector.layers[0].weight)


def of_format_2(spec: dict) -> dict:
    """What `kanjian.json` said before decoders other than Qwen-1, trained decoders and views."""
    spec = {key: value for key, value in spec.items() if key not in ("template", "media", "holds")}
    del spec["decoder"]["rows"], spec["projector"]["pixel_shuffle"]
    return {**spec, "format": 2}


def test_format_2_is_read(outputs, make_model):
    model = _model(outputs, make_model)
    model.save_pretrained(outputs / "run")
    file = outputs / "run" / "kanjian.json"
    file.write_text(json.dumps(of_format_2(json.loads(file.read_text()))))
    loaded = MultiModalModel.from_pretrained(outputs / "run")
    assert loaded.media.num_features == model.media.num_features and not loaded.holds
    ids = torch.tensor([[5, *[model.placeholder_id] * model.media.num_features, 6, 7]])
    pixel_values = torch.randn(1, 3, *model.encoder.image_size)
    with torch.no_grad():
        expected = model(ids, pixel_values=pixel_values).logits
        torch.testing.assert_close(loaded(ids, pixel_values=pixel_values).logits, expected, rtol=0, atol=0)


def test_format_1_is_read(outputs, make_model):
    """It had no system text, which lay in config.yaml, and no quantization."""
    _model(outputs, make_model).save_pretrained(outputs / "run")
    file = outputs / "run" / "kanjian.json"
    spec = of_format_2(json.loads(file.read_text()))
    del spec["system"], spec["weights"], spec["decoder"]["quantization"]
    file.write_text(json.dumps({**spec, "format": 1}))
    assert MultiModalModel.from_pretrained(outputs / "run").system is None
    (outputs / "run" / "config.yaml").write_text("data: {system: 简短。}\n")
    assert MultiModalModel.from_pretrained(outputs / "run").system == "简短。"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"format \[\], this code reads"),
        ("{", "is no JSON file"),
        ('{"format": 2}', r"no description of a checkpoint \(KeyError\('projector'\)\)"),
        ('{"format": 2, "decoder": {"path": "x"}}', r"no description of a checkpoint \(KeyError\('projector'\)\)"),
    ],
)
def test_a_damaged_description_is_named(tmp_path, content, message):
    (tmp_path / "kanjian.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        MultiModalModel.from_pretrained(tmp_path)


def test_lora_on_tied_matrices_is_not_merged(golden, make_model, tmp_path):
    config = QWenConfig.from_pretrained(golden / "llm", tie_word_embeddings=True)
    MultimodalQWenLMHeadModel(config).save_pretrained(tmp_path)
    decoder = add_lora(MultimodalQWenLMHeadModel.from_pretrained(tmp_path), r=2, alpha=2, targets=["w1", "lm_head"])
    given = make_model()
    model = MultiModalModel(given.encoder, given.projector, decoder, PLACEHOLDER)
    with pytest.raises(ValueError, match="can't be merged: they are one matrix"):
        model.merge()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_frozen_weights_are_recognised_in_any_dtype(outputs, make_model, dtype):
    _model(outputs, make_model).save_pretrained(outputs / "run")
    assert MultiModalModel.from_pretrained(outputs / "run", dtype=dtype).language_model.dtype == dtype


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_weights_are_not_taken_for_others(outputs, make_model, quantization):
    _model(outputs, make_model).save_pretrained(outputs / "run")
    MultiModalModel.from_pretrained(outputs / "run", quantization=quantization)


def test_an_adapter_is_not_applied_to_a_decoder_that_has_it_already(outputs, make_model):
    model = _model(outputs, make_model)
    model.save_pretrained(outputs / "run")
    model.merge().language_model.save_pretrained(outputs / "merged")
    with pytest.raises(ValueError, match="decoder: the weights from .*/merged are not those of the training.*c_attn"):
        MultiModalModel.from_pretrained(outputs / "run", decoder=outputs / "merged")


def test_a_projector_is_not_put_behind_another_encoder(outputs, make_model):
    _model(outputs, make_model).save_pretrained(outputs / "run")
    file = outputs / "encoder" / "model.safetensors"
    weights = {name: torch.randn_like(weight) for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="encoder: the weights from .* are not those of the training"):
        MultiModalModel.from_pretrained(outputs / "run")


@pytest.mark.parametrize("target", ["c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj", "lm_head"])
def test_a_merged_adapter_is_noticed_wherever_it_was(golden, tmp_path, target):
    """Also in a decoder of 32 layers, of which only some tensors can be sampled."""
    torch.manual_seed(0)
    config = QWenConfig(vocab_size=64, hidden_size=16, num_hidden_layers=32, num_attention_heads=2, kv_channels=8,
                        intermediate_size=32)  # fmt: skip
    decoder = MultimodalQWenLMHeadModel(config)
    recorded = weight_sample(decoder)
    decoder = add_lora(decoder, r=2, alpha=2, targets=[target])
    assert sample_differences(language_model(decoder), recorded) == []
    for name, parameter in decoder.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert sample_differences(decoder.merge_and_unload(), recorded)


def test_values_that_are_no_numbers_agree_with_none():
    layer = torch.nn.Linear(4, 4)
    recorded = weight_sample(layer)
    torch.nn.init.constant_(layer.bias, float("nan"))
    assert sample_differences(layer, recorded) == ["bias"]
    assert sample_differences(torch.nn.Identity(), recorded) == ["weight", "bias"]


def _legacy(golden: Path, folder: Path, **kwargs) -> MultiModalModel:
    places = {"decoder": golden / "llm", "encoder": golden / "f_siglip" / "vision", "placeholder_id": PLACEHOLDER}
    return MultiModalModel.from_pretrained(folder, **{**places, **kwargs})
