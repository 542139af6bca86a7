"""Rollouts per second of the trainer's way through NeMo Gym and of Gym's own way, with an engine that costs nothing.

    .venv/bin/python benchmarks/rollout_throughput.py                                         # two turns, both
    .venv/bin/python benchmarks/rollout_throughput.py --turns 30 --tokens 8000 --rollouts 16 --rounds 3
    .venv/bin/python benchmarks/rollout_throughput.py --arms ours --gym_processes 1,2 --turns 10 --rollouts 1024 \
        --max_inflight 1024 --rounds 2
    options: --gym_python .gym-venv/bin/python   --json FILE

    gym      `gym env start` (Ray, a process per server), rollouts by Gym's `RolloutCollectionHelper.run_examples`:
             what `gym eval run` and NeMo RL do. Its policy returns token ids, as training needs them.
    ours-N   N processes with all servers (`gym_mode: host`), rollouts by our collector, with all that the trainer
             adds: keys, the ledger's calls of each rollout, a line in the journal. Its policy is behind our
             middleware.

The environment is the calculator; the policy calls its tool in every turn but the last, and says as many tokens as
asked for. Both engines answer at once over real HTTP. The arms take turns.

Compare rollouts per second of `ours-1` with `gym`, and of `ours-2` with `ours-1`. Where the machine has no cores left
for a further process, rollouts per second cannot grow: what the busiest Gym process uses for a rollout tells what
would be possible. "Gym" is the CPU of all of its processes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from measure import CALCULATOR, ROOT, Counts, Spent, Trees, cpu_of, in_turns, machine, report, write_json

sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

Json = dict[str, Any]
NUM_WARM_UP = 32
TEXT = "abc "  # of a token
MAX_MODEL_LEN = 10**6
AGENT = "calculator_simple_agent"

# Runs in Gym's interpreter. Per batch: a line of JSON with its rows in, a line with its seconds out.
GYMS_COLLECTOR = """
import asyncio, json, sys, time
from nemo_gym.rollout_collection import RolloutCollectionHelper
from nemo_gym.server_utils import BaseServerConfig

async def collect(rows, head, max_inflight):
    num_done, started = 0, time.perf_counter()
    for future in RolloutCollectionHelper().run_examples(rows, head, asyncio.Semaphore(max_inflight)):
        row, result = await future
        assert isinstance(result["reward"], float), result
        num_done += 1
    assert num_done == len(rows)
    print(f"spent {time.perf_counter() - started}", flush=True)

async def main():
    host, port, max_inflight = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    head = BaseServerConfig(host=host, port=port)
    while line := await asyncio.to_thread(sys.stdin.readline):
        await collect(json.loads(line), head, max_inflight)

asyncio.run(main())
"""

# -- engines that cost nothing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Of a rollout."""

    num_turns: int
    num_tokens: int  # sampled in each turn

    def message(self, messages: list[Json], tools: list[Json]) -> Json:
        """Return what the policy says next."""
        from tests.gym.fake_policy import example_value

        said: Json = {"role": "assistant", "content": TEXT * self.num_tokens}
        if sum(message["role"] == "tool" for message in messages) + 1 < self.num_turns:
            function = tools[0]["function"]
            arguments = json.dumps(example_value(function["parameters"]))
            function = {"name": function["name"], "arguments": arguments}
            said["tool_calls"] = [{"id": f"call_{len(messages)}", "type": "function", "function": function}]
        return said


def serve_for_gym(size: Size) -> None:
    """Serve a policy that returns the token ids of each turn, as Gym has them; print its base URL."""
    from tests.gym.fake_policy import FakePolicy, prompt_ids

    def reply(body: Json) -> Json:
        policy.requests.clear()
        prompt = prompt_ids(body["messages"])
        ids = list(range(len(prompt), len(prompt) + size.num_tokens))
        bundle = {"prompt_token_ids": prompt, "generation_token_ids": ids, "generation_log_probs": [-0.5] * len(ids)}
        return {**size.message(body["messages"], body["tools"]), **bundle}

    policy = FakePolicy(reply=reply)

    async def serve() -> None:
        async with policy:
            print(policy.base_url, flush=True)
            await asyncio.Event().wait()

    asyncio.run(serve())


