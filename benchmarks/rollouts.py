"""Where the time of a rollout goes: CPU seconds per process while the calculator environment is rolled out.

    .venv/bin/python benchmarks/rollouts.py [--batches 5] [--rollouts 128] [--gym_python .gym-venv/bin/python]

Starts the real servers with the quickstart's small policy, runs batches of two-turn rollouts through the trainer's
collector, and prints rollouts per second and CPU milliseconds per rollout for each process. Compare the figures of one
run with each other; those of different machines, or of a busy one, say little.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
CALCULATOR = ROOT / "recipes" / "environments" / "calculator"


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def label(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    for text, name in (
        ("EngineCore", "vLLM engine"),
        ("host.py", "NeMo Gym"),
        ("supervisor.py", "supervisor"),
        ("trl_gym.policy_server", "vLLM API server and middleware"),
        ("benchmarks/rollouts.py", "trainer side (collector)"),
    ):
        if text in command:
            return name
    return process.name()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=128, help="per batch")
    parser.add_argument("--gym_python", default=None)
    parser.add_argument("--vllm_args", type=json.loads, default={}, help="further flags of the server, as JSON")
    args = parser.parse_args()

    from tiny_policy import build_tiny_policy

    from trl_gym import GymServers, PolicyServer
    from trl_gym.rollout_options import RolloutOptions
    from trl_gym.rollouts.admission import budgets_from_options
    from trl_gym.rollouts.collector import RolloutCollector
    from trl_gym.rollouts.request import RolloutRequest, Sampling, stamp

    rows = [json.loads(line) for line in (CALCULATOR / "data" / "example.jsonl").read_text().splitlines()]
    policy = build_tiny_policy(ROOT / "runs" / "small_policy")
    flags = {"dtype": "float32", "max-model-len": 1024, "enforce-eager": True, "tool-call-parser": "hermes"}
    flags |= args.vllm_args
    logs = Path(tempfile.mkdtemp(prefix="trl-gym-benchmark-"))
    with (
        PolicyServer(policy, vllm_args=flags, log_dir=logs) as server,
        GymServers(
            [CALCULATOR / "calculator.yaml"], policy_base_url=server.base_url, python=args.gym_python, log_dir=logs
        ) as gym,
    ):
        collector = RolloutCollector(
            gym.agent, budgets=budgets_from_options(RolloutOptions(deadline=120, max_inflight=256))
        )
        agent = gym.sole_agent

        def batch(number: int) -> list[RolloutRequest]:
            identities = [{"rollout_id": f"b{number}-{i}", "task_index": i, "member": 0} for i in range(args.rollouts)]
            return [
                RolloutRequest(
                    **identity,
                    group=0,
                    attempt=0,
                    agent=agent,
                    row=stamp(rows[i % len(rows)], **identity, sampling=Sampling(), completion_budget=64),
                )
                for i, identity in enumerate(identities)
            ]

        collector.collect(batch(-1), lambda result: result)  # warm up
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        before = {process: cpu_seconds(process) for process in processes}
        seconds = []
        for number in range(args.batches):
            started = time.perf_counter()
            results = collector.collect(batch(number), lambda result: result)
            seconds.append(time.perf_counter() - started)
            assert all(result.failure is None for result in results), results[0]
        total = args.batches * args.rollouts
        print(f"NeMo Gym {gym.gym_version}: {args.batches} batches of {args.rollouts} rollouts")
        print(f"rollouts/s: {total / sum(seconds):.1f} (best batch {args.rollouts / min(seconds):.1f})")
        for process, spent in before.items():
            used = 1000 * (cpu_seconds(process) - spent) / total
            if used > 0.05:
                print(f"{used:8.2f} CPU ms per rollout  {label(process)}")
        collector.close()


if __name__ == "__main__":
    main()
