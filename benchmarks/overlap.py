"""What rollouts ahead of training buy: wall of synchronous ÷ wall of overlapped training, same optimizer steps.

    .venv/bin/python benchmarks/overlap.py [--cases sleeping,long_tail] [--rounds 1] [--json FILE]
    .venv/bin/python benchmarks/overlap.py --simulate

The real trainer, vLLM and NeMo Gym, the quickstart's policy. The environment is the calculator, and sleeps in its tool
(a rollout that calls none sleeps before it is judged). How long is in the dataset's rows:

    sleeping    16 rollouts a step; each sleeps as long as such a batch takes without, which is measured first
    long_tail   32 rollouts a step; one of them sleeps nine times that, so that it takes ten times as long as others

Each arm is a set of options (`ARMS`). The arms take turns, with the same tasks and with servers that are started once.
A learning rate of almost zero keeps rollouts of all arms alike. The wall is that of `train()`: the first weight sync,
the first rollouts, beside which nothing is trained, and the last ones are in it.

"idle" is the share of looks, one every 50 ms, at which the engine ran no request. All processes share the cores: CPU
seconds a step ÷ cores is the least that a step can take, and other work on the machine costs overlapped arms more.

`--simulate` prints the same ratio for a larger setup, without sampling: 64 slots, 128 rollouts a step, groups of 8, an
update that takes as long as a median rollout, and the trainer's rule which groups are taken
(`trl_gym/rollouts/queue.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import json
import math
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from measure import CALCULATOR, ROOT, cpu_seconds, machine

sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

Json = dict[str, Any]
NUM_MEMBERS = 8
NUM_GROUPS = {"sleeping": 2, "long_tail": 4}  # a step; of 32 rollouts one straggles
SYNCHRONOUS = "synchronous"
ARMS: dict[str, dict[str, Json]] = {
    "sleeping": {
        SYNCHRONOUS: {},
        "staleness 1": {"gym_max_staleness": 1},
        "staleness 2, 2 ahead": {"gym_max_staleness": 2, "gym_batches_ahead": 2},
    },
    "long_tail": {
        SYNCHRONOUS: {},
        "staleness 4": {"gym_max_staleness": 4},
        "staleness 8": {"gym_max_staleness": 8},
        "staleness 4, drop": {"gym_max_staleness": 4, "gym_on_stale": "drop"},
        "8 of 9 members": {"gym_oversample": 1},
    },
}
LOGGED = {  # what is printed of an arm → the metric of which it is the mean over steps
    "staleness": "rollouts/staleness/mean",
    "cut": "sampling/importance_sampling_ratio/fraction_cut",
    "dropped": "rollouts/failed/cancelled",
    "over-sampled": "oversample/cancelled_fraction",
    "rollout s": "rollouts/seconds_p50",
    "reward": "reward",
}
_LOOK_EVERY_S = 0.05

# The resources server, in Gym's interpreter. `sleeps` of a row is by member.
SLEEPER = """
import asyncio
from typing import Annotated, Any

from calculator_app import CalculatorServer, CalculatorVerifyRequest, CalculatorVerifyResponse
from fastapi import Body, Request
from nemo_gym.base_resources_server import BaseSeedSessionResponse
from nemo_gym.server_utils import SESSION_ID_KEY

sleeps: dict[str, float] = {}  # by session, until it has slept


async def sleep(request: Request) -> None:
    await asyncio.sleep(sleeps.pop(request.session[SESSION_ID_KEY], 0.0))


class SleepingServer(CalculatorServer):
    async def seed_session(self, request: Request, body: Annotated[dict[str, Any], Body()]) -> BaseSeedSessionResponse:
        seconds, member = body["sleeps"], body["_ng_rollout_index"]
        sleeps[request.session[SESSION_ID_KEY]] = seconds[member] if member < len(seconds) else 0.0
        return BaseSeedSessionResponse()

    async def add(self, request: Request, arguments: Annotated[Any, Body()] = None) -> Any:
        await sleep(request)
        return await super().add(arguments)

    async def subtract(self, request: Request, arguments: Annotated[Any, Body()] = None) -> Any:
        await sleep(request)
        return await super().subtract(arguments)

    async def verify(self, request: Request, body: CalculatorVerifyRequest) -> CalculatorVerifyResponse:
        await sleep(request)
        return await super().verify(body)


if __name__ == "__main__":
    SleepingServer.run_webserver()
"""


def write_environment(folder: Path) -> Path:
    """Write a calculator that sleeps; return its configuration."""
    shutil.copytree(CALCULATOR, folder)
    app = folder / "resources_servers" / "calculator" / "app.py"
    app.rename(app.with_name("calculator_app.py"))
    app.write_text(SLEEPER)
    return folder / "calculator.yaml"


def sleeps_of(case: str, task: int, seconds: float) -> list[float]:
    """Return how long each member of a task's group sleeps."""
    if case == "sleeping":
        return [seconds] * NUM_MEMBERS
    sleeps = [0.0] * NUM_MEMBERS
    step, place = divmod(task, NUM_GROUPS["long_tail"])
    if place == 0:
        sleeps[step % NUM_MEMBERS] = 9 * seconds
    return sleeps


