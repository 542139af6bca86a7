"""PolicyClient against a real HTTP server: what is sent, and that every failure is a readable PolicyServerError."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.policy_server.fake_upstream import without_way_out
from trl_gym.errors import PolicyServerError, PolicyServerLostError
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError

Answers = dict[str, tuple[int, Any]]


@pytest.fixture
def server() -> Iterator[tuple[PolicyClient, Answers, list[tuple[str, str, Any]]]]:
    answers: Answers = {}
    over = threading.Event()
    seen: list[tuple[str, str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            seen.append((self.command, self.path, json.loads(body) if body else None))
            status, payload = answers.get(self.path.partition("?")[0], (200, {}))
            if payload == "slow":
                over.wait(60)
            raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(raw)))
            if 300 <= status < 400:
                self.send_header("location", "http://evil.example/x")
            self.end_headers()
            self.wfile.write(raw)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    client = PolicyClient(f"http://127.0.0.1:{http.server_port}/v1", timeout_s=60.0)
    yield client, answers, seen
    over.set()
    client.close()
    http.shutdown()
    http.server_close()


def test_one_weight_update(server: Any) -> None:
    client, answers, seen = server
    answers["/weight_info"] = (200, {"weight_version": "7"})
    answers["/reset_mm_cache"] = (200, b"")
    client.init_weight_transfer({})
    client.pause()
    client.start_weight_update()
    client.update_weights({"path": "/dev/shm/w"})
    client.finish_weight_update("7")
    client.reset_caches()
    client.resume()
    assert client.weight_version() == "7"
    assert seen == [
        ("POST", "/init_weight_transfer_engine", {"init_info": {}}),
        ("POST", "/pause?mode=wait", None),
        ("POST", "/start_weight_update", None),
        ("POST", "/update_weights", {"update_info": {"path": "/dev/shm/w"}}),
        ("POST", "/finish_weight_update", {"weight_version": "7"}),
        ("POST", "/reset_prefix_cache", None),
        ("POST", "/reset_mm_cache", None),
        ("POST", "/reset_encoder_cache", None),
        ("POST", "/resume", None),
        ("GET", "/weight_info", None),
    ]


@pytest.mark.parametrize(
    ("finish", "complete", "asked"),
    [(200, True, ["/finish_weight_update"]), (500, False, ["/finish_weight_update", "/update_weights"])],
)
def test_an_update_of_a_dead_trainer_is_ended(server: Any, finish: int, complete: bool, asked: list[str]) -> None:
    """Both routes refuse where nothing is to be ended; a server that says nothing is lost."""
    client, answers, seen = server
    answers["/is_paused"] = (200, {"is_paused": True})
    assert client.is_paused()
    seen.clear()
    answers["/finish_weight_update"] = (finish, {"error": {"message": "the update lacks 24 parameters"}})
    answers["/update_weights"] = (500, {"error": {"message": "start_weight_update must be called before"}})
    assert client.abandon_weight_update() is complete
    assert [path for _, path, _ in seen] == asked
    assert seen[0][2] == {}, "no version: what the server holds keeps its own"
    with pytest.raises(PolicyServerLostError, match="cannot be reached"):
        PolicyClient("http://127.0.0.1:9/v1").abandon_weight_update()


def test_a_proxy_of_the_environment_is_not_asked(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, answers, seen = server
    answers["/trl_gym/info"] = (200, {"model_names": ["policy"], "max_model_len": 9})
    without_way_out(monkeypatch)
    client.info()
    PolicyClient(client.base_urls).resume()
    assert client.health()
    assert [path for _, path, _ in seen] == ["/trl_gym/info", "/resume", "/health"]


def test_sleep_and_wake_up(server: Any) -> None:
    client, _, seen = server
    client.sleep(2)
    client.wake_up(["weights", "kv_cache"])
    client.wake_up()
    assert [path for _, path, _ in seen] == ["/sleep?level=2", "/wake_up?tags=weights&tags=kv_cache", "/wake_up"]


def test_a_prefix_cache_in_use_is_an_error(server: Any) -> None:
    client, answers, _ = server
    answers["/reset_prefix_cache"] = (200, {"success": False})
    with pytest.raises(PolicyServerError, match="Pause the server first"):
        client.reset_caches()


def test_prompt_logprobs_are_those_of_the_tokens_themselves(server: Any) -> None:
    client, answers, seen = server
    entries = [None, {"5": {"logprob": -1.5}, "6": {"logprob": -0.1}}]
    answers["/v1/completions"] = (
        200,
        {"choices": [{"index": 1, "prompt_logprobs": [None]}, {"index": 0, "prompt_logprobs": entries}]},
    )
    assert client.prompt_logprobs([[4, 5], [9]]) == [[-1.5], []]
    assert seen[0][2]["prompt"] == [[4, 5], [9]]
    assert client.prompt_logprobs([]) == []


@pytest.mark.parametrize(
    ("status", "payload", "words"),
    [
        (400, {"error": {"message": "maximum context length"}}, "HTTP 400: maximum context length"),
        (422, {"detail": "bad body"}, "HTTP 422: bad body"),
        (500, b"Internal Server Error", "HTTP 500: Internal Server Error"),
        (200, b"<html>", "is not JSON"),
    ],
)
def test_an_answer_that_is_an_error(server: Any, status: int, payload: Any, words: str) -> None:
    client, answers, _ = server
    answers["/weight_info"] = (status, payload)
    with pytest.raises(PolicyServerError, match=f"GET http://127.0.0.1.*/weight_info: .*{words}") as caught:
        client.weight_version()
    if status != 200:
        assert isinstance(caught.value, PolicyResponseError) and caught.value.status == status


ODD = [None, [], "x", 5, {}, {"x": 1}]
CALLS: dict[str, tuple[str, Callable[[PolicyClient], Any], list[Any]]] = {
    "info": ("/trl_gym/info", PolicyClient.info, [{"model_names": [], "max_model_len": 9}]),
    "untagged_calls": (
        "/trl_gym/info",
        PolicyClient.untagged_calls,
        [{"model_names": ["a"], "max_model_len": 9, "untagged_calls": {"gym": [1], "others": 1}}],
    ),
    "models": ("/v1/models", PolicyClient.models, [{"data": 5}, {"data": ["x"]}, {"data": [{}]}]),
    "server_config": (
        "/server_info",
        PolicyClient.server_config,
        [{"vllm_config": "text"}, {"vllm_config": {"weight_transfer_config": "file"}}],
    ),
    "server_environment": ("/server_info", PolicyClient.server_environment, [{"vllm_env": None}]),
    "world_size": ("/get_world_size", PolicyClient.world_size, [{"world_size": "many"}, {"world_size": None}]),
    "collective_rpc": ("/collective_rpc", lambda client: client.collective_rpc("f"), [{"results": 1}]),
    "is_paused": ("/is_paused", PolicyClient.is_paused, [{"is_paused": "no"}]),
    "weight_version": ("/weight_info", PolicyClient.weight_version, [{"weight_version": [1]}]),
    "load_adapter": (
        "/trl_gym/adapters",
        lambda client: client.load_adapter("a", "/a", "1", max_adapters=1, wait_s=1),
        [{"held": [{}]}, {"held": ["x"]}],
    ),
    "rollout_records": (
        "/trl_gym/rollouts/records",
        lambda client: client.rollout_records(["r"]),
        [{"records": []}, {"records": {"r": "x"}}],
    ),
    "cancel_rollouts": ("/trl_gym/rollouts/cancel", lambda client: client.cancel_rollouts(["r"]), [{"aborted": "1"}]),
    "prompt_logprobs": (
        "/v1/completions",
        lambda client: client.prompt_logprobs([[1, 2]]),
        [
            {"choices": 5},
            {"choices": [{"index": 0}]},
            {"choices": [{"index": 0, "prompt_logprobs": [None, 5]}]},
            {"choices": [{"index": 0, "prompt_logprobs": [None, {"2": {"logprob": "x"}}]}]},
        ],
    ),
    "chat": (
        "/v1/chat/completions",
        lambda client: client.chat(messages=[]),
        [{"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"prompt_token_ids": "a"}}]}],
    ),
    "render": ("/tokenize", lambda client: client.render([]), [{"tokens": "abc"}, {"tokens": [1.5]}]),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_of_another_form(server: Any, name: str) -> None:
    client, answers, _ = server
    path, call, odd = CALLS[name]
    for payload in [*ODD, *odd, b"[" * 100_000, b"[" * 500 + b"]" * 500]:
        answers[path] = (200, payload)
        with pytest.raises(PolicyServerError, match=rf"http://127.0.0.1.*{path}"):
            call(client)


def test_a_redirect_is_not_followed(server: Any) -> None:
    client, answers, seen = server
    answers["/resume"] = (307, b"x")  # a body, and a location below
    with pytest.raises(PolicyResponseError, match=r"HTTP 307: it redirects to evil\.example, and redirects are not"):
        client.resume()
    assert [path for _, path, _ in seen] == ["/resume"]


def test_a_slow_answer_and_none_at_all(server: Any) -> None:
    client, answers, _ = server
    answers["/trl_gym/info"] = (200, "slow")
    with pytest.raises(PolicyServerLostError, match=r"no answer within 0.2 s"):
        client.info(timeout_s=0.2)
    assert client.health()
    gone = PolicyClient("http://127.0.0.1:9/v1")
    assert not gone.health()
    with pytest.raises(PolicyServerLostError, match="cannot be reached"):
        gone.resume()


def test_an_engine_that_hangs_behind_a_process_that_answers(server: Any) -> None:
    client, answers, seen = server
    client.ask_engines()
    answers["/is_paused"] = (404, {"detail": "Not Found"})  # stock vLLM outside of its development mode
    client.ask_engines()
    assert {path for _, path, _ in seen} == {"/is_paused"}
    answers["/is_paused"] = (500, {"error": {"message": "EngineCore encountered an issue"}})
    with pytest.raises(PolicyResponseError, match="EngineCore"):
        client.ask_engines()
    answers["/is_paused"] = (200, "slow")
    with pytest.raises(
        PolicyServerLostError, match=r"its HTTP process answers, and its engine does not .*1 s"
    ) as lost:
        client.patient(1.0).ask_engines()
    assert lost.value.silent_s == 1.0
    answers["/health"] = (200, "slow")
    with pytest.raises(PolicyServerLostError, match=r"hangs: nothing answers"):
        client.patient(0.2).ask_engines()
    answers.clear()
    with pytest.raises(PolicyServerLostError, match="cannot be reached") as lost:
        PolicyClient([client.base_url, "http://127.0.0.1:9/v1"], timeout_s=5.0).ask_engines()
    assert lost.value.silent_s == 0.0
