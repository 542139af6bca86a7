"""Which policy servers a trainer takes, and when it refuses the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.policy_server.fake_vllm import FakeVllm
from tests.policy_server.test_splice_probe import REMEDIES, served
from trl_gym import GymGRPOConfig, GymServers
from trl_gym.errors import PolicyServerError
from trl_gym.policy_server.on_policy import OnPolicyMiddleware, Settings
from trl_gym.policy_server.server import PolicyServer
from trl_gym.servers import RunServers


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
