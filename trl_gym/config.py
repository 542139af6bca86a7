"""Every option of trl-gym on top of TRL's `GRPOConfig`, for Python, YAML and the command line.

`GymGRPOConfig.__post_init__` reports everything that is wrong in one `ConfigError`, one `Problem` per option.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import GRPOConfig

from trl_gym import compat, engines
from trl_gym.config_checks import (
    UNEVEN_OF_TRL,
    batch_problems,
    fill_in,
    find_problems,
    read_reward_weights,
    replace_wrong_sizes,
    replace_wrong_types,
)
from trl_gym.errors import ConfigError, Problem
from trl_gym.given import home_paths
from trl_gym.rollout_options import AGENT_SAMPLING, DEFAULT_RETRIES, RolloutOptions, Sampling, by_kind

if TYPE_CHECKING:
    import torch

_JSON_OPTIONS = (
    *("gym_overrides", "gym_vllm_args", "gym_sglang_args", "gym_retries", "gym_environments", "gym_eval_sampling"),
)
# Where `~` is spelled out; transformers does it for `output_dir`. Some of them may be something else than a path.
_PATHS = (
    *("gym_config_paths", "gym_python", "gym_sglang_python", "gym_weight_dir", "gym_replay", "gym_log_dir"),
    *("resume_from_checkpoint", "deepspeed", "fsdp_config", "gym_response_template"),
)
TRANSPORTS = ("ipc", "nccl", "file", "adapter", "shared")
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # in accelerate's order
_SYNCHRONOUS_MODE: str = GRPOConfig.vllm_importance_sampling_mode  # TRL's default


@dataclass
class GymGRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`GymGRPOTrainer`].

    It has every option of [`~trl.GRPOConfig`]; those that mean something special here are `vllm_mode` (`"colocate"`:
    we start the policy server on the training devices; `"server"`: nothing is started, `vllm_server_base_url` names a
    running one), `vllm_max_model_length`, `vllm_gpu_memory_utilization` and `vllm_tensor_parallel_size` (passed to the
    server that we start), and `vllm_importance_sampling_mode` (`"token_truncate"` by default with
    `gym_max_staleness`).

    Parameters:
        > Parameters that control lengths and batches, of TRL with other defaults

        max_completion_length (`int`, *optional*):
            Tokens of a conversation after its first prompt, over all its turns, tool outputs included. Default: 2048,
            or half of `vllm_max_model_length` where that is less; TRL's 512 are for one answer.
        num_generations (`int`, *optional*):
            Rollouts of each task. Default: 8.
        per_device_train_batch_size (`int`, *optional*):
            Rollouts of a micro-step on each process. Default: 8.
        per_device_eval_batch_size (`int`, *optional*):
            Rollouts of an evaluation's batch on each process. Default: 8, or as many more as whole groups need.
        gradient_accumulation_steps (`int`, *optional*):
            Micro-steps of an optimizer step. Default: as many as make 8 tasks of all processes, where TRL's 1 makes
            one on each; as few as make whole groups with `per_device_train_batch_size` given; 1 with
            `steps_per_generation` or `generation_batch_size` given.
        logging_steps (`float`, *optional*, defaults to `1`):
            Optimizer steps between two lines of metrics; TRL's 10 show nothing of the first nine.

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
            Interpreter that has `nemo-gym`. Default: `TRL_GYM_PYTHON`, else `.gym-venv/bin/python`,
            else the one that `trl-gym setup-gym` made.
        gym_overrides (`dict` or `str`, *optional*):
            Any NeMo Gym option, nested or with dotted keys; wins over the configs.
        gym_start_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds until every Gym server must answer.

        > Parameters that control the policy server

        gym_engine (`str`, *optional*, defaults to `"auto"`):
            What samples. `"vllm"`: a server of vLLM. `"transformers"`: continuous batching in the trainer's own
            process, with the very weights that are trained; it needs neither vLLM nor a copy of the model. `"sglang"`:
            a server of SGLang. `"auto"`: with `vllm_mode="colocate"` vLLM where it is installed, else transformers.
            With `vllm_mode="server"` the server is asked, and one that differs from what is named is refused.
        gym_vllm_args (`dict` or `str`, *optional*):
            Flags passed to `vllm serve`, e.g. `{"max-num-seqs": 256}`. `tool-call-parser` and `reasoning-parser` are
            guessed from the model's chat template where they are not among them; `"none"` means none.
        gym_response_template (`str`, *optional*):
            What reads tool calls and thinking with the transformers engine: a response template of TRL's by name
            (`"qwen3"`, `"qwen3_5"`, `"llama3"`, …), or a JSON file with one; `"none"` means none. Default: the
            tokenizer's own, else one that is guessed from the model's chat template.
        gym_sglang_args (`dict` or `str`, *optional*):
            Flags passed to `sglang.launch_server` with `gym_engine="sglang"`, e.g. `{"max-running-requests": 256}`.
            `tool-call-parser` and `reasoning-parser` are guessed where they are not among them; `"none"` means none.
        gym_sglang_python (`str`, *optional*):
            Interpreter that has SGLang. Default: `TRL_GYM_SGLANG_PYTHON`, else the trainer's own.
        gym_server_start_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds until the server that we start must be ready.
        gym_server_devices (`str`, *optional*):
            GPUs for the server that we start, e.g. `"6,7"`, when it shall not share those of training.
        gym_server_restarts (`int`, *optional*, defaults to `3`):
            How often, in the whole run, a server that we started is started again after it died; a NeMo Gym as often.
        gym_server_reconnect_timeout (`float`, *optional*, defaults to `600.0`):
            Seconds to wait for a server that runs elsewhere and has disappeared.
        gym_server_hang_timeout (`float`, *optional*, defaults to `300.0`):
            Seconds without an answer of the server's engine, which it gives between two of its forward passes, after
            which it counts as hanging: one that we started is replaced, one elsewhere is waited for as if it had
            disappeared. Raise it where one forward pass takes minutes (long prompts on a CPU, compilation in between).
            A server of NeMo Gym hangs when it answers no request for so long; one environment that computes on its
            event loop, instead of in a thread, blocks all others of its process.
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
            Other values for single agents: `{agent: {"deadline": …, "max_inflight": …, "retries": …, "launch_rate": …,
            "agent_sampling": …}}`.
        gym_on_environment_down (`str`, *optional*, defaults to `"fail"`):
            What to do when an environment's servers do not answer any more: `"fail"` starts a NeMo Gym of ours again
            (`gym_server_restarts`), and stops training with another one; `"skip"` leaves its rollouts out of the batch
            and tries again with the next one.
        gym_stall_timeout (`float`, *optional*, defaults to `60.0`):
            Seconds without a finished rollout after which every outstanding one is listed with what it waits for.
        gym_min_group_size (`int`, *optional*, defaults to `2`):
            A group with fewer rollouts that have a reward is left out of the loss.
        gym_min_valid_fraction (`float`, *optional*, defaults to `0.1`):
            A generation batch in which a smaller part of the rollouts can be trained on stops training. Rollouts of
            groups that `gym_refill_rounds` replaces count, too.
        gym_reward_components (`bool`, *optional*, defaults to `False`):
            Train the `reward_components` of Gym's answers (its multi-reward contract) instead of the reward that they
            are made of. Each is a column of its own, as a reward function is, under `multi_objective_aggregation`
            (`"normalize_then_sum"`: GDPO) and `scale_rewards`, with the weight that `reward_weights` has for its name.
            Rollouts without any have their reward in the column `gym`.
        gym_eval_sampling (`dict` or `str`, *optional*):
            Sampling parameters of evaluation that differ from training: `temperature`, `top_p`, `top_k`, `min_p`,
            `repetition_penalty`.
        gym_agent_sampling (`str`, *optional*, defaults to `"strip"`):
            What the policy server does with a model call of a rollout that asks for another distribution than that of
            `temperature`, `top_p` and the like (penalties, `logit_bias`, `response_format`, `structured_outputs`,
            `tool_choice: required`, …) or for a seed. `"strip"` leaves it out, `"refuse"` refuses the call, which
            fails the rollout, `"allow"` samples so, seeds excepted. Such calls are counted, and their agents named.
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

        > Parameters that control overlap

        gym_max_staleness (`int`, *optional*, defaults to `0`):
            Optimizer steps that may lie between the weights that a rollout begins with and the first step that trains
            its generation batch. 0: rollouts and training take turns. Otherwise rollouts of the next batches run while
            training does, and groups are trained as they end; tasks come in the same order. With it
            `vllm_importance_sampling_mode` is `"token_truncate"` unless set: TRL's default would leave long rollouts
            out.
        gym_batches_ahead (`int`, *optional*, defaults to `1`):
            Generation batches that are begun beside the one that is trained next, as far as `gym_max_staleness`
            allows; more are, up to its limit, where groups of earlier batches have not ended.
        gym_on_stale (`str`, *optional*, defaults to `"wait"`):
            What to do with a rollout that would become staler than `gym_max_staleness`: with `"wait"` training waits
            for it; `"drop"` cancels it, and it counts as failed (kind `cancelled`). `"drop"` needs whole groups on
            each rank.
        gym_eval_overlap (`str`, *optional*, defaults to `"drain"`):
            What an evaluation does with rollouts of training in flight: `"drain"` lets them end first, `"share"` runs
            beside them. Weights do not change during an evaluation either way.
        gym_refill_rounds (`int`, *optional*, defaults to `0`):
            How often groups that teach nothing (all rewards equal, or fewer than `gym_min_group_size` of them) are
            replaced by groups of further tasks, in each generation batch: tasks that it does not have, as long as the
            dataset has others, in an order that follows from `seed` and the batch. What is left after that is trained
            as it is, and counted.
        gym_oversample (`int`, *optional*, defaults to `0`):
            Further rollouts of each group: the first `num_generations` that have a reward make the group, the others
            are cancelled. It favours short rollouts.

        > Parameters that control weight sync

        gym_weight_transport (`str`, *optional*, defaults to `"auto"`):
            How weights reach the policy server. `"ipc"`: CUDA IPC, on shared GPUs. `"nccl"`: broadcast to other GPUs
            or hosts. `"file"`: a file in shared memory or on a shared disk, works everywhere. `"adapter"`: only the
            LoRA adapter is sent. `"shared"`: nothing is sent, since the engine is in the trainer's process. `"auto"`
            chooses from engine and placement.
        gym_weight_dir (`str`, *optional*):
            Folder through which `file` and `adapter` hand over weights. Default: shared memory (`/dev/shm`). With a
            server on another host it must be on a disk that both see.
        gym_weight_buffer_mb (`int`, *optional*, defaults to `512`):
            MB of packed weights that `ipc` and `nccl` send at a time; no single tensor may be bigger with `ipc`.
        gym_sync_only_trainable (`bool`, *optional*, defaults to `False`):
            After the first sync, send only parameters that are trained.
        gym_pause_mode (`str`, *optional*, defaults to `"wait"`):
            What a sync does with requests that are being answered: `"wait"` lets them finish, `"keep"` freezes them;
            they continue with the new weights, which compute the keys and values of their tokens again.
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
        gym_resume_changed (`str`, *optional*, defaults to `"refuse"`):
            What to do with a checkpoint that cannot be continued exactly, since it was made with other data, seed,
            batches, ranks, optimizer or adapter, or has no optimizer state: `"refuse"` starts nothing and names them
            all, `"allow"` names them and goes on. Other options that have changed are named and taken either way.
        gym_journal_max_mb (`float`, *optional*, defaults to `512.0`):
            Size in MB at which a journal file is continued in a new one.
        gym_log_dir (`str`, *optional*):
            Folder of the server logs. Default: `<output_dir>/logs`.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, *_JSON_OPTIONS]  # noqa: RUF012

    use_vllm: bool = field(
        default=True,
        metadata={"help": "Always true: rollouts are served by a policy server, see gym_engine."},
    )
    vllm_importance_sampling_mode: str | None = field(
        default=None,
        metadata={
            "help": "How ratios of training to sampling probabilities are bounded: token_truncate, token_mask, "
            "sequence_truncate or sequence_mask. Default: token_truncate with gym_max_staleness, else "
            f"{_SYNCHRONOUS_MODE}."
        },
    )
    # Numbers, or weights by name; on a command line text, which `__post_init__` reads.
    reward_weights: list[str] | None = field(
        default=None,
        metadata={
            "help": "Weights of gym, the environment's reward, and of reward functions: a list in that order, or a "
            "mapping by name, which gym_reward_components needs. Default: 1 for each."
        },
    )
    max_completion_length: int | None = None  # `__post_init__` sets it, and the next
    num_generations: int = None  # type: ignore[assignment]
    per_device_train_batch_size: int = None  # type: ignore[assignment]
    per_device_eval_batch_size: int = None  # type: ignore[assignment]
    gradient_accumulation_steps: int = None  # type: ignore[assignment]
    logging_steps: float = 1
    gym_config_paths: list[str] = field(default_factory=list)
    gym_mode: str = field(default="host", metadata={"choices": ["host", "upstream", "attach"]})
    gym_processes: int | None = None
    gym_head_url: str | None = None
    gym_python: str | None = None
    gym_overrides: dict[str, Any] | str | None = None
    gym_start_timeout: float = 120.0
    gym_engine: str = field(default="auto", metadata={"choices": ["auto", *engines.NAMES]})
    gym_vllm_args: dict[str, Any] | str | None = None
    gym_response_template: str | None = None
    gym_sglang_args: dict[str, Any] | str | None = None
    gym_sglang_python: str | None = None
    gym_server_start_timeout: float = 600.0
    gym_server_devices: str | None = None
    gym_server_restarts: int = 3
    gym_server_reconnect_timeout: float = 600.0
    gym_server_hang_timeout: float = 300.0
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
    gym_reward_components: bool = False
    gym_eval_sampling: dict[str, Any] | str | None = None
    gym_replay: str | None = None
    gym_resume_changed: str = field(default="refuse", metadata={"choices": ["refuse", "allow"]})
    gym_journal_max_mb: float = 512.0
    gym_agent_sampling: str = field(default=AGENT_SAMPLING[0], metadata={"choices": [*AGENT_SAMPLING]})
    gym_drift: str = field(default="truncate", metadata={"choices": ["truncate", "split", "exclude", "error"]})
    gym_train_calls: str = field(default="answer", metadata={"choices": ["answer", "all"]})
    gym_max_rows_factor: float = 2.0
    gym_untagged_calls: str = field(default="error", metadata={"choices": ["error", "warn"]})
    gym_max_staleness: int = 0
    gym_batches_ahead: int = 1
    gym_on_stale: str = field(default="wait", metadata={"choices": ["wait", "drop"]})
    gym_eval_overlap: str = field(default="drain", metadata={"choices": ["drain", "share"]})
    gym_refill_rounds: int = 0
    gym_oversample: int = 0
    gym_weight_transport: str = field(default="auto", metadata={"choices": ["auto", *TRANSPORTS]})
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
        problems = [*self._parse_json_options(), *replace_wrong_types(self), *replace_wrong_sizes(self)]
        problems += read_reward_weights(self)
        self._spell_out_retries()
        for name in _PATHS:
            setattr(self, name, home_paths(getattr(self, name)))
        if self.bf16 is None and (self.use_cpu or not _has_accelerator()):
            # TRL turns bf16 on by default. On a CPU, autocast is slower than float32 and widens the gap to the server.
            self.bf16 = False
        if self.gym_head_url is not None:
            self.gym_mode = "attach"
        if self.vllm_importance_sampling_mode is None:
            # The ratio of a whole sequence grows with its length, and rollouts ahead begin with older weights.
            self.vllm_importance_sampling_mode = "token_truncate" if self.gym_max_staleness > 0 else _SYNCHRONOUS_MODE
        self.notes: list[str] = fill_in(self, self.world_size)  # told at the start
        problems += find_problems(self)
        try:
            super().__post_init__()
        except ValueError as error:  # TRL's and transformers' own checks stop at their first complaint
            if UNEVEN_OF_TRL not in str(error):
                problems.append(Problem(str(error)))
        if self.steps_per_generation and self.num_generations:  # resolved by TRL, unless it complained before
            problems += batch_problems(self)
        if problems:
            raise ConfigError(f"{len(problems)} problem(s) in the configuration:", problems=problems)
        if self.gym_log_dir is None:
            self.gym_log_dir = os.path.join(self.output_dir, "logs")

    @property
    def world_size(self) -> int:
        """Number of training processes, which sizes of batches depend on: those that were launched.

        It is known before transformers has set up the devices. What looks at a run that is launched elsewhere
        overrides it.
        """
        if "distributed_state" in vars(self):
            return int(super().world_size)
        return launched_processes(os.environ) or 1

    @property
    def device(self) -> torch.device:
        """This rank's device. With several ranks on CPUs accelerate numbers theirs, and transformers could not resume:
        it has `torch.load` put the optimizer's state there, which knows "cpu" alone."""
        device = super().device
        return type(device)("cpu") if device.type == "cpu" else device

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
            agent_sampling=self.gym_agent_sampling,
            max_completion_length=self.max_completion_length,  # type: ignore[arg-type]  # set by `__post_init__`
            deadline=self.gym_deadline,
            max_inflight=self.gym_max_inflight,
            launch_rate=self.gym_launch_rate,
            retries=self.gym_retries,  # type: ignore[arg-type]  # a mapping since `__post_init__`, like the next
            environments=self.gym_environments or {},  # type: ignore[arg-type]
        )

    @property
    def has_whole_groups(self) -> bool:
        """Whether no group of a generation batch lies across ranks."""
        return self.per_device_train_batch_size * self.steps_per_generation % self.num_generations == 0

    @property
    def most_batches_ahead(self) -> int:
        """How many generation batches may be rolled out before the one that is trained has been.

        A generation batch is taken every E = `steps_per_generation` × `num_iterations` micro-steps, and G =
        `gradient_accumulation_steps` of them make an optimizer step. Between taking two batches that are i apart lie
        at most ⌈i·E/G⌉ optimizer steps, whatever the first micro-step is within its optimizer step; so i = ⌊S·G/E⌋ is
        the largest that stays within S = `gym_max_staleness`. An epoch may end with a shorter optimizer step: this
        holds for batches of one epoch.
        """
        return self.gym_max_staleness * self.gradient_accumulation_steps // self.generate_every

    def sampling_in(self, mode: str) -> Sampling:
        """Return the distribution that tokens are drawn from in training, `"train"`, or in evaluation, `"eval"`."""
        changes: Any = self.gym_eval_sampling if mode == "eval" else None
        return dataclasses.replace(self.rollout_options.sampling, **(changes or {}))

    def rollouts_in_flight(self, num_processes: int) -> int:
        """Return how many rollouts run at the same time at most, in training or evaluation.

        Args:
            num_processes: Number of training processes.
        """
        batch = self.per_device_train_batch_size * (self.steps_per_generation or 1)
        batch += batch // (self.num_generations or 1) * self.gym_oversample
        ahead = self.most_batches_ahead * batch
        evaluated = self.per_device_eval_batch_size + (ahead if self.gym_eval_overlap == "share" else 0)
        return num_processes * min(self.gym_max_inflight, max(batch + ahead, evaluated))

    @property
    def generate_every(self) -> int:
        """Micro-steps for which one generation batch is trained."""
        return (self.steps_per_generation or 1) * self.num_iterations

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


def launched_processes(environment: Mapping[str, str]) -> int | None:
    """Return the number of processes that a launcher started, where accelerate looks for it; None without a launcher.

    Args:
        environment: Variables of one of these processes.
    """
    return next((int(environment[name]) for name in _WORLD_SIZES if name in environment), None)


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


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
