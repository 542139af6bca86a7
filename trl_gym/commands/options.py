"""What `trl-gym rollout` and `trl-gym eval` have in common: their options, as arguments and as data."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import requests

from trl_gym.errors import ConfigError, PolicyServerError
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError

KEY_VARIABLE = "TRL_GYM_API_KEY"


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A Gym JSONL file; `name` is its stem unless another was given (`NAME=FILE`)."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectOptions:
    """What to roll out, on what, and where to write.

    Attributes:
        mode: `"rollout"` or `"eval"`; `mode` of the journal's lines.
        datasets: Files, with unique names.
        output_dir: Gets `rollouts/`, `logs/` and the summary.
        base_url: OpenAI base URL of the policy.
        model: Its name there.
        api_key: Its bearer token.
        config_paths: NeMo Gym configs to start, unless `head_url` names a running Gym.
        head_url: Head server of a running Gym.
        gym_python: Interpreter that has `nemo-gym`.
        overrides: Options of NeMo Gym.
        agent: For rows that name none.
        limit: At most so many rows of each file.
        num_generations: Rollouts per row.
        deadline_s: Seconds that a rollout may take.
        max_inflight: Rollouts at the same time.
        retries: How often a rollout is run again after an infrastructure failure.
        temperature: Of every model call.
        top_p: Of every model call.
        max_tokens: Tokens that a rollout may have after its first prompt.
    """

    mode: str
    datasets: Sequence[NamedFile]
    output_dir: Path
    base_url: str
    model: str
    api_key: str | None = None
    config_paths: Sequence[str] = ()
    head_url: str | None = None
    gym_python: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    agent: str | None = None
    limit: int | None = None
    num_generations: int = 1
    deadline_s: float = 600.0
    max_inflight: int = 256
    retries: int = 2
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        problems = [*self._source_problems(), *self._number_problems()]
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise ConfigError(f"{len(problems)} problem(s) in the options:\n{listed}")

    @property
    def journal_dir(self) -> Path:
        return self.output_dir / "rollouts"

    def _source_problems(self) -> list[str]:
        problems = [f"--dataset {file.path}: no such file." for file in self.datasets if not file.path.is_file()]
        names = [file.name for file in self.datasets]
        problems += [
            f"two datasets are called {name!r}; name them, `--dataset one={name}.jsonl two=…`."
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
        if bool(self.config_paths) == (self.head_url is not None):
            problems.append(
                "give either --gym_config_paths (to start a NeMo Gym) or --gym_head_url (of a running one)."
            )
        if not self.base_url.startswith(("http://", "https://")):
            problems.append(f"--base_url is {self.base_url!r}; it looks like http://127.0.0.1:8000/v1.")
        return problems

    def _number_problems(self) -> list[str]:
        at_least_one = ("num_generations", "max_inflight", "max_tokens", "limit")
        problems = [
            f"--{name} is {value}; it must be at least 1."
            for name in at_least_one
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if not self.deadline_s > 0:
            problems.append(f"--deadline is {self.deadline_s}; it must be above 0 (seconds).")
        if self.retries < 0:
            problems.append(f"--retries is {self.retries}; it must be at least 0.")
        if self.temperature < 0:
            problems.append(f"--temperature is {self.temperature}; it must be at least 0.")
        if not 0 < self.top_p <= 1:
            problems.append(f"--top_p is {self.top_p}; it must be above 0 and at most 1.")
        return problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `CollectOptions`, all but `mode`."""
    needed = parser.add_argument_group("what to roll out")
    needed.add_argument(
        "--dataset", nargs="+", action="extend", required=True, metavar="FILE", help="Gym JSONL; NAME=FILE names it"
    )
    needed.add_argument("--output_dir", required=True, metavar="DIR", help="for the journal, logs and the summary")
    needed.add_argument("--num_generations", type=int, default=1, metavar="G", help="rollouts per row (default: 1)")
    needed.add_argument("--limit", type=int, metavar="N", help="at most so many rows of each file")
    needed.add_argument("--agent", metavar="NAME", help="agent for rows that name none")

    policy = parser.add_argument_group("the policy")
    policy.add_argument(
        "--base_url", required=True, metavar="URL", help="OpenAI endpoint, e.g. http://127.0.0.1:8000/v1"
    )
    policy.add_argument("--model", required=True, metavar="NAME", help="name of the model there")
    policy.add_argument(
        "--api_key",
        default=os.environ.get(KEY_VARIABLE),
        metavar="KEY",
        help=f"bearer token (default: ${KEY_VARIABLE})",
    )
    policy.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    policy.add_argument("--top_p", type=float, default=1.0, help="default: %(default)s")
    policy.add_argument(
        "--max_tokens",
        type=int,
        default=4096,
        metavar="N",
        help="tokens after the first prompt (default: %(default)s)",
    )

    gym = parser.add_argument_group("NeMo Gym")
    gym.add_argument("--gym_config_paths", nargs="+", action="extend", default=[], metavar="YAML", help="to start one")
    gym.add_argument("--gym_head_url", metavar="URL", help="to use one that runs")
    gym.add_argument("--gym_python", metavar="FILE", help="interpreter with nemo-gym (default: as in training)")
    gym.add_argument("--overrides", type=_json_object, default={}, metavar="JSON", help="any option of NeMo Gym")

    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--deadline", type=float, default=600.0, metavar="S", help="seconds per rollout (default: 600)"
    )
    limits.add_argument("--max_inflight", type=int, default=256, metavar="N", help="rollouts at a time (default: 256)")
    limits.add_argument(
        "--retries", type=int, default=2, metavar="N", help="after an infrastructure failure (default: %(default)s)"
    )


