import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from model.decoder import load_decoder
from qwen import MultimodalQWenLMHeadModel, QWenConfig
from visual.weights import by_layer, read_tensors

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def folder(golden, tmp_path):
    return shutil.copytree(golden / "llm", tmp_path / "llm")


def test_complete_weights_load(folder):
    decoder = load_decoder(folder, "bfloat16", attn_implementation="eager")
    assert decoder.dtype == torch.bfloat16 and decoder.config._attn_implementation == "eager"
    on_disk = load_file(folder / "model.safetensors")
    assert torch.equal(decoder.lm_head.weight, on_disk["lm_head.weight"].bfloat16())


def test_every_kind_of_wrong_weight_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    for layer in range(3):
        del weights[f"transformer.h.{layer}.attn.c_proj.weight"]
    weights["transformer.h.1.ln_1.weight"] = torch.ones(3)
    weights["transformer.h.9.ln_1.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        load_decoder(folder, "float32")
    assert str(error.value).endswith(
        "missing: transformer.h.{0-2}.attn.c_proj.weight; unexpected: transformer.h.9.ln_1.weight; "
        "of another shape: transformer.h.1.ln_1.weight [3] instead of [64]"
    )


@pytest.mark.parametrize("kind", ["clip", "t5", "bert", "no-such-type", None])
def test_what_is_no_decoder_is_refused(folder, kind):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    with pytest.raises(ValueError, match=f"holds a model of type {kind!r}, (expected a decoder|which is no decoder)"):
        load_decoder(folder, "float32")


def test_a_folder_without_config_is_refused(folder):
    # transformers would build the default shape, which is that of Qwen-7B.
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match="config.json"):
        load_decoder(folder, "float32")


@pytest.fixture
def published(golden, tmp_path):
    """The layout of the published checkpoint at small size: shards, index, config, in both file formats."""
    weights = load_file(golden / "llm" / "model.safetensors")
    names = sorted(weights)
    for suffix, save in ((".safetensors", _save_safetensors), (".bin", torch.save)):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        index = {}
        for number in range(3):
            shard = f"{stem}-{number + 1:05}-of-00003{suffix}"
            save({name: weights[name].bfloat16() for name in names[number::3]}, folder / shard)
            index.update(dict.fromkeys(names[number::3], shard))
        size = sum(2 * tensor.numel() for tensor in weights.values())
        (folder / f"{stem}{suffix}.index.json").write_text(
            json.dumps({"metadata": {"total_size": size}, "weight_map": index})
        )
        shutil.copy(golden / "llm" / "config.json", folder)
    return tmp_path


def _save_safetensors(weights, file):
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_every_tensor_of_a_sharded_checkpoint_is_that_of_its_file(published, golden, layout, dtype):
    decoder = load_decoder(published / layout, dtype, device="cpu")
    on_disk = load_file(golden / "llm" / "model.safetensors")
    assert decoder.state_dict().keys() == on_disk.keys()
    expected = torch.float32 if dtype == "float32" else torch.bfloat16
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, on_disk[name].bfloat16().to(expected)), name
        assert tensor.dtype == expected


def test_a_hub_id_is_read_from_the_cache(published, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    snapshot = cache / "models--Qwen--Qwen-Tiny" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(published / "safetensors", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_decoder("Qwen/Qwen-Tiny", "bfloat16").config._name_or_path == "Qwen/Qwen-Tiny"
    shard = next(snapshot.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{shard} can't be read: it is cut off or damaged"):
        load_decoder("Qwen/Qwen-Tiny", "bfloat16")


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_damaged_files_are_named(published, layout):
    folder = published / layout
    shard = sorted(folder.glob("*-00002-of-*"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-200])
    with pytest.raises(ValueError, match=f"{shard.name} can't be read: it is cut off or damaged|{shard.name} holds"):
        load_decoder(folder, "float32")
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}, which .*index.json names; copy the whole checkpoint"):
        load_decoder(folder, "float32")
    next(folder.glob("*.index.json")).write_text("{")
    with pytest.raises(ValueError, match="index.json is no index of weight files"):
        load_decoder(folder, "float32")


def test_code_in_a_pickle_is_not_run(golden, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    shutil.copy(golden / "llm" / "config.json", tmp_path)
    torch.save({"transformer.wte.weight": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin holds code or objects .* nothing of it was run"):
        load_decoder(tmp_path, "float32")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_pct": 0.5}, "rotary_pct=0.5: Qwen-1 rotates the whole head, rotary_pct must be 1.0"),
        ({"hidden_size": "128"}, "'hidden_size' expected int, got str"),
        ({"torch_dtype": "float99"}, "float99"),
    ],
)
def test_a_bad_value_in_the_config_is_named(folder, change, message):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=f"^{file}: .*{message}") as error:
        load_decoder(folder, "float32")
    assert "\n" not in str(error.value)


def test_weights_that_are_quantized_already_are_refused(folder):
    file = folder / "config.json"
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **quantized}))
    with pytest.raises(ValueError, match="quantized by 'gptq' .*: take the unquantized ones.* quantization=nf4"):
        load_decoder(folder, "float32")


