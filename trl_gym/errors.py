"""Every error that trl-gym raises on purpose, named by the boundary that was crossed, and without secrets.

A single rollout that fails is not an exception for its siblings: it is a `RolloutFailure`, recorded in the journal,
and leaves both the loss and the group baseline. `RolloutError` is for what concerns a whole batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from trl_gym.redaction import without_secrets
from trl_gym.untrusted import parse_json


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and what to do about it.

    Attributes:
        text: What is wrong, with the option and its value: a sentence, or several.
        remedy: What to do: a sentence that begins with a verb. Empty when nothing is known to help.
    """

    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", without_secrets(self.text))
        object.__setattr__(self, "remedy", without_secrets(self.remedy))

    def __str__(self) -> str:
        return f"{self.text} {self.remedy}".strip()


_NUM_SHOWN = 5  # causes, in an error


def as_problems(causes: Counter[str]) -> list[Problem]:
    """Return the most frequent causes for an error: `12 × environment (my_agent /run): …`."""
    return [Problem(f"{count} × {cause}") for cause, count in causes.most_common(_NUM_SHOWN)]


class TrlGymError(Exception):
    """Base of all errors raised by trl-gym. Catch it to tell our errors from upstream's.

    `str(error)` is the problem, then the remedy, then one line per entry of `problems`.

    Args:
        problem: What is wrong, with the option and its value, the file or the URL.
        remedy: What to do about it; empty when nothing is known to help, or when each of `problems` has its own.
        problems: The parts of an error that found several things wrong.

    Attributes:
        problem: As given.
        remedy: As given.
        problems: As given.
    """

    def __init__(self, problem: str, remedy: str = "", problems: Sequence[Problem] = ()) -> None:
        said = Problem(problem, remedy)
        super().__init__(said.text, said.remedy, tuple(problems))  # all of them: an error is pickled by its `args`
        self.problem = said.text
        self.remedy = said.remedy
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n  - ".join([str(Problem(self.problem, self.remedy)), *map(str, self.problems)])


class ConfigError(TrlGymError, ValueError):
    """An option or a file is wrong, and nothing was started. Lists every problem found, not only the first one."""


class UnsupportedVersionError(ConfigError):
    """An installed package lies outside the range that trl-gym supports."""


class DatasetError(ConfigError):
    """A Gym dataset cannot be used; the message names the file and the line."""


class ServerError(TrlGymError, RuntimeError):
    """A server process or URL is unusable. The message carries exit code, last log lines and log path where known."""


class PolicyServerError(ServerError):
    """The server that serves the policy could not be started, died or refused a control request."""


class PolicyServerLostError(PolicyServerError):
    """The policy server has died, cannot be reached or does not answer. Whoever supervises it may get it back.

    Attributes:
        silent_s: Seconds for which its engine, which was asked, had not answered. Set by whoever has waited.
    """

    silent_s: float = 0.0


class GymServerError(ServerError):
    """A NeMo Gym server could not be started, died, or is not the one that was asked for."""


class GymServerLostError(GymServerError):
    """NeMo Gym, or a server of it, has died or hangs. Whoever started it may start it again."""


ServerLoss = PolicyServerLostError | GymServerLostError
"""Ends what runs on the server; it can go on when the server is back."""


class WeightSyncError(TrlGymError, RuntimeError):
    """Weights did not reach the policy server. The server is not resumed with half-updated weights.

    Attributes:
        silent_s: As for `PolicyServerLostError`.
    """

    silent_s: float = 0.0


class WeightMismatchError(WeightSyncError):
    """The server holds the version that was sent and still computes other log-probabilities than the trainer."""


class StorageError(TrlGymError, RuntimeError):
    """A file could not be written: a full disk, a folder that is read-only, a limit of this process."""


class RolloutError(TrlGymError, RuntimeError):
    """A batch of rollouts cannot be trained on (for example: not a single rollout succeeded)."""


@contextlib.contextmanager
def naming(method: str, of: str, *, unless: type[Exception] = TrlGymError) -> Iterator[None]:
    """Say where an exception came from: a method that a user has written may raise anything.

    Args:
        method: Its name.
        of: What it was called for.
        unless: Exceptions that mean something and are left alone, beside `TrlGymError`.

    Raises:
        RolloutError: Another exception was raised inside, which is its cause.
    """
    try:
        yield
    except (TrlGymError, unless):
        raise
    except Exception as error:
        raise RolloutError(
            f"`{method}` raised {type(error).__name__} for {of}: {error}.",
            "Fix it: the traceback above shows the line. What was rolled out is in the journal.",
        ) from error


class RankLostError(TrlGymError, RuntimeError):
    """Another training process has ended, or does not answer: a collective operation with it broke."""


def error_body_text(body: bytes) -> str:
    """Return the text of an HTTP error body: a JSON string, `error.message` (OpenAI), `detail` (FastAPI), or all."""
    text = body.decode(errors="replace").strip()
    try:
        value = parse_json(text)
    except ValueError:
        return text
    for key in ("error", "detail", "message"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class FailureKind(StrEnum):
    """Why a rollout has no reward. The values are written to the journal and are keys of `gym_retries`."""

    INFRASTRUCTURE = "infrastructure"
    """Connection refused or dropped, 5xx without a cause, a server died: says nothing about policy or task."""

    DEADLINE = "deadline"
    """It took longer than its deadline."""

    ENVIRONMENT = "environment"
    """Tool, verifier or agent raised; an answer without a usable reward; `mask_sample`, `failure_kind` of Gym 0.7."""

    POLICY = "policy"
    """Nothing to train on: no sampled token (the first prompt overflows the context), or excluded for drift."""

    CANCELLED = "cancelled"
    """It was ended early, alone or with its collection. Never retried, never in a batch that is trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFailure:
    """The recorded cause of one failed rollout.

    Attributes:
        kind: Which boundary failed.
        text: One readable sentence, with the server's own words where there are any; without secrets, such as the URL
            or the key of a harness.
        where: URL, agent or stage in which it happened, e.g. `"calculator_simple_agent /run"`.
        agent: Name of the Gym agent that ran it.
        task_index: Index of the dataset row; None before `of`.
        rollout_id: Id of the attempt that failed.
        attempt: 0 for the first try.
        seconds: From dispatch to failure; 0.0 when it was never dispatched.
    """

    kind: FailureKind
    text: str
    where: str
    agent: str = ""
    task_index: int | None = None
    rollout_id: str = ""
    attempt: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", without_secrets(self.text))

    def of(self, *, agent: str, task_index: int, rollout_id: str, attempt: int, seconds: float) -> RolloutFailure:
        """The same cause, with the rollout that it belongs to."""
        return dataclasses.replace(
            self, agent=agent, task_index=task_index, rollout_id=rollout_id, attempt=attempt, seconds=seconds
        )

    def as_json(self) -> dict[str, str | int | float | None]:
        return dataclasses.asdict(self) | {"kind": str(self.kind), "seconds": round(self.seconds, 4)}
