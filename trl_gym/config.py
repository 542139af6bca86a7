"""Every option of trl-gym on top of TRL's `GRPOConfig`, for Python, YAML and the command line; and their checks.

`GymGRPOConfig.__post_init__` reports everything that is wrong in one `ConfigError`, one `Problem` per option.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from trl_gym import compat
from trl_gym.errors import ConfigError, Problem
from trl_gym.rollout_options import (
    DEFAULT_RETRIES,
    SAMPLING_KEYS,
    RolloutOptions,
    Sampling,
    by_kind,
    number_problems,
)

# Flags of the policy server that belong to us; each names the option that sets it, or why it cannot be set.
OWNED_VLLM_FLAGS = {
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
# Values of `loss_type` with a mean over each row's tokens. The rows of a rollout weigh by their tokens there, which a
# single `beta` for all of them cannot express.
TOKEN_MEAN_LOSSES = ("grpo", "sapo")
_JSON_OPTIONS = ("gym_overrides", "gym_vllm_args", "gym_retries", "gym_environments", "gym_eval_sampling")
_SECONDS = (
    "gym_start_timeout",
    "gym_server_start_timeout",
    "gym_server_reconnect_timeout",
    "gym_stall_timeout",
    "gym_sync_timeout",
)
_AT_LEAST = {
    "gym_min_group_size": 2,  # a group of one has no baseline
    "gym_verify_sync_steps": 0,
    "gym_server_restarts": 0,
    "gym_max_adapters": 2,  # one is loaded while the other is used
    "gym_weight_buffer_mb": 1,
}
# Options of TRL that the rollout path cannot honour are refused: silence would be worse.
_NOT_HONOURED = {
    "vllm_structured_outputs_regex": "NeMo Gym's agents make the requests",
    "generation_kwargs": "server-wide settings belong into `gym_vllm_args`",
    "use_transformers_continuous_batching": "rollouts are served by vLLM",
}


@dataclass
class GymGRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`GymGRPOTrainer`].

    It has every option of [`~trl.GRPOConfig`]; those that mean something special here are `vllm_mode` (`"colocate"`:
    we start the policy server on the training devices; `"server"`: nothing is started, `vllm_server_base_url` names a
    running one), `vllm_max_model_length`, `vllm_gpu_memory_utilization` and `vllm_tensor_parallel_size` (passed to the
    server that we start).

    Parameters:
        > Parameters that control NeMo Gym

        gym_config_paths (`list[str]`, *optional*, defaults to `[]`):
            NeMo Gym configs, resolved as Gym does: absolute, relative to the working directory, or inside the
            installed `nemo-gym`.
        gym_mode (`str`, *optional*, defaults to `"host"`):
            `"host"`: all servers of the configs in one child process. `"upstream"`: Gym's own launcher, supervised.
            `"attach"`: a running Gym at `gym_head_url`.
        gym_processes (`int`, *optional*):
            Processes of `gym_mode="host"`, each with all servers of the configs; a rollout stays in one. Default: one
            for every 64 rollouts in flight over all ranks, at most one for every four cores of this machine, and one
            if the configs fix a port or say `trl_gym_single_process: true`.
        gym_head_url (`str`, *optional*):
            Head server of a running Gym, or several of them, separated by commas; implies `gym_mode="attach"`.
        gym_python (`str`, *optional*):
            Interpreter that has `nemo-gym`. Default: `TRL_GYM_PYTHON`, else `.gym-venv/bin/python`.
        gym_overrides (`dict` or `str`, *optional*):
            Any NeMo Gym option, nested or with dotted keys; wins over the configs.
        gym_start_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds until every Gym server must answer.

        > Parameters that control the policy server

        gym_vllm_args (`dict` or `str`, *optional*):
            Flags passed to `vllm serve`, e.g. `{"tool-call-parser": "hermes"}`.
        gym_server_start_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds until the server that we start must be ready.
        gym_server_devices (`str`, *optional*):
            GPUs for the server that we start, e.g. `"6,7"`, when it shall not share those of training.
        gym_server_restarts (`int`, *optional*, defaults to `3`):
            How often, in the whole run, a server that we started is started again after it died.
        gym_server_reconnect_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds to wait for a server that runs elsewhere and has disappeared.
        gym_gpu_memory (`str`, *optional*, defaults to `"given"`):
            `"given"`: the server takes `vllm_gpu_memory_utilization` of each GPU. `"auto"`: what the planner computes
            from model, batch and context. The planner's arithmetic is printed either way.
        gym_offload_optimizer (`bool`, *optional*, defaults to `False`):
            Move the optimizer's state to the host during rollouts.

        > Parameters that control rollouts

        gym_deadline (`float`, *optional*, defaults to `600.0`):
            Seconds after which a rollout counts as failed.
        gym_max_inflight (`int`, *optional*, defaults to `256`):
            Rollouts of one rank that run at the same time.
        gym_retries (`int` or `dict` or `str`, *optional*, defaults to `{"infrastructure": 2}`):
            How often a failed rollout is run again, per failure kind (`infrastructure`, `deadline`, `environment`,
            `policy`); a number stands for `infrastructure`. Only that rollout is sent again, after a pause that
            doubles from attempt to attempt.
        gym_launch_rate (`float`, *optional*):
            Rollouts that are started per second and rank at most.
        gym_environments (`dict` or `str`, *optional*):
            Other values for single agents: `{agent: {"deadline": …, "max_inflight": …, "retries": …, "launch_rate":
            …}}`.
        gym_on_environment_down (`str`, *optional*, defaults to `"fail"`):
            What to do when an environment's servers do not answer any more: `"fail"` stops training, `"skip"` leaves
            its rollouts out of the batch and tries again with the next one.
        gym_stall_timeout (`float`, *optional*, defaults to `60.0`):
            Seconds without a finished rollout after which every outstanding one is listed with what it waits for.
        gym_min_group_size (`int`, *optional*, defaults to `2`):
            A group with fewer rollouts that have a reward is left out of the loss.
        gym_min_valid_fraction (`float`, *optional*, defaults to `0.1`):
            A generation batch in which a smaller part of the rollouts can be trained on stops training.
        gym_eval_sampling (`dict` or `str`, *optional*):
            Sampling parameters of evaluation that differ from training: `temperature`, `top_p`, `top_k`, `min_p`,
            `repetition_penalty`.
        gym_drift (`str`, *optional*, defaults to `"truncate"`):
            What to do with a rollout that drifts: one of its prompts does not start with the tokens already seen.
            `"truncate"` trains the tokens before, `"split"` trains those after it too, in a further row that begins
            with the whole new prompt, `"exclude"` takes the rollout out of the loss and of its group's baseline,
            `"error"` stops training. Every drift is counted, logged with its cause and explained in the journal.
        gym_train_calls (`str`, *optional*, defaults to `"answer"`):
            Which model calls of a rollout are trained. `"answer"`: those that Gym's answer contains. `"all"`: also the
            others that it made, in further rows: sub-agents, discarded samples, calls that were tried again. Needs
            `gym_drift="split"`.
        gym_max_rows_factor (`float`, *optional*, defaults to `2.0`):
            How many times as many rows as rollouts a rank trains at most; micro-batches grow by as much. Of the
            rollouts with most rows, the oldest rows beyond it are dropped and counted.
        gym_untagged_calls (`str`, *optional*, defaults to `"error"`):
            What the policy server does with a model call of NeMo Gym that belongs to no rollout, since its agent lost
            the identity: such a call has its own sampling parameters, no budget, and is not trained. `"error"` refuses
            it, which fails the rollout; `"warn"` serves it. Either way they are counted, and their agents named.

        > Parameters that control weight sync

        gym_weight_transport (`str`, *optional*, defaults to `"auto"`):
            How weights reach the policy server. `"ipc"`: CUDA IPC, on shared GPUs. `"nccl"`: broadcast to other GPUs
            or hosts. `"file"`: a file in shared memory or on a shared disk, works everywhere. `"adapter"`: only the
            LoRA adapter is sent. `"auto"` chooses from the placement.
        gym_weight_dir (`str`, *optional*):
            Folder through which `file` and `adapter` hand over weights. Default: shared memory (`/dev/shm`). With a
            server on another host it must be on a disk that both see.
        gym_weight_buffer_mb (`int`, *optional*, defaults to `512`):
            MB of packed weights that `ipc` and `nccl` send at a time; no single tensor may be bigger with `ipc`.
        gym_sync_only_trainable (`bool`, *optional*, defaults to `False`):
            After the first sync, send only parameters that are trained.
        gym_pause_mode (`str`, *optional*, defaults to `"wait"`):
            What a sync does with requests that are being answered: `"wait"` lets them finish, `"keep"` freezes them;
            they continue with the new weights.
        gym_sync_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds for each step of a sync before it counts as failed.
        gym_verify_sync_steps (`int`, *optional*, defaults to `50`):
            The log-probabilities of trainer and server are compared after the first sync, after each restart of the
            server, and after every so many optimizer steps; 0 leaves the last out.
        gym_max_adapters (`int`, *optional*, defaults to `2`):
            Versions of the adapter that the server keeps at the same time.
        gym_probe_tolerance (`float`, *optional*):
            Largest mean absolute difference in nats between the log-probabilities of trainer and server after the
            first weight sync. Default: 0.02 when the trainer computes in float32, else 0.1.

        > Parameters that control what is written

        gym_replay (`str`, *optional*):
            Folder of a journal to train from instead of live rollouts; no server is started.
        gym_journal_max_mb (`float`, *optional*, defaults to `512.0`):
            Size in MB at which a journal file is continued in a new one.
        gym_log_dir (`str`, *optional*):
            Folder of the server logs. Default: `<output_dir>/logs`.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, *_JSON_OPTIONS]  # noqa: RUF012

    use_vllm: bool = field(
        default=True,
        metadata={"help": "Always true: rollouts are served by a vLLM server."},
    )
    gym_config_paths: list[str] = field(default_factory=list)
    gym_mode: str = field(default="host", metadata={"choices": ["host", "upstream", "attach"]})
    gym_processes: int | None = None
    gym_head_url: str | None = None
    gym_python: str | None = None
    gym_overrides: dict[str, Any] | str | None = None
    gym_start_timeout: float = 120.0
    gym_vllm_args: dict[str, Any] | str | None = None
    gym_server_start_timeout: float = 600.0
    gym_server_devices: str | None = None
    gym_server_restarts: int = 3
    gym_server_reconnect_timeout: float = 600.0
    gym_gpu_memory: str = field(default="given", metadata={"choices": ["given", "auto"]})
    gym_offload_optimizer: bool = False
    gym_deadline: float = 600.0
    gym_max_inflight: int = 256
    gym_retries: dict[str, Any] | int | str | None = None
    gym_launch_rate: float | None = None
    gym_environments: dict[str, Any] | str | None = None
    gym_on_environment_down: str = field(default="fail", metadata={"choices": ["fail", "skip"]})
    gym_stall_timeout: float = 60.0
    gym_min_group_size: int = 2
    gym_min_valid_fraction: float = 0.1
    gym_eval_sampling: dict[str, Any] | str | None = None
    gym_replay: str | None = None
    gym_journal_max_mb: float = 512.0
    gym_drift: str = field(default="truncate", metadata={"choices": ["truncate", "split", "exclude", "error"]})
    gym_train_calls: str = field(default="answer", metadata={"choices": ["answer", "all"]})
    gym_max_rows_factor: float = 2.0
    gym_untagged_calls: str = field(default="error", metadata={"choices": ["error", "warn"]})
    gym_weight_transport: str = field(default="auto", metadata={"choices": ["auto", "ipc", "nccl", "file", "adapter"]})
    gym_weight_dir: str | None = None
    gym_weight_buffer_mb: int = 512
    gym_sync_only_trainable: bool = False
    gym_pause_mode: str = field(default="wait", metadata={"choices": ["wait", "keep"]})
    gym_sync_timeout: float = 600.0
    gym_verify_sync_steps: int = 50
    gym_max_adapters: int = 2
    gym_probe_tolerance: float | None = None
    gym_log_dir: str | None = None

    def __post_init__(self) -> None:
        problems = [*self._parse_json_options(), *self._replace_wrong_types()]
        self._spell_out_retries()
        if self.bf16 is None and (self.use_cpu or not _has_accelerator()):
            # TRL turns bf16 on by default. On a CPU, autocast is slower than float32 and widens the gap to the server.
            self.bf16 = False
        if self.gym_head_url is not None:
            self.gym_mode = "attach"
        problems += find_problems(self)
        try:
            super().__post_init__()
        except ValueError as error:  # TRL's and transformers' own checks stop at their first complaint
            problems.append(Problem(str(error)))
        if problems:
            raise ConfigError(f"{len(problems)} problem(s) in the configuration:", problems=problems)
        if self.gym_log_dir is None:
            self.gym_log_dir = os.path.join(self.output_dir, "logs")

    @property
    def rollout_options(self) -> RolloutOptions:
        """How rollouts of training are sampled and what they may cost."""
        return RolloutOptions(
            sampling=Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k or -1,
                min_p=self.min_p or 0.0,
                repetition_penalty=self.repetition_penalty,
            ),
            max_completion_length=self.max_completion_length,
            deadline=self.gym_deadline,
            max_inflight=self.gym_max_inflight,
            launch_rate=self.gym_launch_rate,
            retries=self.gym_retries,  # type: ignore[arg-type]  # a mapping since `__post_init__`, like the next
            environments=self.gym_environments or {},  # type: ignore[arg-type]
        )

    def rollouts_in_flight(self, num_processes: int) -> int:
        """Return how many rollouts run at the same time at most.

        Args:
            num_processes: Number of training processes.
        """
        batch = self.per_device_train_batch_size * (self.steps_per_generation or 1)
        return num_processes * min(self.gym_max_inflight, max(batch, self.per_device_eval_batch_size))

    @property
    def has_further_rows(self) -> bool:
        """Whether rollouts may have several rows; with `build_trajectories` overridden they may in any case."""
        return self.gym_drift == "split"

    @property
    def serving_dtype(self) -> str:
        """Precision in which the trainer computes, and the policy server that we start too."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    @property
    def probe_tolerance(self) -> float:
        """Mean absolute difference in nats that the first weight sync may show."""
        if self.gym_probe_tolerance is not None:
            return self.gym_probe_tolerance
        return 0.02 if self.serving_dtype == "float32" else 0.1

    def _parse_json_options(self) -> list[Problem]:
        """Turn JSON text from the command line into mappings; transformers would stop at the first that is broken."""
        problems = []
        for name in _JSON_OPTIONS:
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    setattr(self, name, json.loads(value))
                except json.JSONDecodeError as error:
                    setattr(self, name, None)
                    problems.append(
                        Problem(
                            f"`{name}` is {value!r}, which is not JSON ({error}).",
                            """Write it as '{"key": "value"}', in quotes.""",
                        )
                    )
        return problems

    def _replace_wrong_types(self) -> list[Problem]:
        """Put the default where a value is of a wrong type, so that all other checks can be made; list such values.

        YAML's `null`, and text where a number belongs, would otherwise end in a TypeError somewhere later. Of TRL's
        options only numbers are looked at: others convert what they take.
        """
        hints = typing.get_type_hints(type(self))
        problems = []
        for one in fields(self):
            value, hint = getattr(self, one.name), hints[one.name]
            is_checked = one.name.startswith("gym_") or set(_alternatives(hint)) <= _NUMBERS
            if is_checked and not _is_of(value, hint) and value != _default(one):
                setattr(self, one.name, _default(one))
                problems.append(Problem(f"`{one.name}` is {value!r}.", f"Set it to {_spelled(hint)}."))
        return problems

    def _spell_out_retries(self) -> None:
        """Write retries by failure kind, where a number stands for infrastructure failures."""
        self.gym_retries = by_kind(DEFAULT_RETRIES if self.gym_retries is None else self.gym_retries)
        if isinstance(self.gym_environments, dict):
            self.gym_environments = {
                agent: {**own, "retries": by_kind(own["retries"])}
                if isinstance(own, dict) and "retries" in own
                else own
                for agent, own in self.gym_environments.items()
            }


