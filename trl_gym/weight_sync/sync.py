"""One weight sync: pause → transfer → finish with version → reset caches → resume.

A transfer that fails leaves the server paused: resuming it would serve half-updated weights. The probe comes after the
resume, because it asks the server to compute; when it finds a mismatch, training stops.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trl_gym.errors import WeightSyncError
from trl_gym.weight_sync.probe import ProbeReport, compare, probe_batch, require_agreement, trainer_logprobs
from trl_gym.weight_sync.source import named_weights

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from trl_gym.policy_server.client import PolicyClient
    from trl_gym.policy_server.server import PolicyBackend
    from trl_gym.weight_sync.transports import WeightTransport


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one sync cost.

    Attributes:
        version: Weight version that the server holds now.
        seconds: Wall time, pause to resume.
        num_bytes: Bytes handed over.
        probe: Behavioural comparison; None when none was made.
    """

    version: str
    seconds: float
    num_bytes: int
    probe: ProbeReport | None


class WeightSync:
    """Pushes the trainer's weights to the policy server. Every rank has one and calls `push` in step.

    Args:
        accelerator: The trainer's.
        server: The policy server; its control plane is used on rank 0 only.
        transport: How the weights travel.
        probe_tolerance: Mean absolute gap in nats allowed by the probe after the first push.
    """

    def __init__(
        self, accelerator: Accelerator, server: PolicyBackend, transport: WeightTransport, *, probe_tolerance: float
    ) -> None:
        self._accelerator = accelerator
        self._server = server
        self._transport = transport
        self._probe_tolerance = probe_tolerance
        self._connected = False
        self._verified = False

    def push(self, model: torch.nn.Module, version: str) -> SyncReport:
        """Send the model's weights and resume the server with them.

        Args:
            model: The trainer's model, wrapped or not.
            version: Stamped on everything that is sampled from here on.

        Raises:
            WeightSyncError: The server refused, died, or reports another version afterwards.
            WeightMismatchError: The first push arrived and the server computes something else.
        """
        started = time.monotonic()
        unwrapped = self._accelerator.unwrap_model(model)
        client = self._server.client if self._accelerator.is_main_process else None
        self._accelerator.wait_for_everyone()
        try:
            if client is not None:
                self._begin(client)
            num_bytes = self._transport.send(named_weights(unwrapped), client)
            if client is not None:
                self._finish(client, version)
        finally:
            self._transport.release()
        probe = None if self._verified else self._verify(unwrapped, version)
        self._verified = True
        self._accelerator.wait_for_everyone()
        return SyncReport(version, time.monotonic() - started, num_bytes, probe)

    def _begin(self, client: PolicyClient) -> None:
        if not self._connected:
            self._transport.connect(client)
            self._connected = True
        client.pause("wait")
        client.start_weight_update()

    def _finish(self, client: PolicyClient, version: str) -> None:
        client.finish_weight_update(version)
        client.reset_caches()
        held = client.weight_version()
        if held != version:
            raise WeightSyncError(
                f"Weight version {version} was sent and the policy server says it holds {held!r}; it stays paused."
            )
        client.resume()

    def _verify(self, model: torch.nn.Module, version: str) -> ProbeReport | None:
        batch = probe_batch(model.config.get_text_config().vocab_size)
        ours = trainer_logprobs(model, batch)
        if not self._accelerator.is_main_process:
            return None
        report = compare(ours, self._server.client.prompt_logprobs(batch))
        require_agreement(report, self._probe_tolerance, version=version)
        return report
