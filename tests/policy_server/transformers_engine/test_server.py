"""The policy server in the trainer's own process: its life, its thread, and whose turn the model is."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.conftest import wait_for
from tests.policy_server.tiny_model import attend_otherwise, build_random_policy
from trl_gym.errors import ConfigError, PolicyServerError, PolicyServerLostError
from trl_gym.policy_server.client import PolicyResponseError
from trl_gym.policy_server.splice_probe import check_sampling, check_splice
from trl_gym.policy_server.transformers_engine.server import TransformersServer
from trl_gym.processes import ServerState

CHAT: dict[str, Any] = {"model": "policy", "messages": [{"role": "user", "content": "1"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_policy(tmp_path_factory.mktemp("policy") / "random")


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


@pytest.fixture
def server(folder: Path, model: PreTrainedModel) -> Iterator[TransformersServer]:
    with TransformersServer(max_model_len=128) as started:
        started.take_model(model, AutoTokenizer.from_pretrained(folder))
        yield started.wait_ready()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "policy server" in thread.name]


def test_callers_queue_at_the_port_until_there_is_a_model(folder: Path, model: PreTrainedModel) -> None:
    with TransformersServer(max_model_len=128) as server:
        assert server.state is ServerState.STARTING and not threads()
        with pytest.raises(PolicyServerError, match="has no model yet"):
            server.wait_ready()
        answers: list[int] = []
        url, headers = f"{server.client.root_url}/v1/models", {"Authorization": f"Bearer {server.client.api_key}"}
        early = threading.Thread(
            target=lambda: answers.append(requests.get(url, headers=headers, timeout=60).status_code)
        )
        early.start()
        server.take_model(model, AutoTokenizer.from_pretrained(folder))
        early.join(60)
        assert answers == [200]
        assert server.wait_ready().state is ServerState.READY
        assert server.wait_ready() is server
    assert server.state is ServerState.STOPPED and not threads()
    server.stop()


def test_the_threads_of_a_server_that_is_forgotten_end(folder: Path, model: PreTrainedModel) -> None:
    server = TransformersServer(max_model_len=128).start()
    server.take_model(model, AutoTokenizer.from_pretrained(folder))
    assert server.wait_ready() and threads()
    del server
    gc.collect()
    wait_for(lambda: not threads(), "they would keep the model of a trainer that was deleted")


def test_it_demands_its_key_and_tells_what_it_is(server: TransformersServer) -> None:
    assert requests.get(f"{server.client.root_url}/v1/models", timeout=60).status_code == 401
    info = server.client.info()
    assert info["engine"] == "transformers" and info["model_names"] == ["policy"] and info["max_model_len"] == 128
    assert info["weight_transports"] == ["shared"]
    assert server.base_urls == (server.own_url,) and server.own_url.startswith("http://127.0.0.1:")


def test_the_model_is_sampled_from_inside_and_trained_outside(
    server: TransformersServer, model: PreTrainedModel
) -> None:
    before = model.config._attn_implementation
    with server.sampling():
        check_splice(server.client, "policy")
        answer = server.client.chat(**CHAT)
        assert answer["usage"]["completion_tokens"] >= 1
        with server.resting():
            assert model.training and model.config._attn_implementation == before
            model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
        assert server.client.chat(**CHAT)["choices"]
    assert model.training and model.config._attn_implementation == before
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()


def test_sampling_goes_on_after_a_rest_that_has_failed(server: TransformersServer) -> None:
    with server.sampling():
        with pytest.raises(ZeroDivisionError), server.resting():
            raise ZeroDivisionError
        with server.resting():
            pass
        server.restart()
        assert server.client.chat(**CHAT)["choices"]


def test_an_engine_that_samples_from_something_else_than_its_model_is_found(
    server: TransformersServer, model: PreTrainedModel
) -> None:
    with server.sampling():
        check_sampling(server.client, "policy", 1e-4)
    attend_otherwise(model)
    with server.sampling(), pytest.raises(ConfigError, match=r"does not compute .* differ by [\d.]+ n"):
        check_sampling(server.client, "policy", 0.1)


def test_a_tokenizer_without_chat_template_is_refused(folder: Path, model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    with TransformersServer(max_model_len=128) as other, pytest.raises(ConfigError, match="has no chat template"):
        other.take_model(model, tokenizer)


def test_only_a_rest_lends_the_model_to_who_asks_for_log_probabilities(
    server: TransformersServer, model: PreTrainedModel
) -> None:
    ids, hook = [[5, 9, 300]], model.register_forward_pre_hook(lambda *_: pytest.fail("the model was touched"))
    with pytest.raises(PolicyResponseError, match=r"HTTP 409: .*the trainer computes with its model"):
        server.client.prompt_logprobs(ids)
    hook.remove()
    with server.resting():
        resting = server.client.prompt_logprobs(ids)
    with server.sampling():
        assert server.client.prompt_logprobs(ids)[0] == pytest.approx(resting[0])
    with pytest.raises(PolicyResponseError, match="HTTP 409"):
        server.client.prompt_logprobs(ids)
    assert model.training


def test_a_call_outside_of_sampling_waits_for_it(server: TransformersServer) -> None:
    answers: list[Any] = []
    caller = threading.Thread(target=lambda: answers.append(server.client.singly()[0].chat(**CHAT)))
    caller.start()
    while not server.client.info()["untagged_calls"]["others"]:
        pass
    assert not answers
    with server.sampling():
        caller.join(60)
    assert len(answers) == 1


def test_the_model_is_ordinary_again_whatever_ends_the_sampling(
    server: TransformersServer, model: PreTrainedModel
) -> None:
    model.eval()
    with pytest.raises(KeyboardInterrupt), server.sampling():
        server.client.chat(**CHAT)
        raise KeyboardInterrupt
    assert not model.training
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()


@pytest.mark.parametrize("mode", ["parked", "paused", "running"])
def test_calls_that_wait_or_run_when_it_stops_are_answered_with_an_error(
    server: TransformersServer, model: PreTrainedModel, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """uvicorn would cancel them after a second, and log a traceback for each of them to the user's terminal."""
    answers: list[requests.Response] = []
    url, headers = f"{server.own_url}/chat/completions", {"Authorization": f"Bearer {server.client.api_key}"}
    body = {**CHAT, "max_tokens": 100, "ignore_eos": True}

    def call() -> None:
        answers.append(requests.post(url, json=body, headers=headers, timeout=60))

    model.register_forward_pre_hook(lambda *_: time.sleep(0.1))  # the first has not ended when the last comes
    callers = [threading.Thread(target=call) for _ in range(3)]
    with server.sampling() if mode != "parked" else contextlib.nullcontext():
        if mode == "paused":
            server.client.pause()
        for caller in callers:
            caller.start()
        wait_for(lambda: _waiting(server) == len(callers))
        server.stop()
    for caller in callers:
        caller.join(60)
    assert [answer.status_code for answer in answers] == [500] * 3
    assert "The policy server of this process was stopped." in answers[0].json()["error"]["message"]
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]
    assert not threads()