def _describe_options(config: type[GymGRPOConfig]) -> None:
    """Give each option its text in the docstring as the help of the command line: it is written once."""
    parts = re.split(r"^ {4}(\w+) \(`.*\):$", inspect.getdoc(config) or "", flags=re.MULTILINE)  # none with -OO
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    for one in fields(config):
        if one.name in texts:
            text = " ".join(texts[one.name].partition("\n\n")[0].split()).replace("%", "%%")
            one.metadata = types.MappingProxyType({**one.metadata, "help": text})


_describe_options(GymGRPOConfig)


def checked_args(args: GymGRPOConfig | None, model: Any, kwargs: dict[str, Any]) -> GymGRPOConfig:
    """Return the configuration that a trainer was given, or the default one.

    Args:
        args: As given to the trainer.
        model: Model, or its name, for the default `output_dir`.
        kwargs: Other arguments of TRL's `GRPOTrainer`.

    Raises:
        ConfigError: `args` is of another class, or an argument cannot be combined with a NeMo Gym environment.
    """
    for name in ("tools", "environment_factory", "rollout_func"):
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"`{name}` cannot be combined with a NeMo Gym environment, which brings its own tools and rollouts.",
                "Use TRL's GRPOTrainer, or write a Gym environment.",
            )
    if args is None:
        name = model if isinstance(model, str) else compat.model_id(model)
        return GymGRPOConfig(output_dir=f"{Path(name).name or 'policy'}-GymGRPO")
    if not isinstance(args, GymGRPOConfig):
        raise ConfigError(
            f"`args` must be a GymGRPOConfig, got {type(args).__name__}.",
            "Use GymGRPOConfig, which has all of its options.",
        )
    return args


