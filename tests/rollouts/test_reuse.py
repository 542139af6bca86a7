from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.rollouts.recorded import POLICY, request, rollout, write
from trl_gym.errors import FailureKind, RolloutFailure
from trl_gym.rollouts.request import RolloutRequest, Sampling
from trl_gym.rollouts.reuse import Policy, Recall
from trl_gym.rollouts.rollout import conversation

FAILURE = RolloutFailure(kind=FailureKind.DEADLINE, text="too long", where="calculator /run")


def batch(**changes: Any) -> list[RolloutRequest]:
    return [request(task, member, **changes) for task in range(2) for member in range(3)]


def test_a_recorded_rollout_is_the_same_rollout(tmp_path: Path) -> None:
    before = rollout(request(1, 2, rollout_id="old"), reward=0.5)
    write(tmp_path, [before])
    now = request(1, 2, rollout_id="new")
    [recalled] = Recall(tmp_path).take_all([now], POLICY, newest=3).values()
    assert recalled.request is now
    assert recalled.trajectories == before.trajectories
    assert (recalled.reward, recalled.success, recalled.seconds) == (before.reward, before.success, before.seconds)
    assert conversation(recalled) == conversation(before)
    expected = {**before.answer, "responses_create_params": before.request.row["responses_create_params"]}
    assert recalled.answer == expected
    assert recalled.failure is None


def test_what_is_recorded_is_found_by_its_place_and_the_rest_is_missing(tmp_path: Path) -> None:
    requests = batch()
    write(tmp_path, [rollout(requests[4]), rollout(requests[1])], rank=0)
    write(tmp_path, [rollout(requests[0], reward=0.5)], rank=1)  # another number of ranks than now
    recalled = Recall(tmp_path).take_all(requests, POLICY, newest=3)
    assert {index: (one.request, one.reward) for index, one in recalled.items()} == {
        0: (requests[0], 0.5), 1: (requests[1], 1.0), 4: (requests[4], 1.0),
    }  # fmt: skip


def test_a_rollout_that_continued_with_weights_that_the_resumed_run_has_had_counts(tmp_path: Path) -> None:
    asked = [request(task) for task in range(3)]
    for one, versions in zip(asked, (["3"], ["3", "4"], ["4", "5"]), strict=True):
        write(tmp_path, [rollout(one)], weight_versions=versions)
    assert sorted(Recall(tmp_path).take_all(asked, POLICY, newest=4)) == [0, 1]
    assert sorted(Recall(tmp_path).take_all(asked, POLICY, newest=5)) == [0, 1, 2]


def test_lines_of_earlier_versions_have_no_batch_and_are_recalled_all_the_same(tmp_path: Path) -> None:
    write(tmp_path, [rollout(request(), 0.5)], batch=None)
    recall = Recall(tmp_path)
    asked = dataclasses.replace(request(), batch=4)
    assert [one.reward for one in recall.take_all([asked], POLICY, newest=3).values()] == [0.5]
    assert recall.take_all([asked], POLICY, newest=3) == {}, "given out once"


def test_lines_of_earlier_versions_are_recalled_by_the_weights_that_they_began_with(tmp_path: Path) -> None:
    """Those of schema 2 named the step before, whatever step their batch was for."""
    old = {"schema": 2, "step": POLICY.version, "version": None}
    write(tmp_path, [rollout(request(0), 0.5)], **old)
    write(tmp_path, [rollout(request(1), 0.25)], **old | {"step": POLICY.version + 1}, weight_versions=["4"])
    for step in (4, 6):  # as when it was written, and as a batch that was two steps ahead
        asked = [dataclasses.replace(request(task), step=step) for task in range(2)]
        taken = Recall(tmp_path).take_all(asked, POLICY, newest=4)
        assert {index: one.reward for index, one in taken.items()} == {0: 0.5}
        later = dataclasses.replace(POLICY, version=4)
        taken = Recall(tmp_path).take_all(asked, later, newest=4)
        assert {index: one.reward for index, one in taken.items()} == {1: 0.25}