def serve_for_ours(size: Size) -> None:
    """Serve a policy behind our middleware; print its base URL."""
    import uvicorn
    from tiny_policy import CHAT_TEMPLATE

    from tests.policy_server.fake_vllm import END, FakeVllm
    from trl_gym.policy_server.middleware.app import OnPolicyMiddleware
    from trl_gym.processes import bind_socket

    def speak(answer: Json) -> None:
        _, asked = engine.requests[-1]
        engine.requests.clear()
        [choice] = answer["choices"]
        answer |= {"id": "chatcmpl-0", "object": "chat.completion", "created": 0}
        answer["usage"]["total_tokens"] = answer["usage"]["prompt_tokens"] + size.num_tokens
        for entry in choice["logprobs"]["content"]:
            entry |= {"bytes": [111], "top_logprobs": []}
        choice["message"] = size.message(asked["messages"], asked["tools"])
        choice["finish_reason"] = "tool_calls" if "tool_calls" in choice["message"] else "stop"

    engine = FakeVllm(
        max_model_len=MAX_MODEL_LEN,
        weight_version="0",
        reply=[*[ord("o")] * (size.num_tokens - 1), END],
        chat_template=CHAT_TEMPLATE,  # proves that chats can be rendered with short texts, as with most models
        change_answer=speak,
    )
    sock = bind_socket()
    print(f"http://127.0.0.1:{sock.getsockname()[1]}/v1", flush=True)
    config = uvicorn.Config(OnPolicyMiddleware(engine), log_level="warning", loop="uvloop", lifespan="off")
    uvicorn.Server(config).run([sock])


@contextlib.contextmanager
def engine(whose: str, options: argparse.Namespace) -> Iterator[str]:
    """Yield the base URL of an engine of its own."""
    size = ["--turns", str(options.turns), "--tokens", str(options.tokens)]
    command = [sys.executable, __file__, "--serve", whose, *size]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


# -- arms -------------------------------------------------------------------------------------------------------------


