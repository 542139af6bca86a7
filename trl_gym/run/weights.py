"""What keeps a policy server able to sample: current weights, memory on shared devices, and a new life when it dies.

push        ── weights; a server that dies meanwhile is revived and gets everything anew
revive      ── restarted or waited for, and known to hold none of our weights
sampling    ── the server wakes before, and sleeps after, where it shares the trainer's GPUs
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

from trl_gym.errors import PolicyServerError, WeightMismatchError, WeightSyncError
from trl_gym.memory.offload import OptimizerOffload, check_offload
from trl_gym.memory.sharing import DeviceSharing, may_drop_weights
from trl_gym.weight_sync.sync import SyncOptions, SyncReport, WeightSync
from trl_gym.weight_sync.transports import TransportOptions, choose_transport
from trl_gym.weight_sync.transports.adapter import adapter_options
from trl_gym.weight_sync.transports.plan import merged_problem

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trl_gym.config import GymGRPOConfig
    from trl_gym.run.servers import RunServers
    from trl_gym.weight_sync.transports import WeightTransport

logger = logging.getLogger(__name__)

_QUANTIZED_TOLERANCE = 0.5  # nats; random tokens showed 0.17 with nf4 on one side only


class PolicySupply:
    """Every rank has one and calls its methods in step.

    Args:
        args: The trainer's configuration.
        accelerator: The trainer's.
        servers: The run's, ready.
        model: The trainer's, wrapped.

    Attributes:
        transport_name: How weights travel, as in `gym_weight_transport`.

    Raises:
        ConfigError: No transport fits, or the optimizer's state cannot be moved as was asked.
    """

    def __init__(
        self, args: GymGRPOConfig, accelerator: Accelerator, servers: RunServers, model: torch.nn.Module
    ) -> None:
        self._servers = servers
        self._accelerator = accelerator
        self._offloads = args.gym_offload_optimizer
        transport = _transport(args, accelerator, servers, model)
        self.transport_name = transport.name
        self._sharing = self._new_sharing(args, transport)
        options = SyncOptions(
            dtype=getattr(torch, args.serving_dtype),
            pause_mode=args.gym_pause_mode,
            only_trainable=args.gym_sync_only_trainable,
            timeout_s=args.gym_sync_timeout,
            verify_every=args.gym_verify_sync_steps,
            probe_tolerance=_probe_tolerance(args, accelerator.unwrap_model(model)),
        )
        self._sync = WeightSync(accelerator, servers.policy, transport, options, self._sharing)

    def push(self, model: torch.nn.Module, step: int) -> SyncReport:
        """One weight sync, as often as it takes.

        Args:
            model: The trainer's, wrapped.
            step: Optimizer steps in it.

        Raises:
            PolicyServerError, WeightSyncError: It is not worth trying again.
        """
        while True:
            try:
                return self._sync.push(model, step)
            except WeightMismatchError:
                raise
            except (PolicyServerError, WeightSyncError) as error:
                self.revive(error)

    def revive(self, error: Exception) -> None:
        """Bring the policy server back; it has none of our weights then.

        Raises:
            Exception: `error`, where nothing is gained by another server, or what went wrong with that.
        """
        if self._sharing is not None:
            self._sharing.make_room()  # a server that starts needs its memory free
        self._servers.revive(error, broadcast_object_list)
        self._sync.disconnect()
        if self._sharing is not None:
            self._sharing.reset()

    @contextmanager
    def sampling(self, push: Callable[[], None], *, again: bool) -> Iterator[None]:
        """Around rollouts.

        Args:
            push: Sends the current weights; called when the server has dropped its own.
            again: Whether the same weights will be sampled from again.
        """
        if self._sharing is None:
            yield
            return
        if self._sharing.needs_push:
            push()
        self._sharing.before_sampling()
        yield  # after an exception the run ends: the server is left as it is
        self._sharing.after_sampling(again=again)

    def before_saving(self) -> None:
        """A checkpoint needs the optimizer's state on the device."""
        if self._sharing is not None:
            self._sharing.after_sampling(again=True)

    def take_optimizer(self, optimizer: Any) -> None:
        """The trainer's optimizer exists from here on."""
        if self._sharing is not None and self._offloads:
            self._sharing.optimizer = OptimizerOffload(optimizer, self._accelerator.device)

    def _new_sharing(self, args: GymGRPOConfig, transport: WeightTransport) -> DeviceSharing | None:
        if not args.vllm_enable_sleep_mode:
            return None
        if self._accelerator.device.type != "cuda":
            logger.warning("`vllm_enable_sleep_mode` has no effect: vLLM's servers sleep on GPUs only.")
            return None
        if self._offloads:
            check_offload(self._accelerator, str(args.optim))
        drops = may_drop_weights(transport, args.gym_sync_only_trainable)
        return DeviceSharing(self._accelerator, self._servers.policy, drops_weights=drops)


def _probe_tolerance(args: GymGRPOConfig, model: torch.nn.Module) -> float:
    """Trainer and server compute with different weights where the base is quantized on the trainer's side only."""
    if args.gym_probe_tolerance is not None or merged_problem(model) is None:
        return args.probe_tolerance
    logger.warning(
        "the base model is quantized for training, and the policy server may serve it unquantized: probes of the "
        "weight sync allow a gap of %g nats; set `gym_probe_tolerance` for another bound",
        _QUANTIZED_TOLERANCE,
    )
    return _QUANTIZED_TOLERANCE


def _transport(
    args: GymGRPOConfig, accelerator: Accelerator, servers: RunServers, model: torch.nn.Module
) -> WeightTransport:
    policy = servers.policy
    options = TransportOptions(
        wanted=args.gym_weight_transport,
        folder=args.gym_weight_dir,
        buffer_mb=args.gym_weight_buffer_mb,
        on_cuda=accelerator.device.type == "cuda",
        **adapter_options(args, accelerator.unwrap_model(model), policy),
    )
    return choose_transport(policy, options)
