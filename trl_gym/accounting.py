"""Decide what is trained of a generation batch in which some rollouts are not samples, and what is logged of it.

`GymGRPOTrainer` asks `Accounting` at these places of TRL's loop:

    before _generate        which rollouts are trained, and in which rows, decided by all ranks together
    after _generate         lengths and truncation of the rollouts that are trained, as Gym reports them
    after scoring           advantages and weights of the rows; the gap between sampling and training
    after splitting         which rows are in which micro-batch of an optimizer step
    rewards                 NaN for a rollout that is not a sample, for every reward function: out of the baseline
    after the loss          TRL's means over tokens and over sequences: of those of rollouts that are trained
    log, evaluate           metrics of rollouts, named evaluation sets, a random state left as it was

What the loss divides by is in `trl_gym.rollouts.rows`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from trl_gym.config_checks import TOKEN_MEAN_LOSSES
from trl_gym.errors import ConfigError
from trl_gym.ranks import agreed
from trl_gym.rollouts import logprobs
from trl_gym.rollouts import rows as batch_rows
from trl_gym.rollouts.batch import SharedBatch, share
from trl_gym.rollouts.evaluation import EvaluationProgress, evaluation_metrics, preserved_rng, set_name, table_beside
from trl_gym.rollouts.logprobs import ratio_sum
from trl_gym.rollouts.metrics import (
    NEWEST,
    MetricsBuffer,
    ValueSum,
    completion_metrics,
    merge_cut,
    merge_gaps,
    merge_ratios,
    rollout_metrics,
    training_metrics,
)
from trl_gym.rollouts.padding import TOKEN_WEIGHT, by_length, is_sum_over_rows, num_loss_tokens, token_weights
from trl_gym.rollouts.rollout import Rollout, RolloutFacts
from trl_gym.rollouts.rows import ROW_COUNTS, SHARE, Row, mean_of_trained, num_trained_rows, row_counts

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trl_gym.config import GymGRPOConfig

logger = logging.getLogger(__name__)

Metrics = MutableMapping[str, list[float]]
"""Values by name since the last log, as TRL keeps them."""

# TRL's means over tokens, and over rows, with what a row that is not trained adds to their sums: its ratio is 1 and
# its advantage 0, so that nothing of it is clipped. The others are over tokens or, with
# `importance_sampling_level="sequence"`, over rows.
_TOKEN_MEANS = ("entropy", "kl")
_ROW_MEANS = {"vespo/phi_seq_mean": 1.0}
_CLIPPED_MEANS = (*(f"clip_ratio/{name}_mean" for name in ("low", "high", "region")), "cispo_clip_ratio")
_EQUAL_GROUPS = "frac_reward_zero_std"
_LEAST_CLIPPED, _MOST_CLIPPED = "clip_ratio/low_min", "clip_ratio/high_max"


class Accounting:
    """Decides what is trained and keeps what is logged. Every rank has one and calls its methods in step.

    Attributes:
        rollouts: `[B]`, this rank's newest batch.
        rows: `[R]`, the rows that are trained of it.
        shared: That batch on all ranks.
        evaluation: The evaluation that runs; None in training.
    """

    shared: SharedBatch  # set by `settle`, before anything reads it

    def __init__(self, args: GymGRPOConfig, accelerator: Accelerator) -> None:
        self._args, self._accelerator = args, accelerator
        self._run_metrics = {"train": MetricsBuffer(NEWEST), "eval": MetricsBuffer()}
        self.rollouts: Sequence[Rollout] = ()
        self.rows: list[Row] = []
        self.evaluation: EvaluationProgress | None = None

    # ---------------------------------------------------------------------------------------------- one batch of rows

    def settle(
        self,
        rollouts: Sequence[Rollout],
        rewards: Sequence[float | None],
        *,
        replaced: Sequence[tuple[Rollout, float | None]] = (),
        mode: str,
        step: int,
        where: str,
        pad_id: int,
        eos_id: int,
    ) -> list[float | None]:
        """Decide with all ranks which of the rollouts are trained, and in which rows.

        Args:
            rollouts: `[B]`, of this rank.
            rewards: `[B]`, checked (`batch.checked_rewards`).
            replaced: Rollouts whose groups were replaced, with their rewards: counted, and not trained.
            mode: `"train"` or `"eval"`.
            step: Number of the optimizer step that trains them; in an evaluation, the steps made before.
            where: Tells the user where to read more about failures: a sentence that begins with a verb.

        Returns:
            `[B]`, the rewards to train on; None for a rollout that is not trained.

        Raises:
            RolloutError: On every rank, when too few of them can be trained on.
            ConfigError: On every rank, when a rollout has several rows and the loss cannot weigh them exactly.
        """
        self.rollouts = rollouts
        self.shared = share(
            rollouts,
            rewards,
            mode=mode,
            rank=self._accelerator.process_index,
            gather=gather_object,
            step=step if mode == "train" else None,
            replaced=replaced,
        )
        if mode == "train":
            self.shared = self.shared.without_small_groups(self._args.gym_min_group_size)
            self.shared.check(self._args.gym_min_valid_fraction, step=step, where=where)
        self._fit_rows(self._num_micro_steps(mode), pad_id=pad_id, eos_id=eos_id)
        self.shared = self.shared.with_replaced_untrained()
        # Failures of rollouts that were replaced are the environment's all the same, and their rewards the policy's.
        counted: Sequence[RolloutFacts] = self.shared.finished
        if mode != "train" and self.evaluation is not None:
            counted = self.evaluation.counted(self.shared)
        self._run_metrics[mode].add(counted)
        return self.shared.own_rewards

    def _fit_rows(self, num_micro_steps: int, *, pad_id: int, eos_id: int) -> None:
        self.shared, num_rows = self.shared.fitted(
            num_ranks=self._accelerator.num_processes, multiple=num_micro_steps, factor=self._args.gym_max_rows_factor
        )
        several = [
            fact for fact in self.shared.facts if fact.is_valid and len(fact.row_tokens) - fact.dropped_rows > 1
        ]
        if several and self._args.beta and self._args.loss_type in TOKEN_MEAN_LOSSES:
            raise ConfigError(
                f"{len(several)} rollouts have several trajectories, `loss_type` is {self._args.loss_type!r} and "
                f"`beta` {self._args.beta:g}: the KL term would count each trajectory as a rollout.",
                f"Set `beta` to 0, or `loss_type` to another one than {' and '.join(TOKEN_MEAN_LOSSES)}.",
            )
        num_dropped = sum(fact.dropped_rows for fact in self.shared.facts)
        if num_dropped and self._accelerator.is_main_process:
            logger.warning(
                "%d rows have no room and are not trained: `gym_max_rows_factor` is %g",
                num_dropped,
                self._args.gym_max_rows_factor,
            )
        dropped = self.shared.own_dropped
        self.rows = batch_rows.rows_of(self.rollouts, dropped, num_rows, pad_id=pad_id, eos_id=eos_id)

    def _num_micro_steps(self, mode: str) -> int:
        """Micro-batches into which TRL splits a rank's part of a generation batch."""
        return self._args.steps_per_generation if mode == "train" else 1

    def correct_lengths(self, metrics: Metrics) -> int:
        """Replace TRL's metrics of completions by those of the rollouts that are trained.

        Args:
            metrics: TRL's, with this batch's values last.

        Returns:
            Tokens that are trained on or read by it, on all ranks.
        """
        for name, value in completion_metrics(self.shared.facts).items():
            metrics[name][-1] = value
        trained = [fact for fact in self.shared.facts if fact.is_valid]
        return sum(sum(fact.row_tokens[fact.dropped_rows :]) for fact in trained)

    def exclude_failures(self, rewards: torch.Tensor) -> torch.Tensor:
        """Take the rollouts that are not samples out of every baseline.

        Args:
            rewards: `[N, F]`, by rollout of all ranks and reward function; changed in place.
        """
        failed = [not fact.is_valid for fact in self.shared.facts]
        rewards[torch.tensor(failed, device=rewards.device)] = torch.nan
        return rewards

    def mark(self, batch: dict[str, Any], mode: str) -> dict[str, Any]:
        """Return a scored batch whose rows have the advantages of their rollouts, and shares for `rows.weighted`."""
        return batch_rows.mark(
            batch,
            self.rows,
            num_valid=self.shared.num_valid,
            num_micro_batches=self._accelerator.num_processes * self._num_micro_steps(mode),
        )

    def arrange(self, micro_batches: Sequence[dict[str, Any]], *, has_router_loss: bool) -> list[dict[str, Any]]:
        """Return the micro-batches of a generation batch: rows of similar length together, where the loss allows it.

        Args:
            micro_batches: As TRL split the batch after it shuffled it.
            has_router_loss: Whether TRL adds the load-balancing loss of a mixture of experts.
        """
        args = self._args
        # In whatever step of the accumulation a generation batch begins, so many in succession are of one step.
        num_together = math.gcd(args.gradient_accumulation_steps, len(micro_batches))
        is_sum = is_sum_over_rows(
            args.loss_type,
            top_entropy_quantile=args.top_entropy_quantile,
            has_entropy_bonus=args.use_adaptive_entropy or args.entropy_coef != 0,
            has_router_loss=has_router_loss,
        )
        arranged = by_length(micro_batches, num_together) if is_sum else list(micro_batches)
        own = torch.stack([torch.stack([num_loss_tokens(batch), num_trained_rows(batch)]) for batch in arranged])
        num_tokens, num_trained = self._accelerator.reduce(own.float(), reduction="sum").T
        num_rows = self._accelerator.num_processes * torch.tensor([len(batch[SHARE]) for batch in arranged])
        weights = token_weights(num_tokens, num_together)
        counts = row_counts(num_rows.to(num_trained.device), num_trained, num_together)
        return [
            batch | {TOKEN_WEIGHT: weight, ROW_COUNTS: count}
            for batch, weight, count in zip(arranged, weights, counts, strict=True)
        ]

    def weigh_means(
        self, metrics: Metrics, token_weight: torch.Tensor | None, counts: torch.Tensor | None = None
    ) -> None:
        """Make TRL's means over the tokens, or rows, of each micro-batch means over those of an optimizer step, and
        leave the rows out that are not trained.

        Args:
            metrics: TRL's, with those of a micro-batch last.
            token_weight: Of that micro-batch; None for one that `arrange` has not seen.
            counts: See `rows.row_counts`; None for one of a checkpoint of an earlier version.
        """
        is_by_token = self._args.importance_sampling_level == "token"
        weight = 1.0 if token_weight is None else float(token_weight)
        for name in (*_TOKEN_MEANS, *(_CLIPPED_MEANS if is_by_token else ())):
            if metrics.get(name):
                metrics[name][-1] *= weight
        if counts is None:
            return
        if not is_by_token and metrics.get(_LEAST_CLIPPED):  # 0 or 1 of each row
            num_rows, num_trained, _ = counts.tolist()
            num_clipped = round(metrics["clip_ratio/low_mean"][-1] * num_rows)
            metrics[_LEAST_CLIPPED][-1] = float(num_clipped == num_trained) if num_trained else math.nan
            metrics[_MOST_CLIPPED][-1] = metrics[_MOST_CLIPPED][-1] if num_trained else math.nan
        for name, untrained in (_ROW_MEANS | ({} if is_by_token else dict.fromkeys(_CLIPPED_MEANS, 0.0))).items():
            if metrics.get(name):
                metrics[name][-1] = mean_of_trained(metrics[name][-1], counts, untrained=untrained)

    def correct_scores(self, batch: dict[str, Any], metrics: Metrics, *, mode: str, step: int, same: bool) -> None:
        """Log how far sampling and training are apart; in training, write the trainer's log-probabilities down.

        TRL's own metrics of it are means of ranks' means and count rows that are not trained; they are corrected. So
        is its fraction of groups with equal rewards, which counts groups that have none.

        Args:
            batch: A scored batch, `R` rows.
            metrics: TRL's, with this batch's values last.
            mode: `"train"` or `"eval"`.
            step: Number of the optimizer step that trains it.
            same: Whether sampling drew from the distribution that TRL computes.

        Raises:
            RolloutError: On every rank, when they cannot be written.
        """
        turn_ends = [row.trajectory.turn_ends for row in self.rows]
        agents = ["" if row.rollout is None else self.rollouts[row.rollout].request.agent for row in self.rows]
        gaps = logprobs.batch_gaps(batch, turn_ends, agents) if same else {}
        with agreed(self._accelerator):
            if gaps and mode == "train":
                logprobs.record(
                    self._args.output_dir,
                    batch["old_per_token_logps"],
                    self.rows,
                    self.rollouts,
                    batch["advantages"].tolist(),
                    step=step,
                    rank=self._accelerator.process_index,
                )
        is_trained = [row.rollout is not None for row in self.rows]
        ranks = gather_object([(gaps, ratio_sum(batch, is_trained), self._cut(batch, is_trained))])
        self._run_metrics[mode].add_gaps([gaps for gaps, _, _ in ranks])
        corrected = merge_ratios([ratios for _, ratios, _ in ranks])
        if corrected:
            merged = merge_gaps([gaps for gaps, _, _ in ranks])
            for name, value in merge_cut([cut for _, _, cut in ranks]).items():
                metrics[name].append(value)
            for name in ("mean", "max"):
                corrected[f"sampling/sampling_logp_difference/{name}"] = merged.get(f"logprob_gap/{name}", torch.nan)
        for name, value in corrected.items():
            metrics[name][-1] = value
        if metrics.get(_EQUAL_GROUPS):
            metrics[_EQUAL_GROUPS][-1] *= self._groups_per_trained_one(mode)

    def _groups_per_trained_one(self, mode: str) -> float:
        """Return how many times as many groups a batch has as groups with a rollout that is trained; 1 where TRL does
        not look at groups, or looks at groups of one."""
        args = self._args
        size = args.num_generations if mode == "train" else args.num_generations_eval or args.num_generations
        is_by_group = args.multi_objective_aggregation == "sum_then_normalize" and args.scale_rewards != "batch"
        if size == 1 or not is_by_group:
            return 1.0
        groups = {fact.group for fact in self.shared.facts}
        trained = {fact.group for fact in self.shared.facts if fact.is_valid}
        return len(groups) / len(trained) if trained else math.nan

    def _cut(self, batch: dict[str, Any], is_trained: Sequence[bool]) -> ValueSum | None:
        return logprobs.cut_tokens(
            batch,
            is_trained,
            mode=str(self._args.vllm_importance_sampling_mode),
            clip_min=self._args.vllm_importance_sampling_clip_min,
            clip_max=self._args.vllm_importance_sampling_clip_max,
        )

    # -------------------------------------------------------------------------------------- evaluation, what is logged

    @contextlib.contextmanager
    def evaluating(self, prefix: str, num_rollouts: int | None, *, step: int, has_table: bool) -> Iterator[None]:
        """While open, batches belong to one evaluation, and training finds its random state and table as they were.

        Args:
            prefix: transformers' `metric_key_prefix`.
            num_rollouts: Rollouts that the dataset asks for; None when it does not tell its length.
            has_table: Whether this rank writes TRL's completions table.

        Raises:
            RolloutError: At the end: fewer of the rollouts than `gym_min_valid_fraction` have a reward.
        """
        self.evaluation = evaluation = EvaluationProgress(set_name(prefix), num_rollouts)
        self._run_metrics["eval"] = MetricsBuffer()
        table = table_beside(self._args.output_dir, step, evaluation.name) if has_table else nullcontext()
        try:
            with preserved_rng(), table:
                yield
        finally:
            self.evaluation = None
        evaluation.check(self._args.gym_min_valid_fraction)

    @property
    def dataset(self) -> str:
        """Name of the evaluation set that is rolled out, where there are several; else empty."""
        return "" if self.evaluation is None else self.evaluation.name

    def take(self, metrics: Metrics, *, mode: str, num_attempts: int) -> None:
        """Add what rollouts have shown since the last log to TRL's metrics.

        Args:
            metrics: TRL's. Those of a named evaluation set get its name; TRL puts `eval_` before it.
            mode: `"train"` or `"eval"`.
            num_attempts: Attempts at each task of an evaluation.
        """
        summarize = training_metrics if mode == "train" else functools.partial(_evaluated, num_attempts=num_attempts)
        for name, value in self._run_metrics[mode].take(summarize).items():
            metrics[name] = [value]
        if self.dataset:
            named = {f"{self.dataset}_{name}": values for name, values in metrics.items()}
            metrics.clear()
            metrics.update(named)


def _evaluated(facts: Sequence[RolloutFacts], *, num_attempts: int) -> dict[str, float]:
    return rollout_metrics(facts) | evaluation_metrics(facts, num_attempts)
