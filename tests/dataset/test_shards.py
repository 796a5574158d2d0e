"""Media inside of tar files: read by their place, as if each were a file of its own."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import record
from torch.utils.data import DataLoader

from dataprocess.moving import write_clip
from dataset.collator import Collator
from dataset.dataset import RecordDataset
from dataset.shards import open_medium
from visual import build_encoder, load_image
from visual.image import image_size
from visual.media import Media
from visual.video import count_frames, load_frames


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images and a clip, and the same in a shard."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (16, 48, 3), dtype=np.uint8)).save(tmp_path / "b.png", exif=turned)
    frames = [Image.new("RGB", (32, 32), (12 * number, 0, 0)) for number in range(20)]
    write_clip(frames, 10, tmp_path / "c.mp4")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-100])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for path in sorted(tmp_path.iterdir()):
            if path.suffix != ".tar":
                tar.add(path, path.name)
    return tmp_path


def places(folder: Path) -> dict[str, str]:
    """File -> its place in the shard."""
    with tarfile.open(folder / "s.tar") as tar:
        return {member.name: f"s.tar#{member.offset_data}+{member.size}" for member in tar}


def test_bytes_are_those_of_the_file(folder):
    for name, place in places(folder).items():
        expected = (folder / name).read_bytes()
        with open_medium(folder, place) as file:
            assert file.name == f"{folder}/{place}"
            assert file.read() == expected and file.read(1) == b""
            for position in (0, 7, len(expected), len(expected) + 5):
                assert file.seek(position) == file.tell() == position
                assert file.read(9) == expected[position : position + 9]
            assert file.seek(0, os.SEEK_END) == len(expected)


def test_names_that_are_no_places(folder):
    for name in ("a.jpg", "x.tar", "x.tar#1+2.jpg", "x.tar#1", "x.tgz#1+2", "x.tar#-1+2"):
        assert open_medium(folder, name) == folder / name


def test_images_and_clips_are_the_same_as_from_files(folder):
    for name in ("a.jpg", "b.png"):
        place = places(folder)[name]
        np.testing.assert_array_equal(load_image(open_medium(folder, place)), load_image(folder / name))
        assert image_size(open_medium(folder, place)) == image_size(folder / name)
        file = open_medium(folder, place)  # what has been read is read again from its beginning
        assert image_size(file) == load_image(file).size == image_size(file)
    clip = open_medium(folder, places(folder)["c.mp4"])
    assert count_frames(clip, 99, fps=5) == count_frames(folder / "c.mp4", 99, fps=5)
    ours, theirs = list(load_frames(clip, 4)), list(load_frames(folder / "c.mp4", 4))
    assert len(ours) == 4 and all(map(np.array_equal, ours, theirs))
    assert all(map(np.array_equal, load_frames(clip, 4), theirs))


@pytest.mark.parametrize(
    ("name", "message"),
    [("cut.jpg", "can't be decoded: .*truncated"), ("text.jpg", "is not an image"), ("empty.jpg", "is empty")],
)
def test_bad_images_are_named_by_shard_and_place(folder, name, message):
    place = places(folder)[name].replace("+", r"\+")
    with pytest.raises(ValueError, match=rf"{place} {message}"):
        load_image(open_medium(folder, places(folder)[name]))
    with pytest.raises(ValueError, match=rf"{place} (can't be read as a video|is empty)"):
        list(load_frames(open_medium(folder, places(folder)[name]), 4))


@pytest.mark.parametrize("read", [load_image, image_size, lambda file: list(load_frames(file, 4))])
def test_wrong_shards(folder, read):
    place = places(folder)["c.mp4"]
    offset, length = map(int, place.split("#")[1].split("+"))
    with pytest.raises(FileNotFoundError, match=r"t.tar#"):
        read(open_medium(folder, place.replace("s.tar", "t.tar")))
    for wrong in (f"s.tar#{offset + 512}+{length}", f"s.tar#{offset}+{length - 1}", "s.tar#0+10", "s.tar#100+10"):
        with pytest.raises(ValueError, match=rf"{wrong}: no member of that length begins there".replace("+", r"\+")):
            read(open_medium(folder, wrong))
    content = (folder / "s.tar").read_bytes()
    (folder / "s.tar").write_bytes(content[: offset + length - 1])
    with pytest.raises(ValueError, match=rf"\+{length}: the shard is cut off, it has {offset + length - 1} bytes"):
        read(open_medium(folder, place))
    (folder / "s.tar").write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match="it is another shard"):
        read(open_medium(folder, place))


def test_nothing_is_opened_before_it_is_read(tmp_path):
    file = open_medium(tmp_path, "absent.tar#512+10")
    assert file.seek(0) == 0
    with pytest.raises(FileNotFoundError):
        file.read(1)


def test_open_files_are_left_open(folder):
    with open(folder / "a.jpg", "rb") as file:
        assert load_image(file).size == image_size(file) == (30, 20)
        assert not file.closed
    named = io.BytesIO(b"")
    named.name = "nothing"
    with pytest.raises(ValueError, match="nothing is empty"):
        load_image(named)


@pytest.mark.parametrize("settings", [{"max_tiles": 4, "fps": 2.0}, {"frames": 3}])
def test_samples_are_the_same_as_from_files(tokenizer, tiny, folder, settings):
    media = Media(build_encoder("clip", str(tiny.folder / "encoder")), **settings)
    place = places(folder)

    def batch(name) -> dict:
        records = [
            record("<image><video><image>", "x", images=[name("a.jpg"), name("b.png")], videos=[name("c.mp4")]),
            record("<image>?", "y", images=[name("cut.jpg")], name="bad"),
        ]
        dataset = RecordDataset(records, tokenizer, media, folder, on_bad_image="skip")
        assert list(dataset.lengths)[0] > 3
        collate = Collator(tokenizer.pad_token_id)
        (loaded,) = list(DataLoader(dataset, batch_size=2, collate_fn=collate, num_workers=1, timeout=60))
        assert dataset.skipped == ["bad"]
        return loaded

    ours, theirs = batch(place.__getitem__), batch(str)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_errors_name_the_record_too(tokenizer, tiny, folder):
    media = Media(build_encoder("clip", str(tiny.folder / "encoder")))
    images = [places(folder)["cut.jpg"]]
    dataset = RecordDataset([record("<image>", "x", images=images, name="bad")], tokenizer, media, folder)
    with pytest.raises(ValueError, match=r"record 'bad': .*s.tar#\d+\+\d+ can't be decoded.*on_bad_image=skip"):
        dataset[0]
