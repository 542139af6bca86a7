"""The names and values that leave the trainer are those that vLLM loads."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import IA3Config, PeftModel, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.weight_sync.models import mixture, model, with_adapter
from trl_gym.errors import ConfigError
from trl_gym.weight_sync.source import AdapterSource, WeightSource, check_supported, with_siblings


def streamed(policy: nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    """Copies of what comes, checked against what was announced."""
    source = WeightSource(policy, **options)
    metadata = source.metadata()
    pairs = [(name, tensor.clone()) for name, tensor in source]
    assert [(meta.name, meta.dtype, meta.shape) for meta in metadata] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in pairs
    ]
    assert not any(tensor.requires_grad for _, tensor in pairs)
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def saved(policy: Any, folder: Path) -> dict[str, torch.Tensor]:
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        policy.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not differing


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_model_streams_its_checkpoint(tied: bool, tmp_path: Path) -> None:
    policy = model(tied=tied)
    same(streamed(policy), saved(policy, tmp_path))
    assert ("lm_head.weight" in streamed(policy)) is not tied
    assert list(streamed(policy)) == [name for name, _ in policy.named_parameters()]


def test_floating_point_weights_are_cast_and_others_are_not() -> None:
    policy = model()
    policy.register_buffer("count", torch.arange(3))
    policy.register_buffer("cache", torch.arange(3), persistent=False)
    sent = streamed(policy, dtype=torch.bfloat16)
    assert sent["count"].dtype == torch.int64
    assert "cache" not in sent  # as in a checkpoint
    assert torch.equal(sent["model.norm.weight"], policy.model.norm.weight.bfloat16())


def test_what_wrappers_add_to_names_is_taken_off() -> None:
    policy = model(tied=False)
    expected = streamed(policy)
    policy.model.layers[0] = torch.compile(policy.model.layers[0])  # as `regional_compilation` does
    assert "model.layers.0._orig_mod.mlp.up_proj.weight" in dict(policy.named_parameters())
    same(streamed(torch.compile(policy)), expected)


@pytest.mark.parametrize("reload", [False, True])
def test_experts_are_sent_as_their_checkpoint_has_them(reload: bool, tmp_path: Path) -> None:
    policy = mixture()
    expected = saved(policy, tmp_path)
    if reload:  # transformers keeps the recipe by which it loaded
        policy = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "model.layers.0.mlp.experts.gate_up_proj" in dict(policy.named_parameters())
    assert "model.layers.0.mlp.experts.2.gate_proj.weight" in expected
    same(streamed(policy), expected)


def test_other_architectures_are_sent_as_their_checkpoints_have_them(tmp_path: Path) -> None:
    sizes = {"vocab_size": 33, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for kind in ("llama", "qwen2", "gemma3_text", "mistral", "mixtral", "phi3", "gpt_oss"):
        policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        same(streamed(policy), saved(policy, tmp_path / kind))


# ----------------------------------------------------------------------------------------------------------- adapters


def merged_by_peft(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT makes of it; the model is not to be used after."""
    base = adapted.merge_and_unload()
    return {name: parameter.detach().clone() for name, parameter in base.named_parameters()}


PLAIN: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("all layers", {"target_modules": "all-linear"}),
    ("rslora", {"use_rslora": True, "lora_alpha": 16}),
    ("rank and alpha by pattern", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 5}}),
    ("embedding", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    ("modules_to_save", {"modules_to_save": ["norm", "lm_head"]}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [options for _, options in PLAIN], ids=[name for name, _ in PLAIN])
@pytest.mark.parametrize("adapters", [1, 2])
def test_adapters_are_added_as_peft_does_and_the_model_is_not_touched(
    options: dict[str, Any], dtype: torch.dtype, adapters: int
) -> None:
    if adapters == 2 and "modules_to_save" in options:
        options = {}  # PEFT allows that with one adapter only
    adapted = with_adapter(model(tied=False, dtype=dtype), adapters=adapters, **options)
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    stream = iter(WeightSource(adapted))
    next(stream)  # abandoned
    stream.close()
    actual = streamed(adapted)
    same(dict(adapted.named_parameters()), before)
    assert not any(getattr(module, "merged", False) for module in adapted.modules())
    same(actual, merged_by_peft(adapted))


def test_adapters_of_transposed_layers_and_biases_are_added_as_peft_does() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=33, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True}
    adapted = with_adapter(GPT2LMHeadModel(config), **options)
    with torch.no_grad():
        adapted.get_parameter("base_model.model.transformer.h.0.attn.c_attn.lora_B.default.bias").fill_(0.25)
    same(streamed(adapted), merged_by_peft(adapted))


PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
ODD: list[tuple[str, Any]] = [
    ("dora", lambda: with_adapter(model(dtype=torch.bfloat16), use_dora=True)),
    ("ia3", lambda: get_peft_model(model(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))),
    (
        "experts",
        lambda: with_adapter(
            mixture(), target_parameters=["experts.gate_up_proj", "experts.down_proj"], target_modules=["q_proj"]
        ),
    ),
]


