"""What a person is told."""

from __future__ import annotations

from trl_gym.rollouts.call_records import CallState
from trl_gym.rollouts.collection import Outstanding, Phase, Tally, describe_stall, waits_for


def one(phase: Phase = Phase.RUNNING, agent: str = "calc", name: str = "r1", attempt: int = 0, since: float = 0.0):
    return Outstanding(agent, name, attempt, phase, since)


def test_every_wait_has_a_name() -> None:
    assert waits_for(one(Phase.WAITING), None) == "not dispatched (cap)"
    assert waits_for(one(Phase.PAUSED), None) == "pause before another attempt"
    assert waits_for(one(Phase.RECORDING), None) == "records of its model calls (policy server)"
    assert waits_for(one(), CallState(1, 1)) == "model call (policy server)"
    assert waits_for(one(), CallState(1, 0)) == "tool or verifier of calc"
    assert waits_for(one(), CallState(0, 0)) == "tool or verifier of calc (no model call yet)"
    assert "not known" in waits_for(one(), None) and "not known" in waits_for(one(), CallState(1, None))


def test_few_are_listed_one_by_one() -> None:
    outstanding = [one(since=2.0), one(Phase.WAITING, name="r2", attempt=1, since=5.0)]
    text = describe_stall(outstanding, {"r1": CallState(2, 0)}, now=65.0, silent_s=60.0)
    assert text.splitlines() == [
        "No rollout has ended for 60 s; 2 are outstanding:",
        "  r1 (calc, 63 s, attempt 0): tool or verifier of calc",
        "  r2 (calc, 60 s, attempt 1): not dispatched (cap)",
    ]


def test_many_are_grouped_and_none_is_left_out() -> None:
    outstanding = [one(name=f"r{index}", attempt=index % 2, since=float(index)) for index in range(30)]
    outstanding += [one(Phase.WAITING, agent="math", name=f"w{index}") for index in range(10)]
    calls = {f"r{index}": CallState(1, 1) for index in range(30)}
    lines = describe_stall(outstanding, calls, now=100.0, silent_s=60.0).splitlines()
    assert lines == [
        "No rollout has ended for 60 s; 40 are outstanding:",
        "  30 of calc, attempts 0 to 1: model call (policy server); longest r0, 100 s",
        "  10 of math, attempt 0: not dispatched (cap); longest w0, 100 s",
    ]


def test_the_tally_knows_who_has_been_running_longest() -> None:
    tally = Tally(3)
    tally.enter(0, one(Phase.WAITING))
    tally.enter(1, one(agent="slow", since=1.0))
    tally.enter(0, one(since=4.0))
    assert tally.status(10.0).slowest == ("slow", 9.0) and tally.status(10.0).num_running == 2
    tally.enter(1, one(Phase.RECORDING, agent="slow"))
    assert tally.status(10.0).slowest == ("calc", 6.0) and len(tally.outstanding) == 2
    tally.leave(0)
    tally.leave(1)
    assert tally.status(10.0).slowest is None and not tally.outstanding
