"""Real NeMo Gym servers, both supported ends of its version range, against a policy without a model."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import wait_for
from tests.fork_ranks import free_port
from tests.gym.fake_policy import FakePolicy
from trl_gym.errors import ConfigError, FailureKind, GymServerError, RolloutFailure
from trl_gym.gym.client import GymAnswer, new_session, run_rollout
from trl_gym.gym.install import GymInstallation, probe
from trl_gym.gym.servers import GymServers
from trl_gym.rollout_options import RolloutOptions
from trl_gym.rollouts.admission import budgets_from_options
from trl_gym.rollouts.collector import RolloutCollector, RolloutResult
from trl_gym.rollouts.request import RolloutRequest

pytestmark = [pytest.mark.e2e, pytest.mark.no_policy]

CHECKOUT = Path(__file__).resolve().parents[2]
INTERPRETERS = {
    "0.4.0": ("TRL_GYM_PYTHON_040", CHECKOUT / ".gym-venv/bin/python"),
    "0.7.0": ("TRL_GYM_PYTHON_070", CHECKOUT / ".gym-venv-0.7/bin/python"),
}
START_TIMEOUT_S = 300.0  # seconds where the machine is idle; several tests may share two cores
DEADLINE_S = 120.0
ENVIRONMENTS = (
    "example_single_tool_call",
    "example_multi_step",
    "workplace_assistant",
    "reasoning_gym",
    "mcqa",
    "example_session_state_mgmt",
    "example_multi_turn_gymnasium",
)
NO_POLICY = "http://127.0.0.1:9/v1"  # for tests that make no model call

CUSTOM_SERVER = """
import asyncio
from nemo_gym.base_resources_server import BaseResourcesServerConfig, BaseVerifyResponse, SimpleResourcesServer
from helper import REWARD
import MISSING

class Halves(SimpleResourcesServer):
    config: BaseResourcesServerConfig

    async def verify(self, body: "BaseVerifyRequest") -> BaseVerifyResponse:
        import late_helper  # imports inside functions work, too
        if body.responses_create_params.input[0].content == "boom":
            raise ValueError("the verifier tripped")
        if body.responses_create_params.input[0].content == "hang":
            print("hanging", flush=True)
            try:
                await asyncio.Event().wait()
            finally:
                print("let go", flush=True)
        return BaseVerifyResponse(**body.model_dump(), reward=REWARD * late_helper.SIGN)

from nemo_gym.base_resources_server import BaseVerifyRequest

if __name__ == "__main__":
    Halves.run_webserver()
