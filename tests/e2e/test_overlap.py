"""Rollouts in flight while training runs (`gym_max_staleness`): what is trained, in which order and how stale; nothing
that had ended is lost when the trainer, the policy server or NeMo Gym dies in the middle of it.

The loss of a step waits until rollouts of the next batch have ended, which they only do if they run meanwhile, and so
few of them that others are in flight during the update and the weight sync.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.conftest import wait_for
from tests.e2e.servers import Pair, vllm_metric
from tests.e2e.training import CALCULATOR, RecordingTrainer, config
from tests.fork_ranks import forked, run_ranks
from trl_gym import GymServers, PolicyServer, load_gym_dataset
from trl_gym.errors import GymServerError, PolicyServerLostError
from trl_gym.rollouts.journal import read_journal
from trl_gym.rollouts.ledger import Ledger
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.rollout import Rollout

pytestmark = pytest.mark.e2e
small = pytest.mark.shares("small")

NUM_STEPS, PER_EPOCH, NUM_GROUPS, NUM_MEMBERS = 6, 4, 2, 4
NUM_ENDED = 2  # rollouts of the next batch that the loss waits for
KILLED_AT_STEP = 2
IDENTITY = ("batch", "group", "member")

Identity = tuple[int, int, int]


class Overlapping(RecordingTrainer):
    """Waits in every loss for rollouts of the next batch; notes when steps end, and which groups they train."""

    ended: Counter[int]  # rollouts, by batch
    step_ends: dict[int, float]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ended, self.step_ends = Counter(), {}
        super().__init__(*args, **kwargs)

    def build_trajectories(self, answer: dict[str, Any], request: RolloutRequest, calls: Any) -> Any:
        self.ended[request.batch] += "-train" in request.rollout_id
        return super().build_trajectories(answer, request, calls)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self._mode == "train":
            trained = sorted({identity_of(rollout)[:2] for rollout in self._accounting.rollouts})
            with open(Path(self.args.output_dir) / f"trained-{self.accelerator.process_index}.jsonl", "a") as file:
                file.write(json.dumps({"step": self.state.global_step, "groups": trained}) + "\n")
        return output

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self._mode == "train":
            self.in_update()
        return super().compute_loss(*args, **kwargs)

    def in_update(self) -> None:
        """Wait until some of the next batch have ended, where it is known."""
        batch = self._step // self.args.generate_every + 1
        if self._look_ahead.rows(batch) is not None:
            wait_for(lambda: self.ended[batch] >= NUM_ENDED, f"rollouts of batch {batch} to end before it")

    def _push_weights(self) -> None:
        self.step_ends[self.state.global_step] = time.time()
        super()._push_weights()


class Holding(Overlapping):
    """Keeps what follows the first rollouts of a batch in flight through the weight sync and into the evaluation."""

    newest = 0  # the batch that is trained

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.goes_on, self.whole_at_evaluation = threading.Event(), dict[int, bool]()
        super().__init__(*args, **kwargs)

    def build_trajectories(self, answer: dict[str, Any], request: RolloutRequest, calls: Any) -> Any:
        is_ahead = request.batch > self.newest and "-train" in request.rollout_id
        if is_ahead and self.ended[request.batch] >= NUM_ENDED:
            self.goes_on.wait(300)  # in the thread of the collector, where every rollout ends
        return super().build_trajectories(answer, request, calls)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._mode == "eval":
            entries = self._source._queue._entries
            self.whole_at_evaluation[self.state.global_step] = all(entry.is_whole for entry in entries)
        else:
            self.newest = self._step // self.args.generate_every
        self.goes_on.set()
        if self._mode == "train":
            self.goes_on.clear()  # whoever waited goes on
        return super()._generate_and_score_completions(inputs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.gym_eval_overlap == "drain":
            self.goes_on.set()
        return super().evaluate(*args, **kwargs)


class Killed(Holding):
    """Dies without notice in the middle of a step."""

    def in_update(self) -> None:
        super().in_update()
        if self.state.global_step == KILLED_AT_STEP:
            wait_for(  # what has ended is written a moment later
                lambda: (
                    sum(line["batch"] > KILLED_AT_STEP for line in recorded(Path(self.args.output_dir))) >= NUM_ENDED
                ),
                "the journal to have what has ended",
            )
            os.kill(os.getpid(), signal.SIGKILL)


class Resumed(Holding):
    """Recalls of the first batches what a run that was killed has finished, which does not end once more."""

    def in_update(self) -> None:
        if self.state.global_step > KILLED_AT_STEP:
            super().in_update()


def settings(output_dir: Path, **changes: Any) -> Any:
    return config(
        output_dir,
        **{
            "num_generations": NUM_MEMBERS,
            "per_device_train_batch_size": NUM_GROUPS * NUM_MEMBERS,
            "max_steps": NUM_STEPS,
            "eval_strategy": "no",
            "gym_max_inflight": 1,  # most of a batch is in flight when its first rollouts have ended
            "gym_max_staleness": 1,
        }
        | changes,
    )


def train(
    kind: type[Overlapping], output_dir: Path, policy: str, gym_head: str, data: Path, model: Path, **changes: Any
) -> Overlapping:
    dataset = load_gym_dataset(data)
    made = kind(
        model=str(model),
        args=settings(output_dir, **changes),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(4)),
        policy_server=PolicyServer.attach(policy),
        gym_servers=GymServers.attach(gym_head),
    )
    with made:
        made.train(resume_from_checkpoint=bool(list(output_dir.glob("checkpoint-*"))))
    return made


def train_until_killed(*where: Any) -> None:
    train(Killed, *where, **SAVED, **EVALUATED, gym_eval_overlap="drain")


SAVED = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


def identity_of(rollout: Rollout) -> Identity:
    return rollout.request.batch, rollout.request.group, rollout.request.member


def recorded(folder: Path, mode: str = "train") -> list[dict[str, Any]]:
    return [line for line in read_journal(folder / "rollouts") if line["mode"] == mode]


def tasks(lines: list[dict[str, Any]]) -> dict[tuple[int, int], int]:
    return {(line["batch"], line["group"]): line["task_index"] for line in lines}


def trained(folder: Path) -> dict[int, list[tuple[int, int]]]:
    """The groups that each step trained, the last time that it was made."""
    lines = map(json.loads, (folder / "trained-0.jsonl").read_text().splitlines())
    return {line["step"]: [(batch, group) for batch, group in line["groups"]] for line in lines}


def require_each_group_once(by_step: dict[int, list[tuple[int, int]]], num_groups: int = NUM_GROUPS) -> None:
    groups = [group for step in sorted(by_step) for group in by_step[step]]
    assert sorted(groups) == [(batch, group) for batch in range(len(by_step)) for group in range(num_groups)]


def require_fresh(trainer: Overlapping, max_staleness: int = 1) -> None:
    """Nothing that is trained, token by token, is staler than allowed: what the rows hold is what was sampled then."""
    ended = (line for line in recorded(Path(trainer.args.output_dir)) if line["failure"] is None)
    lines = {(*(line[name] for name in IDENTITY), line["version"]): line for line in ended if not line["retried"]}
    for batch in (one for one in trainer.seen if one["mode"] == "train"):
        allowed = set(range(batch["step"] - max_staleness, batch["step"] + 1))
        for row, rollout in enumerate(batch["rollouts"]):
            [line] = (line for version in allowed if (line := lines.get((*identity_of(rollout), version))))
            assert rollout.failure is None and {line["version"], *map(int, line["weight_versions"])} <= allowed
            [trajectory] = rollout.trajectories
            mask = (batch["completion_mask"][row] * batch["tool_mask"][row]).bool()
            own = [place for place, is_own in enumerate(trajectory.env_mask) if is_own]
            assert batch["completion_ids"][row][mask].tolist() == [trajectory.completion_ids[p] for p in own]
            sampled = torch.tensor([trajectory.logprobs[p] for p in own])
            torch.testing.assert_close(batch["sampling_per_token_logps"][row][mask].cpu(), sampled)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, calculator_data: Any) -> Path:
    folder, number = tmp_path_factory.mktemp("data"), NUM_GROUPS * PER_EPOCH
    return calculator_data.generate(folder, num_train=number, num_validation=1, seed=0)[0]


@pytest.fixture(scope="module")
def where(pair: Pair, data: Path, small_policy: Path) -> tuple[str, str, Path, Path]:
    return pair.policy.base_url, pair.gym.head_url, data, small_policy


@pytest.fixture(scope="module")
def whole(where: tuple[str, str, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Holding:
    """A run over an epoch and a half, with an evaluation beside rollouts in flight after every second step."""
    folder = tmp_path_factory.mktemp("overlap") / "whole"
    return train(Holding, folder, *where, **SAVED, **EVALUATED, gym_eval_overlap="share")


@small
def test_rollouts_of_the_next_batch_run_during_a_step_and_are_at_most_one_step_old(
    whole: Holding, where: tuple[str, str, Path, Path], tmp_path: Path
) -> None:
    lines = recorded(Path(whole.args.output_dir))
    assert [line["failure"] for line in lines] == [None] * NUM_STEPS * NUM_GROUPS * NUM_MEMBERS
    assert set(Counter(tuple(line[name] for name in IDENTITY) for line in lines).values()) == {1}
    for batch in range(NUM_STEPS):
        own = [line for line in lines if line["batch"] == batch]
        is_first = batch % PER_EPOCH == 0  # of its epoch: nothing of it was known before
        began = batch if is_first else batch - 1
        assert {(line["step"], line["version"]) for line in own} == {(batch + 1, began)}
        assert all(set(line["weight_versions"]) <= {str(began), str(began + 1)} for line in own)
        if not is_first:
            early = [line for line in own if line["time"] < whole.step_ends[batch]]
            assert len(early) >= NUM_ENDED and all(line["weight_versions"] == [str(began)] for line in early)
            assert len(early) < len(own), "some were in flight during the weight sync"
            assert any(str(batch) in line["weight_versions"] for line in own), "and went on after it"
    require_fresh(whole)
    require_each_group_once(trained(Path(whole.args.output_dir)))
    synchronous = train(RecordingTrainer, tmp_path, *where, gym_max_staleness=0)
    assert tasks(lines) == tasks(recorded(tmp_path))
    assert [batch["step"] for batch in synchronous.seen] == list(range(NUM_STEPS))


@small
def test_the_importance_ratio_is_that_of_the_saved_weights_and_the_sampled_tokens(
    whole: Holding, small_policy: Path
) -> None:
    folder = Path(whole.args.output_dir)
    lines = {line["rollout_id"]: line for line in recorded(folder)}
    largest = 0.0
    for batch in (one for one in whole.seen if one["mode"] == "train"):
        step = batch["step"]
        model = AutoModelForCausalLM.from_pretrained(small_policy if step == 0 else folder / f"checkpoint-{step}")
        for row, rollout in enumerate(batch["rollouts"]):
            line = lines[rollout.request.rollout_id]
            ids = torch.tensor([line["prompt_ids"] + line["completion_ids"]])
            with torch.no_grad():
                logits = model.float()(ids).logits[0, len(line["prompt_ids"]) - 1 : -1] / whole.temperature
            logprobs = logits.log_softmax(-1).gather(1, ids[0, len(line["prompt_ids"]) :, None]).squeeze(1)
            own = torch.tensor(line["env_mask"], dtype=torch.bool)
            ratio = (logprobs - torch.tensor(line["logprobs"]))[own].exp()
            mask = (batch["completion_mask"][row] * batch["tool_mask"][row]).bool()
            used = batch["importance_sampling_ratio"][row][mask].cpu()
            clipped = ratio.clamp(max=whole.vllm_importance_sampling_clip_max)
            torch.testing.assert_close(used, clipped, atol=2e-3, rtol=2e-3)
            if line["weight_versions"] != [str(step)]:
                largest = max(largest, (used - 1).abs().max().item())
    assert largest > 0.02, "the weights moved: this could tell a wrong ratio from a right one"


def require_one_version_in_evaluations(folder: Path) -> None:
    evaluated = recorded(folder, "eval")
    assert {line["step"] for line in evaluated} == {2, 4, 6}
    assert all(line["weight_versions"] == [str(line["step"])] for line in evaluated)


@small
def test_an_evaluation_beside_rollouts_in_flight_samples_one_version(whole: Holding) -> None:
    require_one_version_in_evaluations(Path(whole.args.output_dir))
    assert not whole.whole_at_evaluation[2], "training's rollouts were in flight"


@small
def test_a_trainer_that_is_killed_in_a_step_recalls_what_had_ended_and_trains_each_task_once(
    whole: Holding, where: tuple[str, str, Path, Path], tmp_path: Path
) -> None:
    process = forked(train_until_killed, tmp_path, *where)
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL
    before = recorded(tmp_path)
    assert {line["batch"] for line in before} == set(range(KILLED_AT_STEP + 2)), "the next batch was in flight"
    resumed = train(Resumed, tmp_path, *where, **SAVED, **EVALUATED, gym_eval_overlap="drain")

    lines = recorded(tmp_path)
    assert tasks(lines) == tasks(recorded(Path(whole.args.output_dir)))
    assert set(Counter(tuple(line[name] for name in IDENTITY) for line in lines).values()) == {1}, "sampled again"
    by_step = trained(tmp_path)
    assert list(by_step) == list(range(NUM_STEPS))
    require_each_group_once(by_step)
    require_fresh(resumed)
    assert [batch["step"] for batch in resumed.seen if batch["mode"] == "train"] == [2, 3, 4, 5]
    again = [line for line in before if line["batch"] >= KILLED_AT_STEP]
    assert len(again) >= NUM_GROUPS * NUM_MEMBERS + NUM_ENDED, "as many were recalled: they are there once"
    require_one_version_in_evaluations(tmp_path)
    assert resumed.whole_at_evaluation == {4: True, 6: True}, "they had ended"


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


class Interrupted(Overlapping):
    """Gets Ctrl-C where a test wants it, once."""

    where = ""

    def _interrupt_in(self, place: str) -> None:
        if place == self.where:
            self.where = ""
            os.kill(os.getpid(), signal.SIGINT)  # for the main thread, whichever this is

    def build_trajectories(self, answer: dict[str, Any], request: RolloutRequest, calls: Any) -> Any:
        self._interrupt_in("wait")
        return super().build_trajectories(answer, request, calls)

    def in_update(self) -> None:
        super().in_update()
        self._interrupt_in("update")

    def _push_weights(self) -> None:
        client = self.policy_server.client
        update = client.update_weights

        def interrupted(*args: Any, **kwargs: Any) -> None:
            self._interrupt_in("weight sync")
            update(*args, **kwargs)

        if self.state.global_step > 0:
            client.update_weights = interrupted
        super()._push_weights()
        client.update_weights = update


@small
def test_after_ctrl_c_nothing_runs_and_train_may_be_called_again(
    where: tuple[str, str, Path, Path], pair: Pair, tmp_path: Path
) -> None:
    url, head, data, model = where
    trainer = Interrupted(
        model=str(model),
        args=settings(tmp_path, max_steps=2),
        train_dataset=load_gym_dataset(data),
        policy_server=PolicyServer.attach(url),
        gym_servers=GymServers.attach(head),
    )
    with trainer:
        for place in ("wait", "update", "weight sync"):
            trainer.ended.clear()
            trainer.where = place
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            assert trainer.where == "" and len(trainer._source._queue) == 0
            if place == "weight sync":
                assert pair.policy.client.is_paused()
            else:
                wait_for(lambda: vllm_metric(pair.policy.client, "num_requests_running") == 0, "no calls")
        trainer.seen.clear()
        trainer.train()
    assert [batch["step"] for batch in trainer.seen] == [0, 1]
    require_fresh(trainer)
    assert pair.policy.client.weight_version() == "2"
    names = [line["rollout_id"] for line in recorded(tmp_path)]
    assert len(set(names)) == len(names)


# -- two ranks --------------------------------------------------------------------------------------------------------


class LosesServer:
    """Makes this process believe, once, that the policy server is gone."""

    is_armed = False


class Ranked(Overlapping):
    """Loses the connection to the policy server on rank 1, while rollouts of the third batch are in flight."""

    loses = has_lost = False

    def build_trajectories(self, answer: dict[str, Any], request: RolloutRequest, calls: Any) -> Any:
        if self._is_victim and request.batch == 2 and not self.has_lost:
            self.has_lost = LosesServer.is_armed = True
        return super().build_trajectories(answer, request, calls)

    def in_update(self) -> None:
        if self._is_victim and self.state.global_step == 1:
            wait_for(lambda: self.has_lost and not LosesServer.is_armed, "the loss")
        else:
            super().in_update()

    @property
    def _is_victim(self) -> bool:
        return self.loses and self.accelerator.process_index == 1


def main(folder: str, policy: str, gym_head: str, data: str, model: str) -> None:
    """One rank of two: whole groups on each, then groups across them."""
    take = Ledger.take

    async def take_or_lose(self: Ledger, *args: Any, **kwargs: Any) -> Any:
        if LosesServer.is_armed:
            LosesServer.is_armed = False
            raise PolicyServerLostError("its connection was cut")
        return await take(self, *args, **kwargs)

    Ledger.take = take_or_lose  # type: ignore[method-assign]
    for kind, size in (("whole", 4), ("across", 6)):
        made = Ranked(
            model=model,
            args=settings(Path(folder) / kind, per_device_train_batch_size=size, max_steps=5),
            train_dataset=load_gym_dataset(data),
            policy_server=PolicyServer.attach(policy),
            gym_servers=GymServers.attach(gym_head),
            callbacks=[StopsEarly()] if kind == "whole" else [],
        )
        made.loses = kind == "whole"
        made.train()
        require_fresh(made)
        assert len(made._source._queue) == 0
        made.close()
    torch.distributed.destroy_process_group()


class StopsEarly(TrainerCallback):
    """After the third step, while rollouts of the fourth batch are in flight."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 3


