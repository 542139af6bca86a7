"""The whole loop on real parts: vLLM server, NeMo Gym, TRL; a policy that can learn, and one that only samples."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import threading
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.training import MAX_MEAN_GAP, NUM_STEPS, RecordingTrainer, config, gap
from trl_gym import GymGRPOTrainer, GymServers, PolicyServer, load_gym_dataset
from trl_gym.errors import RolloutError
from trl_gym.report.index import states, step_stats
from trl_gym.report.rows import row_of
from trl_gym.report.source import open_run, read_trained
from trl_gym.rollouts.journal import lines_of, read_journal
from trl_gym.rollouts.rollout import Rollout
from trl_gym.rollouts.source import JournalSource
from trl_gym.rollouts.trajectory import finish_reason

pytestmark = [pytest.mark.e2e, pytest.mark.shares("small")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, calculator_data: Any) -> tuple[Path, Path]:
    return calculator_data.generate(tmp_path_factory.mktemp("data"), num_train=512, num_validation=64, seed=0)


@pytest.fixture(scope="module")
def run(
    small_policy: Path,
    policy: PolicyServer,
    gym: GymServers,
    data: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> RecordingTrainer:
    """One training run that several tests look at."""
    train, validation = data
    trainer = RecordingTrainer(
        model=str(small_policy),
        args=config(tmp_path_factory.mktemp("run"), log_completions=True, num_completions_to_print=1),
        train_dataset=load_gym_dataset(train),
        eval_dataset=load_gym_dataset(validation),
        policy_server=policy,
        gym_servers=gym,
    )
    with contextlib.redirect_stdout(io.StringIO()) as terminal:
        trainer.train()
    trainer.printed = terminal.getvalue()
    return trainer


def test_every_trained_trajectory_is_contiguous(run: RecordingTrainer) -> None:
    """Independent of the code under test: the last prompt of a rollout holds every token seen before, and what is
    trained is exactly that prompt and the last generation."""
    rollouts = [rollout for batch in run.seen for rollout in batch["rollouts"]]
    assert len(rollouts) >= NUM_STEPS * 64
    assert all(rollout.failure is None for rollout in rollouts)
    num_turns = set()
    for rollout in rollouts:
        calls = run.calls[rollout.request.rollout_id]
        num_turns.add(len(calls))
        for before, after in itertools.pairwise(calls):
            seen = before.prompt_ids + before.generation_ids
            assert after.prompt_ids[: len(seen)] == seen
        [trajectory] = rollout.trajectories
        assert trajectory.prompt_ids + trajectory.completion_ids == calls[-1].prompt_ids + calls[-1].generation_ids
    assert 2 in num_turns


def test_trainer_and_server_agree_before_and_after_every_sync(run: RecordingTrainer) -> None:
    gaps = [gap(batch) for batch in run.seen]
    assert len(gaps) >= NUM_STEPS + 2  # training batches and evaluations
    assert max(gaps) < MAX_MEAN_GAP, gaps


def test_what_reaches_the_loss_is_what_was_sampled(run: RecordingTrainer) -> None:
    for batch in run.seen:
        for row, rollout in enumerate(batch["rollouts"]):
            [trajectory] = rollout.trajectories
            length = len(trajectory.completion_ids)
            assert batch["completion_ids"][row, :length].tolist() == trajectory.completion_ids
            assert batch["completion_mask"][row].sum() == length
            assert batch["tool_mask"][row, :length].tolist() == trajectory.env_mask
            assert batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist() == trajectory.prompt_ids


def test_the_weight_version_is_the_number_of_steps_made_also_in_evaluation(run: RecordingTrainer) -> None:
    recorded = list(read_journal(Path(run.args.output_dir) / "rollouts"))
    expected = {("train", step, step - 1) for step in range(1, NUM_STEPS + 1)}
    expected |= {("eval", step, step) for step in (NUM_STEPS // 2, NUM_STEPS)}
    assert {(r["mode"], r["step"], r["version"]) for r in recorded} == expected
    assert all(r["weight_versions"] == [str(r["version"])] for r in recorded)
    assert run.policy_server.client.weight_version() == str(NUM_STEPS)


def test_a_step_has_one_number_wherever_it_is_shown(run: RecordingTrainer) -> None:
    """Terminal, metrics, completions tables, viewer, the journal's names and lines, `training_logprobs`, rollout ids:
    who looks for step k finds the same batch in each, by its mean reward."""
    folder = Path(run.args.output_dir)
    lines = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    train = {line["step"]: line["reward"] for line in lines}
    evaluated = {line["step"]: line["eval_reward"] for line in lines if "eval_reward" in line}
    assert len(set(train.values())) > NUM_STEPS // 2, "rewards tell most batches apart"

    def same(found: Mapping[int, float], expected: Mapping[int, float] = train) -> bool:
        return found.keys() == expected.keys() and found == pytest.approx(expected, abs=6e-4)

    printed = re.findall(r"^(step|evaluation at step) (\d+).*: reward ([0-9.]+)", run.printed, re.MULTILINE)
    for expected, words in ((train, "step"), (evaluated, "evaluation at step")):
        assert same({int(step): float(reward) for kind, step, reward in printed if kind == words}, expected)
    for expected, name in ((train, "completions"), (evaluated, "eval")):
        tables = {step: folder / "completions" / f"{name}_{step:05d}.parquet" for step in expected}
        assert sorted(tables.values()) == sorted((folder / "completions").glob(f"{name}_*.parquet"))
        read = {step: pandas.read_parquet(path) for step, path in tables.items()}
        assert same({step: table["gym"].mean() for step, table in read.items()}, expected)
        assert all(set(map(int, table["step"])) == {step} for step, table in read.items())

    rows = [row_of(line) for line in read_journal(folder / "rollouts")]
    for expected, mode, name in ((train, "train", "step"), (evaluated, "eval", "eval-step")):
        stats = [one for one in step_stats(rows, states(rows)) if one.mode == mode]
        assert same({one.step: one.reward for one in stats}, expected)
        for step in expected:
            own = list(lines_of(folder / "rollouts" / f"{name}-{step}.rank-0.jsonl"))
            assert {line.record["step"] for line in own} == {step} and len(own) == 64
            assert all(f"-{mode}{step}-" in line.record["rollout_id"] for line in own)
    trained = defaultdict(set)
    for one in read_trained(open_run(folder)):
        trained[one.step].add(one.rollout_id)
    assert trained == {
        step: {row.rollout_id for row in rows if (row.mode, row.step) == ("train", step)} for step in train
    }


def test_the_journal_is_what_was_trained(run: RecordingTrainer) -> None:
    recorded = {r["rollout_id"]: r for r in read_journal(Path(run.args.output_dir) / "rollouts")}
    trained = {r.request.rollout_id: r for batch in run.seen for r in batch["rollouts"]}
    assert set(recorded) == set(trained)
    for rollout_id, rollout in trained.items():
        [trajectory] = rollout.trajectories
        record = recorded[rollout_id]
        assert record["completion_ids"] == trajectory.completion_ids
        assert record["env_mask"] == trajectory.env_mask
        assert record["logprobs"] == pytest.approx(trajectory.logprobs)
        assert record["reward"] == rollout.reward


def test_the_journal_knows_what_each_model_call_took(run: RecordingTrainer) -> None:
    for record in read_journal(Path(run.args.output_dir) / "rollouts"):
        calls = [turn for turn in record["turns"] if turn["kind"] == "model"]
        assert calls and record["drift"] is None
        for call in calls:
            assert all(call[name] >= 0 for name in ("cached_tokens", "queue_s", "prefill_s", "decode_s")), call
            assert call["weight_version"] == str(record["version"])


def test_training_raises_the_reward(run: RecordingTrainer) -> None:
    rewards = [entry["reward"] for entry in run.state.log_history if "reward" in entry]
    assert len(rewards) == NUM_STEPS
    assert sum(rewards[-4:]) / 4 > sum(rewards[:3]) / 3 + 0.1, rewards
    evaluated = [entry["eval_reward"] for entry in run.state.log_history if "eval_reward" in entry]
    assert len(evaluated) == 2


def test_metrics_are_on_disk_with_phases(run: RecordingTrainer) -> None:
    lines = [json.loads(line) for line in (Path(run.args.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    for line in lines:
        assert {"reward", "success", "seconds/rollouts", "seconds/update", "seconds/weight_sync"} <= set(line)
        assert {"engine/running", "engine/generation_tokens_per_second"} <= set(line)
        assert line["rollouts/failed_fraction"] == 0.0
        assert line["rollouts/drift_fraction"] == 0.0
        gaps = {name: value for name, value in line.items() if "logprob_gap/" in name and not name.endswith("/max")}
        assert {"logprob_gap/mean", "logprob_gap/turn_0", "logprob_gap/turn_1"} <= set(gaps)
        assert all(0 <= value < MAX_MEAN_GAP for value in gaps.values()), gaps
        agents = {name.split("/")[1] for name in line if name.startswith("gym/")}
        assert len(agents) == 1
        scope = f"gym/{agents.pop()}"
        assert line[f"{scope}/reward"] == pytest.approx(line["reward"], abs=1e-5)
        assert line[f"{scope}/failed/deadline"] == 0.0
        assert line["rollouts/count"] == 64 and line["rollouts/groups/size"] == 8
        assert 0 < line["rollouts/queue_seconds_p50"] < line["rollouts/model_seconds_p50"]
        assert line["rollouts/model_seconds_p50"] <= line["rollouts/seconds_p95"]
    evaluated = [line for line in lines if "eval_reward" in line]
    assert [line["step"] for line in evaluated] == [NUM_STEPS // 2, NUM_STEPS]
    for line in evaluated:
        assert line["eval_pass@1"] == line["eval_mean@1"] == pytest.approx(line["eval_success"])
        assert line["eval_rollouts/count"] == line["eval_pass@1/tasks"] == 64


def test_named_evaluation_sets_truncation_and_the_table(
    small_policy: Path, policy: PolicyServer, gym: GymServers, data: tuple[Path, Path], tmp_path: Path
) -> None:
    """One step with too few tokens for most, and greedy evaluations of two sets."""
    validation = load_gym_dataset(data[1])
    trainer = RecordingTrainer(
        model=str(small_policy),
        args=config(
            tmp_path,
            max_steps=1,
            eval_steps=1,
            max_completion_length=25,
            mask_truncated_completions=True,
            num_generations_eval=2,
            gym_eval_sampling={"temperature": 0.0},
            log_completions=True,
            num_completions_to_print=1,
        ),
        train_dataset=load_gym_dataset(data[0]),
        eval_dataset={"few": validation.select(range(4)), "more": validation.select(range(4, 12))},
        policy_server=policy,
        gym_servers=gym,
    )
    trainer.train()

    batch = trainer.seen[0]
    cut = torch.tensor([finish_reason(rollout.answer) != "stop" for rollout in batch["rollouts"]])
    assert 0 < cut.sum() < len(cut)
    assert torch.equal((batch["tool_mask"] * batch["completion_mask"]).sum(1) == 0, cut)
    [line] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (
        line["completions/clipped_ratio"] == line["rollouts/truncated_fraction"] == pytest.approx(cut.float().mean())
    )

    assert (line["eval_few_rollouts/count"], line["eval_more_rollouts/count"]) == (8, 16)
    for name in ("few", "more"):  # greedy: both attempts at a task are the same
        assert line[f"eval_{name}_pass@1"] == line[f"eval_{name}_pass@2"] == line[f"eval_{name}_mean@2"]
    sampled = defaultdict(set)
    for record in read_journal(tmp_path / "rollouts"):
        if record["mode"] == "eval":
            sampled[record["task_index"]].add(tuple(record["completion_ids"]))
    assert len(sampled) == 12 and all(len(attempts) == 1 for attempts in sampled.values())

    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert len(table) == 64 and {"assistant", "tool"} == {
        m["role"] for messages in table["completion"] for m in messages
    }
    assert len(pandas.read_parquet(tmp_path / "completions" / "eval_more_00001.parquet")) == 16


class Halved(GymGRPOTrainer):
    """Overrides the three documented methods."""

    def build_request(self, row: dict[str, Any], request: Any) -> dict[str, Any]:
        return request.row | {"note": f"task {request.task_index}"}

    def build_trajectories(self, answer: dict[str, Any], request: Any, calls: Any) -> Any:
        assert request.row["note"] == f"task {request.task_index}"
        return super().build_trajectories(answer, request, calls)

    def compute_rewards(self, rollouts: Any) -> list[float | None]:
        # The first of each group is taken out: as if it had failed.
        return [None if r.request.member == 0 else 0.5 * r.reward for r in rollouts]


def brevity(completions: list[Any], gym_result: list[dict[str, Any]], **_: Any) -> list[float]:
    assert all(messages[0]["role"] == "assistant" for messages in completions)
    assert all("reward" in result for result in gym_result)
    return [1.0] * len(completions)


def test_a_subclass_with_an_extra_reward_and_an_adapter(
    small_policy: Path, policy: PolicyServer, gym: GymServers, data: tuple[Path, Path], tmp_path: Path
) -> None:
    """On the same servers, with PEFT: the base model's weights on the server are replaced by merged ones."""
    from peft import LoraConfig

    class Recording(RecordingTrainer, Halved):
        pass

    trainer = Recording(
        model=str(small_policy),
        reward_funcs=brevity,
        args=config(tmp_path, max_steps=3, learning_rate=1e-2, eval_strategy="no", reward_weights=[1.0, 0.25]),
        train_dataset=load_gym_dataset(data[0]),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        policy_server=policy,
        gym_servers=gym,
    )
    trainer.train()
    assert max(gap(batch) for batch in trainer.seen) < MAX_MEAN_GAP
    for batch in trainer.seen:
        first_members = [row for row, rollout in enumerate(batch["rollouts"]) if rollout.request.member == 0]
        assert len(first_members) == 8
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["rewards/brevity/mean"] == 1.0
    # 0.25 for everybody, and half of the environment's reward for those that have one.
    for line in metrics:
        assert line["reward"] == pytest.approx(line["rewards/gym/mean"] + 0.25, abs=1e-5)
    trainer.close()
    policy.check()  # borrowed servers run on
    gym.check()


