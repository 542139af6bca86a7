"""Keep secrets out of what is written to files, and find numbers that JSON does not have. Pure functions.

Redacted are values under keys that say so (`api_key`, `Authorization`, …), the exact values that this process knows as
secrets, and keys of rollouts. No other text is altered: it is what reward functions get of a recalled or replayed
rollout.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_gym.policy_server.middleware.identity import KEY_PATTERN

REDACTED = "[redacted]"
_MIN_SECRET_CHARS = 8

_SECRET_KEYS = (
    *("api_key", "apikey", "access_token", "auth_token", "bearer_token", "refresh_token", "hf_token"),
    *("authorization", "client_secret", "secret_key", "secret_access_key", "private_key", "password"),
)
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)


class Redactor:
    """Takes secrets out of JSON values.

    A value is redacted whole where its key says that it is a secret (`{"policy_api_key": …}`). Everywhere else, keys
    included, only what is in `secrets` is, wherever it stands in a text, and every rollout key.

    Args:
        secrets: Secret values; short ones (below 8 characters) are ignored, since they would take ordinary words
            along.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._known = sorted({secret for secret in secrets if len(secret) >= _MIN_SECRET_CHARS}, key=len, reverse=True)

    def __call__(self, value: Any) -> Any:
        """Return a value without secrets; see `look`."""
        return self.look(value)[0]

    def look(self, value: Any) -> tuple[Any, bool]:
        """Take secrets out of a JSON value.

        Returns:
            The value itself where there are none, else a copy; what was redacted once is not changed again. And
            whether JSON has all of its numbers: no NaN, no infinity.
        """
        # Almost always there is nothing to find: one look at all the text is cheaper than a look at every string.
        found = _Found()
        found.walk(value)
        text = "\n".join(found.texts)
        if found.has_secret_key or any(secret in text for secret in self._known) or KEY_PATTERN.search(text):
            return _redact(value, self._known), found.is_finite
        return value, found.is_finite


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Return values of environment variables that are named like keys (`OPENAI_API_KEY`, …) and could be one."""
    return [
        value
        for name, value in environment.items()
        if _SECRET_VARIABLE.search(name) and len(value) >= _MIN_SECRET_CHARS and not any(c.isspace() for c in value)
    ]


def secrets_in(options: Any) -> list[str]:
    """Return the values under secret-named keys of nested options, e.g. of NeMo Gym's configuration."""
    if isinstance(options, Mapping):
        own = [item for key, item in options.items() if isinstance(item, str) and _is_secret_key(key)]
        return [*own, *(secret for item in options.values() for secret in secrets_in(item))]
    if isinstance(options, list | tuple):
        return [secret for item in options for secret in secrets_in(item)]
    return []


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        return _redact_text(value, known)
    if isinstance(value, dict):
        return {
            _redact_text(key, known) if isinstance(key, str) else key: _redact_item(key, item, known)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_redact(item, known) for item in value]
    return value


def _redact_item(key: Any, item: Any, known: list[str]) -> Any:
    if isinstance(item, str) and item and _is_secret_key(key):
        return REDACTED
    return _redact(item, known)


def _redact_text(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, REDACTED)
    return KEY_PATTERN.sub(REDACTED, text)


@dataclass(slots=True)
class _Found:
    """What a look at a JSON value finds."""

    texts: list[str] = field(default_factory=list)  # every string, keys included
    has_secret_key: bool = False  # a key is named like a secret
    is_finite: bool = True

    def walk(self, value: Any) -> None:
        children: Iterable[Any] = (value,)
        if isinstance(value, dict):
            children = value.values()
            for key in value:
                self.texts.append(str(key))
                self.has_secret_key |= _is_secret_key(key)
        elif isinstance(value, list):
            children = value
        for child in children:  # a call for each of them would take most of the time
            if isinstance(child, str):
                self.texts.append(child)
            elif isinstance(child, dict | list):
                self.walk(child)
            elif isinstance(child, float) and not math.isfinite(child):
                self.is_finite = False


@functools.lru_cache(maxsize=4096)
def _is_secret_key(key: Any) -> bool:
    return isinstance(key, str) and key.lower().replace("-", "_").endswith(_SECRET_KEYS)
