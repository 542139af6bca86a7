"""Secrets are in no file, and nothing else changes."""

from __future__ import annotations

import io
import json
import logging
import math
import pickle
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym import redaction
from trl_gym.doctor.context import Status
from trl_gym.doctor.outcome import Entry
from trl_gym.errors import FailureKind, Problem, RolloutFailure, TrlGymError
from trl_gym.policy_server.middleware.identity import rollout_key
from trl_gym.redaction import REDACTED, Redactor, log_without_secrets, secrets_in, secrets_of, without_secrets

redact = Redactor()
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEvQIBADANBg\n-----END RSA PRIVATE KEY-----"

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
        "TLS_KEY": PEM,
        "RIDDLE_KEY": "patience and time",  # prose, not a secret
        "DB_PASSWORD": "geheim geheim",
        "PGPASSWORD": "longpassword1",
        "MY_PASSPHRASE": "open the door",
        "DATABASE_URL": "postgres://me:geheim1234@host/db",
        "HTTPS_PROXY": "http://proxy:8080",
        "PWD": "/home/someone",
        "GIT_ASKPASS": "/usr/bin/askpass",
        "MY_SECRET": "short",
        "TOKENIZERS_PARALLELISM": "false---",
        "KEYBOARD_LAYOUT": "de_DE.UTF-8",
        "PATH": "/usr/bin:/bin",
    }
    found = ["0123456789", "tokentoken", PEM, "geheim geheim", "longpassword1", "open the door", "geheim1234"]
    assert secrets_of(environment) == found


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


@pytest.mark.parametrize(
    "value",
    ["dummy_key", "EMPTY", "<your-api-key>", "test_api_key", "sk-no-key-required", "required", "sk-xxxxxxxx"],
)
def test_a_placeholder_is_no_secret(value: str) -> None:
    """It is, where it stands under a key that says so."""
    said = {"text": f"the {value} of the policy", "api_key": value}
    for known in (secrets_in(said), secrets_of({"OPENAI_API_KEY": value})):
        assert Redactor(known)(said) == {"text": f"the {value} of the policy", "api_key": REDACTED}


@given(st.from_regex(r"[A-Za-z0-9+/]{16,64}|[b-m]{2,9}-[b-m]{2,9}!|(my|secret|password|key)-[b-m]{9}", fullmatch=True))
def test_a_key_is_no_placeholder_and_no_id(key: str) -> None:
    for secret in (key, f"test-{key}", f"your_{key}", "my-secret-password"):
        redact_known = Redactor(secrets_in({"api_key": secret}))
        assert redact_known(f"said {secret}.") == f"said {REDACTED}." or len(secret) < 8
    if any(c.isdigit() for c in key):
        assert key not in without_secrets(f"key={key} key='task_{key}' key=a-{key}_1 key=task_1{key} token=task_{key}")


def test_rollout_keys_are_redacted_wherever_they_stand() -> None:
    """An agent's answer may hold the URL, or the key, that it was given for this rollout."""
    key = rollout_key("an-api-key", {"rollout": "r0"})
    said = {"params": {"url": f"http://x/trl_gym/rollouts/{key}/v1", key: [key]}, "policy_api_key": key}
    redacted = Redactor()(said)
    assert key not in str(redacted) and key.partition(".")[2] not in str(redacted)
    assert redacted["params"]["url"] == "http://x/trl_gym/rollouts/[redacted]/v1"
    assert redacted["policy_api_key"] == "[redacted]"


@given(secret=st.text(min_size=8, max_size=40), value=json_values)
def test_a_known_secret_is_found_as_json_and_urls_spell_it(secret: str, value: Any) -> None:
    said = {"value": value, "said": [1, (json.dumps([secret]), quote(secret, safe="", errors="replace")), {secret: 0}]}
    once = Redactor([secret])(said)
    assert once["said"] == [1, [f'["{REDACTED}"]', REDACTED], {REDACTED: 0}] or secret in f'["{REDACTED}"]'


