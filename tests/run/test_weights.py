"""What stands around rollouts and syncs, with a server that only records. At work: `tests/e2e/test_supervision.py`."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trl_gym.errors import PolicyServerError, PolicyServerLostError, WeightMismatchError, WeightSyncError
from trl_gym.run.weights import PolicyWeights, check_model


class Recorder:
    """Plays sync, sharing and servers; `failures` are raised by the first pushes."""

    def __init__(self, *failures: Exception, hopeless: bool = False) -> None:
        self.calls: list[str] = []
        self.needs_push = False
        self._failures, self._hopeless = list(failures), hopeless

    def push(self, model: Any, step: int) -> str:
        self.calls.append("push")
        if self._failures:
            raise self._failures.pop(0)
        return f"pushed {step}"

    def recover(self, error: Exception) -> None:
        self.calls.append("recover")
        if self._hopeless:
            raise error

    def after_sampling(self, *, again: bool) -> None:
        self.calls.append(f"after_sampling(again={again})")

    def resting(self) -> Any:
        return contextlib.nullcontext()

    sampling = resting

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.calls.append(name)


def weights_with(recorder: Recorder, *, sharing: bool = True) -> PolicyWeights:
    weights = PolicyWeights.__new__(PolicyWeights)
    weights._sync = weights._servers = recorder  # type: ignore[assignment]
    weights._sharing = recorder if sharing else None  # type: ignore[assignment]
    weights._accelerator, weights._offloads = SimpleNamespace(process_index=0), False
    weights.num_recoveries = 0
    return weights


@pytest.mark.parametrize("failure", [PolicyServerError("gone"), WeightSyncError("half of it")])
def test_a_push_goes_on_with_a_recovered_server(failure: Exception) -> None:
    recorder = Recorder(failure)
    assert weights_with(recorder).push("model", 7) == "pushed 7"
    # Room first: a server that starts needs its memory; and nothing that was agreed with the old one holds.
    assert recorder.calls == ["push", "make_room", "recover", "disconnect", "reset", "push"]


def test_weights_that_compute_something_else_are_not_sent_again() -> None:
    recorder = Recorder(WeightMismatchError("differs"))
    with pytest.raises(WeightMismatchError):
        weights_with(recorder).push("model", 1)
    assert recorder.calls == ["push"]


def test_an_error_that_another_server_would_not_fix_ends_the_run() -> None:
    recorder = Recorder(WeightSyncError("no space"), hopeless=True)
    with pytest.raises(WeightSyncError, match="no space"):
        weights_with(recorder, sharing=False).push("model", 1)
    assert recorder.calls == ["push", "recover"]


@pytest.mark.parametrize("again", [False, True])
def test_the_server_wakes_before_rollouts_and_sleeps_afterwards(again: bool) -> None:
    recorder = Recorder()
    recorder.needs_push = True
    with weights_with(recorder).sampling(lambda: recorder.calls.append("push"), again=again):
        recorder.calls.append("rollouts")
    assert recorder.calls == ["push", "before_sampling", "rollouts", f"after_sampling(again={again})"]


def test_a_server_that_is_lost_as_it_wakes_or_falls_asleep_is_recovered() -> None:
    """As one is that hangs."""
    recorder, losses = Recorder(), [PolicyServerLostError("hangs")] * 2

    def lost(name: str) -> None:
        recorder.calls.append(name)
        if losses:
            raise losses.pop()

    recorder.before_sampling = lambda: lost("before_sampling")  # type: ignore[method-assign]
    recorder.after_sampling = lambda *, again: lost("after_sampling")  # type: ignore[method-assign, misc]
    with weights_with(recorder).sampling(lambda: None, again=False):
        losses.append(PolicyServerLostError("hangs"))
    got_back = ["make_room", "recover", "disconnect", "reset"]
    waking = [*["before_sampling", *got_back] * 2, "before_sampling"]
    assert recorder.calls == [*waking, "after_sampling", *got_back, "after_sampling"]


def test_after_a_failure_the_server_is_left_as_it_is() -> None:
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError), weights_with(recorder).sampling(lambda: None, again=False):
        raise ZeroDivisionError
    assert recorder.calls == ["before_sampling"]


def test_nothing_is_asked_of_a_server_that_never_sleeps() -> None:
    recorder = Recorder()
    with weights_with(recorder, sharing=False).sampling(lambda: None, again=False):
        pass
    weights_with(recorder, sharing=False).before_saving()
    assert recorder.calls == []


@pytest.mark.parametrize(
    ("replaces", "only_trainable", "drops"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_server_that_sleeps_drops_its_weights_where_all_of_them_come_again(
    replaces: bool, only_trainable: bool, drops: bool
) -> None:
    weights = weights_with(Recorder())
    weights._accelerator = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    weights._servers = SimpleNamespace(policy=None)
    args: Any = SimpleNamespace(
        vllm_enable_sleep_mode=True, gym_sync_timeout=650.0, gym_sync_only_trainable=only_trainable
    )
    sharing = weights._new_sharing(args, SimpleNamespace(replaces=replaces))
    assert sharing is not None and (sharing._drops_weights, sharing._timeout_s) == (drops, 650.0)


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_dropout_is_told_of_since_nothing_samples_with_it(share: float, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(share))
    ranks: Any = (SimpleNamespace(is_main_process=True), SimpleNamespace(is_main_process=False))
    for accelerator in ranks:
        check_model(SimpleNamespace(), accelerator, model, shares_weights=True)  # type: ignore[arg-type]
    assert caplog.text.count("dropout of up to 0.05") == (share > 0)
    caplog.clear()
    model[1].p, model[0].attention_dropout = 0.0, share
    check_model(SimpleNamespace(), ranks[0], model, shares_weights=True)  # type: ignore[arg-type]
    assert ("dropout" in caplog.text) == (share > 0)
