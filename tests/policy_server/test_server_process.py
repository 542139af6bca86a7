"""PolicyServer around small stand-ins for the server process: readiness, death, strangers, state."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.conftest import server_below, wait_for
from trl_gym import processes
from trl_gym.errors import ConfigError, PolicyServerError, PolicyServerLostError
from trl_gym.policy_server import command
from trl_gym.policy_server.server import PolicyServer
from trl_gym.processes import ServerState, bind_socket

# Serves /trl_gym/info on the inherited socket after a pause, with the nonce that it was given (or a wrong one).
STAND_IN = """
import json, os, socket, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        nonce = os.environ["TRL_GYM_NONCE"] if sys.argv[2] == "right" else "another"
        info = {"nonce": nonce, "instance": str(os.getpid()), "max_model_len": 512, "model_names": ["policy"]}
        body = json.dumps(info).encode()
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
time.sleep(0.5)
server = HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
server.socket = socket.socket(fileno=int(sys.argv[1]))
server.serve_forever()
"""


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


Make = Callable[..., PolicyServer]


@pytest.fixture
def make(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    servers: list[PolicyServer] = []

    def make_server(code: str, *args: str, **options: object) -> PolicyServer:
        def stand_in(*_: object, listen_fd: int, **__: object) -> list[str]:
            return [sys.executable, "-c", code, str(listen_fd), *args]

        monkeypatch.setattr(command, "serve_command", stand_in)
        servers.append(PolicyServer(model_folder, log_dir=tmp_path / "logs", **options))
        return servers[-1]

    yield make_server
    for server in servers:
        server.stop()


def instance(server: PolicyServer) -> str:
    return server.client.info()["instance"]


def test_ready_is_proven_by_the_nonce(make: Make) -> None:
    server = make(STAND_IN, "right")
    with pytest.raises(PolicyServerError, match=r"is new\. Call `start` first"):
        _ = server.base_url
    server.start()
    assert server.base_url.startswith("http://127.0.0.1:") and server.base_url.endswith("/v1")
    with pytest.raises(PolicyServerError, match="needs a policy server that is ready; this one is starting"):
        _ = server.max_model_len
    assert server.wait_ready().state is ServerState.READY
    assert server.max_model_len == 512
    server.check()
    server.stop()
    server.stop()
    server.check()
    assert server.state is ServerState.STOPPED


def test_a_stranger_on_the_port_is_not_ours(make: Make) -> None:
    with pytest.raises(PolicyServerError, match="answered by another server"):
        make(STAND_IN, "wrong").start().wait_ready()


def test_death_while_loading_is_one_readable_error(make: Make) -> None:
    code = "import sys; sys.exit('ValueError: No available memory for the cache blocks')"
    server = make(code).start()
    with pytest.raises(PolicyServerError) as caught:
        server.wait_ready()
    text = str(caught.value)
    for words in ("No available memory", "give the KV cache more memory", "exit code 1", str(server.log_path)):
        assert words in text
    assert server.state is ServerState.STOPPED


def test_death_later_is_found_by_check(make: Make) -> None:
    server = make(STAND_IN, "right").start().wait_ready()
    assert server._process is not None
    server._process.stop()
    with pytest.raises(PolicyServerError, match="policy server ended"):
        server.check()


def test_restart_keeps_the_address(make: Make, tmp_path: Path) -> None:
    """Connections to the dead server linger on its port; the one that answers afterwards is the new process."""
    server = make(STAND_IN, "right").start().wait_ready()
    url, client = server.base_url, server.client
    assert server.is_ours
    for _ in range(2):
        first = instance(server)
        os.kill(server_below(server._process).pid, signal.SIGKILL)
        assert server._process.wait(60.0) is not None
        with pytest.raises(PolicyServerLostError, match="SIGKILL"):
            server.check()
        server.restart()
        assert (server.base_url, server.client, server.state) == (url, client, ServerState.READY)
        assert instance(server) not in (first, None)
    port = url.rpartition(":")[2].removesuffix("/v1")
    names = {path.name for path in (tmp_path / "logs").iterdir()}
    assert names == {f"policy_server-{port}{again}.log" for again in ("", "-restart1", "-restart2")}


def test_a_restart_replaces_a_server_that_hangs(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE_S", 0.5)  # until it is killed
    server = make(STAND_IN, "right").start().wait_ready()
    process = server_below(server._process)
    process.suspend()
    server.restart()
    assert not process.is_running() and instance(server)


@pytest.mark.parametrize(
    ("cause", "kind"),
    [("MemoryError: 3 GiB", PolicyServerLostError), ("error: unrecognized arguments: --x", ConfigError)],
)
def test_a_restart_that_fails(make: Make, tmp_path: Path, cause: str, kind: type[Exception]) -> None:
    """One may be tried again, with another nothing changes."""
    trouble = tmp_path / "trouble"
    code = f"import pathlib, sys\nif pathlib.Path({str(trouble)!r}).exists(): sys.exit({cause!r})\n{STAND_IN}"
    server = make(code, "right").start().wait_ready()
    trouble.touch()
    with pytest.raises(kind, match=cause):
        server.restart()
    trouble.unlink()
    server.restart()
    assert instance(server)


def test_a_log_that_cannot_be_read_or_written_prevents_no_restart(make: Make, tmp_path: Path) -> None:
    server = make(STAND_IN, "right").start().wait_ready()
    shutil.rmtree(tmp_path / "logs")
    (tmp_path / "logs").touch()  # a file where the folder was: nothing can be read or written below it
    os.kill(server_below(server._process).pid, signal.SIGKILL)
    assert server._process.wait(60.0) is not None
    with pytest.raises(PolicyServerLostError, match=r"SIGKILL") as caught:
        server.check()
    assert "cannot be read" in str(caught.value)
    with pytest.raises(PolicyServerError, match="policy server's log cannot be written to"):
        server.restart()  # counted and tried again by `PolicyRecovery`
    (tmp_path / "logs").unlink()
    server.restart()
    assert instance(server)


def test_only_our_own_running_servers_are_restarted(make: Make, remote: tuple[str, type[_Stranger]]) -> None:
    server = make(STAND_IN, "right").start().wait_ready()
    server.stop()
    with pytest.raises(PolicyServerError, match="it is stopped, or not ours"):
        server.restart()
    url, handler = remote
    handler.payload = {"nonce": None, "model_names": ["big"], "max_model_len": 64, "instance": "a"}
    attached = PolicyServer.attach(url)
    assert not attached.is_ours and instance(attached) == "a"
    with pytest.raises(PolicyServerError, match="not ours"):
        attached.restart()


def test_devices_of_its_own(make: Make) -> None:
    code = "import os, sys; sys.exit('KeyError: devices ' + os.environ['CUDA_VISIBLE_DEVICES'])"
    server = make(code, devices="6,7", env={"X": "1"})
    with pytest.raises(PolicyServerError, match="KeyError: devices 6,7"):
        server.start().wait_ready()


def test_a_timeout_stops_the_process(make: Make) -> None:
    server = make("import time; print('still loading', flush=True); time.sleep(600)", start_timeout_s=1.0).start()
    wait_for(lambda: "still loading" in server.log_path.read_text())
    with pytest.raises(PolicyServerError, match=r"not ready after 1 s(.|\n)*still loading"):
        server.wait_ready()
    assert server._process is not None and server._process.poll() is not None


def test_the_key_is_in_the_environment_and_not_in_the_command(make: Make) -> None:
    code = "import os, sys; sys.exit(f\"KeyError: {os.environ.get('VLLM_API_KEY')} {os.environ['X']}\")"
    with pytest.raises(PolicyServerError, match="KeyError: secret 1"):
        make(code, api_key="secret", env={"X": "1"}).start().wait_ready()


@pytest.mark.parametrize("call", ["start", "wait_ready"])
def test_no_way_back_from_stopped(make: Make, call: str) -> None:
    server = make(STAND_IN, "right")
    server.stop()
    with pytest.raises(PolicyServerError, match="this one is stopped"):
        getattr(server, call)()


def test_a_port_that_is_taken(make: Make) -> None:
    with bind_socket() as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PolicyServerError, match=f"Port {port} on 127.0.0.1 is in use.*leave it at 0"):
            make(STAND_IN, "right", port=port).start()


def test_beyond_loopback_a_key_is_demanded(make: Make) -> None:
    with pytest.raises(ConfigError, match="Give a key"):
        make(STAND_IN, "right", host="0.0.0.0", api_key="").start()


class _Stranger(BaseHTTPRequestHandler):
    payload: dict[str, object] | None = None

    def do_GET(self) -> None:
        body = json.dumps(self.payload or {"detail": "Not Found"}).encode()
        self.send_response(200 if self.payload else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def remote() -> Iterator[tuple[str, type[_Stranger]]]:
    handler = type("Handler", (_Stranger,), {})
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", handler
    server.shutdown()
    server.server_close()


def test_attach(remote: tuple[str, type[_Stranger]]) -> None:
    url, handler = remote
    handler.payload = {"nonce": None, "model_names": ["big"], "max_model_len": 64}
    server = PolicyServer.attach(url)
    assert (server.model_name, server.max_model_len) == ("big", 64)
    server.check()
    server.stop()


def test_attaching_to_something_else_fails_at_once(remote: tuple[str, type[_Stranger]]) -> None:
    with pytest.raises(PolicyServerError, match="trl-gym serve MODEL"):
        PolicyServer.attach(remote[0])


def test_attaching_to_nothing_names_the_url() -> None:
    with bind_socket() as sock:
        port = sock.getsockname()[1]
    with pytest.raises(PolicyServerError, match=f"127.0.0.1:{port}/v1 was not ready after 0.3 s.*cannot be reached"):
        PolicyServer.attach(f"http://127.0.0.1:{port}/v1", timeout_s=0.3)