def write_data(path: Path, case: str, steps: int, seconds: float) -> Path:
    """Write the tasks of a run of so many steps: no epoch ends in it, over which nothing is rolled out ahead."""
    from tiny_policy import load_calculator_data

    rows = load_calculator_data().sample_rows(NUM_GROUPS[case] * (steps + 1), held_out=False, rng=random.Random(0))
    rows = [{**row, "sleeps": sleeps_of(case, task, seconds)} for task, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- runs -------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training run."""

    seconds: float = 0.0
    steps: int = 0
    idle: float = 0.0  # share of the time in which the engine ran no request
    cpu: Counter[str] = field(default_factory=Counter)  # seconds by process
    logged: dict[str, float] = field(default_factory=dict)  # see `LOGGED`
    phases: dict[str, float] = field(default_factory=dict)  # seconds of the trainer's phases, a step


class Setup:
    """Servers that are started once, and training runs on them."""

    def __init__(self, policy: Any, gym: Any, folder: Path) -> None:
        self._policy, self._gym, self._folder = policy, gym, folder
        self._names = itertools.count()

    def run(self, case: str, options: Mapping[str, Any], *, steps: int, seconds: float) -> Run:
        """Train.

        Args:
            case: Of `ARMS`.
            options: Of `GymGRPOConfig`, over those that all arms have.
            steps: Optimizer steps.
            seconds: That a batch needs without sleep.
        """
        from trl_gym import GymGRPOConfig, GymGRPOTrainer, load_gym_dataset

        folder = self._folder / str(next(self._names))
        folder.mkdir()
        args = GymGRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            max_steps=steps,
            num_generations=NUM_MEMBERS,
            per_device_train_batch_size=NUM_GROUPS[case] * NUM_MEMBERS,
            max_completion_length=64,
            learning_rate=1e-7,
            gradient_checkpointing=False,
            shuffle_dataset=False,  # a straggler in each step
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            gym_deadline=120,
            **options,
        )
        trainer = GymGRPOTrainer(
            model=str(ROOT / "runs" / "small_policy"),
            args=args,
            train_dataset=load_gym_dataset(str(write_data(folder / "tasks.jsonl", case, steps, seconds))),
            policy_server=self._policy,
            gym_servers=self._gym,
        )
        with trainer, watching(self._policy) as idle:
            before, started = cpu_seconds(), time.perf_counter()
            trainer.train()
            took, cpu = time.perf_counter() - started, cpu_seconds() - before
        lines = [line for line in trainer.state.log_history if "reward" in line]
        assert len(lines) == trainer.state.global_step == steps, f"{len(lines)} of {steps} steps"
        logged = {name: fmean(line.get(metric, 0.0) for line in lines) for name, metric in LOGGED.items()}
        phases = {
            name.removeprefix("seconds/"): median(line[name] for line in lines[1:])
            for name in lines[-1]
            if name.startswith("seconds/")
        }
        return Run(took, steps, fmean(idle), cpu, logged, phases)


@contextlib.contextmanager
def watching(policy: Any) -> Iterator[list[bool]]:
    """Yield a list that grows while the block runs: whether the engine ran no request at that moment."""
    idle: list[bool] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK_EVERY_S):
            [text] = policy.client.prometheus()
            gauges = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running{")]
            idle.append(sum(float(gauge.rpartition(" ")[2]) for gauge in gauges) == 0.0)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield idle
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[Setup]:
    """Start vLLM with the quickstart's policy and NeMo Gym with the environment."""
    from tiny_policy import build_tiny_policy

    from trl_gym import GymServers, PolicyServer

    model = build_tiny_policy(ROOT / "runs" / "small_policy")
    flags = {"max-model-len": 512, "max-num-seqs": 64, "enforce-eager": True, "dtype": "float32"}
    flags["tool-call-parser"] = "hermes"
    with (
        PolicyServer(model, vllm_args=flags, log_dir=folder) as policy,
        GymServers(
            [write_environment(folder / "environment")],
            policy_base_url=policy.base_url,
            policy_api_key=policy.gym_key,
            log_dir=folder,
        ) as gym,
    ):
        yield Setup(policy, gym, folder)


def compare(cases: list[str], steps: Mapping[str, int], rounds: int) -> dict[str, dict[str, list[Run]]]:
    """Run every arm of every case once per round, in another order each round; print each case as it ends."""
    runs: dict[str, dict[str, list[Run]]] = {case: {arm: [] for arm in ARMS[case]} for case in cases}
    with servers(Path(tempfile.mkdtemp(prefix="trl-gym-benchmark-"))) as setup:
        for case in cases:
            seconds = setup.run(case, {}, steps=5, seconds=0.0).phases["rollouts"]
            print(f"{case}: {seconds:.2f} s of rollouts a step without sleep", flush=True)
            for number in range(rounds):
                names = list(ARMS[case])
                first = number % len(names)
                for arm in names[first:] + names[:first]:
                    runs[case][arm].append(setup.run(case, ARMS[case][arm], steps=steps[case], seconds=seconds))
            tell(case, runs[case])
    return runs


def tell(case: str, arms: Mapping[str, list[Run]]) -> None:
    """Print a line per arm, and the ratio of its wall to that of the synchronous one."""
    print(f"\n{case}: wall of synchronous ÷ wall; per step: CPU seconds, the trainer's phases, metrics")
    for arm, those in arms.items():
        ratio = median(base.seconds / run.seconds for base, run in zip(arms[SYNCHRONOUS], those, strict=True))
        one = those[0]
        cpu = {("trainer" if role == "client" else role): spent / one.steps for role, spent in one.cpu.items()}
        print(
            f"{arm:20} {ratio:5.2f} {median(run.seconds for run in those):7.1f} s"
            f" {median(run.idle for run in those):5.0%} idle; {sum(cpu.values()):.2f} CPU s ({listed(cpu)});"
            f" {listed(one.phases)}; {listed(one.logged)}",
            flush=True,
        )


def listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items() if value >= 0.005)


