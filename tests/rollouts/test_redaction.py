"""Secrets are in no file, and nothing else changes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.policy_server.middleware.identity import rollout_key
from trl_gym.rollouts import redaction
from trl_gym.rollouts.redaction import REDACTED, Redactor, secrets_in, secrets_of

redact = Redactor()

plain_text = st.text(st.characters(codec="utf-8", exclude_characters=":=@"), max_size=40)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | plain_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"policy_api_key": "EMPTY"}, {"policy_api_key": REDACTED}),
        ({"headers": {"Authorization": "Basic dTpw"}}, {"headers": {"Authorization": REDACTED}}),
        ([{"x-api-key": "a"}, {"SECRET_ACCESS_KEY": "b"}], [{"x-api-key": REDACTED}, {"SECRET_ACCESS_KEY": REDACTED}]),
    ],
)
def test_a_value_under_a_secret_named_key_is_taken_out(value: Any, expected: Any) -> None:
    assert redact(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        {"tool": "calculator", "arguments": '{"a": 12, "b": 30}'},
        {"max_output_tokens": 128, "password": None, "api_key": ""},
        "The key to the riddle: patience. Tokens are counted at 12:30, see http://host/path?x=1",
        {"secret_word": "banana"},  # a game's own data
        # What only looks like a secret is what was said: reward functions and replays must see it as it was.
        "API_KEY=0123456789abc, Authorization: Bearer abc.def-123456, https://me:geheim123@host/path",
        {"text": '{"api_key": "sk-proj-Abcdef0123456789xyz"}', "task": ["hf_abcdefghijklmnopqrstuvwxyz"]},
    ],
)
def test_what_is_no_secret_stays(value: Any) -> None:
    assert redact(value) == value


def test_token_ids_are_passed_on_without_a_copy() -> None:
    record = {
        "prompt_ids": [1, 2, 3],
        "response": {"output": [{"generation_token_ids": [4], "generation_log_probs": []}]},
    }
    redacted = redact(record)
    assert redacted == record
    assert redacted["prompt_ids"] is record["prompt_ids"]


def test_secrets_of_the_environment() -> None:
    environment = {
        "OPENAI_API_KEY": "0123456789",
        "HF_TOKEN": "tokentoken",
        "DB_PASSWORD": "geheim geheim",  # prose, not a secret
        "MY_SECRET": "short",
        "TOKENIZERS_PARALLELISM": "false---",
        "KEYBOARD_LAYOUT": "de_DE.UTF-8",
        "PATH": "/usr/bin:/bin",
    }
    assert secrets_of(environment) == ["0123456789", "tokentoken"]


@given(
    value=json_values,
    secret=st.from_regex(r"[a-p0-9_-]{4,12}[a-p][a-p0-9_-]{4,11}", fullmatch=True),  # no part of a number
    where=st.integers(0, 2),
)
def test_a_known_secret_is_nowhere_and_nothing_else_changes(value: Any, secret: str, where: int) -> None:
    redact_known = Redactor([secret])
    hidden = [f"x {secret} y", {"note": [secret]}, {"output": [{"content": [{"text": f'"{secret}"'}]}]}][where]
    text = json.dumps(redact_known({"value": value, "hidden": hidden}), ensure_ascii=False)
    assert secret not in text.replace(REDACTED, "")
    assert json.dumps(redact_known(value)) == json.dumps(redact(value)) or secret in json.dumps(value)


@given(value=json_values, key=st.sampled_from(["text", "x-api-key", "Authorization", "clientSecret", "private-key"]))
def test_the_quick_look_misses_nothing(value: Any, key: str) -> None:
    record = {"value": value, key: "0123456789"}
    assert redact(record) == redaction._redact(record, [])


@given(value=json_values)
def test_redaction_is_idempotent_and_keeps_the_shape(value: Any) -> None:
    once = redact(value)
    assert redact(once) == once
    assert type(once) is type(value)
    if isinstance(value, dict):
        assert list(once) == list(value)


def test_secrets_in_nested_options_are_known_values() -> None:
    options = {"judge": {"openai_api_key": "0123456789"}, "servers": [{"password": "geheim123"}], "api_key": 3}
    assert secrets_in(options) == ["0123456789", "geheim123"]
    assert Redactor(secrets_in(options))({"said 0123456789": ["geheim123!"]}) == {f"said {REDACTED}": [f"{REDACTED}!"]}


def test_rollout_keys_are_redacted_wherever_they_stand() -> None:
    """An agent's answer may hold the URL, or the key, that it was given for this rollout."""
    key = rollout_key("an-api-key", {"rollout": "r0"})
    said = {"params": {"url": f"http://x/trl_gym/rollouts/{key}/v1", key: [key]}, "policy_api_key": key}
    redacted = Redactor()(said)
    assert key not in str(redacted) and key.partition(".")[2] not in str(redacted)
    assert redacted["params"]["url"] == "http://x/trl_gym/rollouts/[redacted]/v1"
    assert redacted["policy_api_key"] == "[redacted]"


@given(value=json_values)
def test_numbers_that_json_does_not_have_are_found(value: Any) -> None:
    assert redact.look(value) == (value, True)
    for number in (math.nan, math.inf, -math.inf):
        assert not redact.look([value, {"x": [number]}])[1]