# -- types ------------------------------------------------------------------------------------------------------------

_TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}
_NUMBERS = {int, float, bool, type(None)}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, without their parameters; of any other type, that type."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return tuple(typing.get_origin(one) or one for one in (typing.get_args(hint) if union else (hint,)))


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of an option's type. An option with a type that is not in `_TYPES` takes everything."""
    wanted = _alternatives(hint)
    if not set(wanted) <= _TYPES.keys():
        return True
    if isinstance(value, bool):  # is an int to Python
        return bool in wanted
    return isinstance(value, wanted) or (float in wanted and isinstance(value, int))


def _spelled(hint: Any) -> str:
    return " or ".join(_TYPES[one] for one in _alternatives(hint))


def _default(one: Field[Any]) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


# -- values -----------------------------------------------------------------------------------------------------------


def find_problems(config: GymGRPOConfig) -> list[Problem]:
    """List everything that is wrong with our own options; their types are right."""
    return [
        *_choice_problems(config),
        *_gym_problems(config),
        *_server_problems(config),
        *_length_problems(config),
        *_number_problems(config),
        *config.rollout_options.problems(lambda name: f"gym_{name}"),
        *_eval_sampling_problems(config),
        *_row_problems(config),
        *_shared_gpu_problems(config),
        *_unused_option_problems(config),
    ]


