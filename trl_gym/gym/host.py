"""Run the servers of NeMo Gym configs in one process, or start Gym's own launcher. A script for Gym's interpreter.

    gym-python -P host.py SETTINGS.json

It imports the standard library, nemo_gym, what nemo_gym needs, and by their paths `carrier.py` and `local_calls.py`:
the trainer's packages do not exist here, and with `-P` neither do its neighbours in this folder, whose names
(`client`, `config`) environments use for their own modules.
`servers.py` writes the settings, a file that only its owner can read, and reads what this script leaves behind.

* `mode: host` runs the head server and all servers of the configs on one event loop, without Ray and without an
  environment per server. Gym's own `run_webserver` builds every application, so sessions, error handling and
  cancellation are the real ones; only its last step, `uvicorn.run`, is recorded instead of executed. Every socket is
  bound and listening before its port is written into the config. The head server answers only when all others do.
  Every model call carries the rollout that it is made for (`carrier.py`), and the servers call each other without
  sockets (`local_calls.py`).
* `mode: upstream` does what `gym env start` does (Ray, one process per server), with prepared virtual environments.

When the script fails, before or after the servers are ready, it writes one readable text to the file `error_path` and
the traceback to the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import inspect
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
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
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


_BACKLOG = 2048
_GC_THRESHOLDS = (100_000, 5, 5)
_SERVER_KINDS = ("environment_servers", "resources_servers", "responses_api_agents", "responses_api_models")
_RAY_IMPORT = re.compile(r"^\s*(import ray\b|from ray\b)", re.MULTILINE)


class HostError(Exception):
    """A cause that a user can act on; shown without a traceback."""


@dataclass(frozen=True)
class Instance:
    """One server of the merged config: `kind` is e.g. `resources_servers`, `server` the folder below it."""

    name: str
    kind: str
    server: str
    config: DictConfig
    folder: Path
    run_fields: list[str] = field(default_factory=list)  # names of the fields that its `/run` declares

    @property
    def label(self) -> str:
        return f"`{self.name}` ({self.kind}/{self.server}/{self.config.entrypoint})"

    def announcement(self) -> dict[str, Any]:
        """Return its entry in the head server's `/server_instances`."""
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
            "run_fields": self.run_fields,  # ours: its `/openapi.json` takes a second to be made
        }


def parse_config(initial: Mapping[str, Any]) -> DictConfig:
    """Return Gym's merged config; `initial` wins over every file, as the command line does.

    Ports that no config fixes are 0 and are filled in by `bind_all`: Gym would pick numbers at random and close the
    sockets again, so that another process could take them before the server does.
    """
    if not hasattr(global_config, "_find_open_port_using_range"):
        raise HostError("This version of nemo-gym chooses ports in a way that trl-gym does not know.")
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
    """Return the servers of a config, each with the folder that holds its entry point. Raises `HostError` if folders
    do not exist; names all of them."""
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
        raise HostError(f"No code was found for {', '.join(missing)}. Looked in:{looked_in}")
    return instances


def _first_item(node: Any) -> tuple[Any, Any]:
    if not isinstance(node, DictConfig) or not node:
        return None, None
    key = next(iter(node))
    return key, node[key]


def load_applications(instances: Sequence[Instance]) -> list[dict[str, Any]]:
    """Run every entry point as Gym would; return the arguments of each call of `uvicorn.run`. Raises `HostError` if an
    entry point cannot be imported, needs Ray, or starts no server."""
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
                raise HostError(f"{instance.label} started {len(recorded)} web servers, expected 1.")
            replace_middleware(recorded[0]["app"])
            instance.run_fields.extend(run_fields(recorded[0]["app"]))
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
        raise HostError(f"{instance.label} cannot start: {error}") from error
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        raise HostError(f"{instance.label} failed while starting: {type(error).__name__}: {error}.") from error


