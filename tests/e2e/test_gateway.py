"""`trl-gym gateway` in front of a stock vLLM server: started as anybody would, without development mode.

One server and one gateway for the whole module; the last tests end them, in this order.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.conftest import wait_for
from tests.e2e import stock_vllm
from tests.e2e.servers import API_KEY, MAX_MODEL_LEN, START_TIMEOUT_S, vllm_metric
from tests.e2e.stock_requests import CHAT, IN_OWN_WORDS, REFUSED, all_requests, answer_of, bodies, without_bundle
from tests.policy_server.tiny_model import build_tokenizer
from trl_gym.errors import PolicyServerError
from trl_gym.policy_server.client import PolicyClient
from trl_gym.policy_server.fork_server import ForkServer
from trl_gym.policy_server.middleware.turn import TOKEN_KEYS
from trl_gym.policy_server.server import PolicyServer
from trl_gym.processes import ChildProcess

pytestmark = pytest.mark.e2e

HOT = {"rollout": "hot", "sampling": {"temperature": 1.5, "top_p": 1.0, "top_k": -1}}
USER = {"role": "user", "content": "What is 47 + 36?"}
AUTH = {"Authorization": f"Bearer {API_KEY}"}

Json = dict[str, Any]


@dataclass
class Gate:
    """A running `trl-gym gateway`, attached to, and the server behind it."""

    process: subprocess.Popen[str]
    server: PolicyServer
    stock: ChildProcess
    stock_url: str
    log: Path

    @property
    def client(self) -> PolicyClient:
        return self.server.client

    def chat(self, messages: list[Json], **body: Any) -> Json:
        return self.client.chat(messages=messages, timeout_s=120.0, **body)

    def message(self, messages: list[Json], **body: Any) -> Json:
        return self.chat(messages, **body)["choices"][0]["message"]

    def metric(self, name: str) -> float:
        return vllm_metric(PolicyClient(self.stock_url), name)


@pytest.fixture(scope="module")
def gate(
    alone: None, forks: ForkServer, random_policy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gate]:
    folder = tmp_path_factory.mktemp("gateway")
    flags = ["--max-model-len", str(MAX_MODEL_LEN), "--enable-request-id-headers"]
    stock, url = stock_vllm.start(forks, random_policy, folder / "vllm.log", *flags)
    log = folder / "gateway.log"
    # Started at once: it waits for the server.
    command = [sys.executable, "-m", "trl_gym.cli", "gateway", "--upstream", f"{url}/v1", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--start-timeout", str(START_TIMEOUT_S)], stdout=subprocess.PIPE, stderr=log.open("w"), text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready http://127.0.0.1:"), log.read_text() + stock.log_tail()
        yield Gate(process, PolicyServer.attach(line.split()[1]), stock, url, log)
    finally:
        process.terminate()
        process.wait(60.0)
        stock.stop()


def test_what_it_is_and_what_it_said_while_starting(gate: Gate) -> None:
    info = gate.client.info()
    assert (info["max_model_len"], info["model_names"]) == (MAX_MODEL_LEN, ["policy"])
    assert info["turn_end_token_id"] == build_tokenizer().eos_token_id
    assert info["vllm_version"] and info["weight_version"] is None  # no development mode: nobody can change them
    log = gate.log.read_text()
    assert f"waiting for {gate.stock_url}" in log
    assert "--logprobs-mode processed_logprobs" in log  # stock vLLM reports raw ones


def test_another_client_gets_the_stock_answer(gate: Gate) -> None:
    body = {"model": "policy", "messages": [USER], "temperature": 0.0, "max_tokens": 12}
    stock, ours = (
        requests.post(f"{url}/v1/chat/completions", json=body, headers=AUTH, timeout=60.0).json()
        for url in (gate.stock_url, gate.client.root_url)
    )
    bundle = {key: ours["choices"][0]["message"].pop(key) for key in TOKEN_KEYS}
    assert len(bundle["generation_token_ids"]) == len(bundle["generation_log_probs"]) == 12
    for key in ("choices", "usage", "object", "model"):
        assert ours[key] == stock[key]


def test_requests_of_no_rollout_get_the_stock_servers_status_headers_and_body(gate: Gate) -> None:
    for method, path, how in all_requests():
        stock, ours = (answer_of(url, method, path, how) for url in (gate.stock_url, gate.client.root_url))
        assert without_bundle(ours) == stock, (method, path, str(how)[:500])
    for method, path, how in REFUSED:
        stock, ours = (answer_of(url, method, path, how) for url in (gate.stock_url, gate.client.root_url))
        assert {**stock, "headers": None} == {**ours, "headers": None}, how
    for body in bodies(IN_OWN_WORDS):
        stock, ours = (answer_of(url, "POST", CHAT, {"json": body}) for url in (gate.stock_url, gate.client.root_url))
        assert (stock["status"], ours["status"]) == (400, 400), body
        assert stock["body"]["error"].keys() == ours["body"]["error"].keys(), body


def test_routes_that_a_stock_server_lacks_are_said_to_be_missing(gate: Gate) -> None:
    with pytest.raises(PolicyServerError, match=r"HTTP 500: upstream http\S+ answered HTTP 404 to POST /pause"):
        gate.client.pause()
    assert gate.client.health()
    assert gate.message([USER], max_tokens=2, trl_gym=HOT)["generation_token_ids"]


LONG: Json = {"messages": [USER], "max_tokens": MAX_MODEL_LEN - 100, "ignore_eos": True, "trl_gym": HOT}


def test_a_client_that_hangs_up_aborts_the_generation(gate: Gate) -> None:
    before, number = gate.metric("generation_tokens_total"), 16  # one alone may be over before it is hung up on
    clients = [HTTPConnection(gate.client.root_url.removeprefix("http://"), timeout=60.0) for _ in range(number)]
    for client in clients:
        client.request("POST", "/v1/chat/completions", json.dumps(LONG), {"content-type": "application/json", **AUTH})
    wait_for(lambda: gate.metric("num_requests_running") > 0, "they run")
    for client in clients:
        client.close()
    wait_for(lambda: gate.metric("num_requests_running") == 0, "they have ended")
    assert gate.metric("generation_tokens_total") - before < number * LONG["max_tokens"]


def test_a_killed_upstream_is_an_error_with_words_and_the_gateway_lives_on(gate: Gate) -> None:
    failed: list[tuple[int, str]] = []

    def sample() -> None:
        answer = requests.post(f"{gate.client.base_url}/chat/completions", json=LONG, headers=AUTH, timeout=60.0)
        failed.append((answer.status_code, answer.text))

    running = [threading.Thread(target=sample) for _ in range(16)]  # one alone may be over before the end
    for thread in running:
        thread.start()
    wait_for(lambda: gate.metric("num_requests_running") > 0, "they run")
    for child in psutil.Process(gate.stock.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended with its parent
            child.kill()
    for thread in running:
        thread.join()
    sample()
    assert [status for status, _ in failed] == [500] * 17
    assert all("No upstream of the gateway can answer" in text and gate.stock_url in text for _, text in failed)
    assert requests.get(f"{gate.client.root_url}/health", timeout=60.0).status_code == 503
    assert gate.process.poll() is None


def test_ctrl_c_ends_it_and_it_said_one_line(gate: Gate) -> None:
    gate.process.send_signal(signal.SIGINT)
    assert gate.process.wait(60.0) == 130
    assert gate.process.stdout is not None and gate.process.stdout.read() == ""
    assert "Traceback" not in gate.log.read_text()
