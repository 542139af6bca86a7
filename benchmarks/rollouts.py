"""How much of the engine's speed do rollouts get? Two-turn rollouts with everything, and the same calls without.

    .venv/bin/python benchmarks/rollouts.py [--rollouts 128] [--rounds 4] [--arms full,chat,raw] [--json FILE]

Starts vLLM with the quickstart's policy and NeMo Gym with the calculator. The arms take turns on them:

    full    what the trainer does: collector → Gym → middleware → vLLM, calls taken from the ledger, journal
    gym     the same without ledger and journal
    chat    the model calls of the rollouts of `full`, posted from here with the same tags: middleware → vLLM
    stock   these calls as plain chats, as a client that knows nothing of us posts them
    raw     the same prompts as token ids to /v1/completions, with log-probabilities and token ids in the answers
    bare    the same without either

Each samples as many tokens in as many calls. Compare `full` with `raw`: that is the share of the engine's speed
that is left (1 is all of it). `chat` tells how much of the rest is vLLM's chat route and our middleware, and not
Gym. Engine steps, and calls per step, show how well the engine batches.

Ours are the collector with ledger and journal (the process "client" in `full`) and the middleware. The middleware is
a part of the API server's process; its CPU seconds are measured in the server, around and inside of it (`Clock`).
The share is of the rollouts' CPU seconds: of a whole step, which also trains, it is less.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import os
import random
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from measure import CALCULATOR, ROOT, Clock, Counts, Spent, in_turns, machine, report, write_json

sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

Json = dict[str, Any]
ARMS = ("full", "gym", "chat", "stock", "raw", "bare")
CLOCK_PATH = "/benchmark/clock"
COMPLETION_BUDGET = 128
MAX_MODEL_LEN = 1024
_STEPS = re.compile(r"^vllm:iteration_tokens_total_(count|sum)\{.*\} (\S+)$", re.MULTILINE)


class MiddlewareClock:
    """ASGI, between our middleware and vLLM's application: both are timed, the difference is the middleware's own."""

    def __init__(self, app: Any) -> None:
        from trl_gym.policy_server.middleware.app import OnPolicyMiddleware

        self.app, self.inside, self.outside = app, Clock(), Clock()
        whole = OnPolicyMiddleware.__call__

        async def timed(middleware: Any, scope: Any, receive: Any, send: Any) -> None:
            await self.outside.timed(whole(middleware, scope, receive, send))

        OnPolicyMiddleware.__call__ = timed  # type: ignore[method-assign]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") != CLOCK_PATH:
            await self.inside.timed(self.app(scope, receive, send))
            return
        body = json.dumps({"seconds": self.outside.seconds - self.inside.seconds}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@dataclass
class Call:
    """A model call of a rollout, as it was."""

    prompt_ids: list[int]
    num_sampled: int
    messages: list[Json]  # the chat in front of it
    results: list[Json]  # what the environment said since the call before


def calls_of(rollout: Any) -> list[Call]:
    """Return the model calls of a rollout: tokens of its trajectory, text of Gym's answer."""
    from trl_gym.responses import completion_messages, model_call_indices

    items = rollout.answer["response"]["output"]
    history = list(rollout.request.row["responses_create_params"]["input"])
    fronts: list[list[Json]] = []
    results: list[list[Json]] = [[]]
    for item, index in zip(items, model_call_indices(items), strict=True):
        [message] = completion_messages([item])
        if index is None:
            message["tool_call_id"] = item["call_id"]
            results[-1].append(message)
        elif index == len(fronts):
            fronts.append(list(history))
            results.append([])
        for call in message.get("tool_calls", ()):
            call["id"] = item["call_id"]
        history.append(message)
    [trajectory] = rollout.trajectories
    calls = []
    begin, completion, mask = 0, trajectory.completion_ids, trajectory.env_mask
    for end, front, said in zip(trajectory.turn_ends, fronts, results, strict=False):
        start = mask.index(1, begin)
        calls.append(Call([*trajectory.prompt_ids, *completion[:start]], end - start, front, said))
        begin = end
    assert len(calls) == len(fronts) == trajectory.num_turns, items
    return calls


