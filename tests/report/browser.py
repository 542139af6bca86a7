"""Headless Chromium through its DevTools protocol, over aiohttp: no driver, no further package."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
_START_S = 60.0
_ANSWER_S = 60.0


class PageError(AssertionError):
    """The page threw, or did not get where it was expected to."""


def find_browser() -> str:
    """Path of a Chromium.

    Raises:
        FileNotFoundError: There is none.
    """
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise FileNotFoundError(f"none of {', '.join(NAMES)} is on PATH: run `python3 scripts/setup.py --test`")
    return found


class Browser:
    """One tab. Every call waits for its answer.

    Attributes:
        errors: Exceptions that pages threw, and what the console said as errors; violations of the policy included.
        requests: Addresses that pages asked for.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, loop: asyncio.AbstractEventLoop) -> None:
        self._socket, self._loop = socket, loop
        self._number = 0
        self._session: str | None = None
        self._frames: list[str] = []
        self.errors: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        # A sandboxed frame has a process of its own, and is spoken to in a session of its own.
        self.send("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        return self._loop.run_until_complete(asyncio.wait_for(self._send(method, params), _ANSWER_S))

    async def _send(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        await self._socket.send_json({"id": self._number, "method": method, "params": params, **session})
        while True:
            message = json.loads((await self._socket.receive()).data)
            if message.get("id") == self._number:
                if "error" in message:
                    raise PageError(f"{method}: {message['error']}")
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(str(details.get("exception", {}).get("description", details["text"])))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Target.attachedToTarget":
            self._frames.append(params["sessionId"])

    def run(self, expression: str) -> Any:
        """Value of a JavaScript expression; a promise is waited for.

        Raises:
            PageError: It threw.
        """
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise PageError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression is true.

        Raises:
            PageError: None within a minute.
        """
        end = time.monotonic() + _ANSWER_S
        while not self._is_true(expression):
            if time.monotonic() > end:
                raise PageError(f"never true: {expression}; errors: {self.errors}; page: {self.run(_TEXT)[:800]}")
            time.sleep(0.02)

    def _is_true(self, expression: str) -> bool:
        try:
            return bool(self.run(f"Boolean({expression})"))
        except PageError as error:
            if "navigated" in str(error) or "context" in str(error):  # a page that reads its file again
                return False
            raise

    @contextlib.contextmanager
    def inside_frame(self) -> Iterator[None]:
        """What is said in here is said to the newest frame with a process of its own."""
        end = time.monotonic() + _ANSWER_S
        while not self._frames:
            self.run("1")
            if time.monotonic() > end:
                raise PageError("no frame with a process of its own")
        self._session = self._frames[-1]
        try:
            yield
        finally:
            self._session = None

    def open(self, path: Path, hash_: str = "") -> None:
        """Open a file and wait until its first view is there."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=path.resolve().as_uri() + hash_)
        self.wait("document.querySelector('#view') && document.querySelector('#bar nav') !== null")

    def go(self, hash_: str) -> None:
        """Follow a link of the page."""
        self.run(f"location.hash = {json.dumps(hash_)}")
        self.wait(f"location.hash === {json.dumps(hash_)} || true")

    def text(self, selector: str = "#view") -> str:
        return self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def texts(self, selector: str) -> list[str]:
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.innerText.trim())")

    def press(self, key: str) -> None:
        """One key."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, text=text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def resize(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def use_scheme(self, scheme: str) -> None:
        """`"light"` or `"dark"`."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


_TEXT = "document.body?.innerText ?? ''"


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with an empty profile; it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="trl-gym-browser-", ignore_cleanup_errors=True) as profile:
        log = Path(profile) / "log"
        with open(log, "wb") as output:
            command = [find_browser(), *_FLAGS, f"--user-data-dir={profile}/data", "--remote-debugging-port=0"]
            process = subprocess.Popen([*command, "about:blank"], stdout=output, stderr=output, start_new_session=True)
        loop = asyncio.new_event_loop()
        try:
            port = _port(Path(profile) / "data" / "DevToolsActivePort", process, log)
            session = loop.run_until_complete(_session())
            try:
                yield Browser(loop.run_until_complete(_connect(session, port)), loop)
            finally:
                loop.run_until_complete(session.close())
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # with its helpers, which would go on writing into the profile
            process.wait()
            loop.close()


def _port(file: Path, process: subprocess.Popen[bytes], log: Path) -> int:
    end = time.monotonic() + _START_S
    while not (file.exists() and file.read_text().count("\n")):
        if process.poll() is not None or time.monotonic() > end:
            raise PageError(f"Chromium did not start (exit code {process.poll()}): {log.read_text()[-2000:]}")
        time.sleep(0.02)
    return int(file.read_text().split()[0])


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


async def _connect(session: aiohttp.ClientSession, port: int) -> aiohttp.ClientWebSocketResponse:
    async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
        pages = [target for target in await response.json(content_type=None) if target["type"] == "page"]
    return await session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
