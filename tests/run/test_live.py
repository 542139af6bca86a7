"""What a live source decides without servers; the source at work is in `tests/e2e`."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator

from trl_gym import GymGRPOConfig
from trl_gym.errors import ConfigError, RolloutError
from trl_gym.policy_server.client import PolicyResponseError
from trl_gym.policy_server.middleware.identity import UntaggedCalls
from trl_gym.rollouts.source import BatchInfo
from trl_gym.run.live import LiveSource


def source(folder: Path, **servers: Any) -> LiveSource:
    return LiveSource(GymGRPOConfig(output_dir=str(folder), use_cpu=True, report_to=[]), SimpleNamespace(**servers))


def test_a_row_without_an_agent_is_for_the_sole_one(tmp_path: Path) -> None:
    one = source(tmp_path, gym=SimpleNamespace(sole_agent="calculator"))
    assert one.agent_of({"agent_ref": None}) == "calculator"
    assert one.agent_of({"agent_ref": {"name": "search"}}) == "search"
    several = source(tmp_path, gym=SimpleNamespace(sole_agent=None, agents={"search": 1, "calculator": 2}))
    with pytest.raises(ConfigError, match=r"several \(calculator, search\)\. Load the file with `load_gym_dataset"):
        several.agent_of({})


def test_weights_that_somebody_else_has_changed_end_the_batch_on_rank_0(tmp_path: Path) -> None:
    policy = SimpleNamespace(client=SimpleNamespace(weight_version=lambda: "9"))
    live = source(tmp_path, policy=policy, require_same_policy=lambda: None)
    live._step = 3
    live._accelerator = SimpleNamespace(is_main_process=True)
    with pytest.raises(RolloutError, match="weights changed from version 3 to 9 during rollouts"):
        live._check_version()
    live._accelerator.is_main_process = False
    live._check_version()


@pytest.mark.parametrize(
    ("options", "expected", "words"),
    [
        ({}, 5.0, "responses_api_agents/chat: 4, an unknown server: 1). They were refused"),
        ({"gym_untagged_calls": "warn"}, 5.0, "They were served"),
        ({"gym_head_url": "http://gym:1"}, 7.0, "responses_api_agents/chat: 4"),
    ],
)
def test_calls_of_no_rollout_are_counted_and_their_agents_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any], expected: float, words: str
) -> None:
    counts = UntaggedCalls(gym=Counter({"responses_api_agents/chat": 6, "": 1}), others=9)
    args = GymGRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **options)
    live = LiveSource(args, SimpleNamespace(owns_gym=args.gym_mode != "attach"))  # type: ignore[arg-type]
    before = UntaggedCalls(gym=Counter({"responses_api_agents/chat": 2}), others=7)
    assert live._untagged_metrics(counts.since(before)) == {"rollouts/untagged_calls": [expected]}
    assert words in caplog.text and "gym_untagged_calls" in caplog.text
    caplog.clear()
    assert live._untagged_metrics(counts.since(counts)) == {}
    assert caplog.text == ""


def test_other_clients_of_the_policy_server_are_not_taken_for_our_gym(tmp_path: Path) -> None:
    live = source(tmp_path, owns_gym=True)
    assert live._untagged_metrics(UntaggedCalls(others=9)) == {}


def test_a_server_without_metrics_ends_no_batch(tmp_path: Path) -> None:
    def refuse() -> list[str]:
        raise PolicyResponseError("GET /metrics: HTTP 404", 404)

    client = SimpleNamespace(untagged_calls=lambda: UntaggedCalls(others=9), prometheus=refuse)
    live = source(tmp_path, policy=SimpleNamespace(client=client))
    live._accelerator = Accelerator(cpu=True)
    look = live._look()
    assert look.untagged.others == 9 and look.engine.values == {}
    client.prometheus = lambda: ["vllm:num_preemptions_total 3.0"]
    assert list(live._look().engine.values.values()) == [3.0]


def test_metrics_of_a_batch_are_over_all_of_its_rounds(tmp_path: Path) -> None:
    """The engine's counter goes up by one with every look; between two batches without overlap others may count."""
    numbers, kept, text = iter(range(99)), list[bool](), "vllm:num_preemptions_total {}.0"
    client = SimpleNamespace(untagged_calls=UntaggedCalls, prometheus=lambda: [text.format(next(numbers))])
    live = source(tmp_path, policy=SimpleNamespace(client=client), owns_gym=True, num_restarts=0)

    def sampling(push: Any, *, again: bool) -> Any:
        kept.append(again)
        return contextlib.nullcontext()

    live._accelerator, live._hooks = Accelerator(cpu=True), SimpleNamespace(push=None)
    live._collector = live._journal = SimpleNamespace(commit=lambda: None)
    live._weights = SimpleNamespace(sampling=sampling)
    live._queue = SimpleNamespace(collect=lambda *_, **__: [])
    rounds = [(True, False), (False, False), (False, True), (True, True)]
    found = [
        live.collect([], 0, BatchInfo(run="r", step=0, mode="train", is_first=first, is_last=last)).metrics
        for first, last in rounds
    ]
    assert [metrics["engine/preemptions"] for metrics in found] == [[1.0], [2.0], [3.0], [1.0]]
    # A server that sleeps keeps its weights while more rounds may come.
    assert kept == [True, True, False, False]


def test_a_sync_that_finds_the_server_dead_gives_up_what_was_in_flight(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Weights:
        num_recoveries = 0

        def push(self, model: Any, step: int) -> Any:
            self.num_recoveries += step == 2
            return SimpleNamespace(fingerprint=f"w{step}", num_bytes=1, seconds={}, probe=None)

    live = source(tmp_path)
    given_up: list[int] = []  # the step of the weights that what is given up began with, at most
    live._weights = Weights()  # type: ignore[assignment]
    live._queue = SimpleNamespace(give_up_lost=lambda: given_up.append(live._step) or 3)  # type: ignore[assignment]
    for step in (1, 2, 3):
        live.push_weights(SimpleNamespace(), step)  # type: ignore[arg-type]
    assert given_up == [1] and live._step == 3
    assert caplog.text.count("3 of this rank's rollouts are lost with the policy server and will run again") == 1
