"""Callbacks of `GymGRPOTrainer`: weight sync, metrics on disk, progress."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_gym.progress import PhaseClock, RunProgress
from trl_gym.storage import writing
from trl_gym.untrusted import parse_json

logger = logging.getLogger(__name__)

EVAL_PREFIX = "eval_"
_EVALUATION_TIME = "runtime"  # transformers logs `<prefix>_runtime` with every evaluation


class WeightSyncCallback(TrainerCallback):
    """Pushes weights after an optimizer step if something will be sampled with them.

    That is when the next micro-step generates, when an evaluation follows, or when training ends. It comes after
    Transformers' own flow callback, whose `should_evaluate` it reads.

    Args:
        generates_next: Tells whether the next micro-step starts with rollouts.
    """

    def __init__(self, push: Callable[[], None], generates_next: Callable[[], bool]) -> None:
        self._push, self._generates_next = push, generates_next

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if ends or control.should_evaluate or self._generates_next():
            self._push()


class PhaseCallback(TrainerCallback):
    """Counts the time of an optimizer step that is not spent on rollouts, scoring or weight sync as `update`."""

    def __init__(self, clock: PhaseClock) -> None:
        self._clock = clock

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._clock.enter("update")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._clock.leave("update")


class MetricsCallback(TrainerCallback):
    """Writes `metrics.jsonl`: one object per logged step, evaluation results in the object of their step.

    A step's line is written when its training metrics are known and rewritten in place when an evaluation follows, so
    a run that dies loses nothing that was logged. A line that a crash or a full disk tore is cut off before anything
    is written after it.

    Args:
        path: The file; a run that does not resume empties it.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._last: dict[str, Any] = {}
        self._offset = 0
        self._is_whole = False  # known to end with a whole line

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        with self._explained():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._keep(state.global_step if state.global_step > 0 else -1)
        self._last, self._offset = {}, self._path.stat().st_size
        self._is_whole = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        numbers = {name: _finite(value) for name, value in logs.items() if isinstance(value, bool | int | float)}
        with self._explained():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if not self._is_whole and self._path.exists():  # of an earlier run: an evaluation before training
                self._keep(math.inf)
            self._is_whole = True
            with open(self._path, "r+" if self._path.exists() else "w+") as file:
                if self._last.get("step") == state.global_step:
                    self._last |= numbers
                else:
                    self._offset = file.seek(0, 2)
                    self._last = {"step": state.global_step, **numbers}
                file.seek(self._offset)
                file.write(json.dumps(self._last) + "\n")
                file.truncate()

    def _keep(self, last_step: float) -> None:
        """Rewrite the file with the lines up to a step; log those that cannot be read, and leave them out."""
        kept = []
        for number, line in enumerate(self._path.read_text().splitlines() if self._path.exists() else [], start=1):
            try:
                step = float(parse_json(line)["step"])
            except (ValueError, LookupError, TypeError, OverflowError):
                logger.warning("%s, line %d: torn by a crash or a full disk; left out", self._path, number)
                continue
            if step <= last_step:
                kept.append(line)
        beside = self._path.with_suffix(".tmp")
        beside.write_text("".join(f"{line}\n" for line in kept))
        os.replace(beside, self._path)

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        safe = "Checkpoints and journal are not affected."
        return writing("The metrics", self._path, safe=safe, also="and resume from the newest checkpoint")


class ProgressCallback(TrainerCallback):
    """Feeds a `RunProgress` from the training loop."""

    def __init__(self, progress: RunProgress) -> None:
        self._progress = progress
        self._running = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._progress.start(state.max_steps, state.global_step)
            self._running = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if (prefix := _evaluation_prefix(logs)) is not None:
            metrics = {name.removeprefix(prefix): value for name, value in logs.items() if name.startswith(prefix)}
            self._progress.evaluated(state.global_step, metrics, prefix.removeprefix(EVAL_PREFIX).rstrip("_"))
        elif "reward" in logs:
            self._progress.step(state.global_step, logs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._running:
            self._progress.stop()
            self._running = False


def _evaluation_prefix(logs: Mapping[str, Any]) -> str | None:
    """Return the prefix of an evaluation's metrics, `"eval_"` or `"eval_<set>_"`; None for a training log."""
    timed = [name for name in logs if name.startswith(EVAL_PREFIX) and name.endswith(_EVALUATION_TIME)]
    return timed[0].removesuffix(_EVALUATION_TIME) if timed else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
