"""`recipes/environments/small_policy.py`: demonstrations of a scaffolded environment, a model that loads."""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import RECIPES, load
from trl_gym.commands.new_environment import NewEnvironment, create


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load("recipe_environment_policy", RECIPES / "environments" / "small_policy.py")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environments") / "lamp_room"
    create(NewEnvironment("lamp_room", folder, "gym-python"))
    return folder


def test_demonstrations_are_right_wrong_and_given_up(recipe: ModuleType, environment: Path) -> None:
    data, rng = recipe.load(environment), random.Random(0)
    rows = data.sample_rows(200, held_out=False, rng=rng)
    demos = [recipe.demonstration(data, row, rng) for row in rows]
    ends = [demo[-1]["content"] for demo in demos]
    gave_up = [end == recipe.tiny_policy.GIVE_UP for end in ends]
    right = [end == str(row["expected"]) for end, row in zip(ends, rows, strict=True)]
    assert 0.15 < sum(gave_up) / len(rows) < 0.35 and 0.3 < sum(right) / len(rows) < 0.6
    for row, demo, no_tool in zip(rows, demos, gave_up, strict=True):
        assert demo[:2] == row["responses_create_params"]["input"]
        results = [message["content"] for message in demo if message["role"] == "tool"]
        assert len(results) == (0 if no_tool else len(row["operations"]))
        assert no_tool or results[-1] == demo[-1]["content"]


def test_what_it_writes_can_be_loaded(
    recipe: ModuleType, environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "NUM_STEPS", 3)
    recipe.build(environment, tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    data = recipe.load(environment)
    [row] = data.sample_rows(1, held_out=True, rng=random.Random(0))
    messages, tools = row["responses_create_params"]["input"], recipe.tiny_policy.chat_tools(data)
    ids = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(ids) == text
    assert len(ids) < 64 and max(ids) < model.config.vocab_size
    assert tokenizer.convert_tokens_to_ids("<tool_call>") in tokenizer.encode("a<tool_call>b")
