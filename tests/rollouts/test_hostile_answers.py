"""Answers of agents as no agent should answer, over real HTTP, through all that the trainer does with a rollout.

One odd answer is one failed rollout in the journal, or a sample where it is legal, and never the end of its siblings.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from tests.rollouts.fake_agent import Ledger
from tests.rollouts.sampled import records_of
from trl_gym.gym.discovery import AgentInfo
from trl_gym.rollout_options import Sampling
from trl_gym.rollouts.admission import Budget, Budgets
from trl_gym.rollouts.batch import checked_rewards, table_columns
from trl_gym.rollouts.collector import RolloutCollector
from trl_gym.rollouts.journal import Journal, read_journal
from trl_gym.rollouts.metrics import completion_metrics, rollout_metrics
from trl_gym.rollouts.request import RolloutRequest, stamp
from trl_gym.rollouts.rollout import Rollout, conversation, facts_of, from_record
from trl_gym.rollouts.rows import rows_of, training_rows
from trl_gym.rollouts.source import Finisher
from trl_gym.rollouts.trajectory import from_calls

Json = dict[str, Any]
_GOOD = "good"


def item(**changes: Any) -> Json:
    tokens = {"prompt_token_ids": [1, 2, 3], "generation_token_ids": [4, 5], "generation_log_probs": [-0.5, -0.25]}
    content = [{"type": "output_text", "text": "hi"}]
    return {"type": "message", "role": "assistant", "content": content, **tokens, **changes}


def answer(*output: Any, **changes: Any) -> str:
    response = {"output": list(output) or [item()], "incomplete_details": None}
    return json.dumps({"responses_create_params": {"input": []}, "reward": 1.0, "response": response, **changes})


def deep(num: int) -> str:
    return "[" * num + "]" * num


def with_value(value: str, **changes: Any) -> str:
    """An answer with `"@"` replaced by JSON that `json.dumps` would not write."""
    return answer(**changes).replace('"@"', value)


HUGE = "9" * 400
# What the agent answers with status 200, and words of the failure; None where it is a sample.
BODIES: dict[str, tuple[str | bytes, str | None]] = {
    _GOOD: (answer(), None),
    "html": ("<html>oops</html>", "not JSON"),
    "empty": ("", "not JSON"),
    "a list": ("[1,2]", "not a JSON object"),
    "invalid utf-8": (b'{"reward":1,"x":"\xff\xfe"}', "not JSON"),
    "reward is text": (answer(reward="1.0"), "`reward` is '1.0'"),
    "reward is true": (answer(reward=True), "`reward` is True"),
    "reward is infinite": (with_value("1e400", reward="@"), "`reward` is inf"),
    "reward is NaN": (with_value("NaN", reward="@"), "`reward` is nan"),
    "reward beyond float32": (answer(reward=1e308), "`reward` is 1e+308"),
    "reward beyond float64": (with_value(HUGE, reward="@"), "`reward` is 999"),
    "reward of 5,000 digits": (with_value("9" * 5000, reward="@"), "not JSON"),
    "100,000 levels": (with_value(deep(100_000), x="@"), "200 levels"),
    "900 levels": (with_value(deep(900), x="@"), "200 levels"),
    "190 levels": (with_value(deep(190), x="@"), None),
    "no response": ('{"reward": 1}', "$.response"),
    "response is null": (answer(response=None), "$.response"),
    "response is text": (answer(response="oops"), "$.response"),
    "response is a list": (answer(response=[1]), "$.response"),
    "output is text": (answer(response={"output": "oops"}), "$.response.output"),
    "output is an object": (answer(response={"output": {"a": 1}}), "$.response.output"),
    "an item is text": (answer(item(), "oops"), "$.response.output[1]"),
    "an item is null": (answer(None, item()), "$.response.output[0]"),
    "incomplete_details is text": (answer(response={"output": [], "incomplete_details": "max"}), "incomplete_details"),
    "ids are text": (answer(item(generation_token_ids=["a", "b"])), "generation_token_ids[0]"),
    "ids are one text": (answer(item(generation_token_ids="ab")), "generation_token_ids"),
    "ids are true": (answer(item(generation_token_ids=[True, False])), "generation_token_ids[0]"),
    "ids are floats": (answer(item(generation_token_ids=[4.5, 5.0])), "generation_token_ids[0]"),
    "ids are negative": (answer(item(generation_token_ids=[-4, 5])), "negative token id -4"),
    "ids that nobody sampled": (answer(item(generation_token_ids=[4, 10_000_000])), "no model call"),
    "ids beyond int32": (answer(item(generation_token_ids=[4, 2**40])), "generation_token_ids[1]"),
    "ids beyond int64": (answer(item(generation_token_ids=[4, 2**70])), "generation_token_ids[1]"),
    "ids are an object": (answer(item(generation_token_ids={"4": 1})), "generation_token_ids"),
    "ids are a number": (answer(item(generation_token_ids=5)), "generation_token_ids"),
    "prompt ids are text": (answer(item(prompt_token_ids=["x"])), "prompt_token_ids[0]"),
    "prompt ids have null": (answer(item(prompt_token_ids=[1, None])), "prompt_token_ids[1]"),
    "fewer logprobs than ids": (answer(item(generation_log_probs=[-0.5])), "no model call"),
    "logprobs are a number": (answer(item(generation_log_probs=5)), "generation_log_probs"),
    "logprobs are positive": (answer(item(generation_log_probs=[0.7, 3.0])), "generation_log_probs[0]"),
    "logprobs are true": (answer(item(generation_log_probs=[True, False])), "generation_log_probs[0]"),
    "logprobs are text": (answer(item(generation_log_probs=["-0.5", "-0.5"])), "generation_log_probs[0]"),
    "logprobs are -1e30": (answer(item(generation_log_probs=[-1e30, -1.0])), "generation_log_probs[0]"),
    "logprobs are NaN": (answer(item(generation_log_probs=[math.nan, -1.0])), "generation_log_probs[0]"),
    "logprobs beyond float64": (
        answer(item(generation_log_probs=["@", -1])).replace('"@"', f"-{HUGE}"),
        "generation_log_probs[0]",
    ),
    "an image": (answer(item(), {"type": "message", "content": [{"type": "input_image"}]}), "`input_image`"),
    "an image of a tool": (
        answer(item(), {"type": "function_call_output", "output": [{"image_url": "data:"}]}),
        "`image_url`",
    ),
    "episode without result": ('{"episode_id": "x"}', "neither `result` nor `failure`"),
    "episode with an odd failure": ('{"episode_id": "x", "failure": [1, 2]}', "reports a failure"),
    "half surrogates": (with_value('"\\ud800"', x="@").replace('"x"', '"\\ud800key"'), None),
    "keys of the journal": (answer(step="evil", mode="eval", rollout_id="../x", schema=99), None),
    "NaN beside": (with_value("NaN", x="@"), None),
    "components are a list": (answer(reward_components=[1, 2]), None),
    "a component beyond float64": (with_value(HUGE, reward_components={"x": "@"}), None),
    "success is text": (answer(success="yes"), None),
    "a measurement of 1e308": (answer(zzz=1e308, success=1e308, reward_components={"x": 1e308}), None),
    "another one": (answer(zzz=1e308, success=1e308, reward_components={"x": 1e308}), None),
    "a measurement beyond float64": (with_value(HUGE, zzz="@", success=1), None),
    "success beyond float64": (with_value(HUGE, success="@"), None),
    "content is null": (answer(item(content=None)), None),
    "content is lists": (answer(item(content=[[1], None])), None),
    "text is a number": (answer(item(content=[{"type": "output_text", "text": 5}])), None),
    "arguments are an object": (answer({"type": "function_call", "name": None, "arguments": {"a": 1}}, item()), None),
    "arguments nested 5,000 deep": (answer(item(type="function_call", name="f", arguments="[" * 5000)), None),
    "arguments nested 1,500 deep, closed": (
        answer(item(type="function_call", name="f", arguments=f'{{"a": {deep(1500)}}}')),
        None,
    ),
    "a result nested 5,000 deep": (
        answer(item(), {"type": "function_call_output", "output": '{"error": ' + "[" * 5000}),
        None,
    ),
    "a result is null": (answer({"type": "function_call_output", "output": None}, item()), None),
    "a summary of texts": (answer({"type": "reasoning", "summary": ["x"]}, item()), None),
}
# What comes over the connection, and words of the failure.
RAW: dict[str, tuple[bytes, str]] = {
    "garbage": (b"\x00\x01\x02 hello\r\n\r\n", "http"),
    "a bad chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n", "http"),
    "two lengths": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", "http"),
    "a negative length": (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabcdef", "http"),
    "a body that breaks off": (b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"reward":1}', "http"),
    "a header of 200,000 bytes": (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000 + b"\r\n\r\n", "http"),
    "status 99999": (b"HTTP/1.1 99999 OK\r\nContent-Length: 0\r\n\r\n", "http"),
    "status 204": (b"HTTP/1.1 204 No Content\r\n\r\n", "HTTP 204"),
    "bad gzip": (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08x", "not JSON"),
    "a loop": (b"HTTP/1.1 307 R\r\nLocation: /run\r\nContent-Length: 0\r\n\r\n", "redirects to 127.0.0.1"),
    "a file": (b"HTTP/1.1 307 R\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n", "redirects to"),
    "no URL": (b"HTTP/1.1 307 R\r\nLocation: http://[::bad\r\nContent-Length: 0\r\n\r\n", "redirects to"),
    "another host": (b"HTTP/1.1 308 R\r\nLocation: //a:b@evil.example/x\r\nContent-Length: 0\r\n\r\n", "evil.example"),
    "100,000 levels in an error": (
        b"HTTP/1.1 400 Bad\r\nConnection: close\r\n\r\n" + b'{"detail":' + deep(100_000).encode() + b"}",
        "HTTP 400",
    ),
    "an endless body": (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", "longer than 1,000,000 bytes"),
    "an endless error": (b"HTTP/1.1 422 No\r\nConnection: close\r\n\r\n", "HTTP 422"),
}


@dataclass(frozen=True)
class Batch:
    rollouts: dict[str, Rollout]
    lines: dict[str, Json]
    rows: dict[str, list[Any]]


class Sampled(Ledger):
    """The policy server's ledger: what the answer says that was sampled where it is legal, else the good answer's."""

    async def take(self, session: Any, rollout_id: str) -> tuple[list[Any], str]:
        index = int(rollout_id.split("-m")[1].split("-")[0])
        body, words = [*BODIES.values(), *(("", "") for _ in RAW)][index]
        return records_of(json.loads(answer() if words is not None else body)), self.instance


async def _serve_raw(name: str, data: bytes) -> asyncio.Server:
    async def answer_raw(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            writer.write(data)
            while "endless" in name:
                writer.write(b"x" * 2**16)
                await writer.drain()
        except ConnectionError:
            pass  # the client has had enough
        finally:
            writer.close()

    return await asyncio.start_server(answer_raw, "127.0.0.1", 0)


async def _run(request: web.Request) -> web.Response:
    body = BODIES[(await request.json())["case"]][0]
    return web.Response(body=body if isinstance(body, bytes) else body.encode())


async def _collect(folder: Path) -> list[Rollout]:
    """Run all cases as one batch, on agents that have the names of the cases."""
    app = web.Application()
    app.router.add_post("/run", _run)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    servers = {name: await _serve_raw(name, data) for name, (data, _) in RAW.items()}
    ports = {name: server.sockets[0].getsockname()[1] for name, server in servers.items()}

    def agent(name: str) -> AgentInfo:
        return AgentInfo(name, f"http://127.0.0.1:{ports.get(name, runner.addresses[0][1])}", None, "simple_agent")

    requests = []
    for index, name in enumerate((*BODIES, *RAW)):
        identity: Json = {"rollout_id": f"r-m{index}-a0", "task_index": 0, "member": index}
        row: Json = {"responses_create_params": {"input": "x"}, "case": name}
        row = stamp(row, **identity, sampling=Sampling(), completion_budget=8)
        requests.append(RolloutRequest(**identity, group=0, attempt=0, agent=name, row=row))
    finish = Finisher(
        build=lambda answer, request, calls: from_calls(calls),
        decode=str,
        journal=Journal(folder),
        drift_policy="truncate",
        mode="train",
        weight_version="0",
    )
    collector: RolloutCollector[Rollout] = RolloutCollector(
        agent, budgets=Budgets(default=Budget(deadline_s=30), max_inflight=8), ledger=Sampled()
    )
    try:
        return await asyncio.to_thread(collector.collect, requests, finish)
    finally:
        await asyncio.to_thread(collector.close)
        await runner.cleanup()
        for server in servers.values():
            server.close()


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Batch]:
    folder = tmp_path_factory.mktemp("rollouts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_gym.gym.client.MAX_ANSWER_BYTES", 1_000_000)
        rollouts = asyncio.run(_collect(folder))
    rewards = checked_rewards([rollout.reward for rollout in rollouts], len(rollouts))
    facts = [facts_of(rollout, reward, "b0") for rollout, reward in zip(rollouts, rewards, strict=True)]
    numbers = rollout_metrics(facts) | completion_metrics(facts)
    assert all(math.isfinite(value) for value in numbers.values())
    assert table_columns(rollouts) and all(conversation(rollout) for rollout in rollouts)
    dropped = [None if reward is None else 0 for reward in rewards]
    rows = rows_of(rollouts, dropped, len(rollouts), pad_id=0, eos_id=1)
    yield Batch(
        rollouts={rollout.request.agent: rollout for rollout in rollouts},
        lines={line["agent"]: line for line in read_journal(folder)},
        rows=training_rows(rows, rollouts, rewards),
    )


@pytest.mark.parametrize("name", [*BODIES, *RAW])
def test_one_odd_answer_is_one_rollout(batch: Batch, name: str) -> None:
    rollout, line = batch.rollouts[name], batch.lines[name]
    words = BODIES[name][1] if name in BODIES else RAW[name][1]
    assert from_record(line, rollout.request).reward == rollout.reward
    if words is None:
        assert rollout.failure is None and rollout.reward == 1.0
        assert line["completion_ids"] == [4, 5] and line["failure"] is None
    else:
        assert rollout.failure is not None and rollout.reward is None and not rollout.trajectories
        assert words in rollout.failure.text and len(rollout.failure.text) < 5000
        assert rollout.failure.kind == ("infrastructure" if words in ("http", "HTTP 204") else "environment")
        assert line["failure"]["text"] == rollout.failure.text


def test_what_is_trained_are_tensors(batch: Batch) -> None:
    for name in ("prompt_ids", "completion_ids"):
        assert {torch.tensor(ids).dtype for ids in batch.rows[name]} == {torch.int64}
    assert all(torch.tensor(values).isfinite().all() for values in batch.rows["logprobs"])
    rewards = torch.tensor([math.nan if reward is None else reward for reward in batch.rows["gym_reward"]])
    assert not rewards.isinf().any() and rewards.nansum() == sum(words is None for _, words in BODIES.values())
