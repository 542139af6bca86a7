"""Run vLLM's server with our defaults. The only file that imports vLLM's server; importing it imports vLLM.

It was read with vLLM 0.30 and run with 0.31 to 0.33 (docs/tested.md). It uses the argument parser of `vllm serve`, its
validation, and the two parts of its `run_server_worker`: the engine, and the server on a socket that is already bound.
Between them it chooses how the engine's process is started. When a release moves these names, only this file changes.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import uvloop
import vllm.logger
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.system_utils import decorate_logs, set_ulimit
from vllm.v1.engine.async_llm import AsyncLLM

try:  # since 0.33
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.common.startup import cli_env_setup
except ImportError:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

from trl_gym.policy_server.command import (
    DEFAULT_FLAGS,
    ENV_API_KEYS,
    ENV_PROMPT_FIELD,
    ENV_REPLICAS,
    ENV_WEIGHT_TRANSPORTS,
    MIDDLEWARE,
    is_loopback,
)
from trl_gym.policy_server.engine.plugin import ENV_OWN_SERVER, answer_any_text, leave_the_server, use_scratch
from trl_gym.processes import bind_socket
from trl_gym.threads import NUM_THREADS, num_cores, num_that_run, number_in, threads_here

logger = vllm.logger.init_logger("vllm.trl_gym.policy_server")  # to where vLLM's own lines go

# Flags that are refused → the reason. One process answers HTTP: it owns the middleware's caches and counters, and the
# socket that it gets.
_UNSUPPORTED = {
    "headless": "a policy server has an API process",
    "grpc": "Gym and the trainer speak HTTP",
    "uds": "Gym and the trainer speak TCP",
    "ssl_keyfile": "put a proxy that ends TLS in front",
}


def serve(argv: Sequence[str], *, listen_fd: int | None) -> None:
    """Parse `argv` as `vllm serve` does, bind, load the model, and serve until SIGINT or SIGTERM.

    Args:
        argv: The model and any flag of `vllm serve`.
        listen_fd: Inherited socket, bound and listening. Default: a new one, bound to `--host` and `--port`.

    Raises:
        SystemExit: If flags are wrong or refused; names them.
        KeyboardInterrupt: If a signal arrives while the model is loaded.
    """
    asked = os.environ.get(_START_METHOD)
    _log_as_told()
    cli_env_setup()
    args = parse_args(argv)
    if configure_logging := getattr(vllm.logger, "configure_logging_from_args", None):  # since 0.31
        configure_logging(args)
    _configure_environment(args)
    answer_any_text()
    sock = _listen(args, listen_fd)
    set_ulimit()
    decorate_logs("APIServer")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until uvicorn has its own handlers
    host, port = sock.getsockname()[:2]
    uvloop.run(_serve(f"http://{host}:{port}", sock, args, asked))


# When the engine has died, uvicorn waits for the answers that are under way. A pause that came as it died gets none:
# the client would wait for this process, and this process for its answer.
_LAST_ANSWERS_S = 5


async def _serve(address: str, sock: socket.socket, args: argparse.Namespace, asked: str | None) -> None:
    engine_args = AsyncEngineArgs.from_cli_args(args)
    config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    parallel = config.parallel_config
    replicas = parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size
    os.environ[ENV_REPLICAS] = str(replicas)  # those that a request may name
    if reason := why_not_forked(_engine_start(config, asked)):
        logger.info("The engine's process is left to vLLM, which may import everything again: %s", reason)
    else:
        os.environ[_START_METHOD] = "fork"
    os.register_at_fork(after_in_child=lambda: _be_an_engine(sock))
    engine = AsyncLLM.from_vllm_config(
        config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
    )
    try:
        await engine.reset_mm_cache()  # what the engine has seen while it warmed up
        ended = await build_and_serve(engine, address, sock, args, timeout_graceful_shutdown=_LAST_ANSWERS_S)
    finally:
        engine.shutdown(timeout=config.shutdown_timeout)
    try:
        await ended
    finally:
        sock.close()


# -- how the engine's process is started ------------------------------------------------------------------------------

_START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


@dataclass(frozen=True)
class EngineStart:
    """What decides whether the engine can be forked from the server."""

    asked: str | None  # by the user, as VLLM_WORKER_MULTIPROC_METHOD
    system: str  # `sys.platform`
    device: str  # as vLLM names it: "cpu", "cuda", "rocm", "xpu", …
    executor: str  # of the workers: "uni" runs the only one in the engine
    num_engines: int = 1
    needs_spawn: str = ""  # option of vLLM
    device_in_use: bool = False  # by this process
    num_threads: int = 1  # of this process
    not_preloaded: tuple[str, ...] = ()  # libraries that the dynamic linker was to load first


def why_not_forked(start: EngineStart) -> str:
    """Return why the start of the engine is left to vLLM, which spawns it mostly; empty if it can be forked.

    A fork copies the memory of the server and one of its threads. That is safe where nothing that it copies is bound
    to the process: no device (CUDA and XPU refuse to work after a fork, and so they must not be in use yet), and no
    lock that another thread holds, as on macOS, where system libraries start threads of their own. It is the same as
    a spawn where a new process would read nothing again: workers that vLLM binds to cores, or that the dynamic linker
    gives other libraries (`LD_PRELOAD`), need one. Engines with several processes (tensor, pipeline and data
    parallelism, Ray) load for longer than they import, and stay with what `vllm serve` does.
    """
    reasons = {
        f"{_START_METHOD}={start.asked}": start.asked is not None,
        f"a fork is not safe on {start.system}": start.system != "linux",
        f"a fork is not known to be safe for {start.device}": start.device not in ("cpu", "cuda"),
        f"the executor is {start.executor!r}": start.executor != "uni",
        f"there are {start.num_engines} engines": start.num_engines > 1,
        f"{start.needs_spawn} needs it": bool(start.needs_spawn),
        "the device is in use": start.device_in_use,
        f"{start.num_threads} threads run": start.num_threads > 1,
        f"{', '.join(start.not_preloaded)} can only be preloaded so": bool(start.not_preloaded),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _engine_start(config: VllmConfig, asked: str | None) -> EngineStart:
    parallel, model = config.parallel_config, config.model_config
    multimodal = model.multimodal_config
    needs = "--numa-bind" if parallel.numa_bind else ""
    if multimodal is not None and multimodal.mm_tensor_ipc == "torch_shm":
        needs = "--mm-tensor-ipc torch_shm"
    mapped = Path("/proc/self/maps")
    loaded = mapped.read_text() if mapped.exists() else ""
    preloaded = filter(None, os.environ.get("LD_PRELOAD", "").split(":"))
    return EngineStart(
        asked=asked,
        system=sys.platform,
        device=current_platform.device_name,
        executor=str(parallel.distributed_executor_backend),
        num_engines=parallel.data_parallel_size,
        needs_spawn=needs,
        device_in_use=torch.cuda.is_initialized() or torch.xpu.is_initialized(),
        num_threads=num_that_run(),
        not_preloaded=tuple(name for name in preloaded if os.path.realpath(name) not in loaded),
    )


def _be_an_engine(sock: socket.socket) -> None:
    leave_the_server(sock)
    if current_platform.is_cpu() and (num_threads := number_in(os.environ)):
        torch.set_num_threads(num_threads)  # OpenMP has read the variable when it was loaded


# -- arguments and environment ----------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse vLLM's own arguments with our defaults, and refuse those that a policy server cannot have. Raises
    `SystemExit`: see `serve`."""
    parser = make_arg_parser(FlexibleArgumentParser(prog="python -m trl_gym.policy_server"))
    parser.set_defaults(**DEFAULT_FLAGS)
    args = parser.parse_args(list(argv))
    if args.model_tag is not None:
        args.model = args.model_tag
    _refuse_unsupported(args)
    if args.tool_call_parser:
        args.enable_auto_tool_choice = True
    if args.disable_log_stats:
        args.enable_per_request_metrics = False  # our default; vLLM refuses the two together
    # The last one is outermost: nothing may answer before our check of the API key.
    args.middleware = [*(name for name in args.middleware if name != MIDDLEWARE), MIDDLEWARE]
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    try:
        validate_parsed_serve_args(args)
        validate_api_server_args(args)
    except (KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"error: {error.args[0] if error.args else error}") from error
    return args


