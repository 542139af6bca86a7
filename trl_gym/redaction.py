"""Keep secrets out of everything that is written: messages, logs, reports, journals. The one place that decides.

Two kinds of text are told apart. What *we* say (errors, failures, log lines, the doctor's findings) loses all that is
a secret or looks like one: `without_secrets`. What the policy, an agent or an environment *said* is what reward
functions get of a recalled or replayed rollout, and loses only what is certainly one: `Redactor`, for JSON values,
takes out values under keys that say so (`api_key`, `Authorization`, …), the exact values that this process knows as
secrets, and keys of rollouts. A value that calls itself none (`dummy_key`, `<your-api-key>`) is none: it would take
ordinary words along.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, urlsplit

REDACTED = "[redacted]"
# A rollout key; `policy_server/middleware/identity.py` makes them.
KEY_PATTERN = re.compile(r"trlgym_[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{43}")
_MIN_SECRET_CHARS = 8

_SECRET_KEYS = (  # ends of names, without what separates their words
    *("apikey", "accesskey", "secretkey", "privatekey", "secretaccesskey", "authorization", "clientsecret"),
    *("password", "passwd", "passphrase", "credential", "credentials", "connectionstring", "setcookie"),
    *(f"{kind}token" for kind in ("access", "api", "auth", "bearer", "github", "hf", "refresh", "session")),
)
_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:API_?KEYS?|KEYS?|ACCESS_KEY_ID|PAT|AUTH)$|_(?:PASS|PWD)$"
    r"|(?:TOKEN|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|CONNECTION_STRING)$",
    re.IGNORECASE,
)
# A value that says itself that it is none: one of the first words, and others of these alone.
_SAYS_NONE = (
    r"any|anything|changeme|dummy|empty|example|fake|no|none|not|nothing|null|placeholder|required|test|unused|your"
    r"|x{2,64}"
)
_PLACEHOLDER = re.compile(
    rf"(?=.*(?<![A-Za-z])(?:{_SAYS_NONE})(?![A-Za-z]))(?:[-_.<>]*(?:{_SAYS_NONE}|a|an|api|change|here|hf|insert|judge|key"
    r"|local|me|my|needed|nvidia|openai|password|policy|replace|secret|sk|the|this|token|used|value)"
    r"(?![A-Za-z]))+[-_.<>]*",
    re.IGNORECASE,
)
_MAY_HAVE_BLANKS = re.compile(r"PASS(?:WORD|WD|PHRASE)?$|PWD$|STRING$", re.IGNORECASE)
_PEM = "-----BEGIN "


# -- what we say ------------------------------------------------------------------------------------------------------

_NAME = (
    r"(?:(?:api|access|secret|private|account)[-_]?key|(?:access|api|auth|bearer|github|hf|refresh|session)[-_]?token"
    r"|client[-_]?secret|password|passwd|passphrase|authorization)"
)
_PARAMETER = r"(?:key|token|auth|sig|signature|secret|pwd|pass|code)"
_WORD = r"[A-Za-z0-9_.~+/=%-]"
_ID = r"(?:agent|batch|example|group|item|rollout|row|sample|step|task)s?[_-]\d{1,12}"  # which a key may be, too
# Quantifiers are bounded where a text could be read again and again. A value that begins with a sign is a placeholder.
_LOOKS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY.*?(?:-----END [A-Z0-9 ]{0,40}KEY-----|\Z)", re.DOTALL), ""),
    (KEY_PATTERN, ""),
    (re.compile(r"(?<=://)[^\s/@:\"'<>]{1,256}(?::[^\s/@\"'<>]{0,256})?(?=@)"), ""),
    (re.compile(rf"([?&;](?:{_NAME}|{_PARAMETER})=)[^\s&#\"'<>]+", re.IGNORECASE), r"\1"),
    (
        re.compile(
            rf"({_NAME}[\"'\\]{{0,4}}\s{{0,3}}[:=]\s{{0,3}}[\"'\\]{{0,4}}(?:(?:basic|bearer|token)\s{{1,3}})?)"
            r"(?![$<{\[…])[^\s\"'\\,;&(){}\[\]<>]{8,}",
            re.IGNORECASE,
        ),
        r"\1",
    ),
    (
        re.compile(
            rf"(\b(?:token|secret|key)=[\"']?)(?!{_ID}(?!{_WORD}))(?={_WORD}{{0,200}}\d){_WORD}{{8,}}", re.IGNORECASE
        ),
        r"\1",
    ),
    (re.compile(rf"(\bbearer\s{{1,3}})(?={_WORD}{{0,200}}\d){_WORD}{{8,}}", re.IGNORECASE), r"\1"),
    (
        re.compile(
            r"\b(?:sk-[A-Za-z0-9_-]{16,}|(?:sk|pk|rk)_(?:live|test)_[A-Za-z0-9]{16,}|hf_[A-Za-z0-9]{20,}"
            r"|(?:nvapi-|gsk_|glpat-|npm_)[A-Za-z0-9_-]{20,}|(?:gh[opsur]_|github_pat_)[A-Za-z0-9_]{20,}"
            r"|xox[abeprs]-[A-Za-z0-9-]{12,}|AIza[A-Za-z0-9_-]{30,}|(?:AKIA|ASIA)[A-Z0-9]{12,}"
            r"|eyJ[A-Za-z0-9_-]{10,4096}\.[A-Za-z0-9_.-]{10,})"
        ),
        "",
    ),
)


def without_secrets(text: str, known: Iterable[str] = ()) -> str:
    """Return a text of ours without secrets: those that are known, those of the environment, and what looks like one.

    What looks like one: rollout keys, private keys (PEM), user and password of a URL, secret-named parameters of a
    query, values behind `api_key=`, `password:`, `Authorization: Bearer` and such, keys as known services make them.

    Args:
        text: The text.
        known: Further secrets, as for `Redactor`.
    """
    text = _without_known(text, _spellings([*secrets_of(os.environ), *known]))
    for pattern, kept in _LOOKS:
        text = pattern.sub(f"{kept}{REDACTED}", text)
    return text


class _Formatter(logging.Formatter):
    """Formats records, tracebacks included, without secrets."""

    def __init__(self, given: logging.Formatter | None, known: tuple[str, ...]) -> None:
        super().__init__()
        self._given, self._known = given or logging.Formatter(), known

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(self._given.format(record), self._known)


def log_without_secrets(known: Iterable[str] = ()) -> None:
    """Let the root logger's handlers write no secrets. Call it where logging is set up.

    Args:
        known: See `without_secrets`.
    """
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Formatter(handler.formatter, tuple(known)))


# -- which are known --------------------------------------------------------------------------------------------------


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Return values of environment variables that are named like keys (`OPENAI_API_KEY`, …) and could be one, and the
    passwords of URLs in any of them (`DATABASE_URL`)."""
    found = []
    for name, value in environment.items():
        if _SECRET_VARIABLE.search(name) and _could_be_secret(name, value):
            found.append(value)
        if "@" in value and (password := _password_of(value)):
            found.append(password)
    return [secret for secret in found if len(secret) >= _MIN_SECRET_CHARS]


