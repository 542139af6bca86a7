"""What a checkpoint was made with, and what of that has changed when a run is resumed.

A checkpoint has a file of the options, of the data by a digest, of the adapter and of the number of ranks. When it is
resumed, each difference has a consequence (`CONSEQUENCES`):

    refused   tasks would come in another order, be skipped or repeated, or the state does not fit what is trained;
              `gym_resume_changed: allow` goes on all the same
    told      the run trains in another way from here on, which is what one resumes with another option for
    kept      the option has no effect, since the checkpoint's own value is put back
    silent    nothing that is trained depends on it

What the state of training lacks (`checkpoints.lost_state`) is refused, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gym import compat, recipes
from trl_gym.checkpoints import MADE_WITH, lost_best, lost_state
from trl_gym.dataset import ROW_COLUMN
from trl_gym.errors import ConfigError, Problem
from trl_gym.redaction import Redactor, secrets_in, secrets_of
from trl_gym.untrusted import parse_json

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trl_gym.config import GymGRPOConfig

logger = logging.getLogger(__name__)

_SCHEMA = 1
_ROWS_AT_A_TIME = 1000
_NUM_SHOWN_CHARS = 200  # of a value
_SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # of accelerate; the state of the others has one form
_PATHS_OF_ADAPTER = ("base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version")


class Consequence(StrEnum):
    """What follows from a difference; see above."""

    REFUSED = "refused"
    TOLD = "told"
    KEPT = "kept"
    SILENT = "silent"


# Micro-steps and rows of a generation batch: with others, what a checkpoint has of one fits nowhere.
LAYOUT = (
    *("world_size", "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"),
    *("steps_per_generation", "num_iterations"),
)
_REFUSED = (
    *LAYOUT,
    *("train_dataset", "adapter", "seed", "data_seed", "shuffle_dataset", "dataloader_drop_last"),
    *("sharding", "optim", "optim_target_modules", "fsdp", "deepspeed", "parallelism_config", "accelerator_config"),
)
# The optimizer's state and transformers' `trainer_state.json` have them.
_KEPT_BY_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_KEPT_BY_STATE = ("logging_steps", "eval_steps", "save_steps")
_TOLD = (
    *("model", "reward_funcs", "model_init_kwargs", "ignore_data_skip", "dataloader_in_order", "full_determinism"),
    # how long, and how fast
    *("num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("optim_args", "auto_find_batch_size", "average_tokens_across_devices", "fsdp_config"),
    # numbers and model
    *("bf16", "fp16", "tf32", "cast_lm_head_to_fp32", "use_liger_kernel", "liger_kernel_config", "disable_dropout"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "neftune_noise_alpha", "router_aux_loss_coef"),
    # sampling
    *("max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"),
    *("chat_template_kwargs", "vllm_max_model_length", "vllm_structured_outputs_regex"),
    # the loss
    *("label_smoothing_factor", "beta", "epsilon", "delta", "epsilon_high", "sapo_temperature_neg"),
    *("sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    *("importance_sampling_level", "reward_weights", "multi_objective_aggregation", "scale_rewards", "loss_type"),
    "gym_reward_components",
    *("mask_truncated_completions", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max"),
    *("entropy_coef_delta", "entropy_target", "vllm_importance_sampling_correction"),
    *("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
    *("vllm_importance_sampling_cap", "off_policy_mask_threshold", "use_bias_correction_kl"),
    # what is compared to choose the best
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "num_generations_eval"),
    "gym_eval_sampling",
    # environments and rollouts
    *("gym_config_paths", "gym_overrides", "gym_environments", "gym_on_environment_down", "gym_deadline"),
    *("gym_retries", "gym_replay", "gym_engine", "gym_vllm_args", "gym_sglang_args", "gym_response_template"),
    *("gym_min_group_size", "gym_drift", "gym_train_calls", "gym_max_rows_factor", "gym_untagged_calls"),
    "gym_agent_sampling",
    *("gym_max_staleness", "gym_batches_ahead", "gym_on_stale", "gym_refill_rounds", "gym_oversample"),
    "gym_pause_mode",
)
_SILENT = (
    *("output_dir", "resume_from_checkpoint", "gym_resume_changed", "do_train", "do_eval", "do_predict", "local_rank"),
    "generation_batch_size",  # follows from others
    *("train_sampling_strategy", "length_column_name"),  # TRL has a sampler of its own
    # memory and speed
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "use_cache", "use_cpu", "torch_empty_cache_steps"),
    *("pad_to_multiple_of", "ds3_gather_for_generation", "dataloader_num_workers", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend"),
    *("ddp_timeout", "cache_implementation", "use_transformers_paged", "use_transformers_continuous_batching"),
    *("transformers_continuous_batching_config", "trust_remote_code", "remove_unused_columns", "label_names"),
    # what is logged and written
    *("logging_strategy", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "log_level"),
    *("include_num_input_tokens_seen", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics", "debug"),
    *("log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts"),
    *("log_completions_hub_repo", "save_only_model", "save_strategy", "save_on_each_node", "save_total_limit"),
    *("enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
    *("hub_always_push", "hub_revision", "restore_callback_states_from_checkpoint"),
    # evaluation
    *("eval_strategy", "eval_delay", "eval_on_start", "per_device_eval_batch_size", "prediction_loss_only"),
    *("bf16_full_eval", "fp16_full_eval", "eval_do_concat_batches", "eval_use_gather_object"),
    *("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "gym_eval_overlap"),
    # how servers are started, found and fed
    *("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_base_url"),
    *("vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
    *("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "max_tool_calling_iterations", "gym_mode"),
    *("gym_processes", "gym_head_url", "gym_python", "gym_start_timeout", "gym_sglang_python"),
    *("gym_server_start_timeout", "gym_server_devices", "gym_server_restarts", "gym_server_reconnect_timeout"),
    *("gym_gpu_memory", "gym_offload_optimizer", "gym_max_inflight", "gym_launch_rate", "gym_stall_timeout"),
    *("gym_min_valid_fraction", "gym_journal_max_mb", "gym_weight_transport", "gym_weight_dir", "gym_log_dir"),
    *("gym_weight_buffer_mb", "gym_sync_only_trainable", "gym_sync_timeout", "gym_verify_sync_steps"),
    *("gym_max_adapters", "gym_probe_tolerance", "gym_server_hang_timeout"),
)
CONSEQUENCES: Mapping[str, Consequence] = {
    **dict.fromkeys(_REFUSED, Consequence.REFUSED),
    **dict.fromkeys(_TOLD, Consequence.TOLD),
    **dict.fromkeys((*_KEPT_BY_OPTIMIZER, *_KEPT_BY_STATE), Consequence.KEPT),
    **dict.fromkeys(_SILENT, Consequence.SILENT),
}


@dataclass(frozen=True, slots=True)
class Change:
    """A difference between what a checkpoint was made with and what it is resumed with."""

    name: str
    then: Any
    now: Any

    @property
    def consequence(self) -> Consequence:
        """What follows from it; an option that nobody has decided about, as of a subclass, is told."""
        return CONSEQUENCES.get(self.name, Consequence.TOLD)

    def __str__(self) -> str:
        then, now = _differing(self.then, self.now)
        if self.consequence is Consequence.KEPT:
            return f"`{self.name}` stays {_shown(then)}, which the checkpoint puts back ({_shown(now)} has no effect)"
        return f"`{self.name}` was {_shown(then)} and is {_shown(now)}"


def facts(args: GymGRPOConfig, dataset: Any, world_size: int, **more: Any) -> dict[str, Any]:
    """Return what a checkpoint is made with, as JSON: no secrets, and nothing that is silent.

    Args:
        more: What else there is; see `of_model`.
    """
    names = (one.name for one in fields(args) if CONSEQUENCES.get(one.name) is not Consequence.SILENT)
    values = {name: getattr(args, name) for name in names}
    values |= {"gym_config_paths": [_with_digest(path) for path in args.gym_config_paths]}
    if isinstance(args.deepspeed, str):
        values |= {"deepspeed": _with_digest(args.deepspeed)}
    values |= {"world_size": world_size, "train_dataset": _tasks(dataset), **more}
    redact = Redactor([*secrets_of(os.environ), *secrets_in(args.gym_overrides), *secrets_in(args.gym_environments)])
    plain: dict[str, Any] = redact(json.loads(json.dumps(values, default=_plain)))
    return plain


def of_model(accelerator: Accelerator, model: Any, reward_funcs: Sequence[str]) -> dict[str, Any]:
    """Return what is known once there is a model: where it is from, its adapters, what shards it (a launcher may have
    said so), and the rewards' names."""
    model = accelerator.unwrap_model(model)
    kind = str(accelerator.distributed_type.value)
    adapters = getattr(model, "peft_config", None) or {}
    own = {name: _adapter(config) for name, config in adapters.items() if name != "ref"}  # TRL's, with `beta`
    sharding = kind if kind in _SHARDING else None
    names = list(reward_funcs)
    return {"model": compat.model_id(model), "adapter": own or None, "sharding": sharding, "reward_funcs": names}


