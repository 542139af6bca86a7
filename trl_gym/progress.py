"""Show the progress of a run: a line per step, and below it a bar in a terminal or notebook.

    importing torch, transformers and TRL: 9.2 s
    first rollouts (as long as the slowest of them, at most 120 s each)
    step  1/36: reward 0.535, success 0.531, 3.1 s
    step 1/36 ━━━━╺━━━━━━━━━━ 0:00:06 rollouts 12/128, 116 running, slowest calculator…

Only the last column is cut where a terminal is narrow. The texts are made by the functions at the end of this file;
`PhaseClock` measures the seconds in them.
"""

from __future__ import annotations

import contextlib
import functools
import html
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column

if TYPE_CHECKING:
    from trl_gym.config import GymGRPOConfig
    from trl_gym.rollouts.attempts import CollectionStatus

_SAMPLING = "sampling"  # begins with the first status of rollouts; the phase also waits for other things
_LINE_EVERY_S = 30.0  # between two lines about one batch of rollouts
_DRAW_EVERY_S = 0.25  # between two drawings in a notebook of what changes often; steps are always drawn


class PhaseClock:
    """Measure seconds by phase. Phases nest; time counts for the innermost one only.

    Args:
        on_change: Called with the name of the phase that time counts for from now on (None between phases).
    """

    def __init__(self, on_change: Callable[[str | None], None] = lambda phase: None) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = time.perf_counter()
        self._on_change = on_change

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave(name)

    def enter(self, name: str) -> None:
        self._add_elapsed()
        self._stack.append(name)
        self._on_change(name)

    def leave(self, name: str) -> None:
        """Leave `name` and all phases inside it (an exception may have skipped an `on_step_end`)."""
        self._add_elapsed()
        while self._stack and self._stack.pop() != name:
            pass
        self._on_change(self._stack[-1] if self._stack else None)

    def take(self) -> dict[str, float]:
        """Return seconds per phase since the last call."""
        self._add_elapsed()
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken

    def _add_elapsed(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._since
        self._since = now


class RunProgress(Protocol):
    """Show a run. `start` comes first, `stop` last and always; `phase` and `rollouts` may come from any thread."""

    def start(self, num_steps: int, first_step: int) -> None: ...

    def phase(self, name: str | None, *, evaluates: bool = False) -> None: ...

    def rollouts(self, status: CollectionStatus) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float], name: str = "") -> None: ...

    def stop(self) -> None: ...


class BarProgress:
    """Show one live bar (steps, time, phase), and above it a line for each step, evaluation and first phase.

    Args:
        console: A terminal.
        first: What is said before the first time, see `first_phases`.
    """

    def __init__(self, console: Console, first: Mapping[str, str] | None = None) -> None:
        self._console = console
        self._first = dict(first or {})
        self._evaluates = False
        self._num_steps = 0
        self._bar = Progress(*bar_columns("step"), console=console, expand=True)
        self._task = self._bar.add_task("", total=None, phase="")

    def start(self, num_steps: int, first_step: int) -> None:
        self._num_steps = num_steps
        self._bar.reset(self._task, total=num_steps, completed=first_step)  # time counts from here
        self._bar.start()

    def phase(self, name: str | None, *, evaluates: bool = False) -> None:
        _announce(self._console, self._first, name or "")
        self._evaluates = evaluates
        self._bar.update(self._task, phase=phase_text(name, evaluates=evaluates))

    def rollouts(self, status: CollectionStatus) -> None:
        _announce(self._console, self._first, _SAMPLING)
        self._bar.update(self._task, phase=rollouts_text(status, evaluates=self._evaluates))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        print_line(self._console, step_text(step, self._num_steps, metrics))
        self._bar.update(self._task, completed=step)

    def evaluated(self, step: int, metrics: Mapping[str, float], name: str = "") -> None:
        print_line(self._console, evaluation_text(step, metrics, name))

    def stop(self) -> None:
        self._bar.update(self._task, phase="")
        self._bar.stop()


