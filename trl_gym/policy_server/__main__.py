"""Run the server process: vLLM's OpenAI server plus our defaults, or transformers in its place.

    python -m trl_gym.policy_server MODEL [--host H] [--port P] [--listen-fd N] [any flag of `vllm serve`]
    python -m trl_gym.policy_server MODEL --engine transformers [… those of `transformers_engine/alone.py`]

`PolicyServer` spawns this; people use `trl-gym serve`, which supervises it. Environment variables are set here before
vLLM is imported, because vLLM reads some of them at import. Everything that touches vLLM is in `engine/`.

Contract with the owner:
  * `--listen-fd N` is a bound, listening socket. Without it, the socket is bound here before the model is loaded.
  * `TRL_GYM_NONCE` comes back from `GET /trl_gym/info`, which proves that this process answers and no other.
  * `TRL_GYM_SCRATCH` is a folder for sockets and temporary files, which the owner removes when all has ended.
  * `VLLM_API_KEY` (or `--api-key`) is demanded on every route but `/health`; without one the server samples and
    takes no weights (`middleware/identity.py`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from trl_gym.errors import TrlGymError
from trl_gym.policy_server.command import DEFAULT_ENVIRONMENT, ENGINES
from trl_gym.threads import wait_without_spinning


def main(argv: Sequence[str]) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit status. Raises `SystemExit`: a flag is wrong; with status 2 or a
    message."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--listen-fd", type=int)
    own.add_argument("--engine", choices=ENGINES, default=ENGINES[0])
    options, rest = own.parse_known_args(argv)
    if options.engine == "transformers":
        return _transformers(rest, options.listen_fd)
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    from trl_gym.policy_server.engine import entry

    try:
        entry.serve(rest, listen_fd=options.listen_fd)
    except KeyboardInterrupt:
        return 130
    return 0


def _transformers(argv: Sequence[str], listen_fd: int | None) -> int:
    wait_without_spinning()
    from trl_gym.policy_server.transformers_engine import alone

    try:
        alone.main(argv, listen_fd=listen_fd)
    except TrlGymError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")  # as the cause of a death is found in a log
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":  # vLLM's worker processes import this module again
    sys.exit(main(sys.argv[1:]))
