"""Rollouts per second of our collector and of NeMo Gym's own: the same servers, an engine that costs nothing.

    .venv/bin/python benchmarks/rollout_throughput.py [--rollouts 200] [--rounds 10] [--max_inflight 256]
        [--gym_python .gym-venv/bin/python] [--gym_mode host|upstream]

The engine answers at once over real HTTP; NeMo Gym is real, with the calculator environment (two model calls and a
tool call per rollout). The collectors take turns, so that a busy machine slows both:

    gym       `RolloutCollectionHelper.run_examples`, what `gym eval run` and NeMo RL call, in Gym's interpreter
    ours      `RolloutCollector`: the same requests
    trainer   the same, plus what the trainer adds: the policy server's records of each rollout, a line in the journal

Printed besides: CPU time, resident memory of our process, and what is left when all is done (sockets, tasks, the
thread). Compare the figures of one run with each other only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CALCULATOR = ROOT / "recipes" / "environments" / "calculator"
NUM_WARM_UP = 128

# Runs in Gym's interpreter. Per batch: a line of JSON with its rows in, a line with seconds and CPU seconds out.
GYMS_COLLECTOR = """
import asyncio, json, sys, time
from nemo_gym.rollout_collection import RolloutCollectionHelper
from nemo_gym.server_utils import BaseServerConfig

async def collect(rows, head, max_inflight):
    num_done, started, cpu = 0, time.perf_counter(), time.process_time()
    for future in RolloutCollectionHelper().run_examples(rows, head, asyncio.Semaphore(max_inflight)):
        row, result = await future
        assert isinstance(result["reward"], float), result
        num_done += 1
    assert num_done == len(rows)
    print(f"spent {time.perf_counter() - started} {time.process_time() - cpu}", flush=True)

async def main():
    host, port, max_inflight = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    head = BaseServerConfig(host=host, port=port)
    while line := await asyncio.to_thread(sys.stdin.readline):
        await collect(json.loads(line), head, max_inflight)

