"""Which policy servers a trainer takes, and when it refuses the others."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.policy_server.fake_vllm import FakeVllm
from tests.policy_server.test_splice_probe import REMEDIES, served
from tests.policy_server.tiny_model import attend_otherwise, build_random_policy
from tests.test_ranks import on_ranks
from trl_gym import GymGRPOConfig, GymServers
from trl_gym.errors import (
    ConfigError,
    GymServerError,
    GymServerLostError,
    PolicyServerError,
    PolicyServerLostError,
    TrlGymError,
)
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings
from trl_gym.policy_server.server import PolicyServer
from trl_gym.policy_server.transformers_engine.server import TransformersServer
from trl_gym.processes import ServerState, bind_socket
from trl_gym.run.live import LiveSource
from trl_gym.run.servers import RunServers, servers_for, workers_problem


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


def run_servers(url: str, tmp_path: Path, policy: PolicyServer | None = None, **more: Any) -> RunServers:
    args = GymGRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        gym_config_paths=["environment.yaml"],
        max_completion_length=16,
        report_to=[],
        **({} if policy else {"vllm_mode": "server", "vllm_server_base_url": url}),
    )
    return RunServers(args, lambda: "unused", policy, **more)


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


@pytest.mark.usefixtures("gym_that_must_not_start")
def test_one_of_transformers_that_samples_from_something_else_than_its_model_is_refused(tmp_path: Path) -> None:
    folder = build_random_policy(tmp_path / "policy")
    odd = AutoModelForCausalLM.from_pretrained(folder)
    attend_otherwise(odd)
    with TransformersServer(max_model_len=256) as elsewhere:
        elsewhere.take_model(odd, AutoTokenizer.from_pretrained(folder))
        client = elsewhere.wait_ready().client
        policy = PolicyServer.attach(client.base_url, api_key=client.api_key)
        with elsewhere.sampling(), pytest.raises(ConfigError, match="does not compute what its model does"):
            run_servers(client.base_url, tmp_path, policy).start()


# -- parsers of tool calls --------------------------------------------------------------------------------------------


class Unparsing(FakeVllm):
    """Was started without a tool parser, as vLLM says."""

    def chat(self, request: Any) -> Any:
        if not request.get("tools"):
            return super().chat(request)
        text = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
        return 400, {"error": {"message": text, "type": "BadRequestError", "code": 400}}


@pytest.mark.usefixtures("gym_that_must_not_start")
def test_a_server_elsewhere_without_a_tool_parser_is_refused_where_rows_have_tools(tmp_path: Path) -> None:
    with served(OnPolicyMiddleware(Unparsing(), Settings())) as client:
        with pytest.raises(PolicyServerError, match=r"Rows of `my_agent` have tools.*--enable-auto-tool-choice"):
            run_servers(client.base_url, tmp_path, agent_with_tools="my_agent").start()
        with pytest.raises(AssertionError, match="must be refused first"):  # no tools: on to the Gym
            run_servers(client.base_url, tmp_path).start()


@pytest.mark.usefixtures("gym_that_must_not_start")
def test_one_that_answers_in_another_way_is_said_not_to_be_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(FakeVllm):
        def chat(self, request: Any) -> Any:
            return (400, {"error": {"message": "no tools here"}}) if request.get("tools") else super().chat(request)

    with served(OnPolicyMiddleware(Odd(), Settings())) as client, pytest.raises(AssertionError, match="refused first"):
        run_servers(client.base_url, tmp_path, agent_with_tools="my_agent").start()
    assert f"whether {client.base_url} parses tool calls is not checked" in caplog.text


@pytest.mark.usefixtures("gym_that_must_not_start")
def test_rows_with_tools_and_no_parser_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []
    monkeypatch.setattr(PolicyServer, "start", lambda self: started.append("policy"))
    folder = build_random_policy(tmp_path / "policy")
    args = GymGRPOConfig(output_dir=str(tmp_path), use_cpu=True, gym_config_paths=["environment.yaml"], report_to=[])
    with pytest.raises(PolicyServerError, match="is new"):  # on to the server
        servers_for(args, str(folder), agent_with_tools="my_agent").start()
    assert started.pop() == "policy"
    assert "tool calls: read by vLLM's parser `hermes` (guessed from `<tool_call>`" in capsys.readouterr().out
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ConfigError, match=r"Rows of `my_agent` have tools.*does not show tools.*`gym_vllm_args`"):
        servers_for(args, str(folder), agent_with_tools="my_agent").start()
    assert not started


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


def test_it_says_for_which_server_elsewhere_it_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with bind_socket() as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
    with pytest.raises(PolicyServerError, match=r"was not ready after 0\.1 s"):
        managed(tmp_path, vllm_mode="server", vllm_server_base_url=url, vllm_server_timeout=0.1)
    assert capsys.readouterr().out == f"waiting for the policy server at {url} (at most 0.1 s)\n"


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
    run = servers_for(args, str(folder), peft_config=LoraConfig(r=3, target_modules=["q_proj"]))
    flags = run.new_policy()._serving.flags
    assert "--enable-lora" in flags
    assert flags[flags.index("--max-lora-rank") + 1] == "8"
    assert flags[flags.index("--lora-target-modules") + 1] == "q_proj"
    assert flags[flags.index("--max-loras") + 1] == "6"  # the user's word is the last


def test_sglang_is_started_with_its_own_names_for_the_options(tmp_path: Path) -> None:
    args = GymGRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        gym_config_paths=["environment.yaml"],
        max_completion_length=16,
        gym_engine="sglang",
        gym_sglang_python=sys.executable,
        gym_sglang_args={"max_running_requests": 8, "attention-backend": "intel_amx"},
        vllm_max_model_length=64,
    )
    folder = build_random_policy(tmp_path / "policy")
    policy = servers_for(args, str(folder)).new_policy()
    command = policy._serving
    words = command.words(host="127.0.0.1", port=7, listen_fd=3, name="policy")
    assert words[:4] == [sys.executable, "-m", "trl_gym.policy_server.sglang", str(folder)]
    assert words[words.index("--sglang-python") + 1] == sys.executable
    told = {one[2:]: other for one, other in pairwise(words) if one.startswith("--")}
    expected = {"dtype": "float32", "context-length": "64", "device": "cpu", "max-running-requests": "8"}
    expected |= {"attention-backend": "intel_amx", "sampling-backend": "pytorch"}  # the user's word is the last
    assert expected.items() <= told.items()
    assert command.environment == {"SGLANG_USE_CPU_ENGINE": "1"}
    args.gym_weight_transport = "ipc"
    with pytest.raises(ConfigError, match="and SGLang is sent weights by 'file', 'nccl' or 'adapter'"):
        servers_for(args, str(folder)).new_policy()


def test_a_managed_server_may_have_devices_of_its_own(tmp_path: Path) -> None:
    assert "CUDA_VISIBLE_DEVICES" not in managed(tmp_path)._env
    apart = managed(tmp_path, gym_server_devices="6,7")
    assert apart._env["CUDA_VISIBLE_DEVICES"] == "6,7"


@pytest.mark.usefixtures("gym_that_must_not_start")
def test_the_key_of_a_server_elsewhere_is_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    with served(OnPolicyMiddleware(FakeVllm(), Settings(api_keys=("right",)))) as client:
        with pytest.raises(PolicyServerError, match="demands another API key"):
            run_servers(client.base_url, tmp_path).start()
        monkeypatch.setenv("VLLM_API_KEY", "right")
        with pytest.raises(AssertionError, match="must be refused first"):  # it was not
            run_servers(client.base_url, tmp_path).start()


# -- found paused, recovered -----------------------------------------------------------------------------------------


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
    monkeypatch.setenv("VLLM_API_KEY", "right")
    with served(OnPolicyMiddleware(vllm, Settings(api_keys=("right",)))) as client:
        servers = run_servers(client.base_url, tmp_path)
        servers.start()
        servers.wait_ready()
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
        servers.wait_ready()
        servers.check_before_rollouts()
        app._instance = "another"
        with pytest.raises(PolicyServerLostError, match="was restarted"):
            servers.check_before_rollouts()
        servers.recover(PolicyServerLostError("was restarted"))
        servers.check_before_rollouts()
        assert servers.num_restarts == 0


# -- several ranks ----------------------------------------------------------------------------------------------------


HERE = threading.local()


def gather_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives are those of the rank that this thread plays."""
    monkeypatch.setattr("trl_gym.ranks._gather", lambda items: HERE.gather(items))


