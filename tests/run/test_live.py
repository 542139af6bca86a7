"""What a live source decides without servers; the source at work is in `tests/e2e`."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import torch
from accelerate import Accelerator

from trl_gym import GymGRPOConfig
from trl_gym.errors import ConfigError, PolicyServerLostError, RolloutError
from trl_gym.policy_server.client import PolicyResponseError
from trl_gym.policy_server.middleware.identity import UntaggedCalls
from trl_gym.rollouts.engine_metrics import EngineCounters
from trl_gym.rollouts.ledger import Ledger
from trl_gym.rollouts.reuse import Policy
from trl_gym.rollouts.source import BatchInfo
from trl_gym.run.live import LiveSource, _Look


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
    live._version = 3
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


def test_who_trains_on_after_close_is_told_so_at_once(tmp_path: Path) -> None:
    live = source(tmp_path, stop=lambda: None)
    live.close()
    with pytest.raises(RolloutError, match="The trainer was closed, and its servers with it"):
        live.push_weights(torch.nn.Linear(1, 1), 1)


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


def test_a_server_that_is_lost_when_it_is_looked_at_is_got_back_later(tmp_path: Path) -> None:
    def lost() -> UntaggedCalls:
        raise PolicyServerLostError("GET /trl_gym/info: no answer within 60 s.")

    live = source(tmp_path, policy=SimpleNamespace(client=SimpleNamespace(untagged_calls=lost)))
    live._accelerator = Accelerator(cpu=True)
    assert live._look() == _Look(UntaggedCalls(), EngineCounters(0.0))


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
        live.collect([], 0, BatchInfo(run="r", step=1, mode="train", is_first=first, is_last=last)).metrics
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
    given_up: list[int] = []  # the version of the weights that what is given up began with, at most
    live._weights = Weights()  # type: ignore[assignment]
    live._ledger = Ledger("http://policy")
    live._queue = SimpleNamespace(give_up_lost=lambda: given_up.append(live._version) or 3)  # type: ignore[assignment]
    for step in (1, 2, 3):
        live.push_weights(SimpleNamespace(), step)  # type: ignore[arg-type]
    assert given_up == [1] and live._version == 3
    assert caplog.text.count("3 of this rank's rollouts are lost with the server and will run again") == 1


# -- looks at the policy server, and the queues -----------------------------------------------------------------------


def connected(folder: Path, **options: Any) -> LiveSource:
    """A source of which only the servers, the weights and the queues are missing."""
    options |= {"output_dir": str(folder), "use_cpu": True, "report_to": []}
    client = SimpleNamespace(cancel_rollouts=lambda ids: None)
    servers = SimpleNamespace(
        owns_gym=True, num_restarts=0, check_before_rollouts=lambda: None, policy=SimpleNamespace(client=client)
    )
    live = LiveSource(GymGRPOConfig(**options), servers)  # type: ignore[arg-type]
    live._accelerator = Accelerator(cpu=True)
    live._hooks = SimpleNamespace(push=lambda: None, progress=None, build=None, tokenizer=None)  # type: ignore[assignment]
    live._collector = live._journal = SimpleNamespace(commit=lambda: None)  # type: ignore[assignment]
    sampling = lambda push, *, again: contextlib.nullcontext()  # noqa: E731
    live._weights = SimpleNamespace(sampling=sampling)  # type: ignore[assignment]
    return live


class Counting:
    """A policy server that counts what is sampled there, a second each, and queues that sample."""

    def __init__(self, live: LiveSource) -> None:
        self.num_calls, self.seconds, self.sampled = 0, 0.0, 0
        live._queue = SimpleNamespace(collect=self.collect)  # type: ignore[assignment]
        live._new_queue = lambda *_: live._queue  # type: ignore[method-assign]
        live._look = self.look  # type: ignore[method-assign]

    def collect(self, *_: Any, **__: Any) -> list[Any]:
        self.sample(self.sampled)
        return []

    def sample(self, num_calls: int) -> None:
        self.num_calls, self.seconds = self.num_calls + num_calls, self.seconds + 1

    def look(self) -> _Look:
        series = (0, "vllm:num_preemptions_total", "")
        untagged = UntaggedCalls(gym=Counter({"judge": self.num_calls}), others=self.num_calls)
        return _Look(untagged, EngineCounters(self.seconds, {series: float(self.num_calls)}))


def test_with_overlap_what_an_evaluation_counts_is_none_of_trainings(tmp_path: Path) -> None:
    """What rollouts ahead do before the evaluation, and after it, is counted with the next batch."""
    live = connected(tmp_path)
    server = Counting(live)

    def counted(num_calls: int, mode: str, **ahead: Any) -> tuple[float, float]:
        server.sampled = num_calls
        metrics = live.collect([], 0, BatchInfo(run="r", step=0, mode=mode, **ahead)).metrics
        return metrics.get("rollouts/untagged_calls", [0.0])[0], metrics["engine/preemptions"][0]

    ahead: dict[str, Any] = {"later_steps": (2,), "per_batch": 1}
    assert counted(1, "train", **ahead) == (1.0, 1.0)
    server.sample(2)
    assert [counted(5, "eval"), counted(40, "eval")] == [(5.0, 5.0), (40.0, 40.0)]
    server.sample(3)
    assert counted(7, "train", **ahead) == (12.0, 12.0)
    server.sample(20)
    assert counted(7, "train") == (27.0, 27.0)
    server.sample(100)  # without rollouts in flight it is nobody's
    assert counted(7, "train") == (7.0, 7.0)


def test_the_time_of_an_evaluation_is_left_out_and_a_restart_begins_anew(tmp_path: Path) -> None:
    server = Counting(connected(tmp_path))
    looks = []
    for num_calls in (1, 4, 10):
        server.sample(num_calls)
        looks.append(server.look())
    base, first, last = looks
    assert base.moved(first, last).engine == EngineCounters(2.0, {(0, "vllm:num_preemptions_total", ""): 11.0})
    assert base.moved(first, last).untagged == UntaggedCalls(gym=Counter({"judge": 11}), others=11)
    assert base.moved(last, first) is first  # it counts less than before
    no_metrics = _Look(last.untagged, EngineCounters(last.engine.at))
    assert base.moved(first, no_metrics).engine.values == {}


@pytest.mark.parametrize(
    ("options", "is_evaluation", "expected"),
    [
        ({}, False, (0, True, False)),
        ({"gym_max_staleness": 2}, False, (2, False, False)),
        ({"gym_max_staleness": 2, "gym_on_stale": "drop"}, False, (2, False, True)),
        ({"gym_max_staleness": 2, "gym_on_stale": "drop"}, True, (0, True, True)),
    ],
)
def test_the_queue_of_training_is_bounded_and_that_of_an_evaluation_takes_what_it_is_given(
    tmp_path: Path, options: dict[str, Any], is_evaluation: bool, expected: tuple[int, bool, bool]
) -> None:
    live = connected(tmp_path, **options)
    batch = BatchInfo(run="r", step=0, mode="eval") if is_evaluation else None
    queue = live._new_queue(live._collector, batch)  # type: ignore[arg-type]
    assert (queue._max_staleness, queue._in_order, queue._drops) == expected


def test_ranks_take_groups_that_lie_across_them_in_order(tmp_path: Path) -> None:
    live = connected(tmp_path, gym_max_staleness=2, num_generations=8, gradient_accumulation_steps=1)
    live._args.per_device_train_batch_size = 4  # as with two ranks
    assert not live._args.has_whole_groups
    assert live._new_queue(live._collector)._in_order  # type: ignore[arg-type]


def test_only_training_recalls_and_what_newer_weights_continued_counts(tmp_path: Path) -> None:
    live = connected(tmp_path)
    asked: list[Any] = []
    recalled = {0: "a rollout"}
    begun = Policy("r", 3, "w3")
    train = live._new_queue(live._collector)  # type: ignore[arg-type]
    assert train._sampler.recall([], begun) == {}  # nothing was interrupted
    live._version = 5
    live._recall = SimpleNamespace(  # type: ignore[assignment]
        take_all=lambda requests, policy, *, newest: asked.append((requests, policy, newest)) or recalled
    )
    evaluation = live._new_queue(live._collector, BatchInfo(run="r", step=5, mode="eval"))  # type: ignore[arg-type]
    assert evaluation._sampler.recall([], begun) == {} and asked == []
    assert train._sampler.recall([], begun) == recalled
    assert asked == [([], begun, 5)]


def test_a_loss_that_an_evaluation_notices_costs_trainings_rollouts_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are given up once the server is back, and before it gets weights: the engine would continue them."""
    live = connected(tmp_path)
    order: list[Any] = []
    live._weights.recover = order.append  # type: ignore[method-assign]
    live._queue = SimpleNamespace(give_up_lost=lambda: order.append("given up") or 4)  # type: ignore[assignment]
    live._hooks = SimpleNamespace(push=lambda: order.append("pushed"))  # type: ignore[assignment]
    loss = PolicyServerLostError("policy server ended")
    live._recover(loss, 2)
    assert order == [loss, "given up", "pushed"]
    assert [text in caplog.text for text in ("2 of this rank's rollouts", "4 of this rank's")] == [True, True]


async def test_a_server_that_came_back_is_told_which_rollouts_have_ended(tmp_path: Path) -> None:
    """Also where none was in flight: their agents may call late, and a new server would sample for them."""
    live = connected(tmp_path)
    told: list[list[str]] = []
    live.policy_server.client.cancel_rollouts = told.append  # type: ignore[method-assign, assignment]
    live._ledger = Ledger("http://127.0.0.1:9")
    async with aiohttp.ClientSession() as session:
        for name in ("r1", "r2"):
            with pytest.raises(PolicyServerLostError):
                await live._ledger.take(session, name)
    queue = live._new_queue(SimpleNamespace(), BatchInfo(run="run", step=1, mode="eval"))  # type: ignore[arg-type]
    queue._attempt(list, 0)
    assert not told
    queue.give_up_lost()
    for _ in range(2):
        queue._attempt(list, 0)
    assert told == [["r1", "r2"]]
