# Copyright 2026 The trl-gym Authors
# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import pytest


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def task(row):
    return row["expected_tool"], row["expected_arguments"]["a"], row["expected_arguments"]["b"]


def test_train_and_validation_share_no_operand_pair_whatever_the_seed(calculator_data, tmp_path):
    train, _ = calculator_data.generate(tmp_path / "0", num_train=14_580, num_validation=0, seed=0)
    _, validation = calculator_data.generate(tmp_path / "1", num_train=0, num_validation=1_620, seed=1)
    assert not {task(row)[1:] for row in read(train)} & {task(row)[1:] for row in read(validation)}


def test_tasks_are_unique(calculator_data, tmp_path):
    for path in calculator_data.generate(tmp_path, num_train=3_000, num_validation=500):
        tasks = [task(row) for row in read(path)]
        assert len(set(tasks)) == len(tasks)


def test_same_seed_same_bytes_other_seed_other_tasks(calculator_data, tmp_path):
    paths = [calculator_data.generate(tmp_path / str(i), 50, 20, seed)[0] for i, seed in enumerate((3, 3, 4))]
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again != other


def test_rows_are_in_gyms_format(calculator_data, tmp_path):
    train, validation = calculator_data.generate(tmp_path, num_train=20, num_validation=10)
    assert (train.name, validation.name) == ("train.jsonl", "validation.jsonl")
    assert (len(read(train)), len(read(validation))) == (20, 10)
    for row in read(train):
        params = row["responses_create_params"]
        assert set(params) == {"input", "tools"}
        (message,) = params["input"]
        tool, a, b = task(row)
        assert message == {"role": "user", "content": calculator_data.question(tool, a, b)}
        assert [t["name"] for t in params["tools"]] == ["add", "subtract"]
        assert all({"type", "name", "parameters", "strict"} <= set(t) for t in params["tools"])
        assert row["agent_ref"] == {"type": "responses_api_agents", "name": "calculator_simple_agent"}
        assert row["expected_answer"] == str(a + b if tool == "add" else a - b)


def test_agent_name_is_the_one_in_the_config(calculator_data, calculator_dir):
    lines = (calculator_dir / "calculator.yaml").read_text(encoding="utf-8").splitlines()
    assert f"{calculator_data.AGENT}:" in lines


def test_committed_example_is_current_and_held_in(calculator_data, calculator_dir):
    rows = read(calculator_dir / "data" / "example.jsonl")
    assert len(rows) == 5
    assert rows == [calculator_data.make_row(*task(row)) for row in rows]
    assert not any(calculator_data.is_held_out(*task(row)[1:]) for row in rows)


def test_too_many_tasks_is_an_error_that_gives_the_limit(calculator_data, tmp_path):
    with pytest.raises(ValueError, match="14580 different training tasks; 14581"):
        calculator_data.generate(tmp_path, num_train=14_581)
    assert not list(tmp_path.iterdir())


def test_command_line(calculator_dir, tmp_path):
    command = [sys.executable, "-I", str(calculator_dir / "generate_data.py"), "--output_dir", str(tmp_path)]
    subprocess.run([*command, "--num_train", "4", "--num_validation", "2", "--seed", "1"], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl", "validation.jsonl"]
