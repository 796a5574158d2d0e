"""cache_features.py, and training with what it makes: equal losses, no encoder, nothing stale."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import cache_features
from build import build_model, load_dataset
from cache_features import fill
from config import Config, ConfigError, load_config, save_config
from dataset.collator import Collator
from dataset.feature_cache import StaleFeatures
from dataset.record import write_records
from model.optim import parameter_groups
from tests.model.families import make_decoder
from tests.test_train import log_of, trajectory, weights
from train import main, train
from training import learning_rates
from visual.encoder import VisionEncoder
from visual.media import Media

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """CLIP and SigLIP towers with 4 x 4 features, a decoder, pictures, clips, records of every mixture of them."""
    from tests.visual.clips import write_clip

    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(**SHAPE, patch_size=4)).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder / "clip"
    )
    SiglipVisionModel(SiglipVisionConfig(**SHAPE, patch_size=4)).save_pretrained(folder / "siglip")
    SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "siglip")
    make_decoder("qwen2", folder / "decoder", spare_rows=4)
    (folder / "media").mkdir()
    random = np.random.default_rng(0)
    for name, size in (("wide.png", (20, 64)), ("square.png", (16, 16)), ("high.jpg", (50, 30)), ("late.png", (8, 8))):
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(folder / "media" / name)
    write_clip(folder / "media/clip.mp4")
    write_clip(folder / "media/short.mp4", 3, rate=1)
    (folder / "media/bad.png").write_bytes((folder / "media/square.png").read_bytes()[:60])
    write_records(records(), folder / "train.parquet")
    write_records(records()[:4], folder / "validation.parquet")
    return folder


def record(name: str, question: str, images=(), videos=(), answer: str = "yes", more=()) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}, *more]
    return {"id": name, "source": "s", "images": list(images), "videos": list(videos), "messages": messages}


def records() -> list[dict]:
    later = [{"role": "user", "content": "And <image>?"}, {"role": "assistant", "content": "no"}]
    return [
        record("one", "<image>?", ["wide.png"]),
        record("text", "So?"),
        record("several", "<image> then <video> then <image>?", ["square.png", "high.jpg"], ["clip.mp4"]),
        record("clip", "<video>?", videos=["short.mp4"]),
        # Long enough to be cut before its second picture.
        record("cut", "<image>" + " why" * 10 + "?", ["high.jpg", "late.png"], answer="so" * 30, more=later),
        record("again", "What is <image>?", ["wide.png"], answer="a picture"),
    ]


def config(world: Path, output: Path, *overrides: str) -> Config:
    return load_config([
        f"decoder={world}/decoder", f"encoder.path={world}/clip", "lora.r=4", "projector.init_std=0.3",
        f"data.train={world}/train.parquet", f"data.validation={world}/validation.parquet",
        f"image_root={world}/media", "data.max_length=110", f"output_dir={output}", "per_device_train_batch_size=2",
        "max_steps=6", "logging_steps=1", "eval_steps=3", "save_steps=100", "lora_lr=1e-2", "projector_lr=1e-2",
        "media.frames=3", "media.frame_pooling=2", *overrides,
    ])  # fmt: skip


def assert_same_training(without: Path, with_cache: Path, rel: float) -> None:
    """Losses, gradient norms and validation losses of every step, and the projector in the end."""
    a, b = trajectory(without), trajectory(with_cache)
    assert len(a) == len(b) > 6 and len({entry[1] for entry in a}) > 3
    for one, other in zip(a, b, strict=True):
        assert [value for value in one if value is not None] == pytest.approx(
            [value for value in other if value is not None], rel=rel
        )
    for name, tensor in load_file(without / "projector.safetensors").items():
        other = load_file(with_cache / "projector.safetensors")[name]
        torch.testing.assert_close(other, tensor, rtol=10 * rel, atol=10 * rel)


@pytest.mark.parametrize(
    "settings",
    [
        ["lora.dropout=0.2"],
        ["encoder.path={world}/siglip", "media.frame_pooling=1", "projector.position_embedding=true",
         "data.max_length=200"],
        ["max_tiles=4", "media.frame_pooling=1", "projector.pixel_shuffle=2", "encoder.layer=penultimate",
         "data.max_length=200"],
        ["media.fps=0.5", "media.max_seconds=5", "tune=projector", "gradient_accumulation_steps=2"],
    ],
    ids=["clip", "siglip", "tiles", "fps"],
)  # fmt: skip
def test_training_with_the_cache_has_the_same_losses(world, tmp_path, settings, monkeypatch):
    settings = [setting.format(world=world) for setting in settings]
    cached = config(world, tmp_path / "with", f"data.feature_cache={tmp_path}/f", *settings)
    fill(cached)
    plain = train(config(world, tmp_path / "without", *settings))
    if "data.max_length=200" not in settings:
        sample = plain.train_dataset[4]  # the second picture is beyond its end
        assert len(sample["pixel_values"]) == 1 and len(sample["input_ids"]) <= 110
    seen, forward = [], VisionEncoder.forward
    monkeypatch.setattr(VisionEncoder, "forward", lambda self, views: seen.append(len(views)) or forward(self, views))
    monkeypatch.setattr(Media, "load_image", None)
    monkeypatch.setattr(Media, "load_video", None)
    train(cached)
    assert seen == [1, 1]  # to recognise the encoder, for either data set
    # The encoder sees other batches when it fills the cache, and so rounds the last places of float32 otherwise.
    assert_same_training(tmp_path / "without", tmp_path / "with", rel=2e-5)


def test_bf16_training_with_the_cache_has_the_same_losses(world, tmp_path):
    cached = config(world, tmp_path / "with", f"data.feature_cache={tmp_path}/f", "bf16=true")
    fill(cached)
    train(cached)
    train(config(world, tmp_path / "without", "bf16=true"))
    assert_same_training(tmp_path / "without", tmp_path / "with", rel=2e-2)
    with pytest.raises(ConfigError, match="autocast .train.bf16, train.fp16.: bfloat16 then, none now"):
        train(config(world, tmp_path / "other", f"data.feature_cache={tmp_path}/f"))


def test_unreadable_pictures_are_skipped_as_without_the_cache(world, tmp_path):
    """A bad picture, one that is missing, and a bad one beyond the end of its sample, which nobody notices."""
    bad = [
        record("bad", "<image>?", ["bad.png"]),
        record("gone", "<image> <image>?", ["square.png", "gone.png"]),
        {**records()[4], "id": "unnoticed", "images": ["high.jpg", "bad.png"]},
    ]
    write_records(records() + bad, tmp_path / "train.parquet")
    settings = [f"data.train={tmp_path}/train.parquet", "on_bad_image=skip", "max_steps=9"]
    cached = config(world, tmp_path / "with", f"data.feature_cache={tmp_path}/f", *settings)
    fill(cached)
    skipped = [train(one).train_dataset.skipped for one in (config(world, tmp_path / "without", *settings), cached)]
    assert skipped == [["bad", "gone"]] * 2
    assert_same_training(tmp_path / "without", tmp_path / "with", rel=2e-5)


def test_batches_without_pictures_still_reach_every_trained_weight(world, tmp_path):
    cached = config(world, tmp_path / "run", f"data.feature_cache={tmp_path}/f")
    fill(cached)
    model = build_model(cached.model)
    data = load_dataset(cached, cached.data.train, model)
    model.train()
    model(**Collator(model.tokenizer.pad_token_id)([data[1]])).loss.backward()
    groups = parameter_groups(model, learning_rates(cached), 0.0)
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert len(parameters) > 4 and all(parameter.grad is not None for parameter in parameters)


def test_resumed_training_with_the_cache_continues_bit_for_bit(world, tmp_path):
    settings = [f"data.feature_cache={tmp_path}/f", "save_steps=3", "lora.dropout=0.1", "data.num_workers=1"]
    whole, resumed = (config(world, tmp_path / name, *settings) for name in ("whole", "resumed"))
    fill(whole)
    train(whole)
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    shutil.copy(tmp_path / "whole/config.yaml", tmp_path / "resumed")
    train(resumed)
    assert trajectory(tmp_path / "resumed") == trajectory(tmp_path / "whole")
    assert all(torch.equal(weights(tmp_path / "resumed")[k], v) for k, v in weights(tmp_path / "whole").items())


def test_an_encoder_that_was_trained_before(world, tmp_path):
    """Features are those of the checkpoint's encoder, also where a run that began from it is continued."""
    train(config(world, tmp_path / "first", "tune=all", "max_steps=1", "encoder_lr=1e-3"))
    settings = ["tune=projector", f"model.checkpoint={tmp_path}/first", f"decoder={tmp_path}/first/trained_decoder"]
    cached = config(world, tmp_path / "with", f"data.feature_cache={tmp_path}/f", "save_steps=3", *settings)
    fill(cached)
    train(cached)
    train(config(world, tmp_path / "without", *settings))
    losses = [[entry["loss"] for entry in log_of(tmp_path / name) if "loss" in entry] for name in ("with", "without")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    (tmp_path / "with/trainer_state.json").unlink()
    shutil.rmtree(tmp_path / "with/checkpoint-6")
    train(cached)
    assert [entry["loss"] for entry in log_of(tmp_path / "with") if "loss" in entry] == losses[0]
    with pytest.raises(ConfigError, match="the encoder has other weights"):
        train(config(world, tmp_path / "other", f"data.feature_cache={tmp_path}/f"))


def own_copy(world: Path, folder: Path) -> list[str]:
    """Settings with pictures and records that a test may change."""
    shutil.copytree(world / "media", folder / "media")
    shutil.copy(world / "train.parquet", folder)
    return [f"image_root={folder}/media", f"data.train={folder}/train.parquet", "data.validation=[]",
            f"data.feature_cache={folder}/f"]  # fmt: skip


def run(capsys, monkeypatch, script, arguments: list[str]) -> tuple[str, str]:
    """(standard output, the line with which the script ends)."""
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    capsys.readouterr()
    try:
        script()
    except SystemExit as error:
        return capsys.readouterr().out, str(error.code)
    return capsys.readouterr().out, ""


def arguments(world: Path, folder: Path, *overrides: str) -> list[str]:
    """Arguments of a script, by way of a file."""
    save_config(config(world, folder / "run", "overwrite=true", *overrides), folder / "config.yaml")
    return ["--config", str(folder / "config.yaml")]


def test_only_what_is_new_or_changed_is_encoded(world, tmp_path, capsys, monkeypatch):
    command = arguments(world, tmp_path, *own_copy(world, tmp_path))
    script = cache_features.main
    out, _ = run(capsys, monkeypatch, script, command)
    # 4 pictures of one view, 2 clips of 3 frames; a view has 16 features of 16 float32 numbers
    assert f"6 images and clips, 6 of them to be encoded: 10 views of 16 x 16 float32, 10.0 KiB in {tmp_path}/f," in out
    assert "6 encoded in " in out and out.endswith(f"{tmp_path}/f is complete\n")
    before = {path: path.read_bytes() for path in (tmp_path / "f").iterdir()}
    out, _ = run(capsys, monkeypatch, script, command)
    assert "6 images and clips, 0 of them to be encoded" in out
    assert before == {path: path.read_bytes() for path in (tmp_path / "f").iterdir()}

    Image.new("RGB", (30, 30), "red").save(tmp_path / "media/square.png")
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "media/new.png")
    write_records([*records(), record("new", "<image>?", ["new.png"])], tmp_path / "train.parquet")
    _, line = run(capsys, monkeypatch, main, command)
    assert "1 of 7 media of the records are not in the feature cache" in line and "first is the image new.png" in line
    out, _ = run(capsys, monkeypatch, script, command)
    assert "7 images and clips, 2 of them to be encoded: 2 views" in out
    assert all(path.read_bytes() == content for path, content in before.items())
    loaded = load_config(command)
    model = build_model(loaded.model)
    data = load_dataset(loaded, loaded.data.train, model)
    for index, name in ((2, "square.png"), (6, "new.png")):
        with torch.no_grad():
            expected = model.encoder(model.media.load_image(tmp_path / "media" / name).pixel_values)
        torch.testing.assert_close(data[index]["vision"][:1], expected)
    os.utime(tmp_path / "media/new.png", ns=(5, 5))
    with pytest.raises(StaleFeatures, match="media/new.png has changed since its features were computed"):
        _ = data[6]
    data.on_bad_image = "skip"
    with pytest.raises(StaleFeatures, match="has changed"):
        _ = data[6]


