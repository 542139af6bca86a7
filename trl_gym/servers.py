"""The two servers of a run, started on rank 0 and known to every rank.

    rank 0     start() ── both spawn and load side by side ── wait_ready() ── broadcast addresses
    others                                                     wait_ready() ── attach to them

Who starts a server stops it: one that was passed in running is borrowed and runs on, one that was passed in unstarted
is started, and stopped, here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from trl_gym import compat
from trl_gym.config import GymGRPOConfig
from trl_gym.errors import ConfigError, ServerError, TrlGymError
from trl_gym.gym.servers import GymServers
from trl_gym.policy_server.server import PolicyBackend, PolicyServer
from trl_gym.policy_server.splice_probe import check_splice
from trl_gym.rollouts.replay import check_replay

_INITIAL_POLICY = "initial_policy"  # folder for a model that was given as an object without a folder of its own


class RunServers:
    """Policy server and NeMo Gym of one trainer.

    Args:
        args: The trainer's configuration.
        servable: Makes the folder or hub id that the policy server loads; called on rank 0 when one is started.
        policy: A policy server to borrow.
        gym: A NeMo Gym to borrow.

    Raises:
        ConfigError: There is no way to get one of the two.
    """

    def __init__(
        self,
        args: GymGRPOConfig,
        servable: Callable[[], str],
        policy: PolicyBackend | None = None,
        gym: GymServers | None = None,
    ) -> None:
        self._args = args
        self._servable = servable
        self._owns_policy = policy is None or policy.state == "new"
        self._owns_gym = gym is None or gym.state.value == "new"
        self._is_main = PartialState().is_main_process
        self._splice_checked = False
        _check_sources(args, policy, gym)
        self.policy: PolicyBackend | None = policy
        self.gym: GymServers | None = gym

    def start(self) -> None:
        """Spawn on rank 0; returns before they are ready."""
        if not self._is_main:
            return
        if self.policy is None:
            self.policy = self._new_policy()
        if self.policy.state == "new":
            compat.check_versions(("vllm",))
            self.policy.start()
        elif self.policy.state == "ready":  # refused before a model is loaded for nothing
            check_splice(self.policy.client, self.policy.model_name)
            self._splice_checked = True
        if self.gym is None:
            self.gym = self._new_gym()
        self.gym.connect_policy(self.policy.base_url, self.policy.model_name, self.policy.client.api_key or "EMPTY")
        if self.gym.state.value == "new":
            self.gym.start()

    def wait_ready(self, broadcast: Callable[[list[Any]], Any]) -> None:
        """Wait on rank 0, then tell every rank where they are.

        Args:
            broadcast: Sends a list's items from rank 0 to all ranks, in place (accelerate's `broadcast_object_list`).

        Raises:
            ServerError: On every rank, when rank 0 could not get them.
        """
        message: list[Any] = [None]
        error: TrlGymError | None = None
        if self._is_main:
            try:
                self.gym.wait_ready()
                self.policy.wait_ready()
                if not self._splice_checked:
                    check_splice(self.policy.client, self.policy.model_name)
                message[0] = (self.policy.base_url, self.policy.client.api_key, self.gym.head_url)
            except TrlGymError as caught:
                error = caught  # told to the other ranks first: they would wait for the broadcast for ever
        broadcast(message)
        if error is not None:
            raise error
        if message[0] is None:
            raise ServerError("The servers could not be started; rank 0 says why.")
        if not self._is_main:
            base_url, api_key, head_url = message[0]
            self.policy = PolicyServer.attach(base_url, api_key=api_key).wait_ready()
            self.gym = GymServers.attach(head_url).wait_ready()

    def check(self) -> None:
        """Raise when the policy server, or the whole Gym that we started, has died. A single environment that is down
        is for the collector: it may be skipped."""
        self.policy.check()
        self.gym.check_process()

    def server_config(self) -> dict[str, Any]:
        """The policy server's resolved configuration."""
        return self.policy.client.server_config()

    def stop(self) -> None:
        """Stop what was started here. Idempotent."""
        try:
            if self._owns_gym and self.gym is not None:
                self.gym.stop()
        finally:
            if self._owns_policy and self.policy is not None:
                self.policy.stop()

    def _new_policy(self) -> PolicyServer:
        args = self._args
        if args.vllm_mode == "server":
            return PolicyServer.attach(args.vllm_server_base_url, timeout_s=args.vllm_server_timeout)
        return PolicyServer(
            self._servable(),
            vllm_args=_vllm_args(args),
            log_dir=args.gym_log_dir,
            start_timeout_s=args.gym_server_start_timeout,
        )

    def _new_gym(self) -> GymServers:
        args = self._args
        if args.gym_mode == "attach":
            return GymServers.attach(args.gym_head_url, timeout_s=args.gym_start_timeout)
        return GymServers(
            args.gym_config_paths,
            mode=args.gym_mode,
            python=args.gym_python,
            overrides=args.gym_overrides or {},
            log_dir=args.gym_log_dir,
            start_timeout_s=args.gym_start_timeout,
        )


