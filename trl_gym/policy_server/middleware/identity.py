"""Tell whose model call it is: of a rollout, of the NeMo Gym of a run, or of anybody who holds the server's API key.

A call is a turn of a rollout when it says so in one of four ways:

    body      "trl_gym": {"rollout": …, "sampling": {…}, "completion_budget": …}         what Gym's model server sends
    header    x-trl-gym-rollout: KEY                                        what our host adds to Gym's own requests
    bearer    Authorization: Bearer KEY                                     for a harness that takes a URL and a key
    prefix    POST /trl_gym/rollouts/KEY/v1/chat/completions                for one that takes a URL only

KEY is a *rollout key*: `trlgym_`, the tag of the body as JSON in base64url, a dot, and its HMAC-SHA256 under the
server's API key. Whoever holds that key makes rollout keys without asking the server. A rollout key opens the routes
that a rollout needs, for that rollout alone. A *Gym key* has the same form and says that its holder is the NeMo Gym of
a run, and what to do with its calls that belong to no rollout: these are sampled with the agent's own parameters, have
no budget and cannot be trained.

A server without an API key reads these keys and checks no signature, for there is none to check. It is for whoever can
run programs on its machine, and for no web page that a browser there shows: it refuses requests that a page of another
origin makes (`Origin`), and those that ask for it under a name (`Host`), as a page does whose name was bound to this
machine's address after it was loaded. And it samples only: no route that changes the server is open.

`x-trl-gym-caller: KIND/NAME` names the Gym server that called. Calls of a resources server (a judge in `/verify`, a
tool that asks the policy) belong to their rollout and are not its turns: they are served as by a stock server. That a
resources server called is believed of whoever holds the server's API key or a Gym key: with a rollout key alone every
call is a turn.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import msgspec

from trl_gym.policy_server.middleware.http import Scope, header, path_of
from trl_gym.redaction import KEY_PATTERN

UntaggedPolicy = Literal["error", "warn"]

ROLLOUT_HEADER = "x-trl-gym-rollout"
CALLER_HEADER = "x-trl-gym-caller"
PREFIX = "/trl_gym/rollouts/"
SIDE_KIND = "resources_servers"  # calls of these are not turns

_OPEN = "/health"
_CHAT_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_RENDER_PATHS = ("/tokenize", "/detokenize")
_ROLLOUT_ROUTES = frozenset(
    {("GET", "/v1/models"), ("GET", "/version"), *(("POST", path) for path in (*_CHAT_PATHS, *_RENDER_PATHS))}
)
_GYM_ROUTES = _ROLLOUT_ROUTES | {("GET", "/metrics"), ("POST", "/v1/messages/count_tokens")}
# What a server without a key opens: it samples, and tells what it is, holds and has counted. Records of rollouts are
# a part of sampling, and who samples can as well say that a rollout has ended.
_KEYLESS_ROUTES = _GYM_ROUTES | {
    *(("GET", f"/{name}") for name in ("ping", "load", "weight_info", "is_paused", "is_sleeping", "get_world_size")),
    *(("GET", path) for path in ("/tokenizer_info", "/trl_gym/info")),
    *(("POST", f"{PREFIX}{verb}") for verb in ("records", "take", "cancel")),
}
_MAX_KEY_CHARS = 8192
_MAX_QUOTED_CHARS = 100
_MAX_CALLERS = 64  # names that are counted one by one
_CALLER = re.compile(rb"[A-Za-z0-9_.-]{1,64}/[A-Za-z0-9_.-]{1,128}")
_PREFIXED = re.compile(rf"^{PREFIX}(?P<key>trlgym_[^/]+)(?P<rest>/.*)$")
_OWN_HEADERS = frozenset({ROLLOUT_HEADER.encode(), CALLER_HEADER.encode()})
_IDENTITY = "trl_gym.identity"  # key in the scope


class RefusedError(Exception):
    """A request may not enter.

    Args:
        text: For its sender; it quotes no key.
    """

    def __init__(self, text: str, status: int = 401) -> None:
        super().__init__(text)
        self.status = status


class _Claims(msgspec.Struct, forbid_unknown_fields=True):
    """What a key says."""

    rollout: str | None = None
    sampling: dict[str, Any] | None = None
    agent_sampling: str | None = None
    completion_budget: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    gym: UntaggedPolicy | None = None


_claims = msgspec.json.Decoder(_Claims)


def rollout_key(api_key: str | None, tag: Mapping[str, Any]) -> str:
    """Return the key of one rollout.

    Args:
        api_key: An API key of the server; None for a server that has none.
        tag: The tag of the body: `rollout`, and optionally `sampling`, `agent_sampling`, `completion_budget`,
            `chat_template_kwargs`.
    """
    return _signed(api_key, {"rollout": tag["rollout"], **tag})


def gym_key(api_key: str | None, untagged: str) -> str:
    """Return the key of the NeMo Gym of a run.

    Args:
        untagged: Whether its model calls without a rollout are refused (`"error"`) or served and counted (`"warn"`).
    """
    return _signed(api_key, {"gym": untagged})


def _signed(api_key: str | None, claims: Mapping[str, Any]) -> str:
    payload = _base64(json.dumps(claims, separators=(",", ":")).encode())
    return f"trlgym_{payload}.{_signature(api_key or '', payload)}"


def _signature(api_key: str, payload: str) -> str:
    return _base64(hmac.digest(api_key.encode(), b"trl-gym key\0" + payload.encode(), hashlib.sha256))


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass(frozen=True, slots=True)
class Identity:
    """What is known about the sender of a request before its body is read."""

    tag: Mapping[str, Any] | None = None  # the tag that its key holds; None for a call without a rollout key
    caller: str | None = None  # `kind/name` of the Gym server that called, where it says so
    untagged: UntaggedPolicy | None = None  # for a call with a Gym key: what to do if it belongs to no rollout

    @property
    def rollout(self) -> str | None:
        return None if self.tag is None else self.tag["rollout"]

    @property
    def is_side(self) -> bool:
        """Tell whether a resources server called: its calls are not turns, unless their body has a tag too."""
        return self.caller is not None and self.caller.partition("/")[0] == SIDE_KIND

    @property
    def turn_tag(self) -> Mapping[str, Any] | None:
        """Return the tag under which the call is a turn; None for a call that is none."""
        return None if self.is_side else self.tag


NOBODY = Identity()


def identity_of(scope: Scope) -> Identity:
    """Return what `Gate.admit` has found out about a request."""
    return scope.get(_IDENTITY) or NOBODY


def agreed_rollout(one: str | None, other: str | None) -> str | None:
    """Return the rollout that two places of a request name, either of which may name none. Raises `RefusedError`: they
    name different ones."""
    if one is not None and other is not None and one != other:
        raise RefusedError(f"this request belongs to two rollouts, {one} and {other}: a key opens one rollout", 403)
    return one if one is not None else other


class Gate:
    """Let requests in, with their identity.

    Args:
        api_keys: API keys of the server. Without any, programs of this machine are let in, to what samples alone.
    """

    def __init__(self, api_keys: Sequence[str]) -> None:
        self._api_keys = tuple(api_keys)

    def admit(self, scope: Scope) -> None:
        """Check the keys of a request, and leave in its scope what a server without keys of ours understands.

        The prefix is taken off the path, in place, so that no access log has it; our headers are removed, and a key of
        ours as bearer token is replaced by the server's API key, which the server itself may demand.

        Args:
            scope: Of the request; changed in place.

        Raises:
            RefusedError: It may not enter, or names two rollouts.
        """
        if not self._api_keys:
            _refuse_web_pages(scope)
        prefix, bearer, given = _strip_prefix(scope), _bearer(scope), header(scope, ROLLOUT_HEADER.encode())
        from_prefix = None if prefix is None else self._rollout_claims(prefix, "the prefix of its URL")
        from_header = None if given is None else self._rollout_claims(given, f"the header {ROLLOUT_HEADER}")
        has_api_key = self._is_api_key(bearer)
        from_bearer = None if has_api_key else self._claims(bearer)  # a prefix comes with any: harnesses demand one
        claims = [
            one for one in (from_prefix, from_bearer, from_header) if one is not None and one.rollout is not None
        ]
        for one in claims:
            agreed_rollout(claims[0].rollout, one.rollout)
        if not has_api_key:
            self._check_route(scope, from_prefix or from_bearer)  # the header says whose call it is and opens nothing
        is_open = not self._api_keys and from_prefix is None and from_bearer is None  # anybody may call as anybody
        is_gym = from_bearer is not None and from_bearer.gym is not None
        caller = _caller(scope, may_be_side=has_api_key or is_gym or is_open)
        tag = {key: value for key, value in msgspec.structs.asdict(claims[0]).items() if value} if claims else None
        untagged = None if from_bearer is None else from_bearer.gym
        scope[_IDENTITY] = Identity(tag=tag, caller=caller, untagged=untagged)
        self._clean(scope, is_ours=not has_api_key and (from_prefix or from_bearer) is not None)

    def _is_api_key(self, bearer: bytes | None) -> bool:
        # Every key is compared in constant time: the timing of the answer says nothing about any key.
        matches = [hmac.compare_digest(bearer or b"", known.encode()) for known in self._api_keys]
        return any(matches)

    def _claims(self, key: bytes | None) -> _Claims | None:
        """Return what a key says; None for one that is not of our form. Raises `RefusedError` if it is not valid."""
        text = (key or b"").decode("latin-1")
        if len(text) > _MAX_KEY_CHARS or not KEY_PATTERN.fullmatch(text):
            return None
        payload, _, signature = text.removeprefix("trlgym_").partition(".")
        matches = [hmac.compare_digest(signature, _signature(known, payload)) for known in self._api_keys]
        if self._api_keys and not any(matches):
            raise RefusedError("a key of this request was not made with an API key of this server")
        try:
            claims = _claims.decode(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        except (ValueError, msgspec.MsgspecError):
            raise RefusedError("a key of this request says nothing that this server understands") from None
        if (claims.rollout is None) == (claims.gym is None):
            raise RefusedError("a key of this request is neither that of a rollout nor that of a NeMo Gym")
        return claims

    def _rollout_claims(self, key: bytes, where: str) -> _Claims:
        claims = self._claims(key)
        if claims is None or claims.rollout is None:
            raise RefusedError(f"a request has no rollout key in {where}")
        return claims

    def _check_route(self, scope: Scope, claims: _Claims | None) -> None:
        path = path_of(scope)
        if path == _OPEN:
            return
        if claims is None:
            if self._api_keys:
                raise RefusedError("this server demands its API key as a bearer token on every route but /health")
            if (scope.get("method"), path) not in _KEYLESS_ROUTES:
                raise RefusedError(
                    f"this server was started without a key, and opens no more than what samples: not {path}. Start "
                    "it with a key (`--api-key` or VLLM_API_KEY)",
                    403,
                )
            return
        routes = _ROLLOUT_ROUTES if claims.gym is None else _GYM_ROUTES
        if (scope.get("method"), path) not in routes:
            whose = "a rollout" if claims.gym is None else "a NeMo Gym"
            raise RefusedError(f"the key of {whose} does not open {scope.get('method', 'a websocket at')} {path}", 403)

    def _clean(self, scope: Scope, *, is_ours: bool) -> None:
        dropped = _OWN_HEADERS | {b"authorization"} if is_ours else _OWN_HEADERS
        headers = [(key, value) for key, value in scope["headers"] if key.lower() not in dropped]
        if is_ours and self._api_keys:
            headers.append((b"authorization", b"Bearer " + self._api_keys[0].encode()))
        scope["headers"] = headers


def _refuse_web_pages(scope: Scope) -> None:
    """Raise `RefusedError` for a request to a server without a key that a web page may have made."""
    hosts = [value.decode("latin-1").lower() for key, value in scope["headers"] if key.lower() == b"host"]
    origins = [value.decode("latin-1").lower() for key, value in scope["headers"] if key.lower() == b"origin"]
    why = next((f"it is asked as {host[:_MAX_QUOTED_CHARS]!r}" for host in hosts if not _is_local(host)), None)
    foreign = (origin for origin in origins if origin.partition("://")[2] not in hosts)
    if why is None and (origin := next(foreign, None)) is not None:
        why = f"a web page of {origin[:_MAX_QUOTED_CHARS]!r} asks"
    if why is not None:
        raise RefusedError(
            f"{why}, and this server was started without a key: it answers programs of this machine, which ask for it "
            "as localhost or by an IP address. Start it with a key (`--api-key` or VLLM_API_KEY)",
            403,
        )


def _is_local(host: str) -> bool:
    """Return whether a `Host` is localhost or an address: only a name can be bound to another address meanwhile."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _strip_prefix(scope: Scope) -> bytes | None:
    """Take a rollout's prefix off the path; return the key in it, or None."""
    match = _PREFIXED.match(path_of(scope))
    if match is None:
        return None
    scope["path"] = scope.get("root_path", "") + match["rest"]
    scope["raw_path"] = quote(scope["path"]).encode()
    return match["key"].encode("latin-1", "replace")