def load_rows() -> list[Json]:
    return [json.loads(line) for line in (CALCULATOR / "data" / "example.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def gym_servers(mode: str, base_url: str, options: argparse.Namespace, folder: Path, processes: int) -> Iterator[Any]:
    from trl_gym import GymServers
    from trl_gym.policy_server.middleware.identity import gym_key

    # Gym's agent stops after two turns by the calculator's config.
    overrides = {f"{AGENT}.responses_api_agents.simple_agent.max_steps": options.turns}
    more = {"processes": processes} if processes > 1 else {}
    with GymServers(
        [CALCULATOR / "calculator.yaml"],
        mode=mode,
        policy_base_url=base_url,
        policy_api_key=gym_key(None, "error"),
        python=options.gym_python,
        overrides=overrides,
        log_dir=folder / f"{mode}-{processes}",
        **more,
    ) as gym:
        yield gym


class Gyms:
    """Gym's own collector, in a process of Gym's interpreter."""

    def __init__(self, gym: Any, options: argparse.Namespace, folder: Path) -> None:
        head = urlsplit(gym.head_url)
        place = [head.hostname, str(head.port), str(options.max_inflight)]
        self._log = (folder / "collector.log").open("w")
        self._process = subprocess.Popen(
            [options.gym_python, "-c", GYMS_COLLECTOR, *place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._rows = load_rows()

    def run(self, number: int) -> Counts:
        rows = [
            {**self._rows[index % len(self._rows)], "_ng_task_index": index, "_ng_rollout_index": 0}
            for index in range(number)
        ]
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(rows) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:  # Gym prints, too
            if line.startswith("spent "):
                return {"seconds": float(line.split()[1]), "rollouts": number}
        raise SystemExit(f"Gym's collector ended; see {self._log.name}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


class Ours:
    """The trainer's collector, ledger and journal."""

    def __init__(self, gym: Any, base_url: str, options: argparse.Namespace, folder: Path) -> None:
        from trl_gym.rollout_options import RolloutOptions
        from trl_gym.rollouts.admission import budgets_from_options
        from trl_gym.rollouts.collector import RolloutCollector
        from trl_gym.rollouts.journal import Journal
        from trl_gym.rollouts.ledger import Ledger
        from trl_gym.rollouts.request import PolicyAccess
        from trl_gym.rollouts.source import Finisher
        from trl_gym.rollouts.trajectory import from_calls

        self._num_batches, self._rows, self._options = 0, load_rows(), options
        self._collector = RolloutCollector(
            gym.agent,
            budgets=budgets_from_options(RolloutOptions(deadline=600, max_inflight=options.max_inflight)),
            check=gym.check_process,
            agents_down=gym.agents_down,
            ledger=Ledger(base_url),
            access=PolicyAccess((base_url,)),
        )
        self._finish = Finisher(
            build=lambda answer, request, calls: from_calls(calls),
            decode=str,
            journal=Journal(folder / f"journal-{id(self)}"),
            drift_policy="error",
            mode="train",
            weight_version="0",
        )

    def run(self, number: int) -> Counts:
        requests = self._requests(number)
        started = time.perf_counter()
        ended = self._collector.collect(requests, self._finish)
        self._finish.journal.commit()
        seconds = time.perf_counter() - started
        failed = [one.failure for one in ended if one.failure is not None]
        assert not failed and len(ended) == number, failed[:3]
        turns = {len(one.counted) for one in ended}
        assert turns == {self._options.turns}, turns
        return {"seconds": seconds, "rollouts": number}

    def _requests(self, number: int) -> list[Any]:
        from trl_gym.rollouts.request import RolloutRequest, Sampling, stamp

        self._num_batches += 1
        made = []
        for index in range(number):
            identity = {"rollout_id": f"b{self._num_batches}-{index}-a0", "task_index": index, "member": 0}
            row = self._rows[index % len(self._rows)]
            row = stamp(row, **identity, sampling=Sampling(), completion_budget=MAX_MODEL_LEN)
            made.append(RolloutRequest(**identity, group=0, attempt=0, agent=AGENT, row=row))
        return made

    def close(self) -> None:
        self._collector.close()
        self._finish.journal.close()


class Busiest:
    """Runs an arm and counts the CPU seconds of the busiest of its Gym processes."""

    def __init__(self, arm: Any, trees: Trees, name: str, number: int) -> None:
        self.arm, self.number = arm, number
        self.processes = trees.processes(name)

    def __call__(self) -> Counts:
        before = [cpu_of(process) for process in self.processes]
        counts = self.arm.run(self.number)
        used = [cpu_of(process) - then for process, then in zip(self.processes, before, strict=True)]
        return counts | {"busiest_s": max(used)}


def run(options: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="trl-gym-benchmark-"))
    trees, arms = Trees(), {}
    roles: dict[str, dict[str, str]] = {}  # of each arm: its process trees → what to call them
    with contextlib.ExitStack() as stack:
        start = stack.enter_context
        for name, processes in named_arms(options):
            whose = name.partition("-")[0]
            base_url = start(engine(whose, options))
            trees.name_new(f"{name} engine")
            mode = "upstream" if whose == "gym" else "host"
            gym = start(gym_servers(mode, base_url, options, folder, processes))
            trees.name_new(f"{name} Gym")
            make = Gyms(gym, options, folder) if whose == "gym" else Ours(gym, base_url, options, folder)
            arm = start(contextlib.closing(make))
            trees.name_new(f"{name} client")
            roles[name] = {f"{name} {part}": part for part in ("engine", "Gym", "client")} | {
                "client": "" if whose == "gym" else "client"
            }
            arm.run(NUM_WARM_UP)
            arms[name] = Busiest(arm, trees, f"{name} Gym", options.rollouts)
        size = f"{options.turns} turns, {options.turns * options.tokens} sampled tokens"
        print(f"{machine()}; NeMo Gym {gym.gym_version}; {options.rounds} × {options.rollouts} rollouts of {size}")
        spent = in_turns(arms, options.rounds, cpu=trees)
    for name, one in spent.items():
        named = {roles[name].get(tree, ""): seconds for tree, seconds in one.cpu.items()}
        one.cpu.clear()
        one.cpu.update({role: seconds for role, seconds in named.items() if role})
    tell(spent)
    write_json(options.json, spent, turns=options.turns, tokens=options.tokens, gym=gym.gym_version)


def named_arms(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return the arms that were asked for, with their number of Gym processes."""
    arms = [("gym", 1)] if "gym" in options.arms.split(",") else []
    if "ours" in options.arms.split(","):
        arms += [(f"ours-{number}", number) for number in map(int, options.gym_processes.split(","))]
    return arms


def tell(spent: dict[str, Spent]) -> None:
    first = next(iter(spent))
    report(spent, "rollouts", first)
    print("\nthe busiest Gym process")
    theirs = spent[first].counts["busiest_s"] / spent[first].counts["rollouts"]
    for name, one in spent.items():
        own = one.counts["busiest_s"] / one.counts["rollouts"]
        print(f"{name:10} {1000 * own:.2f} CPU ms a rollout; {first} uses {theirs / own:.2f} times as much")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=200, help="per round and arm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=2, help="model calls of a rollout")
    parser.add_argument("--tokens", type=int, default=24, help="that a rollout samples")
    parser.add_argument("--max_inflight", type=int, default=256)
    parser.add_argument("--arms", default="gym,ours")
    parser.add_argument("--gym_processes", default="1", help="of `ours`; several with commas")
    parser.add_argument("--gym_python", default=str(ROOT / ".gym-venv" / "bin" / "python"))
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--serve", choices=["gym", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is None:
        options.tokens = max(1, options.tokens // options.turns)
        run(options)
        return
    serve = functools.partial(Size, options.turns, options.tokens)
    (serve_for_gym if options.serve == "gym" else serve_for_ours)(serve())


if __name__ == "__main__":
    main()
