"""The server process: vLLM's OpenAI server plus our defaults.

    python -m trl_gym.policy_server MODEL [--host H] [--port P] [--listen-fd N] [any flag of `vllm serve`]

This is what `PolicyServer` spawns; people use `trl-gym serve`, which supervises it. Environment variables are set here
before vLLM is imported, because vLLM reads some of them while it is. Everything that touches vLLM is in
`vllm_entry.py`.

Contract with the owner:
  * `--listen-fd N` is a bound, listening socket. Without it, the socket is bound here before the model is loaded.
  * `TRL_GYM_NONCE` comes back from `GET /trl_gym/info`, which proves that this process answers and no other.
  * `VLLM_API_KEY` (or `--api-key`) is demanded on every route but `/health`.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Sequence

# How the owner and this process set the middleware up, which vLLM builds.
ENV_NONCE = "TRL_GYM_NONCE"
ENV_API_KEYS = "TRL_GYM_API_KEY"  # one per line
ENV_PROMPT_FIELD = "TRL_GYM_PROMPT_FIELD"  # "1" if the server takes `prompt_token_ids` as a field of the request

MIDDLEWARE = "trl_gym.policy_server.middleware.app.OnPolicyMiddleware"

# Flags of `vllm serve` that we set unless the user does. Same names, dashes as underscores.
DEFAULT_FLAGS: dict[str, object] = {
    "host": "127.0.0.1",
    "served_model_name": ["policy"],
    "weight_transfer_config": '{"backend": "file"}',
    # Sums over the weights that it holds: which ones differ, when a probe finds that something does.
    "worker_extension_cls": "trl_gym.policy_server.engine.worker.WeightSums",
    "generation_config": "vllm",  # no top_k, top_p from the model's generation_config.json behind the trainer's back
    "logprobs_mode": "processed_logprobs",  # what the trainer computes at temperature ≠ 1
    "enable_prompt_tokens_details": True,  # tokens from the prefix cache, for the call records
    "enable_per_request_metrics": True,  # seconds in queue, prefill and decode, for the call records
    "disable_uvicorn_access_log": True,
}

DEFAULT_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # pause, resume, sleep and the weight transfer routes
    "VLLM_NO_USAGE_STATS": "1",
    # Gym's connection pool and our own keep connections open between steps. Closed by the server after vLLM's default
    # of 5 s, a request that is just being sent dies with "connection reset".
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
}


def is_loopback(host: str | None) -> bool:
    """Whether only this machine can reach `host`. Empty means every interface."""
    if not host:
        return False
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: Sequence[str]) -> int:
    """Serve until SIGINT or SIGTERM.

    Returns:
        The exit status.

    Raises:
        SystemExit: For a flag that is wrong, with status 2 or a message.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--listen-fd", type=int)
    options, vllm_argv = own.parse_known_args(argv)
    for name, value in DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    from trl_gym.policy_server.engine import entry as vllm_entry

    try:
        vllm_entry.serve(vllm_argv, listen_fd=options.listen_fd)
    except KeyboardInterrupt:
        return 130
    return 0
