"""Gym's own two HTTP middlewares without Starlette's per-request task group. Imported by `host.py` only.

Every Gym server wraps its application in two functions registered with `@app.middleware("http")`: one makes sure that
the session has an id, one turns exceptions into answers. Starlette runs such a function through `BaseHTTPMiddleware`,
which starts a task and a memory stream per request and layer, so that the function may read or replace the response.
Gym's two functions return the response as it is. `DirectMiddleware` runs the same functions with the application
called in place, to the same effect. There are two layers per server and about seven requests in a two-turn rollout.

Middleware that a server adds for itself is left alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

GYM_FUNCTIONS = frozenset({"add_session_id", "exception_handling_middleware"})

Dispatch = Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]


class _AlreadySent(Response):
    """Stands for the response that went to the client while `call_next` ran."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        return


class DirectMiddleware:
    """Runs a `dispatch` function that passes the response on unchanged or, after an exception, makes one."""

    def __init__(self, app: ASGIApp, dispatch: Dispatch) -> None:
        self.app = app
        self.dispatch = dispatch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_started = False
        error: Exception | None = None

        async def observed_send(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        async def call_next(_request: Request) -> Response:
            nonlocal error
            try:
                await self.app(scope, receive, observed_send)
            except Exception as raised:
                error = raised
                raise
            return _AlreadySent()

        response = await self.dispatch(Request(scope, receive), call_next)
        if error is not None and is_started:  # too late for another answer: let the server close the connection
            raise error
        await response(scope, receive, send)


def lighten(app: Starlette) -> None:
    """Replace Gym's two middlewares in an application that serves no request yet."""
    for index, middleware in enumerate(app.user_middleware):
        if middleware.cls is BaseHTTPMiddleware and _is_gyms(middleware.kwargs.get("dispatch")):
            app.user_middleware[index] = Middleware(DirectMiddleware, dispatch=middleware.kwargs["dispatch"])


def _is_gyms(dispatch: Any) -> bool:
    module, name = getattr(dispatch, "__module__", ""), getattr(dispatch, "__name__", "")
    return module == "nemo_gym.server_utils" and name in GYM_FUNCTIONS
