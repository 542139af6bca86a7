"""`trl-gym gateway`: exact prompts in front of vLLM or SGLang servers that are not ours.

    Gym, trainer ──► gateway: OnPolicyMiddleware ──► UpstreamApp ──HTTP──► vLLM, vLLM, …
                                                         └── SglangWire ──HTTP──► SGLang, SGLang, …

The middleware is the one that `trl-gym serve` puts inside the server; here its inner application asks over the network
(`upstreams.py`). Nothing of ours runs in the upstreams, and only their public routes are used.

Before it serves, it finds out by behaviour what each upstream is: whether it answers (it waits for that), is an OpenAI
server made by vLLM or SGLang, is not one of ours already, renders chats and accepts an exact prompt, and which
logprobs it reports. All upstreams must be of one kind and serve the same model; whether they hold the same weights
cannot be seen from here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NotRequired, TypedDict

import aiohttp
import msgspec
import uvicorn

from trl_gym.errors import ConfigError, PolicyServerError, Problem
from trl_gym.given import split_urls, url_problems, usable_key
from trl_gym.policy_server import upstreams
from trl_gym.policy_server.client import root_url
from trl_gym.policy_server.command import is_loopback
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings
from trl_gym.policy_server.middleware.http import App, Receive, Reply, Scope, Send
from trl_gym.policy_server.sglang import dialect
from trl_gym.policy_server.sglang.wire import SglangWire
from trl_gym.policy_server.upstreams import (
    Answering,
    ForwardedRequest,
    PlainWire,
    RedirectedError,
    UpstreamApp,
    UpstreamLostError,
    Wire,
    quote,
    words,
)
from trl_gym.processes import bind_socket, reachable
from trl_gym.redaction import log_without_secrets
from trl_gym.supervisor import raise_open_files

_logger = logging.getLogger("trl_gym.gateway")

_ANSWER_TIMEOUT_S = 10.0
_FIRST_ANSWER_TIMEOUT_S = 120.0  # the first chat request may compile kernels
_RETRY_EVERY_S = 0.5
_CHAT = [{"role": "user", "content": "0"}]
_NEUTRAL = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 1}
_TOP = 5
_MIN_GAP = 0.01  # between the most likely tokens, in nats; below it the two kinds of logprobs look alike

_GIVE_SERVER = "Give the URL of a `vllm serve`, or of an SGLang server."
_GIVE_TEMPLATE = "Start it with --chat-template FILE."

_NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
_PROCESSED = "with --logprobs-mode processed_logprobs"

Note = Callable[[str], None]

# -- the forms of answers, as far as they are read --------------------------------------------------------------------

_ONE_OR_MORE = msgspec.Meta(min_length=1)


class _Model(TypedDict):
    id: str
    max_model_len: NotRequired[Annotated[int, msgspec.Meta(ge=1)] | None]  # adapters have none


class _Models(TypedDict):
    data: Annotated[list[_Model], _ONE_OR_MORE]


class _Version(TypedDict):
    version: str
    engine: NotRequired[str]


class _Tokens(TypedDict):
    tokens: list[Annotated[int, msgspec.Meta(ge=0)]]


class _Prompted(TypedDict):
    prompt_token_ids: NotRequired[list[int] | None]


class _Entry(TypedDict):
    logprob: float


class _Place(TypedDict):
    top_logprobs: list[_Entry]


class _Places(TypedDict):
    content: Annotated[list[_Place], _ONE_OR_MORE]


class _Choice(TypedDict):
    logprobs: _Places


class _Ranked(TypedDict):
    choices: Annotated[list[_Choice], _ONE_OR_MORE]


@dataclass(frozen=True, slots=True)
class UpstreamFacts:
    """One upstream: what it is, and how it behaves."""

    url: str  # root URL
    model_names: tuple[str, ...]  # as in `/v1/models`; the first is the policy
    max_model_len: int  # tokens of prompt and completion together
    version: str  # of the engine
    has_prompt_field: bool  # whether it takes an exact prompt as the field `prompt_token_ids` of a chat request
    has_transfer_params: bool  # whether it takes one in `kv_transfer_params`
    # Whether its logprobs are those before temperature; `None` if that could not be measured.
    raw_logprobs: bool | None
    num_replicas: int = 1  # of its data-parallel engine
    engine: str = "vllm"  # or `"sglang"`
    # Ways in which it takes weights; None where the trainer finds out by asking.
    weight_transports: tuple[str, ...] | None = None


class _UnusableError(PolicyServerError):
    """The server cannot be an upstream, and waiting would not change that."""


async def check_upstreams(
    urls: Sequence[str], *, api_key: str | None, timeout_s: float, note: Note
) -> list[UpstreamFacts]:
    """Wait for every upstream and find out what it is.

    Args:
        urls: Root URLs, without `/v1`.
        timeout_s: How long to wait until all have answered, in seconds.
        note: Called with one line for each upstream that is waited for, and for each that reports raw logprobs.

    Returns:
        One entry per URL.

    Raises:
        PolicyServerError: An upstream cannot be used; lists every problem, each with its URL and remedy.
    """
    deadline = time.monotonic() + timeout_s
    async with upstreams.open_session() as session:
        checks = [_Check(session, url, api_key, deadline, note, PlainWire(url)) for url in urls]
        results = await asyncio.gather(*(check.run() for check in checks))
    problems = [result for result in results if isinstance(result, Problem)]
    facts = [result for result in results if isinstance(result, UpstreamFacts)]
    problems += _differences(facts)
    if problems:
        raise PolicyServerError("The gateway cannot be started:", problems=problems)
    for fact in facts:
        if fact.raw_logprobs is not False:
            note(_logprobs_warning(fact))
    return facts


def takes_prompt_field(facts: Sequence[UpstreamFacts]) -> bool:
    """Return whether exact prompts go into `prompt_token_ids` (else into `kv_transfer_params`) for all upstreams."""
    return all(fact.has_prompt_field for fact in facts)


def shared_replicas(facts: Sequence[UpstreamFacts]) -> int:
    """Return how many replicas each upstream has, where all have as many: a request names one of any upstream's."""
    counts = {fact.num_replicas for fact in facts}
    return counts.pop() if len(counts) == 1 else 1


