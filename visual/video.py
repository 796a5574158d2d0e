"""Any video file, given as in `visual.image`, -> some of its frames, upright and in RGB.

A clip is split into as many equal intervals as frames are wanted, and the picture that is on the screen in the middle
of each interval is taken. All times are presentation times, so frame rates may vary.
"""

import os
import re
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, groupby
from math import floor
from operator import itemgetter
from typing import NamedTuple

import av
from av import VideoFrame
from av.sidedata.sidedata import Type as SideData
from PIL import Image

from visual.image import File, check_pixels, is_empty, name_of, to_rgb

# Containers that are read. Others that libav knows are subtitles, lists of further files or addresses, which a data set
# must not make us open, or text and single images, which it shows as films.
CONTAINERS = (
    "3dostr amv apng asf av1 avi cavsvideo dirac dnxhd dv flic flv gif gxf h261 h263 h264 hevc ivf m4v matroska mjpeg "
    "mov mpeg mpegts mpegvideo mxf nsv nut obu ogg rm roq swf vc1 viv vvc wtv yuv4mpegpipe"
).split()
# Their demuxers can't seek, or mark pictures that build on the one before as if they could be decoded alone.
NO_SEEKING = {"gif", "apng"}
# What turns a stored picture upright, by the signs of its display matrix (a, b, c, d): where x goes, where y goes.
TURNS = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


def sample_times(
    seconds: Fraction | float, frames: int, fps: float | None = None, max_seconds: float | None = None
) -> list[Fraction]:
    """Seconds from the beginning of a clip of `seconds` at which its frames are taken.

    Args:
        frames: how many; with `fps`, how many at most.
        fps: how many per second, rounded to a whole number of frames over the clip, but at least one.
        max_seconds: only so much of the clip, from its beginning.
    """
    length = Fraction(seconds) if max_seconds is None else min(Fraction(seconds), Fraction(max_seconds))
    count = frames if fps is None else min(frames, max(1, int(length * Fraction(fps) + Fraction(1, 2))))
    return [length * (2 * index + 1) / (2 * count) for index in range(count)]


def count_frames(
    file: File, frames: int, fps: float | None = None, max_seconds: float | None = None
) -> int:
    """How many frames `load_frames` yields, by the length that the header of the file states.

    A file whose header states none is read through, but not decoded. Without `fps` no file is opened.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no video; names it.
    """
    if fps is None:
        return frames
    with _open(file) as (container, stream):
        length = _stated_length(container, stream)
        if length is None:
            length = _span(container, stream, None).length
        return len(sample_times(length, frames, fps, max_seconds))


def load_frames(
    file: File, frames: int, fps: float | None = None, max_seconds: float | None = None
) -> Iterator[Image.Image]:
    """The frames of a clip at its `sample_times`: RGB, upright, in the order of time.

    Where the header misstates the length, there are as many frames as it promises (`count_frames`), but spread over
    what there really is. Where frames are missing or damaged, the last intact one before stands in for them; after a
    damaged one, those up to the next key frame are not used. A picture that is wanted several times is yielded several
    times, as the same object. Transparent pixels are put on white.

    Only the parts that are needed are decoded: each from the last key frame before a wanted time.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no video, or nothing of the first interval (at least of one second) can be decoded, or it has
            more pixels than `PIL.Image.MAX_IMAGE_PIXELS`. The message names the file.
    """
    with _open(file) as (container, stream):
        stated = _stated_length(container, stream)
        span = _span(container, stream, stated)
        count = len(sample_times(span.length if stated is None else stated, frames, fps, max_seconds))
    times = [span.start + time for time in sample_times(span.length, count, None, max_seconds)]
    before, image = None, None
    for frame in _frames_at(file, times, span.start):
        image = image if frame is before else _upright(frame, name_of(file))
        before = frame
        yield image


class _Span(NamedTuple):
    """When a stream begins and how long it is, in seconds."""

    start: Fraction
    length: Fraction


