from __future__ import annotations

import contextlib
import dataclasses
import pickle
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOConfig, TrlParser

from trl_gym import made_with
from trl_gym.config import GymGRPOConfig, launched_processes
from trl_gym.config_checks import (
    biased_ratio,
    check_datasets,
    check_refill,
    context_problem,
    fill_in,
    small_batch_notes,
)
from trl_gym.errors import ConfigError
from trl_gym.rollout_options import SAMPLING_KEYS, RolloutOptions, Sampling

BASE: dict[str, Any] = {
    "output_dir": "unused",
    "use_cpu": True,
    "per_device_train_batch_size": 8,
    "num_generations": 8,
    "report_to": [],
}


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        GymGRPOConfig(
            **BASE
            | {
                "num_generations": 3,
                "steps_per_generation": 1,
                "gym_mode": "magic",
                "gym_deadline": -1,
                "gym_max_inflight": 0,
                "gym_processes": 0,
                "gym_drift": "ignore",
                "gym_train_calls": "some",
                "gym_max_rows_factor": 0.5,
                "gym_vllm_args": {"port": 80, "max_model_len": 10},
                "gym_weight_dir": str(tmp_path / "missing"),
                "max_completion_length": 512,
                "vllm_max_model_length": 512,
                "vllm_mode": "somewhere",
            }
        )
    message = str(caught.value)
    assert "13 problem(s)" in message
    for name in (
        "gym_mode", "gym_deadline", "gym_max_inflight", "gym_processes", "gym_drift", "gym_train_calls", "'port'",
        "`vllm_max_model_length`", "gym_max_rows_factor", "gym_weight_dir", "max_completion_length", "vllm_mode",
        "num_generations",
    ):  # fmt: skip
        assert name in message, name


def test_a_head_url_means_attach_and_excludes_configs() -> None:
    assert GymGRPOConfig(**BASE, gym_head_url="http://127.0.0.1:1").gym_mode == "attach"
    with pytest.raises(ConfigError, match="Set only one"):
        GymGRPOConfig(**BASE, gym_head_url="http://127.0.0.1:1", gym_config_paths=["a.yaml"])
    with pytest.raises(ConfigError, match="gym_head_url"):
        GymGRPOConfig(**BASE, gym_mode="attach")


@pytest.mark.parametrize("other", [{"gym_mode": "upstream"}, {"gym_head_url": "http://127.0.0.1:1"}])
def test_only_the_processes_of_mode_host_can_be_counted(other: dict[str, str]) -> None:
    assert GymGRPOConfig(**BASE, **other, gym_processes=1).gym_processes == 1
    with pytest.raises(ConfigError, match=r"`gym_processes` is 2 and `gym_mode` '(upstream|attach)': only"):
        GymGRPOConfig(**BASE, **other, gym_processes=2)


def test_rollouts_in_flight_are_those_of_a_batch_or_what_may_be_at_a_time() -> None:
    batches = {"per_device_train_batch_size": 16, "steps_per_generation": 4, "per_device_eval_batch_size": 8}
    assert GymGRPOConfig(**BASE | batches).rollouts_in_flight(2) == 128
    assert GymGRPOConfig(**BASE | batches, gym_max_inflight=10).rollouts_in_flight(3) == 30
    assert GymGRPOConfig(**BASE | batches | {"per_device_eval_batch_size": 80}).rollouts_in_flight(1) == 80


def test_rollouts_in_flight_are_also_those_of_batches_ahead_and_further_members() -> None:
    options = BASE | {"per_device_train_batch_size": 16, "gym_max_staleness": 2, "gym_max_inflight": 1000}
    assert GymGRPOConfig(**options).rollouts_in_flight(1) == 16 * 3
    assert GymGRPOConfig(**options, gym_oversample=3).rollouts_in_flight(2) == 2 * (16 + 2 * 3) * 3
    assert GymGRPOConfig(**options | {"gym_max_inflight": 40}, gym_oversample=3).rollouts_in_flight(2) == 80
    options["per_device_eval_batch_size"] = 200
    assert GymGRPOConfig(**options).rollouts_in_flight(1) == 200
    assert GymGRPOConfig(**options, gym_eval_overlap="share").rollouts_in_flight(1) == 200 + 16 * 2