def _choice_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    choices = {
        one.name: one.metadata["choices"]
        for one in fields(config)
        if one.name.startswith("gym_") and "choices" in one.metadata
    }
    for name, allowed in {**choices, "vllm_mode": ("colocate", "server")}.items():
        if getattr(config, name) not in allowed:
            yield Problem(f"`{name}` is {getattr(config, name)!r}.", f"Choose one of {', '.join(allowed)}.")


def _gym_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    if config.gym_mode == "attach" and config.gym_head_url is None:
        yield Problem(
            "`gym_mode` is 'attach' and `gym_head_url` is not set.", "Set it to the URL of that Gym's head server."
        )
    if config.gym_head_url is not None and config.gym_config_paths:
        yield Problem(
            "`gym_head_url` attaches to a running Gym and `gym_config_paths` would start one.", "Set only one."
        )
    if config.gym_processes is not None:
        yield from number_problems("gym_processes", config.gym_processes, least=1, whole=True)
        if config.gym_processes > 1 and config.gym_mode != "host":
            yield Problem(
                f"`gym_processes` is {config.gym_processes} and `gym_mode` {config.gym_mode!r}: only the processes of "
                "'host' are ours to count.",
                "Set `gym_mode` to 'host', or leave `gym_processes` out.",
            )
    if not isinstance(config.gym_overrides, dict | None):
        yield Problem(f"`gym_overrides` is {config.gym_overrides!r}.", "Set it to a mapping, or to a JSON object.")
    for name in ("gym_weight_dir", "gym_replay"):
        folder = getattr(config, name)
        if folder is not None and not Path(folder).is_dir():
            yield Problem(f"`{name}` is {folder!r}, which is not a folder.", "Create it, or correct the path.")


