"""What subclasses override, without servers. The trainer at work is in `tests/e2e`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gradient import NUM_MEMBERS, Case, PreparedTrainer, gym_config, make_trainer, save_model, tasks
from trl_gym.errors import ConfigError
from trl_gym.resume import QueueState
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.source import BatchInfo


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("trainer") / "model")


def test_a_curriculum_chooses_the_task_of_a_whole_group(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(model, Case(name="curriculum", failed=()), tmp_path)
    examples = list(trainer.train_dataset)
    rows = [example for example in examples for _ in range(NUM_MEMBERS)]

    def easy_first(example: dict[str, Any], group: int) -> dict[str, Any]:
        return examples[0] if group < 2 else example

    def planned() -> tuple[list[int], list[RolloutRequest]]:
        batch = trainer._batches.train(
            rows, NUM_MEMBERS, number=0, info=BatchInfo(run="run", step=1, mode="train"), ahead=lambda number: None
        )
        trainer._batches.restore(QueueState())
        return [example["task_index"] for example in batch.examples], [one.request for one in batch.rollouts]

    trainer._source.optimizer = trainer.accelerator.prepare(torch.optim.SGD(trainer.model.parameters()))
    tasks_of, requests = planned()
    assert tasks_of == [row["task_index"] for row in rows]
    assert [request.task_index for request in requests[::NUM_MEMBERS]] == [0, 1, 2]
    monkeypatch.setattr(trainer, "choose_task", easy_first)
    tasks_of, requests = planned()
    assert tasks_of == [task for task in (0, 0, 2) for _ in range(NUM_MEMBERS)]
    assert [(r.group, r.task_index) for r in requests] == [(g, t) for g, t in ((0, 0), (1, 0), (2, 2)) for _ in "abcd"]
    assert len({request.rollout_id for request in requests}) == 3 * NUM_MEMBERS


def test_reward_functions_and_refilled_groups_are_refused_before_anything_starts(model: Path, tmp_path: Path) -> None:
    case = Case(name="refill", failed=(), options={"gym_refill_rounds": 2})
    with pytest.raises(ConfigError, match="There are 1 `reward_funcs`, and groups are judged before these are called"):
        make_trainer(model, case, tmp_path, reward_funcs=lambda prompts, **_: [0.0] * len(prompts))


class WithoutCalls(PreparedTrainer):
    def build_trajectories(self, answer: Any, request: Any) -> Any:  # type: ignore[override]
        return []


def test_an_override_without_the_calls_is_refused_before_anything_starts(model: Path, tmp_path: Path) -> None:
    args = gym_config(tmp_path, Case(name="old", failed=()), 1)
    with pytest.raises(
        ConfigError, match=r"WithoutCalls.build_trajectories\(answer.*called with \(answer, request, calls"
    ):
        WithoutCalls(Case(name="old", failed=()), model=str(model), args=args, train_dataset=tasks(range(1)))
