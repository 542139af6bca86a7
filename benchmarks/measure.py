"""What the benchmarks share: arms in turns, CPU seconds per process, the CPU seconds of single coroutines, a report.

An arm is a function that does a piece of work and returns what it counted, its own `seconds` among it. Arms take
turns, and the first one changes, so that a busy machine slows all of them. Ratios of one run hold on any machine;
its absolute times say little about another one.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
CALCULATOR = ROOT / "recipes" / "environments" / "calculator"

Counts = dict[str, float]
Arm = Callable[[], Counts]

# A word of the command line → what the process, and all below it that have no word of their own, is called.
ROLES = (
    ("EngineCore", "engine"),
    ("ray::", "Gym"),
    ("gym/host.py", "Gym"),
    ("trl_gym.policy_server", "API server"),
)


def cpu_seconds(roles: Sequence[tuple[str, str]] = ROLES, root: int | None = None) -> Counter[str]:
    """CPU seconds so far of a process (default: this one, as "client") and of all below it, by role.

    Args:
        roles: See `ROLES`.
        root: Process id.
    """
    top = psutil.Process(root)
    found: Counter[str] = Counter()
    role_of = {top.pid: "client"}
    for process in (top, *top.children(recursive=True)):  # parents come first
        try:
            with process.oneshot():
                text = f"{process.name()} {' '.join(process.cmdline())}"
                parents = role_of.get(process.ppid(), "client")
            role = next((name for word, name in roles if word in text), parents)
        except psutil.Error:
            continue  # it has ended
        role_of[process.pid] = role if process.pid != top.pid else "client"
        found[role_of[process.pid]] += cpu_of(process)
    return found


class Trees:
    """CPU seconds so far of the processes that this one has started, each with all below it, by the names given here.

    A call returns them; this process itself is "client".
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def name_new(self, name: str) -> None:
        """Give the processes that were started since the last call a name."""
        for child in psutil.Process().children():
            self._names.setdefault(child.pid, name)

    def processes(self, name: str) -> list[psutil.Process]:
        """Return all processes of that name."""
        return [process for top, process in self._all() if top == name]

    def __call__(self) -> Counter[str]:
        found: Counter[str] = Counter(client=cpu_of(psutil.Process()))
        for name, process in self._all():
            found[name] += cpu_of(process)
        return found

    def _all(self) -> list[tuple[str, psutil.Process]]:
        top_of: dict[int, str] = dict(self._names)
        found = []
        for process in psutil.Process().children(recursive=True):  # parents come first
            try:
                name = top_of.get(process.pid) or top_of.get(process.ppid())
            except psutil.Error:
                continue  # it has ended
            if name is not None:
                top_of[process.pid] = name
                found.append((name, process))
        return found


def cpu_of(process: psutil.Process) -> float:
    """Return the CPU seconds of one process; 0 if it has ended."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


@dataclass
class Spent:
    """What an arm has used over all rounds."""

    seconds: list[float] = field(default_factory=list)  # of each round
    cpu: Counter[str] = field(default_factory=Counter)  # by role
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, counts: Counts, cpu: Mapping[str, float]) -> None:
        self.seconds.append(counts.pop("seconds"))
        self.counts.update(counts)
        self.cpu.update(cpu)

    def rate(self, name: str) -> float:
        """Return how many of what is counted under that name were done per second."""
        return self.counts[name] / sum(self.seconds)

    def cpu_ms(self, name: str) -> dict[str, float]:
        """Return CPU milliseconds by role for each of what is counted under that name."""
        shares = {role: 1000 * seconds / self.counts[name] for role, seconds in self.cpu.items()}
        return {role: round(ms, 2) for role, ms in sorted(shares.items(), key=lambda one: -one[1]) if ms >= 0.005}


def in_turns(
    arms: Mapping[str, Arm], rounds: int, *, cpu: Callable[[], Counter[str]] = cpu_seconds
) -> dict[str, Spent]:
    """Run every arm once per round, each round in another order. Run the arms once before to warm up.

    Args:
        arms: By name.
        rounds: How often.
        cpu: CPU seconds so far, by role.
    """
    spent = {name: Spent() for name in arms}
    names = list(arms)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            before = cpu()
            counts = arms[name]()
            after = cpu()
            spent[name].add(counts, {role: after[role] - before[role] for role in after})
    return spent


def report(spent: Mapping[str, Spent], unit: str, against: str) -> None:
    """Print for each arm its rate, its CPU by role, and the ratio of both to another arm's; more is better.

    Args:
        spent: From `in_turns`.
        unit: What is counted.
        against: The arm to compare with.
    """
    base = spent[against]
    base_cpu = sum(base.cpu_ms(unit).values())
    for name, one in spent.items():
        cpu = one.cpu_ms(unit)
        shares = ", ".join(f"{role} {ms:.2f}" for role, ms in cpu.items())
        print(f"{name:10} {one.rate(unit):8.1f} {unit}/s; CPU ms each {sum(cpu.values()):.2f} ({shares})")
    print(f"\nagainst {against}; 1 is equal, more is better")
    for name, one in spent.items():
        rounds = [theirs / own for theirs, own in zip(base.seconds, one.seconds, strict=True)]
        ratio, by_cpu = one.rate(unit) / base.rate(unit), base_cpu / max(1e-9, sum(one.cpu_ms(unit).values()))
        print(f"{name:10} {unit}/s {ratio:.2f} (median round {median(rounds):.2f}), by CPU {by_cpu:.2f}")


def machine() -> str:
    """Return a line on where, and beside how much other work, a figure was measured."""
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d %H:%M')}"


def write_json(path: Path | None, spent: Mapping[str, Spent], **facts: Any) -> None:
    """Write what `in_turns` returned, and facts about the run, for programs; nothing without a path."""
    if path is not None:
        arms = {name: vars(one) for name, one in spent.items()}
        content = {"machine": machine(), **facts, "arms": arms}
        path.write_text(json.dumps(content, indent=2) + "\n")


@dataclass
class Clock:
    """The CPU seconds of coroutines: of their own steps, not of what else the event loop does while they wait.

    What a coroutine awaits counts as its own, unless that is a task.
    """

    seconds: float = 0.0

    def timed(self, work: Coroutine[Any, Any, Any]) -> _Timed:
        """Return an awaitable that does the work and adds what it used."""
        return _Timed(work, self)


@dataclass
class _Timed:
    work: Coroutine[Any, Any, Any]
    clock: Clock

    def __await__(self) -> Generator[Any, Any, Any]:
        send, value = self.work.send, None
        while True:
            started = time.thread_time()
            try:
                waits_for = send(value)
            except StopIteration as ended:
                return ended.value
            finally:
                self.clock.seconds += time.thread_time() - started
            try:
                value = yield waits_for
                send = self.work.send
            except BaseException as error:  # a cancellation arrives here: it is for the work
                send, value = self.work.throw, error