def _differences(facts: Sequence[UpstreamFacts]) -> list[Problem]:
    problems = []
    served = {fact.url: f"{', '.join(fact.model_names)} (max_model_len {fact.max_model_len})" for fact in facts}
    if len(set(served.values())) > 1:
        problems.append(
            Problem(
                f"The upstreams serve different models ({upstreams.listed(served)}).",
                "Start all with the same model and context.",
            )
        )
    if len({fact.engine for fact in facts}) > 1:
        engines = upstreams.listed({fact.url: _named(fact) for fact in facts})
        problems.append(
            Problem(f"The upstreams are servers of different kinds ({engines}).", "Give those of one kind only.")
        )
    elif not takes_prompt_field(facts) and not all(fact.has_transfer_params for fact in facts):
        versions = upstreams.listed({fact.url: _named(fact) for fact in facts})
        problems.append(
            Problem(f"The upstreams accept exact prompts in different ways ({versions}).", "Run one version of vLLM.")
        )
    return problems


def _named(fact: UpstreamFacts) -> str:
    return f"{_NAMES.get(fact.engine, fact.engine)} {fact.version}"


def _logprobs_warning(fact: UpstreamFacts) -> str:
    if fact.raw_logprobs is None:
        return f"warning: {fact.url}: whether its logprobs are processed or raw could not be measured"
    remedy = "without $SGLANG_RETURN_ORIGINAL_LOGPROB" if fact.engine == "sglang" else _PROCESSED
    return (
        f"warning: {fact.url} reports raw logprobs, those before temperature and top_p. Training is exact at "
        f"temperature 1 and top_p 1 only; for others start it {remedy}"
    )


