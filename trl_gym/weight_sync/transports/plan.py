"""Which transport a run uses: chosen from the placement, overridable, refused early where it cannot work.

Two stages, because the server has to be started for the way in which it will get weights:

    `planned_backend`    before a server is started: its `--weight-transfer-config`, and `environment_for` it
    `choose_transport`   when it is ready, or was attached to: the object that sends
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from trl_gym import compat
from trl_gym.errors import ConfigError
from trl_gym.policy_server.entry import is_loopback
from trl_gym.weight_sync.transports import ipc
from trl_gym.weight_sync.transports.file import FileTransport
from trl_gym.weight_sync.transports.nccl import NcclTransport

if TYPE_CHECKING:
    from trl_gym.policy_server.server import PolicyBackend
    from trl_gym.weight_sync.protocol import WeightTransport


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """What decides about the transport.

    Attributes:
        wanted: `gym_weight_transport`.
        folder: `gym_weight_dir`.
        buffer_mb: `gym_weight_buffer_mb`.
        on_cuda: Whether the trainer computes on CUDA devices.
        adapter: Makes the transport `adapter`; None where nothing but an adapter is not all that is trained.
        adapter_problem: Why `adapter` cannot be used, when it cannot.
        merged_problem: Why whole weights cannot be sent, when they cannot: the base is quantized.
    """

    wanted: str = "auto"
    folder: str | None = None
    buffer_mb: int = 512
    on_cuda: bool = False
    adapter: WeightTransport | None = None
    adapter_problem: str | None = None
    merged_problem: str | None = None


def planned_backend(wanted: str, *, on_cuda: bool, shares_devices: bool) -> str:
    """The backend of vLLM's weight transfer for a server that we start.

    Raises:
        ConfigError: It was asked for, and cannot work.
    """
    auto = ("ipc" if shares_devices else "nccl") if on_cuda else "file"
    if wanted in ("auto", "adapter"):  # an adapter needs none; this one is for what else may have to be sent
        return auto
    problem = None
    if wanted in ("ipc", "nccl") and not on_cuda:
        problem = "the trainer does not compute on CUDA devices; use 'file'"
    elif wanted == "ipc" and not shares_devices:
        problem = "the server runs on other GPUs (`gym_server_devices`); use 'nccl', or leave the devices out"
    elif wanted == "nccl" and shares_devices:
        problem = "NCCL does not connect two processes on one GPU; use 'ipc', or set `gym_server_devices`"
    if problem is not None:
        raise ConfigError(f"`gym_weight_transport` is {wanted!r}, and {problem}.")
    return wanted


def environment_for(backend: str) -> Mapping[str, str]:
    """Environment variables of a server that gets its weights by `backend`; only for one on a loopback address."""
    return ipc.ENVIRONMENT if backend == "ipc" else {}


def choose_transport(server: PolicyBackend, options: TransportOptions) -> WeightTransport:
    """What this run sends with. The same on every rank.

    Args:
        server: Ready.
        options: See there.

    Raises:
        ConfigError: Nothing fits, or what was asked for does not; the message says why and what does.
        UnsupportedVersionError: `ipc` or `nccl`, and this environment lacks vLLM or has another version.
    """
    wanted = options.wanted
    if wanted == "adapter" or (wanted == "auto" and options.merged_problem is not None):
        return _adapter(options)
    if options.merged_problem is not None:
        raise ConfigError(f"`gym_weight_transport` is {wanted!r}, and {options.merged_problem}; use 'adapter'.")
    name = _backend_of(server, wanted)
    if name == "file":
        if (problem := _file_problem(server, options)) is not None:
            raise ConfigError(f"The policy server takes weights by `file`, and {problem}.")
        return FileTransport(options.folder)
    if not options.on_cuda:
        raise ConfigError(
            f"The policy server takes weights by `{name}`, and the trainer does not compute on CUDA devices. Start "
            """the server with --weight-transfer-config '{"backend": "file"}'."""
        )
    compat.check_versions(("vllm",))  # both sides pack with its code
    if name == "nccl":
        return NcclTransport(options.buffer_mb)
    if (problem := _ipc_problem(server)) is not None:
        raise ConfigError(f"The policy server takes weights by `ipc`, and {problem}.")
    return ipc.IpcTransport(options.buffer_mb)


def _adapter(options: TransportOptions) -> WeightTransport:
    if options.adapter is not None and options.adapter_problem is None:
        return options.adapter
    reason = options.adapter_problem or "no LoRA adapter is trained"
    if options.wanted == "adapter":
        raise ConfigError(f"`gym_weight_transport` is 'adapter', and {reason}.")
    raise ConfigError(f"Only the adapter can be sent, because {options.merged_problem}; but {reason}.")


def _backend_of(server: PolicyBackend, wanted: str) -> str:
    """The one by which the server takes whole weights. It has one, for as long as it lives."""
    accepted = [name for name in server.weight_transports if name in ("ipc", "nccl", "file")]
    if not accepted:
        named = ", ".join(server.weight_transports) or "nothing"
        raise ConfigError(
            f"The policy server at {server.base_url} takes weights by {named} only; trl-gym sends them by ipc, nccl "
            "or file (flag --weight-transfer-config of the server)."
        )
    if wanted != "auto" and wanted not in accepted:
        raise ConfigError(
            f"`gym_weight_transport` is {wanted!r}, and the policy server at {server.base_url} was started for "
            f"{', '.join(accepted)}. Leave the option at 'auto', or start the server with "
            f"""--weight-transfer-config '{{"backend": "{wanted}"}}'."""
        )
    return wanted if wanted != "auto" else accepted[0]


def _file_problem(server: PolicyBackend, options: TransportOptions) -> str | None:
    if options.folder is not None:
        return None  # whether both see it is found when they are connected
    for url in server.base_url.split(","):
        host = urlsplit(url).hostname or ""
        if not is_this_host(host):
            return (
                f"{host} is another host, which does not see our shared memory; set `gym_weight_dir` to a folder on a "
                "disk that both hosts mount, or start the server with "
                """--weight-transfer-config '{"backend": "nccl"}'"""
            )
    return None


def _ipc_problem(server: PolicyBackend) -> str | None:
    host = urlsplit(server.base_url).hostname
    if not is_loopback(host):
        return (
            f"{host} is not a loopback address: CUDA IPC needs shared GPUs, and its messages are unpickled. "
            """Start the server with --host 127.0.0.1 here, or with --weight-transfer-config '{"backend": "nccl"}'"""
        )
    if server.placement == "server" and not _allows_pickle(server):
        return (
            "it was started without VLLM_ALLOW_INSECURE_SERIALIZATION=1, which handles of CUDA IPC need over HTTP. "
            "Start it again with that in its environment"
        )
    return None


def _allows_pickle(server: PolicyBackend) -> bool:
    return bool(server.client.server_environment().get("VLLM_ALLOW_INSECURE_SERIALIZATION"))


def is_this_host(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine's: its own addresses are those that one can bind to."""
    if is_loopback(host):
        return True
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