def optimizer_steps_at_batches(num_batches: int, generate_every: int, accumulated: int) -> list[int]:
    """Count, micro-step by micro-step, the optimizer steps done when each generation batch of an epoch is taken."""
    steps, taken = 0, []
    for micro_step in range(num_batches * generate_every):
        if micro_step % generate_every == 0:
            taken.append(steps)
        if (micro_step + 1) % accumulated == 0:
            steps += 1
    return taken


@given(
    staleness=st.integers(0, 4),
    accumulated=st.integers(1, 12),
    steps_per_generation=st.integers(1, 12),
    num_iterations=st.integers(1, 3),
)
def test_batches_ahead_are_as_many_as_staleness_allows_at_the_worst_moment(
    staleness: int, accumulated: int, steps_per_generation: int, num_iterations: int
) -> None:
    # `__post_init__` refuses some of these values, and needs longer than all else here.
    config = object.__new__(GymGRPOConfig)
    config.gym_max_staleness, config.gradient_accumulation_steps = staleness, accumulated
    config.steps_per_generation, config.num_iterations = steps_per_generation, num_iterations
    ahead = config.most_batches_ahead
    taken = optimizer_steps_at_batches(
        2 * ahead + 2 + 2 * accumulated, steps_per_generation * num_iterations, accumulated
    )

    def stalest(distance: int) -> int:
        return max(later - earlier for earlier, later in zip(taken, taken[distance:], strict=False))

    assert stalest(ahead) <= staleness < stalest(ahead + 1)


def test_long_rollouts_are_not_left_out_for_older_weights_unless_asked_for(tmp_path: Path) -> None:
    of_trl = GRPOConfig.vllm_importance_sampling_mode
    assert of_trl not in (None, "token_truncate")
    mode = "vllm_importance_sampling_mode"
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, of_trl),
        ({"gym_max_staleness": 1}, "token_truncate"),
        ({"gym_max_staleness": 1, mode: of_trl}, of_trl),
        ({mode: "sequence_truncate"}, "sequence_truncate"),
    ]
    for options, expected in cases:
        config = GymGRPOConfig(**BASE | options)
        assert config.vllm_importance_sampling_mode == expected
        assert pickle.loads(pickle.dumps(config)).vllm_importance_sampling_mode == expected
        again = {**config.to_dict(), "generation_batch_size": None}  # TRL takes one of two that it sets
        names = {one.name for one in fields(GymGRPOConfig) if one.init}
        again = {name: value for name, value in again.items() if name in names}
        assert GymGRPOConfig(**again).vllm_importance_sampling_mode == expected
        words = ["--output_dir", "out", "--use_cpu", "true", "--report_to", "none"]
        words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        (parsed,) = TrlParser([GymGRPOConfig]).parse_args_and_config(words)
        assert parsed.vllm_importance_sampling_mode == expected
        path = tmp_path / "config.yaml"
        lines = ["output_dir: out", "use_cpu: true", *(f"{name}: {value}" for name, value in options.items())]
        path.write_text("\n".join(lines))
        (parsed,) = TrlParser([GymGRPOConfig]).parse_args_and_config(["--config", str(path)])
        assert parsed.vllm_importance_sampling_mode == expected


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"gym_max_staleness": -1}, ["`gym_max_staleness` is -1"]),
        ({"gym_refill_rounds": -1, "gym_oversample": -1}, ["`gym_refill_rounds` is -1", "`gym_oversample` is -1"]),
        ({"gym_on_stale": "cancel", "gym_max_staleness": 1}, ["Choose one of wait, drop."]),
        ({"gym_eval_overlap": "both", "gym_max_staleness": 1}, ["Choose one of drain, share."]),
        ({"gym_batches_ahead": 2}, ["`gym_batches_ahead` is 2 and `gym_max_staleness` 0"]),
        ({"gym_on_stale": "drop"}, ["`gym_on_stale` is 'drop' and `gym_max_staleness` 0"]),
        ({"gym_eval_overlap": "share"}, ["`gym_eval_overlap` is 'share' and `gym_max_staleness` 0"]),
        ({"gym_max_staleness": 1, "vllm_enable_sleep_mode": True}, ["the server sleeps then"]),
        ({"gym_max_staleness": 1, "num_iterations": 2, "gradient_accumulation_steps": 2}, ["`num_iterations` 2"]),
        (
            {"gym_max_staleness": 1, "steps_per_generation": 3},
            ["Set `gym_max_staleness` to 0 or at least 3, or lower `steps_per_generation`."],
        ),
        (
            {
                "gym_max_staleness": 1,
                "vllm_enable_sleep_mode": True,
                "vllm_importance_sampling_correction": False,
                "num_iterations": 2,
                "gym_replay": ".",
                "steps_per_generation": 2,
                "gym_refill_rounds": 1,
                "gym_oversample": 2,
            },
            [
                "the server sleeps then",
                "nothing would correct",
                "`num_iterations` 2",
                "`gym_max_staleness` is 1 and `gym_replay` '.'",
                "`gym_refill_rounds` is 1 and `gym_replay` '.'",
                "`gym_oversample` is 2 and `gym_replay` '.'",
                "a generation batch lasts longer",
            ],
        ),
        ({"gym_min_group_size": 9}, ["Set `gym_min_group_size` to at most 8."]),
    ],
)
def test_what_overlap_cannot_be_combined_with_is_named_at_once(options: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        GymGRPOConfig(**BASE | options)
    assert f"{len(texts)} problem(s)" in str(caught.value)
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"gym_max_staleness": 1, "gym_on_stale": "drop", "gym_eval_overlap": "share", "gym_pause_mode": "keep"},
        {"gym_max_staleness": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"gym_refill_rounds": 2, "gym_oversample": 1},
    ],
)
def test_overlap_refill_and_over_sampling_need_no_further_options(options: dict[str, Any]) -> None:
    assert GymGRPOConfig(**BASE | options)


