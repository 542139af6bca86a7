"""Exact resuming: the same tasks in the same order, none skipped, none repeated.

transformers restores weights, optimizer, scheduler, random states and the place in the dataset. Of what TRL adds to
that, three things are lost with the process (checked in TRL 1.16), and are put back here:

    micro-steps done       TRL counts from 0 again. After a checkpoint that is not at the end of a generation batch,
                           all later batches would be generated at the wrong micro-steps, from the wrong rows.
    the generation batch   With `steps_per_generation` or `num_iterations` above what one optimizer step takes, part
                           of the batch is still to be trained on. TRL would sample it again, with newer weights.
    the epoch's order      TRL's sampler draws a new order per epoch, and in a new process the first one again.

The first two are written to the checkpoint folder (`trl_gym_state.rank-<r>.pt`), before transformers writes
`trainer_state.json`; the third follows from the epoch. With them go the groups of rollouts that are in flight
(`gym_max_staleness`), and the id of the run, which a resumed one keeps. Which checkpoint is resumed, and whether it
was made as this run would go on, is decided before anything is loaded (`begin`; checkpoints.py, made_with.py).

A checkpoint holds weights between two optimizer steps, and no gradients. One that is asked for within an accumulation
window (transformers' `enable_jit_checkpoint` does so on SIGTERM, just before the optimizer steps) is written when that
step has been made: before, it could only be resumed by computing the window again.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_gym import made_with
from trl_gym.checkpoints import TRAINER_STATE, best_of, checkpoint_to_resume
from trl_gym.errors import ConfigError, StorageError
from trl_gym.ranks import on_all, on_main
from trl_gym.storage import writing
from trl_gym.untrusted import shape_problem

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

    from trl_gym.config import GymGRPOConfig

logger = logging.getLogger(__name__)

_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class QueueState:
    """Groups of rollouts that are in flight on a rank."""

    num_planned: int = 0  # generation batches whose tasks have been drawn, in the run
    options: dict[str, int] = field(default_factory=dict)  # that say what a batch is, and how stale it may become
    # By age, and as plain data: `example`, `batch`, `group`, `members`, and `begun`, the policy that it began with.
    groups: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RunState:
    """The state that a checkpoint needs beside what transformers writes."""

    run: str  # id of the run; the same after it was resumed
    num_micro_steps: int  # micro-steps done
    num_ranks: int  # ranks of the run
    # The rest of the generation batch: one entry per micro-step; None between two batches.
    buffered: list[dict[str, Any]] | None
    queue: QueueState = field(default_factory=QueueState)
    user: dict[str, Any] | None = None  # what `GymGRPOTrainer.checkpoint_state` returned on rank 0; there alone


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins, and what its checkpoints are made with."""

    made_with: Mapping[str, Any]  # `made_with.facts`
    checkpoint: str | None  # folder of the checkpoint that is resumed; None at the beginning
    fits: bool = True  # whether what the checkpoint has of a generation batch fits those of this run


def begin(
    asked: str | bool | None,
    args: GymGRPOConfig,
    process: Accelerator | PartialState,
    facts: Mapping[str, Any],
    *,
    is_told: bool = True,
) -> Start:
    """Choose the checkpoint that a run continues from, and compare what it was made with. Every rank calls it in step.

    Args:
        asked: `resume_from_checkpoint`.
        facts: What this run makes checkpoints with (`made_with.facts`), or the part that is known.
        is_told: Whether changes that are not refused are said.

    Raises:
        ConfigError: See `checkpoints.checkpoint_to_resume` and `made_with.require_same`.
    """
    rank, num_ranks = process.process_index, process.num_processes
    checkpoint = checkpoint_to_resume(asked, args.output_dir, rank, gather_object)
    if checkpoint is None:
        return Start(facts, None)
    lost = gather_object(on_all(process, lambda: made_with.lost_files(checkpoint, rank, num_ranks)))
    given: Any = {"is_allowed": args.gym_resume_changed == "allow", "is_told": is_told}
    fits = on_main(process, lambda: made_with.require_same(checkpoint, facts, lost, **given))
    return Start(facts, checkpoint, fits)


def prepare_folder(folder: str | Path, facts: Mapping[str, Any], *, writes: bool) -> None:
    """Begin a checkpoint: its folder is none that is whole until transformers writes the file that makes it so, also
    where it is one that was written before.

    Args:
        writes: Whether this rank writes what is there once; see `TrainingArguments.should_save`.
    """
    if writes:
        (Path(folder) / TRAINER_STATE).unlink(missing_ok=True)
        made_with.write(folder, facts)


class _StateShape(msgspec.Struct):
    run: str
    num_micro_steps: Annotated[int, msgspec.Meta(ge=0)]
    num_ranks: Annotated[int, msgspec.Meta(ge=1)]
    user: dict[Any, Any] | None = None


