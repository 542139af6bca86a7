"""Transport `shared`: the engine is in the trainer's process and computes with the trainer's own weights.

Nothing is sent. What a sync does all the same is what must happen when weights have changed: the engine pauses,
forgets what it has computed with the old ones, and gets the new version, which it stamps on what it samples; and a
probe, now and then, compares log-probabilities, as with every transport. Both sides compute them by the same forward
pass of the same model: it finds a server that has another model, and no fault of sampling. Whether the engine
samples from what its model computes is checked when a run starts (`splice_probe.check_sampling`), and every batch that
is trained compares the two (`sampling/…` of the metrics).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_gym.policy_server.client import PolicyClient
    from trl_gym.weight_sync.protocol import WeightStream


class SharedTransport:
    """Sends nothing. A `WeightTransport`."""

    name = "shared"
    replaces = True

    def connect(self, client: PolicyClient) -> None:
        """Do nothing: there is nothing to agree on."""

    def disconnect(self) -> None:
        """Do nothing."""

    def send(self, weights: WeightStream, client: PolicyClient | None, version: str) -> int:
        """Return 0. The stream is not walked, on any rank: no tensor is gathered or copied."""
        return 0

    def release(self) -> None:
        """Do nothing."""
