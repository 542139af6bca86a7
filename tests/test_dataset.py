from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_gym.dataset import gym_row, load_gym_dataset, mix_gym_datasets
from trl_gym.errors import DatasetError

json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def row(text: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"responses_create_params": {"input": [{"role": "user", "content": text}]}, **fields}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(min_size=1, max_size=6), json_value, max_size=4), min_size=1, max_size=4))
def test_rows_survive_arrow_unchanged(tmp_path: Path, extras: list[dict[str, Any]]) -> None:
    rows = [{"x": extra} | row("a\u2028b") for extra in extras]
    file = write(tmp_path / "rows.jsonl", rows)
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    dataset = load_gym_dataset(file)
    assert [example["gym_row"] for example in dataset] == lines
    assert [gym_row(example) for example in dataset] == rows
    assert dataset[0]["prompt"] == [{"role": "user", "content": "a\u2028b"}]


def test_several_files_are_joined_and_numbered(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", [row(name)] * 3) for name in "ab"]
    dataset = load_gym_dataset(files, limit=2)
    assert [example["prompt"][0]["content"] for example in dataset] == ["a", "a", "b", "b"]
    assert [example["task_index"] for example in dataset] == [0, 1, 2, 3]


def test_an_agent_is_filled_in_only_where_none_is_named(tmp_path: Path) -> None:
    named = row(agent_ref={"type": "responses_api_agents", "name": "mine"})
    dataset = load_gym_dataset(write(tmp_path / "x.jsonl", [named, row()]), agent="yours")
    assert dataset["agent"][:] == ["mine", "yours"]
    assert [gym_row(example)["agent_ref"]["name"] for example in dataset] == ["mine", "yours"]


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"a": 1}\n\n{nonsense\n[1]\n' + json.dumps(row()) + '\n{"responses_create_params": {}}\n')
    with pytest.raises(DatasetError) as caught:
        load_gym_dataset([file, tmp_path / "missing.jsonl"])
    message = str(caught.value)
    assert "5 problem(s)" in message
    for number in (1, 3, 4, 6):
        assert f"bad.jsonl, line {number}:" in message
    assert "missing.jsonl: cannot be read" in message


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no rows"):
        load_gym_dataset(write(tmp_path / "empty.jsonl", []))


def test_inputs_of_all_shapes_have_a_prompt_to_show(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"responses_create_params": {"input": "plain", "instructions": "be brief"}},
        {"responses_create_params": {"input": []}},
        row()
        | {"responses_create_params": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "t"}]}]}},
    ]
    prompts = load_gym_dataset(write(tmp_path / "x.jsonl", rows))["prompt"][:]
    assert [p["role"] for p in prompts[0]] == ["system", "user"]
    assert prompts[1] == [{"role": "user", "content": ""}]
    assert prompts[2][0]["content"] == "t"


def test_a_row_that_lost_its_column_says_how_to_mend_it() -> None:
    with pytest.raises(DatasetError, match="load_gym_dataset"):
        gym_row({"prompt": "x"})


def parts(tmp_path: Path, **sizes: int) -> list[Any]:
    return [
        load_gym_dataset(write(tmp_path / f"{name}.jsonl", [row(f"{name}{i}") for i in range(size)]), agent=name)
        for name, size in sizes.items()
    ]


def test_environments_are_mixed_by_weight_and_every_row_is_used(tmp_path: Path) -> None:
    mixed = mix_gym_datasets(parts(tmp_path, a=300, b=20), weights=[3, 1])
    agents = mixed["agent"]
    assert 0.15 < agents.count("b") / len(agents) < 0.35
    assert len({example["gym_row"] for example in mixed}) == 320
    tasks = {(example["task_index"], example["gym_row"]) for example in mixed}
    assert len(tasks) == 320 and {task for task, _ in tasks} == set(range(320))


def test_mixing_is_repeatable_and_takes_rows_without_agents(tmp_path: Path) -> None:
    [named] = parts(tmp_path, a=5)
    bare = load_gym_dataset(write(tmp_path / "bare.jsonl", [row("x")]))
    first, again, other = (mix_gym_datasets([named, bare], seed=seed)["task_index"] for seed in (1, 1, 2))
    assert first == again != other
    assert None in mix_gym_datasets([named, bare])["agent"]


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("inf")]])
def test_weights_that_do_not_fit(tmp_path: Path, weights: list[float]) -> None:
    with pytest.raises(DatasetError, match="weights"):
        mix_gym_datasets(parts(tmp_path, a=2, b=2), weights=weights)
