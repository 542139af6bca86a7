"""What do exact prompts cost? Latency of a turn with the middleware against the same server without it.

    python benchmarks/on_policy_overhead.py [--turns 1 10 30] [--tokens 8000] [--calls 30] [--max_tokens 32]

One stock vLLM server runs with the middleware; a second middleware in front (`Bypass`, below) leads requests with the
header `x-stock` around it. Both get the same chat by turns, stock as plain messages, ours as NeMo Gym sends it: tagged
and with the whole prompt's token ids on every assistant message. The prompts that reach the engine are equal token by
token (checked), and so is what it has cached. Quote the ratio, not the milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.policy_server.tiny_model import build_random_policy
from trl_gym.policy_server.command import DEFAULT_ENVIRONMENT
from trl_gym.processes import ChildProcess, bind_socket

Json = dict[str, Any]
_STOCK = "x-stock"
_START_TIMEOUT_S = 300.0


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
        flags += ["--disable-uvicorn-access-log", "--enable-prompt-tokens-details"]
        flags += ["--middleware", "trl_gym.policy_server.middleware.app.OnPolicyMiddleware"]
        flags += ["--middleware", "on_policy_overhead.Bypass"]
        environment = {**DEFAULT_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *flags]
        self.process = ChildProcess("vLLM", command, log_path=folder / "vllm.log", env=environment)
        self.session = requests.Session()

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

    def post(self, path: str, body: Json | bytes, *, stock: bool = False) -> Json:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **({_STOCK: "1"} if stock else {})}
        answer = self.session.post(self.url + path, data=raw, headers=headers)
        if answer.status_code != 200:
            raise SystemExit(f"{path}: HTTP {answer.status_code}: {answer.text}")
        return answer.json()


def conversation(server: Server, num_turns: int, num_tokens: int) -> list[Json]:
    """A chat before its turn `num_turns`, of about `num_tokens` tokens, with bundles on the assistant messages."""
    sentence = "The sum of 12 and 90 is 102. What is 47 + 36? "
    per_sentence = len(server.post("/tokenize", {"prompt": sentence})["tokens"])
    repeats = max(1, num_tokens // num_turns // per_sentence - 3)
    messages: list[Json] = []
    for turn in range(num_turns):
        messages.append({"role": "user", "content": f"{turn} " + sentence * repeats})
        if turn == num_turns - 1:
            return messages
        answer = {"role": "assistant", "content": "one two three four five six seven eight nine ten " * 3 + str(turn)}
        plain = [{key: m[key] for key in ("role", "content")} for m in messages]
        prompt = server.post("/tokenize", {"messages": plain})["tokens"]
        closed = {"messages": [*plain, answer], "add_generation_prompt": False}
        sampled = server.post("/tokenize", closed)["tokens"][len(prompt) : -1]  # without the newline after the end
        bundle = {"prompt_token_ids": prompt, "generation_token_ids": sampled, "generation_log_probs": [-0.123456789]}
        bundle["generation_log_probs"] *= len(sampled)
        messages.append({**answer, **bundle})
    raise AssertionError("unreachable")


def measure(server: Server, messages: list[Json], num_calls: int, max_tokens: int) -> tuple[list[float], list[float]]:
    """Seconds of stock and of our calls, taken by turns."""
    common = {"model": "policy", "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    plain = [{key: m[key] for key in ("role", "content")} for m in messages]
    stock = {**common, "messages": plain, "logprobs": True, "top_logprobs": 0, "return_token_ids": True}
    ours = {**common, "messages": messages, "logprobs": True}
    seconds: tuple[list[float], list[float]] = ([], [])
    for call in range(num_calls + 3):
        prompts = []
        for index, body in enumerate((stock, ours)):
            if index:  # three rollouts: the template has proved itself then, as it has after the first step of a run
                body = {**body, "trl_gym": {"rollout": f"r{call}", "sampling": {"temperature": 0.0}}}
            raw = json.dumps(body).encode()  # the client's work, not the server's
            started = time.perf_counter()
            answer = server.post("/v1/chat/completions", raw, stock=not index)
            if call >= 3:
                seconds[index].append(time.perf_counter() - started)
            prompts.append(answer["choices"][0]["message"].get("prompt_token_ids") or answer["prompt_token_ids"])
        assert prompts[0] == prompts[1], "the two prompts differ"
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 10, 30])
    parser.add_argument("--tokens", type=int, default=8000, help="of the prompt of the last turn")
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--max_tokens", type=int, nargs="+", default=[32, 128])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), max_model_len=2 * options.tokens)
        try:
            server.wait()
            print("turns  prompt tokens  sampled   stock ms   ours ms   added ms   ours/stock")
            for num_turns in options.turns:
                messages = conversation(server, num_turns, options.tokens * num_turns // max(options.turns))
                plain = [{key: m[key] for key in ("role", "content")} for m in messages]
                num_tokens = len(server.post("/tokenize", {"messages": plain})["tokens"])
                for max_tokens in options.max_tokens:
                    stock, ours = map(statistics.median, measure(server, messages, options.calls, max_tokens))
                    print(
                        f"{num_turns:5}  {num_tokens:13}  {max_tokens:7}  {stock * 1e3:9.1f}  {ours * 1e3:8.1f}  "
                        f"{(ours - stock) * 1e3:9.1f}  {ours / stock:11.3f}",
                        flush=True,
                    )
        finally:
            server.process.stop()


if __name__ == "__main__":
    main()
