"""chat/terminal.py: Ctrl-C stops an answer alone, errors are a line, nothing from outside steers the terminal."""

import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList

from build import build_model
from chat.session import Session
from chat.terminal import COMMANDS, Terminal, answer_once, write_answer
from dataset.record import read_records
from dataset.template import encode_record
from model import MultiModalModel
from qwen import QWenLMHeadModel
from qwen.tokenization_qwen import write_ranks
from tests.conftest import make_decoder
from tests.visual.clips import write_clip

WORDS = ("图".encode(), "片".encode())
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")


@pytest.fixture(scope="module")
def endless(tiny, tmp_path_factory) -> Path:
    """A checkpoint whose answers consist of two words and never end."""
    folder = tmp_path_factory.mktemp("endless")
    make_decoder(folder / "decoder")
    tokens = [*(bytes([byte]) for byte in range(256)), *WORDS]
    write_ranks({token: rank for rank, token in enumerate(tokens)}, folder / "decoder/qwen.tiktoken")
    decoder = QWenLMHeadModel.from_pretrained(folder / "decoder")
    with torch.no_grad():
        one = decoder.lm_head.weight[256].clone()
        decoder.lm_head.weight.zero_()[256:258] = torch.stack([one, -one])
    decoder.save_pretrained(folder / "decoder")
    build_model(tiny.config(folder / "run", f"model.decoder={folder}/decoder").model).save_pretrained(folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def model(endless) -> MultiModalModel:
    return MultiModalModel.from_pretrained(endless)


@pytest.fixture
def session(model) -> Session:
    return Session(model, max_new_tokens=4)


class Typed:
    """In place of `Lines`: a list of lines, where an exception is raised."""

    def __init__(self, *lines):
        self.rest, self.begun = [*lines, EOFError()], []

    def read(self, prompt: str, begin: str = "") -> str:
        self.begun.append(begin)
        line = self.rest.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line


def run(session: Session, *lines, way=None) -> Typed:
    typed = Typed(*lines)
    Terminal(session, typed, way).run()
    return typed


class At(LogitsProcessor):
    """Calls `act` at the `step`-th token of an answer."""

    def __init__(self, step: int, act):
        self.left, self.act = step, act

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left == 0:
            self.act()
        return scores


def press_ctrl_c_at(session: Session, step: int, times: int = 1) -> None:
    def press():
        for _ in range(times):
            session._stopping.wanted = False
            os.kill(os.getpid(), signal.SIGINT)  # this is the thread that generates: the main one takes the signal
            end = time.monotonic() + 5
            while not session._stopping.wanted and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(0.01)

    session.generation["logits_processor"] = LogitsProcessorList([At(step, press)])


@pytest.mark.parametrize("beams", [1, 2])
def test_ctrl_c_stops_the_answer_alone(session, capsys, beams):
    session.generation |= {"max_new_tokens": 300, "num_beams": beams}
    press_ctrl_c_at(session, 7)
    before = signal.getsignal(signal.SIGINT)
    run(session, "Go", "/set max_new_tokens 3", "/set num_beams 1", "On")
    first, second = session.exchanges
    assert first.stopped and 6 <= len(first.ids) <= 8 and first.answer
    assert not second.stopped and len(second.ids) == 3
    printed = capsys.readouterr().out
    assert f"{first.answer}\n[stopped]\n" in printed and printed.endswith(f"{second.answer}\n\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait_for_more(session, capsys):
    before = signal.getsignal(signal.SIGINT)
    session.generation["max_new_tokens"] = 300
    press_ctrl_c_at(session, 7, times=2)
    run(session, "Go", "/set max_new_tokens 3", "On")
    assert [exchange.question for exchange in session.exchanges] == ["Go", "On"] and session.exchanges[0].stopped
    assert "[stopped]" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def test_once_ctrl_c_is_status_130(session, capsys):
    assert answer_once(session, "Go") == 0
    session.clear()
    session.generation["max_new_tokens"] = 300
    press_ctrl_c_at(session, 7)
    capsys.readouterr()
    assert answer_once(session, "Go") == 130
    assert capsys.readouterr().out == session.exchanges[0].answer + "\n"


def test_ctrl_c_at_the_prompt(session, capsys):
    typed = run(session, KeyboardInterrupt(), "Go", KeyboardInterrupt(), KeyboardInterrupt(), "never")
    assert typed.rest[0] == "never" and len(session.exchanges) == 1
    assert capsys.readouterr().out.count("Ctrl-C again, or Ctrl-D, ends") == 2


def test_what_torch_complains_of_ends_no_conversation(session, capsys):
    def fail():
        raise RuntimeError("probability tensor contains inf")

    session.generation["logits_processor"] = LogitsProcessorList([At(2, fail)])
    run(session, "Go", "/set do_sample off", "/help")
    assert session.exchanges == [] and "probability tensor contains inf\n" in capsys.readouterr().out


def test_quit_and_the_end_of_input(session):
    assert run(session, "/quit ", "never").rest[0] == "never"
    assert run(session, "").rest == [] and session.exchanges == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2 GiB"), "not enough memory on the GPU"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (MemoryError("no room"), "no room"),
        (ValueError("a prompt has 9999 tokens,\nbut \x1b[31m more"), "a prompt has 9999 tokens, but [31m more"),
        (OSError("x" * 5000), "..."),
    ],
)
def test_an_error_is_one_line_and_the_conversation_goes_on(session, tiny, capsys, error, message):
    session.ask("One?")
    exchange = session.exchanges[0]
    session.add_image(tiny.folder / "images/red.png")

    def fail():
        raise error

    session.generation["logits_processor"] = LogitsProcessorList([At(3, fail)])
    run(session, "Two?")
    assert session.exchanges == [exchange] and len(session.waiting) == 1
    *_, line, last = capsys.readouterr().out.splitlines()
    assert message in line and len(line) < 600 and last == "" and not CONTROL.search(line)
    run(session, "Two?")  # the third token was then
    assert len(session.exchanges) == 2


