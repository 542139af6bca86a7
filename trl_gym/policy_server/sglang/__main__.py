"""Run SGLang's server with our gateway in front, as one server with one log.

    python -m trl_gym.policy_server.sglang MODEL --sglang-python PYTHON [--host H] [--port P] [--listen-fd N]
                                           [--served-model-name NAME] [any flag of `sglang.launch_server`]

`PolicyServer` spawns this; its contract with the owner is that of `trl_gym.policy_server`. SGLang listens on a
loopback port and demands a key that is made here, for its routes replace weights and unpickle what they are sent. The
key stands in a file that nobody else can read, and not in what SGLang logs, which passes through here. Whichever of
the two processes ends, the other one does.
"""

from __future__ import annotations

import argparse
import getpass
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trl_gym.errors import TrlGymError
from trl_gym.policy_server import gateway
from trl_gym.policy_server.command import ENV_NONCE, ENV_SCRATCH, KEY_VARIABLE, new_key
from trl_gym.policy_server.sglang.server import find_python
from trl_gym.processes import Launch, Supervisor, bind_socket, execute
from trl_gym.threads import NUM_THREADS, threads_here

_GRACE_S = 3.0  # from SIGINT to SIGKILL; shorter than the owner's patience with us
_FOREVER_S = 7 * 24 * 3600.0  # the owner knows how long it waits for a model to load
# Of ours, and nothing to SGLang. The last one makes it report log-probabilities before temperature.
_NOT_INHERITED = (KEY_VARIABLE, ENV_NONCE, ENV_SCRATCH, "SGLANG_RETURN_ORIGINAL_LOGPROB")


@dataclass(frozen=True, slots=True)
class _Sglang:
    """SGLang's process. Its supervisor ends it when this process is gone."""

    supervisor: Supervisor
    death_pipe: int  # write end
    is_stopped: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        self.is_stopped.set()
        os.close(self.death_pipe)
        self.supervisor.wait()

    def pass_on(self, log_fd: int, key: str, forget_key: Callable[[], None]) -> None:
        """Write what SGLang writes, without its key, until all of its processes have ended; end this process with
        them: the main thread may be anywhere, and connections break off as those of a server that died."""
        with os.fdopen(log_fd, "rb") as lines:
            for line in lines:
                sys.stdout.buffer.write(line.replace(key.encode(), b"***"))
                sys.stdout.buffer.flush()
        status = self.supervisor.wait()
        if not self.is_stopped.is_set():
            forget_key()
            _say(f"SGLang's server has ended (exit status {status})")
            os._exit(status or 1)


def main(argv: Sequence[str]) -> int:
    """Serve until SIGINT or SIGTERM, or until SGLang has ended. Returns the exit status."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("model")
    own.add_argument("--listen-fd", type=int)
    own.add_argument("--host", default="127.0.0.1")
    own.add_argument("--port", type=int, default=0)
    own.add_argument("--served-model-name", default="policy")
    own.add_argument("--sglang-python")
    options, flags = own.parse_known_args(argv)
    key = new_key()
    kept = tempfile.TemporaryDirectory(prefix="trl-gym-sglang-", dir=os.environ.get(ENV_SCRATCH))
    with kept as folder:
        config = Path(folder, "key.yaml")
        config.write_text(f"api-key: {key}\n")  # in a folder with mode 0700
        try:
            port = _free_port()
            words = [find_python(options.sglang_python), "-m", "sglang.launch_server", "--config", str(config)]
            words += ["--model-path", options.model, "--served-model-name", options.served_model_name]
            words += ["--host", "127.0.0.1", "--port", str(port), *flags]
            environment = _environment(os.environ)
            if "cpu" in flags:  # `--device cpu`; elsewhere SGLang decides
                environment.setdefault(NUM_THREADS, str(threads_here(options.model).policy_server or 1))
            sglang = _start(words, key, environment, kept.cleanup)
            try:
                _serve(options, f"http://127.0.0.1:{port}", key)
            finally:
                sglang.stop()
        except TrlGymError as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
        except KeyboardInterrupt:
            return 130
    return 0


def _serve(options: argparse.Namespace, upstream: str, key: str) -> None:
    gateway.run(
        gateway.GatewayOptions(
            upstreams=[upstream],
            host=options.host,
            port=options.port,
            listen_fd=options.listen_fd,
            api_key=os.environ.get(KEY_VARIABLE) or None,
            upstream_api_key=key,
            start_timeout_s=_FOREVER_S,
            nonce=os.environ.get(ENV_NONCE) or None,
        ),
        ready=lambda url: _say(f"ready {url}"),
        note=_say,
    )


def _start(words: Sequence[str], key: str, environment: Mapping[str, str], forget_key: Callable[[], None]) -> _Sglang:
    """Start SGLang, and a thread that passes on what it writes."""
    log_read, log_write = os.pipe()
    death_read, death_write = os.pipe()
    try:
        supervisor = execute(
            Launch(
                command=words, env=environment, log_fd=log_write, death_fd=death_read, grace_s=_GRACE_S, pass_fds=()
            )
        )
    finally:
        os.close(log_write)
        os.close(death_read)
    sglang = _Sglang(supervisor, death_write)
    passing = (log_read, key, forget_key)
    threading.Thread(target=sglang.pass_on, args=passing, name="sglang-log", daemon=True).start()
    return sglang


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    """SGLang leaves its sockets in TMPDIR, however it ends; what torch compiles stays for the next server."""
    environment = {name: value for name, value in ours.items() if name not in _NOT_INHERITED}
    if scratch := ours.get(ENV_SCRATCH):
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
        environment["TMPDIR"] = scratch
    return environment


def _free_port() -> int:
    """Return a port that SGLang may bind: it takes no socket. Who comes first does not know the key."""
    sock: socket.socket
    with bind_socket() as sock:
        return sock.getsockname()[1]


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
