"""Which transport a run uses: chosen from the placement, overridable, refused early where it cannot work.

Two stages, because the server has to be started for the way in which it will get weights:

    `planned_backend`    before a server is started: its `--weight-transfer-config`, and `environment_for` it
    `choose_transport`   when it is ready, or was attached to: the object that sends
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trl_gym import compat
from trl_gym.errors import ConfigError
from trl_gym.policy_server.adapter_files import config_problems, module_problems
from trl_gym.policy_server.command import is_loopback
from trl_gym.weight_sync.transports import ipc
from trl_gym.weight_sync.transports.file import FileTransport
from trl_gym.weight_sync.transports.nccl import NcclTransport

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

    from trl_gym.config import GymGRPOConfig
    from trl_gym.policy_server.server import PolicyBackend
    from trl_gym.weight_sync.protocol import WeightTransport


# --------------------------------------------------------------------------------------------------------------------
# Can vLLM serve this adapter, and with which flags? Two stages, as for every transport:
#
#     `managed_flags`   before a server is started: the flags with which it serves what `plan_adapter` finds
#     `adapter_problem` when model and server are there: why the transport cannot be used, if it cannot
#     `merged_problem`  why whole weights cannot be sent instead
#
# A reason is one clause, made to be put into a message: "…, because <reason>".

# Values of --max-lora-rank (`MaxLoRARanks` in vllm/config/lora.py, 0.30 and 0.31).
_SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """An adapter that will be trained, as far as a server must know it.

    Attributes:
        rank: Its `r`.
        targets: Last parts of the names of the adapted modules, sorted, e.g. `("down_proj", "q_proj")`.
        problem: Why it cannot be served as an adapter, or None.
    """

    rank: int
    targets: tuple[str, ...]
    problem: str | None


def plan_adapter(
    model: str | torch.nn.Module, peft_config: PeftConfig | None = None, *, trust_remote_code: bool = False
) -> AdapterPlan | None:
    """What a server must be able to serve.

    Args:
        model: Name or folder of a model, or the model; may have its adapter already.
        peft_config: Of the adapter that the trainer will put on it. Which modules it means is asked of PEFT, on a
            model without weights.
        trust_remote_code: For a model by name.

    Returns:
        None if no adapter is trained.
    """
    if _is_peft(model):
        adapted: Any = model
    elif peft_config is None:
        return None
    else:
        adapted = _adapted_skeleton(model, peft_config, trust_remote_code)
    return _plan_of(adapted)


def managed_flags(
    args: GymGRPOConfig,
    model: str | torch.nn.Module,
    peft_config: PeftConfig | None,
    quantization_config: Any = None,
) -> dict[str, Any]:
    """Flags for adapters of a server that we start; none where whole weights will be sent.

    Args:
        args: The trainer's configuration.
        model: As for `plan_adapter`.
        peft_config: As for `plan_adapter`.
        quantization_config: As given to the trainer.

    Raises:
        ConfigError: Only an adapter can be sent, or was asked for, and it cannot be served.
    """
    quantized = _quantization(args, model, quantization_config)
    if args.gym_weight_transport != "adapter" and (args.gym_weight_transport != "auto" or quantized is None):
        return {}
    plan = plan_adapter(model, peft_config, trust_remote_code=args.trust_remote_code)
    problem = "no LoRA adapter is trained" if plan is None else plan.problem
    if problem is None and quantized == "bitsandbytes" and _is_stored_quantized(model):
        problem = (
            "vLLM has no bitsandbytes since 0.31: name the checkpoint that is not quantized as `model`, and quantize "
            "it for training with `model_init_kwargs: {quantization_config: …}`"
        )
    if problem is not None:
        why = "" if args.gym_weight_transport == "adapter" else f" (the base is quantized: {quantized})"
        raise ConfigError(f"Weights would be sent as an adapter{why}, and {problem}.")
    assert plan is not None  # else it had a problem
    return lora_flags(plan, args.gym_max_adapters)


def lora_flags(plan: AdapterPlan, max_adapters: int) -> dict[str, Any]:
    """Flags of `vllm serve` for a plan without a problem.

    The modules are named, because vLLM would otherwise wrap the head as well: 0.31 then dies of a request for prompt
    log-probabilities on a CPU, and leaves the adapter's part out of them elsewhere.
    """
    return {
        "enable-lora": True,
        "max-loras": max_adapters,
        "max-lora-rank": next(rank for rank in _SERVER_RANKS if rank >= plan.rank),
        "lora-target-modules": list(plan.targets),
    }


def adapter_problem(model: torch.nn.Module, server_config: Mapping[str, Any] | None = None) -> str | None:
    """Why the adapter of a model cannot be served, or None.

    Args:
        model: The trainer's, unwrapped.
        server_config: vLLM's resolved configuration (`PolicyClient.server_config`), to see whether that server can.
    """
    plan = plan_adapter(model)
    if plan is None:
        return "no LoRA adapter is trained"
    if plan.problem is not None or server_config is None:
        return plan.problem
    return _server_problem(plan, server_config)


def merged_problem(model: torch.nn.Module) -> str | None:
    """Why a model's whole weights cannot be sent, or None."""
    base = model.get_base_model() if _is_peft(model) else model
    config = getattr(getattr(base, "config", None), "quantization_config", None)
    if not getattr(base, "is_quantized", False) and config is None:
        return None
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    return f"the base is quantized ({getattr(method, 'value', method)}) and would round away what is merged into it"


