"""The folder of precomputed features: what is written is read, and nothing stale, foreign or half-written is."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from dataset import feature_cache, feature_writer
from dataset.feature_cache import FeatureCache, FileState, StaleFeatures, digest_of_ends, file_state, media_ids
from dataset.feature_key import feature_key, weight_digest
from dataset.feature_writer import FeatureWriter, NewEntry
from dataset.record import to_table
from tests.dataset.samples import record
from visual import build_encoder
from visual.media import Media

KEY = {
    "encoder": {"kind": "clip", "dtype": "float32"}, "weights": "ab", "preprocessing": [0.5], "features": [1.0, 2.0],
    "media": {"frames": 8}, "autocast": None,
}  # fmt: skip
SHAPE = (2, 3)


def vision(views: int, value: float, dtype=torch.float32) -> torch.Tensor:
    return torch.arange(views * 6, dtype=torch.float32).view(views, *SHAPE).add(value).to(dtype)


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abcd":
        (folder / name).write_text(name)
    return folder


def entry(root: Path, name: str, views: int = 1, kind: str = "image", problem: str | None = None) -> NewEntry:
    ends = digest_of_ends(root, name)
    return NewEntry(f"{kind}:{name}", file_state(root, name), ends, 0 if problem else views, problem)


def write(folder: Path, root: Path, *media: tuple[str, int, float], dtype=torch.float32) -> None:
    """Each of `media` (name, views, first value) by a call of its own."""
    with FeatureWriter(folder, KEY, SHAPE, dtype) as writer:
        for name, views, value in media:
            writer.add([entry(root, name, views)], vision(views, value, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read(tmp_path, root, dtype):
    with FeatureWriter(tmp_path / "f", KEY, SHAPE, dtype) as writer:
        writer.add([entry(root, "a", 2), entry(root, "b", 1, "video")], vision(3, 10, dtype))
        writer.add([entry(root, "b")], vision(1, 50, dtype))
    cache = FeatureCache(tmp_path / "f", KEY)
    assert (cache.shape, cache.dtype, len(cache)) == (SHAPE, dtype, 3)
    for kind, name, expected in (
        ("image", "a", vision(3, 10, dtype)[:2]),
        ("video", "b", vision(3, 10, dtype)[2:]),
        ("image", "b", vision(1, 50, dtype)),
    ):
        found = cache.load(kind, name, root)
        assert found.dtype == dtype and torch.equal(found, expected)
    assert (tmp_path / "f/part-00000.bin").stat().st_size == 4 * 6 * dtype.itemsize


def test_writing_to_what_was_read_does_not_reach_the_file(tmp_path, root):
    write(tmp_path / "f", root, ("a", 1, 5))
    before = (tmp_path / "f/part-00000.bin").read_bytes()
    cache = FeatureCache(tmp_path / "f", KEY)
    cache.load("image", "a", root).zero_()
    assert (tmp_path / "f/part-00000.bin").read_bytes() == before
    assert torch.equal(FeatureCache(tmp_path / "f", KEY).load("image", "a", root), vision(1, 5))


def test_parts_are_closed_when_large_and_more_can_be_added(tmp_path, root, monkeypatch):
    monkeypatch.setattr(feature_writer, "PART_BYTES", 2 * 6 * 4)
    write(tmp_path / "f", root, ("a", 1, 0), ("b", 1, 10), ("c", 1, 20))
    write(tmp_path / "f", root, ("d", 3, 30))
    assert sorted(path.name for path in (tmp_path / "f").glob("*.bin")) == [f"part-0000{n}.bin" for n in range(3)]
    cache = pickle.loads(pickle.dumps(FeatureCache(tmp_path / "f", KEY)))
    for name, views, value in (("a", 1, 0), ("b", 1, 10), ("c", 1, 20), ("d", 3, 30)):
        assert torch.equal(cache.load("image", name, root), vision(views, value))


def test_parts_are_closed_after_a_while(tmp_path, root, monkeypatch):
    monkeypatch.setattr(feature_writer, "PART_SECONDS", 0)
    write(tmp_path / "f", root, ("a", 1, 0), ("b", 1, 10))
    assert len(list((tmp_path / "f").glob("*.arrow"))) == 2


def test_names_with_equal_hashes_are_told_apart(tmp_path, root, monkeypatch):
    for module in (feature_cache, feature_writer):
        monkeypatch.setattr(module, "medium_hash", lambda medium: 7)
    write(tmp_path / "f", root, ("a", 1, 0), ("b", 1, 10), ("c", 1, 20))
    cache = FeatureCache(tmp_path / "f", KEY)
    for name, value in (("a", 0), ("b", 10), ("c", 20)):
        assert torch.equal(cache.load("image", name, root), vision(1, value))
    assert cache.lookup("image:d") is None


def test_changed_gone_and_unknown_files_are_refused_by_name(tmp_path, root):
    write(tmp_path / "f", root, ("a", 1, 0), ("b", 1, 10), ("c", 1, 20))
    cache = FeatureCache(tmp_path / "f", KEY)
    (root / "a").write_text("longer")
    os.utime(root / "b", ns=(1, 1))
    (root / "c").unlink()
    for name in "ab":
        with pytest.raises(StaleFeatures, match=rf"images/{name} has changed .*cache_features.py --config .*cp -p"):
            cache.load("image", name, root)
    with pytest.raises(FileNotFoundError, match="no image file .*images/c"):
        cache.load("image", "c", root)
    with pytest.raises(StaleFeatures, match=r"the image .*images/d is not in the feature cache .*cache_features.py"):
        cache.load("image", "d", root)
    with pytest.raises(StaleFeatures, match="the video .*images/a is not in"):
        cache.load("video", "a", root)
    write(tmp_path / "f", root, ("a", 2, 70))  # the newest counts
    assert torch.equal(FeatureCache(tmp_path / "f", KEY).load("image", "a", root), vision(2, 70))


def test_unreadable_media_keep_their_problem(tmp_path, root):
    with FeatureWriter(tmp_path / "f", KEY, SHAPE, torch.float32) as writer:
        writer.add([entry(root, "a", problem="a is no image")], torch.zeros(0, *SHAPE))
        writer.add([entry(root, "gone", problem="no image file gone")], torch.zeros(0, *SHAPE))
    cache = FeatureCache(tmp_path / "f", KEY)
    with pytest.raises(ValueError, match="a is no image"):
        cache.load("image", "a", root)
    with pytest.raises(FileNotFoundError, match="no image file .*gone"):
        cache.load("image", "gone", root)
    (root / "gone").write_text("back")
    with pytest.raises(StaleFeatures, match="gone has changed"):
        cache.load("image", "gone", root)


def test_media_in_shards_have_the_state_of_the_shard(root):
    (root / "shards").mkdir()
    (root / "shards/train-0.tar").write_bytes(bytes(10))
    (root / "a#1+2").write_text("abc")
    stat = (root / "shards/train-0.tar").stat()
    assert file_state(root, "shards/train-0.tar#512+30") == FileState(10, stat.st_mtime_ns)
    assert file_state(root, "a#1+2").size == 3
    assert file_state(root, "shards/none.tar#0+1") == file_state(root, "a/b") == FileState(-1, -1)


def test_missing_media_of_records_are_counted(tmp_path, root):
    table = to_table([
        record("<image> <image>", "x", images=("a", "b"), name="1"),
        record("<image> <video>", "x", images=("a",), videos=("c",), name="2"),
        record("so", "x", name="3"),
    ])  # fmt: skip
    media = media_ids(table)
    assert media.to_pylist() == ["image:a", "image:b", "video:c"]
    assert media_ids(table.slice(2)).to_pylist() == []
    with FeatureWriter(tmp_path / "f", KEY, SHAPE, torch.float32) as writer:
        writer.add([entry(root, "a"), entry(root, "b")], vision(2, 0))
    cache = FeatureCache(tmp_path / "f", KEY)
    cache.check(media_ids(table.slice(0, 1)), root)
    with pytest.raises(StaleFeatures, match="1 of 3 media of the records are not in .* first is the video c; add them"):
        cache.check(media, root)
    os.utime(root / "b", ns=(1, 1))
    with pytest.raises(StaleFeatures, match="b has changed since its features were computed"):
        cache.check(media_ids(table.slice(0, 1)), root)
    state = (root / "a").stat()
    (root / "a").write_bytes(bytes(state.st_size))
    os.utime(root / "a", ns=(1, state.st_mtime_ns))
    with pytest.raises(StaleFeatures, match="a is another file than the one in the feature cache"):
        cache.check(media_ids(table.slice(0, 1)), root)
    for name in "ab":
        (root / name).unlink()  # bad media, with which on_bad_image deals
    cache.check(media_ids(table.slice(0, 1)), root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": {"kind": "siglip", "dtype": "float32"}}, "encoder kind: 'clip' then, 'siglip' now"),
        ({"media": {"frames": 16}}, "media frames: 8 then, 16 now"),
        ({"autocast": "bfloat16"}, r"autocast \(train.bf16, train.fp16\): none then, bfloat16 now"),
        ({"weights": "cd"}, "the encoder has other weights"),
        ({"preprocessing": [0.51]}, "preprocessing makes other pixels"),
        ({"features": [1.0, 2.01]}, "other features of a picture with the same weights"),
        ({"weights": "cd", "media": {"frames": 4}}, "frames: 8 then, 4 now; the encoder has other weights"),
    ],
)
def test_features_of_another_encoder_or_of_other_settings_are_refused(tmp_path, root, change, message):
    write(tmp_path / "f", root, ("a", 1, 0))
    for use in (lambda: FeatureCache(tmp_path / "f", KEY | change), lambda: FeatureWriter(
        tmp_path / "f", KEY | change, SHAPE, torch.float32
    )):  # fmt: skip
        with pytest.raises(ValueError, match=f"not for this configuration: .*{message}.*another folder"):
            use()
    rounded = KEY | {"preprocessing": [0.5001], "features": [1.0, 2.0001]}
    assert len(FeatureCache(tmp_path / "f", rounded)) == 1


# Keys of real encoders.


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("key") / "tower"
    save_tower(folder)
    return folder


def save_tower(folder: Path, hidden_act: str = "quick_gelu", **processor) -> None:
    torch.manual_seed(1)
    shape = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8,
        hidden_act=hidden_act,
    )  # fmt: skip
    CLIPVisionModel(shape).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**{**size, **processor}).save_pretrained(folder)


def key_of(folder: Path, autocast: str | None = None, media: dict | None = None, **options) -> dict:
    encoder = build_encoder("clip", str(folder), **options)
    return feature_key(encoder, Media(encoder, **(media or {})), autocast)


def differs(tower: Path, other: dict) -> str:
    """What is said where a cache of `tower` meets the key `other`; as it is read back from JSON."""
    return "; ".join(feature_cache.key_differences(json.loads(json.dumps(key_of(tower))), other))


def test_the_same_encoder_elsewhere_has_the_same_key(tower, tmp_path):
    save_tower(tmp_path / "copy")
    assert differs(tower, key_of(tmp_path / "copy")) == ""
    assert differs(tower, key_of(tower, media={"frame_pooling": 2, "pixel_shuffle": 2})) == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "penultimate"}, "encoder layer: 'last' then, 'penultimate' now"),
        ({"dtype": "bfloat16"}, "encoder dtype: 'float32' then, 'bfloat16' now; the encoder has other weights"),
        ({"drop_class_token": False}, "encoder drop_class_token: None then, False now"),
        ({"media": {"max_tiles": 4}}, "media max_tiles: 0 then, 4 now"),
        ({"media": {"fps": 1.5}}, "media fps: None then, 1.5 now"),
        ({"media": {"max_seconds": 3}}, "media max_seconds: None then, 3 now"),
        ({"autocast": "bfloat16"}, "none then, bfloat16 now"),
    ],
)
def test_settings_that_change_features_change_the_key(tower, options, message):
    assert message in differs(tower, key_of(tower, **options))


@pytest.mark.parametrize(
    "settings",
    [
        {"resample": 2}, {"image_mean": [0.48, 0.46, 0.41]}, {"image_std": [0.28, 0.26, 0.28]},
        {"size": {"shortest_edge": 17}}, {"rescale_factor": 1 / 256}, {"do_normalize": False},
    ],
)  # fmt: skip
def test_other_preprocessing_changes_the_key(tower, tmp_path, settings):
    save_tower(tmp_path / "t", **settings)
    assert differs(tower, key_of(tmp_path / "t")) == "the encoder's preprocessing makes other pixels of a picture"


def test_what_no_weight_shows_changes_the_key(tower, tmp_path):
    save_tower(tmp_path / "t", hidden_act="relu")
    assert "other features of a picture with the same weights" in differs(tower, key_of(tmp_path / "t"))


def test_a_rounding_in_any_weight_changes_the_digest(tower):
    encoder = build_encoder("clip", str(tower))
    state = encoder.backbone.state_dict()
    whole = weight_digest(state)
    assert weight_digest(dict(reversed(state.items()))) == whole
    for name, tensor in state.items():
        changed = tensor.clone()
        changed.view(-1)[-1] = torch.nextafter(changed.view(-1)[-1], torch.tensor(9.0))
        assert weight_digest(state | {name: changed}) != whole, name
        assert weight_digest(state | {name: tensor.flatten()[None]}) != whole, name


# Interrupted, damaged, foreign.


def test_what_was_added_before_an_error_is_kept(tmp_path, root):
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), FeatureWriter(tmp_path / error.__name__, KEY, SHAPE, torch.float32) as writer:
            writer.add([entry(root, "a")], vision(1, 3))
            raise error
        cache = FeatureCache(tmp_path / error.__name__, KEY)
        assert len(cache) == 1 and torch.equal(cache.load("image", "a", root), vision(1, 3))


def test_full_disk_keeps_what_was_there(tmp_path, root, monkeypatch):
    write_all = feature_writer._write_all

    def half(file, data):
        if len(data) == 4 * 6 * 4:
            file.write(data[:50])
            raise OSError(errno.ENOSPC, "no space left for it")
        write_all(file, data)

    monkeypatch.setattr(feature_writer, "_write_all", half)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path / "f", root, ("a", 1, 3), ("b", 2, 4), ("c", 4, 0))
    monkeypatch.undo()
    write(tmp_path / "f", root, ("c", 4, 7))
    cache = FeatureCache(tmp_path / "f", KEY)
    for name, views, value in (("a", 1, 3), ("b", 2, 4), ("c", 4, 7)):
        assert torch.equal(cache.load("image", name, root), vision(views, value))


def test_errors_of_a_full_disk_name_the_file(tmp_path):
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="left for /dev/full") as caught:
        feature_writer._write_all(full, memoryview(b"abc"))
    assert caught.value.errno == errno.ENOSPC


KILLED = """
import os, signal, sys, torch
from tests.dataset.test_feature_cache import *
writer = FeatureWriter(sys.argv[1], KEY, SHAPE, torch.float32)
feature_writer.PART_BYTES = 2 * 6 * 4
for name in "abc":
    writer.add([entry(Path(sys.argv[2]), name)], vision(1, ord(name)))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_whole_parts_and_no_lock(tmp_path, root, request):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "f"), str(root)]
    done = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in (tmp_path / "f").glob("part*")) == [
        "part-00000.arrow", "part-00000.bin", "part-00001.bin",
    ]  # fmt: skip
    cache = FeatureCache(tmp_path / "f", KEY)
    assert len(cache) == 2 and cache.lookup("image:c") is None
    write(tmp_path / "f", root, ("c", 1, 1))
    cache = FeatureCache(tmp_path / "f", KEY)
    for name, value in (("a", ord("a")), ("b", ord("b")), ("c", 1)):
        assert torch.equal(cache.load("image", name, root), vision(1, value))