def load_rows(number: int) -> list[Json]:
    from tiny_policy import load_calculator_data

    return load_calculator_data().sample_rows(number, held_out=False, rng=random.Random(0))


@dataclass
class Replay:
    """Posts recorded calls to the server, those of a rollout one after another."""

    root_url: str
    api_key: str
    tools: list[Json]
    max_inflight: int
    num_played: int = 0
    common: Json = field(default_factory=lambda: {"model": "policy", "temperature": 1.0, "ignore_eos": True})

    def play(self, work: list[list[Call]], kind: str) -> float:
        """Return the seconds that all rollouts took."""
        self.num_played += 1
        return asyncio.run(self._play_all(work, getattr(self, f"_{kind}")))

    async def _play_all(self, work: list[list[Call]], one: Callable[..., Awaitable[None]]) -> float:
        connector = aiohttp.TCPConnector(limit=self.max_inflight)
        places = asyncio.Semaphore(self.max_inflight)
        headers = {"Authorization": f"Bearer {self.api_key}", "Content-Type": "application/json"}

        async def in_place(session: aiohttp.ClientSession, name: str, calls: list[Call]) -> None:
            async with places:
                await one(session, name, calls)

        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            started = time.perf_counter()
            names = (f"replay{self.num_played}-{index}" for index in itertools.count())
            await asyncio.gather(*(in_place(session, name, calls) for name, calls in zip(names, work, strict=False)))
            return time.perf_counter() - started

    async def _post(self, session: aiohttp.ClientSession, path: str, call: Call, body: Json) -> Json:
        body = {**self.common, "max_tokens": call.num_sampled, **body}
        async with session.post(self.root_url + path, data=json.dumps(body).encode()) as response:
            answer = json.loads(await response.read())
        assert response.status == 200, answer
        assert answer["usage"]["completion_tokens"] == call.num_sampled, (answer, call)
        return answer

    async def _chat(self, session: aiohttp.ClientSession, name: str, calls: list[Call]) -> None:
        """Go on from what is sampled now, by its handle, as Gym does."""
        from trl_gym.rollout_options import Sampling

        tag = {"rollout": name, "sampling": asdict(Sampling()), "completion_budget": COMPLETION_BUDGET}
        messages = list(calls[0].messages)
        for call in calls:
            messages += call.results
            body = {"messages": messages, "tools": self.tools, "trl_gym": tag, "logprobs": True}
            answer = await self._post(session, "/v1/chat/completions", call, {**body, "return_token_ids": True})
            said = answer["choices"][0]["message"]
            messages.append({key: value for key, value in said.items() if value is not None})

    async def _stock(self, session: aiohttp.ClientSession, _name: str, calls: list[Call]) -> None:
        asked = {"logprobs": True, "top_logprobs": 0, "return_token_ids": True}
        for call in calls:
            body = {"messages": call.messages, "tools": self.tools, "min_tokens": call.num_sampled, **asked}
            await self._post(session, "/v1/chat/completions", call, body)

    async def _raw(self, session: aiohttp.ClientSession, _name: str, calls: list[Call]) -> None:
        for call in calls:
            body = {"prompt": call.prompt_ids, "logprobs": 0, "return_token_ids": True}
            await self._post(session, "/v1/completions", call, body)

    async def _bare(self, session: aiohttp.ClientSession, _name: str, calls: list[Call]) -> None:
        for call in calls:
            await self._post(session, "/v1/completions", call, {"prompt": call.prompt_ids})


