"""Transport `nccl`: the server runs on other GPUs, here or elsewhere, and weights are broadcast to its workers.

    rank 0, main thread    walks the stream (collectives stay here), copies each tensor into the handover
    rank 0, a thread       packs and broadcasts
    rank 0, a thread       waits for the answer of /update_weights
    other ranks            walk the stream

A collective with a peer that died never returns. So whichever side fails first, or the timeout, ends the send with an
error; what hangs is left to its daemon thread, and `disconnect` aborts the communicator.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trl_gym.errors import TrlGymError, WeightSyncError
from trl_gym.policy_server.client import PolicyClient
from trl_gym.weight_sync import vllm_transfer
from trl_gym.weight_sync.transports.together import Handover, Together

if TYPE_CHECKING:
    from trl_gym.weight_sync.protocol import WeightStream


class NcclTransport:
    """Packed broadcast from rank 0's GPU to every worker of the server.

    Args:
        buffer_mb: Size of a packed buffer, in MB; two of them are in use at a time on each side, and as much again is
            held back for the thread that sends.
    """

    name = "nccl"
    replaces = True
    sends_part = True

    def __init__(self, buffer_mb: int = 512) -> None:
        self._buffer_bytes = buffer_mb * 10**6
        self._link: vllm_transfer.NcclLink | None = None

    def connect(self, client: PolicyClient) -> None:
        """Meet the server's workers.

        Raises:
            WeightSyncError: They did not come within the client's timeout, or NCCL failed.
            PolicyServerError: The server refused.
        """
        device = _device()
        world_size = client.world_size() + 1
        address = local_address(client.root_url)
        listener = socket.create_server((address, 0), family=_family(address))
        port = listener.getsockname()[1]
        info = vllm_transfer.nccl_init_info(
            address=address, port=port, world_size=world_size, buffer_bytes=self._buffer_bytes
        )
        both = Together(client.timeout_s)
        server = _own_client(client)
        both.start("the server, to join the NCCL group", lambda: server.init_weight_transfer(info))
        join = "the trainer, to join the NCCL group"
        both.start(
            join,
            lambda: vllm_transfer.join_nccl(
                listener, device=device, world_size=world_size, timeout_s=client.timeout_s
            ),
        )
        self._link = _named(both, f"The NCCL group of {world_size} at {address}:{port} could not be formed")[join]

    def disconnect(self) -> None:
        if self._link is not None:
            self._link.abort()
            self._link = None

    def send(self, weights: WeightStream, client: PolicyClient | None, version: str) -> int:
        if client is None:
            for _ in weights:
                pass
            return 0
        parameters = weights.metadata()
        handover: Handover[Any] = Handover(self._buffer_bytes)
        both = Together(client.timeout_s, on_failure=handover.close)
        stream = iter(weights)
        try:
            link = self._start(both, handover, parameters, client)
            is_wanted = True
            for name, tensor in stream:
                num_bytes = tensor.numel() * tensor.element_size()
                is_wanted = is_wanted and handover.put(
                    (name, vllm_transfer.staged(tensor, link.device)), num_bytes, both.remaining_s
                )
            handover.finish()
            _named(both, "The broadcast of weights failed")
        except BaseException:
            handover.close()
            self.disconnect()  # one side is in a collective that the other one left
            for _ in stream:  # nobody listens any more; the other ranks walk it to its end
                pass
            raise
        return sum(one.num_bytes for one in parameters)

    def release(self) -> None:
        """The buffers are freed when `send` returns."""

    def _start(
        self, both: Together, handover: Handover[Any], parameters: list[Any], client: PolicyClient
    ) -> vllm_transfer.NcclLink:
        link = self._link
        if link is None:
            raise WeightSyncError("The NCCL group was given up after a failure; the policy server must be restarted.")
        info = vllm_transfer.nccl_update_info(parameters)
        server = _own_client(client)
        both.start("the server, to load the weights", lambda: server.update_weights(info))
        both.start("the broadcast", lambda: vllm_transfer.broadcast(link, handover, self._buffer_bytes))
        return link


def local_address(url: str) -> str:
    """The address of this machine under which a server sees it: that of the interface which leads there.

    Args:
        url: The server's, e.g. `"http://10.0.0.7:8000"`.

    Raises:
        WeightSyncError: The name cannot be resolved, or no route leads there.
    """
    parts = urlsplit(url)
    try:
        target = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(target[0], socket.SOCK_DGRAM) as probe:
            probe.connect(target[4])  # sends nothing; chooses the interface
            return str(probe.getsockname()[0])
    except OSError as error:
        raise WeightSyncError(f"No way leads from here to the policy server at {url} ({error}).") from error


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET


def _device() -> int:
    import torch

    try:
        return int(torch.cuda.current_device())
    except (AssertionError, RuntimeError) as error:
        raise WeightSyncError(f"`nccl` needs a CUDA device in the trainer's process ({error}).") from error


def _own_client(client: PolicyClient) -> PolicyClient:
    """For another thread: connections are not shared between threads."""
    return PolicyClient(client.base_url, api_key=client.api_key, timeout_s=client.timeout_s)


def _named(both: Together, what: str) -> dict[str, Any]:
    """Wait; an error of NCCL or torch becomes one of ours."""
    try:
        return both.wait()
    except TrlGymError:
        raise
    except Exception as error:
        raise WeightSyncError(f"{what}: {error}") from error
