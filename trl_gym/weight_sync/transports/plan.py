"""Choose the weight transport of a run. Here, and nowhere else, `gym_weight_transport` and its "auto" are interpreted.

    plan = plan_transport(args, model, …)      adapter or whole weights: from the options and the model alone
    plan.server_flags(), .server_environment() for a server that we start, so that it can get its weights that way
    plan.connect(server)                       for a server that is ready, ours or not: the transport that sends

"auto" is `shared` for an engine in this process: nothing is sent. It is `adapter` for an adapter on a quantized base,
which nothing else can carry. Else it is whole weights, because rollouts are faster without an adapter: `ipc` on shared
GPUs, `nccl` to other GPUs, `file` without GPUs, and for a server that runs already the backend that it was started
with. A transport that cannot work is refused with the reason.
"""

from __future__ import annotations

import copy
import json
import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trl_gym import compat
from trl_gym.errors import ConfigError, Problem
from trl_gym.policy_server.adapter_files import config_problems, module_problems
from trl_gym.policy_server.command import is_loopback
from trl_gym.weight_sync import sglang_transfer, vllm_transfer
from trl_gym.weight_sync.merging import is_peft
from trl_gym.weight_sync.source import quantization_method, quantization_of
from trl_gym.weight_sync.transports.adapter import AdapterTransport
from trl_gym.weight_sync.transports.file import FileTransport
from trl_gym.weight_sync.transports.ipc import ENVIRONMENT, IpcTransport
from trl_gym.weight_sync.transports.nccl import NcclTransport
from trl_gym.weight_sync.transports.shared import SharedTransport

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

    from trl_gym.config import GymGRPOConfig
    from trl_gym.policy_server.server import PolicyBackend
    from trl_gym.weight_sync.protocol import WeightTransport

_logger = logging.getLogger(__name__)

_BACKENDS = ("ipc", "nccl", "file")  # of vLLM's weight transfer, those that we have a transport for
# Values of --max-lora-rank (`MaxLoRARanks` in vllm/config/lora.py, 0.30 and 0.31).
_SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_BACKEND_FLAG = """--weight-transfer-config '{{"backend": "{}"}}'"""


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """An adapter that will be trained, as far as a server must know it."""

    rank: int  # `r` of its config
    targets: tuple[str, ...]  # last parts of the names of the adapted modules, sorted, e.g. `("down_proj", "q_proj")`
    problem: str | None  # reason why vLLM cannot serve it as an adapter, or None