class Bench:
    """The arms on one pair of servers."""

    def __init__(self, server: Any, gym: Any, options: argparse.Namespace, folder: Path) -> None:
        self.server, self.gym, self.options = server, gym, options
        self.rows = load_rows(4 * options.rollouts)
        tools = self.rows[0]["responses_create_params"]["tools"]
        functions = [{key: tool[key] for key in ("name", "description", "parameters")} for tool in tools]
        self.replay = Replay(
            server.client.root_url,
            server.client.api_key,
            [{"type": "function", "function": function} for function in functions],
            options.max_inflight,
        )
        self.full, self.plain = self._collector(with_ledger=True), self._collector(with_ledger=False)
        self.finish = self._finisher(folder / "journal")
        self.num_batches = 0
        self.work: list[list[Call]] = []

    def _collector(self, *, with_ledger: bool) -> Any:
        from trl_gym.rollout_options import RolloutOptions
        from trl_gym.rollouts.admission import budgets_from_options
        from trl_gym.rollouts.collector import RolloutCollector
        from trl_gym.rollouts.ledger import Ledger
        from trl_gym.rollouts.request import PolicyAccess

        access = (self.server.base_urls, self.server.client.api_key)
        return RolloutCollector(
            self.gym.agent,
            budgets=budgets_from_options(RolloutOptions(deadline=280, max_inflight=self.options.max_inflight)),
            check=self.gym.check_process,
            agents_down=self.gym.agents_down,
            ledger=Ledger(*access) if with_ledger else None,
            access=PolicyAccess(*access),
        )

    def _finisher(self, journal: Path) -> Any:
        from trl_gym.rollouts.journal import Journal
        from trl_gym.rollouts.source import Finisher
        from trl_gym.rollouts.trajectory import from_calls

        return Finisher(
            build=lambda answer, request, calls: from_calls(calls),
            decode=str,
            journal=Journal(journal),
            drift_policy="truncate",
            mode="train",
            weight_version="0",
        )

    def requests(self) -> list[Any]:
        from trl_gym.rollouts.request import RolloutRequest, Sampling, stamp

        made, number = [], self.options.rollouts
        for index in range(number):
            identity = {"rollout_id": f"b{self.num_batches}-{index}-a0", "task_index": index, "member": 0}
            row = self.rows[(self.num_batches * number + index) % len(self.rows)]
            row = stamp(row, **identity, sampling=Sampling(), completion_budget=COMPLETION_BUDGET)
            made.append(RolloutRequest(**identity, group=0, attempt=0, agent=self.gym.sole_agent, row=row))
        self.num_batches += 1
        return made

    def run(self, arm: str) -> Counts:
        """Do an arm's work once, with an empty prefix cache."""
        self.server.client.reset_caches()
        before = self._server_counts()
        if arm in ("full", "gym"):
            collector, finish = (self.full, self.finish) if arm == "full" else (self.plain, lambda result: result)
            requests = self.requests()
            started = time.perf_counter()
            ended = collector.collect(requests, finish)
            if arm == "full":
                self.finish.journal.commit()
            seconds = time.perf_counter() - started
            assert all(one.failure is None for one in ended), next(one.failure for one in ended if one.failure)
            if arm == "full":
                self.work = [calls_of(rollout) for rollout in ended]
        else:
            seconds = self.replay.play(self.work, arm)
        counts = {"seconds": seconds, "rollouts": self.options.rollouts}
        if arm != "gym":  # whose calls nobody has counted
            counts["calls"] = sum(map(len, self.work))
            counts["tokens"] = sum(call.num_sampled for calls in self.work for call in calls)
        after = self._server_counts()
        return counts | {name: after[name] - before[name] for name in after}

    def _server_counts(self) -> Counts:
        """Return engine steps, the tokens that they computed, and the middleware's CPU seconds, so far."""
        client = self.server.client
        headers = {"Authorization": f"Bearer {client.api_key}"}

        async def ask() -> tuple[str, str]:
            async with aiohttp.ClientSession(headers=headers) as session:
                texts = []
                for path in ("/metrics", CLOCK_PATH):
                    async with session.get(client.root_url + path) as response:
                        texts.append(await response.text())
                return texts[0], texts[1]

        metrics, clock = asyncio.run(ask())
        steps = dict(_STEPS.findall(metrics))
        return {
            "engine_steps": float(steps.get("count", 0)),
            "engine_tokens": float(steps.get("sum", 0)),
            "middleware_s": json.loads(clock)["seconds"],
        }

    def close(self) -> None:
        self.full.close()
        self.plain.close()


