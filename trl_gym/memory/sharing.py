"""One device, used in turns: the policy server while rollouts run, the trainer while it updates the weights.

    AWAKE ──after_sampling──► ASLEEP ──before_sync──► WEIGHTS ──before_sampling──► AWAKE
                                 └───────── before_sampling (weights were kept) ─────┘

Server: vLLM's sleep mode. Level 1 keeps the weights in host memory, level 2 drops them: then they must be pushed
before anything is sampled (`needs_push`). The KV cache is dropped either way. Trainer: memory that torch keeps for
later is given back, and the optimizer's state goes to the host if asked, before the server takes its KV cache.

What vLLM 0.30 and 0.31 do (read, and the calls' answers run on a CPU server, where workers ignore them):
  * `/sleep` stops the scheduler, aborts what still runs, and empties the prefix cache.
  * `/wake_up` of the last sleeping part also resumes the scheduler. So `before_sampling` comes after everything that
    must be known of a sync (its version), and
  * `/resume` starts the scheduler *whatever sleeps*: while the KV cache does, a request would compute with memory that
    is not there. Call it after `before_sampling` only.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING

from trl_gym.errors import WeightSyncError
from trl_gym.memory.offload import OptimizerOffload, release_cached
from trl_gym.ranks import on_main

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trl_gym.policy_server.client import PolicyClient
    from trl_gym.policy_server.server import PolicyBackend
    from trl_gym.weight_sync.transports import WeightTransport

KEEP, DROP = 1, 2  # vLLM's sleep levels


class Occupancy(StrEnum):
    """What of the server is in device memory."""

    AWAKE = "awake"
    ASLEEP = "asleep"
    WEIGHTS = "weights"


class DeviceSharing:
    """Every rank has one and calls its methods in step; the server is asked on rank 0. All are idempotent.

    Args:
        accelerator: The trainer's.
        server: The policy server on the same devices; its client is used on rank 0 only.
        drops_weights: Whether the server's weights may be dropped, because a sync brings all of them.
        optimizer: Moved to the host while the server is awake; None leaves it. It may come later.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        server: PolicyBackend,
        *,
        drops_weights: bool,
        optimizer: OptimizerOffload | None = None,
    ) -> None:
        self.state = Occupancy.AWAKE
        self.needs_push = False
        self._accelerator = accelerator
        self._server = server
        self._drops_weights = drops_weights
        self.optimizer = optimizer
        self._proven = False

    @property
    def needs_probe(self) -> bool:
        """Whether the next sync shall be verified: the first one into memory that was dropped. What a model keeps
        beside its parameters and buffers does not survive that."""
        return self.needs_push and not self._proven

    def before_sync(self) -> None:
        """The server's weights have memory again; what is in it is undefined where they were dropped."""
        if self.state is Occupancy.ASLEEP:
            release_cached()
            self._on_main(lambda client: client.wake_up(["weights"]))
            self.state = Occupancy.WEIGHTS

    def pushed(self) -> None:
        """A sync has brought the weights."""
        self.needs_push = False

    def verified(self) -> None:
        """The probe of a sync into dropped memory agreed; later ones need none because of that."""
        self._proven = True

    def before_sampling(self) -> None:
        """The server can answer. The trainer gives up what it does not need meanwhile.

        Raises:
            WeightSyncError: The weights were dropped and not pushed since.
        """
        if self.state is not Occupancy.AWAKE and self.needs_push:
            raise WeightSyncError(
                "The policy server's weights were dropped when it was put to sleep and have not been sent since; "
                "this is an error in trl-gym, not in the configuration."
            )
        self.make_room()
        if self.state is Occupancy.AWAKE:
            return
        tags = ["kv_cache"] if self.state is Occupancy.WEIGHTS else []  # none: everything that sleeps
        self._accelerator.wait_for_everyone()  # has given up its memory
        self._on_main(lambda client: client.wake_up(tags))
        self.state = Occupancy.AWAKE

    def after_sampling(self, *, again: bool = False) -> None:
        """The device belongs to the trainer.

        Args:
            again: Whether the same weights are sampled from again (evaluation, saving a checkpoint): they are kept on
                the host then.
        """
        if self.state is not Occupancy.ASLEEP:
            level = DROP if self._drops_weights and not again else KEEP
            self._on_main(lambda client: client.sleep(level))
            self.state = Occupancy.ASLEEP
            self.needs_push = self.needs_push or level == DROP
        if self.optimizer is not None:
            self.optimizer.restore()

    def make_room(self) -> None:
        """Give up the trainer's memory on this rank, also for a server that is about to be started again."""
        if self.optimizer is not None:
            self.optimizer.offload()
        release_cached()

    def reset(self) -> None:
        """Another server is there, awake, with the weights that it was started with."""
        self.state = Occupancy.AWAKE
        self.needs_push = True

    def _on_main(self, work: Callable[[PolicyClient], None]) -> None:
        on_main(self._accelerator, lambda: work(self._server.client))


def may_drop_weights(transport: WeightTransport, only_trainable: bool) -> bool:
    """Whether every sync by this transport brings every weight, so that a sleeping server need not keep any."""
    return transport.replaces and not (only_trainable and transport.sends_part)
