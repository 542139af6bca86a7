"""Resumed from any checkpoint, a run trains on the same tasks in the same order and ends with the same weights, bit
for bit. Rollouts come from a journal (`gym_replay`), so that nothing but resuming can make a difference."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, TrainerCallback, TrainerState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from tests.gradient import lean
from tests.policy_server.tiny_model import build_model, build_tokenizer
from tests.rollouts.recorded import POLICY, write
from trl_gym import GymGRPOConfig, GymGRPOTrainer, load_gym_dataset
from trl_gym.checkpoints import MADE_WITH, damage
from trl_gym.errors import ConfigError, RolloutError, StorageError
from trl_gym.folder_owner import FolderOwner
from trl_gym.resume import load_state, save_state
from trl_gym.rollouts.queue import TaskGroup
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.rollout import Rollout
from trl_gym.rollouts.source import BatchInfo, Collected, JournalSource
from trl_gym.rollouts.tasks import LookAhead
from trl_gym.rollouts.trajectory import Trajectory

NUM_TASKS, NUM_MEMBERS = 6, 2
# Optimizer steps, rows and passes per generation batch, by what is special about them.
SCHEDULES = {
    "a batch per step": {"gradient_accumulation_steps": 2, "steps_per_generation": 2},
    "a batch for two steps": {"gradient_accumulation_steps": 1, "steps_per_generation": 2},
    "two batches per step": {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
    "a batch passed through twice": {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "num_iterations": 2},
}


class Watched(GymGRPOTrainer):
    """Keeps the tasks of every generation batch, with the step at which it was made.

    Args:
        num_ahead: Generation batches whose tasks are read before their turn.
    """

    def __init__(self, *, num_ahead: int = 0, **kwargs: Any) -> None:
        self.batches: list[tuple[int, list[int]]] = []
        self.foretold: list[tuple[list[int], list[int]]] = []  # tasks of a batch, and as they were known before
        self.told: dict[int, int] = {}  # the step of a batch's rollouts, by its number
        super().__init__(**kwargs)
        self._look_ahead = LookAhead(num_ahead, self.args.generate_every)
        self._coming: dict[int, list[int]] = {}

    def get_batch_samples(self, *args: Any) -> Any:
        samples = super().get_batch_samples(*args)
        for number in range(1 + self._step // self.args.generate_every, 8 + self._step // self.args.generate_every):
            if (rows := self._look_ahead.rows(number)) is not None:
                self._coming[number] = [row["task_index"] for row in rows]
        return samples

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if coming := self._coming.get(self._step // self.args.generate_every):
            self.foretold.append(([row["task_index"] for row in inputs], coming))
        return super()._generate_and_score_completions(inputs)

    def build_request(self, row: dict[str, Any], request: RolloutRequest) -> dict[str, Any]:
        if not self.batches or len(self.batches[-1][1]) == 4:
            self.batches.append((self.state.global_step, []))
        self.batches[-1][1].append(request.task_index)
        self.told[request.batch] = request.step
        return request.row


def sampled(task: int, member: int) -> Rollout:
    """Of one row, or of two or three: buffered micro-batches have more rows than rollouts."""
    rng = random.Random(10 * task + member)
    trajectories = [
        Trajectory(
            prompt_ids=[1, task],
            completion_ids=[rng.randrange(20) for _ in range(6)],
            env_mask=[1] * 6,
            logprobs=[-3.0] * 6,
            num_turns=1,
            turn_ends=[6],
        )
        for _ in range(1 + (task + member) % 3)
    ]
    success = (0.0, 1.0, float(member))[task % 3]  # solved never, always, sometimes
    answer = {"response": {"output": []}, "reward": rng.random(), "success": success}
    row = {"responses_create_params": {"input": f"{task}?"}}
    asked = RolloutRequest(
        rollout_id=f"{task}-{member}", task_index=task, group=task, member=member, attempt=0, agent="a", row=row
    )
    return Rollout(request=asked, answer=answer, failure=None, trajectories=trajectories, seconds=0.1)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A journal and its dataset."""
    folder = tmp_path_factory.mktemp("recorded")
    write(folder / "rollouts", [sampled(task, member) for task in range(NUM_TASKS) for member in range(NUM_MEMBERS)])
    rows = [{"responses_create_params": {"input": f"{task}?"}} for task in range(NUM_TASKS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert POLICY.version == 3
    return folder / "rollouts", folder / "train.jsonl"


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[PreTrainedTokenizerFast]:
    with lean():
        yield build_tokenizer()


def trainer(
    recorded: tuple[Path, Path], tokenizer: Any, output_dir: Path, kind: type[Watched] = Watched, **changes: Any
) -> Watched:
    model: Qwen3ForCausalLM = build_model(tokenizer, tie=True, seed=0)
    options = {
        "output_dir": str(output_dir),
        "gym_replay": str(recorded[0]),
        "use_cpu": True,
        "seed": 3,
        "num_generations": NUM_MEMBERS,
        "per_device_train_batch_size": 2,
        "max_steps": 7,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    return kind(
        num_ahead=changes.pop("num_ahead", 0),
        model=model,
        processing_class=tokenizer,
        args=GymGRPOConfig(**(options | changes)),
        train_dataset=load_gym_dataset(recorded[1]),
    )


def test_a_folder_that_another_process_trains_in_is_refused(
    recorded: tuple[Path, Path], tokenizer: Any, tmp_path: Path
) -> None:
    owner = FolderOwner(tmp_path, option="output_dir", what="a training run")
    with owner, pytest.raises(ConfigError, match=r"`output_dir` .* is in use: a training run \(process"):
        trainer(recorded, tokenizer, tmp_path)
    trainer(recorded, tokenizer, tmp_path).close()
    owner.take()  # the trainer has let it go
    owner.release()


def weights(made: Watched) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in made.model.parameters()]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_resumed_from_checkpoints(
    recorded: tuple[Path, Path], tokenizer: Any, tmp_path: Path, schedule: dict[str, int]
) -> None:
    whole = trainer(recorded, tokenizer, tmp_path / "whole", **schedule)
    whole.train()
    # Three batches of two tasks per epoch: at least one epoch ends within the run.
    assert len(whole.batches) > 3
    assert len({task for _, tasks in whole.batches for task in tasks}) == NUM_TASKS
    assert list(whole.told.values()) == [1 + step for step, _ in whole.batches], "the step that trains it first"
    if schedule["gradient_accumulation_steps"] == 1:
        [_, rest] = load_state(tmp_path / "whole" / "checkpoint-1", 0).buffered
        assert len(rest["advantages"]) > 2  # more rows than rollouts
    # Step 1 is within a batch where one lasts for two steps, 4 and 6 are in or before the second epoch.
    for step in (1, 4, 6):
        options = {**schedule, "save_only_model": True}
        resumed = trainer(recorded, tokenizer, tmp_path / f"from-{step}", **options, num_ahead=2 if step < 6 else 0)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.batches == [batch for batch in whole.batches if batch[0] >= step], step
        for expected, actual in zip(weights(whole), weights(resumed), strict=True):
            assert torch.equal(expected, actual), step
        assert resumed._run == whole._run and resumed.told.items() <= whole.told.items()
        # The whole run has read nothing ahead. From step 1, at least the second batch of the epoch is known before.
        assert all(tasks == known for tasks, known in resumed.foretold)
        assert resumed.foretold or step > 1


@pytest.fixture(scope="module")
def learning() -> type[Watched]:
    """The curriculum of `docs/custom_trainer.md`, watched."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "custom_trainer.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(code[0] + next(block for block in code if "class Curriculum" in block), names)  # the first one imports
    return type("Learning", (Watched, names["Curriculum"]), {})


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_resumed_curriculum_draws_the_same_tasks(
    recorded: tuple[Path, Path], tokenizer: Any, tmp_path: Path, learning: type[Watched], schedule: dict[str, int]
) -> None:
    options = {**schedule, "kind": learning, "max_steps": 12}
    whole: Any = trainer(recorded, tokenizer, tmp_path / "whole", **options)
    whole.train()
    tasks = [task for _, batch in whole.batches for task in batch]
    num_sometimes = sum(task % 3 == 2 for task in tasks)
    assert num_sometimes / len(tasks) > 0.4  # a third without a curriculum, 0.74 in the long run
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    resumed: Any = trainer(recorded, tokenizer, tmp_path / "again", **options, save_only_model=True)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.batches == [batch for batch in whole.batches if batch[0] >= 5]
    assert resumed.pools.state_dict() == whole.pools.state_dict()
    for expected, actual in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(expected, actual)


class Behind(JournalSource):
    """Recorded rollouts that end when it is their batch's turn, however early they have begun."""

    _in_flight: Sequence[TaskGroup] = ()

    @property
    def in_flight(self) -> list[TaskGroup]:
        return list(self._in_flight)

    def collect(self, groups: Sequence[TaskGroup], number: int, batch: BatchInfo) -> Collected:
        waiting = [*self._in_flight, *groups]
        self._in_flight = waiting[number:]
        return super().collect(waiting[:number], number, batch)


def test_a_resumed_curriculum_draws_the_same_tasks_ahead(
    recorded: tuple[Path, Path], tokenizer: Any, tmp_path: Path, learning: type[Watched]
) -> None:
    class Overlapped(learning):  # type: ignore[misc, valid-type]
        def _new_source(self, *_: Any) -> Behind:
            return Behind(recorded[0])

    options = {**SCHEDULES["a batch per step"], "kind": Overlapped, "num_ahead": 1, "max_steps": 12}
    options |= {"gym_replay": None, "gym_max_staleness": 1}
    whole: Any = trainer(recorded, tokenizer, tmp_path / "whole", **options)
    whole.train()
    assert [step for step, _ in whole.batches] == [0, 0, 1, 3, 3, 4, 6, 6, 7, 9, 9, 10]  # epochs have three batches
    tasks = [batch for _, batch in whole.batches]
    assert list(whole.told.values()) == list(range(1, 13)), "whenever they begin, they are for the step of their batch"
    resumed: Any = trainer(recorded, tokenizer, tmp_path / "again", **options, save_only_model=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert resumed.batches == [(5, tasks[5]), *[batch for batch in whole.batches if batch[0] > 5]]
    assert resumed.told.items() <= whole.told.items()
    assert resumed.pools.state_dict() == whole.pools.state_dict()


def test_what_a_trainer_has_learned_outlives_another_number_of_ranks(
    recorded: tuple[Path, Path], tokenizer: Any, tmp_path: Path, learning: type[Watched]
) -> None:
    options: dict[str, Any] = {**SCHEDULES["a batch per step"], "kind": learning}
    trainer(recorded, tokenizer, tmp_path / "whole", **options, max_steps=2).train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    state = load_state(checkpoint, 0)
    assert state is not None and state.user is not None and state.user["pools"]["batches"] == 2
    save_state(checkpoint, 0, dataclasses.replace(state, num_ranks=2))
    resumed: Any = trainer(recorded, tokenizer, tmp_path / "again", **options, max_steps=3)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.pools.state_dict()["batches"] == 3


def test_what_a_checkpoint_cannot_hold_is_refused(
    recorded: tuple[Path, Path], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(recorded, tokenizer, tmp_path, max_steps=1, steps_per_generation=2, gradient_accumulation_steps=2)
    monkeypatch.setattr(made, "checkpoint_state", lambda: {"path": tmp_path})
    with pytest.raises(ConfigError, match=r"(?s)returned \(pathlib.*Return a dict"):
        made.train()


class Terminated(TrainerCallback):
    """Asks for transformers' checkpoint on SIGTERM at one event, as the signal's handler does. The callback that
    writes it has been called for that event before, and looks at its next one."""

    def __init__(self, event: str, step: int) -> None:
        self._event, self._step = event, step
        self.manager: Any = None

    def _look(self, event: str, state: TrainerState) -> None:
        if (event, state.global_step) == (self._event, self._step):
            self.manager.is_checkpoint_requested = True

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._look("epoch_begin", state)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._look("step_begin", state)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._look("pre_optimizer_step", state)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self._look("step_end", state)


@pytest.fixture(scope="module")
def uninterrupted(
    recorded: tuple[Path, Path], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> list[Watched]:
    """Runs with an optimizer step that takes half a generation batch, and with one that takes one of two passes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    runs = []
    for number, schedule in enumerate(JIT_SCHEDULES):  # trained one by one: making a trainer sets the random state
        runs.append(trainer(recorded, tokenizer, folder / str(number), **schedule, save_strategy="no"))
        runs[-1].train()
    return runs


JIT_SCHEDULES = (
    {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "per_device_train_batch_size": 1},
    {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "num_iterations": 2},
)


@pytest.mark.parametrize("schedule", range(2))
@pytest.mark.parametrize(
    ("asked", "step", "saved"),
    [
        ("step_begin", 2, 3),  # answered before the optimizer steps: the checkpoint waits for that
        ("step_begin", 3, 4),
        ("pre_optimizer_step", 3, 4),  # answered at the end of the step
        ("step_end", 3, 3),  # answered when the next step begins, or the epoch ends
        ("step_end", 5, 5),
        ("step_end", 6, 6),
        ("epoch_begin", 6, 6),
    ],
)
def test_resumed_from_the_checkpoint_on_sigterm(
    recorded: tuple[Path, Path],
    tokenizer: Any,
    tmp_path: Path,
    uninterrupted: list[Watched],
    schedule: int,
    asked: str,
    step: int,
    saved: int,
) -> None:
    options = {**JIT_SCHEDULES[schedule], "save_strategy": "epoch", "save_only_model": False}
    stopped = trainer(recorded, tokenizer, tmp_path, **options, enable_jit_checkpoint=True)
    terminated = Terminated(asked, step)
    stopped.add_callback(terminated)
    [jit] = [own for own in stopped.callback_handler.callbacks if isinstance(own, JITCheckpointCallback)]
    terminated.manager = jit.jit_manager
    stopped.train()
    assert stopped.state.global_step < 7
    folders = {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")}
    assert max(folders) == saved and step not in folders - {saved}
    resumed = trainer(recorded, tokenizer, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    whole = uninterrupted[schedule]
    assert resumed.batches == [batch for batch in whole.batches if batch[0] >= saved]
    for expected, actual in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(expected, actual)


def test_a_batch_that_was_begun_cannot_be_taken_over_without_its_rest(
    recorded: tuple[Path, Path], tokenizer: Any, tmp_path: Path
) -> None:
    schedule = SCHEDULES["a batch for two steps"]
    trainer(recorded, tokenizer, tmp_path / "whole", **schedule, max_steps=2).train()
    for checkpoint in (tmp_path / "whole").glob("checkpoint-*"):
        for name in ("trl_gym_state.rank-0.pt", MADE_WITH):
            (checkpoint / name).unlink()
    resumed = trainer(recorded, tokenizer, tmp_path / "again", **schedule, max_steps=3)
    with pytest.raises(ConfigError, match=r"checkpoint-1 was saved in the middle .* not written by trl-gym"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [step for step, _ in resumed.batches] == [2]


def test_a_run_is_not_continued_with_what_breaks_exactness_unless_that_is_allowed(
    recorded: tuple[Path, Path], tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the middle of a generation batch: its rest fits no other batches, and is left out. The learning rate is
    that of the checkpoint, as transformers resumes it; the schedule's length is the run's own."""
    schedule = SCHEDULES["a batch for two steps"]
    whole = trainer(recorded, tokenizer, tmp_path / "whole", **schedule, max_steps=3)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    other = {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "seed": 4, "max_steps": 4}
    other |= {"temperature": 0.9, "learning_rate": 5e-4}
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    best = {"best_model_checkpoint": str(tmp_path / "before it was moved" / "checkpoint-3")}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | best))
    resumed = trainer(recorded, tokenizer, tmp_path / "again", **other)
    with pytest.raises(ConfigError) as caught:
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert [problem.text.split()[0] for problem in caught.value.problems] == [
        "`gradient_accumulation_steps`",
        "`seed`",
        "`steps_per_generation`",
    ]
    assert not resumed.batches
    resumed = trainer(recorded, tokenizer, tmp_path / "again", **other, gym_resume_changed="allow")
    with caplog.at_level("WARNING"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert "`temperature` was 1.0 and is 0.9" in caplog.text and "`max_steps` was 3 and is 4" in caplog.text
    assert "`learning_rate` stays 0.001, which the checkpoint puts back (0.0005 has no effect)" in caplog.text
    assert "does not fit the batches of this run" in caplog.text
    assert resumed.state.global_step == 4 and resumed.batches[0][0] == 1 and resumed._run != whole._run
    assert resumed.state.best_model_checkpoint == str(tmp_path / "whole" / "checkpoint-3")
    rates = {row["step"]: row["learning_rate"] for row in resumed.state.log_history if "learning_rate" in row}
    assert rates[2] == pytest.approx(1e-3 * (1 - 1 / 3)), "as it was left"
    assert rates[3] == pytest.approx(1e-3 * (1 - 2 / 4))


def test_a_checkpoint_without_the_state_of_its_optimizer_is_refused(
    recorded: tuple[Path, Path], tokenizer: Any, tmp_path: Path
) -> None:
    options = {**SCHEDULES["a batch per step"], "max_steps": 1}
    trainer(recorded, tokenizer, tmp_path, **options, save_only_model=True).train()
    resumed = trainer(recorded, tokenizer, tmp_path, **options | {"max_steps": 2})
    with pytest.raises(
        ConfigError, match=r"(?s)optimizer.pt is missing.*rng_state.pth is.*scheduler.pt is.*trl_gym_sta"
    ):
        resumed.train(resume_from_checkpoint=True)
    resumed = trainer(recorded, tokenizer, tmp_path, **options | {"max_steps": 2}, gym_resume_changed="allow")
    resumed.train(resume_from_checkpoint=True)
    assert [step for step, _ in resumed.batches] == [1]


def test_a_job_whose_last_save_was_cut_goes_on_from_the_one_before_or_from_nothing(
    recorded: tuple[Path, Path], tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And writes over it: a folder that is written again is not whole until it has been."""
    schedule = SCHEDULES["a batch for two steps"]
    whole = trainer(recorded, tokenizer, tmp_path, **schedule, max_steps=3)
    whole.train()
    model = tmp_path / "checkpoint-3" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-7])
    resumed = trainer(recorded, tokenizer, tmp_path, **schedule, max_steps=3)
    with caplog.at_level("WARNING"):
        resumed.train(resume_from_checkpoint=True)
    assert f"{model.parent} is not whole, and is passed over as it is: model.safetensors is cut" in caplog.text
    assert resumed.batches == whole.batches[1:] and not list(damage(model.parent))
    for checkpoint in tmp_path.glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").write_bytes(b"")
    again = trainer(recorded, tokenizer, tmp_path, **schedule, max_steps=3)

    def cut(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    again.save_model = cut  # type: ignore[method-assign]  # which transformers calls first in a save
    with pytest.raises(StorageError, match="No space"):
        again.train(resume_from_checkpoint=True)
    assert again.batches == whole.batches[:1]
    assert "trainer_state.json, which is written last, is missing" in "".join(damage(tmp_path / "checkpoint-1"))


def test_evaluation_is_refused(recorded: tuple[Path, Path], tokenizer: Any, tmp_path: Path) -> None:
    made = trainer(recorded, tokenizer, tmp_path)
    with pytest.raises(RolloutError, match="nothing can be evaluated"):
        made.evaluate(load_gym_dataset(recorded[1]))