def test_commands_of_files(session, tiny, tmp_path, capsys):
    red, blue = tiny.folder / "images/red.png", tiny.folder / "images/blue.png"
    (tmp_path / "a 'picture'.png").write_bytes(red.read_bytes())
    (tmp_path / "broken.png").write_bytes(red.read_bytes()[:50])
    clip = write_clip(tmp_path / "clip.mp4")
    run(
        session, f"/image {red} nowhere.png '{blue}'", f"/image {tmp_path}/a 'picture'.png", f"/image {tmp_path}",
        f"/image {tmp_path}/broken.png", "/image", "/image 'open", f"/video {clip}", f"/video {red}x", str(red),
        "/imge x", "/reset now",
    )  # fmt: skip
    names = ["red.png", "blue.png", "a 'picture'.png", "clip.mp4"]
    assert [Path(shown.name).name for shown in session.waiting] == names
    printed = capsys.readouterr().out.splitlines()
    for message in (f"{red}: 20 x 20 pixels, 4 tokens", "no image file nowhere.png", "a 'picture'.png: 20 x 20 pixels",
                    "Is a directory", "broken.png can't be", "name a file", "No closing quotation",
                    "clip.mp4: 8 frames, ", "red.pngx", f"to show a file: /image {red}",
                    "there is no /imge (did you mean '/image'?)", "/reset stands alone"):  # fmt: skip
        assert any(message in line for line in printed), message
    assert len(printed) == 1 + 4 + 9 + 1  # greeting, media, errors, the end
    run(session, "/reset")
    assert session.waiting == []


