"""One device, used in turns: by the policy server while rollouts run, by the trainer while it updates the weights.

    AWAKE ──after_sampling──► ASLEEP ──before_sync──► WEIGHTS ──before_sampling──► AWAKE
                                 └───────── before_sampling (weights were kept) ─────┘

Server: vLLM's sleep mode. Level 1 keeps the weights in host memory, level 2 drops them: then they must be pushed
before anything is sampled (`needs_push`). The KV cache is dropped either way. Trainer: before the server takes memory
again, every rank gives back what torch keeps for later and, if asked, moves the optimizer's state to the host.

How vLLM 0.30 and 0.31 behave (read; the answers of the calls checked on a CPU server, where workers ignore them):
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
from trl_gym.ranks import on_all, on_main

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trl_gym.policy_server.client import PolicyClient
    from trl_gym.policy_server.server import PolicyBackend

KEEP, DROP = 1, 2  # vLLM's sleep levels


class Occupancy(StrEnum):
    """The part of the server that is in device memory."""

    AWAKE = "awake"
    ASLEEP = "asleep"
    WEIGHTS = "weights"


class DeviceSharing:
    """Every rank has one and calls its methods in step; the server is asked on rank 0. All are idempotent.

    Args:
        server: The policy server on the same devices; its client is used on rank 0 only.
        timeout_s: For each call: a first sleep copies all weights to the host (`gym_sync_timeout`).
        drops_weights: Whether the server's weights may be dropped, because a sync brings all of them.
        optimizer: Moved to the host while the server is awake; None leaves it. It may be set later.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        server: PolicyBackend,
        *,
        timeout_s: float,
        drops_weights: bool,
        optimizer: OptimizerOffload | None = None,
    ) -> None:
        self.state = Occupancy.AWAKE
        self.needs_push = False
        self.optimizer = optimizer
        self._accelerator = accelerator
        self._server = server
        self._timeout_s = timeout_s
        self._drops_weights = drops_weights
        self._proven = False

    @property
    def needs_probe(self) -> bool:
        """True before the first sync into memory that was dropped, which must be verified: what a model keeps beside
        its parameters and buffers does not survive that."""
        return self.needs_push and not self._proven

    def before_sync(self) -> None:
        """Give the server's weights memory again; its content is undefined where they were dropped."""
        if self.state is Occupancy.ASLEEP:
            self.make_room()
            self._on_main(lambda client: client.wake_up(["weights"]))
            self.state = Occupancy.WEIGHTS

    def pushed(self) -> None:
        """Note that a sync has brought the weights."""
        self.needs_push = False

    def verified(self) -> None:
        """Note that the probe of a sync into dropped memory agreed; later syncs need none because of that."""
        self._proven = True

    def before_sampling(self) -> None:
        """Wake the server, after the trainer has given up what it does not need meanwhile. Raises `WeightSyncError`:
        the weights were dropped and not pushed since."""
        if self.state is not Occupancy.AWAKE and self.needs_push:
            raise WeightSyncError(
                "The policy server's weights were dropped when it was put to sleep and have not been sent since.",
                "Report this: it is an error in trl-gym, not in the configuration.",
            )
        self.make_room()
        if self.state is Occupancy.AWAKE:
            return
        tags = ["kv_cache"] if self.state is Occupancy.WEIGHTS else []  # none: everything that sleeps
        self._on_main(lambda client: client.wake_up(tags))
        self.state = Occupancy.AWAKE

    def after_sampling(self, *, again: bool = False) -> None:
        """Hand the device to the trainer.

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
        """Give up the trainer's memory on all ranks, also for a server that is about to be restarted. Returns when
        every rank has: a server that spans several GPUs takes memory on all of them at once. Raises `ConfigError`: the
        optimizer's state cannot be moved (on every rank, when it fails on one)."""
        on_all(self._accelerator, self._give_up_memory)

    def reset(self) -> None:
        """Note that another server is there: awake, with the weights that it was started with."""
        self.state = Occupancy.AWAKE
        self.needs_push = True

    def _give_up_memory(self) -> None:
        if self.optimizer is not None:
            self.optimizer.offload()
        release_cached()

    def _on_main(self, work: Callable[[PolicyClient], None]) -> None:
        on_main(self._accelerator, lambda: work(self._server.client.patient(self._timeout_s)))
