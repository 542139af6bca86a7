"""Runs inside Gym's interpreter: the servers of NeMo Gym configs in one process, or Gym's own launcher.

    gym-python host.py SETTINGS.json

Standard library and nemo_gym only; the trainer's packages are not importable here. `servers.py` writes the settings
(a file that only its owner can read, never the command line) and reads what this script leaves behind:

* `mode: host` — head server and all servers of the configs on one event loop. No Ray, no environment per server.
  Gym's own `run_webserver` builds every application, so sessions, error handling and cancellation are the real ones;
  only its last step, `uvicorn.run`, is recorded instead of executed. Every socket is bound and listening before its
  port is written into the config, and the head server answers only when all others do.
* `mode: upstream` — what `gym env start` does (Ray, one process per server), with prepared virtual environments.

A failure before readiness ends up as one readable text in the file `error_path`, the traceback in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import uvicorn
from nemo_gym import PARENT_DIR, global_config, server_utils
from omegaconf import DictConfig, OmegaConf, open_dict
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("trl_gym.host")


# --------------------------------------------------------------------------------------------------------------------
# Gym's own two HTTP middlewares without Starlette's per-request task group. Imported by `host.py` only.
#
# Every Gym server wraps its application in two functions registered with `@app.middleware("http")`: one makes sure
# that
# the session has an id, one turns exceptions into answers. Starlette runs such a function through
# `BaseHTTPMiddleware`,
# which starts a task and a memory stream per request and layer, so that the function may read or replace the response.
# Gym's two functions return the response as it is. `DirectMiddleware` runs the same functions with the application
# called in place, to the same effect. There are two layers per server and about seven requests in a two-turn rollout.
#
# Middleware that a server adds for itself is left alone.

GYM_FUNCTIONS = frozenset({"add_session_id", "exception_handling_middleware"})

Dispatch = Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]


class _AlreadySent(Response):
    """Stands for the response that went to the client while `call_next` ran."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        return