def save_state(folder: str | Path, rank: int, state: RunState) -> None:
    """Write one rank's state, whole or not at all. Raises `StorageError`: see `storage.writing`; `ConfigError`: a
    checkpoint cannot hold it."""
    path = _path(folder, rank)
    beside = path.with_suffix(".tmp")
    _require_plain(state)
    fields = {name: getattr(state, name) for name in RunState.__slots__}
    with _writing(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"schema": _SCHEMA, **fields, "queue": asdict(state.queue)}, beside)
        os.replace(beside, path)


def _writing(folder: str | Path) -> contextlib.AbstractContextManager[None]:
    safe = "The checkpoints before it are whole, and the journal has every rollout."
    return writing("The checkpoint", folder, safe=safe, kind=StorageError, also="and resume from the newest one")


def require_plain_tasks(tasks: Any) -> None:
    """Check that a checkpoint can hold examples of the dataset: it holds no code. Raises `ConfigError`: it could not
    be read back."""
    if (problem := _plain_problem(tasks)) is not None:
        raise ConfigError(
            "A checkpoint cannot hold the tasks that are in flight (`gym_max_staleness`): a column of the dataset has "
            f"other values than text, numbers, lists, mappings and tensors ({problem}).",
            "Remove the column, or store it as text.",
        )


def _require_plain(state: RunState) -> None:
    require_plain_tasks(state.queue.groups)
    problem = _plain_problem(state.user) if isinstance(state.user, dict | None) else f"{type(state.user)}"
    if problem is not None:
        raise ConfigError(
            f"A checkpoint cannot hold what `checkpoint_state` returned ({problem}).",
            "Return a dict of text, numbers, lists, mappings and tensors.",
        )


def _plain_problem(value: Any) -> str | None:
    if not value:
        return None
    written = io.BytesIO()
    try:
        torch.save(value, written)
    except Exception as error:  # whatever a value comes to that cannot be pickled
        return f"{type(error).__name__}: {str(error)[:200]}"
    written.seek(0)
    kinds = torch.serialization.get_unsafe_globals_in_checkpoint(written)
    return ", ".join(kinds[:5]) or None


def load_state(folder: str | Path, rank: int, device: Any = "cpu") -> RunState | None:
    """Return one rank's state; None when the checkpoint has none. Raises `ConfigError`: another version of trl-gym
    wrote it, or it is damaged."""
    path = _path(folder, rank)
    if not path.exists():
        return None
    try:
        fields = torch.load(path, map_location=device, weights_only=True)
        schema = fields.pop("schema", None)
        queue = QueueState(**fields.pop("queue", {}))  # an earlier version had none
        state = RunState(**fields, queue=queue) if schema == _SCHEMA else None
    except Exception as error:  # whatever a pickle that is none comes to
        raise ConfigError(
            f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]}).",
            "Resume from an earlier checkpoint.",
        ) from error
    if state is None:
        raise ConfigError(
            f"{path} has schema {schema}, and this trl-gym reads {_SCHEMA}.",
            "Resume with the version of trl-gym that wrote it.",
        )
    problem = shape_problem({name: getattr(state, name) for name in _StateShape.__struct_fields__}, _StateShape)
    if problem is not None:
        raise ConfigError(f"{path} cannot be read ({problem}).", "Resume from an earlier checkpoint.")
    return state


def restored(
    checkpoint: str,
    own: RunState | None,
    num_ranks: Sequence[int | None],
    *,
    run: str,
    num_micro_steps: int,
    generate_every: int,
    fits: bool = True,
) -> RunState:
    """Return the state from which this rank continues.

    Args:
        checkpoint: Folder of the checkpoint, for messages.
        own: What it has for this rank.
        num_ranks: `num_ranks` of what it has for each rank that runs now; None where it has nothing.
        run: Id of the run where the checkpoint has none.
        num_micro_steps: Micro-steps done, as far as optimizer steps tell.
        generate_every: Micro-steps per generation batch.
        fits: Whether what it has of a generation batch fits those of this run; else it is left, as was allowed.

    Raises:
        ConfigError: A generation batch was begun, and a checkpoint of plain TRL or of another number of ranks does not
            have the rest of it.
    """
    if not fits:
        logger.warning(
            "%s: what it has of a generation batch, and of rollouts in flight, does not fit the batches of this run, "
            "and is left out; its journal is not used again",
            checkpoint,
        )
        return RunState(run, num_micro_steps, len(num_ranks), None)
    if own is not None and all(num == len(num_ranks) for num in num_ranks):
        return own
    if own is not None and own.queue.groups:
        raise ConfigError(
            f"{checkpoint} was written by {own.num_ranks} ranks with groups of rollouts in flight "
            f"(`gym_max_staleness`), which {len(num_ranks)} ranks cannot take over.",
            f"Resume with {own.num_ranks} ranks.",
        )
    if num_micro_steps % generate_every:
        writers = max((num for num in num_ranks if num is not None), default=None)
        cause = f"it was written by {writers} ranks" if writers else "it was not written by trl-gym"
        raise ConfigError(
            f"{checkpoint} was saved in the middle of a generation batch and its rollouts cannot be taken over: "
            f"{cause}, or with `save_only_model`.",
            "Resume from a checkpoint whose step times `gradient_accumulation_steps` is a multiple of "
            f"{generate_every} (`steps_per_generation` × `num_iterations`).",
        )
    logger.warning("%s has no state of trl-gym for so many ranks; its journal is not used again", checkpoint)
    return RunState(run, num_micro_steps, len(num_ranks), None)


