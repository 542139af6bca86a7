"""The token bundle of a chat completion: what was in front of the policy, what it sampled, and how likely that was.

On `choices[i].message`: `prompt_token_ids`, `generation_token_ids` and `generation_log_probs` (one finite number per
sampled id). Never a guess: a bundle that cannot be built exactly is an error.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

_MISSING_LOGPROB = -9999.0  # vLLM writes this where it has none, and where the probability is zero


class BundleError(Exception):
    """The server's answer does not say exactly what was sampled. The text says in which way."""


def attach(answer: dict[str, Any], *, forced_prompt: list[int] | None) -> None:
    """Put the bundle on every choice of a chat completion that was asked for token ids and logprobs.

    Args:
        answer: The server's answer; changed in place.
        forced_prompt: Ids that must have been the prompt, or `None` if the server rendered it.

    Raises:
        BundleError: If the server used another prompt, if ids or logprobs are missing or disagree in number, or if a
            logprob is not a finite number.
    """
    prompt = answer.get("prompt_token_ids")
    if not prompt:
        raise BundleError("the server did not return the prompt's token ids")
    if forced_prompt is not None and prompt != forced_prompt:
        raise BundleError(
            f"the server did not use the exact prompt that it was given ({len(forced_prompt)} tokens, used "
            f"{len(prompt)}, first difference at {_first_difference(prompt, forced_prompt)}): this version of vLLM "
            "does not accept prompts of token ids in chat completions"
        )
    for choice in answer["choices"]:
        ids = choice.get("token_ids")
        if ids is None:
            raise BundleError("the server did not return the sampled token ids")
        choice["message"] |= {
            "prompt_token_ids": prompt,
            "generation_token_ids": ids,
            "generation_log_probs": _logprobs(choice, len(ids)),
        }


def strip_unasked(answer: dict[str, Any], asked: Collection[str]) -> None:
    """Take out again what we asked for and the client did not.

    Args:
        answer: The server's answer; changed in place.
        asked: Which of `"logprobs"` and `"return_token_ids"` the client asked for.
    """
    if "return_token_ids" not in asked and "prompt_token_ids" in answer:
        answer["prompt_token_ids"] = None
    for choice in answer["choices"]:
        if "logprobs" not in asked and "logprobs" in choice:
            choice["logprobs"] = None
        if "return_token_ids" not in asked and "token_ids" in choice:
            choice["token_ids"] = None


def _logprobs(choice: dict[str, Any], num_ids: int) -> list[float]:
    content = (choice.get("logprobs") or {}).get("content") or []
    if len(content) != num_ids:
        raise BundleError(f"the server returned {len(content)} logprobs for {num_ids} sampled tokens")
    logprobs = [entry.get("logprob") for entry in content]
    for place, logprob in enumerate(logprobs):
        if not isinstance(logprob, int | float) or not math.isfinite(logprob) or logprob <= _MISSING_LOGPROB:
            raise BundleError(f"the logprob of sampled token {place} is {logprob!r}, which is no finite number")
    return logprobs


def _first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