def test_bad_pictures_end_it_or_are_noted_once(world, tmp_path, capsys, monkeypatch):
    settings = own_copy(world, tmp_path)
    write_records([record("bad", "<image>?", ["bad.png"]), *records()], tmp_path / "train.parquet")
    _, line = run(capsys, monkeypatch, cache_features.main, arguments(world, tmp_path, *settings))
    assert line.startswith("cache_features.py: ") and "media/bad.png" in line and "data.on_bad_image=skip" in line
    skip = arguments(world, tmp_path, *settings, "on_bad_image=skip")
    out, line = run(capsys, monkeypatch, cache_features.main, skip)
    assert line == "" and "1 can't be read, and training leaves out their records: image:bad.png" in out
    files = sorted((tmp_path / "f").iterdir())
    out, _ = run(capsys, monkeypatch, cache_features.main, skip)
    assert "7 images and clips, 1 of them to be encoded" in out and sorted((tmp_path / "f").iterdir()) == files
    with pytest.raises(ValueError, match="record 'bad': .*media/bad.png can't be decoded.*on_bad_image=skip"):
        train(load_config(arguments(world, tmp_path, *settings)))
    shutil.copy(tmp_path / "media/square.png", tmp_path / "media/bad.png")
    assert run(capsys, monkeypatch, cache_features.main, arguments(world, tmp_path, *settings))[1] == ""
    assert run(capsys, monkeypatch, main, arguments(world, tmp_path, *settings))[1] == ""


