from __future__ import annotations

import json

import pytest

from tests.commands.plain_endpoint import KEY, MODEL, plain_endpoint
from tests.rollouts.recorded import request
from trl_gym.commands.collect import look_at, without_tag
from trl_gym.errors import ConfigError, PolicyServerError


def test_a_foreign_endpoint_is_recognized_and_its_limits_are_said() -> None:
    with plain_endpoint() as server:
        endpoint = look_at(server.base_url, MODEL, KEY)
        assert not endpoint.is_ours
        assert "without token ids" in endpoint.note and "trl-gym gateway" in endpoint.note


def test_a_proxy_for_the_outer_world_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with plain_endpoint() as server:
        assert not look_at(server.base_url, MODEL, KEY).is_ours


def test_what_cannot_work_is_said_before_anything_is_started() -> None:
    with plain_endpoint() as server:
        with pytest.raises(ConfigError, match="--api-key"):
            look_at(server.base_url, MODEL, None)
        with pytest.raises(ConfigError, match=r"`--model` is 'other' and .* serves 'foreign'"):
            look_at(server.base_url, "other", KEY)
        gone = server.base_url
    with pytest.raises(PolicyServerError, match="cannot be reached"):
        look_at(gone, MODEL, KEY)


def test_a_foreign_endpoint_gets_no_field_of_ours() -> None:
    stamped = request().row
    plain = without_tag(stamped)
    assert "metadata" not in plain["responses_create_params"]
    assert plain["responses_create_params"]["temperature"] == 1.0
    assert "trl_gym" in json.loads(stamped["responses_create_params"]["metadata"]["extra_body"])  # a copy was changed
    stamped["responses_create_params"]["metadata"] |= {"mine": "1", "extra_body": '{"trl_gym": {}, "seed": 3}'}
    assert without_tag(stamped)["responses_create_params"]["metadata"] == {"mine": "1", "extra_body": '{"seed": 3}'}