@dataclass(frozen=True, slots=True)
class TransportPlan:
    """A decision about the transport; see `plan_transport`."""

    args: GymGRPOConfig  # the trainer's configuration
    on_cuda: bool  # whether the trainer computes on CUDA devices
    # The adapter that is trained, if any. Of a model by name only known if the adapter is sent alone.
    adapter: AdapterPlan | None
    # Kind of quantization of the base that is trained, e.g. `"bitsandbytes"`; None for an ordinary one.
    quantized: str | None
    stored_quantized: bool  # whether the checkpoint itself is quantized
    sends_adapter: bool  # whether the adapter is sent alone
    shares_weights: bool = False  # whether the engine computes with the trainer's own weights

    @property
    def backend(self) -> str:
        """Backend of vLLM's weight transfer for a server that we start, also where an adapter is sent. Raises
        `ConfigError`: the transport that was asked for cannot work in this placement."""
        wanted, shares_devices = self.args.gym_weight_transport, self.args.gym_server_devices is None
        if wanted in ("auto", "adapter"):
            return ("ipc" if shares_devices else "nccl") if self.on_cuda else "file"
        problem = None
        if wanted in ("ipc", "nccl") and not self.on_cuda:
            problem = Problem("the trainer does not compute on CUDA devices.", "Use 'file'.")
        elif wanted == "ipc" and not shares_devices:
            problem = Problem(
                "the server runs on other GPUs (`gym_server_devices`).", "Use 'nccl', or leave the devices out."
            )
        elif wanted == "nccl" and shares_devices:
            problem = Problem(
                "NCCL does not connect two processes on one GPU.", "Use 'ipc', or set `gym_server_devices`."
            )
        if problem is not None:
            raise ConfigError(f"`gym_weight_transport` is {wanted!r}, and {problem.text}", problem.remedy)
        return wanted

    def server_flags(self) -> dict[str, Any]:
        """Return the flags of `vllm serve` for a server that we start. Raises `ConfigError`: the transport cannot work
        in this placement, or vLLM cannot load the checkpoint."""
        flags: dict[str, Any] = {"weight-transfer-config": json.dumps({"backend": self.backend})}
        if not self.sends_adapter:
            return flags
        if self.quantized == "bitsandbytes" and self.stored_quantized:
            raise ConfigError(
                "The policy server cannot load the checkpoint: vLLM has no bitsandbytes since 0.31.",
                "Name the checkpoint that is not quantized as `model`, and quantize it for training with "
                "`model_init_kwargs: {quantization_config: …}`.",
            )
        assert self.adapter is not None  # else `plan_transport` had refused
        return flags | lora_flags(self.adapter, self.args.gym_max_adapters)

    def sglang_flags(self) -> dict[str, Any]:
        """Return the flags of SGLang's server that we start. Whole weights need none. Raises `ConfigError`: SGLang
        takes no weights this way."""
        wanted = self.args.gym_weight_transport
        if wanted not in ("auto", "file", "nccl", "adapter"):
            raise ConfigError(
                f"`gym_weight_transport` is {wanted!r}, and SGLang is sent weights by 'file', 'nccl' or 'adapter'.",
                "Leave it at 'auto'.",
            )
        if wanted == "nccl":
            _ = self.backend  # raises where it cannot work in this placement
        if not self.sends_adapter:
            return {}
        assert self.adapter is not None  # else `plan_transport` had refused
        if not self.on_cuda:
            raise ConfigError(
                "SGLang serves adapters with a GPU only (its LoRA layers pin memory, 0.5.23), and the trainer uses "
                "no CUDA device.",
                "Set `gym_weight_transport` to 'file', by which the adapter is merged, or `gym_engine` to 'vllm'.",
            )
        return {
            "enable-lora": True,
            "max-lora-rank": self.adapter.rank,
            # Requests without one count as well; SGLang must hold as many as it may use at a time.
            **dict.fromkeys(("max-loras-per-batch", "max-loaded-loras"), self.args.gym_max_adapters + 1),
            "lora-target-modules": list(self.adapter.targets),
        }

    def server_environment(self) -> Mapping[str, str]:
        """Return environment variables for a server that we start, which listens on a loopback address."""
        return ENVIRONMENT if self.backend == "ipc" else {}

    def connect(self, server: PolicyBackend) -> WeightTransport:
        """Return the transport to a server. The same on every rank.

        Args:
            server: A policy server that is ready.

        Raises:
            ConfigError: Nothing fits, or the transport that was asked for does not; says why and what does.
            UnsupportedVersionError: `ipc` or `nccl`, and this environment lacks vLLM or has another version.
        """
        if self.shares_weights:
            return SharedTransport()
        if self.sends_adapter:
            return self._adapter_transport(server)
        if "adapter" in server.weight_transports:  # wrapped layers do not take whole weights (0.31)
            if (wanted := self.args.gym_weight_transport) == "auto":
                return self._adapter_transport(server)
            raise ConfigError(
                f"`gym_weight_transport` is {wanted!r}, and the policy server was started with --enable-lora, where "
                "whole weights cannot be replaced.",
                "Set it to 'adapter', or start the server without that flag.",
            )
        if self.adapter is not None:
            alone = self.adapter.problem
            _logger.info(
                "`gym_weight_transport` is %r: whole weights are sent, with the adapter merged into them; %s",
                self.args.gym_weight_transport,
                "'adapter' would send it alone" if alone is None else f"it cannot be sent alone: {alone}",
            )
        return _whole_weights(self.args, self.on_cuda, server)

    def _adapter_transport(self, server: PolicyBackend) -> WeightTransport:
        adapter = _servable(self.args, self.adapter, self.quantized)
        if (problem := server_problem(adapter, server.client.server_config())) is not None:
            raise ConfigError(problem.text, problem.remedy)
        return AdapterTransport(self.args.gym_weight_dir, max_adapters=self.args.gym_max_adapters)


