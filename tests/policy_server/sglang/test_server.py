"""Starting SGLang behind the gateway: flags, interpreter, and the process, with a stand-in that is quick to start."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from trl_gym.cli import main
from trl_gym.errors import ConfigError, PolicyServerLostError
from trl_gym.policy_server.parsers import REASONING_RULES, TOOL_RULES
from trl_gym.policy_server.server import PolicyServer, find_cause, remedy_for
from trl_gym.policy_server.sglang.server import (
    PYTHON_VARIABLE,
    REASONING_PARSERS,
    TOOL_PARSERS,
    SglangCommand,
    find_python,
    flags_from,
)

# As `sglang.launch_server`, without a model: it says what it was told, as SGLang does, and answers the few questions
# that a gateway asks at its start. `SAYS` ends it while it loads.
LAUNCH_SERVER = """
import json, os, sys, tempfile
from http.server import BaseHTTPRequestHandler, HTTPServer
words = sys.argv[1:]
told = {one[2:]: other for one, other in zip(words, words[1:]) if one.startswith("--")}
key = open(told["config"]).read().partition(": ")[2].strip()
print(f"server_args=ServerArgs(api_key={key!r}, port={told['port']})", flush=True)
print("VLLM_API_KEY" in os.environ, "SGLANG_RETURN_ORIGINAL_LOGPROB" in os.environ, flush=True)
tempfile.NamedTemporaryFile(delete=False)  # as its sockets
if said := os.environ.get("SAYS"):
    sys.exit(said)
ANSWERS = {
    "/health": {},
    "/model_info": {"model_path": told["model-path"], "is_generation": True, "weight_version": "default"},
    "/server_info": {"version": "0.5.23", "served_model_name": told["served-model-name"]},
    "/v1/models": {"data": [{"id": told["served-model-name"], "max_model_len": 64, "parent": None}]},
    "/tokenize": {"tokens": [1, 2, 3]},
}
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or "{}")
        status, answer = 200, ANSWERS.get(self.path)
        if self.headers.get("authorization") != f"Bearer {key}":
            status, answer = 401, {"error": "Unauthorized"}
        elif self.path == "/v1/chat/completions":
            message = {"role": "assistant", "content": "4"}
            choice = {"index": 0, "message": message, "finish_reason": "stop", "matched_stop": 2}
            choice |= {"prompt_token_ids": body.get("input_ids"), "response_token_ids": [4, 2], "logprobs": None}
            usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
            answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
            answer |= {"usage": usage, "metadata": {"weight_version": "default"}}
        elif answer is None:
            status, answer = 404, {"detail": "Not Found"}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_POST = do_GET
