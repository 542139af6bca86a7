"""Ways for weights to reach the policy server. One class each, behind one Protocol, chosen from the placement.

| transport | where it works                        | how                                                         |
|-----------|---------------------------------------|-------------------------------------------------------------|
| `ipc`     | trainer and server share GPUs         | CUDA IPC handles of packed buffers                          |
| `nccl`    | server on other GPUs or hosts         | packed broadcast                                            |
| `file`    | one host, or a disk that both can see | safetensors file, memory-mapped by the server's workers     |
| `adapter` | LoRA, where both see a folder         | versioned adapters; the base's weights are not touched      |
"""

from trl_gym.weight_sync.protocol import WeightMeta, WeightStream, WeightTransport
from trl_gym.weight_sync.transports.file import FileTransport
from trl_gym.weight_sync.transports.ipc import IpcTransport
from trl_gym.weight_sync.transports.nccl import NcclTransport
from trl_gym.weight_sync.transports.plan import (
    TransportOptions,
    choose_transport,
    environment_for,
    planned_backend,
)

__all__ = [
    "FileTransport",
    "IpcTransport",
    "NcclTransport",
    "TransportOptions",
    "WeightMeta",
    "WeightStream",
    "WeightTransport",
    "choose_transport",
    "environment_for",
    "planned_backend",
]
