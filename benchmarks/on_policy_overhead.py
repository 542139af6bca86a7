"""What do exact prompts cost? Seconds, bytes and CPU seconds of whole rollouts, in three ways on one server.

    python benchmarks/on_policy_overhead.py [--turns 2 10 30] [--tokens 16000] [--max_tokens 32] [--repeats 3]
                                            [--concurrency 64] [--only_middleware]

First the middleware alone: CPU milliseconds per call of turns with a handle, around a fake server in process whose own
time is left out; half of the tokens are sampled, with `logprobs` as vLLM writes them. No socket, no engine.

One stock vLLM server runs with the middleware; a second middleware in front (`Bypass`, below) leads requests with the
header `x-stock` around it. Each rollout is played by turns

    stock    around the middleware, with plain messages
    full     with the token ids of every earlier turn in the messages, as a client without a tag sends them
    slim     with a tag and a handle in each message, as training does

The policy may sample one letter only, so that stock tokenizes its answers as they were sampled: the prompts that reach
the engine are equal token by token (checked), and so is what it has cached. Seconds are those of all model calls,
request bytes those between NeMo Gym and policy server, CPU seconds those of the API server's process, which the
middleware is part of, and of the engine's; the journal's line is written by the journal. Ratios are to "stock", those
of the journal to "full". At last as many rollouts of two short turns as `--concurrency` says are played at the same
time, from threads: CPU milliseconds per call. Quote ratios, not milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.policy_server.fake_vllm import END, FakeVllm
from tests.policy_server.tiny_model import build_random_policy
from trl_gym.policy_server.command import DEFAULT_ENVIRONMENT
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings
from trl_gym.policy_server.middleware.ledger import Taken
from trl_gym.processes import ChildProcess, bind_socket
from trl_gym.rollouts.journal import Journal
from trl_gym.rollouts.ledger import TAKE_PATH
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.rollout import Rollout, journal_record
from trl_gym.rollouts.trajectory import ModelCall, from_calls, model_calls

Json = dict[str, Any]
_STOCK = "x-stock"
_START_TIMEOUT_S = 300.0
_SENTENCE = "The sum of 12 and 90 is 102. What is 47 + 36? "
_LETTER = "Q"
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
_KINDS = ("stock", "full", "slim")
_IDS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")


# -- the middleware alone ---------------------------------------------------------------------------------------------


class Untimed:
    """ASGI; an application whose CPU time is left out."""

    def __init__(self, app: FakeVllm) -> None:
        self.app, self.seconds = app, 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        started = time.process_time()
        body = (await receive())["body"] if scope["method"] == "POST" else b""
        status, payload = self.app.answer(scope["path"], body)
        answer = json.dumps(payload).encode()
        self.app.requests.clear()
        self.seconds += time.process_time() - started
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


async def post_in_process(app: Any, body: bytes) -> Json:
    pending, sent = [body], []

    async def receive() -> Any:
        if not pending:
            await asyncio.Event().wait()  # the client does not hang up
        return {"type": "http.request", "body": pending.pop(), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}
    await app(scope, receive, send)
    assert sent[0]["status"] == 200, sent[1]["body"][:300]
    return json.loads(sent[1]["body"])


async def middleware_ms(num_turns: int, num_tokens: int, repeats: int) -> tuple[float, float]:
    """CPU milliseconds of a call in the middleware, and of a rollout's last one: medians over rollouts."""
    rng, per_turn = random.Random(0), max(1, num_tokens // num_turns // 2)

    def as_vllm(answer: Json) -> None:
        for entry in answer["choices"][0]["logprobs"]["content"]:
            entry |= {"bytes": [100], "top_logprobs": [], "logprob": -rng.expovariate(2.0)}

    reply = [300 + index % 100 for index in range(per_turn - 1)] + [END]
    template = (
        "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    inner = Untimed(FakeVllm(max_model_len=10**6, reply=reply, change_answer=as_vllm, chat_template=template))
    app = OnPolicyMiddleware(inner, Settings())
    means, lasts = [], []
    for repeat in range(repeats + 2):  # the first two warm up
        messages: list[Json] = [{"role": "user", "content": "a" * per_turn}]
        times = []
        for _ in range(num_turns):
            tag = {"rollout": f"r{repeat}", "sampling": {"temperature": 1.0}, "completion_budget": 10**6}
            asked = {"logprobs": True, "top_logprobs": 0, "return_tokens_as_token_ids": True}  # as Gym asks
            body = json.dumps({"model": "policy", "messages": messages, **asked, "trl_gym": tag}).encode()
            inner.seconds, started = 0.0, time.process_time()
            answer = await post_in_process(app, body)
            times.append(time.process_time() - started - inner.seconds)
            messages += [answer["choices"][0]["message"], {"role": "user", "content": "b" * per_turn}]
        means.append(statistics.mean(times))
        lasts.append(times[-1])
    return 1e3 * statistics.median(means[2:]), 1e3 * statistics.median(lasts[2:])


def print_middleware(repeats: int) -> None:
    print("middleware alone, CPU ms per call:   turns tokens    mean    last")
    for num_turns, num_tokens in ((2, 500), (2, 8000), (10, 8000), (30, 16_000), (60, 32_000)):
        mean, last = asyncio.run(middleware_ms(num_turns, num_tokens, repeats))
        print(f"{'':37}{num_turns:5} {num_tokens:6} {mean:7.2f} {last:7.2f}", flush=True)


# -- on a server ------------------------------------------------------------------------------------------------------


class Bypass:
    """ASGI; around the middleware that it wraps, for requests that ask for it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        stock = any(key == _STOCK.encode() for key, _ in scope.get("headers", ()))
        await (self.app.app if stock else self.app)(scope, receive, send)


class Server:
    """A stock vLLM server with both middlewares, on a random policy of 0.3 M parameters."""

    def __init__(self, folder: Path, max_model_len: int) -> None:
        model = build_random_policy(folder / "model")
        with bind_socket() as sock:
            self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        port = self.url.rpartition(":")[2]
        flags = ["--port", port, "--max-model-len", str(max_model_len), "--served-model-name", "policy"]
        flags += ["--enforce-eager", "--dtype", "float32", "--generation-config", "vllm", "--host", "127.0.0.1"]
        flags += ["--hf-overrides", json.dumps({"max_position_embeddings": max_model_len})]
        flags += ["--disable-uvicorn-access-log", "--enable-prompt-tokens-details", "--enable-tokenizer-info-endpoint"]
        flags += ["--middleware", "trl_gym.policy_server.middleware.app.OnPolicyMiddleware"]
        flags += ["--middleware", "on_policy_overhead.Bypass"]
        environment = {**DEFAULT_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *flags]
        self.process = ChildProcess("vLLM", command, log_path=folder / "vllm.log", env=environment)
        self.session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=256)  # for threads
        self.session.mount("http://", adapter)
        self._lengths: dict[str, int] = {}

    def wait(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise SystemExit(self.process.describe_death())
            try:
                self.post("/tokenize", {"prompt": "0"})
                return
            except requests.ConnectionError:
                time.sleep(0.5)
        raise SystemExit(f"not ready after {_START_TIMEOUT_S:g} s:\n{self.process.log_tail()}")

    def cpu_seconds(self) -> tuple[float, float]:
        """CPU seconds so far, of the API server's process and of the engine's."""
        [supervisor] = psutil.Process(self.process.pid).children()
        [api] = supervisor.children()
        seconds = [sum(process.cpu_times()[:2]) for process in (api, *api.children(recursive=True))]
        return seconds[0], sum(seconds[1:])

    def num_tokens(self, text: str) -> int:
        if text not in self._lengths:
            self._lengths[text] = len(self.post("/tokenize", {"prompt": text})["tokens"])
        return self._lengths[text]

    @functools.cached_property
    def letter(self) -> int:
        """The one token that the policy may sample."""
        [token] = self.post("/tokenize", {"prompt": _LETTER})["tokens"]
        return token

    def post(self, path: str, body: Json | bytes, *, stock: bool = False) -> Any:
        """Return the JSON of an answer, or its bytes if it is something else."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **({_STOCK: "1"} if stock else {})}
        answer = self.session.post(self.url + path, data=raw, headers=headers)
        if answer.status_code != 200:
            raise SystemExit(f"{path}: HTTP {answer.status_code}: {answer.text}")
        is_json = answer.headers.get("Content-Type", "").startswith("application/json")
        return answer.json() if is_json else answer.content


@dataclass(frozen=True)
class Size:
    """Of a rollout."""

    num_turns: int
    num_tokens: int  # about, of the last prompt
    max_tokens: int  # sampled in each turn


@dataclass
class Played:
    """One rollout."""

    messages: list[Json] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    calls: list[ModelCall] = field(default_factory=list)
    seconds: float = 0.0
    request_bytes: int = 0
    ledger_bytes: int = 0  # of what the trainer takes when it has ended
    api_s: float = 0.0
    engine_s: float = 0.0


def play(server: Server, kind: str, name: str, size: Size, *, is_alone: bool = True) -> Played:
    num_repeats = (size.num_tokens // size.num_turns - size.max_tokens - 20) // server.num_tokens(_SENTENCE)
    assert server.num_tokens(_LETTER * size.max_tokens) == size.max_tokens, "the tokenizer joins letters"
    common = {
        "model": "policy",
        "max_tokens": size.max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "logprobs": True,
    }
    common["allowed_token_ids"] = [server.letter]
    more: dict[str, Json] = {
        "stock": {"return_token_ids": True, "top_logprobs": 0},
        "full": {},
        "slim": {"trl_gym": {"rollout": name}},  # pinned parameters would leave `allowed_token_ids` out
    }
    if is_alone:
        server.post("/reset_prefix_cache", b"")
    played, before = Played(), server.cpu_seconds()
    for turn in range(size.num_turns):
        played.messages.append({"role": "user", "content": f"{name} {turn} " + _SENTENCE * max(1, num_repeats)})
        raw = json.dumps({**common, **more[kind], "messages": played.messages}).encode()
        played.request_bytes += len(raw)
        started = time.perf_counter()
        answer = server.post("/v1/chat/completions", raw, stock=kind == "stock")
        played.seconds += time.perf_counter() - started
        message = answer["choices"][0]["message"]
        played.messages.append({key: message[key] for key in ("role", "content", *_IDS) if key in message})
        played.prompts.append(answer["prompt_token_ids"] if kind == "stock" else message["prompt_token_ids"])
        if kind == "full":
            tokens = dict(zip(("prompt_ids", "generation_ids", "logprobs"), map(message.get, _IDS), strict=True))
            played.calls.append(ModelCall(**tokens, index=turn, parent=turn - 1 if turn else None, handle=0, said=()))
    if kind == "slim":
        taken = server.post(TAKE_PATH, {"rollouts": [name]})
        played.ledger_bytes = len(taken)
        played.calls = model_calls(msgspec.msgpack.decode(taken, type=Taken).rollouts[name] or [])
        played.prompts = [call.prompt_ids for call in played.calls]
    played.api_s, played.engine_s = (now - then for now, then in zip(server.cpu_seconds(), before, strict=True))
    return played


def journal_bytes(played: Played, folder: Path) -> int:
    """Bytes of the rollout's line in the journal."""
    output = [
        {**message, "type": "message", "content": [{"type": "output_text", "text": message["content"]}]}
        for message in played.messages
    ]
    rollout = Rollout(
        request=RolloutRequest(
            rollout_id="r1",
            task_index=0,
            group=0,
            member=0,
            attempt=0,
            agent="agent",
            row={"responses_create_params": {"input": output[:1]}},
        ),
        answer={"reward": 1.0, "response": {"id": "resp_1", "model": "policy", "output": output}},
        failure=None,
        trajectories=from_calls(played.calls),
        seconds=1.0,
    )
    journal = Journal(folder)
    journal.append(journal_record(rollout, mode="train", weight_version="1"))
    journal.close()
    return sum(path.stat().st_size for path in folder.rglob("*.jsonl"))


def line(server: Server, size: Size, repeats: int) -> str:
    """Play rollouts of all kinds by turns; return medians."""
    rollouts: dict[str, list[Played]] = {kind: [] for kind in _KINDS}
    for repeat, kind in itertools.product(range(repeats), _KINDS):
        rollouts[kind].append(play(server, kind, f"{size.num_turns}x{repeat}", size))
        assert rollouts[kind][-1].prompts == rollouts["stock"][-1].prompts, "the prompts differ"

    def of(kind: str, name: str) -> float:
        return statistics.median(getattr(played, name) for played in rollouts[kind])

    def against(name: str, scale: float, digits: int) -> str:
        values = [of(kind, name) for kind in _KINDS]
        shown = " ".join(f"{value / scale:7.{digits}f}" for value in values)
        return f"{shown} {values[1] / values[0]:6.2f} {values[2] / values[0]:6.2f}"

    with tempfile.TemporaryDirectory() as folder:
        lines = [journal_bytes(rollouts[kind][0], Path(folder) / kind) for kind in ("full", "slim")]
    return " | ".join(
        [
            f"{size.num_turns:5} {len(rollouts['slim'][0].prompts[-1]):6}",
            against("seconds", 1, 2),
            against("request_bytes", 1000, 0),
            against("api_s", 1, 2),
            against("engine_s", 1, 2),
            f"{lines[0] / 1000:7.0f} {lines[1] / 1000:7.0f} {lines[1] / lines[0]:6.2f}",
            f"{of('slim', 'ledger_bytes') / 1000:6.0f}",
        ]
    )


def print_crowd(server: Server, num_rollouts: int, repeats: int) -> None:
    """Play many short rollouts at the same time, of each kind in turns."""
    size = Size(num_turns=2, num_tokens=500, max_tokens=32)
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in _KINDS}
    for repeat, kind in itertools.product(range(repeats), _KINDS):
        server.post("/reset_prefix_cache", b"")
        before = server.cpu_seconds()
        with ThreadPoolExecutor(num_rollouts) as pool:
            names = [f"{kind}-{repeat}-{index}" for index in range(num_rollouts)]
            list(pool.map(lambda name, kind=kind: play(server, kind, name, size, is_alone=False), names))
        spent = [1e3 * (now - then) for now, then in zip(server.cpu_seconds(), before, strict=True)]
        found[kind].append((spent[0] / num_rollouts / size.num_turns, spent[1] / num_rollouts / size.num_turns))
    print(f"{num_rollouts} rollouts of 2 turns and 500 tokens at the same time, CPU ms per call:")
    for place, process in enumerate(("API server", "engine")):
        values = [statistics.median(own[place] for own in found[kind]) for kind in _KINDS]
        shown = " ".join(f"{kind} {value:.2f}" for kind, value in zip(_KINDS, values, strict=True))
        ratios = f"full / stock {values[1] / values[0]:.2f}   slim / stock {values[2] / values[0]:.2f}"
        print(f"  {process:11} {shown}   {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 10, 30])
    parser.add_argument("--tokens", type=int, default=16_000, help="of the last turn's prompt")
    parser.add_argument("--max_tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--only_middleware", action="store_true")
    options = parser.parse_args()
    print_middleware(options.repeats)
    if options.only_middleware:
        return
    groups = ("seconds", "request kB", "CPU s, API server", "CPU s, engine")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), max_model_len=options.tokens + 2000)
        try:
            server.wait()
            for kind in _KINDS:  # the first calls of a server are slow
                play(server, kind, "warm", Size(2, 1000, 8))
            kinds = f"{'stock':>7} {'full':>7} {'slim':>7} {'full':>6} {'slim':>6}"
            print(" | ".join([" " * 12, *(f"{group:37}" for group in groups), f"{'journal kB':22}", "ledger"]))
            print(" | ".join(["turns tokens", *[kinds] * 4, f"{'full':>7} {'slim':>7} {'ratio':>6}", "    kB"]))
            for num_turns in options.turns:
                print(line(server, Size(num_turns, options.tokens, options.max_tokens), options.repeats), flush=True)
            print_crowd(server, options.concurrency, options.repeats)
        finally:
            server.process.stop()


if __name__ == "__main__":
    main()
