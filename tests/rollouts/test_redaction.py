from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.rollouts import journal
from trl_gym.rollouts.journal import REDACTED, make_redactor, secrets_of

KEY = "sk-proj-Abcdef0123456789xyz"
redact = make_redactor()

plain_text = st.text(st.characters(codec="utf-8", exclude_characters=":=@"), max_size=40)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | plain_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"policy_api_key": "EMPTY"}, {"policy_api_key": REDACTED}),
        ({"headers": {"Authorization": "Basic dTpw"}}, {"headers": {"Authorization": REDACTED}}),
        ("Authorization: Bearer abc.def-123456", f"Authorization: Bearer {REDACTED}"),
        (f"use {KEY} please", f"use {REDACTED} please"),
        ('{"api_key": "0123456789"}', f'{{"api_key": "{REDACTED}"}}'),
        ("API_KEY=0123456789abc", f"API_KEY={REDACTED}"),
        ("https://me:geheim123@host/path", f"https://me:{REDACTED}@host/path"),
        (["hf_abcdefghijklmnopqrstuvwxyz"], [REDACTED]),
    ],
)
def test_what_looks_like_a_secret_is_taken_out(value: Any, expected: Any) -> None:
    assert redact(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        {"tool": "calculator", "arguments": '{"a": 12, "b": 30}'},
        {"max_output_tokens": 128, "password": None, "api_key": ""},
        "The key to the riddle: patience. Tokens are counted at 12:30, see http://host/path?x=1",
        "task-sk- is short, eyJ too",
        {"secret_word": "banana"},  # a game's own data
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


@given(value=values, secret=st.text("abcdefghijklmnop0123456789-_", min_size=8, max_size=24), where=st.integers(0, 2))
def test_a_known_secret_is_nowhere_and_nothing_else_changes(value: Any, secret: str, where: int) -> None:
    redact_known = make_redactor([secret])
    hidden = [f"x {secret} y", {"note": [secret]}, {"output": [{"content": [{"text": f'"{secret}"'}]}]}][where]
    text = json.dumps(redact_known({"value": value, "hidden": hidden}), ensure_ascii=False)
    assert secret not in text.replace(REDACTED, "")
    assert json.dumps(redact_known(value)) == json.dumps(redact(value)) or secret in json.dumps(value)


@given(
    value=values,
    hidden=st.sampled_from(
        ["sk-", "SK_live_", "hf_", "Bearer ", "apiKey=", "API-KEY: ", "password='", "http://u:", "eyJ"]
    ),
    key=st.sampled_from(["text", "x-api-key", "Authorization", "SECRET_ACCESS_KEY", "clientSecret", "private-key"]),
)
def test_the_quick_look_misses_nothing(value: Any, hidden: str, key: str) -> None:
    record = {"value": value, key: f"{hidden}0123456789abcdefghij@"}
    assert redact(record) == journal._redact(record, [])


@given(value=values)
def test_redaction_is_idempotent_and_keeps_the_shape(value: Any) -> None:
    once = redact(value)
    assert redact(once) == once
    assert type(once) is type(value)
    if isinstance(value, dict):
        assert list(once) == list(value)


@given(before=plain_text, after=plain_text)
def test_keys_are_found_in_any_text(before: str, after: str) -> None:
    assert KEY not in redact(f"{before} {KEY} {after}")
    assert (
        KEY
        not in redact({"response": {"output": [{"text": f"{before}\n{KEY}\n{after}"}]}})["response"]["output"][0][
            "text"
        ]
    )
