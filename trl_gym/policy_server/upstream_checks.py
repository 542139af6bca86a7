"""What `trl-gym gateway` finds out about its upstreams before it serves: by what they do, not by what they are called.

Asked of every upstream, in this order: does it answer (waited for), is it an OpenAI server made by vLLM, is it not one
of ours already, does it render chats, does it accept an exact prompt, and which logprobs does it report. All upstreams
must serve the same model; whether they hold the same weights cannot be seen from here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from trl_gym.errors import PolicyServerError
from trl_gym.policy_server import forwarding
from trl_gym.policy_server.forwarding import ForwardedRequest, quote, words
from trl_gym.policy_server.middleware.http import Reply

_ANSWER_TIMEOUT_S = 10.0
_FIRST_ANSWER_TIMEOUT_S = 120.0  # the first chat request may compile kernels
_RETRY_EVERY_S = 0.5
_CHAT = [{"role": "user", "content": "0"}]
_NEUTRAL = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 1}
_TOP = 5
_MIN_GAP = 0.01  # between the most likely tokens, in nats; below it the two kinds of logprobs look alike

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class UpstreamFacts:
    """What one upstream is and does.

    Attributes:
        url: Root URL.
        model_names: As in `/v1/models`; the first is the policy.
        max_model_len: Tokens of prompt and completion together.
        vllm_version: As in `/version`.
        has_prompt_field: Whether it takes an exact prompt as the field `prompt_token_ids` of a chat request.
        has_transfer_params: Whether it takes it in `kv_transfer_params`.
        raw_logprobs: Whether its logprobs are those before temperature; `None` if that could not be measured.
    """

    url: str
    model_names: tuple[str, ...]
    max_model_len: int
    vllm_version: str
    has_prompt_field: bool
    has_transfer_params: bool
    raw_logprobs: bool | None


class _UnusableError(Exception):
    """This server cannot be an upstream, and waiting would not change that."""


async def check_upstreams(
    urls: Sequence[str], *, api_key: str | None, timeout_s: float, note: Note
) -> list[UpstreamFacts]:
    """Wait for every upstream and look at it.

    Args:
        urls: Root URLs, without `/v1`.
        api_key: Bearer token for all of them.
        timeout_s: How long to wait until all have answered.
        note: Gets one line for each upstream that is waited for, and one for each that reports raw logprobs.

    Returns:
        One entry per URL.

    Raises:
        PolicyServerError: With every problem found, each with its URL and remedy.
    """
    deadline = time.monotonic() + timeout_s
    async with forwarding.open_session() as session:
        checks = [_Check(session, url, api_key, deadline, note) for url in urls]
        results = await asyncio.gather(*(check.run() for check in checks))
    problems = [result for result in results if isinstance(result, str)]
    facts = [result for result in results if isinstance(result, UpstreamFacts)]
    problems += _differences(facts)
    if problems:
        raise PolicyServerError("the gateway cannot be started:\n" + "\n".join(f"  - {line}" for line in problems))
    for fact in facts:
        if fact.raw_logprobs is not False:
            note(_logprobs_warning(fact))
    return facts


def takes_prompt_field(facts: Sequence[UpstreamFacts]) -> bool:
    """Whether exact prompts go into `prompt_token_ids` (else into `kv_transfer_params`), the same way for all."""
    return all(fact.has_prompt_field for fact in facts)


def _differences(facts: Sequence[UpstreamFacts]) -> list[str]:
    problems = []
    served = {fact.url: f"{', '.join(fact.model_names)} (max_model_len {fact.max_model_len})" for fact in facts}
    if len(set(served.values())) > 1:
        text = forwarding.listed(served)
        problems.append(f"the upstreams serve different models; they must be replicas of one: {text}")
    if not takes_prompt_field(facts) and not all(fact.has_transfer_params for fact in facts):
        versions = forwarding.listed({fact.url: f"vLLM {fact.vllm_version}" for fact in facts})
        problems.append(f"the upstreams accept exact prompts in different ways; run one version of vLLM: {versions}")
    return problems


def _logprobs_warning(fact: UpstreamFacts) -> str:
    if fact.raw_logprobs is None:
        return f"warning: {fact.url}: it could not be measured whether its logprobs are processed or raw"
    return (
        f"warning: {fact.url} reports raw logprobs, those before temperature and top_p. Training is exact at "
        "temperature 1 and top_p 1 only; for others start it with --logprobs-mode processed_logprobs"
    )


@dataclass(frozen=True, slots=True)
class _Check:
    session: aiohttp.ClientSession
    url: str
    api_key: str | None
    deadline: float
    note: Note

    async def run(self) -> UpstreamFacts | str:
        """The facts, or what is wrong."""
        waiting = False
        while True:
            try:
                return await self._look()
            except _UnusableError as problem:
                return f"{self.url}: {problem}"
            except (aiohttp.ClientError, TimeoutError) as error:
                last = words(error)
            if time.monotonic() >= self.deadline:
                return f"{self.url} cannot be reached: {last}. Is it running, and is the URL right?"
            if not waiting:
                self.note(f"waiting for {self.url}: {last}")
                waiting = True
            await asyncio.sleep(_RETRY_EVERY_S)

    async def _look(self) -> UpstreamFacts:
        names, max_model_len = await self._models()
        version = await self._version()
        await self._refuse_our_own()
        rendered = await self._render(names[0])
        ids = [*rendered, rendered[-1]]  # of the vocabulary, and not what the server would render
        by_field = {"prompt_token_ids": ids}
        by_params = {"kv_transfer_params": {"prompt_token_ids": ids}}
        has_field, has_params = [await self._is_exact(names[0], how, ids) for how in (by_field, by_params)]
        if not has_field and not has_params:
            raise _UnusableError(
                f"it takes exact prompts neither as prompt_token_ids nor in kv_transfer_params: asked for {len(ids)} "
                f"given tokens, it (vLLM {version}) answered on its own render of {len(rendered)}. vLLM >= 0.27 does"
            )
        raw = await self._has_raw_logprobs(names[0], by_field if has_field else by_params)
        return UpstreamFacts(self.url, names, max_model_len, version, has_field, has_params, raw)

    async def _models(self) -> tuple[tuple[str, ...], int]:
        reply = await self._call("GET", "/v1/models")
        if reply.status in (401, 403):
            remedy = "the upstream key is wrong" if self.api_key else "it demands a key"
            raise _UnusableError(
                f"authentication failed (HTTP {reply.status}): {remedy}; give --upstream-api-key or set "
                "$TRL_GYM_UPSTREAM_API_KEY"
            )
        if reply.status == 429 or reply.status >= 500:  # a proxy whose server is still loading
            raise aiohttp.ClientError(f"GET /v1/models: HTTP {reply.status}: {quote(reply.body)}")
        try:
            models = reply.json()["data"]
            return tuple(model["id"] for model in models), int(models[0]["max_model_len"])
        except (ValueError, LookupError, TypeError) as error:
            raise _UnusableError(
                f"it is no OpenAI server made by vLLM: GET /v1/models answered HTTP {reply.status}: "
                f"{quote(reply.body)}"
            ) from error

    async def _version(self) -> str:
        reply = await self._call("GET", "/version")
        try:
            return str(reply.json()["version"])
        except (ValueError, LookupError, TypeError) as error:
            raise _UnusableError(
                f"it is an OpenAI server, but not vLLM's: GET /version answered HTTP {reply.status}: "
                f"{quote(reply.body)}"
            ) from error

    async def _refuse_our_own(self) -> None:
        reply = await self._call("GET", "/trl_gym/info")
        if reply.ok and b'"package_version"' in reply.body:
            raise _UnusableError("it is a trl-gym server already, which needs no gateway: use its URL directly")

    async def _render(self, model: str) -> list[int]:
        reply = await self._call("POST", "/tokenize", {"model": model, "messages": _CHAT})
        try:
            if tokens := reply.json()["tokens"]:
                return tokens
        except (ValueError, LookupError, TypeError) as error:
            raise _UnusableError(
                f"it does not render chats, which exact prompts need: POST /tokenize answered HTTP {reply.status}: "
                f"{quote(reply.body)}"
            ) from error
        raise _UnusableError("its chat template renders nothing")

    async def _is_exact(self, model: str, how: dict[str, Any], ids: list[int]) -> bool:
        body = {**_NEUTRAL, **how, "model": model, "messages": _CHAT, "return_token_ids": True}
        reply = await self._call("POST", "/v1/chat/completions", body, timeout_s=_FIRST_ANSWER_TIMEOUT_S)
        if 400 <= reply.status < 500:
            return False  # a server may refuse the field it does not know
        if not reply.ok:
            raise _UnusableError(f"POST /v1/chat/completions answered HTTP {reply.status}: {quote(reply.body)}")
        return reply.json().get("prompt_token_ids") == ids

    async def _has_raw_logprobs(self, model: str, how: dict[str, Any]) -> bool | None:
        """Halving the temperature doubles the distances between processed logprobs and leaves raw ones alone."""
        gaps = []
        for temperature in (1.0, 0.5):
            body = {**_NEUTRAL, **how, "model": model, "messages": _CHAT, "temperature": temperature}
            body |= {"logprobs": True, "top_logprobs": _TOP}
            reply = await self._call("POST", "/v1/chat/completions", body)
            if not reply.ok:
                return None  # --max-logprobs may be below _TOP
            try:
                entries = reply.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            except (ValueError, LookupError, TypeError):
                return None  # it has none to show, and the user is told that they could not be measured
            # The sampled token comes first and may be none of the most likely: it takes the place of the last of them.
            most_likely = sorted((entry["logprob"] for entry in entries), reverse=True)[: _TOP - 1]
            if not most_likely:
                return None
            gaps.append(most_likely[0] - most_likely[-1])
        return gaps[1] < 1.5 * gaps[0] if gaps[0] > _MIN_GAP else None

    async def _call(
        self, method: str, path: str, payload: dict[str, Any] | None = None, *, timeout_s: float = _ANSWER_TIMEOUT_S
    ) -> Reply:
        """Raises `aiohttp.ClientError`, or `TimeoutError` with a text."""
        request = ForwardedRequest.of(method, path, payload).with_key(self.api_key)
        timeout_s = min(timeout_s, max(1.0, self.deadline - time.monotonic()))
        try:
            async with asyncio.timeout(timeout_s):
                return await forwarding.ask(self.session, self.url, request)
        except TimeoutError as error:
            raise TimeoutError(f"{request}: no answer within {timeout_s:.0f} s") from error
