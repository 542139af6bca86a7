"""Every option of trl-gym, on top of TRL's `GRPOConfig`. Usable with TRL's `TrlParser` (YAML and command line)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from trl_gym import config_checks
from trl_gym.errors import ConfigError

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
            "choices": list(config_checks.GYM_MODES),
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
            "choices": list(config_checks.GPU_MEMORY),
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
            "choices": list(config_checks.ON_ENVIRONMENT_DOWN),
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
            "choices": list(config_checks.DRIFT_POLICIES),
        },
    )
    gym_weight_transport: str = field(
        default="auto",
        metadata={
            "help": "How weights reach the policy server: 'ipc' (shared GPUs), 'nccl' (other GPUs or hosts), 'file' "
            "(everywhere), 'adapter' (LoRA only); 'auto' chooses from the placement.",
            "choices": list(config_checks.WEIGHT_TRANSPORTS),
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
            "choices": list(config_checks.PAUSE_MODES),
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
        problems += config_checks.find_problems(self)
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