class DirectMiddleware:
    """Runs a `dispatch` function that passes the response on unchanged or, after an exception, makes one."""

    def __init__(self, app: ASGIApp, dispatch: Dispatch) -> None:
        self.app = app
        self.dispatch = dispatch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_started = False
        error: Exception | None = None

        async def observed_send(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        async def call_next(_request: Request) -> Response:
            nonlocal error
            try:
                await self.app(scope, receive, observed_send)
            except Exception as raised:
                error = raised
                raise
            return _AlreadySent()

        response = await self.dispatch(Request(scope, receive), call_next)
        if error is not None and is_started:  # too late for another answer: let the server close the connection
            raise error
        await response(scope, receive, send)


def lighten(app: Starlette) -> None:
    """Replace Gym's two middlewares in an application that serves no request yet."""
    for index, middleware in enumerate(app.user_middleware):
        if middleware.cls is BaseHTTPMiddleware and _is_gyms(middleware.kwargs.get("dispatch")):
            app.user_middleware[index] = Middleware(DirectMiddleware, dispatch=middleware.kwargs["dispatch"])


def _is_gyms(dispatch: Any) -> bool:
    module, name = getattr(dispatch, "__module__", ""), getattr(dispatch, "__name__", "")
    return module == "nemo_gym.server_utils" and name in GYM_FUNCTIONS


# From here on our own folder must not be importable: environments have modules called `client`, too.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]


_BACKLOG = 2048
_RAY_IMPORT = re.compile(r"^\s*(import ray\b|from ray\b)", re.MULTILINE)


class HostError(Exception):
    """A reason not to start that a user can act on; shown without a traceback."""


@dataclass(frozen=True)
class Instance:
    """One server of the merged config. `kind` is e.g. `resources_servers`, `server` the folder below it."""

    name: str
    kind: str
    server: str
    config: DictConfig
    folder: Path

    @property
    def label(self) -> str:
        return f"`{self.name}` ({self.kind}/{self.server}/{self.config.entrypoint})"

    def announcement(self) -> dict[str, Any]:
        """Its entry in the head server's `/server_instances`."""
        host, port = self.config.host, self.config.port
        return {
            "process_name": self.name,
            "config_path": self.name,
            "server_type": self.kind,
            "name": self.server,
            "host": host,
            "port": port,
            "url": f"http://{host}:{port}",
            "pid": os.getpid(),
            "dir_path": str(self.folder),
            "entrypoint": self.config.entrypoint,
            "start_time": time.time(),
            "status": None,
            "uptime_seconds": None,
        }


# --- Configuration ---------------------------------------------------------------------------------------------------


def parse_config(initial: Mapping[str, Any]) -> DictConfig:
    """Gym's merged config; `initial` wins over every file, as the command line does.

    Ports that no config fixes come back as 0, to be filled in by `bind_all`: Gym would pick numbers at random and
    close the sockets again, which lets anybody take them before the server does.
    """
    if not hasattr(global_config, "_find_open_port_using_range"):
        raise HostError("this version of nemo-gym chooses ports in a way that trl-gym does not know")
    original = global_config._find_open_port_using_range
    global_config._find_open_port_using_range = lambda *_args, **_kwargs: 0
    try:
        return parse_config_as_gym_does(initial)
    finally:
        global_config._find_open_port_using_range = original


def parse_config_as_gym_does(initial: Mapping[str, Any]) -> DictConfig:
    parser_config = global_config.GlobalConfigDictParserConfig(
        initial_global_config_dict=OmegaConf.create(dict(initial)), skip_load_from_cli=True
    )
    config = global_config.get_global_config_dict(global_config_dict_parser_config=parser_config)
    global_config.GlobalConfigDictParser().raise_on_no_server_instances(config)
    return config


def find_instances(config: DictConfig, search_roots: Sequence[Path]) -> list[Instance]:
    """The servers of a config, each with the folder that holds its entry point.

    Raises:
        HostError: If folders cannot be found; names all of them.
    """
    instances: list[Instance] = []
    missing: list[str] = []
    for name in config:
        if name in global_config.NEMO_GYM_RESERVED_TOP_LEVEL_KEYS:
            continue
        kind, kind_config = _first_item(config[name])
        server, server_config = _first_item(kind_config)
        if not isinstance(server_config, DictConfig) or "entrypoint" not in server_config:
            continue
        folders = [root / kind / server for root in search_roots]
        folder = next((f for f in folders if (f / server_config.entrypoint).is_file()), None)
        if folder is None:
            missing.append(f"`{name}` ({kind}/{server}/{server_config.entrypoint})")
        else:
            instances.append(Instance(str(name), str(kind), str(server), server_config, folder))
    if missing:
        looked_in = "".join(f"\n  - {root}" for root in search_roots)
        raise HostError(f"no code found for {', '.join(missing)}. Looked in:{looked_in}")
    return instances


def _first_item(node: Any) -> tuple[Any, Any]:
    if not isinstance(node, DictConfig) or not node:
        return None, None
    key = next(iter(node))
    return key, node[key]


# --- Loading servers -------------------------------------------------------------------------------------------------


def load_applications(instances: Sequence[Instance]) -> list[dict[str, Any]]:
    """Run every entry point as Gym would and return what each would have handed to `uvicorn.run`.

    Raises:
        HostError: If an entry point cannot be imported, needs Ray, or starts no server.
    """
    applications: list[dict[str, Any]] = []
    recorded: list[dict[str, Any]] = []
    helpers: dict[str, list[ModuleType]] = {}
    working_directory = Path.cwd()
    original_run = uvicorn.run
    uvicorn.run = lambda app=None, **kwargs: recorded.append({"app": app, **kwargs})
    try:
        for instance in instances:
            recorded.clear()
            os.environ[global_config.NEMO_GYM_CONFIG_PATH_ENV_VAR_NAME] = instance.name
            os.chdir(instance.folder)  # as in Gym, where each server starts in its own folder
            with _own_modules(instance.folder, helpers):
                _run_entry_point(instance)
            if len(recorded) != 1:
                raise HostError(f"the entry point of {instance.label} started {len(recorded)} web servers, expected 1")
            lighten(recorded[0]["app"])
            applications.append(recorded[0])
    finally:
        uvicorn.run = original_run
        os.chdir(working_directory)
    _keep_importable(instances, helpers)
    return applications


def _run_entry_point(instance: Instance) -> None:
    entry_point = instance.folder / instance.config.entrypoint
    try:
        runpy.run_path(str(entry_point), run_name="__main__")
    except ModuleNotFoundError as error:
        raise HostError(_missing_module_text(instance, error)) from error
    except HostError as error:
        raise HostError(f"{instance.label}: {error}") from error
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        raise HostError(f"{instance.label} failed while starting: {type(error).__name__}: {error}") from error


def _missing_module_text(instance: Instance, error: ModuleNotFoundError) -> str:
    requirements = instance.folder / "requirements.txt"
    lines = requirements.read_text().splitlines() if requirements.is_file() else []
    packages = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith(("#", "-"))]
    packages = [package for package in packages if "nemo-gym" not in package and "nemo_gym" not in package]
    wanted = " ".join(f"'{package}'" for package in packages or [str(error.name).split(".")[0]])
    return (
        f"{instance.label} needs the Python module `{error.name}`, which is not installed for {sys.executable}. "
        f"Install what the server asks for:\n\n    uv pip install --python {sys.executable} {wanted}\n\n"
        "(without uv: the same interpreter with `-m pip install`, where it has pip)"
    )


