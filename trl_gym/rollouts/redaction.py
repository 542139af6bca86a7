"""Secrets are taken out of what is written to the journal. Pure functions.

Three nets, coarse to fine:

    a value whose key says that it is a secret       {"policy_api_key": …}, {"Authorization": …}
    a value that this process got as a secret        environment variables named like keys, the policy server's key
    a text that looks like a secret                  `Bearer …`, `sk-…`, `hf_…`, `api_key="…"`, `https://user:…@host`

Token ids are left alone: they are what is trained on, and tell whoever has the tokenizer what the text said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

REDACTED = "[redacted]"
_MIN_SECRET_CHARS = 8

# Long lists of numbers, and most of a journal line: not walked.
_NUMBERS = frozenset(
    (
        "prompt_ids",
        "completion_ids",
        "env_mask",
        "logprobs",
        "prompt_token_ids",
        "generation_token_ids",
        "generation_log_probs",
    )
)
_SECRET_KEYS = (
    "api_key",
    "apikey",
    "access_token",
    "auth_token",
    "bearer_token",
    "refresh_token",
    "authorization",
    "client_secret",
    "secret_key",
    "secret_access_key",
    "private_key",
    "password",
)
_PAIRS = (
    ("api", "key"),
    ("access", "token"),
    ("auth", "token"),
    ("bearer", "token"),
    ("refresh", "token"),
    ("client", "secret"),
    ("secret", "key"),
    ("access", "key"),
    ("private", "key"),
)
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)

_PREFIXED = re.compile(
    r"\b(?:sk-|sk_live_|sk_test_|pk-|hf_|nvapi-|gsk_|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abprs]-|AKIA|AIza|eyJ)[A-Za-z0-9_.\-]{12,}"
)
_BEARER = re.compile(r"\b(bearer\s+)[A-Za-z0-9_.~+/=\-]{8,}", re.IGNORECASE)
_NAMED = re.compile(
    r"((?:api[_-]?key|access[_-]?token|auth[_-]?token|client[_-]?secret|secret[_-]?key|password)"
    r"\\*[\"']?\s*[:=]\s*\\*[\"']?)[^\s\"'\\,;&(){}\[\]]{8,}",
    re.IGNORECASE,
)
_IN_URL = re.compile(r"(://[^\s/:@]{1,256}:)[^\s/@]{1,256}(?=@)")
# Lower-cased text that holds none of these holds nothing for a key or a pattern above to match.
_MARKS = (
    *(
        "sk-",
        "sk_live_",
        "sk_test_",
        "pk-",
        "hf_",
        "nvapi-",
        "gsk_",
        "ghp_",
        "gho_",
        "ghs_",
        "github_pat_",
        "glpat-",
        "xox",
        "akia",
    ),
    *("aiza", "eyj", "bearer", "://", "password", "authorization"),
    *(f"{first}{between}{last}" for first, last in _PAIRS for between in ("_", "-", "")),
)


def make_redactor(secrets: Iterable[str] = ()) -> Callable[[Any], Any]:
    """What takes secrets out of a JSON value.

    Args:
        secrets: Values to take out wherever they stand; short ones (below 8 characters) are ignored, since they
            would take ordinary words along.

    Returns:
        A function from a JSON value to one without secrets: the value itself where nothing could be one, else a copy.
        Applying it twice changes nothing more.
    """
    known = sorted({secret for secret in secrets if len(secret) >= _MIN_SECRET_CHARS}, key=len, reverse=True)

    def redact(value: Any) -> Any:
        # Almost always there is nothing to find: one look at all the text is cheaper than a look at every string.
        text = "\n".join(_texts(value, []))
        lowered = text.lower()
        if any(secret in text for secret in known) or any(mark in lowered for mark in _MARKS):
            return _redact(value, known)
        return value

    return redact


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Values of environment variables that are named like keys (`OPENAI_API_KEY`, `HF_TOKEN`, …) and could be one."""
    return [
        value
        for name, value in environment.items()
        if _SECRET_VARIABLE.search(name) and len(value) >= _MIN_SECRET_CHARS and not any(c.isspace() for c in value)
    ]


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        return _redact_text(value, known)
    if isinstance(value, dict):
        return {key: _redact_item(key, item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_redact(item, known) for item in value]
    return value


def _redact_item(key: Any, item: Any, known: list[str]) -> Any:
    if _is_numbers(key, item):
        return item
    if isinstance(item, str) and item and _is_secret_key(key):
        return REDACTED
    return _redact(item, known)


def _texts(value: Any, found: list[str]) -> list[str]:
    """Every string in a JSON value, keys included, added to `found`."""
    if isinstance(value, str):
        found.append(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not _is_numbers(key, item):
                found.append(str(key))
                _texts(item, found)
    elif isinstance(value, list):
        for item in value:
            _texts(item, found)
    return found


def _is_numbers(key: Any, item: Any) -> bool:
    return key in _NUMBERS and isinstance(item, list) and not (item and isinstance(item[0], str))


def _is_secret_key(key: Any) -> bool:
    return isinstance(key, str) and key.lower().replace("-", "_").endswith(_SECRET_KEYS)


def _redact_text(text: str, known: list[str]) -> str:
    if len(text) < _MIN_SECRET_CHARS:
        return text
    for secret in known:
        if secret in text:
            text = text.replace(secret, REDACTED)
    text = _PREFIXED.sub(REDACTED, text)
    text = _BEARER.sub(rf"\g<1>{REDACTED}", text)
    text = _NAMED.sub(rf"\g<1>{REDACTED}", text)
    if "://" in text:
        text = _IN_URL.sub(rf"\g<1>{REDACTED}", text)
    return text
