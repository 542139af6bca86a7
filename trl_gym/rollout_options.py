"""Options of rollouts, the same in training and in commands: sampling, tokens, seconds, places, further attempts.

`GymGRPOConfig.rollout_options` makes them from the `gym_*` options, `trl-gym rollout` and `trl-gym eval` from their
flags. Both check their values with the functions here. Imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from trl_gym.errors import FailureKind, Problem

RETRIED_KINDS = tuple(str(kind) for kind in FailureKind if kind is not FailureKind.CANCELLED)
DEFAULT_RETRIES = 2
AGENT_SAMPLING = ("strip", "refuse", "allow")
_ENVIRONMENT_KEYS = ("deadline", "max_inflight", "retries", "launch_rate", "agent_sampling")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The distribution that tokens are drawn from, in vLLM's terms."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0


SAMPLING_KEYS = tuple(parameter.name for parameter in fields(Sampling))


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutOptions:
    """Say how rollouts are sampled and what they may cost."""

    sampling: Sampling = Sampling()  # distribution that tokens are drawn from
    # What the policy server does with a model call that asks for another one, see `AGENT_SAMPLING`.
    agent_sampling: str = AGENT_SAMPLING[0]
    # Tokens that a conversation of a rollout may have after its first prompt; a compaction begins a new one.
    max_completion_length: int = 4096
    deadline: float = 600.0  # seconds after which a rollout counts as failed
    max_inflight: int = 256  # rollouts of one process that run at the same time
    launch_rate: float | None = None  # rollouts that one process starts per second at most; None for no limit
    # Further attempts by failure kind; a kind that is missing has none.
    retries: Mapping[str, int] = field(default_factory=lambda: by_kind(DEFAULT_RETRIES))
    # Other values for single agents: `{agent: {"deadline", "max_inflight", "retries", "launch_rate",
    # "agent_sampling"}}`, each key optional.
    environments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def agent_sampling_of(self, agent: str) -> str:
        """Return `agent_sampling` for one agent."""
        return str(self.environments.get(agent, {}).get("agent_sampling", self.agent_sampling))

    def problems(self, name: Callable[[str], str]) -> list[Problem]:
        """List every value that is out of its range.

        Args:
            name: Spells an attribute as the user knows it, e.g. `"deadline"` → `"gym_deadline"`.
        """
        return [
            *number_problems(name("deadline"), self.deadline, above=0, unit="seconds"),
            *number_problems(name("max_inflight"), self.max_inflight, least=1, whole=True),
            *retry_problems(name("retries"), self.retries),
            *([] if self.launch_rate is None else number_problems(name("launch_rate"), self.launch_rate, above=0)),
            *environment_problems(name("environments"), self.environments),
        ]


def sampling_problems(
    name: Callable[[str], str], sampling: Mapping[str, Any], *, is_trained: bool = False
) -> list[Problem]:
    """List values that vLLM would refuse, or that cannot be trained with.

    Args:
        name: Spells a parameter of `Sampling` as the user knows it.
        sampling: Values by parameter; one that is left out has its default.
        is_trained: Whether what is sampled is trained: its temperature divides logits. vLLM samples with 0.01 what is
            between 0 and that, the trainer would not.
    """
    problems: list[Problem] = []
    for parameter, value in sampling.items():
        if is_trained and parameter == "temperature" and isinstance(value, int | float) and value < _LEAST_TRAINED:
            problems.append(
                Problem(
                    f"`{name(parameter)}` is {value}: logits are divided by it in training, and vLLM samples with "
                    f"{_LEAST_TRAINED} what is less.",
                    f"Set it to at least {_LEAST_TRAINED}. To evaluate greedily, set `temperature` to 0 in "
                    "`gym_eval_sampling`.",
                )
            )
        else:
            problems += number_problems(name(parameter), value, **_SAMPLING_RANGES[parameter])
    return problems


_LEAST_TRAINED = 0.01  # `temperature`
_SAMPLING_RANGES: Mapping[str, dict[str, Any]] = {  # those of vLLM's `SamplingParams`
    "temperature": {"least": 0, "most": 2},
    "top_p": {"above": 0, "most": 1},
    "top_k": {"least": -1, "whole": True},  # 0 and -1 are all tokens
    "min_p": {"least": 0, "most": 1},
    "repetition_penalty": {"above": 0},
}


def by_kind(retries: Any) -> Any:
    """Spell retries out by failure kind: a number stands for infrastructure failures."""
    return {str(FailureKind.INFRASTRUCTURE): retries} if isinstance(retries, int) else retries


def number_problems(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    whole: bool = False,
    unit: str = "",
) -> list[Problem]:
    """Compare a number with its range.

    Args:
        name: The option, as the message names it.
        value: As given, of any type.
        least: Smallest value.
        above: What the value must exceed.
        most: Largest value.
        whole: Whether fractions are wrong.
        unit: For the message, e.g. `"seconds"`.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if (
        is_number
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (not whole or value == int(value))
    ):
        return []
    bounds = [
        text
        for bound, text in ((least, f"of at least {least}"), (above, f"above {above}"), (most, f"of at most {most}"))
        if bound is not None
    ]
    kind = "a whole number" if whole else f"a number of {unit}" if unit else "a number"
    return [Problem(f"`{name}` is {value!r}.", f"Set it to {' and '.join([f'{kind} {bounds[0]}', *bounds[1:]])}.")]


def retry_problems(name: str, retries: Any) -> list[Problem]:
    """Check retries that `by_kind` has spelled out."""
    if not isinstance(retries, Mapping):
        return [
            Problem(f"`{name}` is {retries!r}.", "Set it to a number, or to a mapping from failure kinds to numbers.")
        ]
    unknown = [
        Problem(f"`{name}` has the unknown failure kind {kind!r}.", f"Choose among {', '.join(RETRIED_KINDS)}.")
        for kind in retries
        if kind not in RETRIED_KINDS
    ]
    wrong = [
        number_problems(f"{name}[{kind!r}]", number, least=0, whole=True)
        for kind, number in retries.items()
        if kind in RETRIED_KINDS
    ]
    return [*unknown, *(problem for found in wrong for problem in found)]


def environment_problems(name: str, environments: Any) -> list[Problem]:
    """Check the values of single agents."""
    if not isinstance(environments, Mapping) or not all(isinstance(own, Mapping) for own in environments.values()):
        return [Problem(f"`{name}` is {environments!r}.", "Set it to a mapping from agent names to mappings.")]
    problems: list[Problem] = []
    for agent, own in environments.items():
        for key, value in own.items():
            where = f"{name}[{agent!r}][{key!r}]"
            if key not in _ENVIRONMENT_KEYS:
                problems.append(
                    Problem(f"`{where}` is not an option of an agent.", f"Use {', '.join(_ENVIRONMENT_KEYS)}.")
                )
            elif key == "retries":
                problems += retry_problems(where, by_kind(value))
            elif key == "agent_sampling":
                if value not in AGENT_SAMPLING:
                    problems.append(Problem(f"`{where}` is {value!r}.", f"Choose among {', '.join(AGENT_SAMPLING)}."))
            elif key == "max_inflight":
                problems += number_problems(where, value, least=1, whole=True)
            else:
                problems += number_problems(where, value, above=0)
    return problems