"""


@pytest.fixture(scope="module", params=INTERPRETERS)
def gym(request: pytest.FixtureRequest) -> GymInstallation:
    variable, default = INTERPRETERS[request.param]
    path = Path(os.environ.get(variable, default))
    if not path.is_file():
        pytest.fail(f"no interpreter with nemo-gym {request.param}: run `make setup`, or set {variable}=/…/bin/python")
    return probe(path)


Started = Callable[[], list[psutil.Process]]


@pytest.fixture(autouse=True)
def started() -> Iterator[Started]:
    """What this test has started and still runs, in the order of the starts; nothing of it is left in the end."""
    before = set(psutil.Process().children(recursive=True))  # other tests share processes

    def those() -> list[psutil.Process]:
        return [child for child in psutil.Process().children(recursive=True) if child not in before]

    yield those
    wait_for(lambda: not those(), "every child is gone")


@pytest.fixture
async def policy() -> AsyncIterator[FakePolicy]:
    async with FakePolicy() as fake:
        yield fake


def config_of(name: str) -> str:
    return f"resources_servers/{name}/configs/{name}.yaml"


def make(gym: GymInstallation, tmp_path: Path, configs: list[str | Path], **options: object) -> GymServers:
    options = {"policy_base_url": NO_POLICY, "start_timeout_s": START_TIMEOUT_S, **options}
    return GymServers(configs, python=gym.python, log_dir=tmp_path / "logs", **options)  # type: ignore[arg-type]


def example_rows(gym: GymInstallation, name: str) -> list[dict]:
    lines = (gym.root / f"resources_servers/{name}/data/example.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def agent_of(servers: GymServers, environment: str) -> str:
    """Agents are called after their environment; their `resources_server` sometimes is not."""
    return next(name for name in servers.agents if name.startswith(environment))


async def roll_out(gym: GymInstallation, servers: GymServers, environments: list[str]) -> list[GymAnswer]:
    """All example rows side by side; any failure fails the test."""
    async with new_session(64) as session:
        calls = [
            run_rollout(session, servers.agent(agent_of(servers, name)), row, deadline_s=DEADLINE_S)
            for name in environments
            for row in example_rows(gym, name)
        ]
        results = await asyncio.gather(*calls)
    failures = [result for result in results if isinstance(result, RolloutFailure)]
    assert not failures, failures
    return [result for result in results if isinstance(result, GymAnswer)]


async def test_seven_environments_in_one_process(
    gym: GymInstallation, tmp_path: Path, policy: FakePolicy, started: Started
) -> None:
    overrides = {"mcqa_simple_agent.responses_api_agents.simple_agent.max_steps": 5, "text": 'it\'s "a, b": ${x} \n#'}
    overrides["text"] = overrides["text"].replace("${x}", "$x")  # an interpolation would be resolved
    configs: list[str | Path] = [config_of(name) for name in ENVIRONMENTS]
    key = "sk-secret-for-e2e"
    servers = make(gym, tmp_path, configs, overrides=overrides, policy_api_key=key, policy_base_url=policy.base_url)
    servers.start()
    try:
        await asyncio.to_thread(servers.wait_ready)
        assert servers.gym_version == gym.version and servers.sole_agent is None
        assert len(servers.agents) == len(ENVIRONMENTS)
        answers = await roll_out(gym, servers, list(ENVIRONMENTS))
        assert len(answers) == 5 * len(ENVIRONMENTS)
        for answer in answers:
            assert any(item.get("generation_token_ids") for item in answer.result["response"]["output"])
        servers.check()

        config = servers._processes[0].view.config
        assert config["text"] == overrides["text"]
        assert config["mcqa_simple_agent"]["responses_api_agents"]["simple_agent"]["max_steps"] == 5
        assert key not in json.dumps(config)
        family = started()
        assert key not in str([process.cmdline() for process in family])
        assert len(family) == 3, "one guard, one supervisor, one host"
    finally:
        await asyncio.to_thread(servers.stop)
    roles = {message["role"] for body in policy.requests for message in body["messages"]}
    assert "developer" not in roles and "tool" in roles


def write_custom_environment(folder: Path, missing_module: str = "json", **marks: bool) -> Path:
    """A server beside its config, with helper modules and code of its own; marks are in every place for such."""
    server = folder / "resources_servers" / "halves"
    server.mkdir(parents=True)
    (server / "app.py").write_text(CUSTOM_SERVER.replace("MISSING", missing_module))
    (server / "helper.py").write_text("REWARD = 0.5\n")
    (server / "late_helper.py").write_text("SIGN = -1\n")
    (server / "requirements.txt").write_text("-e nemo-gym[dev] @ ../../\nno-such-package>=1\n")
    model = {"type": "responses_api_models", "name": "policy_model"}
    resources = {"type": "resources_servers", "name": "halves"}
    agent = {"entrypoint": "app.py", "resources_server": resources, "model_server": model, **marks}
    config = {
        **marks,
        "halves": {"resources_servers": {"halves": {"entrypoint": "app.py", "domain": "other", **marks}}},
        "halves_agent": {"responses_api_agents": {"simple_agent": agent}},
    }
    path = folder / "halves.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


async def roll_out_halves(servers: GymServers) -> None:
    row = {"responses_create_params": {"input": [{"role": "user", "content": "?"}], "metadata": None}}
    async with new_session(1) as session:
        answer = await run_rollout(session, servers.agent("halves_agent"), row, deadline_s=DEADLINE_S)
    assert isinstance(answer, GymAnswer), answer
    assert answer.result["reward"] == -0.5


async def fail_halves(servers: GymServers) -> None:
    row = {"responses_create_params": {"input": [{"role": "user", "content": "boom"}]}}
    async with new_session(1) as session:
        failure = await run_rollout(session, servers.agent("halves_agent"), row, deadline_s=DEADLINE_S)
        unusable = await run_rollout(session, servers.agent("halves_agent"), {}, deadline_s=DEADLINE_S)
    assert isinstance(failure, RolloutFailure) and failure.kind is FailureKind.ENVIRONMENT
    assert failure.text == "halves_agent → the server that it called: ValueError('the verifier tripped')"
    assert isinstance(unusable, RolloutFailure) and "HTTP 422" in unusable.text


async def leave_halves(servers: GymServers) -> None:
    """A rollout that is given up: from 0.7 on, Gym cancels what its servers do for it, whoever called them."""
    assert servers.log_path is not None
    async with new_session(1) as session:
        call = run_rollout(session, servers.agent("halves_agent"), HANGS, deadline_s=DEADLINE_S)
        rollout = asyncio.create_task(call)
        await asyncio.to_thread(wait_for, lambda: "hanging" in servers.log_path.read_text(), "it hangs")
        rollout.cancel()
        await asyncio.gather(rollout, return_exceptions=True)
    if not servers.gym_version.startswith("0.4"):
        await asyncio.to_thread(
            wait_for, lambda: "let go" in servers.log_path.read_text(), "the verifier is cancelled"
        )


async def test_server_beside_its_config(gym: GymInstallation, tmp_path: Path, policy: FakePolicy) -> None:
    config = write_custom_environment(tmp_path / "env", trl_gym_single_process=True)  # which Gym ignores
    with pytest.raises(ConfigError, match=r"cannot run in 2 processes .*`halves` demands a single process"):
        make(gym, tmp_path, [config], processes=2).start()
    servers = make(gym, tmp_path, [config], policy_base_url=policy.base_url, rollouts_in_flight=10_000)
    servers.start()
    try:
        await asyncio.to_thread(servers.wait_ready)
        assert servers.num_processes == 1
        assert servers.sole_agent == "halves_agent" and servers.agents["halves_agent"].resources_server == "halves"
        await roll_out_halves(servers)
        await fail_halves(servers)
        await leave_halves(servers)
        attached = await asyncio.to_thread(GymServers.attach, servers.head_url)
        attached.connect_policy(policy.base_url, "policy")
        await roll_out_halves(attached)
        attached.stop()
        servers.check()  # still there
    finally:
        await asyncio.to_thread(servers.stop)


def test_missing_module_names_server_module_and_command(gym: GymInstallation, tmp_path: Path) -> None:
    config = write_custom_environment(tmp_path / "env", missing_module="no_such_module")
    with pytest.raises(GymServerError) as error, make(gym, tmp_path, [config]):
        pass
    text = str(error.value)
    assert "`halves` (resources_servers/halves/app.py)" in text and "`no_such_module`" in text
    assert f"uv pip install --python {gym.python} 'no-such-package>=1'" in text


def test_a_server_that_needs_ray_is_sent_to_upstream_mode(gym: GymInstallation, tmp_path: Path) -> None:
    config = write_custom_environment(tmp_path / "env", missing_module="ray")
    with pytest.raises(GymServerError, match=r"`halves`.*mode='upstream'"), make(gym, tmp_path, [config]):
        pass


def test_config_that_does_not_exist(gym: GymInstallation, tmp_path: Path) -> None:
    servers = make(gym, tmp_path, ["resources_servers/mcqa/configs/mqca.yaml"])
    with pytest.raises(
        ConfigError, match=r"mqca\.yaml does not exist[\s\S]*resources_servers/mcqa/configs/mcqa\.yaml"
    ):
        servers.start()


def test_gyms_own_complaint_comes_through(gym: GymInstallation, tmp_path: Path) -> None:
    overrides = {"mcqa_simple_agent.responses_api_agents.simple_agent.resources_server.name": "mcqb"}
    with (
        pytest.raises(GymServerError, match=r"ServerRefNotFoundError.*mcqa_simple_agent"),
        make(gym, tmp_path, [config_of("mcqa")], overrides=overrides),
    ):
        pass


def test_fixed_and_busy_head_port_and_death_of_the_host(
    gym: GymInstallation, tmp_path: Path, started: Started
) -> None:
    port = free_port()
    with make(gym, tmp_path, [config_of("mcqa")], overrides={"head_server.port": port}) as first:
        assert first.head_url == f"http://127.0.0.1:{port}"
        second = make(gym, tmp_path / "second", [config_of("mcqa")], overrides={"head_server.port": port})
        with pytest.raises(GymServerError, match=rf"cannot listen on 127.0.0.1:{port}.*GymServers\.attach"):
            second.start()

        # The port was free when we looked, and another Gym has it when ours comes: only the nonce tells.
        third = make(gym, tmp_path / "third", [config_of("mcqa")])
        third.start()
        third._processes[0]._head_url = first.head_url
        with pytest.raises(GymServerError, match="Another NeMo Gym answers"):
            third.wait_ready()

        host = started()[-1]
        os.kill(host.pid, signal.SIGKILL)
        child = first._processes[0].child
        assert child is not None and child.wait(60) is not None
        with pytest.raises(GymServerError, match=r"was ready and ended within .* \(signal SIGKILL\)[\s\S]*gym\.log"):
            first.check()


async def test_several_processes_share_the_rollouts_and_end_together(
    gym: GymInstallation, tmp_path: Path, policy: FakePolicy, started: Started
) -> None:
    """Sessions of a rollout stay in its process; one that dies ends the collection by its name."""
    configs: list[str | Path] = [config_of("example_session_state_mgmt"), write_custom_environment(tmp_path / "env")]
    servers = make(gym, tmp_path, configs, policy_base_url=policy.base_url, processes=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    servers.start()
    try:
        await asyncio.to_thread(servers.wait_ready)
        family = started()
        hosts = [one for one in servers.servers if one.name == "halves"]
        assert len({host.pid for host in hosts}) == servers.num_processes == 2 and len(family) == 6
        for host in hosts:
            assert psutil.Process(host.pid).rlimit(psutil.RLIMIT_NOFILE) == (max(soft, min(65_536, hard)), hard)
        with await asyncio.to_thread(GymServers.attach, servers.head_url) as other_rank:
            assert {agent.url for agent in [other_rank.agent("halves_agent") for _ in range(64)]} == {
                process.agents["halves_agent"].url for process in servers._processes
            }
            await roll_out(gym, other_rank, ["example_session_state_mgmt"] * 2)

        def kill_the_second(result: RolloutResult) -> None:
            in_flight.append([process.in_flight.number for process in servers._processes])
            if result.answer is not None:
                os.kill(hosts[1].pid or 0, signal.SIGKILL)

        in_flight: list[list[int]] = []
        row = {"responses_create_params": {"input": [{"role": "user", "content": "?"}]}, "name": "halves_agent"}
        with pytest.raises(GymServerError, match=r"\(process 2 of 2\) was ready and .*SIGKILL[\s\S]*gym-2\.log"):
            await asyncio.to_thread(collect, servers, [HANGS] * 4 + [row], kill_the_second)
        assert in_flight[0] == [2, 2]
        assert (tmp_path / "logs" / "gym.log").is_file()
    finally:
        await asyncio.to_thread(servers.stop)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


OWNER = """
import sys, time
from trl_gym.gym.servers import GymServers
python, logs, policy, *configs = sys.argv[1:]
servers = GymServers(configs, python=python, log_dir=logs, policy_base_url=policy, start_timeout_s=300)
with servers:
    print("ready", flush=True)
    time.sleep(600)
