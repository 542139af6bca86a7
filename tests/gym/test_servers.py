"""Life cycle and discovery, without a real Gym: heads are small local servers. The real ones are in tests/e2e."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import wait_for
from trl_gym.errors import ConfigError, GymServerError, GymServerLostError
from trl_gym.gym.discovery import HeadView, new_http_session
from trl_gym.gym.process import GymProcess, bind_head, error_path
from trl_gym.gym.servers import AgentInfo, GymServers, choose_processes, default_processes, least_busy, log_name
from trl_gym.processes import ChildProcess, ServerState, bind_socket
from trl_gym.supervisor import is_stopped

SECRET = "sk-do-not-print"


class FakeHead:
    """Answers GET with whatever `pages` holds; a value that is not bytes is sent as JSON."""

    def __init__(self) -> None:
        self.pages: dict[str, Any] = {"/": {"status": "ok"}}
        pages = self.pages

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = pages.get(self.path)
                body = page if isinstance(page, bytes) else json.dumps(page).encode()
                self.send_response(404 if page is None else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def describe(self, config: dict[str, Any], instances: list[dict[str, Any]]) -> None:
        self.pages["/global_config_dict_yaml"] = yaml.safe_dump(config)
        self.pages["/server_instances"] = instances

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def head() -> Iterator[FakeHead]:
    fake = FakeHead()
    reference = {"type": "resources_servers", "name": "math"}
    config = {
        "policy_base_url": "http://127.0.0.1:8000/v1",
        "policy_api_key": SECRET,
        "math": {"resources_servers": {"math": {"entrypoint": "app.py"}}},
        "math_agent": {"responses_api_agents": {"simple_agent": {"resources_server": reference}}},
        "free_agent": {"responses_api_agents": {"other_agent": {}}},
    }
    instances = [
        instance("math", "resources_servers", "math", fake.url),
        instance("math_agent", "responses_api_agents", "simple_agent", fake.url),
        instance("free_agent", "responses_api_agents", "other_agent", fake.url + "/"),
    ]
    fake.describe(config, instances)
    yield fake
    fake.close()


def instance(name: str, kind: str, server: str, url: str) -> dict[str, Any]:
    return {"process_name": name, "server_type": kind, "name": server, "url": url, "pid": 1, "status": None}


def test_attach_discovers_agents(head: FakeHead) -> None:
    gym = GymServers.attach(head.url + "/")
    assert gym.state is ServerState.READY and gym.head_url == head.url and gym.log_path is None
    assert gym.agents == {
        "math_agent": AgentInfo("math_agent", head.url, "math", "simple_agent"),
        "free_agent": AgentInfo("free_agent", head.url, None, "other_agent"),
    }
    assert gym.sole_agent is None and len(gym.servers) == 3
    assert gym.agent("math_agent").url == head.url
    with pytest.raises(ConfigError, match=r"no agent `maths_agent`.*`free_agent`.*Did you mean `math_agent`\?"):
        gym.agent("maths_agent")
    gym.check()
    gym.stop()
    gym.stop()
    assert gym.state is ServerState.STOPPED


def test_a_gym_of_one_process_hangs_as_a_whole_and_others_server_by_server(head: FakeHead) -> None:
    with GymServers.attach(head.url, hang_timeout_s=7.0) as gym:
        assert gym.pulse_urls == [head.url]
        gym.note_hung([])
        with pytest.raises(GymServerLostError, match=rf"NeMo Gym at {head.url} hangs.* for 7 s \(`gym_server_hang_t"):
            gym.note_hung([head.url])
    kinds = {"math": "resources_servers", "math_agent": "responses_api_agents", "free_agent": "responses_api_agents"}
    servers = [
        instance(name, kind, kind, f"{head.url}/{name}") | {"pid": pid}
        for pid, (name, kind) in enumerate(kinds.items(), start=1)
    ]
    head.pages["/server_instances"] = servers
    head.pages |= {f"/{server['process_name']}/": "well" for server in servers}
    with GymServers.attach(head.url) as gym:
        gym.note_hung(gym.pulse_urls[:1])
        assert gym.agents_down(Counter()) == {
            "math_agent": f"server `math`: {head.url}/math accepts requests and answers none: it hangs"
        }
        gym.note_hung([])  # it answers again
        assert gym.agents_down(Counter()) == {}


def test_a_rank_sees_that_the_process_of_another_ranks_gym_was_stopped(head: FakeHead) -> None:
    """Without the timeout of one that hangs; a Gym that someone else has started may be paused."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        for server in head.pages["/server_instances"]:
            server["pid"] = child.pid
        with GymServers.attach(head.url, is_ours=True) as gym, GymServers.attach(head.url) as another:
            gym.check_process()
            os.kill(child.pid, signal.SIGSTOP)
            wait_for(lambda: is_stopped(child.pid))
            for _ in range(2):
                gym.check_process()
            with pytest.raises(GymServerLostError, match=rf"\(pid {child.pid}\) was stopped by someone"):
                gym.check_process()
            for _ in range(3):
                another.check_process()
        child.kill()