def plan_transport(
    args: GymGRPOConfig,
    model: str | torch.nn.Module,
    peft_config: PeftConfig | None = None,
    quantization_config: Any = None,
    *,
    on_cuda: bool,
    shares_weights: bool = False,
) -> TransportPlan:
    """Decide what is sent, and how. Local, the same on every rank; asked before the server is started, and again with
    the model that was loaded, which gives the same answer.

    Args:
        model: Name or folder of a model, or the model without wrappers; may have its adapter already.
        peft_config: Adapter that the trainer will put on it.
        on_cuda: Whether the trainer computes on CUDA devices.
        shares_weights: Whether the engine computes with the trainer's own weights, so that nothing is sent.

    Raises:
        ConfigError: Only an adapter can be sent, or was asked for, and vLLM cannot serve it; or whole weights were
            asked for and the base is quantized.
    """
    wanted = args.gym_weight_transport
    if shares_weights:
        return TransportPlan(args, on_cuda, None, None, False, False, shares_weights=True)
    if wanted == "shared":
        raise ConfigError(
            "`gym_weight_transport` is 'shared', and the policy server has a process of its own.",
            "Leave it at 'auto', or set `gym_engine` to 'transformers'.",
        )
    stored = _stored_quantization(model, args.trust_remote_code)
    quantized = stored
    if isinstance(model, str):
        asked = quantization_config or (args.model_init_kwargs or {}).get("quantization_config")
        quantized = stored if asked is None else quantization_method(asked)
    if quantized is not None and wanted not in ("auto", "adapter"):
        raise ConfigError(
            f"`gym_weight_transport` is {wanted!r}, and the base is quantized ({quantized}), which would round away "
            "what is merged into it.",
            "Set it to 'adapter'.",
        )
    sends_adapter = wanted == "adapter" or (wanted == "auto" and quantized is not None)
    adapter = None
    if sends_adapter or is_peft(model):
        adapter = plan_adapter(model, peft_config, trust_remote_code=args.trust_remote_code)
    if sends_adapter:
        _servable(args, adapter, quantized)
    stored_quantized = isinstance(model, str) and stored is not None
    return TransportPlan(args, on_cuda, adapter, quantized, stored_quantized, sends_adapter)


def lora_flags(adapter: AdapterPlan, max_adapters: int) -> dict[str, Any]:
    """Return the flags of `vllm serve` for an adapter without a problem.

    The modules are named, because vLLM would otherwise wrap the head as well: 0.31 then dies of a request for prompt
    log-probabilities on a CPU, and leaves the adapter's part out of them elsewhere.
    """
    return {
        "enable-lora": True,
        "max-loras": max_adapters,
        "max-lora-rank": next(rank for rank in _SERVER_RANKS if rank >= adapter.rank),
        "lora-target-modules": list(adapter.targets),
    }


def _whole_weights(args: GymGRPOConfig, on_cuda: bool, server: PolicyBackend) -> WeightTransport:
    name = _backend_of(server, args.gym_weight_transport)
    if name != "file" and not on_cuda:
        raise ConfigError(
            f"The policy server takes weights by `{name}`, and the trainer does not compute on CUDA devices.",
            f"Start the server with {_BACKEND_FLAG.format('file')}.",
        )
    if name == "file":
        problem = None if args.gym_weight_dir is not None else _unshared_memory(server)  # a folder: seen by `connect`
    elif (engine := server.client.info().get("engine", "vllm")) == "vllm":
        compat.check_versions(("vllm",))  # both sides pack with its code
        problem = _ipc_problem(server) if name == "ipc" else None
    else:
        problem = None
    if problem is not None:
        raise ConfigError(f"The policy server takes weights by `{name}`, and {problem.text}", problem.remedy)
    if name == "file":
        return FileTransport(args.gym_weight_dir)
    if name == "ipc":
        return IpcTransport(args.gym_weight_buffer_mb)
    return NcclTransport(args.gym_weight_buffer_mb, sglang_transfer if engine == "sglang" else vllm_transfer)


