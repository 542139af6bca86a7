"""Say what `trl-gym rollout` and `trl-gym eval` roll out, and on what."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl_gym.errors import ConfigError, Problem
from trl_gym.given import url_problems, usable_key
from trl_gym.policy_server.command import KEY_VARIABLE, api_key_from_environment
from trl_gym.recipes import find
from trl_gym.rollout_options import (
    AGENT_SAMPLING,
    DEFAULT_RETRIES,
    RolloutOptions,
    Sampling,
    by_kind,
    number_problems,
    sampling_problems,
)

# Names of version 0.1, and the training options of the same meaning.
OLD_FLAGS = {
    "--max-tokens": "--max-completion-length",
    "--overrides": "--gym-overrides",
    "--gym-deadline": "--deadline",
    "--gym-max-inflight": "--max-inflight",
    "--gym-retries": "--retries",
}


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A Gym JSONL file; `name` is its stem unless another was given (`NAME=FILE`)."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectOptions:
    """Say what to roll out, on what, and where to write.

    Raises:
        ConfigError: Lists every problem that can be found without starting anything.
    """

    mode: str  # `"rollout"` or `"eval"`; `mode` of the journal's lines
    datasets: Sequence[NamedFile]  # files, with unique names
    output_dir: Path  # folder for `rollouts/`, `logs/` and the summary
    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    config_paths: Sequence[str] = ()  # NeMo Gym configs to start, unless `head_url` names a running Gym
    head_url: str | None = None  # head server of a running Gym; several, separated by commas
    processes: int | None = None  # processes of the NeMo Gym that is started; None for the default
    gym_python: str | None = None  # interpreter that has `nemo-gym`
    overrides: dict[str, Any] = field(default_factory=dict)
    agent: str | None = None  # agent for rows that name none
    limit: int | None = None  # rows of each file at most
    num_generations: int = 1  # rollouts per row
    rollouts: RolloutOptions = field(default_factory=RolloutOptions)  # sampling and limits, as in training

    def __post_init__(self) -> None:
        object.__setattr__(self, "api_key", usable_key("--api-key", self.api_key))
        problems = [*self._source_problems(), *self._number_problems()]
        if problems:
            raise ConfigError(f"{len(problems)} problem(s) in the options:", problems=problems)

    @property
    def journal_dir(self) -> Path:
        return self.output_dir / "rollouts"

    def _source_problems(self) -> list[Problem]:
        problems = [
            Problem(f"`--dataset` {file.path} does not exist.", "Correct the path.")
            for file in self.datasets
            if not file.path.is_file()
        ]
        names = [file.name for file in self.datasets]
        problems += [
            Problem(f"Two datasets are called {name!r}.", f"Name them: `--dataset one={name}.jsonl two=…`.")
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
        if bool(self.config_paths) == (self.head_url is not None):
            given = "Both" if self.config_paths else "Neither"
            problems.append(
                Problem(
                    f"{given} of `--gym-config-paths` (starts a NeMo Gym) and `--gym-head-url` (names one) is set.",
                    "Set one of them.",
                )
            )
        if self.head_url is not None and (self.processes or 1) > 1:
            problems.append(
                Problem(
                    f"`--gym-processes` is {self.processes} and `--gym-head-url` names a Gym that runs already.",
                    "Leave `--gym-processes` out.",
                )
            )
        if self.head_url is not None:
            problems += url_problems("--gym-head-url", self.head_url)
        return [*problems, *url_problems("--base-url", self.base_url)]

    def _number_problems(self) -> list[Problem]:
        whole = {"--limit": self.limit, "--gym-processes": self.processes}
        given = {name: number for name, number in whole.items() if number is not None}
        return [
            *(problem for name in given for problem in number_problems(name, given[name], least=1, whole=True)),
            *number_problems("--num-generations", self.num_generations, least=1, whole=True),
            *number_problems("--max-completion-length", self.rollouts.max_completion_length, least=1, whole=True),
            *sampling_problems(lambda name: f"--{name.replace('_', '-')}", asdict(self.rollouts.sampling)),
            *self.rollouts.problems(lambda name: f"--{name.replace('_', '-')}"),
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `CollectOptions`, all but `mode`."""
    needed = parser.add_argument_group("what to roll out")
    needed.add_argument(
        "--dataset", nargs="+", action="extend", required=True, metavar="FILE", help="Gym JSONL; NAME=FILE names it"
    )
    needed.add_argument("--output-dir", required=True, metavar="DIR", help="for the journal, logs and the summary")
    needed.add_argument("--num-generations", type=int, default=1, metavar="G", help="rollouts per row (default: 1)")
    needed.add_argument("--limit", type=int, metavar="N", help="rows of each file at most")
    needed.add_argument("--agent", metavar="NAME", help="agent for rows that name none")

    policy = parser.add_argument_group("the policy")
    policy.add_argument(
        "--base-url", required=True, metavar="URL", help="OpenAI endpoint, e.g. http://127.0.0.1:8000/v1"
    )
    policy.add_argument("--model", required=True, metavar="NAME", help="name of the model there")
    policy.add_argument("--api-key", metavar="KEY", help=f"bearer token (default: ${KEY_VARIABLE})")
    policy.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    policy.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    policy.add_argument(
        "--agent-sampling",
        choices=AGENT_SAMPLING,
        default=AGENT_SAMPLING[0],
        help="sampling of an agent's own (penalties, logit_bias, response_format, seed, …) is left out, refuses the "
        "call, or is allowed, as gym_agent_sampling says in training; for a policy served by trl-gym (default: "
        "%(default)s)",
    )
    policy.add_argument(
        "--max-completion-length",
        type=int,
        default=4096,
        metavar="N",
        help="tokens of a conversation of a rollout after its first prompt (default: %(default)s)",
    )

    gym = parser.add_argument_group("NeMo Gym")
    gym.add_argument("--gym-config-paths", nargs="+", action="extend", default=[], metavar="YAML", help="to start one")
    gym.add_argument("--gym-head-url", metavar="URL", help="to use one that runs")
    gym.add_argument(
        "--gym-processes", type=int, metavar="N", help="processes with all of its servers (default: as in training)"
    )
    gym.add_argument("--gym-python", metavar="FILE", help="interpreter with nemo-gym (default: as in training)")
    gym.add_argument("--gym-overrides", type=_json_object, default={}, metavar="JSON", help="any option of NeMo Gym")

    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--deadline", type=float, default=600.0, metavar="S", help="seconds per rollout (default: 600)"
    )
    limits.add_argument("--max-inflight", type=int, default=256, metavar="N", help="rollouts at a time (default: 256)")
    limits.add_argument(
        "--retries",
        type=int,
        default=DEFAULT_RETRIES,
        metavar="N",
        help="further attempts after an infrastructure failure (default: %(default)s)",
    )