def test_the_first_of_each_group_are_trained_and_the_others_are_no_failures(
    small_policy: Path, policy: PolicyServer, gym: GymServers, data: tuple[Path, Path], tmp_path: Path
) -> None:
    """Two further members of each group of eight, while the next batch's rollouts run."""
    trainer = RecordingTrainer(
        model=str(small_policy),
        args=config(tmp_path, max_steps=3, eval_strategy="no", gym_max_staleness=1, gym_oversample=2),
        train_dataset=load_gym_dataset(data[0]),
        policy_server=policy,
        gym_servers=gym,
    )
    trainer.train()
    lines = defaultdict(list)
    for line in read_journal(tmp_path / "rollouts"):
        lines[line["batch"], line["group"]].append(line)
    recorded = JournalSource(tmp_path / "rollouts")._groups
    for batch in trainer.seen:
        groups = defaultdict(list)
        for rollout in batch["rollouts"]:
            groups[rollout.request.batch, rollout.request.group].append(rollout)
        assert {len(own) for own in groups.values()} == {8}
        for key, own in groups.items():
            assert all(rollout.reward is not None for rollout in own)
            trained = {rollout.request.rollout_id for rollout in own}
            others = [line for line in lines[key] if line["rollout_id"] not in trained]
            assert len(lines[key]) == 10 and {line["member"] for line in lines[key]} == set(range(10))
            assert all(line["failure"] is None or line["failure"]["kind"] == "cancelled" for line in others)
            assert {len(own) for own in recorded[lines[key][0]["task_hash"]]} <= {8, 9, 10}
    for line in (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()):
        assert line["rollouts/count"] == 64 and line["rollouts/failed_fraction"] == 0
        assert line["oversample/cancelled_fraction"] == pytest.approx(0.2)
        assert line["oversample/failed_fraction"] == 0
        assert line["oversample/kept/reward_mean"] == pytest.approx(line["rollouts/reward"])
        assert line["oversample/kept/tokens_mean"] == pytest.approx(line["rollouts/tokens_out"])
        assert 0 <= line["oversample/wasted_tokens_fraction"] < 0.5
    trainer.close()


