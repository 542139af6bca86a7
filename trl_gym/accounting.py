"""TRL's GRPO where some rows of a batch are no samples: what reaches the loss, what is logged, how it is evaluated.

TRL's methods are extended, none is copied:

    _generate                         lengths and truncation of the rollouts that are trained, as Gym reports them
    _generate_and_score_completions   marks the rows that count; the gap between sampling and training
    _calculate_rewards                a row that is no sample is NaN for every reward function: out of the baseline
    compute_loss                      such rows leave what the loss divides by, see `trl_gym.rollouts.batch`
    log, evaluate                     metrics of rollouts, named evaluation sets, random states
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer

from trl_gym.errors import RolloutError
from trl_gym.ranks import agree
from trl_gym.rollouts import batch as batches
from trl_gym.rollouts import logprobs
from trl_gym.rollouts.batch import SharedBatch, share, table_columns
from trl_gym.rollouts.evaluation import (
    EvaluationRun,
    emptied,
    evaluation_metrics,
    evaluation_sampling,
    preserved_rng,
    set_name,
    table_beside,
)
from trl_gym.rollouts.logprobs import merge_ratios, ratio_sum
from trl_gym.rollouts.metrics import NEWEST, RunMetrics, completion_metrics, rollout_metrics, training_metrics
from trl_gym.rollouts.request import Sampling
from trl_gym.rollouts.rollout import Rollout, RolloutFacts


class AccountingGRPOTrainer(GRPOTrainer):
    """See the module. A subclass sets `_rollouts` in its `rollout_func` and calls `_settle` there."""

    _rollouts: Sequence[Rollout] = ()
    _shared: SharedBatch  # of the newest batch; set before anything reads it
    _evaluation: EvaluationRun | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._run_metrics = {"train": RunMetrics(NEWEST), "eval": RunMetrics()}
        self._num_settled = 0
        super().__init__(*args, **kwargs)
        # TRL would look at the last token. `training_rows` masks what Gym reports as cut.
        self.mask_truncated_completions = False

    # ---------------------------------------------------------------------------------------------- one batch of rows

    def _settle(self, rewards: Sequence[float | None], where: str) -> list[float | None]:
        """Decide with all ranks which of the rollouts are trained. Every rank calls it, once per batch.

        Args:
            rewards: `[B]`, of `_rollouts`.
            where: Where to read more about failures, a sentence.

        Returns:
            `[B]`, the rewards to train on; None for a rollout that is not trained.

        Raises:
            RolloutError: On every rank, when too few of them can be trained on.
        """
        self._num_settled += 1
        self._shared = share(
            self._rollouts,
            batches.checked_rewards(rewards, len(self._rollouts)),
            batch=f"{self._mode}-{self._num_settled}",
            rank=self.accelerator.process_index,
            gather=gather_object,
        )
        counted: Sequence[RolloutFacts] = self._shared.facts
        if self._mode == "train":
            self._shared = self._shared.without_small_groups(self.args.gym_min_group_size)
            self._shared.check(self.args.gym_min_valid_fraction, step=self.state.global_step, where=where)
            counted = self._shared.facts
        elif self._evaluation is not None:
            counted = self._evaluation.counted(self._shared)
        self._run_metrics[self._mode].add(counted)
        return self._shared.own_rewards

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        num_tokens_before = self.state.num_input_tokens_seen
        generated = super()._generate(prompts)
        metrics, trained = self._metrics[self._mode], [fact for fact in self._shared.facts if fact.is_valid]
        for name, value in completion_metrics(self._shared.facts).items():
            metrics[name][-1] = value
        if self._mode == "train":
            num_tokens = sum(fact.prompt_tokens + fact.sampled_tokens for fact in trained)
            self.state.num_input_tokens_seen = num_tokens_before + num_tokens
            metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        for column, values in table_columns(self._rollouts).items():
            self._log_completion_extra(column, values)
        return generated

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self._log_sampling(output)
        steps = self.args.steps_per_generation if self._mode == "train" else 1
        return batches.mark(
            output,
            self._shared.own_valid,
            num_valid=self._shared.num_valid,
            num_micro_batches=self.accelerator.num_processes * steps,
        )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        rewards[torch.tensor([not fact.is_valid for fact in self._shared.facts], device=rewards.device)] = torch.nan
        return rewards

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        rows, weight = batches.weighted(inputs, self.loss_type)
        beta = self.beta
        self.beta = beta * weight
        try:
            return super().compute_loss(model, rows, return_outputs, num_items_in_batch)
        finally:
            self.beta = beta

    def _log_sampling(self, batch: dict[str, Any]) -> None:
        """How far sampling and training are apart. Every rank calls it.

        TRL's own metrics of it are means of ranks' means with rows that are not trained; they are put right.
        """
        turn_ends = [rollout.trajectories[0].turn_ends if rollout.trajectories else [] for rollout in self._rollouts]
        agents = [rollout.request.agent for rollout in self._rollouts]
        gaps = {} if self._samples_differently else logprobs.batch_gaps(batch, turn_ends, agents)
        agree(
            self._record(batch) if gaps and self._mode == "train" else None,
            self.accelerator.process_index,
            gather_object,
        )
        ranks = gather_object([(gaps, ratio_sum(batch, self._shared.own_valid))])
        self._run_metrics[self._mode].add_gaps([gaps for gaps, _ in ranks])
        corrected = merge_ratios([ratios for _, ratios in ranks])
        if corrected:
            merged = logprobs.merge([gaps for gaps, _ in ranks])
            for name in ("mean", "max"):
                corrected[f"sampling/sampling_logp_difference/{name}"] = merged.get(f"logprob_gap/{name}", torch.nan)
        for name, value in corrected.items():
            self._metrics[self._mode][name][-1] = value

    def _record(self, batch: dict[str, Any]) -> RolloutError | None:
        """Write down what the trainer's log-probabilities are. What goes wrong is returned: all ranks must know."""
        try:
            logprobs.record(
                self.args.output_dir,
                batch["old_per_token_logps"],
                self._rollouts,
                step=self.state.global_step,
                rank=self.accelerator.process_index,
            )
        except RolloutError as error:
            return error
        return None

    # -------------------------------------------------------------------------------------- evaluation, what is logged

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in transformers: one dataset, or several by name, whose metrics are `eval_<name>_…`.

        Raises:
            RolloutError: Fewer of the rollouts than `gym_min_valid_fraction` have a reward.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):  # transformers comes back here with each of them
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        num_rollouts = len(dataset) * self.num_generations_eval if hasattr(dataset, "__len__") else None
        self._evaluation = evaluation = EvaluationRun(set_name(metric_key_prefix), num_rollouts)
        self._run_metrics["eval"] = RunMetrics()
        try:
            with preserved_rng(), self._own_table(evaluation.name):
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluation = None
        evaluation.check(self.args.gym_min_valid_fraction)
        return metrics

    @contextlib.contextmanager
    def _own_table(self, name: str) -> Iterator[None]:
        """A completions table for an evaluation: TRL would mix it with training's, and write over that file."""
        training = self._logs
        self._logs = emptied(training)
        writes = self.log_completions and self.accelerator.is_main_process
        try:
            with table_beside(self.args.output_dir, self.state.global_step, name) if writes else nullcontext():
                yield
        finally:
            self._logs = training

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics[self._mode]
        for name, value in self._run_metrics[self._mode].take(self._summarize).items():
            metrics[name] = [value]
        if self._evaluation is not None and self._evaluation.name:  # TRL puts `eval_` before the names
            named = {f"{self._evaluation.name}_{name}": values for name, values in metrics.items()}
            metrics.clear()
            metrics.update(named)
        super().log(logs, start_time)

    @property
    def _summarize(self) -> Callable[[Sequence[RolloutFacts]], dict[str, float]]:
        evaluated = functools.partial(_evaluated, k=self.num_generations_eval)
        return training_metrics if self._mode == "train" else evaluated

    # -------------------------------------------------------------------------------------------------------- sampling

    @property
    def _sampling(self) -> Sampling:
        """The distribution that this batch's tokens are drawn from."""
        changes = self.args.gym_eval_sampling if self._mode == "eval" else None
        return evaluation_sampling(self._trained_sampling, changes)

    @property
    def _trained_sampling(self) -> Sampling:
        """The distribution whose log-probabilities TRL computes."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k if self.top_k else -1,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty,
        )

    @property
    def _samples_differently(self) -> bool:
        """Whether the log-probabilities of sampling are not those that TRL computes."""
        return self._sampling != self._trained_sampling

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"


def _evaluated(facts: Sequence[RolloutFacts], *, k: int) -> dict[str, float]:
    return rollout_metrics(facts) | evaluation_metrics(facts, k)
