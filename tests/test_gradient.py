"""A batch with failed rollouts moves the policy as the batch without them would: TRL's own trainer says how.

Everything is in float64 except what TRL itself computes in float32 (rewards, advantages, log-probabilities), which
leaves differences of about 1e-7, and the angles of positions, which are others behind padding: about 1e-6.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOTrainer

from tests.fork_ranks import run_ranks
from tests.gradient import (
    LOSS_TYPES,
    NUM_MEMBERS,
    Case,
    Step,
    gradient_by_hand,
    gym_step,
    in_rows,
    lean,
    lengths_of,
    make_trainer,
    num_rows_of,
    num_trained,
    reference_step,
    save_model,
    tasks,
    trained,
    trained_reference,
    trajectory_of,
)
from tests.gradient_ranks import (
    EMPTY_RANK,
    SEAMS,
    UNEQUAL,
    VESPO,
    below_fraction,
    by_token,
    cases,
    evaluation,
    in_components,
    in_steps,
    oversampled,
    refilled,
)
from tests.policy_server.tiny_model import build_tokenizer
from trl_gym.config_checks import TOKEN_MEAN_LOSSES
from trl_gym.errors import ConfigError, RolloutError

TOLERANCE = 3e-6  # of a parameter's gradient, relative to its norm
ROOT = Path(__file__).resolve().parents[1]

ONE_EACH = {(0, 1), (1, 0), (2, 0)}  # of every task one
BY_TOKEN = ("entropy bonus", "high entropy tokens", "batch std", "no std", "normalize first", "truncated masked")
VARIANTS: dict[str, dict[str, Any]] = {
    "no importance sampling correction": {"vllm_importance_sampling_correction": False},
    "ratios by sequence": {"importance_sampling_level": "sequence", "loss_type": "luspo"},
    "importance sampling by token": {"vllm_importance_sampling_mode": "token_mask"},
    "kl": {"beta": 0.1, "loss_type": "grpo"},
    "entropy bonus": {"entropy_coef": 0.1, "loss_type": "dr_grpo"},
    "high entropy tokens": {"top_entropy_quantile": 0.5, "loss_type": "grpo"},
    "batch std": {"scale_rewards": "batch"},
    "no std": {"scale_rewards": "none"},
    "normalize first": {"multi_objective_aggregation": "normalize_then_sum"},
    "truncated masked": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "off-policy mask": {"off_policy_mask_threshold": 0.5, "loss_type": "grpo"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = save_model(tmp_path_factory.mktemp("model"))
    with lean():
        yield folder


def difference(step: Step, reference: Step) -> float:
    """Largest relative difference over parameters."""
    assert step.gradient.keys() == reference.gradient.keys() and step.gradient
    return max(
        ((step.gradient[name] - expected).norm() / expected.norm()).item()
        for name, expected in reference.gradient.items()
    )


def check_weights(batches: list[dict[str, torch.Tensor]], *, num_valid: int) -> None:
    """As many rows as that are trained, and the others have a weight of exactly zero in what is handed to the loss."""
    assert sum(map(num_trained, batches)) == num_valid
    for batch in batches:
        mask = batch["completion_mask"] * batch["tool_mask"]
        untrained = mask.sum(1) == 0
        assert batch["advantages"][untrained].abs().sum() == 0
        assert batch["completion_mask"][untrained].sum() == batch["prompt_mask"][untrained].sum() == 0  # not computed


def test_these_are_all_loss_types_of_trl() -> None:
    source = inspect.getsource(GRPOTrainer._compute_loss)
    named = re.findall(r"self\.loss_type (?:==|in) (\[[^]]*\]|\"\w+\")", source)
    assert {name for text in named for name in re.findall(r"\w+", text)} == set(LOSS_TYPES)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_failed_rollouts_leave_no_trace(model: Path, tmp_path: Path, loss_type: str) -> None:
    options = {"loss_type": loss_type} | (VESPO if loss_type == "vespo" else {})
    case = Case(name=loss_type, failed=UNEQUAL, options=options)
    step = gym_step(model, case, tmp_path / "gym")
    assert difference(step, reference_step(model, case, tmp_path / "trl")) < TOLERANCE
    check_weights(step.batches, num_valid=9)
    # That the test can tell: with one rollout more than failed, the gradient is another.
    other = gym_step(model, Case(name="other", failed=UNEQUAL | {(0, 0)}, options=options), tmp_path / "other")
    assert difference(other, step) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", [refilled, oversampled])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_groups_that_were_replaced_and_rollouts_beyond_a_group_leave_no_trace(
    model: Path, tmp_path: Path, loss_type: str, kind: Callable[[str], Case]
) -> None:
    case = dataclasses.replace(kind(loss_type), parts=None)
    step = gym_step(model, case, tmp_path / "gym")
    case = dataclasses.replace(case, kept=step.kept)
    reference = reference_step(model, case, tmp_path / "trl")
    assert difference(step, reference) < TOLERANCE
    check_weights(step.batches, num_valid=3 * case.num_tasks)
    assert all(step.logs[name] == pytest.approx(reference.logs[name], abs=1e-6) for name in ("reward", "reward_std"))
    if kind is oversampled:
        assert {member for task in range(2) for member in case.surviving[task]} == {1, 2, 3, 4, 5}
        return
    assert sorted(step.kept) == [2, 3, 7, 9] and step.kept[2:] == [2, 3]
    # What was there before, and what was replaced, is counted all the same.
    first = [case.reward(task, member) for task in (0, 2, 3) for member in range(NUM_MEMBERS) if member != task % 4]
    assert step.logs["refill/reward_before"] == pytest.approx(sum(first) / 9)
    assert step.logs["refill/zero_variance_before"] == step.logs["refill/too_small_before"] == 0.25
    assert step.logs["refill/left_fraction"] == step.logs["frac_reward_zero_std"] == 0
    num_groups = step.logs["refill/groups_replaced"] + 4
    assert 6 <= num_groups <= 10 and step.logs["rollouts/count"] == 4 * num_groups
    assert step.logs["rollouts/failed_fraction"] == pytest.approx((num_groups + 3) / (4 * num_groups))
    assert step.logs["rollouts/untrained_fraction"] == pytest.approx(1 - 12 / (4 * num_groups))
    assert step.logs["rollouts/groups/dropped_fraction"] == pytest.approx(1 - 4 / num_groups)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_group_that_still_teaches_nothing_is_trained_as_trl_would(
    model: Path, tmp_path: Path, loss_type: str
) -> None:
    """It counts in the divisor, with advantages of 0."""
    options = {"loss_type": loss_type, "gym_refill_rounds": 1}
    case = Case(name="left", failed=(), equal=range(1, 9), num_tasks=2, num_further=6, options=options)
    step = gym_step(model, case, tmp_path / "gym")
    assert step.kept[0] == 0 and step.kept[1] > 1
    reference = reference_step(model, dataclasses.replace(case, kept=step.kept), tmp_path / "trl")
    assert difference(step, reference) < TOLERANCE
    assert step.logs["refill/left_fraction"] == step.logs["frac_reward_zero_std"] == 0.5
    [batch] = step.batches
    assert sorted((batch["advantages"] != 0).tolist()) == [False] * 4 + [True] * 4
    assert num_trained(batch) == 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_failed_rollouts_leave_no_trace_with_other_options(model: Path, tmp_path: Path, variant: str) -> None:
    case = Case(name=variant, failed=UNEQUAL, options=VARIANTS[variant])
    step, reference = gym_step(model, case, tmp_path / "gym"), reference_step(model, case, tmp_path / "trl")
    assert difference(step, reference) < TOLERANCE
    for name in ("loss", "reward", "reward_std", "entropy", "kl", "clip_ratio/region_mean"):
        assert step.logs.get(name) == pytest.approx(reference.logs.get(name), abs=1e-6), name


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "bnpo"])
def test_micro_batches_with_unequal_numbers(model: Path, tmp_path: Path, loss_type: str) -> None:
    """Four micro-batches of three rows, shuffled by TRL: what fails in each is chance, and may be all of it. Not for
    `bnpo`, a mean over whatever is in a micro-batch, which without failures is not that of one batch either; see
    `test_two_ranks_with_unequal_failures`."""
    options = {"loss_type": loss_type, "gradient_accumulation_steps": 4} | (VESPO if loss_type == "vespo" else {})
    case = Case(name=loss_type, failed=UNEQUAL | {(2, member) for member in range(4)}, options=options)
    step = gym_step(model, case, tmp_path / "gym")
    assert len(step.batches) == 4 and len({num_trained(batch) for batch in step.batches}) > 1
    check_weights(step.batches, num_valid=6)
    assert difference(step, reference_step(model, case, tmp_path / "trl")) < TOLERANCE


# Two optimizer steps on one generation batch, each in two micro-batches of three rows.
IN_TWO_STEPS = {
    "per_device_train_batch_size": 3, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 2,
}  # fmt: skip
UNSORTED: dict[str, dict[str, Any]] = {
    "bnpo": {"loss_type": "bnpo"},
    "high entropy tokens": {"top_entropy_quantile": 0.5},
    "entropy bonus": {"entropy_coef": 0.1},
    "adaptive entropy bonus": {"use_adaptive_entropy": True},
}


def compared(
    model: Path, folder: Path, options: dict[str, Any], tolerance: float = TOLERANCE
) -> list[dict[str, torch.Tensor]]:
    """Check that steps move the policy as they do with all padding, with rows where TRL shuffled them; return our
    micro-batches."""
    case = Case(name="padding", failed=ONE_EACH, options=IN_TWO_STEPS | {"beta": 0.1} | options)
    (padded, expected), (step, history) = (
        trained(make_trainer(model, case, folder / str(is_padded), is_padded=is_padded)) for is_padded in (True, False)
    )
    assert difference(step, padded) < tolerance
    for theirs, ours in zip(expected, history, strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-6), name
    assert len(step.batches) == 4
    for first in (0, 2):  # TRL's rows of each step
        ours, theirs = (
            sorted(lengths_of(batches[first]) + lengths_of(batches[first + 1]))
            for batches in (step.batches, padded.batches)
        )
        assert ours == theirs
    return step.batches


@pytest.mark.parametrize(
    ("loss_type", "mode"),
    [
        ("grpo", "token_truncate"), ("sapo", "sequence_mask"), ("luspo", "token_mask"),
        ("dr_grpo", "sequence_truncate"), ("dapo", "sequence_mask"), ("cispo", "token_truncate"),
        ("vespo", "token_mask"),
    ],
)  # fmt: skip
def test_steps_on_sorted_rows_without_padding_are_those_on_shuffled_rows_with_it(
    model: Path, tmp_path: Path, loss_type: str, mode: str
) -> None:
    batches = compared(model, tmp_path, {"loss_type": loss_type, "vllm_importance_sampling_mode": mode})
    for longer, shorter in (batches[:2], batches[2:]):
        assert min(lengths_of(longer)) >= max(lengths_of(shorter))


@pytest.mark.parametrize("variant", UNSORTED)
def test_rows_stay_where_the_loss_depends_on_it(model: Path, tmp_path: Path, variant: str) -> None:
    batches = compared(model, tmp_path, UNSORTED[variant])
    assert any(min(lengths_of(batches[first])) < max(lengths_of(batches[first + 1])) for first in (0, 2))


def test_a_mixture_of_experts_loses_padding_and_keeps_its_router_loss(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    # There are no experts in float64.
    batches = compared(tmp_path / "model", tmp_path, {"router_aux_loss_coef": 0.1}, tolerance=1e-4)
    assert any(min(lengths_of(batches[first])) < max(lengths_of(batches[first + 1])) for first in (0, 2))
    # Rows that fill up have no router loss either.
    case = Case(name="experts", failed=UNEQUAL, options={"router_aux_loss_coef": 0.1})
    step, reference = (run(tmp_path / "model", case, tmp_path / run.__name__) for run in (gym_step, reference_step))
    assert difference(step, reference) < 1e-4
    assert step.logs["aux_loss"] == pytest.approx(reference.logs["aux_loss"], rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"loss_type": "cispo"}, {"importance_sampling_level": "sequence"}])
def test_metrics_do_not_depend_on_micro_batches(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Two steps on one generation batch, the second of which is off-policy, in one micro-batch each and in four."""
    common = {
        "num_iterations": 2,
        "max_steps": 2,
        "beta": 0.1,
        "epsilon": 1e-3,
        "epsilon_high": 1e-3,
        "learning_rate": 0.01,
    } | options
    logs = []
    for num in (1, 4):
        case = Case(name="metrics", failed=(), options=common | {"gradient_accumulation_steps": num})
        logs.append(trained(make_trainer(model, case, tmp_path / str(num)))[1])
    names = {"loss", "grad_norm", "entropy", "kl"} | {
        name for name in logs[0][1] if "clip_ratio" in name and not name.endswith(("min", "max"))
    }
    assert max(logs[0][1][name] for name in names if "clip_ratio" in name) > 0.1
    for one, four in zip(*logs, strict=True):
        for name in names:
            assert four[name] == pytest.approx(one[name], rel=1e-4, abs=1e-7), name


