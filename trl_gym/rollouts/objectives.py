"""What rollouts are rewarded for, as columns of TRL's: the environment's reward, or the components that it is made of.

NeMo Gym's multi-reward contract (`BaseMultiRewardVerifyResponse` of 0.7; environments of 0.4 have the field, too) is a
mapping `reward_components` from objectives to numbers, beside `reward`, an aggregate for who wants one number. It need
not be the sum. The names should be the same for all tasks of an environment. With `gym_reward_components` each name is
a column, as a reward function of TRL's is, under `multi_objective_aggregation` and `scale_rewards`:

    a rollout has                               in the columns
    components                                  each in its own
    not one that others of the batch have       NaN there: TRL adds 0, and leaves it out of that column's baseline
    none at all (an environment of one reward)  its reward, in the column `gym`
    one that is no finite number                none: it has failed, as with such a reward (`component_problem`)
    failed                                      NaN in all: out of every baseline

A batch has the columns of its own rollouts, on all ranks: by name, `gym` first, reward functions last. Nothing is kept
from batch to batch, so that a resumed run has the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trl_gym.errors import ConfigError
from trl_gym.gym.client import MAX_REWARD
from trl_gym.rollouts.metrics import by_agent
from trl_gym.rollouts.rollout import Rollout, RolloutFacts, components_of
from trl_gym.untrusted import number

if TYPE_CHECKING:
    from trl_gym.config import GymGRPOConfig

logger = logging.getLogger(__name__)

GYM = "gym"
_SAME = 1e-6  # of a reward: a sum that is no further from it is the reward
_MAX_SHOWN = 10  # names


def gym(*, gym_reward: list[float | None], **_: Any) -> list[float]:
    """Return the environment's reward, as a TRL reward function; its name is the metric's name.

    A failed rollout is 0 here and NaN after `_calculate_rewards`, which also takes other reward functions out.
    """
    return [0.0 if reward is None else reward for reward in gym_reward]


@dataclass(frozen=True, slots=True)
class Component:
    """A component as a TRL reward function; `gym` is the reward of rollouts that have none."""

    name: str

    def __call__(
        self, *, gym_reward: list[float | None], gym_result: list[dict[str, Any] | None], **_: Any
    ) -> list[float | None]:
        """Return one number per rollout: None where it does not have this component, 0 where it has failed."""
        return [
            0.0 if reward is None else _columns_of(components_of(answer), reward).get(self.name)
            for reward, answer in zip(gym_reward, gym_result, strict=True)
        ]


def component_problem(answer: Mapping[str, Any]) -> str | None:
    """Say that the components of Gym's answer cannot be trained on; None where they can, or there are none.

    Args:
        answer: Gym's answer, which has a reward.
    """
    found = answer.get("reward_components")
    if found is None:
        return None
    if not isinstance(found, dict):
        return f"`reward_components` is {str(found)[:100]!r}, and a mapping from names to numbers is needed"
    for name, given in found.items():
        value = number(given)
        if given is not None and (value is None or abs(value) > MAX_REWARD):
            return (
                f"a finite number is needed as reward component, of {MAX_REWARD:g} at most, but "
                f"`reward_components[{name[:100]!r}]` is {str(given)[:100]!r}"
            )
    return None


@dataclass(frozen=True, slots=True)
class Columns:
    """Reward functions as TRL keeps them in four lists."""

    functions: list[Any]
    names: list[str]
    processing_classes: list[Any]
    weights: torch.Tensor  # `[F]`

    @classmethod
    def of(cls, trainer: Any) -> Columns:
        """Return those of a trainer of TRL's."""
        return cls(
            trainer.reward_funcs, trainer.reward_func_names, trainer.reward_processing_classes, trainer.reward_weights
        )

    def give(self, trainer: Any) -> None:
        """Make them those of a trainer of TRL's."""
        trainer.reward_funcs, trainer.reward_func_names = self.functions, self.names
        trainer.reward_processing_classes, trainer.reward_weights = self.processing_classes, self.weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """The columns of each batch. Every rank has one and asks it for the same."""

    args: GymGRPOConfig
    given: Columns  # the columns of `gym` and of the trainer's reward functions
    tells: bool = True  # whether this process says what is odd about components, once for each environment
    _told: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def of(cls, args: GymGRPOConfig, trainer: Any, *, tells: bool) -> Objectives:
        """Return those of a trainer, which gets the weights that `reward_weights` gives its functions by name. Raises
        `ConfigError`: one has no weight there, or the name of another column."""
        given = Columns.of(trainer)
        if isinstance(args.reward_weights, dict) and not args.gym_reward_components:
            given = dataclasses.replace(given, weights=_weights(args.reward_weights, given.names))
            given.give(trainer)
        return cls(args=args, given=given, tells=tells)

    def columns(self, facts: Sequence[RolloutFacts]) -> Columns:
        """Return the columns of a batch.

        Args:
            facts: Of its rollouts on all ranks; those that are not trained have no part in it.

        Raises:
            ConfigError: A component has no weight in `reward_weights`, or the name of a reward function.
        """
        trained = [fact for fact in facts if fact.is_valid]
        names = sorted({name for fact in trained for name in fact.components})
        functions = self.given.names[1:]
        if taken := sorted({GYM, *functions} & set(names)):
            raise ConfigError(
                f"The component {taken[0]!r} of `reward_components` has the name of "
                f"{'the column of the reward' if taken[0] == GYM else 'a reward function'}.",
                "Rename one of them.",
            )
        if not all(fact.components for fact in trained) or not trained:
            names.insert(0, GYM)
        if self.tells:
            for line in self._odd(trained):
                logger.warning(line)
        return Columns(
            [*map(Component, names), *self.given.functions[1:]],
            [*names, *functions],
            [*(None for _ in names), *self.given.processing_classes[1:]],
            _weights(self.args.reward_weights, [*names, *functions]),
        )

    def apart(self, rollouts: Sequence[tuple[Rollout, float]]) -> float:
        """Return how far apart the rollouts of a group are in what TRL compares: their weighted sums, or each column.

        Args:
            rollouts: With their rewards; at least one.
        """
        columns = [_columns_of(components_of(rollout.answer), reward) for rollout, reward in rollouts]
        names = sorted({name for own in columns for name in own})
        weights = dict(zip(names, _weights(self.args.reward_weights, names).tolist(), strict=True))
        if self.args.multi_objective_aggregation == "normalize_then_sum":
            by_name = ([own[name] for own in columns if name in own] for name in names if weights[name])
            return max((max(values) - min(values) for values in by_name), default=0.0)
        sums = [math.fsum(weights[name] * value for name, value in own.items()) for own in columns]
        return max(sums) - min(sums)

    def _odd(self, trained: Sequence[RolloutFacts]) -> Iterator[str]:
        """Yield a line for each environment whose components differ from rollout to rollout, or from its reward."""
        for agent, own in by_agent(trained).items():
            names = {name for fact in own for name in fact.components}
            lacking = [
                (fact, sorted(names - fact.components.keys())) for fact in own if names - fact.components.keys()
            ]
            if lacking and self._is_new(agent, "names"):
                some = ", ".join(f"`{name}`" for name in lacking[0][1][:_MAX_SHOWN])
                yield (
                    f"{len(lacking)} of {len(own)} rollouts of {agent} lack components that others have (task "
                    f"{lacking[0][0].task}: {some}), and NeMo Gym asks for the same in all. They count nothing there."
                )
            odd = [fact for fact in own if not _adds_up(fact)]
            if odd and self._is_new(agent, "sum"):
                first = odd[0]
                yield (
                    f"The components of {agent} do not add up to its reward (task {first.task}: "
                    f"{math.fsum(first.components.values()):g} and {first.reward:g}). They are trained, with the "
                    "weights of `reward_weights`, and the reward is not."
                )

    def _is_new(self, agent: str, what: str) -> bool:
        is_new = (agent, what) not in self._told
        self._told.add((agent, what))
        return is_new


