"""An exported folder behind `transformers serve`, asked with an OpenAI client: the answers are the model's own."""

import base64
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from chat.session import Session
from model import MultiModalModel
from train import train

for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package, reason="needs requirements-serve.txt")
openai = pytest.importorskip("openai", reason="needs requirements-serve.txt")

SYSTEM = "Be brief."
STARTUP = 120  # seconds; the server imports transformers and FastAPI first


@pytest.fixture(scope="module")
def session(tiny, tmp_path_factory) -> Session:
    """Of a model that has learned the names of a few colours, so that its answers depend on the picture."""
    folder = tmp_path_factory.mktemp("serving") / "run"
    train(tiny.config(folder, "max_steps=150", "save_steps=150", f"system={SYSTEM}", "dropout=0"))
    return Session(MultiModalModel.from_pretrained(folder), SYSTEM, max_new_tokens=8)


@pytest.fixture(scope="module")
def pictures(tiny, tmp_path_factory) -> dict[str, Path]:
    """As large as the encoder takes them: torchvision, transformers' default, scales by other sums than PIL."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("red", "blue"):
        Image.open(tiny.folder / f"images/{name}.png").resize((16, 16)).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in ("red", "blue")}


@pytest.fixture(scope="module")
def served(session, tiny, tmp_path_factory) -> Iterator[tuple[openai.OpenAI, str]]:
    """A client of a running server, and the name of the model."""
    folder = tmp_path_factory.mktemp("served")
    session.model.save_pretrained(folder / "run")
    tiny.run("export.py", "--checkpoint_path", folder / "run", "--format", "llava", "--output", folder / "llava")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", folder / "llava", "--host", "127.0.0.1",
               "--port", str(port), "--device", "cpu"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder)}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + STARTUP
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none"), str(folder / "llava")
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def _answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def parts(question: str, *files: Path) -> list[dict]:
    addresses = [f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" for file in files]
    return [*({"type": "image_url", "image_url": {"url": address}} for address in addresses),
            {"type": "text", "text": question}]  # fmt: skip


def reply_to(served: tuple[openai.OpenAI, str], turns: list[dict]) -> str:
    client, model = served
    reply = client.chat.completions.create(model=model, messages=turns, max_tokens=8)
    return reply.choices[0].message.content.strip()


def expected(session: Session, *exchanges: tuple[str, list[Path]]) -> list[str]:
    """The session's answers, one by one."""
    session.clear()
    answers = []
    for question, files in exchanges:
        for file in files:
            session.add_image(file)
        answers.append(session.ask(question).strip())
    return answers


def test_served_answers_are_the_models_own(served, session, pictures):
    client, model = served
    question, answers = "What colour is it?", {}
    for name, file in pictures.items():
        answers[name] = reply_to(served, [{"role": "user", "content": parts(question, file)}])
        assert [answers[name]] == expected(session, (question, [file]))
    assert len(set(answers.values())) == 2
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": parts(question, file)}], max_tokens=8, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces).strip() == answers[name]


def test_several_turns_pictures_and_a_system_text(served, session, pictures):
    red, blue = pictures.values()
    first, second = expected(session, ("What colour is it?", [red]), ("And these?", [blue, red]))
    turns = [
        {"role": "user", "content": parts("What colour is it?", red)},
        {"role": "assistant", "content": first},
        {"role": "user", "content": parts("And these?", blue, red)},
    ]
    assert reply_to(served, turns) == second
    session.system = "Answer at length."
    try:
        (other,) = expected(session, ("Which?", [blue]))
    finally:
        session.system = SYSTEM
    turns = [{"role": "system", "content": "Answer at length."}, {"role": "user", "content": parts("Which?", blue)}]
    assert reply_to(served, turns) == other


def test_a_bad_picture_does_not_end_the_server(served, pictures, tmp_path):
    client, model = served
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(openai.APIStatusError):
        turns = [{"role": "user", "content": parts("What?", tmp_path / "bad.png")}]
        client.chat.completions.create(model=model, messages=turns, max_tokens=4)
    assert reply_to(served, [{"role": "user", "content": parts("What?", pictures["red"])}])
    assert client.models.list().object == "list"


def test_the_example_client(served, session, pictures, tiny):
    """The script that docs/serving.md shows."""
    client, model = served
    (expected_answer,) = expected(session, ("What colour is it?", [pictures["blue"]]))
    printed = tiny.run("examples/ask_server.py", "--url", client.base_url, "--model", model, "--max_tokens", "8",
                       "--image", pictures["blue"], "--text", "What colour is it?").stdout  # fmt: skip
    assert printed.strip() == expected_answer
