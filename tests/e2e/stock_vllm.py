"""vLLM's own server, forked from a process that has imported vLLM, as its engine is: executed, both would import it.

python -m tests.e2e.stock_vllm [any flag of vllm.entrypoints.openai.api_server]
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from tests.fork_ranks import free_port
from trl_gym.policy_server.fork_server import ForkServer
from trl_gym.processes import ChildProcess

# What a small machine needs, see `trl_gym/policy_server/engine/entry.py`; nothing that a gateway could profit from.
_SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def start(forks: ForkServer, model: Path, log: Path, *flags: str, **variables: str) -> tuple[ChildProcess, str]:
    """Start it without a key, with more variables, and return it with its URL."""
    port = free_port()
    argv = [sys.executable, "-m", "tests.e2e.stock_vllm", "--model", str(model), "--served-model-name", "policy"]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    argv += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--distributed-executor-backend", "uni"]
    env = {**variables, "VLLM_API_KEY": None}
    process = ChildProcess("stock vLLM", [*argv, *flags], log_path=log, env=env, start=forks.fork)
    return process, f"http://127.0.0.1:{port}"


def main() -> None:
    import torch
    from vllm.platforms import current_platform

    os.environ |= _SMALL
    torch.compiler.set_stance("force_eager")  # the import has read TORCHDYNAMO_DISABLE
    if current_platform.is_cpu():
        platform: Any = type(current_platform)
        configure = platform.check_and_update_config

        def and_fork(config: Any) -> None:
            configure(config)
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # instead of the spawn that it asks for

        platform.check_and_update_config = staticmethod(and_fork)
    os.register_at_fork(after_in_child=_be_an_engine)
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


def _be_an_engine() -> None:
    import torch

    signal.set_wakeup_fd(-1)  # its signals would wake the server's event loop
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))


if __name__ == "__main__":
    main()
