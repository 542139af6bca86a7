"""One optimizer step on prepared rollouts, through the real trainers and the real loss, without servers.

`gym_step` is `GymGRPOTrainer` on rollouts of which some have failed; `reference_step` is TRL's own `GRPOTrainer` on
what is left of them: every group with as many members fewer, as if nobody had asked for them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate.utils.imports as accelerate_imports
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.imports import _is_package_available as find_package
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.policy_server.tiny_model import build_model, build_tokenizer
from tests.rollouts.sampled import calls_in
from trl_gym import GymGRPOConfig, GymGRPOTrainer, compat
from trl_gym.batches import GenerationBatch
from trl_gym.errors import FailureKind, RolloutFailure
from trl_gym.rollouts.queue import EndedGroup, TaskGroup
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.rollout import Rollout
from trl_gym.rollouts.rows import LOSS_TYPES as LOSS_TYPES
from trl_gym.rollouts.source import BatchInfo, Collected
from trl_gym.rollouts.trajectory import Trajectory, from_calls

NUM_MEMBERS = 4
AGENT = "arithmetic"
Failed = Collection[tuple[int, int]]  # (task, member)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One optimizer step.

    Attributes:
        name: Unique.
        failed: Rollouts that fail, as (task, member).
        num_tasks: Groups.
        num_further: Tasks of the dataset that are not of the batch.
        equal: Tasks whose rollouts all have the same reward.
        components: Returns the reward components of a rollout by (task, member); None for one without.
        kept: Tasks that are trained, where others than the first are.
        max_rows: Most rows of a rollout; they have one to so many, see `num_rows_of`.
        options: Of the configuration, beyond what all cases have.
        parts: For the reference: rows of each micro-batch that TRL shall take its means over, where that is not all.
    """

    name: str
    failed: Failed
    num_tasks: int = 3
    num_further: int = 0
    equal: Collection[int] = ()
    components: Callable[[int, int], dict[str, Any] | None] = lambda task, member: None
    kept: Sequence[int] | None = None
    max_rows: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    parts: Sequence[int] | None = None

    @property
    def surviving(self) -> dict[int, list[int]]:
        """Members by task; the same number for every task that has any."""
        members = {
            task: [member for member in self.members(task) if (task, member) not in self.failed]
            for task in self.kept or range(self.num_tasks)
        }
        return {task: own for task, own in members.items() if own}

    def members(self, task: int) -> list[int]:
        """Those that make the group: of an over-sampled one, the first with a reward. The last ones end first."""
        ending = reversed(range(NUM_MEMBERS + self.options.get("gym_oversample", 0)))
        return sorted(sorted(ending, key=lambda member: (task, member) in self.failed)[:NUM_MEMBERS])

    def reward(self, task: int, member: int) -> float:
        return 0.5 if task in self.equal else trajectory_of(task, member)[1]


@dataclass(frozen=True)
class Step:
    """What came of it.

    Attributes:
        gradient: By parameter.
        logs: What was logged of the step.
        batches: Micro-batches as they were handed to TRL's loss.
        kept: Tasks that were trained.
    """

    gradient: dict[str, torch.Tensor]
    logs: dict[str, float]
    batches: list[dict[str, torch.Tensor]]
    kept: Sequence[int] = ()


def trajectory_of(task: int, member: int) -> tuple[Trajectory, float, bool]:
    """A prepared rollout: two turns with environment tokens between them, its reward, and whether it was cut."""
    draw = random.Random(f"{task}-{member}")
    prompt = [draw.randrange(10, 400) for _ in range(4 + task)]
    turns = [[draw.randrange(10, 400) for _ in range(draw.randrange(2, 7))] for _ in range(2)]
    added = [draw.randrange(10, 400) for _ in range(3)]
    mask = [1] * len(turns[0]) + [0] * len(added) + [1] * len(turns[1])
    trajectory = Trajectory(
        prompt_ids=prompt,
        completion_ids=turns[0] + added + turns[1],
        env_mask=mask,
        # Near what the policy says (about -6.3), so that importance ratios are neither 1 nor clipped away.
        logprobs=[-6.3 + draw.uniform(-0.3, 0.3) if sampled else 0.0 for sampled in mask],
        num_turns=2,
        turn_ends=[len(turns[0]), len(mask)],
    )
    return trajectory, round(draw.uniform(0, 1), 3), draw.random() < 0.4


def num_rows_of(task: int, member: int, max_rows: int) -> int:
    return 1 + (task + member) % max_rows


