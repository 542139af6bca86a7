"""Every error that trl-gym raises on purpose, named by the boundary that was crossed.

    TrlGymError
    ├── ConfigError                 an option, a file or a dataset is wrong; nothing was started
    │   ├── UnsupportedVersionError     an installed package is outside the supported range
    │   └── DatasetError                a row or a file of a Gym dataset cannot be used
    ├── ServerError                 a server could not be started, died, or does not answer
    │   ├── PolicyServerError           the vLLM server that serves the policy
    │   └── GymServerError              one of NeMo Gym's servers
    ├── WeightSyncError             weights did not reach the policy server
    │   └── WeightMismatchError         they arrived, and the server computes something else with them
    └── RolloutError                a batch of rollouts cannot be trained on

A single rollout that fails is not an exception for its siblings: it is a `RolloutFailure`, recorded in the journal,
and leaves both the loss and the group baseline. `RolloutError` is for what concerns a whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TrlGymError(Exception):
    """Base of all errors raised by trl-gym. Catch it to tell our errors from upstream's."""


class ConfigError(TrlGymError, ValueError):
    """An option or a file is wrong. The message lists every problem found, not only the first one."""


class UnsupportedVersionError(ConfigError):
    """An installed package lies outside the range that trl-gym supports."""


class DatasetError(ConfigError):
    """A Gym dataset cannot be used; the message names the file and the line."""


class ServerError(TrlGymError, RuntimeError):
    """A server process or URL is unusable. The message carries exit code, last log lines and log path where known."""


class PolicyServerError(ServerError):
    """The server that serves the policy could not be started, died or refused a control request."""


class GymServerError(ServerError):
    """A NeMo Gym server could not be started, died, or is not the one that was asked for."""


class WeightSyncError(TrlGymError, RuntimeError):
    """Weights did not reach the policy server. The server is not resumed with half-updated weights."""


class WeightMismatchError(WeightSyncError):
    """The server holds the version that was sent and still computes other log-probabilities than the trainer."""


class RolloutError(TrlGymError, RuntimeError):
    """A batch of rollouts cannot be trained on (for example: not a single rollout succeeded)."""


class FailureKind(StrEnum):
    """Why a rollout has no reward. The values are written to the journal."""

    INFRASTRUCTURE = "infrastructure"  # connection refused or dropped, 5xx without a cause, server died
    DEADLINE = "deadline"  # took longer than its deadline
    ENVIRONMENT = "environment"  # tool, verifier or agent raised; answer without a usable reward; `mask_sample`
    POLICY = "policy"  # no trainable token: overflow on the first turn, or drift excluded
    CANCELLED = "cancelled"  # the batch was given up while the rollout was running


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFailure:
    """The recorded cause of one failed rollout.

    Attributes:
        kind: Which boundary failed.
        text: One readable sentence, with the server's own words where there are any.
        where: URL, agent or stage in which it happened, e.g. `"calculator_simple_agent /run"`.
    """

    kind: FailureKind
    text: str
    where: str

    def as_json(self) -> dict[str, str]:
        return {"kind": str(self.kind), "text": self.text, "where": self.where}
