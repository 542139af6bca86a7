"""Metrics are of rollouts, not of ranks or batches."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rollouts.test_batch import OUTPUT, bad, drifted, good, record, with_records
from trl_gym.errors import FailureKind, RolloutError
from trl_gym.policy_server.middleware.ledger import DriftCause
from trl_gym.rollouts.batch import RankReport, SharedBatch, failure_causes, share
from trl_gym.rollouts.metrics import (
    MetricsBuffer,
    ValueSum,
    completion_metrics,
    oversample_metrics,
    percentile,
    rollout_metrics,
    training_metrics,
)
from trl_gym.rollouts.rollout import Rollout, RolloutFacts, facts_of, from_record, journal_record
from trl_gym.rollouts.trajectory import model_calls


def facts(*rollouts: Rollout) -> list[RolloutFacts]:
    return [facts_of(rollout, rollout.reward, "b") for rollout in rollouts]


def fact(**changes: Any) -> RolloutFacts:
    [made] = facts(good())
    return dataclasses.replace(made, **changes)


def test_metrics_hold_every_number_of_the_verifier_and_no_echo_of_the_task() -> None:
    answer = {"success": False, "steps": 2, "note": "x", "a": 1, "bad": math.nan}
    metrics = rollout_metrics(facts(good(0.5, **answer, reward_components={"style": 0.25, "none": None}), bad()))
    assert metrics["gym/calculator/reward"] == metrics["rollouts/reward"] == 0.5
    assert metrics["gym/calculator/steps"] == 2.0
    assert metrics["gym/calculator/reward_components/style"] == 0.25
    assert metrics["success"] == metrics["gym/calculator/success"] == 0.0
    absent = {"note", "a", "bad", "reward_components/none", "reward_std"}
    assert not {f"gym/calculator/{name}" for name in absent} & set(metrics)


def test_failures_are_fractions_by_kind_also_where_there_are_none() -> None:
    metrics = rollout_metrics(facts(good(), good(), bad(), bad(FailureKind.ENVIRONMENT)))
    assert metrics["rollouts/failed_fraction"] == 0.5
    for scope in ("rollouts", "gym/calculator"):
        assert {kind: metrics[f"{scope}/failed/{kind}"] for kind in FailureKind} == {
            FailureKind.INFRASTRUCTURE: 0.0,
            FailureKind.DEADLINE: 0.25,
            FailureKind.ENVIRONMENT: 0.25,
            FailureKind.POLICY: 0.0,
            FailureKind.CANCELLED: 0.0,
        }


def test_drift_is_counted_also_where_it_excluded_the_rollout() -> None:
    """Of rollouts without tokens nobody knows; they count neither way."""
    batch = [good(), drifted(DriftCause.RETOKENIZED), drifted(DriftCause.NO_BOUNDARY, excluded=True), bad()]
    metrics = rollout_metrics(facts(*batch))
    for scope in ("rollouts", "gym/calculator"):
        assert metrics[f"{scope}/drift_fraction"] == pytest.approx(2 / 3)
    assert metrics["gym/calculator/drift/retokenized"] == pytest.approx(1 / 3)
    assert metrics["gym/calculator/drift/no_boundary"] == pytest.approx(1 / 3)
    assert metrics["gym/calculator/failed/policy"] == 0.25


def test_what_a_rollout_did() -> None:
    failing = [*OUTPUT[:1], {"type": "function_call_output", "output": '{"error": "no"}'}, *OUTPUT[2:]]
    cut = good(response={"output": failing, "incomplete_details": {"reason": "max_output_tokens"}})
    first = record([], [1, 2], [3], seconds=3.0, queue_s=0.01)
    slow = with_records(cut, [first, record([first], [1, 2, 3, 4], [5], seconds=2.0, queue_s=None)], [])
    metrics = rollout_metrics(facts(good(), slow, bad()))
    assert metrics["rollouts/turns"] == 2.0
    assert metrics["rollouts/tokens_in"] == 3.0  # two of the prompt, one that the tool added
    assert metrics["rollouts/tokens_out"] == 2.0
    assert metrics["rollouts/tool_calls"] == 1.0
    assert metrics["rollouts/tool_errors"] == 0.5
    assert metrics["rollouts/truncated_fraction"] == 0.5
    assert metrics["rollouts/model_seconds_p50"] == metrics["rollouts/model_seconds_p95"] == 5.0
    assert metrics["rollouts/queue_seconds_p50"] == 0.01
    assert metrics["rollouts/seconds"] == metrics["gym/calculator/rollouts/seconds_p95"] == 0.5


def test_groups() -> None:
    def group(name: str, *rewards: float | None, agent: str = "a") -> list[RolloutFacts]:
        return [fact(group=name, agent=agent, trained_reward=r, is_valid=r is not None) for r in rewards]

    batch = group("1", 1.0, 0.0, 0.5) + group("2", 1.0, 1.0, None) + group("3", None, None, None, agent="b")
    metrics = training_metrics(batch)
    assert metrics["rollouts/groups/dropped_fraction"] == pytest.approx(1 / 3)
    assert metrics["rollouts/groups/size"] == 2.5
    assert metrics["rollouts/groups/zero_variance_fraction"] == 0.5
    assert metrics["gym/b/rollouts/groups/dropped_fraction"] == 1.0
    assert "gym/b/rollouts/groups/size" not in metrics


def test_lengths_are_of_trained_rollouts_and_truncation_is_what_gym_said() -> None:
    batch = [fact(sampled_tokens=4), fact(sampled_tokens=8, is_truncated=True), fact(sampled_tokens=0, is_valid=False)]
    assert completion_metrics(batch) == {
        "completions/clipped_ratio": 0.5,
        "completions/mean_length": 6.0,
        "completions/min_length": 4.0,
        "completions/max_length": 8.0,
        "completions/mean_terminated_length": 4.0,
        "completions/min_terminated_length": 4.0,
        "completions/max_terminated_length": 4.0,
    }
    assert all(math.isnan(value) for value in completion_metrics(batch[2:]).values())
    assert completion_metrics(batch[1:2])["completions/max_terminated_length"] == 0.0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.sampled_from([0, 5, 50, 95, 100]))
def test_percentiles_are_numpys(values: list[float], percent: int) -> None:
    assert percentile(values, percent) == pytest.approx(numpy.percentile(values, percent), abs=1e-6)
    assert percentile([], percent) is None


def test_metrics_go_on_until_they_are_taken() -> None:
    """Two batches of different sizes: every rollout weighs the same, and every token of the gap."""
    metrics = MetricsBuffer()
    metrics.add(facts(good(1.0), good(1.0), good(1.0)))
    metrics.add_gaps([{"logprob_gap": ValueSum(3.0, 3, 1.0, 1.0)}])
    metrics.add(facts(good(0.0)))
    metrics.add_gaps([{"logprob_gap": ValueSum(9.0, 1, 9.0, 9.0)}, {}])
    taken = metrics.take(training_metrics)
    assert taken["rollouts/reward"] == 0.75
    assert taken["logprob_gap/mean"] == 3.0
    assert metrics.take(training_metrics) == {}


def test_a_training_that_never_logs_keeps_only_so_many() -> None:
    metrics = MetricsBuffer(newest=3)
    for reward in (0.0, 0.0, 1.0, 1.0, 1.0):
        metrics.add(facts(good(reward)))
    taken = metrics.take(rollout_metrics)
    assert (taken["rollouts/count"], taken["rollouts/reward"]) == (3, 1.0)


@given(st.lists(st.sampled_from(["good", "bad", "cut", "late"]), min_size=1, max_size=12), st.data())
def test_ranks_together_log_what_one_would(kinds: list[str], data: st.DataObject) -> None:
    made = {
        "good": good(1.0, steps=3),
        "bad": bad(),
        "cut": good(0.25, response={"output": OUTPUT, "incomplete_details": {"reason": "x"}}),
        "late": dataclasses.replace(good(0.5), seconds=9.0),
    }
    rollouts = [made[kind] for kind in kinds]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(kinds)), max_size=3)))
    pieces = [rollouts[a:b] for a, b in zip([0, *cuts], [*cuts, len(kinds)], strict=True)]
    together = _share(pieces)
    alone = _share([rollouts])
    assert [batch.facts for batch in together] == [alone[0].facts] * len(pieces)
    assert all(batch.replaced == batch.facts for batch in together)
    assert together[0].causes == failure_causes(rollouts * 2)
    assert [f for batch in together for f in batch.facts[batch.own]] == alone[0].facts


def test_staleness_is_of_tokens_and_of_the_oldest_call() -> None:
    """Calls that do not count are left out, also of what is read back from the journal."""
    first = record([], [1, 2], [3], weight_version="3")
    second = record([first], [1, 2, 3, 4], [5, 5, 5], weight_version="4", last_version="5")
    other = record([], [7], [8] * 9, weight_version="1")
    calls = model_calls([first, second, other])
    stale = with_records(good(), [first, second, other], calls[:2])
    fresh = with_records(good(), [record([], [1, 2], [3, 4], weight_version="5")], calls[:1])
    named = with_records(good(), [record([], [1], [2], weight_version="default")], calls[:1])
    again = from_record(journal_record(stale, mode="train", weight_version="5"), stale.request)
    assert again.sampled_calls == stale.sampled_calls
    for one in (stale, again):
        measured = [facts_of(each, each.reward, "b", step=6) for each in (fresh, one, named, bad())]
        assert [fact.staleness for fact in measured] == [{0: 2}, {2: 1, 1: 3}, {}, {}]
        metrics = training_metrics(measured)
        found = {name: metrics[f"rollouts/{name}"] for name in ("staleness/mean", "staleness/max", "spans_versions")}
        assert found == {"staleness/mean": 1.0, "staleness/max": 2.0, "spans_versions": 0.5}
        assert metrics["rollouts/staleness/token_mean"] == pytest.approx((0 * 2 + 2 * 1 + 1 * 3) / 6)
    assert not any("staleness" in name for name in training_metrics(facts(stale)))


def sampling(rollout: Rollout, *tokens: int) -> Rollout:
    """With a model call for each number, which sampled so many tokens."""
    records = [record([], [1], list(range(number))) for number in tokens]
    return with_records(rollout, records, model_calls(records))


def test_kept_and_cancelled_rollouts_are_compared_by_what_is_known_of_them() -> None:
    kept = [sampling(good(1.0), 3, 5), sampling(good(0.0), 2), sampling(bad(), 9)]
    cancelled, beside = sampling(bad(FailureKind.CANCELLED), 4), sampling(good(0.5), 1, 1)
    failed = sampling(bad(FailureKind.ENVIRONMENT), 100)
    found = oversample_metrics([(kept[:2], [cancelled, failed]), (kept[2:], [beside])])
    means = {name.removeprefix("oversample/"): numpy.mean(values) for name, values in found.items()}
    assert means == {
        "kept/turns_mean": 1.5,
        "kept/tokens_mean": 5.0,
        "kept/seconds_mean": kept[0].seconds,
        "kept/reward_mean": 0.5,
        "cancelled/turns_mean": 1.5,
        "cancelled/tokens_mean": 3.0,
        "cancelled/seconds_mean": (cancelled.seconds + beside.seconds) / 2,
        "cancelled/reward_mean": 0.5,
        "cancelled_fraction": pytest.approx(2 / 6),
        "failed_fraction": pytest.approx(1 / 6),
        "wasted_tokens_fraction": pytest.approx((4 / 14 + 2 / 2) / 2),
    }
    unknown = oversample_metrics([([good(1.0)], [dataclasses.replace(bad(FailureKind.CANCELLED), records=None)])])
    assert unknown["oversample/cancelled/tokens_mean"] == [0.0] and "oversample/cancelled/reward_mean" not in unknown
    assert oversample_metrics([]) == {}


def test_what_was_dropped_as_too_stale_is_counted() -> None:
    assert training_metrics(facts(good(), bad(FailureKind.CANCELLED), bad()))["rollouts/dropped_stale"] == 1.0
    assert "rollouts/dropped_stale" not in training_metrics(facts(good(), bad()))


def test_small_groups_and_small_batches() -> None:
    one, other = [facts_of(good(), 1.0, "b")], [facts_of(good(), None, "b"), facts_of(bad(), None, "b")]
    batch = SharedBatch(facts=one + other, own=slice(1, 3), causes=Counter({"deadline (x): late": 1}))
    batch.check(0.3, step=1, where="See there.")
    kept = batch.without_small_groups(2)
    assert kept.num_valid == 0 and kept.own_rewards == [None, None]
    expected = (
        r"(?s)Only 0 of the 3 rollouts of step 1.*1 failed, 1 got no reward, 1 are in groups with too few.*"
        r"See there\.\n  - 1 × deadline \(x\): late"
    )
    with pytest.raises(RolloutError, match=expected):
        kept.check(0.0, step=1, where="See there.")


def test_failures_that_were_replaced_count_and_what_could_have_been_trained_does() -> None:
    """Two rollouts are trained. Of four that were replaced one failed, and leaves its group too small."""
    [valid], [failed] = facts(good()), facts(bad())
    groups = [dataclasses.replace(valid, group=group) for group in ("b", "b", "equal", "equal", "small")]
    replaced = [*groups[2:], dataclasses.replace(failed, group="small")]
    batch = SharedBatch(facts=groups[:2], own=slice(0, 2), causes=Counter(), replaced=replaced).without_small_groups(2)
    assert [one.is_valid for one in batch.finished] == [True] * 4 + [False] * 2 and batch.own_dropped == [0, 0]
    batch.check(0.66, step=1, where="See there.")
    with pytest.raises(RolloutError, match=r"Only 4 of the 6 .*: 1 failed, 0 got no reward, 1 are in groups with"):
        batch.check(0.67, step=1, where="See there.")
    assert [one.is_valid for one in batch.with_replaced_untrained().finished] == [True] * 2 + [False] * 4
    lost = dataclasses.replace(batch, facts=[dataclasses.replace(failed, group="b")] * 2)
    with pytest.raises(RolloutError, match="All 2 rollouts of step 1 failed"):
        lost.check(0.0, step=1, where="See there.")


def _share(pieces: list[list[Rollout]]) -> list[SharedBatch]:
    """What each rank of a group would know."""
    reports: list[RankReport] = []

    def tell(own: list[RankReport]) -> list[RankReport]:
        reports.extend(own)
        return own

    def rank(index: int, gather: Any) -> SharedBatch:
        rewards = [rollout.reward for rollout in pieces[index]]
        replaced = list(zip(pieces[index], rewards, strict=True))
        return share(pieces[index], rewards, mode="train", rank=index, gather=gather, replaced=replaced)

    for index in range(len(pieces)):
        rank_is_alone = [([], [], Counter())] * index
        rank(index, lambda own, before=rank_is_alone: [*before, *tell(own)])
    return [rank(index, lambda own: reports) for index in range(len(pieces))]