def test_each_start_has_logs_of_its_own() -> None:
    assert [log_name(index, restarts) for restarts in (0, 2) for index in (0, 1)] == [
        *("gym.log", "gym-2.log", "gym-restart2.log", "gym-2-restart2.log")
    ]


def test_connect_policy_compares_with_an_attached_gym(head: FakeHead) -> None:
    with GymServers.attach(head.url) as gym:
        gym.connect_policy("http://localhost:8000/v1/", "policy")
        with pytest.raises(GymServerError, match=r"http://127\.0\.0\.1:8000/v1, but .* http://127\.0\.0\.1:9000/v1"):
            gym.connect_policy("http://127.0.0.1:9000/v1", "policy")


def test_several_policy_servers_have_to_be_the_same_ones(head: FakeHead) -> None:
    """One that Gym calls and the trainer does not know would sample with old weights."""
    both = ["http://127.0.0.1:8000/v1", "http://node7:8000/v1"]
    head.describe({"policy_base_url": both}, [instance("free_agent", "responses_api_agents", "other_agent", head.url)])
    with GymServers.attach(head.url) as gym:
        gym.connect_policy("http://node7:8000/v1, http://localhost:8000/v1", "policy")
        gym.connect_policy(("http://node7:8000/v1", "http://localhost:8000/v1"), "policy")
        for urls in ("http://node7:8000/v1", f"{both[0]},{both[1]},http://node8:8000/v1"):
            with pytest.raises(GymServerError, match=f"calls the policy at {both[0]} and {both[1]}, but"):
                gym.connect_policy(urls, "policy")


@pytest.fixture
def other_head(head: FakeHead) -> Iterator[FakeHead]:
    """A second process of the same Gym."""
    fake = FakeHead()
    instances = [entry | {"url": fake.url} for entry in head.pages["/server_instances"]]
    fake.describe(yaml.safe_load(head.pages["/global_config_dict_yaml"]), instances)
    yield fake
    fake.close()


def test_rollouts_are_spread_over_the_processes_of_an_attached_gym(head: FakeHead, other_head: FakeHead) -> None:
    gym = GymServers.attach(f"{head.url}/, {other_head.url},{head.url}")
    assert gym.head_url == f"{head.url},{other_head.url}" and gym.num_processes == 2 and len(gym.servers) == 6
    assert gym.agents["math_agent"].url == head.url

    async def start(stack: contextlib.AsyncExitStack, agent: str) -> str:
        chosen = gym.agent(agent)
        await stack.enter_async_context(chosen.in_flight)
        return chosen.url

    async def fill() -> None:
        async with contextlib.AsyncExitStack() as stack:
            # Whichever agent they are of: what counts is the process.
            urls = [await start(stack, agent) for agent in ("math_agent", "free_agent") * 8]
            assert Counter(urls) == {head.url: 8, other_head.url: 8}
            async with gym._processes[0].in_flight:
                assert {gym.agent("math_agent").url for _ in range(8)} == {other_head.url}

    asyncio.run(fill())
    assert [process.in_flight.number for process in gym._processes] == [0, 0]
    with GymServers.attach(gym.head_url) as same:  # what the other ranks do
        assert same.num_processes == 2
    gym.stop()


def test_every_process_of_an_attached_gym_is_looked_at(head: FakeHead, other_head: FakeHead) -> None:
    gym = GymServers.attach(f"{head.url},{other_head.url}")
    gym.connect_policy("http://127.0.0.1:8000/v1", "policy")
    with bind_socket() as sock:
        tools = f"http://127.0.0.1:{sock.getsockname()[1]}"
    instances = gym._processes[1].view.instances
    instances[0] = dataclasses.replace(instances[0], url=tools)
    refused: Counter[str] = Counter()
    assert [gym.agents_down(refused) for _ in range(3)][-1] == {
        "math_agent": f"server `math`: {tools} refuses connections"
    }
    other_head.close()
    with pytest.raises(GymServerError, match=f"No NeMo Gym head server answers at {other_head.url}"):
        gym.check()