def in_rows(whole: Trajectory, num_rows: int) -> list[Trajectory]:
    """The same tokens in several rows. Each begins with all tokens before it as its prompt: every sampled token is
    trained once, in the context that it was sampled in. Two rows are the two turns; a third is the last token."""
    first, last = whole.turn_ends[0], whole.turn_ends[1]
    second = whole.env_mask.index(1, whole.env_mask.index(0))
    starts = [0, second, last - 1][:num_rows]
    ends = [first, last - 1 if num_rows == 3 else last, last] if num_rows > 1 else [last]
    return [
        Trajectory(
            prompt_ids=whole.prompt_ids + whole.completion_ids[:start],
            completion_ids=whole.completion_ids[start:end],
            env_mask=whole.env_mask[start:end],
            logprobs=whole.logprobs[start:end],
            num_turns=1 if num_rows > 1 else 2,
            turn_ends=[end - start] if num_rows > 1 else whole.turn_ends,
        )
        for start, end in zip(starts, ends, strict=False)
    ]


def rollout_of(request: RolloutRequest, case: Case) -> Rollout:
    """The rollout that Gym would have answered with."""
    if (request.task_index, request.member) in case.failed:
        failure = RolloutFailure(kind=FailureKind.DEADLINE, text="took too long", where=f"{AGENT} /run")
        return Rollout(request=request, answer=None, failure=failure, trajectories=[], seconds=9.0)
    trajectory, _, is_cut = trajectory_of(request.task_index, request.member)
    reward = case.reward(request.task_index, request.member)
    cut = {"incomplete_details": {"reason": "max_output_tokens"}} if is_cut else {}
    first, last = trajectory.turn_ends[0], trajectory.turn_ends[1]
    second_prompt = trajectory.prompt_ids + trajectory.completion_ids[: first + 3]
    output = [
        _item(trajectory.prompt_ids, trajectory.completion_ids[:first], trajectory.logprobs[:first]),
        {"type": "function_call", "name": "add", "arguments": "not json"},
        {"type": "function_call_output", "output": '{"error": "no such number"}'},
        _item(second_prompt, trajectory.completion_ids[first + 3 : last], trajectory.logprobs[first + 3 :]),
    ]
    answer = {"reward": reward, "steps": 2 + request.member, "response": {"output": output, **cut}}
    if (components := case.components(request.task_index, request.member)) is not None:
        answer["reward_components"] = components
    [whole] = from_calls(calls_in(answer))
    rows = in_rows(whole, num_rows_of(request.task_index, request.member, case.max_rows))
    return Rollout(request=request, answer=answer, failure=None, trajectories=rows, seconds=1.0)


def save_model(folder: Path) -> Path:
    """A tiny random policy in float64, so that rounding is far below what a row that counts would do."""
    tokenizer = build_tokenizer()
    build_model(tokenizer, tie=True, seed=0).double().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gym_step(model: Path, case: Case, output_dir: Path, *, num_ranks: int = 1) -> Step:
    """One step of `GymGRPOTrainer`, failures and all."""
    return _step(make_trainer(model, case, output_dir, num_ranks=num_ranks))


def make_trainer(
    model: Path, case: Case, output_dir: Path, *, num_ranks: int = 1, is_padded: bool = False, **kwargs: Any
) -> PreparedTrainer:
    """`GymGRPOTrainer` on prepared rollouts."""
    args = gym_config(output_dir, case, num_ranks)
    kind = PaddedTrainer if is_padded else PreparedTrainer
    return _with_other_reference(
        kind(
            case, model=str(model), args=args, train_dataset=tasks(range(case.num_tasks + case.num_further)), **kwargs
        )
    )


def reference_step(model: Path, case: Case, output_dir: Path) -> Step:
    """One step of TRL's `GRPOTrainer` on the rollouts that did not fail; single process, one micro-batch."""
    return trained_reference(model, case, output_dir)[0]


def trained_reference(model: Path, case: Case, output_dir: Path) -> tuple[Step, list[dict[str, float]]]:
    """The same, with what was logged of each step, where the options make several."""
    return trained(make_reference(model, case, output_dir))


def make_reference(model: Path, case: Case, output_dir: Path, *reward_funcs: Any, **options: Any) -> ReferenceTrainer:
    """TRL's `GRPOTrainer` on the rollouts that did not fail, whose `place` reward functions get: (task, member)."""
    sizes = {len(own) for own in case.surviving.values()}
    assert len(sizes) == 1, "TRL's groups are of one size"
    num_members = sizes.pop()
    num_rows = num_members * len(case.surviving)
    args = GRPOConfig(
        **_common(output_dir, num_rows, num_members)
        | {name: value for name, value in case.options.items() if not name.startswith("gym_")}
        | {"gradient_accumulation_steps": 1, "use_vllm": True}
        | options
    )
    with compat.generation_backend(lambda **_: compat.ServedGeneration(lambda: None, dict)):
        trainer = ReferenceTrainer(
            case,
            model=str(model),
            args=args,
            train_dataset=tasks(case.surviving),
            reward_funcs=list(reward_funcs) or prepared_reward,
        )
    return _with_other_reference(trainer)