@contextmanager
def _open(source: File) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """(container, its first video stream); what libav raises meanwhile becomes one line that names the file."""
    name = name_of(source)
    file = source
    if isinstance(source, str | os.PathLike):
        if not os.path.exists(name):
            raise FileNotFoundError(f"no video file {name}")
        if os.path.isdir(name):
            raise ValueError(f"{name} is a folder, not a video file")
        file = f"file:{name}"  # said to be one: a name may look like an address, or like one of libav's own protocols
    if is_empty(source):
        raise ValueError(f"{name} is empty")
    if file is source:
        source.seek(0)
    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
    try:
        with av.open(file, container_options=options, metadata_errors="replace") as container:
            streams = [
                stream
                for stream in container.streams.video
                if not stream.disposition & av.stream.Disposition.attached_pic  # the cover of a song
            ]
            if not streams:
                raise ValueError(f"{name} holds no video, only {_contents(container)}")
            context = streams[0].codec_context
            if context is None:
                raise ValueError(f"{name}: there is no decoder for its video")
            check_pixels(context.width, context.height, name)
            streams[0].thread_type = "SLICE"  # with threads per frame, errors are reported with later packets
            yield container, streams[0]
    except av.FFmpegError as error:
        raise ValueError(f"{name} can't be read as a video: {error.strerror}") from error


def _contents(container: av.container.InputContainer) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"


def _stated_length(container: av.container.InputContainer, stream: av.VideoStream) -> Fraction | None:
    """Seconds that the header gives the stream, or else the whole file; None where it states none."""
    if stream.duration and stream.duration > 0:
        return stream.duration * stream.time_base
    # Matroska has no field for the length of a stream, but a customary note.
    note = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)\0*", stream.metadata.get("DURATION", ""))
    if note and any(float(part) for part in note.groups()):
        return Fraction(note[1]) * 3600 + Fraction(note[2]) * 60 + Fraction(note[3])
    if container.duration and container.duration > 0:
        return Fraction(container.duration, av.time_base)
    return None


def _span(container: av.container.InputContainer, stream: av.VideoStream, stated: Fraction | None) -> _Span:
    """When the stream begins and how long it really is, by the packets at its end; nothing is decoded."""
    start, last, count = stream.start_time, None, 0
    if stated is not None and start is not None and _can_seek(container):
        # A second earlier: the packet of the last picture need not be the last one.
        _seek(container, stream, start * stream.time_base + max(Fraction(0), stated - 1))
        _, last, count = _extent(container, stream)
        if last is None or last <= start:  # the header of a cut file leads to an end that is not there
            _seek(container, stream, start * stream.time_base)
            _, last, count = _extent(container, stream)
    else:
        first, last, count = _extent(container, stream)
        start = first if start is None else start
    if last is not None:
        return _Span(start * stream.time_base, max(last - start, 1) * stream.time_base)
    if not count:
        raise ValueError(f"{_name(container)} holds no frame: it is cut off or damaged")
    return _Span(Fraction(0), count / _rate(stream))


