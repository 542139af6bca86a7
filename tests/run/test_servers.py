"""Which policy servers a trainer takes, and when it refuses the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from tests.policy_server.fake_vllm import FakeVllm
from tests.policy_server.test_splice_probe import REMEDIES, served
from tests.policy_server.tiny_model import build_random_policy
from trl_gym import GymGRPOConfig, GymServers
from trl_gym.errors import PolicyServerError, PolicyServerLostError
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings
from trl_gym.policy_server.server import PolicyServer
from trl_gym.run.servers import RunServers, servers_for


class Rerendering(FakeVllm):
    """Claims to be ours and renders every turn again, as an old or broken gateway would."""

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/trl_gym/info":
            return 200, {"nonce": None, "model_names": ["policy"], "max_model_len": 200}
        return super().answer(path, body)


@pytest.fixture
def gym_that_must_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: GymServers) -> None:
        raise AssertionError("the policy server must be refused first")

    monkeypatch.setattr(GymServers, "start", start)


def run_servers(url: str, tmp_path: Path, policy: PolicyServer | None = None) -> RunServers:
    args = GymGRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        gym_config_paths=["environment.yaml"],
        max_completion_length=16,
        report_to=[],
        **({} if policy else {"vllm_mode": "server", "vllm_server_base_url": url}),
    )
    return RunServers(args, lambda: "unused", policy)


@pytest.mark.usefixtures("gym_that_must_not_start")
@pytest.mark.parametrize("app", [FakeVllm(), Rerendering()])
def test_a_remote_server_without_splice_is_refused_before_anything_starts(app: FakeVllm, tmp_path: Path) -> None:
    with served(app) as client, pytest.raises(PolicyServerError) as caught:
        run_servers(client.base_url, tmp_path).start()
    assert all(remedy in str(caught.value) for remedy in (client.base_url, *REMEDIES))


@pytest.mark.usefixtures("gym_that_must_not_start")
def test_one_that_was_passed_in_is_refused_too(tmp_path: Path) -> None:
    with served(Rerendering()) as client:
        policy = PolicyServer.attach(client.base_url)
        with pytest.raises(PolicyServerError, match="does not continue sampled tokens exactly"):
            run_servers(client.base_url, tmp_path, policy).start()


def test_one_that_splices_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(GymServers, "start", lambda self: started.append("gym"))
    vllm = FakeVllm()
    with served(OnPolicyMiddleware(vllm, Settings())) as client:
        servers = run_servers(client.base_url, tmp_path)
        servers.start()
        assert servers.policy.base_url == client.base_url
    assert started == ["gym"]
    assert len(vllm.chats()) == 1


# -- keys and devices -------------------------------------------------------------------------------------------------


def managed(tmp_path: Path, **options: Any) -> PolicyServer:
    """A server as a trainer would start it; it is not started."""
    args = GymGRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        gym_config_paths=["environment.yaml"],
        max_completion_length=16,
        report_to=[],
        **options,
    )
    return RunServers(args, lambda: "a model").new_policy()


def test_a_managed_server_gets_a_key_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    keys = {managed(tmp_path)._api_key for _ in range(3)}
    assert len(keys) == 3 and all(len(key) >= 32 for key in keys)
    monkeypatch.setenv("VLLM_API_KEY", "chosen")
    assert managed(tmp_path)._api_key == "chosen"


def test_a_managed_server_is_started_for_the_adapter_that_is_trained(tmp_path: Path) -> None:
    args = GymGRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        gym_config_paths=["environment.yaml"],
        max_completion_length=16,
        gym_weight_transport="adapter",
        gym_max_adapters=4,
        gym_vllm_args={"max_loras": 6},
    )
    folder = build_random_policy(tmp_path / "policy")
    run = servers_for(args, str(folder), None, None, None, LoraConfig(r=3, target_modules=["q_proj"]))
    flags = run.new_policy()._flags
    assert "--enable-lora" in flags
    assert flags[flags.index("--max-lora-rank") + 1] == "8"
    assert flags[flags.index("--lora-target-modules") + 1] == "q_proj"
    assert flags[flags.index("--max-loras") + 1] == "6"  # the user's word is the last


def test_a_managed_server_may_have_devices_of_its_own(tmp_path: Path) -> None:
    assert managed(tmp_path).placement == "colocate"
    apart = managed(tmp_path, gym_server_devices="6,7")
    assert apart.placement == "server" and apart._env["CUDA_VISIBLE_DEVICES"] == "6,7"


@pytest.mark.usefixtures("gym_that_must_not_start")
def test_the_key_of_a_server_elsewhere_is_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    with served(OnPolicyMiddleware(FakeVllm(), Settings(api_keys=("right",)))) as client:
        with pytest.raises(PolicyServerError, match="demands another API key"):
            run_servers(client.base_url, tmp_path).start()
        monkeypatch.setenv("VLLM_API_KEY", "right")
        with pytest.raises(AssertionError, match="must be refused first"):  # it was not
            run_servers(client.base_url, tmp_path).start()


# -- found paused, revived --------------------------------------------------------------------------------------------


class Interrupted(FakeVllm):
    """As a trainer leaves it that is killed in the middle of a sync: nothing is sampled until it is resumed."""

    paused = True

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/is_paused":
            return 200, {"is_paused": self.paused}
        if path in ("/finish_weight_update", "/update_weights"):
            self.requests.append((path, {}))
            return 500, {"error": {"message": "the update lacks 24 parameters"}}
        assert not (self.paused and path == "/v1/chat/completions"), "would hang"
        return super().answer(path, body)


def test_a_server_found_paused_is_made_ready_for_the_next_sync_and_checked_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(GymServers, "start", lambda self: None)
    monkeypatch.setattr(GymServers, "wait_ready", lambda self: None)
    monkeypatch.setattr(GymServers, "head_url", "http://127.0.0.1:1")
    vllm = Interrupted()
    with served(OnPolicyMiddleware(vllm, Settings())) as client:
        servers = run_servers(client.base_url, tmp_path)
        servers.start()
        servers.wait_ready(lambda items: items)
        ended = [path for path, _ in vllm.requests if path.endswith(("_update", "_weights"))]
        assert ended == ["/finish_weight_update", "/update_weights"]
        assert vllm.chats() == [] and caplog.text.count("is paused") == 1
        vllm.paused = False
        for _ in range(2):
            servers.check_before_rollouts()
        assert len(vllm.chats()) == 1


def test_a_server_that_somebody_restarted_is_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("start", "wait_ready"):
        monkeypatch.setattr(GymServers, name, lambda self: None)
    monkeypatch.setattr(GymServers, "head_url", "http://127.0.0.1:1")
    app = OnPolicyMiddleware(FakeVllm(), Settings())
    with served(app) as client:
        servers = run_servers(client.base_url, tmp_path)
        servers.start()
        servers.wait_ready(lambda items: items)
        servers.check_before_rollouts()
        app._instance = "another"
        with pytest.raises(PolicyServerLostError, match="was restarted"):
            servers.check_before_rollouts()
        servers.revive(PolicyServerLostError("was restarted"), lambda items: items)
        servers.check_before_rollouts()
        assert servers.num_restarts == 0


def test_every_rank_hears_that_a_server_does_not_come_back(tmp_path: Path) -> None:
    loss = PolicyServerLostError("connection refused")
    told: list[Any] = []

    class Hopeless:
        def revive(self, error: Exception) -> None:
            raise PolicyServerError("the budget is used up") from error

    servers = run_servers("http://127.0.0.1:1/v1", tmp_path)
    servers._reviver = Hopeless()
    with pytest.raises(PolicyServerError, match=r"^the budget is used up"):
        servers.revive(loss, told.extend)
    assert told == ["the budget is used up"]
    servers._is_main = False

    def receive(items: list[Any]) -> None:
        items[:] = told

    with pytest.raises(PolicyServerError, match="rank 0: the budget is used up") as caught:
        servers.revive(loss, receive)
    assert caught.value.__cause__ is loss
