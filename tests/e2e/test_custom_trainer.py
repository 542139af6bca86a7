"""`recipes/custom_trainer.py` with all its overrides in one training run on real servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.conftest import RECIPES, load
from tests.e2e.training import MAX_MEAN_GAP, RecordingTrainer, config, gap
from trl_gym import GymServers, PolicyServer, load_gym_dataset
from trl_gym.dataset import gym_row
from trl_gym.rollouts.journal import read_journal

pytestmark = [pytest.mark.e2e, pytest.mark.shares("small")]

EASY_STEPS, NUM_STEPS, TURN_TOKENS, TURN_COST = 1, 2, 24, 0.05


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load("recipe_custom_trainer", RECIPES / "custom_trainer.py")


@pytest.fixture(scope="module")
def run(
    recipe: ModuleType,
    small_policy: Path,
    policy: PolicyServer,
    gym: GymServers,
    calculator_data: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """A step on sums and one on everything, then an evaluation."""
    folder = tmp_path_factory.mktemp("custom")
    train, validation = calculator_data.generate(folder / "data", num_train=256, num_validation=16, seed=0)

    class Recording(RecordingTrainer, recipe.CustomTrainer):
        pass

    own = {"easy_steps": EASY_STEPS, "turn_tokens": TURN_TOKENS, "turn_cost": TURN_COST}
    args = config(
        folder, recipe.CustomConfig, max_steps=NUM_STEPS, eval_steps=NUM_STEPS, reward_weights=[1.0, 0.1], **own
    )
    with Recording(
        model=str(small_policy),
        reward_funcs=[recipe.bare_answer],
        args=args,
        train_dataset=load_gym_dataset(train),
        eval_dataset=load_gym_dataset(validation),
        policy_server=policy,
        gym_servers=gym,
    ) as trainer:
        trainer.train()
        yield trainer


def batches(run: Any, mode: str = "train") -> list[dict[str, Any]]:
    return [batch for batch in run.seen if batch["mode"] == mode]


def test_the_curriculum_begins_with_sums_and_spares_evaluation(run: Any) -> None:
    tools = [{r.request.row["expected_tool"] for r in batch["rollouts"]} for batch in batches(run)]
    assert tools == [{"add"}, {"add", "subtract"}]
    groups: dict[tuple[int, int], set[int]] = {}
    for batch in batches(run):
        for rollout in batch["rollouts"]:
            task = run.train_dataset[rollout.request.task_index]
            assert gym_row(task)["expected_arguments"] == rollout.request.row["expected_arguments"]
            groups.setdefault((batch["step"], rollout.request.group), set()).add(rollout.request.task_index)
    assert len(groups) == NUM_STEPS * 8 and all(len(tasks) == 1 for tasks in groups.values())
    [evaluated] = batches(run, "eval")
    asked = sorted(gym_row(example)["expected_answer"] for example in run.eval_dataset)
    assert sorted(r.request.row["expected_answer"] for r in evaluated["rollouts"]) == asked


def test_no_turn_is_longer_than_it_may_be(run: Any) -> None:
    rollouts = [rollout for batch in run.seen for rollout in batch["rollouts"]]
    assert {r.request.row["responses_create_params"]["max_output_tokens"] for r in rollouts} == {TURN_TOKENS}
    longest = max(len(call.generation_ids) for r in rollouts for call in run.calls[r.request.rollout_id])
    assert 8 < longest <= TURN_TOKENS


def test_only_the_turn_that_decided_is_trained(run: Any) -> None:
    """In what reaches the loss: after a wrong call no later token counts, after a right one all of them do."""
    num_cut = 0
    for batch in run.seen:
        trained = (batch["completion_mask"] * batch["tool_mask"]).sum(1).tolist()
        for row, rollout in enumerate(batch["rollouts"]):
            lengths = [len(call.generation_ids) for call in run.calls[rollout.request.rollout_id]]
            is_cut = not rollout.answer["call_correct"]
            assert trained[row] == (lengths[0] if is_cut else sum(lengths))
            num_cut += is_cut and len(lengths) > 1
    assert num_cut > 0
    assert max(gap(batch) for batch in run.seen) < MAX_MEAN_GAP


def test_the_advantages_are_of_the_rewards_as_they_were_formed(run: Any, recipe: ModuleType) -> None:
    seen: set[float] = set()
    for batch in batches(run):
        rollouts = batch["rollouts"]
        formed = torch.tensor(
            [r.answer["reward"] - TURN_COST * (len(run.calls[r.request.rollout_id]) - 1) for r in rollouts],
            dtype=torch.float32,
        )
        bare = torch.tensor(
            recipe.bare_answer(completions=[[recipe_message(r)] for r in rollouts]), dtype=torch.float32
        )
        rewards = (formed + 0.1 * bare).view(-1, 8)
        expected = (rewards - rewards.mean(1, keepdim=True)).flatten()
        torch.testing.assert_close(batch["advantages"], expected, atol=1e-5, rtol=0)
        assert bare.sum() > 0
        seen |= set(formed.tolist())
    assert len(seen) > 2


def recipe_message(rollout: Any) -> dict[str, Any]:
    """The last item of Gym's answer as a chat message."""
    last = rollout.answer["response"]["output"][-1]
    if last["type"] != "message":
        return {"role": "tool", "content": ""}
    return {"role": "assistant", "content": "".join(part["text"] for part in last["content"])}


def test_it_trained(run: Any, recipe: ModuleType) -> None:
    metrics = [json.loads(line) for line in (Path(run.args.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, NUM_STEPS + 1))
    assert all(line["grad_norm"] > 0 and 0 < line["rewards/bare_answer/mean"] < 1 for line in metrics)
    assert len(list(read_journal(Path(run.args.output_dir) / "rollouts"))) == NUM_STEPS * 64 + 16
    assert run.policy_server.client.weight_version() == str(NUM_STEPS)
