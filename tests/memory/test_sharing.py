"""Order of sleeping and waking, with a server that is only a recorder, and a failing one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_ranks import Ranks
from trl_gym.errors import ConfigError, PolicyServerError, WeightSyncError
from trl_gym.memory.offload import OptimizerOffload
from trl_gym.memory.sharing import DeviceSharing, Occupancy


class Recorder:
    """Keeps the calls, and what vLLM would have in memory after them; `fail_in` makes one call raise."""

    def __init__(self, fail_in: str = "") -> None:
        self.calls: list[Any] = []
        self.timeouts: set[float] = set()
        self.asleep: set[str] = set()
        self.weights_valid = True
        self._fail_in = fail_in

    def patient(self, timeout_s: float) -> Recorder:
        self.timeouts.add(timeout_s)
        return self

    def sleep(self, level: int) -> None:
        self._called("sleep", level)
        self.asleep = {"weights", "kv_cache"}
        self.weights_valid = self.weights_valid and level == 1

    def wake_up(self, tags: list[str]) -> None:
        self._called("wake_up", *tags)
        assert self.asleep.issuperset(tags)  # vLLM ignores the whole call otherwise
        self.asleep -= set(tags or self.asleep)

    def _called(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self._fail_in:
            raise PolicyServerError(f"{call[0]} answered 500")


def sharing_with(server: Recorder, *, drops: bool = True, optimizer: OptimizerOffload | None = None) -> DeviceSharing:
    served = SimpleNamespace(client=server)
    return DeviceSharing(Accelerator(cpu=True), served, timeout_s=700.0, drops_weights=drops, optimizer=optimizer)


def test_a_step_with_weights_that_are_pushed() -> None:
    server = Recorder()
    sharing = sharing_with(server)
    sharing.before_sync()  # the first push: nothing sleeps yet
    sharing.pushed()
    sharing.before_sampling()
    assert server.calls == []
    sharing.after_sampling()
    assert sharing.needs_push and sharing.state is Occupancy.ASLEEP
    sharing.before_sync()
    sharing.pushed()
    sharing.before_sampling()
    assert server.calls == [("sleep", 2), ("wake_up", "weights"), ("wake_up", "kv_cache")]
    assert sharing.state is Occupancy.AWAKE and not sharing.needs_push


def test_sleeping_and_waking_have_the_time_of_a_sync() -> None:
    server = Recorder()
    sharing = sharing_with(server)
    sharing.after_sampling()
    sharing.before_sync()
    sharing.pushed()
    sharing.before_sampling()
    assert len(server.calls) == 3 and server.timeouts == {700.0}


class SlowRank:
    """An optimizer of rank 1 that moves to the host a little later than that of rank 0."""

    def __init__(self, woken: threading.Event) -> None:
        self._woken = woken
        self.is_gone = False

    def offload(self) -> None:
        assert not self._woken.wait(0.3), "the server was woken before every rank had given up its memory"
        self.is_gone = True

    def restore(self) -> None:
        self.is_gone = False


@pytest.mark.parametrize("step", ["before_sync", "before_sampling"])
def test_the_server_wakes_when_every_rank_has_given_up_its_memory(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    woken, ranks = threading.Event(), Ranks(2)
    slow = SlowRank(woken)
    here = threading.local()
    monkeypatch.setattr("accelerate.utils.gather_object", lambda values: ranks.gather(here.rank)(values))

    class Waking(Recorder):
        def wake_up(self, tags: list[str]) -> None:
            woken.set()

    def play(rank: int) -> None:
        here.rank = rank
        accelerator = SimpleNamespace(is_main_process=rank == 0, process_index=rank)
        sharing = DeviceSharing(
            accelerator, SimpleNamespace(client=Waking()), timeout_s=9.0, drops_weights=False,
            optimizer=slow if rank == 1 else None,
        )  # fmt: skip
        sharing.state = Occupancy.ASLEEP
        getattr(sharing, step)()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(play, range(2)))
    assert woken.is_set() and slow.is_gone


def test_a_rank_that_cannot_give_up_its_memory_leaves_none_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, here = Ranks(2), threading.local()
    monkeypatch.setattr("accelerate.utils.gather_object", lambda values: ranks.gather(here.rank)(values))

    class Immovable:
        def offload(self) -> None:
            raise ConfigError("it cannot be moved.")

    def play(rank: int) -> str:
        here.rank = rank
        accelerator = SimpleNamespace(is_main_process=rank == 0, process_index=rank)
        sharing = DeviceSharing(
            accelerator, SimpleNamespace(client=Recorder("wake_up")), timeout_s=9.0, drops_weights=False,
            optimizer=Immovable() if rank == 1 else None,
        )  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            sharing.make_room()
        return caught.value.problem

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(play, range(2))) == ["rank 1: it cannot be moved.", "it cannot be moved."]


def test_every_call_may_come_twice() -> None:
    server = Recorder()
    sharing = sharing_with(server)
    for call in (sharing.after_sampling, sharing.before_sync, sharing.pushed, sharing.before_sampling):
        call()
        call()
    assert server.calls == [("sleep", 2), ("wake_up", "weights"), ("wake_up", "kv_cache")]


def test_a_base_that_is_not_sent_is_kept() -> None:
    server = Recorder()
    sharing = sharing_with(server, drops=False)
    sharing.after_sampling()
    assert server.calls == [("sleep", 1)] and not sharing.needs_push
    sharing.before_sampling()
    assert server.calls[-1] == ("wake_up",) and server.asleep == set()


def test_evaluation_samples_again_from_the_same_weights() -> None:
    server = Recorder()
    sharing = sharing_with(server)
    sharing.after_sampling(again=True)
    assert server.calls == [("sleep", 1)] and not sharing.needs_push
    sharing.before_sampling()
    assert sharing.state is Occupancy.AWAKE


def test_sampling_from_dropped_weights_is_refused() -> None:
    server = Recorder()
    sharing = sharing_with(server)
    sharing.after_sampling()
    with pytest.raises(WeightSyncError, match="have not been sent"):
        sharing.before_sampling()
    sharing.before_sync()
    with pytest.raises(WeightSyncError, match="have not been sent"):
        sharing.before_sampling()
    assert server.calls == [("sleep", 2), ("wake_up", "weights")]


def test_the_first_weights_that_come_into_dropped_memory_are_to_be_verified() -> None:
    sharing = sharing_with(Recorder())
    assert not sharing.needs_probe
    sharing.pushed()  # into memory that was not dropped
    for _ in range(2):  # as long as nothing has been verified
        sharing.after_sampling()
        assert sharing.needs_probe
        sharing.before_sync()
        sharing.pushed()
        sharing.before_sampling()
    sharing.verified()
    sharing.after_sampling()
    assert sharing.needs_push and not sharing.needs_probe


def test_another_server_is_awake_and_has_to_be_pushed_to() -> None:
    server = Recorder()
    sharing = sharing_with(server)
    sharing.after_sampling()
    sharing.reset()
    assert sharing.state is Occupancy.AWAKE and sharing.needs_push
    sharing.before_sync()
    sharing.pushed()
    sharing.before_sampling()
    assert server.calls == [("sleep", 2)]


@pytest.mark.parametrize(("fail_in", "state"), [("sleep", Occupancy.AWAKE), ("wake_up", Occupancy.ASLEEP)])
def test_a_call_that_fails_changes_nothing(fail_in: str, state: Occupancy) -> None:
    sharing = sharing_with(Recorder(fail_in))
    with pytest.raises(PolicyServerError, match=fail_in):
        sharing.after_sampling()
        sharing.before_sync()
    assert sharing.state is state


def test_optimizer_and_server_take_turns() -> None:
    weight = torch.nn.Parameter(torch.zeros(2048))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    mover = OptimizerOffload(optimizer, torch.device("cpu"))
    away = []

    class Watching(Recorder):
        def _called(self, *call: Any) -> None:
            away.append((call[0], bool(mover._away)))

    sharing = sharing_with(Watching(), drops=False, optimizer=mover)
    sharing.before_sampling()
    assert mover._away  # also for a server that was never asleep
    sharing.after_sampling()
    assert not mover._away
    sharing.before_sampling()
    # It leaves before the server wakes, and comes back when the server sleeps.
    assert away == [("sleep", True), ("wake_up", True)]


CALLS = ("before_sync", "pushed", "before_sampling", "after_sampling", "again", "reset")


@settings(max_examples=60)
@given(st.lists(st.sampled_from(CALLS), max_size=12), st.booleans())
def test_in_any_order_the_server_never_samples_without_its_memory(calls: list[str], drops: bool) -> None:
    server = Recorder()
    sharing = sharing_with(server, drops=drops)
    for call in calls:
        if call == "pushed":
            if sharing.state is Occupancy.ASLEEP:
                continue  # no one can push into memory that does not exist
            sharing.pushed()
            server.weights_valid = True
        elif call == "reset":
            sharing.reset()
            server.asleep = set()
        elif call == "again":
            sharing.after_sampling(again=True)
        elif call == "before_sampling" and sharing.needs_push and sharing.state is not Occupancy.AWAKE:
            with pytest.raises(WeightSyncError):
                sharing.before_sampling()
        else:
            getattr(sharing, call)()
            if call == "before_sampling" and not sharing.needs_push:
                assert server.asleep == set() and server.weights_valid
        expected = {Occupancy.AWAKE: set(), Occupancy.WEIGHTS: {"kv_cache"}}
        assert server.asleep == expected.get(sharing.state, {"weights", "kv_cache"})
