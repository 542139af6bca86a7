"""A stand-in for someone else's OpenAI service: it knows text only, and refuses fields that it does not know."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "key-of-the-service"
MODEL = "foreign"
_FOREIGN_FIELDS = ("trl_gym", "return_tokens_as_token_ids", "prompt_token_ids")


class PlainEndpoint(ThreadingHTTPServer):
    """
    Attributes:
        requests: Bodies of the chat completions received so far.
        tokenizes: Whether it has vLLM's `/tokenize`.
    """

    def __init__(self, *, tokenizes: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.tokenizes = tokenizes

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: PlainEndpoint

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/v1/models" else 404, {"data": [{"id": MODEL}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize" and self.server.tokenizes:
            return self._answer(200, {"tokens": [1]})
        if self.path != "/v1/chat/completions":
            return self._answer(404, {"detail": "Not Found"})
        if unknown := [name for name in _FOREIGN_FIELDS if name in body]:
            return self._answer(400, {"error": {"message": f"unknown fields: {unknown}"}})
        self.server.requests.append(body)
        message = {"role": "assistant", "content": f"It is 1. My key is {KEY}."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
        answer = {"id": "c", "object": "chat.completion", "created": 0, "model": MODEL, "usage": usage}
        return self._answer(200, answer | {"choices": [choice]})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            status, body = 401, {"error": {"message": "wrong key"}}
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@contextlib.contextmanager
def plain_endpoint(*, tokenizes: bool = False) -> Iterator[PlainEndpoint]:
    with PlainEndpoint(tokenizes=tokenizes) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
