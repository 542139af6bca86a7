from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from transformers import PretrainedConfig

from tests.rollouts.recorded import POLICY, grouped, request, rollout, write
from trl_gym import GymGRPOConfig
from trl_gym.errors import ConfigError, FailureKind, RolloutFailure
from trl_gym.rollout_options import Sampling
from trl_gym.rollouts.journal import Journal
from trl_gym.rollouts.metrics import training_metrics
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.rollout import Rollout, RolloutFacts, facts_of
from trl_gym.rollouts.source import BatchInfo, JournalSource, check_replay

FAILURE = RolloutFailure(kind=FailureKind.ENVIRONMENT, text="the verifier raised", where="calculator /run")


def group(task: int, rewards: list[float], **changes: Any) -> list[Any]:
    return [rollout(request(task, member, **changes), reward) for member, reward in enumerate(rewards)]


def batch(step: int = 1, epoch: int = 0) -> BatchInfo:
    return BatchInfo(run="run", step=step, mode="train", epoch=epoch)


def replay(folder: Path, asked: Sequence[RolloutRequest], info: BatchInfo) -> list[Rollout]:
    groups = grouped(asked)
    ended = JournalSource(folder).collect(groups, len(groups), info).groups
    return [one for group in ended for one in group.rollouts]


def replayed(folder: Path, task: int, number: int, size: int = 2) -> list[float | None]:
    # Another place in another batch, sampled otherwise: only the task counts.
    asked = [request(task, member, group=7, sampling=Sampling(temperature=0.3)) for member in range(size)]
    return [one.reward for one in replay(folder, asked, batch(epoch=number))]


def test_a_pass_over_the_dataset_takes_the_next_recorded_group(tmp_path: Path) -> None:
    write(tmp_path, group(0, [0.1, 0.2]) + group(1, [0.5, 0.6]))
    write(tmp_path, group(0, [0.3, 0.4]), policy=dataclasses.replace(POLICY, version=9, weights="later"))
    assert replayed(tmp_path, task=0, number=0) == [0.1, 0.2]
    assert replayed(tmp_path, task=0, number=1) == [0.3, 0.4]
    assert replayed(tmp_path, task=0, number=2) == [0.1, 0.2]
    assert replayed(tmp_path, task=1, number=1) == [0.5, 0.6]


def test_tokens_are_as_recorded_and_failures_stay_failures(tmp_path: Path) -> None:
    recorded = [rollout(request(0, 0)), rollout(request(0, 1), failure=FAILURE)]
    write(tmp_path, recorded)
    first, second = replay(tmp_path, [request(0, 0), request(0, 1)], batch())
    assert first.trajectories == recorded[0].trajectories
    assert (second.reward, second.failure, second.trajectories) == (None, FAILURE, [])


def test_all_rows_of_a_recorded_rollout_are_replayed(tmp_path: Path) -> None:
    recorded = rollout(request(0, 0))
    [first] = recorded.trajectories
    recorded = dataclasses.replace(recorded, trajectories=[first, dataclasses.replace(first, prompt_ids=[7, 8])])
    write(tmp_path, [recorded, rollout(request(0, 1))])
    replayed = replay(tmp_path, [request(0, 0), request(0, 1)], batch())
    assert [len(one.trajectories) for one in replayed] == [2, 1]
    assert replayed[0].trajectories == recorded.trajectories


def test_a_rollout_that_was_run_again_counts_as_it_ended_last(tmp_path: Path) -> None:
    write(tmp_path, [rollout(request(0, 0), failure=FAILURE), rollout(request(0, 1), reward=0.25)])
    write(tmp_path, [rollout(request(0, 0), reward=0.5), rollout(request(0, 1), failure=FAILURE)])
    assert replayed(tmp_path, task=0, number=0) == [0.5, 0.25]


def test_groups_that_were_interrupted_come_last(tmp_path: Path) -> None:
    write(tmp_path, group(0, [0.1]), policy=dataclasses.replace(POLICY, version=1))
    write(tmp_path, group(0, [0.3, 0.4]))
    assert replayed(tmp_path, task=0, number=0) == [0.3, 0.4]


def test_what_was_given_up_or_tried_again_is_no_rollout(tmp_path: Path) -> None:
    cancelled = dataclasses.replace(FAILURE, kind=FailureKind.CANCELLED)
    given_up = dataclasses.replace(POLICY, weights="given up")
    write(tmp_path, [*group(0, [0.1]), rollout(request(0, 1), failure=cancelled)], policy=given_up)
    write(tmp_path, [rollout(request(0, 0), failure=FAILURE)], retried=True)
    write(tmp_path, group(0, [0.3, 0.4]))
    write(tmp_path, [rollout(request(0, 1), reward=0.9)], retried=True)  # as the policy server was lost
    assert replayed(tmp_path, task=0, number=0) == [0.3, 0.4]


def test_members_of_different_weights_are_not_one_group(tmp_path: Path) -> None:
    """A step that was trained again after a resume, with other weights than the first time."""
    write(tmp_path, group(0, [0.1, 0.2]))
    write(tmp_path, group(0, [0.3, 0.4]), policy=dataclasses.replace(POLICY, weights="other"))
    assert [replayed(tmp_path, 0, number) for number in (0, 1)] == [[0.1, 0.2], [0.3, 0.4]]