@pytest.mark.parametrize("make", [make for _, make in ODD], ids=[name for name, _ in ODD])
def test_what_only_peft_can_merge_is_put_back_bit_for_bit(make: Any, tmp_path: Path) -> None:
    adapted = make()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ia3" in name:
                parameter.uniform_(0.5, 2.0)
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    actual = streamed(adapted)
    same(dict(adapted.named_parameters()), before)
    assert not any(getattr(module, "merged", False) for module in adapted.modules())
    same(actual, saved(adapted.merge_and_unload(), tmp_path))


def test_what_is_served_computes_what_is_trained() -> None:
    adapted = with_adapter(model(), modules_to_save=["norm"])
    ids = torch.arange(8)[None]
    served = model()
    served.load_state_dict(streamed(adapted), strict=False)
    torch.testing.assert_close(served(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_adapter(model(), target_modules=["embed_tokens"]), "tied.*target_modules"),
        (lambda: with_adapter(model(), target_modules=["lm_head"]), "tied.*target_modules"),
        (lambda: with_adapter(model(), modules_to_save=["embed_tokens"]), "tied to lm_head.*ensure_weight_tying"),
        (lambda: with_adapter(model(), trainable_token_indices=[1, 2]), "trainable_token_indices"),
        (lambda: get_peft_model(model(), PROMPT), "PROMPT_TUNING.*Use LoRA"),
    ],
)
def test_what_the_server_could_not_compute_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightSource(make())
    with pytest.raises(ConfigError, match=message):
        check_supported(make(), Accelerator(cpu=True))


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `accelerate launch` on a CPU, when the training arguments do not say `use_cpu`."""
    accelerator = Accelerator(cpu=True)
    check_supported(model(), accelerator)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were started.*`use_cpu`"):
        check_supported(model(), accelerator)


def test_quantized_weights_are_refused_and_their_adapter_is_not() -> None:
    adapted = with_adapter(model())
    layer = adapted.base_model.model.model.layers[0].self_attn.k_proj
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)  # as bitsandbytes packs
    with pytest.raises(ConfigError, match="gym_weight_transport` to 'adapter'"):
        WeightSource(adapted)
    assert dict(AdapterSource(adapted))


@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["norm"]}, {"use_dora": True}],
)
def test_an_adapter_alone_is_its_checkpoint(options: dict[str, Any], tmp_path: Path) -> None:
    adapted = with_adapter(model(tied=False), **options)
    source = AdapterSource(adapted)
    config, stream = source.config, iter(source)
    same(dict(stream), get_peft_model_state_dict(adapted, save_embedding_layers=False))
    adapted.save_pretrained(tmp_path)
    written = adapted.peft_config["default"].from_pretrained(tmp_path)
    assert config == {**config, "r": written.r, "peft_type": "LORA", "inference_mode": True}
    assert config["target_modules"] == sorted(written.target_modules)


def test_an_adapter_that_cannot_be_served_is_refused() -> None:
    with pytest.raises(ConfigError, match="no adapter"):
        AdapterSource(model())
    with pytest.raises(ConfigError, match="2 adapters are active"):
        AdapterSource(with_adapter(model(), adapters=2))
    with pytest.raises(ConfigError, match="IA3"):
        AdapterSource(get_peft_model(model(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])))


# ------------------------------------------------------------------------------------------------------ only trainable


def test_only_what_is_trained_is_sent_with_what_vllm_packs_with_it() -> None:
    adapted = with_adapter(model(), modules_to_save=["model.norm"])  # "norm" would be every name that ends so
    partial = streamed(adapted, only_trainable=True)
    modules = {name.removesuffix(".weight").rpartition(".")[2] for name in partial}
    assert modules == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "norm"}
    whole = streamed(adapted)
    same(partial, {name: whole[name] for name in partial})

    frozen = model(tied=False).requires_grad_(False)
    frozen.lm_head.requires_grad_(True)
    assert set(streamed(frozen, only_trainable=True)) == {"lm_head.weight"}


def test_modules_are_completed_with_biases_and_experts() -> None:
    layer = "model.layers.3"
    qkv = {
        f"{layer}.self_attn.{part}.{kind}" for part in ("q_proj", "k_proj", "v_proj") for kind in ("weight", "bias")
    }
    experts = {f"{layer}.mlp.experts.{i}.{part}.weight" for i in range(3) for part in ("up_proj", "down_proj")}
    others = {
        f"{layer}.self_attn.o_proj.weight",
        f"{layer}.mlp.gate.weight",
        "model.layers.30.self_attn.q_proj.weight",
    }
    names = qkv | experts | others
    assert with_siblings({f"{layer}.self_attn.k_proj.weight"}, names) == qkv
    assert with_siblings({f"{layer}.mlp.experts.1.up_proj.weight"}, names) == experts
    assert with_siblings({f"{layer}.mlp.gate.weight"}, names) == {f"{layer}.mlp.gate.weight"}
    assert with_siblings(set(), names) == set()