def gradient_by_hand(
    model: Path, case: Case, dropped: Mapping[tuple[int, int], int] | None = None
) -> dict[str, torch.Tensor]:
    """The gradient of `dapo` or `grpo` in one batch, from the log-probabilities of each row alone.

    Args:
        model: The policy.
        case: The loss is `dapo`, if its options name none.
        dropped: Rows that a rollout, by (task, member), has lost.
    """
    policy = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    rewards = {task: [trajectory_of(task, own)[1] for own in members] for task, members in case.surviving.items()}
    rollouts = []
    for task, members in case.surviving.items():
        group = torch.tensor(rewards[task])
        for member, reward in zip(members, group, strict=True):
            rows = in_rows(trajectory_of(task, member)[0], num_rows_of(task, member, case.max_rows))
            advantage = (reward - group.mean()) / (group.std() + 1e-4)
            rollouts.append((advantage, rows[(dropped or {}).get((task, member), 0) :]))
    num_tokens = sum(sum(row.env_mask) for _, rows in rollouts for row in rows)
    loss = torch.zeros(())
    for advantage, rows in rollouts:
        own_tokens = sum(sum(row.env_mask) for row in rows)
        is_dapo = case.options.get("loss_type", "dapo") == "dapo"
        divisor = num_tokens if is_dapo else own_tokens * len(rollouts)
        for row in rows:
            ids = torch.tensor([row.prompt_ids + row.completion_ids])
            said = policy(ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
            logprobs = said.gather(-1, torch.tensor(row.completion_ids)[:, None])[:, 0]
            mask = torch.tensor(row.env_mask)
            ratio = ((logprobs.detach() - torch.tensor(row.logprobs)) * mask).sum().exp()  # of the row
            loss = loss - advantage * (ratio if ratio <= 3 else 0) * (logprobs * mask).sum() / divisor
    loss.backward()
    return {name: own.grad for name, own in policy.named_parameters() if own.grad is not None}


def lengths_of(batch: dict[str, torch.Tensor]) -> list[int]:
    """Tokens of each row."""
    return (batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)).tolist()


def num_trained(batch: dict[str, torch.Tensor]) -> int:
    """Rows that have a token in the loss."""
    return int(((batch["completion_mask"] * batch["tool_mask"]).sum(1) > 0).sum())