@contextlib.contextmanager
def _own_modules(folder: Path, helpers: dict[str, list[ModuleType]]) -> Iterator[None]:
    """Let one server import its helper modules (`app`, `utils`, `client`, …) without seeing those of another."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            is_packaged = name.partition(".")[0] in _SERVER_KINDS  # `resources_servers.x.y` is unique already
            if file and not is_packaged and Path(file).is_relative_to(folder):
                helpers.setdefault(name, []).append(sys.modules.pop(name))


_SERVER_KINDS = ("environment_servers", "resources_servers", "responses_api_agents", "responses_api_models")


def _keep_importable(instances: Sequence[Instance], helpers: Mapping[str, list[ModuleType]]) -> None:
    """For imports inside functions: helper modules whose name only one server uses stay where they were."""
    for name, modules in helpers.items():
        if len({module.__file__ for module in modules}) == 1:
            sys.modules.setdefault(name, modules[0])
    for folder in dict.fromkeys(str(instance.folder) for instance in instances):
        sys.path.append(folder)


def adapt_server_class(instances: Sequence[Instance]) -> None:
    """Change the three habits of Gym's servers that assume one process each."""
    folders = {instance.name: instance.folder for instance in instances}
    base = server_utils.SimpleServer
    original = base.run_webserver.__func__

    def run_webserver(cls: type) -> Any:
        folder = folders[os.environ[global_config.NEMO_GYM_CONFIG_PATH_ENV_VAR_NAME]]
        if needs_ray(cls, folder):
            raise HostError("this server runs its work on Ray, which mode='host' does not start: use mode='upstream'")
        return original(cls)

    base.run_webserver = classmethod(run_webserver)
    base.prefix_server_logs = lambda self: None  # would stack one prefix on stdout per server
    server_utils.initialize_ray = lambda: None
    # A server that uses Ray behind our back gets an error, not a cluster of its own that nobody stops.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"


def needs_ray(server_class: type, folder: Path) -> bool:
    """What the class declares (0.5 and later), else whether any module of the server imports Ray."""
    declared = getattr(server_class, "ray_enabled", None)
    if declared is not None:
        return bool(declared)
    sources = [path for path in folder.rglob("*.py") if "tests" not in path.relative_to(folder).parts]
    return any(_RAY_IMPORT.search(path.read_text(errors="replace")) for path in sources)


# --- Serving ---------------------------------------------------------------------------------------------------------


def bind_all(instances: Sequence[Instance]) -> list[socket.socket]:
    """Bind and listen for every server, and write the real ports into the config."""
    sockets: list[socket.socket] = []
    for instance in instances:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((instance.config.host, instance.config.port))
        except OSError as error:
            address = f"{instance.config.host}:{instance.config.port}"
            raise HostError(f"{instance.label} cannot listen on {address}: {error.strerror}") from error
        sock.listen(_BACKLOG)
        with open_dict(instance.config):
            instance.config.port = sock.getsockname()[1]
            if (instance.config.get("num_workers") or 1) > 1:
                logger.warning("%s: num_workers is ignored by mode='host'", instance.label)
                instance.config.num_workers = 1
        sockets.append(sock)
    return sockets


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # one handler for all servers, in `serve`


async def serve(applications: Sequence[tuple[dict[str, Any], socket.socket]], head: tuple[Any, socket.socket]) -> None:
    """Serve until SIGINT or SIGTERM. The head server starts when all others are up.

    Raises:
        HostError: If a server ends by itself.
    """
    servers = [_make_server(kwargs) for kwargs, _ in applications]
    tasks = [asyncio.create_task(s.serve(sockets=[sock])) for s, (_, sock) in zip(servers, applications, strict=True)]
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, lambda: [setattr(server, "should_exit", True) for server in servers])
    while not all(server.started for server in servers):
        _raise_if_ended(servers, tasks)
        await asyncio.sleep(0.01)

    head_app, head_socket = head
    servers.append(_make_server({"app": head_app}))
    tasks.append(asyncio.create_task(servers[-1].serve(sockets=[head_socket])))
    # What was imported so far lives as long as the process: keep the collector from walking it again and again.
    gc.collect()
    gc.freeze()
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    _raise_if_ended(servers, tasks)
    await asyncio.gather(*tasks)


