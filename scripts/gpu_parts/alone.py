"""Parts without a server: weights of FSDP2, an optimizer that goes away, `ipc` between two processes."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import torch
from weight_sync import SIZES, build, seconds

from gpu_parts import Run
from trl_gym.memory.offload import OptimizerOffload
from trl_gym.weight_sync.source import WeightSource

_OPTIMIZER = "1B"  # size of the model whose optimizer moves; its state has 8 GB in float32
_WEIGHTS = "1B"
_SMALL = "10M"  # of a dry run


def fsdp2(run: Run) -> None:
    from accelerate import Accelerator

    from tests.weight_sync import sharded

    store = torch.distributed.FileStore(str(run.folder / "store"), 1)
    torch.distributed.init_process_group("gloo" if run.dry else "nccl", store=store, rank=0, world_size=1)
    try:
        for case, make in sharded.CASES.items():
            found = sharded.compare(lambda make=make: make().to(run.device), sharded.fsdp2, Accelerator(cpu=run.dry))
            for what in (name for name, holds in found.items() if not holds):
                run.expect(False, f"{case}: {what} differ between the sharded model and the whole one")
        stepped = sharded.after_a_step(sharded.CASES["tied"]().to(run.device), sharded.fsdp2, Accelerator(cpu=run.dry))
        run.expect(stepped, "the weights after a step are not those that the sharded model computes with")
        model = sharded.fsdp2(_model(run, _WEIGHTS))
        source = WeightSource(model, Accelerator(cpu=run.dry), dtype=torch.bfloat16)
        taken = [_walk(source, run) for _ in range(3)]
        num_bytes = sum(one.num_bytes for one in source.metadata())
        run.measure(weights_gb=num_bytes / 1e9, stream_s=min(taken), stream_gb_per_s=num_bytes / min(taken) / 1e9)
    finally:
        torch.distributed.destroy_process_group()
    if run.dry:
        run.stops.append("shards on a CPU, over gloo: NCCL needs a GPU")


def _walk(source: WeightSource, run: Run) -> float:
    def walk() -> None:
        for _ in source:
            pass
        _synchronize(run)

    return seconds(walk)


def offload(run: Run) -> None:
    model = _model(run, _OPTIMIZER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=not run.dry)
    _gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    sums = [_bits(state) for state in states]
    mover = OptimizerOffload(optimizer, run.device)
    first = seconds(mover.offload)  # with the making of host buffers
    mover.restore()
    before = _free(run)
    started = time.perf_counter()
    moved = mover.offload()
    away = time.perf_counter() - started
    freed = _free(run) - before
    back = seconds(mover.restore)
    run.measure(moved_gb=moved / 1e9, first_s=first, away_s=away, back_s=back)
    run.measure(away_gb_per_s=moved / away / 1e9, back_gb_per_s=moved / back / 1e9)
    expected = sum(state.untyped_storage().nbytes() for state in states if state.untyped_storage().nbytes() >= 4096)
    run.expect(moved == expected, f"{moved} bytes were moved, and the state has {expected}")
    run.expect(sums == [_bits(state) for state in states], "the state came back with other bits")
    mover.offload()
    _gradients(model)
    optimizer.step()  # brings the state back by itself
    run.expect(sums != [_bits(state) for state in states], "a step after an offload did not change the state")
    if run.dry:
        run.stops.append("from host to host: a CPU has no memory of its own that gets free")
        return
    run.measure(freed_gb=freed / 1e9)
    # torch gives back whole segments: those that something else is in as well stay.
    run.expect(freed > 0.9 * moved, f"{moved / 1e9:.2f} GB were moved and {freed / 1e9:.2f} GB became free")


def _model(run: Run, name: str) -> torch.nn.Module:
    with run.device:  # made there
        return build(SIZES[_SMALL if run.dry else name], torch.float32)


def _gradients(model: torch.nn.Module) -> None:
    ids = torch.arange(16, device=next(model.parameters()).device)[None]
    model(input_ids=ids, use_cache=False).logits.float().pow(2).mean().backward()


def _bits(tensor: torch.Tensor) -> int:
    from trl_gym.policy_server.engine.worker import bit_sum

    return int(bit_sum(tensor.clone()))  # of a copy: NumPy, which adds on a CPU, makes a storage unmovable


def _free(run: Run) -> int:
    if run.dry:
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _synchronize(run: Run) -> None:
    if not run.dry:
        torch.cuda.synchronize()


def ipc(run: Run) -> None:
    from weight_sync import Handed, hand_over

    name = _SMALL if run.dry else _WEIGHTS
    for buffer_mb in (4, 16) if run.dry else (64, 512):
        handed: Handed = hand_over(name, 3, "ipc", buffer_mb=buffer_mb, on_cpu=run.dry)
        run.expect(not handed.differing, f"{len(handed.differing)} tensors differ: {handed.differing[:4]}")
        rates: dict[str, Any] = {"weights_gb": handed.num_bytes / 1e9}
        if not run.dry:
            rates[f"ipc_gb_per_s_with_{buffer_mb}_mb"] = handed.num_bytes / statistics.median(handed.sent_s) / 1e9
            rates["device_copy_gb_per_s"] = handed.num_bytes / statistics.median(handed.copied_s) / 1e9
        run.measure(**rates)
    if run.dry:
        run.measure(processes=2, receiver=f"forked from {os.getpid()}")
        run.stops.append("the handles are of shared memory of the host: CUDA IPC needs a GPU")
