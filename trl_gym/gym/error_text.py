"""What a NeMo Gym server meant by its HTTP 500: pure functions on answer bodies, no I/O.

Gym hands an error on as the `repr` of the bytes that it received, inside a JSON string, once per server on the way:

    "Hit an exception in SimpleAgent___math_agent calling an inner server: b'\\"Hit an exception in VLLMModel___…\\"'"

so that two hops already mean three layers of quotes. `explain` peels them off.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from trl_gym.errors import FailureKind

MAX_TEXT_CHARS = 2000  # of one message: a verifier may put a whole response into its exception

# `<class>___<instance name>` is the session key by which Gym's servers call themselves.
_HOP = re.compile(
    r"^Hit an exception in (?:\S+?___)?(?P<server>.+?) calling an inner server: (?P<answer>.*)$", re.DOTALL
)

# Words of aiohttp, requests, Ray and of Gym's own middleware for: the cause is not the environment's code.
_INFRASTRUCTURE = re.compile(
    r"Cannot connect to host|Connect call failed|Connection (?:refused|reset|closed|aborted)|Connection\w*Error|"
    r"Client(?:Connector|OS|Payload)\w*Error|Server(?:Disconnected|Timeout)\w*Error|Server disconnected|"
    r"Broken pipe|BrokenPipeError|Too many open files|No space left|Out of memory|MemoryError|"
    r"An unknown error occurred|Request was cancelled",
    re.IGNORECASE,
)
_NO_CAUSE = frozenset({"", "Internal Server Error"})


def explain(body: bytes, status: int) -> tuple[FailureKind, str]:
    """One sentence and a kind for an HTTP answer that is not 200.

    Args:
        body: The answer's body as received.
        status: Its HTTP status.

    Returns:
        INFRASTRUCTURE when the innermost message speaks of connections, or when there is no message; otherwise
        ENVIRONMENT. The sentence names the servers on the way, outermost first.
    """
    servers, message = unwrap(body)
    if message in _NO_CAUSE:
        text = f"HTTP {status} without a cause (Gym's log may have it)"
        kind = FailureKind.INFRASTRUCTURE
    else:
        text = _shorten(message)
        is_infrastructure = status in (404, 502, 503, 504) or _INFRASTRUCTURE.search(message)
        kind = FailureKind.INFRASTRUCTURE if is_infrastructure else FailureKind.ENVIRONMENT
        if status != 500:
            text = f"HTTP {status}: {text}"
    if servers:
        text = f"{' → '.join(servers)} → the server that it called: {text}"
    return kind, text


def unwrap(body: bytes) -> tuple[list[str], str]:
    """The servers that handed the error on, outermost first and each once, and the innermost message."""
    servers: list[str] = []
    text = _message(body)
    while hop := _HOP.match(text):
        if hop["server"] not in servers[-1:]:  # an agent calls its own /v1/responses
            servers.append(hop["server"])
        answer = _bytes_literal(hop["answer"])
        if answer is None:  # cut off by a logger, or quoted in a way that we do not know: better raw than lost
            return servers, hop["answer"].strip()
        text = _message(answer)
    return servers, text


def _bytes_literal(text: str) -> bytes | None:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return None
    return value if isinstance(value, bytes) else None


def _message(body: bytes) -> str:
    """The text of an error body: a JSON string, `{"detail": …}` (FastAPI), `{"error": {"message": …}}` (OpenAI)."""
    text = body.decode(errors="replace").strip()
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if isinstance(value, str):
        return value.strip()
    for key in ("error", "detail", "message"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return value.strip() if isinstance(value, str) else _compact(value)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_TEXT_CHARS else f"{text[:MAX_TEXT_CHARS]}… ({len(text)} characters)"
