from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import concatenate_datasets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_gym.dataset import agent_with_tools, body_of, gym_row, load_gym_dataset, mix_gym_datasets
from trl_gym.errors import DatasetError
from trl_gym.rollout_options import Sampling
from trl_gym.rollouts.request import stamp

json_value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
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


def odd(**changes: Any) -> dict[str, Any]:
    return {"responses_create_params": {"input": "x", **changes}}


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
ODD_ROWS = {
    "extra_body is an object": (odd(metadata={"extra_body": {"min_tokens": 1}}), "metadata"),
    "extra_body is no JSON": (odd(metadata={"extra_body": "min_tokens=1"}), "metadata.extra_body"),
    "extra_body is a list": (odd(metadata={"extra_body": "[1]"}), "metadata.extra_body"),
    "extra_body is deep": (odd(metadata={"extra_body": "[" * 100_000}), "metadata.extra_body"),
    "template arguments are no JSON": (odd(metadata={"chat_template_kwargs": "x"}), "metadata.chat_template_kwargs"),
    "metadata is a list": (odd(metadata=["a"]), "metadata"),
    "metadata is text": (odd(metadata="a"), "metadata"),
    "metadata has a number": (odd(metadata={"a": 1}), "metadata"),  # Gym answers 422
    "max_output_tokens is words": (odd(max_output_tokens="many"), "max_output_tokens"),
    "max_output_tokens is a list": (odd(max_output_tokens=[1]), "max_output_tokens"),
    "max_output_tokens is negative": (odd(max_output_tokens=-5), "max_output_tokens"),
    "instructions are a number": (odd(instructions=5), "instructions"),
    "tools are an object": (odd(tools={"a": 1}), "tools"),
    "a tool is text": (odd(tools=["a"]), "tools[0]"),
    "the agent's name is a list": ({**odd(), "agent_ref": {"name": [1]}}, "agent_ref.name"),
    "an integer is too long": ({**odd(), "answer": [{"n": 2**64}]}, "64 bits"),
    "an image": (
        odd(input=[{"role": "user", "content": [{"type": "input_text", "text": "x"}, IMAGE]}]),
        "input_image",
    ),
    "audio": (odd(input=[{"role": "user", "content": [{"type": "input_audio"}]}]), "input_audio"),
    "a file": (odd(input=[{"role": "user", "content": [{"type": "input_file"}]}]), "input_file"),
    "an image as in chats": (odd(input=[{"role": "user", "content": [{"type": "image_url"}]}]), "image_url"),
    "an image of a tool": (odd(input=[{"type": "function_call_output", "output": [IMAGE]}]), "input_image"),
}


@pytest.mark.parametrize("name", ODD_ROWS)
def test_a_row_that_would_fail_in_training_is_named_before(tmp_path: Path, name: str) -> None:
    odd_row, words = ODD_ROWS[name]
    with pytest.raises(DatasetError, match=re.escape(words)) as caught:
        load_gym_dataset(write(tmp_path / "x.jsonl", [row(), odd_row]))
    assert "x.jsonl, line 2:" in str(caught.value) and "1 problem(s)" in str(caught.value)
    with pytest.raises(DatasetError, match=re.escape(words)):  # one that `choose_task` made
        stamp(odd_row, rollout_id="r", task_index=3, member=0, sampling=Sampling(), completion_budget=8)


TOOL = {"type": "function", "name": "add", "strict": True, "parameters": {"type": "object", "properties": {"a": {}}}}
MEANT = {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}], "default": None, "enum": ["b", None]}}}
FILLED = {"type": "object", "properties": {"a": {"default": None, "enum": None}, "b": None}, "required": None}
NAMED_AS_KEYWORDS = {"properties": {"default": None, "properties": {"type": None}}, "$defs": {"any": {"type": None}}}
# What `datasets` makes of a request, and what is sent of it.
WITH_NULLS = {
    "a message": (
        {"input": [{"role": "user", "content": "x", "id": None}]},
        {"input": [{"role": "user", "content": "x"}]},
    ),
    "a part": (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x", "image_url": None}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}]},
    ),
    "parameters": (odd(metadata=None, reasoning={"effort": None}, text={"format": None}, tools=None), odd()),
    "metadata": (odd(metadata={"a": "b", "c": None}), odd(metadata={"a": "b"})),
    "a tool": (odd(tools=[TOOL | {"description": None}]), odd(tools=[TOOL])),
    "a tool whose keys Gym demands": (odd(tools=[TOOL | {"strict": None}]), odd(tools=[TOOL | {"strict": None}])),
    "a schema that means them": (odd(tools=[TOOL | {"parameters": MEANT}]), odd(tools=[TOOL | {"parameters": MEANT}])),
    "a schema that was filled": (
        odd(tools=[TOOL | {"parameters": FILLED}]),
        odd(tools=[TOOL | {"parameters": {"type": "object", "properties": {"a": {}}}}]),
    ),
    "names of a schema": (
        odd(tools=[TOOL | {"parameters": NAMED_AS_KEYWORDS}]),
        odd(tools=[TOOL | {"parameters": {"properties": {"properties": {}}, "$defs": {"any": {}}}}]),
    ),
    "a schema with a null for a name": (
        odd(tools=[TOOL | {"parameters": {"properties": {"a": {"type": "string"}, "default": None}}}]),
        odd(tools=[TOOL | {"parameters": {"properties": {"a": {"type": "string"}}}}]),
    ),
}


