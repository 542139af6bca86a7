"""Ranks that share a gloo group, forked from one process that has imported what they run: importing takes longest.

    python -m tests.fork_ranks NUM_RANKS MODULE [ARGUMENT …]        # each rank calls the module's `main(*arguments)`

Ends as `torchrun` does: with 1 once a rank has failed, and the others are killed.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback

from trl_gym.processes import bind_socket


def run_rank(rank: int, num_ranks: int, port: int, module: str, arguments: list[str]) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    try:
        importlib.import_module(module).main(*arguments)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(num_ranks: int, module: str, arguments: list[str]) -> int:
    importlib.import_module(module)
    with bind_socket() as free:
        port = free.getsockname()[1]
    running = set()
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            code = run_rank(rank, num_ranks, port, module, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        running.add(pid)
    failed = False
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status != 0 and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
