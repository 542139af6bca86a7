"""What people, shells and schedulers give: every option that takes it, and the streams of a real process."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import ModelConfig

from trl_gym.cli import build_parser, parse_args
from trl_gym.commands.rollout_flags import CollectOptions
from trl_gym.config import GymGRPOConfig
from trl_gym.errors import ConfigError
from trl_gym.given import RAY_SOCKETS, VLLM_SOCKETS, home_words, socket_folder, url_problems, usable_key, with_output
from trl_gym.gym.servers import GymServers
from trl_gym.policy_server import gateway
from trl_gym.policy_server.client import PolicyClient
from trl_gym.policy_server.command import api_key_from_environment, flags_from
from trl_gym.policy_server.server import PolicyServer
from trl_gym.rollouts.ledger import Ledger
from trl_gym.train import ScriptArguments, parse_options

# -- URLs -------------------------------------------------------------------------------------------------------------

NO_URLS = [
    "", "127.0.0.1:9/v1", "localhost:9", "http:/127.0.0.1:9/v1", "http://127.0.0.1:99999/v1", "http://[::1/v1",
    "//h:1", "http://", "http:///v1", "http://h:", "http://h:0", "http://h:x", "http://h:+80", "ftp://h", "unix:///s",
    "http://h/ x", "http://h\n.org", "http://h?x=s3cret", "h?x=s3cret", "http://h#s3cret",
    "http://[zz]:1", "http://1.2.3.4.5", "http://a..b",
    "http://999.1.1.1", "http://*:80", "http://::1:80", "http://me:s3cret@h:1", "me:s3cret@h:1", "http://s3cret@[::1",
]  # fmt: skip
URLS = [
    "http://h:1/v1",
    "https://h",
    "HTTP://a_b.c-d:80/proxy/v1/",
    "http://[::1]:8",
    "http://10.0.0.1:65535",
    "http://ä.de",
]


def config(**options: Any) -> GymGRPOConfig:
    return GymGRPOConfig(**{"output_dir": "out", "use_cpu": True, "report_to": [], **options})


def collection(**options: Any) -> CollectOptions:
    given = {"mode": "rollout", "datasets": [], "output_dir": Path("o"), "base_url": "http://h:1", "model": "m"}
    return CollectOptions(**given | {"head_url": "http://h:2", **options})


URL_OPTIONS: dict[str, Callable[[str], Any]] = {
    "vllm_server_base_url": lambda url: config(vllm_mode="server", vllm_server_base_url=url),
    "gym_head_url": lambda url: config(gym_head_url=url),
    "PolicyServer.attach": lambda url: PolicyServer.attach(url, timeout_s=60),
    "GymServers.attach": lambda url: GymServers.attach(url, timeout_s=60),
    "GymServers.connect_policy": lambda url: GymServers(["x.yaml"]).connect_policy(url, "policy"),
    "--upstream": lambda url: gateway.upstream_urls([url]),
    "--base-url": lambda url: collection(base_url=url),
    "--gym-head-url": lambda url: collection(head_url=url),
}


def test_what_cannot_be_a_url_is_named_unless_it_holds_a_password() -> None:
    for url in NO_URLS:
        for written in (url, f"http://good:1,{url}") if url else (url,):
            [problem] = url_problems("option", written)
            assert "`option`" in problem.text and "s3cret" not in problem.text
            assert "s3cret" in url or repr(url) in problem.text
    [problem] = url_problems("option", "http://h:80/v1?api_key=s3cret")
    assert "is 'http://h:80/v1', which has a query" in problem.text


@pytest.mark.parametrize("option", URL_OPTIONS)
def test_every_option_of_urls_refuses_it_at_once(option: str) -> None:
    for url in ("localhost:9", "http://good:1,http://[::1/v1", "http://me:s3cret@h:1"):
        with pytest.raises(ConfigError) as caught:
            URL_OPTIONS[option](url)
        assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_urls_of_servers_are_taken() -> None:
    assert url_problems("o", ", ".join(URLS)) == [] and url_problems("o", URLS) == []
    assert PolicyClient(URLS).base_urls[2] == "HTTP://a_b.c-d:80/proxy/v1"


# -- keys -------------------------------------------------------------------------------------------------------------

NO_KEYS = [
    *("s3cret-0\n12", "s3cret-0\r12", "s3cret-\u043a\u043b\u044e\u0447", "s3cret-ü", "s3cret\x00", "s3cret\tx"),
    *("s3cret\u2028x", "\n"),
]


def in_variable(name: str) -> Callable[[str], Any]:
    def use(key: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for one in ("VLLM_API_KEY", "TRL_GYM_API_KEY"):
                patch.delenv(one, raising=False)
            patch.setattr(os, "environ", {**os.environ, name: key})  # a real one cannot hold \0
            return api_key_from_environment()

    return use


def of_gateway(name: str) -> Callable[[str], Any]:
    def use(key: str) -> Any:
        options = gateway.GatewayOptions(upstreams=["http://127.0.0.1:9"], host="256.0.0.1", **{name: key})
        assert "s3cret" not in repr(options)
        return gateway.run(options, ready=print, note=print)

    return use


KEYS: dict[str, Callable[[str], Any]] = {
    "VLLM_API_KEY": in_variable("VLLM_API_KEY"),
    "TRL_GYM_API_KEY": in_variable("TRL_GYM_API_KEY"),
    "PolicyServer": lambda key: PolicyServer("model", api_key=key),
    "PolicyServer.attach": lambda key: PolicyServer.attach("http://127.0.0.1:9", api_key=key, timeout_s=60),
    "PolicyClient": lambda key: PolicyClient("http://127.0.0.1:9", api_key=key),
    "GymServers": lambda key: GymServers(["x.yaml"], policy_api_key=key),
    "GymServers.connect_policy": lambda key: GymServers(["x.yaml"]).connect_policy("http://h:1", "policy", key),
    "Ledger": lambda key: Ledger("http://h:1", key),
    "rollout --api-key": lambda key: collection(api_key=key),
    "gateway --api-key": of_gateway("api_key"),
    "gateway --upstream-api-key": of_gateway("upstream_api_key"),
}


@pytest.mark.parametrize("source", KEYS)
def test_a_key_that_is_no_header_is_refused_and_never_shown(source: str) -> None:
    for key in NO_KEYS:
        with pytest.raises(ConfigError, match="cannot be sent in a header") as caught:
            KEYS[source](key)
        assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_the_line_end_of_a_mounted_secret_is_no_part_of_the_key() -> None:
    assert "s3cret" not in repr(collection(api_key="s3cret")) and collection(api_key="s3cret\n").api_key == "s3cret"
    assert usable_key("o", "a b\r\n") == "a b" and usable_key("o", "") is None and usable_key("o", None) is None
    assert PolicyClient("http://h:1", api_key="key\n").api_key == "key"
    assert in_variable("VLLM_API_KEY")("key\n") == "key"


# -- paths ------------------------------------------------------------------------------------------------------------

PATH_NAMES = re.compile(r"\w*_(?:dir|paths?|files?|script|python|replay|checkpoint)")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").mkdir()
    return tmp_path


def test_every_path_of_a_run_knows_the_home_folder(home: Path) -> None:
    options = [one for part in (ScriptArguments, GymGRPOConfig, ModelConfig) for one in dataclasses.fields(part)]
    options = [one for one in options if PATH_NAMES.fullmatch(one.name) and "str" in str(one.type)]
    names = {one.name: "list" in str(one.type) for one in options}
    assert {
        "train_files",
        "gym_replay",
        "gym_log_dir",
        "model_name_or_path",
        "output_dir",
        "gym_python",
    } <= names.keys()
    lines = [f"{name}: {['~/x'] if many else '~/x'}" for name, many in names.items()]
    (home / "run.yaml").write_text("\n".join(["use_cpu: true", "report_to: none", "gym_engine: sglang", *lines]))
    words = ["--use_cpu=true", "--report_to=none", "--gym_engine=sglang", *(f"--{name}=~/x" for name in names)]
    for argv in (["--config=~/run.yaml"], words):
        parsed = parse_options(argv, GymGRPOConfig)
        for name in names:
            [value] = [getattr(part, name) for part in parsed if hasattr(part, name)]
            assert value in (f"{home}/x", [f"{home}/x"]), name


def actions(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for name, command in commands.choices.items():
        yield from ((name, action) for action in command._actions)


def test_every_path_of_every_command_knows_the_home_folder(home: Path) -> None:
    found = 0
    for command, action in actions(build_parser()):
        if action.metavar in ("FILE", "DIR", "YAML", "PATH", "RUN", "MODEL", "FOLDER") or "_dir" in action.dest:
            words = ["~/x"] if not action.option_strings else [f"{action.option_strings[0]}=~/x"]
            told = home_words([command, *words])
            assert told[-1].endswith(f"{home}/x"), (command, action.dest)
            found += 1
    assert found > 10
    assert parse_args(["view", "~/x", "--output", "~/y"]).folder == f"{home}/x"
    assert parse_args(["view", "~/x", "--output", "~/y"]).output == f"{home}/y"
    assert flags_from({"chat-template": "~/x"}) == ["--chat-template", f"{home}/x"]
    assert str(PolicyServer("~/x", log_dir="~/x").model) == f"{home}/x"


@given(st.text('~/a=-.key{"', max_size=12), st.text('~/a=-.key{"', max_size=12))
def test_what_is_no_path_stays_as_it_is(first: str, second: str) -> None:
    words = home_words(["--api-key", first, f"--upstream-api-key={second}", f"a{first}", f'{{"a": "~/{second}"}}'])
    kept = ["--api-key", first, f"--upstream-api-key={second}"]
    assert words[:3] == kept and words[4] == f'{{"a": "~/{second}"}}'
    assert words[3] == f"a{first}" or "=~" in words[3] or "=~" in f"a{first}"


# -- folders for sockets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sockets", [RAY_SOCKETS, VLLM_SOCKETS])
def test_sockets_go_where_their_names_are_short_enough(
    sockets: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 107 - len(sockets[1]) - 1
    for length, fits in ((longest, True), (longest + 1, False)):
        monkeypatch.setattr(tempfile, "tempdir", "/" + "t" * (length - 1))
        assert socket_folder(sockets) == (tempfile.tempdir if fits else "/tmp")
    monkeypatch.setattr("trl_gym.given._SHORT_FOLDERS", (str(tmp_path / "missing"), "/" + "t" * 99))
    with pytest.raises(ConfigError, match=rf"TMPDIR is .* {longest + 1} characters: too long .* at most {longest}"):
        socket_folder(sockets)


def test_a_folder_for_sockets_that_was_named_is_not_replaced() -> None:
    assert socket_folder(VLLM_SOCKETS, {"VLLM_RPC_BASE_PATH": "/mine"}) == "/mine"
    with pytest.raises(ConfigError, match="VLLM_RPC_BASE_PATH is"):
        socket_folder(VLLM_SOCKETS, {"VLLM_RPC_BASE_PATH": "/" + "m" * 90})


# -- standard output --------------------------------------------------------------------------------------------------

_WORK = """
import os, sys
from trl_gym.cli import main
from trl_gym.given import with_output
def work():
    for _ in range(3):
        print("x" * 100_000, flush=True)
    sys.stderr.write("said\\n" * 1000)
    open("done", "w").write(str(sys.stdout.fileno()))
    return 7 if sys.argv[1:] == ["fails"] else 0
sys.exit(main(["--help"]) if sys.argv[1:] == ["help"] else with_output(work))
"""


@pytest.mark.parametrize(
    ("shell", "status"),
    [
        ('"$0" -c "$1" >&- 2>&-', 0),
        ('("$0" -c "$1"; exit $?) | true; exit ${PIPESTATUS[0]}', 0),
        ('"$0" -c "$1" >/dev/full', 1),
        ('"$0" -c "$1" fails >/dev/full', 7),
        ('"$0" -c "$1" 2>/dev/full >/dev/null', 0),
        ('"$0" -c "$1" help >/dev/full', 1),
        ('"$0" -c "$1" help >&-', 0),
    ],
)
def test_work_is_done_whoever_reads_what_is_printed(shell: str, status: int, tmp_path: Path) -> None:
    command = ["bash", "-c", shell, sys.executable, _WORK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert "help" in shell or (tmp_path / "done").read_text() == "1"
    assert ("cannot be written to" in done.stderr) == (">/dev/full" in shell and "2>/dev/full" not in shell)


def test_a_stream_that_someone_has_put_in_place_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", text := io.StringIO())
    assert with_output(lambda: sys.stdout.write("x") + 2) == 3 and text.getvalue() == "x"
