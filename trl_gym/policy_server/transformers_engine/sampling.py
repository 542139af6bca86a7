"""Read from a request how it wants to be sampled, in vLLM's fields, and refuse what the engine does not have.

A field that is ignored would change the distribution that is trained on without a word. So each one that vLLM knows
and this engine does not must have the value that leaves sampling as it is; fields that nobody knows are ignored, as
vLLM ignores them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trl_gym.policy_server.middleware.sampling import SKEWING
from trl_gym.policy_server.transformers_engine.engine import SamplingRequest

_ENGINE = "the transformers engine"
# Fields that would change what is sampled, with the values at which they do not (beside null).
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **SKEWING,
    "n": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "stop": ([], ""),
    "seed": (),
    "truncate_prompt_tokens": (),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
}
MAX_TOKEN_ID = 2**31 - 1


class RefusedError(ValueError):
    """A request asks for what the engine does not do; the text is for its sender."""


def overflow(max_model_len: int, num_prompt_tokens: int, max_tokens: int) -> str:
    """Return what vLLM says of a prompt and an answer that do not fit."""
    return (
        f"This model's maximum context length is {max_model_len} tokens. However, you requested {max_tokens} output "
        f"tokens and your prompt contains {num_prompt_tokens} input tokens, for a total of "
        f"{num_prompt_tokens + max_tokens} tokens. Please reduce the length of the input prompt or the number of "
        "requested output tokens."
    )


def read_sampling(body: Mapping[str, Any], num_prompt_tokens: int, max_model_len: int) -> SamplingRequest:
    """Return how a request is sampled.

    Args:
        max_model_len: Of prompt and completion together.

    Raises:
        RefusedError: It asks for something that the engine does not have, a value has another form, or prompt and
            completion do not fit.
    """
    for name, neutral in _NEUTRAL.items():
        value = body.get(name)
        if value is not None and value not in neutral:
            also = "".join(f", {one!r}" for one in neutral)
            raise RefusedError(f"{name}={str(value)[:100]!r} is not supported by {_ENGINE}: only null{also}")
    room = max_model_len - num_prompt_tokens
    asked = body.get("max_completion_tokens")
    asked = body.get("max_tokens") if asked is None else asked
    limit = max(room, 1) if asked is None else _integer("max_tokens", asked, 1)
    if limit > room:
        raise RefusedError(overflow(max_model_len, num_prompt_tokens, limit))
    top_k = _integer("top_k", _given(body, "top_k", 0), -1)
    return SamplingRequest(
        max_tokens=limit,
        temperature=_number("temperature", _given(body, "temperature", 1.0), 0.0, math.inf),
        top_p=_number("top_p", _given(body, "top_p", 1.0), 0.0, 1.0, open_below=True),
        top_k=max(top_k, 0),
        stop_token_ids=tuple(token_ids("stop_token_ids", _given(body, "stop_token_ids", []))),
        ignore_eos=_flag("ignore_eos", _given(body, "ignore_eos", False)),
    )


def token_ids(name: str, value: Any) -> list[int]:
    """Return a list of token ids. Raises `RefusedError` for anything else."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RefusedError(f"{name} must be a list of token ids")
    if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one <= MAX_TOKEN_ID for one in value):
        raise RefusedError(f"{name} must be a list of token ids, integers of at least 0")
    return list(value)


def _given(body: Mapping[str, Any], name: str, default: Any) -> Any:
    value = body.get(name)
    return default if value is None else value


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RefusedError(f"{name} must be an integer of at least {least}, not {str(value)[:100]!r}")
    return value


def _number(name: str, value: Any, least: float, most: float, *, open_below: bool = False) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not least <= value <= most or (open_below and value == least):
        border = f"in ({least:g}, {most:g}]" if open_below else f"of at least {least:g}"
        raise RefusedError(f"{name} must be a number {border}, not {str(value)[:100]!r}")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RefusedError(f"{name} must be true or false, not {str(value)[:100]!r}")
    return value
