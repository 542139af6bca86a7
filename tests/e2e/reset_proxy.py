"""A TCP proxy that resets connections now and then, as a network in trouble does."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from urllib.parse import urlsplit


class ResetProxy:
    """Runs in a thread of its own, from `with` to `with`'s end.

    Args:
        target: URL to forward to.
        share: Of the pieces of data that pass, how many end their connection instead.
        seed: Of what is drawn.

    Attributes:
        url: What to call instead of `target`.
        num_resets: Connections reset so far.
    """

    def __init__(self, target: str, *, share: float, seed: int = 0) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._share, self._rng = share, random.Random(seed)
        self.num_resets = 0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> ResetProxy:
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._connection, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: object) -> object:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _stop(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        ways = [self._forward(reader, far_writer, writer), self._forward(far_reader, writer, writer)]
        tasks = [asyncio.create_task(way) for way in ways]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for end in (writer, far_writer):
                end.close()

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, near: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if self._rng.random() < self._share:
                    self.num_resets += 1
                    # No lingering: closing sends RST, not FIN.
                    near.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                    )
                    near.transport.abort()
                    return
                writer.write(data)
                await writer.drain()
