"""What the page's server refuses before Gradio sees it, and that all else arrives whole."""

import asyncio
import json

import pytest

pytest.importorskip("starlette", reason="needs requirements-app.txt")

from chat.guard import Guard


def answer(*parts: bytes, path: str = "/gradio_api/queue/join", most: int = 1000) -> tuple[int, bytes]:
    """Status and text for a POST whose body comes in parts; the server behind it says what it was sent."""
    sent, waiting = [], list(parts)

    async def echo(scope, receive, send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def receive() -> dict:
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    asyncio.run(Guard(echo, most)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


def file(path: str, **more: str) -> bytes:
    return json.dumps({"data": [{"files": [{"path": path, **more}]}]}).encode()


def test_uploads_and_texts_pass():
    uploaded = file("/tmp/a/http.png", url="http://127.0.0.1:7860/gradio_api/file=/tmp/a/http.png")
    assert answer(uploaded) == (200, uploaded)
    text = json.dumps({"data": [{"text": '"path": "http://a"'}]}).encode()
    assert answer(text[:9], text[9:]) == (200, text)
    assert answer(b"no JSON") == (200, b"no JSON")
    assert answer(bytes(2000), path="/gradio_api/upload") == (200, bytes(2000))


@pytest.mark.parametrize("body", [
    file("http://example.com/a.png"), file(" HTTPS://example.com/a.png"),
    file("http://example.com/a.png").replace(b'"path"', b'"\\u0070ath"'), b"[" * 200_000,
])  # fmt: skip
def test_addresses_are_refused(body):
    status, text = answer(body, most=10**6)
    assert status == 400 and text == b"files are uploaded, not fetched"


def test_what_is_too_large_is_not_read_to_its_end():
    assert answer(bytes(600), bytes(600), b"never read")[0] == 413
