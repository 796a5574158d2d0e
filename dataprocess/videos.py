"""Do videos exist and decode, and which of them are the same file?"""

import hashlib
import os
from itertools import islice

import av
from PIL import Image

from dataprocess.images import Checked

ENDS = 1 << 20  # bytes at either end of a file by which it is recognised, beside its length
# Those that `visual.video` reads: what is kept here can be trained on. Others that libav knows are lists of further
# files or addresses, which a data set must not make us open, or subtitles, texts and single images.
CONTAINERS = (
    "3dostr amv apng asf av1 avi cavsvideo dirac dnxhd dv flic flv gif gxf h261 h263 h264 hevc ivf m4v matroska mjpeg "
    "mov mpeg mpegts mpegvideo mxf nsv nut obu ogg rm roq swf vc1 viv vvc wtv yuv4mpegpipe"
).split()


def check_video(path: str) -> Checked:
    """Opens a video and decodes its first frame; what comes after it costs neither time nor memory.

    `digest` is of the file's length and both of its ends: whole videos are large, and differ there if at all.
    """
    try:
        digest = _digest(path)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        problem = f"{path}: {getattr(error, 'strerror', None) or error}"
        return Checked(None, "video missing" if missing else "video unreadable", problem)
    if os.path.getsize(path) == 0:
        return Checked(None, "video unreadable", f"{path}: the file is empty")
    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
    try:
        # Said to be a file: a name may look like an address, or like one of libav's own protocols.
        with av.open(f"file:{path}", container_options=options, metadata_errors="replace") as container:
            streams = [
                stream
                for stream in container.streams.video
                if not stream.disposition & av.stream.Disposition.attached_pic  # the cover of a song
            ]
            if not streams:
                return Checked(None, "video unreadable", f"{path}: it has no video stream")
            context = streams[0].codec_context
            if context is None:
                return Checked(None, "video unreadable", f"{path}: there is no decoder for its video")
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and context.width * context.height > limit:
                problem = f"{path}: {context.width}x{context.height} pixels, above the limit of {limit}"
                return Checked(None, "video too large", problem)
            context.thread_count = 1  # all cores are busy with other files
            if not list(islice(container.decode(streams[0]), 1)):
                return Checked(None, "video unreadable", f"{path}: it has no frame")
    except Exception as error:  # on corrupt data the library raises OSError, ValueError and others besides
        problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Checked(None, "video unreadable", f"{path}: can't be read as a video: {problem}")
    return Checked(digest)


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        digest = hashlib.blake2b(str(length).encode(), digest_size=16)
        digest.update(file.read(ENDS))
        file.seek(max(length - ENDS, 0))
        digest.update(file.read(ENDS))
    return digest.hexdigest()
