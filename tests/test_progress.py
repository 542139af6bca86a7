from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from rich.console import Console

from trl_gym.progress import BarProgress, LineProgress, PhaseClock, rollouts_text
from trl_gym.rollouts.attempts import CollectionStatus

METRICS = {"reward": 0.5, "success": 0.25, "seconds/rollouts": 3.1, "seconds/weight_sync": 0.06, "loss": 1.0}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let seconds pass, without waiting for them."""
    now = [100.0]
    monkeypatch.setattr("trl_gym.progress.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_nested_time_counts_for_the_innermost_phase(passes: Callable[[float], None]) -> None:
    clock = PhaseClock()
    with clock.phase("outer"):
        passes(2.0)
        with clock.phase("inner"):
            passes(5.0)
        passes(1.0)
    assert clock.take() == {"outer": 3.0, "inner": 5.0}
    assert clock.take() == {}


def test_time_outside_phases_counts_for_nothing(passes: Callable[[float], None]) -> None:
    clock = PhaseClock()
    passes(2.0)
    with clock.phase("a"):
        passes(0.5)
    passes(2.0)
    assert clock.take() == {"a": 0.5}


def test_leaving_closes_what_an_exception_left_open() -> None:
    changes: list[str | None] = []
    clock = PhaseClock(changes.append)
    clock.enter("update")
    clock.enter("scoring")
    clock.leave("update")
    assert changes == ["update", "scoring", None]


def test_piped_output_is_one_plain_line_per_step() -> None:
    out = io.StringIO()
    progress = LineProgress(Console(file=out, width=40))
    progress.start(20, 0)
    progress.evaluated(0, METRICS)
    progress.phase("rollouts 1/2")
    progress.step(1, METRICS)
    progress.stop()
    assert out.getvalue().splitlines() == [
        "evaluation at step 0: reward 0.500, success 0.250",
        "step 1/20: reward 0.500, success 0.250 (rollouts 3.1 s, weight sync 0.1 s)",
    ]


def status(num_done: int) -> CollectionStatus:
    return CollectionStatus(
        num_done=num_done, num_failed=1, num_running=2, num_retried=0, num_total=64, slowest=("calc", 7.0)
    )


def test_the_text_about_rollouts_is_one_line() -> None:
    several = CollectionStatus(
        num_done=3, num_failed=1, num_running=4, num_retried=2, num_total=16, slowest=("calc", 12.4)
    )
    assert rollouts_text(several) == "rollouts 3/16, 1 failed, 2 retried, 4 running, slowest calc 12 s"
    none = CollectionStatus(num_done=0, num_failed=0, num_running=0, num_retried=0, num_total=2)
    assert rollouts_text(none) == "rollouts 0/2"


def test_piped_output_says_now_and_then_how_far_a_long_batch_is() -> None:
    out, now = io.StringIO(), [0.0]
    progress = LineProgress(Console(file=out, width=40), clock=lambda: now[0])
    progress.start(20, 0)
    progress.phase("rollouts")
    for seconds in range(0, 70, 5):
        now[0] = float(seconds)
        progress.rollouts(status(seconds))
    progress.phase("scoring")
    now[0] = 80.0
    progress.rollouts(status(64))
    assert out.getvalue().splitlines() == [
        "rollouts 30/64, 1 failed, 2 running, slowest calc 7 s",
        "rollouts 60/64, 1 failed, 2 running, slowest calc 7 s",
    ]


def test_the_bar_shows_how_far_a_batch_is() -> None:
    out = io.StringIO()
    progress = BarProgress(Console(file=out, force_terminal=True, width=160))
    progress.start(20, 0)
    progress.rollouts(status(12))
    progress.stop()
    assert "rollouts 12/64, 1 failed, 2 running, slowest calc 7 s" in out.getvalue()


def test_the_bar_shows_step_reward_and_phase() -> None:
    out = io.StringIO()
    progress = BarProgress(Console(file=out, force_terminal=True, width=120))
    progress.start(20, 0)
    progress.step(3, METRICS | {"rollouts/failed_fraction": 0.5})
    progress.phase("rollouts 64/128")
    progress.stop()
    text = out.getvalue()
    assert "3/20" in text
    assert "reward 0.500, success 0.250, failed 50%" in text
    assert "rollouts 64/128" in text


# -- which one is chosen ----------------------------------------------------------------------------------------------

CHOOSE = "from trl_gym.progress import make_progress; print(*[type(make_progress(live=l)).__name__ for l in (1, 0)])"


def chosen(**environment: str) -> str:
    """By a process whose output is a terminal."""
    ours, theirs = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", CHOOSE], stdout=theirs, env={**os.environ, **environment}, check=True)
        return os.read(ours, 1000).decode().strip()
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_terminal_gets_a_bar_unless_it_is_not_wanted() -> None:
    assert chosen(TERM="xterm") == "BarProgress LineProgress"


def test_a_pipe_gets_lines() -> None:
    done = subprocess.run([sys.executable, "-c", CHOOSE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "LineProgress LineProgress"  # a notebook: tests/notebooks/test_life_cycle.py