@small
def test_two_ranks_lose_a_server_stop_early_and_share_groups(
    where: tuple[str, str, Path, Path], pair: Pair, tmp_path: Path
) -> None:
    arguments = [str(argument) for argument in (tmp_path, *where)]
    done = run_ranks(2, "tests.e2e.test_overlap", *arguments)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "answers again, unchanged" in done.stderr and "will run again" in done.stderr

    whole, across = recorded(tmp_path / "whole"), recorded(tmp_path / "across")
    by_step: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for rank in (0, 1):
        for line in map(json.loads, (tmp_path / "whole" / f"trained-{rank}.jsonl").read_text().splitlines()):
            by_step[line["step"]] += [(batch, group) for batch, group in line["groups"]]
    require_each_group_once(by_step)
    assert sorted(by_step) == [0, 1, 2]
    ended = [line for line in whole if line["failure"] is None and not line["retried"]]
    # One that ends while its launch is given up is recorded, and runs again as another attempt.
    assert set(Counter((*(line[name] for name in IDENTITY), line["attempt"]) for line in ended).values()) == {1}
    assert any(line["failure"] is not None and line["failure"]["kind"] == "cancelled" for line in whole)
    assert any(line["batch"] == 3 for line in whole), "the fourth batch had begun"
    wait_for(lambda: vllm_metric(pair.policy.client, "num_requests_running") == 0, "no calls")

    # Three groups of four over two ranks with six rows each: the second group lies across them.
    assert Counter((line["rank"], line["group"]) for line in across if line["batch"] == 0) == {
        (0, 0): 4, (0, 1): 2, (1, 1): 2, (1, 2): 4,
    }  # fmt: skip
    for rank, groups in ((0, [0, 1]), (1, [1, 2])):
        lines = map(json.loads, (tmp_path / "across" / f"trained-{rank}.jsonl").read_text().splitlines())
        assert [line["groups"] for line in lines] == [[[step, group] for group in groups] for step in range(5)]
    # Two batches per epoch: the first one of each is not known before.
    assert {line["batch"]: line["version"] for line in across} == {0: 0, 1: 0, 2: 2, 3: 2, 4: 4}


