"""Show the progress of a run: a bar in a terminal or notebook, a line per step if the output is piped.

The texts of progress lines are made at the end of this file; `PhaseClock` measures the seconds in them.
"""

from __future__ import annotations

import contextlib
import html
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from trl_gym.rollouts.attempts import CollectionStatus

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

    def phase(self, text: str | None) -> None: ...

    def rollouts(self, status: CollectionStatus) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluated(self, step: int, metrics: Mapping[str, float], name: str = "") -> None: ...

    def stop(self) -> None: ...


class BarProgress:
    """Show one live bar: steps, time, reward, phase. Evaluations are printed above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[reward]}"),
            TextColumn("[dim]{task.fields[phase]}"),
            console=console,
            transient=False,
        )
        self._task = self._bar.add_task("", total=None, reward="", phase="")

    def start(self, num_steps: int, first_step: int) -> None:
        self._bar.reset(self._task, total=num_steps, completed=first_step)  # time counts from here
        self._bar.start()

    def phase(self, text: str | None) -> None:
        self._bar.update(self._task, phase=(text or "").replace("_", " "))

    def rollouts(self, status: CollectionStatus) -> None:
        self._bar.update(self._task, phase=rollouts_text(status))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._bar.update(self._task, completed=step, reward=headline(metrics))

    def evaluated(self, step: int, metrics: Mapping[str, float], name: str = "") -> None:
        self._console.print(evaluation_text(step, metrics, name), highlight=False)

    def stop(self) -> None:
        self._bar.stop()


class LineProgress:
    """Print one plain line per logged step, for logs and pipes, and more for a batch of rollouts that takes long.

    Args:
        console: Console to print to.
        clock: Returns seconds; only differences count.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._num_steps = 0
        self._next_line = math.inf

    def start(self, num_steps: int, first_step: int) -> None:
        self._num_steps = num_steps

    def phase(self, text: str | None) -> None:
        self._next_line = self._clock() + _LINE_EVERY_S

    def rollouts(self, status: CollectionStatus) -> None:
        if self._clock() >= self._next_line:
            self._next_line = self._clock() + _LINE_EVERY_S
            self._print(rollouts_text(status))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        seconds = ", ".join(
            f"{name.partition('/')[2].replace('_', ' ')} {value:.1f} s"
            for name, value in metrics.items()
            if name.startswith("seconds/")
        )
        self._print(f"step {step}/{self._num_steps}: {headline(metrics)}" + (f" ({seconds})" if seconds else ""))

    def evaluated(self, step: int, metrics: Mapping[str, float], name: str = "") -> None:
        self._print(evaluation_text(step, metrics, name))

    def stop(self) -> None:
        pass

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


class NotebookProgress:
    """Show one line in a notebook, drawn again in place: rich's own live display needs ipywidgets and shows nothing
    without. IPython is imported only here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handle: Any = None
        self._step = self._num_steps = 0
        self._reward = self._phase = ""
        self._started = self._drawn = 0.0

    def start(self, num_steps: int, first_step: int) -> None:
        self._step, self._num_steps = first_step, num_steps
        self._reward = self._phase = ""
        self._started = time.monotonic()
        from IPython.display import HTML, display

        self._handle = display(HTML(self._document()), display_id=True)  # in the output of the cell that trains

    def phase(self, text: str | None) -> None:
        self._phase = (text or "").replace("_", " ")
        self._draw()

    def rollouts(self, status: CollectionStatus) -> None:
        self._phase = rollouts_text(status)
        self._draw()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step, self._reward = step, headline(metrics)
        self._draw(now=True)

    def evaluated(self, step: int, metrics: Mapping[str, float], name: str = "") -> None:
        from IPython.display import HTML, display

        display(HTML(f"<div>{html.escape(evaluation_text(step, metrics, name))}</div>"))

    def stop(self) -> None:
        self._phase = ""
        self._draw(now=True)

    def _draw(self, now: bool = False) -> None:
        with self._lock:
            if self._handle is None or (not now and time.monotonic() - self._drawn < _DRAW_EVERY_S):
                return
            self._drawn = time.monotonic()
            from IPython.display import HTML

            self._handle.update(HTML(self._document()))

    def _document(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        text = f"step {self._step}/{self._num_steps} · {minutes}:{seconds:02d}"
        text = " · ".join(filter(None, [text, self._reward, self._phase]))
        return (
            f'<progress value="{self._step}" max="{max(self._num_steps, 1)}" style="width:20em"></progress> '
            f"<span>{html.escape(text)}</span>"
        )


def make_progress(*, live: bool) -> RunProgress:
    """Return a bar if `live` and the output is a terminal or a notebook, else lines."""
    console = Console()
    if live and console.is_jupyter:  # first: a notebook is not a terminal
        return NotebookProgress()
    return BarProgress(console) if live and console.is_terminal else LineProgress(console)


def evaluation_text(step: int, metrics: Mapping[str, float], name: str = "") -> str:
    """Return e.g. `"evaluation of hard at step 12: reward 0.500, success 0.250"`."""
    return f"evaluation{' of ' + name if name else ''} at step {step}: {headline(metrics)}"


def headline(metrics: Mapping[str, float]) -> str:
    """Return reward and success, as far as measured, and the fraction of failed rollouts, if any failed."""
    shown = [
        f"{name} {metrics[name]:.3f}" for name in ("reward", "success") if isinstance(metrics.get(name), int | float)
    ]
    failed = metrics.get("rollouts/failed_fraction")
    return ", ".join(shown + ([f"failed {failed:.0%}"] if failed else []))


def rollouts_text(status: CollectionStatus) -> str:
    """Return e.g. `"rollouts 12/32, 1 failed, 4 running, slowest math_agent 41 s"`."""
    counts = (("failed", status.num_failed), ("retried", status.num_retried), ("running", status.num_running))
    parts = [f"rollouts {status.num_done}/{status.num_total}"]
    parts += [f"{number} {name}" for name, number in counts if number]
    if status.slowest is not None:
        parts.append(f"slowest {status.slowest[0]} {status.slowest[1]:.0f} s")
    return ", ".join(parts)