class PreparedSource:
    """Rollouts that are there already. A `RolloutSource`."""

    policy_server = gym_servers = None
    in_flight: Sequence[TaskGroup] = ()

    def __init__(self, case: Case, folder: Path) -> None:
        self._case = case
        self.folder = folder
        self.requests: list[RolloutRequest] = []
        self.optimizer: Any = None

    def collect(self, groups: Sequence[TaskGroup], number: int, batch: BatchInfo) -> Collected:
        assert batch.mode != "train" or isinstance(self.optimizer, AcceleratedOptimizer)
        assert number == len(groups)
        self.requests += [request for group in groups for request in group.requests]
        return Collected(groups=[self._ended(group, batch) for group in groups])

    def _ended(self, group: TaskGroup, batch: BatchInfo) -> EndedGroup:
        rollouts = [rollout_of(request, self._case) for request in group.requests]
        members = self._case.members(group.example["task_index"])
        wanted, surplus = (
            ([one for one in rollouts if (one.request.member in members) == is_wanted] for is_wanted in (True, False))
            if batch.mode == "train"
            else (rollouts, [])
        )
        return EndedGroup(task=group, rollouts=wanted, surplus=surplus, born=batch.step - 1)

    def drain(self) -> None: ...

    def abandon(self) -> None: ...

    def agent_of(self, row: Mapping[str, Any]) -> str:
        return AGENT

    def server_config(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def push_weights(self, model: Any, step: int) -> dict[str, float]:
        return {}

    def describe(self) -> dict[str, str]:
        return {}

    def start(self) -> None: ...

    def connect(self, accelerator: Any, model: Any, hooks: Any) -> None: ...

    def take_optimizer(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def resumed(self) -> None: ...

    def before_saving(self) -> None: ...

    def close(self) -> None: ...


class PreparedTrainer(GymGRPOTrainer):
    """`GymGRPOTrainer` whose rollouts are there already."""

    def __init__(self, case: Case, **kwargs: Any) -> None:
        self._case = case
        self.batches: list[dict[str, Any]] = []
        self.kept: list[int] = []
        super().__init__(**kwargs)

    @property
    def requests(self) -> list[RolloutRequest]:
        return self._source.requests

    def _new_source(self, args: GymGRPOConfig, *_: Any) -> PreparedSource:
        return PreparedSource(self._case, Path(args.output_dir))

    def _next_batch(self, inputs: list[dict[str, Any]]) -> GenerationBatch:
        batch = super()._next_batch(inputs)
        self.kept = [group.ended.task.example["task_index"] for group in batch.groups]
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self.batches.append(inputs)
        return super()._compute_loss(model, inputs)


class PaddedTrainer(PreparedTrainer):
    """It computes every column, and leaves rows where TRL shuffled them."""

    _get_per_token_logps_and_entropies = GRPOTrainer._get_per_token_logps_and_entropies
    _prepare_inputs = GRPOTrainer._prepare_inputs


class ReferenceTrainer(GRPOTrainer):
    """TRL's own, on the surviving rollouts of a case."""

    def __init__(self, case: Case, **kwargs: Any) -> None:
        self._case = case
        self.batches: list[dict[str, Any]] = []
        super().__init__(rollout_func=self._roll_out, **kwargs)

    def _roll_out(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        prepared = [trajectory_of(task, member) for task, own in self._case.surviving.items() for member in own]
        assert len(prepared) == len(prompts)
        masked = [self.args.mask_truncated_completions and cut for *_, cut in prepared]
        self.mask_truncated_completions = False  # TRL would look at the last token, which is drawn
        return {
            "prompt_ids": [trajectory.prompt_ids for trajectory, *_ in prepared],
            "completion_ids": [trajectory.completion_ids for trajectory, *_ in prepared],
            "logprobs": [trajectory.logprobs for trajectory, *_ in prepared],
            "env_mask": [
                [0] * len(t.env_mask) if m else t.env_mask for (t, *_), m in zip(prepared, masked, strict=True)
            ],
            "place": [(task, own) for task, of in self._case.surviving.items() for own in of],
            "prepared": [self._case.reward(task, own) for task, of in self._case.surviving.items() for own in of],
        }

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        return output | {"row": torch.arange(len(inputs))}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._case.parts is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        order = inputs["row"].argsort()
        pieces = order.split(list(self._case.parts))
        return sum(
            len(piece) / len(order) * super(ReferenceTrainer, self).compute_loss(model, _rows(inputs, piece))
            for piece in pieces
        )


def prepared_reward(prepared: list[float], **_: Any) -> list[float]:
    return prepared


def gym_config(output_dir: Path, case: Case, num_ranks: int) -> GymGRPOConfig:
    num_steps = case.options.get("gradient_accumulation_steps", 1)
    num_rows = case.num_tasks * NUM_MEMBERS // num_ranks // num_steps
    return GymGRPOConfig(**_common(output_dir, num_rows, NUM_MEMBERS) | case.options)


def tasks(indices: Collection[int]) -> Dataset:
    question = [{"role": "user", "content": "?"}]
    rows = {task: json.dumps({"responses_create_params": {"input": f"{task}?"}}) for task in indices}
    return Dataset.from_list([{"prompt": question, "task_index": task, "gym_row": rows[task]} for task in indices])


def _common(output_dir: Path, num_rows: int, num_members: int) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "model_init_kwargs": {"dtype": "auto"},  # float64, as `save_model` wrote it
        "num_generations": num_members,
        "per_device_train_batch_size": num_rows,
        "max_completion_length": 16,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-4,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """One thread, and no look at the metadata of packages whenever accelerate asks what there is."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate_imports, "_is_package_available", functools.cache(find_package))
        yield
    torch.set_num_threads(num_threads)


class _KeepGradient(TrainerCallback):
    def __init__(self) -> None:
        self.gradient: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradient = {
            name.removeprefix("module."): parameter.grad.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


def _with_other_reference(trainer: Any) -> Any:
    """A KL term whose gradient is not 0, as it is where the reference is the policy itself."""
    if trainer.ref_model is not None:
        with torch.no_grad():
            for parameter in trainer.ref_model.parameters():
                parameter *= 1.1
    return trainer


def trained(trainer: Any) -> tuple[Step, list[dict[str, float]]]:
    """The gradient of the last step, and what was logged of each."""
    kept = _KeepGradient()
    trainer.add_callback(kept)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Step(kept.gradient, history[0], trainer.batches, getattr(trainer, "kept", ())), history


def _step(trainer: Any) -> Step:
    return trained(trainer)[0]


def _item(prompt: list[int], sampled: list[int], logprobs: list[float]) -> dict[str, Any]:
    bundle = {"prompt_token_ids": prompt, "generation_token_ids": sampled, "generation_log_probs": logprobs}
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "…"}], **bundle}


def _rows(inputs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    return {name: value[rows] if value.ndim else value for name, value in inputs.items()}