def _server_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    if not config.use_vllm:
        yield Problem("`use_vllm` is false, and rollouts need a policy server.", "Leave it at true.")
    if config.vllm_mode == "colocate" and config.vllm_server_base_url is not None:
        yield Problem(
            "`vllm_server_base_url` names a running server and `vllm_mode` is 'colocate', which starts one.",
            "Set `vllm_mode` to 'server', or leave the URL out.",
        )
    if not isinstance(config.gym_vllm_args, dict | None):
        yield Problem(f"`gym_vllm_args` is {config.gym_vllm_args!r}.", "Set it to a mapping, or to a JSON object.")
    elif config.gym_vllm_args:
        if config.vllm_mode == "server":
            yield Problem(
                "`gym_vllm_args` has no effect with `vllm_mode` 'server': that server runs already.",
                "Start the server with these flags, and remove them here.",
            )
        for flag in config.gym_vllm_args:
            if (reason := OWNED_VLLM_FLAGS.get(flag.lstrip("-").replace("_", "-"))) is not None:
                yield Problem(f"`gym_vllm_args` must not set {flag!r}: {reason}.", "Remove it.")
    for name in ("gym_server_start_timeout", "gym_server_reconnect_timeout"):
        if (seconds := getattr(config, name)) >= config.ddp_timeout:
            yield Problem(
                f"`{name}` is {seconds:g} and `ddp_timeout` {config.ddp_timeout}: the ranks that wait for the one "
                "which waits for the server would give up first.",
                "Set `ddp_timeout` higher.",
            )