class LineProgress:
    """Print one plain line per logged step, for logs and pipes, and more for a batch of rollouts that takes long.

    Args:
        first: What is said before the first time, see `first_phases`.
        clock: Returns seconds; only differences count.
    """

    def __init__(
        self, console: Console, first: Mapping[str, str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._first = dict(first or {})
        self._clock = clock
        self._evaluates = False
        self._num_steps = 0
        self._next_line = math.inf

    def start(self, num_steps: int, first_step: int) -> None:
        self._num_steps = num_steps

    def phase(self, name: str | None, *, evaluates: bool = False) -> None:
        _announce(self._console, self._first, name or "")
        self._evaluates = evaluates
        self._next_line = self._clock() + _LINE_EVERY_S

    def rollouts(self, status: CollectionStatus) -> None:
        _announce(self._console, self._first, _SAMPLING)
        if self._clock() >= self._next_line:
            self._next_line = self._clock() + _LINE_EVERY_S
            print_line(self._console, rollouts_text(status, evaluates=self._evaluates))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        print_line(self._console, step_text(step, self._num_steps, metrics, by_phase=True))

    def evaluated(self, step: int, metrics: Mapping[str, float], name: str = "") -> None:
        print_line(self._console, evaluation_text(step, metrics, name))

    def stop(self) -> None:
        pass


class NotebookProgress:
    """Show a bar in a notebook, drawn again in place, and below it a line for each step and evaluation: rich's own
    live display needs ipywidgets and shows nothing without. IPython is imported only here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bar: Any = None
        self._lines: Any = None
        self._said: list[str] = []
        self._step = self._num_steps = 0
        self._phase = ""
        self._evaluates = False
        self._started = self._drawn = 0.0

    def start(self, num_steps: int, first_step: int) -> None:
        self._step, self._num_steps = first_step, num_steps
        self._phase, self._said = "", []
        self._started = time.monotonic()
        from IPython.display import HTML, display  # in the output of the cell that trains

        self._bar = display(HTML(self._document()), display_id=True)
        self._lines = display(HTML(_lines_document(self._said)), display_id=True)

    def phase(self, name: str | None, *, evaluates: bool = False) -> None:
        self._evaluates = evaluates
        self._phase = phase_text(name, evaluates=evaluates)
        self._draw()

    def rollouts(self, status: CollectionStatus) -> None:
        self._phase = rollouts_text(status, evaluates=self._evaluates)
        self._draw()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        self._say(step_text(step, self._num_steps, metrics))
        self._draw(now=True)

    def evaluated(self, step: int, metrics: Mapping[str, float], name: str = "") -> None:
        self._say(evaluation_text(step, metrics, name))

    def stop(self) -> None:
        self._phase = ""
        self._draw(now=True)
        self._bar = self._lines = None  # an evaluation of another cell is shown there

    def _say(self, text: str) -> None:
        from IPython.display import HTML, display

        if self._lines is None:
            display(HTML(_lines_document([text])))
            return
        self._said.append(text)
        self._lines.update(HTML(_lines_document(self._said)))

    def _draw(self, now: bool = False) -> None:
        with self._lock:
            if self._bar is None or (not now and time.monotonic() - self._drawn < _DRAW_EVERY_S):
                return
            self._drawn = time.monotonic()
            from IPython.display import HTML

            self._bar.update(HTML(self._document()))

    def _document(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        text = f"step {self._step}/{self._num_steps} · {minutes}:{seconds:02d}"
        text = " · ".join(filter(None, [text, self._phase]))
        return (
            f'<progress value="{self._step}" max="{max(self._num_steps, 1)}" style="width:20em"></progress> '
            f"<span>{html.escape(text)}</span>"
        )


def _lines_document(lines: Sequence[str]) -> str:
    shown = "".join(f"<div>{html.escape(line)}</div>" for line in lines)
    return f'<div style="max-height:20em;overflow:auto;font-family:monospace">{shown}</div>'


def make_progress(*, live: bool, quiet: bool = False, first: Mapping[str, str] | None = None) -> RunProgress:
    """Return a bar if `live` and the output is a terminal or a notebook, else lines.

    Args:
        quiet: Whether nothing is shown, as by all ranks but one.
        first: What is said before the first time, see `first_phases`. A notebook has no lines for it.
    """
    console = Console(quiet=quiet)
    if live and not quiet and console.is_jupyter:  # first: a notebook is not a terminal
        return NotebookProgress()
    if live and draws(console):
        return BarProgress(console, first)
    return LineProgress(_line_console(quiet), first)


def progress_of(args: GymGRPOConfig) -> RunProgress:
    """Return what shows a run of this configuration; nothing on ranks but the first."""
    return make_progress(live=not args.disable_tqdm, quiet=args.process_index > 0, first=first_phases(args))


def clocks_of(progress: RunProgress) -> dict[str, PhaseClock]:
    """Return the clocks of training, `"train"`, and of evaluation, `"eval"`, whose phases are shown."""
    during_evaluation = functools.partial(progress.phase, evaluates=True)
    return {"train": PhaseClock(progress.phase), "eval": PhaseClock(during_evaluation)}


def loading_model(args: GymGRPOConfig) -> contextlib.AbstractContextManager[None]:
    """While open, show that a trainer loads its model; see `working`."""
    from transformers.utils import logging

    live = not args.disable_tqdm and not logging.is_progress_bar_enabled()  # transformers draws bars of its own
    may_take = "downloaded first where it is not cached"
    return working("loading the model", may_take, live=live, quiet=args.process_index > 0)


def waiting_for_servers(args: GymGRPOConfig, *, quiet: bool) -> contextlib.AbstractContextManager[None]:
    """While open, show that a trainer waits for its servers; see `working`.

    Args:
        quiet: Whether there are none.
    """
    longest = f"at most {args.gym_server_start_timeout:g} s"
    quiet = quiet or args.process_index > 0
    return working("waiting for policy server and NeMo Gym", longest, live=not args.disable_tqdm, quiet=quiet)


@contextlib.contextmanager
def working(text: str, may_take: str = "", *, live: bool = True, quiet: bool = False) -> Iterator[None]:
    """Show what is done outside of training: a live line, and at its end a line with the seconds that it took. Where
    nothing can be drawn, one line at the beginning.

    Args:
        may_take: How long it may take, for who waits.
    """
    console, started = Console(quiet=quiet), time.monotonic()
    begun = f"{text} ({may_take})" if may_take else text

    def ended() -> str:
        return f"{text}: {seconds_text(time.monotonic() - started)}"

    if live and not quiet and console.is_jupyter:
        from IPython.display import HTML, display

        shown = display(HTML(_lines_document([begun])), display_id=True)
        yield
        shown.update(HTML(_lines_document([ended()])))
    elif live and draws(console):
        columns = SpinnerColumn(), TimeElapsedColumn(), _phase_column()
        with Progress(*columns, console=console, expand=True, transient=True) as bar:
            bar.add_task("", total=None, phase=begun)
            yield
        print_line(console, ended())
    else:
        print_line(_line_console(quiet), begun)
        yield


def _line_console(quiet: bool) -> Console:
    return Console(quiet=quiet, force_jupyter=False)  # in a notebook each line would be an output of its own


def draws(console: Console) -> bool:
    """Return whether a line can be drawn again in place."""
    return console.is_terminal and not console.is_dumb_terminal and not console.quiet


def bar_columns(label: str) -> tuple[ProgressColumn, ...]:
    """Return the columns of a bar, for a `Progress` that expands: the last, a task's field `phase`, gets what the
    others leave, and is cut."""
    bar = BarColumn(bar_width=None, table_column=Column(ratio=1))
    return TextColumn(label, style="bold"), MofNCompleteColumn(), bar, TimeElapsedColumn(), _phase_column()


def _phase_column() -> ProgressColumn:
    column = Column(ratio=3, no_wrap=True, overflow="ellipsis")
    return TextColumn(
        "{task.fields[phase]}", style="dim", markup=False, table_column=column
    )  # names may have brackets


def print_line(console: Console, text: str) -> None:
    """Print a sentence as it is, in one line."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _announce(console: Console, first: dict[str, str], name: str) -> None:
    if (text := first.pop(name, None)) is not None:
        print_line(console, text)


# -- texts ------------------------------------------------------------------------------------------------------------


def first_phases(args: GymGRPOConfig) -> dict[str, str]:
    """Return what is said when a run first syncs weights and first samples, as `make_progress` takes it."""
    if args.gym_replay is not None:  # weights go nowhere
        return {}
    return {
        "weight_sync": f"first weight sync, and a probe of it (seconds, at most {args.gym_sync_timeout:g} s)",
        _SAMPLING: f"first rollouts (as long as the slowest of them, at most {args.gym_deadline:g} s each)",
    }


def phase_text(name: str | None, *, evaluates: bool = False) -> str:
    """Return e.g. `"evaluation: weight sync"` for `"weight_sync"`; nothing between phases."""
    return "" if name is None else ("evaluation: " if evaluates else "") + name.replace("_", " ")


def step_text(step: int, num_steps: int, metrics: Mapping[str, float], *, by_phase: bool = False) -> str:
    """Return e.g. `"step  3/36: reward 0.535, success 0.531, failed 2%, 3.1 s"`.

    Args:
        num_steps: Of the whole run.
        metrics: Logged with the step; `seconds/<phase>` since the log before.
        by_phase: Whether the seconds of each phase are said as well.
    """
    seconds = {
        name.partition("/")[2].replace("_", " "): value
        for name, value in metrics.items()
        if name.startswith("seconds/")
    }
    shown = [headline(metrics)] + ([seconds_text(sum(seconds.values()))] if seconds else [])
    parts = ", ".join(f"{name} {seconds_text(value)}" for name, value in seconds.items()) if by_phase else ""
    text = f"step {step:>{len(str(num_steps))}}/{num_steps}: {', '.join(filter(None, shown))}"
    return f"{text} ({parts})" if parts else text


def evaluation_text(step: int, metrics: Mapping[str, float], name: str = "") -> str:
    """Return e.g. `"evaluation of hard at step 12: reward 0.500, success 0.250, 3.1 s"`."""
    seconds = metrics.get("runtime")
    shown = [headline(metrics), seconds_text(seconds) if seconds else ""]
    return f"evaluation{' of ' + name if name else ''} at step {step}: {', '.join(filter(None, shown))}"


def headline(metrics: Mapping[str, float]) -> str:
    """Return reward and success, as far as measured, and the fraction of failed rollouts, if any failed."""
    shown = [
        f"{name} {metrics[name]:.3f}" for name in ("reward", "success") if isinstance(metrics.get(name), int | float)
    ]
    if failed := metrics.get("rollouts/failed_fraction"):
        percent = f"{failed:.0%}"
        shown.append(f"failed {'<1%' if percent == '0%' else percent}")
    return ", ".join(shown)


def rollouts_text(status: CollectionStatus, *, evaluates: bool = False) -> str:
    """Return e.g. `"rollouts 12/32, 1 failed, 4 running, slowest math_agent 41 s"`."""
    counts = (("failed", status.num_failed), ("retried", status.num_retried), ("running", status.num_running))
    parts = [phase_text("rollouts", evaluates=evaluates) + f" {status.num_done}/{status.num_total}"]
    parts += [f"{number} {name}" for name, number in counts if number]
    if status.slowest is not None:
        parts.append(f"slowest {status.slowest[0]} {status.slowest[1]:.0f} s")
    return ", ".join(parts)


def seconds_text(seconds: float) -> str:
    """Return e.g. `"3.1 s"`; from a hundred seconds on without the tenth."""
    return f"{seconds:.1f} s" if seconds < 99.95 else f"{seconds:.0f} s"