@contextlib.contextmanager
def servers(options: argparse.Namespace, folder: Path) -> Iterator[tuple[Any, Any]]:
    """Start both servers as a training run does."""
    from tiny_policy import build_tiny_policy

    from trl_gym import GymServers, PolicyServer
    from trl_gym.policy_server.middleware.identity import gym_key

    flags = {"dtype": "float32", "max-model-len": MAX_MODEL_LEN, "enforce-eager": True, "max-num-seqs": 256}
    flags |= {"tool-call-parser": "hermes", "middleware": ["rollouts.MiddlewareClock"], **options.vllm_args}
    key = secrets.token_urlsafe(32)
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    policy = build_tiny_policy(ROOT / "runs" / "small_policy")
    with (
        PolicyServer(policy, vllm_args=flags, api_key=key, log_dir=folder, env={"PYTHONPATH": paths}) as server,
        GymServers(
            [CALCULATOR / "calculator.yaml"],
            policy_base_url=server.base_url,
            policy_api_key=gym_key(key, "error"),
            python=options.gym_python,
            log_dir=folder,
            **options.gym_args,
        ) as gym,
    ):
        yield server, gym


def batching(spent: dict[str, Spent]) -> None:
    print("\nengine")
    for name, one in spent.items():
        counts = one.counts
        if counts["calls"]:
            steps, per_rollout = counts["engine_steps"], 1 / counts["rollouts"]
            print(
                f"{name:10} {steps / len(one.seconds):7.0f} steps a round, {counts['tokens'] / max(1, steps):6.1f} "
                f"sampled tokens a step; {per_rollout * counts['calls']:.2f} calls and "
                f"{per_rollout * counts['tokens']:.1f} sampled tokens a rollout"
            )


def our_share(spent: dict[str, Spent]) -> None:
    full = spent["full"]
    client, middleware = full.cpu["client"], full.counts["middleware_s"]
    total = sum(full.cpu.values())
    per = 1000 / full.counts["rollouts"]
    print(
        f"\nours: {100 * (client + middleware) / total:.1f} % of the CPU of rollouts (collector, ledger, journal "
        f"{per * client:.2f} ms, middleware {per * middleware:.2f} ms of {per * total:.2f} ms a rollout)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=128, help="per round and arm")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--max_inflight", type=int, default=256)
    parser.add_argument("--arms", default=",".join(ARMS), help="full is always among them")
    parser.add_argument("--gym_python", default=None)
    parser.add_argument("--gym_args", type=json.loads, default={}, help="further arguments of `GymServers`, as JSON")
    parser.add_argument("--vllm_args", type=json.loads, default={}, help="further flags of the server, as JSON")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    names = list(dict.fromkeys(["full", *options.arms.split(",")]))
    folder = Path(tempfile.mkdtemp(prefix="trl-gym-benchmark-"))
    with servers(options, folder) as (server, gym), contextlib.closing(Bench(server, gym, options, folder)) as bench:
        arms = {name: functools.partial(bench.run, name) for name in names}
        for arm in arms.values():
            arm()  # warm up
        print(f"{machine()}; NeMo Gym {gym.gym_version}; {options.rounds} × {options.rollouts} rollouts", flush=True)
        spent = in_turns(arms, options.rounds)
    report(spent, "rollouts", "raw" if "raw" in spent else "full")
    batching(spent)
    our_share(spent)
    write_json(options.json, spent, rollouts=options.rollouts, gym=gym.gym_version)


if __name__ == "__main__":
    main()
