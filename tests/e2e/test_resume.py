"""A run that is killed in the middle of a generation batch and resumed ends as one that was never interrupted; the
same rollouts train another run without any server; and two ranks do together what one does alone.

Sampling is seeded per rollout (TRL divides logits by the temperature, so it cannot be 0), through the documented
override: the same weights, task and member then sample the same tokens, whatever else is in the batch.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.servers import Pair
from tests.e2e.training import RecordingTrainer, config
from tests.fork_ranks import forked, run_ranks
from trl_gym import GymServers, PolicyServer, load_gym_dataset
from trl_gym.rollouts.journal import read_journal
from trl_gym.rollouts.request import RolloutRequest

pytestmark = [pytest.mark.e2e, pytest.mark.shares("small")]

# Eight steps over two epochs of eight tasks: a generation batch has 4 tasks x 4 rollouts and lasts two optimizer
# steps. Checkpoints after every third step: that of step 3 is in the middle of a generation batch, that of step 6
# in the second epoch.
NUM_STEPS = 8
NUM_RANKS = 2
KILLED_AT_STEP, KILLED_AFTER = 6, 7
# Log-probabilities of the same tokens differ in the last bits with what else is in the server's batch, and a resumed
# batch is smaller; they enter the loss through the importance ratio, and Adam turns a difference in a tiny gradient
# into one of up to the learning rate.
TOLERANCE = 1e-4


class Seeded(RecordingTrainer):
    """Samples reproducibly."""

    def build_request(self, row: dict[str, Any], request: RolloutRequest) -> dict[str, Any]:
        metadata = request.row["responses_create_params"]["metadata"]
        seed = 1000 * self.state.global_step + 10 * request.task_index + request.member
        extra = json.loads(metadata["extra_body"])
        extra["trl_gym"]["sampling"]["seed"] = seed  # a seed that is no part of what the rollout pins is left out
        metadata["extra_body"] = json.dumps(extra)
        return request.row


class Killed(Seeded):
    """Dies without notice once so many rollouts of a step are in the journal."""

    num_left = KILLED_AFTER

    def build_trajectories(self, answer: dict[str, Any], request: RolloutRequest, calls: Any) -> Any:
        if self.state.global_step == KILLED_AT_STEP:
            if self.num_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.num_left -= 1
        return super().build_trajectories(answer, request, calls)


class DiesInItsPhase(Seeded):
    """Gets a signal in the middle of what it is doing in its first step."""

    phase: str
    signal: signal.Signals

    def _die_in(self, phase: str) -> None:
        if phase == self.phase:
            os.kill(os.getpid(), self.signal)

    def build_trajectories(self, answer: dict[str, Any], request: RolloutRequest, calls: Any) -> Any:
        if request.member == 1:  # some are in the journal by then
            self._die_in("rollouts")
        return super().build_trajectories(answer, request, calls)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self._die_in("loss")
        return super().compute_loss(*args, **kwargs)

    def _push_weights(self) -> None:
        if self.state.global_step > 0:
            self.policy_server.client.pause()
            self._die_in("weight sync")
        super()._push_weights()


def train_until_it_dies(phase: str, signum: int, *where: Any) -> None:
    DiesInItsPhase.phase, DiesInItsPhase.signal = phase, signal.Signals(signum)
    train(DiesInItsPhase, *where)


def settings(output_dir: Path, **changes: Any) -> Any:
    return config(
        output_dir,
        **{
            "num_generations": 4,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
            "max_steps": NUM_STEPS,
            "eval_strategy": "no",
            "save_strategy": "steps",
            "save_steps": 3,
            "gym_max_inflight": 8,
        }
        | changes,
    )


def train(trainer: type[Seeded], output_dir: Path, policy: str, gym_head: str, data: Path, model: Path) -> Seeded:
    made = trainer(
        model=str(model),
        args=settings(output_dir),
        train_dataset=load_gym_dataset(data),
        policy_server=PolicyServer.attach(policy),
        gym_servers=GymServers.attach(gym_head),
    )
    made.train(resume_from_checkpoint=(output_dir / "checkpoint-3").exists())
    return made


@pytest.fixture(scope="module")
def servers(pair: Pair) -> tuple[str, str]:
    return pair.policy.base_url, pair.gym.head_url


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, calculator_data: Any) -> Path:
    return calculator_data.generate(tmp_path_factory.mktemp("data"), num_train=8, num_validation=1, seed=0)[0]


@pytest.fixture(scope="module")
def runs(
    servers: tuple[str, str],
    data: Path,
    small_policy: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Seeded, Seeded, Path]:
    """An uninterrupted run, and one that was killed and resumed, with its folder."""
    folder = tmp_path_factory.mktemp("runs")
    whole = train(Seeded, folder / "whole", *servers, data, small_policy)
    process = forked(train, Killed, folder / "killed", *servers, data, small_policy)
    process.join(timeout=240)
    assert process.exitcode == -signal.SIGKILL
    assert (folder / "killed" / "checkpoint-6").exists()
    return whole, train(Seeded, folder / "killed", *servers, data, small_policy), folder / "killed"


def identity(record: dict[str, Any]) -> tuple[int, int, int, int]:
    return record["step"], record["task_index"], record["group"], record["member"]


def test_the_same_tasks_and_rollouts_and_nothing_is_collected_twice(runs: tuple[Seeded, Seeded, Path]) -> None:
    whole, _, folder = runs
    expected = list(read_journal(Path(whole.args.output_dir) / "rollouts"))
    recorded = list(read_journal(folder / "rollouts"))
    assert [r["failure"] for r in expected + recorded] == [None] * len(expected + recorded)
    assert len(expected) == 16 * NUM_STEPS / 2
    assert Counter(map(identity, recorded)) == Counter(map(identity, expected))  # each once, none missing
    tokens = {identity(r): r["completion_ids"] for r in expected}
    assert {identity(r): r["completion_ids"] for r in recorded} == tokens
    in_the_interrupted_batch = [r for r in recorded if r["version"] == KILLED_AT_STEP]
    # The order of rollout ids tells who collected: the killed run's begin with another id than the resumed one's.
    assert sorted(Counter(r["rollout_id"].split("-")[0] for r in in_the_interrupted_batch).values()) == [
        KILLED_AFTER,
        16 - KILLED_AFTER,
    ]
    assert {r["run"] for r in recorded} != {r["run"] for r in expected}
    assert len({r["run"] for r in recorded}) == 1


def test_the_batches_and_the_weights_are_the_same(runs: tuple[Seeded, Seeded, Path]) -> None:
    whole, resumed, _ = runs
    assert [batch["step"] for batch in whole.seen] == [0, 2, 4, 6]
    assert [batch["step"] for batch in resumed.seen] == [6]
    last, again = whole.seen[-1], resumed.seen[-1]
    assert torch.equal(last["completion_ids"], again["completion_ids"])
    assert torch.equal(last["advantages"], again["advantages"])
    torch.testing.assert_close(last["sampling_per_token_logps"], again["sampling_per_token_logps"], atol=1e-4, rtol=0)
    for (name, expected), actual in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0, msg=name)


def test_a_checkpoint_in_the_middle_of_a_batch_goes_on_with_its_rest(
    runs: tuple[Seeded, Seeded, Path], servers: tuple[str, str], data: Path, small_policy: Path, tmp_path: Path
) -> None:
    """From checkpoint 3, trained on without its journal: step 3 uses up the buffered half of the batch of step 2, and
    generates at step 4 for the tasks that the uninterrupted run has there."""
    whole, _, folder = runs
    trainer = Seeded(
        model=str(small_policy),
        args=settings(tmp_path, max_steps=5),
        train_dataset=load_gym_dataset(data),
        policy_server=PolicyServer.attach(servers[0]),
        gym_servers=GymServers.attach(servers[1]),
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    trainer.close()
    [batch] = trainer.seen
    assert batch["step"] == 4
    expected = whole.seen[2]
    assert [r.request.task_index for r in batch["rollouts"]] == [r.request.task_index for r in expected["rollouts"]]
    assert torch.equal(batch["completion_ids"], expected["completion_ids"])


def test_a_run_that_is_started_anew_recalls_nothing(
    runs: tuple[Seeded, Seeded, Path], servers: tuple[str, str], data: Path, small_policy: Path
) -> None:
    """In the same folder, with the same weights, tasks and sampling as the run before, but without resuming."""
    _, _, folder = runs
    before = Counter(map(identity, read_journal(folder / "rollouts")))
    trainer = Seeded(
        model=str(small_policy),
        args=settings(folder, max_steps=1, save_strategy="no"),
        train_dataset=load_gym_dataset(data),
        policy_server=PolicyServer.attach(servers[0]),
        gym_servers=GymServers.attach(servers[1]),
    )
    trainer.train()
    trainer.close()
    after = Counter(map(identity, read_journal(folder / "rollouts")))
    assert sum((after - before).values()) == 16
    assert before <= after  # nothing that was there is gone


def test_training_from_the_journal_needs_no_server(
    runs: tuple[Seeded, Seeded, Path], data: Path, small_policy: Path, tmp_path: Path
) -> None:
    """The first generation batch of the recorded run, replayed: the same tensors, and so the same first steps."""
    whole, _, _ = runs
    journal = Path(whole.args.output_dir) / "rollouts"
    trainer = RecordingTrainer(
        model=str(small_policy),
        args=settings(tmp_path, max_steps=4, save_strategy="no", gym_replay=str(journal)),
        train_dataset=load_gym_dataset(data),
    )
    assert trainer.policy_server is None and trainer.gym_servers is None
    trainer.train()
    first, recorded = trainer.seen[0], whole.seen[0]
    for name in ("prompt_ids", "completion_ids", "tool_mask", "advantages", "sampling_per_token_logps"):
        assert torch.equal(first[name], recorded[name]), name
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["rollouts/staleness/mean"] == 0.0
    trainer.close()


def test_two_ranks_roll_out_their_own_rows_and_log_what_one_would(
    runs: tuple[Seeded, Seeded, Path], servers: tuple[str, str], data: Path, small_policy: Path, tmp_path: Path
) -> None:
    """The first generation batch of the uninterrupted run, over gloo.

    TRL shuffles each rank's rows before it cuts them into optimizer steps, so the steps themselves differ; that the
    gradient of a given batch does not is shown in `tests/test_gradient.py`.
    """
    whole, _, _ = runs
    done = run_ranks(NUM_RANKS, "tests.e2e.two_ranks", str(tmp_path), *servers, str(data), str(small_policy))
    assert done.returncode == 0, done.stderr[-4000:]

    recorded = list(read_journal(tmp_path / "rollouts"))
    assert Counter(r["rank"] for r in recorded) == {0: 8, 1: 8}
    together = {identity(r): r["completion_ids"] for r in recorded}
    alone = {identity(r): r["completion_ids"] for r in read_journal(Path(whole.args.output_dir) / "rollouts")}
    assert together == {key: ids for key, ids in alone.items() if key[0] == 1}

    [ours, theirs] = (
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        for folder in (tmp_path, Path(whole.args.output_dir))
    )
    names = [name for name in theirs if name.startswith(("rollouts/", "gym/", "success", "reward"))]
    assert len(names) > 20
    for name in (name for name in names if "seconds" not in name):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6), name


@pytest.mark.parametrize(
    ("phase", "signum", "num_recorded"),
    [
        ("rollouts", signal.SIGTERM, range(1, 16)),
        ("loss", signal.SIGKILL, range(16, 17)),
        ("weight sync", signal.SIGKILL, range(16, 17)),
    ],
)
def test_a_signal_in_any_phase_loses_nothing_that_was_finished(
    servers: tuple[str, str],
    data: Path,
    small_policy: Path,
    tmp_path: Path,
    phase: str,
    signum: signal.Signals,
    num_recorded: range,
) -> None:
    """And the servers, which are not the trainer's, serve the next run."""
    where = (tmp_path, *servers, data, small_policy)
    process = forked(train_until_it_dies, phase, signum, *where)
    process.join(timeout=240)
    assert process.exitcode == -signum
    recorded = [record for record in read_journal(tmp_path / "rollouts") if record["step"] == 1]
    assert len(recorded) in num_recorded
    assert all(record["failure"] is None and record["completion_ids"] for record in recorded)
    server = PolicyServer.attach(servers[0])
    if phase == "weight sync":
        server.client.resume()  # it died between pause and resume; nobody samples from half a policy
    answer = server.client.chat(messages=[{"role": "user", "content": "1"}], max_tokens=2, timeout_s=60)
    assert answer["choices"][0]["message"]["generation_token_ids"]
