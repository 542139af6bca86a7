"""The policy servers that end-to-end tests share, and the rule that one runs at a time."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
import uvicorn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.conftest import wait_for
from tests.e2e.training import CALCULATOR
from tests.fork_ranks import forked_into, use_forks
from trl_gym import GymServers, PolicyServer
from trl_gym.cli import main
from trl_gym.policy_server.client import PolicyClient
from trl_gym.policy_server.command import KEY_VARIABLE
from trl_gym.policy_server.fork_server import ForkServer
from trl_gym.policy_server.middleware.ledger import Taken
from trl_gym.processes import bind_socket
from trl_gym.rollouts.trajectory import ModelCall, model_calls

MAX_MODEL_LEN = 512
START_TIMEOUT_S = 400.0  # 15 s on a quiet machine
FLAGS: dict[str, Any] = {
    "max-model-len": MAX_MODEL_LEN,
    "enforce-eager": True,
    "dtype": "float32",
}  # the tool parser is guessed
# In the order in which they run; each name is an argument of the mark `shares`.
SHARED = (
    "small",
    "small, killed at the end",
    "random",
    "random, ended at the end",
    "untied",
    "untied, ended at the end",
)

API_KEY = "key-of-the-tests"  # of every policy server that these tests start

Json = dict[str, Any]
T = TypeVar("T")


class OneAtATime:
    """Keep what was started last; starting another thing ends it. Two vLLM servers would fill a small machine."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._value: Any = None
        self._stack = ExitStack()

    def get(self, name: str, start: Callable[[], AbstractContextManager[T]]) -> T:
        """Return what runs under this name; start it if something else runs or nothing does."""
        if name != self._name:
            self.end()
            self._value = self._stack.enter_context(start())
            self._name = name
        return self._value

    def end(self) -> None:
        self._name = self._value = None
        self._stack.close()


@dataclass
class Pair:
    """A policy server and a NeMo Gym with the calculator that samples from it."""

    policy: PolicyServer
    gym: GymServers


@contextmanager
def calculator_pair(model: Path, logs: Path, **flags: Any) -> Iterator[Pair]:
    with (
        PolicyServer(model, vllm_args=FLAGS | flags, log_dir=logs, start_timeout_s=START_TIMEOUT_S) as policy,
        GymServers(
            [CALCULATOR / "calculator.yaml"],
            policy_base_url=policy.base_url,
            policy_api_key=policy.gym_key,
            log_dir=logs,
        ) as gym,
    ):
        yield Pair(policy, gym)


def tagged(temperature: float = 1.0, **fields: Any) -> Json:
    """The tag of a rollout of its own."""
    return {"rollout": uuid.uuid4().hex, "sampling": {"temperature": temperature, "top_p": 1.0}, **fields}


def calls_of(client: PolicyClient, tag: Json) -> list[ModelCall]:
    """The model calls of a rollout, with their tokens; it has ended then."""
    url = f"{client.root_url}/trl_gym/rollouts/take"
    response = client._sessions[0].post(url, json={"rollouts": [tag["rollout"]]}, timeout=60.0)
    assert response.status_code == 200, response.text
    records = msgspec.msgpack.decode(response.content, type=Taken).rollouts[tag["rollout"]]
    assert records is not None
    return model_calls(records)


def is_running(client: PolicyClient, *tags: Json) -> bool:
    """Return whether the server is answering a call of each rollout."""
    url, body = f"{client.root_url}/trl_gym/rollouts/records", {"rollouts": [tag["rollout"] for tag in tags]}
    return all(client._sessions[0].post(url, json=body, timeout=60.0).json()["running"].values())


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Serve an ASGI application in a thread; its OpenAI base URL."""
    sock = bind_socket()
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", ws="none", log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
    thread.start()
    wait_for(lambda: server.started, "it answers")
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


@dataclass
class Served:
    """A running `trl-gym serve`, attached to."""

    process: BaseProcess
    server: PolicyServer
    printed: Path

    @property
    def client(self) -> PolicyClient:
        return self.server.client

    def chat(self, messages: list[Json], **body: Any) -> Json:
        return self.client.chat(messages=messages, timeout_s=120.0, **body)

    def message(self, messages: list[Json], **body: Any) -> Json:
        return self.chat(messages, **body)["choices"][0]["message"]


def serve_argv(model: Path, log_dir: Path, *more: str) -> list[str]:
    flags = [part for name, value in FLAGS.items() for part in (f"--{name}", str(value)) if part != "True"]
    flags += ["--log-dir", str(log_dir), "--start-timeout", str(START_TIMEOUT_S)]
    return [sys.executable, "-m", "trl_gym.cli", "serve", str(model), *flags, *more]


def serve(control: socket.socket, words: list[str]) -> None:
    """Be `trl-gym serve`, whose server is forked by who listens to `control`."""
    os.environ[KEY_VARIABLE] = API_KEY
    use_forks(control)
    sys.exit(main(words))


@contextmanager
def command_served(forks: ForkServer, model: Path, folder: Path) -> Iterator[Served]:
    """Run `trl-gym serve`."""
    words = serve_argv(model, folder / "logs", "--port", "0")
    printed, told = folder / "stdout", folder / "stderr"
    process = forked_into([printed, told], serve, forks._control, words[words.index("serve") :])
    try:
        wait_for(lambda: process.exitcode is not None or "\n" in read(printed), timeout_s=START_TIMEOUT_S)
        line = read(printed)
        assert line.startswith("ready http://127.0.0.1:"), told.read_text()
        yield Served(process, PolicyServer.attach(line.split()[1], api_key=API_KEY), printed)
    finally:
        process.terminate()
        process.join(60.0)


def read(path: Path) -> str:
    """What a file has so far; empty if there is none yet."""
    return path.read_text() if path.exists() else ""


def vllm_metric(client: PolicyClient, name: str) -> float:
    """Return one of vLLM's own metrics, summed over its labels."""
    [text] = client.prometheus(timeout_s=60.0)
    return sum(float(value) for value in re.findall(rf"^vllm:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def untied(policy: Path, folder: Path) -> Path:
    """The same policy with an output layer of its own."""
    tied = AutoModelForCausalLM.from_pretrained(policy)
    config = tied.config
    config.tie_word_embeddings = False
    model = type(tied)(config)
    model.load_state_dict(tied.state_dict())
    model.generation_config = tied.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    return folder


def random_like(policy: Path, seed: int) -> PreTrainedModel:
    """A model with the shapes of a policy and random weights, far enough from uniform to tell two of them apart."""
    config = AutoConfig.from_pretrained(policy)
    config.initializer_range = 0.08
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).to(torch.float32).eval()


def push_file(client: PolicyClient, weights: Path, version: str, *, resume: bool = True) -> None:
    """Replace a server's weights by those of a safetensors file."""
    client.init_weight_transfer({})
    client.pause()
    client.start_weight_update()
    client.update_weights({"path": str(weights)})
    client.finish_weight_update(version)
    client.reset_caches()
    if resume:
        client.resume()
