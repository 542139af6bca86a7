"""What is asked of SGLang and made of its answers, without a server."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_gym.policy_server.sglang import dialect
from trl_gym.policy_server.sglang.dialect import UnsupportedError, chat_answer, chat_request, error_reply
from trl_gym.rollouts.engine_metrics import engine_metrics, parse_counters

Json = dict[str, Any]

USER = {"role": "user", "content": "0"}
ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def asked(body: Json, **how: Any) -> Json:
    return chat_request({"messages": [USER], **body}, rid="r", adapter=None, **how)


def completion(**choice: Any) -> Json:
    said = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop", **choice}
    return {"id": "1", "model": "default", "choices": [said], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


def told(answer: Json, **request: Any) -> Json:
    return chat_answer(json.dumps(answer).encode(), request, "policy")


# -- requests ---------------------------------------------------------------------------------------------------------


@given(prompt=ids)
def test_an_exact_prompt_is_taken_in_either_form(prompt: list[int]) -> None:
    for how in ({"prompt_token_ids": prompt}, {"kv_transfer_params": {"prompt_token_ids": prompt}}):
        request = asked(how)
        assert request["input_ids"] == prompt
        assert not set(request) & {"prompt_token_ids", "kv_transfer_params"}


@given(body=st.dictionaries(st.sampled_from(("frequency_penalty", "n", "logprobs", "tools", "seed")), st.none()))
def test_null_is_left_out(body: Json) -> None:
    assert asked(body) == {"messages": [USER], "rid": "r"}


def test_token_ids_are_asked_for_but_not_in_a_stream() -> None:
    assert asked({"return_token_ids": True})["return_prompt_token_ids"] is True
    assert not {"return_token_ids", "return_prompt_token_ids"} & set(asked({"return_token_ids": True, "stream": True}))


def test_what_is_said_otherwise() -> None:
    assert asked({"top_k": 0})["top_k"] == -1
    assert asked({"include_stop_str_in_output": True})["no_stop_trim"] is True
    assert asked({"documents": [1], "chat_template_kwargs": {"a": 2}})["chat_template_kwargs"] == {
        "a": 2,
        "documents": [1],
    }
    assert chat_request({"messages": [USER], "model": "a"}, rid="r", adapter="a")["lora_path"] == "a"
    thought = asked({"messages": [{"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": None}]})
    assert thought["messages"] == [{"role": "assistant", "content": None, "reasoning_content": "hm"}]


@pytest.mark.parametrize(
    ("wanted", "fields"),
    [
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"grammar": "g"}, {"ebnf": "g"}),
        ({"choice": ["a.b", "c"]}, {"regex": r"(a\.b)|(c)"}),
        ({"json_object": True}, {"response_format": {"type": "json_object"}}),
    ],
)
def test_structured_outputs(wanted: Json, fields: Json) -> None:
    assert asked({"structured_outputs": wanted}) == {"messages": [USER], "rid": "r", **fields}
    schema = asked({"structured_outputs": {"json": '{"type": "object"}'}})["response_format"]["json_schema"]
    assert schema["schema"] == {"type": "object"}


@pytest.mark.parametrize(
    "body",
    [
        {"allowed_token_ids": [1]},
        {"bad_words": ["x"]},
        {"use_beam_search": True},
        {"prompt_logprobs": 0},
        {"chat_template": "{{ 1 }}"},
        {"vllm_xargs": {"a": 1}},
        {"structured_outputs": {"structural_tag": "x"}},
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(body: Json) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(body))):
        asked(body)


def test_what_asks_for_nothing_is_not_refused() -> None:
    nothing = {"bad_words": [], "use_beam_search": False, "best_of": 1, "length_penalty": 1.0, "vllm_xargs": None}
    assert asked(nothing) == {"messages": [USER], "rid": "r"}


def test_a_chat_that_sglang_would_render_otherwise_is_rendered_as_it_is() -> None:
    answer = {"role": "assistant", "content": "so"}
    assert dialect.render_request({"messages": [USER]}) is None
    assert dialect.render_request({"messages": [USER, answer], "prompt_token_ids": [1]}) is None
    assert dialect.render_request({"messages": [USER, answer], "continue_final_message": True}) is None
    assert dialect.render_request({"messages": [USER, answer]}) == {
        "messages": [USER, answer],
        "add_generation_prompt": True,
    }
    assert dialect.render_request({"messages": [USER], "add_generation_prompt": False}) == {
        "messages": [USER],
        "add_generation_prompt": False,
    }


def test_a_turn_that_goes_on_is_opened_by_sglang() -> None:
    body = {"messages": [USER], "continue_final_message": True, "add_generation_prompt": False}
    assert dialect.tokenize_request(body) == {"messages": [USER], "continue_final_message": True}


@given(
    body=st.dictionaries(
        st.sampled_from(sorted({*dialect.Asked.__annotations__, "prompt", "documents", "top_k", "tools"})), JSON
    )
)
def test_an_odd_request_is_refused_or_translated(body: Json) -> None:
    body = {"messages": [USER], "prompt_logprobs": 0, **body}
    makers = (
        lambda: asked({key: value for key, value in body.items() if key != "prompt_logprobs"}),
        lambda: dialect.render_request(body),
        lambda: dialect.tokenize_request(body),
        lambda: dialect.logprobs_request(body, adapter=None),
        lambda: dialect.completion_request(body, rid="r", adapter=None),
    )
    try:
        dialect.check_request(body)
    except UnsupportedError:
        return
    body["messages"] = body["messages"] or [USER]  # `wire.py` refuses a chat without one
    for make in makers:
        with contextlib.suppress(UnsupportedError):
            make()


# -- answers ----------------------------------------------------------------------------------------------------------


@given(prompt=ids, sampled=ids)
def test_ids_and_versions_have_vllms_places(prompt: list[int], sampled: list[int]) -> None:
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]
    answer = {
        **completion(prompt_token_ids=prompt, response_token_ids=sampled),
        "metadata": {"weight_version": "4", "weight_versions": spans},
    }
    seen = told(answer)
    assert (seen["prompt_token_ids"], seen["choices"][0]["token_ids"]) == (prompt, sampled)
    assert (seen["weight_versions"], seen["model"]) == (spans, "policy")
    assert "metadata" not in seen and "prompt_token_ids" not in seen["choices"][0]


@pytest.mark.parametrize(("matched", "reason"), [(None, None), (2, None), (7, 7), ("END", "END"), ([1, 2], None)])
def test_the_models_own_stop_is_no_stop_reason(matched: Any, reason: Any) -> None:
    assert told(completion(matched_stop=matched), stop_token_ids=[7])["choices"][0]["stop_reason"] == reason


def test_messages() -> None:
    call = {"id": "c", "index": 0, "type": "function", "function": {"name": "add", "arguments": "{}"}}
    said = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]}
    message = told(completion(message=said))["choices"][0]["message"]
    assert message["reasoning"] == "hm" and message["content"] is None
    assert message["tool_calls"] == [{key: value for key, value in call.items() if key != "index"}]
    assert told(completion())["choices"][0]["message"] == {"role": "assistant", "content": "x", "tool_calls": []}


def test_tokens_as_ids() -> None:
    entry = {"token": "x", "logprob": -1.0, "bytes": [120], "top_logprobs": []}
    answer = completion(response_token_ids=[5, 6], logprobs={"content": [entry, entry]})
    content = told(answer, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in content] == ["token_id:5", "token_id:6"]


@given(answer=JSON, key=st.sampled_from(("choices", "metadata", "usage", "")))
def test_an_odd_answer_is_a_value_error_or_an_answer(answer: Any, key: str) -> None:
    body = {**completion(response_token_ids=[1], logprobs=answer), key: answer} if key else answer
    try:
        seen = told(body, return_tokens_as_token_ids=True)
    except ValueError:
        return
    assert all(isinstance(choice["message"], dict) for choice in seen["choices"])


@given(prompts=st.lists(ids, min_size=1, max_size=3))
def test_logprobs_of_given_sequences(prompts: list[list[int]]) -> None:
    request = dialect.logprobs_request(
        {"prompt": prompts, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}, adapter=None
    )
    answers = [
        {
            "text": "",
            "meta_info": {
                "input_token_logprobs": [[None if i == 0 else -1.0 * i, t, None] for i, t in enumerate(one)]
            },
        }
        for one in prompts
    ]
    choices = dialect.logprobs_answer(json.dumps(answers).encode(), request, "policy")["choices"]
    for one, choice in zip(prompts, choices, strict=True):
        assert choice["prompt_logprobs"][0] is None
        expected = [{str(token): {"logprob": -1.0 * place}} for place, token in enumerate(one)]
        assert choice["prompt_logprobs"][1:] == expected[1:]
    answers[0]["meta_info"]["input_token_logprobs"][0][1] += 1
    with pytest.raises(ValueError, match="of other tokens"):
        dialect.logprobs_answer(json.dumps(answers).encode(), request, "policy")


@pytest.mark.parametrize(
    "body", [{"prompt": "text"}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [[1]], "prompt_logprobs": 5}]
)
def test_logprobs_of_anything_else_are_refused(body: Json) -> None:
    with pytest.raises(UnsupportedError):
        dialect.logprobs_request({"prompt_logprobs": 0, **body}, adapter=None)


# -- errors, metrics, arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "The input (300 tokens) is longer than the model's context length (256 tokens).",
        "Requested token count exceeds the model's maximum context length of 256 tokens. You requested …",
        "Input length (253 tokens) exceeds the maximum allowed length (256 tokens). Use a shorter input or …",
    ],
)
def test_a_prompt_that_is_too_long_is_said_in_vllms_words(text: str) -> None:
    for body in ({"object": "error", "message": text, "code": 400}, {"error": {"message": text}}):
        reply = error_reply(400, json.dumps(body).encode())
        assert reply.error_text() == f"This model's maximum context length is 256 tokens. {text}"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"object": "error", "message": "no", "type": "BadRequest", "param": None, "code": 400}, "no"),
        ({"success": False, "error_message": "no", "loaded_adapters": None}, "no"),
        ({"error": "Unauthorized"}, "Unauthorized"),
        ({"detail": "Not Found"}, "Not Found"),
    ],
)
def test_errors_of_all_forms(body: Json, text: str) -> None:
    error = error_reply(400, json.dumps(body).encode()).json()["error"]
    assert (error["message"], error["type"], error["code"]) == (text, "BadRequestError", 400)


@given(
    status=st.sampled_from((400, 404, 500)),
    body=st.binary(max_size=30) | JSON.map(lambda one: json.dumps(one).encode()),
)
def test_any_error_becomes_one(status: int, body: bytes) -> None:
    assert isinstance(error_reply(status, body).json()["error"]["message"], str)


def test_metrics_are_read_as_vllms() -> None:
    def text(scale: float) -> str:
        values = {"prompt_tokens_total": 10, "generation_tokens_total": 4, "num_retracted_requests_total": 1}
        lines = [f'sglang:{name}{{model_name="p"}} {value * scale}' for name, value in values.items()]
        lines.append(f'sglang:cached_tokens_total{{cache_source="device",model_name="p"}} {5 * scale}')
        return dialect.metrics_answer("\n".join(["# HELP x y", *lines, ""]).encode()).decode()

    before, after = parse_counters([text(1)], 0.0), parse_counters([text(3)], 2.0)
    assert engine_metrics(before, after) == {
        "engine/prefix_cache_hit_rate": 0.5,
        "engine/preemptions": 2.0,
        "engine/prompt_tokens_per_second": 10.0,
        "engine/generation_tokens_per_second": 4.0,
    }


def test_the_workers_that_hold_weights() -> None:
    assert dialect.world_size({}) == 1
    assert dialect.world_size({"tp_size": 2, "pp_size": 2, "dp_size": 2}) == 8
    assert dialect.world_size({"tp_size": 4, "dp_size": 4, "enable_dp_attention": True}) == 4


def test_pause_and_sleep() -> None:
    modes = {mode: dialect.pause_request(mode)["mode"] for mode in ("abort", "wait", "keep")}
    assert modes == {"abort": "abort", "wait": "retract", "keep": "retract"}
    assert dialect.sleep_request("1", {}) == {"tags": ["kv_cache"]}
    assert dialect.sleep_request("1", {"enable_weights_cpu_backup": True}) == {"tags": ["weights", "kv_cache"]}
    for wrong in (lambda: dialect.pause_request("x"), lambda: dialect.sleep_request("3", {})):
        with pytest.raises(UnsupportedError):
            wrong()