def _backend_of(server: PolicyBackend, wanted: str) -> str:
    """Return the backend by which the server takes whole weights. It has one, for as long as it lives."""
    accepted = [name for name in server.weight_transports if name in _BACKENDS]
    if not accepted:
        named = ", ".join(server.weight_transports) or "nothing"
        raise ConfigError(
            f"The policy server at {', '.join(server.base_urls)} takes weights by {named} only; trl-gym sends them "
            "by ipc, nccl or file.",
            f"Start the server with {_BACKEND_FLAG.format('file')}.",
        )
    if wanted != "auto" and wanted not in accepted:
        raise ConfigError(
            f"`gym_weight_transport` is {wanted!r}, and the policy server at {', '.join(server.base_urls)} was "
            f"started for {', '.join(accepted)}.",
            f"Leave the option at 'auto', or start the server with {_BACKEND_FLAG.format(wanted)}.",
        )
    return wanted if wanted != "auto" else accepted[0]


def _unshared_memory(server: PolicyBackend) -> Problem | None:
    for url in server.base_urls:
        host = urlsplit(url).hostname or ""
        if not is_this_host(host):
            return Problem(
                f"{host} is another host, which does not see our shared memory.",
                "Set `gym_weight_dir` to a folder on a disk that both hosts mount, or start the server with "
                f"{_BACKEND_FLAG.format('nccl')}.",
            )
    return None


def _ipc_problem(server: PolicyBackend) -> Problem | None:
    others = [host for url in server.base_urls if not is_loopback(host := urlsplit(url).hostname)]
    if others:
        return Problem(
            f"{others[0]} is not a loopback address: CUDA IPC needs shared GPUs, and its messages are unpickled.",
            f"Start the server with --host 127.0.0.1 here, or with {_BACKEND_FLAG.format('nccl')}.",
        )
    [(variable, value)] = ENVIRONMENT.items()
    if not server.client.server_environment().get(variable):
        return Problem(
            f"it was started without {variable}={value}, which handles of CUDA IPC need over HTTP.",
            "Start it again with that in its environment.",
        )
    return None


def is_this_host(host: str) -> bool:
    """Check whether a name or an address is this machine's: its own addresses are those that one can bind to."""
    if is_loopback(host):
        return True
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def plan_adapter(
    model: str | torch.nn.Module, peft_config: PeftConfig | None = None, *, trust_remote_code: bool = False
) -> AdapterPlan | None:
    """Find out what a server must be able to serve.

    Args:
        model: Name or folder of a model, or the model; may have its adapter already.
        peft_config: Adapter that the trainer will put on it. PEFT finds the modules that it means, on a model without
            weights.

    Returns:
        None if no adapter is trained.
    """
    if is_peft(model):
        adapted: Any = model
    elif peft_config is None:
        return None
    else:
        adapted = _adapted_skeleton(model, peft_config, trust_remote_code)
    active = list(adapted.active_adapters)
    if len(active) != 1:
        return AdapterPlan(0, (), f"{len(active)} adapters are active ({', '.join(active)}), one serves a call")
    config = adapted.peft_config[active[0]].to_dict()
    modules = _adapted_modules(adapted, active[0])
    problems = config_problems(config) or [*module_problems(modules), *_tower_problems(adapted, modules)]
    rank = config.get("r") or 0
    if not problems and rank > _SERVER_RANKS[-1]:
        problems = [f"its rank is {rank} and vLLM serves up to {_SERVER_RANKS[-1]}"]
    if not problems and not modules:
        problems = ["the adapter has no module"]
    targets = tuple(sorted({name.rsplit(".", 1)[-1] for name in modules}))
    return AdapterPlan(rank, targets, "; ".join(problems) or None)


