"""The wrapped application as one request sees it: ask its own HTTP routes, in process, on behalf of the client."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from trl_gym.policy_server.middleware.http import App, ClientGoneError, Message, Receive, Reply, Scope, ask
from trl_gym.policy_server.middleware.templates import RenderRefusedError


class AnsweredError(Exception):
    """The request ends here with this reply (an error of the server's or ours)."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.body.decode(errors="replace"))
        self.reply = reply


class AbortedError(Exception):
    """The call was aborted from our side."""


@dataclass(frozen=True, slots=True)
class Inner:
    """The application behind the middleware, for the time of one request.

    Attributes:
        app: It.
        scope: Of the client's request: its headers go along.
        receive: Of the client's request: its hang-up cancels what we ask.
    """

    app: App
    scope: Scope
    receive: Receive

    async def ask(self, method: str, path: str, payload: dict[str, Any] | bytes = b"") -> Reply:
        """Any answer. Raises `ClientGoneError`."""
        return await ask(self.app, self.scope, self.receive, method, path, payload)

    async def ask_json(self, method: str, path: str, payload: dict[str, Any] | bytes = b"") -> Any:
        """JSON of an answer with status 200. Raises `AnsweredError` with any other."""
        reply = await self.ask(method, path, payload)
        if not reply.ok:
            raise AnsweredError(reply)
        return reply.json()

    async def tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        """`POST /tokenize`. Raises `RenderRefusedError` with the server's words."""
        reply = await self.ask("POST", "/tokenize", body)
        if not reply.ok:
            raise RenderRefusedError(reply.error_text())
        return reply.json()

    async def ask_until(self, abort: asyncio.Event, method: str, path: str, payload: dict[str, Any]) -> Reply:
        """As `ask`, but hang up when `abort` is set. Raises `AbortedError` then."""

        async def receive() -> Message:
            client, aborted = asyncio.ensure_future(self.receive()), asyncio.ensure_future(abort.wait())
            try:
                await asyncio.wait({client, aborted}, return_when=asyncio.FIRST_COMPLETED)
                return {"type": "http.disconnect"} if abort.is_set() else client.result()
            finally:
                client.cancel()
                aborted.cancel()

        try:
            reply = await ask(self.app, self.scope, receive, method, path, payload)
        except ClientGoneError as error:
            if abort.is_set():
                raise AbortedError from error
            raise
        return reply