"""


def test_sigkill_of_the_owner_leaves_nothing(gym: GymInstallation, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(gym.python), str(tmp_path), NO_POLICY, config_of("mcqa")]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
        assert [path.name for path in temporary.glob("trl-gym-*/*")] == ["settings.json"]
        family = psutil.Process(owner.pid).children(recursive=True)
        assert len(family) == 3
        owner.kill()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive and not [*temporary.glob("trl-gym-*")]


HANGS = {"responses_create_params": {"input": [{"role": "user", "content": "hang"}]}, "name": "halves_agent"}


def collect(
    servers: GymServers, rows: list[dict], on_end: Callable[[RolloutResult], object], **options: Any
) -> list[RolloutResult]:
    """Collect as a trainer does; rows are those of the agent that they name, else of the example."""
    limits = {name: options.pop(name, default) for name, default in (("max_inflight", 64), ("retries", {}))}
    collector = RolloutCollector(
        servers.agent,
        budgets=budgets_from_options(RolloutOptions(deadline=600.0, **limits)),
        check=servers.check_process,
        agents_down=servers.agents_down,
        gym_log=servers.log_end,
        **options,
    )

    def finish(result: RolloutResult) -> RolloutResult:
        on_end(result)
        return result

    made = []
    for index, row in enumerate(rows):
        agent = row.get("name") or agent_of(servers, "example_single_tool_call")
        identity: dict[str, Any] = {"rollout_id": f"g{index}-m0-a0", "task_index": index, "member": 0}
        made.append(RolloutRequest(**identity, group=index, attempt=0, agent=agent, row=row))
    try:
        return collector.collect(made, finish)
    finally:
        collector.close()


def kill_after(servers: GymServers, number: int, name: str) -> Callable[[RolloutResult], None]:
    """Kill a server once so many rollouts have been answered."""
    pid = next(server.pid for server in servers.servers if server.name == name)
    left = [None] * number

    def on_end(result: RolloutResult) -> None:
        if result.answer is not None and left:
            left.pop()
            if not left:
                os.kill(pid, signal.SIGKILL)  # type: ignore[arg-type]

    return on_end


@pytest.mark.slow
async def test_upstream_mode(
    gym: GymInstallation, tmp_path: Path, policy: FakePolicy, monkeypatch: pytest.MonkeyPatch, started: Started
) -> None:
    """Gym's own launcher, with a server of the user's and one of the installation; Ray leaves no process behind.

    It has a process per server. An agent gone, its environment is left out; then the resources server of the other one
    ends the collection.
    """
    monkeypatch.chdir(tmp_path)
    configs: list[str | Path] = [write_custom_environment(tmp_path / "env"), config_of("example_single_tool_call")]
    servers = make(gym, tmp_path, configs, mode="upstream", policy_base_url=policy.base_url, start_timeout_s=500)
    servers.start()
    try:
        await asyncio.to_thread(servers.wait_ready)
        family = started()
        assert any("gcs_server" in process.name() for process in family)
        await roll_out(gym, servers, ["example_single_tool_call"])
        await roll_out_halves(servers)
        servers.check()
        rest = example_rows(gym, "example_single_tool_call")[:1] * 30
        skipping = partial(collect, servers, on_environment_down="skip", retries={"infrastructure": 5})
        results = await asyncio.to_thread(skipping, [HANGS] * 4 + rest[:8], kill_after(servers, 1, "halves_agent"))
        for result in results[:4]:
            assert result.failure.kind is FailureKind.INFRASTRUCTURE
            assert "`halves_agent` is down: server `halves_agent`: its process" in result.failure.text
        assert [result.failure for result in results[4:]] == [None] * 8
        servers.check_process()

        ended: list[RolloutResult] = []
        kill = kill_after(servers, 2, "example_single_tool_call")
        down = r"environment `\S+` is down: server `example_single_tool_call`.*[\s\S]*gym\.log"
        with pytest.raises(GymServerError, match=down):
            await asyncio.to_thread(
                collect, servers, rest, lambda result: (ended.append(result), kill(result)), max_inflight=2
            )
        assert sum(result.failure is None for result in ended) >= 2
        with pytest.raises(GymServerError, match=r"servers have died: .*`example_single_tool_call`"):
            servers.check()
    finally:
        await asyncio.to_thread(servers.stop)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    assert not {path.name for path in tmp_path.iterdir()} - {"env", "logs"}, "nothing in the user's folder"