def _length_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    length, context = config.max_completion_length, config.vllm_max_model_length
    if length is None:
        yield Problem(
            "`max_completion_length` must be set: it bounds the tokens of a conversation after its first prompt.",
            "Set it below `vllm_max_model_length`.",
        )
    elif context is not None and length >= context:
        yield Problem(
            f"`max_completion_length` ({length}) leaves no room for a prompt in `vllm_max_model_length` ({context}).",
            "Lower the first, or raise the second.",
        )


def _number_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    for name in _SECONDS:
        yield from number_problems(name, getattr(config, name), above=0, unit="seconds")
    for name, least in _AT_LEAST.items():
        yield from number_problems(name, getattr(config, name), least=least, whole=True)
    yield from number_problems("gym_min_valid_fraction", config.gym_min_valid_fraction, least=0, most=1)
    yield from number_problems("gym_max_rows_factor", config.gym_max_rows_factor, least=1)
    yield from number_problems("gym_journal_max_mb", config.gym_journal_max_mb, above=0, unit="MB")
    if config.gym_probe_tolerance is not None:
        yield from number_problems("gym_probe_tolerance", config.gym_probe_tolerance, above=0, unit="nats")


def _eval_sampling_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    sampling = config.gym_eval_sampling
    if not isinstance(sampling, dict | None):
        yield Problem(f"`gym_eval_sampling` is {sampling!r}.", "Set it to a mapping, or to a JSON object.")
        return
    for name, value in (sampling or {}).items():
        if name not in SAMPLING_KEYS:
            yield Problem(
                f"`gym_eval_sampling` has the unknown key {name!r}.", f"Choose among {', '.join(SAMPLING_KEYS)}."
            )
        else:
            yield from number_problems(f"gym_eval_sampling[{name!r}]", value, least=-1)


def _row_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    if config.gym_train_calls == "all" and not config.has_further_rows:
        yield Problem(
            f"`gym_train_calls` is 'all' and `gym_drift` {config.gym_drift!r}: calls that do not continue each other "
            "would have no row.",
            "Set `gym_drift` to 'split'.",
        )
    if config.has_further_rows and config.beta and config.loss_type in TOKEN_MEAN_LOSSES:
        yield Problem(
            f"`gym_drift` is 'split', `loss_type` {config.loss_type!r} and `beta` {config.beta:g}: the KL term would "
            "count each row of a rollout as a rollout.",
            f"Set `beta` to 0, or `loss_type` to another one than {' and '.join(TOKEN_MEAN_LOSSES)}.",
        )


def _shared_gpu_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    if config.vllm_enable_sleep_mode and (config.vllm_mode == "server" or config.gym_server_devices is not None):
        yield Problem(
            "`vllm_enable_sleep_mode` makes trainer and server take turns on the same GPUs, and the server has its "
            "own (`vllm_mode` 'server' or `gym_server_devices`).",
            "Leave it out.",
        )
    if config.gym_offload_optimizer and not config.vllm_enable_sleep_mode:
        yield Problem(
            "`gym_offload_optimizer` makes room for a server that sleeps during updates.",
            "Set `vllm_enable_sleep_mode` too, or leave it out.",
        )
    if config.gym_server_devices is not None and config.vllm_mode == "server":
        yield Problem(
            "`gym_server_devices` places a server that we start and `vllm_mode` is 'server', where one runs already.",
            "Set `vllm_mode` to 'colocate', or leave the devices out.",
        )


def _unused_option_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    for name, reason in _NOT_HONOURED.items():
        if getattr(config, name):
            yield Problem(f"`{name}` has no effect on Gym rollouts: {reason}.", "Remove it.")