def server_problem(adapter: AdapterPlan, server_config: Mapping[str, Any]) -> Problem | None:
    """Say why a server cannot serve an adapter, or None.

    Args:
        adapter: An adapter without a problem of its own.
        server_config: vLLM's resolved configuration (`PolicyClient.server_config`).
    """
    lora, needed = server_config.get("lora_config"), lora_flags(adapter, 2)
    flags = " ".join(
        f"--{name}" if value is True else f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in needed.items()
    )
    problem = None
    if not lora:
        problem = "The policy server was started without --enable-lora."
    elif lora["max_lora_rank"] < adapter.rank:
        problem = (
            f"The adapter's rank is {adapter.rank} and the policy server was started with --max-lora-rank "
            f"{lora['max_lora_rank']}."
        )
    elif (targets := lora.get("target_modules")) is None:
        problem = (
            "The policy server was started without --lora-target-modules, and vLLM then computes wrong prompt "
            "log-probabilities, or dies of them."
        )
    elif missing := sorted(set(adapter.targets).difference(targets)):
        problem = f"The policy server's --lora-target-modules lacks {', '.join(missing)}."
    if problem is not None:
        return Problem(problem, f"Start it with {flags}.")
    parallel = server_config.get("parallel_config", {})
    if parallel.get("data_parallel_external_lb") or parallel.get("data_parallel_hybrid_lb"):
        return Problem(
            "The policy server balances its data-parallel replicas elsewhere, and an adapter reaches only some.",
            "Start it with vLLM's own balancing, or use a transport that sends whole weights.",
        )
    return None


def _servable(args: GymGRPOConfig, adapter: AdapterPlan | None, quantized: str | None) -> AdapterPlan:
    """Return an adapter that vLLM can serve, or raise `ConfigError`."""
    problem = "no LoRA adapter is trained" if adapter is None else adapter.problem
    if adapter is not None and problem is None:
        if args.gym_max_adapters <= args.gym_max_staleness:
            raise ConfigError(
                f"`gym_max_adapters` is {args.gym_max_adapters} and `gym_max_staleness` {args.gym_max_staleness}: "
                "rollouts in flight hold that many older versions of the adapter, and a new one has no room.",
                f"Set `gym_max_adapters` to {args.gym_max_staleness + 1} or more.",
            )
        return adapter
    remedy = "Train plain LoRA on linear layers of the blocks (`peft_config`)"
    if quantized is not None:
        why = f"the base is quantized, {quantized}"
    elif args.gym_weight_transport == "adapter":
        why, remedy = "`gym_weight_transport` is 'adapter'", f"{remedy}, or use 'auto', which sends whole weights"
    else:
        why = "the policy server was started with --enable-lora"
    raise ConfigError(f"Only an adapter can be sent ({why}), and {problem}.", f"{remedy}.")


def _adapted_modules(adapted: Any, adapter: str) -> tuple[str, ...]:
    """Return the names in the base model of the modules that have this adapter's matrices."""
    return tuple(
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if adapter in getattr(module, "lora_A", ()) or adapter in getattr(module, "lora_embedding_A", ())
    )


def _tower_problems(adapted: Any, modules: Sequence[str]) -> list[str]:
    """vLLM ignores adapters on towers for images and audio, and a probe of text would not show it."""
    config = getattr(adapted, "config", None)
    if config is None or config.get_text_config() is config:
        return []
    outside = [name for name in modules if "language_model" not in name]
    return [f"{outside[0]} has an adapter: vLLM serves those of the language model only"] if outside else []


def _adapted_skeleton(model: Any, peft_config: Any, trust_remote_code: bool) -> Any:
    """Build the model with its adapter, without memory for either."""
    import transformers
    from peft import get_peft_model

    if isinstance(model, str):
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        skeleton = compat.empty_model(config, trust_remote_code=trust_remote_code)
    else:
        skeleton = compat.empty_model(model.config, type(model))
    return get_peft_model(skeleton, copy.deepcopy(peft_config), autocast_adapter_dtype=False)


def _stored_quantization(model: Any, trust_remote_code: bool) -> str | None:
    """Return the kind of quantization of a checkpoint, or of a model as it was loaded."""
    if not isinstance(model, str):
        return quantization_of(model.get_base_model() if is_peft(model) else model)
    import transformers

    config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    return quantization_method(getattr(config, "quantization_config", None))
