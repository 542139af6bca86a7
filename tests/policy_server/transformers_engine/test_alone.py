"""What a server of its own on transformers is started with; `tests/e2e/test_serve_transformers.py` starts one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trl_gym.errors import ConfigError, WeightSyncError
from trl_gym.policy_server import __main__ as process
from trl_gym.policy_server.transformers_engine.alone import chosen_parsers, context_of
from trl_gym.policy_server.transformers_engine.weight_files import ModelFiles

SMALL_POLICY = Path(__file__).resolve().parents[3] / "recipes" / "small_policy"


@pytest.mark.parametrize(
    ("made_for", "asked", "length"), [(1024, None, 1024), (1024, 512, 512), (None, 512, 512), (1024, 1024, 1024)]
)
def test_the_context_is_what_is_asked_for_or_what_the_model_was_made_for(
    made_for: int | None, asked: int | None, length: int
) -> None:
    assert context_of(made_for, asked) == length


@pytest.mark.parametrize(("made_for", "asked", "words"), [(None, None, "does not say"), (1024, 1025, "1,024 tokens")])
def test_a_context_that_the_model_was_not_made_for_is_refused(
    made_for: int | None, asked: int | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        context_of(made_for, asked)


def test_the_flag_names_what_reads_answers() -> None:
    assert chosen_parsers(SMALL_POLICY, ["--dtype", "float32"]).tool.name == "qwen3"
    assert chosen_parsers(SMALL_POLICY, ["--response-template=llama3", "--device", "cpu"]).tool.name == "llama3"
    assert chosen_parsers(SMALL_POLICY, ["--response-template", "none"]).tool.name is None


def test_wrong_flags_and_hosts_without_a_key_end_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for flags, words in ((["--dtype", "int4"], "invalid choice"), (["--host", "0.0.0.0"], "set VLLM_API_KEY")):
        with pytest.raises(SystemExit):
            process.main([str(SMALL_POLICY), "--engine", "transformers", *flags])
        assert words in capsys.readouterr().err


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "norm": nn.LayerNorm(2), "head": nn.Linear(2, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def test_weights_that_are_tied_come_once_and_an_update_that_ended_halfway_needs_a_complete_one(tmp_path: Path) -> None:
    model, loader = tied(), ModelFiles()
    whole = {"embed.weight": torch.ones(4, 2), "norm.weight": torch.ones(2), "norm.bias": torch.ones(2)}
    save_file(whole, tmp_path / "whole")
    save_file({"norm.bias": torch.full((2,), 3.0)}, tmp_path / "part")
    loader.update(model, {"path": str(tmp_path / "part")})
    with pytest.raises(WeightSyncError, match=r"lacks 3 weights of the model: embed.weight, head.weight, norm.weight"):
        loader.finish()
    with pytest.raises(WeightSyncError, match="only a complete one can follow"):
        loader.update(model, {"path": str(tmp_path / "part"), "partial": True})
    loader.update(model, {"path": str(tmp_path / "whole")})
    loader.finish()
    assert all(bool((parameter == 1).all()) for parameter in model.parameters())
    loader.update(model, {"path": str(tmp_path / "part"), "partial": True})
    loader.finish()
    assert model["norm"].bias.tolist() == [3, 3] and model["head"].weight.tolist() == [[1, 1]] * 4