def _extent(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[int | None, int | None, int]:
    """(first time, end of the last frame, how many) of the packets from here on, times in units of the time base."""
    count, first, latest = 0, None, None
    for packet in _packets(container, stream):
        count += 1
        if (ticks := _ticks(packet)) is not None:
            first = ticks if first is None else min(first, ticks)
            latest = packet if latest is None or ticks >= _ticks(latest) else latest
    return first, None if latest is None else _ticks(latest) + _shown_for(latest, stream), count


def _shown_for(packet: av.Packet, stream: av.VideoStream) -> int:
    """How long a frame is shown, in units of the time base."""
    usual = floor(1 / (_rate(stream) * stream.time_base))
    if not packet.duration:
        return usual
    # Where frames are reordered, a packet may state how long it takes to the next packet, not to the next frame.
    return packet.duration if packet.pts == packet.dts else min(packet.duration, usual)


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Packets from here on. A damaged container ends where it can't be read further."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except av.FFmpegError:
        return


def _ticks(of: av.Packet | av.VideoFrame) -> int | None:
    """Presentation time in units of the time base; some old files have decoding times alone."""
    return of.dts if of.pts is None else of.pts


def _rate(stream: av.VideoStream) -> Fraction:
    """Frames per second of a stream that does not say when its frames are shown."""
    return stream.average_rate or stream.guessed_rate or Fraction(25)


def _name(container: av.container.InputContainer) -> str:
    return container.name.removeprefix("file:")


def _can_seek(container: av.container.InputContainer) -> bool:
    return container.format.name not in NO_SEEKING


def _seek(container: av.container.InputContainer, stream: av.VideoStream, time: Fraction) -> None:
    """To somewhere before `time`, as near as the container allows."""
    container.seek(floor(time / stream.time_base), stream=stream)


class _Entry(NamedTuple):
    """Where decoding can begin, in seconds."""

    seek: Fraction | None  # to this time; None: at the beginning of the file
    key_frame: Fraction  # which stands there, or after there


def _entry(container: av.container.InputContainer, stream: av.VideoStream, time: Fraction, start: Fraction) -> _Entry:
    """The last key frame that is shown at `time` or before, as far as the container finds it."""
    back = Fraction(0)
    while time - back > start and _can_seek(container):
        try:
            _seek(container, stream, time - back)
        except av.FFmpegError:
            break
        key = next((packet for packet in _packets(container, stream) if packet.is_keyframe), None)
        if key is not None and _ticks(key) is not None and _ticks(key) * stream.time_base <= time:
            return _Entry(time - back, _ticks(key) * stream.time_base)
        # Transport streams are searched by bytes, and others by the time of decoding: both may lead too far.
        back = max(Fraction(1), 2 * back)
    return _Entry(None, start)


def _frames_at(file: File, times: Sequence[Fraction], start: Fraction) -> Iterator[VideoFrame]:
    """What is on the screen at each of ascending `times`, in seconds; the same object where it is the same frame."""
    entries: list[_Entry] = []
    with _open(file) as (container, stream):
        for time in times:
            entry = _entry(container, stream, time, start)
            entries.append(entry if not entries or entry.key_frame > entries[-1].key_frame else entries[-1])
    with _open(file) as (container, stream):  # again, as not every file can be rewound
        shown, done = None, start
        for entry, group in groupby(zip(entries, times, strict=True), key=itemgetter(0)):
            wanted = deque(time for _, time in group)
            last = wanted[-1]
            frames = _decode(container, stream, entry, last)
            first = next(frames, None)
            while (first is None or first[0] > wanted[0]) and entry.key_frame > done:
                # Nothing is intact there. What was before it, back to where it is known already?
                entry = _entry(container, stream, entry.key_frame - stream.time_base, start)
                if entry.key_frame > done:
                    frames = _decode(container, stream, entry, last)
                    first = next(frames, None)
            if shown is None and (first is None or first[0] - start > max(1, 2 * (wanted[0] - start))):
                raise ValueError(f"{name_of(file)}: its beginning can't be decoded; it is damaged or cut off")
            for time, frame in chain([first] if first else [], frames):
                while shown is not None and wanted and time > wanted[0]:
                    wanted.popleft()
                    yield shown
                shown = frame
            yield from [shown] * len(wanted)
            done = last


def _decode(
    container: av.container.InputContainer, stream: av.VideoStream, entry: _Entry, until: Fraction
) -> Iterator[tuple[Fraction, VideoFrame]]:
    """(time, frame) of all intact frames from `entry` on, at least to the one shown at `until`."""
    if entry.seek is not None:
        _seek(container, stream, entry.seek)
    time = None
    has_key, skip = False, entry.seek is not None
    for packet in chain(_packets(container, stream), [None]):
        is_key = packet is not None and packet.is_keyframe
        if packet is not None and packet.dts is not None and packet.dts * stream.time_base > until and has_key:
            packet = None  # whatever is shown until then has been decoded, or waits in the decoder
        elif packet is not None and skip and not is_key:
            continue
        has_key = has_key or is_key
        try:
            frames = stream.codec_context.decode(packet)
            skip = skip and not is_key
        except av.FFmpegError:
            # What builds on a damaged frame, or on an older one in its place, looks like any other to the decoder.
            frames, skip = [], True
        for frame in frames:
            if (ticks := _ticks(frame)) is not None:
                time = ticks * (frame.time_base or stream.time_base)
            else:
                time = entry.key_frame if time is None else time + 1 / _rate(stream)
            # Pictures before a key frame may build on ones that were not decoded.
            if not frame.is_corrupt and (entry.seek is None or time >= entry.key_frame):
                yield time, frame
        if packet is None:
            return


def _upright(frame: VideoFrame, name: str) -> Image.Image:
    """A decoded frame in RGB, turned as its display matrix says."""
    check_pixels(frame.width, frame.height, name)
    has_alpha = any(component.is_alpha for component in frame.format.components)
    # Threads of the scaler would be missing in a process that is forked later, such as a loader's worker.
    array = frame.to_ndarray(format="rgba" if has_alpha else "rgb24", threads=1)
    image = to_rgb(Image.fromarray(array))
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return image
    a, b, _, c, d = struct.unpack("<5i", bytes(matrix)[:20])
    # Angles between those of TURNS do not occur in practice; the nearer one is taken.
    straight = abs(a) + abs(d) >= abs(b) + abs(c)
    turn = TURNS[(_sign(a), 0, 0, _sign(d)) if straight else (0, _sign(b), _sign(c), 0)]
    return image if turn is None else image.transpose(turn)


def _sign(number: int) -> int:
    return 1 if number >= 0 else -1
