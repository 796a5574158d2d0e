"""export.py: every format from the command line, and what it refuses."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer

import export
import inference
from model import MultiModalModel
from model.decoder import add_rows, load_decoder
from model.lora import add_lora
from model.projector import build_projector
from model.tokenizer import load_tokenizer
from qwen import MultimodalQWenLMHeadModel, QWenTokenizer
from tests.model.families import make_decoder
from visual import build_encoder

SYSTEM = "Be brief. 简短。"


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory) -> Path:
    """As train.py leaves it, with weights that were drawn and not trained."""
    torch.manual_seed(0)
    encoder = build_encoder("clip", str(tiny.folder / "encoder"))
    decoder = MultimodalQWenLMHeadModel.from_pretrained(tiny.folder / "decoder")
    decoder = add_lora(decoder, r=4, alpha=8, targets=["c_attn", "w1", "w2"])
    for name, parameter in decoder.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    projector = build_projector("mlp", encoder.width, decoder.config.hidden_size, init_std=0.3)
    tokenizer = QWenTokenizer.from_pretrained(tiny.folder / "decoder")
    folder = tmp_path_factory.mktemp("export") / "run"
    MultiModalModel(encoder, projector, decoder, tokenizer.placeholder_id, tokenizer, SYSTEM).save_pretrained(folder)
    return folder


def run(monkeypatch, script, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    script.main()


def ask(monkeypatch, capsys, tiny, checkpoint: Path, *arguments) -> str:
    capsys.readouterr()
    picture = tiny.folder / "images/red.png"
    run(monkeypatch, inference, "--checkpoint_path", checkpoint, "--image", picture, "--text", "Which?",
        "--max_new_tokens", 8, "--device", "cpu", *arguments)  # fmt: skip
    return capsys.readouterr().out


def test_merged_answers_as_the_checkpoint(checkpoint, tiny, tmp_path, monkeypatch, capsys):
    run(monkeypatch, export, "--checkpoint_path", checkpoint, "--format", "merged", "--output", tmp_path / "a" / "out")
    printed = capsys.readouterr().out
    assert "decoder/model.safetensors" in printed and f"MultiModalModel.from_pretrained('{tmp_path}/a/out')" in printed
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    shutil.move(tmp_path / "a" / "out", tmp_path / "moved")
    expected = ask(monkeypatch, capsys, tiny, checkpoint)
    assert ask(monkeypatch, capsys, tiny, tmp_path / "moved") == expected
    assert ask(monkeypatch, capsys, tiny, checkpoint, "--system", "") != expected  # so the system text was kept


def test_checkpoint_of_moved_weights(checkpoint, tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "new").mkdir()
    for part in ("decoder", "encoder"):
        shutil.copytree(tiny.folder / part, tmp_path / "new" / part)
    places = ["--decoder", tmp_path / "new/decoder", "--encoder", tmp_path / "new/encoder"]
    output = tmp_path / "out"
    run(monkeypatch, export, "--checkpoint_path", checkpoint, "--format", "checkpoint", "--output", output, *places,
        "--system", "Other.")  # fmt: skip
    spec = json.loads((output / "kanjian.json").read_text())
    assert (spec["decoder"]["path"], spec["encoder"]["path"]) == ("../new/decoder", "../new/encoder")
    saved, before = (load_file(folder / "adapter_model.safetensors") for folder in (output, checkpoint))
    assert saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in saved)
    expected = ask(monkeypatch, capsys, tiny, checkpoint, "--system", "Other.")
    assert ask(monkeypatch, capsys, tiny, output) == expected


def test_adapter_of_the_first_system(tiny, golden, tmp_path, monkeypatch, capsys):
    """Its text of the system turn goes into the chat template and the new checkpoint."""
    decoder = tmp_path / "decoder"
    shutil.copytree(golden / "llm", decoder)
    shutil.copy(tiny.folder / "decoder" / "qwen.tiktoken", decoder)
    shutil.copytree(golden / "f_clip" / "vision", tmp_path / "vision")
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}}
    settings["crop_size"] = {"height": 32, "width": 32}
    (tmp_path / "vision" / "preprocessor_config.json").write_text(json.dumps(settings))
    arguments = ["--checkpoint_path", golden / "f_clip" / "saved"]
    arguments += ["--decoder", decoder, "--encoder", tmp_path / "vision"]
    run(monkeypatch, export, *arguments, "--format", "checkpoint", "--output", tmp_path / "present")
    assert MultiModalModel.from_pretrained(tmp_path / "present").system == "你是一位图像理解助手。"
    run(monkeypatch, export, *arguments, "--format", "llava", "--output", tmp_path / "llava", "--dtype", "bfloat16")
    assert "All weights are bfloat16; those that were float32 are rounded" in capsys.readouterr().out
    assert {weight.dtype for weight in load_file(tmp_path / "llava" / "model.safetensors").values()} == {torch.bfloat16}
    settings = json.loads((tmp_path / "llava" / "tokenizer_config.json").read_text())
    # What transformers 4 reads: it knows no other name of the class and would add token_type_ids.
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    text = AutoProcessor.from_pretrained(tmp_path / "llava").apply_chat_template([{"role": "user", "content": "红?"}])
    assert text == "<|im_start|>system\n你是一位图像理解助手。<|im_end|>\n<|im_start|>user\n红?<|im_end|>\n"


def edited(checkpoint: Path, folder: Path, quantization: str = "none", **changes) -> Path:
    """A copy of the checkpoint with other entries in its kanjian.json."""
    shutil.copytree(checkpoint, folder)
    spec = json.loads((folder / "kanjian.json").read_text()) | changes
    for part in ("decoder", "encoder"):
        spec[part]["path"] = str((checkpoint / spec[part]["path"]).resolve())
    spec["decoder"]["quantization"] = quantization
    (folder / "kanjian.json").write_text(json.dumps(spec))
    return folder


def test_qwen2_of_a_quantized_checkpoint(checkpoint, tiny, tmp_path, monkeypatch, capsys):
    """Its weights are those of the unquantized decoder; it has the system text of the training."""
    arguments = ["--checkpoint_path", edited(checkpoint, tmp_path / "in", quantization="nf4"), "--format", "qwen2"]
    run(monkeypatch, export, *arguments, "--output", tmp_path / "out")
    assert "up to 256 tokens" in capsys.readouterr().out
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    saved = load_file(tiny.folder / "decoder" / "model.safetensors")["transformer.h.0.attn.c_proj.weight"]
    assert torch.equal(found, saved)  # there is no LoRA on it
    with pytest.raises(ValueError, match="quantization=\"none\""):
        run(monkeypatch, export, *arguments, "--output", tmp_path / "other", "--quantization", "nf4")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    assert text.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n?")


def test_nothing_is_left_of_what_fails(checkpoint, tmp_path, monkeypatch):
    broken = edited(checkpoint, tmp_path / "in" / "run", tokenizer=False)
    arguments = ["--checkpoint_path", broken, "--output", tmp_path / "out", "--format"]
    with pytest.raises(ValueError, match="the checkpoint has no tokenizer, which this format needs"):
        run(monkeypatch, export, *arguments, "llava")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    (tmp_path / "out").mkdir()
    run(monkeypatch, export, *arguments, "merged")  # which needs none; an empty folder may be there
    assert (tmp_path / "out" / "decoder" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="out exists and is no empty folder"):
        run(monkeypatch, export, *arguments, "merged")


def test_bad_input_ends_the_script_with_one_line(tiny, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    command = ["export.py", "--checkpoint_path", "nowhere", "--format", "llava", "--output", tmp_path / "full"]
    result = tiny.run(*command, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1] == (
        f"export.py: --output {tmp_path}/full exists and is no empty folder; name a new one or empty it"
    )


def test_a_decoder_of_transformers(tiny, tmp_path, monkeypatch, capsys):
    """Every format of a model on a Llama, and what each says about it."""
    torch.manual_seed(0)
    decoder = load_decoder(make_decoder("llama", tmp_path / "llama", "<|im_start|>", "<|im_end|>"), "float32")
    tokenizer = load_tokenizer(tmp_path / "llama", "llama")
    rows = add_rows(decoder, tokenizer.placeholder_id + 1)
    encoder = build_encoder("clip", str(tiny.folder / "encoder"), layer="penultimate")
    projector = build_projector("mlp", encoder.width, decoder.config.hidden_size, init_std=0.3)
    decoder = add_lora(decoder, r=4, alpha=8)
    model = MultiModalModel(encoder, projector, decoder, tokenizer.placeholder_id, tokenizer, SYSTEM, added_rows=rows)
    model.save_pretrained(tmp_path / "run")
    arguments = ["--checkpoint_path", tmp_path / "run", "--format"]
    run(monkeypatch, export, *arguments, "llava", "--output", tmp_path / "llava")
    printed = capsys.readouterr().out
    assert "A clip is given to it as the images of its frames" in printed and "Qwen-1" not in printed
    run(monkeypatch, export, *arguments, "merged", "--output", tmp_path / "merged")
    expected = ask(monkeypatch, capsys, tiny, tmp_path / "run")
    assert ask(monkeypatch, capsys, tiny, tmp_path / "merged") == expected
    with pytest.raises(ValueError, match="format qwen2 converts Qwen-1; this decoder is a llama"):
        run(monkeypatch, export, *arguments, "qwen2", "--output", tmp_path / "qwen2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "llava", "merged", "run"]
