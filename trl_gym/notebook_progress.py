"""The progress of a run in a notebook: one line that is drawn again in place. Imported only where IPython runs us.

rich's own live display needs ipywidgets in a notebook, and shows nothing without.
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from IPython.display import HTML, display

from trl_gym.progress import evaluation_text, headline
from trl_gym.rollouts.watch import CollectionStatus

_EVERY_S = 0.25  # between two drawings of what changes often; steps are always drawn


class NotebookProgress:
    """Implements `RunProgress`. `phase` and `rollouts` may come from other threads; they are drawn four times a second
    at most.

    Args:
        clock: Seconds; only differences count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._handle: Any = None
        self._step = self._num_steps = 0
        self._reward = self._phase = ""
        self._started = self._drawn = 0.0

    def start(self, num_steps: int, first_step: int) -> None:
        self._step, self._num_steps = first_step, num_steps
        self._reward = self._phase = ""
        self._started = self._clock()
        self._handle = display(HTML(self._document()), display_id=True)  # in the output of the cell that trains

    def phase(self, text: str | None) -> None:
        self._phase = (text or "").replace("_", " ")
        self._draw()

    def rollouts(self, status: CollectionStatus) -> None:
        self._phase = f"rollouts {status}"
        self._draw()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step, self._reward = step, headline(metrics)
        self._draw(now=True)

    def evaluated(self, step: int, metrics: Mapping[str, float], name: str = "") -> None:
        display(HTML(f"<div>{html.escape(evaluation_text(step, metrics, name))}</div>"))

    def stop(self) -> None:
        self._phase = ""
        self._draw(now=True)

    def _draw(self, now: bool = False) -> None:
        with self._lock:
            if self._handle is None or (not now and self._clock() - self._drawn < _EVERY_S):
                return
            self._drawn = self._clock()
            self._handle.update(HTML(self._document()))

    def _document(self) -> str:
        minutes, seconds = divmod(int(self._clock() - self._started), 60)
        told = f"step {self._step}/{self._num_steps} · {minutes}:{seconds:02d}"
        told = " · ".join(filter(None, [told, self._reward, self._phase]))
        return (
            f'<progress value="{self._step}" max="{max(self._num_steps, 1)}" style="width:20em"></progress> '
            f"<span>{html.escape(told)}</span>"
        )
