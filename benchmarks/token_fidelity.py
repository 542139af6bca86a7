"""How often does a multi-turn rollout drift, and what does it cost, with and without exact prompts?

    python benchmarks/token_fidelity.py [--rollouts 210] [--temperature 1.5] [--gym_python .gym-venv/bin/python]

Three environments, the real NeMo Gym, and the quickstart's small policy at a temperature at which it writes odd
tokens. The same rollouts are collected from

    stock     a stock vLLM server, NeMo Gym's own way to get token ids (`return_token_id_information`)
    gateway   `trl-gym gateway` in front of that server
    serve     `trl-gym serve`'s server, with the middleware in it

and compared: in how many multi-turn rollouts does a prompt not start with the tokens already seen, and how far are the
log-probabilities of a forward pass over the sequence that would be trained (all prompts' new tokens and all samples,
one after the other) from those that were sampled with?
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_gym import GymServers, PolicyServer
from trl_gym.policy_server.client import PolicyClient
from trl_gym.policy_server.command import DEFAULT_ENVIRONMENT
from trl_gym.processes import ChildProcess, bind_socket, wait_until
from trl_gym.responses import output_items
from trl_gym.rollout_options import RolloutOptions
from trl_gym.rollouts.admission import budgets_from_options
from trl_gym.rollouts.collector import RolloutCollector
from trl_gym.rollouts.ledger import Ledger
from trl_gym.rollouts.request import RolloutRequest, Sampling, stamp
from trl_gym.rollouts.trajectory import ModelCall, classify, contiguous_head, make_decoder, model_calls

ROOT = Path(__file__).resolve().parents[1]
CALCULATOR = ROOT / "recipes" / "environments" / "calculator"
UPSTREAM = ("example_multi_turn_gymnasium", "example_single_tool_call")
AGENTS = {
    "example_multi_turn_gymnasium": "example_multi_turn_gymnasium_agent",
    "example_single_tool_call": "example_single_tool_call_simple_agent",
}
MAX_MODEL_LEN = 1024
_COMPLETION_BUDGET = 400
_PER_CALL = 48  # tokens
_START_TIMEOUT_S = 400.0

Json = dict[str, Any]


@dataclass(slots=True)
class Outcome:
    """What came of the rollouts of one server.

    Attributes:
        num_rollouts: Collected.
        num_multi_turn: Of these, with two model calls or more.
        num_drifting: Of these, with a prompt that does not start with the tokens seen.
        num_odd: Multi-turn rollouts with a turn whose ids are not how the tokenizer writes its text.
        causes: Of the first drift of each.
        agents: Multi-turn rollouts per agent.
        gaps: Per sampled token after the first turn, |training - sampling| log-probability, in nats.
        failures: Texts of failed rollouts.
    """

    num_rollouts: int = 0
    num_multi_turn: int = 0
    num_drifting: int = 0
    num_odd: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    agents: Counter[str] = field(default_factory=Counter)
    gaps: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def flags() -> Json:
    """The policy server's; a stock server needs the last three said, `trl-gym serve` has them."""
    return {"dtype": "float32", "max-model-len": MAX_MODEL_LEN, "enforce-eager": True, "tool-call-parser": "hermes"}


@contextmanager
def stock_server(policy: Path, folder: Path) -> Iterator[str]:
    """A vLLM server as anybody would start it; gives its URL."""
    with bind_socket() as sock:
        port = sock.getsockname()[1]
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(policy), "--port", str(port)]
    argv += ["--served-model-name", "policy", "--host", "127.0.0.1", "--enable-auto-tool-choice"]
    argv += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs", "--disable-uvicorn-access-log"]
    for name, value in flags().items():
        argv += [f"--{name}", *([] if value is True else [str(value)])]
    # What trl-gym's entry point does for a small machine without a GPU.
    environment = {
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": DEFAULT_ENVIRONMENT["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"],
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_API_KEY": None,  # a key of this process's own servers: anybody may ask this one
    }
    argv += ["--distributed-executor-backend", "uni"]
    process = ChildProcess("stock vLLM", argv, log_path=folder / "stock.log", env=environment)
    try:
        url = f"http://127.0.0.1:{port}/v1"
        wait(process, url)
        yield url
    finally:
        process.stop()


