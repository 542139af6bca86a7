"""Transport `ipc`: the trainer and the server share GPUs, and the server reads the trainer's memory.

Weights are copied into a packed buffer on the GPU; the server gets its CUDA IPC handle over HTTP and copies from
there. Every rank takes part: a worker of the server can only open the memory of the GPU that it runs on, so rank 0
sends the handles of all of them.

vLLM takes such handles pickled, and unpickling runs code that a message names. So this transport is for a server that
only this machine can reach, and the server must have been started with VLLM_ALLOW_INSECURE_SERIALIZATION=1.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from trl_gym.errors import PolicyServerError, PolicyServerLostError, TrlGymError, WeightSyncError
from trl_gym.weight_sync import vllm_transfer

if TYPE_CHECKING:
    from trl_gym.policy_server.client import PolicyClient
    from trl_gym.weight_sync.protocol import WeightMeta, WeightStream

logger = logging.getLogger(__name__)

ENVIRONMENT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
"""Environment that the server's process needs."""


class IpcTransport:
    """CUDA IPC of packed buffers.

    Args:
        buffer_mb: Size of the buffer on each GPU, in MB. A bigger tensor makes it as big as that.
    """

    name = "ipc"
    replaces = True

    def __init__(self, buffer_mb: int = 512) -> None:
        self._buffer_bytes = buffer_mb * 10**6

    def connect(self, client: PolicyClient) -> None:
        client.init_weight_transfer(vllm_transfer.ipc_init_info())

    def disconnect(self) -> None:
        """Nothing outlives a sync."""

    def send(self, weights: WeightStream, client: PolicyClient | None, version: str) -> int:
        parameters = weights.metadata()
        buffer_bytes = self._fit(parameters)
        outbox = _Outbox(client)
        stream = iter(weights)
        try:
            vllm_transfer.send_ipc(
                parameters, stream, outbox.post, is_sender=client is not None, buffer_bytes=buffer_bytes
            )
        except TrlGymError:
            raise
        except Exception as error:  # CUDA's and vLLM's own
            outbox.error = WeightSyncError(
                f"Weights could not be sent by CUDA IPC: {error}", "Look into the policy server's log."
            )
            outbox.error.__cause__ = error
        finally:
            for _ in stream:  # other ranks walk it to its end
                pass
        if outbox.error is not None:
            if client is not None and not isinstance(
                outbox.error, PolicyServerLostError
            ):  # one that is lost is replaced
                client.abandon_weight_update()
            raise outbox.error
        return 0 if client is None else sum(one.num_bytes for one in parameters)

    def release(self) -> None:
        """The buffer is gone when `send` returns."""

    def _fit(self, parameters: list[WeightMeta]) -> int:
        biggest = max(parameters, key=lambda one: one.num_bytes, default=None)
        if biggest is not None and biggest.num_bytes > self._buffer_bytes:
            logger.warning(
                "%s has %.0f MB and `gym_weight_buffer_mb` is %.0f: the buffer is made as big as that tensor.",
                biggest.name,
                biggest.num_bytes / 1e6,
                self._buffer_bytes / 1e6,
            )
            self._buffer_bytes = biggest.num_bytes
        return self._buffer_bytes


class _Outbox:
    """Posts updates until one fails, and none after that: the ranks walk the stream to its end together."""

    def __init__(self, client: PolicyClient | None) -> None:
        self._client = client
        self.error: TrlGymError | None = None

    def post(self, update_info: dict[str, Any]) -> None:
        if self.error is not None or self._client is None:
            return
        try:
            self._client.update_weights(update_info)
        except PolicyServerError as error:
            self.error = error
