"""Where a model's configuration comes from, and what is said where it does not come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trl_gym.errors import ConfigError
from trl_gym.hub import load_config, why_unreachable
from trl_gym.processes import bind_socket

NAME = "nobody/no-such-model"


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub at which nothing listens."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    return "http://127.0.0.1:1"


def test_a_folder_needs_nothing_but_its_config(tmp_path: Path, nowhere: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "hidden_size": 64}))
    assert load_config(str(tmp_path)).hidden_size == 64


@pytest.mark.parametrize("config", ["{", '{"model_type": "no_such_kind"}', "{}", "[]"])
def test_a_config_that_cannot_be_read_is_an_error_of_ours(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        load_config(str(tmp_path))
    assert str(tmp_path) in caught.value.problem


def test_a_folder_that_is_none_is_not_looked_up_on_the_hub(tmp_path: Path, nowhere: str) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_config(str(tmp_path))
    for missing in (f"{tmp_path}/gone", "./gone", "~/no-such-folder"):
        with pytest.raises(ConfigError, match=f"The model folder {missing} does not exist"):
            load_config(missing)


def test_a_model_that_is_nowhere_says_how_to_fetch_it(nowhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"not in the cache.*{nowhere} cannot be asked") as caught:
        load_config(NAME)
    assert f"hf download {NAME} --local-dir FOLDER" in caught.value.remedy
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        load_config(NAME)


def test_a_host_that_answers_is_reachable() -> None:
    with bind_socket("127.0.0.1", 0) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert why_unreachable(f"{url}/x") is None
    assert why_unreachable(url) is not None
