"""A training run in which a process is killed or stopped again and again; then its journal is checked.

    .venv/bin/python benchmarks/soak.py [--steps 100] [--every 20] [--engine vllm] [--seed 0] [--json FILE] [OPTION …]

Trains the quickstart. About every `--every` seconds one process below the trainer gets SIGKILL, or SIGSTOP forever:
vLLM's engine, its API server, NeMo Gym's host, a supervisor. Options that are unknown here go to the run. At the end:

    ended      the run has exit code 0 and all its steps, with as many rollouts in each as the recipe asks for
    rewards    every reward in the journal is what the environment's scoring says of the recorded answer
    once       no rollout of training is counted twice; every one is of the batch and the step that it is recorded in
    behind     no process and no temporary file is left

Exit code 0 when all four hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from measure import CALCULATOR, ROOT, machine

sys.path[:0] = [str(ROOT), str(CALCULATOR / "resources_servers" / "calculator")]

# A word of a process's name and command line → what it is.
VICTIMS = {
    "EngineCore": "engine",
    "trl_gym.policy_server": "API server",
    "gym/host.py": "NeMo Gym",
}
SUPERVISOR = "supervisor.py"
WAYS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
ROLLOUTS = 128  # of a step of the quickstart
THEIRS = ("wandb-artifacts", "wandb-media", "torchinductor")  # of libraries, for later runs
_LOOK_EVERY_S = 0.5


def role_of(process: psutil.Process) -> str | None:
    """Say what a process is; None for one that no fault is for."""
    try:
        text = f"{process.name()} {' '.join(process.cmdline())}"
    except psutil.Error:
        return None  # it has ended
    role = next((role for word, role in VICTIMS.items() if word in text), None)
    if SUPERVISOR in text:
        return f"supervisor of {role}" if role else None
    return role


def strike(below: Iterable[psutil.Process], rng: random.Random) -> str | None:
    """Kill or stop one of these processes; returns what was done, None where there is nothing to strike."""
    by_role: dict[str, list[psutil.Process]] = {}
    for process in below:
        if role := role_of(process):
            by_role.setdefault(role, []).append(process)
    if not by_role:
        return None
    role = rng.choice(sorted(by_role))
    way = rng.choice(sorted(WAYS))
    try:
        rng.choice(by_role[role]).send_signal(WAYS[way])
    except psutil.Error:
        return None
    return f"{role} {way}"


class Family:
    """All processes that a run has started, also those whose parent is gone."""

    def __init__(self, run: subprocess.Popen[bytes]) -> None:
        self._seen = {psutil.Process(run.pid)}
        self._run = run.pid

    def look(self) -> set[psutil.Process]:
        """Return those that run now, without the first. What begins and ends between two looks is not seen."""
        for process in list(self._seen):
            try:
                self._seen.update(process.children(recursive=True))
            except psutil.Error:
                self._seen.discard(process)
        return {one for one in self._seen if one.pid != self._run and is_alive(one)}


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@dataclass
class Soaked:
    """How a run under faults has ended."""

    code: int
    faults: Counter[str]  # what was done to it
    left: list[str]  # processes that it has left


def soak(command: list[str], every: float, rng: random.Random, log: Path, environment: Mapping[str, str]) -> Soaked:
    """Run the command under faults. They begin with the first step: a fault of the start ends a run, as it should."""
    done: Counter[str] = Counter()
    begun = time.monotonic()
    with log.open("wb") as output:
        run = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)
        family, next_at = Family(run), 0.0
        try:
            while run.poll() is None:
                time.sleep(_LOOK_EVERY_S)
                below, now = family.look(), time.monotonic()
                if not next_at and b"step " in log.read_bytes():
                    next_at = now + rng.uniform(0.5, 1.5) * every
                if next_at and now >= next_at and (fault := strike(below, rng)) is not None:
                    next_at = now + rng.uniform(0.5, 1.5) * every
                    done[fault] += 1
                    print(f"{now - begun:5.0f} s: {fault}", flush=True)
        finally:
            run.kill()
    psutil.wait_procs(family.look(), timeout=10.0)  # what was killed at the end may take a moment
    left = [f"process {one.pid}: {' '.join(one.cmdline())[:120]}" for one in family.look()]
    return Soaked(run.wait(), done, left)


def problems_of(journal: Path, metrics: Iterable[Mapping[str, Any]], steps: int) -> tuple[list[str], Counter[str]]:
    """Check a journal of the quickstart; returns what is wrong with it, and counts of its lines."""
    from calculator_scoring import score

    from trl_gym.responses import output_items
    from trl_gym.rollouts.journal import Attempt, LineState, read_journal

    wrong: list[str] = []
    counts: Counter[str] = Counter()
    seen: set[tuple[Any, ...]] = set()
    per_step: Counter[int] = Counter()
    for line in read_journal(journal):
        counts["lines"] += 1
        if line["reward"] is not None:
            row = line["row"]
            expected = [row[f"expected_{name}"] for name in ("tool", "arguments", "answer")]
            counts["rewards"] += 1
            if line["reward"] != score(output_items(line), *expected).reward:
                wrong.append(f"{line['rollout_id']} has reward {line['reward']}, which its answer does not deserve")
        if Attempt.of(line).state is not LineState.COUNTED or line["mode"] != "train":
            continue
        counts["counted"] += 1
        counts[f"failed: {line['failure']['kind']}" if line["failure"] else "rewarded"] += 1
        per_step[line["step"]] += 1
        member = (line["batch"], line["group"], line["member"])
        if member in seen or not line["rollout_id"]:
            wrong.append(f"{line['rollout_id']} is the second rollout of batch, group, member {member}")
        seen.add(member)
    made = [row["step"] for row in metrics if "reward" in row]
    if made != list(range(1, steps + 1)):
        wrong.append(f"metrics.jsonl has the steps {made[:3]} … {made[-3:]}, {len(made)} in all")
    wrong += [f"step {step} has {n} rollouts" for step, n in sorted(per_step.items()) if n != ROLLOUTS]
    if len(per_step) != steps:
        wrong.append(f"the journal has {len(per_step)} steps")
    return wrong, counts


def files_left(folder: Path) -> list[str]:
    """Return the files in a folder of temporary files that are no caches, an engine's sockets among them."""
    return [f"file {path}" for path in folder.iterdir() if not any(name in path.name for name in THEIRS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--every", type=float, default=20.0, help="mean seconds between faults")
    parser.add_argument("--engine", default="vllm", help="gym_engine of the run")
    parser.add_argument("--seed", type=int, default=0, help="of what is struck, and when")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options, further = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp(prefix="trl-gym-soak-"))
    (folder / "tmp").mkdir()
    command = [
        *(sys.executable, "recipes/grpo.py", "--config", "recipes/quickstart.yaml", "--gym_engine", options.engine),
        *("--output_dir", str(folder / "run"), "--max_steps", str(options.steps), "--gym_server_restarts", "1000"),
        *("--eval_strategy", "no", "--eval_on_start", "false", "--save_steps", "1000", *further),
    ]
    environment = os.environ | {"TMPDIR": str(folder / "tmp")}
    begun = time.monotonic()
    soaked = soak(command, options.every, random.Random(options.seed), folder / "output.log", environment)
    seconds = time.monotonic() - begun
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    wrong, counts = problems_of(folder / "run" / "rollouts", metrics, options.steps)
    wrong += [] if soaked.code == 0 else [f"the run ended with exit code {soaked.code}"]
    wrong += [f"left behind: {one}" for one in [*soaked.left, *files_left(folder / "tmp")]]
    faults = dict(soaked.faults)
    print(f"\n{machine()}; {seconds:.0f} s, {sum(faults.values())} faults: {faults}\n{dict(counts)}")
    print(f"output: {folder / 'output.log'}")
    print("\n".join(wrong[:20]) or "ended, rewards right, every rollout once, nothing left behind")
    if options.json is not None:
        facts = {"machine": machine(), "seconds": seconds, "faults": faults, "journal": counts, "wrong": wrong}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
