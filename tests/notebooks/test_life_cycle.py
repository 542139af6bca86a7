"""Servers in a real kernel: cells that are run again or interrupted, kernels that are restarted, killed or shut down.

The policy server is a stand-in that answers at once: what is tested is who stops it, not what it serves.
"""

from __future__ import annotations

import contextlib
import json
import re
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client.manager import KernelManager

from tests.conftest import wait_for
from tests.policy_server.test_server_process import STAND_IN

TIMEOUT_S = 180.0
SILENT = "import time; time.sleep(600)"  # a server that never answers

PREPARE = """
import asyncio, os, sys, time
from pathlib import Path
from trl_gym import PolicyServer
from trl_gym.policy_server import command

def serve(code, *args):
    def stand_in(*_, listen_fd, **__):
        return [sys.executable, "-c", code, str(listen_fd), *args]
    command.serve_command = stand_in
    return PolicyServer({model!r}, log_dir={logs!r})
"""


class Kernel:
    """A kernel that runs cells, with every process that is started below it."""

    def __init__(self, folder: Path) -> None:
        model = folder / "model"
        model.mkdir()
        for name in ("config.json", "tokenizer.json"):
            (model / name).write_text("{}")
        self._prepare = PREPARE.format(model=str(model), logs=str(folder / "logs"))
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel()
        self._connect()

    def _connect(self) -> None:
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=TIMEOUT_S)
        self.run(self._prepare)

    def run(self, code: str) -> str:
        """Run a cell. Returns what it printed; the name of its exception when it has one."""
        printed: list[str] = []

        def on_output(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
                printed.append(message["content"]["text"])

        reply = self.client.execute_interactive(
            textwrap.dedent(code), timeout=TIMEOUT_S, output_hook=on_output, store_history=True
        )
        content = reply["content"]
        return "".join(printed).strip() if content["status"] == "ok" else content["ename"]

    def run_interrupted(self, code: str, when: Callable[[], bool]) -> str:
        """Run a cell and press Jupyter's stop button once `when` holds."""

        def press() -> None:
            wait_for(when)
            self.manager.interrupt_kernel()

        presser = threading.Thread(target=press)
        presser.start()
        try:
            return self.run(code)
        finally:
            presser.join()

    def servers(self) -> list[psutil.Process]:
        """Everything that runs below the kernel."""
        kernel = psutil.Process(self.manager.provisioner.process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            return [process for process in kernel.children(recursive=True) if is_running(process)]
        return []

    def restart(self) -> None:
        self.client.stop_channels()
        self.manager.restart_kernel()
        self._connect()

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(processes: list[psutil.Process]) -> None:
    assert processes
    wait_for(lambda: not any(map(is_running, processes)))


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    made = Kernel(tmp_path)
    yield made
    made.close()


START = f"""
policy = serve({STAND_IN!r}, "right").start()
policy.wait_ready()
asyncio.get_running_loop()  # a cell runs inside the kernel's event loop
print(policy.state.value)
"""


def test_a_cell_that_is_run_again_replaces_its_server(kernel: Kernel) -> None:
    assert kernel.run(START) == "ready"
    first = kernel.servers()
    assert len(first) == 3  # guard, supervisor and server
    assert kernel.run(START) == "ready"
    gone(first)
    assert len(kernel.servers()) == 3


def test_an_interrupted_start_leaves_nothing_and_can_be_repeated(kernel: Kernel) -> None:
    waiting = f"policy = serve({SILENT!r}).start()\npolicy.wait_ready()"
    assert kernel.run_interrupted(waiting, lambda: len(kernel.servers()) == 3) == "KeyboardInterrupt"
    wait_for(lambda: kernel.servers() == [])
    assert kernel.run(START) == "ready"
    assert len(kernel.servers()) == 3


def test_an_interrupted_cell_leaves_the_server_of_another_cell_alone(kernel: Kernel, tmp_path: Path) -> None:
    assert kernel.run(START) == "ready"
    servers = kernel.servers()
    begun = tmp_path / "begun"
    busy = f"Path({str(begun)!r}).touch()\ntime.sleep(600)"
    assert kernel.run_interrupted(busy, begun.exists) == "KeyboardInterrupt"
    assert all(map(is_running, servers))
    assert kernel.run("policy.check(); print(policy.state.value)") == "ready"


@pytest.mark.parametrize("how", ["restart", "shutdown", "kill"])
def test_nothing_outlives_the_kernel(kernel: Kernel, how: str) -> None:
    assert kernel.run(START) == "ready"
    servers = kernel.servers()
    if how == "restart":
        kernel.restart()
        assert kernel.servers() == []
    elif how == "shutdown":
        kernel.client.shutdown()
    else:
        psutil.Process(kernel.manager.provisioner.process.pid).kill()
    gone(servers)


def test_progress_is_a_bar_and_lines_that_are_drawn_again(kernel: Kernel) -> None:
    """Without ipywidgets, whose absence makes rich's own bar invisible."""
    drawn: list[tuple[str, str]] = []

    def on_output(message: dict[str, Any]) -> None:
        html = message["content"].get("data", {}).get("text/html")
        if html:
            drawn.append((message["msg_type"], html))

    code = """
    from trl_gym.progress import make_progress, working
    with working("loading <b>it</b>", "seconds"):
        pass
    progress = make_progress(live=True)
    progress.start(20, 0)
    progress.evaluated(0, {"reward": 0.5, "success": 0.25})
    progress.step(3, {"reward": 0.75, "rollouts/failed_fraction": 0.5})
    progress.phase("<b>weight_sync</b>")
    progress.stop()
    progress.evaluated(3, {"reward": 0.875})
    """
    reply = kernel.client.execute_interactive(textwrap.dedent(code), timeout=TIMEOUT_S, output_hook=on_output)
    assert reply["content"]["status"] == "ok", json.dumps(reply["content"])
    texts = [html for _, html in drawn]
    begun = ["loading", "step 0/20", "<div style", "evaluation at step 3: reward 0.875"]
    displayed = [html for kind, html in drawn if kind == "display_data"]
    assert [text in html for text, html in zip(begun, displayed, strict=True)] == [True] * 4
    assert "loading &lt;b&gt;it&lt;/b&gt; (seconds)" in texts[0] and re.search(r"it&lt;/b&gt;: [\d.]+ s", texts[1])
    assert "step  3/20: reward 0.750, failed 50%" in texts[-4] and "evaluation at step 0: reward 0.500" in texts[-4]
    assert 'value="3" max="20"' in texts[-3]
    assert "step 3/20" in texts[-2] and not any("<b>" in text for text in texts)
    assert kernel.run("print(type(make_progress(live=False)).__name__)") == "LineProgress"
