"""What a policy server knows about the model calls of a rollout: one record per call, and who has been cancelled.

Kept by the middleware in memory, read through `POST /trl_gym/rollouts/records`. Gym hands the messages of an answer on
and drops everything else, so this is how versions, cache hits and seconds reach the trainer.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, NotRequired, TypedDict


class DriftCause(StrEnum):
    """Why a prompt does not start with the tokens already seen."""

    RETOKENIZED = "retokenized"
    """The same text in other tokens: nobody put the sampled ids back."""

    RETEMPLATED = "retemplated"
    """The chat template writes a sampled turn differently from how it was sampled (tool call markup, thinking)."""

    HISTORY_REWRITTEN = "history_rewritten"
    """The agent sent other earlier messages, or other tools, than it had sent before."""

    MESSAGE_WITHOUT_IDS = "message_without_ids"
    """The agent sent no token ids with a turn that was sampled."""

    NO_BOUNDARY = "no_boundary"
    """The template does not show where the sampled turn ends; see the text."""


class CallDrift(TypedDict):
    """Why a call was not answered on the exact prompt."""

    cause: DriftCause
    text: str


class CallRecord(TypedDict):
    """One model call of a rollout, as JSON.

    Seconds are null where the server does not measure them (`--enable-per-request-metrics`), tokens from the prefix
    cache where it does not report them (`--enable-prompt-tokens-details`).
    """

    status: int  # HTTP status of the answer
    prompt: Literal["rendered", "exact"]  # by the chat template, or the tokens seen plus what is new
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    finish_reason: str | None
    weight_version: str | None
    seconds: float  # in the middleware, all included
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None
    drift: CallDrift | None
    error: NotRequired[str]
