"""Every option of trl-gym, on top of TRL's `GRPOConfig`. Usable with TRL's `TrlParser` (YAML and command line)."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from trl_gym.errors import ConfigError
from trl_gym.rollouts.requests import Sampling

GYM_MODES = ("host", "upstream", "attach")
DRIFT_POLICIES = ("split", "truncate", "exclude", "error")
ON_ENVIRONMENT_DOWN = ("fail", "skip")
_JSON_OPTIONS = (
    "gym_overrides",
    "gym_vllm_args",
    "gym_retries",
    "gym_environments",
    "gym_eval_sampling",
)
_RETRIED_KINDS = ("infrastructure", "deadline", "environment", "policy")
_ENVIRONMENT_KEYS = ("deadline", "max_inflight", "retries", "launch_rate")
_SAMPLING_KEYS = tuple(parameter.name for parameter in fields(Sampling))
_DEFAULT_RETRIES = 2
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

        gym_weight_dir (`str`, *optional*):
            Folder through which the `file` transport hands over weights. Default: shared memory (`/dev/shm`). With a
            server on another host it must be on a disk that both see.
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
    gym_weight_dir: str | None = field(
        default=None,
        metadata={"help": "Folder through which the 'file' transport hands over weights. Default: shared memory."},
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
        problems += self._problems()
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

    def _problems(self) -> list[str]:
        """Everything that is wrong with our own options, in the order of the options."""
        return [
            *self._gym_problems(),
            *self._server_problems(),
            *self._number_problems(),
            *self._rollout_problems(),
            *self._ignored_options(),
        ]

    def _gym_problems(self) -> list[str]:
        problems = []
        if self.gym_mode not in GYM_MODES:
            problems.append(f"`gym_mode` is {self.gym_mode!r}; choose one of {', '.join(GYM_MODES)}.")
        if self.gym_mode == "attach" and self.gym_head_url is None:
            problems.append("`gym_mode` is 'attach' and `gym_head_url` is not set; name the head server of that Gym.")
        if self.gym_head_url is not None and self.gym_config_paths:
            problems.append(
                "`gym_head_url` attaches to a running Gym and `gym_config_paths` would start one; set only one."
            )
        if self.gym_overrides is not None and not isinstance(self.gym_overrides, dict):
            problems.append(f"`gym_overrides` must be a mapping or a JSON object, got {self.gym_overrides!r}.")
        if self.gym_drift not in DRIFT_POLICIES:
            problems.append(f"`gym_drift` is {self.gym_drift!r}; choose one of {', '.join(DRIFT_POLICIES)}.")
        return problems

    def _server_problems(self) -> list[str]:
        problems = []
        if not self.use_vllm:
            problems.append("`use_vllm` is false; rollouts need a policy server, leave it at true.")
        if self.vllm_mode not in ("colocate", "server"):
            problems.append(f"`vllm_mode` is {self.vllm_mode!r}; choose 'colocate' or 'server'.")
        if self.vllm_mode == "colocate" and self.vllm_server_base_url is not None:
            problems.append(
                "`vllm_server_base_url` names a running server and `vllm_mode` is 'colocate', which starts one; "
                "set `vllm_mode` to 'server', or leave the URL out."
            )
        if self.gym_vllm_args is not None and not isinstance(self.gym_vllm_args, dict):
            problems.append(f"`gym_vllm_args` must be a mapping or a JSON object, got {self.gym_vllm_args!r}.")
        elif self.gym_vllm_args:
            if self.vllm_mode == "server":
                problems.append("`gym_vllm_args` has no effect with `vllm_mode` 'server': that server runs already.")
            for flag in self.gym_vllm_args:
                if (reason := _OWNED_VLLM_FLAGS.get(flag.lstrip("-").replace("_", "-"))) is not None:
                    problems.append(f"`gym_vllm_args` must not set {flag!r}: {reason}.")
        if self.gym_weight_dir is not None and not Path(self.gym_weight_dir).is_dir():
            problems.append(f"`gym_weight_dir` is {self.gym_weight_dir!r}, which is not a folder; create it first.")
        return problems

    def _number_problems(self) -> list[str]:
        problems = []
        for name in ("gym_start_timeout", "gym_server_start_timeout", "gym_deadline", "gym_stall_timeout"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                problems.append(f"`{name}` is {value!r}; it must be a number of seconds above 0.")
        if self.gym_max_inflight < 1:
            problems.append(f"`gym_max_inflight` is {self.gym_max_inflight}; it must be at least 1.")
        if self.gym_probe_tolerance is not None and not self.gym_probe_tolerance > 0:
            problems.append(f"`gym_probe_tolerance` is {self.gym_probe_tolerance}; it must be above 0 (nats).")
        length, context = self.max_completion_length, self.vllm_max_model_length
        if length is not None and context is not None and length >= context:
            problems.append(
                f"`max_completion_length` ({length}) leaves no room for a prompt in `vllm_max_model_length` "
                f"({context})."
            )
        if length is None:
            problems.append("`max_completion_length` must be set: it bounds the tokens of a rollout after its prompt.")
        return problems

    def _rollout_problems(self) -> list[str]:
        problems = _retry_problems("gym_retries", self.gym_retries)
        if self.gym_launch_rate is not None and not self.gym_launch_rate > 0:
            problems.append(f"`gym_launch_rate` is {self.gym_launch_rate!r}; it must be above 0 (per second).")
        if self.gym_on_environment_down not in ON_ENVIRONMENT_DOWN:
            problems.append(
                f"`gym_on_environment_down` is {self.gym_on_environment_down!r}; choose one of "
                f"{', '.join(ON_ENVIRONMENT_DOWN)}."
            )
        if self.gym_min_group_size < 2:
            problems.append(f"`gym_min_group_size` is {self.gym_min_group_size}; a baseline needs at least 2.")
        if not 0 <= self.gym_min_valid_fraction <= 1:
            problems.append(f"`gym_min_valid_fraction` is {self.gym_min_valid_fraction}; it must be within 0 and 1.")
        if self.gym_replay is not None and not Path(self.gym_replay).is_dir():
            problems.append(f"`gym_replay` is {self.gym_replay!r}, which is not a folder.")
        if not self.gym_journal_max_mb > 0:
            problems.append(f"`gym_journal_max_mb` is {self.gym_journal_max_mb}; it must be above 0.")
        return problems + self._eval_sampling_problems() + self._environment_problems()

    def _eval_sampling_problems(self) -> list[str]:
        sampling = self.gym_eval_sampling
        if sampling is None:
            return []
        if not isinstance(sampling, dict):
            return [f"`gym_eval_sampling` must be a mapping or a JSON object, got {sampling!r}."]
        return [
            f"`gym_eval_sampling` has the unknown key {name!r}; choose among {', '.join(_SAMPLING_KEYS)}."
            for name in sampling
            if name not in _SAMPLING_KEYS
        ]

    def _environment_problems(self) -> list[str]:
        environments = self.gym_environments or {}
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

    def _ignored_options(self) -> list[str]:
        """Options of TRL that the rollout path cannot honour: refused, because silence would be worse."""
        ignored = {
            "vllm_structured_outputs_regex": "NeMo Gym's agents make the requests",
            "generation_kwargs": "put server-wide settings into `gym_vllm_args`",
            "use_transformers_continuous_batching": "rollouts are served by vLLM",
        }
        return [
            f"`{name}` has no effect on Gym rollouts ({reason}); remove it."
            for name, reason in ignored.items()
            if getattr(self, name)
        ]


def _by_kind(retries: Any) -> Any:
    return {"infrastructure": retries} if isinstance(retries, int) else retries


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


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