def fill_table(
    table: MutableMapping[str, deque[float]], names: Sequence[str], *, num_logged: int, num_rollouts: int
) -> None:
    """Give columns that only some batches have as many values as the others have, in TRL's completions table.

    Args:
        table: Values by column, of the newest rollouts; those of a batch are added after this. Columns that have no
            number any more are dropped.
        names: Columns of that batch.
        num_logged: Rows before it.
        num_rollouts: Rows of it.
    """
    for name in names:
        table[name].extend([math.nan] * (num_logged - len(table[name])))
    for name in table.keys() - set(names):
        table[name].extend([math.nan] * num_rollouts)
        if all(map(math.isnan, table[name])):
            del table[name]


@contextlib.contextmanager
def unnamed_weights(args: GymGRPOConfig) -> Iterator[None]:
    """While open, hide weights that are given by name from TRL, which knows a list only."""
    given = args.reward_weights
    args.reward_weights = None if isinstance(given, dict) else given
    try:
        yield
    finally:
        args.reward_weights = given


def check_rewards_are_gyms(args: GymGRPOConfig, compute_rewards: Callable[..., Any], own: Callable[..., Any]) -> None:
    """Refuse an override of `compute_rewards` whose numbers would not be trained.

    Args:
        own: That of `GymGRPOTrainer`.

    Raises:
        ConfigError: It is another one, and components are trained.
    """
    if args.gym_reward_components and compute_rewards is not own:
        raise ConfigError(
            f"`gym_reward_components` is true and `compute_rewards` is overridden as {compute_rewards.__qualname__}: "
            "the environment's components are trained, not the numbers that it returns.",
            "Leave one of them out; `reward_funcs` add objectives.",
        )


def _columns_of(components: Mapping[str, float], reward: float) -> Mapping[str, float]:
    return components or {GYM: reward}


def _adds_up(fact: RolloutFacts) -> bool:
    if not fact.components or fact.reward is None:
        return True
    return math.isclose(math.fsum(fact.components.values()), fact.reward, rel_tol=_SAME, abs_tol=_SAME)


def _weights(given: Any, names: Sequence[str]) -> torch.Tensor:
    """Return the weight of each column, `[F]`."""
    if not isinstance(given, dict):
        return torch.ones(len(names), dtype=torch.float32)
    if missing := [name for name in names if name not in given]:
        named, others = (", ".join(map(repr, some)) for some in (given, missing[:_MAX_SHOWN]))
        raise ConfigError(
            f"`reward_weights` names {named}, and not {others}, for which rollouts are rewarded.",
            "Add a weight for each; 0 leaves one out.",
        )
    return torch.tensor([given[name] for name in names], dtype=torch.float32)
