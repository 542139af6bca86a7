"""Life cycle and discovery, without a real Gym: heads are small local servers. The real ones are in tests/e2e."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_gym.errors import ConfigError, GymServerError
from trl_gym.gym.servers import AgentInfo, GymServers, error_path
from trl_gym.processes import ChildProcess, ServerState, bind_socket

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


def test_an_attached_gym_that_goes_away(head: FakeHead) -> None:
    gym = GymServers.attach(head.url)
    head.close()
    with pytest.raises(GymServerError, match="No NeMo Gym head server answers"):
        gym.check()


def test_agents_whose_servers_are_gone_are_named_with_the_server(head: FakeHead) -> None:
    with bind_socket() as sock:
        tools = f"http://127.0.0.1:{sock.getsockname()[1]}"
        gym = GymServers.attach(head.url)
    gym._view.instances[0] = dataclasses.replace(gym._view.instances[0], url=tools)
    looks = [gym.agents_down() for _ in range(3)]
    assert looks == [{}, {}, {"math_agent": f"server `math`: {tools} refuses connections"}]
    gym.check_process()
    gym.stop()
    assert gym.agents_down() == {}


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
        GymServers.attach(head.url, timeout_s=5)
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
        GymServers.attach(head.url, timeout_s=5).stop()


@pytest.mark.parametrize("state", [ServerState.STARTING, ServerState.READY])
@pytest.mark.parametrize("reason", ["", "KeyError: 'score'"], ids=["killed", "with a reason"])
def test_a_death_says_whether_gym_had_been_ready(tmp_path: Path, state: ServerState, reason: str) -> None:
    gym = GymServers(log_dir=tmp_path)
    gym._child = ChildProcess("NeMo Gym", [sys.executable, "-c", "exit('the last line')"], log_path=gym.log_path)
    gym._work_dir = tmp_path / "work"
    gym._work_dir.mkdir()
    if reason:
        error_path(gym._work_dir).write_text(reason)
    assert gym._child.wait(30.0) == 1
    gym._state = state
    with pytest.raises(GymServerError) as error:
        gym.check()
    text = str(error.value)
    start = "did not start: it" if state is ServerState.STARTING else "was ready and"
    assert re.match(rf"NeMo Gym {start} ended within [0-9.]+ s of its start \(exit code 1\)\.", text)
    assert (reason or "the last line") in text and str(gym.log_path) in text
    gym.stop()


def test_a_server_that_does_not_answer_is_named(head: FakeHead) -> None:
    sock = bind_socket()
    dead = f"http://127.0.0.1:{sock.getsockname()[1]}"
    sock.close()
    head.pages["/server_instances"].append(instance("judge", "resources_servers", "judge", dead))
    with pytest.raises(GymServerError, match=f"No answer comes from `judge` at {dead}"):
        GymServers.attach(head.url, timeout_s=0.3)


def test_secrets_do_not_show(head: FakeHead) -> None:
    gym = GymServers.attach(head.url)
    assert SECRET not in repr(gym._view)


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
    with pytest.raises(ConfigError, match="list of paths"):
        GymServers("x.yaml")


def test_the_head_port_of_gyms_own_launcher_is_none_that_ray_would_take(tmp_path: Path) -> None:
    """It is free again for a while; Ray's servers, which start then, take what the operating system gives them."""
    gym = GymServers(["x.yaml"], mode="upstream", log_dir=tmp_path)
    with gym._bind_head("127.0.0.1", 0) as sock:
        assert 20_000 < sock.getsockname()[1] < 32_768
