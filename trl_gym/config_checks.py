"""Everything that can be wrong with the options of trl-gym, one `Problem` for each."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gym import engines
from trl_gym.errors import ConfigError, Problem
from trl_gym.given import url_problems
from trl_gym.rollout_options import SAMPLING_KEYS, Sampling, number_problems, sampling_problems
from trl_gym.trl_options import unused_problems

if TYPE_CHECKING:
    from trl_gym.config import GymGRPOConfig

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
# The same for SGLang, besides those that the command of its server has for itself (`sglang/server.py`).
OWNED_SGLANG_FLAGS = {
    "context-length": "set `vllm_max_model_length`",
    "mem-fraction-static": "set `vllm_gpu_memory_utilization`",
    **dict.fromkeys(("tp", "tp-size", "tensor-parallel-size"), "set `vllm_tensor_parallel_size`"),
    "enable-memory-saver": "set `vllm_enable_sleep_mode`",
}
# Values of `loss_type` with a mean over each row's tokens. The rows of a rollout weigh by their tokens there, which a
# single `beta` for all of them cannot express.
TOKEN_MEAN_LOSSES = ("grpo", "sapo")
_SECONDS = (
    *("gym_start_timeout", "gym_server_start_timeout", "gym_server_reconnect_timeout", "gym_server_hang_timeout"),
    *("gym_stall_timeout", "gym_sync_timeout"),
)
_AT_LEAST = {
    "gym_min_group_size": 2,  # a group of one has no baseline
    "gym_max_staleness": 0,
    "gym_batches_ahead": 1,
    "gym_refill_rounds": 0,
    "gym_oversample": 0,
    "gym_verify_sync_steps": 0,
    "gym_server_restarts": 0,
    "gym_max_adapters": 2,  # one is loaded while the other is used
    "gym_weight_buffer_mb": 1,
}
# Sizes of batches, by which TRL divides; those of None are not given.
_SIZES = {
    "num_generations": 2,  # a group of one has no baseline
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "generation_batch_size": 1,
    "num_generations_eval": 1,
    "num_iterations": 1,
}
# Their defaults; other values need overlap.
_OVERLAP_ONLY = {"gym_batches_ahead": 1, "gym_on_stale": "wait", "gym_eval_overlap": "drain"}
_GROUP_OPTIONS = ("gym_refill_rounds", "gym_oversample")

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


def replace_wrong_types(config: GymGRPOConfig) -> list[Problem]:
    """Put the default where a value is of a wrong type, so that all other checks can be made; list such values.

    YAML's `null`, and text where a number belongs, would otherwise end in a TypeError somewhere later. Of TRL's
    options only numbers are looked at: others convert what they take.
    """
    hints = typing.get_type_hints(type(config))
    problems = []
    for one in fields(config):
        value, hint = getattr(config, one.name), hints[one.name]
        is_checked = one.name.startswith("gym_") or set(_alternatives(hint)) <= _NUMBERS
        if is_checked and not _is_of(value, hint) and value != _default(one):
            setattr(config, one.name, _default(one))
            problems.append(Problem(f"`{one.name}` is {value!r}.", f"Set it to {_spelled(hint)}."))
    return problems


def replace_wrong_sizes(config: GymGRPOConfig) -> list[Problem]:
    """Put the default where the size of a batch is too small for all other checks to be made; list such values."""
    problems = []
    for one in fields(config):
        value = getattr(config, one.name)
        if one.name in _SIZES and value is not None:
            found = list(number_problems(one.name, value, least=_SIZES[one.name], whole=True))
            if found:
                setattr(config, one.name, _default(one))
            problems += found
    return problems


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


def read_reward_weights(config: GymGRPOConfig) -> list[Problem]:
    """Read `reward_weights`, numbers or a mapping by name, from text too; None where it is something else."""
    given: Any = config.reward_weights
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str) and given[0].lstrip().startswith("{"):
        given = given[0]
    config.reward_weights = None
    try:
        given = json.loads(given) if isinstance(given, str) else given
        weights = {str(name): float(weight) for name, weight in given.items()} if isinstance(given, dict) else None
        listed = [float(weight) for weight in given or ()] if weights is None else list(weights.values())
    except (TypeError, ValueError):
        listed = [math.nan]
    if not all(map(math.isfinite, listed)):
        return [
            Problem(
                f"`reward_weights` is {given!r}.",
                """Set it to a list of numbers, or to a mapping from names to numbers ('{"name": 1}').""",
            )
        ]
    config.reward_weights = given and (listed if weights is None else weights)  # type: ignore[assignment]
    if weights is None and listed and config.gym_reward_components:
        return [
            Problem(
                f"`reward_weights` is {given!r} and `gym_reward_components` true: components have names, no order.",
                "Set it to a mapping from the name of each component, and of each reward function, to its weight.",
            )
        ]
    return []


# -- what is not given ------------------------------------------------------------------------------------------------

_COMPLETION_TOKENS = 2048
_GROUPS = 8  # per optimizer step
_TRL_ROWS = 8  # TRL's `per_device_train_batch_size`, and its `num_generations`
_SMALL_LEARNING_RATE = 5e-6  # for an adapter


def fill_in(config: GymGRPOConfig, num_processes: int) -> list[str]:
    """Set options that are not given and of which TRL's default does not train an agent; return what was set, and why.

    Args:
        config: Its numbers are of the right types.
    """
    notes: list[str] = []
    if config.max_completion_length is None:
        context = config.vllm_max_model_length
        config.max_completion_length = _COMPLETION_TOKENS if context is None else min(_COMPLETION_TOKENS, context // 2)
        notes.append(
            f"`max_completion_length` is {config.max_completion_length} tokens for a whole conversation after its "
            "first prompt (TRL's 512 are for one answer)"
        )
    least_tasks = _GROUPS if config.per_device_train_batch_size is None else 1
    for name in ("num_generations", "per_device_train_batch_size"):
        if getattr(config, name) is None:
            setattr(config, name, _TRL_ROWS)
    group, rows = config.num_generations, config.per_device_train_batch_size * num_processes
    if config.per_device_eval_batch_size is None:
        evaluated = config.num_generations_eval or group
        config.per_device_eval_batch_size = _whole_groups(num_processes, evaluated, at_least=_TRL_ROWS)
    if config.gradient_accumulation_steps is None:
        said = config.generation_batch_size or config.steps_per_generation
        steps = 1 if said else _whole_groups(rows, group, at_least=-(-least_tasks * group // rows))
        config.gradient_accumulation_steps = steps
        if steps > 1:
            tasks = f"{steps * rows // group} task{'s' if steps * rows > group else ''}"
            of_trl = "no whole group" if rows % group else f"{rows // group}"
            notes.append(
                f"`gradient_accumulation_steps` is {steps}, for {tasks} × {group} rollouts "
                f"per optimizer step (TRL's 1 makes {of_trl})"
            )
    return notes


def _whole_groups(rows: int, group: int, *, at_least: int) -> int:
    """Return the smallest number from `at_least` on that makes whole groups of so many rows each time."""
    unit = group // math.gcd(rows, group)
    return -(-at_least // unit) * unit


def small_batch_notes(config: GymGRPOConfig, num_processes: int, *, adapts: bool) -> list[str]:
    """Say which options let a run learn little or nothing.

    Args:
        adapts: Whether an adapter is trained.
    """
    notes = []
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * num_processes
    if rows <= config.num_generations:
        notes.append(
            f"an optimizer step is made of one task's {rows} rollouts: nothing is learned from it when their rewards "
            "are equal. Raise `gradient_accumulation_steps` for several tasks per step."
        )
    if adapts and config.learning_rate < _SMALL_LEARNING_RATE:
        notes.append(
            f"`learning_rate` is {config.learning_rate:g}, and an adapter is trained: TRL's default of 1e-6 is for "
            "whole models, adapters want about ten times as much or more."
        )
    return notes


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
        *_sampling_problems(config),
        *_row_problems(config),
        *_shared_gpu_problems(config),
        *_overlap_problems(config),
        *engines.named_problems(config),
        *unused_problems(config),
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
    if config.gym_head_url is not None:
        yield from url_problems("gym_head_url", config.gym_head_url)
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
    if config.vllm_server_base_url is not None:
        yield from url_problems("vllm_server_base_url", config.vllm_server_base_url)
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
    yield from _sglang_problems(config)
    for name in ("gym_server_start_timeout", "gym_server_reconnect_timeout", "gym_server_hang_timeout"):
        if (seconds := getattr(config, name)) >= config.ddp_timeout:
            yield Problem(
                f"`{name}` is {seconds:g} and `ddp_timeout` {config.ddp_timeout}: the ranks that wait for the one "
                "which waits for the server would give up first.",
                "Set `ddp_timeout` higher.",
            )


def _sglang_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    given = config.gym_sglang_args
    if not isinstance(given, dict | None):
        yield Problem(f"`gym_sglang_args` is {given!r}.", "Set it to a mapping, or to a JSON object.")
        return
    starts = config.gym_engine == "sglang" and config.vllm_mode == "colocate"
    for name in ("gym_sglang_args", "gym_sglang_python"):
        if getattr(config, name) and not starts:
            yield Problem(
                f"`{name}` is set, and no SGLang is started: `gym_engine` is {config.gym_engine!r} and `vllm_mode` "
                f"{config.vllm_mode!r}.",
                f"Set `gym_engine` to 'sglang' and `vllm_mode` to 'colocate', or leave `{name}` out.",
            )
    if starts and config.gym_vllm_args:
        yield Problem(
            "`gym_vllm_args` are flags of `vllm serve`, and `gym_engine` is 'sglang'.", "Use `gym_sglang_args`."
        )
    for flag in given or {}:
        name = flag.lstrip("-").replace("_", "-")
        if (reason := OWNED_SGLANG_FLAGS.get(name)) is not None:
            yield Problem(f"`gym_sglang_args` must not set {flag!r}: {reason}.", "Remove it.")


def _length_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    length, context = config.max_completion_length, config.vllm_max_model_length
    for name, value in (("max_completion_length", length), ("vllm_max_model_length", context)):
        if value is not None:
            yield from number_problems(name, value, least=1, whole=True)
    if context is not None and length is not None and length >= context:
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


def _sampling_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    given = {name: value for name in SAMPLING_KEYS if (value := getattr(config, name)) is not None}
    yield from sampling_problems(str, given, is_trained=True)
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
            yield from sampling_problems(lambda key: f"gym_eval_sampling[{key!r}]", {name: value})


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


def _overlap_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    staleness = f"`gym_max_staleness` is {config.gym_max_staleness}"
    synchronous = "Set `gym_max_staleness` to 0"
    if config.gym_max_staleness > 0:
        if config.vllm_enable_sleep_mode:
            yield Problem(
                f"{staleness} and `vllm_enable_sleep_mode` true: rollouts cannot run while training does, since the "
                "server sleeps then.",
                f"{synchronous}, or leave `vllm_enable_sleep_mode` out.",
            )
        if not config.vllm_importance_sampling_correction:
            yield Problem(
                f"{staleness} and `vllm_importance_sampling_correction` false: nothing would correct for the older "
                "weights that tokens were sampled with.",
                "Set `vllm_importance_sampling_correction` to true, or `gym_max_staleness` to 0.",
            )
        if config.num_iterations > 1:
            yield Problem(
                f"{staleness} and `num_iterations` {config.num_iterations}: each further pass over a generation batch "
                "would train rollouts that are staler than that.",
                f"{synchronous}, or `num_iterations` to 1.",
            )
    for name, default in _OVERLAP_ONLY.items():
        if config.gym_max_staleness == 0 and getattr(config, name) != default:
            yield Problem(
                f"`{name}` is {getattr(config, name)!r} and `gym_max_staleness` 0: no rollout runs during training.",
                f"Set `gym_max_staleness` to at least 1, or leave `{name}` out.",
            )
    for name in ("gym_max_staleness", *_GROUP_OPTIONS):
        if config.gym_replay is not None and (value := getattr(config, name)) > 0:
            yield Problem(
                f"`{name}` is {value} and `gym_replay` {config.gym_replay!r}: recorded rollouts are looked up, and no "
                "others can be made.",
                f"Set `{name}` to 0, or leave `gym_replay` out.",
            )


# -- batches and rewards ----------------------------------------------------------------------------------------------


def batch_problems(config: GymGRPOConfig) -> list[Problem]:
    """List what is wrong with our options given the sizes of batches that TRL has resolved."""
    uneven = _uneven_problems(config)
    return [*uneven, *_small_group_problems(config), *_batch_ahead_problems(config), *_whole_group_problems(config)]


UNEVEN_OF_TRL = "must be divisible by num_generations"  # of its message, which names an option that it has set itself


def _uneven_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    size, steps, group = config.per_device_train_batch_size, config.steps_per_generation, config.num_generations
    rows = size * config.world_size
    if steps * rows % group:
        unit = _whole_groups(rows, group, at_least=1)
        yield Problem(
            f"`num_generations` {group} does not divide a generation batch: `per_device_train_batch_size` {size} × "
            f"`steps_per_generation` {steps} (where not given, `gradient_accumulation_steps`) × {config.world_size} "
            f"process(es) are {steps * rows} rollouts.",
            f"Make those steps a multiple of {unit} (`generation_batch_size` one of {unit * rows}), or leave all of "
            "them out.",
        )


def _small_group_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    if config.gym_min_group_size > config.num_generations:
        yield Problem(
            f"`gym_min_group_size` is {config.gym_min_group_size} and `num_generations` {config.num_generations}: "
            "every group would be left out of the loss.",
            f"Set `gym_min_group_size` to at most {config.num_generations}.",
        )


def _batch_ahead_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    steps, accumulated = config.steps_per_generation, config.gradient_accumulation_steps
    if config.gym_max_staleness > 0 and steps > config.gym_max_staleness * accumulated:
        yield Problem(
            f"`gym_max_staleness` is {config.gym_max_staleness}, and a generation batch lasts longer: "
            f"`steps_per_generation` {steps} ÷ `gradient_accumulation_steps` {accumulated} optimizer steps. No "
            "rollout could begin ahead of its batch.",
            f"Set `gym_max_staleness` to 0 or at least {-(-steps // accumulated)}, or lower `steps_per_generation`.",
        )


def _whole_group_problems(config: GymGRPOConfig) -> Iterator[Problem]:
    size, steps = config.per_device_train_batch_size, config.steps_per_generation
    product = f"`per_device_train_batch_size` {size} × `steps_per_generation` {steps}"
    if config.has_whole_groups:
        return
    for name in (*_GROUP_OPTIONS, "gym_on_stale"):
        if (value := getattr(config, name)) not in (0, "wait"):
            yield Problem(
                f"`{name}` is {value!r} and needs whole groups of `num_generations` {config.num_generations} on each "
                f"rank, which has {product} rollouts.",
                f"Make that product a multiple of `num_generations`, or leave `{name}` out.",
            )


def check_datasets(config: GymGRPOConfig, train: Any, evaluation: Any) -> None:
    """Refuse datasets of which nothing would be trained, or nothing evaluated.

    Args:
        config: Options of the run, with the sizes of batches that TRL has resolved.
        train: The dataset to train on; one without a length is not looked at, like None.
        evaluation: The dataset to evaluate on, or several by name.

    Raises:
        ConfigError: There are too few tasks; has their number, and that which is needed.
    """
    sets = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    found = [eval_dataset_problem(config, name, len(data)) for name, data in sets.items() if hasattr(data, "__len__")]
    if hasattr(train, "__len__"):
        found.insert(0, dataset_problem(config, len(train)))
    problems = [problem for problem in found if problem is not None]
    if len(problems) == 1:
        raise ConfigError(problems[0].text, problems[0].remedy)
    if problems:
        raise ConfigError("Datasets are too small:", problems=problems)


def eval_dataset_problem(config: GymGRPOConfig, name: str, num_tasks: int) -> Problem | None:
    """Say that an evaluation set is empty, or has fewer rollouts than a batch while incomplete ones are dropped.

    Args:
        name: Name of the set; empty for one without.
    """
    generations = config.num_generations_eval or config.num_generations
    batch = config.per_device_eval_batch_size * config.world_size if config.dataloader_drop_last else 1
    if num_tasks * generations >= batch:
        return None
    return Problem(
        f"The evaluation set{f' {name}' if name else ''} has {num_tasks} tasks, which make {num_tasks * generations} "
        f"rollouts, and a batch needs {batch}: nothing would be evaluated.",
        "Use more tasks, or set `dataloader_drop_last` to false." if num_tasks else "Leave it out, or fill it.",
    )


def dataset_problem(config: GymGRPOConfig, num_tasks: int) -> Problem | None:
    """Say that a dataset has fewer tasks than a generation batch, of which TRL would train none.

    Args:
        config: Options of the run, with the sizes of batches that TRL has resolved.
    """
    size, steps, group = config.per_device_train_batch_size, config.steps_per_generation, config.num_generations
    needed = config.generation_batch_size // group
    if num_tasks >= needed:
        return None
    processes = config.generation_batch_size // (size * steps)
    return Problem(
        f"The training dataset has {num_tasks} tasks and a generation batch {needed}: "
        f"`per_device_train_batch_size` {size} × `steps_per_generation` {steps} × {processes} processes ÷ "
        f"`num_generations` {group}. Only whole generation batches are trained: there would be none.",
        f"Use at least {needed} tasks, or lower `per_device_train_batch_size`, `steps_per_generation` or "
        "`gradient_accumulation_steps` (its default).",
    )


def context_problem(config: GymGRPOConfig, context: int | None, prompt_tokens: int = 1) -> Problem | None:
    """Say that rollouts end where a context does, before they have had `max_completion_length`.

    Args:
        context: Tokens of prompt and completion that are served, or that the model was made for; None: not known.
        prompt_tokens: Tokens of the longest prompt.
    """
    if context is None or prompt_tokens + (config.max_completion_length or 0) <= context:
        return None
    return Problem(
        f"`max_completion_length` {config.max_completion_length} and a prompt are more than the context of {context} "
        "tokens, where rollouts are cut off.",
        f"Set `max_completion_length` to {max(context - prompt_tokens, 1)} or less.",
    )


def biased_ratio(config: GymGRPOConfig) -> str | None:
    """Say that training's importance ratios are biased by how rollouts are sampled; None where they are not."""
    sampling, neutral = config.rollout_options.sampling, Sampling(temperature=config.temperature)
    restricted = [
        f"`{name}` {value:g}" for name in SAMPLING_KEYS if (value := getattr(sampling, name)) != getattr(neutral, name)
    ]
    if not restricted:
        return None
    return (
        f"Rollouts are sampled with {', '.join(restricted)}. The policy server's log-probabilities are those of that "
        "distribution and the trainer's those of the whole one: importance ratios are biased by the difference, which "
        "`rollouts/logprob_gap` contains too. Leave these options at their defaults to train without that; "
        "`gym_eval_sampling` has its own."
    )


def check_refill(config: GymGRPOConfig, num_reward_funcs: int, dataset: Any) -> None:
    """Refuse what groups cannot be replaced with.

    Args:
        num_reward_funcs: Reward functions that the trainer was given besides the environment's reward.

    Raises:
        ConfigError: Groups are replaced, and there are such functions, or further tasks cannot be drawn.
    """
    if config.gym_refill_rounds == 0:
        return
    problems, option = [], f"`gym_refill_rounds` is {config.gym_refill_rounds}"
    if num_reward_funcs:
        problems.append(
            Problem(
                f"There are {num_reward_funcs} `reward_funcs`, and groups are judged before these are called, by what "
                "`compute_rewards` returns.",
                "Add their rewards in `compute_rewards`.",
            )
        )
    if dataset is not None and not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        problems.append(
            Problem(
                f"`train_dataset` is a {type(dataset).__name__}: it has no length, and further tasks are drawn by "
                "their row numbers.",
                "Load it whole, as `load_gym_dataset` does.",
            )
        )
    if problems:
        raise ConfigError(f"{option} and cannot be combined with this trainer's arguments:", problems=problems)
