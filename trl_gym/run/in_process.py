"""Policy servers in the training processes: one per rank, each with its rank's copy of the model, used as one.

    every rank   new_server ── start ──┐                        ┌── take_model, when the trainer has loaded it
    all ranks                          └── join: tell the URLs ─┘
    rank 0       is the only one that controls them, all at once (`PolicyClient`), and NeMo Gym gets the list

All copies are equal after each optimizer step, so that it does not matter which of them a rollout is sampled with.
Each rank lets its own engine sample and rest (`TransformersServer.sampling`), which ranks do in step: a rank waits for
the rollouts of all before it goes on.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from transformers import AutoConfig, AutoTokenizer

from trl_gym import compat
from trl_gym.engines import require_fit
from trl_gym.errors import ConfigError, PolicyServerLostError
from trl_gym.policy_server.transformers_engine.answers import choose, reader_of
from trl_gym.policy_server.transformers_engine.server import TransformersServer
from trl_gym.policy_server.transformers_engine.session import check_positions
from trl_gym.ranks import Gather, Process, agree, agreed
from trl_gym.weight_sync.source import quantization_method, quantization_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trl_gym.config import GymGRPOConfig

_REMEDY = "Set `gym_engine` to 'vllm'."


def new_server(
    args: GymGRPOConfig,
    model: str | PreTrainedModel,
    processing_class: Any = None,
    quantization_config: Any = None,
    *,
    api_key: str,
) -> TransformersServer:
    """Return this rank's policy server, not started.

    Args:
        quantization_config: Quantization with which the trainer will load the model.
        api_key: The same on all ranks.

    Raises:
        ConfigError: See `engines.require_fit` and `require_servable`.
    """
    require_fit(args)
    require_servable(args, model, quantization_config)
    told = args.gym_response_template
    if isinstance(model, str) and processing_class is None:
        reader = choose(model, told)
    else:
        name = model if isinstance(model, str) else compat.model_id(model)
        if processing_class is None and not name:
            raise ConfigError(
                "`model` was not loaded from a folder or hub id, so the policy server needs a tokenizer.",
                "Pass `processing_class`.",
            )
        tokenizer = processing_class or AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        reader = reader_of(_config_of(args, model), getattr(tokenizer, "tokenizer", tokenizer), told)
    return TransformersServer(
        reader=reader,
        max_model_len=args.vllm_max_model_length,
        max_concurrency=args.rollouts_in_flight(1),
        api_key=api_key,
        start_timeout_s=args.gym_server_start_timeout,
        hang_timeout_s=args.gym_server_hang_timeout,
    )


def require_servable(args: GymGRPOConfig, model: str | PreTrainedModel, quantization_config: Any = None) -> None:
    """Refuse a model that cannot be sampled from in the trainer's process, before it is loaded. Local.

    Args:
        quantization_config: Quantization with which the trainer will load it.

    Raises:
        ConfigError: It is quantized, reads images or sounds, or was made for a shorter context.
    """
    config = _config_of(args, model)
    if isinstance(model, str):
        asked = quantization_config or (args.model_init_kwargs or {}).get("quantization_config")
        quantized = quantization_method(asked or getattr(config, "quantization_config", None))
    else:
        quantized = quantization_of(model.get_base_model() if hasattr(model, "get_base_model") else model)
    name = model if isinstance(model, str) else compat.model_id(model) or type(model).__name__
    if quantized is not None:
        raise ConfigError(
            f"The model {name} is quantized ({quantized}), and `gym_engine` 'transformers' was never run with such "
            "weights.",
            f"Load it without quantization. {_REMEDY}",
        )
    media = [part for part in ("vision_config", "audio_config") if getattr(config, part, None) is not None]
    if media:
        raise ConfigError(
            f"The model {name} reads more than text (`{media[0]}`), and `gym_engine` 'transformers' samples from text "
            "models only.",
            _REMEDY,
        )
    made_for = getattr(config.get_text_config(), "max_position_embeddings", None)
    if made_for is not None and (args.vllm_max_model_length or 0) > made_for:
        raise ConfigError(
            f"`vllm_max_model_length` is {args.vllm_max_model_length:,} and the model {name} was made for "
            f"{made_for:,} tokens.",
            "Lower `vllm_max_model_length`.",
        )
    if (length := args.vllm_max_model_length or made_for) is not None:
        check_positions(config, length)


def _config_of(args: GymGRPOConfig, model: str | PreTrainedModel) -> Any:
    if not isinstance(model, str):
        return model.config
    revision = (args.model_init_kwargs or {}).get("revision")
    return AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code, revision=revision)


def join(server: TransformersServer, gather: Gather = gather_object) -> None:
    """Make one policy of the servers of all ranks. Every rank calls it in step, with a server that was started. Raises
    `ConfigError`: ranks are on several hosts: the servers listen on loopback addresses."""
    told: list[tuple[str, str]] = gather([(socket.gethostname(), server.own_url)])
    hosts = {host for host, _ in told}
    if len(hosts) > 1:
        raise ConfigError(
            f"The training processes are on {len(hosts)} hosts, and those of `gym_engine` 'transformers' must be on "
            "one: their policy servers listen on loopback addresses.",
            f"Train on one host. {_REMEDY}",
        )
    server.join([url for _, url in told])


def restart_others(process: Process, server: TransformersServer, gather: Gather = gather_object) -> None:
    """If the engine of any rank has died, restart those of the ranks above 0, and let rank 0 know, which restarts its
    own as often as it may. Every rank calls it in step. Raises `PolicyServerError`: on every rank, when one does not
    come back."""
    loss = None
    try:
        server.check()
    except PolicyServerLostError as error:
        loss = error.problem
    texts = agree(None, process.process_index, gather, loss)
    told = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
    if not told:
        return
    with agreed(process, gather):
        if process.process_index == 0:
            server.note_loss(PolicyServerLostError(told[0]))
        else:
            server.restart()


def precision_of(mixed_precision: str) -> torch.dtype | None:
    """Return the precision of accelerate's autocast, None where there is none."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