def test_what_began_ahead_of_its_batch_is_found_at_the_step_of_its_batch(tmp_path: Path) -> None:
    asked = [dataclasses.replace(request(task), step=6) for task in range(2)]
    write(tmp_path, [rollout(asked[0])], step=6)
    write(tmp_path, [rollout(asked[1])], step=6, version=5, weight_versions=["5"])  # of later weights: not outdated
    assert list(Recall(tmp_path).take_all(asked, POLICY, newest=3)) == [0]


def test_a_rollout_of_another_batch_of_the_same_weights_is_another(tmp_path: Path) -> None:
    write(tmp_path, [rollout(dataclasses.replace(request(), batch=4))])
    recall = Recall(tmp_path)
    assert recall.take_all([request()], POLICY, newest=3) == {}
    assert list(recall.take_all([dataclasses.replace(request(), batch=4)], POLICY, newest=3)) == [0]


@pytest.mark.parametrize(
    "now",
    [
        request(1, 2),  # another task
        request(0, 1),  # another member
        request(0, 2, group=5),
        request(0, 2, sampling=Sampling(temperature=0.5)),
    ],
)
def test_another_request_is_not_answered(tmp_path: Path, now: RolloutRequest) -> None:
    write(tmp_path, [rollout(request(0, 2))])
    assert Recall(tmp_path).take_all([now], POLICY, newest=3) == {}
    assert len(Recall(tmp_path).take_all([request(0, 2)], POLICY, newest=3)) == 1


@pytest.mark.parametrize(
    "policy",
    [
        Policy(run="other", version=3, weights="abc"),
        Policy(run="run", version=2, weights="abc"),
        Policy(run="run", version=4, weights="abc"),
        Policy(run="run", version=3, weights="abd"),
    ],
)
def test_rollouts_of_another_policy_are_not_taken(
    tmp_path: Path, policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, [rollout(one) for one in batch()])
    with caplog.at_level(logging.WARNING):
        assert Recall(tmp_path).take_all(batch(), policy, newest=3) == {}
    assert ("6 recorded rollouts of step 4 were sampled by other weights" in caplog.text) == (policy.weights == "abd")


def test_a_version_that_answered_in_between_rules_a_rollout_out(tmp_path: Path) -> None:
    write(tmp_path, [rollout(request())], weight_versions=["2", "3"])
    assert Recall(tmp_path).take_all([request()], POLICY, newest=3) == {}


def test_failed_rollouts_are_tried_again_and_none_is_given_out_twice(tmp_path: Path) -> None:
    write(tmp_path, [rollout(request(0, 0), failure=FAILURE), rollout(request(0, 1))])
    recall = Recall(tmp_path)
    assert list(recall.take_all([request(0, 0), request(0, 1), request(0, 1)], POLICY, newest=3)) == [1]
    assert recall.take_all([request(0, 1)], POLICY, newest=3) == {}


def test_what_was_rewarded_as_the_policy_server_was_lost_is_run_again(tmp_path: Path) -> None:
    write(tmp_path, [rollout(request(0, 0))], retried=True)
    assert Recall(tmp_path).take_all([request(0, 0)], POLICY, newest=3) == {}


def test_evaluations_are_not_recalled(tmp_path: Path) -> None:
    write(tmp_path, [rollout(request())], mode="eval")
    assert Recall(tmp_path).take_all([request()], POLICY, newest=3) == {}


def test_what_is_written_while_a_step_goes_on_is_not_recalled_in_it(tmp_path: Path) -> None:
    """Two generation batches of one step: the second must not find rollouts of the first."""
    write(tmp_path, [rollout(request(0, 0))])
    recall = Recall(tmp_path)
    assert len(recall.take_all([request(0, 0)], POLICY, newest=3)) == 1
    write(tmp_path, [rollout(request(0, 1))])
    assert recall.take_all([request(0, 1)], dataclasses.replace(POLICY), newest=3) == {}