@contextmanager
def gateway(upstream: str, folder: Path) -> Iterator[str]:
    """`trl-gym gateway` in front of a server; gives its URL."""
    argv = [sys.executable, "-m", "trl_gym.cli", "gateway", "--upstream", upstream, "--port", "0", "--no-key"]
    with (folder / "gateway.log").open("w") as log:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = process.stdout.readline()
        if not line.startswith("ready "):
            raise RuntimeError(f"the gateway did not start:\n{(folder / 'gateway.log').read_text()}")
        yield line.split()[1]
    finally:
        process.terminate()
        process.wait(20.0)


@contextmanager
def serving(policy: Path, folder: Path) -> Iterator[str]:
    """Our own server; gives its URL."""
    with PolicyServer(policy, vllm_args=flags(), log_dir=folder, api_key="") as server:
        yield server.base_url


def collect(url: str, policy: Path, folder: Path, options: argparse.Namespace, *, has_ledger: bool = True) -> Outcome:
    """Rollouts of all three environments from one server, and what is wrong with them."""
    configs = [CALCULATOR / "calculator.yaml", *(f"resources_servers/{n}/configs/{n}.yaml" for n in UPSTREAM)]
    with GymServers(configs, policy_base_url=url, python=options.gym_python, log_dir=folder) as gym:
        collector = RolloutCollector(
            gym.agent,
            budgets=budgets_from_options(RolloutOptions(deadline=300, max_inflight=64)),
            ledger=Ledger(url) if has_ledger else None,
        )
        try:
            requests = _requests(gym, options)
            results = collector.collect(requests, lambda result: result)
        finally:
            collector.close()
    return judge(results, policy, options.temperature)


def judge(results: Sequence[Any], policy: Path, temperature: float) -> Outcome:
    """Drift and log-probability gap of finished rollouts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype="float32").eval()
    decode = make_decoder(tokenizer)
    outcome = Outcome(num_rollouts=len(results))
    for result in results:
        if result.failure is not None:
            outcome.failures.append(f"{result.request.agent}: {result.failure.text}")
            continue
        calls = calls_in(result.answer) if result.records is None else model_calls(result.records)
        if len(calls) < 2:
            continue
        outcome.num_multi_turn += 1
        outcome.agents[result.request.agent] += 1
        outcome.num_odd += any(_is_odd(call.generation_ids, tokenizer) for call in calls[:-1])
        drift = contiguous_head(calls).drift
        if drift is not None:
            outcome.num_drifting += 1
            outcome.causes[str(classify(drift, decode))] += 1
        outcome.gaps += _gaps(model, calls, temperature)
    return outcome


def calls_in(answer: Json) -> list[ModelCall]:
    """The model calls of an answer whose token ids NeMo Gym has put into its items."""
    return [
        ModelCall(
            prompt_ids=item["prompt_token_ids"],
            generation_ids=item["generation_token_ids"],
            logprobs=item["generation_log_probs"],
        )
        for item in output_items(answer)
        if item.get("generation_token_ids")
    ]


def _is_odd(ids: list[int], tokenizer: Any) -> bool:
    return tokenizer(tokenizer.decode(ids, skip_special_tokens=False), add_special_tokens=False)["input_ids"] != ids


def _gaps(model: Any, calls: Sequence[ModelCall], temperature: float) -> list[float]:
    """Gaps of the later turns' tokens in the sequence that a trainer builds which does not look for drift."""
    import torch

    sequence = calls[0].prompt_ids + calls[0].generation_ids
    places: list[tuple[int, float]] = []
    for call in calls[1:]:
        sequence = sequence + call.prompt_ids[len(sequence) :]
        places += [(len(sequence) + index, logprob) for index, logprob in enumerate(call.logprobs)]
        sequence = sequence + call.generation_ids
    with torch.no_grad():
        logits = model(torch.tensor([sequence])).logits[0].float() / temperature
    logprobs = logits.log_softmax(-1)
    return [abs(logprobs[place - 1, sequence[place]].item() - sampled) for place, sampled in places]


