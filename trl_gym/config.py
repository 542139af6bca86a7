"""Every option of trl-gym, on top of TRL's `GRPOConfig`. Usable with TRL's `TrlParser` (YAML and command line)."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from trl_gym import compat
from trl_gym.errors import ConfigError
from trl_gym.rollouts.request import Sampling

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
_JSON_OPTIONS = (
    "gym_overrides",
    "gym_vllm_args",
    "gym_retries",
    "gym_environments",
    "gym_eval_sampling",
)
_DEFAULT_RETRIES = 2


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
        gym_head_url (`str`, *optional*):
            Head server of a running Gym; implies `gym_mode="attach"`.
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
            `"truncate"` trains the tokens before, `"exclude"` takes the rollout out of the loss and of its group's
            baseline, `"error"` stops training, `"split"` behaves as `"truncate"` for now. Every drift is counted,
            logged with its cause and explained in the journal.

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
    gym_config_paths: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NeMo Gym configs, resolved as Gym does: absolute, relative to the working directory, or inside "
            "the installed nemo-gym."
        },
    )
    gym_mode: str = field(
        default="host",
        metadata={
            "help": "'host': all Gym servers in one child process; 'upstream': Gym's own launcher, supervised; "
            "'attach': a running Gym at gym_head_url.",
            "choices": list(GYM_MODES),
        },
    )
    gym_head_url: str | None = field(
        default=None,
        metadata={"help": "Head server of a running Gym, e.g. http://127.0.0.1:11000. Implies gym_mode='attach'."},
    )
    gym_python: str | None = field(
        default=None,
        metadata={"help": "Interpreter that has nemo-gym. Default: TRL_GYM_PYTHON, else .gym-venv/bin/python."},
    )
    gym_overrides: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Any NeMo Gym option, nested or with dotted keys (JSON on the command line)."},
    )
    gym_start_timeout: float = field(default=120.0, metadata={"help": "Seconds until every Gym server must answer."})
    gym_vllm_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Flags passed to `vllm serve`, e.g. {'tool-call-parser': 'hermes'} (JSON on the command line)."
        },
    )
    gym_server_start_timeout: float = field(
        default=600.0, metadata={"help": "Seconds until the policy server that we start must be ready."}
    )
    gym_server_devices: str | None = field(
        default=None, metadata={"help": "GPUs for the server that we start, e.g. '6,7', apart from training's."}
    )
    gym_server_restarts: int = field(
        default=3, metadata={"help": "How often a server that we started is started again after it died."}
    )
    gym_server_reconnect_timeout: float = field(
        default=600.0, metadata={"help": "Seconds to wait for a server that runs elsewhere and has disappeared."}
    )
    gym_gpu_memory: str = field(
        default="given",
        metadata={
            "help": "'given': the server takes vllm_gpu_memory_utilization of each GPU; 'auto': what the planner "
            "computes from model, batch and context.",
            "choices": list(GPU_MEMORY),
        },
    )
    gym_offload_optimizer: bool = field(
        default=False, metadata={"help": "Move the optimizer's state to the host during rollouts."}
    )
    gym_deadline: float = field(default=600.0, metadata={"help": "Seconds after which a rollout counts as failed."})
    gym_max_inflight: int = field(default=256, metadata={"help": "Rollouts of one rank that run at the same time."})
    gym_retries: dict[str, Any] | int | str | None = field(
        default=None,
        metadata={
            "help": "How often a failed rollout is run again: a number (infrastructure failures), or JSON by failure "
            "kind. Default: {'infrastructure': 2}."
        },
    )
    gym_launch_rate: float | None = field(
        default=None, metadata={"help": "Rollouts that are started per second and rank at most."}
    )
    gym_environments: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Other values for single agents (JSON on the command line): {agent: {'deadline': 30, "
            "'max_inflight': 8, 'retries': 1, 'launch_rate': 2}}."
        },
    )
    gym_on_environment_down: str = field(
        default="fail",
        metadata={
            "help": "When an environment's servers do not answer any more: 'fail' stops training, 'skip' leaves its "
            "rollouts out of the batch.",
            "choices": list(ON_ENVIRONMENT_DOWN),
        },
    )
    gym_stall_timeout: float = field(
        default=60.0,
        metadata={"help": "Seconds without a finished rollout after which every outstanding one is listed."},
    )
    gym_min_group_size: int = field(
        default=2, metadata={"help": "A group with fewer rollouts that have a reward is left out of the loss."}
    )
    gym_min_valid_fraction: float = field(
        default=0.1,
        metadata={"help": "A generation batch in which a smaller part can be trained on stops training."},
    )
    gym_eval_sampling: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Sampling parameters of evaluation that differ from training, e.g. {'temperature': 0.0}."},
    )
    gym_replay: str | None = field(
        default=None, metadata={"help": "Folder of a journal to train from instead of live rollouts."}
    )
    gym_journal_max_mb: float = field(
        default=512.0, metadata={"help": "Size in MB at which a journal file is continued in a new one."}
    )
    gym_drift: str = field(
        default="truncate",
        metadata={
            "help": "What to do with a rollout whose prompt does not start with the tokens already seen: 'truncate' "
            "trains the part before, 'exclude' takes it out of loss and baseline, 'error' stops, 'split' behaves as "
            "'truncate' for now.",
            "choices": list(DRIFT_POLICIES),
        },
    )
    gym_weight_transport: str = field(
        default="auto",
        metadata={
            "help": "How weights reach the policy server: 'ipc' (shared GPUs), 'nccl' (other GPUs or hosts), 'file' "
            "(everywhere), 'adapter' (LoRA only); 'auto' chooses from the placement.",
            "choices": list(WEIGHT_TRANSPORTS),
        },
    )
    gym_weight_dir: str | None = field(
        default=None,
        metadata={"help": "Folder through which 'file' and 'adapter' hand over weights. Default: shared memory."},
    )
    gym_weight_buffer_mb: int = field(
        default=512, metadata={"help": "MB of packed weights that 'ipc' and 'nccl' send at a time."}
    )
    gym_sync_only_trainable: bool = field(
        default=False, metadata={"help": "After the first sync, send only parameters that are trained."}
    )
    gym_pause_mode: str = field(
        default="wait",
        metadata={
            "help": "What a sync does with requests that are being answered: 'wait' lets them finish, 'keep' freezes "
            "them.",
            "choices": list(PAUSE_MODES),
        },
    )
    gym_sync_timeout: float = field(
        default=600.0, metadata={"help": "Seconds for each step of a weight sync before it counts as failed."}
    )
    gym_verify_sync_steps: int = field(
        default=50,
        metadata={
            "help": "Compare log-probabilities of trainer and server after every so many steps; 0: only after the "
            "first sync and after restarts."
        },
    )
    gym_max_adapters: int = field(
        default=2, metadata={"help": "Versions of the adapter that the server keeps at the same time."}
    )
    gym_probe_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Largest mean absolute difference in nats between trainer and server log-probabilities after the "
            "first weight sync. Default: 0.02 in float32, else 0.1."
        },
    )
    gym_log_dir: str | None = field(
        default=None, metadata={"help": "Folder of the server logs. Default: <output_dir>/logs."}
    )

    def __post_init__(self) -> None:
        problems = self._parse_json_options()
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
            problems.append(str(error))
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise ConfigError(f"{len(problems)} problem(s) in the configuration:\n{listed}")
        if self.gym_log_dir is None:
            self.gym_log_dir = os.path.join(self.output_dir, "logs")

    @property
    def serving_dtype(self) -> str:
        """Precision the trainer computes in, in which the policy server that we start computes too."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    @property
    def probe_tolerance(self) -> float:
        """Mean absolute difference in nats that the first weight sync may show."""
        if self.gym_probe_tolerance is not None:
            return self.gym_probe_tolerance
        return 0.02 if self.serving_dtype == "float32" else 0.1

    def _parse_json_options(self) -> list[str]:
        """Turn JSON text from the command line into mappings; transformers would stop at the first that is broken."""
        problems = []
        for name in _JSON_OPTIONS:
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    setattr(self, name, json.loads(value))
                except json.JSONDecodeError as error:
                    setattr(self, name, None)
                    problems.append(f"`{name}` must be a JSON object, got {value!r} ({error}).")
        return problems

    def _spell_out_retries(self) -> None:
        """A number stands for infrastructure failures; from here on every value is by failure kind."""
        self.gym_retries = _by_kind(_DEFAULT_RETRIES if self.gym_retries is None else self.gym_retries)
        if isinstance(self.gym_environments, dict):
            self.gym_environments = {
                agent: {**own, "retries": _by_kind(own["retries"])}
                if isinstance(own, dict) and "retries" in own
                else own
                for agent, own in self.gym_environments.items()
            }


def _by_kind(retries: Any) -> Any:
    return {"infrastructure": retries} if isinstance(retries, int) else retries


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


# --------------------------------------------------------------------------------------------------------------------
# What can be wrong with a `GymGRPOConfig`: one list, each entry naming the option, the value and the remedy.


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


# --------------------------------------------------------------------------------------------------------------------
# What a trainer is given, checked before anything is started.


def checked_args(args: GymGRPOConfig | None, model: Any, kwargs: dict[str, Any]) -> GymGRPOConfig:
    """The configuration, or one error for what TRL takes and a Gym trainer cannot."""
    for name in ("tools", "environment_factory", "rollout_func"):
        if kwargs.get(name) is not None:
            raise ConfigError(
                f"`{name}` cannot be combined with a NeMo Gym environment, which brings its own tools and rollouts; "
                "use TRL's GRPOTrainer, or write a Gym environment."
            )
    if args is None:
        name = model if isinstance(model, str) else compat.model_id(model)
        return GymGRPOConfig(output_dir=f"{Path(name).name or 'policy'}-GymGRPO")
    if not isinstance(args, GymGRPOConfig):
        raise ConfigError(f"`args` must be a GymGRPOConfig, got {type(args).__name__}.")
    return args