# -- servers that die -------------------------------------------------------------------------------------------------


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class KillsServers(Overlapping):
    """Kills, during the update, the policy server's engine in one step and NeMo Gym in another one."""

    kills_gym = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.has_killed = {2: threading.Event(), 3: threading.Event()}  # by the batch that is in flight
        super().__init__(*args, **kwargs)

    def build_trajectories(self, answer: dict[str, Any], request: RolloutRequest, calls: Any) -> Any:
        batch = request.batch
        if self.kills_gym and batch in self.has_killed and self.ended[batch] >= NUM_ENDED:
            # In the thread of the collector: the rest of the batch is not finished before.
            self.has_killed[batch].wait(300)
        return super().build_trajectories(answer, request, calls)

    def in_update(self) -> None:
        super().in_update()
        if self.state.global_step == 1 and self.policy_server.is_ours:
            self.ended_before = [line["rollout_id"] for line in recorded(Path(self.args.output_dir))]
            supervisor = psutil.Process(self.policy_server._process.pid)
            [engine] = [one for one in supervisor.children(recursive=True) if "EngineCore" in one.name()]
            engine.kill()
            wait_for(lambda: has_ended(engine), "the engine to end")
            self.has_killed[2].set()
        if self.state.global_step == 2 and self.kills_gym:
            self._source._servers._num_gym_restarts = 1  # as often as allowed
            pid = self.gym_servers.servers[0].pid
            os.kill(pid, signal.SIGKILL)  # the process that runs all of its servers
            wait_for(lambda: not psutil.pid_exists(pid), "NeMo Gym to be gone")
            self.has_killed[3].set()


