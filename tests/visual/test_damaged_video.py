"""Files that are no video, or no longer a whole one, and headers that misstate the length."""

import struct

import numpy as np
import pytest
from clips import decode_all, number_in, shown_at, write_clip
from PIL import Image

from visual.video import count_frames, load_frames, sample_times

FASTSTART = {"movflags": "faststart"}


def numbers(path, *args, **kwargs):
    return [number_in(image) for image in load_frames(path, *args, **kwargs)]


@pytest.fixture(scope="module")
def long_clips(tmp_path_factory):
    """Eight seconds, 200 frames."""
    folder = tmp_path_factory.mktemp("long")
    clips = {name: write_clip(folder / f"a.{name}", 200) for name in ("mkv", "ts", "mp4")}
    return clips | {"faststart": write_clip(folder / "b.mp4", 200, container=FASTSTART)}


@pytest.mark.parametrize("name", ["faststart", "mkv", "ts"])
@pytest.mark.parametrize("kept", [0.9, 0.5])
def test_cut_off(tmp_path, long_clips, name, kept):
    data = long_clips[name].read_bytes()
    path = tmp_path / long_clips[name].name
    path.write_bytes(data[: int(len(data) * kept)])
    left = len(decode_all(path))
    assert left < 200
    found = numbers(path, 8)
    np.testing.assert_allclose(found, [left * (2 * k + 1) / 16 for k in range(8)], atol=2)
    assert len(numbers(path, 99, fps=2)) == count_frames(path, 99, fps=2)