HTTPServer(("127.0.0.1", int(told["port"])), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder, in an environment where Python finds the stand-in as `sglang`."""
    package = tmp_path / "packages" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(LAUNCH_SERVER)
    metadata = package.parent / "sglang-0.5.23.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.23\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), *sys.path]))
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    return model


def server_of(model: Path, **options: object) -> PolicyServer:
    command = SglangCommand(model, flags_from({"context-length": 64}), sys.executable)
    return PolicyServer(model, serving=command, log_dir=model.parent / "logs", api_key="ours", **options)


@pytest.fixture
def server(stand_in: Path) -> Iterator[PolicyServer]:
    with server_of(stand_in) as started:
        yield started


def test_it_is_ready_when_the_gateway_in_front_answers_and_dies_with_sglang(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    with server_of(stand_in) as server:
        info = server.client.info()
        assert (info["engine"], info["engine_version"], info["model_names"]) == ("sglang", "0.5.23", ["policy"])
        assert info["weight_transports"] == ["file", "nccl"] and server.max_model_len == 64
        log = server.log_path.read_text()  # type: ignore[union-attr]
        assert "server_args=ServerArgs(api_key='***', port=" in log  # a secret of the two
        assert (
            "False False" in log
        )  # our key is none of SGLang's business, and raw log-probabilities are not asked for
        below = psutil.Process(server._process.pid).children(recursive=True)  # type: ignore[union-attr,arg-type]
        [sglang] = [
            one for one in below if "sglang.launch_server" in one.cmdline() and "supervisor" not in one.cmdline()[3]
        ]
        scratch = server._process.scratch  # type: ignore[union-attr]
        assert scratch.stat().st_mode & 0o777 == 0o700
        assert sorted(path.name[:3] for path in scratch.iterdir()) == ["tmp", "trl"], "of SGLang, and its key"
        sglang.kill()
        server._process.wait(60.0)  # type: ignore[union-attr]
        assert not scratch.exists()
        with pytest.raises(PolicyServerLostError, match="policy server ended"):
            server.check()
        url = server.base_url
        server.restart()
        assert server.base_url == url and server.client.info()["engine"] == "sglang"
        below += psutil.Process(server._process.pid).children(recursive=True)  # type: ignore[union-attr,arg-type]
    _, alive = psutil.wait_procs(below, timeout=60.0)
    assert not alive and not server._process.scratch.exists()  # type: ignore[union-attr]


def test_what_ends_sglang_while_it_loads_is_told_by_serve_too(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAYS", "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.")
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    flags = ["--engine", "sglang", "--port", "0", "--log-dir", str(stand_in.parent), "--context-length", "64"]
    assert main(["serve", str(stand_in), *flags]) == 1
    told = capsys.readouterr().err
    assert "Not enough memory" in told and "Raise `vllm_gpu_memory_utilization`" in told


def test_a_cause_is_not_that_sglang_asked_itself_too_early() -> None:
    log = """\
        ConnectionRefusedError: [Errno 111] Connection refused
        urllib3.exceptions.NewConnectionError: HTTPConnection(host='127.0.0.1', port=1): Failed to establish
        urllib3.exceptions.MaxRetryError: Max retries exceeded with url: /freeze_gc (Caused by …)
        [2026-11-28 22:02:45] The server is fired up and ready to roll!
        [2026-11-28 22:03:01] Scheduler hit an exception: Traceback (most recent call last):
        IndexError: index out of range in self
        [2026-11-28 22:03:01] SIGQUIT received. signum=None, frame=None. It usually means one child failed."""
    assert find_cause(textwrap.dedent(log)) == "IndexError: index out of range in self"
    assert remedy_for("IndexError: index out of range in self") == ""


def test_flags_follow_our_defaults_and_win_over_them() -> None:
    assert flags_from(None)[:2] == ["--sampling-defaults", "openai"]
    told = flags_from({"context_length": 512, "disable-radix-cache": True, "enable-metrics": False, "x": [1, 2]})
    assert told[-6:] == ["--context-length", "512", "--disable-radix-cache", "--x", "1", "2"]
    assert "--enable-metrics" not in told


def words_of(model: Path, given: object = None) -> list[str]:
    command = SglangCommand(model, flags_from(given), "python")  # type: ignore[arg-type]
    return command.words(host="127.0.0.1", port=7, listen_fd=3, name="policy")


def test_parsers_are_guessed_in_sglangs_names_or_left_to_it(stand_in: Path) -> None:
    words = words_of(stand_in)  # no chat template
    assert words[words.index("--tool-call-parser") + 1] == words[words.index("--reasoning-parser") + 1] == "auto"
    (stand_in / "chat_template.jinja").write_text("{{ tools }}<tool_call>arguments</tool_call>")
    command = SglangCommand(stand_in, flags_from(None), "python")
    [line] = command.parsers.lines()
    assert line.startswith("tool calls: read by SGLang's parser `hermes`") and "gym_sglang_args" in line
    words = words_of(stand_in)
    assert words[words.index("--tool-call-parser") + 1] == "hermes"
    told = words_of(stand_in, ["--tool-call-parser", "qwen", "--reasoning-parser=none"])
    assert told.count("--tool-call-parser") == 1 and told[told.index("--tool-call-parser") + 1] == "qwen"
    assert not any(word.startswith("--reasoning-parser") for word in told)
    assert "--tool-call-parser" not in words_of(stand_in, {"tool-call-parser": "none"})


def test_every_guess_is_one_that_vllm_has() -> None:
    assert set(TOOL_PARSERS) <= {rule.parser for rule in TOOL_RULES}
    assert set(REASONING_PARSERS) <= {rule.parser for rule in REASONING_RULES} | {"deepseek_r1"}


@pytest.mark.parametrize("given", [{"port": 1}, {"api_key": "x"}, ["--model-path", "y"], ["--config=z"]])
def test_flags_that_are_ours_are_refused(given: object) -> None:
    with pytest.raises(ConfigError, match="These flags of SGLang are not to be given"):
        flags_from(given)  # type: ignore[arg-type]


def test_the_interpreter_is_named_or_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    assert find_python() == sys.executable
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    monkeypatch.setenv(PYTHON_VARIABLE, str(link))
    assert find_python() == str(link) and find_python(sys.executable) == sys.executable
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=rf"{PYTHON_VARIABLE} names .*, which does not exist"):
        find_python()
    (tmp_path / "text").touch()
    with pytest.raises(ConfigError, match=r"`gym_sglang_python` names .*, which is not executable"):
        find_python(str(tmp_path / "text"))


def test_an_interpreter_without_sglang_is_refused_before_anything_starts(stand_in: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    server = PolicyServer(stand_in, serving=SglangCommand(stand_in, [], str(bare)), log_dir=tmp_path / "logs")
    with pytest.raises(ConfigError, match="bare has no SGLang"):
        server.start()
    assert server.log_path is None