def test_an_engine_that_dies_costs_its_own_rollouts_and_a_gym_that_dies_the_run_until_it_is_resumed(
    alone: None, warm: None, data: Path, small_policy: Path, tmp_path: Path
) -> None:
    def make() -> KillsServers:
        args = settings(
            tmp_path,
            **SAVED | {"max_steps": 4},
            gym_config_paths=[str(CALCULATOR / "calculator.yaml")],
            vllm_max_model_length=512,
            gym_vllm_args={"tool-call-parser": "hermes", "max-num-seqs": 32},
            gym_server_restarts=1,
            gym_retries=0,
        )
        return KillsServers(model=str(small_policy), args=args, train_dataset=load_gym_dataset(data))

    with make() as first, pytest.raises(GymServerError, match=r"NeMo Gym is lost and is not restarted"):
        first.train()
    assert first.state.global_step == 3, "the step in which it died was made; its loss is heard at the next one"
    require_fresh(first)
    lines = recorded(tmp_path)
    lines = [line for line in lines if line["failure"] is None and not line["retried"]]
    done = {line["rollout_id"]: tuple(line[name] for name in IDENTITY) for line in lines}
    assert set(first.ended_before) <= done.keys() and len(set(done.values())) == len(done)
    attempts = {line["rollout_id"]: line["attempt"] for line in lines}
    again = {name for name, attempt in attempts.items() if attempt > 0}
    assert again and {done[name][0] for name in again} == {2}, "of the batch that was in flight"
    assert not again & set(first.ended_before)
    [restarts] = {entry["policy_server/restarts"] for entry in first.state.log_history if entry.get("step") == 3}
    assert restarts == 1

    with make() as resumed:
        resumed.kills_gym = False
        resumed.train(resume_from_checkpoint=True)
    require_fresh(resumed)
    require_each_group_once(trained(tmp_path))
    done_again = [tuple(line[name] for name in IDENTITY) for line in recorded(tmp_path) if line["failure"] is None]
    assert set(Counter(done_again).values()) == {1}, "what had ended was recalled"
