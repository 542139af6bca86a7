"""What each option of TRL's `GRPOConfig` does here: something of its own, what it does in TRL, or nothing: refused.

Every option is in one of these tables; `tests/test_trl_options.py` walks those of the installed TRL and transformers.
`docs/reference/configuration.md` is written from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from trl_gym.errors import Problem

if TYPE_CHECKING:
    from trl_gym.config import GymGRPOConfig

# Options that mean something of their own here, or have another default; Markdown.
HERE: dict[tuple[str, ...], str] = {
    ("vllm_mode",): '`"colocate"` (default of TRL): the trainer starts the policy server, on the devices of training '
    'unless `gym_server_devices` names others. `"server"`: nothing is started, `vllm_server_base_url` names a running '
    "one",
    ("vllm_server_base_url",): "base URL of that server, e.g. `http://10.0.0.5:8000/v1`; several replicas separated "
    "by commas. Its key is taken from `$VLLM_API_KEY`",
    ("vllm_server_timeout",): "seconds that we wait for that server at the start",
    ("vllm_max_model_length",): "context length of the server that we start; default: the model's, or what fits into "
    "the memory for the KV cache where that is less (`--max-model-len auto`)",
    ("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size"): "passed to the server that we start",
    ("vllm_enable_sleep_mode",): "the server that we start sleeps during updates; see "
    "[out of memory](../howto/out_of_memory.md)",
    ("max_completion_length",): "tokens of a conversation after its first prompt, over all its turns, tool outputs "
    "included ([default](#max_completion_length)). A rollout has one conversation, unless its agent [begins "
    "others](../token_fidelity.md#whose-call-it-is)",
    ("num_generations", "per_device_train_batch_size", "per_device_eval_batch_size"): "8 unless given, as in TRL; "
    "what is given stays",
    ("gradient_accumulation_steps",): "[8 tasks](#gradient_accumulation_steps) per optimizer step where nothing but "
    "`num_generations` is said about batches",
    ("logging_steps",): "1, so that each step is seen (TRL: 10)",
    ("learning_rate",): "TRL's default, 1e-6, which is for whole models; with an adapter a smaller one than 5e-6 is "
    "warned of",
    ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"): "pinned for every model call of a rollout, "
    "whatever the agent asks for",
    ("chat_template_kwargs",): "stamped into every model call of a rollout",
    ("vllm_importance_sampling_mode",): '`"token_truncate"` by default with '
    "[`gym_max_staleness`](#gym_max_staleness), else TRL's default",
    ("reward_weights",): "a list that begins with the weight of the environment's reward, or a mapping by name "
    "(`gym`, components, reward functions), which [`gym_reward_components`](#gym_reward_components) needs",
    ("mask_truncated_completions",): "masks what Gym reports as cut, where TRL looks at the last token",
    ("pad_to_multiple_of",): "of what is computed together, where TRL pads all rows of a batch",
    ("use_vllm",): "always true",
    ("bf16",): "off on a machine without an accelerator, unless set",
}


@dataclass(frozen=True, slots=True)
class Refused:
    """An option that has no effect here: another value than the default is refused."""

    reason: str  # after "has no effect …:"
    remedy: str = "Remove it."
    mode: str | None = None  # only with this `vllm_mode`


_TOOLS = "the agent of a NeMo Gym environment decides when it ends"
_SERVER = "Set `vllm_server_base_url` to its URL."
_RUNS = "the server of `vllm_mode` 'server' runs already", "Start the server with it, and remove it here."
_OTHER_ENGINE = "`gym_engine` says what samples"
_SET_ENGINE = "Set `gym_engine` to 'transformers', or remove it."
REFUSED: dict[str, Refused] = {
    "vllm_structured_outputs_regex": Refused("NeMo Gym's agents make the requests"),
    "generation_kwargs": Refused(
        "server-wide settings belong into `gym_vllm_args`", "Remove it, or name flags of the server there."
    ),
    "cache_implementation": Refused(f"it is of `model.generate`, and {_OTHER_ENGINE}"),
    "use_transformers_continuous_batching": Refused(_OTHER_ENGINE, _SET_ENGINE),
    "use_transformers_paged": Refused(_OTHER_ENGINE, _SET_ENGINE),
    "transformers_continuous_batching_config": Refused("the engine is set up from the lengths and batches of the run"),
    "max_tool_calling_iterations": Refused(_TOOLS, "Set the limit in the agent's configuration, or remove it."),
    "vllm_model_impl": Refused(
        "the policy server has flags of its own", "Set `model-impl` in `gym_vllm_args`, or remove it."
    ),
    "vllm_server_host": Refused("a server that runs elsewhere has one address", _SERVER),
    "vllm_server_port": Refused("a server that runs elsewhere has one address", _SERVER),
    "vllm_group_port": Refused("the weight transport `nccl` takes a free port"),
    "vllm_server_timeout": Refused(
        "it is the wait for a server that runs elsewhere, and `vllm_mode` 'colocate' starts one",
        "Set `gym_server_start_timeout`, or remove it.",
        mode="colocate",
    ),
    "vllm_gpu_memory_utilization": Refused(*_RUNS, mode="server"),
    "vllm_tensor_parallel_size": Refused(*_RUNS, mode="server"),
    "ds3_gather_for_generation": Refused("a weight sync gathers one parameter at a time", "Leave it at true."),
    "log_multimodal": Refused("images are in Gym's rows, which no completions table shows", "Leave it at true."),
    "remove_unused_columns": Refused(
        "tasks are in columns that no model takes, and would be removed", "Leave it at false."
    ),
}

# Options of TRL, and of transformers, that do here what they do there.
INHERITED: tuple[str, ...] = (
    *("model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "disable_dropout", "cast_lm_head_to_fp32"),
    *("num_generations_eval", "generation_batch_size", "steps_per_generation", "num_iterations", "shuffle_dataset"),
    *("loss_type", "beta", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "use_bias_correction_kl"),
    *("sapo_temperature_neg", "sapo_temperature_pos"),
    *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    *("multi_objective_aggregation", "scale_rewards", "off_policy_mask_threshold", "top_entropy_quantile"),
    *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *("entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"),
    *("entropy_target", "vllm_importance_sampling_correction", "vllm_importance_sampling_cap"),
    *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
    *("log_completions", "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"),
)
OF_TRANSFORMERS: tuple[str, ...] = (
    *("output_dir", "num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules"),
    *("average_tokens_across_devices", "max_grad_norm", "label_smoothing_factor", "fp16", "bf16_full_eval"),
    *("fp16_full_eval", "tf32", "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile"),
    *("torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config", "use_cache"),
    *("neftune_noise_alpha", "torch_empty_cache_steps", "auto_find_batch_size", "logging_strategy"),
    *("logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "include_num_input_tokens_seen"),
    *("log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id"),
    *("trackio_bucket_id", "trackio_static_space_id", "eval_strategy", "eval_steps", "eval_delay"),
    *("prediction_loss_only", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object"),
    *("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "save_only_model", "save_strategy"),
    *("save_steps", "save_on_each_node", "save_total_limit", "enable_jit_checkpoint", "push_to_hub", "hub_token"),
    *("hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "ignore_data_skip"),
    *("restore_callback_states_from_checkpoint", "full_determinism", "seed", "data_seed", "use_cpu"),
    *("accelerator_config", "parallelism_config", "dataloader_drop_last", "dataloader_num_workers"),
    *("dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "dataloader_in_order", "label_names", "train_sampling_strategy"),
    *("length_column_name", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *("ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "debug"),
    *("warmup_ratio", "logging_dir", "activation_checkpointing", "activation_checkpointing_kwargs"),  # some versions
    *("skip_memory_metrics", "do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank"),
)


def unused_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    """List the options of TRL that have no effect on rollouts through NeMo Gym and are set."""
    defaults = {one.name: one.default for one in fields(config)}
    for name, refused in REFUSED.items():
        value = getattr(config, name)
        if refused.mode in (None, config.vllm_mode) and value != defaults[name] and value not in (None, "", {}):
            yield Problem(
                f"`{name}` is {value!r} and has no effect on Gym rollouts: {refused.reason}.", refused.remedy
            )
