"""Faults injected into real parts: vLLM server, NeMo Gym, trainer. One policy server for all; the last test kills it.

After each: what failed is named and is not in the gradient, what finished is in the journal, nobody waits forever.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import server_below, wait_for
from tests.e2e.reset_proxy import ResetProxy
from tests.e2e.training import CALCULATOR, ROOT, RecordingTrainer, config
from trl_gym import GymServers, PolicyServer, load_gym_dataset
from trl_gym.errors import FailureKind, PolicyServerError, PolicyServerLostError
from trl_gym.rollout_options import RolloutOptions
from trl_gym.rollouts.admission import budgets_from_options
from trl_gym.rollouts.collector import RolloutCollector, RolloutResult
from trl_gym.rollouts.journal import Journal, read_journal
from trl_gym.rollouts.ledger import Ledger
from trl_gym.rollouts.request import RolloutRequest, Sampling, stamp
from trl_gym.rollouts.rollout import Rollout
from trl_gym.rollouts.source import Finisher
from trl_gym.rollouts.trajectory import from_calls

pytestmark = [pytest.mark.e2e, pytest.mark.shares("small, killed at the end")]

FAULTY = Path(__file__).parent / "environments" / "faulty" / "faulty.yaml"
CALCULATOR_AGENT, FAULTY_AGENT = "calculator_simple_agent", "faulty_simple_agent"
HANGING_AGENT = "hanging_simple_agent"  # of rows that hang
MULTI_TURN_AGENT = "example_multi_turn_gymnasium_agent"
SAMPLING = Sampling(temperature=0.05)  # the small policy then calls its tool


@pytest.fixture(scope="module")
def gym(policy: PolicyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GymServers]:
    multi_turn = "resources_servers/example_multi_turn_gymnasium/configs/example_multi_turn_gymnasium.yaml"
    with GymServers(
        [CALCULATOR / "calculator.yaml", FAULTY, multi_turn],
        policy_base_url=policy.base_url,
        policy_api_key=policy.gym_key,
        log_dir=tmp_path_factory.mktemp("gym"),
    ) as servers:
        yield servers


def calculator_row() -> dict[str, Any]:
    return json.loads((CALCULATOR / "data" / "example.jsonl").read_text().splitlines()[0])


def faulty_row(fault: str | None) -> dict[str, Any]:
    agent = {"type": "responses_api_agents", "name": HANGING_AGENT if fault == "hang" else FAULTY_AGENT}
    return {**calculator_row(), "agent_ref": agent, "fault": fault}


def multi_turn_row() -> dict[str, Any]:
    folder = next((ROOT / ".gym-venv" / "lib").glob("python*/site-packages/resources_servers"))
    text = (folder / "example_multi_turn_gymnasium" / "data" / "example.jsonl").read_text()
    agent = {"type": "responses_api_agents", "name": MULTI_TURN_AGENT}
    return {**json.loads(text.splitlines()[0]), "agent_ref": agent}


def requests(name: str, rows: list[dict[str, Any]]) -> list[RolloutRequest]:
    made = []
    for index, row in enumerate(rows):
        identity: dict[str, Any] = {"rollout_id": f"{name}-g{index}-m0-a0", "task_index": index, "member": 0}
        stamped = stamp(row, **identity, sampling=SAMPLING, completion_budget=48)
        made.append(RolloutRequest(**identity, group=index, attempt=0, agent=row["agent_ref"]["name"], row=stamped))
    return made


@dataclasses.dataclass
class Batch:
    """A collector on the real servers, and a journal."""

    policy: PolicyServer
    gym: GymServers
    folder: Path
    options: dict[str, Any]
    on_end: Callable[[RolloutResult], None] = lambda result: None

    def collect(self, name: str, rows: list[dict[str, Any]], **limits: Any) -> list[Rollout]:
        finisher = Finisher(
            build=lambda answer, request, calls: from_calls(calls),
            decode=str,
            journal=Journal(self.folder),
            drift_policy="truncate",
            mode="train",
            weight_version="0",
        )

        def finish(result: RolloutResult) -> Rollout:
            rollout = finisher(result)
            self.on_end(result)
            return rollout

        collector = RolloutCollector(
            **{
                "agent": self.gym.agent,
                "budgets": budgets_from_options(
                    RolloutOptions(**{"deadline": 60.0, "max_inflight": 64, "retries": {}} | limits)
                ),
                "check": self.check,
                "agents_down": self.gym.agents_down,
                "gym_log": self.gym.log_end,
                "ledger": Ledger(self.policy.client.root_url, self.policy.client.api_key),
            }
            | self.options
        )
        try:
            return collector.collect(requests(name, rows), finish)
        finally:
            collector.close()

    def check(self) -> None:
        self.policy.check()
        self.gym.check_process()

    def journaled(self) -> list[dict[str, Any]]:
        return list(read_journal(self.folder))


def kinds(rollouts: list[Rollout]) -> list[str | None]:
    return [None if rollout.failure is None else str(rollout.failure.kind) for rollout in rollouts]


def after(number: int, action: Callable[[], None]) -> Callable[[RolloutResult], None]:
    """Do it once, when so many rollouts have been answered."""
    answered: list[RolloutResult] = []

    def on_end(result: RolloutResult) -> None:
        if result.answer is not None:
            answered.append(result)
            if len(answered) == number:
                action()

    return on_end


FAULTS = ("raise", "garbage", "missing", "nan", "mask", "hang")


def test_no_wrong_sample_is_in_the_gradient(
    policy: PolicyServer, gym: GymServers, small_policy: Path, tmp_path: Path
) -> None:
    """Every fault of an environment in one batch of the trainer, beside groups that are well."""
    rows = [calculator_row(), faulty_row(None), multi_turn_row(), *map(faulty_row, FAULTS)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    num_members = 4
    trainer = RecordingTrainer(
        model=str(small_policy),
        args=config(
            tmp_path / "out",
            num_generations=num_members,
            per_device_train_batch_size=num_members * len(rows),
            max_steps=1,
            eval_strategy="no",
            gym_retries=0,
            gym_environments={HANGING_AGENT: {"deadline": 1.0}},
        ),
        train_dataset=load_gym_dataset(data),
        policy_server=policy,
        gym_servers=gym,
    )
    with trainer:
        trainer.train()
    [batch] = trainer.seen
    fault_of = [rollout.request.row.get("fault") for rollout in batch["rollouts"]]
    assert Counter(fault_of) == Counter(dict.fromkeys(FAULTS, num_members) | {None: 3 * num_members})
    for row, (fault, rollout) in enumerate(zip(fault_of, batch["rollouts"], strict=True)):
        trained = (batch["completion_mask"][row] * batch["tool_mask"][row]).bool()
        if fault is None:
            [trajectory] = rollout.trajectories
            ids = [t for t, own in zip(trajectory.completion_ids, trajectory.env_mask, strict=True) if own]
            assert batch["completion_ids"][row][trained].tolist() == ids and rollout.reward is not None
        else:
            expected, agent = FailureKind.ENVIRONMENT, FAULTY_AGENT
            if fault == "hang":
                expected, agent = FailureKind.DEADLINE, HANGING_AGENT
            assert rollout.failure is not None and rollout.failure.kind is expected, rollout.failure
            assert (rollout.failure.agent, rollout.failure.where) == (agent, f"{agent} /run")
            assert not trained.any() and batch["advantages"][row] == 0 and rollout.reward is None
    texts = {f: r.failure.text for f, r in zip(fault_of, batch["rollouts"], strict=True) if r.failure is not None}
    assert "the verifier tripped" in texts["raise"] and "masked this sample" in texts["mask"], texts
    recorded = list(read_journal(tmp_path / "out" / "rollouts"))
    assert len(recorded) == num_members * len(rows)
    assert sum(line["failure"] is None for line in recorded) == 3 * num_members


def test_a_tool_that_never_answers_is_cancelled_at_the_policy_server(
    policy: PolicyServer, gym: GymServers, tmp_path: Path
) -> None:
    """One sleeps forever. One goes on after its deadline, as NeMo Gym 0.4 does, and is not served any more."""
    refused = policy.client.info()["counters"]["cancelled"]
    batch = Batch(policy, gym, tmp_path, {})
    rows = [faulty_row("sleep"), faulty_row("slow"), *[calculator_row()] * 8, multi_turn_row()]
    rollouts = batch.collect("sleepers", rows, environments={FAULTY_AGENT: {"deadline": 4.0}})
    assert kinds(rollouts) == ["deadline", "deadline", *[None] * 9]
    for rollout in rollouts[:2]:
        assert "no answer within 4 s" in rollout.failure.text and rollout.failure.agent == FAULTY_AGENT
        assert len(rollout.records) == 1, "its first model call was answered; it waits for the tool"
    assert len(batch.journaled()) == len(rows)
    wait_for(
        lambda: policy.client.info()["counters"]["cancelled"] > refused,
        "the slow tool returns, and its rollout asks again",
    )


def test_connections_that_are_reset_cost_attempts_and_nothing_else(
    policy: PolicyServer, gym: GymServers, tmp_path: Path
) -> None:
    agent = gym.agent(CALCULATOR_AGENT)
    with ResetProxy(agent.url, share=0.05) as proxy:
        options = {"agent": lambda name: dataclasses.replace(agent, url=proxy.url)}
        batch = Batch(policy, gym, tmp_path, options)
        rollouts = batch.collect("resets", [calculator_row()] * 64, retries={"infrastructure": 6})
        assert proxy.num_resets >= 3
    assert kinds(rollouts) == [None] * 64
    assert [rollout.request.task_index for rollout in rollouts] == list(range(64))
    lines = batch.journaled()
    retried = [line for line in lines if line["retried"]]
    assert len(lines) == 64 + len(retried) and len({line["rollout_id"] for line in lines}) == len(lines)
    assert len(retried) == sum(rollout.request.attempt for rollout in rollouts) >= 3
    assert all(line["failure"]["kind"] == "infrastructure" and line["reward"] is None for line in retried)


def test_an_engine_that_is_stopped_in_the_middle_of_a_batch(
    policy: PolicyServer, gym: GymServers, tmp_path: Path
) -> None:
    """It never goes on by itself; here it does afterwards, so that the next test finds the server well."""
    [engine] = server_below(policy._process).children()
    ledger = Ledger(policy.client.root_url, policy.client.api_key, hang_timeout_s=3.0)
    batch = Batch(policy, gym, tmp_path, {"ledger": ledger}, after(3, engine.suspend))
    try:
        with pytest.raises(PolicyServerLostError, match="its HTTP process answers, and its engine does not"):
            batch.collect("stopped", [calculator_row()] * 48, max_inflight=4, deadline=600)
        assert policy.stopped() == [f"VLLM::EngineCor (pid {engine.pid})"]
    finally:
        engine.resume()
    assert sum(line["failure"] is None for line in batch.journaled()) >= 3
    policy.client.ask_engines()


def test_the_policy_server_killed_in_the_middle_of_a_batch(
    policy: PolicyServer, gym: GymServers, tmp_path: Path
) -> None:
    """The last one: there is no policy server after it."""
    server = server_below(policy._process)
    family = psutil.Process(policy._process.pid).children(recursive=True)
    batch = Batch(policy, gym, tmp_path, {}, after(3, server.kill))
    with pytest.raises(PolicyServerError, match=r"policy server ended within .* \(signal SIGKILL\)[\s\S]*\.log"):
        batch.collect("killed", [calculator_row()] * 48, max_inflight=4, deadline=600)
    lines = batch.journaled()
    assert sum(line["failure"] is None for line in lines) >= 3
    assert all(line["failure"] is None or line["failure"]["kind"] != "environment" for line in lines)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, "the engine ends with its server"
