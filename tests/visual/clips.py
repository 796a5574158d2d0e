"""Writes small video files whose frames show their number, and reads the number off a frame."""

from collections.abc import Iterable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

BLOCK = 8
SIZE = (8 * BLOCK, 3 * BLOCK)  # width, height
KEY_EVERY = 10


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """[H, W, 3]: eight columns, black or white, are the bits of the number."""
    bits = [(number >> bit) & 1 for bit in range(8)]
    row = np.repeat(np.array(bits, np.uint8) * 255, size[0] // 8)
    return np.broadcast_to(row[None, :, None], (size[1], size[0], 3)).copy()


def number_in(image: Image.Image) -> int:
    columns = np.asarray(image).mean(axis=(0, 2)).reshape(8, -1).mean(axis=1)
    return sum(int(value > 127) << bit for bit, value in enumerate(columns))


def write_clip(
    path: Path,
    frames: int = 50,
    *,
    times: Iterable[float] | None = None,
    rate: int = 25,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    format: str | None = None,
    audio_seconds: float = 0,
    size: tuple[int, int] = SIZE,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """A clip with B-frames and a key frame every `KEY_EVERY` frames; frame k is shown at `times[k]` or k / rate."""
    times = [Fraction(k, rate) for k in range(frames)] if times is None else list(times)
    tick = Fraction(1, 1000) if codec in ("libx264", "libvpx-vp9") else Fraction(1, rate)
    ordinary = {} if codec in ("gif", "mjpeg") else {"g": str(KEY_EVERY), "sc_threshold": "1000000000"}
    if codec in ("libx264", "mpeg4", "mpeg2video"):
        ordinary["bf"] = "2"
    with av.open(str(path), "w", format=format, options=container or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=ordinary | (options or {}))
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.time_base = tick
        sound = out.add_stream("aac", rate=16000, layout="mono") if audio_seconds else None
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number % 256, size), format="rgb24")
            frame.pts, frame.time_base = round(time / tick), tick
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        for start in range(0, int(audio_seconds * 16000), 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
            out.mux(sound.encode(frame))
        if sound:
            out.mux(sound.encode())
    return path


def decode_all(path: Path) -> list[tuple[Fraction, np.ndarray]]:
    """(time, picture) of every frame, with the first packets first and nothing skipped."""
    frames: list[av.VideoFrame] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate
        stream.thread_type = "SLICE"
        with suppress(av.FFmpegError):  # at the end of a damaged container
            for packet in container.demux(stream):
                with suppress(av.FFmpegError):
                    frames += packet.decode()
        with suppress(av.FFmpegError):
            frames += stream.codec_context.decode(None)
        return [
            (k / rate if frame.pts is None else frame.pts * frame.time_base, frame.to_ndarray(format="rgb24"))
            for k, frame in enumerate(frames)
        ]


def shown_at(frames: list[tuple[Fraction, np.ndarray]], time: Fraction) -> np.ndarray:
    """What is on the screen `time` seconds after the first frame."""
    begin = frames[0][0]
    return [frame for at, frame in frames if at <= begin + time or at == begin][-1]