def _quantization(args: GymGRPOConfig, model: Any, given: Any) -> str | None:
    """How the base that is trained is quantized, or None."""
    asked = (given or (args.model_init_kwargs or {}).get("quantization_config")) if isinstance(model, str) else None
    config = asked if asked is not None else _stored_quantization(model, args.trust_remote_code)
    if config is None:
        return None
    method = config.get("quant_method", "unknown") if isinstance(config, Mapping) else config.quant_method
    return str(getattr(method, "value", method))


def _is_stored_quantized(model: Any) -> bool:
    return isinstance(model, str) and _stored_quantization(model, trust_remote_code=False) is not None


def _stored_quantization(model: Any, trust_remote_code: bool) -> Any:
    """Of the checkpoint, or of the model as it was loaded."""
    if not isinstance(model, str):
        base = model.get_base_model() if _is_peft(model) else model
        return getattr(base.config, "quantization_config", None)
    import transformers

    config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    return getattr(config, "quantization_config", None)


def _is_peft(model: Any) -> bool:
    from transformers.utils import is_peft_available

    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _plan_of(adapted: Any) -> AdapterPlan:
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


def _adapted_modules(adapted: Any, adapter: str) -> tuple[str, ...]:
    """Names in the base model of the modules that have this adapter's matrices."""
    return tuple(
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if adapter in getattr(module, "lora_A", ()) or adapter in getattr(module, "lora_embedding_A", ())
    )


def _tower_problems(adapted: Any, modules: Sequence[str]) -> list[str]:
    """vLLM ignores what an adapter has on towers for images and audio, and a probe of text would not show it."""
    config = getattr(adapted, "config", None)
    if config is None or config.get_text_config() is config:
        return []
    outside = [name for name in modules if "language_model" not in name]
    return [f"{outside[0]} has an adapter: vLLM serves those of the language model only"] if outside else []


def _server_problem(plan: AdapterPlan, server_config: Mapping[str, Any]) -> str | None:
    lora = server_config.get("lora_config")
    needed = lora_flags(plan, 2)
    remedy = " ".join(
        f"--{name}" if value is True else f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in needed.items()
    )
    if not lora:
        return f"the policy server was started without --enable-lora; start it with {remedy}"
    if lora["max_lora_rank"] < plan.rank:
        return f"the adapter's rank is {plan.rank} and the policy server was started with --max-lora-rank " + (
            f"{lora['max_lora_rank']}; start it with {remedy}"
        )
    targets = lora.get("target_modules")
    if targets is None:
        return (
            "the policy server was started without --lora-target-modules, and vLLM then computes wrong prompt "
            f"log-probabilities, or dies of them; start it with {remedy}"
        )
    if missing := sorted(set(plan.targets).difference(targets)):
        return f"the policy server's --lora-target-modules lacks {', '.join(missing)}; start it with {remedy}"
    parallel = server_config.get("parallel_config", {})
    if parallel.get("data_parallel_external_lb") or parallel.get("data_parallel_hybrid_lb"):
        return "the policy server balances its data-parallel replicas elsewhere, and an adapter reaches only some"
    return None


def _adapted_skeleton(model: Any, peft_config: Any, trust_remote_code: bool) -> Any:
    """The model with its adapter, without memory for either."""
    import torch
    import transformers
    from peft import get_peft_model

    if isinstance(model, str):
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    else:
        config = model.config
    with torch.device("meta"):
        if not isinstance(model, str):
            skeleton = type(model)(copy.deepcopy(config))
        elif (kind := getattr(transformers, (config.architectures or [""])[0], None)) is not None:
            skeleton = kind(config)
        else:
            skeleton = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return get_peft_model(skeleton, copy.deepcopy(peft_config))


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """What decides about the transport.

    Attributes:
        wanted: `gym_weight_transport`.
        folder: `gym_weight_dir`.
        buffer_mb: `gym_weight_buffer_mb`.
        on_cuda: Whether the trainer computes on CUDA devices.
        adapter: Makes the transport `adapter`; None where nothing but an adapter is not all that is trained.
        adapter_problem: Why `adapter` cannot be used, when it cannot.
        merged_problem: Why whole weights cannot be sent, when they cannot: the base is quantized.
    """

    wanted: str = "auto"
    folder: str | None = None
    buffer_mb: int = 512
    on_cuda: bool = False
    adapter: WeightTransport | None = None
    adapter_problem: str | None = None
    merged_problem: str | None = None


