"""Policy servers forked from one process that has imported vLLM: importing takes longer than all else in a start.

    trainer ──► supervisor ──► this file as `stand_in` ──socket──► this file as `serve_forks` ──fork──► the server

The stand-in is where the server would be: it hands its arguments, environment, folder and files over, passes signals
on, and ends as the server ends; when it is killed, the server ends too. Tests of how a user starts a server, and of
its process tree, do not use it.

    python -m tests.e2e.warm_vllm SOCKET                 # imports, then forks a server per connection
    python warm_vllm.py SOCKET LISTEN_FD [ARGUMENT …]    # the stand-in; standard library only
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import traceback

# Beside what `engine/entry.py` imports: what vLLM imports while it starts an engine on a CPU.
LATER = ("vllm.v1.engine.async_llm", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen3")


def stand_in(path: str, listen_fd: int, arguments: list[str]) -> int:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        told = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
        socket.send_fds(connection, [len(told).to_bytes(8, "big")], [0, 1, 2, listen_fd])
        connection.sendall(told)
        pid = int.from_bytes(received(connection, 8), "big")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        status = int.from_bytes(received(connection, 8), "big", signed=True)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    return status


def received(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        part = connection.recv(num_bytes - len(data))
        if not part:
            raise EOFError("the other side has ended")
        data += part
    return data


def serve_forks(path: str) -> None:
    import importlib

    from trl_gym.policy_server.command import DEFAULT_ENVIRONMENT

    os.environ.update(DEFAULT_ENVIRONMENT)  # vLLM reads some of it when it is imported
    import trl_gym.policy_server.engine.entry  # noqa: F401

    for name in LATER:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:  # one process per server waits for it, so that this one only forks
                listening.close()
                os._exit(supervise(connection))
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def supervise(connection: socket.socket) -> int:
    """Fork the server, and say how it ended. When the stand-in ends first, kill it."""
    head, files, _, _ = socket.recv_fds(connection, 8, 4)
    told = json.loads(received(connection, int.from_bytes(head, "big")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        become(told, files)
    for file in files:
        os.close(file)
    connection.sendall(pid.to_bytes(8, "big"))

    def kill_with_the_stand_in() -> None:
        with contextlib.suppress(OSError):
            connection.recv(1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    threading.Thread(target=kill_with_the_stand_in, daemon=True).start()
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
    return 0


def become(told: dict, files: list[int]) -> None:
    """Be the server that the stand-in stands for."""
    from trl_gym.policy_server.__main__ import main

    code = 1
    try:
        for number, file in enumerate(files[:3]):
            os.dup2(file, number)
        os.chdir(told["folder"])
        os.environ.clear()
        os.environ.update(told["environment"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        arguments = [str(files[3]) if argument == "LISTEN_FD" else argument for argument in told["arguments"]]
        code = main(arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve_forks(sys.argv[1])
    else:
        sys.exit(stand_in(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
