"""Serve a model with the transformers engine in a process of its own: `trl-gym serve --engine transformers MODEL`.

The application is the one that serves in a trainer's process (`server.py`), over a model that this process has alone
and that nobody trains here. New weights arrive in files (`weight_files.py`). The contract with the owner is that of
every policy server process (`policy_server/__main__.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trl_gym.errors import ConfigError
from trl_gym.policy_server.command import ENV_NONCE, KEY_VARIABLE, is_loopback
from trl_gym.policy_server.parsers import Parsers
from trl_gym.policy_server.transformers_engine import answers
from trl_gym.processes import bind_socket
from trl_gym.redaction import log_without_secrets

if TYPE_CHECKING:
    import uvicorn

    from trl_gym.policy_server.transformers_engine.engine import Engine

_CHECK_EVERY_S = 1.0
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_KEEP_ALIVE_S = 600  # Gym's connection pool and our own keep connections open between steps


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that `trl-gym serve --engine transformers` takes besides those of every server."""
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="auto", help="precision of the weights (default: the model's)"
    )
    parser.add_argument("--device", help="e.g. cuda:1 or cpu (default: an accelerator where there is one)")
    parser.add_argument(
        "--max-model-len",
        type=int,
        metavar="TOKENS",
        help="tokens of prompt and completion together (default: what the model was made for)",
    )
    parser.add_argument(
        "--max-num-seqs",
        type=int,
        default=256,
        metavar="N",
        help="calls that are sampled at once (default: %(default)s)",
    )
    parser.add_argument(
        "--response-template",
        metavar="NAME",
        help="what reads tool calls and thinking: a name of TRL's, a JSON file, or none (default: guessed)",
    )


def chosen_parsers(model: str | Path, flags: Sequence[str]) -> Parsers:
    """Return what reads a model's answers. Raises `ConfigError`: see `answers.choose`.

    Args:
        model: Folder, or name on the model hub.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--response-template")
    return answers.choose(model, parser.parse_known_args(flags)[0].response_template).parsers


def main(argv: Sequence[str], *, listen_fd: int | None) -> None:
    """Load the model and serve until SIGINT or SIGTERM.

    Args:
        listen_fd: Inherited socket, bound and listening. Default: a new one, bound to `--host` and `--port`.

    Raises:
        SystemExit: Flags are wrong; names them.
        TrlGymError: The model cannot be served so.
    """
    parser = argparse.ArgumentParser(prog="trl-gym serve --engine transformers", allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--served-model-name", default="policy")
    add_flags(parser)
    options = parser.parse_args(argv)
    key = os.environ.get(KEY_VARIABLE, "")
    if not is_loopback(options.host) and not key:
        parser.error(f"--host {options.host} can be reached from other machines: set {KEY_VARIABLE}")
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    log_without_secrets()
    with _listen(options, listen_fd) as sock:
        _serve(options, sock, key)


def _listen(options: argparse.Namespace, listen_fd: int | None) -> socket.socket:
    """Return the socket to serve on, bound before the model is loaded, so that no other process takes the port."""
    if listen_fd is not None:
        return socket.socket(fileno=listen_fd)
    try:
        return bind_socket(options.host, options.port)
    except OSError as error:
        raise SystemExit(f"error: cannot listen on {options.host}:{options.port}: {error.strerror}") from error


def _serve(options: argparse.Namespace, sock: socket.socket, key: str) -> None:
    import torch
    import uvicorn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings
    from trl_gym.policy_server.transformers_engine.app import EngineApp
    from trl_gym.policy_server.transformers_engine.engine import Engine
    from trl_gym.policy_server.transformers_engine.rendering import ChatRenderer
    from trl_gym.policy_server.transformers_engine.session import EngineOptions, turn_ends
    from trl_gym.policy_server.transformers_engine.weight_files import ModelFiles

    device = options.device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).to(device)
    length = context_of(
        getattr(model.config.get_text_config(), "max_position_embeddings", None), options.max_model_len
    )
    engine = Engine(
        EngineOptions(max_model_len=length, max_concurrency=options.max_num_seqs),
        eos_token_ids=turn_ends(model, tokenizer),
    )
    engine.take(model)
    engine.unpark()  # for as long as this process lives
    reader = answers.reader_of(model.config, tokenizer, options.response_template)
    renderer = ChatRenderer(tokenizer, response_template=reader.template)
    app = OnPolicyMiddleware(
        EngineApp(engine, renderer, model_name=options.served_model_name, weight_loader=ModelFiles()),
        Settings(nonce=os.environ.get(ENV_NONCE), api_keys=(key,) if key else (), weight_transports=("file",)),
    )
    config = uvicorn.Config(
        app, lifespan="off", ws="none", log_config=None, access_log=False, timeout_keep_alive=_KEEP_ALIVE_S
    )
    asyncio.run(_answer(uvicorn.Server(config), sock, engine))


def context_of(made_for: int | None, asked: int | None) -> int:
    """Return the tokens of prompt and completion together.

    Args:
        made_for: Positions of the model, as far as it says.
        asked: Value of `--max-model-len`.

    Raises:
        ConfigError: The model was made for less, or nobody says.
    """
    if made_for is None and asked is None:
        raise ConfigError("The model does not say for how many tokens it was made.", "Give --max-model-len.")
    if made_for is not None and asked is not None and asked > made_for:
        raise ConfigError(
            f"--max-model-len is {asked:,} and the model was made for {made_for:,} tokens.", "Lower --max-model-len."
        )
    return asked or made_for or 0


async def _answer(server: uvicorn.Server, sock: socket.socket, engine: Engine) -> None:
    """Serve until a signal comes. Raises `EngineLostError` once the engine is lost: this process is of no use then."""
    serving = asyncio.ensure_future(server.serve(sockets=[sock]))
    try:
        while not (serving.done() or server.should_exit):
            await asyncio.wait({serving}, timeout=_CHECK_EVERY_S)
            engine.check()
    finally:
        server.should_exit = True
        await asyncio.to_thread(engine.end)  # calls that wait, as in a pause, would hold it
        await serving