def test_groups_that_lie_across_ranks_can_neither_be_refilled_nor_over_sampled() -> None:
    @dataclasses.dataclass
    class TwoRanks(GymGRPOConfig):
        world_size = 2

    options = BASE | {"per_device_train_batch_size": 4}
    assert TwoRanks(**options, gym_max_staleness=1).most_batches_ahead == 1
    assert TwoRanks(**options, gym_oversample=1, steps_per_generation=2)
    with pytest.raises(
        ConfigError, match=r"2 problem.*\n.*`gym_refill_rounds` is 2 and.*\n.*`gym_oversample` is 1 and"
    ) as e:
        TwoRanks(**options, gym_refill_rounds=2, gym_oversample=1)
    dropping = {"gym_max_staleness": 2, "gym_on_stale": "drop"}
    assert TwoRanks(**options, **dropping, steps_per_generation=2)
    with pytest.raises(ConfigError, match=r"`gym_on_stale` is 'drop' and needs whole groups of `num_generations` 8"):
        TwoRanks(**options, **dropping)
    assert "on each rank, which has `per_device_train_batch_size` 4 × `steps_per_generation` 1 rollouts" in str(
        e.value
    )


def test_what_groups_cannot_be_refilled_with() -> None:
    config, dataset = GymGRPOConfig(**BASE, gym_refill_rounds=1), Dataset.from_list([{"gym_row": "{}"}])
    check_refill(config, 0, dataset)
    check_refill(GymGRPOConfig(**BASE, gym_oversample=1), 2, dataset.to_iterable_dataset())
    with pytest.raises(ConfigError, match=r"(?s)`gym_refill_rounds` is 1 .*2 `reward_funcs`.*`compute_rewards`"):
        check_refill(config, 2, dataset)
    with pytest.raises(ConfigError, match=r"(?s)`gym_refill_rounds` is 1 .*a IterableDataset: it has no length"):
        check_refill(config, 0, dataset.to_iterable_dataset())


def test_a_server_url_needs_server_mode() -> None:
    with pytest.raises(ConfigError, match="vllm_mode"):
        GymGRPOConfig(**BASE, vllm_server_base_url="http://127.0.0.1:1/v1")
    with pytest.raises(ConfigError, match="has no effect"):
        GymGRPOConfig(**BASE, vllm_mode="server", gym_vllm_args={"seed": 1})