class Gym:
    """A NeMo Gym that fails on command. Each rank has its own."""

    state = ServerState.STARTING
    head_url = "http://127.0.0.1:1"

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure

    def connect_policy(self, *_: object) -> None:
        if self.failure is not None:
            raise self.failure

    def wait_ready(self) -> Gym:
        self.connect_policy()
        return self


def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, call: Callable[[RunServers], Any]) -> list[Any]:
    """What `call` returns or raises on each of several ranks, which are threads."""
    gather_here(monkeypatch)

    def on_rank(rank: int, gather: Any) -> Any:
        HERE.gather = gather
        servers = run_servers("http://127.0.0.1:1/v1", tmp_path)
        servers._process = SimpleNamespace(process_index=rank, is_main_process=rank == 0)
        return call(servers)

    return on_ranks(number, on_rank)


class Policy:
    """A policy server that is ready, or whose `wait_ready` fails."""

    base_urls, model_name, is_ours, state = ("http://127.0.0.1:1/v1",), "policy", False, ServerState.STARTING

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.client = SimpleNamespace(api_key="key", patient=lambda _: SimpleNamespace(infos=lambda: [{}]))

    def wait_ready(self) -> None:
        if self.failure is not None:
            raise self.failure

    def check(self) -> None:
        pass