def test_processes_of_different_gyms_are_refused(head: FakeHead, other_head: FakeHead) -> None:
    other_head.pages["/server_instances"].pop()
    with pytest.raises(GymServerError, match=f"{head.url} and {other_head.url} differ in their agents: `free_agent`"):
        GymServers.attach(f"{head.url},{other_head.url}")
    other_head.pages["/server_instances"] = head.pages["/server_instances"]
    other_head.describe({"policy_base_url": "http://127.0.0.1:9000/v1"}, head.pages["/server_instances"])
    gym = GymServers.attach(f"{head.url},{other_head.url}")
    with pytest.raises(GymServerError, match=rf"at {other_head.url} calls the policy at http://127\.0\.0\.1:9000"):
        gym.connect_policy("http://127.0.0.1:8000/v1", "policy")
    gym.stop()


@given(in_flight=st.lists(st.integers(0, 5), min_size=1, max_size=8), seed=st.integers(0, 3))
def test_a_rollout_goes_where_the_fewest_are(in_flight: list[int], seed: int) -> None:
    assert in_flight[least_busy(in_flight, random.Random(seed))] == min(in_flight)


def test_the_choice_among_equals_is_by_chance() -> None:
    """Ranks choose without knowing of each other: with a fixed order all would begin with the same process."""
    assert {least_busy([1, 0, 0, 2], random.Random(seed)) for seed in range(32)} == {1, 2}


@given(rollouts=st.integers(1, 10_000), cores=st.integers(1, 512))
def test_the_default_number_of_processes(rollouts: int, cores: int) -> None:
    number = default_processes(rollouts, cores)
    assert number >= 1
    assert number == 1 or (4 * number <= cores and 64 * (number - 1) < rollouts)
    assert default_processes(rollouts + 1, cores) >= number and default_processes(rollouts, cores + 1) >= number


def test_the_default_number_of_processes_on_usual_machines() -> None:
    places = [(256, 2), (256, 8), (256, 16), (1024, 64), (8, 128), (64, 128)]
    assert [default_processes(*place) for place in places] == [1, 2, 4, 16, 1, 1]


def test_servers_that_need_one_process_get_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl_gym.gym.servers.num_cores", lambda: 64)
    caplog.set_level("INFO", "trl_gym")
    reasons = ["`board` has the fixed port 8000"]
    assert (
        choose_processes(None, "host", [], 256) == 4
        and "For 256 rollouts in flight NeMo Gym runs in 4 processes" in caplog.text
    )
    assert choose_processes(None, "host", reasons, 256) == 1
    assert "runs in one process: `board` has the fixed port 8000" in caplog.text
    assert choose_processes(1, "host", reasons, 256) == 1 and choose_processes(3, "host", [], 1) == 3
    with pytest.raises(
        ConfigError, match=r"cannot run in 2 processes \(`gym_processes`\): `board` has the fixed port"
    ):
        choose_processes(2, "host", reasons, 256)
    assert choose_processes(None, "upstream", [], 256) == 1
    with pytest.raises(ConfigError, match="the mode is 'upstream'"):
        choose_processes(2, "upstream", [], 256)


def test_an_attached_gym_that_goes_away(head: FakeHead) -> None:
    gym = GymServers.attach(head.url)
    head.close()
    with pytest.raises(GymServerError, match="No NeMo Gym head server answers"):
        gym.check()


def test_agents_whose_servers_are_gone_are_named_with_the_server(head: FakeHead) -> None:
    with bind_socket() as sock:
        tools = f"http://127.0.0.1:{sock.getsockname()[1]}"
        gym = GymServers.attach(head.url)
    instances = gym._processes[0].view.instances
    instances[0] = dataclasses.replace(instances[0], url=tools)
    refused: Counter[str] = Counter()
    looks = [gym.agents_down(refused) for _ in range(3)]
    assert looks == [{}, {}, {"math_agent": f"server `math`: {tools} refuses connections"}]
    assert gym.agents_down(Counter()) == {}, "another watch has not looked yet"
    gym.check_process()
    gym.stop()
    assert gym.agents_down(refused) == {}


BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
INSTANCE = {"process_name": "a", "server_type": "responses_api_agents", "name": "a", "url": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("path", "page", "words"),
    [
        ("/global_config_dict_yaml", None, "answered HTTP 404"),
        ("/global_config_dict_yaml", b"<html>", "did not answer with JSON"),
        ("/global_config_dict_yaml", {"a": 1}, "another form"),
        ("/global_config_dict_yaml", f"policy_api_key: {SECRET}\n: [", "not YAML"),
        ("/global_config_dict_yaml", "a: &a {x: *a, name: a}", "not YAML that can be read"),
        ("/global_config_dict_yaml", BOMB, "not YAML that can be read"),
        ("/global_config_dict_yaml", "[" * 50_000, "not YAML that can be read"),
        ("/global_config_dict_yaml", "a: !!python/object/apply:os.getcwd []", "not YAML that can be read"),
        ("/server_instances", [{"name": "x"}], "missing required field `process_name`"),
        ("/server_instances", ["x"], "an entry of /server_instances"),
        ("/server_instances", [{**INSTANCE, "url": 5}], "$.url"),
        ("/server_instances", [{**INSTANCE, "url": "file:///etc/passwd"}], "its URL is 'file:///etc/passwd'"),
        ("/server_instances", [{**INSTANCE, "url": "http://h:99999"}], "its URL is"),
        ("/server_instances", [{**INSTANCE, "pid": "1"}], "$.pid"),
        ("/server_instances", b"[" * 100_000, "did not answer with JSON"),
    ],
)
def test_something_else_answers(head: FakeHead, path: str, page: Any, words: str) -> None:
    head.pages[path] = page
    with pytest.raises(GymServerError, match="is not the head server of a NeMo Gym") as error:
        GymServers.attach(head.url, timeout_s=60)
    assert words in str(error.value) and SECRET not in str(error.value)