def parse(options: argparse.Namespace, mode: str) -> CollectOptions:
    """From parsed arguments.

    Raises:
        ConfigError: With every problem that can be found without starting anything.
    """
    return CollectOptions(
        mode=mode,
        datasets=[named_file(text) for text in options.dataset],
        output_dir=Path(options.output_dir),
        base_url=options.base_url,
        model=options.model,
        api_key=options.api_key,
        config_paths=options.gym_config_paths,
        head_url=options.gym_head_url,
        gym_python=options.gym_python,
        overrides=options.overrides,
        agent=options.agent,
        limit=options.limit,
        num_generations=options.num_generations,
        deadline_s=options.deadline,
        max_inflight=options.max_inflight,
        retries=options.retries,
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_tokens,
    )


def named_file(text: str) -> NamedFile:
    """`"easy=data/a.jsonl"` is called easy, `"data/a.jsonl"` is called a."""
    name, equals, path = text.partition("=")
    if equals and not Path(text).exists():
        return NamedFile(name, Path(path))
    return NamedFile(Path(text).stem, Path(text))


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


# --------------------------------------------------------------------------------------------------------------------
# What an OpenAI endpoint can do for a rollout. Three kinds:
#
# ours    `trl-gym serve`, `trl-gym gateway`    exact prompts, the tokens of every answer, records, cancellation
# vllm    stock vLLM                            tokens, though NeMo Gym has to tokenize the prompts once more
# plain   anything else                         text only

_TIMEOUT_S = 30.0


class EndpointKind(StrEnum):
    OURS = "ours"
    VLLM = "vllm"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint that has answered.

    Attributes:
        kind: See the module.
        weight_version: Of the policy; empty when it does not say.
    """

    kind: EndpointKind
    weight_version: str = ""

    @property
    def note(self) -> str | None:
        """What a user should know about the tokens that will be recorded."""
        if self.kind is EndpointKind.OURS:
            return None
        remedy = "`trl-gym gateway --upstream URL` in front of a vLLM server gives exact ones."
        if self.kind is EndpointKind.VLLM:
            return f"token ids are recorded, with prompts that NeMo Gym tokenizes itself: rollouts may drift. {remedy}"
        return f"the endpoint gives no token ids; rollouts are recorded without. {remedy}"


def look_at(base_url: str, model: str, api_key: str | None) -> Endpoint:
    """Find out what answers.

    Args:
        base_url: OpenAI base URL, with or without `/v1`.
        model: Name of the model.
        api_key: Bearer token.

    Raises:
        PolicyServerError: Nothing answers.
        ConfigError: It wants another key, or does not serve the model.
    """
    client = PolicyClient(base_url, api_key=api_key, timeout_s=_TIMEOUT_S)
    try:
        _check_model(client, model)
        try:
            client.rollout_records([], forget=False)
        except PolicyResponseError:
            return Endpoint(EndpointKind.VLLM if _tokenizes(client, model) else EndpointKind.PLAIN)
        return Endpoint(EndpointKind.OURS, str(client.info().get("weight_version") or ""))
    finally:
        client.close()


def _check_model(client: PolicyClient, model: str) -> None:
    try:
        served = [entry["id"] for entry in client.models()]
    except PolicyResponseError as error:
        if error.status in (401, 403):
            raise ConfigError(f"{client.base_url} wants another key ({error}); set --api_key.") from error
        if error.status == 404:  # an endpoint need not list its models
            return
        raise
    if model not in served:
        raise ConfigError(
            f"--model is {model!r} and {client.base_url} serves {', '.join(map(repr, served)) or 'nothing'}."
        )


def _tokenizes(client: PolicyClient, model: str) -> bool:
    """Whether it has vLLM's `/tokenize`."""
    headers = {"Authorization": f"Bearer {client.api_key}"} if client.api_key else {}
    try:
        body = {"model": model, "prompt": "a"}
        answer = requests.post(f"{client.root_url}/tokenize", json=body, headers=headers, timeout=_TIMEOUT_S)
        return answer.status_code == 200 and "tokens" in answer.json()
    except ValueError:  # 200 and no JSON: something else
        return False
    except requests.RequestException as error:
        raise PolicyServerError(f"{client.root_url} does not answer any more: {error}") from error
