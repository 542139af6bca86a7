"""vLLM's own packing on both sides, with CUDA's and NCCL's calls replaced by ones that work without a GPU.

It is what says, when vLLM moves, that names and arguments are still those that `vllm_transfer.py` uses.
"""

from __future__ import annotations

import base64
import contextlib
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.weight_sync.streams import Stream
from trl_gym.weight_sync import vllm_transfer
from trl_gym.weight_sync.transports.ipc import IpcTransport

pytestmark = pytest.mark.slow  # imports vLLM

BUFFER_BYTES = 620
TENSORS = {
    "whole buffer": torch.randn(300).bfloat16(),
    "without dimensions": torch.tensor(3.0).bfloat16(),
    "not contiguous": torch.randn(7, 11).t().bfloat16(),
    "empty": torch.empty(0).bfloat16(),
    "last": torch.randn(5).bfloat16(),
}


class Inert:
    """A stream or an event: everything is done at once."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Yields the buffers that were exported for CUDA IPC."""
    from vllm.distributed.weight_transfer import packed_tensor

    exported: list[torch.Tensor] = []
    to, empty = torch.Tensor.to, torch.empty

    def to_cpu(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        args = tuple("cpu" if value == "cuda" else value for value in args)
        return to(self, *args, **({**options, "device": "cpu"} if options.get("device") == "cuda" else options))

    def export(tensor: torch.Tensor) -> tuple[None, tuple[str, ...]]:
        exported.append(tensor)
        return None, ("handle",) * 7

    nothing = contextlib.nullcontext
    for target, name, value in (
        (torch, "empty", lambda *args, **options: empty(*args, **{**options, "device": "cpu"})),
        (torch.Tensor, "to", to_cpu),
        (torch.Tensor, "record_stream", lambda *_: None),
        (torch.accelerator, "current_device_index", lambda: 0),
        (torch.accelerator, "current_stream", Inert),  # with `torch.Event`, of vLLM 0.33
        (torch, "Event", Inert),
        (torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-0")),
        (torch.cuda, "current_stream", Inert),
        (torch.cuda, "stream", lambda _: nothing()),
        (torch.cuda, "device", lambda _: nothing()),
        (torch.cuda, "set_device", lambda _: None),
        (torch.cuda, "ipc_collect", lambda: None),
        (torch.cuda, "Event", Inert),
        (packed_tensor, "reduce_tensor", export),
        (packed_tensor, "_get_streams", lambda _, number: tuple(Inert() for _ in range(number))),
    ):
        monkeypatch.setattr(target, name, value)
    yield exported


def is_what_was_sent(received: dict[str, torch.Tensor]) -> bool:
    return list(received) == list(TENSORS) and all(
        torch.equal(received[name].reshape(-1), tensor.reshape(-1)) for name, tensor in TENSORS.items()
    )


def test_ipc_chunks_are_what_vllm_unpacks(no_gpu_needed: list[torch.Tensor]) -> None:
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor

    received: dict[str, torch.Tensor] = {}

    def update_weights(info: dict[str, Any]) -> None:
        handles = pickle.loads(base64.b64decode(info.pop("ipc_handles_pickled")))
        assert handles == {"GPU-0": ("handle",) * 7}
        told = IPCWeightTransferUpdateInfo(**info, ipc_handles=handles)
        dtypes = [getattr(torch, name) for name in told.dtype_names]
        packed = no_gpu_needed[0][: sum(told.tensor_sizes)]
        unpacked = unpack_tensor(packed, told.names, told.shapes, dtypes, told.tensor_sizes)
        received.update({name: tensor.clone() for name, tensor in unpacked})

    transport = IpcTransport()
    transport._buffer_bytes = BUFFER_BYTES
    client: Any = SimpleNamespace(update_weights=update_weights)
    assert transport.send(Stream(TENSORS), client, "1") == sum(tensor.nbytes for tensor in TENSORS.values())
    assert is_what_was_sent(received)
    assert len(no_gpu_needed) == 1
    assert IPCWeightTransferInitInfo(**vllm_transfer.ipc_init_info()).packed


@pytest.mark.usefixtures("no_gpu_needed")
def test_a_broadcast_is_what_vllm_unpacks() -> None:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

    wire: list[torch.Tensor] = []
    sender: Any = SimpleNamespace(broadcast=lambda tensor, src: wire.append(tensor.clone()))
    staged = [(name, vllm_transfer.staged(tensor, 0)) for name, tensor in TENSORS.items()]
    vllm_transfer.broadcast(vllm_transfer.NcclLink(sender, 0), staged, BUFFER_BYTES)

    arriving = iter(wire)
    receiver = SimpleNamespace(broadcast=lambda tensor, src: tensor.copy_(next(arriving)))
    told = NCCLWeightTransferUpdateInfo(**vllm_transfer.nccl_update_infos(Stream(TENSORS).metadata(), 1)[0])
    agreed = NCCLWeightTransferInitInfo(
        **vllm_transfer.nccl_init_info(address="127.0.0.1", port=1, world_size=2, buffer_bytes=BUFFER_BYTES)
    )
    received: dict[str, torch.Tensor] = {}
    packed_nccl_broadcast_consumer(
        iterator=iter(
            (name, (shape, getattr(torch, dtype)))
            for name, dtype, shape in zip(told.names, told.dtype_names, told.shapes, strict=True)
        ),
        group=receiver,
        src=0,
        post_unpack_func=lambda pairs: received.update({name: tensor.clone() for name, tensor in pairs}),
        buffer_size_bytes=agreed.packed_buffer_size_bytes,
        num_buffers=agreed.packed_num_buffers,
        device="cpu",
    )
    assert len(wire) > 1
    assert is_what_was_sent(received)