class NoServers:
    """In the place of `RunServers` where nothing is sampled: training from a journal."""

    policy: PolicyBackend | None = None
    gym: GymServers | None = None

    def start(self) -> None:
        """Nothing to start."""

    def wait_ready(self, broadcast: Callable[[list[Any]], Any]) -> None:
        """Nothing to wait for."""

    def check(self) -> None:
        """Nothing that could have died."""

    def server_config(self) -> dict[str, Any]:
        """What TRL asks for: recorded log-probabilities are those of the distribution that was drawn from."""
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def stop(self) -> None:
        """Nothing to stop."""


def servers_for(
    args: GymGRPOConfig,
    model: str | PreTrainedModel,
    processing_class: Any,
    policy: PolicyBackend | None,
    gym: GymServers | None,
) -> RunServers | NoServers:
    """What a run needs: two servers, or none when it trains from a journal. For the arguments see `RunServers`."""
    if args.gym_replay is not None:
        check_replay(args, has_servers=policy is not None or gym is not None)
        return NoServers()
    return RunServers(args, lambda: servable(model, processing_class, args), policy, gym)


def servable(model: str | PreTrainedModel, processing_class: Any, args: GymGRPOConfig) -> str:
    """Folder or hub id that the policy server loads. The trainer's weights are pushed before anything is sampled, so
    it only has to be the same architecture and tokenizer; a model without a folder is saved to one."""
    name = model if isinstance(model, str) else compat.model_id(model)
    if name and (processing_class is None or isinstance(model, str)):
        return name
    if processing_class is None:
        raise ConfigError(
            "`model` was not loaded from a folder or hub id, so the policy server needs a tokenizer: pass "
            "`processing_class`."
        )
    folder = Path(args.output_dir) / _INITIAL_POLICY
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.save_pretrained(folder)
    processing_class.save_pretrained(folder)
    return str(folder)


def _check_sources(args: GymGRPOConfig, policy: PolicyBackend | None, gym: GymServers | None) -> None:
    if gym is None and args.gym_mode != "attach" and not args.gym_config_paths:
        raise ConfigError(
            "No NeMo Gym: set `gym_config_paths` to start one, `gym_head_url` to attach to a running one, or pass "
            "`gym_servers`."
        )
    if policy is None and args.vllm_mode == "server" and args.vllm_server_base_url is None:
        raise ConfigError(
            "`vllm_mode` is 'server' and `vllm_server_base_url` is not set: name the running server (start one with "
            "`trl-gym serve MODEL`), or pass `policy_server`."
        )


def _vllm_args(args: GymGRPOConfig) -> dict[str, Any]:
    """Flags of the server that we start: what TRL's options say, then what `gym_vllm_args` says."""
    flags: dict[str, Any] = {"dtype": args.serving_dtype}
    if args.vllm_max_model_length is not None:
        flags["max-model-len"] = args.vllm_max_model_length
    if torch.cuda.is_available():
        flags["gpu-memory-utilization"] = args.vllm_gpu_memory_utilization
        flags["tensor-parallel-size"] = args.vllm_tensor_parallel_size
    else:
        flags["enforce-eager"] = True  # compiling for a CPU takes longer than it saves
    if args.trust_remote_code:
        flags["trust-remote-code"] = True
    return flags | {flag.lstrip("-").replace("_", "-"): value for flag, value in (args.gym_vllm_args or {}).items()}
