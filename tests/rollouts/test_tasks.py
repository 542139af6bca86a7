"""Tasks that are foretold are those that come, and reading them ahead changes nothing of a run. Schedules are trained
by TRL's real trainer with look-ahead and without, on one rank and on two (`main` is what a rank does)."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOConfig, GRPOTrainer

from tests.fork_ranks import run_ranks
from tests.gradient import lean
from tests.policy_server.tiny_model import build_model, build_tokenizer
from trl_gym.errors import ConfigError
from trl_gym.resume import QueueState, RunState, Start, read_back, save_state
from trl_gym.rollouts.tasks import LookAhead, further_tasks, own_share

ROOT = Path(__file__).parents[2]
NUM_TASKS, NUM_MEMBERS, NUM_AHEAD = 13, 2, 2
SIZES = (1, 2, 4)
SCHEDULES = [
    {"gradient_accumulation_steps": steps, "steps_per_generation": rows, "num_iterations": passes}
    for steps, rows, passes in [*itertools.product(SIZES, SIZES, (1,)), (2, 2, 2)]
]


@dataclass
class Seen:
    """What happened in a run, in order.

    Attributes:
        batches: Micro-step, optimizer steps made and rows of each generation batch.
        foretold: Rows of the next generation batches as they were known at each, by how far ahead.
        steps: Of each micro-step: whether gradients were synchronized, rows, and torch's random state.
        weights: At the end.
    """

    batches: list[tuple[int, int, list[int]]] = field(default_factory=list)
    foretold: list[dict[int, list[int] | None]] = field(default_factory=list)
    steps: list[tuple[bool, list[int], int]] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)


class Foretelling(GRPOTrainer):
    """Trains the numbers of the rows themselves: no rollouts, and an optimizer step that depends on all of them."""

    def __init__(self, num_ahead: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen = Seen()
        self.generate_every = self.args.steps_per_generation * self.num_iterations
        self.look_ahead = LookAhead(num_ahead, self.generate_every)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        num_left = (self.state.max_steps - self.state.global_step) * self.args.gradient_accumulation_steps
        batches = self.look_ahead.read(epoch_iterator, num_batches, micro_step=self._step, num_left=num_left)
        return super().get_batch_samples(batches, num_batches, device)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        own = [row["task"] for row in inputs]
        number, within = divmod(self._step, self.generate_every)
        assert within == 0
        self.seen.batches.append((self._step, self.state.global_step, own))
        coming = {index: self.look_ahead.rows(number + index) for index in range(1, NUM_AHEAD + 2)}
        self.seen.foretold.append(
            {index: None if rows is None else [row["task"] for row in rows] for index, rows in coming.items()}
        )
        return {"row": torch.tensor(own)}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        rows = inputs["row"]
        self.seen.steps.append(
            (self.accelerator.sync_gradients, rows.tolist(), hash(torch.get_rng_state().numpy().tobytes()))
        )
        return model(input_ids=rows[:, None]).logits.square().mean()


def make(output_dir: Path, tokenizer: Any, num_ahead: int, **options: Any) -> Foretelling:
    model: Any = build_model(tokenizer, tie=True, seed=0)
    args = GRPOConfig(
        **{
            "output_dir": str(output_dir),
            "use_cpu": True,
            "bf16": False,
            "num_generations": NUM_MEMBERS,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
        }
        | options
    )
    return Foretelling(
        num_ahead,
        model=model,
        processing_class=tokenizer,
        args=args,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "?", "task": task} for task in range(NUM_TASKS)]),
    )


def run(output_dir: Path, tokenizer: Any, num_ahead: int, **options: Any) -> Seen:
    trainer = make(output_dir, tokenizer, num_ahead, **options)
    trainer.train()
    trainer.seen.weights = [own.detach().clone() for own in trainer.model.parameters()]
    return trainer.seen


def epochs_of(schedule: dict[str, int], num_ranks: int) -> tuple[int, int]:
    """Micro-steps and optimizer steps of an epoch."""
    tasks = 2 * num_ranks * schedule["steps_per_generation"] // NUM_MEMBERS
    micro_steps = NUM_TASKS // tasks * schedule["steps_per_generation"] * schedule["num_iterations"]
    return micro_steps, -(-micro_steps // schedule["gradient_accumulation_steps"])


def check(plain: Seen, ahead: Seen, schedule: dict[str, int], max_steps: int, num_ranks: int = 1) -> None:
    """Nothing differs but what is foretold; that is right, and known up to the end of the epoch and of training."""
    assert ahead.batches == plain.batches
    assert ahead.steps == plain.steps
    assert sum(is_synchronized for is_synchronized, *_ in plain.steps) == max_steps
    assert all(torch.equal(one, other) for one, other in zip(plain.weights, ahead.weights, strict=True))
    assert all(rows is None for coming in plain.foretold for rows in coming.values())
    in_epoch, _ = epochs_of(schedule, num_ranks)
    for number, coming in enumerate(ahead.foretold):
        epoch = ahead.batches[number][0] // in_epoch
        for index, rows in coming.items():
            there = ahead.batches[number + index : number + index + 1]
            expected = there[0][2] if there and there[0][0] // in_epoch == epoch else None
            # Where several batches are made in a step, more than `NUM_AHEAD` are known at the first of them.
            assert rows == expected or (index > NUM_AHEAD and rows is None), (number, index)


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Any]:
    with lean():
        yield build_tokenizer()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(map(str, schedule.values())))
def test_foretold_batches_come(tokenizer: Any, tmp_path: Path, schedule: dict[str, int]) -> None:
    _, steps_in_epoch = epochs_of(schedule, 1)
    ends = [2 * steps_in_epoch + steps_in_epoch // 2]  # within an epoch
    if schedule["gradient_accumulation_steps"] == 4:
        ends.append(2 * steps_in_epoch)
    for max_steps in ends:
        plain, ahead = (run(tmp_path, tokenizer, num, **schedule, max_steps=max_steps) for num in (0, NUM_AHEAD))
        check(plain, ahead, schedule, max_steps)


@given(
    st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.integers(1, 40),
)  # fmt: skip
def test_nothing_is_read_twice_or_behind_the_end(
    num_ahead: int, generate_every: int, num_per_step: int, epochs: list[int], max_steps: int
) -> None:
    """As transformers takes micro-batches, with epochs that may end within a generation batch, as callbacks can do."""
    ahead, step, taken, num_read = LookAhead(num_ahead, generate_every), 0, 0, 0

    def iterate(epoch: int, size: int) -> Iterator[list[dict[str, Any]]]:
        nonlocal num_read
        for place in range(size):
            num_read += 1
            yield [{"at": (epoch, place)}]

    for epoch, size in enumerate(epochs):
        iterator, first, num_read = iterate(epoch, size), taken, 0
        for _ in range(-(-size // num_per_step)):
            if step == max_steps:
                break
            num_left = (max_steps - step) * num_per_step
            own = [*ahead.read(iterator, num_per_step, micro_step=taken, num_left=num_left)]
            assert own == [[{"at": (epoch, taken - first + place)}] for place in range(len(own))]
            assert taken - first + len(own) <= num_read <= taken - first + num_left
            for batch in range((taken + len(own)) // generate_every + num_ahead + 2):
                place = batch * generate_every - first
                is_known = taken - first <= place < num_read
                assert ahead.rows(batch) == ([{"at": (epoch, place)}] if is_known else None)
            newest = (taken + num_per_step - 1) // generate_every + num_ahead
            wanted = newest * generate_every - first
            assert num_read >= min(wanted + 1, size, taken - first + num_left)
            taken, step = taken + len(own), step + 1


def main(folder: str) -> None:
    """What one rank does."""
    with lean():
        tokenizer = build_tokenizer()
        found = [
            [run(Path(folder), tokenizer, ahead, **schedule, max_steps=max_steps) for ahead in (0, NUM_AHEAD)]
            for schedule, max_steps in on_two_ranks()
        ]
    told = refused_by_one_rank(Path(folder) / "checkpoint")
    torch.save((found, told), Path(folder) / f"rank-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


def refused_by_one_rank(folder: Path) -> str:
    """What a rank is told of a checkpoint by three ranks that has groups in flight for the first alone."""
    process = PartialState()
    if process.is_main_process:
        save_state(folder, 0, RunState("run", 0, 3, None, QueueState(groups=[{"group": 0}])))
    process.wait_for_everyone()
    with pytest.raises(ConfigError) as refused:
        options = SimpleNamespace(gradient_accumulation_steps=1, generate_every=1, device="cpu")
        read_back(Start({}, str(folder)), process, options, run="run", num_steps=0)
    return str(refused.value)


def on_two_ranks() -> list[tuple[dict[str, int], int]]:
    """Schedules, and optimizer steps: training ends within the third epoch."""
    chosen = [own for own in SCHEDULES if own["gradient_accumulation_steps"] == 2 and own["steps_per_generation"] != 2]
    return [(own, epochs_of(own, 2)[1] * 5 // 2) for own in chosen]


def test_two_ranks(tmp_path: Path) -> None:
    ended = run_ranks(2, "tests.rollouts.test_tasks", str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-3000:]
    ranks, told = zip(
        *(torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in range(2)), strict=True
    )
    assert all("written by 3 ranks with groups of rollouts in flight" in words for words in told)
    for (schedule, max_steps), *both in zip(on_two_ranks(), *ranks, strict=True):
        for plain, ahead in both:
            check(plain, ahead, schedule, max_steps, num_ranks=2)
        assert all(torch.equal(*pair) for pair in zip(both[0][1].weights, both[1][1].weights, strict=True))
        rows = [{task for *_, tasks in rank[1].batches for task in tasks} for rank in both]
        assert all(len(own) > 3 for own in rows)


places = st.tuples(st.integers(0, 2**32), st.integers(0, 10**6), st.integers(0, 9))


def stream(
    num_tasks: int, place: tuple[int, int, int], exclude: set[int] | frozenset[int] = frozenset()
) -> Iterator[int]:
    seed, batch, round_index = place
    return further_tasks(num_tasks, seed=seed, batch=batch, round_index=round_index, exclude=exclude)


@given(st.integers(0, 60), places, st.sets(st.integers(0, 70)))
def test_further_tasks_are_all_there_are_and_excluded_ones_come_last(
    num_tasks: int, place: tuple[int, int, int], exclude: set[int]
) -> None:
    drawn = list(stream(num_tasks, place, exclude))
    assert sorted(drawn) == list(range(num_tasks))
    num_others = num_tasks - len(exclude & set(drawn))
    assert not exclude & set(drawn[:num_others])
    # What is excluded does not change the order of the others.
    assert drawn[:num_others] == [task for task in stream(num_tasks, place) if task not in exclude]


@given(places, st.integers())
def test_further_tasks_depend_on_their_place_alone(place: tuple[int, int, int], global_seed: int) -> None:
    first = list(stream(100, place))
    random.seed(global_seed)
    torch.manual_seed(global_seed % 2**63)
    before = random.getstate(), torch.get_rng_state()
    assert list(stream(100, place)) == first
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    for index in range(3):
        other = list(place)
        other[index] += 1
        assert list(stream(100, tuple(other))) != first  # type: ignore[arg-type]


def test_further_tasks_of_a_large_dataset_are_drawn_evenly_and_lazily() -> None:
    few = list(itertools.islice(stream(10**15, (0, 0, 0)), 1000))
    assert len(set(few)) == 1000
    assert 0.4 < sum(few) / 1000 / 10**15 < 0.6
    orders = [tuple(stream(3, (seed, 0, 0))) for seed in range(1200)]
    assert all(150 < orders.count(order) < 250 for order in itertools.permutations(range(3)))


@given(st.integers(0, 40), places, st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_ranks_share_the_stream(num_tasks: int, place: tuple[int, int, int], counts: list[int]) -> None:
    shares = [own_share(stream(num_tasks, place), counts, rank) for rank in range(len(counts))]
    assert [task for own in shares for task in own] == list(stream(num_tasks, place))[: sum(counts)]
    if sum(counts) <= num_tasks:
        assert [len(own) for own in shares] == counts