def test_nothing_answers() -> None:
    sock = bind_socket()
    port = sock.getsockname()[1]
    sock.close()
    with pytest.raises(GymServerError, match=r"not ready after 0\.2 s\. No NeMo Gym head server answers"):
        GymServers.attach(f"http://127.0.0.1:{port}", timeout_s=0.2)
    with pytest.raises(ConfigError, match="looks like http"):
        GymServers.attach("127.0.0.1:11000")


def test_a_proxy_of_the_environment_is_not_used(head: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    with bind_socket() as proxy:  # accepts connections and never answers
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        GymServers.attach(head.url, timeout_s=60).stop()


@pytest.mark.parametrize("state", [ServerState.STARTING, ServerState.READY])
@pytest.mark.parametrize("reason", ["", "KeyError: 'score'"], ids=["killed", "with a reason"])
def test_a_death_says_whether_gym_had_been_ready(tmp_path: Path, state: ServerState, reason: str) -> None:
    gym = GymServers(log_dir=tmp_path)
    living, dead = (GymProcess(gym._http, which=f" (process {number} of 2)") for number in (1, 2))
    dead.log_path = tmp_path / "gym-2.log"
    dead.child = ChildProcess("NeMo Gym", [sys.executable, "-c", "exit('the last line')"], log_path=dead.log_path)
    dead._work_dir = work_dir = tmp_path / "work"
    work_dir.mkdir()
    if reason:
        error_path(dead.log_path).write_text(reason)
    assert dead.child.wait(60.0) == 1
    gym._processes, gym._state = [living, dead], state
    if state is ServerState.READY:
        dead._view = HeadView({}, [])
    with pytest.raises(GymServerError) as error:
        gym.check()
    text = str(error.value)
    start = "did not start: it" if state is ServerState.STARTING else "was ready and"
    assert re.match(
        rf"NeMo Gym \(process 2 of 2\) {start} ended within [0-9.]+ s of its start \(exit code 1\)\.", text
    )
    assert (reason or "the last line") in text and str(dead.log_path) in text
    gym.stop()
    assert not work_dir.exists()


def test_a_server_that_does_not_answer_is_named(head: FakeHead) -> None:
    sock = bind_socket()
    dead = f"http://127.0.0.1:{sock.getsockname()[1]}"
    sock.close()
    head.pages["/server_instances"].append(instance("judge", "resources_servers", "judge", dead))
    with pytest.raises(GymServerError, match=f"No answer comes from `judge` at {dead}"):
        GymServers.attach(head.url, timeout_s=0.3)


def test_secrets_do_not_show(head: FakeHead) -> None:
    gym = GymServers.attach(head.url)
    assert SECRET not in repr(gym._processes[0].view)


def test_illegal_transitions(tmp_path: Path) -> None:
    gym = GymServers(["x.yaml"], log_dir=tmp_path)
    assert gym.state is ServerState.NEW
    for act in (gym.wait_ready, gym.check, lambda: gym.agents, lambda: gym.head_url):
        with pytest.raises(GymServerError):
            act()
    gym.stop()
    with pytest.raises(GymServerError, match="Cannot start NeMo Gym servers that are stopped"):
        gym.start()
    with pytest.raises(GymServerError, match="stopped"):
        gym.connect_policy("http://x/v1", "policy")


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match=r"GymServers\.attach"):
        GymServers(mode="attach")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`processes` is 0"):
        GymServers(processes=0)
    with pytest.raises(ConfigError, match="list of paths"):
        GymServers("x.yaml")


def test_the_head_port_of_gyms_own_launcher_is_none_that_ray_would_take() -> None:
    """It is free again for a while; Ray's servers, which start then, take what the operating system gives them."""
    with new_http_session() as http, bind_head(http, "127.0.0.1", 0, "upstream") as sock:
        assert 20_000 < sock.getsockname()[1] < 32_768
