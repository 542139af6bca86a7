"""Servers that are gone, and the agents that need them. Sockets are real; there is no Gym."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.conftest import wait_for
from trl_gym.gym.discovery import (
    ServerInstance,
    is_alive,
    needed_servers,
    new_http_session,
    servers_gone,
    with_run_fields,
)
from trl_gym.processes import bind_socket
from trl_gym.supervisor import is_stopped


def server(url: str, pid: int | None = None) -> ServerInstance:
    return ServerInstance("tools", "resources_servers", "tools", url, pid)


def test_a_refused_connection_counts_when_it_repeats() -> None:
    sock = bind_socket()
    address = server(f"http://127.0.0.1:{sock.getsockname()[1]}")
    refused: Counter[str] = Counter()

    def look(refused: Counter[str]) -> dict[str, str]:
        return servers_gone([address], refused, knows_processes=False)

    assert look(refused) == {}
    sock.close()
    assert look(refused) == {}
    assert look(refused) == {}
    assert look(refused) == {"tools": f"{address.url} refuses connections"}
    with bind_socket(port=int(address.url.rpartition(":")[2])):
        assert look(refused) == {}
    assert look(refused) == {}, "counted again"


def test_several_watches_count_for_themselves() -> None:
    """Each rollout collection has one: together they would take a pause of one look for three."""
    with bind_socket() as sock:
        address = server(f"http://127.0.0.1:{sock.getsockname()[1]}")
    watches: list[Counter[str]] = [Counter() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        looks = [
            list(pool.map(lambda refused: servers_gone([address], refused, knows_processes=False), watches))
            for _ in range(3)
        ]
    assert looks == [[{}] * 8, [{}] * 8, [{"tools": f"{address.url} refuses connections"}] * 8]


def test_a_process_that_ended_counts_at_once_where_it_is_ours() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child, bind_socket() as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        child.wait()
        gone = servers_gone([server(url, child.pid)], Counter(), knows_processes=True)
        assert gone == {"tools": f"its process (pid {child.pid}) has ended"}
        assert servers_gone([server(url, child.pid)], Counter(), knows_processes=False) == {}
        assert servers_gone([server(url, os.getpid())], Counter(), knows_processes=True) == {}
    assert is_alive(os.getpid()) and is_alive(None)


def test_a_process_that_was_stopped_counts_when_that_repeats_and_one_that_hangs_at_once() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child, bind_socket() as sock:
        address = server(f"http://127.0.0.1:{sock.getsockname()[1]}", child.pid)
        try:
            os.kill(child.pid, signal.SIGSTOP)
            wait_for(lambda: is_stopped(child.pid))
            refused: Counter[str] = Counter()
            looks = [servers_gone([address], refused, knows_processes=True) for _ in range(3)]
            assert looks == [{}, {}, {"tools": f"its process (pid {child.pid}) was stopped by someone (SIGSTOP)"}]
            assert servers_gone([address], Counter(), knows_processes=False) == {}
            gone = servers_gone([address], Counter(), knows_processes=False, hung=[address.url])
            assert gone == {"tools": f"{address.url} accepts requests and answers none: it hangs"}
        finally:
            child.kill()


def test_an_agent_needs_what_its_config_refers_to_and_so_on() -> None:
    def reference(kind: str, name: str) -> dict[str, str]:
        return {"type": kind, "name": name}

    config = {
        "agent": {
            "responses_api_agents": {
                "simple_agent": {
                    "resources_server": reference("resources_servers", "tools"),
                    "model_server": reference("responses_api_models", "policy_model"),
                    "datasets": [{"type": "example", "name": "not_a_server"}],
                }
            }
        },
        "tools": {"resources_servers": {"tools": {"judges": [reference("responses_api_models", "judge_model")]}}},
        "other": {"responses_api_agents": {"simple_agent": {}}},
    }
    assert needed_servers(config, "agent") == {"agent", "tools", "policy_model", "judge_model"}
    assert needed_servers(config, "other") == {"other"}
    config["tools"]["resources_servers"]["tools"]["back"] = reference("responses_api_agents", "agent")
    assert needed_servers(config, "tools") == {"agent", "tools", "policy_model", "judge_model"}


RUN_REQUEST = {
    "paths": {"/run": {"post": {"requestBody": {"content": {"application/json": {"schema": {"$ref": "#/c/s/Run"}}}}}}},
    "components": {"schemas": {"Run": {"properties": {"policy_base_url": {}, "policy_api_key": {}, "question": {}}}}},
}


@pytest.mark.parametrize(
    ("schema", "fields"),
    [
        (json.dumps(RUN_REQUEST), {"policy_base_url", "policy_api_key"}),
        (json.dumps({**RUN_REQUEST, "components": {"schemas": {"Run": {}}}}), set()),
        (json.dumps({**RUN_REQUEST, "paths": {}}), set()),
        (json.dumps({**RUN_REQUEST, "components": []}), set()),
        ("[]", set()),
        ("not JSON", set()),
    ],
)
def test_an_agent_says_which_policy_fields_its_run_takes(schema: str, fields: set[str]) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/openapi.json"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(schema.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.handle_request).start()
        agent = ServerInstance("agent", "responses_api_agents", "own", f"http://127.0.0.1:{http.server_port}", None)
        assert with_run_fields(new_http_session(), agent, timeout_s=10).run_fields == fields


def test_only_agents_that_have_not_said_so_are_asked() -> None:
    nobody = "http://127.0.0.1:9"
    known = ServerInstance("agent", "responses_api_agents", "own", nobody, None, frozenset({"policy_base_url"}))
    for instance in (known, server(nobody)):
        assert with_run_fields(new_http_session(), instance, timeout_s=1) is instance
    silent = ServerInstance("agent", "responses_api_agents", "own", nobody, None)
    assert with_run_fields(new_http_session(), silent, timeout_s=1).run_fields == frozenset()