def _missing_module_text(instance: Instance, error: ModuleNotFoundError) -> str:
    requirements = instance.folder / "requirements.txt"
    lines = requirements.read_text().splitlines() if requirements.is_file() else []
    packages = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith(("#", "-"))]
    packages = [package for package in packages if "nemo-gym" not in package and "nemo_gym" not in package]
    wanted = " ".join(f"'{package}'" for package in packages or [str(error.name).split(".")[0]])
    return (
        f"{instance.label} needs the Python module `{error.name}`, which is not installed for {sys.executable}. "
        f"Install the server's requirements:\n\n    uv pip install --python {sys.executable} {wanted}\n\n"
        "(without uv: run the same interpreter with `-m pip install`, if it has pip)"
    )


@contextlib.contextmanager
def _own_modules(folder: Path, helpers: dict[str, list[ModuleType]]) -> Iterator[None]:
    """Let one server import its helper modules (`app`, `utils`, `client`, …), hidden from the other servers."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            is_packaged = name.partition(".")[0] in _SERVER_KINDS  # `resources_servers.x.y` is already unique
            if file and not is_packaged and Path(file).is_relative_to(folder):
                helpers.setdefault(name, []).append(sys.modules.pop(name))


def _keep_importable(instances: Sequence[Instance], helpers: Mapping[str, list[ModuleType]]) -> None:
    """Put helper modules whose name only one server uses back, for imports inside functions."""
    for name, modules in helpers.items():
        if len({module.__file__ for module in modules}) == 1:
            sys.modules.setdefault(name, modules[0])
    for folder in dict.fromkeys(str(instance.folder) for instance in instances):
        sys.path.append(folder)


def adapt_server_class(instances: Sequence[Instance]) -> None:
    """Change the three habits of Gym's servers that assume one process per server."""
    folders = {instance.name: instance.folder for instance in instances}
    base = server_utils.SimpleServer
    original = base.run_webserver.__func__

    def run_webserver(cls: type) -> Any:
        folder = folders[os.environ[global_config.NEMO_GYM_CONFIG_PATH_ENV_VAR_NAME]]
        if needs_ray(cls, folder):
            raise HostError("this server runs its work on Ray, which mode='host' does not start. Use mode='upstream'.")
        return original(cls)

    base.run_webserver = classmethod(run_webserver)
    base.prefix_server_logs = lambda self: None  # it would add one prefix per server to every line
    server_utils.initialize_ray = lambda: None
    # A server that uses Ray undeclared gets an error instead of a cluster of its own that nothing stops.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"


def remember_addresses() -> None:
    """Look every server up once. Gym walks the config for each call between servers, which costs more than the call.

    The config of servers does not change once they run; Gym 0.7 remembers their URLs, too.
    """
    find, build = server_utils.get_first_server_config_dict, server_utils.ServerClient._build_server_base_url
    nodes: dict[tuple[int, str], tuple[Any, Any]] = {}  # with what was walked, so that its id stays its own
    urls: dict[int, tuple[Any, str]] = {}

    def find_once(config: DictConfig, name: str) -> Any:
        if (id(config), name) not in nodes:
            nodes[id(config), name] = config, find(config, name)
        return nodes[id(config), name][1]

    def build_once(client: Any, server_config: DictConfig) -> str:
        if id(server_config) not in urls:
            urls[id(server_config)] = server_config, build(client, server_config)
        return urls[id(server_config)][1]

    server_utils.get_first_server_config_dict = find_once
    server_utils.ServerClient._build_server_base_url = build_once


def needs_ray(server_class: type, folder: Path) -> bool:
    """Tell whether a server needs Ray: by its class (0.5 and later), else by the imports of its modules."""
    declared = getattr(server_class, "ray_enabled", None)
    if declared is not None:
        return bool(declared)
    sources = [path for path in folder.rglob("*.py") if "tests" not in path.relative_to(folder).parts]
    return any(_RAY_IMPORT.search(path.read_text(errors="replace")) for path in sources)


# Middleware functions of Gym by the file that defines them.
_GYM_FUNCTIONS = {
    PARENT_DIR / "nemo_gym" / "server_utils.py": {"add_session_id", "exception_handling_middleware"},
    PARENT_DIR / "responses_api_models" / "vllm_model" / "app.py": {"context_error_middleware"},
}
GONE_EXTENSION = "trl_gym.caller_gone"  # in ASGI scopes of `local_calls.py`

Dispatch = Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]


