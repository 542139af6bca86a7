"""A scaffolded environment in a real NeMo Gym, played by a scripted model through `trl-gym rollout`: no vLLM."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.training import ROOT
from tests.gym.fake_policy import FakePolicy
from trl_gym.cli import main
from trl_gym.commands.new_environment import NewEnvironment, create
from trl_gym.rollouts.journal import read_journal

pytestmark = [pytest.mark.e2e, pytest.mark.no_policy]

NUM_ROWS = 12
BUG, ANSWER_WRONG, NO_TOOL, RUBBISH = 2, 3, 4, 5  # of every six tasks; the others are played well
BUGGY_ARGUMENT = 12345


def task_number(question: str) -> int:
    """A number by which the scripted model chooses how it plays; the same for a question every time."""
    return sum(map(int, re.findall(r"\d+", question)))


def play(body: dict[str, Any]) -> dict[str, Any]:
    """The next message of a model that knows the task, and plays some of them wrong on purpose."""
    messages = body["messages"]
    question = next(message["content"] for message in messages if message["role"] == "user")
    steps = re.findall(r"([+-]) (\d+)", question)
    results = [message["content"] for message in messages if message["role"] == "tool"]
    style = task_number(question) % 6
    if style == NO_TOOL:
        return {"role": "assistant", "content": "I guess 42."}
    if len(results) == len(steps):
        return {"role": "assistant", "content": "0.5" if style == ANSWER_WRONG else f"It shows {results[-1]}."}
    sign, a = steps[len(results)]
    arguments = json.dumps({"a": {RUBBISH: "many", BUG: BUGGY_ARGUMENT}.get(style, int(a))})
    call = {"name": "add" if sign == "+" else "subtract", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": f"call_{len(results)}", "type": "function", "function": call}],
    }


EXPECTED = {ANSWER_WRONG: 0.6, NO_TOOL: 0.0, RUBBISH: 0.0}


@pytest.mark.parametrize("venv", [".gym-venv", ".gym-venv-0.7"])
async def test_it_rolls_out_in_a_real_gym(venv: str, tmp_path: Path) -> None:
    folder = tmp_path / "lamp_room"
    create(NewEnvironment("lamp_room", folder, "gym-python"))
    rules = folder / "resources_servers" / "lamp_room" / "lamp_room_rules.py"
    accepted = "        self.num_calls += 1\n"
    assert accepted in rules.read_text()
    rules.write_text(rules.read_text().replace(accepted, f"{accepted}        1 / (a - {BUGGY_ARGUMENT})\n"))
    data = [sys.executable, folder / "generate_data.py", "--output_dir", folder / "data", "--num_validation"]
    subprocess.run([*data, str(NUM_ROWS)], check=True, capture_output=True)

    async with FakePolicy(reply=play) as policy:
        command = [
            *("rollout", "--dataset", str(folder / "data" / "validation.jsonl")),
            *("--gym_config_paths", str(folder / "lamp_room.yaml")),
            *("--base_url", policy.base_url, "--model", "policy", "--num_generations", "2", "--max_tokens", "256"),
            *("--output_dir", str(tmp_path / "out"), "--gym_python", str(ROOT / venv / "bin" / "python")),
        ]
        assert await asyncio.to_thread(main, command) == 0

    rollouts = list(read_journal(tmp_path / "out" / "rollouts"))
    assert len(rollouts) == 2 * NUM_ROWS
    styles = set()
    for rollout in rollouts:
        question = rollout["row"]["responses_create_params"]["input"][1]["content"]
        style = task_number(question) % 6
        styles.add(style)
        if style == BUG:  # the agent went on, and the verifier would have given 0.2
            assert rollout["reward"] is None and rollout["failure"]["kind"] == "environment"
            assert "ZeroDivisionError" in rollout["failure"]["text"]
            continue
        assert rollout["failure"] is None
        assert rollout["reward"] == EXPECTED.get(style, 1.0), (question, rollout["response"]["output"])
        assert rollout["reward_components"]["called"] == float(style not in (NO_TOOL, RUBBISH))
        assert rollout["verify"]["success"] == float(style not in EXPECTED)
    assert {BUG, ANSWER_WRONG, NO_TOOL, RUBBISH} < styles
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["environments"]["lamp_room_simple_agent"]["rollouts"] == 2 * NUM_ROWS
