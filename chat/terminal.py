"""Questions and answers in a terminal: one (`answer_once`) or a conversation with commands (`converse`)."""

import os
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from chat.drawing import Way, draw, side_by_side, way_of
from chat.lines import Lines, history_file, path_in, paths_in
from chat.plain import one_line, plain
from chat.sampling import changed, described
from chat.session import Exchange, Session, Shown
from dataset.rows import nearest
from visual.image import image_size
from visual.video import load_frames

COMMANDS = {
    "/image": ("PATH ...", "shows pictures with the next question"),
    "/video": ("PATH ...", "shows clips with it"),
    "/regenerate": ("", "answers the last question again"),
    "/undo": ("", "takes the last question and its answer back, to ask it otherwise"),
    "/reset": ("", "forgets all questions, answers, pictures and clips"),
    "/system": ("[TEXT]", "sets the text of the system turn, - for none; without a text it is shown"),
    "/set": ("[NAME VALUE]", "changes how answers are picked: /set temperature 0.7; alone it lists what there is"),
    "/where": ("[METHOD] [FILE.png]", "draws where the last answer looked: occlusion, features, attention or rollout"),
    "/save": ("FILE.json", "writes the conversation as a record, pictures and clips beside it"),
    "/help": ("", "lists the commands"),
    "/quit": ("", "ends, as Ctrl-D does"),
}
WITH_PATHS = ("/image", "/video", "/where", "/save")
HELP = "\n".join(f"  {name + ' ' + arguments:<27} {text}" for name, (arguments, text) in COMMANDS.items()) + (
    '\n  """ begins and ends a question of several lines; Ctrl-C stops an answer'
)
FRAMES_DRAWN = 4  # of a clip
LONGEST_ERROR = 500  # characters; it may quote what was typed
# What a conversation goes on after: files and settings of the user, too little memory for so long a conversation, and
# whatever else torch says of devices and numbers.
ERRORS = (OSError, ValueError, MemoryError, RuntimeError)
CPU_MEMORY = "can't allocate memory"  # in the RuntimeError by which torch says so of a CPU


@contextmanager
def ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """Within it, Ctrl-C calls `stop`; the next one raises KeyboardInterrupt, as it does outside."""

    def first(*_) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def write_answer(session: Session, pieces: Iterator[str], stats: bool = False) -> Exchange | None:
    """Writes an answer to standard output as it grows, and a line break; Ctrl-C stops it.

    Args:
        pieces: of `session.stream` or `session.regenerate`.
        stats: write tokens, seconds and tokens per second to standard error.

    Returns:
        What joined the conversation; None if the answer was stopped before its first word.
    """
    before = session.exchanges[-1] if session.exchanges else None
    start, first, written = time.perf_counter(), None, ""
    try:
        with ctrl_c(session.stop):
            for text in pieces:
                first = first or time.perf_counter()
                if not text.startswith(written):  # the last pieces changed what came before them
                    print()
                    written = ""
                print(plain(text[len(written) :]), end="", flush=True)
                written = text
    except BaseException:
        print(end="\n" if written else "", flush=True)
        raise
    end = time.perf_counter()
    exchange = session.exchanges[-1] if session.exchanges else None
    if exchange is before:
        return None
    print(flush=True)
    if stats:
        count, seconds = len(exchange.ids), end - start
        print(f"[{count} tokens in {seconds:.2f} s, the first words after {(first or end) - start:.2f} s, "
              f"{count / seconds:.1f} tokens/s]", file=sys.stderr, flush=True)  # fmt: skip
    return exchange


def answer_once(session: Session, text: str, stats: bool = False) -> int:
    """Writes the answer to `text`; returns the exit status, 130 if Ctrl-C stopped it, as shells expect."""
    exchange = write_answer(session, session.stream(text), stats)
    return 130 if exchange is None or exchange.stopped else 0


