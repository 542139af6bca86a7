"""What a start costs: CPU seconds from the command to the first optimizer step, per process and per phase.

    .venv/bin/python benchmarks/start.py [--repeats 3] [--before CHECKOUT] [-- any option of the recipe]
    .venv/bin/python benchmarks/start.py --server [--repeats 3] [--before CHECKOUT]

Runs the quickstart as `make quickstart` does (`recipes/grpo.py` with `recipes/quickstart.yaml`), ends it after its
first step, and sums the CPU seconds of all processes that it started, those that had ended included.
The evaluation before the first step, which the quickstart makes, is a phase of its own. With `--before`, another
checkout of this repository (`git worktree add`) runs in turns with this one, with the same interpreters, and the ratio
is printed; `--before-launch accelerate` starts it as the quickstart was started there.

With `--server` it starts policy servers alone, and counts until the first sampled token: executed, forked from a
`ForkServer` that has imported vLLM, and with `--before` executed in the other checkout.

Everything is cached by a first run of each that is not counted. CPU seconds hold on a busy machine, wall times do not.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
EVERY_S = 0.05
ROLES = (  # the first text that a command line contains
    ("accelerate.commands.launch", "accelerate launch"),
    ("supervisor", "supervisors"),
    ("engine.forking", "fork server"),
    ("fork server", "fork server"),
    ("EngineCore", "vLLM engine"),
    ("trl_gym.policy_server", "policy server"),
    ("host.py", "NeMo Gym"),
    ("recipes/grpo.py", "trainer"),
)


@dataclass
class Spent:
    """CPU seconds of a run until an event."""

    wall_s: float = 0.0
    total: float = 0.0  # of all processes, those that have ended included
    roles: Counter[str] = field(default_factory=Counter)


class Tree:
    """The processes below one, with what each has used when it was last seen."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._own: dict[psutil.Process, tuple[str, float]] = {}
        self._started = time.monotonic()

    def look(self) -> Spent:
        """Sum up. What has ended and was waited for is in its parent's counters, whether it was ever seen or not."""
        total = 0.0
        for process in [self._root, *self._root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                total += used.user + used.system + used.children_user + used.children_system
                self._own[process] = (role(" ".join(process.cmdline())), used.user + used.system)
        roles: Counter[str] = Counter()
        for name, seconds in self._own.values():
            roles[name] += seconds
        roles["others, and what had ended"] += total - sum(roles.values())
        return Spent(time.monotonic() - self._started, total, roles)


def role(command: str) -> str:
    return next((name for text, name in ROLES if text in command), "others, and what had ended")


def measure(checkout: Path, launch: list[str], options: list[str]) -> dict[str, Spent]:
    """Run until the first optimizer step.

    Returns:
        What was used until each event, in their order.
    """
    with tempfile.TemporaryDirectory(prefix="trl-gym-start-") as folder:
        out = Path(folder)
        command = [*launch, "recipes/grpo.py", "--config", "recipes/quickstart.yaml", "--output_dir", folder]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        with open(out / "output", "wb") as output:
            run = subprocess.Popen(
                [*command, *options],
                cwd=checkout,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        events = {
            "servers begin to load": lambda: any((out / "logs").glob("*.log")),
            "servers and trainer are ready": lambda: "policy server log:" in (out / "output").read_text(),
            "evaluated": lambda: "eval_reward" in metrics(out),
            "first optimizer step": lambda: '"reward"' in metrics(out),
        }
        found: dict[str, Spent] = {}
        try:
            tree = Tree(run.pid)
            while "first optimizer step" not in found:
                spent = tree.look()
                if run.poll() is not None:
                    sys.exit(f"the run ended before its first step:\n{(out / 'output').read_text()}")
                found |= {name: spent for name, is_there in events.items() if name not in found and is_there()}
                time.sleep(EVERY_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGINT)
            run.wait(timeout=60)
        return dict(sorted(found.items(), key=lambda item: item[1].total))


# Starts a server and samples; says before and after what is counted, and waits for an answer each time.
SERVE = """
import sys, time
from trl_gym.policy_server.server import PolicyServer
model, logs, how = sys.argv[1:]
options = {}
if how == "forked":
    from trl_gym.policy_server.fork_server import ForkServer
    options["fork_server"] = ForkServer().start()
flags = {"max-model-len": 512, "enforce-eager": True, "dtype": "float32", "max-num-seqs": 128}
def say(text):
    print(text, flush=True)
    sys.stdin.readline()
def sample(say):
    say("start")
    with PolicyServer(model, vllm_args=flags, log_dir=logs, **options) as server:
        server.client.chat(messages=[{"role": "user", "content": "2 + 2 ="}], max_tokens=8)
        say("sampled")
if how == "forked":
    sample(lambda _: None)
sample(say)
if how == "forked":
    options["fork_server"].stop()
"""


def measure_server(checkout: Path, how: str) -> dict[str, Spent]:
    """Start a policy server; return what was used until its first token, by process."""
    with tempfile.TemporaryDirectory(prefix="trl-gym-start-") as folder:
        command = [sys.executable, "-c", SERVE, str(ROOT / "runs" / "small_policy"), folder, how]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        with subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as run:
            assert run.stdin is not None and run.stdout is not None
            tree, looks = Tree(run.pid), []
            for word in ("start", "sampled"):
                if run.stdout.readline().strip() != word:
                    run.kill()
                    sys.exit(f"the server was not {word}")
                looks.append(tree.look())
                run.stdin.write("\n")
                run.stdin.flush()
        start, sampled = looks
        roles = sampled.roles - start.roles  # of servers that ended before, a fork server's parent keeps no account
        return {"first token": Spent(sampled.wall_s - start.wall_s, sum(roles.values()), roles)}


def metrics(out: Path) -> str:
    path = out / "metrics.jsonl"
    return path.read_text() if path.exists() else ""


def report(name: str, runs: list[dict[str, Spent]]) -> float:
    """Print the run whose total is the median; return that total."""
    runs = sorted(runs, key=lambda run: max(spent.total for spent in run.values()))
    run = runs[len(runs) // 2]
    print(f"\n{name}: CPU seconds (seconds) until …")
    before = Spent()
    for event, spent in run.items():
        print(f"  {spent.total:6.1f} ({spent.wall_s:5.1f})  {event}: {spent.total - before.total:.1f} in this phase")
        for part, seconds in (spent.roles - before.roles).most_common():
            if seconds >= 0.1:
                print(f"  {'':14}    {seconds:6.1f}  {part}")
        before = spent
    print("  in all:", ", ".join(f"{part} {used:.1f}" for part, used in before.roles.most_common() if used >= 0.1))
    totals = [max(spent.total for spent in run.values()) for run in runs]
    print(f"  totals of {len(runs)}: {', '.join(f'{total:.1f}' for total in totals)}")
    return statistics.median(totals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--server", action="store_true", help="policy servers alone, until they have sampled")
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--before-launch", choices=("python", "accelerate"), default="accelerate")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("options", nargs="*", help="options of the recipe, after `--`")
    args = parser.parse_args()

    cases = {"this checkout": (ROOT, [sys.executable])}
    if args.before is not None:
        launch = ACCELERATE if args.before_launch == "accelerate" else [sys.executable]
        cases = {"before": (args.before.resolve(), launch), **cases}
    run = {name: partial(measure, *case, args.options) for name, case in cases.items()}
    if args.server:
        run = {name: partial(measure_server, checkout, "executed") for name, (checkout, _) in cases.items()}
        run["forked"] = partial(measure_server, ROOT, "forked")
    runs: dict[str, list[dict[str, Spent]]] = {name: [] for name in run}
    for repeat in range(args.repeats + 1):
        for name, once in run.items():
            spent = once()
            if repeat:  # the first fills caches
                runs[name].append(spent)
    totals = {name: report(name, found) for name, found in runs.items()}
    for first, second in itertools.pairwise(totals):
        print(f"\n{first} / {second}: {totals[first] / totals[second]:.2f}")
    if args.json is not None:
        args.json.write_text(json.dumps(totals) + "\n")


if __name__ == "__main__":
    main()
