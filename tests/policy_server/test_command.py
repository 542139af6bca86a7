"""Flags, and mistakes that are found before a process is started for them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from trl_gym.errors import ConfigError
from trl_gym.policy_server import command
from trl_gym.policy_server.command import is_loopback


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("vllm_args", "flags"),
    [
        (None, []),
        ({"max_model_len": 512}, ["--max-model-len", "512"]),
        ({"enforce-eager": True}, ["--enforce-eager"]),
        ({"enable_prefix_caching": False}, ["--no-enable-prefix-caching"]),
        ({"headless": False, "seed": None}, []),
        ({"lora-modules": ["a=b", {"name": "c"}]}, ["--lora-modules", "a=b", '{"name": "c"}']),
        ({"middleware": ["a.B", "c.D"]}, ["--middleware", "a.B", "--middleware", "c.D"]),
        ({"weight-transfer-config": {"backend": "nccl"}}, ["--weight-transfer-config", '{"backend": "nccl"}']),
        (["--max-model-len", "512"], ["--max-model-len", "512"]),
    ],
)
def test_flags(vllm_args: object, flags: list[str]) -> None:
    assert command.flags_from(vllm_args) == flags


@pytest.mark.parametrize("vllm_args", [{"port": 1}, {"api_key": "x"}, ["--port=1"], {"--seed": 1}])
def test_a_flag_with_an_argument_of_its_own_is_refused(vllm_args: object) -> None:
    with pytest.raises(ConfigError, match=r"port=|api_key=|leading dashes"):
        command.flags_from(vllm_args)


def test_the_command_runs_our_entry_point() -> None:
    line = command.serve_command("m", host="127.0.0.1", port=5, listen_fd=7, name="policy", flags=["--seed", "1"])
    assert line[:4] == [sys.executable, "-m", "trl_gym.policy_server", "m"]
    assert " ".join(line[4:]) == "--listen-fd 7 --host 127.0.0.1 --port 5 --served-model-name policy --seed 1"


def test_a_good_folder_and_a_hub_name_pass(model_folder: Path) -> None:
    command.check_before_start(model_folder, "127.0.0.1", None, [])
    command.check_before_start("Qwen/Qwen3-0.6B", "localhost", None, [])
    command.check_before_start(model_folder, "0.0.0.0", "key", [])


def test_every_problem_is_in_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        command.check_before_start(tmp_path, "0.0.0.0", None, [])
    text = str(caught.value)
    for words in ("config.json", "tokenizer.json", "pip install trl-gym[vllm]", "Give a key (`--api-key`"):
        assert words in text


def test_a_tokenizer_elsewhere_is_enough(model_folder: Path) -> None:
    (model_folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="no tokenizer"):
        command.check_before_start(model_folder, "127.0.0.1", None, [])
    command.check_before_start(model_folder, "127.0.0.1", None, ["--tokenizer=elsewhere"])


@pytest.mark.parametrize("model", [Path("no/such/folder"), "./no-such-folder", "/no/such/folder"])
def test_a_folder_that_does_not_exist(model: str | Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        command.check_before_start(model, "127.0.0.1", None, [])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.1.2.3"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", None, "0.0.0.0", "::", "10.0.0.1", "gpu-node-7"])
def test_not_loopback(host: str | None) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("flags", "env", "why"),
    [
        ([], {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}, "unpickles what it is sent"),
        (["--weight-transfer-config", '{"backend": "ipc"}'], {}, "backend `ipc` needs"),
        (['--weight-transfer-config={"backend": "ipc"}'], {}, "backend `ipc` needs"),
        (["--weight-transfer-config.backend", "ipc"], {}, "backend `ipc` needs"),
    ],
)
def test_what_unpickles_listens_on_loopback_only(
    model_folder: Path, flags: list[str], env: dict[str, str], why: str
) -> None:
    command.check_before_start(model_folder, "127.0.0.1", "key", flags, env)
    with pytest.raises(ConfigError, match=why):
        command.check_before_start(model_folder, "0.0.0.0", "key", flags, env)


@pytest.mark.parametrize("config", ['{"backend": "nccl"}', "?"])
def test_other_transports_may_be_reached(model_folder: Path, config: str) -> None:
    env = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "0"}
    command.check_before_start(model_folder, "0.0.0.0", "key", ["--weight-transfer-config", config], env)


def test_the_key_is_found_under_its_name_and_under_the_old_one_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("VLLM_API_KEY", "TRL_GYM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert command.api_key_from_environment() is None
    monkeypatch.setenv("TRL_GYM_API_KEY", "old")
    assert command.api_key_from_environment() == "old"
    assert "rename the variable to VLLM_API_KEY" in caplog.text and "old" not in caplog.text
    caplog.clear()
    monkeypatch.setenv("VLLM_API_KEY", "new")
    assert command.api_key_from_environment() == "new" and not caplog.records


def test_a_server_of_the_command_line_has_a_key_unless_it_is_to_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_API_KEY", "TRL_GYM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    (one, told), (other, _) = (command.demanded_key(None, keyless=False) for _ in range(2))
    assert one and other and one != other and one[0].isalpha() and len(one) >= 32
    assert f"export VLLM_API_KEY={one}" in "\n".join(told) and f"Bearer {one}" in "\n".join(told)
    assert command.demanded_key("given\n", keyless=False) == ("given", [])
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    assert command.demanded_key(None, keyless=False) == ("theirs", [])
    assert command.demanded_key("given", keyless=False) == ("given", [])
    key, told = command.demanded_key(None, keyless=True)
    assert key is None and told[0].startswith("no key:")
    with pytest.raises(ConfigError, match="both given"):
        command.demanded_key("given", keyless=True)
