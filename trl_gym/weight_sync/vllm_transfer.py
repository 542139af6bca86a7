"""The trainer's side of vLLM's weight transfer: every name of vLLM that is imported in the trainer's process.

Holds for vLLM 0.30 to 0.33 (read; with 0.31 run without a GPU: `ipc` with memory of the host in the place of CUDA's,
`nccl` up to the first call of CUDA). vLLM's own trainer engines drive the whole sync and wait in ways that cannot be
ended. So of `ipc` its engine is used, with a client that only passes on what it is given; of `nccl` the parts that the
engine is made of: group, communicator and packed broadcast. The server's side is vLLM's own in both cases, and both
sides pack with the same code.

Everything here needs CUDA.
"""

from __future__ import annotations

import base64
import contextlib
import pickle
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

from trl_gym.errors import WeightSyncError
from trl_gym.weight_sync.protocol import WeightMeta

_NUM_BUFFERS = 2  # one is filled while the other one is sent
_STORE_MARGIN_S = 60


class _Control:
    """A client for vLLM's engine, which would steer the server: the sync does that, and this passes updates on."""

    def __init__(self, post: Callable[[dict[str, Any]], None]) -> None:
        self._post = post

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Done by `connect`."""

    def start_weight_update(self) -> None:
        """Done by the sync."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._post(as_json(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Done by the sync."""