def planned_backend(wanted: str, *, on_cuda: bool, shares_devices: bool) -> str:
    """The backend of vLLM's weight transfer for a server that we start.

    Raises:
        ConfigError: It was asked for, and cannot work.
    """
    auto = ("ipc" if shares_devices else "nccl") if on_cuda else "file"
    if wanted in ("auto", "adapter"):  # an adapter needs none; this one is for what else may have to be sent
        return auto
    problem = None
    if wanted in ("ipc", "nccl") and not on_cuda:
        problem = "the trainer does not compute on CUDA devices; use 'file'"
    elif wanted == "ipc" and not shares_devices:
        problem = "the server runs on other GPUs (`gym_server_devices`); use 'nccl', or leave the devices out"
    elif wanted == "nccl" and shares_devices:
        problem = "NCCL does not connect two processes on one GPU; use 'ipc', or set `gym_server_devices`"
    if problem is not None:
        raise ConfigError(f"`gym_weight_transport` is {wanted!r}, and {problem}.")
    return wanted


def environment_for(backend: str) -> Mapping[str, str]:
    """Environment variables of a server that gets its weights by `backend`; only for one on a loopback address."""
    return ipc.ENVIRONMENT if backend == "ipc" else {}


def choose_transport(server: PolicyBackend, options: TransportOptions) -> WeightTransport:
    """What this run sends with. The same on every rank.

    Args:
        server: Ready.
        options: See there.

    Raises:
        ConfigError: Nothing fits, or what was asked for does not; the message says why and what does.
        UnsupportedVersionError: `ipc` or `nccl`, and this environment lacks vLLM or has another version.
    """
    wanted = options.wanted
    if wanted == "adapter" or (wanted == "auto" and options.merged_problem is not None):
        return _adapter(options)
    if options.merged_problem is not None:
        raise ConfigError(f"`gym_weight_transport` is {wanted!r}, and {options.merged_problem}; use 'adapter'.")
    name = _backend_of(server, wanted)
    if name == "file":
        if (problem := _file_problem(server, options)) is not None:
            raise ConfigError(f"The policy server takes weights by `file`, and {problem}.")
        return FileTransport(options.folder)
    if not options.on_cuda:
        raise ConfigError(
            f"The policy server takes weights by `{name}`, and the trainer does not compute on CUDA devices. Start "
            """the server with --weight-transfer-config '{"backend": "file"}'."""
        )
    compat.check_versions(("vllm",))  # both sides pack with its code
    if name == "nccl":
        return NcclTransport(options.buffer_mb)
    if (problem := _ipc_problem(server)) is not None:
        raise ConfigError(f"The policy server takes weights by `ipc`, and {problem}.")
    return ipc.IpcTransport(options.buffer_mb)


def _adapter(options: TransportOptions) -> WeightTransport:
    if options.adapter is not None and options.adapter_problem is None:
        return options.adapter
    reason = options.adapter_problem or "no LoRA adapter is trained"
    if options.wanted == "adapter":
        raise ConfigError(f"`gym_weight_transport` is 'adapter', and {reason}.")
    raise ConfigError(f"Only the adapter can be sent, because {options.merged_problem}; but {reason}.")


def _backend_of(server: PolicyBackend, wanted: str) -> str:
    """The one by which the server takes whole weights. It has one, for as long as it lives."""
    accepted = [name for name in server.weight_transports if name in ("ipc", "nccl", "file")]
    if not accepted:
        named = ", ".join(server.weight_transports) or "nothing"
        raise ConfigError(
            f"The policy server at {server.base_url} takes weights by {named} only; trl-gym sends them by ipc, nccl "
            "or file (flag --weight-transfer-config of the server)."
        )
    if wanted != "auto" and wanted not in accepted:
        raise ConfigError(
            f"`gym_weight_transport` is {wanted!r}, and the policy server at {server.base_url} was started for "
            f"{', '.join(accepted)}. Leave the option at 'auto', or start the server with "
            f"""--weight-transfer-config '{{"backend": "{wanted}"}}'."""
        )
    return wanted if wanted != "auto" else accepted[0]


def _file_problem(server: PolicyBackend, options: TransportOptions) -> str | None:
    if options.folder is not None:
        return None  # whether both see it is found when they are connected
    for url in server.base_url.split(","):
        host = urlsplit(url).hostname or ""
        if not is_this_host(host):
            return (
                f"{host} is another host, which does not see our shared memory; set `gym_weight_dir` to a folder on a "
                "disk that both hosts mount, or start the server with "
                """--weight-transfer-config '{"backend": "nccl"}'"""
            )
    return None


def _ipc_problem(server: PolicyBackend) -> str | None:
    host = urlsplit(server.base_url).hostname
    if not is_loopback(host):
        return (
            f"{host} is not a loopback address: CUDA IPC needs shared GPUs, and its messages are unpickled. "
            """Start the server with --host 127.0.0.1 here, or with --weight-transfer-config '{"backend": "nccl"}'"""
        )
    if server.placement == "server" and not _allows_pickle(server):
        return (
            "it was started without VLLM_ALLOW_INSECURE_SERIALIZATION=1, which handles of CUDA IPC need over HTTP. "
            "Start it again with that in its environment"
        )
    return None


def _allows_pickle(server: PolicyBackend) -> bool:
    return bool(server.client.server_environment().get("VLLM_ALLOW_INSECURE_SERIALIZATION"))


def is_this_host(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine's: its own addresses are those that one can bind to."""
    if is_loopback(host):
        return True
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
