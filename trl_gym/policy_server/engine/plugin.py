"""What vLLM loads in each of its processes (entry point `vllm.general_plugins`): the `file` weight transfer engine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

# --------------------------------------------------------------------------------------------------------------------
# vLLM's engine processes end with the process that started them, even when that is killed.
#
# `trl_gym.supervisor` kills what a server leaves behind. When it is killed together with the server, nobody is left to
# do that, and vLLM's engines would wait for ever, with the GPU's memory (run with 0.31). A parent-death signal is tied
# to the thread that forked, which is vLLM's to choose; so each engine looks at its parent itself.
#
# What loads no plugin is not reached: the coordinator of a data parallel server, a process without a device.

_LOOK_EVERY_S = 1.0
_THREAD_NAME = "trl-gym-parent"


def end_with_parent() -> None:
    """Kill this process as soon as its parent has ended, if `multiprocessing` started it. May be called often."""
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == _THREAD_NAME for thread in threading.enumerate()):
        return
    threading.Thread(target=_watch, args=(parent.pid,), name=_THREAD_NAME, daemon=True).start()


def _watch(pid: int) -> None:
    while os.getppid() == pid:
        time.sleep(_LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGKILL)  # not an exit: it would wait for what waits for the parent


ENGINE_NAME = "file"


def register() -> None:
    """Register the engine. vLLM may call this several times in one process."""
    end_with_parent()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    # `_registry` is private; the public function has no "if not there yet", and its ValueError does not say which
    # engine is registered under the name.
    if ENGINE_NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            ENGINE_NAME, "trl_gym.policy_server.engine.file_engine", "FileWeightTransferEngine"
        )