@pytest.mark.parametrize("place", ["/nowhere", "/nowhere/b", "./nowhere", "~/nowhere", "a/b/nowhere"])
def test_a_path_with_nothing_there(place):
    with pytest.raises(FileNotFoundError, match=f"^there is no folder {place}$"):
        load_decoder(place, "float32")


def test_a_name_that_is_not_at_hand(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="^nowhere is neither a folder here nor a model that the hub") as error:
        load_decoder("nowhere", "float32")
    assert "\n" not in str(error.value)


def test_a_bin_file_of_something_else_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    for content, message in (
        (list(weights.values()), "holds a list without tensors by name"),
        (weights["lm_head.weight"], "holds a Tensor without tensors by name"),
        ({**weights, "lm_head.weight": 3}, "holds a int as 'lm_head.weight', expected a tensor"),
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match=f"^{file} {message}; save the file again"):
            load_decoder(folder, "float32")
        with pytest.raises(ValueError, match=f"^{file} {message}; save the file again"):
            read_tensors(file)
    file.write_text("hello")
    with pytest.raises(ValueError, match=f"^{file} can't be read"):
        read_tensors(file)


def test_layers_of_a_list_of_names():
    assert by_layer(["b", *(f"h.{n}.a" for n in (0, 1, 2, 7, 9, 10)), "h.3.c", "a.1.b.2.c", "a.1.b.3.c"]) == [
        "a.1.b.2.c", "a.1.b.3.c", "b", "h.{0-2,7,9-10}.a", "h.3.c"
    ]  # fmt: skip


# For each folder and dtype: the peak, in MiB, of what the process holds beside its interpreter while it loads a decoder
# and reads every page of it, thereof not backed by a file, and the decoder's size.
PEAK = """
import gc, re, sys, threading, time
from pathlib import Path
import torch
from model.decoder import load_decoder

def resident(kind):
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def watch():
    global peak
    while not done:
        peak = max(peak, resident("RssAnon") - anonymous)
        time.sleep(0.001)

first, *folders = sys.argv[1:]
load_decoder(first, "float32")  # what libraries need at their first use
for folder in folders:
    for dtype in ("bfloat16", "float32"):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before, anonymous, peak, done = resident("VmRSS"), resident("RssAnon"), 0, False
        thread = threading.Thread(target=watch)
        thread.start()
        decoder = load_decoder(folder, dtype, device="cpu")
        for parameter in decoder.parameters():
            parameter.detach().view(-1)[::1024].sum()
        done = True
        thread.join()
        print(dtype, resident("VmHWM") - before, peak, decoder.get_memory_footprint() / 2**20)
        del decoder, parameter
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_makes_no_second_copy(published, tmp_path):
    config = QWenConfig(
        vocab_size=8000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, kv_channels=64,
        intermediate_size=2816,
    )  # fmt: skip
    decoder = MultimodalQWenLMHeadModel(config).bfloat16()
    wide, wide_bin = tmp_path / "wide", tmp_path / "wide_bin"
    decoder.save_pretrained(wide, max_shard_size="20MB")
    config.save_pretrained(wide_bin)
    torch.save(decoder.state_dict(), wide_bin / "pytorch_model.bin")
    command = [sys.executable, "-c", PEAK, *map(str, (published / "bin", wide, wide_bin))]
    # What is freed goes back to the system at once, so that every load starts from the same.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        dtype, *figures = line.split()
        resident, allocated, size = map(float, figures)
        assert size > (55 if dtype == "bfloat16" else 110)
        assert resident > 0.95 * size, "not all of the decoder was read"
        assert allocated < 1.2 * size, line
        if dtype == "bfloat16":  # of another dtype, mapped files count as resident until the system needs their pages
            assert resident < 1.2 * size, line
