"""`trl-gym gateway`: exact prompts in front of vLLM servers that somebody else runs.

    Gym, trainer ──► gateway: OnPolicyMiddleware ──► UpstreamApp ──HTTP──► vLLM, vLLM, …

The middleware is the one that `trl-gym serve` puts inside the server; here its inner application asks over the network
(`upstreams.py`). Nothing of ours runs in the upstreams, and only their public routes are used.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import uvicorn

from trl_gym.errors import ConfigError, PolicyServerError
from trl_gym.policy_server.entry import is_loopback
from trl_gym.policy_server.forwarding import Answering, UpstreamLostError
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings
from trl_gym.policy_server.middleware.http import App, Receive, Reply, Scope, Send
from trl_gym.policy_server.upstream_checks import check_upstreams, takes_prompt_field
from trl_gym.policy_server.upstreams import UpstreamApp
from trl_gym.processes import bind_socket

# As in `entry.DEFAULT_ENVIRONMENT`: clients keep connections open between optimizer steps.
_KEEP_ALIVE_S = 600
_GRACE_S = 2  # running requests are cut off at once; this is for what still does not end
_LOOK_EVERY_S = 0.1

_logger = logging.getLogger("trl_gym.gateway")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """The arguments of `trl-gym gateway`.

    Attributes:
        upstreams: URLs of vLLM's OpenAI servers, with or without `/v1`; all must serve the same model.
        host: Address to listen on. One that other machines can reach demands `api_key`.
        port: Port to listen on; 0 lets the operating system choose.
        api_key: Bearer token that the gateway demands on every route but `/health`.
        upstream_api_key: Bearer token that it sends to the upstreams.
        start_timeout_s: How long to wait for the upstreams to answer.
        log_level: One of logging's names, lower case; `debug` logs every request.
    """

    upstreams: Sequence[str]
    host: str = "127.0.0.1"
    port: int = 0
    api_key: str | None = None
    upstream_api_key: str | None = None
    start_timeout_s: float = 600.0
    log_level: str = "warning"


def run(options: GatewayOptions, *, ready: Callable[[str], None], note: Callable[[str], None]) -> None:
    """Serve until SIGINT (raises `KeyboardInterrupt`) or SIGTERM (ends the process), cutting off what is running.

    Args:
        options: See there.
        ready: Called once with the base URL when the gateway answers.
        note: Called with lines for the user: what is waited for, and warnings.

    Raises:
        ConfigError: If a URL or the address cannot work.
        PolicyServerError: If the port is taken or an upstream cannot be used.
    """
    urls = upstream_urls(options.upstreams)
    if not is_loopback(options.host) and not options.api_key:
        raise ConfigError(
            f"--host {options.host or '(every interface)'} can be reached from other machines, and the gateway passes "
            "on routes that replace the policy's weights: give --api-key too, or set $VLLM_API_KEY"
        )
    logging.basicConfig(level=options.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    with _bind(options.host, options.port) as sock:
        asyncio.run(_serve(urls, options, sock, ready, note))


def upstream_urls(given: Sequence[str]) -> list[str]:
    """Root URLs without `/v1` and trailing slashes.

    Raises:
        ConfigError: With every URL that cannot be one, and why.
    """
    roots = [url.rstrip("/").removesuffix("/v1").rstrip("/") for url in given]
    problems = [f"{problem}" for url, root in zip(given, roots, strict=True) if (problem := _url_problem(url, root))]
    problems += [f"--upstream {root} is given twice" for root in sorted({r for r in roots if roots.count(r) > 1})]
    if not roots:
        problems.append("no --upstream is given; name the URL of at least one vLLM server")
    if problems:
        raise ConfigError("the gateway cannot be started:\n" + "\n".join(f"  - {line}" for line in problems))
    return roots


def build_app(upstreams: UpstreamApp, settings: Settings) -> App:
    """The ASGI application of the gateway.

    Args:
        upstreams: The inner application.
        settings: Of the middleware.
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


async def _serve(
    urls: list[str],
    options: GatewayOptions,
    sock: socket.socket,
    ready: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    key = options.upstream_api_key
    facts = await check_upstreams(urls, api_key=key, timeout_s=options.start_timeout_s, note=note)
    upstreams = UpstreamApp(urls, api_key=key)
    settings = Settings(
        api_keys=(options.api_key,) if options.api_key else (), has_prompt_field=takes_prompt_field(facts)
    )
    config = uvicorn.Config(
        build_app(upstreams, settings),
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
    base_url = f"http://{_reachable(options.host)}:{sock.getsockname()[1]}/v1"
    attending = asyncio.create_task(_attend(server, upstreams, lambda: ready(base_url)))
    try:
        await server.serve(sockets=[sock])
    finally:
        attending.cancel()
        await asyncio.gather(attending, return_exceptions=True)


async def _attend(server: uvicorn.Server, upstreams: UpstreamApp, ready: Callable[[], None]) -> None:
    """Say when the server answers, and cut running requests off when it is to end: it would wait for them."""
    while not (server.started or server.should_exit):
        await asyncio.sleep(_LOOK_EVERY_S)
    if server.started:
        ready()
    while not server.should_exit:
        await asyncio.sleep(_LOOK_EVERY_S)
    upstreams.cut_off()


def _url_problem(url: str, root: str) -> str | None:
    try:
        parts = urlsplit(root)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return f"--upstream {url!r} is no URL"
    if parts.username or parts.password:
        return "an --upstream has a user name or password in its URL; use --upstream-api-key"
    if parts.scheme not in ("http", "https") or not has_host or parts.query or parts.fragment:
        return f"--upstream {url!r} must look like http://host:port or http://host:port/v1"
    return None


def _bind(host: str, port: int) -> socket.socket:
    try:
        return bind_socket(host, port)
    except OSError as error:
        raise PolicyServerError(
            f"port {port} on {host} is in use, or the address is not this machine's ({error.strerror}); choose "
            "another with --port, or --port 0 for a free one"
        ) from error


def _reachable(host: str) -> str:
    """The address under which we reach a server that listens on `host`."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
