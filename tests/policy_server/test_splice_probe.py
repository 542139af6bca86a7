"""Which servers are refused before training, and what the message says to do about it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import uvicorn

from tests.conftest import wait_for
from tests.policy_server.fake_vllm import FakeVllm
from trl_gym.errors import PolicyServerError, PolicyServerLostError
from trl_gym.policy_server.client import PolicyClient
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings
from trl_gym.policy_server.server import PolicyServer
from trl_gym.policy_server.splice_probe import check_splice
from trl_gym.processes import bind_socket

REMEDIES = ("trl-gym serve MODEL", "trl-gym gateway --upstream URL")


@contextmanager
def served(app: Any) -> Iterator[PolicyClient]:
    """An ASGI application behind a real socket."""
    with bind_socket() as sock:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        client = PolicyClient(f"http://127.0.0.1:{sock.getsockname()[1]}/v1", timeout_s=60.0)
        wait_for(lambda: server.started)
        yield client
        client.close()
        server.should_exit = True
        thread.join(60.0)


def refused(client: PolicyClient) -> str:
    with pytest.raises(PolicyServerError) as caught:
        check_splice(client, "policy")
    assert all(remedy in str(caught.value) for remedy in REMEDIES)
    return str(caught.value)


def test_our_middleware_passes_with_one_chat_of_one_token() -> None:
    vllm = FakeVllm()
    with served(OnPolicyMiddleware(vllm, Settings())) as client:
        check_splice(client, "policy")
    [chat] = vllm.chats()
    assert chat["max_tokens"] == 1


def test_a_stock_server_is_refused() -> None:
    with served(FakeVllm()) as client:
        assert "its answers carry no token ids" in refused(client)


def test_a_server_that_answers_with_token_ids_and_renders_again_is_refused() -> None:
    """As stock vLLM with `return_token_ids`, and as our middleware would if an upstream ignored the forced prompt."""

    class Rerendering(FakeVllm):
        def chat(self, request: Any) -> Any:
            status, answer = super().chat({**request, "return_token_ids": True})
            answer["choices"][0]["message"]["prompt_token_ids"] = answer["prompt_token_ids"]
            return status, answer

    with served(Rerendering()) as client:
        assert "it was given the token ids of a sampled turn" in refused(client)


def test_an_upstream_that_ignores_the_forced_prompt_is_refused_in_the_servers_words() -> None:
    class Ignoring(FakeVllm):
        def chat(self, request: Any) -> Any:
            return super().chat({**request, "kv_transfer_params": None, "prompt_token_ids": None})

    with served(OnPolicyMiddleware(Ignoring(), Settings())) as client:
        assert "the server did not use the exact prompt that it was given" in refused(client)


def test_a_template_that_cannot_be_continued_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Rollouts of one turn are exact there, and the drift policy decides about the others."""

    def render(messages: list[Any], add_generation_prompt: bool = True, **_: Any) -> list[int]:
        return [len(messages[-1].get("content") or ""), 7, 8, 9]  # shows nothing of the turns

    with served(OnPolicyMiddleware(FakeVllm(render=render), Settings())) as client:
        check_splice(client, "policy")
    assert "cannot continue a sampled turn exactly" in caplog.text and "gym_drift" in caplog.text


Routes = dict[str, tuple[int, Any]]


@pytest.fixture
def canned() -> Iterator[Callable[[Routes], AbstractContextManager[str]]]:
    """A server that knows these GET routes; 404 else."""

    @contextmanager
    def serve(routes: Routes) -> Iterator[str]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, payload = routes.get(self.path, (404, {"detail": "Not Found"}))
                body = json.dumps(payload).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                over.wait(60)

            def log_message(self, *_: object) -> None:
                pass

        over = threading.Event()
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        over.set()
        server.shutdown()
        server.server_close()

    yield serve


@pytest.mark.parametrize(
    ("routes", "words"),
    [
        (
            {"/v1/models": (200, {"data": [{"id": "Qwen/Qwen3-0.6B"}]})},
            [*REMEDIES, "OpenAI server (of Qwen/Qwen3-0.6B) w"],
        ),
        (
            {"/v1/models": (401, {"error": "Unauthorized"})},
            [*REMEDIES, "without trl-gym's middleware", "another API key"],
        ),
        ({"/trl_gym/info": (401, {"error": {"message": "a key"}})}, ["demands another API key", "`api_key`"]),
        ({}, [*REMEDIES, "no OpenAI server answers there", "Check host and port"]),
        ({"/v1/models": (200, ["a web shop"])}, [*REMEDIES, "no OpenAI server answers there"]),
    ],
)
def test_attaching_tells_strangers_apart(canned: Any, routes: Routes, words: list[str]) -> None:
    with canned(routes) as url, pytest.raises(PolicyServerError) as caught:
        PolicyServer.attach(url)
    assert all(word in str(caught.value) for word in [url, *words]), str(caught.value)


def test_a_server_that_answers_no_chat_may_be_paused(canned: Any) -> None:
    with canned({}) as url:
        client = PolicyClient(url, timeout_s=0.3)
        client.render = lambda messages: [1, 2, 3]  # type: ignore[method-assign]
        with pytest.raises(PolicyServerLostError, match=r"no answer within 0\.3 s.*left paused.*/resume`"):
            check_splice(client, "policy")
