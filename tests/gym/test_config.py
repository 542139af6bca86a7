"""Configs are found as Gym finds them, and every problem is reported at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.errors import ConfigError
from trl_gym.gym.config import (
    API_KEY_VARIABLE,
    NONCE_KEY,
    TRAINING_MODEL_CONFIG,
    ResolvedConfigs,
    expand_overrides,
    initial_config,
    resolve_configs,
    single_process_reasons,
)

MCQA = "resources_servers/mcqa/configs/mcqa.yaml"


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def installation(tmp_path: Path) -> Path:
    root = tmp_path / "site-packages"
    write(root / MCQA, {"mcqa": {}})
    write(root / TRAINING_MODEL_CONFIG, {"policy_model": {}})
    return root


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_paths_resolve_absolute_then_working_directory_then_installation(installation: Path, project: Path) -> None:
    local = write(project / "envs/mine.yaml", {"mine": {}})
    absolute = write(project.parent / "elsewhere/other.yaml", {"other": {}})
    resolved = resolve_configs(["envs/mine.yaml", absolute, MCQA], installation)
    assert resolved.paths == [local, absolute, installation / MCQA, installation / TRAINING_MODEL_CONFIG]
    assert all(path.is_absolute() for path in resolved.paths)

    shadow = write(project / MCQA, {"mcqa": {}})
    assert resolve_configs([MCQA], installation).paths[0] == shadow


def test_every_missing_path_is_listed_with_places_and_closest_matches(installation: Path, project: Path) -> None:
    write(project / "includes.yaml", {"config_paths": ["gone.yaml"]})
    with pytest.raises(ConfigError) as error:
        resolve_configs(["resources_servers/mcqa/configs/mqca.yaml", "/nowhere/x.yaml", "includes.yaml"], installation)
    text = str(error.value)
    assert "mqca.yaml does not exist" in text and f"      {MCQA}" in text
    assert str(project / "resources_servers/mcqa/configs/mqca.yaml") in text
    assert "/nowhere/x.yaml does not exist" in text
    assert f"gone.yaml (included by {project / 'includes.yaml'})" in text


def test_unusable_yaml_names_the_file(installation: Path, project: Path) -> None:
    (project / "broken.yaml").write_text("a: [1,\n b: 2")
    (project / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"broken\.yaml cannot be read[\s\S]*list\.yaml holds a list"):
        resolve_configs(["broken.yaml", "list.yaml"], installation)


def test_no_config_is_an_error(installation: Path) -> None:
    with pytest.raises(ConfigError, match="No NeMo Gym config was given"):
        resolve_configs([], installation)


@pytest.mark.parametrize("nested", [False, True])
def test_model_server_is_added_only_when_no_file_defines_one(installation: Path, project: Path, nested: bool) -> None:
    write(project / "model.yaml", {"policy_model": {"responses_api_models": {"vllm_model": {}}}})
    write(project / "env.yaml", {"env": {}, "config_paths": ["model.yaml"] if nested else []})
    resolved = resolve_configs(["env.yaml"], installation)
    assert resolved.adds_model_server is not nested
    assert (installation / TRAINING_MODEL_CONFIG in resolved.paths) is not nested


def test_search_roots_are_the_users_folders(installation: Path, project: Path) -> None:
    calculator = write(project / "recipes/environments/calculator/calculator.yaml", {"calculator": {}})
    roots = resolve_configs([calculator, MCQA], installation).search_roots
    assert roots[:4] == [calculator.parent, *list(calculator.parent.parents)[:3]]
    assert roots[-1] == project
    assert not any(installation in (root, *root.parents) for root in roots)


@pytest.mark.parametrize(
    ("text", "overrides", "reasons"),
    [
        ("board: {resources_servers: {board: {entrypoint: app.py}}}", {}, []),
        (
            "board: {resources_servers: {board: {entrypoint: app.py, trl_gym_single_process: true}}}",
            {},
            ["`board` demands a single process (`trl_gym_single_process`)"],
        ),
        ("trl_gym_single_process: true", {}, ["a config demands a single process (`trl_gym_single_process`)"]),
        ("trl_gym_single_process: true", {"trl_gym_single_process": False}, []),
        ("board: {environment_servers: {x: {port: 8000}}}", {}, ["`board` has the fixed port 8000"]),
        ("board: {environment_servers: {x: {port: 8000}}}", {"board.environment_servers.x.port": None}, []),
        ("board: {resources_servers: {x: {port: null}}}\nnumbers: {a: {b: {port: 1}}}\nlist: [1]", {}, []),
        ("a: {responses_api_agents: {x: {}}}", {"a.responses_api_agents.x.port": 9}, ["`a` has the fixed port 9"]),
        ("a: 1", {"head_server.port": 11000}, ["the head server has the fixed port 11000"]),
        ("head_server: {port: 11000}", {}, []),  # ours wins, which is free
    ],
)
def test_what_needs_a_single_process(
    installation: Path, project: Path, text: str, overrides: dict[str, object], reasons: list[str]
) -> None:
    (project / "included.yaml").write_text(text)
    (project / "main.yaml").write_text("config_paths: [included.yaml]")
    configs = resolve_configs(["main.yaml"], installation)
    assert single_process_reasons(configs, expand_overrides(overrides)) == reasons


def test_overrides_expand_dots_of_the_outermost_level_only() -> None:
    nested = {"agent": {"responses_api_agents": {"simple_agent": {"max_steps": 3, "prices": {"gpt-4.1": 2}}}}}
    dotted = {"agent.responses_api_agents": {"simple_agent": {"max_steps": 3, "prices": {"gpt-4.1": 2}}}}
    assert expand_overrides(dotted) == nested
    assert expand_overrides({"a.b": 1, "a.c": Path("/x"), "d": None, "e": [True, "x,y"]}) == {
        "a": {"b": 1, "c": "/x"},
        "d": None,
        "e": [True, "x,y"],
    }


@given(st.dictionaries(st.text("ab", min_size=1), st.recursive(st.none() | st.booleans() | st.integers() | st.text(),
       lambda inner: st.lists(inner) | st.dictionaries(st.text(min_size=1), inner), max_leaves=8)))  # fmt: skip
def test_override_values_arrive_unchanged(overrides: dict[str, object]) -> None:
    """Quotes, commas, colons, line ends, `null`-like strings: nothing is parsed again."""
    assert expand_overrides(overrides) == overrides


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"a.b": 1, "a": {"b": 2}}, "`a.b` twice: 1 and 2"),
        ({"a": object()}, "`a` cannot be written"),
        ({"config_paths": ["x"]}, "`config_paths` argument"),
        ({NONCE_KEY: "x"}, "set by trl-gym"),
    ],
)
def test_impossible_overrides_are_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand_overrides(overrides)


def make_initial(
    adds_model_server: bool, overrides: dict[str, object], policy: tuple[str, ...] = ("http://p/v1",)
) -> dict[str, object]:
    configs = ResolvedConfigs([Path("/a.yaml")], [], adds_model_server)
    return initial_config(
        configs,
        expand_overrides(overrides),
        nonce="n",
        head_address=("127.0.0.1", 7),
        policy_base_urls=policy,
        policy_model_name="m",
    )


def test_initial_config_holds_addresses_and_no_key() -> None:
    config = make_initial(True, {})
    assert config[NONCE_KEY] == "n" and config["head_server"] == {"host": "127.0.0.1", "port": 7}
    assert config["policy_base_url"] == "http://p/v1" and config["policy_model_name"] == "m"
    assert make_initial(True, {}, ("http://p/v1", "http://q/v1"))["policy_base_url"] == ["http://p/v1", "http://q/v1"]
    assert config["policy_api_key"] == "${oc.env:" + API_KEY_VARIABLE + "}"
    model = config["policy_model"]["responses_api_models"]["vllm_model"]
    assert model == {"replace_developer_role_with_system": True}


def test_overrides_win_over_our_defaults_and_leave_the_rest() -> None:
    config = make_initial(True, {"policy_model.responses_api_models.vllm_model.uses_reasoning_parser": False})
    model = config["policy_model"]["responses_api_models"]["vllm_model"]
    assert model == {"uses_reasoning_parser": False, "replace_developer_role_with_system": True}


def test_a_model_server_of_the_users_is_not_touched() -> None:
    assert "policy_model" not in make_initial(False, {})


def test_agents_of_included_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    agent = {"responses_api_agents": {"simple_agent": {}}}
    (tmp_path / "inner.yaml").write_text(yaml.safe_dump({"inner_agent": agent, "config_paths": ["outer.yaml"]}))
    (tmp_path / "outer.yaml").write_text(
        yaml.safe_dump({"outer_agent": agent, "server": {"resources_servers": {}}, "config_paths": ["inner.yaml"]})
    )
    assert resolve_configs(["outer.yaml"], tmp_path / "gym").agents == ("inner_agent", "outer_agent")
