"""The engines that the contract of a policy server is tested with: how each is reached, looked into and killed.

A further engine is one more function here, a line in `ENGINES`, and a line in `REFUSED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tests.conftest import server_below
from tests.e2e.servers import API_KEY, MAX_MODEL_LEN, Json, calls_of, listening, random_like, vllm_metric
from tests.policy_server.fake_sglang import behind_gateway
from trl_gym import PolicyServer
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings
from trl_gym.policy_server.transformers_engine.answers import choose
from trl_gym.policy_server.transformers_engine.app import EngineApp
from trl_gym.policy_server.transformers_engine.engine import Engine as Sampler
from trl_gym.policy_server.transformers_engine.rendering import ChatRenderer
from trl_gym.policy_server.transformers_engine.session import EngineOptions as SamplerOptions
from trl_gym.policy_server.transformers_engine.session import turn_ends
from trl_gym.policy_server.transformers_engine.weight_files import ModelFiles
from trl_gym.rollouts.trajectory import ModelCall
from trl_gym.weight_sync.protocol import WeightTransport
from trl_gym.weight_sync.sync import SyncOptions, WeightSync, compare, probe_batch, trainer_logprobs
from trl_gym.weight_sync.transports.file import FileTransport

USER = {"role": "user", "content": "What is 47 + 36?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "the sum",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
SAID = 'ok\n<tool_call>\n{"name": "add", "arguments": {"a": 47, "b": 36}}\n</tool_call>'
ODD = SAID.replace("36", '"\\udbea"')  # half of a surrogate pair, as JSON can write it
MARKERS = ("<tool_call>", "</tool_call>")
PROBE = probe_batch(256, seed=1)  # ids below the size of the vocabulary
MAX_GAP = 1e-4  # nats, mean; both sides compute in float32
MAX_TOKEN_GAP = 1e-3  # of a single token

# Parameters that an engine refuses, each behind the number of its case.
REFUSED: dict[str, tuple[str, ...]] = {
    "vllm": (),
    "transformers": (
        "s2 n",
        "s3 min_p",
        "s4 seed",
        "s5 presence_penalty",
        "s5 frequency_penalty",
        "s5 repetition_penalty",
        "s6 logit_bias",
        "s6 allowed_token_ids",
        "s6 min_tokens",
        "s7 stop",
        "s8 structured_outputs",
        "s8 response_format",
        "s9 top_logprobs",
    ),
    "sglang": ("s6 allowed_token_ids", "t6 return_token_ids"),
}
# What SGLang has and its stand-in has not.
UNTESTED: dict[str, tuple[str, ...]] = {
    "sglang": (
        "s4 seed",
        "s5 presence_penalty",
        "s5 frequency_penalty",
        "s5 repetition_penalty",
        "s6 logit_bias",
        "s6 min_tokens",
        "s8 structured_outputs",
        "s8 response_format",
    ),
}


@dataclass
class Engine:
    """A policy server of one kind, with a random model.

    Attributes:
        name: Of the kind.
        server: Attached to.
        model: Folder of the model that it was started with.
        num_running: Returns how many requests the engine itself samples now.
        num_sampled: Returns how many tokens it has sampled since its start; exact while it is paused or idle.
        progress: Returns a number that grows with every token that is sampled, or with every forward pass.
        transport: Makes the transport by which it takes weights.
        hang: Stops its engine, where that is a process, so that what is asked of it now is never answered. True then.
        kill: Ends its engine, as a fault would.
        restart: Starts its engine again, where weights that compute NaN have ended it.
        call_tokens: Tokens of a call that does not end while it takes one request to pause the server.
        reserved: Tokens of the context that it keeps for itself.
        renormalizes: Whether its log-probabilities are among the tokens that `top_p` and the like have left.
        measures: Whether it tells how long a call was queued, and how long its tokens took.
        block_size: Tokens of a block of its prefix cache; None if it does not say what came from it.
    """

    name: str
    server: PolicyServer
    model: Path
    num_running: Callable[[], float]
    num_sampled: Callable[[], float]
    progress: Callable[[], float]
    transport: Callable[[], WeightTransport] = FileTransport
    hang: Callable[[], Any] = lambda: None
    kill: Callable[[], Any] = lambda: None
    restart: Callable[[], Any] = lambda: None
    call_tokens: int = 450  # of 512
    reserved: int = 0
    renormalizes: bool = True
    measures: bool = True
    block_size: int | None = None

    @property
    def client(self) -> PolicyClient:
        return self.server.client

    def another_client(self) -> PolicyClient:
        """One of the same server, for another thread."""
        return PolicyClient(self.client.base_urls, api_key=self.client.api_key)

    def ask(self, method: str, path: str, **how: Any) -> requests.Response:
        """Send a request with the server's key, and return the answer as it is."""
        return self.client._sessions[0].request(method, f"{self.client.root_url}{path}", timeout=60.0, **how)

    def chat(self, messages: Sequence[Json], **body: Any) -> Json:
        return self.client.chat(messages=list(messages), timeout_s=120.0, **body)

    def message(self, messages: Sequence[Json], **body: Any) -> Json:
        return self.chat(messages, **body)["choices"][0]["message"]

    def turn(self, messages: Sequence[Json], **body: Any) -> ModelCall:
        """The only model call of a rollout, with its tokens."""
        self.chat(messages, **body)
        [call] = calls_of(self.client, body["trl_gym"])
        return call

    def served(self, parameter: str, messages: Sequence[Json], **body: Any) -> Json | None:
        """Return the answer to a request with a parameter that an engine may refuse.

        Args:
            parameter: As in `REFUSED`.
            messages, body: Of the request.

        Returns:
            None where the engine refuses it, with a 400 that names it, and where the stand-in does not have it.
        """
        if parameter in UNTESTED.get(self.name, ()):
            return None
        if parameter not in REFUSED[self.name]:
            return self.chat(messages, **body)
        with pytest.raises(PolicyResponseError, match=rf"HTTP 400: .*\b{parameter.split()[1]}\b"):
            self.chat(messages, **body)
        return None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.model)

    @cached_property
    def original(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.model).eval()

    def random(self, seed: int) -> PreTrainedModel:
        return random_like(self.model, seed)

    def sync(self, **options: Any) -> WeightSync:
        """What pushes a model into it, connected at its first push."""
        options = {"dtype": torch.float32, **options}
        return WeightSync(Accelerator(cpu=True), self.server, self.transport(), SyncOptions(**options))

    def push(self, model: torch.nn.Module, step: int) -> None:
        sync = self.sync()
        sync.push(model, step)
        sync.disconnect()