def test_options_of_sglang_are_for_a_server_of_sglang_that_is_started() -> None:
    given = {"gym_sglang_args": {"context_length": 9, "tp": 2, "seed": 1}, "gym_vllm_args": {"seed": 1}}
    with pytest.raises(ConfigError) as caught:
        GymGRPOConfig(**BASE, gym_engine="sglang", **given)
    for words in (
        "must not set 'context_length': set `vllm_max_model_length`",
        "must not set 'tp': set `vllm_tensor_parallel_size`",
        "`gym_vllm_args` are flags of `vllm serve`",
    ):
        assert words in str(caught.value)
    assert "'seed'" not in str(caught.value)
    with pytest.raises(ConfigError, match="`gym_sglang_python` is set, and no SGLang is started"):
        GymGRPOConfig(**BASE, gym_sglang_python="python")
    with pytest.raises(ConfigError, match="`gym_sglang_args` is 'x'"):
        GymGRPOConfig(**BASE, gym_engine="sglang", gym_sglang_args="x")


def test_options_that_rollouts_cannot_honour_are_refused() -> None:
    with pytest.raises(ConfigError, match="vllm_structured_outputs_regex"):
        GymGRPOConfig(**BASE, vllm_structured_outputs_regex="a+")


def test_precision_of_the_server_follows_the_trainer() -> None:
    assert GymGRPOConfig(**BASE).serving_dtype == "float32"  # on a CPU bf16 is off unless asked for
    assert GymGRPOConfig(**BASE, bf16=True).serving_dtype == "bfloat16"
    assert GymGRPOConfig(**BASE).probe_tolerance < GymGRPOConfig(**BASE, bf16=True).probe_tolerance
    assert GymGRPOConfig(**BASE, gym_probe_tolerance=0.5).probe_tolerance == 0.5


PLAIN = {"output_dir": "out", "use_cpu": True, "report_to": []}


def test_what_is_not_given_trains_an_agent_and_is_told() -> None:
    config = GymGRPOConfig(**PLAIN)
    assert (config.max_completion_length, config.generation_batch_size) == (2048, 64)
    assert [note.split("`")[1] for note in config.notes] == ["max_completion_length", "gradient_accumulation_steps"]
    assert small_batch_notes(config, 1, adapts=False) == []
    assert GymGRPOConfig(**PLAIN, vllm_max_model_length=1024).max_completion_length == 512
    unset = {"gradient_accumulation_steps": None, "generation_batch_size": None, "steps_per_generation": None}
    for num_processes, expected in ((1, 8), (3, 3), (8, 1), (64, 1)):
        several = SimpleNamespace(**{**vars(config), **unset, "per_device_train_batch_size": None})
        assert bool(fill_in(several, num_processes)) == (expected > 1)
        assert several.gradient_accumulation_steps == expected


@pytest.mark.parametrize(
    "given",
    [
        {"gradient_accumulation_steps": 1},
        {"steps_per_generation": 1},
        {"generation_batch_size": 8},
        {"per_device_train_batch_size": 8, "num_generations": 8},
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 16},
    ],
)
def test_what_is_said_about_batches_stays(given: dict[str, int]) -> None:
    config = GymGRPOConfig(**PLAIN, **given, max_completion_length=100)
    assert (config.max_completion_length, config.gradient_accumulation_steps, config.notes) == (100, 1, [])
    rows = given.get("per_device_train_batch_size", 8)
    assert config.generation_batch_size == rows
    warned = small_batch_notes(config, 1, adapts=False)
    assert bool(warned) == (rows == config.num_generations)
    assert not warned or "`gradient_accumulation_steps`" in warned[0]