def read_back(start: Start, accelerator: Accelerator, args: GymGRPOConfig, *, run: str, num_steps: int) -> RunState:
    """Return the state from which this rank continues, with `user` of the main process, of however many ranks that was
    one. Every rank calls it in step; see `restored`.

    Args:
        start: From `begin`.
        run: Its id, where the checkpoint has none.
        num_steps: Optimizer steps made.

    Raises:
        ConfigError: See `load_state` and `restored`.
    """
    checkpoint = str(start.checkpoint)
    own = on_all(accelerator, lambda: load_state(checkpoint, accelerator.process_index, args.device))
    of_ranks = gather_object([own and own.num_ranks])
    num_micro_steps = num_steps * args.gradient_accumulation_steps
    given: Any = {"run": run, "num_micro_steps": num_micro_steps, "generate_every": args.generate_every}
    given["fits"] = start.fits
    # One rank alone may have to refuse, and the others would wait for it below.
    state = on_all(accelerator, lambda: restored(checkpoint, own, of_ranks, **given))
    return replace(state, user=broadcast_object_list([own and own.user])[0])


def find_best(state: TrainerState, start: Start) -> None:
    """Let transformers know where the best checkpoint is, which it forgets when its folder was moved."""
    best = best_of(Path(str(start.checkpoint)))
    if best is not None and best.is_dir():
        state.best_model_checkpoint = str(best)


def draw_orders(sampler: Any, num_epochs: int) -> None:
    """Draw the orders of the epochs that are over, so that TRL's sampler continues with the next one."""
    for _ in range(num_epochs):
        next(iter(sampler), None)


class CheckpointCallback(TrainerCallback):
    """Puts a run's state back when training begins, and writes a checkpoint that came too early after its step."""

    def __init__(
        self, restore: Callable[[], None], save: Callable[[], None], num_micro_steps: Callable[[], int]
    ) -> None:
        self._restore, self._save, self._num_micro_steps = restore, save, num_micro_steps
        self._window: tuple[int, int] | None = None  # optimizer steps and micro-steps where accumulation began
        self._in_first_epoch = True
        self._epoch: tuple[int, torch.Tensor] | None = None  # optimizer steps and random state where the epoch began
        self._is_postponed = False

    def postpones(self, step: int) -> bool:
        """Tell whether a checkpoint has to wait, because gradients are being accumulated; remember that it does."""
        is_open = self._window is not None and self._window[0] == step and self._num_micro_steps() > self._window[1]
        self._is_postponed = self._is_postponed or is_open
        return is_open

    @contextlib.contextmanager
    def saving(self, step: int, output_dir: str | Path) -> Iterator[None]:
        """While open, torch's random state is one that leads to the present state when transformers resumes, and what
        the disk refuses is explained.

        That is the present one, except between the begin of an epoch and its first step: the epoch's iterator has
        drawn from the random state, and will draw from the restored one again.

        Raises:
            StorageError: See `storage.writing`.
        """
        before = None
        if self._epoch is not None and self._epoch[0] == step:
            before = torch.get_rng_state()
            torch.set_rng_state(self._epoch[1])
        try:
            with _writing(Path(output_dir) / f"checkpoint-{step}"):
                yield
        finally:
            if before is not None:
                torch.set_rng_state(before)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._window, self._epoch, self._is_postponed = None, None, False
        self._in_first_epoch = True
        self._restore()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # In the first epoch of a resumed run, transformers restores the random state later than here.
        is_restored = self._in_first_epoch and state.global_step > 0
        self._epoch = None if is_restored else (state.global_step, torch.get_rng_state())
        self._in_first_epoch = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._window = state.global_step, self._num_micro_steps()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._window = None
        if self._is_postponed:
            self._is_postponed = control.should_save = False
            _remove_if_empty(Path(args.output_dir) / f"checkpoint-{state.global_step - 1}")
            self._save()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._is_postponed:
            logger.warning(
                "training ends between two optimizer steps, with gradients that no checkpoint holds, and none was "
                "written; resume from the newest one"
            )


def _remove_if_empty(checkpoint: Path) -> None:
    """Remove the folder that transformers made before it asked for the checkpoint."""
    with contextlib.suppress(OSError):  # it holds a checkpoint, or another rank was quicker
        checkpoint.rmdir()


def _path(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"trl_gym_state.rank-{rank}.pt"