def parse(options: argparse.Namespace, mode: str) -> CollectOptions:
    """Make options from parsed flags. Raises `ConfigError`: lists every problem that can be found without starting
    anything."""
    return CollectOptions(
        mode=mode,
        datasets=[named_file(text) for text in options.dataset],
        output_dir=Path(options.output_dir),
        base_url=options.base_url,
        model=options.model,
        api_key=options.api_key or api_key_from_environment(),
        config_paths=options.gym_config_paths,
        head_url=options.gym_head_url,
        processes=options.gym_processes,
        gym_python=options.gym_python,
        overrides=options.gym_overrides,
        agent=options.agent,
        limit=options.limit,
        num_generations=options.num_generations,
        rollouts=RolloutOptions(
            sampling=Sampling(temperature=options.temperature, top_p=options.top_p),
            agent_sampling=options.agent_sampling,
            max_completion_length=options.max_completion_length,
            deadline=options.deadline,
            max_inflight=options.max_inflight,
            retries=by_kind(options.retries),
        ),
    )


def named_file(text: str) -> NamedFile:
    """Read `NAME=FILE` or `FILE`: `"easy=data/a.jsonl"` is called easy, `"data/a.jsonl"` is called a."""
    name, equals, path = text.partition("=")
    if equals and not Path(text).exists():
        return NamedFile(name, Path(find(path)))
    return NamedFile(Path(text).stem, Path(find(text)))


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
