"""Frames of intact clips in every container against decoding all of it."""

from fractions import Fraction

import av
import numpy as np
import pytest
from clips import KEY_EVERY, decode_all, number_in, picture, shown_at, write_clip
from PIL import Image

from visual import video
from visual.video import count_frames, load_frames, sample_times

CONTAINERS = {
    "mp4": {},
    "mov": {"codec": "mpeg4"},
    "mkv": {},
    "ts": {},
    "flv": {},
    "avi": {"codec": "mpeg4"},
    "mpg": {"codec": "mpeg2video"},
    "webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "gif": {"codec": "gif", "pixels": "rgb8"},
    # Without length, and most of them without a number of frames.
    "live.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}, "container": {"live": "1"}},
    "live.mkv": {"container": {"live": "1"}},
    "fragments.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "h264": {},  # not even with times
    "mjpeg": {"codec": "mjpeg", "pixels": "yuvj420p"},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two seconds, 50 frames, in each container."""
    folder = tmp_path_factory.mktemp("clips")
    return {name: write_clip(folder / f"clip.{name}", **options) for name, options in CONTAINERS.items()}


def numbers(path, *args, **kwargs):
    return [number_in(image) for image in load_frames(path, *args, **kwargs)]


def test_sample_times():
    assert sample_times(8, 4) == [1, 3, 5, 7]
    assert sample_times(8, 4, max_seconds=4) == [0.5, 1.5, 2.5, 3.5]
    assert sample_times(2, 4, max_seconds=4) == [0.25, 0.75, 1.25, 1.75]
    assert sample_times(3, 100, fps=2) == [Fraction(2 * k + 1, 4) for k in range(6)]
    assert sample_times(7200, 16, fps=1) == [225 + 450 * k for k in range(16)]  # capped: all of the film, not its start
    assert sample_times(0.2, 16, fps=1) == [Fraction(0.2) / 2]
    assert [len(sample_times(s, 99, fps=1)) for s in (1.49, 1.5, 2.49, 2.5)] == [1, 2, 2, 3]


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("frames", [1, 8, 64])
def test_equals_decoding_all(clips, name, frames):
    every = decode_all(clips[name])
    assert len(every) == 50
    found = list(load_frames(clips[name], frames))
    assert len(found) == frames and all(image.mode == "RGB" for image in found)
    rate = every[1][0] - every[0][0]
    length = every[-1][0] + rate - every[0][0]
    if name in ("avi", "mpg"):  # whose first frame, by its own header, is shown a little after the beginning
        expected = [50 * (2 * k + 1) / (2 * frames) for k in range(frames)]
        np.testing.assert_allclose([number_in(image) for image in found], expected, atol=3)
        return
    for image, time in zip(found, sample_times(length, frames), strict=True):
        np.testing.assert_array_equal(np.asarray(image), shown_at(every, time))


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("fps, frames", [(1, 16), (2.5, 16), (100, 16), (0.1, 16)])
def test_frames_per_second(clips, name, fps, frames):
    count = count_frames(clips[name], frames, fps)
    if name not in ("mpg", "flv"):  # which state their length wrongly
        assert count == min(frames, max(1, round(2 * fps)))
    found = numbers(clips[name], frames, fps)
    assert len(found) == count and found == sorted(found)
    np.testing.assert_allclose(found, [50 * (2 * k + 1) / (2 * count) for k in range(count)], atol=3)


def test_count_without_fps_reads_nothing():
    assert count_frames("/nowhere", 8) == 8


def test_beginning_alone(clips):
    for name in ("mp4", "h264", "live.webm"):
        assert numbers(clips[name], 4, max_seconds=0.8) == [2, 7, 12, 17]
        assert count_frames(clips[name], 9, fps=5, max_seconds=0.8) == 4


@pytest.mark.parametrize("name", ["mp4", "mkv"])
def test_variable_frame_rate(tmp_path, name):
    times = [0, 0.1, 0.15, 0.2, 3, 3.04, 7.5, 7.6, 9.9]  # the last is shown for less than a tenth of a second
    path = write_clip(tmp_path / f"a.{name}", times=times)
    every = decode_all(path)
    np.testing.assert_allclose([float(time) for time, _ in every], times, atol=0.002)
    for frames in (3, 5, 50):
        found = numbers(path, frames)
        # How long the last frame stays is for the container to say: at most as long as one at the stated rate.
        times_wanted = sample_times(Fraction("9.94"), frames)
        assert found == [max(k for k, time in enumerate(times) if time <= at) for at in times_wanted]


def test_slideshow_shows_what_is_on_the_screen(tmp_path):
    path = write_clip(tmp_path / "a.mp4", times=[0, 10, 20, 20.04])
    assert numbers(path, 5) == [0, 0, 1, 1, 1]  # at 2, 6, 10, 14 and 18 seconds


@pytest.mark.parametrize("name", ["mp4", "mkv", "ts"])
def test_audio_longer_than_the_film(tmp_path, name):
    path = write_clip(tmp_path / f"a.{name}", audio_seconds=6)
    with av.open(str(path)) as container:
        assert container.duration > 5_500_000
    np.testing.assert_allclose(numbers(path, 4), [6, 18, 31, 43], atol=1)
    assert len(numbers(path, 99, fps=2)) == count_frames(path, 99, fps=2)


@pytest.mark.parametrize("seconds, expected", [(0.2, [0, 0, 1, 2, 2, 3, 4, 4]), (0.04, [0] * 8)])
def test_shorter_than_the_number_of_frames(tmp_path, seconds, expected):
    path = write_clip(tmp_path / "a.mp4", round(seconds * 25))
    found = list(load_frames(path, 8))
    assert [number_in(image) for image in found] == expected
    assert len({id(image) for image in found}) == len(set(expected))  # a repeated frame is one object
    assert numbers(path, 8, fps=1) == [expected[4]]


def test_film_of_two_hours(tmp_path):
    path = write_clip(tmp_path / "a.mkv", 7200, rate=1, codec="mpeg4", size=(64, 16))
    assert count_frames(path, 16, fps=1) == 16
    assert numbers(path, 16, fps=1) == [(225 + 450 * k) % 256 for k in range(16)]


@pytest.mark.parametrize("name", ["mp4", "mkv", "ts", "avi", "flv"])
def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch, name):
    path = write_clip(tmp_path / f"a.{name}", 1000, codec="mpeg4" if name == "avi" else "libx264")
    decoded, original = [], video._decode

    def count(*args):
        for item in original(*args):
            decoded.append(item)
            yield item

    monkeypatch.setattr(video, "_decode", count)
    assert len(numbers(path, 8)) == 8
    # Transport streams are entered up to a second, here 25 frames, early.
    assert len(decoded) <= 8 * (KEY_EVERY + 4 + (25 if name == "ts" else 0))


def test_a_single_key_frame_is_decoded_once(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", 250, options={"g": "1000", "keyint_min": "1000"})
    calls, original = [], video._decode
    monkeypatch.setattr(video, "_decode", lambda *args: calls.append(args) or original(*args))
    assert len(set(numbers(path, 8))) == 8
    assert len(calls) == 1


@pytest.mark.parametrize("matrix", [key for key in video.TURNS])
def test_display_matrix(tmp_path, matrix):
    """What phones write into the track header, against the definition: (x, y) goes to (ax + cy, bx + dy)."""
    upright = write_clip(tmp_path / "a.mp4", 3)
    data = bytearray(upright.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value * 65536 for value in matrix)
    data[at : at + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    turned = tmp_path / "b.mp4"
    turned.write_bytes(data)
    stored = np.asarray(next(load_frames(upright, 1)))
    height, width = stored.shape[:2]
    y, x = np.mgrid[:height, :width]
    to_x, to_y = matrix[0] * x + matrix[2] * y, matrix[1] * x + matrix[3] * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    expected = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    expected[to_y, to_x] = stored
    np.testing.assert_array_equal(np.asarray(next(load_frames(turned, 1))), expected)


def test_phone_held_upright(tmp_path):
    """A tag of 90 degrees, as older writers have it, means clockwise."""
    path = write_clip(tmp_path / "a.mp4", 3)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = np.array([0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    stored = next(load_frames(path, 1))
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).rotation == -90  # counter-clockwise
    turned = next(load_frames(path, 1))
    assert turned.size == stored.size[::-1]
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(stored), -1))


@pytest.mark.parametrize("name", ["gif", "png"])
def test_animations_of_pillow(tmp_path, name):
    images = [Image.fromarray(picture(k)) for k in range(6)]
    durations = [100, 100, 1000, 100, 100, 600]
    path = tmp_path / f"a.{name}"
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations)
    assert numbers(path, 10) == [1, 2, 2, 2, 2, 2, 4, 5, 5, 5]
    assert count_frames(path, 99, fps=2) == 4


def test_transparent_pixels_are_white(tmp_path):
    images = [Image.new("RGBA", (16, 16), (255, 0, 0, 0)) for _ in range(2)]
    for number, image in enumerate(images):
        image.paste((0, 0, 255, 255), (0, 0, 8, 8 + number))
    path = tmp_path / "a.gif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, disposal=2)
    frame = np.asarray(next(load_frames(path, 1)))
    assert frame[0, 0].tolist() == [0, 0, 255] and frame[15, 15].tolist() == [255, 255, 255]


@pytest.mark.parametrize("name", ["a:b.mp4", "100%03d.mp4", "concat:x.mp4", "ä ö.mp4", "no suffix", "wrong.txt"])
def test_file_names(tmp_path, monkeypatch, clips, name):
    (tmp_path / name).write_bytes(clips["mp4"].read_bytes())
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, name):
        assert numbers(path, 2) == [12, 37]