def write(folder: str | Path, made_with: Mapping[str, Any]) -> None:
    """Write what a checkpoint is made with into its folder, whole or not at all."""
    path = Path(folder) / MADE_WITH
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps({"schema": _SCHEMA, "made_with": made_with}, indent=1) + "\n")
    os.replace(beside, path)


def read(folder: str | Path) -> dict[str, Any] | None:
    """Return what a checkpoint was made with; None where it does not say it. Raises `ConfigError`: another version of
    trl-gym wrote it, or it is damaged."""
    path = Path(folder) / MADE_WITH
    try:
        content = parse_json(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read ({error}).", "Resume from an earlier checkpoint.") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != _SCHEMA or not isinstance(content.get("made_with"), dict):
        raise ConfigError(
            f"{path} has schema {schema}, and this trl-gym reads {_SCHEMA}.",
            "Resume with the version of trl-gym that wrote it.",
        )
    made_with: dict[str, Any] = content["made_with"]
    return made_with


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return what has changed of that which is known of both, in the order of `now`."""
    known = [name for name in now if name in then and CONSEQUENCES.get(name) is not Consequence.SILENT]
    return [Change(name, then[name], now[name]) for name in known if _differ(name, then[name], now[name])]


def _differ(name: str, then: Any, now: Any) -> bool:
    if name != "adapter" or not (isinstance(then, dict) and isinstance(now, dict)) or then.keys() != now.keys():
        return bool(then != now)
    # Another version of PEFT has other fields: what only one of them has is none of the user's.
    pairs = [(then[one], now[one]) for one in then]
    return any(old[field] != new[field] for old, new in pairs for field in old.keys() & new.keys())


def require_same(
    checkpoint: str | Path, now: Mapping[str, Any], lost: Iterable[str], *, is_allowed: bool, is_told: bool = True
) -> bool:
    """Compare what a checkpoint was made with with a run that resumes it, and say what has changed.

    Args:
        now: `facts` of the run.
        lost: Files of the state of training that it does not have, of any rank; see `lost_files`.
        is_allowed: Whether to go on with changes that break exactness (`gym_resume_changed`).
        is_told: Whether the others are said.

    Returns:
        Whether what it has of a generation batch fits the batches of this run.

    Raises:
        ConfigError: Exactness would be broken, and that is not allowed; has everything that would.
    """
    then = read(checkpoint)
    if then is None and is_told:
        logger.warning(
            "%s does not say what it was made with (an earlier trl-gym wrote it, or another trainer): whether options "
            "or data have changed since then is not known",
            checkpoint,
        )
    lost = sorted(set(lost))
    found = changes(then or {}, now)
    if "optimizer.pt" in lost or "scheduler.pt" in lost:  # without one of them, transformers reads neither
        found = [change for change in found if change.name not in _KEPT_BY_OPTIMIZER]
    breaking = [str(change) for change in found if change.consequence is Consequence.REFUSED]
    breaking += [f"{name} is missing, and with it a part of the state of training" for name in lost]
    if now.get("load_best_model_at_end") and (best := lost_best(Path(checkpoint))) is not None:
        breaking.append(best)
    if breaking and not is_allowed:
        raise ConfigError(
            f"{checkpoint} was made in another way than this run would go on, and cannot be continued exactly "
            "(`gym_resume_changed` is 'refuse'):",
            "Resume with the former values, or set `gym_resume_changed` to 'allow' to go on all the same.",
            [Problem(f"{text}.") for text in breaking],
        )
    told = [str(change) for change in found if change.consequence is not Consequence.REFUSED]
    if is_told and (breaking or told):
        logger.warning("%s is continued in another way than it was made: %s", checkpoint, "; ".join(breaking + told))
    return not {change.name for change in found} & set(LAYOUT)


def lost_files(checkpoint: str | Path, rank: int, num_ranks: int) -> list[str]:
    """Return the files that a rank reads and the checkpoint does not have. Where another number of ranks wrote it,
    which is refused itself, files of ranks are not counted."""
    folder = Path(checkpoint)
    then = read(folder)
    lost = lost_state(folder, rank, num_ranks)
    if then is not None and then.get("world_size") != num_ranks:
        return [name for name in lost if not name.startswith("rng_state")]
    own = f"trl_gym_state.rank-{rank}.pt"
    return lost if then is None or (folder / own).exists() else [*lost, own]


def _tasks(dataset: Any) -> dict[str, Any] | None:
    """Return number and digest of the rows, in their order, as far as a look at them changes nothing."""
    if dataset is None or not hasattr(dataset, "__len__"):
        return None
    digest = hashlib.sha256()
    if ROW_COLUMN in (getattr(dataset, "column_names", None) or ()):
        batches = dataset.select_columns([ROW_COLUMN]).with_format(None).iter(_ROWS_AT_A_TIME)
        rows = (row for batch in batches for row in batch[ROW_COLUMN])  # ten times as fast as one by one
    elif isinstance(dataset, list | tuple):
        rows = (row.get(ROW_COLUMN) for row in dataset)
    else:  # rows are made when they are read, perhaps others each time
        return {"tasks": len(dataset)}
    for row in rows:
        text = row if isinstance(row, str) else json.dumps(row, default=_plain)
        digest.update(f"{len(text)}:{text}".encode(errors="surrogatepass"))
    return {"tasks": len(dataset), "digest": digest.hexdigest()[:16]}


def _with_digest(path: str) -> str:
    """Return the name of a config with a digest of what it says; as it stands where it is in Gym's installation."""
    file = Path(recipes.find(path))
    try:
        return f"{file.name} ({hashlib.sha256(file.read_bytes()).hexdigest()[:8]})"
    except OSError:
        return path


def _adapter(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = config.to_dict()
    return {name: value for name, value in values.items() if name not in _PATHS_OF_ADAPTER}


def _plain(value: Any) -> Any:
    """Return what stands in JSON for a value of an option."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value) if isinstance(value, os.PathLike) else type(value).__name__


def _differing(then: Any, now: Any) -> tuple[Any, Any]:
    """Leave out of two mappings what is the same in both."""
    if not isinstance(then, dict) or not isinstance(now, dict):
        return then, now
    pairs = {key: _differing(then.get(key), now.get(key)) for key in {**then, **now} if then.get(key) != now.get(key)}
    return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _NUM_SHOWN_CHARS else f"{text[:_NUM_SHOWN_CHARS]}…"