def vllm(request: pytest.FixtureRequest) -> Engine:
    """`trl-gym serve`, which the tests share."""
    server = request.getfixturevalue("served").server
    engine = _vllm(server, request.getfixturevalue("random_policy"))
    engine.block_size = server.client.server_config()["cache_config"]["block_size"]
    return engine


def mortal_vllm(request: pytest.FixtureRequest) -> Engine:
    """A `PolicyServer` that nobody needs afterwards."""
    server = request.getfixturevalue("untied_pair").policy
    engine = _vllm(server, request.getfixturevalue("untied_policy"))
    api_server = server_below(server._process)
    engine.hang = lambda: [child.suspend() for child in api_server.children()]
    engine.kill = lambda: [child.kill() for child in api_server.children()]
    return engine


def _vllm(server: PolicyServer, model: Path) -> Engine:
    def num_sampled() -> float:
        return vllm_metric(server.client, "generation_tokens_total")

    def num_running() -> float:
        return vllm_metric(server.client, "num_requests_running")

    return Engine("vllm", server, model, num_running=num_running, num_sampled=num_sampled, progress=num_sampled)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread: several would wait for each other, and for whoever else computes here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def transformers_served(folder: Path) -> Iterator[Engine]:
    """What `trl-gym serve --engine transformers` serves, in this process."""
    model, steps = AutoModelForCausalLM.from_pretrained(folder), []
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sampler = Sampler(SamplerOptions(max_model_len=MAX_MODEL_LEN), eos_token_ids=turn_ends(model, tokenizer))
    sampler.take(model)
    app = EngineApp(
        sampler,
        ChatRenderer(tokenizer, response_template=choose(folder).template),
        model_name="policy",
        weight_loader=ModelFiles(),
    )
    settings = Settings(api_keys=(API_KEY,), weight_transports=("file",))

    def fail(*_: Any) -> None:
        raise RuntimeError("killed by a test")

    with one_thread(), listening(OnPolicyMiddleware(app, settings)) as url, sampler.sampling():
        yield Engine(
            "transformers",
            PolicyServer.attach(url, api_key=API_KEY),
            folder,
            num_running=lambda: sampler.counters.running,
            num_sampled=lambda: sampler.counters.generation_tokens,
            progress=lambda: len(steps),
            kill=lambda: model.register_forward_pre_hook(fail),
            restart=lambda: sampler.take(model),
            call_tokens=200,
        )


