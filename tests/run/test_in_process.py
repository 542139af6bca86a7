"""Policy servers in the training processes: what is refused, how ranks make one policy of them, and who restarts."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2VLConfig

from tests.policy_server.tiny_model import build_random_policy
from tests.test_ranks import on_ranks
from trl_gym import GymGRPOConfig, GymServers
from trl_gym.errors import ConfigError, PolicyServerLostError
from trl_gym.policy_server.server import PolicyServer
from trl_gym.policy_server.sglang.server import SglangCommand
from trl_gym.policy_server.transformers_engine.server import TransformersServer
from trl_gym.processes import ServerState
from trl_gym.run import in_process
from trl_gym.run.servers import RunServers, servers_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_policy(tmp_path_factory.mktemp("policy") / "random")


def options(folder: Path, **more: Any) -> GymGRPOConfig:
    given = {"output_dir": str(folder / "out"), "use_cpu": True, "report_to": [], "gym_config_paths": ["a.yaml"]}
    return GymGRPOConfig(**given | {"gym_engine": "transformers", "max_completion_length": 16} | more)


# -- what is started --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gym(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    told: list[Any] = []
    monkeypatch.setattr(GymServers, "connect_policy", lambda self, *args: told.append(args))
    monkeypatch.setattr(GymServers, "start", lambda self: None)
    return told


def test_the_server_that_the_engine_means_is_started_and_gym_is_told_its_address(
    folder: Path, no_gym: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    servers = servers_for(options(folder, vllm_max_model_length=64), str(folder), agent_with_tools="my_agent")
    servers.start()
    try:
        assert isinstance(servers.own, TransformersServer) and servers.policy is servers.own
        assert no_gym[0][0] == (servers.own.own_url,)
        assert "tool calls: read by the response template `qwen3`" in capsys.readouterr().out
    finally:
        servers.stop()
    assert servers.own.state is ServerState.STOPPED


def test_it_is_what_auto_starts_where_vllm_is_not_installed(
    folder: Path, no_gym: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    servers = servers_for(options(folder, gym_engine="auto"), str(folder))
    servers.start()
    servers.stop()
    assert isinstance(servers.own, TransformersServer)
    assert "`gym_engine` is transformers, since vLLM is not installed" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="cannot be started for this configuration"):
        servers_for(options(folder, gym_engine="auto", gym_max_staleness=1), str(folder)).start()


def test_sglang_is_started_where_it_is_named(folder: Path) -> None:
    policy = RunServers(options(folder, gym_engine="sglang"), lambda: str(folder)).new_policy()
    assert isinstance(policy, PolicyServer) and isinstance(policy._serving, SglangCommand)


def test_tools_that_nothing_reads_are_refused_before_anything_starts(folder: Path, no_gym: list[Any]) -> None:
    servers = servers_for(options(folder, gym_response_template="none"), str(folder), agent_with_tools="my_agent")
    with pytest.raises(ConfigError, match=r"Rows of `my_agent` have tools.*`gym_response_template`"):
        servers.start()
    servers.stop()


def test_a_server_of_another_engine_than_the_named_one_is_refused(folder: Path, no_gym: list[Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with TransformersServer(max_model_len=64) as running:
        running.take_model(model, AutoTokenizer.from_pretrained(folder))
        with running.sampling():
            policy = PolicyServer.attach(running.own_url, api_key=running.client.api_key)
            wrong = RunServers(options(folder, gym_engine="vllm"), lambda: "unused", policy)
            with pytest.raises(ConfigError, match="is of the engine 'transformers'"):
                wrong.start()
            RunServers(options(folder), lambda: "unused", policy).start()
    assert len(no_gym) == 1


# -- models -----------------------------------------------------------------------------------------------------------


def test_quantized_models_and_those_of_images_are_refused_before_they_are_loaded(folder: Path, tmp_path: Path) -> None:
    args = options(folder)
    in_process.require_servable(args, str(folder))
    Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="reads more than text"):
        in_process.require_servable(args, str(tmp_path))
    with pytest.raises(ConfigError, match=r"is quantized \(bitsandbytes\)"):
        in_process.require_servable(args, str(folder), {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(
        ConfigError, match=r"`vllm_max_model_length` is 2,000 and the model .* was made for 1,024 tokens"
    ):
        in_process.require_servable(options(folder, vllm_max_model_length=2000), str(folder))


def test_a_model_that_was_loaded_needs_no_folder(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    server = in_process.new_server(options(folder), model, tokenizer, api_key="key")
    assert server.parsers is not None and server.parsers.tool.name == "qwen3"
    assert in_process.new_server(options(folder), model, api_key="key").parsers == server.parsers
    model.config._name_or_path = ""
    with pytest.raises(ConfigError, match="Pass `processing_class`"):
        in_process.new_server(options(folder), model, api_key="key")


# -- ranks ------------------------------------------------------------------------------------------------------------


class Recorder(TransformersServer):
    """Plays a server of one rank."""

    def __init__(self, rank: int, *, dies: bool = False) -> None:
        super().__init__(port=8000 + rank)
        self.dies, self.restarts = dies, 0

    def check(self) -> None:
        if self.dies:
            raise PolicyServerLostError("the engine is dead")
        super().check()

    def restart(self) -> None:
        self.restarts += 1


def test_all_ranks_know_all_servers() -> None:
    servers = [Recorder(0), Recorder(1)]
    on_ranks(2, lambda rank, gather: in_process.join(servers[rank], gather))
    assert {server.base_urls for server in servers} == {("http://127.0.0.1:8000/v1", "http://127.0.0.1:8001/v1")}


def test_ranks_on_several_hosts_are_refused_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["one", "two"])
    monkeypatch.setattr(socket, "gethostname", lambda: next(names))
    for outcome in on_ranks(2, lambda rank, gather: in_process.join(Recorder(rank), gather)):
        assert isinstance(outcome, ConfigError) and "are on 2 hosts" in str(outcome)


@pytest.mark.parametrize("victim", [0, 1, None])
def test_when_an_engine_has_died_the_others_are_made_again_and_rank_0_knows(victim: int | None) -> None:
    servers = [Recorder(rank, dies=rank == victim) for rank in range(3)]

    def play(rank: int, gather: Any) -> None:
        in_process.restart_others(SimpleNamespace(process_index=rank), servers[rank], gather)

    assert on_ranks(3, play) == [None] * 3
    assert [server.restarts for server in servers] == ([0, 0, 0] if victim is None else [0, 1, 1])
    if victim is not None:
        servers[0].dies = False
        with pytest.raises(PolicyServerLostError, match=f"rank {victim}: the engine is dead"):
            servers[0].check()


def test_precisions_are_those_of_accelerate() -> None:
    found = [in_process.precision_of(name) for name in ("no", "bf16", "fp16")]
    assert found == [None, torch.bfloat16, torch.float16]