def test_an_over_sampled_group_is_replayed_without_those_that_were_cancelled(tmp_path: Path) -> None:
    """Members of it are missing, and others have numbers above `num_generations`."""
    cancelled = dataclasses.replace(FAILURE, kind=FailureKind.CANCELLED)
    recorded = [
        rollout(request(0, 0), failure=FAILURE),
        rollout(request(0, 1), failure=cancelled),
        rollout(request(0, 2), 0.2),
        rollout(request(0, 3), failure=cancelled),
        rollout(request(0, 4), 0.4),
    ]
    write(tmp_path, recorded)
    assert replayed(tmp_path, task=0, number=0) == [0.2, 0.4]
    assert replayed(tmp_path, task=0, number=0, size=3) == [0.2, 0.4, None]
    with pytest.raises(ConfigError, match="groups of at most 3; `num_generations`"):
        replayed(tmp_path, task=0, number=0, size=4)


def test_groups_of_several_batches_of_the_same_weights_are_apart(tmp_path: Path) -> None:
    write(tmp_path, group(0, [0.1, 0.2]), batch=4)
    write(tmp_path, group(0, [0.3, 0.4]), batch=5)
    assert [replayed(tmp_path, 0, number) for number in (0, 1)] == [[0.1, 0.2], [0.3, 0.4]]


def test_members_that_ran_again_under_newer_weights_are_of_their_group(tmp_path: Path) -> None:
    """The policy server was lost while training ran. The third was sampled again after a resume."""
    later = dataclasses.replace(POLICY, version=4, weights="later")
    write(tmp_path, [rollout(request(0, 0), 0.1), rollout(request(0, 1), failure=FAILURE)], batch=4, retried=True)
    write(tmp_path, [rollout(request(0, 0), 0.1)], batch=4)
    write(tmp_path, [rollout(request(0, 1), 0.2)], batch=4, policy=later)
    assert replayed(tmp_path, task=0, number=0) == [0.1, 0.2]
    write(tmp_path, group(0, [0.5, 0.6]), batch=4, policy=dataclasses.replace(later, weights="resumed"))
    assert [replayed(tmp_path, 0, number) for number in (0, 1)] == [[0.1, 0.2], [0.5, 0.6]]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path, group(0, [0.1, 0.2]))
    with pytest.raises(ConfigError, match=r"gym_replay.*no rollout of the task with index 5 \(5 \+ 1\?\)"):
        replayed(tmp_path, task=5, number=0)
    with pytest.raises(ConfigError, match="groups of at most 2; `num_generations`"):
        replayed(tmp_path, task=0, number=0, size=3)


def test_a_journal_with_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rollouts of training"):
        JournalSource(tmp_path)
    write(tmp_path, group(0, [1.0]), mode="eval")
    with pytest.raises(ConfigError, match="no rollouts of training"):
        JournalSource(tmp_path)
    write(tmp_path, [dataclasses.replace(one, trajectories=[]) for one in group(0, [1.0])])
    with pytest.raises(ConfigError, match=r"token ids and a reward.*trl-gym serve"):
        JournalSource(tmp_path)


def test_a_journal_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"step": 0, "mode": "train", "completion_ids": [1], "failure": None, "reward": 1.0})
    journal.close()
    with pytest.raises(ConfigError, match="earlier version"):
        JournalSource(tmp_path)


def test_tokens_of_another_model_are_refused_before_training(tmp_path: Path) -> None:
    write(tmp_path, group(0, [0.1, 0.2]))  # ids up to 9
    source, hooks, model = JournalSource(tmp_path), cast(Any, None), torch.nn.Linear(1, 1)
    model.config = PretrainedConfig(vocab_size=10)  # type: ignore[assignment]
    source.connect(Accelerator(cpu=True), model, hooks)
    model.config = PretrainedConfig(vocab_size=9)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"token id 9, which is not in the vocabulary of the model \(9 ids\)"):
        source.connect(Accelerator(cpu=True), model, hooks)


def test_staleness_is_in_optimizer_steps_and_known_only_for_training_runs(tmp_path: Path) -> None:
    write(tmp_path, group(0, [0.1, 0.2]))
    asked = [request(0, 0), request(0, 1)]
    for step in (11, 1):
        metrics = training_metrics(facts(replay(tmp_path, asked, batch(step=step)), step))
        assert (metrics["rollouts/staleness/mean"], metrics["rollouts/spans_versions"]) == (
            step - 1 - POLICY.version,
            0.0,
        )
    write(tmp_path / "other", group(0, [0.1, 0.2]), weight_versions=["default"])
    others = replay(tmp_path / "other", asked, batch(step=11))
    assert [fact.staleness for fact in facts(others, 10)] == [{}, {}]


def facts(rollouts: list[Rollout], step: int) -> list[RolloutFacts]:
    return [facts_of(rollout, rollout.reward, "b", step) for rollout in rollouts]


def test_what_needs_servers_is_refused_all_at_once(tmp_path: Path) -> None:
    args = GymGRPOConfig(
        output_dir=str(tmp_path),
        gym_replay=str(tmp_path),
        eval_strategy="steps",
        eval_steps=1,
        vllm_importance_sampling_correction=False,
        use_cpu=True,
    )
    with pytest.raises(ConfigError, match=r"(?s)eval_strategy.*importance_sampling_correction.*gym_servers"):
        check_replay(args, has_servers=True)
    args = GymGRPOConfig(output_dir=str(tmp_path), gym_replay=str(tmp_path), use_cpu=True)
    check_replay(args, has_servers=False)