@contextmanager
def sglang_stand_in(folder: Path) -> Iterator[Engine]:
    """What answers as SGLang does, and `trl-gym gateway` in front of it, in this process."""
    with behind_gateway(folder, max_model_len=MAX_MODEL_LEN, gateway_key=API_KEY) as (fake, url):
        yield Engine(
            "sglang",
            PolicyServer.attach(url, api_key=API_KEY),
            folder,
            num_running=lambda: len(fake.running),
            num_sampled=lambda: fake.num_generated,
            progress=lambda: fake.num_generated,
            kill=fake.die,
            call_tokens=100,
            reserved=6,
            renormalizes=False,
            measures=False,
        )


def transformers(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue("in_process")


def mortal_transformers(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue("in_process_to_kill")


def sglang(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue("stand_in")


def mortal_sglang(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue("stand_in_to_kill")


def logprobs_of(model: torch.nn.Module, call: ModelCall, temperature: float = 1.0) -> list[float]:
    """What a model gives to the sampled tokens of a call, as the trainer computes it, `[T]`."""
    if temperature == 1.0:
        [logprobs] = trainer_logprobs(model, [call.prompt_ids + call.generation_ids])
        return logprobs[len(call.prompt_ids) - 1 :]
    ids = torch.tensor([call.prompt_ids + call.generation_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(call.prompt_ids) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(call.prompt_ids) :, None])[:, 0].tolist()


def one_by_one(tokenizer: PreTrainedTokenizerBase, text: str, *, whole: Sequence[str] = ()) -> list[int]:
    """Token ids of a text, character by character, which is not how its tokenizer writes it; some words are whole."""
    for word in whole:
        before, found, after = text.partition(word)
        if found:
            [token] = tokenizer.encode(word, add_special_tokens=False)
            return [*one_by_one(tokenizer, before, whole=whole), token, *one_by_one(tokenizer, after, whole=whole)]
    return [token for character in text for token in tokenizer.encode(character, add_special_tokens=False)]


def taught(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> PreTrainedModel:
    """Train a model to say one answer to one prompt, until it would not say anything else."""
    with one_thread():
        _teach(model, prompt, answer)
    with torch.no_grad():
        model.model.norm.weight.mul_(4)  # four times the logits: else one answer of ten has another token somewhere
    return model.eval()


def _teach(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> None:
    ids = torch.tensor([prompt + answer])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 2e-3:
            return
    raise AssertionError(f"the model has not learned it: {loss}")


def prompt_of(tokenizer: PreTrainedTokenizerBase, messages: list[Json], tools: Any = None) -> list[int]:
    return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)


def said_ids(tokenizer: PreTrainedTokenizerBase, said: str = SAID) -> list[int]:
    return [*one_by_one(tokenizer, said, whole=MARKERS), tokenizer.eos_token_id]


def gap(engine: Engine, model: torch.nn.Module) -> float:
    return compare(trainer_logprobs(model, PROBE), engine.client.prompt_logprobs(PROBE)).mean_gap


def in_thread(pool: ThreadPoolExecutor, engine: Engine, *messages: Json, **body: Any) -> Future[Json]:
    client = engine.another_client()
    return pool.submit(client.chat, messages=list(messages) or [USER], timeout_s=120.0, **body)
