"""What each of two ranks does in `test_gradient.py`: cases of `gradient.py`, gradients to a file of a folder."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tests.gradient import LOSS_TYPES, Case, gym_step, lean, lengths_of, make_trainer, num_trained, tasks
from trl_gym.config_checks import TOKEN_MEAN_LOSSES
from trl_gym.errors import RolloutError

# Rows 0 to 5 are rank 0's, the others rank 1's: group 1 lies across both.
UNEQUAL = {(0, 1), (1, 0), (2, 3)}
EMPTY_RANK = {(1, member) for member in range(4)}
VESPO = {"vllm_importance_sampling_mode": "token_truncate"}


def by_token(loss_type: str) -> dict[str, Any]:
    """Options with which rows of a rollout are exactly what one row with all of its tokens is: nothing by sequence."""
    off = {"vllm_importance_sampling_correction": False}
    return {"loss_type": loss_type} | (
        off if loss_type == "vespo" else {"vllm_importance_sampling_mode": "token_mask"}
    )


def cases() -> list[Case]:
    """Those that are compared with a reference."""
    found = []
    for loss_type in LOSS_TYPES:
        options = {"loss_type": loss_type} | (VESPO if loss_type == "vespo" else {})
        # TRL's `bnpo` is a mean over what a rank has: 4 rows on rank 0, 5 on rank 1.
        parts = (4, 5) if loss_type == "bnpo" else None
        found.append(Case(name=f"unequal-{loss_type}", failed=UNEQUAL, options=options, parts=parts))
        found.append(Case(name=f"empty_rank-{loss_type}", failed=EMPTY_RANK, num_tasks=2, options=options))
        for max_rows in (2, 3):
            name, own = f"{max_rows}_rows-{loss_type}", by_token(loss_type)
            found.append(Case(name=name, failed=UNEQUAL, max_rows=max_rows, options=own, parts=parts))
    return found


def refilled(loss_type: str) -> Case:
    """Four groups, on two ranks or on one. Of the first two one has equal rewards and one fails, and of the further
    tasks four have equal rewards. One rollout of each of the others fails."""
    options = {"loss_type": loss_type, "gym_refill_rounds": 9} | (VESPO if loss_type == "vespo" else {})
    failed = {(task, task % 4) for task in range(10)} | {(1, member) for member in range(4)}
    equal, parts = {0, 4, 5, 6, 8}, (6, 6) if loss_type == "bnpo" else None
    return Case(
        name=f"refilled-{loss_type}",
        failed=failed,
        equal=equal,
        num_tasks=4,
        num_further=6,
        options=options,
        parts=parts,
    )


def oversampled(loss_type: str) -> Case:
    """Two groups of six rollouts, of which the first four to end with a reward are wanted; three have one."""
    options = {"loss_type": loss_type, "gym_oversample": 2} | (VESPO if loss_type == "vespo" else {})
    failed = {(0, 5), (0, 2), (0, 0), (1, 0), (1, 3), (1, 4)}
    parts = (3, 3) if loss_type == "bnpo" else None
    return Case(name=f"oversampled-{loss_type}", failed=failed, num_tasks=2, options=options, parts=parts)


def in_steps() -> list[Case]:
    """Two micro-batches on each rank, with unequal numbers of rows, and the KL term where it takes several rows."""
    options = {"gradient_accumulation_steps": 2}
    return [
        Case(
            name=f"in_steps-{loss_type}",
            failed=UNEQUAL,
            max_rows=3,
            options=by_token(loss_type) | options | ({} if loss_type in TOKEN_MEAN_LOSSES else {"beta": 0.1}),
        )
        for loss_type in LOSS_TYPES
        if loss_type != "bnpo"
    ]


def in_components() -> Case:
    """Rollouts of a group that lies across ranks have different components; those of the last have none."""
    options = {"gym_reward_components": True, "multi_objective_aggregation": "normalize_then_sum"}
    return Case(
        name="components",
        failed=UNEQUAL,
        components=lambda task, member: dict.fromkeys("abc"[member % 2 : 3 - task], (member + 1) / (task + 2)),
        options=options,
    )


# What a subclass may override, in the trainer's thread.
SEAMS = ("choose_task", "build_request", "compute_rewards", "on_rollouts")


def broken(*_: Any) -> Any:
    """An override with a mistake in it."""
    raise ZeroDivisionError("in an override")


def below_fraction() -> Case:
    """Too many fail on rank 0 alone, not too many on rank 1 alone, and too many on both."""
    return Case(name="below_fraction", failed=UNEQUAL | {(0, 0), (2, 0)}, options={"gym_min_valid_fraction": 0.6})


def evaluation() -> tuple[Case, range]:
    """Ten rollouts in batches of eight over two ranks: accelerate fills the last one up with tasks from the start."""
    options = {"num_generations_eval": 2, "per_device_eval_batch_size": 4}
    return Case(name="evaluation", failed={(4, 0), (1, 1)}, max_rows=3, options=options), range(5)


def main(model: str, folder: str) -> None:
    with lean():
        torch.save(found(Path(model), Path(folder)), Path(folder) / f"rank-{os.environ['RANK']}.pt")


def found(model: Path, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    kept_groups = [kind(loss_type) for kind in (refilled, oversampled) for loss_type in LOSS_TYPES]
    for case in [*cases(), *in_steps(), *kept_groups]:
        step = gym_step(model, case, folder / "run", num_ranks=2)
        trained = [num_trained(batch) for batch in step.batches]
        sizes = [len(batch["advantages"]) for batch in step.batches]
        lengths = [lengths_of(batch) for batch in step.batches]
        results[case.name] = {
            "gradient": step.gradient, "logs": step.logs, "trained": trained, "sizes": sizes, "lengths": lengths,
            "kept": step.kept,
        }  # fmt: skip
    try:
        gym_step(model, below_fraction(), folder / "run", num_ranks=2)
    except RolloutError as error:
        results["error"] = str(error)
    trainer = make_trainer(model, in_components(), folder / "run", num_ranks=2)
    trainer.train()
    results["components"] = trainer.reward_func_names, list(trainer._logs["advantages"])
    told: list[Any] = []
    trainer = make_trainer(model, Case(name="told", failed=UNEQUAL), folder / "run", num_ranks=2)
    trainer.on_rollouts = told.append
    trainer.train()
    results["told"] = [[asdict(fact) for fact in facts] for facts in told]
    state = folder / f"optimizer-{os.environ['RANK']}.pt"
    torch.save(torch.ones(3), state)
    results["optimizer"] = torch.load(state, map_location=trainer.args.device)  # as transformers resumes
    for seam in SEAMS:
        trainer = make_trainer(model, Case(name=seam, failed=()), folder / "run", num_ranks=2)
        if os.environ["RANK"] == "1":
            setattr(trainer, seam, broken)
        try:
            trainer.train()
        except Exception as error:
            results[seam] = f"{type(error).__name__}: {error}"
    case, evaluated = evaluation()
    trainer = make_trainer(model, case, folder / "run", num_ranks=2)
    results["evaluation"] = trainer.evaluate(tasks(evaluated))
    return results