def test_lists_under_a_secret_named_key_are_taken_out_and_numbers_stay() -> None:
    value = {"api-keys": "x", "githubToken": ["a", ["b"], 1], "wrong_password": 0.5, "private.key": PEM}
    assert redact(value) == {
        "api-keys": "x",
        "githubToken": [REDACTED, [REDACTED], 1],
        "wrong_password": 0.5,
        "private.key": REDACTED,
    }


# -- what we say ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("token=abcdefgh12345678", "token=[redacted]"),
        (f"cannot read {PEM}.", "cannot read [redacted]."),
        ("-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBg", "[redacted]"),
        ("AKIAIOSFODNN7EXAMPLE and sk-abcdefghijklmnop", "[redacted] and [redacted]"),
        ("postgres://me:pw@host/db failed", "postgres://[redacted]@host/db failed"),
        ('"GET /v1/models?key=abc&n=1 HTTP/1.1" 401', '"GET /v1/models?key=[redacted]&n=1 HTTP/1.1" 401'),
        ('{"api_key": "0123456789"}', '{"api_key": "[redacted]"}'),
        ("Authorization: Bearer abcdef123", "Authorization: Bearer [redacted]"),
        ("authorization: Basic dTpwYXNz", "authorization: Basic [redacted]"),
        ("it was told bearer abcdef123456", "it was told bearer [redacted]"),
        (rollout_key("k", {"rollout": "r0"}), "[redacted]"),
    ],
)
def test_what_looks_like_a_secret_is_in_no_message(text: str, shown: str) -> None:
    assert without_secrets(text) == shown == without_secrets(shown)
    for error in (TrlGymError(text), TrlGymError("x", text), TrlGymError("x", "", [Problem(text)])):
        assert shown in str(error) and shown in str(pickle.loads(pickle.dumps(error)))
    assert RolloutFailure(kind=FailureKind.POLICY, text=text, where="").text == shown
    assert Entry("check", Status.OK, text, "", 0.0).text == shown


@pytest.mark.parametrize(
    "text",
    [
        "Set `--api-key`, or `export VLLM_API_KEY=KEY` with the key that the server was started with.",
        "this server demands its API key as a bearer token on every route but /health",
        "Give `api_key`: the pad_token=<pad> and key=sorted are none, nor is policy@12 at http://h:1/v1",
        "GET /v1 failed for key=task_0000012, ('key='step-00000100')",
        "prompt token: token_id:123456789, `password` is ${oc.env:PASSWORD}",
    ],
)
def test_messages_about_keys_stay(text: str) -> None:
    assert without_secrets(text) == text


@given(st.text(max_size=200), st.sampled_from(["token=", "://", "@", "api_key: '", "Bearer ", "?key=", "-----BEGIN "]))
def test_redacting_a_message_again_changes_nothing(text: str, sign: str) -> None:
    once = without_secrets(f"{text}{sign}{text}")
    assert without_secrets(once) == once


def test_no_message_is_read_again_and_again() -> None:
    """With an unbounded quantifier one of these takes minutes."""
    for piece in ("api_key=", "://:", "eyJ", "bearer ", "token=", "sk-", "-----BEGIN PRIVATE KEY", "&key=&", "://a:"):
        assert without_secrets(piece * 10_000)


def test_a_log_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "key of the environment".replace(" ", "-"))
    monkeypatch.setattr(logging.root, "handlers", [])
    stream = io.StringIO()
    logging.basicConfig(format="%(levelname)s %(message)s", stream=stream)
    log_without_secrets(["known-0123"])
    logger = logging.getLogger("trl_gym.test")
    logger.warning("GET %s with known-0123 and key-of-the-environment", "/x?token=abc")
    try:
        raise ValueError("https://me:pw@host")
    except ValueError:
        logger.exception("it failed")
    log = stream.getvalue()
    assert log.startswith("WARNING GET /x?token=[redacted] with [redacted] and [redacted]\nERROR it failed\nTraceback")
    assert log.endswith("ValueError: https://[redacted]@host\n")


# -- numbers ----------------------------------------------------------------------------------------------------------


@given(value=json_values)
def test_numbers_that_json_does_not_have_are_found(value: Any) -> None:
    assert redact.look(value) == (value, True)
    for number in (math.nan, math.inf, -math.inf):
        assert not redact.look([value, {"x": [number]}])[1]
