"""Requests of no rollout, sent to a stock server and to ours, and what may differ between the two answers.

What differs is listed in `docs/token_fidelity.md` (Differences from a stock server).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import requests

from tests.e2e.contract.engines import TOOL, USER
from tests.e2e.servers import API_KEY, MAX_MODEL_LEN, Json
from trl_gym.policy_server.middleware.turn import TOKEN_KEYS

CHAT = "/v1/chat/completions"

CHATS: list[Json] = [
    {},
    {"max_tokens": 3},
    {"max_completion_tokens": 3, "max_tokens": 5},
    {"n": 2, "temperature": 1.0, "seed": 3},
    {"temperature": 1.0, "seed": 4, "top_p": 0.5, "top_k": 20, "min_p": 0.01},
    {"stop": ["e", "a"]},
    {"stop": ["e"], "include_stop_str_in_output": True},
    {"stop_token_ids": list(range(40, 120))},
    {"ignore_eos": True, "skip_special_tokens": False},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 2},
    {"logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True},
    {"logprobs": True, "logprob_token_ids": [5, 6]},
    {"return_token_ids": True},
    {"prompt_logprobs": 1},
    {"echo": True},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    {"logit_bias": {"40": 100}},
    {"allowed_token_ids": [40, 41], "min_tokens": 2},
    {"bad_words": ["e"]},
    {"tools": [TOOL]},
    {"tools": [TOOL], "tool_choice": "none"},
    {"response_format": {"type": "text"}},
    {"messages": [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "83"}, USER]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
    {
        "messages": [USER, {"role": "assistant", "content": "It"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    {"chat_template_kwargs": {"enable_thinking": False}, "documents": [{"text": "t"}], "reasoning_effort": "low"},
    {"include_reasoning": False},
    {"user": "me", "metadata": {"a": "b"}, "store": True, "unknown": 1, "parallel_tool_calls": False},
    {"stream": True},
    {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "return_token_ids": True},
    {"stream": "false"},
    # mistakes
    {"messages": None},
    {"messages": []},
    {"messages": "hi"},
    {"messages": [{"role": "user"}, 5]},
    {"model": "another"},
    {"temperature": -1},
    {"temperature": "hot"},
    {"top_p": 2.0},
    {"n": 0},
    {"top_logprobs": 2000, "logprobs": True},
    {"stream_options": {"include_usage": True}},
    {"logit_bias": {"1000000": 1}},
    {"allowed_token_ids": [10**6]},
    {"stop": 5},
    {"tools": "x"},
    {"tool_choice": "required"},
    {"response_format": {"type": "json_schema"}},
    {"max_tokens": 10_000},
    {"messages": [{"role": "user", "content": "1" * 2 * MAX_MODEL_LEN}]},
    {"messages": [{"role": "user", "content": "1" * 600_000}]},
]
# Refused by our server in words of its own, before the other sees them.
IN_OWN_WORDS: list[Json] = [
    {"top_logprobs": 2},
    {"logprob_token_ids": [1]},
    {"stream_options": {"include_usage": "what"}, "stream": True},
    {"stream_options": 5, "stream": True},
    {"max_tokens": 0},
    {"max_tokens": "many"},
    {"kv_transfer_params": "x"},
    {"chat_template_kwargs": [1]},
]
_COMPLETION = {"model": "policy", "prompt": "What is", "max_tokens": 5, "temperature": 0.0}
_PLAIN = {"Content-Type": "text/plain"}
_JSON = {"Content-Type": "application/json"}
OTHERS: list[tuple[str, str, Json]] = [
    ("POST", "/v1/completions", {"json": _COMPLETION}),
    ("POST", "/v1/completions", {"json": {**_COMPLETION, "prompt": [[5, 6], [7, 8, 9]], "logprobs": 1}}),
    ("POST", "/v1/completions", {"json": {**_COMPLETION, "echo": True, "return_token_ids": True}}),
    ("POST", "/v1/completions", {"json": {**_COMPLETION, "stream": True}}),
    ("POST", "/v1/completions", {"json": {**_COMPLETION, "suffix": "x"}}),
    ("POST", "/v1/completions", {"data": json.dumps(_COMPLETION), "headers": _PLAIN}),
    ("POST", "/tokenize", {"json": {"messages": [USER], "return_token_strs": True}}),
    ("POST", "/detokenize", {"json": {"tokens": [5, 6, 7]}}),
    ("GET", "/v1/models", {}),
    ("GET", "/version", {}),
    ("GET", CHAT, {}),
    ("GET", "/nothing", {}),
    ("POST", "/nothing", {"json": {}}),
    ("POST", f"{CHAT}/batch", {"json": {"messages": [[USER], [USER]], "max_tokens": 3, "temperature": 0.0}}),
    ("POST", CHAT, {"data": b"{", "headers": _JSON}),
    ("POST", CHAT, {"data": b"[1]", "headers": _JSON}),
    ("POST", CHAT, {"data": b"", "headers": _JSON}),
    ("OPTIONS", CHAT, {"headers": {"Access-Control-Request-Method": "POST"}}),
]
# Refused by our server with the same words, and without the headers of the other.
REFUSED: list[tuple[str, str, Json]] = [
    ("POST", CHAT, {"data": json.dumps({"messages": [USER]}), "headers": _PLAIN}),
    ("POST", CHAT, {"data": json.dumps({"messages": [USER]})}),
]
_HEADERS = {
    "Authorization": f"Bearer {API_KEY}",  # which a stock server without a key does not look at
    "Origin": "http://a.example",
    "X-Request-Id": "7",
    "endpoint-load-metrics-format": "JSON",
}
_VARYING = ("date", "content-length", "endpoint-load-metrics", "location")  # values with times, sizes, loads, ports
_RANDOM = re.compile(r'(?<=-)[0-9a-f]{16,32}|(?<="created":)\d+')


def all_requests() -> Iterator[tuple[str, str, Json]]:
    """Method, path and keywords of each request whose answers are the same."""
    yield from (("POST", CHAT, {"json": body}) for body in bodies(CHATS))
    yield from OTHERS


def bodies(requests_: list[Json]) -> Iterator[Json]:
    """Whole bodies of chats, sampled greedily where they do not say otherwise."""
    fixed = {"model": "policy", "messages": [USER], "temperature": 0.0}
    for fields in requests_:
        limit = {} if {"max_tokens", "max_completion_tokens"} & fields.keys() else {"max_tokens": 6}
        yield {key: value for key, value in {**fixed, **limit, **fields}.items() if value is not None}


def answer_of(url: str, method: str, path: str, how: Json) -> Json:
    """Return status, headers and body of an answer, without what no two answers have in common."""
    headers = {**_HEADERS, **how.get("headers", {})}
    answer = requests.request(method, url + path, **{**how, "headers": headers}, timeout=60.0, allow_redirects=False)
    found = {name.lower(): value for name, value in answer.headers.items()}
    found |= dict.fromkeys(set(_VARYING) & set(found), "…")
    body: Any = _RANDOM.sub("0", answer.text.replace('"created": ', '"created":'))
    if found.get("content-type", "").startswith("text/event-stream"):
        body = _of_stream(body)  # where it is cut into events depends on time
    elif body.startswith("{"):
        body = json.loads(body)
    return {"status": answer.status_code, "headers": found, "body": body}


def _of_stream(body: str) -> Json:
    events = [line.removeprefix("data: ") for line in body.splitlines() if line]
    assert events[-1] == "[DONE]"
    whole: Json = {"keys": set(), "text": ""}
    for event in map(json.loads, events[:-1]):
        whole["keys"] |= set(event)
        for choice in event.get("choices", ()):
            whole["keys"] |= {f"choice.{key}" for key in choice}
            whole["text"] += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return whole


def without_bundle(answer: Json) -> Json:
    """Return one of our answers without what it has more: the bundle of a chat completion, or why there is none."""
    body = answer["body"]
    if isinstance(body, dict):
        body.pop("trl_gym", None)
    for choice in body.get("choices", ()) if isinstance(body, dict) else ():
        for key in TOKEN_KEYS:
            choice.get("message", {}).pop(key, None)
    return answer
