"""For tests of the gateway: a small HTTP server that answers like vLLM, with real sockets that hang, reset and die;
and an ASGI client of `UpstreamApp` in front of such servers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from tests.policy_server.fake_vllm import END, render
from trl_gym.policy_server.middleware.app import AFFINITY
from trl_gym.policy_server.upstreams import UpstreamApp
from trl_gym.processes import bind_socket

PROBE_EVERY_S = 0.05

Json = dict[str, Any]


def without_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set proxies at which nothing answers, as a cluster does for the outer world."""
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@dataclass
class FakeUpstream:
    """Its behaviour may be changed while it runs.

    Attributes:
        requests: What it was asked: method, target, body, headers by lower case name.
        answers: `"METHOD /path"` → status and JSON (or bytes), instead of what it would say.
        breaks: Paths on which it closes the connection without an answer.
        hangs: Paths on which it never answers.
        breaks_off: Paths on which it stops in the middle of its answer.
        exact: Names under which it takes exact prompts.
        raw_logprobs: Whether its logprobs ignore the temperature.
        num_top_logprobs: How many it shows at most.
        go_on: The second event of `/sse` waits for this.
        redirects_to: URL to which it redirects every request.
    """

    name: str = "policy"
    max_model_len: int = 200
    weight_version: str | None = "default"
    health: int = 200
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    breaks: set[str] = field(default_factory=set)
    hangs: set[str] = field(default_factory=set)
    breaks_off: set[str] = field(default_factory=set)
    exact: tuple[str, ...] = ("kv_transfer_params",)
    raw_logprobs: bool = False
    num_top_logprobs: int = 20
    requests: list[tuple[str, str, bytes, dict[str, str]]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0
    redirects_to: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def asked(self, path: str) -> int:
        return sum(asked == path for _, asked, _, _ in self.requests)

    async def start(self) -> FakeUpstream:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05, access_log=None)
        await self._runner.setup()
        sock = bind_socket(port=self.port)
        self.port = sock.getsockname()[1]
        await web.SockSite(self._runner, sock).start()
        return self

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        path = request.path
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append((request.method, request.path_qs, body, headers))
        assert request.transport is not None
        if self.redirects_to:
            return web.Response(status=307, headers={"Location": f"{self.redirects_to}{path}"})
        if path in self.breaks:
            request.transport.abort()
        if path in self.hangs:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                self.cancelled.append(path)
                raise
        if path in self.breaks_off:
            answer = web.StreamResponse(headers={"Content-Length": "100"})
            await answer.prepare(request)
            await answer.write(b'{"half":')
            request.transport.close()
            return answer
        if path == "/sse":
            return await self._sse(request)
        status, payload = self.answers.get(f"{request.method} {path}") or self._answer(path, body)
        own = {"X-Served-By": str(self.port), "Connection": "X-Private", "X-Private": "1"}
        if isinstance(payload, bytes):
            return web.Response(body=payload, status=status, headers=own, content_type="text/plain")
        return web.json_response(payload, status=status, headers=own)

    async def _sse(self, request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b"data: 1\n\n")
        await self.go_on.wait()
        await answer.write(b"data: 2\n\n")
        return answer

    def _answer(self, path: str, body: bytes) -> tuple[int, Any]:
        match path:
            case "/health":
                return self.health, {}
            case "/v1/models":
                return 200, {"data": [{"id": self.name, "max_model_len": self.max_model_len}]}
            case "/version":
                return 200, {"version": "0.31.0"}
            case "/weight_info" if self.weight_version is not None:
                return 200, {"weight_version": self.weight_version}
            case "/finish_weight_update":
                self.weight_version = json.loads(body)["weight_version"]
                return 200, {"message": "ok"}
            case "/update_weight_version":
                self.weight_version = json.loads(body).get("new_version", self.weight_version)
                return 200, {"success": True}
            case "/weight_info" | "/trl_gym/info":
                return 404, {"detail": "Not Found"}
            case "/tokenize":
                tokens = render(**json.loads(body))
                return 200, {"tokens": tokens, "token_strs": [chr(token) for token in tokens]}
            case "/v1/chat/completions":
                return 200, self._chat(json.loads(body))
        return 200, {"path": path}

    def _chat(self, request: Json) -> Json:
        prompt = render(**request)
        if "kv_transfer_params" in self.exact and request.get("kv_transfer_params"):
            prompt = request["kv_transfer_params"]["prompt_token_ids"]
        if "prompt_token_ids" in self.exact and request.get("prompt_token_ids"):
            prompt = request["prompt_token_ids"]
        scale = 1.0 if self.raw_logprobs else 1.0 / request.get("temperature", 1.0)
        num_top = min(self.num_top_logprobs, request.get("top_logprobs") or 0)
        top = [{"token": str(i), "logprob": -scale * i} for i in range(num_top)]
        entries = [{"token": chr(token), "logprob": -1.0, "top_logprobs": top} for token in (ord("x"), END)]
        return {
            "id": "1",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "x"},
                    "logprobs": {"content": entries},
                    "token_ids": [ord("x"), END],
                    "finish_reason": "stop",
                    "stop_reason": None,
                }
            ],
            "prompt_token_ids": prompt,
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": 2},
        }


class Call:
    """One request to an ASGI application, and what came back so far."""

    def __init__(
        self,
        app: UpstreamApp,
        method: str,
        target: str,
        *,
        body: bytes = b"",
        headers: Sequence[tuple[bytes, bytes]] = (),
        affinity: str | None = None,
    ) -> None:
        path, _, query = target.partition("?")
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": list(headers),
        }
        if affinity is not None:
            self.scope[AFFINITY] = affinity
        self.status: int | None = None
        self.headers: dict[bytes, bytes] = {}
        self.chunks: list[bytes] = []
        self.is_complete = False
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self.task = asyncio.create_task(app(self.scope, self._inbox.get, self._send))

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.chunks.append(message["body"])
            self.is_complete = not message.get("more_body", False)

    def hang_up(self) -> None:
        self._inbox.put_nowait({"type": "http.disconnect"})

    async def done(self) -> Call:
        await asyncio.wait_for(self.task, 60.0)
        return self

    @property
    def text(self) -> str:
        return b"".join(self.chunks).decode()

    def json(self) -> Any:
        return json.loads(self.text)


async def ask(app: UpstreamApp, method: str, target: str, **how: Any) -> Call:
    return await Call(app, method, target, **how).done()


@asynccontextmanager
async def serving(*fakes: FakeUpstream, **how: Any) -> AsyncIterator[UpstreamApp]:
    async with AsyncExitStack() as stack:
        for fake in fakes:
            await fake.start()
            stack.push_async_callback(fake.stop)
        app = UpstreamApp([fake.url for fake in fakes], probe_every_s=PROBE_EVERY_S, **how)
        await app.start()
        stack.push_async_callback(app.close)
        yield app
