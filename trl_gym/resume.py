"""TRL's GRPO, resumed exactly: the same tasks in the same order, none skipped, none repeated.

transformers restores weights, optimizer, scheduler, random states and the place in the dataset. Of what TRL adds to
that, three things are lost with the process (checked in TRL 1.16), and are put back here:

    micro-steps done       TRL counts from 0 again. After a checkpoint that is not at the end of a generation batch,
                           all later batches would be generated at the wrong micro-steps, from the wrong rows.
    the generation batch   With `steps_per_generation` or `num_iterations` above what one optimizer step takes, part
                           of the batch is still to be trained on. TRL would sample it anew, with newer weights.
    the epoch's order      TRL's sampler draws a new order per epoch, and in a new process the first one again.

The first two are written to the checkpoint folder (`trl_gym_state.rank-<r>.pt`), before transformers writes
`trainer_state.json`; the third follows from the epoch. With it goes the id of the run, which a resumed one keeps.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer

from trl_gym.errors import ConfigError

logger = logging.getLogger(__name__)

_SCHEMA = 1
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True, slots=True)
class RunState:
    """What a checkpoint needs beside what transformers writes.

    Attributes:
        run: Id of the run; the same after it was resumed.
        num_micro_steps: Micro-steps done.
        num_ranks: Ranks of the run.
        buffered: What is left of the generation batch: one entry per micro-step; None between two batches.
    """

    run: str
    num_micro_steps: int
    num_ranks: int
    buffered: list[dict[str, Any]] | None


def save_state(folder: str | Path, rank: int, state: RunState) -> None:
    """Write one rank's state, whole or not at all."""
    path = _path(folder, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    fields = {name: getattr(state, name) for name in RunState.__slots__}
    torch.save({"schema": _SCHEMA, **fields}, beside)
    os.replace(beside, path)


def load_state(folder: str | Path, rank: int, device: Any = "cpu") -> RunState | None:
    """One rank's state; None when the checkpoint has none.

    Raises:
        ConfigError: Another version of trl-gym wrote it.
    """
    path = _path(folder, rank)
    if not path.exists():
        return None
    fields = torch.load(path, map_location=device, weights_only=True)
    if (schema := fields.pop("schema", None)) != _SCHEMA:
        raise ConfigError(f"{path} has schema {schema}, this trl-gym reads {_SCHEMA}; resume with the one it is of.")
    return RunState(**fields)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that was written to its end; None when there is no checkpoint at all.

    Raises:
        ConfigError: There are checkpoints, and all were interrupted.
    """
    found = [
        (int(match[1]), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if path.is_dir() and (match := _CHECKPOINT.fullmatch(path.name))
    ]
    for _, path in sorted(found, reverse=True):
        if _is_complete(path):
            return str(path)
        logger.warning("%s was interrupted while it was written; trying the one before", path)
    if found:
        raise ConfigError(f"No checkpoint in {output_dir} was written to its end; start anew without resuming.")
    return None


class ResumableGRPOTrainer(GRPOTrainer):
    """See the module. A subclass sets `_run` and may override `_resumed`."""

    _run = ""
    _train_sampler: Any = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. True means the newest checkpoint in `output_dir` that was written to its end."""
        if resume_from_checkpoint in (True, "true", "True"):
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _resumed(self) -> None:
        """Called when the state of a checkpoint was put back, before anything is sampled."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self.args.save_only_model:
            state = RunState(
                run=self._run,
                num_micro_steps=self._step,
                num_ranks=self.accelerator.num_processes,
                buffered=self._buffered_inputs if self._step % self._generate_every else None,
            )
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            save_state(folder, self.accelerator.process_index, state)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._restore(checkpoint)

    def _restore(self, checkpoint: str) -> None:
        state = load_state(checkpoint, self.accelerator.process_index, self.accelerator.device)
        if state is not None and state.num_ranks == self.accelerator.num_processes:
            self._run, self._step, self._buffered_inputs = state.run, state.num_micro_steps, state.buffered
        else:
            self._restore_between_batches(checkpoint, state)
        self._last_loaded_step = -1  # what the policy server holds is not known
        if self._train_sampler is not None:
            for _ in range(int(self.state.epoch or 0)):
                next(iter(self._train_sampler), None)  # draws the order of an epoch
        self._resumed()

    def _restore_between_batches(self, checkpoint: str, state: RunState | None) -> None:
        """From a checkpoint of plain TRL, or of another number of ranks: enough where no batch was begun."""
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self._buffered_inputs = None
        if self._step % self._generate_every:
            ranks = f"it was written by {state.num_ranks} ranks" if state else "it was not written by trl-gym"
            raise ConfigError(
                f"{checkpoint} was saved in the middle of a generation batch and its rollouts cannot be taken over: "
                f"{ranks}, or with `save_only_model`. Resume from a checkpoint whose step times "
                f"`gradient_accumulation_steps` is a multiple of {self._generate_every} "
                "(`steps_per_generation` × `num_iterations`)."
            )
        logger.warning("%s has no state of trl-gym for so many ranks; its journal is not used again", checkpoint)

    @property
    def _generate_every(self) -> int:
        """Micro-steps per generation batch."""
        return self.args.steps_per_generation * self.num_iterations


def _path(folder: str | Path, rank: int) -> Path:
    return Path(folder) / f"trl_gym_state.rank-{rank}.pt"


def _is_complete(checkpoint: Path) -> bool:
    """transformers writes this file last of those that resuming needs."""
    try:
        return "global_step" in json.loads((checkpoint / _TRAINER_STATE).read_text())
    except (OSError, ValueError):
        return False
