"""The server's side of `ipc` and `nccl` without a server: vLLM's own worker engine in a process of its own, on a GPU.

`ipc` also on a CPU, where `cuda_stand_in.py` takes the place of CUDA. On a GPU it has not been run.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch

from tests.weight_sync.transports.cuda_stand_in import cuda_of_the_host
from trl_gym.errors import PolicyServerError


def pattern(place: int, num_elements: int, device: str) -> torch.Tensor:
    """Bytes that both sides can make: `[num_elements]` of bfloat16, the same on GPUs of one kind."""
    generator = torch.Generator(device=device).manual_seed(4711 + place)
    bits = torch.randint(-(2**15), 2**15, (num_elements,), generator=generator, dtype=torch.int16, device=device)
    return bits.view(torch.bfloat16)


class Holder(torch.nn.Module):
    """Stands for a model: keeps a copy of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        new = {name: tensor.clone() for name, tensor in weights}
        self.held.update(new)
        return set(new)


def _receive(connection: Connection, backend: str, device: str) -> None:
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if device == "cpu":
        torch.set_num_threads(1)  # it was forked, without the threads of its parent
    else:
        torch.cuda.set_device(device)
    with cuda_of_the_host() if device == "cpu" else nullcontext():
        _answer(connection, backend, device)


def _answer(connection: Connection, backend: str, device: str) -> None:
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
    config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
    engine_class: Any = IPCWeightTransferEngine if backend == "ipc" else NCCLWeightTransferEngine
    holder = Holder()
    worker_device = torch.device("cuda:0" if device == "cpu" else device)
    engine = engine_class(SimpleNamespace(backend=backend), config, worker_device, holder)

    def differing(sizes: dict[str, int]) -> list[str]:
        expected = {name: pattern(place, size, device) for place, (name, size) in enumerate(sizes.items())}
        return [
            name
            for name, tensor in expected.items()
            if name not in holder.held
            or not torch.equal(holder.held[name].reshape(-1).view(torch.int16), tensor.view(torch.int16))
        ]

    calls = {
        "init": lambda info: engine.init_transfer_engine(engine.parse_init_info(info)),
        "start": lambda _: engine.start_weight_update(),
        "update": engine.update_weights,
        "finish": lambda _: engine.finish_weight_update(),
        "differing": differing,
    }
    while (message := connection.recv()) is not None:
        name, argument = message
        try:
            connection.send((calls[name](argument), None))
        except Exception as error:  # told to the other process
            connection.send((None, repr(error)))


class ReceiverClient:
    """What transports ask of a `PolicyClient`, answered by the other process."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self.root_url, self.base_urls, self.api_key = "http://127.0.0.1:1", ("http://127.0.0.1:1/v1",), None
        self.timeout_s = timeout_s
        self._connection = connection
        self._lock = threading.Lock()

    def ask(self, name: str, argument: Any = None) -> Any:
        with self._lock:
            self._connection.send((name, argument))
            if not self._connection.poll(self.timeout_s):
                raise PolicyServerError(f"{name}: no answer within {self.timeout_s:g} s")
            result, error = self._connection.recv()
        if error is not None:
            raise PolicyServerError(f"{name}: {error}")
        return result

    def world_size(self) -> int:
        return 1

    def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        self.ask("init", init_info)

    def start_weight_update(self) -> None:
        self.ask("start")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.ask("update", update_info)

    def finish_weight_update(self) -> None:
        self.ask("finish")

    def abandon_weight_update(self) -> bool:
        return False


@contextmanager
def receiver(backend: str, device: str, *, timeout_s: float = 120.0) -> Iterator[ReceiverClient]:
    """Run the other process.

    Args:
        backend: `"ipc"` or `"nccl"`.
        device: The worker's, e.g. `"cuda:0"`; `"cpu"` for `ipc` alone.
        timeout_s: For each of its answers.
    """
    context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")  # CUDA cannot be forked
    ours, theirs = context.Pipe()
    process = context.Process(target=_receive, args=(theirs, backend, device), daemon=True)
    process.start()
    try:
        yield ReceiverClient(ours, timeout_s)
        ours.send(None)
        process.join(timeout_s)
    finally:
        process.kill()
        process.join()