def as_json(update_info: dict[str, Any]) -> dict[str, Any]:
    """Make an update JSON: handles are tuples with bytes in them; over HTTP vLLM takes them pickled, if allowed to."""
    fields = {name: value for name, value in update_info.items() if name != "ipc_handles"}
    fields["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
    return {name: value for name, value in fields.items() if value is not None}


def ipc_init_info() -> dict[str, Any]:
    """Return the body of `/init_weight_transfer_engine`."""
    return {"packed": True}


def send_ipc(
    parameters: Sequence[WeightMeta],
    weights: Iterable[tuple[str, torch.Tensor]],
    post: Callable[[dict[str, Any]], None],
    *,
    is_sender: bool,
    buffer_bytes: int,
) -> None:
    """Walk the stream and share it, one packed buffer at a time. Every rank calls it in step.

    Args:
        weights: Tensors on this rank's GPU, or moved there one at a time.
        post: Hands one update to the server (`/update_weights`) and returns when it has been read; called on the
            sender only. It must not raise: other ranks would be left in a collective.
        is_sender: Whether this is rank 0.
        buffer_bytes: At least the size of the biggest tensor.
    """
    from vllm.distributed.weight_transfer import ipc_engine
    from vllm.distributed.weight_transfer.base import WeightSource

    info = ipc_engine.IPCTrainerInitInfo(
        rank=0 if is_sender else 1, packed=True, packed_buffer_size_bytes=buffer_bytes
    )
    stream = _Source(parameters, weights)
    source: Any = stream if hasattr(WeightSource, "iter_full") else _SourceBefore033(stream)
    engine = ipc_engine.IPCTrainerWeightTransferEngine.trainer_init(info, client=_Control(post), source=source)
    engine.send_weights()


class _Source:
    """A stream as vLLM's engines take it: on the current GPU, and nothing without dimensions. Walked once."""

    def __init__(self, parameters: Sequence[WeightMeta], weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.metadata = [on_the_wire(one) for one in parameters]
        self._weights = weights

    def owned_names(self, rank: int) -> list[str]:
        """All of them, on every rank: the stream yields whole tensors."""
        return [one.name for one in self.metadata]

    def implements_iter_full(self) -> bool:
        return True

    def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights:
            yield name, _with_dimensions(tensor.detach().to("cuda"))


class _SourceBefore033:
    """The same for vLLM before 0.33, which calls `metadata` and iterates."""

    def __init__(self, source: _Source) -> None:
        self._source = source

    def metadata(self) -> list[WeightMeta]:
        return self._source.metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._source.iter_full()


def on_the_wire(one: WeightMeta) -> WeightMeta:
    """Give a tensor without dimensions one: else it cannot be packed (`view(uint8)`). vLLM's loaders take it so."""
    return one if one.shape else WeightMeta(one.name, one.dtype, (1,))


def _with_dimensions(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() else tensor.reshape(1)


@dataclass(frozen=True, slots=True)
class NcclLink:
    """A communicator between this process and the server's workers."""

    communicator: Any  # vLLM's
    device: int  # index of our GPU

    def abort(self) -> None:
        """End collectives that hang and free the communicator. Returns at once."""

        def destroy() -> None:
            with contextlib.suppress(Exception):  # a peer is gone, and no error of it can be acted on
                self.communicator.destroy()  # `ncclCommAbort`, with a timeout

        threading.Thread(target=destroy, name="trl-gym: abort nccl", daemon=True).start()


def nccl_init_info(*, address: str, port: int, world_size: int, buffer_bytes: int) -> dict[str, Any]:
    """Return the body of `/init_weight_transfer_engine`. We are rank 0, the workers come after us."""
    return {
        "master_address": address,
        "master_port": port,
        "rank_offset": 1,
        "world_size": world_size,
        "packed": True,
        "packed_buffer_size_bytes": buffer_bytes,
        "packed_num_buffers": _NUM_BUFFERS,
    }


def nccl_update_infos(parameters: Iterable[WeightMeta], buffer_bytes: int) -> list[dict[str, Any]]:
    """Return the body of the only `/update_weights`: the tensors that will be broadcast, in this order."""
    sent = [on_the_wire(one) for one in parameters]
    info = {
        "names": [one.name for one in sent],
        "dtype_names": [str(one.dtype).removeprefix("torch.") for one in sent],
        "shapes": [list(one.shape) for one in sent],
    }
    return [info]


def own_device() -> int:
    """Return the index of our GPU. Raises `AssertionError` or `RuntimeError` where there is none."""
    return int(torch.cuda.current_device())


def join_nccl(listener: socket.socket, *, device: int, world_size: int, timeout_s: float) -> NcclLink:
    """Meet the server's workers, as rank 0. Blocks until all of them are there: run it in a thread.

    Args:
        listener: A bound and listening socket; the rendezvous takes it over.
        device: Index of our GPU.
        world_size: Number of the server's workers, and this process.
        timeout_s: Limit of the rendezvous. NCCL's own start has none.
    """
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup

    torch.cuda.set_device(device)
    address, port = listener.getsockname()[:2]
    # When the store's time is up it reports a bad file descriptor (0.31): our caller must have given up by then.
    store_timeout = int(timeout_s) + _STORE_MARGIN_S
    group = StatelessProcessGroup.create(
        address, port, rank=0, world_size=world_size, store_timeout=store_timeout, listen_socket=listener
    )
    communicator = PyNcclCommunicator(group, device=device)
    if not communicator.available:  # it says so in its log only
        raise WeightSyncError(
            "vLLM cannot load the NCCL library in the trainer's process, or was told not to.",
            "Use `gym_weight_transport: file`, or correct the environment (`VLLM_NCCL_SO_PATH`).",
        )
    return NcclLink(communicator, device)


def staged(tensor: torch.Tensor, device: int) -> tuple[torch.Tensor, torch.cuda.Event]:
    """Copy a tensor on the GPU for another thread: its stream may overwrite it, and CUDA works in the background.
    Returns the copy, and the event at which it is complete."""
    with torch.cuda.device(device):
        copy = _with_dimensions(tensor.detach()).to(device="cuda", copy=True, memory_format=torch.contiguous_format)
        event = torch.cuda.Event()
        event.record()
    return copy, event


def broadcast(
    link: NcclLink, tensors: Iterable[tuple[str, tuple[torch.Tensor, torch.cuda.Event]]], buffer_bytes: int
) -> None:
    """Broadcast in packed buffers, in the order of `nccl_update_infos`. Blocks as long as a worker does not listen:
    run it in a thread.

    Args:
        tensors: Names and results of `staged`.
        buffer_bytes: As in `nccl_init_info`: both sides cut the stream at the same places.
    """
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

    def ready() -> Iterator[tuple[str, torch.Tensor]]:
        for name, (tensor, event) in tensors:
            stream = torch.cuda.current_stream()  # the producer's, on which it packs
            event.wait(stream)
            tensor.record_stream(stream)
            yield name, tensor

    torch.cuda.set_device(link.device)
    packed_nccl_broadcast_producer(
        iterator=ready(),
        group=link.communicator,
        src=0,
        post_iter_func=itemgetter(1),
        buffer_size_bytes=buffer_bytes,
        num_buffers=_NUM_BUFFERS,
    )