asyncio.run(main())
"""


def serve_policy() -> None:
    """The engine: `tests/gym/fake_policy.py` with the two routes that the trainer's collector asks."""
    from aiohttp import web

    from tests.gym.fake_policy import FakePolicy

    class Engine(FakePolicy):
        async def _chat_completions(self, request: web.Request) -> web.Response:
            self.requests.clear()
            return await super()._chat_completions(request)

    async def records(request: web.Request) -> web.Response:
        names = (await request.json())["rollouts"]
        return web.json_response({"records": {name: [] for name in names}, "running": dict.fromkeys(names, 0)})

    async def serve() -> None:
        async with Engine() as policy:
            runner = web.AppRunner(control := web.Application(), access_log=None)
            control.router.add_post("/trl_gym/rollouts/records", records)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            print(policy.base_url, f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
            await asyncio.Event().wait()

    asyncio.run(serve())


class Bench:
    """Both collectors on one Gym."""

    def __init__(self, gym: Any, control_url: str, options: argparse.Namespace, folder: Path) -> None:
        self.gym, self.control_url, self.options, self.folder = gym, control_url, options, folder
        self.rows = [json.loads(line) for line in (CALCULATOR / "data" / "example.jsonl").read_text().splitlines()]
        self.num_batches = 0

    def requests(self, number: int) -> list[Any]:
        from trl_gym.rollouts.request import RolloutRequest, Sampling, stamp

        self.num_batches += 1
        made = []
        for index in range(number):
            identity = {"rollout_id": f"b{self.num_batches}-{index}-a0", "task_index": index, "member": 0}
            row = stamp(self.rows[index % len(self.rows)], **identity, sampling=Sampling(), completion_budget=64)
            made.append(RolloutRequest(**identity, group=0, attempt=0, agent=self.gym.sole_agent, row=row))
        return made

    def collector(self, *, with_records: bool) -> Any:
        from trl_gym.rollout_options import RolloutOptions
        from trl_gym.rollouts.admission import budgets_from_options
        from trl_gym.rollouts.collector import RolloutCollector
        from trl_gym.rollouts.ledger import Ledger

        return RolloutCollector(
            self.gym.agent,
            budgets=budgets_from_options(RolloutOptions(deadline=600, max_inflight=self.options.max_inflight)),
            check=self.gym.check_process,
            agents_down=self.gym.agents_down,
            ledger=Ledger(self.control_url) if with_records else None,
        )

    def finisher(self) -> Any:
        from trl_gym.rollouts.journal import Journal
        from trl_gym.rollouts.source import Finisher
        from trl_gym.rollouts.trajectory import from_calls

        return Finisher(
            build=lambda answer, request, calls: from_calls(calls),
            decode=str,
            journal=Journal(self.folder / "journal"),
            drift_policy="truncate",
            step=0,
            mode="train",
            weight_version="0",
        )

    def ours(self, collector: Any, finish: Any, number: int) -> tuple[float, float]:
        """Seconds, and CPU seconds of this process, for so many rollouts."""
        requests = self.requests(number)
        started, cpu = time.perf_counter(), time.process_time()
        ended = collector.collect(requests, finish)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        failed = [one.failure for one in ended if one.failure is not None]
        assert not failed and len(ended) == number, failed[:3]
        return seconds, cpu

    def gyms(self, process: subprocess.Popen[str], number: int) -> tuple[float, float]:
        """The same with Gym's own collector, which `process` runs."""
        rows = [{**request.row, "agent_ref": {"name": request.agent}} for request in self.requests(number)]
        process.stdin.write(json.dumps(rows) + "\n")
        process.stdin.flush()
        for line in process.stdout:  # Gym prints, too
            if line.startswith("spent "):
                _, seconds, cpu = line.split()
                return float(seconds), float(cpu)
        raise SystemExit(f"Gym's collector ended; see {self.folder / 'collector.log'}")

    @contextlib.contextmanager
    def gyms_collector(self) -> Iterator[subprocess.Popen[str]]:
        head = urlsplit(self.gym.head_url)
        command = [self.options.gym_python, "-c", GYMS_COLLECTOR, head.hostname, str(head.port)]
        with (
            open(self.folder / "collector.log", "w") as log,
            subprocess.Popen(
                [*command, str(self.options.max_inflight)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            ) as process,
        ):
            yield process
            process.stdin.close()


def left_in(collector: Any) -> str:
    """What a collector keeps after its work, and after `close`."""
    process, worker = psutil.Process(), collector._worker
    time.sleep(6)  # idle connections are closed after 2 s, and looked at every 2 s

    async def num_tasks() -> int:
        return len(asyncio.all_tasks()) - 1

    tasks = asyncio.run_coroutine_threadsafe(num_tasks(), worker._loop).result()
    sockets = len([c for c in process.net_connections("tcp") if c.status == "ESTABLISHED"])
    collector.close()
    return f"open sockets {sockets}, tasks {tasks}; thread ended: {not worker._thread.is_alive()}"


def run(options: argparse.Namespace) -> None:
    from trl_gym import GymServers

    folder = Path(tempfile.mkdtemp(prefix="trl-gym-benchmark-"))
    command = [sys.executable, __file__, "--serve_policy"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as engine:
        base_url, control_url = engine.stdout.readline().split()
        try:
            with GymServers(
                [CALCULATOR / "calculator.yaml"],
                mode=options.gym_mode,
                policy_base_url=base_url,
                python=options.gym_python,
                log_dir=folder,
            ) as gym:
                how_many = f"{options.rounds} × {options.rollouts} rollouts each"
                print(f"NeMo Gym {gym.gym_version} ({options.gym_mode}): {how_many}", flush=True)
                compare(Bench(gym, control_url, options, folder), options)
        finally:
            engine.kill()


@dataclass
class Spent:
    """Sums over the rounds."""

    seconds: list[float] = field(default_factory=list)
    cpu: float = 0.0  # of the collector's process
    servers_cpu: float = 0.0  # of Gym and engine


def servers_cpu() -> float:
    """CPU seconds of everything that we started, but Gym's collector."""
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        if GYMS_COLLECTOR not in child.cmdline():
            times = child.cpu_times()
            total += times.user + times.system
    return total


def compare(bench: Bench, options: argparse.Namespace) -> None:
    plain, trainers = bench.collector(with_records=False), bench.collector(with_records=True)
    finisher, process = bench.finisher(), psutil.Process()
    with bench.gyms_collector() as gyms:
        measures: dict[str, Callable[[int], tuple[float, float]]] = {
            "gym": lambda number: bench.gyms(gyms, number),
            "ours": lambda number: bench.ours(plain, lambda result: result, number),
            "trainer": lambda number: bench.ours(trainers, finisher, number),
        }
        for measure in measures.values():
            measure(NUM_WARM_UP)
        spent = {name: Spent() for name in measures}
        memory = [process.memory_info().rss / 2**20]
        for number in range(options.rounds):
            order = list(measures)[number % 3 :] + list(measures)[: number % 3]  # nobody is always first
            for name in order:
                before = servers_cpu()
                seconds, cpu = measures[name](options.rollouts)
                spent[name].seconds.append(seconds)
                spent[name].cpu += cpu
                spent[name].servers_cpu += servers_cpu() - before
            memory.append(process.memory_info().rss / 2**20)
    report(spent, options)
    print(f"our memory, before and after each round: {', '.join(f'{mib:.0f}' for mib in memory)} MiB")
    for name, collector in (("ours", plain), ("trainer", trainers)):
        print(f"{name}: {left_in(collector)}")


def report(spent: dict[str, Spent], options: argparse.Namespace) -> None:
    total = options.rounds * options.rollouts
    for name, one in spent.items():
        ratios = [theirs / own for theirs, own in zip(spent["gym"].seconds, one.seconds, strict=True)]
        print(
            f"{name:8} {total / sum(one.seconds):6.1f} rollouts/s; {sum(spent['gym'].seconds) / sum(one.seconds):.2f} "
            f"of gym (median round {median(ratios):.2f}); CPU ms per rollout: collector {1000 * one.cpu / total:.2f}, "
            f"servers {1000 * one.servers_cpu / total:.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=200, help="per round and collector")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--max_inflight", type=int, default=256)
    parser.add_argument("--gym_python", default=str(ROOT / ".gym-venv" / "bin" / "python"))
    parser.add_argument("--gym_mode", choices=["host", "upstream"], default="host")
    parser.add_argument("--serve_policy", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    serve_policy() if options.serve_policy else run(options)


if __name__ == "__main__":
    main()
