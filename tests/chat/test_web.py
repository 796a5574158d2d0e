"""app.py in a real browser: conversations, maps, files that are none, and a server that nothing of it ends."""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from transformers import GenerationConfig

from qwen import QWenTokenizer
from train import train

pytest.importorskip("gradio", reason="needs requirements-app.txt")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright of requirements-dev.txt")

WAIT = 60_000  # milliseconds, on a machine that is busy with other tests
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory) -> Iterator[str]:
    """Address of an app whose model says letters and blanks as long as it may; ended as by a terminal that goes."""
    folder = tmp_path_factory.mktemp("app")
    train(tiny.config(folder / "run", "max_steps=2", "save_steps=2"))
    shutil.copytree(tiny.folder / "decoder", folder / "decoder")
    letters = QWenTokenizer.from_pretrained(folder / "decoder").encode_plain("abcdefg ")
    others = [token for token in range(480) if token not in letters]
    # A streamer hands on whole words, so that the same letter again and again would be shown at the end only.
    GenerationConfig(suppress_tokens=others, no_repeat_ngram_size=4).save_pretrained(folder / "decoder")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "temporary").mkdir()
    command = [sys.executable, "app.py", "--checkpoint_path", folder / "run", "--decoder", folder / "decoder",
               "--examples", tiny.folder / "images", "--port", port, "--queue", 1, "--max_megapixels", 4,
               "--max_upload_mb", 1, "--max_files", 3, "--device", "cpu"]  # fmt: skip
    with open(folder / "log", "w") as log:
        app = subprocess.Popen(
            list(map(str, command)), cwd=tiny.project, stdout=log, stderr=log,
            env={**os.environ, "TMPDIR": str(folder / "temporary")},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + WAIT / 1000
        while f"http://127.0.0.1:{port}/" not in (folder / "log").read_text():
            assert app.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
        assert app.poll() is None, (folder / "log").read_text()
    finally:
        # The terminal has gone; under nohup, as tests may be, that is nothing to a program.
        app.send_signal(signal.SIGTERM if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else signal.SIGHUP)
        try:
            app.wait(60)
        except subprocess.TimeoutExpired:
            app.kill()
            raise
    written = (folder / "log").read_text()
    assert app.returncode == 0, written
    assert written.count("Traceback") == written.count("InvalidPathError: "), written  # that of a test below
    assert not list((folder / "temporary").glob("**/*.png")), "uploads stayed behind"


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    found = os.environ.get("KANJIAN_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("needs Chromium or Chrome on the path, or KANJIAN_CHROMIUM=<file>")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_tab(server, browser) -> Iterator[Callable[..., "Tab"]]:
    """Opens tabs, each in a browser profile of its own. They may load nothing from other servers."""
    contexts, foreign = [], []

    def open_(locale: str = "en-US") -> Tab:
        context = browser.new_context(locale=locale)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: foreign.append(request.url))
        page.goto(server)
        return Tab(page)

    yield open_
    for context in contexts:
        context.close()
    assert [url for url in foreign if not url.startswith((server, "data:", "blob:"))] == []


class Tab:
    """A tab with the page."""

    def __init__(self, page: "sync_api.Page"):
        self.page = page
        self.box = page.locator("#box textarea")
        self.questions = page.locator('#chat [data-testid="user"]')
        self.answers = page.locator('#chat [data-testid="bot"]')
        self.files = page.locator("#box .thumbnail-wrapper")
        self.toast = page.get_by_test_id("toast-text")
        self.box.wait_for()

    def button(self, name: str) -> "sync_api.Locator":
        return self.page.locator(f"button#{name}")

    def set_length(self, tokens: int) -> None:
        number = self.page.locator("#max_new_tokens input[type=number]")
        if not number.is_visible():
            self.page.locator("#settings button").first.click()
        number.fill(str(tokens))
        number.blur()

    def upload(self, *files: Path) -> None:
        self.page.locator("#box input[type=file]").set_input_files(files)
        self.wait_until(lambda: self.files.count() == len(files))

    def ask(self, question: str) -> None:
        self.box.fill(question)
        self.box.press("Enter")

    def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT / 1000
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def wait_for_end(self) -> None:
        """Of an answer."""
        self.wait_until(self.button("regenerate").is_enabled)


def test_a_conversation(open_tab, tiny):
    tab = open_tab()
    tab.set_length(4000)
    tab.upload(tiny.folder / "images/red.png", tiny.folder / "images/blue.png")
    tab.ask("Which <image> &amp; <b>?")
    # it grows
    tab.wait_until(lambda: tab.answers.count() == 1 and len(tab.answers.last.inner_text()) > 3)
    early = tab.answers.last.inner_text()
    tab.wait_until(lambda: len(tab.answers.last.inner_text()) > len(early) + 10)
    assert tab.answers.last.inner_text().startswith(early)
    assert tab.box.input_value() == "" and tab.button("undo").is_disabled()
    tab.button("stop").click()
    tab.wait_for_end()
    assert tab.answers.all_inner_texts()[-1] == "[stopped]" and len(tab.answers.first.inner_text()) < 4000
    assert tab.questions.last.inner_text() == "Which <image> &amp; <b>?"
    tab.wait_until(lambda: tab.page.locator("#chat img").count() == 2)
    tab.wait_until(lambda: tab.page.locator("#chat").get_by_alt_text("red.png").count() == 1)
    tab.wait_until(lambda: tab.box.evaluate("box => box === document.activeElement"))

    tab.set_length(12)
    tab.ask("And now?")
    tab.wait_until(lambda: tab.questions.last.inner_text() == "And now?")
    tab.wait_for_end()
    assert tab.answers.count() == 3 and len(tab.answers.last.inner_text()) <= 12
    answer = tab.answers.last.inner_text()
    tab.button("regenerate").click()
    tab.wait_until(tab.button("regenerate").is_disabled)
    tab.wait_for_end()
    assert tab.answers.last.inner_text() == answer

    tab.button("look").click()
    tab.wait_until(lambda: tab.page.locator("#map img").count() == 2)
    tab.wait_for_end()
    image = tab.page.request.get(tab.page.locator("#map img").first.get_attribute("src"))
    assert image.ok and image.headers["content-type"].startswith("image/")

    tab.button("undo").click()
    tab.wait_until(lambda: tab.box.input_value() == "And now?")
    assert tab.answers.count() == 2
    tab.button("undo").click()
    tab.wait_until(lambda: tab.box.input_value() == "Which <image> &amp; <b>?" and tab.files.count() == 2)
    tab.wait_until(lambda: tab.answers.count() == 0)
    assert tab.button("look").is_disabled()


def png(width: int, height: int) -> bytes:
    """A file whose header promises so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_what_cannot_be_answered_says_why(open_tab, tiny, tmp_path):
    tab = open_tab()
    tab.set_length(5)
    (tmp_path / "text.png").write_text("no picture")
    Image.effect_noise((200, 200), 50).convert("RGB").save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:2000])
    (tmp_path / "large.png").write_bytes(png(30000, 30000))
    for name, message in (
        ("text.png", "text.png is not an image"),
        ("cut.jpg", "cut.jpg can't be decoded"),
        ("large.png", "large.png has more than 4 million pixels"),
    ):
        tab.upload(tmp_path / name)
        tab.ask("What is this?")
        tab.toast.first.wait_for()
        assert message in tab.toast.first.inner_text()
        assert str(tmp_path) not in tab.toast.first.inner_text() and "kanjian-app" not in tab.toast.first.inner_text()
        tab.page.get_by_test_id("toast-close").first.click()
        tab.wait_until(lambda: tab.toast.count() == 0)
        tab.wait_until(lambda: tab.box.input_value() == "What is this?")  # given back
        tab.files.get_by_role("button", name="Remove file").click()
    tab.upload(tiny.folder / "images/red.png")
    tab.ask("And this?")
    tab.wait_for_end()
    assert tab.answers.count() == 1 and tab.questions.count() == 2


def test_tabs_are_apart_and_wait_in_a_queue_that_ends(open_tab):
    first, second, third = open_tab(), open_tab(), open_tab()
    first.set_length(4096)
    second.set_length(5)
    first.ask("One?")
    first.wait_until(lambda: first.answers.count() == 1)
    second.ask("Two?")  # waits, which is what the queue has room for
    second.wait_until(lambda: second.page.locator("#chat .eta-bar, #chat .progress-text").count() > 0)
    third.ask("Three?")
    third.toast.first.wait_for()
    assert "busy" in third.toast.first.inner_text().lower() or "full" in third.toast.first.inner_text().lower()
    third.wait_until(lambda: third.box.input_value() == "Three?")  # given back
    third.wait_until(third.box.is_editable)
    assert third.answers.count() == 0 and second.box.is_disabled()
    fourth = open_tab()  # pages load meanwhile
    assert fourth.questions.count() == 0
    assert first.button("stop").is_enabled(), "the long answer ended too early for this test"
    first.page.close()  # the answer that nobody reads is ended
    second.wait_for_end()
    assert second.questions.all_inner_texts() == ["Two?"] and len(second.answers.last.inner_text()) <= 5


def test_chinese(open_tab, tiny):
    tab = open_tab("zh-CN")
    tab.wait_until(lambda: tab.button("stop").inner_text() == "停止")
    tab.page.locator("#examples button").first.click()  # a picture of the folder
    tab.wait_until(lambda: tab.files.count() == 1)
    tab.box.press("Enter")
    tab.toast.first.wait_for()
    assert tab.toast.first.inner_text() == "请同时写一个问题。"
    assert tab.box.get_attribute("placeholder") == "就图片提问……"
    assert tab.page.get_by_label("问题").count() > 0 and tab.page.get_by_role("combobox", name="方法").count() == 1
    assert tab.page.evaluate("document.documentElement.lang") == "zh"
    tab.page.get_by_label("English").click()
    tab.wait_until(lambda: tab.button("stop").inner_text() == "Stop")
    assert tab.files.count() == 1
    tab.page.get_by_role("textbox", name="Question").wait_for()
    assert tab.page.evaluate("document.documentElement.lang") == "en"


def test_files_of_the_server_stay_there(server, tiny):
    for path in ("/etc/passwd", tiny.project / "README.md", tiny.folder / "images/red.png", "../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server}gradio_api/file={path}", timeout=30)
        assert refused.value.code in (403, 404)
    config = json.load(urllib.request.urlopen(f"{server}config", timeout=30))
    (take,) = [one for one in config["dependencies"] if one["targets"] and one["targets"][0][1] == "submit"]
    stolen = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    body = {"data": [{"text": "?", "files": [stolen]}], "fn_index": take["id"], "session_hash": "thief"}
    request = urllib.request.Request(
        f"{server}gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=30)
    with urllib.request.urlopen(f"{server}gradio_api/queue/data?session_hash=thief", timeout=30) as events:
        for line in map(bytes.decode, events):
            if "process_completed" in line:
                break
    assert '"success":false' in line.replace(" ", "") and "root:" not in line


def test_no_request_skips_the_queue(server):
    config = json.load(urllib.request.urlopen(f"{server}config", timeout=30))
    asking = [one["id"] for one in config["dependencies"] if one["queue"] is not False]
    assert len(asking) >= 3
    for number in asking:
        body = json.dumps({"data": [], "fn_index": number, "session_hash": "pusher"}).encode()
        request = urllib.request.Request(f"{server}gradio_api/run/x", body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert refused.value.code == 404 and "join the queue" in refused.value.read().decode()


def test_nothing_is_fetched_for_anybody(server):
    address = {"path": "http://example.com/a.png", "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [{"text": "?", "files": [address]}], "fn_index": 0, "session_hash": "pusher"}).encode()
    for route in ("run/x", "queue/join"):
        request = urllib.request.Request(f"{server}gradio_api/{route}", body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert refused.value.code == 400 and b"not fetched" in refused.value.read()


def test_a_file_above_the_limit_is_refused(server):
    border = "kanjian"
    part = f'--{border}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'.encode()
    request = urllib.request.Request(
        f"{server}gradio_api/upload", part + bytes(2_000_000) + f"\r\n--{border}--\r\n".encode(),
        {"Content-Type": f"multipart/form-data; boundary={border}"},
    )  # fmt: skip
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 413