# -- simulation -------------------------------------------------------------------------------------------------------


def simulated(
    max_staleness: int,
    num_ahead: int,
    one_in: int | None,
    *,
    slots: int = 64,
    groups: int = 16,
    members: int = 8,
    steps: int = 100,
) -> tuple[float, float]:
    """Return the wall of training, in median rollouts, and the share of the slots' time in which they idle.

    A rollout has a slot while it runs; those that wait get one in their order.

    Args:
        max_staleness, num_ahead: As `gym_max_staleness` and `gym_batches_ahead`; a batch is an optimizer step.
        one_in: One rollout in so many takes ten times as long as the others, which take 0.75 to 1.25.
        slots, groups, members, steps: Of the engine, a step, a group, the run.
    """
    from trl_gym.rollouts.queue import Candidate, choose

    draw = random.Random(0)
    free = [0.0] * slots  # when each slot is
    flying: list[
        tuple[int, int, float]
    ] = []  # groups by age: their batch, the step at which they began, when they end
    now = busy = 0.0
    num_planned = 0
    for step in range(steps):
        late = sum(batch < step for batch, _, _ in flying)
        ahead = min(num_ahead + math.ceil(late / groups), max_staleness)
        while num_planned <= min(step + ahead, steps - 1):
            for _ in range(groups):
                ends = now
                for _ in range(members):
                    length = 10.0 if one_in and draw.random() < 1 / one_in else draw.uniform(0.75, 1.25)
                    end = max(heapq.heappop(free), now) + length
                    heapq.heappush(free, end)
                    busy, ends = busy + length, max(ends, end)
                flying.append((num_planned, step, ends))
            num_planned += 1
        later_steps = range(step + 1, min(step + max_staleness + 1, steps))
        later = [sum(coming - born <= max_staleness for coming in later_steps) for _, born, _ in flying]
        for moment in sorted({now, *(end for *_, end in flying if end > now)}):
            candidates = [Candidate(num, end <= moment) for num, (*_, end) in zip(later, flying, strict=True)]
            taken, _ = choose(candidates, groups, num_later=len(later_steps), per_batch=groups)
            if taken is not None:
                break
        assert taken is not None, "all have ended at the last moment"
        flying = [one for index, one in enumerate(flying) if index not in taken]
        now = moment + 1.0
    return now, 1 - busy / (slots * now)


def simulate() -> None:
    """Print the ratio of walls by staleness and share of stragglers."""
    settings = ((0, 0), (1, 1), (2, 1), (4, 1), (8, 1), (4, 4), (8, 8))
    print("wall of synchronous ÷ wall, and the share of its slots' time that the engine idles")
    print(f"{'staleness / ahead':18}", *(f"{f'{staleness} / {ahead}':>14}" for staleness, ahead in settings))
    for one_in in (None, 512, 128, 32):
        runs = [simulated(*setting, one_in) for setting in settings]
        cells = (f"{runs[0][0] / wall:8.2f} {idle:5.0%}" for wall, idle in runs)
        print(f"{'none' if one_in is None else f'one in {one_in}':18}", *cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="sleeping,long_tail")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run; default: 24 sleeping, 12 of a long tail")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--simulate", action="store_true", help="a larger setup, without servers")
    options = parser.parse_args()
    if options.simulate:
        simulate()
        return
    from trl_gym.threads import wait_without_spinning

    wait_without_spinning()  # before torch is imported, as `trl-gym train`
    steps = {"sleeping": options.steps or 24, "long_tail": options.steps or 12}
    print(f"{machine()}; {options.rounds} round(s)", flush=True)
    runs = compare(options.cases.split(","), steps, options.rounds)
    if options.json is not None:
        found = {
            case: {arm: [vars(run) for run in those] for arm, those in arms.items()} for case, arms in runs.items()
        }
        options.json.write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