def converse(session: Session, preview: bool = True, stats: bool = False) -> None:
    """Reads questions and commands from standard input, a terminal, until it ends.

    Args:
        preview: draw pictures and clips where the terminal can.
        stats: as in `write_answer`.
    """
    lines = Lines(COMMANDS, WITH_PATHS, history_file())
    try:
        Terminal(session, lines, way_of(sys.stdout) if preview else None, stats).run()
    finally:
        lines.close()


class Terminal:
    """A conversation: carries out what `lines` give. Errors are a line each, and leave the conversation as it was.

    Args:
        way: how pictures are drawn; None: not at all.
        stats: as in `write_answer`.
    """

    def __init__(self, session: Session, lines: Lines, way: Way | None = None, stats: bool = False):
        self.session, self.lines, self.way, self.stats = session, lines, way, stats
        self._begin = ""  # what the next line begins with

    def run(self) -> None:
        """Goes on until /quit, Ctrl-D, or Ctrl-C twice."""
        print("/help lists the commands, /quit or Ctrl-D ends")
        for shown in self.session.waiting:
            self._show(shown)
        interrupted = False
        while True:
            try:
                begin, self._begin = self._begin, ""
                line = self.lines.read("> ", begin)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                if interrupted:
                    return
                interrupted = True
                print("Ctrl-C again, or Ctrl-D, ends")
                continue
            interrupted = False
            if line.split() == ["/quit"]:
                return
            self.handle(line)

    def handle(self, line: str) -> None:
        """A command if the line begins with `/`, else a question; so is ` /...` with a blank before it."""
        try:
            if line.startswith("/"):
                command, _, rest = line.partition(" ")
                self._command(command.strip(), rest.strip())
            elif line.strip():
                self._answer(self.session.stream(line.strip()))
        except ERRORS as error:
            self._complain(error)
        except KeyboardInterrupt:  # in a command, or again while an answer stops
            print("[stopped]")

    def _command(self, command: str, rest: str) -> None:
        if command not in COMMANDS:
            if os.path.isfile(command):
                raise ValueError(f"to show a file: /image {command}")
            raise ValueError(f"there is no {command}{nearest(command, COMMANDS)}; a question may begin with a blank")
        if rest and not COMMANDS[command][0]:
            raise ValueError(f"{command} stands alone on its line")
        getattr(self, f"_{command[1:]}")(rest)

    def _complain(self, error: BaseException) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            error = "not enough memory on the GPU; /reset, or show fewer pictures"
        elif isinstance(error, RuntimeError) and CPU_MEMORY in str(error):
            error = "not enough memory; /reset, or show fewer pictures"
        print(textwrap.shorten(one_line(error), LONGEST_ERROR, placeholder=" ..."))

    def _answer(self, pieces: Iterator[str]) -> None:
        exchange = write_answer(self.session, pieces, self.stats)
        if exchange is None:
            print("[stopped before the first word, as if nothing had been asked]")
        elif exchange.stopped or not exchange.answer:
            print("[stopped]" if exchange.stopped else "[no words]")

    def _image(self, rest: str) -> None:
        self._add(self.session.add_image, rest)

    def _video(self, rest: str) -> None:
        self._add(self.session.add_video, rest)

    def _add(self, add: Callable[[str], Shown], rest: str) -> None:
        for path in paths_in(rest):
            try:
                self._show(add(path))
            except ERRORS as error:  # the other files are shown nonetheless
                self._complain(error)

    def _show(self, shown: Shown) -> None:
        """A line about a picture or clip and, where the terminal can, what it looks like."""
        print(f"{one_line(shown.name)}: {_size(shown)}")
        if self.way is not None:
            try:
                self._draw(shown.pictures(FRAMES_DRAWN))
            except Exception as error:  # whatever goes wrong, the conversation is worth more than its decoration
                print(f"[not drawn: {one_line(error)}]")

    def _draw(self, pictures: Sequence[Image.Image]) -> None:
        print(draw(pictures, self.way), end="", flush=True)

    def _regenerate(self, _: str) -> None:
        self._answer(self.session.regenerate())

    def _undo(self, _: str) -> None:
        last = self.session.undo()
        if last is None:
            raise ValueError("nothing was asked yet")
        self.session.waiting = [*last.shown, *self.session.waiting]
        if "\n" not in last.question:
            self._begin = last.question
        print(f"taken back: {one_line(last.question)}")
        if last.shown:
            print(f"the next question shows {', '.join(one_line(one.name) for one in self.session.waiting)}")

    def _reset(self, _: str) -> None:
        self.session.clear()
        print("a new conversation begins")

    def _system(self, rest: str) -> None:
        if rest:
            self.session.system = None if rest == "-" else rest
        print(f"system turn: {plain(self.session.system)}" if self.session.system else "no system turn")

    def _set(self, rest: str) -> None:
        if rest:
            name, _, value = rest.partition(" ")
            self.session.generation = changed(self.session.generation, name, value.strip())
        print(described(self.session.generation))

    def _where(self, rest: str) -> None:
        from looking.answer import words  # loads what only this command needs
        from looking.explain import METHODS, explain

        method, _, after = rest.partition(" ")
        method, name = (method, after.strip()) if method in METHODS else ("occlusion", rest)
        file = Path(path_in(name)) if name else None
        if file is None and self.way is None:
            raise ValueError("this terminal draws no pictures; /where FILE.png writes what they depend on")
        if file is not None and file.exists():
            raise FileExistsError(f"{file} exists; choose another name")
        if file is not None and not file.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {file.parent} for {file.name}")
        if file is not None and file.suffix != ".png":
            raise ValueError(f"{file}: give it a name that ends in .png")
        if not self.session.shown:
            raise ValueError("the conversation shows no picture that an answer could depend on")
        model, last, media = self.session.model, self.session.exchanges[-1], self.session.shown
        frames = [_frames(shown, model.media.sampling) for shown in media]
        sizes = [None if shown.kind == "video" else frames[number][0].size for number, shown in enumerate(media)]
        maps = explain(
            model, last.prompt, [shown.views for shown in media], words(model, last.ids), method,
            sizes=sizes, features=self.session.features, progress=_progress,
        )  # fmt: skip
        drawn = []
        for one in maps:
            picture = frames[one.picture][one.frame or 0]
            drawn.append(one.draw(picture))
            box, frame = one.peak_box(picture.size), "" if one.frame is None else f", frame {one.frame + 1}"
            print(f"{one_line(media[one.picture].name)}{frame}: {METHODS[method]}; most from x {box.left:.0f} to "
                  f"{box.right:.0f}, y {box.top:.0f} to {box.bottom:.0f}, {one.share:.0%} of it all")  # fmt: skip
        if self.way is not None:
            self._draw(drawn)
        if file is not None:
            _save(side_by_side(drawn), file)
            print(f"written: {one_line(file)}")

    def _save(self, rest: str) -> None:
        file = path_in(rest)
        self.session.save(file)
        print(f"written: {one_line(file)}")

    def _help(self, _: str) -> None:
        print(HELP)


def _size(shown: Shown) -> str:
    tokens = f"{len(shown.features)} tokens"
    if shown.kind == "video":
        return f"{len(shown.views.features)} frames, {tokens}"
    try:
        return "{} x {} pixels, ".format(*image_size(shown.source)) + tokens
    except (OSError, ValueError):  # the file is no longer what it was when it was read
        return tokens


def _frames(shown: Shown, sampling: dict) -> list[Image.Image]:
    """The picture, or all frames of a clip that the model sees."""
    if shown.kind == "image":
        return shown.pictures()
    return list(load_frames(shown.source, **sampling))


def _progress(done: int, steps: int) -> None:
    if sys.stdout.isatty() and steps > 1:
        print(f"\r{done} of {steps}", end="\r\x1b[K" if done == steps else "", flush=True)


def _save(picture: Image.Image, file: Path) -> None:
    """Writes a PNG file, which appears under its name when it is whole."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".writing-") as folder:
        picture.save(Path(folder, file.name))
        os.replace(Path(folder, file.name), file)