@pytest.mark.parametrize(
    ("given", "steps", "tasks"),
    [
        ({"num_generations": 4}, 4, 8),
        ({"num_generations": 8}, 8, 8),
        ({"num_generations": 16, "eval_strategy": "steps", "eval_steps": 1}, 16, 8),
        ({"num_generations": 5}, 5, 8),
        ({"per_device_train_batch_size": 2}, 4, 1),
        ({"per_device_train_batch_size": 12}, 2, 3),
        ({"per_device_train_batch_size": 8, "num_generations": 16}, 2, 1),
    ],
)
def test_the_default_makes_whole_groups(given: dict[str, Any], steps: int, tasks: int) -> None:
    config = GymGRPOConfig(**PLAIN, **given, max_completion_length=100)
    assert config.gradient_accumulation_steps == steps
    assert config.generation_batch_size == tasks * config.num_generations
    [note] = config.notes
    assert f"is {steps}, for {tasks} task{'s' if tasks > 1 else ''} × {config.num_generations} rollouts" in note


def test_groups_that_do_not_fit_are_refused_by_the_options_that_make_them() -> None:
    for steps in ({"gradient_accumulation_steps": 1}, {"steps_per_generation": 1}):
        with pytest.raises(ConfigError, match="`num_generations` 16 does not divide a generation batch:") as caught:
            GymGRPOConfig(**PLAIN, **steps, num_generations=16)
        [problem] = caught.value.problems
        assert "`per_device_train_batch_size` 8 × `steps_per_generation` 1 " in problem.text
        assert "a multiple of 2 (`generation_batch_size` one of 16)" in problem.remedy


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_are_counted_as_their_launcher_says(name: str) -> None:
    assert launched_processes({name: "8"}) == 8
    assert launched_processes({"RANK": "8"}) is None


def test_what_is_launched_elsewhere_has_the_batches_of_its_processes() -> None:
    class EightRanks(GymGRPOConfig):
        world_size = 8

    config = EightRanks(**PLAIN)
    assert (config.gradient_accumulation_steps, config.generation_batch_size) == (1, 64)
    assert EightRanks(**PLAIN, num_generations=16).generation_batch_size == 128


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gradient_accumulation_steps", 0),
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", 0),
        ("num_generations", 0),
        ("num_generations", 1),
        ("steps_per_generation", 0),
        ("generation_batch_size", -8),
    ],
)
def test_sizes_that_train_nothing_are_refused(option: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"^1 problem.*\n.*`{option}` is {value}"):
        GymGRPOConfig(**PLAIN, **{option: value})


def test_a_context_that_ends_before_the_rollout_is_told() -> None:
    config = GymGRPOConfig(**PLAIN)
    problem = context_problem(config, 1024)
    assert problem is not None and "`max_completion_length` 2048 " in problem.text and "1023 or less" in problem.remedy
    assert context_problem(config, 2049) is context_problem(config, None) is None
    assert context_problem(config, 2049, 2) is not None


def test_a_learning_rate_for_whole_models_is_warned_of_with_an_adapter() -> None:
    [note] = small_batch_notes(GymGRPOConfig(**PLAIN), 1, adapts=True)
    assert note.startswith("`learning_rate` is 1e-06, and an adapter is trained")
    assert small_batch_notes(GymGRPOConfig(**PLAIN, learning_rate=1e-5), 1, adapts=True) == []


def test_yaml_and_command_line(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "output_dir: out\nuse_cpu: true\nper_device_train_batch_size: 8\nnum_generations: 8\nreport_to: []\n"
        "gym_config_paths: [a.yaml]\ngym_vllm_args: {tool-call-parser: hermes}\ngym_deadline: 5\n"
    )
    (args,) = TrlParser([GymGRPOConfig]).parse_args_and_config(
        ["--config", str(config), "--gym_overrides", '{"a": {"b": 1}}', "--gym_deadline", "7.5"]
    )
    assert args.gym_config_paths == ["a.yaml"]
    assert args.gym_vllm_args == {"tool-call-parser": "hermes"}
    assert args.gym_overrides == {"a": {"b": 1}}
    assert args.gym_deadline == 7.5
    assert args.gym_log_dir == str(Path("out") / "logs")


def test_broken_json_is_one_of_the_problems() -> None:
    with pytest.raises(ConfigError, match="gym_overrides"):
        GymGRPOConfig(**BASE, gym_overrides="{not json")