class _AlreadySent(Response):
    """Stand-in for the response that went to the client while `call_next` ran."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        return


class DirectMiddleware:
    """Run a `dispatch` function that passes the response on unchanged or, after an exception, makes one.

    Gym wraps every application in such functions, registered with `@app.middleware("http")`: one gives the session an
    id, others turn exceptions into answers. Starlette's `BaseHTTPMiddleware` starts a task and a memory stream per
    request and layer, so that they may read or replace the response; Gym's functions do not. This class calls the
    application in place, to the same effect. A two-turn rollout has about seven requests with two layers each.
    """

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
        if error is not None and is_started:  # too late for another answer; the server closes the connection
            raise error
        await response(scope, receive, send)


class CancelWhenGone:
    """Cancel a request whose caller is gone, as Gym's `ClientDisconnectCancellationMiddleware` (0.7) does.

    Gym's starts two tasks per request, of which one waits for `http.disconnect`. A call in process says in its scope
    whom to tell when the caller is gone, so that no task has to wait; other requests get Gym's.
    """

    def __init__(self, app: ASGIApp, over_socket: Callable[[ASGIApp], ASGIApp]) -> None:
        self.app = app
        self.over_socket = over_socket(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        when_gone = scope.get("extensions", {}).get(GONE_EXTENSION)
        if when_gone is None:
            await self.over_socket(scope, receive, send)
            return
        with anyio.CancelScope() as cancel_scope:
            when_gone(cancel_scope.cancel)
            await self.app(scope, receive, send)


def replace_middleware(app: Starlette) -> None:
    """Let middleware of Gym's own cost less, to the same effect; middleware of the server stays as it is."""
    cancelling = getattr(server_utils, "ClientDisconnectCancellationMiddleware", None)  # 0.7
    for index, middleware in enumerate(app.user_middleware):
        if middleware.cls is BaseHTTPMiddleware and _is_of_gym(middleware.kwargs.get("dispatch")):
            app.user_middleware[index] = Middleware(DirectMiddleware, dispatch=middleware.kwargs["dispatch"])
        elif middleware.cls is cancelling:
            app.user_middleware[index] = Middleware(CancelWhenGone, over_socket=cancelling)


def _is_of_gym(dispatch: Any) -> bool:
    code = getattr(dispatch, "__code__", None)
    return code is not None and code.co_name in _GYM_FUNCTIONS.get(Path(code.co_filename), ())


def run_fields(app: Starlette) -> list[str]:
    """Return the fields that the body of `/run` declares; none for a server without that route."""
    names: set[str] = set()
    for route in app.routes:
        if getattr(route, "path", "") == "/run":
            parameters = inspect.signature(route.endpoint, eval_str=True).parameters.values()
            names.update(*(getattr(parameter.annotation, "model_fields", ()) for parameter in parameters))
    return sorted(names)


def bind_all(instances: Sequence[Instance]) -> list[socket.socket]:
    """Bind and listen for every server; write the real ports into the config."""
    sockets: list[socket.socket] = []
    for instance in instances:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((instance.config.host, instance.config.port))
        except OSError as error:
            address = f"{instance.config.host}:{instance.config.port}"
            raise HostError(f"{instance.label} cannot listen on {address}: {error.strerror}.") from error
        sock.listen(_BACKLOG)
        with open_dict(instance.config):
            instance.config.port = sock.getsockname()[1]
            if (instance.config.get("num_workers") or 1) > 1:
                logger.warning("mode='host' ignores num_workers of %s", instance.label)
                instance.config.num_workers = 1
        sockets.append(sock)
    return sockets


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `serve` has one handler for all servers


async def serve(
    applications: Sequence[tuple[dict[str, Any], socket.socket]], head: tuple[Any, socket.socket], local_calls: Any
) -> None:
    """Serve until SIGINT or SIGTERM. The head server starts when all others are up. Raises `HostError` if a server
    ends by itself."""
    servers = [_make_server(kwargs) for kwargs, _ in applications]
    tasks = [asyncio.create_task(s.serve(sockets=[sock])) for s, (_, sock) in zip(servers, applications, strict=True)]
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, lambda: [setattr(server, "should_exit", True) for server in servers])
    while not all(server.started for server in servers):
        _raise_if_ended(servers, tasks)
        await asyncio.sleep(0.01)
    for server, (kwargs, _) in zip(servers, applications, strict=True):
        local_calls.open(server, kwargs["host"], kwargs["port"])

    head_app, head_socket = head
    servers.append(_make_server({"app": head_app}))
    tasks.append(asyncio.create_task(servers[-1].serve(sockets=[head_socket])))
    # Modules imported so far live as long as the process: keep the collector from walking them again and again. Nor
    # does it have to look for cycles after every 700 objects: a request makes thousands, and they free themselves.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
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
            raise HostError(f"The web server of {server.config.app} ended by itself.") from cause