def _requests(gym: GymServers, options: argparse.Namespace) -> list[RolloutRequest]:
    installation = next(Path(options.gym_python).absolute().parents[1].glob("lib/python*/site-packages"))
    follow_ups = installation / "resources_servers" / UPSTREAM[0] / "data" / "example.jsonl"
    questions = CALCULATOR / "data" / "example.jsonl"
    calculator = next(agent for agent in gym.agents if "calculator" in agent)
    # The third has other tools than the policy calls: it answers every call with an error, and the rollout goes on.
    sources = [(AGENTS[UPSTREAM[0]], follow_ups), (calculator, questions), (AGENTS[UPSTREAM[1]], questions)]
    rows = [[(agent, json.loads(line)) for line in file.read_text().splitlines()] for agent, file in sources]
    requests = []
    for number in range(options.rollouts):
        examples = rows[number % len(rows)]
        agent, row = examples[number // len(rows) % len(examples)]
        row = {**row, "agent_ref": {"type": "responses_api_agents", "name": agent}}
        identity = {"rollout_id": f"fidelity-{number}", "task_index": number, "member": 0}
        sampling = Sampling(temperature=options.temperature)
        stamped = stamp(row, **identity, sampling=sampling, completion_budget=_COMPLETION_BUDGET)
        stamped["responses_create_params"]["max_output_tokens"] = _PER_CALL
        requests.append(RolloutRequest(**identity, group=number, attempt=0, agent=agent, row=stamped))
    return requests


def wait(process: ChildProcess, url: str) -> None:
    """Return when a server answers."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    client = PolicyClient(url)
    while not client.health():
        if process.poll() is not None:
            raise RuntimeError(process.describe_death())
        if not wait_until(deadline):
            raise RuntimeError(f"{url} was not ready after {_START_TIMEOUT_S:g} s:\n{process.log_tail()}")


def show(kind: str, outcome: Outcome) -> None:
    drifting = outcome.num_drifting / max(outcome.num_multi_turn, 1)
    gaps = outcome.gaps or [float("nan")]
    print(
        f"{kind:8} {outcome.num_rollouts:8} {outcome.num_multi_turn:10} {outcome.num_odd:9} {drifting:8.1%} "
        f"{sum(gaps) / len(gaps):14.2e} {max(gaps):12.2e}  {dict(outcome.causes)}",
        flush=True,
    )
    for text, count in Counter(outcome.failures).most_common(3):
        print(f"         {count} failed: {text[:300]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=450)
    parser.add_argument("--temperature", type=float, default=1.5)
    parser.add_argument("--gym_python", default=str(ROOT / ".gym-venv" / "bin" / "python"))
    parser.add_argument("--servers", nargs="+", default=["stock", "gateway", "serve"])
    options = parser.parse_args()

    sys.path.insert(0, str(ROOT / "recipes"))
    from tiny_policy import build_tiny_policy

    policy = build_tiny_policy(ROOT / "runs" / "small_policy")
    folder = Path(tempfile.mkdtemp(prefix="trl-gym-benchmark-"))
    print("server   rollouts multi-turn odd turns  drifting  mean gap (nats)  largest gap  causes")
    if {"stock", "gateway"} & set(options.servers):
        with stock_server(policy, folder) as url:
            if "stock" in options.servers:
                show("stock", collect(url, policy, folder, options, has_ledger=False))
            if "gateway" in options.servers:
                with gateway(url, folder) as front:
                    show("gateway", collect(front, policy, folder, options))
    if "serve" in options.servers:
        with serving(policy, folder) as url:
            show("serve", collect(url, policy, folder, options))


if __name__ == "__main__":
    main()