@pytest.mark.parametrize("name", WITH_NULLS)
def test_nulls_of_a_request_are_not_sent(name: str, tmp_path: Path) -> None:
    given, sent = (part.get("responses_create_params", part) for part in WITH_NULLS[name])
    [example] = load_gym_dataset(
        write(tmp_path / "x.jsonl", [{"responses_create_params": given, "answer": {"b": None}}])
    )
    stamped = stamp(gym_row(example), rollout_id="r", task_index=0, member=0, sampling=Sampling(), completion_budget=8)
    body = json.loads(body_of(stamped))
    assert body["answer"] == {"b": None}  # the environment's own
    assert {key: body["responses_create_params"][key] for key in sent if key != "metadata"} == {
        key: value for key, value in sent.items() if key != "metadata"
    }
    metadata = body["responses_create_params"]["metadata"]
    assert {key: value for key, value in metadata.items() if key != "extra_body"} == sent.get("metadata", {})
    assert body["responses_create_params"].keys() <= sent.keys() | {
        "metadata",
        "max_output_tokens",
        "temperature",
        "top_p",
    }


def test_halves_of_surrogates_are_sent_as_something_that_gym_can_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"responses_create_params": {"input": "cut \\ud83d"}, "x": "\\ud83d"}\n')
    row = gym_row(load_gym_dataset(tmp_path / "x.jsonl")[0])
    assert json.loads(body_of(row)) == {"responses_create_params": {"input": "cut ?"}, "x": "?"}


def test_a_file_is_read_as_it_was_saved_or_named_by_line(tmp_path: Path) -> None:
    good, bad, empty = (tmp_path / f"{name}.jsonl" for name in ("good", "bad", "empty"))
    line = json.dumps(row()).encode()
    good.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line + b"\r\n")
    bad.write_bytes(line + b"\n\n" + b'{"x": "\xff"}\n')
    empty.write_text("\n")
    assert load_gym_dataset(good)["gym_row"][:] == [line.decode()] * 2
    with pytest.raises(DatasetError) as caught:
        load_gym_dataset([good, bad, empty])
    assert f"{bad}, line 3: not UTF-8" in str(caught.value) and f"{empty} has no rows" in str(caught.value)
    with pytest.raises(DatasetError, match="cannot be read"):
        gym_row({"gym_row": "{"})


@pytest.mark.parametrize("line", ["[" * 100_000, '{"x":' + "[" * 900 + "]" * 900 + "}", '{"x":' + "9" * 5000 + "}"])
def test_a_line_that_cannot_be_parsed_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(row()) + "\n" + line + "\n")
    with pytest.raises(DatasetError, match=r"x\.jsonl, line 2: not JSON"):
        load_gym_dataset(tmp_path / "x.jsonl")


@pytest.mark.parametrize("agent", [None, "a"])
def test_half_a_surrogate_is_no_obstacle(tmp_path: Path, agent: str | None) -> None:
    content = {"role": "user", "content": "a \ud800 b"}
    (tmp_path / "x.jsonl").write_text(json.dumps(odd(input=[content])))
    dataset = load_gym_dataset(tmp_path / "x.jsonl", agent=agent)
    assert dataset[0]["prompt"] == [{"role": "user", "content": "a ? b"}]
    assert gym_row(dataset[0])["responses_create_params"]["input"] == [content]


def test_text_parts_are_no_media(tmp_path: Path) -> None:
    content = [
        {"type": kind, "text": "x"} for kind in ("input_text", "output_text", "text", "refusal", "summary_text")
    ]
    items = [
        {"role": "user", "content": content},
        {"type": "file_search_call", "id": "1"},
        {"role": "user", "content": None},
    ]
    assert len(load_gym_dataset(write(tmp_path / "x.jsonl", [odd(input=items)]))) == 1


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


def test_rows_with_tools_are_found_wherever_they_stand(tmp_path: Path) -> None:
    tool = {"type": "function", "name": "f"}
    texts = [row(f'{i} "tools"') for i in range(4100)]
    plain = load_gym_dataset(write(tmp_path / "plain.jsonl", texts), agent="a")
    with_tools = [{"responses_create_params": {"input": "x", "tools": [tool]}}] * 3
    tooled = load_gym_dataset(write(tmp_path / "tooled.jsonl", with_tools), agent="b")
    nameless = load_gym_dataset(write(tmp_path / "nameless.jsonl", with_tools))
    assert agent_with_tools(None, plain, {"x": plain}, plain.to_iterable_dataset(), object()) is None
    assert agent_with_tools(plain, {"x": plain, "y": tooled}) == "b"
    assert agent_with_tools(concatenate_datasets([plain, tooled])) == "b"
    assert agent_with_tools(nameless) == "the only agent"


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