def test_retries_may_be_a_number_or_by_kind() -> None:
    assert GymGRPOConfig(**BASE).gym_retries == {"infrastructure": 2}
    assert GymGRPOConfig(**BASE, gym_retries=0).gym_retries == {"infrastructure": 0}
    own = {"slow": {"retries": 1, "deadline": 30}}
    args = GymGRPOConfig(**BASE, gym_retries='{"environment": 1}', gym_environments=own)
    assert args.gym_retries == {"environment": 1}
    assert args.gym_environments["slow"]["retries"] == {"infrastructure": 1}


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("gym_retries", {"weather": 1}, "'weather'"),
        ("gym_retries", {"policy": -1}, "-1"),
        ("gym_retries", "many", "gym_retries"),
        ("gym_launch_rate", 0.0, "gym_launch_rate"),
        ("gym_environments", {"a": {"speed": 1}}, "gym_environments['a']['speed']"),
        ("gym_environments", {"a": {"deadline": 0}}, "gym_environments['a']['deadline']"),
        ("gym_environments", {"a": {"retries": {"policy": "x"}}}, "gym_environments['a']['retries']"),
        ("gym_environments", {"a": {"agent_sampling": "maybe"}}, "gym_environments['a']['agent_sampling']"),
        ("gym_environments", {"a": 1}, "gym_environments"),
        ("gym_on_environment_down", "ignore", "gym_on_environment_down"),
        ("gym_min_group_size", 1, "gym_min_group_size"),
        ("gym_min_valid_fraction", 1.5, "gym_min_valid_fraction"),
        ("gym_eval_sampling", {"heat": 1}, "'heat'"),
        ("gym_replay", "no/such/folder", "gym_replay"),
        ("gym_journal_max_mb", 0, "gym_journal_max_mb"),
        ("gym_environments", {"a": {"max_inflight": 0.5}}, "gym_environments['a']['max_inflight']"),
        ("gym_eval_sampling", {"temperature": "hot"}, "gym_eval_sampling['temperature']"),
        ("gym_stall_timeout", 0, "gym_stall_timeout"),
    ],
)
def test_each_wrong_option_is_named(option: str, value: Any, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GymGRPOConfig(**BASE, **{option: value})
    assert "1 problem(s)" in str(caught.value) and named in str(caught.value)


def test_a_rank_may_not_give_up_before_the_server_is_back() -> None:
    with pytest.raises(ConfigError, match="`gym_server_reconnect_timeout` is 3600 and `ddp_timeout` 1800"):
        GymGRPOConfig(**BASE, gym_config_paths=["a.yaml"], gym_server_reconnect_timeout=3600)
    GymGRPOConfig(**BASE, gym_config_paths=["a.yaml"], gym_server_reconnect_timeout=3600, ddp_timeout=7200)


def test_taking_turns_needs_shared_gpus() -> None:
    with pytest.raises(ConfigError, match=r"`vllm_enable_sleep_mode`.*Leave it out"):
        GymGRPOConfig(**BASE, gym_config_paths=["a.yaml"], vllm_enable_sleep_mode=True, gym_server_devices="1")
    with pytest.raises(ConfigError, match="Set `vllm_enable_sleep_mode` too"):
        GymGRPOConfig(**BASE, gym_config_paths=["a.yaml"], gym_offload_optimizer=True)


def test_every_problem_of_the_weight_sync_is_named() -> None:
    wrong = {
        "gym_weight_transport": "carrier pigeon",
        "gym_pause_mode": "abort",
        "gym_gpu_memory": "all",
        "gym_verify_sync_steps": -1,
        "gym_server_restarts": -1,
        "gym_max_adapters": 1,
        "gym_weight_buffer_mb": 0,
        "gym_sync_timeout": 0,
    }
    with pytest.raises(ConfigError) as caught:
        GymGRPOConfig(**BASE, gym_config_paths=["a.yaml"], **wrong)
    assert "8 problem(s)" in str(caught.value)
    for name in wrong:
        assert f"`{name}` is " in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("gym_deadline", None, "Set it to a number."),
        ("gym_max_inflight", "many", "Set it to a whole number."),
        ("gym_min_group_size", 2.5, "Set it to a whole number."),
        ("gym_max_inflight", True, "Set it to a whole number."),
        ("gym_mode", None, "Set it to a text."),
        ("gym_probe_tolerance", "small", "Set it to a number or null."),
        ("gym_config_paths", "a.yaml", "Set it to a list."),
        ("gym_sync_only_trainable", "yes", "Set it to true or false."),
        ("gym_weight_dir", 3, "Set it to a text or null."),
        ("gym_server_reconnect_timeout", None, "Set it to a number."),
        ("ddp_timeout", None, "Set it to a whole number."),  # TRL's and transformers' own
        ("num_generations", "8 of them", "Set it to a whole number."),
        ("max_completion_length", "long", "Set it to a whole number or null."),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_what_it_must_be(option: str, value: Any, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GymGRPOConfig(**BASE | {option: value, "gym_pause_mode": "abort"})  # other checks are made too
    assert [(one.text, one.remedy) for one in caught.value.problems] == [
        (f"`{option}` is {value!r}.", remedy),
        ("`gym_pause_mode` is 'abort'.", "Choose one of wait, keep."),
    ]


@pytest.mark.parametrize("option", [one.name for one in fields(GymGRPOConfig) if one.name.startswith("gym_")])
def test_no_value_of_our_options_ends_in_another_error(option: str) -> None:
    for value in (None, "text", -1, [], {"a": None}, object()):
        with contextlib.suppress(ConfigError):
            GymGRPOConfig(**BASE | {option: value})


def test_null_in_yaml_is_one_readable_error(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("output_dir: out\nuse_cpu: true\nreport_to: []\ngym_max_inflight: null\ngym_retries: null\n")
    with pytest.raises(ConfigError, match=r"1 problem.*\n.*`gym_max_inflight` is None. Set it to a whole number"):
        TrlParser([GymGRPOConfig]).parse_args_and_config(["--config", str(config)])


def test_several_rows_and_a_kl_term_that_would_count_them_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"1 problem.*\n.*`beta` 0.1.*would count each row of a rollout"):
        GymGRPOConfig(**BASE, gym_drift="split", loss_type="grpo", beta=0.1)
    for other in ({"loss_type": "dr_grpo", "beta": 0.1}, {"loss_type": "grpo"}):
        assert GymGRPOConfig(**BASE, gym_drift="split", **other)
    assert GymGRPOConfig(**BASE, loss_type="grpo", beta=0.1)


@pytest.mark.parametrize("drift", ["truncate", "exclude", "error"])
def test_all_calls_are_trained_in_rows_of_their_own(drift: str) -> None:
    assert GymGRPOConfig(**BASE, gym_train_calls="all", gym_drift="split").has_further_rows
    with pytest.raises(ConfigError, match=rf"`gym_train_calls` is 'all' and `gym_drift` '{drift}'.*'split'"):
        GymGRPOConfig(**BASE, gym_train_calls="all", gym_drift=drift)


def test_rollout_options_are_those_of_the_run() -> None:
    args = GymGRPOConfig(
        **BASE, temperature=0.7, top_k=0, max_completion_length=64, gym_deadline=5, gym_retries=1,
        gym_environments={"slow": {"retries": 3}, "json": {"agent_sampling": "allow"}},
        gym_agent_sampling="refuse",
    )  # fmt: skip
    assert args.rollout_options == RolloutOptions(
        sampling=Sampling(temperature=0.7), max_completion_length=64, deadline=5,
        retries={"infrastructure": 1}, agent_sampling="refuse",
        environments={"slow": {"retries": {"infrastructure": 3}}, "json": {"agent_sampling": "allow"}},
    )  # fmt: skip
    assert [args.rollout_options.agent_sampling_of(agent) for agent in ("slow", "json")] == ["refuse", "allow"]


def test_the_help_of_an_option_is_its_text_in_the_docstring() -> None:
    helps = {one.name: one.metadata.get("help", "") for one in dataclasses.fields(GymGRPOConfig)}
    assert helps["gym_start_timeout"] == "Seconds until every Gym server must answer."
    assert [name for name, text in helps.items() if name.startswith("gym_") and not text.endswith(".")] == []


WRONG_SAMPLING: list[dict[str, Any]] = [
    *({"temperature": value} for value in (0, 0.0, 0.005, -1.0, 2.5, float("nan"), float("inf"), "hot")),
    *({"top_p": value} for value in (0.0, -0.1, 1.1, 7.0, float("nan"))),
    *({"top_k": value} for value in (-2, 1.5, "a")),
    *({"min_p": value} for value in (-0.1, 1.1)),
    *({"repetition_penalty": value} for value in (0.0, -1.0, float("inf"))),
    *({name: value} for name in ("max_completion_length", "vllm_max_model_length") for value in (0, -5)),
]


@pytest.mark.parametrize("options", WRONG_SAMPLING, ids=str)
def test_sampling_that_vllm_refuses_or_that_cannot_be_trained_is_refused(options: dict[str, Any]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(ConfigError, match=re.escape(f"`{name}` is {value!r}")):
        GymGRPOConfig(**BASE | options)
    if name in SAMPLING_KEYS and not (name == "temperature" and value in (0, 0.005)):
        with pytest.raises(ConfigError, match=rf"`gym_eval_sampling\['{name}'\]` is"):
            GymGRPOConfig(**BASE, gym_eval_sampling=options)


def test_evaluation_may_be_greedy_and_neutral_values_are_taken() -> None:
    neutral = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
    assert GymGRPOConfig(**BASE, gym_eval_sampling=neutral).gym_eval_sampling == neutral
    assert biased_ratio(GymGRPOConfig(**BASE, min_p=None, temperature=0.01)) is None


def test_sampling_of_evaluation_is_that_of_training_with_changes() -> None:
    changed = GymGRPOConfig(**BASE, temperature=0.8, top_p=0.9, gym_eval_sampling={"temperature": 0.0})
    assert changed.sampling_in("train") == Sampling(temperature=0.8, top_p=0.9)
    assert changed.sampling_in("eval") == Sampling(temperature=0.0, top_p=0.9)
    same = GymGRPOConfig(**BASE, temperature=0.8)
    assert same.sampling_in("eval") == same.sampling_in("train") == Sampling(temperature=0.8)


@pytest.mark.parametrize(
    "options", [{"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}, {"repetition_penalty": 1.1}], ids=str
)
def test_sampling_that_biases_importance_ratios_is_told(options: dict[str, Any]) -> None:
    [(name, value)] = options.items()
    assert f"`{name}` {value:g}. The policy server's" in str(biased_ratio(GymGRPOConfig(**BASE | options)))


def test_datasets_of_which_nothing_would_be_trained_or_evaluated_are_refused() -> None:
    args = GymGRPOConfig(**BASE | {"steps_per_generation": 2, "dataloader_drop_last": True}, num_generations_eval=4)
    for world_size, needed in ((1, 2), (3, 6)):
        args.generation_batch_size = 8 * 2 * world_size  # as TRL resolves it
        check_datasets(args, range(needed), {"a": range(2)})
        check_datasets(args, None, None)
        check_datasets(args, iter(()), None)
        with pytest.raises(
            ConfigError, match=rf"{needed - 1} tasks and a generation batch {needed}: .* {world_size} proc"
        ):
            check_datasets(args, range(needed - 1), None)
    with pytest.raises(ConfigError, match="evaluation set a has 1 tasks, which make 4 rollouts, and a batch needs 8"):
        check_datasets(args, None, {"a": range(1)})
    with pytest.raises(ConfigError, match="too small") as caught:
        check_datasets(args, [], [])
    assert len(caught.value.problems) == 2


def test_it_is_decided_for_every_option_what_follows_when_a_run_is_resumed_with_another_value() -> None:
    groups = (made_with._REFUSED, made_with._TOLD, made_with._KEPT_BY_OPTIMIZER, made_with._KEPT_BY_STATE)
    names = [name for group in (*groups, made_with._SILENT) for name in group]
    assert sorted(names) == sorted(set(names)), "once"
    beside = {"world_size", "train_dataset", "adapter", "model", "sharding", "reward_funcs"}  # what is no option
    assert set(names) == {one.name for one in fields(GymGRPOConfig)} | beside, "add it to `trl_gym/made_with.py`"
