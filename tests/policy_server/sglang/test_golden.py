"""The dialect and the stand-in beside SGLang itself: its request models, and what the real server answered.

`golden.json` has requests as the dialect makes them, which the models of SGLang 0.5.23 have accepted, and answers of
that version's server on a CPU (long lists cut). Where SGLang can be imported, its models are asked again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.policy_server.fake_sglang import behind_gateway
from tests.policy_server.tiny_model import build_random_policy
from trl_gym.policy_server.sglang import dialect
from trl_gym.policy_server.sglang.dialect import error_reply

Json = dict[str, Any]

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
MAKERS: dict[str, Any] = {
    "chat": lambda given: dialect.chat_request(given, rid="r", adapter=given.get("adapter")),
    "completion": lambda given: dialect.completion_request(given, rid="r", adapter=None),
    "logprobs": lambda given: dialect.logprobs_request(given, adapter=None),
    "vocabulary": lambda given: dialect.vocabulary_request(),
    "tokenize": dialect.tokenize_request,
    "texts": lambda given: dialect.texts_request(given["tokens"]),
    "detokenize": dialect.detokenize_request,
    "pause": lambda given: dialect.pause_request(given["mode"]),
    "sleep": lambda given: dialect.sleep_request(given["level"], {}),
    "disk": lambda given: dialect.disk_request(given["path"]),
    "version": lambda given: dialect.version_request(given["new_version"]),
    "adapter": dialect.adapter_request,
}
PROTOCOL, IO = "sglang.srt.entrypoints.openai.protocol", "sglang.srt.managers.io_struct"
MODELS = {
    "chat": (PROTOCOL, "ChatCompletionRequest"),
    "completion": (PROTOCOL, "CompletionRequest"),
    "tokenize": (PROTOCOL, "TokenizeRequest"),
    "texts": (PROTOCOL, "DetokenizeRequest"),
    "detokenize": (PROTOCOL, "DetokenizeRequest"),
    "logprobs": (IO, "GenerateReqInput"),
    "vocabulary": (IO, "GenerateReqInput"),
    "pause": (IO, "PauseGenerationReqInput"),
    "sleep": (IO, "ReleaseMemoryOccupationReqInput"),
    "disk": (IO, "UpdateWeightFromDiskReqInput"),
    "version": (IO, "UpdateWeightVersionReqInput"),
    "adapter": (IO, "LoadLoRAAdapterReqInput"),
}


def named(cases: list[Json]) -> list[Any]:
    return [pytest.param(case, id=f"{case['kind']}-{place}") for place, case in enumerate(cases)]


@pytest.mark.parametrize("case", named(GOLDEN["requests"]))
def test_the_dialect_makes_the_requests_that_sglang_has_accepted(case: Json) -> None:
    assert MAKERS[case["kind"]](case["given"]) == case["sent"]


@pytest.mark.parametrize("case", named(GOLDEN["requests"]))
def test_sglangs_models_accept_them(case: Json) -> None:
    module, name = MODELS[case["kind"]]
    model = getattr(pytest.importorskip(module, reason="SGLang is not installed"), name)
    import pydantic

    pydantic.TypeAdapter(model).validate_python(case["sent"])
    fields = getattr(model, "model_fields", None) or getattr(model, "__annotations__", {})
    assert set(case["sent"]) <= {*fields, "rid"}, "SGLang ignores fields that it does not know"


def test_the_stand_in_answers_as_the_server_did(tmp_path: Path) -> None:
    with behind_gateway(build_random_policy(tmp_path), max_model_len=1024) as (fake, _):
        for case in GOLDEN["answers"]:
            answer = requests.request(case["method"], f"{fake.url}{case['path']}", json=case["body"], timeout=60.0)
            where = f"{case['method']} {case['path']}: {answer.text[:300]}"
            assert answer.status_code == case["status"], where
            if case["status"] >= 400:
                told, said = (
                    error_reply(400, body).error_text() for body in (answer.content, as_json(case["answer"]))
                )
                assert told[:40] == said[:40], where
            assert lacking(answer.json(), case["answer"]) == [], where


def test_the_dialect_reads_the_servers_answers() -> None:
    chats = [case for case in GOLDEN["answers"] if case["path"] == dialect.CHAT_PATH and case["status"] == 200]
    for case in chats:
        answer = dialect.chat_answer(as_json(case["answer"]), case["body"], "policy")
        [choice] = answer["choices"]
        assert answer["prompt_token_ids"] and len(choice["token_ids"]) == answer["usage"]["completion_tokens"]
        assert answer["weight_versions"][-1]["end"] == len(choice["token_ids"])
    assert len(chats) >= 2


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def lacking(told: Any, real: Any, path: str = "$") -> list[str]:
    """What the stand-in says that the server does not: keys, and types of values; lists by their first items."""
    if real is None or told is None:
        return []
    if isinstance(told, dict):
        if not isinstance(real, dict):
            return [path]
        unknown = [f"{path}.{key}" for key in told if key not in real]
        return unknown + [one for key in told if key in real for one in lacking(told[key], real[key], f"{path}.{key}")]
    if isinstance(told, list) and isinstance(real, list):
        return lacking(told[0], real[0], f"{path}[0]") if told and real else []
    kinds = [
        float if isinstance(one, int | float) and not isinstance(one, bool) else type(one) for one in (told, real)
    ]
    return [] if kinds[0] is kinds[1] else [path]
