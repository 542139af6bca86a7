"""Can vLLM serve this adapter, and with which flags? Two stages, as for every transport:

    `managed_flags`   before a server is started: the flags with which it serves what `plan_adapter` finds
    `adapter_problem` when model and server are there: why the transport cannot be used, if it cannot
    `merged_problem`  why whole weights cannot be sent instead

A reason is one clause, made to be put into a message: "…, because <reason>".
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_gym.errors import ConfigError
from trl_gym.policy_server.adapter_files import config_problems, module_problems

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

    from trl_gym.config import GymGRPOConfig

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
