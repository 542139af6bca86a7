"""Run vLLM's server with our defaults. The only file that imports vLLM's server; importing it imports vLLM.

It was read with vLLM 0.30 and run with 0.31, where the server is in `vllm.entrypoints.launchers`. It uses the argument
parser of `vllm serve`, its validation, and `run_server_worker(listen_address, sock, args)`, which takes a socket that
is already bound. When a release moves these names, only this file changes.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence

import uvloop
import vllm.logger
from vllm.entrypoints.launchers.api_server.entry import run_server_worker
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.system_utils import decorate_logs, set_ulimit

from trl_gym.policy_server.command import DEFAULT_FLAGS, ENV_API_KEYS, ENV_PROMPT_FIELD, MIDDLEWARE, is_loopback
from trl_gym.policy_server.engine.plugin import ENV_OWN_SERVER
from trl_gym.processes import bind_socket

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
    cli_env_setup()
    args = parse_args(argv)
    if configure_logging := getattr(vllm.logger, "configure_logging_from_args", None):  # since 0.31
        configure_logging(args)
    _configure_environment(args)
    sock = _listen(args, listen_fd)
    set_ulimit()
    decorate_logs("APIServer")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until uvicorn has its own handlers
    host, port = sock.getsockname()[:2]
    uvloop.run(run_server_worker(f"http://{host}:{port}", sock, args))


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse vLLM's own arguments with our defaults, and refuse those that a policy server cannot have.

    Raises:
        SystemExit: See `serve`.
    """
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


def _configure_environment(args: argparse.Namespace) -> None:
    """Set what the middleware and the plugin read, and what vLLM needs to share a small machine."""
    os.environ[ENV_OWN_SERVER] = "1"
    os.environ[ENV_API_KEYS] = "\n".join(_api_keys(args))
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
    if args.distributed_executor_backend is None and args.tensor_parallel_size * args.pipeline_parallel_size == 1:
        _run_the_worker_in_the_engine(args)


def _run_the_worker_in_the_engine(args: argparse.Namespace) -> None:
    """Run a single worker in the engine's process instead of its own.

    On a CPU vLLM gives even a single worker its own process, and both spin while they wait for each other: on a small
    machine that takes the cores that Gym and the trainer need. Without it the calculator's rollouts run about 1.5
    times as fast on two cores (`benchmarks/rollouts.py`), and the server starts sooner. vLLM then does not bind OpenMP
    threads to cores, so their number is limited instead: one core is left to the others.
    """
    args.distributed_executor_backend = "uni"
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # otherwise vLLM turns "uni" back into "mp"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) - 1)))


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
