"""The trainer's side of SGLang's distributed weight update, with public classes of torch alone.

`/init_weights_update_group` makes a process group of torch in every worker (`init_custom_process_group` in
sglang/srt/utils/common.py, 0.5.23): over a TCP store that rank 0, which we are, holds, with the group's name, the same
again with a slash, and the kind of device in front of its keys. `/update_weights_from_distributed` then receives a
broadcast for each tensor, into memory of its own, and loads all that came with one call: what is sent is cut into
calls of a buffer's size.

The functions have the names and the meaning of those in `vllm_transfer.py`, so that one transport sends to either.
Over gloo they work on CPUs: so they were tried. NCCL between them and SGLang has not run.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trl_gym.weight_sync.protocol import WeightMeta

GROUP = "trl_gym"


@dataclass(frozen=True, slots=True)
class Link:
    """A process group of this process and the server's workers."""

    group: Any  # ProcessGroupNCCL or ProcessGroupGloo
    store: Any  # the TCP store, which lives as long as the group does
    device: int | None  # index of our GPU; None on a CPU

    def abort(self) -> None:
        """End collectives that hang. Returns at once."""

        def end() -> None:
            with contextlib.suppress(Exception):  # a peer is gone, and no error of it can be acted on
                self.group.abort()

        threading.Thread(target=end, name="trl-gym: abort broadcast", daemon=True).start()


def own_device() -> int | None:
    """Return the index of our GPU; None where there is none, which gloo does not need."""
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def nccl_init_info(*, address: str, port: int, world_size: int, buffer_bytes: int) -> dict[str, Any]:
    """Return the body of `/init_weight_transfer_engine` for the gateway."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    info = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": world_size}
    return {**info, "group_name": GROUP, "backend": backend}


def nccl_update_infos(parameters: Iterable[WeightMeta], buffer_bytes: int) -> list[dict[str, Any]]:
    """Return the bodies of the calls of `/update_weights`, one after the other: the tensors that will be broadcast, in
    this order.

    Args:
        buffer_bytes: What one call holds at most; a bigger tensor is alone in its call.
    """
    return [
        {
            "names": [one.name for one in call],
            "dtypes": [str(one.dtype).removeprefix("torch.") for one in call],
            "shapes": [list(one.shape) for one in call],
        }
        for call in _cut(parameters, buffer_bytes)
    ]


def _cut(parameters: Iterable[WeightMeta], buffer_bytes: int) -> Iterator[list[WeightMeta]]:
    held: list[WeightMeta] = []
    for one in parameters:
        if held and sum(other.num_bytes for other in held) + one.num_bytes > buffer_bytes:
            yield held
            held = []
        held.append(one)
    if held:
        yield held


def join_nccl(listener: socket.socket, *, device: int | None, world_size: int, timeout_s: float) -> Link:
    """Meet the server's workers, as rank 0. Blocks until all of them are there: run it in a thread.

    Args:
        listener: A bound and listening socket; the store takes it over.
        device: Index of our GPU, None for gloo.
        world_size: Number of the server's workers, and this process.
        timeout_s: Limit of the rendezvous, and of each collective.
    """
    address, port = listener.getsockname()[:2]
    timeout = datetime.timedelta(seconds=timeout_s)
    store: Any = dist.TCPStore(
        address, port, world_size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    keys = store
    for prefix in (GROUP, f"{GROUP}/", "cpu/" if device is None else "cuda/"):
        keys = dist.PrefixStore(prefix, keys)
    if device is None:
        return Link(dist.ProcessGroupGloo(keys, 0, world_size, timeout), store, None)
    torch.cuda.set_device(device)
    return Link(dist.ProcessGroupNCCL(keys, 0, world_size, timeout), store, device)


def staged(tensor: torch.Tensor, device: int | None) -> tuple[torch.Tensor, Any]:
    """Copy a tensor for another thread: its stream may overwrite it, and CUDA works in the background. Returns the
    copy, and the event at which it is complete; None for that on a CPU."""
    if device is None:
        return tensor.detach().clone(memory_format=torch.contiguous_format), None
    with torch.cuda.device(device):
        copy = tensor.detach().to(device="cuda", copy=True, memory_format=torch.contiguous_format)
        event = torch.cuda.Event()
        event.record()
    return copy, event


def broadcast(link: Link, tensors: Iterable[tuple[str, tuple[torch.Tensor, Any]]], buffer_bytes: int) -> None:
    """Broadcast each tensor, in the order of `nccl_update_infos`. Blocks as long as a worker does not listen: run it
    in a thread.

    Args:
        tensors: Names and results of `staged`.
    """
    if link.device is not None:
        torch.cuda.set_device(link.device)
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    for _, (tensor, event) in tensors:
        if event is not None:
            event.wait(torch.cuda.current_stream())
        link.group.broadcast([tensor], options).wait()
    if link.device is not None:
        torch.cuda.synchronize()
