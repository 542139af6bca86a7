"""The weights of a run's policy server: pushed, kept in memory on shared devices, sent again after a restart.

push       one weight sync; a server that is lost meanwhile is recovered and gets everything again
recover    the server is restarted or waited for, and holds none of our weights afterwards
sampling   where the server shares the trainer's GPUs, or its model, it wakes before rollouts and sleeps after them;
           one that is lost in between is recovered
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from trl_gym.errors import PolicyServerError, PolicyServerLostError, WeightMismatchError, WeightSyncError
from trl_gym.memory.offload import OptimizerOffload, check_offload
from trl_gym.memory.sharing import DeviceSharing
from trl_gym.ranks import agreed
from trl_gym.weight_sync.source import check_supported
from trl_gym.weight_sync.sync import SyncOptions, SyncReport, WeightSync
from trl_gym.weight_sync.transports.plan import TransportPlan, plan_transport

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trl_gym.config import GymGRPOConfig
    from trl_gym.run.servers import RunServers
    from trl_gym.weight_sync.protocol import WeightTransport

logger = logging.getLogger(__name__)

_QUANTIZED_TOLERANCE = 0.5  # nats; random tokens showed 0.17 with nf4 on one side only


class PolicyWeights:
    """The policy server's weights. Every rank has one and calls its methods in step.

    Args:
        model: The trainer's model, wrapped.

    Attributes:
        transport_name: Name of the transport in use, as in `gym_weight_transport`.
        num_recoveries: How often the server was lost and came back.

    Raises:
        ConfigError: No transport fits, or the optimizer's state cannot be moved as was asked.
    """

    def __init__(
        self, args: GymGRPOConfig, accelerator: Accelerator, servers: RunServers, model: torch.nn.Module
    ) -> None:
        self._servers = servers
        self._accelerator = accelerator
        self._offloads = args.gym_offload_optimizer
        plan = _plan(args, accelerator, model, shares_weights=servers.own is not None)
        transport = plan.connect(servers.policy)
        self.transport_name = transport.name
        self.num_recoveries = 0
        self._sharing = self._new_sharing(args, transport)
        options = SyncOptions(
            dtype=getattr(torch, args.serving_dtype),
            # Nothing that is trained is in flight where the engine is in this process; what is need not be waited for.
            pause_mode=args.gym_pause_mode if servers.own is None else "keep",
            only_trainable=args.gym_sync_only_trainable,
            timeout_s=args.gym_sync_timeout,
            hang_timeout_s=args.gym_server_hang_timeout,
            verify_every=args.gym_verify_sync_steps,
            probe_tolerance=_probe_tolerance(args, plan),
        )
        self._sync = WeightSync(accelerator, servers.policy, transport, options, self._sharing)

    def push(self, model: torch.nn.Module, step: int) -> SyncReport:
        """Send the weights, and again after a lost server was recovered.

        Args:
            model: The trainer's model, wrapped.
            step: Optimizer steps in it.

        Raises:
            PolicyServerError, WeightSyncError: Another try would not help.
        """
        while True:
            try:
                with self._servers.resting():
                    return self._sync.push(model, step)
            except WeightMismatchError:
                raise
            except (PolicyServerError, WeightSyncError) as error:
                self.recover(error)

    def recover(self, error: Exception) -> None:
        """Get the policy server back, which holds none of our weights then. Raises `Exception`: `error`, where another
        server would not help, or what went wrong with that."""
        if self._sharing is not None:
            with agreed(self._accelerator):
                self._sharing.make_room()  # a server that starts needs its memory
        self._servers.recover(error)
        self._sync.disconnect()
        self.num_recoveries += 1
        if self._sharing is not None:
            self._sharing.reset()

    @contextmanager
    def sampling(self, push: Callable[[], None], *, again: bool) -> Iterator[None]:
        """Keep the server awake while rollouts run.

        Args:
            push: Sends the current weights; called when the server has dropped its own.
            again: Whether the same weights will be sampled from again.
        """
        if self._sharing is None:
            with self._servers.sampling():
                yield
            return
        while True:
            if self._sharing.needs_push:
                push()
            try:
                self._sharing.before_sampling()
                break
            except PolicyServerLostError as error:
                self.recover(error)
        yield  # after an exception the run ends: the server is left as it is
        try:
            self._sharing.after_sampling(again=again)
        except PolicyServerLostError as error:
            self.recover(error)
            self._sharing.after_sampling(again=again)

    def before_saving(self) -> None:
        """Bring the optimizer's state back to the device, which a checkpoint needs."""
        if self._sharing is not None:
            self._sharing.after_sampling(again=True)

    def take_optimizer(self, optimizer: Any) -> None:
        """Move this optimizer's state to the host during rollouts, if asked; it exists only when training begins."""
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
        return DeviceSharing(
            self._accelerator,
            self._servers.policy,
            timeout_s=args.gym_sync_timeout,
            drops_weights=transport.replaces and not args.gym_sync_only_trainable,
        )


def check_model(
    args: GymGRPOConfig, accelerator: Accelerator, model: torch.nn.Module, *, shares_weights: bool = False
) -> None:
    """Refuse a model whose weights cannot be sent, before anything is sampled. Local.

    Args:
        model: The trainer's model, wrapped.
        shares_weights: Whether the engine computes with the trainer's own weights.

    Raises:
        ConfigError: See `plan_transport` and `check_supported`.
    """
    if not shares_weights:
        check_supported(model, accelerator, sends_adapter=_plan(args, accelerator, model).sends_adapter)
    if (share := _dropout(model)) > 0 and accelerator.is_main_process:
        logger.warning(
            "The model is trained with dropout of up to %g and sampled from without: log-probabilities of training "
            "differ from those of what was sampled, by as much as `logprob_gap` says. Set `lora_dropout` to 0, "
            "`disable_dropout` to true, or `attention_dropout` of the model's config to 0.",
            share,
        )


def _dropout(model: torch.nn.Module) -> float:
    """Return the greatest share that a layer leaves out in training."""
    layers = (
        one.p if isinstance(one, torch.nn.Dropout) else getattr(one, "attention_dropout", 0) for one in model.modules()
    )
    return max((float(share) for share in layers if isinstance(share, int | float)), default=0.0)


def _plan(
    args: GymGRPOConfig, accelerator: Accelerator, model: torch.nn.Module, *, shares_weights: bool = False
) -> TransportPlan:
    on_cuda = accelerator.device.type == "cuda"
    return plan_transport(args, accelerator.unwrap_model(model), on_cuda=on_cuda, shares_weights=shares_weights)


def _probe_tolerance(args: GymGRPOConfig, plan: TransportPlan) -> float:
    """Trainer and server compute with different weights where the base is quantized on the trainer's side only."""
    if args.gym_probe_tolerance is not None or plan.quantized is None:
        return args.probe_tolerance
    logger.warning(
        "the base model is quantized for training, and the policy server may serve it unquantized: probes of the "
        "weight sync allow a gap of %g nats; set `gym_probe_tolerance` for another bound",
        _QUANTIZED_TOLERANCE,
    )
    return _QUANTIZED_TOLERANCE
