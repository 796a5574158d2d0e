import json
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
from visual.weights import by_layer

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


@pytest.mark.parametrize("kind", ["qwen2", "llama", None])
def test_a_model_of_another_family_is_refused(folder, kind):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    with pytest.raises(ValueError, match=f"holds a model of type {kind!r}, expected Qwen-1"):
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


def test_layers_of_a_list_of_names():
    assert by_layer(["b", *(f"h.{n}.a" for n in (0, 1, 2, 7, 9, 10)), "h.3.c", "a.1.b.2.c", "a.1.b.3.c"]) == [
        "a.1.b.2.c", "a.1.b.3.c", "b", "h.{0-2,7,9-10}.a", "h.3.c"
    ]  # fmt: skip


# Peak of what a process holds beside its interpreter, while it loads a decoder of 60 MiB in bfloat16.
PEAK = """
import re, sys, threading, time
from pathlib import Path
import torch
from model.decoder import load_decoder

def resident(kind):
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

load_decoder(sys.argv[1], "float32")  # what libraries need at their first use
Path("/proc/self/clear_refs").write_text("5")
before, peak = resident("VmRSS"), 0
anonymous = resident("RssAnon")

def watch():
    global peak
    while not done:
        peak = max(peak, resident("RssAnon") - anonymous)
        time.sleep(0.001)

done = False
thread = threading.Thread(target=watch)
thread.start()
decoder = load_decoder(sys.argv[2], sys.argv[3], device="cpu")
done = True
thread.join()
print(resident("VmHWM") - before, peak, decoder.get_memory_footprint() / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_makes_no_second_copy(published, tmp_path, dtype):
    config = QWenConfig(
        vocab_size=8000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, kv_channels=64,
        intermediate_size=2816,
    )  # fmt: skip
    MultimodalQWenLMHeadModel(config).bfloat16().save_pretrained(tmp_path / "wide", max_shard_size="20MB")
    command = [sys.executable, "-c", PEAK, str(published / "bin"), str(tmp_path / "wide"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
    resident, allocated, size = map(float, done.stdout.split())
    assert size > (55 if dtype == "bfloat16" else 110)
    assert allocated < 1.2 * size
    if dtype == "bfloat16":  # of another dtype, the mapped files count as resident until the system needs their pages
        assert resident < 1.2 * size
