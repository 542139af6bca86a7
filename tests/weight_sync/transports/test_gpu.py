"""The data path of `ipc` and `nccl`: gigabytes through vLLM's own engines into another process, compared bit for bit.

`ipc` needs one GPU, `nccl` two (NCCL refuses two processes on one). Written without a GPU at hand. It has not been
run on one; on a CPU, `ipc` runs with shared memory of the host in the place of CUDA's.
"""

from __future__ import annotations

import pytest
import torch

from tests.weight_sync.streams import Stream
from tests.weight_sync.transports.cuda_stand_in import cuda_of_the_host
from tests.weight_sync.transports.gpu_receiver import pattern, receiver
from trl_gym.weight_sync.transports import nccl
from trl_gym.weight_sync.transports.ipc import IpcTransport
from trl_gym.weight_sync.transports.nccl import NcclTransport

NUM_GPUS = torch.cuda.device_count()
# 2.1 GB in bfloat16: many that share a buffer, one that fills several, some of odd length, one without elements.
SIZES = {f"layer.{place}": 2**24 + place for place in range(32)} | {"big": 2**29, "one": 1, "none": 0}


@pytest.fixture
def weights() -> Stream:
    return Stream({name: pattern(place, size, "cuda:0") for place, (name, size) in enumerate(SIZES.items())})


def test_ipc_hands_over_every_byte_of_the_hosts_memory() -> None:
    sizes = {f"layer.{place}": 2**16 + place for place in range(8)} | {"big": 2**20, "one": 1, "none": 0}
    weights = Stream({name: pattern(place, size, "cpu") for place, (name, size) in enumerate(sizes.items())})
    weights.tensors["one"] = weights.tensors["one"].reshape(())
    transport = IpcTransport(buffer_mb=1)  # "big" makes it bigger; the others fill it once
    with receiver("ipc", "cpu") as client, cuda_of_the_host():
        transport.connect(client)
        for _ in range(2):
            client.start_weight_update()
            assert transport.send(weights, client, "1") == 2 * sum(sizes.values())
            client.finish_weight_update()
            assert client.ask("differing", sizes) == []
        weights.tensors["layer.3"].zero_()
        client.start_weight_update()
        transport.send(weights, client, "2")
        client.finish_weight_update()
        assert client.ask("differing", sizes) == ["layer.3"]


@pytest.mark.slow
@pytest.mark.skipif(NUM_GPUS < 1, reason="needs a GPU")
@pytest.mark.parametrize("buffer_mb", [64, 2048])
def test_ipc_hands_over_every_byte(weights: Stream, buffer_mb: int) -> None:
    transport = IpcTransport(buffer_mb)
    with receiver("ipc", "cuda:0") as client:
        transport.connect(client)
        for _ in range(2):
            client.start_weight_update()
            assert transport.send(weights, client, "1") == 2 * sum(SIZES.values())
            client.finish_weight_update()
            assert client.ask("differing", SIZES) == []


@pytest.mark.slow
@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("buffer_mb", [64, 2048])
def test_nccl_hands_over_every_byte(weights: Stream, buffer_mb: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "_own_client", lambda client: client)  # it is no HTTP client, and thread-safe
    transport = NcclTransport(buffer_mb)
    with receiver("nccl", "cuda:1") as client:
        transport.connect(client)
        for _ in range(2):
            client.start_weight_update()
            assert transport.send(weights, client, "1") == 2 * sum(SIZES.values())
            client.finish_weight_update()
            assert client.ask("differing", SIZES) == []
        transport.disconnect()