def test_commands_of_the_conversation(session, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    red = tiny.folder / "images/red.png"
    typed = run(session, "/undo", "/regenerate", "/save talk.json", f"/image {red}", "One?", "/undo", "Two <image>?",
                "/regenerate", " /what", "/system Be brief.", "/system", "three", "/system -", "/save talk.json",
                "/save talk.json", "/save talk.txt", "/save a talk.json", "/help", "/set do_sample on",
                "/set", "/set seed -1")  # fmt: skip
    assert typed.begun[6] == "One?" and not any(typed.begun[:6] + typed.begun[7:])
    assert [exchange.question for exchange in session.exchanges] == ["Two <image>?", "/what", "three"]
    assert [len(exchange.shown) for exchange in session.exchanges] == [1, 0, 0] and session.waiting == []
    assert "Be brief." in session.model.tokenizer.decode(session.exchanges[2].prompt) and session.system is None
    assert session.generation["do_sample"]
    printed = capsys.readouterr().out
    for message in ("nothing was asked yet", "there is no answer yet that could", "nothing to save", "taken back: One?",
                    f"the next question shows {red}", "system turn: Be brief.\n", "no system turn",
                    "written: talk.json", "talk.json exists", "ends in .json", "more than one file",
                    "seed is a whole number"):  # fmt: skip
        assert message in printed, message
    assert all(command in printed for command in COMMANDS)
    (record,) = read_records("talk.json")
    assert [turn["role"] for turn in record["messages"]] == ["user", "assistant"] * 3
    assert Path("talk_media/image_1.png").read_bytes() == red.read_bytes() and len(record["images"]) == 1
    assert encode_record(record, session.model.tokenizer, 4)


def test_where_did_it_look(session, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = tiny.folder / "images"
    run(session, "/where", "/where look.png", f"/image {images}/red.png {images}/blue.png", "Go",
        "/where attention look.png", "/where look.png", "/where look.jpg", "/where")  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.count("this terminal draws no pictures") == 2 and "shows no picture" in printed
    assert "look.png exists" in printed and "ends in .png" in printed
    assert re.search(r"red\.png: attention .*; most from x 0 to 10, y ", printed)
    with Image.open("look.png") as image:
        assert image.size == (42, 20)  # two of 20 pixels and a gap
    assert os.listdir() == ["look.png"]
    run(session, "/where features", way="true colour")
    assert capsys.readouterr().out.count("▀") == 40 * 10


def test_pictures_are_drawn_and_a_failure_is_said(session, tiny, tmp_path, capsys, monkeypatch):
    red = tiny.folder / "images/red.png"
    session.add_image(red)
    run(session, way="true colour")
    assert "\x1b[38;2;220;30;30;48;2;220;30;30m▀" in capsys.readouterr().out
    session.clear()
    run(session, f"/video {write_clip(tmp_path / 'clip.mp4')}", way="true colour")
    assert capsys.readouterr().out.count("▀") == 40 * 2  # four frames of 64 x 24 pixels beside each other
    monkeypatch.setattr("chat.terminal.draw", lambda pictures, way: 1 / 0)
    run(session, f"/image {red}", "Go", way="kitty")
    assert len(session.exchanges) == 1 and "[not drawn: division by zero]" in capsys.readouterr().out


def test_nothing_from_outside_steers_the_terminal(session, tiny, tmp_path, capsys):
    evil = "\u202e\x1b]0;title\x07\x9b2J\x1b[31m\r\x08"
    file = tmp_path / f"pic{evil}\nture.png"
    file.write_bytes((tiny.folder / "images/red.png").read_bytes())
    (tmp_path / f"{evil}.png").write_bytes(b"none")
    write_answer(session, iter([f"so{evil}", f"so{evil}\tand\nso 图{evil}"]))
    session.add_image(file)
    run(session, f"/image '{file}'", f"/image {tmp_path}/{evil}.png", f"/image {evil}", f"/{evil}", f"/save {evil}.txt",
        f"/set {evil}", f"/system {evil}", "Go", "/undo")  # fmt: skip
    printed = capsys.readouterr().out
    assert "so" in printed and "\tand\nso 图" in printed and "pic]0;title2J[31m ture.png: 20 x 20" in printed
    assert not CONTROL.search(printed)


def test_pieces_are_written_as_they_come(session, capfd):
    seen = []

    def pieces():
        for text in ("图", "图片 is", "图片 is no\ufffd", "Another"):
            yield text
            seen.append(capfd.readouterr().out)

    write_answer(session, pieces())
    assert seen == ["图", "片 is", " no\ufffd", "\nAnother"]


def test_an_answer_without_words_is_said_to_be_one(session, capsys, monkeypatch):
    ended = torch.tensor([session.model.tokenizer.stop_ids[:1]])
    monkeypatch.setattr(session.model, "generate", lambda *arguments, **settings: ended)
    run(session, "Go")
    assert session.exchanges[0].answer == "" and capsys.readouterr().out.endswith("\n[no words]\n\n")


def test_stats_go_to_standard_error(session, capsys):
    answer_once(session, "Go", stats=True)
    out, err = capsys.readouterr()
    assert out == session.exchanges[0].answer + "\n"
    assert re.fullmatch(r"\[4 tokens in \d+\.\d\d s, the first words after \d+\.\d\d s, \d+\.\d tokens/s\]\n", err)


class Screen:
    """A program in a pseudo-terminal of its own."""

    def __init__(self, command: list[str], **environ: str):
        self.master, slave = pty.openpty()
        ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=subprocess.PIPE, env={**os.environ, **environ},
            start_new_session=True, preexec_fn=self._take, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    @staticmethod
    def _take() -> None:
        ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell in the background has its children ignore it

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """What was written until the pattern is found, that included; the rest is for the next call."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text, re.DOTALL)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.text!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # how Linux says that the other end is closed
                    said = self.process.stderr.read()
                    raise AssertionError(f"ended without {pattern!r}: {self.text!r} {said!r}") from None
        before, self.text = self.text[: found.end()], self.text[found.end() :]
        return before


def test_a_conversation_in_a_real_terminal(endless, tiny, tmp_path):
    """The script itself, with a person's keys: completion, a pasted text, Ctrl-C, Ctrl-D."""
    screen = Screen(
        [sys.executable, "inference.py", "--checkpoint_path", str(endless), "--device", "cpu",
         "--max_new_tokens", "1000000"],
        TERM="xterm-256color", COLORTERM="truecolor", NO_COLOR="", TMUX="", XDG_STATE_HOME=str(tmp_path),
    )  # fmt: skip
    try:
        screen.wait_for("/help lists the commands.*> ")
        screen.type(f"/im\t{tiny.folder}/images/r\t\n")
        shown = screen.wait_for(r"20 x 20 pixels, 4 tokens\r\n([^\n]*▀\x1b\[0m\r\n){12}.*> ")
        assert f"{tiny.folder}/images/red.png: " in shown and "\x1b[38;2;220;30;30;48;2;220;30;30m▀" in shown
        screen.type("\x1b[200~What colour?\nSay it.\x1b[201~\n")
        screen.wait_for("[图片]{3}")
        screen.type("\x03")
        screen.wait_for(r"\[stopped\]\r\n.*> ")
        screen.type("half a line")
        screen.wait_for("half a line")
        time.sleep(0.3)  # until Python waits for the next key: that it takes a signal before then is not certain
        screen.type("\x03")
        screen.wait_for("Ctrl-C again, or Ctrl-D, ends\r\n.*> ")
        screen.type(f"/save {tmp_path}/talk.json\n")
        screen.wait_for("written: .*> ")
        screen.type("\x04")
        assert screen.process.wait(60) == 0
    finally:
        screen.process.kill()
        screen.process.communicate()
        os.close(screen.master)
    (record,) = read_records(tmp_path / "talk.json")
    assert record["messages"][0]["content"] == "<image>\nWhat colour?\nSay it." and len(record["messages"]) == 2
    history = (tmp_path / "kanjian/history").read_text()
    assert f"/image {tiny.folder}/images/red.png" in history and "half a line" not in history
