"""A rollout as a conversation and as coloured tokens: what is said is true to the journal, and is never markup."""

from __future__ import annotations

import html
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trl_gym.errors import PolicyServerError
from trl_gym.notebook import messages_of, roll_out, show_conversation, show_tokens

NASTY = "<script>alert(1)</script>"


class Letters:
    """Token 65 is "A"; 60 is "<"."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def record(**changes: Any) -> dict[str, Any]:
    output = [
        {"type": "reasoning", "summary": [{"text": "hm"}]},
        {"type": "function_call", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "output": NASTY},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"text": "2", "type": "output_text"}, {"type": "input_image"}],
        },
    ]
    return {
        "row": {"responses_create_params": {"input": [{"role": "system", "content": "be brief"}]}},
        "response": {"output": output},
        "reward": 0.5,
        "reward_components": {"format": 1.0},
        "failure": None,
        "prompt_ids": [65, 66],
        "completion_ids": [67, 60, 10, 68],
        "env_mask": [1, 0, 0, 1],
        "logprobs": [-0.5, 0.0, 0.0, -1.25],
    } | changes


def test_rollouts_can_lie_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.jsonl").write_text('{"responses_create_params": {"input": "1 + 1?"}}\n')
    nobody: Any = SimpleNamespace(
        base_urls=["http://127.0.0.1:9"],
        head_url="http://127.0.0.1:9",
        model_name="policy",
        client=SimpleNamespace(api_key=None),
    )
    with pytest.raises(PolicyServerError):  # after the folder was made
        roll_out("~/x.jsonl", policy=nobody, gym=nobody, output_dir="~/look")
    assert list((tmp_path / "look").iterdir())


def test_everything_that_was_said_in_order() -> None:
    assert list(messages_of(record())) == [
        ("system", "be brief"),
        ("policy thinks", "hm"),
        ("policy calls", 'add({"a": 1})'),
        ("tool answers", NASTY),
        ("policy", "2[input_image]"),
    ]
    plain = record(row={"responses_create_params": {"input": "1 + 1?"}}, response=None)
    assert list(messages_of(plain)) == [("user", "1 + 1?")]


def test_the_verdict_is_the_reward_or_why_there_is_none() -> None:
    assert repr(show_conversation(record())).endswith("verifier: reward 0.5  (format 1)")
    failure = {"kind": "deadline", "text": "120 s", "where": "/run"}
    failed = repr(show_conversation(record(failure=failure, reward=None, reward_components={})))
    assert failed.endswith("verifier: failed (deadline): 120 s")


def test_what_others_wrote_is_text() -> None:
    shown = show_conversation(record())._repr_html_()
    assert html.escape(NASTY) in shown and NASTY not in shown
    assert "&lt;" in show_tokens(record(), Letters())._repr_html_()


def test_tokens_have_the_colour_of_their_mask() -> None:
    view = show_tokens(record(), Letters())
    spans = re.findall(r'background:(#\w+);[^"]*" title="([^"]+)">([^<]*)', view._repr_html_())
    assert [(told, text) for _, told, text in spans] == [
        ("65: prompt", "A"),
        ("66: prompt", "B"),
        ("67: sampled, log p = -0.5000", "C"),
        ("60: environment", "&lt;"),
        ("10: environment", "↵\n"),
        ("68: sampled, log p = -1.2500", "D"),
    ]
    prompt, sampled, environment = (spans[index][0] for index in (0, 2, 3))
    assert [colour for colour, *_ in spans] == [prompt, prompt, sampled, environment, environment, sampled]
    assert len({prompt, sampled, environment}) == 3
    assert repr(view) == "2 prompt, 2 sampled (trained), 2 environment: ABC<\nD"


def test_all_rows_of_a_rollout_are_shown() -> None:
    further = {"prompt_ids": [70], "completion_ids": [71, 72], "env_mask": [0, 1], "logprobs": [0.0, -2.0]}
    view = show_tokens(record(further_rows=[further]), Letters())
    assert "71: environment" in view._repr_html_()
    assert repr(view) == "3 prompt, 3 sampled (trained), 3 environment: ABC<\nD\nFGH"


def test_a_rollout_without_tokens_says_so() -> None:
    nothing: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "env_mask": [], "logprobs": []}
    assert "no tokens: this rollout is not trained on" in show_tokens(record(**nothing), Letters())._repr_html_()