def _bearer(scope: Scope) -> bytes | None:
    scheme, _, key = (header(scope, b"authorization") or b"").partition(b" ")
    return key if scheme.lower() == b"bearer" else None


def _caller(scope: Scope, *, may_be_side: bool) -> str | None:
    value = header(scope, CALLER_HEADER.encode())
    if value is None or not _CALLER.fullmatch(value):
        return None
    caller = value.decode()
    return caller if may_be_side or not caller.startswith(f"{SIDE_KIND}/") else None


@dataclass(slots=True)
class UntaggedCalls:
    """Counts, since the server's start, of sampled calls that belong to no rollout."""

    gym: Counter[str] = field(default_factory=Counter)  # with a Gym key, by caller; "" where it is not known
    others: int = 0  # with the server's API key, or without any

    def count(self, identity: Identity) -> None:
        """Count one. Raises `RefusedError`: Gym's calls are not to be served without a rollout."""
        if identity.untagged is None:
            self.others += 1
            return
        caller = identity.caller or ""
        self.gym[caller if caller in self.gym or len(self.gym) < _MAX_CALLERS else ""] += 1
        if identity.untagged == "error":
            who = f"{caller} of NeMo Gym" if caller else "a server or agent of NeMo Gym"
            raise RefusedError(
                f"{who} made a model call that belongs to no rollout: it would be sampled with parameters of its own, "
                "without a budget, and not be trained. Let the agent keep `metadata.extra_body`, or send the header "
                f"{ROLLOUT_HEADER}; or set `gym_untagged_calls` to 'warn' to serve such calls",
                400,
            )

    def since(self, before: UntaggedCalls) -> UntaggedCalls:
        """Return what was counted after `before`; a server that has restarted meanwhile counts from zero."""
        restarted = self.others < before.others or bool(before.gym - self.gym)
        return self if restarted else UntaggedCalls(self.gym - before.gym, self.others - before.others)

    def names(self) -> str:
        """Return Gym's callers and how many calls each has made, most first; empty if Gym has made none."""
        return ", ".join(f"{name or 'an unknown server'}: {count}" for name, count in self.gym.most_common())

    def describe(self) -> dict[str, Any]:
        return {"gym": dict(self.gym), "others": self.others}
