"""Parts with a real vLLM server on the trainer's GPU: weight syncs by `ipc`, sleep and wake, a pause that keeps."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from weight_sync import SIZES, build, seconds

from gpu_parts import Run
from trl_gym import GymGRPOConfig, PolicyServer
from trl_gym.memory.sharing import DeviceSharing
from trl_gym.run.servers import server_options
from trl_gym.weight_sync.sync import SyncOptions, SyncReport, WeightSync, compare, probe_batch, trainer_logprobs
from trl_gym.weight_sync.transports.plan import plan_transport

_SIZE, _SMALL = "1B", "10M"
_IN_FLIGHT = 16
_FLAGS = {"enforce-eager": True, "load-format": "dummy", "max-num-seqs": 64}
_STEPS = 4
_START_S = 150  # the first one compiles the bytecode of what was just unpacked


@dataclass
class Pair:
    """A trainer's model and a server of such a model, which has other weights until a sync."""

    model: torch.nn.Module
    server: PolicyServer
    accelerator: Accelerator
    args: GymGRPOConfig
    factor: float = 1.5

    def sync(self, *, sharing: DeviceSharing | None = None, **options: Any) -> WeightSync:
        transport = plan_transport(self.args, self.model, on_cuda=self.accelerator.device.type == "cuda")
        told = SyncOptions(
            dtype=getattr(torch, self.args.serving_dtype),
            verify_every=1,
            probe_tolerance=self.args.probe_tolerance,
            **options,
        )
        return WeightSync(self.accelerator, self.server, transport.connect(self.server), told, sharing)

    def change(self) -> None:
        """As a step of the optimizer would, but so much that a probe sees it; every second time, back."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(self.factor)
        self.factor = 1 / self.factor

    def gap(self) -> float:
        """Mean difference between trainer and server, in nats."""
        batch = probe_batch(self.model.config.vocab_size)
        return compare(trainer_logprobs(self.model, batch), self.server.client.prompt_logprobs(batch)).mean_gap


@contextmanager
def pair(run: Run, **options: Any) -> Iterator[Pair]:
    """Start a server as the trainer does: with its flags, its environment, and its share of the device's memory."""
    from tests.policy_server.tiny_model import build_tokenizer

    size = SIZES[_SMALL if run.dry else _SIZE]
    folder = run.folder / "model"
    build_tokenizer().save_pretrained(folder)
    size.config().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"]}))
    args = GymGRPOConfig(
        output_dir=str(run.folder / "run"),
        use_cpu=run.dry,
        bf16=True,
        vllm_max_model_length=512,
        gym_head_url="http://127.0.0.1:1",  # no NeMo Gym takes part
        gym_vllm_args=_FLAGS | run.vllm_args,
        **options,
    )
    with run.device:
        model = build(size, torch.bfloat16)
    flags, environment = server_options(args, str(folder))
    server = PolicyServer(
        str(folder), vllm_args=flags, env=environment, log_dir=run.folder / "logs", start_timeout_s=_START_S
    )
    starting = time.perf_counter()
    try:
        with server:
            run.measure(server_start_s=time.perf_counter() - starting)
            yield Pair(model, server, Accelerator(cpu=run.dry), args)
    finally:
        for log in (run.folder / "logs").glob("*.log"):
            print(log.read_text(errors="replace")[-3000:])  # into that of the part
    if run.dry:
        run.stops.append("vLLM's CPU build, and weights by `file`: `ipc` needs a GPU")


def _told(run: Run, report: SyncReport, what: str) -> None:
    probe = report.probe
    run.expect(probe is not None, f"{what}: no probe was made")  # one beyond the tolerance raises
    if probe is not None:
        run.measure(probe_gap_nats=probe.mean_gap)


def sync(run: Run) -> None:
    with pair(run) as two:
        pusher = two.sync()
        reports = []
        for step in range(_STEPS):
            reports.append(report := pusher.push(two.model, step))
            _told(run, report, f"sync {step}")
            two.change()
            unsent = two.gap()
            told = f"weights that were not sent differ by {unsent:.4f} nats alone: a probe would not see them"
            run.expect(unsent > 2 * two.args.probe_tolerance, told)
        run.measure(unsent_gap_nats=unsent)
        took = [sum(r.seconds[phase] for phase in ("pause", "transfer", "finish")) for r in reports[1:]]
        num_bytes = reports[0].num_bytes
        targets = [torch.empty_like(parameter) for parameter in two.model.parameters()]
        copied = min(seconds(lambda: _copy(two.model, targets, run)) for _ in range(3))
    run.measure(
        transport=pusher.transport.name, weights_gb=num_bytes / 1e9, first_sync_s=sum(reports[0].seconds.values())
    )
    run.measure(sync_s=statistics.median(took), sync_gb_per_s=num_bytes / statistics.median(took) / 1e9)
    for phase in ("pause", "transfer", "finish", "probe", "fingerprint"):
        run.measure(**{f"{phase}_s": statistics.median(report.seconds[phase] for report in reports[1:])})
    run.measure(device_copy_gb_per_s=num_bytes / copied / 1e9)