def test_cut_off_before_its_index(tmp_path, long_clips):
    data = long_clips["mp4"].read_bytes()
    path = tmp_path / "half.mp4"
    path.write_bytes(data[: len(data) // 2])
    for attempt in (lambda: numbers(path, 8), lambda: count_frames(path, 8, fps=1)):
        with pytest.raises(ValueError, match=r"half\.mp4 can't be read as a video: "):
            attempt()


def zeroed(path, target, begin, end):
    """The payload of an mp4 with a part, from `begin` to `end` of its length, set to zero."""
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    first, last = (start + int((len(data) - start) * part) for part in (begin, end))
    data[first:last] = bytes(last - first)
    target.write_bytes(data)
    return target


def test_damaged_end_is_replaced_by_the_last_intact_frame(tmp_path, long_clips):
    path = zeroed(long_clips["faststart"], tmp_path / "a.mp4", 0.5, 1)
    intact = [number_in(Image.fromarray(frame)) for _, frame in decode_all(path)]
    found = numbers(path, 8)
    assert found[:3] == [12, 37, 62]
    assert set(found[-3:]) == {found[-1]} and abs(found[-1] - max(intact)) <= 10  # nearest, by one key frame at most


def test_damaged_middle(tmp_path, long_clips):
    path = zeroed(long_clips["faststart"], tmp_path / "a.mp4", 0.4, 0.6)
    found = numbers(path, 8)
    # After damage, up to the next key frame, nothing is trusted, whatever the decoder makes of it.
    assert found[:3] == [12, 37, 62] and found[-3:] == [137, 162, 187]
    assert found[3] == found[4] and 62 <= found[3] < 80


def test_damaged_beginning_is_an_error(tmp_path, long_clips):
    path = zeroed(long_clips["faststart"], tmp_path / "zeros.mp4", 0, 0.5)
    with pytest.raises(ValueError, match=r"zeros\.mp4.*can't be"):
        numbers(path, 8)


def test_recording_that_begins_between_key_frames(tmp_path, long_clips):
    data = long_clips["ts"].read_bytes()
    path = tmp_path / "a.ts"
    # Program tables, then from somewhere in the second group of pictures on.
    path.write_bytes(data[: 188 * 3] + data[len(data) // 20 // 188 * 188 :])
    found = numbers(path, 4)
    assert found == sorted(found) and 10 <= found[0] < 60 and found[-1] > 150


@pytest.mark.parametrize("stated", ["00:01:00.000000000", "00:00:00.400000000", "00:00:00.000000000"])
def test_matroska_that_misstates_its_length(tmp_path, long_clips, stated):
    data = long_clips["mkv"].read_bytes()
    assert data.count(b"00:00:08.000000000") == 1
    data = data.replace(b"00:00:08.000000000", stated.encode())
    seconds = float(stated[6:]) + 60 * float(stated[3:5])
    at = data.index(b"\x44\x89\x88") + 3  # length of the segment in milliseconds
    assert struct.unpack(">d", data[at : at + 8])[0] == 8000
    data = data[:at] + struct.pack(">d", seconds * 1000) + data[at + 8 :]
    path = tmp_path / "a.mkv"
    path.write_bytes(data)
    assert numbers(path, 4) == [25, 75, 125, 175]
    promised = count_frames(path, 99, fps=1)
    assert promised == {"60": 60, "0.4": 1, "0": 8}[f"{seconds:g}"]
    found = numbers(path, 99, fps=1)
    np.testing.assert_allclose(found, [200 * (2 * k + 1) / (2 * promised) for k in range(promised)], atol=1)


@pytest.mark.parametrize("seconds", [100, 1])
def test_mp4_that_misstates_its_length(tmp_path, long_clips, seconds):
    data = bytearray(long_clips["faststart"].read_bytes())
    for box in (b"mvhd", b"mdhd"):
        at = data.index(box) + 4 + 12  # version and flags, two dates; then units per second and length
        units = struct.unpack(">I", data[at : at + 4])[0]
        data[at + 4 : at + 8] = struct.pack(">I", units * seconds)
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    assert numbers(path, 4) == [25, 75, 125, 175]
    assert len(numbers(path, 50, fps=1)) == count_frames(path, 50, fps=1)


def write_sound(path):
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac" if path.suffix == ".m4a" else "pcm_s16le", rate=16000, layout="mono")
        format = "fltp" if path.suffix == ".m4a" else "s16"
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32 if format == "fltp" else np.int16), format=format, layout="mono"
        )
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def test_what_is_no_video(tmp_path):
    def file(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    Image.new("RGB", (16, 16)).save(tmp_path / "picture.jpg")
    Image.new("RGB", (16, 16)).save(tmp_path / "picture.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "picture.webp")
    write_clip(tmp_path / "a.ts", 5)
    cases = [
        (file("empty.mp4", b""), "empty.mp4 is empty"),
        (file("text.txt", b"Not a film.\n" * 50), "can't be read as a video"),
        (file("noise.mp4", np.random.default_rng(0).bytes(5000)), "can't be read as a video"),
        (file("page.html", b"<html><body>404</body></html>"), "can't be read as a video"),
        (file("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n"), "can't be read as a video"),
        (file("list.ffconcat", b"ffconcat version 1.0\nfile a.ts\n"), "can't be read as a video"),
        (tmp_path / "picture.jpg", "can't be read as a video"),
        (tmp_path / "picture.webp", "can't be read as a video"),
        (tmp_path, "is a folder"),
        (write_sound(tmp_path / "sound.m4a"), "holds no video, only audio"),
        (write_sound(tmp_path / "sound.wav"), "can't be read as a video"),
    ]
    for path, message in cases:
        for attempt in (lambda: list(load_frames(path, 2)), lambda: count_frames(path, 2, fps=1)):  # noqa: B023
            with pytest.raises(ValueError, match=f"{path.name}.*{message}|{message}"):
                attempt()
    assert numbers(tmp_path / "a.ts", 1) == [2]  # which the lists would have led to
    for name in (tmp_path / "nowhere.mp4", "http://localhost:1/a.mp4", "testsrc"):
        with pytest.raises(FileNotFoundError, match=f"no video file {name}"):
            list(load_frames(name, 2))


def test_more_pixels_than_the_limit(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 24 - 1)
    with pytest.raises(ValueError, match=r"a\.mp4: 64x24 pixels, above the limit of 1535"):
        list(load_frames(path, 1))


def test_reading_leaves_the_file_closed(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 3)
    frames = load_frames(path, 3)
    next(frames)
    frames.close()
    path.unlink()
    every = decode_all(write_clip(path, 3))
    assert np.array_equal(next(load_frames(path, 1)), shown_at(every, sample_times(every[-1][0] * 1.5, 1)[0]))