# Gym reports what was cut; TRL looks at the last token. Times and memory are of the machine.
NOT_COMPARED = re.compile(r"clipped_ratio|terminated_length|step_time|seconds|memory|_runtime|_per_second")


@pytest.mark.parametrize(
    ("loss_type", "level", "num_micro_batches"),
    [(loss_type, "sequence", 1) for loss_type in LOSS_TYPES]
    + [("dapo", "sequence", 4), ("vespo", "sequence", 4), ("dapo", "token", 1)],
)
def test_every_metric_of_trl_is_one_of_the_rollouts_that_are_trained(
    model: Path, tmp_path: Path, loss_type: str, level: str, num_micro_batches: int
) -> None:
    """All that is logged of two steps on one generation batch, the second of which is off-policy. Of three groups one
    rollout fails, of a fourth all do."""
    options: dict[str, Any] = {"num_iterations": 2, "max_steps": 2, "beta": 0.1, "learning_rate": 0.01}
    options |= {"loss_type": loss_type, "importance_sampling_level": level, "epsilon": 1e-3, "epsilon_high": 1e-3}
    options |= {"gradient_accumulation_steps": num_micro_batches} | (VESPO if loss_type == "vespo" else {})
    failed = UNEQUAL | {(3, member) for member in range(NUM_MEMBERS)}
    case = Case(name="metrics", failed=failed, num_tasks=4, equal={1}, options=options)
    [_, logs], [_, reference] = (
        trained(make_trainer(model, case, tmp_path / "gym")), trained_reference(model, case, tmp_path / "trl")
    )  # fmt: skip
    compared = {name for name in reference[1] | reference[0] if not NOT_COMPARED.search(name)}
    if num_micro_batches > 1:  # TRL's means of what is least and most in each
        compared -= {"clip_ratio/low_min", "clip_ratio/high_max"}
    for ours, theirs in zip(logs, reference, strict=True):
        for name in compared & theirs.keys():
            of_gym = ours[name.replace("prepared_reward", "gym")]
            assert of_gym == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
    by_loss = [name for name in compared if name.startswith(("clip_ratio", "cispo", "vespo"))]
    assert (by_loss or loss_type == "sapo") and all(reference[1][name] > 0 for name in by_loss if "min" not in name)
    assert reference[0]["frac_reward_zero_std"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("max_rows", [2, 3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_rollout_weighs_the_same_in_any_number_of_rows(
    model: Path, tmp_path: Path, loss_type: str, max_rows: int
) -> None:
    """Rollouts have one to three rows, and some have failed; TRL has each of them in one."""
    case = Case(name="rows", failed=UNEQUAL, max_rows=max_rows, options=by_token(loss_type))
    step, reference = gym_step(model, case, tmp_path / "gym"), reference_step(model, case, tmp_path / "trl")
    assert difference(step, reference) < TOLERANCE
    counts = [
        num_rows_of(task, member, max_rows) for task in range(3) for member in range(NUM_MEMBERS)
        if (task, member) not in UNEQUAL
    ]  # fmt: skip
    [batch] = step.batches
    assert (num_trained(batch), len(batch["advantages"])) == (sum(counts), max(sum(counts), 3 * NUM_MEMBERS))
    for name in ("reward", "reward_std", "frac_reward_zero_std", "rewards/gym/mean", "entropy"):
        theirs = "rewards/prepared_reward/mean" if name == "rewards/gym/mean" else name
        assert step.logs[name] == pytest.approx(reference.logs[theirs], abs=1e-6), name
    assert step.logs["rollouts/rows"] == pytest.approx(sum(counts) / len(counts))
    assert step.logs["rollouts/dropped_rows_fraction"] == 0


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "bnpo"])
def test_rows_of_a_rollout_in_different_micro_batches(model: Path, tmp_path: Path, loss_type: str) -> None:
    """Two micro-batches per generation batch, into which TRL shuffles 17 rows and one that fills up."""
    options = by_token(loss_type) | {"gradient_accumulation_steps": 2}
    case = Case(name=loss_type, failed=ONE_EACH, max_rows=3, options=options)
    step = gym_step(model, case, tmp_path / "gym")
    assert [len(batch["advantages"]) for batch in step.batches] == [9, 9]
    check_weights(step.batches, num_valid=17)
    assert difference(step, reference_step(model, case, tmp_path / "trl")) < TOLERANCE


@pytest.mark.parametrize("variant", BY_TOKEN)
def test_rows_with_other_options(model: Path, tmp_path: Path, variant: str) -> None:
    options = {"vllm_importance_sampling_mode": "token_mask"} | VARIANTS[variant]
    case = Case(name=variant, failed=ONE_EACH, max_rows=3, options=options)
    assert (
        difference(gym_step(model, case, tmp_path / "gym"), reference_step(model, case, tmp_path / "trl")) < TOLERANCE
    )


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_kl_term_counts_rollouts_or_is_refused(model: Path, tmp_path: Path, loss_type: str) -> None:
    case = Case(name=loss_type, failed=ONE_EACH, max_rows=3, options=by_token(loss_type) | {"beta": 0.1})
    if loss_type in TOKEN_MEAN_LOSSES:
        with pytest.raises(ConfigError, match=r"5 rollouts have several trajectories.*`beta` 0.1"):
            gym_step(model, case, tmp_path)
    else:
        reference = reference_step(model, case, tmp_path / "trl")
        assert difference(gym_step(model, case, tmp_path / "gym"), reference) < TOLERANCE


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_row_has_an_importance_ratio_of_its_own(model: Path, tmp_path: Path, loss_type: str) -> None:
    case = Case(name="rows", failed=ONE_EACH, max_rows=3, options={"loss_type": loss_type})
    expected = Step(gradient_by_hand(model, case), {}, [])
    assert difference(gym_step(model, case, tmp_path / "gym"), expected) < TOLERANCE


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_rows_beyond_the_cap_are_dropped_and_counted(model: Path, tmp_path: Path, loss_type: str) -> None:
    """17 rows, and 1.25 times the 12 rollouts are 15: of those with three rows, the first two lose the oldest."""
    options = {"loss_type": loss_type, "gym_max_rows_factor": 1.25}
    case = Case(name="rows", failed=ONE_EACH, max_rows=3, options=options)
    step = gym_step(model, case, tmp_path / "gym")
    assert [len(batch["advantages"]) for batch in step.batches] == [15]
    expected = gradient_by_hand(model, case, dropped={(0, 2): 1, (1, 1): 1})
    assert difference(step, Step(expected, {}, [])) < TOLERANCE
    assert step.logs["rollouts/dropped_rows_fraction"] == pytest.approx(2 / 17)
    kept = [
        row
        for task, members in case.surviving.items()
        for member in members
        for row in in_rows(trajectory_of(task, member)[0], num_rows_of(task, member, 3))
    ]
    for task, member in ((0, 2), (1, 1)):
        kept.remove(in_rows(trajectory_of(task, member)[0], 3)[0])
    assert step.logs["num_tokens"] == sum(len(row.prompt_ids) + sum(row.env_mask) for row in kept)


def test_a_group_that_is_too_small_is_left_out_whole(model: Path, tmp_path: Path) -> None:
    """Of task 1 one rollout is left: no baseline can be made of it."""
    almost = {(1, 0), (1, 1), (1, 2)}
    case = Case(name="small", failed={(0, 0), (2, 0)} | almost, options={"loss_type": "grpo"})
    without = Case(name="without", failed={(0, 0), (2, 0)} | almost | {(1, 3)}, options={"loss_type": "grpo"})
    step = gym_step(model, case, tmp_path / "gym")
    assert difference(step, reference_step(model, without, tmp_path / "trl")) < TOLERANCE
    assert step.logs["rollouts/groups/dropped_fraction"] == pytest.approx(1 / 3)
    assert step.logs["rollouts/failed_fraction"] == pytest.approx(5 / 12)
    assert step.logs["rollouts/untrained_fraction"] == pytest.approx(6 / 12)


def test_truncation_is_what_gym_reports(model: Path, tmp_path: Path) -> None:
    """The prepared completions end on tokens that are no end of turn, whether they were cut or not."""
    step = gym_step(model, Case(name="cut", failed=UNEQUAL), tmp_path)
    assert step.logs["completions/clipped_ratio"] == pytest.approx(3 / 9)
    assert step.logs["completions/min_length"] > 0  # no row of a failed rollout among them


def test_too_few_rollouts_stop_training(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"(?s)Only 7 of the 12 rollouts.*5 failed.*5 × deadline \(arithmetic /run"):
        gym_step(model, below_fraction(), tmp_path)
    every = Case(name="all", failed={(0, member) for member in range(4)}, num_tasks=1)
    with pytest.raises(RolloutError, match=r"All 4 rollouts of step 1 failed"):
        gym_step(model, every, tmp_path)


@pytest.fixture(scope="module")
def two_ranks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo processes wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    ended = run_ranks(2, "tests.gradient_ranks", str(model), str(folder))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


def test_ranks_on_cpus_get_the_state_of_their_optimizer_back(two_ranks: list[dict[str, Any]]) -> None:
    """accelerate numbers their devices, where torch puts nothing that it loads."""
    assert all(torch.equal(rank["optimizer"], torch.ones(3)) for rank in two_ranks)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_two_ranks_with_unequal_failures(
    case: Case, two_ranks: list[dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    reference = reference_step(model, case, tmp_path)
    for rank in two_ranks:
        assert difference(Step(rank[case.name]["gradient"], {}, []), reference) < TOLERANCE
    trained = [rank[case.name]["trained"] for rank in two_ranks]
    places = [(task, member) for task in range(case.num_tasks) for member in range(NUM_MEMBERS)]
    own = [0 if place in case.failed else num_rows_of(*place, case.max_rows) for place in places]
    assert trained == [[sum(own[: len(own) // 2])], [sum(own[len(own) // 2 :])]]


@pytest.mark.parametrize("kind", [refilled, oversampled])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_two_ranks_train_the_groups_that_are_kept(
    loss_type: str, kind: Callable[[str], Case], two_ranks: list[dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    """The groups of one rank alone are replaced."""
    case = kind(loss_type)
    kept = [task for rank in two_ranks for task in rank[case.name]["kept"]]
    if kind is refilled:
        assert sorted(kept[:2]) == [7, 9] and kept[2:] == [2, 3]
    reference = reference_step(model, dataclasses.replace(case, kept=kept), tmp_path)
    for rank in two_ranks:
        assert difference(Step(rank[case.name]["gradient"], {}, []), reference) < TOLERANCE
        assert rank[case.name]["trained"] == [3 * case.num_tasks // 2]


@pytest.mark.parametrize("case", in_steps(), ids=lambda case: case.name)
def test_two_ranks_with_several_micro_batches_of_rows(
    case: Case, two_ranks: list[dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    """Rank 0 has 8 rows and rank 1 has 9: on both, two micro-batches of five."""
    reference = reference_step(model, case, tmp_path)
    for rank in two_ranks:
        assert difference(Step(rank[case.name]["gradient"], {}, []), reference) < TOLERANCE
    assert [sum(rank[case.name]["trained"]) for rank in two_ranks] == [8, 9]
    assert {size for rank in two_ranks for size in rank[case.name]["sizes"]} == {5}
    for rank in two_ranks:
        first, second = rank[case.name]["lengths"]
        assert min(first) >= max(second)
        for name in {"entropy", "kl"} & reference.logs.keys():
            assert rank[case.name]["logs"][name] == pytest.approx(reference.logs[name], rel=1e-5)


@pytest.mark.parametrize("name", ["unequal-dapo", "empty_rank-grpo", "3_rows-dapo", "2_rows-grpo", "refilled-dapo"])
def test_two_ranks_log_what_one_would(name: str, two_ranks: list[dict[str, Any]], model: Path, tmp_path: Path) -> None:
    case = next(case for case in [*cases(), refilled("dapo")] if case.name == name)
    expected = gym_step(model, case, tmp_path).logs
    prefixes = ("rollouts/", "gym/", "completions/", "reward", "success", "logprob_gap", "sampling/", "num_tokens")
    prefixes += ("refill/",)
    compared = {key: value for key, value in expected.items() if key.startswith(prefixes)}
    assert len(compared) > 50
    for key, value in compared.items():
        assert two_ranks[0][name]["logs"][key] == pytest.approx(value, rel=1e-5, abs=1e-7), key


def test_two_ranks_have_the_components_and_advantages_that_one_would(
    two_ranks: list[dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(model, in_components(), tmp_path)
    trainer.train()
    names, advantages = trainer.reward_func_names, list(trainer._logs["advantages"])
    assert names == ["gym", "a", "b", "c"] and len(set(advantages)) > 5
    assert [rank["components"] for rank in two_ranks] == [(names, advantages)] * 2


def test_two_ranks_evaluate_what_one_would(two_ranks: list[dict[str, Any]], model: Path, tmp_path: Path) -> None:
    case, evaluated = evaluation()
    expected = make_trainer(model, case, tmp_path).evaluate(tasks(evaluated))
    assert expected["eval_rollouts/count"] == 10
    prefixes = ("eval_rollouts/", "eval_gym/", "eval_pass@", "eval_mean@", "eval_success")
    # The gap is over every row that was computed, also those that only fill the last batch up.
    compared = {key: v for key, v in expected.items() if key.startswith(prefixes) and "logprob_gap" not in key}
    assert {"eval_pass@2", "eval_gym/arithmetic/pass@1/tasks", "eval_mean@2"} <= set(compared)
    for rank in two_ranks:
        assert {key: rank["evaluation"][key] for key in compared} == pytest.approx(compared)


def test_every_rank_is_told_of_the_rollouts_of_all(two_ranks: list[dict[str, Any]]) -> None:
    [facts] = two_ranks[0]["told"]
    assert two_ranks[1]["told"] == [facts]
    assert {(fact["task"], fact["is_valid"]) for fact in facts} == {(t, v) for t in range(3) for v in (True, False)}
    assert len(facts) == 3 * NUM_MEMBERS


def test_no_rank_raises_alone(two_ranks: list[dict[str, Any]]) -> None:
    assert "Only 7 of the 12 rollouts" in two_ranks[0]["error"]
    assert two_ranks[0]["error"] == two_ranks[1]["error"]


@pytest.mark.parametrize("seam", SEAMS)
def test_a_mistake_in_an_override_on_one_rank_ends_all(seam: str, two_ranks: list[dict[str, Any]]) -> None:
    assert re.match(rf"RolloutError: `{seam}` raised ZeroDivisionError for .*: in an override\.", two_ranks[1][seam])
    assert re.match(r"\w+Error: rank 1: .*in an override", two_ranks[0][seam])


def test_one_rank_without_any_success_trains(two_ranks: list[dict[str, Any]]) -> None:
    assert {member for _, member in EMPTY_RANK} == {0, 1, 2, 3}
    assert all("empty_rank-grpo" in rank for rank in two_ranks)
