"""What requests to the page in the browser may hold, looked at before Gradio reads them."""

import json
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Guard:
    """Middleware that refuses what no page of ours sends.

    That are values of more than `most` bytes, and files that are given as an address: Gradio would fetch them, from
    wherever that is and however large they are, in place of an upload.
    """

    def __init__(self, app: ASGIApp, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].endswith("/upload"):
            return await self.app(scope, receive, send)
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the browser has gone
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.most:
                return await PlainTextResponse("more than a page sends", 413)(scope, receive, send)
        if holds_address(bytes(body)):
            return await PlainTextResponse("files are uploaded, not fetched", 400)(scope, receive, send)
        parts = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def read_already() -> Message:
            return next(parts, None) or await receive()

        return await self.app(scope, read_already, send)


def holds_address(body: bytes) -> bool:
    """Whether JSON holds a file whose path is an address; also true of JSON nested too deeply to tell."""
    try:
        waiting: list[Any] = [json.loads(body)]
    except RecursionError:
        return True
    except ValueError:  # no JSON, which is refused later
        return False
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and path.strip().lower().startswith(("http:", "https:")):
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False
