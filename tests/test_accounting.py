"""What is logged and evaluated, on prepared rollouts, through the real trainer."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
import torch
from transformers import AutoTokenizer

from tests.gradient import NUM_MEMBERS, Case, PreparedTrainer, lean, make_trainer, save_model, tasks, trajectory_of
from trl_gym.errors import RolloutError

EVALUATION = {"num_generations_eval": 2, "per_device_eval_batch_size": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = save_model(tmp_path_factory.mktemp("model"))
    with lean():
        yield folder


def prepared(model: Path, folder: Path, *failed: tuple[int, int], **options: Any) -> PreparedTrainer:
    """Rollouts have one to three rows."""
    return make_trainer(model, Case(name="x", failed=set(failed), max_rows=3, options=EVALUATION | options), folder)


def test_evaluation_sets_have_metrics_of_their_own(model: Path, tmp_path: Path) -> None:
    """Two sets, one of which has a task whose first attempt fails."""
    trainer = prepared(model, tmp_path, (3, 0))
    metrics = trainer.evaluate({"first": tasks([0, 1, 2]), "second": tasks([3, 4])})
    rewards = {task: [trajectory_of(task, member)[1] for member in range(2)] for task in range(5)}
    first = [reward for task in (0, 1, 2) for reward in rewards[task]]
    assert metrics["eval_first_rollouts/count"] == 6
    assert metrics["eval_first_rollouts/reward"] == pytest.approx(sum(first) / 6)
    assert metrics["eval_first_gym/arithmetic/reward"] == metrics["eval_first_rollouts/reward"]
    assert metrics["eval_second_rollouts/failed_fraction"] == 0.25
    assert metrics["eval_second_rollouts/reward"] == pytest.approx((rewards[3][1] + sum(rewards[4])) / 3)
    assert (metrics["eval_first_pass@2/tasks"], metrics["eval_second_pass@2/tasks"]) == (3, 1)
    assert metrics["eval_second_pass@1/tasks"] == 2
    assert {"eval_first_reward", "eval_second_reward", "eval_second_completions/mean_length"} <= set(metrics)
    assert not {name for name in metrics if not name.startswith(("eval_first_", "eval_second_", "epoch"))}
    logged = [set(entry) for entry in trainer.state.log_history]
    assert len(logged) == 2 and "eval_first_success" in logged[0] and "eval_second_success" in logged[1]


def test_a_task_without_a_rollout_leaves_no_trace_in_the_means_of_an_evaluation(model: Path, tmp_path: Path) -> None:
    """Of the third task both attempts fail. The first set has the others alone."""
    options = {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"}
    case = Case(
        name="x", failed={(2, 0), (2, 1)}, equal={1}, options=EVALUATION | options | {"per_device_eval_batch_size": 6}
    )
    trainer = make_trainer(model, case, tmp_path)
    alone, beside = (trainer.evaluate(tasks(of)) for of in ([0, 1], [0, 2, 1]))
    for name in ("eval_vespo/phi_seq_mean", "eval_frac_reward_zero_std", "eval_entropy", "eval_reward"):
        assert beside[name] == pytest.approx(alone[name], rel=1e-5), name
    assert alone["eval_frac_reward_zero_std"] == 0.5 and 0 < alone["eval_vespo/phi_seq_mean"] < 1


def test_a_set_without_a_name_has_the_plain_prefix(model: Path, tmp_path: Path) -> None:
    metrics = prepared(model, tmp_path).evaluate(tasks([0, 1]))
    assert metrics["eval_rollouts/count"] == 4
    assert {"eval_success", "eval_mean@2", "eval_pass@1", "eval_gym/arithmetic/pass@2", "eval_loss"} <= set(metrics)
    assert not any("/groups/" in name for name in metrics)


def test_evaluation_leaves_training_as_it_was(model: Path, tmp_path: Path) -> None:
    trainer = prepared(model, tmp_path)

    def states() -> list[Any]:
        return [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]

    before, tokens = states(), trainer.state.num_input_tokens_seen
    trainer.evaluate(tasks([0, 1]))
    assert states() == before
    assert trainer.state.num_input_tokens_seen == tokens
    trainer.train()
    assert trainer.state.log_history[-2]["rollouts/count"] == 3 * NUM_MEMBERS  # none of the evaluation's


def test_evaluation_may_sample_otherwise(model: Path, tmp_path: Path) -> None:
    trainer = prepared(model, tmp_path, gym_eval_sampling={"temperature": 0.0, "top_k": 1}, temperature=0.7)
    metrics = trainer.evaluate(tasks([0, 1]))
    assert not any("logprob_gap" in name for name in metrics)  # it would compare two distributions
    assert metrics["eval_sampling/sampling_logp_difference/mean"] is None
    trainer.train()
    assert "logprob_gap/mean" in trainer.state.log_history[-2]
    sent = {}
    for request in trainer.requests:
        extra = json.loads(request.row["responses_create_params"]["metadata"]["extra_body"])
        sent.setdefault("train" if "-train" in request.rollout_id else "eval", []).append(extra["trl_gym"]["sampling"])
    assert {(s["temperature"], s["top_k"]) for s in sent["eval"]} == {(0.0, 1)}
    assert {(s["temperature"], s["top_k"]) for s in sent["train"]} == {(0.7, -1)}


def test_an_evaluation_that_failed_says_so_and_is_logged(model: Path, tmp_path: Path) -> None:
    trainer = prepared(model, tmp_path, (0, 0), (0, 1), (1, 0), gym_min_valid_fraction=0.5)
    with pytest.raises(RolloutError, match=r"(?s)Only 1 of the 4 rollouts of the evaluation have a reward.*3 × deadl"):
        trainer.evaluate(tasks([0, 1]))
    assert trainer.state.log_history[-1]["eval_rollouts/failed_fraction"] == 0.75


def test_the_completions_table_shows_the_conversation(model: Path, tmp_path: Path) -> None:
    """Also where a policy wrote arguments that are no JSON, which all prepared rollouts do; and evaluation's is its
    own."""
    trainer = prepared(model, tmp_path, (1, 2), log_completions=True, num_completions_to_print=1)
    trainer.train()
    trainer.evaluate(tasks([0, 1]))
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert len(table) == 3 * NUM_MEMBERS
    shown = [[message["role"] for message in messages] for messages in table["completion"]]
    failed = table["finish_reason"] == "deadline failure"
    assert failed.sum() == 1 and table["advantage"][failed].item() == 0 and table["gym"][failed].isna().all()
    assert [roles for roles, is_failed in zip(shown, failed, strict=True) if not is_failed] == [
        ["assistant", "assistant", "tool", "assistant"]
    ] * 11
    assert table["rollout_id"].is_unique and set(table["environment"]) == {"arithmetic"}
    assert len(pandas.read_parquet(tmp_path / "completions" / "eval_00001.parquet")) == 4


def test_reward_functions_get_rollouts(model: Path, tmp_path: Path) -> None:
    """However many rows these have: one conversation each, with the tokens of all rows."""
    seen: dict[str, Any] = {}

    def length(prompts: Any, completions: Any, completion_ids: Any, gym_reward: Any, gym_result: Any, **_: Any) -> Any:
        seen.update(completions=completions, ids=completion_ids, rewards=gym_reward, results=gym_result)
        return [len(ids) / 10 for ids in completion_ids]

    case = Case(name="x", failed={(1, 2)}, max_rows=3)
    trainer = make_trainer(model, case, tmp_path, reward_funcs=length)
    trainer.train()
    assert {len(values) for values in seen.values()} == {3 * NUM_MEMBERS}
    expected = [trajectory_of(task, member)[0] for task in range(3) for member in range(NUM_MEMBERS)]
    sampled = [
        sum(ids in whole.completion_ids for ids in own) for own, whole in zip(seen["ids"], expected, strict=True)
    ]
    assert sampled == [len(ids) for ids in seen["ids"][:6]] + [0] + [len(ids) for ids in seen["ids"][7:]]
    assert seen["rewards"][6] is None and seen["results"][6] is None and len(seen["ids"][6]) == 1
    assert trainer.state.log_history[0]["rewards/length/mean"] == pytest.approx(
        sum(len(ids) for own, ids in enumerate(seen["ids"]) if own != 6) / 110
    )


def test_the_trainers_logprobs_are_written_for_every_row(model: Path, tmp_path: Path) -> None:
    trainer = prepared(model, tmp_path, (1, 2))
    saved = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")  # there before the first rollout
    assert saved.get_vocab() == trainer.processing_class.get_vocab() and saved.is_fast
    trainer.train()
    lines = (tmp_path / "training_logprobs" / "step-1.rank-0.jsonl").read_text().splitlines()
    found = {line["rollout_id"]: [line["logprobs"], *line.get("further_rows", [])] for line in map(json.loads, lines)}
    rollouts = {rollout.request.rollout_id: rollout for rollout in trainer._accounting.rollouts}
    assert len(found) == 11 and {json.loads(line)["step"] for line in lines} == {1}
    rewards = {name: rollout.reward for name, rollout in rollouts.items()}
    for group in range(3):  # what is recorded is what TRL trained with: of a failed rollout nothing
        own = {
            one["rollout_id"]: one["advantage"] for one in map(json.loads, lines) if f"-g{group}-" in one["rollout_id"]
        }
        mean = statistics.fmean(rewards[name] for name in own)
        spread = statistics.stdev(rewards[name] for name in own) + 1e-4
        assert own == pytest.approx({name: (rewards[name] - mean) / spread for name in own}, abs=1e-4)
    assert 0 < trainer.state.log_history[0]["sampling/importance_sampling_ratio/fraction_cut"] < 1  # of made-up ones
    for name, rows in found.items():
        expected = [len(trajectory.completion_ids) for trajectory in rollouts[name].trajectories]
        assert [len(row) for row in rows] == expected
        assert all(-12 < value < -2 for row in rows for value in row)  # of that token, not of padding


@pytest.mark.parametrize(("rewards", "message"), [([1.0], "returned 1 rewards for 12"), ([float("inf")] * 12, "inf")])
def test_wrong_rewards_of_a_subclass_stop_training(
    model: Path, tmp_path: Path, rewards: list[float], message: str
) -> None:
    trainer = prepared(model, tmp_path)
    trainer.compute_rewards = lambda rollouts: rewards
    with pytest.raises(RolloutError, match=message):
        trainer.train()