def test_what_can_not_be_done_ends_with_one_line(world, tmp_path, capsys, monkeypatch):
    def line(script, *overrides: str) -> str:
        return run(capsys, monkeypatch, script, arguments(world, tmp_path, *overrides))[1]

    here = f"data.feature_cache={tmp_path}/f"
    assert "add data.feature_cache=FOLDER" in line(cache_features.main)
    assert f"there is no feature cache in {tmp_path}/f; make it: python cache_features.py" in line(main, here)
    assert "model.encoder.path: there is no folder" in line(cache_features.main, here, "encoder.path=./none")
    assert "none.parquet" in line(cache_features.main, here, "data.train=none.parquet")
    assert "choose another folder" in line(cache_features.main, f"data.feature_cache={world}")
    unfit = line(cache_features.main, here, "projector.pixel_shuffle=4")
    assert "frames of a clip (frame_pooling=2): pixel_shuffle=4 does not divide" in unfit
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
        assert "f needs 10.0 KiB where 0.0 KiB are free; make room" in line(cache_features.main, here)
    assert line(cache_features.main, here) == ""
    for other, found in (
        ("encoder.layer=penultimate", "encoder layer: 'last' then, 'penultimate' now"),
        ("media.frames=4", "media frames: 3 then, 4 now"),
        (f"encoder.path={world}/siglip", "encoder kind: 'clip' then, 'siglip' now"),
    ):
        assert found in line(main, here, other)
    assert "media frames: 3 then, 4 now" in line(cache_features.main, here, "media.frames=4")
    assert line(main, here, "media.frame_pooling=1", "projector.pixel_shuffle=2", "max_steps=1") == ""