def test_rollouts_without_a_reward_move_nothing(
    small_policy: Path, policy: PolicyServer, gym: GymServers, data: tuple[Path, Path], tmp_path: Path
) -> None:
    """Half of each group is taken out: those rows have advantage 0 and no trained token, and the baseline of the
    others is their own mean."""

    class Half(RecordingTrainer):
        def compute_rewards(self, rollouts: list[Rollout]) -> list[float | None]:
            return [None if r.request.member % 2 else float(r.request.member) for r in rollouts]

    trainer = Half(
        model=str(small_policy),
        args=config(tmp_path, max_steps=1, eval_strategy="no", scale_rewards="none"),
        train_dataset=load_gym_dataset(data[0]),
        policy_server=policy,
        gym_servers=gym,
    )
    trainer.train()
    [batch] = trainer.seen
    kept = torch.tensor([rollout.request.member % 2 == 0 for rollout in batch["rollouts"]])
    assert (batch["tool_mask"] * batch["completion_mask"])[~kept].sum() == 0
    assert batch["advantages"][~kept].abs().sum() == 0
    # Members 0, 2, 4, 6 have rewards 0, 2, 4, 6: their mean is 3.
    expected = [float(r.request.member) - 3.0 for r in batch["rollouts"] if r.request.member % 2 == 0]
    torch.testing.assert_close(batch["advantages"][kept], torch.tensor(expected))


