from pathlib import Path

import av
import pytest
from PIL import Image

from dataprocess.moving import write_clip
from dataprocess.videos import CONTAINERS, ENDS, check_video
from visual import video


@pytest.fixture
def folder(tmp_path) -> Path:
    noise = [Image.effect_noise((96, 96), 80).convert("RGB") for _ in range(20)]
    write_clip(noise, 10, tmp_path / "a.mp4")
    write_clip(noise[::-1], 10, tmp_path / "b.mp4")
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "copy.mp4").write_bytes(content)
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])  # its index stands at the end
    (tmp_path / "page.mp4").write_text("<html>404</html>")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame(format="s16", layout="mono", samples=800)
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    return tmp_path


def test_sound_videos_are_recognised_by_their_bytes(folder):
    first, copy, other = (check_video(str(folder / name)) for name in ("a.mp4", "copy.mp4", "b.mp4"))
    assert first.problem is None and first.digest == copy.digest != other.digest


def test_long_files_differ_by_length_and_ends(folder):
    content = (folder / "a.mp4").read_bytes()
    free = (3 * ENDS + 8).to_bytes(4, "big") + b"free" + bytes(3 * ENDS)  # a box without meaning, after the clip
    (folder / "long.mp4").write_bytes(content + free)
    (folder / "longer.mp4").write_bytes(content + free + free)
    (folder / "ends.mp4").write_bytes(content + free[:-1] + b"x")
    digests = {check_video(str(folder / name)).digest for name in ("a.mp4", "long.mp4", "longer.mp4", "ends.mp4")}
    assert len(digests) == 4 and None not in digests


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent.mp4", "video missing"),
        ("cut.mp4", "video unreadable"),
        ("page.mp4", "video unreadable"),
        ("empty.mp4", "video unreadable"),
        ("folder.mp4", "video unreadable"),
        ("sound.wav", "video unreadable"),
    ],
)
def test_bad_videos(folder, name, reason):
    checked = check_video(str(folder / name))
    assert checked.digest is None and checked.reason == reason and name in checked.problem


def test_videos_above_pillows_limit(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 95)
    assert check_video(str(folder / "a.mp4")).reason == "video too large"


def test_what_is_kept_can_be_trained_on(folder):
    """The same containers are open to `visual.video`; a list of other files is none of them."""
    assert CONTAINERS == video.CONTAINERS
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    (folder / "playlist.m3u8").write_text("#EXTM3U\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n")
    for name in ("list.mp4", "playlist.m3u8"):
        checked = check_video(str(folder / name))
        assert checked.reason == "video unreadable" and "can't be read as a video" in checked.problem


def test_names_that_look_like_addresses(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "http:").mkdir()
    (folder / "http:" / "a.mp4").write_bytes((folder / "a.mp4").read_bytes())
    assert check_video("http:/a.mp4").digest == check_video("a.mp4").digest is not None
