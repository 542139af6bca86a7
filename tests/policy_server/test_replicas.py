"""Several servers used as one policy: real HTTP, our middleware, a stand-in for vLLM behind each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.policy_server.adapter_folder import write_adapter
from tests.policy_server.fake_vllm import FakeVllm
from tests.policy_server.test_splice_probe import served
from trl_gym.errors import ConfigError, PolicyServerError, PolicyServerLostError, WeightMismatchError
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError, root_url, server_urls
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings
from trl_gym.policy_server.server import PolicyServer
from trl_gym.policy_server.splice_probe import check_splice
from trl_gym.processes import bind_socket
from trl_gym.rollouts.ledger import Ledger
from trl_gym.run.recovery import answering_process

KEY = "secret"
SAMPLED = {"rollout": "r", "sampling": {"temperature": 1.0}}


@dataclass
class Replica(FakeVllm):
    """Pauses, takes weights, and gives every token the same log-probability."""

    paused: bool = False
    logprob: float = -1.0
    backend: str = "file"
    refuses: set[str] = field(default_factory=set)

    def answer(self, path: str, body: bytes) -> Any:
        if path in self.refuses:
            return 500, {"error": {"message": f"{path} refused"}}
        request = json.loads(body) if body else {}
        match path:
            case "/pause" | "/resume":
                self.paused = path == "/pause"
            case "/server_info":
                return 200, {"vllm_config": {"weight_transfer_config": {"backend": self.backend}}}
            case "/is_paused":
                return 200, {"is_paused": self.paused}
            case "/v1/completions":
                choices = [
                    {"index": i, "prompt_logprobs": [None, *({str(t): {"logprob": self.logprob}} for t in ids[1:])]}
                    for i, ids in enumerate(request["prompt"])
                ]
                return 200, {"choices": choices}
            case "/start_weight_update" | "/update_weights":
                pass
            case _:
                return super().answer(path, body)
        self.requests.append((path, request))
        return 200, {}

    def asked(self) -> list[str]:
        return [path for path, _ in self.requests]


@pytest.fixture
def replicas() -> Iterator[tuple[list[Replica], str]]:
    """Two, and their URLs as in `vllm_server_base_url`."""
    apps = [Replica(), Replica()]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(served(OnPolicyMiddleware(app, Settings(api_keys=(KEY,))))) for app in apps]
        yield apps, ", ".join(client.base_url for client in clients)


@pytest.fixture
def fleet(replicas: tuple[list[Replica], str]) -> PolicyServer:
    return PolicyServer.attach(replicas[1], api_key=KEY, timeout_s=60.0)


def test_it_is_one_policy(replicas: tuple[list[Replica], str], fleet: PolicyServer) -> None:
    urls = replicas[1].split(", ")
    assert fleet.base_urls == tuple(urls) and fleet.model_name == "policy" and fleet.max_model_len == 200
    assert (fleet.state, fleet.is_ours) == ("ready", False)
    assert fleet.weight_transports == ("file",)
    assert len(set(answering_process(fleet).split("+"))) == 2
    assert fleet.wait_ready() is fleet
    fleet.check()
    replicas[0][1].backend = "nccl"
    mixed = PolicyServer.attach(urls, api_key=KEY)
    with pytest.raises(ConfigError, match=r"by file or adapter only, .*/v1: file; .*/v1: nccl\)"):
        _ = mixed.weight_transports
    with pytest.raises(PolicyServerError, match="cannot be restarted from here"):
        fleet.restart()
    check_splice(fleet.client, fleet.model_name)
    fleet.stop()


def test_how_our_own_server_accepts_weights_is_not_asked_of_vllm() -> None:
    app = Replica()
    settings = Settings(api_keys=(KEY,), weight_transports=("ipc", "adapter"))
    with served(OnPolicyMiddleware(app, settings)) as client:
        assert PolicyServer.attach(client.base_url, api_key=KEY).weight_transports == ("ipc", "adapter")
    assert "/server_info" not in app.asked()


def test_a_server_without_a_key_is_not_trained_with() -> None:
    with served(OnPolicyMiddleware(Replica(), Settings(weight_transports=("file",)))) as client:
        server = PolicyServer.attach(client.base_url)
        with pytest.raises(ConfigError, match="was started without a key, and so takes no weights"):
            _ = server.weight_transports


def test_control_reaches_all_and_reads_one(replicas: tuple[list[Replica], str], fleet: PolicyServer) -> None:
    apps, _ = replicas
    for app in apps:
        app.requests.clear()
    client = fleet.client.patient(10.0)
    client.pause("wait")
    assert all(app.paused for app in apps) and client.is_paused()
    client.start_weight_update()
    client.update_weights({"path": "w"})
    client.finish_weight_update("7")
    client.resume()
    assert client.weight_version() == "7" and client.health() and not client.is_paused()
    changes = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]
    assert all([path for path in app.asked() if path in changes] == changes for app in apps)
    assert client.models()[0]["id"] == "policy"
    assert [app.asked().count("/v1/models") for app in apps] == [1, 0]


def test_who_failed_is_named(replicas: tuple[list[Replica], str], fleet: PolicyServer) -> None:
    apps, urls = replicas
    first, second = (url.removesuffix("/v1") for url in urls.split(", "))
    apps[1].refuses = {"/update_weights"}
    with pytest.raises(PolicyResponseError, match=f"{second}/update_weights: HTTP 500: /update_weights refused"):
        fleet.client.update_weights({})
    apps[0].refuses = {"/update_weights"}
    with pytest.raises(PolicyServerError, match=f"2 of 2 policy servers failed.\n.*{first}.*\n.*{second}"):
        fleet.client.update_weights({})
    apps[0].weight_version, apps[1].weight_version = "1", "2"
    with pytest.raises(PolicyServerError, match=f"different weight versions .{first}/v1: '1', {second}/v1: '2'"):
        fleet.client.weight_version()


def test_replicas_with_other_weights_are_found(replicas: tuple[list[Replica], str], fleet: PolicyServer) -> None:
    apps, _ = replicas
    apps[1].logprob = -1.01
    assert fleet.client.prompt_logprobs([[1, 2, 3], [4, 5]]) == [[-1.0, -1.0], [-1.0]]
    apps[1].logprob = -1.2
    with pytest.raises(WeightMismatchError, match=r"hold different weights: .* differ by 0\.2000 nats"):
        fleet.client.prompt_logprobs([[1, 2, 3], [4, 5]])


def test_an_update_that_one_had_finished_is_ended_on_the_other(
    replicas: tuple[list[Replica], str], fleet: PolicyServer
) -> None:
    apps, _ = replicas
    apps[0].refuses = {"/finish_weight_update", "/update_weights"}
    for app in apps:
        app.requests.clear()
    # The stand-in wants a version; as to the real server, none is sent.
    apps[1].answer = lambda path, body: (apps[1].requests.append((path, {})), (200, {}))[1]  # type: ignore[method-assign]
    assert fleet.client.abandon_weight_update() is False
    # Afterwards the middleware asks which version it holds, since calls in flight may have two.
    assert [path for path in apps[1].asked() if path != "/weight_info"] == ["/finish_weight_update"]


async def test_records_are_wherever_the_rollout_was(replicas: tuple[list[Replica], str], fleet: PolicyServer) -> None:
    """NeMo Gym chooses the server; the ledger asks all, and the client of the trainer does so too."""
    second = fleet.client.singly()[1]
    for name in ("a", "b"):
        second.chat(messages=[{"role": "user", "content": "hi"}], trl_gym={**SAMPLED, "rollout": name})
    ledger = Ledger(fleet.base_urls, KEY)
    async with aiohttp.ClientSession() as session:
        assert (await ledger.peek(session, ["a", "x"]))["a"].num_answered == 1
        [record], process = await ledger.take(session, "a")
        assert record.tokens is not None and process == answering_process(fleet)
        assert await ledger.ping(session) == answering_process(fleet)
        await ledger.cancel(session, ["c"])
    assert len(fleet.client.rollout_records(["b"])["b"]) == 1
    assert fleet.client.cancel_rollouts(["d"]) == 0
    for name in ("c", "d"):
        for one in fleet.client.singly():
            with pytest.raises(PolicyServerError, match="was cancelled"):
                one.chat(messages=[{"role": "user", "content": "hi"}], trl_gym={**SAMPLED, "rollout": name})


def test_an_adapter_is_kept_as_long_as_one_replica_needs_it(
    replicas: tuple[list[Replica], str], fleet: PolicyServer, tmp_path: Path
) -> None:
    folders = [str(write_adapter(tmp_path / name)) for name in ("0", "1")]
    load = partial(fleet.client.load_adapter, max_adapters=2, wait_s=0)
    assert load("policy@0", folders[0], "0") == folders[:1]
    fleet.client.singly()[1].chat(messages=[{"role": "user", "content": "hi"}], trl_gym=SAMPLED)
    assert load("policy@1", folders[1], "1") == folders[::-1]  # the second has a rollout that began with the old one
    assert [len(app.adapters) for app in replicas[0]] == [1, 2]
    assert fleet.client.weight_version() == "1"
    fleet.client.clear_adapters()


async def test_one_that_is_gone_is_a_loss_and_is_named(fleet: PolicyServer) -> None:
    with bind_socket() as sock:
        port = sock.getsockname()[1]
    gone = f"http://127.0.0.1:{port}"
    there = fleet.base_urls[0]
    client = PolicyClient([there, gone], api_key=KEY, timeout_s=60.0)
    with pytest.raises(PolicyServerLostError, match=gone):
        client.pause("wait")
    assert not client.health()
    ledger = Ledger(f"{there},{gone}/v1", KEY)
    async with aiohttp.ClientSession() as session:
        assert await ledger.ping(session) is None
        with pytest.raises(PolicyServerLostError, match=gone):
            await ledger.take(session, "a")
    assert gone in ledger.describe_silence() and there not in ledger.describe_silence()


def test_a_cache_that_one_cannot_reset_is_an_error(replicas: tuple[list[Replica], str], fleet: PolicyServer) -> None:
    apps, _ = replicas
    for app, success in zip(apps, [True, False], strict=True):
        app.answer = lambda path, body, success=success: (200, {"success": success})  # type: ignore[method-assign]
    with pytest.raises(PolicyServerError, match="could not be reset"):
        fleet.client.reset_caches()


def test_servers_that_are_no_replicas(replicas: tuple[list[Replica], str]) -> None:
    apps, urls = replicas
    apps[1].max_model_len = 100
    with pytest.raises(PolicyServerError, match="differ in max_model_len: 200 and 100"):
        PolicyServer.attach(urls, api_key=KEY)


@pytest.mark.parametrize(
    "given", ["http://a:1, http://b:2/v1/", ["http://a:1/v1", "http://b:2"], " http://a:1/,,http://b:2/v1"]
)
def test_urls_are_told_apart_and_made_alike(given: str | list[str]) -> None:
    assert server_urls(given) == ("http://a:1/v1", "http://b:2/v1")
    assert [root_url(url) for url in server_urls(given)] == ["http://a:1", "http://b:2"]


@pytest.mark.parametrize(
    ("given", "words"), [("http://a:1,http://a:1/v1", "twice"), (" , ", "names no URL"), ([], "names no URL")]
)
def test_urls_of_no_server_or_of_one_twice_are_refused(given: str | list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PolicyServer.attach(given)