def _make_server(kwargs: Mapping[str, Any]) -> _Server:
    options = {key: value for key, value in kwargs.items() if key not in ("host", "port", "workers")}
    return _Server(uvicorn.Config(**{**options, "log_level": "warning", "access_log": False, "proxy_headers": False}))


def _raise_if_ended(servers: Sequence[_Server], tasks: Sequence[asyncio.Task[None]]) -> None:
    for server, task in zip(servers, tasks, strict=False):
        if task.done() and not server.should_exit:
            cause = task.exception()
            raise HostError(f"the web server of {server.config.app} ended by itself") from cause


# --- The two modes ---------------------------------------------------------------------------------------------------


def run_host(settings: Mapping[str, Any]) -> None:
    config = parse_config(settings["config"])
    instances = find_instances(config, [*map(Path, settings["search_roots"]), PARENT_DIR])
    sockets = bind_all(instances)
    adapt_server_class(instances)
    for root in settings["search_roots"]:
        sys.path.append(root)  # `import resources_servers.<name>` for servers outside of the installation
    applications = load_applications(instances)

    head = server_utils.HeadServer(config=server_utils.ServerClient.load_head_server_config())
    head.set_server_instances([instance.announcement() for instance in instances])
    if hasattr(head, "mark_ready"):  # 0.5 and later
        head.mark_ready()
    head_socket = socket.socket(fileno=settings["head_fd"])
    sys.stdout.write(f"serving {', '.join(instance.name for instance in instances)}\n")
    sys.stdout.flush()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        served = serve(list(zip(applications, sockets, strict=True)), (head.setup_webserver(), head_socket))
        runner.run(served)


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:  # a dependency of nemo-gym, but not on every platform
        return None
    return uvloop.new_event_loop


def run_upstream(settings: Mapping[str, Any]) -> None:
    """`gym env start`: the same function that the command calls, without a command line to quote values for."""
    from nemo_gym.cli.env import RunHelper

    work_dir = Path(settings["work_dir"])
    config = parse_config_as_gym_does(settings["config"])
    instances = find_instances(config, [*map(Path, settings["search_roots"]), PARENT_DIR])
    for instance in instances:
        prepare_upstream_folder(instance, work_dir)
    # Configs were found from the user's folder. Servers are looked up below the current one, which from here on is
    # ours: only there can a link stand for a server that lives beside its config (0.4 has no search path).
    os.chdir(work_dir)
    helper = RunHelper()
    helper.start(None)  # takes the config that was parsed above
    try:
        while helper._processes:
            report_ended(helper._processes)
            time.sleep(1)
    finally:
        helper.shutdown()


def report_ended(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Say which servers have ended, and forget them. Gym's own `run_forever` would end all others a minute later;
    whether they go on is for whoever started us to say."""
    for name in [name for name, process in processes.items() if process.poll() is not None]:
        code = processes.pop(name).returncode
        sys.stdout.write(f"server {name} ended (exit code {code})\n")
        sys.stdout.flush()


def prepare_upstream_folder(instance: Instance, work_dir: Path) -> None:
    """A link to the server's code where it is not Gym's own, and one to our environment instead of a new one."""
    if not (Path(sys.prefix) / "bin" / "activate").is_file():
        raise HostError(f"mode='upstream' needs Gym in a virtual environment, and {sys.prefix} is none")
    relative = Path(instance.kind, instance.server)
    environment = work_dir / "environments" / relative / ".venv"
    environment.parent.mkdir(parents=True, exist_ok=True)
    if not environment.is_symlink():
        environment.symlink_to(sys.prefix)
    if PARENT_DIR not in instance.folder.parents and not (work_dir / relative).exists():
        (work_dir / relative).parent.mkdir(parents=True, exist_ok=True)
        (work_dir / relative).symlink_to(instance.folder)


def main(settings_path: str) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    settings = json.loads(Path(settings_path).read_text())
    try:
        {"host": run_host, "upstream": run_upstream}[settings["mode"]](settings)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        text = explain(error)
        traceback.print_tb(error.__traceback__)
        sys.stderr.write(f"{text}\n")
        Path(settings["error_path"]).write_text(text)
        return 1
    return 0


def explain(error: Exception) -> str:
    """The message, without the dump of the whole config that Gym attaches to some: it may hold secrets."""
    text = str(error).partition("Found global config dict yaml")[0].rstrip()
    return text if isinstance(error, HostError) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