def test_one_writer_at_a_time(tmp_path, root):
    with FeatureWriter(tmp_path / "f", KEY, SHAPE, torch.float32):
        with pytest.raises(BlockingIOError, match="another process is adding to the feature cache"):
            FeatureWriter(tmp_path / "f", KEY, SHAPE, torch.float32)
    write(tmp_path / "f", root, ("a", 1, 0))


def cut_features(folder: Path) -> None:
    os.truncate(folder / "part-00000.bin", 10)


def cut_index(folder: Path) -> None:
    os.truncate(folder / "part-00000.arrow", 300)


def other_index(folder: Path) -> None:
    table = pa.table({"medium": ["image:a"]})
    with pa.OSFile(str(folder / "part-00000.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_features, "part-00000.bin has 10 bytes, expected 24; remove .*part-00000.arrow and compute that"),
        (lambda folder: (folder / "part-00000.bin").unlink(), "part-00000.bin has 0 bytes, expected 24"),
        (cut_index, "part-00000.arrow is damaged .*; remove"),
        (lambda folder: (folder / "part-00000.arrow").write_bytes(b""), "part-00000.arrow is damaged"),
        (other_index, "part-00000.arrow is no index of features; remove"),
        (lambda folder: (folder / "key.json").write_text("{"), "key.json is no description of a feature cache"),
        (lambda folder: (folder / "key.json").write_text("[]"), "key.json is no description of a feature cache"),
        (lambda folder: (folder / "key.json").write_text('{"format": 9}'), "key.json .*format 9, this code reads"),
        (lambda folder: (folder / "key.json").unlink(), "there is no feature cache in .*; make it: python cache_"),
    ],
)
def test_damage_is_named(tmp_path, root, damage, message):
    write(tmp_path / "f", root, ("a", 1, 0))
    damage(tmp_path / "f")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        FeatureCache(tmp_path / "f", KEY)


def test_other_folders_are_left_alone(tmp_path, root):
    with pytest.raises(ValueError, match=r"images holds other files \(a, b, c\); choose another folder"):
        FeatureWriter(root, KEY, SHAPE, torch.float32)
    assert sorted(path.name for path in root.iterdir()) == list("abcd")
    write(tmp_path / "f", root, ("a", 1, 0))
    with pytest.raises(ValueError, match="holds features"):
        FeatureWriter(tmp_path / "f", KEY, (2, 4), torch.float32)
    Image.new("RGB", (2, 2)).save(tmp_path / "file.png")
    with pytest.raises(FileExistsError):
        FeatureWriter(tmp_path / "file.png", KEY, SHAPE, torch.float32)
