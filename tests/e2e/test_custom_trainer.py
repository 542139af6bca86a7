"""The blocks of `docs/custom_trainer.md`, as they stand, in one training run on real servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_gym
from tests.conftest import load, page_code
from tests.e2e.training import MAX_MEAN_GAP, RecordingTrainer, gap
from trl_gym import GymServers, PolicyServer
from trl_gym.dataset import gym_row
from trl_gym.rollouts.journal import read_journal

pytestmark = [pytest.mark.e2e, pytest.mark.shares("small")]

EASY_STEPS, NUM_STEPS, TURN_TOKENS, TURN_COST = 1, 2, 24, 0.05


class Shortened(RecordingTrainer):
    """In the place of `GymGRPOTrainer`: a step on sums and one on everything, on servers that run already."""

    servers: dict[str, Any]
    made: list[RecordingTrainer]

    def __init__(self, args: Any, **given: Any) -> None:
        args.max_steps = args.eval_steps = NUM_STEPS
        args.easy_steps, args.turn_tokens = EASY_STEPS, TURN_TOKENS
        super().__init__(args=args, **given, **self.servers)
        self.made.append(self)


@pytest.fixture(scope="module")
def run(
    small_policy: Path,
    policy: PolicyServer,
    gym: GymServers,
    calculator_data: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """The trainer of the page, when it has trained in an empty folder that has the quickstart's data."""
    folder = tmp_path_factory.mktemp("custom")
    calculator_data.generate(folder / "runs/quickstart/data", num_train=256, num_validation=16, seed=0)
    (folder / "page.py").write_text(page_code("custom_trainer.md"))
    Shortened.servers, Shortened.made = {"policy_server": policy, "gym_servers": gym}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(trl_gym, "GymGRPOTrainer", Shortened)
        page = load("custom_trainer_page", folder / "page.py")
        assert isinstance(page.trainer, page.CustomTrainer)
        [trainer] = Shortened.made
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


def test_the_advantages_are_of_the_rewards_as_they_were_formed(run: Any) -> None:
    seen: set[float] = set()
    for batch in batches(run):
        rollouts = batch["rollouts"]
        formed = torch.tensor(
            [r.answer["reward"] - TURN_COST * (len(run.calls[r.request.rollout_id]) - 1) for r in rollouts],
            dtype=torch.float32,
        )
        bare = torch.tensor(
            run.reward_funcs[1](completions=[[last_message(r)] for r in rollouts]), dtype=torch.float32
        )
        rewards = (formed + 0.1 * bare).view(-1, 8)
        expected = (rewards - rewards.mean(1, keepdim=True)).flatten()
        torch.testing.assert_close(batch["advantages"], expected, atol=1e-5, rtol=0)
        assert bare.sum() > 0
        seen |= set(formed.tolist())
    assert len(seen) > 2


def last_message(rollout: Any) -> dict[str, Any]:
    """The last item of Gym's answer as a chat message."""
    last = rollout.answer["response"]["output"][-1]
    if last["type"] != "message":
        return {"role": "tool", "content": ""}
    return {"role": "assistant", "content": "".join(part["text"] for part in last["content"])}


def test_it_trained(run: Any, policy: PolicyServer) -> None:
    metrics = [json.loads(line) for line in (Path(run.args.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, NUM_STEPS + 1))
    assert all(line["grad_norm"] > 0 and 0 < line["rewards/bare_answer/mean"] < 1 for line in metrics)
    longest = [max(len(run.calls[r.request.rollout_id]) for r in batch["rollouts"]) for batch in batches(run)]
    assert [line["custom/longest_turns"] for line in metrics] == longest  # by `log_metric`
    assert len(list(read_journal(Path(run.args.output_dir) / "rollouts"))) == NUM_STEPS * 64 + 16
    assert policy.client.weight_version() == str(NUM_STEPS)