# Anything that a wrong answer, a full disk or a mistake of ours may raise.
FAILURES = [PolicyServerError("It died.", "Start it."), OSError("No space left"), KeyError("head_url")]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("step", ["start", "gym", "policy"])
def test_what_fails_on_rank_0_is_raised_on_every_rank(
    failure: Exception, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(servers: RunServers) -> None:
        servers.policy, servers.gym = Policy(), Gym()
        if step == "policy":
            servers.policy.failure = failure
        else:
            servers.gym.failure = failure
        if step == "start":
            servers.start()
        else:
            servers.wait_ready()

    first, second, third = play(monkeypatch, tmp_path, 3, call)
    assert first is failure and type(second) is type(third)
    assert isinstance(second, TrlGymError) and str(second).startswith("rank 0: ")
    if isinstance(failure, TrlGymError):
        assert type(second) is type(failure) and second.remedy == failure.remedy


def test_what_fails_on_another_rank_that_attaches_is_raised_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached: list[Any] = []

    def attach(base_urls: tuple[str, ...], *, api_key: str) -> Policy:
        attached.append((base_urls, api_key))
        return Policy()

    def attach_gym(head_url: str, *, hang_timeout_s: float, is_ours: bool) -> Gym:
        assert is_ours, "what rank 0 has started"
        return Gym(OSError("No route to host") if len(attached) == 2 else None)

    def call(servers: RunServers) -> None:
        servers._splice_checked = True
        if servers._process.is_main_process:
            servers.policy, servers.gym = Policy(), Gym()
        servers.wait_ready()

    monkeypatch.setattr(PolicyServer, "attach", attach)
    monkeypatch.setattr(GymServers, "attach", attach_gym)
    first, second, third = play(monkeypatch, tmp_path, 3, call)
    assert attached == [(Policy.base_urls, "key")] * 2
    assert OSError in (type(second), type(third))
    assert isinstance(first, TrlGymError) and "OSError: No route to host" in str(first)


@pytest.mark.parametrize("step", ["Journal", "PolicyWeights"])
def test_a_rank_that_cannot_connect_its_source_ends_all(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(*_: Any, **__: Any) -> None:
        if HERE.rank == 1:
            raise OSError("No space left on device")

    def connect(rank: int, gather: Any) -> None:
        HERE.rank, HERE.gather = rank, gather
        servers = SimpleNamespace(wait_ready=lambda: None, take_model=lambda *_: None, secrets=(), own=None)
        servers.policy = SimpleNamespace(client=SimpleNamespace(info=dict))
        options = SimpleNamespace(agent_sampling_of=None)
        args = SimpleNamespace(output_dir=tmp_path, gym_journal_max_mb=1, gym_overrides={}, rollout_options=options)
        source = LiveSource(args, servers)
        source._new_collector = lambda: None  # type: ignore[method-assign]
        source._new_queue = lambda collector: None  # type: ignore[method-assign]
        accelerator = SimpleNamespace(process_index=rank, mixed_precision="no")
        source.connect(accelerator, None, SimpleNamespace(tokenizer=None))

    gather_here(monkeypatch)
    for name in ("check_model", "Journal", "PolicyWeights"):
        monkeypatch.setattr(f"trl_gym.run.live.{name}", make if name == step else lambda *_, **__: None)
    first, second = on_ranks(2, connect)
    assert isinstance(second, OSError)
    assert type(first) is TrlGymError and str(first) == "rank 1: OSError: No space left on device"


def test_every_rank_hears_that_a_server_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hopeless:
        def recover(self, error: Exception) -> None:
            raise PolicyServerError("The budget is used up.", "Find the cause.") from error

    def call(servers: RunServers) -> None:
        servers._recovery = Hopeless()
        servers.recover(PolicyServerLostError("connection refused"))

    first, second = play(monkeypatch, tmp_path, 2, call)
    assert str(first) == "The budget is used up. Find the cause."
    assert type(second) is PolicyServerError and str(second) == "rank 0: The budget is used up. Find the cause."


GYM_LOSS = GymServerLostError("NeMo Gym was ready and ended.", "Look.")


def test_a_gym_of_ours_is_started_again_as_often_as_allowed_and_every_rank_attaches_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def call(servers: RunServers) -> list[str]:
        done: list[str] = []
        servers._args.gym_server_restarts = 2

        def restart() -> SimpleNamespace:
            done.append("restarted")
            if len(done) == 1:
                raise GymServerError("It was killed as it started.")
            return SimpleNamespace(head_url="http://new")

        servers.gym = SimpleNamespace(restart=restart, attach_again=done.append)  # type: ignore[assignment]
        servers.recover_gym(GYM_LOSS)
        with pytest.raises(
            GymServerError, match=r"was restarted 2 times, and `gym_server_restarts` allows no more\. Ne"
        ):
            servers.recover_gym(GYM_LOSS)
        return done

    assert play(monkeypatch, tmp_path, 3, call) == [["restarted"] * 2, ["http://new"], ["http://new"]]
    assert "restarting NeMo Gym (1 of 2 restarts): NeMo Gym was ready and ended." in caplog.text
    assert "restarting NeMo Gym (2 of 2 restarts): It was killed as it started." in caplog.text


def test_a_gym_of_others_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(servers: RunServers) -> None:
        servers._owns_gym = False
        servers.recover_gym(GYM_LOSS)

    first, second = play(monkeypatch, tmp_path, 2, call)
    assert first is GYM_LOSS and type(second) is GymServerLostError and str(second) == f"rank 0: {GYM_LOSS}"


@pytest.mark.parametrize(
    ("tensor", "data", "training", "gpus", "said", "proposed"),
    [
        (1, 8, 8, 8, "", 0),
        (2, 4, 8, 8, "", 0),
        (2, 1, 1, 2, "", 0),  # of GPUs that do not train, too
        (1, 1, 8, 8, "Training uses 8 GPUs of this host and the policy server 1", 8),
        (2, 1, 8, 8, "Training uses 8 GPUs of this host and the policy server 2", 4),
        (1, 8, 4, 4, "The policy server has 8 workers (tensor parallel × data parallel) and the host 4 GPUs", 4),
        (8, 1, 4, 4, "The policy server has 8 workers", 1),
    ],
)
def test_a_server_that_shares_gpus_has_as_many_workers(
    tensor: int, data: int, training: int, gpus: int, said: str, proposed: int
) -> None:
    for engine, option, name in (
        ("vllm", "gym_vllm_args", "data_parallel_size"),
        ("sglang", "gym_sglang_args", "dp-size"),
        ("sglang", "gym_sglang_args", "--data-parallel-size"),
    ):
        given = {"gym_vllm_args": None, "gym_sglang_args": None, option: {name: data}}
        args: Any = SimpleNamespace(gym_engine=engine, vllm_tensor_parallel_size=tensor, **given)
        problem = workers_problem(args, training, gpus)
        assert (problem is None) == (not said)
        if problem is not None:
            assert said in problem.text and f'`{option}` to {{"data-parallel-size": {proposed}}}' in problem.remedy
    args.gym_engine = "transformers"
    assert workers_problem(args, training, gpus) is None
