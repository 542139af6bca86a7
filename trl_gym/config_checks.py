"""What can be wrong with a `GymGRPOConfig`: one list, each entry naming the option, the value and the remedy."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gym.rollouts.request import Sampling

if TYPE_CHECKING:
    from trl_gym.config import GymGRPOConfig

GYM_MODES = ("host", "upstream", "attach")
DRIFT_POLICIES = ("split", "truncate", "exclude", "error")
ON_ENVIRONMENT_DOWN = ("fail", "skip")
WEIGHT_TRANSPORTS = ("auto", "ipc", "nccl", "file", "adapter")
PAUSE_MODES = ("wait", "keep")
GPU_MEMORY = ("given", "auto")
_SECONDS = (
    "gym_start_timeout",
    "gym_server_start_timeout",
    "gym_server_reconnect_timeout",
    "gym_deadline",
    "gym_stall_timeout",
    "gym_sync_timeout",
)
_RETRIED_KINDS = ("infrastructure", "deadline", "environment", "policy")
_ENVIRONMENT_KEYS = ("deadline", "max_inflight", "retries", "launch_rate")
_SAMPLING_KEYS = tuple(parameter.name for parameter in fields(Sampling))
# Flags of the policy server that belong to us; each names the option that sets it, or why it cannot be set.
_OWNED_VLLM_FLAGS = {
    "host": "the managed server is reachable from this machine only",
    "port": "the operating system chooses it",
    "listen-fd": "it is how the port reaches the server",
    "served-model-name": "NeMo Gym is told the same name",
    "weight-transfer-config": "the weight transport is chosen from the placement",
    "logprobs-mode": "training needs `processed_logprobs`",
    "max-model-len": "set `vllm_max_model_length`",
    "gpu-memory-utilization": "set `vllm_gpu_memory_utilization`",
    "tensor-parallel-size": "set `vllm_tensor_parallel_size`",
}


def find_problems(config: GymGRPOConfig) -> list[str]:
    """Everything that is wrong with our own options, in the order of the options."""
    return [
        *_gym_problems(config),
        *_server_problems(config),
        *_number_problems(config),
        *_rollout_problems(config),
        *_sync_problems(config),
        *_ignored_options(config),
    ]


def _gym_problems(config: GymGRPOConfig) -> list[str]:
    problems = []
    if config.gym_mode not in GYM_MODES:
        problems.append(f"`gym_mode` is {config.gym_mode!r}; choose one of {', '.join(GYM_MODES)}.")
    if config.gym_mode == "attach" and config.gym_head_url is None:
        problems.append("`gym_mode` is 'attach' and `gym_head_url` is not set; name the head server of that Gym.")
    if config.gym_head_url is not None and config.gym_config_paths:
        problems.append(
            "`gym_head_url` attaches to a running Gym and `gym_config_paths` would start one; set only one."
        )
    if config.gym_overrides is not None and not isinstance(config.gym_overrides, dict):
        problems.append(f"`gym_overrides` must be a mapping or a JSON object, got {config.gym_overrides!r}.")
    if config.gym_drift not in DRIFT_POLICIES:
        problems.append(f"`gym_drift` is {config.gym_drift!r}; choose one of {', '.join(DRIFT_POLICIES)}.")
    return problems


def _server_problems(config: GymGRPOConfig) -> list[str]:
    problems = []
    if not config.use_vllm:
        problems.append("`use_vllm` is false; rollouts need a policy server, leave it at true.")
    if config.vllm_mode not in ("colocate", "server"):
        problems.append(f"`vllm_mode` is {config.vllm_mode!r}; choose 'colocate' or 'server'.")
    if config.vllm_mode == "colocate" and config.vllm_server_base_url is not None:
        problems.append(
            "`vllm_server_base_url` names a running server and `vllm_mode` is 'colocate', which starts one; "
            "set `vllm_mode` to 'server', or leave the URL out."
        )
    if config.gym_vllm_args is not None and not isinstance(config.gym_vllm_args, dict):
        problems.append(f"`gym_vllm_args` must be a mapping or a JSON object, got {config.gym_vllm_args!r}.")
    elif config.gym_vllm_args:
        if config.vllm_mode == "server":
            problems.append("`gym_vllm_args` has no effect with `vllm_mode` 'server': that server runs already.")
        for flag in config.gym_vllm_args:
            if (reason := _OWNED_VLLM_FLAGS.get(flag.lstrip("-").replace("_", "-"))) is not None:
                problems.append(f"`gym_vllm_args` must not set {flag!r}: {reason}.")
    if config.gym_weight_dir is not None and not Path(config.gym_weight_dir).is_dir():
        problems.append(f"`gym_weight_dir` is {config.gym_weight_dir!r}, which is not a folder; create it first.")
    return problems


def _number_problems(config: GymGRPOConfig) -> list[str]:
    problems = []
    for name in _SECONDS:
        value = getattr(config, name)
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            problems.append(f"`{name}` is {value!r}; it must be a number of seconds above 0.")
    if config.gym_max_inflight < 1:
        problems.append(f"`gym_max_inflight` is {config.gym_max_inflight}; it must be at least 1.")
    if config.gym_probe_tolerance is not None and not config.gym_probe_tolerance > 0:
        problems.append(f"`gym_probe_tolerance` is {config.gym_probe_tolerance}; it must be above 0 (nats).")
    length, context = config.max_completion_length, config.vllm_max_model_length
    if length is not None and context is not None and length >= context:
        problems.append(
            f"`max_completion_length` ({length}) leaves no room for a prompt in `vllm_max_model_length` ({context})."
        )
    if length is None:
        problems.append("`max_completion_length` must be set: it bounds the tokens of a rollout after its prompt.")
    return problems


def _rollout_problems(config: GymGRPOConfig) -> list[str]:
    problems = _retry_problems("gym_retries", config.gym_retries)
    if config.gym_launch_rate is not None and not config.gym_launch_rate > 0:
        problems.append(f"`gym_launch_rate` is {config.gym_launch_rate!r}; it must be above 0 (per second).")
    if config.gym_on_environment_down not in ON_ENVIRONMENT_DOWN:
        problems.append(
            f"`gym_on_environment_down` is {config.gym_on_environment_down!r}; choose one of "
            f"{', '.join(ON_ENVIRONMENT_DOWN)}."
        )
    if config.gym_min_group_size < 2:
        problems.append(f"`gym_min_group_size` is {config.gym_min_group_size}; a baseline needs at least 2.")
    if not 0 <= config.gym_min_valid_fraction <= 1:
        problems.append(f"`gym_min_valid_fraction` is {config.gym_min_valid_fraction}; it must be within 0 and 1.")
    if config.gym_replay is not None and not Path(config.gym_replay).is_dir():
        problems.append(f"`gym_replay` is {config.gym_replay!r}, which is not a folder.")
    if not config.gym_journal_max_mb > 0:
        problems.append(f"`gym_journal_max_mb` is {config.gym_journal_max_mb}; it must be above 0.")
    return problems + _eval_sampling_problems(config) + _environment_problems(config)


def _eval_sampling_problems(config: GymGRPOConfig) -> list[str]:
    sampling = config.gym_eval_sampling
    if sampling is None:
        return []
    if not isinstance(sampling, dict):
        return [f"`gym_eval_sampling` must be a mapping or a JSON object, got {sampling!r}."]
    return [
        f"`gym_eval_sampling` has the unknown key {name!r}; choose among {', '.join(_SAMPLING_KEYS)}."
        for name in sampling
        if name not in _SAMPLING_KEYS
    ]


def _environment_problems(config: GymGRPOConfig) -> list[str]:
    environments = config.gym_environments or {}
    if not isinstance(environments, dict) or not all(isinstance(own, dict) for own in environments.values()):
        return [f"`gym_environments` must map agent names to mappings, got {environments!r}."]
    problems = []
    for agent, own in environments.items():
        for name, value in own.items():
            where = f"gym_environments[{agent!r}][{name!r}]"
            if name not in _ENVIRONMENT_KEYS:
                problems.append(f"`{where}` is unknown; choose among {', '.join(_ENVIRONMENT_KEYS)}.")
            elif name == "retries":
                problems += _retry_problems(where, value)
            elif not isinstance(value, int | float) or not 0 < value < math.inf:
                problems.append(f"`{where}` is {value!r}; it must be a number above 0.")
    return problems


def _sync_problems(config: GymGRPOConfig) -> list[str]:
    problems = []
    for name, choices in (
        ("gym_weight_transport", WEIGHT_TRANSPORTS),
        ("gym_pause_mode", PAUSE_MODES),
        ("gym_gpu_memory", GPU_MEMORY),
    ):
        if getattr(config, name) not in choices:
            problems.append(f"`{name}` is {getattr(config, name)!r}; choose one of {', '.join(choices)}.")
    for name, least in (
        ("gym_verify_sync_steps", 0),
        ("gym_server_restarts", 0),
        ("gym_max_adapters", 2),
        ("gym_weight_buffer_mb", 1),
    ):
        if getattr(config, name) < least:
            problems.append(f"`{name}` is {getattr(config, name)}; it must be at least {least}.")
    for name in ("gym_server_start_timeout", "gym_server_reconnect_timeout"):
        value = getattr(config, name)
        if isinstance(value, int | float) and value >= config.ddp_timeout:
            problems.append(
                f"`{name}` is {value:g} and `ddp_timeout` {config.ddp_timeout}: the ranks that wait for the one which "
                "waits for the server would give up first; set `ddp_timeout` higher."
            )
    if config.vllm_enable_sleep_mode and (config.vllm_mode == "server" or config.gym_server_devices is not None):
        problems.append(
            "`vllm_enable_sleep_mode` makes trainer and server take turns on the same GPUs, and the server has its "
            "own (`vllm_mode` 'server' or `gym_server_devices`); leave it out."
        )
    if config.gym_offload_optimizer and not config.vllm_enable_sleep_mode:
        problems.append(
            "`gym_offload_optimizer` makes room for a server that sleeps during updates; set "
            "`vllm_enable_sleep_mode` too, or leave it out."
        )
    if config.gym_server_devices is not None and config.vllm_mode == "server":
        problems.append(
            "`gym_server_devices` places a server that we start and `vllm_mode` is 'server', where one runs already; "
            "set `vllm_mode` to 'colocate', or leave the devices out."
        )
    return problems


def _ignored_options(config: GymGRPOConfig) -> list[str]:
    """Options of TRL that the rollout path cannot honour: refused, because silence would be worse."""
    ignored = {
        "vllm_structured_outputs_regex": "NeMo Gym's agents make the requests",
        "generation_kwargs": "put server-wide settings into `gym_vllm_args`",
        "use_transformers_continuous_batching": "rollouts are served by vLLM",
    }
    return [
        f"`{name}` has no effect on Gym rollouts ({reason}); remove it."
        for name, reason in ignored.items()
        if getattr(config, name)
    ]


def _retry_problems(where: str, retries: Any) -> list[str]:
    if not isinstance(retries, dict):
        return [f"`{where}` must be a number or a mapping from failure kinds to numbers, got {retries!r}."]
    problems = [
        f"`{where}` has the unknown failure kind {kind!r}; choose among {', '.join(_RETRIED_KINDS)}."
        for kind in retries
        if kind not in _RETRIED_KINDS
    ]
    return problems + [
        f"`{where}` has {number!r} for {kind!r}; it must be an integer of at least 0."
        for kind, number in retries.items()
        if not isinstance(number, int) or number < 0
    ]
