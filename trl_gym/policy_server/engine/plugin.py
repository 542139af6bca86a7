"""Register trl-gym with vLLM, which loads this module in each of its processes (entry point `vllm.general_plugins`).

Every vLLM of the Python environment loads it, also one that trl-gym did not start: it imports nothing heavy, and never
ends such a process.

`register` makes the `file` weight transfer engine known. In the engines of our own servers, which `entry.py` marks
with an environment variable, it also starts a thread that ends the engine when its parent ends. `trl_gym.supervisor`
kills what a server leaves behind; if it is killed together with the server, vLLM's engines would wait forever with the
GPU's memory (run with 0.31). A parent-death signal is tied to the thread that forked, which vLLM chooses; so each
engine looks at its parent itself (`leave_the_server`, where it was forked). Processes that load no plugin are not
reached: the coordinator of a data parallel server, a process without a device.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from typing import Any

ENV_OWN_SERVER = "TRL_GYM_OWN_SERVER"  # "1" in a policy server that trl-gym started, and in its engines
ENGINE_NAME = "file"
_LOOK_EVERY_S = 1.0
_THREAD_NAME = "trl-gym-parent"
_logger = logging.getLogger("trl_gym.plugin")


def register() -> None:
    """Register the `file` engine; in one of our own, also `end_with_parent`, `use_scratch`. vLLM may call this often.

    A vLLM whose factory differs from the supported one starts without the engine, unless it is our own server.
    """
    end_with_parent()
    use_scratch()
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

        # `_registry` is private. The public function raises a ValueError for a name that is registered, without saying
        # which engine has it.
        if ENGINE_NAME not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(
                ENGINE_NAME, "trl_gym.policy_server.engine.file_engine", "FileWeightTransferEngine"
            )
    except (ImportError, AttributeError, TypeError) as error:
        if _is_own_server():
            raise
        _logger.info("This vLLM does not take trl-gym's weight transfer engine `%s`: %r", ENGINE_NAME, error)


def end_with_parent(parent: int | None = None) -> None:
    """Kill this process as soon as its parent has ended, if it is a child of a server of ours. May be called often.

    Args:
        parent: Its pid; default: that of the process that started this one through `multiprocessing`, if one did.
    """
    if parent is None and (started_by := multiprocessing.parent_process()) is not None:
        parent = started_by.pid
    if parent is None or not _is_own_server():
        return
    if all(thread.name != _THREAD_NAME for thread in threading.enumerate()):
        threading.Thread(target=_watch, args=(parent,), name=_THREAD_NAME, daemon=True).start()


def leave_the_server(sock: socket.socket) -> None:
    """In an engine that was just forked from the server: give up what is the server's, and end with it.

    A forked process loads no plugin: the server has loaded them. It has the server's listening socket, which would
    keep the port, and its signal handlers, of which the event loop's would wake the server instead.
    """
    sock.close()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(os.getppid())


def use_scratch() -> None:
    """In a server of ours and its engines: have sockets and temporary files in the folder that is removed at the end.

    One that is killed leaves them. vLLM's variable is for its sockets alone: its `vllm_dist_…` and what libraries
    have (`pymp-…`) go where `tempfile` says. TMPDIR would move more: Ray finds its cluster there.
    """
    from trl_gym.given import VLLM_SOCKET_VARIABLE
    from trl_gym.policy_server.command import ENV_SCRATCH

    if _is_own_server() and (scratch := os.environ.get(ENV_SCRATCH)):
        os.environ[VLLM_SOCKET_VARIABLE] = tempfile.tempdir = scratch


def answer_any_text() -> None:
    """In a server of ours: write half of a surrogate as JSON can, by its escape. A policy can say one in the arguments
    of a call, and the server would refuse to answer with what it has sampled."""
    from starlette.responses import JSONResponse

    def render(self: JSONResponse, content: Any) -> bytes:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")  # in a text of JSON, that is the escape

    JSONResponse.render = render  # type: ignore[method-assign]


def _is_own_server() -> bool:
    return os.environ.get(ENV_OWN_SERVER) == "1"


def _watch(pid: int) -> None:
    while os.getppid() == pid:
        time.sleep(_LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGKILL)  # not an exit, which would wait for what waits for the parent
