"""The engines that a run can sample with, which of them a configuration means, and what they lack.

    vllm            `vllm serve` with our middleware, in processes of its own
    transformers    continuous batching in the trainer's own process, over the very weights that are trained
    sglang          SGLang's server behind our gateway

`gym_engine` names the one that is started (`vllm_mode: colocate`). A server that runs already (`vllm_mode: server`)
is asked what it is. What an engine lacks is refused with the other problems of a configuration where it is named, and
when it is about to be started where "auto" has chosen it: until then nobody knows whether one will be.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trl_gym.compat import engine_problem
from trl_gym.errors import ConfigError, Problem

if TYPE_CHECKING:
    from trl_gym.config import GymGRPOConfig

NAMES = ("vllm", "transformers", "sglang")

# Options that have no effect, or cannot have any, on an engine in the trainer's own process: their values that are
# fine, and why no other one is.
_NOT_IN_PROCESS: dict[str, tuple[Any, str]] = {
    "gym_max_staleness": (0, "it samples with the weights that are trained, and rests while they are"),
    "gym_pause_mode": ("wait", "no call is in flight when weights change"),
    "gym_server_devices": (None, "it computes where the trainer does"),
    "gym_vllm_args": (None, "they are flags of `vllm serve`"),
    "gym_gpu_memory": ("given", "the planner computes the share of a server of its own"),
    "vllm_enable_sleep_mode": (False, "its cache is freed after every batch of rollouts as it is"),
    "vllm_gpu_memory_utilization": (0.3, "its cache takes what the trainer leaves"),
    "vllm_tensor_parallel_size": (1, "each process serves the whole model"),
    "gym_sync_only_trainable": (False, "no weights are sent"),
}
_TRANSPORTS = ("auto", "shared")
_SAMPLING = {"min_p": 0.0, "repetition_penalty": 1.0}  # what it lacks, and the values that change nothing


def vllm_is_installed() -> bool:
    """Return whether vLLM can be imported, without importing it."""
    return importlib.util.find_spec("vllm") is not None


def started_engine(config: GymGRPOConfig) -> str:
    """Return the engine that this configuration starts: the one that it names, else vLLM where that is installed."""
    if config.gym_engine != "auto":
        return config.gym_engine
    return "vllm" if vllm_is_installed() else "transformers"


def describe_choice(config: GymGRPOConfig) -> str | None:
    """Say what "auto" stands for where it is not vLLM; None elsewhere."""
    if config.gym_engine != "auto" or vllm_is_installed():
        return None
    return (
        "`gym_engine` is transformers, since vLLM is not installed: rollouts are sampled in this process, with the "
        "weights that are trained"
    )


def named_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    """List what contradicts the engine that a configuration names, or "auto" stands for where an option needs it."""
    if config.gym_engine == "transformers" and config.vllm_mode == "colocate":
        yield from in_process_problems(config)
    elif config.gym_weight_transport == "shared" and config.gym_engine != "auto":
        yield Problem(
            f"`gym_weight_transport` is 'shared' and `gym_engine` {config.gym_engine!r}: only an engine in the "
            "trainer's own process computes with its weights.",
            "Set `gym_engine` to 'transformers' and `vllm_mode` to 'colocate', or leave the transport at 'auto'.",
        )
    if config.gym_response_template is not None and (
        config.vllm_mode != "colocate" or started_engine(config) != "transformers"
    ):
        yield Problem(
            f"`gym_response_template` is {config.gym_response_template!r}, and no policy server of the transformers "
            "engine is started.",
            "Set `gym_engine` to 'transformers', or leave it out: `gym_vllm_args` names the parsers of vLLM, and "
            "`trl-gym serve --engine transformers --response-template` the template of a server elsewhere.",
        )


def require_fit(config: GymGRPOConfig) -> None:
    """Refuse to start the engine "transformers" for a configuration that it lacks something for. Raises `ConfigError`:
    lists all of it."""
    problems = [*in_process_problems(config)]
    if problems:
        raise ConfigError("The engine 'transformers' cannot be started for this configuration:", problems=problems)


def in_process_problems(config: GymGRPOConfig, environment: Mapping[str, str] = os.environ) -> Iterator[Problem]:
    """List what an engine in the trainer's own process lacks for a configuration.

    Args:
        environment: Variables by which launchers say how the model is sharded.
    """
    if (problem := engine_problem()) is not None:
        yield problem
    engine = _told(config)
    remedy = "or set `gym_engine` to 'vllm'."
    for name, (neutral, reason) in _NOT_IN_PROCESS.items():
        if (value := getattr(config, name)) not in (neutral, {}):
            yield Problem(
                f"`{name}` is {value!r} and has no use with {engine}: {reason}.", f"Leave `{name}` out, {remedy}"
            )
    if config.gym_weight_transport not in _TRANSPORTS:
        yield Problem(
            f"`gym_weight_transport` is {config.gym_weight_transport!r} and {engine}: it computes with the trainer's "
            "own weights, and none are sent.",
            f"Leave `gym_weight_transport` at 'auto', {remedy}",
        )
    given = config.gym_eval_sampling if isinstance(config.gym_eval_sampling, dict) else {}
    for name, unchanged in _SAMPLING.items():
        for option, value in ((name, getattr(config, name)), (f"gym_eval_sampling[{name!r}]", given.get(name))):
            if value not in (None, unchanged):
                yield Problem(
                    f"`{option}` is {value!r} and {engine}: transformers' continuous batching does not have it.",
                    f"Leave `{option}` out, {remedy}",
                )
    for what in _shards(config, environment):
        yield Problem(
            f"{what} and {engine}: each process samples with the whole model, which it has alone or with DDP only.",
            f"Train with one process or with DDP, {remedy}",
        )


def _told(config: GymGRPOConfig) -> str:
    return "`gym_engine` 'transformers'" + (" (vLLM is not installed)" if config.gym_engine == "auto" else "")


def _shards(config: GymGRPOConfig, environment: Mapping[str, str]) -> Iterator[str]:
    """Name what spreads the model over processes, as far as options and launchers tell."""
    if config.fsdp or environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        yield "FSDP is set"
    if config.deepspeed or environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        yield "DeepSpeed is set"
    if config.parallelism_config is not None or (config.model_init_kwargs or {}).get("tp_plan") is not None:
        yield "Tensor parallelism is set"