@torch.no_grad()
def _copy(model: torch.nn.Module, targets: list[torch.Tensor], run: Run) -> None:
    for target, parameter in zip(targets, model.parameters(), strict=True):
        target.copy_(parameter)
    if not run.dry:
        torch.cuda.synchronize()


def sleep(run: Run) -> None:
    sequences = [[5, 9, 30, 17, 44, 12, 8], [40, 33, 2, 3, 90]]
    with pair(run, vllm_enable_sleep_mode=True) as two:
        client = two.server.client
        kept, dropped = (
            DeviceSharing(two.accelerator, two.server, timeout_s=100, drops_weights=drops) for drops in (False, True)
        )
        _told(run, two.sync(sharing=kept).push(two.model, 0), "before sleeping")
        before, used = client.prompt_logprobs(sequences), _used(run)
        for level, sharing in ((1, kept), (2, dropped)):
            run.measure(**{f"sleep_{level}_s": seconds(sharing.after_sampling)})
            if not run.dry:
                freed = (used - _used(run)) / 1e9
                run.measure(**{f"freed_{level}_gb": freed})
                run.expect(freed > 1, f"level {level} has freed {freed:.2f} GB")
            if level == 1:
                run.measure(wake_1_s=seconds(sharing.before_sampling))
                gap = max(abs(a - b) for one in zip(before, client.prompt_logprobs(sequences), strict=True)
                          for a, b in zip(*one, strict=True))  # fmt: skip
                run.expect(gap < 1e-3, f"after a sleep that keeps weights answers differ by {gap} nats")
        two.change()
        pusher = two.sync(sharing=dropped)
        report = pusher.push(two.model, 1)  # wakes memory for the weights, then the rest
        _told(run, report, "after weights were dropped")
        run.measure(wake_2_with_sync_s=sum(report.seconds.values()) - report.seconds["fingerprint"])
        answer = client.chat(messages=[{"role": "user", "content": "add 1 and 2"}], max_tokens=4, timeout_s=60)
        run.expect(answer["usage"]["completion_tokens"] > 0, "nothing is sampled after waking")
    if run.dry:
        run.stops.append("vLLM's CPU workers ignore sleeping: no memory is freed, and none of it comes back empty")


def _used(run: Run) -> int:
    """Return the device's memory in use, by all processes."""
    if run.dry:
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def keep(run: Run) -> None:
    with pair(run) as two, ThreadPoolExecutor(_IN_FLIGHT) as pool:
        pusher = two.sync(pause_mode="keep")
        pusher.push(two.model, 0)
        client = two.server.client.patient(100)
        names = [f"rollout-{number}" for number in range(_IN_FLIGHT)]
        started, waiting = time.perf_counter(), [pool.submit(_rollout, client, name) for name in names]
        _until_sampling(client, len(names))
        two.change()
        report = pusher.push(two.model, 1)
        in_flight = sum(not one.done() for one in waiting)
        _told(run, report, "with rollouts in flight")
        tokens = sum(one.result()["usage"]["completion_tokens"] for one in waiting)
        took = time.perf_counter() - started
        records = [record for found in client.rollout_records(names).values() for record in found]
    spanning = sum((one["weight_version"], one.get("last_version")) == ("0", "1") for one in records)
    run.measure(in_flight=in_flight, spanning_both_versions=spanning, pause_s=report.seconds["pause"])
    run.measure(sync_s=sum(report.seconds[phase] for phase in ("pause", "transfer", "finish")))
    run.measure(tokens_per_s=tokens / took)
    run.expect(in_flight > 0, "all rollouts had ended before the sync did: nothing was kept")
    run.expect(spanning == in_flight, f"{in_flight} rollouts went on after the sync, {spanning} were told so")
    run.expect(all(one["status"] == 200 for one in records), "a rollout failed")


def _rollout(client: Any, name: str) -> dict[str, Any]:
    tag = {"rollout": name, "sampling": {"temperature": 1.0, "top_p": 1.0}}
    messages = [{"role": "user", "content": f"add 1 and {len(name)}"}]
    return client.chat(messages=messages, max_tokens=400, ignore_eos=True, trl_gym=tag, timeout_s=100)


def _until_sampling(client: Any, number: int) -> None:
    """Wait until all of them sample."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        [text] = client.prometheus()
        running = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
        if running and float(running[0].split()[-1]) >= number:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{number} rollouts do not run at the same time")