def test_media_in_shards(world, tmp_path):
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/train-00000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("wide.png", "clip.mp4"):
            tar.add(world / "media" / name, name)
    with tarfile.open(tmp_path / "shards/train-00000.tar") as tar:
        image, clip = (f"shards/train-00000.tar#{m.offset_data}+{m.size}" for m in tar.getmembers())
    write_records([record("both", "<image> <video>?", [image], [clip])], tmp_path / "train.parquet")
    settings = [f"data.train={tmp_path}/train.parquet", f"image_root={tmp_path}", "data.validation=[]", "max_tiles=4"]
    cached = config(world, tmp_path / "run", *settings, f"data.feature_cache={tmp_path}/f", "data.max_length=200")
    fill(cached)
    model = build_model(cached.model)
    data = load_dataset(cached, cached.data.train, model)
    with torch.no_grad():
        files = (model.media.load_image(world / "media/wide.png"), model.media.load_video(world / "media/clip.mp4"))
        expected = model.encoder(torch.cat([one.pixel_values for one in files]))
    assert len(expected) > 1 + 3  # tiles too
    torch.testing.assert_close(data[0]["vision"], expected)
    os.utime(tmp_path / "shards/train-00000.tar", ns=(5, 5))
    with pytest.raises(StaleFeatures, match=r"train-00000.tar#\d+\+\d+ has changed"):
        _ = data[0]


def test_interrupted_filling_goes_on(world, tmp_path, request):
    """SIGTERM, as batch systems send it, keeps what was done."""
    settings = own_copy(world, tmp_path)
    for number in range(1000):
        shutil.copy(world / "media/square.png", tmp_path / f"media/{number}.png")
    write_records([record(str(n), "<image>?", [f"{n}.png"]) for n in range(1000)], tmp_path / "train.parquet")
    command = arguments(world, tmp_path, *settings)
    process = subprocess.Popen(
        [sys.executable, "cache_features.py", *command], cwd=request.config.rootpath,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    features, end = tmp_path / "f/part-00000.bin", time.time() + 60
    while not (features.exists() and features.stat().st_size):
        assert process.poll() is None and time.time() < end, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted; what was done is kept" in errors
    cache = fill(load_config(command)).cache
    assert len(cache) == 1000  # nothing twice
    first, last = (cache.load("image", f"{n}.png", tmp_path / "media") for n in (0, 999))
    torch.testing.assert_close(first, last)
    assert sorted(path.suffix for path in (tmp_path / "f").glob("part-*")) == [".arrow"] * 2 + [".bin"] * 2


def test_benchmark_runs(capsys, monkeypatch):
    from benchmarks import feature_cache as benchmark

    threads = torch.get_num_threads()
    command = ["feature_cache", "--cases", "small_decoder", "--small", "--steps", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", command)
    benchmark.main()
    torch.set_num_threads(threads)
    row = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert len(row) == len(benchmark.HEADER) and row[:2] == ["small_decoder", "2"]
    assert all(float(row[place]) > 0 for place in (2, 4, 7)) and float(row[-1]) < 1e-5