def test_a_batch_without_any_success_stops_and_says_why(
    small_policy: Path, policy: PolicyServer, gym: GymServers, data: tuple[Path, Path], tmp_path: Path
) -> None:
    trainer = GymGRPOTrainer(
        model=str(small_policy),
        args=config(tmp_path, gym_deadline=0.001, eval_strategy="no"),
        train_dataset=load_gym_dataset(data[0]),
        policy_server=policy,
        gym_servers=gym,
    )
    with pytest.raises(RolloutError, match=r"(?s)All 64 rollouts of step 1 failed.*64 × deadline"):
        trainer.train()
    recorded = list(read_journal(tmp_path / "rollouts"))
    assert len(recorded) == 64
    assert all(r["reward"] is None and r["failure"]["kind"] == "deadline" for r in recorded)


def test_a_dead_policy_server_ends_training_at_once(
    data: tuple[Path, Path], gym: GymServers, tmp_path: Path, small_policy: Path
) -> None:
    """The server is paused, so that no rollout can end by itself, and from then on reported dead by its stand-in."""
    from trl_gym.errors import PolicyServerError

    server, is_dead = _policy_of(gym), threading.Event()

    class Dying:
        def __getattr__(self, name: str) -> Any:
            return getattr(server, name)

        def check(self) -> None:
            if is_dead.is_set():
                raise PolicyServerError("policy server ended (exit code 9)")

    class Paused(GymGRPOTrainer):
        def build_request(self, row: dict[str, Any], request: Any) -> dict[str, Any]:
            if request.group == request.member == 0:
                server.client.pause("keep")
                is_dead.set()
            return request.row

    trainer = Paused(
        model=str(small_policy),
        args=config(tmp_path, eval_strategy="no"),
        train_dataset=load_gym_dataset(data[0]),
        policy_server=Dying(),
        gym_servers=gym,
    )
    try:
        with pytest.raises(PolicyServerError, match="exit code 9"):
            trainer.train()
    finally:
        server.client.resume()


def _policy_of(gym: GymServers) -> PolicyServer:
    return PolicyServer.attach(gym._policy[0])


def test_the_saved_model_loads_in_transformers(run: RecordingTrainer, tmp_path: Path) -> None:
    run.save_model(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(ids).logits, run.model.eval()(ids).logits)
