"""The members that a weight transport must have, and the stream of weights that it is given.

A new transport is a class with the members of `WeightTransport` in `transports/`, a choice of `gym_weight_transport`
(`config.py`) and its rules in `transports/plan.py`. A server that needs code of its own for it gets a
weight transfer engine, which `policy_server/engine/plugin.py` registers in vLLM's workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from trl_gym.policy_server.client import PolicyClient


@dataclass(frozen=True, slots=True)
class WeightMeta:
    """One parameter as it will be sent."""

    name: str  # as in the model's checkpoint, e.g. `"model.layers.0.mlp.up_proj.weight"`
    dtype: torch.dtype  # precision in which it is sent
    shape: tuple[int, ...]  # shape of the whole tensor, also where it is sharded

    @property
    def num_bytes(self) -> int:
        num_elements = 1
        for size in self.shape:
            num_elements *= size
        return num_elements * self.dtype.itemsize


class WeightStream(Protocol):
    """The weights of one sync; see `trl_gym.weight_sync.source`.

    `metadata` and iteration name the same parameters in the same order. Iterating is a collective: every rank walks
    to the end, one full tensor at a time, whatever happens to the transfer. A tensor may be overwritten when the next
    one is asked for: finish with it, or copy it, before that.
    """

    def metadata(self) -> list[WeightMeta]:
        """List what iteration will yield. Local: nothing is gathered."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and full tensor, detached, in the dtype and shape of `metadata`, on the parameter's device."""


class WeightTransport(Protocol):
    """Moves one set of weights. Called by `WeightSync` only, on every rank in step.

    Attributes:
        name: As in `gym_weight_transport`.
        replaces: Whether weights in service are overwritten. Then the server is paused, `send` comes between
            `start_weight_update` and `finish_weight_update`, and after a first complete sync a part of the parameters
            is enough. Otherwise the transport itself puts the new version into service and the server samples on.
    """

    name: str
    replaces: bool

    def connect(self, client: PolicyClient) -> None:
        """Prepare the server's side. Rank 0, before the first transfer and again after `disconnect`. Raises
        `WeightSyncError` or `PolicyServerError`: the server cannot be prepared; nothing was changed."""

    def disconnect(self) -> None:
        """Forget everything agreed with the server, which is gone or was replaced. Idempotent; must not block."""

    def send(self, weights: WeightStream, client: PolicyClient | None, version: str) -> int:
        """Exhaust the stream and hand it to the server.

        Args:
            client: The server's control plane on rank 0, None on other ranks, which only take part in collectives.
            version: Weight version of the stream.

        Returns:
            Number of bytes handed over (0 on other ranks).

        Raises:
            WeightSyncError, PolicyServerError: On rank 0, within the client's timeouts; after the stream has been
                exhausted, so that no rank is left in a collective.
        """

    def release(self) -> None:
        """Give back what `send` took; the server has loaded the weights or never will. Idempotent."""
