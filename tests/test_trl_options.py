"""Every option of the installed TRL has an effect here, is refused, or is listed as inherited."""

from __future__ import annotations

import dataclasses
import inspect
import re
from itertools import chain
from typing import Any

import pytest
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from trl_gym import GymGRPOConfig
from trl_gym.errors import ConfigError
from trl_gym.trl_options import HERE, INHERITED, OF_TRANSFORMERS, REFUSED

BASE: dict[str, Any] = {"output_dir": "out", "use_cpu": True, "report_to": []}
OPTIONS = {one.name: one for one in dataclasses.fields(GRPOConfig)}
NAMED_HERE = set(chain.from_iterable(HERE))
# Another value than the default, where the default does not tell one.
VALUES: dict[str, Any] = {
    "generation_kwargs": {"suppress_tokens": [1]},
    "transformers_continuous_batching_config": {"block_size": 64},
    "max_tool_calling_iterations": 0,
    "vllm_structured_outputs_regex": "a+",
    "cache_implementation": "static",
    "vllm_model_impl": "transformers",
    "vllm_server_host": "10.0.0.5",
}


def test_every_option_of_trl_is_in_one_of_the_lists() -> None:
    lists = [NAMED_HERE | REFUSED.keys(), set(INHERITED), set(OF_TRANSFORMERS)]
    assert not OPTIONS.keys() - set().union(*lists), "say in trl_options.py what they do here"
    assert sum(map(len, lists)) == len(set().union(*lists))
    assert not (NAMED_HERE | REFUSED.keys() | set(INHERITED)) - OPTIONS.keys(), "TRL has them no more"
    of_transformers = {one.name for one in dataclasses.fields(TrainingArguments)}
    assert not of_transformers & set(INHERITED) and not set(OF_TRANSFORMERS) & (OPTIONS.keys() - of_transformers)
    assert NAMED_HERE & REFUSED.keys() == {name for name, refused in REFUSED.items() if refused.mode is not None}


def test_trl_reads_what_is_inherited_elsewhere_than_where_it_samples() -> None:
    """Its trainer reads them, or its configuration; what only builds its own generation has no effect here."""
    source = inspect.getsource(grpo_trainer)
    for sampling in (GRPOTrainer._generate_single_turn, GRPOTrainer._tool_call_loop):
        source = source.replace(inspect.getsource(sampling), "")
    source = re.sub(r"VLLMGeneration\(\n(?:.*\n)*?            \)\n", "", source)
    assert "VLLMGeneration(" not in source.split("class GRPOTrainer")[1]
    source += inspect.getsource(GRPOConfig.__post_init__)
    callback = "ref_model_mixup_alpha", "ref_model_sync_steps"  # of the callback that `sync_ref_model` adds
    unread = {name for name in INHERITED if not re.search(rf"\b(?:args|self)\.{name}\b", source)}
    assert unread == set(callback)


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_without_effect_is_refused_with_a_way_out(option: str) -> None:
    refused, default = REFUSED[option], OPTIONS[option].default
    value = VALUES.get(option, not default if isinstance(default, bool) else None)
    value = default + 1 if value is None else value
    mode = refused.mode or "colocate"
    url = {"vllm_server_base_url": "http://10.0.0.5:8000/v1"} if mode == "server" else {}
    with pytest.raises(ConfigError) as caught:
        GymGRPOConfig(**BASE | url, vllm_mode=mode, **{option: value})
    [problem] = [one for one in caught.value.problems if f"`{option}` is {value!r} and has no effect" in one.text]
    assert problem.remedy == refused.remedy
    GymGRPOConfig(**BASE | url, vllm_mode=mode, **{option: default})
    if refused.mode == "colocate":
        GymGRPOConfig(**BASE, vllm_mode="server", vllm_server_base_url="http://h:1/v1", **{option: value})
    elif refused.mode == "server":
        GymGRPOConfig(**BASE, **{option: default / 2 if isinstance(default, float) else value})
