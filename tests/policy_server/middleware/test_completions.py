"""Turns of rollouts at `/v1/completions`: the middleware around a fake server, and its pure functions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy_server.fake_vllm import END, FakeVllm, Json, tokens_of
from tests.policy_server.middleware.test_app import KEY, TAG, Http
from trl_gym.policy_server.middleware.completions import Continued, Texts, joined
from trl_gym.policy_server.middleware.identity import rollout_key
from trl_gym.policy_server.middleware.ledger import sampled_ids, token_ids

PATH = "/v1/completions"
GYM = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 0}  # what Gym's model server adds


async def complete(http: Http, prompt: Any, **body: Any) -> Json:
    status, answer = await http("POST", PATH, {"prompt": prompt, "trl_gym": TAG, **GYM, **body})
    assert status == 200, answer
    return answer


def asked(app: FakeVllm) -> Json:
    """The newest request for a completion."""
    return [body for path, body in app.requests if path == PATH][-1]


async def prompts(http: Http) -> list[list[int]]:
    """The prompts of the calls of the rollout, which has ended then."""
    records = await http.take("r0")
    found = []
    for index, record in enumerate(records):
        assert record.tokens is not None
        found.append(token_ids(records, index)[: -len(sampled_ids(record.tokens))])
    return found


async def test_a_completion_is_a_turn(http: Http, app: FakeVllm) -> None:
    answer = await complete(http, "1+1=", temperature=0.1, max_tokens=50, logit_bias={"5": 1})
    (choice,) = answer["choices"]
    (handle,) = choice["token_ids"]
    assert handle < 0 and choice["prompt_token_ids"] == [handle]
    assert choice["logprobs"]["tokens"] == [f"token_id:{handle}"] and choice["logprobs"]["token_logprobs"] == [0.0]
    assert (choice["text"], choice["finish_reason"], answer["object"]) == ("ok", "stop", "text_completion")
    assert answer["weight_version"] == "default" and "message" not in choice and "messages" not in answer
    assert [asked(app)[key] for key in ("temperature", "top_p", "max_tokens")] == [0.7, 0.9, 50]
    assert "logit_bias" not in asked(app) and "trl_gym" not in asked(app)
    (record,) = await http.take("r0")
    assert record.tokens is not None
    assert (record.status, record.prompt, record.finish_reason, record.cached_tokens) == (200, "rendered", "stop", 3)
    assert token_ids([record], 0) == [*tokens_of("1+1="), *app.reply] and sampled_ids(record.tokens) == app.reply
    assert record.tokens.handle == handle and record.own_sampling == ("logit_bias", "temperature")
    status, answer = await http("POST", PATH, {"prompt": "1+1=", "trl_gym": TAG})
    assert (status, "has ended" in answer["error"]["message"]) == (400, True)


async def test_the_key_of_a_rollout_makes_turns_of_completions(http: Http, app: FakeVllm) -> None:
    header = {b"x-trl-gym-rollout": rollout_key(KEY, TAG).encode()}
    status, answer = await http("POST", PATH, {"prompt": "1+1=", **GYM}, header)
    assert status == 200 and answer["choices"][0]["token_ids"][0] < 0
    assert asked(app)["temperature"] == 0.7 and asked(app)["max_tokens"] == 16
    assert await prompts(http) == [tokens_of("1+1=")]


async def test_a_prompt_that_goes_on_from_what_was_sampled_starts_with_it(http: Http, app: FakeVllm) -> None:
    app.reply = [ord("o"), 3, ord("k"), END]  # a token that the text does not show
    app.change_answer = lambda answer: answer["choices"][0]["message"].update(content="ok")
    await complete(http, "uhi|a")
    await complete(http, "uhi|aok|umore|a")
    app.reply = [ord("o"), ord("k")]  # cut off
    await complete(http, "uhi|aok|umore|aok|unow|a")
    await complete(http, "uhi|aok|umore|aok|unow|aok|uend|a")
    assert asked(app)["prompt"] != "uhi|aok|umore|aok|unow|aok|uend|a"
    first, second, third, fourth = await prompts(http)
    said = [ord("o"), 3, ord("k"), END]
    assert second == [*first, *said, *tokens_of("umore|a")]
    assert third == [*second, *said, *tokens_of("unow|a")]
    assert fourth == [*third, *tokens_of("ok|uend|a")]


async def test_a_prompt_that_goes_on_otherwise_is_drift(http: Http) -> None:
    await complete(http, "uhi|a")
    await complete(http, "uhi|aNO|umore|a")
    await complete(http, "uother|a")
    _, drifted, other = await http.take("r0")
    assert drifted.drift is not None and drifted.drift.cause == "message_without_ids"
    assert other.drift is None and other.tokens is not None and other.tokens.parent is None


async def test_a_prompt_of_ids_is_used_as_it_is(http: Http, app: FakeVllm) -> None:
    await complete(http, [1, 5, 6])
    await complete(http, [[1, 5, 6, *app.reply, 9]])
    assert [body["prompt"] for path, body in app.requests if path == PATH] == [[1, 5, 6], [1, 5, 6, *app.reply, 9]]
    records = await http.take("r0")
    assert [record.tokens and record.tokens.parent for record in records] == [None, 0]


async def test_the_budget_counts_over_completions(http: Http, app: FakeVllm) -> None:
    tag = {**TAG, "completion_budget": 12}
    await complete(http, "uhi|a", trl_gym=tag, max_tokens=50)
    assert asked(app)["max_tokens"] == 12
    await complete(http, "uhi|aok|umore|a", trl_gym=tag, max_tokens=50)
    assert asked(app)["max_tokens"] == 12 - len("ok|umore|a")
    prompt = "uhi|aok|umore|aok|uend|a"
    status, answer = await http("POST", PATH, {"prompt": prompt, "trl_gym": tag})
    assert status == 400 and "maximum context length" in answer["error"]["message"]


async def test_a_prompt_that_is_too_long_is_an_overflow(http: Http, app: FakeVllm) -> None:
    app.max_model_len = 20
    await complete(http, "x" * 15, max_tokens=10)
    assert asked(app)["max_tokens"] == 5
    status, answer = await http("POST", PATH, {"prompt": "x" * 25, "trl_gym": TAG})
    assert status == 400 and "maximum context length" in answer["error"]["message"]


async def test_a_completion_is_streamed_whole(http: Http) -> None:
    body = {"prompt": "x", "trl_gym": TAG, "stream": True, "stream_options": {"include_usage": True}}
    status, text = await http("POST", PATH, body)
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert (status, events[-1]) == (200, "[DONE]")
    piece, usage = map(json.loads, events[:-1])
    assert piece["choices"][0]["text"] == "ok" and piece["choices"][0]["token_ids"][0] < 0
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": None}, "must have one `prompt`"),
        ({"prompt": ["a", "b"]}, "must have one `prompt`"),
        ({"prompt": [[1], [2]]}, "must have one `prompt`"),
        ({"prompt": [1, True]}, "must have one `prompt`"),
        ({"n": 2}, "n must be 1"),
        ({"echo": True, "suffix": "x"}, "must be sampled without echo, suffix"),
        ({"prompt_logprobs": 0}, "must be sampled without prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens must be a positive integer"),
        ({"stream_options": {"include_usage": 5}, "stream": True}, "stream_options.include_usage"),
    ],
)
async def test_what_cannot_be_a_turn_is_refused(http: Http, app: FakeVllm, body: Json, said: str) -> None:
    status, answer = await http("POST", PATH, {"prompt": "x", "trl_gym": TAG, **body})
    assert (status, said in answer["error"]["message"]) == (400, True), answer
    assert app.requests == []


async def test_no_limit_is_evaded_by_a_field_of_chats(http: Http, app: FakeVllm) -> None:
    await complete(http, "x", max_completion_tokens=2, trl_gym={**TAG, "completion_budget": 3}, max_tokens=9)
    assert asked(app)["max_tokens"] == 3 and "max_completion_tokens" not in asked(app)


@pytest.mark.parametrize(
    "answer", [b"{}", b'{"choices": [{}]}', b'{"choices": []}', b"NaN", b'{"choices": [{"text": 1}]}']
)
async def test_an_answer_of_another_form_is_an_error(http: Http, app: FakeVllm, answer: bytes) -> None:
    app.complete = lambda _request: (200, json.loads(answer))
    status, said = await http("POST", PATH, {"prompt": "x", "trl_gym": TAG})
    assert status == 500 and "the server" in said["error"]["message"]


def test_of_several_calls_the_longest_and_newest_is_continued() -> None:
    texts = Texts()
    for call, (prompt, said) in enumerate([("a", "b"), ("a", "bc"), ("a", "bc"), ("abcd", "")]):
        texts.add(call, prompt, said)
    assert texts.continued("a") is None and texts.continued("xa") is None
    assert texts.continued("abx") == Continued(0, "x")
    assert texts.continued("abcx") == Continued(2, "x")
    assert texts.continued("abcd.") == Continued(3, ".")
    assert texts.continued("a?") == Continued()
    texts.add(4, "q", "\n<think>hm</think>\n ok \n")
    assert texts.continued("q ok<end>") == Continued(4, "<end>")
    texts.clear()
    assert texts.continued("abx") is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6), st.booleans())
def test_nothing_that_was_seen_is_lost_and_nothing_is_written_twice(
    seen: list[int], tail: list[int], stopped: bool
) -> None:
    found = joined(seen, tail, stopped=stopped)
    assert found[: len(seen)] == seen and (found[len(found) - len(tail) :] == tail or len(tail) > len(found))
    if not stopped:
        assert found == seen + tail