def _could_be_secret(name: str, value: str) -> bool:
    """Return whether a value is neither prose nor a folder (`HOST_PWD`)."""
    if name.upper().endswith("PWD") and value.startswith("/"):
        return False
    return not any(c.isspace() for c in value) or _PEM in value or _MAY_HAVE_BLANKS.search(name) is not None


def _password_of(url: str) -> str | None:
    try:
        return urlsplit(url).password if "://" in url else None
    except ValueError:
        return None


def secrets_in(options: Any) -> list[str]:
    """Return the values under secret-named keys of nested options, e.g. of NeMo Gym's configuration."""
    if isinstance(options, Mapping):
        own = [text for key, item in options.items() if _is_secret_key(key) for text in _texts_of(item)]
        return [*own, *(secret for item in options.values() for secret in secrets_in(item))]
    if isinstance(options, list | tuple):
        return [secret for item in options for secret in secrets_in(item)]
    return []


def _texts_of(item: Any) -> list[str]:
    texts = item if isinstance(item, list | tuple) else [item]
    return [text for text in texts if isinstance(text, str)]


def _spellings(secrets: Iterable[str]) -> list[str]:
    """Return secrets as they stand in texts, in JSON and in URLs, the longest first; short ones are left out."""
    found = set()
    for secret in secrets:
        if len(secret) >= _MIN_SECRET_CHARS and not _PLACEHOLDER.fullmatch(secret):
            found |= {secret, unquote(secret), *(quote(secret, safe, errors="replace") for safe in ("", "/"))}
            found |= {json.dumps(secret, ensure_ascii=is_ascii)[1:-1] for is_ascii in (True, False)}
    return sorted((one for one in found if len(one) >= _MIN_SECRET_CHARS), key=len, reverse=True)


def _without_known(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, REDACTED)
    return text


# -- what was said ----------------------------------------------------------------------------------------------------


class Redactor:
    """Takes secrets out of JSON values.

    A value is redacted whole where its key says that it is a secret (`{"policy_api_key": …}`). Everywhere else, keys
    included, only what is in `secrets` is, wherever it stands in a text, and every rollout key.

    Args:
        secrets: Secret values; short ones (below 8 characters) are ignored, since they would take ordinary words
            along.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._known = _spellings(secrets)

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


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        return KEY_PATTERN.sub(REDACTED, _without_known(value, known))
    if isinstance(value, dict):
        return {_redact(key, known): _redact_item(key, item, known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(item, known) for item in value]
    return value


def _redact_item(key: Any, item: Any, known: list[str]) -> Any:
    if not _is_secret_key(key):
        return _redact(item, known)
    if isinstance(item, list | tuple):
        return [_redact_item(key, one, known) for one in item]
    return REDACTED if isinstance(item, str) and item else _redact(item, known)


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
        elif isinstance(value, list | tuple):
            children = value
        for child in children:  # a call for each of them would take most of the time
            if isinstance(child, str):
                self.texts.append(child)
            elif isinstance(child, dict | list | tuple):
                self.walk(child)
            elif isinstance(child, float) and not math.isfinite(child):
                self.is_finite = False


@functools.lru_cache(maxsize=4096)
def _is_secret_key(key: Any) -> bool:
    return isinstance(key, str) and re.sub("[-_. ]", "", key).lower().endswith(_SECRET_KEYS)
