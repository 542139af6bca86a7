"""Agents that lose `metadata.extra_body` roll out as their rollout: real NeMo Gym, both ends of its version range, and
the real middleware around a server without a model.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import trl_gym
from tests.e2e.servers import listening
from tests.e2e.test_gym_servers import INTERPRETERS, START_TIMEOUT_S
from tests.policy_server.fake_vllm import END, FakeVllm, Json
from trl_gym.errors import FailureKind
from trl_gym.gym.servers import GymServers
from trl_gym.policy_server.client import PolicyClient
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings
from trl_gym.policy_server.middleware.identity import KEY_PATTERN, gym_key
from trl_gym.rollout_options import RolloutOptions, Sampling
from trl_gym.rollouts.admission import budgets_from_options
from trl_gym.rollouts.collector import RolloutCollector, RolloutResult
from trl_gym.rollouts.counted_calls import counted_calls
from trl_gym.rollouts.ledger import Ledger
from trl_gym.rollouts.request import PolicyAccess, RolloutRequest, stamp
from trl_gym.rollouts.trajectory import Trajectory, from_calls, model_calls

pytestmark = [pytest.mark.e2e, pytest.mark.no_policy]

CONFIG = Path(__file__).parent / "environments" / "own_calls" / "own_calls.yaml"
CARRIER = Path(trl_gym.__file__).parent / "gym" / "carrier.py"
API_KEY = "sk-key-of-the-policy-server"
SAMPLING = Sampling(temperature=0.7, top_p=0.9)
BUDGET = 400
NUM_FIRST_PROMPT = 60  # characters at most
AGENTS = ("chat_agent", "harness_agent", "parallel_agent", "compacting_agent", "sdk_agent")
NUM_TURNS = {"parallel_agent": 4, "compacting_agent": 4}  # others: 2
JUDGE_TEMPERATURE = 0.4


@dataclass
class Policy(FakeVllm):
    """Answers every call with other words, in the form that Gym's model server reads."""

    max_model_len: int = 4000
    authorizations: set[bytes] = field(default_factory=set)

    async def __call__(self, scope: Json, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.authorizations |= {value for key, value in scope["headers"] if key == b"authorization"}
            await super().__call__(scope, receive, send)

    def chat(self, request: Json) -> tuple[int, Json]:
        self.reply = [*map(ord, f"w{len(self.chats())}"), END]
        status, answer = super().chat(request)
        if status == 200:
            answer |= {"id": "chatcmpl-1", "created": 0, "object": "chat.completion"}
            answer["usage"]["total_tokens"] = sum(
                answer["usage"][f"{part}_tokens"] for part in ("prompt", "completion")
            )
            for choice in answer["choices"]:
                for entry in (choice["logprobs"] or {}).get("content") or []:
                    entry["top_logprobs"] = []
        return status, answer


@dataclass
class Served:
    """The policy behind its middleware, over HTTP."""

    policy: Policy
    base_url: str

    @property
    def client(self) -> PolicyClient:
        return PolicyClient(self.base_url, api_key=API_KEY)

    def calls_of(self, number: int) -> list[Json]:
        """The newest calls."""
        return self.policy.chats()[-number:]

    def untagged(self) -> Json:
        return self.client.info()["untagged_calls"]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    policy = Policy()
    with listening(OnPolicyMiddleware(policy, Settings(api_keys=(API_KEY,)))) as base_url:
        yield Served(policy, base_url)


@pytest.fixture(scope="module", params=INTERPRETERS)
def gym(
    request: pytest.FixtureRequest, served: Served, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GymServers]:
    logs = tmp_path_factory.mktemp("gym")
    with GymServers(
        [CONFIG],
        policy_base_url=served.base_url,
        policy_api_key=gym_key(API_KEY, "error"),
        python=INTERPRETERS[request.param][1],
        log_dir=logs,
        start_timeout_s=START_TIMEOUT_S,
    ) as servers:
        yield servers
    log = (logs / "gym.log").read_text()
    assert API_KEY not in log and not KEY_PATTERN.search(log)


def request(agent: str, name: str, **row: Any) -> RolloutRequest:
    given = {"responses_create_params": {"input": [{"role": "user", "content": f"task of {name}"}]}, **row}
    identity: dict[str, Any] = {"rollout_id": name, "task_index": 0, "member": 0}
    stamped = stamp(given, **identity, sampling=SAMPLING, completion_budget=BUDGET)
    return RolloutRequest(**identity, group=0, attempt=0, agent=agent, row=stamped)


def collect(
    gym: GymServers, served: Served, requests: list[RolloutRequest], access: PolicyAccess | None
) -> list[RolloutResult]:
    collector: RolloutCollector[RolloutResult] = RolloutCollector(
        gym.agent,
        budgets=budgets_from_options(RolloutOptions(deadline=60.0, retries={})),
        check=gym.check,
        ledger=Ledger(served.base_url, API_KEY),
        access=access,
    )
    try:
        return collector.collect(requests, lambda result: result)
    finally:
        collector.close()


def roll_out(gym: GymServers, served: Served, requests: list[RolloutRequest]) -> list[RolloutResult]:
    return collect(gym, served, requests, PolicyAccess((served.base_url,), API_KEY))


def rows_of(result: RolloutResult) -> list[Trajectory]:
    assert result.failure is None and result.answer is not None and result.records is not None
    return from_calls(counted_calls(result.answer, model_calls(result.records)), "split")


def assert_exact(row: Trajectory) -> None:
    """What was sampled is there as it was sampled: the template would write it in capitals."""
    start = 0
    for end in row.turn_ends:
        sampled = [token for token, mask in zip(row.completion_ids, row.env_mask, strict=True) if mask][start:]
        word, _, _ = "".join(map(chr, sampled)).partition(chr(END))
        assert word[0] == "w" and word[1:].isdigit(), word
        assert row.completion_ids[end - 1] == END and row.env_mask[end - 1] == 1
        start += len(word) + 1
    assert sum(row.env_mask) == start


@pytest.mark.parametrize("agent", AGENTS)
def test_it_rolls_out_as_its_rollout(gym: GymServers, served: Served, agent: str) -> None:
    before = served.untagged()
    [result] = roll_out(gym, served, [request(agent, f"{gym.gym_version}-{agent}")])
    assert result.failure is None, result.failure
    num_turns = NUM_TURNS.get(agent, 2)
    assert result.records is not None and len(result.records) == num_turns
    assert {record.status for record in result.records} == {200}
    assert {record.caller for record in result.records} == {f"responses_api_agents/{agent}"}

    *turns, judgement = served.calls_of(num_turns + 1)
    for call in turns:
        assert (call["temperature"], call["top_p"]) == (SAMPLING.temperature, SAMPLING.top_p)
        # The budget counts from the end of the first prompt, and a compacted prompt may be shorter than that.
        assert call["max_tokens"] <= BUDGET + NUM_FIRST_PROMPT
    assert judgement["temperature"] == JUDGE_TEMPERATURE, "the verifier's call is not a turn"
    assert served.untagged() == before

    rows = rows_of(result)
    assert [row.num_turns for row in rows] == ([2, 2] if num_turns == 4 else [2])
    for row in rows:
        assert_exact(row)


def test_rollouts_that_run_side_by_side_keep_apart(gym: GymServers, served: Served) -> None:
    """Also those of one client in one thread pool."""
    requests = [request(agent, f"{gym.gym_version}-{agent}-{n}") for agent in AGENTS for n in range(6)]
    results = roll_out(gym, served, requests)
    assert [result.failure for result in results if result.failure] == []
    for result in results:
        assert result.records is not None
        num_turns = NUM_TURNS.get(result.request.agent, 2)
        assert len(result.records) == num_turns, result.request.rollout_id
        assert sum(row.num_turns for row in rows_of(result)) == num_turns


def test_a_harness_gets_its_own_access_to_the_policy(gym: GymServers, served: Served) -> None:
    assert gym.agent("harness_agent").run_fields == {"policy_base_url", "policy_api_key"}
    given = request("harness_agent", f"{gym.gym_version}-direct", direct=True)
    [result] = roll_out(gym, served, [given])
    assert result.failure is None, result.failure
    assert result.records is not None and len(result.records) == 2
    [row] = rows_of(result)
    assert_exact(row)
    assert "policy_api_key" not in given.row, "what is recorded has no key"


def test_an_agent_whose_identity_is_lost_is_refused_and_named(gym: GymServers, served: Served) -> None:
    before = served.untagged()["gym"]
    [result] = collect(gym, served, [request("chat_agent", f"{gym.gym_version}-lost")], access=None)
    assert result.failure is not None and result.failure.kind is FailureKind.ENVIRONMENT
    assert "belongs to no rollout" in result.failure.text and "gym_untagged_calls" in result.failure.text
    assert "responses_api_agents/chat_agent" in result.failure.text
    after = served.untagged()["gym"]
    name = "responses_api_agents/chat_agent"
    assert after[name] == before.get(name, 0) + 1


def test_gym_never_has_the_servers_key(gym: GymServers, served: Served) -> None:
    roll_out(gym, served, [request("chat_agent", f"{gym.gym_version}-key")])
    assert served.policy.authorizations == {f"Bearer {API_KEY}".encode()}  # what the server itself demands
    config = gym._processes[0].view.config
    assert API_KEY not in str(config)


@pytest.mark.parametrize("version", INTERPRETERS)
def test_clients_carry_the_rollout_to_gyms_servers_and_to_nobody_else(version: str) -> None:
    probe = Path(__file__).with_name("carrier_probe.py")
    command = [str(INTERPRETERS[version][1]), "-P", str(probe), str(CARRIER)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    own, foreign, urls = found["own"], found["foreign"], found["urls"]
    agent = ["KEY", "responses_api_agents/one"]
    reached = {"/aiohttp", "/stayed", "/gym", "/task", "/httpx"}
    reached |= {
        f"/{place}/{client}" for place in ("to_thread", "executor", "pool") for client in ("httpx", "requests")
    }
    assert {path for path, headers in own.items() if headers == agent} == reached
    # Threads of its own and other clients do not carry: their calls are counted where they arrive.
    lost = {"/thread/httpx", "/thread/requests", "/urllib", "/outside"}
    assert {path for path, headers in own.items() if headers == [None, None]} == lost
    assert set(foreign) >= {"/aiohttp", "/httpx", "/redirected", "/to_thread/requests"}
    assert {tuple(headers) for headers in foreign.values()} == {(None, None)}

    assert own["/nothing"] == [None, "responses_api_agents/one"], "the caller is known all the same"
    assert own["/model"] == ["KEY", "responses_api_agents/two"]
    assert own["/side"] == ["KEY", "resources_servers/judge"]
    assert own["/tool"] == ["KEY", "resources_servers/one"]
    assert own["/prefix"] == ["PREFIXED", None]

    plain = f"http://127.0.0.1:{found['port']}"
    assert urls["agent"] == f"{plain}/trl_gym/rollouts/KEY"
    assert urls["other"] == "http://127.0.0.1:1"
    assert urls["outside"] == plain and urls.get("kept", plain) == plain