def _waiting(server: TransformersServer) -> int:
    counters = server._engine.counters
    return counters.held + counters.running


def test_a_dead_engine_is_noticed_and_replaced_at_the_same_address(
    server: TransformersServer, model: PreTrainedModel
) -> None:
    server.check()
    url, first = server.own_url, server.client.info()["instance"]

    def die(*_: Any) -> None:
        raise RuntimeError("a fault of the tests")

    handle = model.register_forward_pre_hook(die)
    with server.sampling():
        with pytest.raises(PolicyServerError, match="a fault of the tests"):
            server.client.chat(**CHAT)
        with pytest.raises(PolicyServerLostError, match="a fault of the tests"):
            server.check()
        handle.remove()
        server.restart()
        server.check()
        assert server.client.chat(**CHAT)["choices"]
    assert server.own_url == url and server.client.info()["instance"] != first
    assert len(threads()) == 1


def test_the_loss_of_another_rank_is_one_until_the_restart(server: TransformersServer) -> None:
    server.note_loss(PolicyServerLostError("rank 1: it ended"))
    with pytest.raises(PolicyServerLostError, match="rank 1"):
        server.check()
    server.restart()
    server.check()


def test_servers_that_were_joined_are_controlled_as_one(folder: Path, model: PreTrainedModel) -> None:
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with TransformersServer(api_key="same") as first, TransformersServer(api_key="same") as second:
        urls = [first.own_url, second.own_url]
        for server, own in ((first, model), (second, other)):
            server.join(urls)
            server.take_model(own, tokenizer)
        assert first.wait_ready().base_urls == second.wait_ready().base_urls == tuple(urls)
        first.client.finish_weight_update("7")
        assert {one.weight_version() for one in first.client.singly()} == {"7"}
        assert first.client.info()["max_model_len"] == model.config.max_position_embeddings


def test_a_stopped_one_is_neither_started_nor_restarted(server: TransformersServer) -> None:
    server.stop()
    for call in (server.start, server.restart):
        with pytest.raises(PolicyServerError, match="stopped"):
            call()
    server.check()