@dataclass(frozen=True, slots=True)
class _Check:
    session: aiohttp.ClientSession
    url: str
    api_key: str | None
    deadline: float
    note: Note
    wire: Wire  # as to vLLM, until it is known to be another

    async def run(self) -> UpstreamFacts | Problem:
        """Return the facts, or why the server cannot be used."""
        waiting = False
        while True:
            try:
                return await replace(self, wire=await self._wire())._look()
            except _UnusableError as error:
                return Problem(f"{self.url}: {error.problem}", error.remedy)
            except RedirectedError as error:
                return Problem(f"{self.url}: {error}.", "Give the URL of the server itself.")
            except (aiohttp.ClientError, TimeoutError) as error:
                last = words(error)
            if time.monotonic() >= self.deadline:
                return Problem(f"{self.url} cannot be reached: {last}.", "Start it, or correct the URL.")
            if not waiting:
                self.note(f"waiting for {self.url}: {last}")
                waiting = True
            await asyncio.sleep(_RETRY_EVERY_S)

    async def _wire(self) -> Wire:
        """Find out whose server it is: SGLang's alone tells the path of its model."""
        reply = await self._call("GET", "/model_info")
        try:
            reply.read(dialect.ModelInfo)
        except ValueError:
            return self.wire
        return SglangWire(self.url)

    async def _look(self) -> UpstreamFacts:
        names, max_model_len = await self._models()
        engine, version = await self._version()
        await self._refuse_our_own()
        rendered = await self._render(names[0])
        ids = [*rendered, rendered[-1]]  # of the vocabulary, and not what the server would render
        by_field = {"prompt_token_ids": ids}
        by_params = {"kv_transfer_params": {"prompt_token_ids": ids}}
        has_field, has_params = [await self._is_exact(names[0], how, ids) for how in (by_field, by_params)]
        if not has_field and not has_params:
            raise _UnusableError(
                f"it takes exact prompts neither as prompt_token_ids nor in kv_transfer_params: asked for {len(ids)} "
                f"given tokens, it ({_NAMES.get(engine, engine)} {version}) answered on its own render of "
                f"{len(rendered)}.",
                "Run vLLM 0.27 or SGLang 0.5.23, or newer.",
            )
        raw = await self._has_raw_logprobs(names[0], by_field if has_field else by_params)
        replicas, transports = await self._replicas_and_transports()
        return UpstreamFacts(
            *(self.url, names, max_model_len, version, has_field, has_params, raw, replicas, engine, transports)
        )

    async def _models(self) -> tuple[tuple[str, ...], int]:
        reply = await self._call("GET", "/v1/models")
        if reply.status in (401, 403):
            why = "the upstream key is wrong" if self.api_key else "it demands a key"
            raise _UnusableError(
                f"authentication failed (HTTP {reply.status}): {why}.",
                "Give --upstream-api-key, or set $TRL_GYM_UPSTREAM_API_KEY.",
            )
        if reply.status == 429 or reply.status >= 500:  # a proxy whose server is still loading
            raise aiohttp.ClientError(f"GET /v1/models: HTTP {reply.status}: {quote(reply.body)}")
        try:
            models = reply.read(_Models)["data"]
            return tuple(model["id"] for model in models), models[0]["max_model_len"]
        except (ValueError, KeyError) as error:
            raise _UnusableError(
                f"it is not an OpenAI server made by vLLM or SGLang: GET /v1/models answered HTTP {reply.status}: "
                f"{quote(reply.body)}.",
                _GIVE_SERVER,
            ) from error

    async def _version(self) -> tuple[str, str]:
        reply = await self._call("GET", "/version")
        try:
            answer = reply.read(_Version)
            return answer.get("engine", "vllm"), answer["version"]
        except ValueError as error:
            raise _UnusableError(
                f"it is an OpenAI server, but neither vLLM's nor SGLang's: GET /version answered HTTP {reply.status}: "
                f"{quote(reply.body)}.",
                _GIVE_SERVER,
            ) from error

    async def _refuse_our_own(self) -> None:
        reply = await self._call("GET", "/trl_gym/info")
        if reply.ok and b'"package_version"' in reply.body:
            raise _UnusableError("it is a trl-gym server already, which needs no gateway.", "Use its URL directly.")

    async def _render(self, model: str) -> list[int]:
        reply = await self._call("POST", "/tokenize", {"model": model, "messages": _CHAT})
        try:
            if tokens := reply.read(_Tokens)["tokens"]:
                return tokens
        except ValueError as error:
            raise _UnusableError(
                f"it does not render chats, which exact prompts need: POST /tokenize answered HTTP {reply.status}: "
                f"{quote(reply.body)}.",
                _GIVE_TEMPLATE,
            ) from error
        raise _UnusableError("its chat template renders nothing.", _GIVE_TEMPLATE)

    async def _is_exact(self, model: str, how: dict[str, Any], ids: list[int]) -> bool:
        body = {**_NEUTRAL, **how, "model": model, "messages": _CHAT, "return_token_ids": True}
        reply = await self._call("POST", "/v1/chat/completions", body, timeout_s=_FIRST_ANSWER_TIMEOUT_S)
        if 400 <= reply.status < 500:
            return False  # a server may refuse the field it does not know
        if not reply.ok:
            raise _UnusableError(f"POST /v1/chat/completions answered HTTP {reply.status}: {quote(reply.body)}")
        try:
            return reply.read(_Prompted).get("prompt_token_ids") == ids
        except ValueError as error:
            raise _UnusableError(
                f"POST /v1/chat/completions is answered as vLLM does not ({error}): {quote(reply.body)}.", _GIVE_SERVER
            ) from error

    async def _replicas_and_transports(self) -> tuple[int, tuple[str, ...] | None]:
        """Count engines, of vLLM by their metrics, the only public route that tells; 1 for a server that has none."""
        if isinstance(self.wire, SglangWire):
            args = self.wire.args or {}  # asked for by `_version`
            return dialect.num_replicas(args), dialect.weight_transports(args)
        reply = await self._call("GET", "/metrics")
        found = re.findall(rb'^vllm:num_requests_running\{[^}]*engine="(\d+)"', reply.body, re.MULTILINE)
        return (max(1, len(set(found))) if reply.ok else 1), None

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
                entries = reply.read(_Ranked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            except ValueError:
                return None  # it shows none; the user is told that they could not be measured
            # The sampled token comes first and may not be among the most likely: it takes the place of the last one.
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
                return await self.wire.ask(self.session, request)
        except TimeoutError as error:
            raise TimeoutError(f"{request}: no answer within {timeout_s:.0f} s") from error


# As in `entry.DEFAULT_ENVIRONMENT`: clients keep connections open between optimizer steps.
_KEEP_ALIVE_S = 600
_GRACE_S = 2  # running requests are cut off at once; this is for what still does not end
_LOOK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """The arguments of `trl-gym gateway`."""

    upstreams: Sequence[
        str
    ]  # URLs of vLLM's or SGLang's servers, with or without `/v1`; all must serve the same model
    host: str = "127.0.0.1"  # address to listen on. One that other machines can reach demands `api_key`.
    port: int = 0  # port to listen on; 0 lets the operating system choose
    # Bearer tokens: one that the gateway demands on every route but `/health`, one that it sends to the upstreams.
    api_key: str | None = field(default=None, repr=False)
    upstream_api_key: str | None = field(default=None, repr=False)
    start_timeout_s: float = 600.0  # how long to wait for the upstreams to answer
    log_level: str = "warning"  # one of logging's names, lower case; `debug` logs every request
    # Of a gateway that is started by a program: an inherited socket that listens already, and what it says of itself.
    listen_fd: int | None = None
    nonce: str | None = None


def run(options: GatewayOptions, *, ready: Callable[[str], None], note: Callable[[str], None]) -> None:
    """Serve until SIGINT (raises `KeyboardInterrupt`) or SIGTERM (ends the process), and cut off what is running.

    Args:
        ready: Called once with the base URL when the gateway answers.
        note: Called with lines for the user: what is waited for, and warnings.

    Raises:
        ConfigError: A URL or the address cannot work, or a key cannot be sent.
        PolicyServerError: The port is taken, or an upstream cannot be used.
    """
    raise_open_files()
    urls = upstream_urls(options.upstreams)
    options = replace(
        options,
        api_key=usable_key("--api-key", options.api_key),
        upstream_api_key=usable_key("--upstream-api-key", options.upstream_api_key),
    )
    if not is_loopback(options.host) and not options.api_key:
        raise ConfigError(
            f"--host {options.host or '(every interface)'} can be reached from other machines, and the gateway passes "
            "on routes that replace the policy's weights.",
            "Give --api-key, or set VLLM_API_KEY, without --no-key.",
        )
    logging.basicConfig(level=options.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    log_without_secrets(filter(None, [options.api_key, options.upstream_api_key]))
    given = options.listen_fd
    with _bind(options.host, options.port) if given is None else socket.socket(fileno=given) as sock:
        asyncio.run(_serve(urls, options, sock, ready, note))


def upstream_urls(given: Sequence[str]) -> list[str]:
    """Return root URLs, without `/v1` and trailing slashes. Raises `ConfigError`: a URL cannot be one, or is given
    twice; lists all of them."""
    given = [url for one in given for url in split_urls(one)]
    roots = [root_url(url) for url in given]
    problems = [problem for url in given for problem in url_problems("--upstream", url)]
    twice = sorted({root for root in roots if roots.count(root) > 1})
    problems += [Problem(f"--upstream {root} is given twice.", "Give it once.") for root in twice]
    if not roots:
        problems.append(Problem("No --upstream is given.", "Name the URL of at least one server."))
    if problems:
        raise ConfigError("The gateway cannot be started:", problems=problems)
    return roots


def build_app(upstreams: UpstreamApp, settings: Settings) -> App:
    """Return the ASGI application of the gateway.

    Args:
        upstreams: The inner application.
    """
    inner = OnPolicyMiddleware(upstreams, settings)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await inner(scope, receive, send)
        answering = Answering(send)
        try:
            await inner(scope, receive, answering)
        except UpstreamLostError as error:
            _logger.warning("%s", error)
            if not answering.has_begun:
                await Reply.error(500, str(error)).send(send)
            # An answer that has begun stays incomplete, upon which the server closes the connection.
        return None

    return app


def assemble(facts: Sequence[UpstreamFacts], options: GatewayOptions) -> tuple[UpstreamApp, App]:
    """Return the inner application of a gateway before servers that were checked, and the whole of it."""
    raw_logprobs = {fact.url: fact.raw_logprobs for fact in facts}

    def sglang(url: str) -> Wire:
        return SglangWire(url, raw_logprobs=raw_logprobs[url])

    wire = sglang if facts[0].engine == "sglang" else PlainWire
    upstreams = UpstreamApp([fact.url for fact in facts], api_key=options.upstream_api_key, wire=wire)
    settings = Settings(
        nonce=options.nonce,
        api_keys=(options.api_key,) if options.api_key else (),
        has_prompt_field=takes_prompt_field(facts),
        weight_transports=facts[0].weight_transports,
        num_replicas=shared_replicas(facts),
    )
    return upstreams, build_app(upstreams, settings)


async def _serve(
    urls: list[str],
    options: GatewayOptions,
    sock: socket.socket,
    ready: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    key = options.upstream_api_key
    facts = await check_upstreams(urls, api_key=key, timeout_s=options.start_timeout_s, note=note)
    upstreams, app = assemble(facts, options)
    config = uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        log_config=None,
        access_log=options.log_level == "debug",
        server_header=False,  # the upstream's own are passed on
        date_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACE_S,
    )
    server = uvicorn.Server(config)
    base_url = f"http://{reachable(options.host)}:{sock.getsockname()[1]}/v1"
    attending = asyncio.create_task(_attend(server, upstreams, lambda: ready(base_url)))
    try:
        await server.serve(sockets=[sock])
    finally:
        attending.cancel()
        await asyncio.gather(attending, return_exceptions=True)


async def _attend(server: uvicorn.Server, upstreams: UpstreamApp, ready: Callable[[], None]) -> None:
    """Call `ready` when the server answers, and cut running requests off when it is to end: it would wait for them."""
    while not (server.started or server.should_exit):
        await asyncio.sleep(_LOOK_EVERY_S)
    if server.started:
        ready()
    while not server.should_exit:
        await asyncio.sleep(_LOOK_EVERY_S)
    upstreams.cut_off()


def _bind(host: str, port: int) -> socket.socket:
    try:
        return bind_socket(host, port)
    except OSError as error:
        raise PolicyServerError(
            f"Port {port} on {host} is in use, or the address is not this machine's ({error.strerror}).",
            "Choose another with --port, or --port 0 for a free one.",
        ) from error