def _refuse_unsupported(args: argparse.Namespace) -> None:
    for name, reason in _UNSUPPORTED.items():
        if getattr(args, name, None):
            raise SystemExit(f"error: --{name.replace('_', '-')} is not supported: {reason}")
    if (args.api_server_count or 1) > 1:
        raise SystemExit("error: --api-server-count must be 1: versions and counters are kept in one process")
    if not is_loopback(args.host) and not _api_keys(args):
        raise SystemExit(
            f"error: --host {args.host or '(every interface)'} can be reached from other machines, and the server has "
            "routes that replace its weights: give --api-key too"
        )


def _api_keys(args: argparse.Namespace) -> list[str]:
    return [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY", "")]) if key]


def _log_as_told() -> None:
    """Set the level that VLLM_LOGGING_LEVEL has now. vLLM 0.30 sets the one that it had when vLLM was imported, which
    may have been in another process, before TRL was imported in the owner's and set the variable."""
    told = logging.getLogger("vllm")
    if told.handlers and not os.environ.get("VLLM_LOGGING_CONFIG_PATH"):
        level = os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper()
        told.setLevel(level)
        for handler in told.handlers:
            handler.setLevel(level)


def _configure_environment(args: argparse.Namespace) -> None:
    """Set what the middleware and the plugin read, and what vLLM needs to share a small machine."""
    os.environ[ENV_OWN_SERVER] = "1"
    use_scratch()
    os.environ[ENV_API_KEYS] = "\n".join(_api_keys(args))
    weights = args.weight_transfer_config
    transports = [*([weights.backend] if weights else []), *(["adapter"] if args.enable_lora else [])]
    os.environ[ENV_WEIGHT_TRANSPORTS] = ",".join(transports)
    if args.enable_lora:
        # The route needs the key, as every route that changes weights.
        os.environ.setdefault("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    os.environ[ENV_PROMPT_FIELD] = "1" if "prompt_token_ids" in ChatCompletionRequest.model_fields else ""
    if not current_platform.is_cpu():
        return
    if args.kv_cache_memory_bytes is None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM would take most of the memory
    if args.enforce_eager:
        # vLLM compiles the sampler's helpers anyway: seconds in the first request, and it needs a C++ compiler.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        if os.environ["TORCHDYNAMO_DISABLE"] == "1":
            torch.compiler.set_stance("force_eager")  # the same for functions that this process has decorated already
    if args.distributed_executor_backend is None and args.tensor_parallel_size * args.pipeline_parallel_size == 1:
        _run_the_worker_in_the_engine(args)


def _run_the_worker_in_the_engine(args: argparse.Namespace) -> None:
    """Run a single worker in the engine's process instead of its own.

    On a CPU vLLM gives even a single worker its own process, and both spin while they wait for each other: on a small
    machine that takes the cores that Gym and the trainer need. Without it the calculator's rollouts run about 1.5
    times as fast on two cores (`benchmarks/rollouts.py`), and the server starts sooner. vLLM then does not bind OpenMP
    threads to cores: their number is that of `trl_gym.threads`, and they sleep while they wait.
    """
    args.distributed_executor_backend = "uni"
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # otherwise vLLM turns "uni" back into "mp"
    engine = threads_here(args.model).policy_server or 1
    os.environ.setdefault(NUM_THREADS, str(max(1, engine // max(1, args.data_parallel_size or 1))))
    sys.stderr.write(f"threads: {os.environ[NUM_THREADS]} for each engine, on {num_cores()} cores\n")


def _listen(args: argparse.Namespace, listen_fd: int | None) -> socket.socket:
    """Return the socket to serve on, bound before the engine loads, so that no other process takes the port."""
    if listen_fd is not None:
        sock = socket.socket(fileno=listen_fd)
        os.set_inheritable(listen_fd, False)  # not for the engine: the port is free again when the server has ended
    else:
        try:
            sock = bind_socket(args.host, args.port)
        except OSError as error:
            raise SystemExit(f"error: cannot listen on {args.host}:{args.port}: {error.strerror}") from error
    args.port = sock.getsockname()[1]
    sys.stderr.write(f"listening on {args.host}:{args.port}; the model is loaded next\n")
    return sock
