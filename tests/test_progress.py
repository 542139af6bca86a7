from __future__ import annotations

import functools
import io
import logging
import os
import pty
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator

import pytest
from rich.cells import cell_len
from rich.console import Console

from trl_gym.progress import (
    BarProgress,
    LineProgress,
    PhaseClock,
    RunProgress,
    first_phases,
    headline,
    make_progress,
    rollouts_text,
    working,
)
from trl_gym.rollouts.attempts import CollectionStatus
from trl_gym.train import CurrentStderr

METRICS = {"reward": 0.5, "success": 0.25, "seconds/rollouts": 3.1, "seconds/weight_sync": 0.06, "loss": 1.0}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let seconds pass, without waiting for them."""
    now = [100.0]
    monkeypatch.setattr("trl_gym.progress.time", types.SimpleNamespace(perf_counter=lambda: now[0]))

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


FIRST = {"weight_sync": "first weight sync (at most 9 s)", "sampling": "first rollouts (at most 7 s each)"}


def status(num_done: int, agent: str = "calc") -> CollectionStatus:
    return CollectionStatus(
        num_done=num_done, num_failed=1, num_running=2, num_retried=0, num_total=64, slowest=(agent, 7.0)
    )


def run(progress: RunProgress, agent: str = "calc") -> Iterator[None]:
    """What a run tells, from its first phase to its end."""
    progress.start(20, 0)
    yield progress.phase("rollouts")  # which waits for the weights
    yield progress.phase("weight_sync")
    yield progress.phase("rollouts", evaluates=True)
    yield progress.rollouts(status(12, agent))
    yield progress.evaluated(0, METRICS | {"runtime": 123.4}, "[/hard]")
    for step in range(1, 21):
        yield progress.phase("rollouts")
        yield progress.rollouts(status(64, agent))
        yield progress.phase(None)
        yield progress.phase("update")
        yield progress.step(step, METRICS | {"rollouts/failed_fraction": 0.02})
    progress.stop()
    yield


LINES = [
    "first weight sync (at most 9 s)",
    "first rollouts (at most 7 s each)",
    "evaluation of [/hard] at step 0: reward 0.500, success 0.250, 123 s",
    *(f"step {step:>2}/20: reward 0.500, success 0.250, failed 2%, 3.2 s" for step in range(1, 21)),
]


@pytest.mark.parametrize(
    ("fraction", "said"), [(0, ""), (1e-4, "failed <1%"), (0.006, "failed 1%"), (1, "failed 100%")]
)
def test_a_few_failed_rollouts_are_not_none(fraction: float, said: str) -> None:
    assert headline({"rollouts/failed_fraction": fraction}) == said


def test_piped_output_is_one_plain_line_per_step() -> None:
    out = io.StringIO()
    for _ in run(LineProgress(Console(file=out, width=40), FIRST)):
        pass
    by_phase = " (rollouts 3.1 s, weight sync 0.1 s)"
    assert out.getvalue().splitlines() == [line + by_phase * line.startswith("step") for line in LINES]


ERASE = "\r\x1b[2K"


@pytest.mark.parametrize("width", [60, 80, 110])
@pytest.mark.parametrize("agent", ["calc", "an_agent_with_a_long_name_" * 5, "[/bold]"])
def test_step_bar_and_time_never_vanish(width: int, agent: str) -> None:
    """The phase is what is cut, whatever it is; steps and evaluations stay above the bar."""
    out = io.StringIO()
    progress = BarProgress(Console(file=out, force_terminal=True, width=width), FIRST)
    for _ in run(progress, agent):
        progress._bar.refresh()
    drawn = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", part) for part in out.getvalue().split(ERASE)]
    bars = [line for part in drawn for line in part.splitlines() if re.match("step +[0-9]+/20 [━╺╸]", line)]
    assert len(bars) > 80
    for bar in bars:
        assert re.match(r"step +\d+/20 [━╺╸]{9,} 0:00:00( |$)", bar) and cell_len(bar) <= width, bar
    assert f"rollouts 64/64, 1 failed, 2 running, slowest {agent}"[: width // 3] in "".join(bars)
    assert f"evaluation: rollouts 12/64, 1 failed, 2 running, slowest {agent}"[: width // 3] in "".join(bars)
    shown = [line.rstrip() for part in drawn for line in part.splitlines() if line.strip() and line not in bars]
    assert shown == LINES
    assert bars[-1].rstrip().endswith("0:00:00")  # no phase is left at the end


def test_what_is_logged_appears_above_the_bar() -> None:
    out = io.StringIO()
    progress = BarProgress(Console(file=out, force_terminal=True, width=80))
    handler = logging.StreamHandler(CurrentStderr())
    progress.start(20, 0)
    try:
        handler.handle(logging.makeLogRecord({"msg": "a gap is large"}))
    finally:
        progress.stop()
    assert f"{ERASE}a gap is large" in out.getvalue()


def test_what_is_done_outside_of_training_says_how_long_it_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(width: int, *, live: bool = True, quiet: bool = False, terminal: bool = True) -> str:
        out = io.StringIO()
        monkeypatch.setattr(
            "trl_gym.progress.Console", functools.partial(Console, file=out, width=width, force_terminal=terminal)
        )
        with working("importing [torch]", "up to a minute", live=live, quiet=quiet):
            pass
        return out.getvalue()

    assert shown(80, terminal=False) == shown(80, live=False) == "importing [torch] (up to a minute)\n"
    assert shown(80, quiet=True) == ""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown(80))
    assert re.search(r"0:00:\d\d importing \[torch\] \(up to a minute\)", plain)
    assert re.search(r"importing \[torch\]: [\d.]+ s\n$", shown(20))


def test_nothing_ends_well_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("trl_gym.progress.Console", functools.partial(Console, file=out, force_terminal=True))
    with pytest.raises(KeyboardInterrupt), working("importing"):
        raise KeyboardInterrupt
    assert "importing:" not in out.getvalue()
    assert out.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # cursor is back, line is gone


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for live in (True, False):
        for _ in run(make_progress(live=live, quiet=True, first=FIRST)):
            pass
    assert capsys.readouterr().out == ""


def test_what_comes_first_is_announced_with_its_bounds_unless_rollouts_are_replayed() -> None:
    config = types.SimpleNamespace(gym_replay=None, gym_sync_timeout=600.0, gym_deadline=120.0)
    assert [*first_phases(config).values()] == [
        "first weight sync, and a probe of it (seconds, at most 600 s)",
        "first rollouts (as long as the slowest of them, at most 120 s each)",
    ]
    config.gym_replay = "rollouts"
    assert first_phases(config) == {}


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