def run_host(settings: Mapping[str, Any]) -> None:
    config = parse_config(settings["config"])
    instances = find_instances(config, [*map(Path, settings["search_roots"]), PARENT_DIR])
    sockets = bind_all(instances)
    adapt_server_class(instances)
    remember_addresses()
    servers = [(instance.kind, str(instance.config.host), int(instance.config.port)) for instance in instances]
    carrier = _load_neighbour("carrier").Carrier(servers, settings["policy_urls"])
    local_calls = _load_neighbour("local_calls").LocalCalls(carrier.mark, GONE_EXTENSION)
    carrier.install()  # before any server makes an HTTP client
    local_calls.install()
    for root in settings["search_roots"]:
        sys.path.append(root)  # `import resources_servers.<name>` for servers outside of the installation
    applications = load_applications(instances)
    for instance, kwargs in zip(instances, applications, strict=True):
        kwargs["app"] = carrier.around(kwargs["app"], instance.kind, instance.name)

    head = server_utils.HeadServer(config=server_utils.ServerClient.load_head_server_config())
    head.set_server_instances([instance.announcement() for instance in instances])
    if hasattr(head, "mark_ready"):  # 0.5 and later
        head.mark_ready()
    head_socket = socket.socket(fileno=settings["head_fd"])
    sys.stdout.write(f"serving {', '.join(instance.name for instance in instances)}\n")
    sys.stdout.flush()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        served = serve(
            list(zip(applications, sockets, strict=True)), (head.setup_webserver(), head_socket), local_calls
        )
        runner.run(served)


def _load_neighbour(name: str) -> ModuleType:
    """Load a script beside this one from its file: neighbours cannot be imported."""
    spec = importlib.util.spec_from_file_location(f"trl_gym_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:  # a dependency of nemo-gym, but not on every platform
        return None
    return uvloop.new_event_loop


def run_upstream(settings: Mapping[str, Any]) -> None:
    """Call the function behind `gym env start`, without a command line to quote values for."""
    from nemo_gym.cli.env import RunHelper

    work_dir = Path(settings["work_dir"])
    config = parse_config_as_gym_does(settings["config"])
    instances = find_instances(config, [*map(Path, settings["search_roots"]), PARENT_DIR])
    for instance in instances:
        prepare_upstream_folder(instance, work_dir)
    # Configs were found from the user's folder. Gym looks up servers below the current folder, which from here on is
    # ours: a link there replaces the folder of a server beside its config (0.4 has no search path).
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
    """Print which servers have ended, and forget them.

    Gym's own `run_forever` would end all others a minute later; here `servers.py` decides whether they go on.
    """
    for name in [name for name, process in processes.items() if process.poll() is not None]:
        code = processes.pop(name).returncode
        sys.stdout.write(f"server {name} ended (exit code {code})\n")
        sys.stdout.flush()


def prepare_upstream_folder(instance: Instance, work_dir: Path) -> None:
    """Link the server's code where it is not Gym's own, and our environment instead of building a new one."""
    if not (Path(sys.prefix) / "bin" / "activate").is_file():
        raise HostError(f"mode='upstream' needs Gym in a virtual environment, and {sys.prefix} is not one.")
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
        text = _error_text(error)
        traceback.print_tb(error.__traceback__)
        sys.stderr.write(f"{text}\n")
        Path(settings["error_path"]).write_text(text)
        return 1
    return 0


def _error_text(error: Exception) -> str:
    """Return the message without the whole config, which Gym attaches to some: it may hold secrets."""
    text = str(error).partition("Found global config dict yaml")[0].rstrip()
    return text if isinstance(error, HostError) else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
