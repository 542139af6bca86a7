"""The middleware around a fake server that renders assistant turns differently than they were sampled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import pytest

from tests.policy_server.fake_vllm import END, FakeVllm, Json, render, with_tokens
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings, _without_tokens
from trl_gym.policy_server.middleware.http import App
from trl_gym.policy_server.middleware.identity import rollout_key
from trl_gym.policy_server.middleware.ledger import CallRecord, Taken, sampled_ids, token_ids
from trl_gym.policy_server.middleware.turn import TOKEN_KEYS

KEY = "the-server's-key"
BEARER = (b"authorization", f"Bearer {KEY}".encode())
TAG = {"rollout": "r0", "sampling": {"temperature": 0.7, "top_p": 0.9}}
USER = {"role": "user", "content": "hi"}


def guarded(app: App) -> OnPolicyMiddleware:
    return OnPolicyMiddleware(app, replace(Settings.from_env(), api_keys=(KEY,)))


class Http:
    """Talks to the middleware in process, with its key."""

    def __init__(self, app: FakeVllm) -> None:
        self.app, self.middleware = app, guarded(app)
        self.headers: list[tuple[bytes, bytes]] = []  # of the last answer

    async def __call__(
        self, method: str, path: str, body: Json | bytes = b"", headers: dict[bytes, bytes] | None = None
    ) -> tuple[int, Any]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        pending = [raw[: len(raw) // 2], raw[len(raw) // 2 :]]  # bodies come in pieces
        sent: list[Json] = []

        async def receive() -> Json:
            if not pending:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": pending.pop(0), "more_body": bool(pending)}

        async def send(message: Json) -> None:
            sent.append(message)

        own = {b"content-length": str(len(raw)).encode(), b"content-type": b"application/json"}
        given = own | dict([BEARER]) | (headers or {})
        scope = {"type": "http", "method": method, "path": path, "headers": list(given.items()), "query_string": b""}
        if path != "/v1/chat/completions" or b"stream" in raw:
            pending[:] = [raw]  # the fake reads one piece
        await self.middleware(scope, receive, send)
        answer, self.headers = b"".join(message.get("body", b"") for message in sent[1:]), sent[0]["headers"]
        if dict(sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream"):
            return sent[0]["status"], answer.decode()
        if dict(sent[0]["headers"])[b"content-type"] == b"application/msgpack":
            return sent[0]["status"], answer
        return sent[0]["status"], json.loads(answer or b"null")

    async def chat(self, messages: list[Json], **body: Any) -> Json:
        """Chat; a handle in the answer is replaced by the tokens, as clients without a tag get them."""
        answer = await self.slim_chat(messages, **body)
        return with_tokens(self.middleware, body["trl_gym"]["rollout"], answer) if "trl_gym" in body else answer

    async def slim_chat(self, messages: list[Json], **body: Any) -> Json:
        status, answer = await self("POST", "/v1/chat/completions", {"messages": messages, **body})
        assert status == 200, answer
        return answer

    async def records(self, rollout: str, **body: Any) -> list[Json]:
        status, answer = await self("POST", "/trl_gym/rollouts/records", {"rollouts": [rollout], **body})
        assert status == 200, answer
        return answer["records"][rollout]

    async def take(self, rollout: str) -> list[CallRecord]:
        status, answer = await self("POST", "/trl_gym/rollouts/take", {"rollouts": [rollout]})
        assert status == 200, answer
        records = msgspec.msgpack.decode(answer, type=Taken).rollouts[rollout]
        assert records is not None
        return records

    async def counters(self) -> Json:
        return (await self("GET", "/trl_gym/info"))[1]["counters"]


@pytest.fixture
def http(app: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> Http:
    monkeypatch.setenv("TRL_GYM_NONCE", "n1")
    return Http(app)


async def converse(http: Http, num_turns: int, *, user: Json = USER, **body: Any) -> list[Json]:
    """`num_turns` turns of one rollout; the messages, answers included."""
    messages: list[Json] = [user]
    for turn in range(num_turns):
        message = (await http.chat(messages, **{"trl_gym": TAG, **body}))["choices"][0]["message"]
        messages += [message, {"role": "user", "content": f"more {turn}"}]
    return messages


async def test_info(http: Http) -> None:
    status, info = await http("GET", "/trl_gym/info")
    assert status == 200
    assert info["nonce"] == "n1"
    assert (info["max_model_len"], info["model_names"], info["turn_end_token_id"]) == (200, ["policy"], END)
    assert (info["vllm_version"], info["weight_version"]) == ("0.31.0", "default")
    assert (info["engine"], info["engine_version"]) == ("vllm", "0.31.0")


async def test_info_names_an_engine_that_names_itself(app: FakeVllm) -> None:
    app.engine = "sglang"
    info = (await Http(app)("GET", "/trl_gym/info"))[1]
    assert (info["engine"], info["engine_version"]) == ("sglang", "0.31.0")
    assert "vllm_version" not in info


async def test_every_prompt_starts_with_all_tokens_seen(http: Http, app: FakeVllm) -> None:
    messages = await converse(http, 4)
    seen: list[int] = []
    for message in messages[1::2]:
        assert message["prompt_token_ids"][: len(seen)] == seen
        assert message["generation_log_probs"] == [-0.5] * 3
        seen = message["prompt_token_ids"] + message["generation_token_ids"]
    last = messages[-2]["prompt_token_ids"]
    assert "ok" in "".join(map(chr, last)) and "OK" not in "".join(map(chr, last))  # sampled, not rendered
    assert last.count(END) == 7  # none doubled
    counters = await http.counters()
    assert (counters["requests"], counters["spliced"], counters["served_as_rendered"]) == (4, 3, 0)
    assert all("generation_token_ids" not in m for chat in app.chats() for m in chat["messages"])


async def test_a_turn_cut_off_at_its_limit_is_closed_by_the_template(http: Http, app: FakeVllm) -> None:
    app.reply = [ord("o")]
    messages = await converse(http, 2)
    first, second = messages[1], messages[3]
    seen = first["prompt_token_ids"] + first["generation_token_ids"]
    assert second["prompt_token_ids"][: len(seen) + 1] == [*seen, END]


async def test_one_index_for_both_renders_when_a_later_answer_has_no_ids(http: Http) -> None:
    messages = await converse(http, 1)
    messages += [{"role": "assistant", "content": "forced"}, {"role": "user", "content": "and?"}]
    message = (await http.chat(messages, trl_gym=TAG))["choices"][0]["message"]
    text = "".join(map(chr, message["prompt_token_ids"]))
    assert "more 0" in text and "FORCED" in text and "and?" in text


async def test_nothing_new_starts_another_assistant_turn(http: Http) -> None:
    messages = (await converse(http, 1))[:2]
    message = (await http.chat(messages, trl_gym=TAG))["choices"][0]["message"]
    first = messages[1]
    assert message["prompt_token_ids"] == first["prompt_token_ids"] + first["generation_token_ids"] + [ord("a")]


async def test_continuing_the_sampled_turn_uses_it_as_it_is(http: Http, app: FakeVllm) -> None:
    app.reply = [ord("o")]
    messages = (await converse(http, 1))[:2]
    ending = {"continue_final_message": True, "add_generation_prompt": False}
    message = (await http.chat(messages, trl_gym=TAG, **ending))["choices"][0]["message"]
    assert message["prompt_token_ids"] == messages[1]["prompt_token_ids"] + messages[1]["generation_token_ids"]


async def test_no_boundary_is_reported_and_not_guessed(http: Http, app: FakeVllm) -> None:
    app.render = lambda messages, **_: [*map(ord, "".join((m["content"] or "").lstrip("zqx") for m in messages))]
    messages: list[Json] = [USER]
    answer = await http.chat(messages, trl_gym=TAG)
    assert "trl_gym" not in answer
    messages += [answer["choices"][0]["message"], {"role": "user", "content": "more"}]
    answer = await http.chat(messages, trl_gym=TAG)
    drift = answer["trl_gym"]["drift"]
    assert drift == {"cause": "no_boundary", "text": "the chat template does not write the turn's text as it is given"}
    assert answer["choices"][0]["message"]["prompt_token_ids"] == [*map(ord, "hiokmore")]
    assert (await http.counters())["served_as_rendered"] == 1
    record = (await http.records("r0"))[-1]
    assert (record["prompt"], record["drift"]) == ("rendered", drift)


async def test_a_template_that_closes_nothing_is_exact_all_the_same(http: Http, app: FakeVllm) -> None:
    app.render = lambda messages, **_: [*map(ord, "".join(m["content"] or "" for m in messages))]
    messages = await converse(http, 2)
    seen = messages[1]["prompt_token_ids"] + messages[1]["generation_token_ids"]
    assert messages[3]["prompt_token_ids"] == [*seen, *map(ord, "more 0")]


@pytest.mark.parametrize(
    ("path", "payload"),
    [
        ("/v1/models", []),
        ("/v1/models", {"data": []}),
        ("/v1/models", {"data": [{"id": 5}]}),
        ("/v1/models", {"data": [{"id": "policy"}]}),
        ("/version", "0.31"),
        ("/weight_info", {"weight_version": [1]}),
        ("/tokenize", {"tokens": "abc"}),
    ],
)
async def test_a_server_that_answers_as_vllm_does_not(
    http: Http, app: FakeVllm, path: str, payload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = app.answer
    monkeypatch.setattr(app, "answer", lambda at, body: (200, payload) if at == path else real(at, body))
    messages = [
        USER,
        {"role": "assistant", "content": "x", "prompt_token_ids": [1], "generation_token_ids": [2]},
        USER,
    ]
    status, answer = await http("POST", "/v1/chat/completions", {"messages": messages, "trl_gym": TAG})
    assert status in (400, 500) and path in answer["error"]["message"]


@pytest.mark.parametrize("depth", [250, 900, 100_000])
@pytest.mark.parametrize("place", ['"x": @', '"messages": [{"role": "user", "content": @}]'])
async def test_a_body_nested_too_deep_is_refused(http: Http, place: str, depth: int) -> None:
    text = place.replace("@", "[" * depth + "]" * depth)
    messages = "" if "messages" in place else '"messages": [{"role": "user", "content": "x"}], '
    status, _ = await http("POST", "/v1/chat/completions", f"{{{messages}{text}}}".encode())
    assert 400 <= status < 500


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


async def test_images_are_never_dropped(http: Http, app: FakeVllm) -> None:
    messages = await converse(http, 1)
    app.render = lambda messages, **_: [5, END]
    messages[-1] = {"role": "user", "content": [IMAGE]}
    answer = await http.chat(messages)  # not of a rollout
    assert "images" in answer["trl_gym"]["drift"]["text"]
    assert "kv_transfer_params" not in app.chats()[-1]


@pytest.mark.parametrize("kind", ["image_url", "input_image", "input_audio", "video_url", "file"])
@pytest.mark.parametrize("num_turns", [0, 1])
async def test_media_in_a_rollout_are_refused(http: Http, app: FakeVllm, kind: str, num_turns: int) -> None:
    messages = await converse(http, num_turns)
    num_asked = len(app.chats())
    messages[-1] = {"role": "tool", "content": [{"type": "text", "text": "see"}, {"type": kind, kind: "x"}]}
    status, answer = await http("POST", "/v1/chat/completions", {"messages": messages, "trl_gym": TAG})
    assert status == 400 and "cannot be trained on" in answer["error"]["message"]
    assert "context length" not in answer["error"]["message"]  # Gym would end the rollout as if it were complete
    assert len(app.chats()) == num_asked
    assert (await http.records("r0"))[-1]["status"] == 400
    answer = await http.chat([{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}], trl_gym=TAG)
    assert answer["choices"]


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda messages: messages[2:],  # compacted: what came first is gone
        lambda messages: [{"role": "user", "content": "summary"}, *messages[1:]],
        lambda messages: [{"role": "system", "content": "be brief"}, *messages],
    ],
    ids=["dropped", "edited", "injected in front"],
)
async def test_a_rewritten_history_is_served_as_the_agent_means_it(
    http: Http, app: FakeVllm, rewrite: Callable[[list[Json]], list[Json]]
) -> None:
    messages = rewrite(await converse(http, 2))
    answer = await http.chat(messages, trl_gym=TAG)
    assert answer["trl_gym"]["drift"]["cause"] == "history_rewritten"
    bare = [{key: m[key] for key in ("role", "content")} for m in messages]
    assert answer["choices"][0]["message"]["prompt_token_ids"] == render(bare)


async def test_what_agents_do_to_sampled_turns_rewrites_nothing(http: Http) -> None:
    messages = await converse(http, 2)
    messages[1] |= {"content": "without its thinking", "reasoning_content": None}
    messages[0] = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    assert "trl_gym" not in await http.chat(messages, trl_gym=TAG)


@pytest.mark.parametrize("sends", ["nothing", "an empty message"])
async def test_an_empty_turn_that_the_agent_drops_is_put_back(http: Http, app: FakeVllm, sends: str) -> None:
    messages, seen = [USER], []
    for turn, reply in enumerate(["ok", "", "", "ok", "", "ok"]):
        app.reply = [*map(ord, reply), END]
        answer = await http.chat(messages, trl_gym=TAG)
        message = answer["choices"][0]["message"]
        assert message["prompt_token_ids"][: len(seen)] == seen
        assert "trl_gym" not in answer
        seen = message["prompt_token_ids"] + message["generation_token_ids"]
        if reply:
            messages.append(message)
        elif sends == "an empty message":
            messages.append({"role": "assistant", "content": ""})
        messages.append({"role": "user", "content": f"more {turn}"})
    assert "".join(map(chr, seen)) == "uhi\2aok\2umore 0\2a\2umore 1\2a\2umore 2\2aok\2umore 3\2a\2umore 4\2aok\2"


async def test_an_empty_first_turn_counts_into_the_budget(http: Http, app: FakeVllm) -> None:
    tag = {**TAG, "completion_budget": 20}
    app.reply = [END]
    first = (await http.chat([USER], trl_gym=tag))["choices"][0]["message"]
    second = await http.chat([USER, {"role": "user", "content": "more"}], trl_gym=tag)
    prompt = second["choices"][0]["message"]["prompt_token_ids"]
    assert prompt[: len(first["prompt_token_ids"]) + 1] == [*first["prompt_token_ids"], END]
    assert app.chats()[-1]["max_tokens"] == 20 - (len(prompt) - len(first["prompt_token_ids"]))


async def test_other_tools_than_before_are_a_rewritten_history(http: Http) -> None:
    messages = await converse(http, 1)
    tool = {"type": "function", "function": {"name": "late", "parameters": {}}}
    answer = await http.chat(messages, trl_gym=TAG, tools=[tool])
    assert "tools" in answer["trl_gym"]["drift"]["text"]


async def test_turns_that_are_not_recognized_are_reported(http: Http) -> None:
    messages = await converse(http, 2)
    edited = [{key: m[key] for key in ("role", "content")} for m in messages]
    edited[1]["content"] = edited[3]["content"] = "another"
    answer = await http.chat(edited, trl_gym=TAG)
    assert answer["trl_gym"]["drift"]["cause"] == "message_without_ids"
    assert answer["choices"][0]["message"]["prompt_token_ids"] == render(edited)
    answer = await http.chat([*messages[:2], *edited[2:]], trl_gym=TAG)  # the newest turn's only
    assert answer["trl_gym"]["drift"]["cause"] == "message_without_ids"
    assert (await http.counters())["served_as_rendered"] == 1


@pytest.mark.parametrize("form", ["handles", "no ids", "both in turn", "no ids, thinking"])
async def test_a_turn_is_continued_exactly_in_whatever_form_it_comes_back(http: Http, form: str) -> None:
    messages: list[Json] = [USER]
    for turn in range(5):
        answer = await http.slim_chat(messages, trl_gym=TAG)
        assert "trl_gym" not in answer and answer["prompt_token_ids"] is None
        message = answer["choices"][0]["message"]
        ((handle,), (same,), logprobs) = (message[f"{name}"] for name in TOKEN_KEYS)
        assert handle == same and -(2**53) < handle < 0 and logprobs == [0.0]
        if form == "no ids, thinking":
            message["content"] = f"<think>hm</think> {message['content']}"
        if form.startswith("no ids") or (form == "both in turn" and turn % 2):
            message = {key: value for key, value in message.items() if key not in TOKEN_KEYS}
        messages += [message, {"role": "user", "content": f"more {turn}"}]
    records = http.middleware._chat.book.calls("r0").records
    assert [record.tokens.parent for record in records if record.tokens] == [None, 0, 1, 2, 3]
    assert [record.prompt for record in records] == ["rendered", *["exact"] * 4]
    assert len(token_ids(records, 4)) == records[4].prompt_tokens + 3  # type: ignore[operator]


async def test_a_request_grows_with_its_text_and_not_with_its_tokens(http: Http, app: FakeVllm) -> None:
    app.max_model_len = 100_000
    app.reply = [*map(ord, "k" * 1000), END]
    messages: list[Json] = [{"role": "user", "content": "hi"}]
    for _ in range(5):
        message = (await http.slim_chat(messages, trl_gym=TAG))["choices"][0]["message"]
        messages += [message, {"role": "user", "content": "more"}]
    assert len(json.dumps(messages)) < 5 * 1000 + 6 * 250


async def test_a_handle_is_good_for_its_own_rollout_only(http: Http) -> None:
    message = (await http.slim_chat([USER], trl_gym=TAG))["choices"][0]["message"]
    more = [USER, message, {"role": "user", "content": "more"}]
    answer = await http.slim_chat(more, trl_gym={"rollout": "another"})
    assert http.middleware._chat.book.calls("another").records[0].tokens.parent is None  # type: ignore[union-attr]
    status, answer = await http("POST", "/v1/chat/completions", {"messages": more})
    assert status == 400 and "tag of the rollout" in answer["error"]["message"]


async def test_rollouts_of_the_same_tokens_are_told_apart(http: Http) -> None:
    for turn in range(3):
        for rollout in "ab":
            messages: list[Json] = [USER]
            for earlier in range(turn + 1):
                answer = await http.slim_chat(messages, trl_gym={"rollout": f"{rollout}{turn}"})
                assert "trl_gym" not in answer
                call = {"id": f"{rollout}{earlier}", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                messages += [
                    answer["choices"][0]["message"] | {"tool_calls": [call]},
                    {"role": "tool", "tool_call_id": call["id"], "content": "42"},
                ]


SOURCE = "{% for m in messages %}{{ m.role[0] ~ m.content ~ eos }}{% endfor %}"  # `render`, as far as it matters


async def test_texts_in_front_are_abbreviated_if_the_template_allows_it(http: Http, app: FakeVllm) -> None:
    app.chat_template, app.max_model_len = SOURCE, 500
    for _ in range(2):
        await converse(http, 3, user={"role": "user", "content": "a question of many words"})
    *_, (_, short) = [call for call in app.requests if call[0] == "/tokenize"]
    assert [message["content"] for message in short["messages"]] == ["zqx1", "ok", "more 0", "zqx0", "more 1"]
    counters = await http.counters()
    assert (counters["rendered_whole"], counters["rendered_abbreviated"]) == (1, 3)  # the first one is compared
    assert [path for path, _ in app.requests].count("/tokenizer_info") == 1


async def test_a_server_that_does_not_tell_its_template_renders_whole(http: Http) -> None:
    await converse(http, 3)
    counters = await http.counters()
    assert (counters["rendered_whole"], counters["rendered_abbreviated"]) == (2, 0)


async def test_a_server_that_renders_with_another_template_renders_whole(http: Http, app: FakeVllm) -> None:
    app.chat_template, app.max_model_len = SOURCE, 500
    app.render = lambda messages, **options: [*render(messages, **options), len(str(messages))]
    for _ in range(2):
        messages = await converse(http, 3, user={"role": "user", "content": "a question of many words"})
        assert messages[5]["prompt_token_ids"][-1] > 100
    assert (await http.counters())["rendered_abbreviated"] == 0


async def test_sampling_is_pinned(http: Http, app: FakeVllm) -> None:
    tag = {"rollout": "r", "sampling": {"temperature": 0.7, "top_p": 1.0, "top_k": None}}
    await http.chat([USER], temperature=0.1, top_k=5, trl_gym=tag)
    sent = app.chats()[-1]
    assert (sent["temperature"], sent["top_p"], "top_k" in sent, "trl_gym" in sent) == (0.7, 1.0, False, False)


OWN: Json = {
    "presence_penalty": 1.0,
    "frequency_penalty": 1.0,
    "logit_bias": {"5": 100},
    "allowed_token_ids": [5],
    "bad_words": ["no"],
    "min_tokens": 3,
    "thinking_token_budget": 5,
    "vllm_xargs": {"skew": 1},
    "response_format": {"type": "json_object"},
    "structured_outputs": {"choice": ["a"]},
    "guided_json": {"type": "object"},
    "tool_choice": "required",
    "regex": "a+",  # SGLang's, and as unknown to us as what a later engine has
}
PINNED: Json = {"min_p": 0.2, "repetition_penalty": 1.1}
TOOL: Json = {"type": "function", "function": {"name": "f", "strict": True}}
KEPT: Json = {"stop": ["x"], "ignore_eos": True, "parallel_tool_calls": False, "user": "me"}


@pytest.mark.parametrize("policy", [None, "strip", "allow", "refuse"])
@pytest.mark.parametrize("pinned_by", ["tag", "server", "nobody"])
async def test_sampling_of_an_agents_own(http: Http, app: FakeVllm, pinned_by: str, policy: str | None) -> None:
    """TRL computes the log-probabilities without it."""
    if pinned_by == "server":
        await http("POST", "/trl_gym/sampling", {"sampling": {"temperature": 0.7}})
    tag: Json = TAG if pinned_by == "tag" else {"rollout": "r0"}
    tag = {**tag, **({} if policy is None else {"agent_sampling": policy})}
    asked = {**KEPT, **OWN, **PINNED, "seed": 1, "tools": [TOOL, 5]}
    status, answer = await http("POST", "/v1/chat/completions", {"messages": [USER], "trl_gym": tag, **asked})
    [record] = await http.records("r0")
    names = sorted([*OWN, "seed", "tools.strict", *(PINNED if pinned_by != "nobody" else {})])
    assert record["own_sampling"] == names[:16]
    if policy == "refuse":
        assert (status, record["status"], app.chats()) == (400, 400, [])
        assert (
            "`gym_agent_sampling` is 'refuse'" in answer["error"]["message"] and "seed" in answer["error"]["message"]
        )
        return
    sent = app.chats()[-1]
    assert "seed" not in sent
    assert sent.keys() & PINNED.keys() == (PINNED.keys() if pinned_by == "nobody" else set())
    left = {**KEPT, **OWN} if policy == "allow" else KEPT
    assert {key: sent.get(key) for key in (KEPT | OWN)} == {key: left.get(key) for key in (KEPT | OWN)}
    assert sent["tools"] == ([TOOL, 5] if policy == "allow" else [{**TOOL, "function": {"name": "f"}}, 5])


async def test_a_seed_that_the_rollout_pins_is_sampled_with(http: Http, app: FakeVllm) -> None:
    tag = {**TAG, "sampling": {**TAG["sampling"], "seed": 5}}
    await http.chat([USER], trl_gym=tag, seed=1)
    assert app.chats()[-1]["seed"] == 5
    status, _ = await http("POST", "/trl_gym/sampling", {"sampling": {"seed": 5}})  # would be that of all rollouts
    assert status == 400


async def test_what_leaves_the_distribution_as_it_is_counts_as_nothing(http: Http, app: FakeVllm) -> None:
    neutral = {"presence_penalty": 0.0, "logit_bias": {}, "bad_words": [], "tool_choice": "auto", "seed": None}
    neutral |= {"response_format": {"type": "text"}, "structured_outputs": None, "temperature": 0.7, "top_p": 0.9}
    await http.chat([USER], trl_gym={**TAG, "agent_sampling": "refuse"}, **neutral)
    assert (await http.records("r0"))[0]["own_sampling"] == []
    await http.chat([USER], **OWN)  # of no rollout: as stock
    assert OWN.items() <= app.chats()[-1].items()


async def test_a_render_has_the_tools_that_are_sampled_with(http: Http, app: FakeVllm) -> None:
    await converse(http, 2, tools=[TOOL])
    assert all(not tool["function"].get("strict") for _, body in app.requests for tool in body.get("tools", ()))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be", "utf-8-sig", "escaped"])
async def test_no_encoding_hides_a_tag(http: Http, app: FakeVllm, path: str, encoding: str) -> None:
    """Servers find the encoding of JSON out, whatever the header says."""
    text = json.dumps({"messages": [USER], "prompt": "é", "trl_gym": TAG}, ensure_ascii=False)
    if encoding == "escaped":
        body = text.replace("trl_gym", "trl\\u005fgym").replace("0.7", "NaN").encode()
    else:
        body = text.encode(encoding)
    status, answer = await http("POST", path, body)
    assert status == 400 and answer["error"]["message"], answer
    assert not app.requests


async def test_bytes_that_are_no_text_are_said_to_be_that(http: Http) -> None:
    body = b'{"messages": [{"role": "user", "content": "\xff"}]}'
    status, answer = await http("POST", "/v1/chat/completions", body)
    assert status == 400 and "the body is not UTF-8" in answer["error"]["message"]


@pytest.mark.parametrize("number", [8, 8.0, "8", " 8 "])
@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens"])
async def test_a_token_limit_is_a_number_in_whatever_form(http: Http, app: FakeVllm, key: str, number: Any) -> None:
    await http.chat([USER], trl_gym={**TAG, "completion_budget": 5}, **{key: number})
    assert app.chats()[-1][key] == 5
    app.finish_reason = "tool_calls"
    await http.chat([USER], **{key: number})
    assert app.chats()[-1][key] == 8


JUNK = [5, "x", [1], {"a": 1}, True, 0, -1, 1.5, "", [], {}, [[1]], [None], "4096", 1e300]


BODY_KEYS = (
    *("chat_template_kwargs", "stream_options", "kv_transfer_params", "max_tokens", "max_completion_tokens"),
    *("reasoning_effort", "documents", "tools", "best_of", "use_beam_search", "stop", "top_logprobs"),
)
MESSAGE_KEYS = ("tool_calls", "tool_call_id", "reasoning", "name", "prompt_token_ids", "generation_token_ids")


@pytest.mark.parametrize("key", [*BODY_KEYS, *MESSAGE_KEYS])
@pytest.mark.parametrize("tag", [TAG | {"chat_template_kwargs": {"a": 1}}, None], ids=["tagged", "untagged"])
async def test_no_field_ends_in_a_traceback(http: Http, key: str, tag: Json | None) -> None:
    more: Json = {} if tag is None else {"trl_gym": tag}
    (choice,) = (await http.slim_chat([USER], **more))["choices"]
    for junk in JUNK:
        answered = choice["message"] | ({key: junk} if key in MESSAGE_KEYS else {})
        body = {"messages": [USER, answered, USER], **({key: junk} if key in BODY_KEYS else {})}
        for option in ({}, {"reasoning_effort": "low"}, {"stream": True, "stream_options": {}}):
            status, answer = await http("POST", "/v1/chat/completions", {**option, **body, **more})
            assert status in (200, 400), answer


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"trl_gym": TAG, "n": 2}, "n must be 1"),
        ({"trl_gym": TAG, "best_of": 4}, "best_of must be 1"),
        ({"trl_gym": TAG, "use_beam_search": True}, "use_beam_search must be false"),
        ({"trl_gym": TAG, "max_tokens": -1}, "max_tokens must be a positive integer"),
        ({"trl_gym": TAG, "max_completion_tokens": "many"}, "max_completion_tokens must be a positive integer"),
        ({"trl_gym": TAG, "max_tokens": True}, "max_tokens must be a positive integer"),
        ({"chat_template_kwargs": "x", "reasoning_effort": "low"}, "chat_template_kwargs must be an object"),
        ({"trl_gym": TAG, "stream": True, "stream_options": "x"}, "stream_options must be an object"),
        ({"kv_transfer_params": "x"}, "kv_transfer_params must be an object"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": 5}]}, "tool_calls must be a list"),
        ({"trl_gym": {"rollout": "r", "sampling": {"typical_p": 1}}}, "typical_p"),
        ({"trl_gym": {"rollout": "r", "budget": 1}}, "unknown keys: budget"),
        ({"trl_gym": {"sampling": {}}}, "rollout"),
        ({"trl_gym": {"rollout": "r", "completion_budget": 0}}, "completion_budget"),
        ({"trl_gym": {"rollout": "r", "sampling": [1]}}, "must be an object"),
        ({"messages": [{"role": "assistant", "content": "", "generation_token_ids": [1]}]}, "prompt_token_ids"),
        (
            {"messages": [{"role": "assistant", "prompt_token_ids": [-1], "generation_token_ids": [1]}]},
            "prompt_token_ids",
        ),
        (
            {"messages": [{"role": "assistant", "prompt_token_ids": [1.5], "generation_token_ids": [1]}]},
            "prompt_token_ids",
        ),
        ({"trl_gym": TAG, "messages": []}, "list of `messages`"),
        ({"trl_gym": TAG, "messages": "hi"}, "list of `messages`"),
    ],
)
async def test_a_contradiction_is_a_400_that_names_it(http: Http, body: Json, message: str) -> None:
    status, answer = await http("POST", "/v1/chat/completions", {"messages": [USER], **body})
    assert status == 400
    assert message in answer["error"]["message"]


async def test_a_request_that_is_nested_too_deeply_is_a_400(http: Http) -> None:
    for nested in (b'"content": ', b'"tools": '):
        deep = b"[" * 100_000 + b"]" * 100_000
        body = b'{"messages": [{"role": "user", "content": "hi"}], "trl_gym": {"rollout": "r0"}, "x": 1}'
        status, answer = await http("POST", "/v1/chat/completions", body.replace(b'"x": 1', nested + deep))
        assert status == 400 and "nested" in answer["error"]["message"]


async def test_a_body_of_very_many_objects_is_not_parsed(http: Http, app: FakeVllm) -> None:
    body = b'{"messages": [' + b"{}," * 2_000_000 + b'{}], "trl_gym": {"rollout": "r0"}}'
    status, answer = await http("POST", "/v1/chat/completions", body)
    assert status == 400 and "more than 2,000,000 lists and objects" in answer["error"]["message"]


async def test_nan_in_a_turn_of_a_rollout_is_a_400(http: Http) -> None:
    body = b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN, "trl_gym": {"rollout": "r"}}'
    status, answer = await http("POST", "/v1/chat/completions", body)
    assert (status, "NaN" in answer["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/messages", "/v1/chat/completions/", "/v1/chat/completions/batch", "/of/tomorrow"]
)
async def test_no_other_route_takes_turns_of_rollouts(http: Http, app: FakeVllm, path: str) -> None:
    status, answer = await http("POST", path, {"input": "hi", "trl_gym": TAG})
    assert (status, f"not to {path}:" in answer["error"]["message"]) == (400, True)
    header = {b"x-trl-gym-rollout": rollout_key(KEY, TAG).encode()}
    assert (await http("PUT", path, {"input": "hi"}, header))[0] == 400
    assert app.requests == []
    assert (await http("POST", path, {"input": 'what is "trl_gym"?'}))[0] == 404  # the server's own answer
    assert [called for called, _ in app.requests] == [path]
    assert (await http("POST", "/tokenize", {"messages": [USER]}, header))[0] == 200


@pytest.mark.parametrize("body", [{}, {"trl_gym": TAG}, {"trl_gym": TAG, "stream": True}])
async def test_the_servers_headers_come_with_its_answer(http: Http, app: FakeVllm, body: Json) -> None:
    app.headers = [(b"Access-Control-Allow-Origin", b"*"), (b"X-Request-Id", b"7"), (b"Content-Length", b"1")]
    await http("POST", "/v1/chat/completions", {"messages": [USER], **body})
    assert http.headers[2:] == app.headers[:2]
    app.chat_status = 400
    await http("POST", "/v1/chat/completions", {"messages": [USER], **body})
    assert http.headers[2:] == app.headers[:2]


async def test_thinking_that_is_not_asked_for_is_left_out_and_its_tokens_are_not(http: Http, app: FakeVllm) -> None:
    app.change_answer = lambda answer: answer["choices"][0]["message"].update(reasoning="so", reasoning_content="so")
    message = (await http.chat([USER], trl_gym=TAG, include_reasoning=False))["choices"][0]["message"]
    assert (message["reasoning"], message["reasoning_content"], message["content"]) == (None, None, "ok")
    assert message["generation_token_ids"] == app.reply
    assert "include_reasoning" not in app.chats()[-1]
    await http.chat([USER], include_reasoning=False)
    assert app.chats()[-1]["include_reasoning"] is False


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"top_logprobs": 2}, "when using `top_logprobs`, `logprobs` must be set to true."),
        ({"logprob_token_ids": [1]}, "when using `logprob_token_ids`, `logprobs` must be set to true."),
        ({"stream": "yes", "trl_gym": TAG}, "stream must be true or false, not 'yes'"),
        ({"stream": True, "stream_options": {"include_usage": 5}, "trl_gym": TAG}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": [1], "trl_gym": TAG}, "stream_options must be an object"),
    ],
)
async def test_what_the_server_would_refuse_and_does_not_see_is_refused(
    http: Http, app: FakeVllm, body: Json, said: str
) -> None:
    status, answer = await http("POST", "/v1/chat/completions", {"messages": [USER], **body})
    assert (status, said in answer["error"]["message"]) == (400, True)
    assert app.requests == []


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/trl_gym/rollouts/cancel", "/trl_gym/sampling"])
@pytest.mark.parametrize("kind", [b"text/plain", b"application/x-www-form-urlencoded", b""])
async def test_a_body_that_is_not_said_to_be_json_is_refused_as_by_vllm(
    http: Http, app: FakeVllm, path: str, kind: bytes
) -> None:
    status, answer = await http("POST", path, {"messages": [USER], "rollouts": []}, {b"content-type": kind})
    assert status == 400 and answer["error"]["type"] == "Bad Request"
    assert answer["error"]["message"].endswith("Only 'application/json' is allowed")
    assert app.requests == []


async def test_max_tokens_is_clamped_to_the_room(http: Http, app: FakeVllm) -> None:
    app.max_model_len = 10
    await http.chat([USER], trl_gym=TAG, max_tokens=100)
    assert app.chats()[-1]["max_tokens"] == 10 - len(render([USER]))
    await http.chat([USER], trl_gym=TAG, max_completion_tokens=2)
    assert app.chats()[-1]["max_completion_tokens"] == 2


async def test_the_budget_counts_all_that_follows_the_first_prompt(http: Http, app: FakeVllm) -> None:
    tag = {**TAG, "completion_budget": 20}
    messages = await converse(http, 1, trl_gym=tag, max_tokens=50)
    assert app.chats()[-1]["max_tokens"] == 20
    answer = await http.chat(messages, trl_gym=tag)
    used = len(answer["choices"][0]["message"]["prompt_token_ids"]) - len(render([USER]))
    assert app.chats()[-1]["max_tokens"] == 20 - used


async def test_overflow_is_the_400_that_ends_a_rollout_gracefully(http: Http, app: FakeVllm) -> None:
    messages = await converse(http, 1)
    app.max_model_len = 8
    http.middleware = guarded(app)
    status, answer = await http("POST", "/v1/chat/completions", {"messages": messages, "trl_gym": TAG})
    assert status == 400
    assert "maximum context length" in answer["error"]["message"]
    assert answer["error"]["code"] == 400
    assert (await http.counters())["overflows"] == 1


async def test_a_first_prompt_as_long_as_the_context_is_an_overflow(http: Http, app: FakeVllm) -> None:
    app.max_model_len = len(render([USER]))
    status, answer = await http("POST", "/v1/chat/completions", {"messages": [USER], "trl_gym": TAG})
    assert status == 400 and "maximum context length" in answer["error"]["message"]
    assert (await http.counters())["overflows"] == 1


async def test_an_untagged_request_is_answered_as_stock_plus_the_bundle(http: Http, app: FakeVllm) -> None:
    answer = await http.chat([USER], temperature=0.1, n=2, max_tokens=100)
    assert (app.chats()[-1]["temperature"], app.chats()[-1]["max_tokens"]) == (0.1, 100)
    assert not any(path == "/tokenize" for path, _ in app.requests)
    for choice in answer["choices"]:
        assert choice["logprobs"] is None and choice["token_ids"] is None
        assert choice["message"]["generation_token_ids"] == app.reply
    assert answer["prompt_token_ids"] is None
    asked = await http.chat([USER], logprobs=True, return_token_ids=True)
    assert asked["choices"][0]["logprobs"] and asked["choices"][0]["token_ids"] and asked["prompt_token_ids"]


async def test_a_handle_stands_for_the_logprobs_of_a_client_that_wants_ids(http: Http, app: FakeVllm) -> None:
    asked = {"logprobs": True, "trl_gym": TAG}
    assert (await http.slim_chat([USER], **asked))["choices"][0]["logprobs"]["content"]  # an agent that reads them
    answer = await http.slim_chat([USER], **asked, return_tokens_as_token_ids=True)  # as Gym's model server asks
    assert answer["choices"][0]["logprobs"] is None
    assert app.chats()[-1]["return_tokens_as_token_ids"]
    untagged = await http.chat([USER], logprobs=True, return_tokens_as_token_ids=True)
    assert untagged["choices"][0]["logprobs"]["content"]


@pytest.mark.parametrize("ids", [b'"\xff\xfe"', b"[1e999]", b'{"\xff": 1}'])
async def test_ids_of_no_text_are_no_failure_of_ours(http: Http, ids: bytes) -> None:
    sampled = b'{"role":"assistant","content":"a","prompt_token_ids":[1],"generation_token_ids":%s}' % ids
    end = b'{"role":"assistant","content":"b","prompt_token_ids":[1],"generation_token_ids":[2]}'
    body = b'{"messages":[%s,%s,{"role":"user","content":"c"}]}' % (sampled, end)
    status, _ = await http("POST", "/v1/chat/completions", body)
    assert status in (200, 400)


async def test_parameters_that_are_no_numbers_are_refused(http: Http) -> None:
    status, answer = await http("POST", "/trl_gym/sampling", b'{"sampling": {"temperature": NaN}}')
    assert status == 400 and "NaN is no JSON" in answer["error"]["message"]


async def test_streams_and_nonsense_go_through_untouched(http: Http, app: FakeVllm) -> None:
    await http("POST", "/v1/chat/completions", {"messages": [USER], "stream": True})
    assert "return_token_ids" not in app.chats()[-1]
    assert (await http("POST", "/v1/chat/completions", b"{nonsense stream"))[0] == 422
    assert (await http("POST", "/v1/chat/completions", b'{"stream": false}'))[0] == 400


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("logprob", -9999.0, "none of a probability"),  # what vLLM writes for minus infinity
        ("logprob", None, "none of a probability"),
        ("logprob", 3.5, "none of a probability"),  # a logit
        ("logprob", 10**400, "other things than logprobs"),
        ("token_ids", [1], "3 logprobs for 1 sampled tokens"),
        ("token_ids", [1, 2**40, 3], "answers as vLLM does not"),
        ("token_ids", [1, -2, 3], "answers as vLLM does not"),
        ("token_ids", [1, "2", 3], "answers as vLLM does not"),
        ("prompt_token_ids", [1, 2], "did not use the exact prompt"),
    ],
)
async def test_a_bundle_that_is_not_exact_is_a_500(
    http: Http, app: FakeVllm, key: str, value: Any, message: str
) -> None:
    messages = await converse(http, 1)

    def corrupt(answer: Json) -> None:
        choice = answer["choices"][0]
        place = {"logprob": choice["logprobs"]["content"][1], "token_ids": choice}.get(key, answer)
        place[key] = value

    app.change_answer = corrupt
    status, answer = await http("POST", "/v1/chat/completions", {"messages": messages, "trl_gym": TAG})
    assert status == 500
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"choices": []},
        {"choices": None},
        {"usage": [1]},
        {"usage": {"prompt_tokens": "5"}},
        {"usage": {"prompt_tokens_details": "x"}},
        {"usage": {"completion_tokens": 2**70}},
        {"metrics": {"queue_time_ms": "x"}},
        {"metrics": {"queue_time_ms": float("inf")}},
        {"weight_version": [3]},
        {"created": float("nan")},
    ],
    ids=str,
)
@pytest.mark.parametrize("tagged", [True, False])
async def test_an_answer_of_another_shape_is_a_500_and_no_record(
    http: Http, app: FakeVllm, change: Json, tagged: bool
) -> None:
    app.change_answer = lambda answer: answer.update(change)
    body = {"messages": [USER], **({"trl_gym": TAG} if tagged else {})}
    status, answer = await http("POST", "/v1/chat/completions", body)
    assert status == 500 and "answers as vLLM does not" in answer["error"]["message"]
    assert [one.status for one in await http.take("r0")] == ([500] if tagged else [])


async def test_an_answer_that_is_no_json_or_has_other_logprobs_is_a_500(
    http: Http, app: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for logprobs in ("x", {"content": 5}, {"content": [5, 5, 5]}, [1]):
        app.change_answer = lambda answer, logprobs=logprobs: answer["choices"][0].update(logprobs=logprobs)  # type: ignore[misc]
        status, _ = await http("POST", "/v1/chat/completions", {"messages": [USER], "trl_gym": TAG})
        assert status == 500
    app.change_answer = lambda answer: answer["choices"].append(answer["choices"][0])
    status, answer = await http("POST", "/v1/chat/completions", {"messages": [USER], "trl_gym": TAG})
    assert status == 500 and "2 answers for one" in answer["error"]["message"]

    async def send_text(scope: Json, receive: Any, send: Any) -> None:
        async def damage(message: Json) -> None:
            is_body = scope["path"] == "/v1/chat/completions" and message["type"] == "http.response.body"
            await send(message | {"body": b"<html>"} if is_body else message)

        await app(scope, receive, damage)

    http.middleware = guarded(send_text)
    status, answer = await http("POST", "/v1/chat/completions", {"messages": [USER], "trl_gym": TAG})
    assert status == 500 and "answers as vLLM does not" in answer["error"]["message"]


async def test_a_servers_own_version_is_recorded_as_text(http: Http, app: FakeVllm) -> None:
    real = app.answer
    app.answer = lambda path, body: (404, {}) if path == "/weight_info" else real(path, body)  # type: ignore[method-assign]
    app.change_answer = lambda answer: answer.update(weight_version=3)
    assert (await http.chat([USER], trl_gym=TAG))["weight_version"] == "3"
    assert [one.weight_version for one in await http.take("r0")] == ["3"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/trl_gym/rollouts/take", "/tokenize"])
async def test_a_body_without_end_is_a_413(
    http: Http, app: FakeVllm, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_read = 0

    async def receive() -> Json:
        nonlocal num_read
        num_read += 2**22
        assert num_read <= 2**27, "it is read on"
        return {"type": "http.request", "body": bytes(2**22), "more_body": True}

    sent: list[Json] = []

    async def send(message: Json) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(b"content-type", b"application/json"), BEARER],
    }
    await http.middleware(scope, receive, send)
    assert sent[0]["status"] == 413 and num_read > 2**26 and b"longer than 67,108,864 bytes" in sent[1]["body"]
    assert app.requests == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 80_000}], "trl_gym": TAG}),
        ("/v1/completions", {"prompt": "x" * 80_000, "trl_gym": TAG}),
        ("/tokenize", {"prompt": "x" * 80_000}),
        ("/tokenize", {"messages": [{"role": "tool", "content": [{"type": "text", "text": "x" * 80_000}]}]}),
    ],
)
async def test_a_prompt_that_no_context_holds_is_an_overflow_before_it_is_tokenized(
    http: Http, app: FakeVllm, path: str, body: Json
) -> None:
    app.longest_token = 399
    for _ in range(2):
        status, answer = await http("POST", path, body)
        said = "maximum context length is 200 tokens. However, you requested 0 output tokens and your prompt contains"
        assert status == 400 and f"{said} 80000 characters (more than 79800 characters" in answer["error"]["message"]
    # It is asked once how long a token is, by a request that cannot be served.
    asked = [
        body.get("max_tokens") for called, body in app.requests if called in ("/v1/completions", path, "/tokenize")
    ]
    assert asked == [199]
    if path != "/tokenize":
        assert (await http.counters())["overflows"] == 2


async def test_a_prompt_that_may_fit_is_tokenized(http: Http, app: FakeVllm) -> None:
    app.longest_token, thinking = 401, {"role": "assistant", "content": "<think>" + "x" * 100_000 + "</think>ok"}
    messages = [USER, thinking, {"role": "user", "content": "y" * 80_000}]  # templates leave thinking out
    status, answer = await http("POST", "/v1/chat/completions", {"messages": messages, "trl_gym": TAG})
    assert status == 400 and "the prompt of 180026 tokens leaves no room" in answer["error"]["message"]
    app.longest_token, http.middleware = None, OnPolicyMiddleware(app)  # where it is not told, tokens may be long
    assert (await http("POST", "/tokenize", {"prompt": "x" * 80_000}))[0] == 200
    app.engine, http.middleware = "sglang", OnPolicyMiddleware(app)  # might sample such a request
    assert (await http("POST", "/tokenize", {"prompt": "x" * 80_000}))[0] == 200
    assert [path for path, _ in app.requests].count("/v1/completions") == 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/update_weights", "/v1/audio/transcriptions"])
async def test_a_body_that_is_said_to_be_too_long_is_not_read(http: Http, app: FakeVllm, path: str) -> None:
    status, answer = await http("POST", path, b"{}", {b"content-length": b"67108865"})
    assert (status, answer["error"]["type"]) == (413, "RequestTooLargeError")
    assert app.requests == []


@pytest.mark.parametrize("status", [429, 502, 503, 504, 520])
async def test_a_status_that_gym_would_retry_for_ever_becomes_a_500(http: Http, app: FakeVllm, status: int) -> None:
    app.chat_status = status
    assert (await http("POST", "/v1/chat/completions", {"messages": [USER], "trl_gym": TAG}))[0] == 500


async def test_every_call_of_a_rollout_is_recorded(http: Http, app: FakeVllm) -> None:
    messages = await converse(http, 2)
    app.max_model_len = 5
    http.middleware._server_info.__init__()
    await http("POST", "/v1/chat/completions", {"messages": messages, "trl_gym": TAG})
    first, second, overflow = await http.records("r0")
    assert (first["prompt"], second["prompt"], overflow["status"]) == ("rendered", "exact", 400)
    assert "maximum context length" in overflow["error"]
    assert (second["prompt_tokens"], second["completion_tokens"]) == (len(messages[3]["prompt_token_ids"]), 3)
    assert second["cached_tokens"] == second["prompt_tokens"] - 1
    assert (second["queue_s"], second["prefill_s"], second["decode_s"]) == (0.001, 0.002, 0.003)
    assert (second["weight_version"], second["finish_reason"], second["drift"]) == ("default", "stop", None)
    assert second["seconds"] > 0
    taken = await http.take("r0")
    assert [(one.prompt, one.prompt_tokens) for one in taken[:2]] == [
        ("rendered", 5),
        ("exact", second["prompt_tokens"]),
    ]
    assert token_ids(taken, 0) == messages[1]["prompt_token_ids"] + messages[1]["generation_token_ids"]
    assert token_ids(taken, 1) == messages[3]["prompt_token_ids"] + messages[3]["generation_token_ids"]
    assert (await http.records("r0"), await http.take("r0")) == (
        [],
        taken,
    )  # again, for one who did not get the answer
    status, answer = await http("POST", "/v1/chat/completions", {"messages": [USER], "trl_gym": TAG})
    assert status == 400 and "context length" in answer["error"]["message"]  # a late call; nobody waits for it


def test_a_record_is_listed_without_a_look_at_its_tokens() -> None:
    record = CallRecord(status=200, prompt="exact", seconds=1.0, tokens=object())  # type: ignore[arg-type]
    listed = _without_tokens(record)
    assert "tokens" not in listed and listed["seconds"] == 1.0


async def test_a_cancelled_rollout_is_told_that_its_context_is_full(http: Http, app: FakeVllm) -> None:
    await converse(http, 1)
    assert (await http("POST", "/trl_gym/rollouts/cancel", {"rollouts": ["r0"]}))[1] == {"aborted": 0}
    status, answer = await http("POST", "/v1/chat/completions", {"messages": [USER], "trl_gym": TAG})
    assert status == 400
    assert "context length" in answer["error"]["message"] and "cancelled" in answer["error"]["message"]
    await http.chat([USER], trl_gym={"rollout": "another"})
    assert len(app.chats()) == 2


async def test_cancelling_hangs_up_on_the_engine(http: Http, app: FakeVllm) -> None:
    app.hangs = True
    running = asyncio.create_task(http("POST", "/v1/chat/completions", {"messages": [USER], "trl_gym": TAG}))
    while not app.chats():
        await asyncio.sleep(0)
    assert (await http("POST", "/trl_gym/rollouts/cancel", {"rollouts": ["r0"]}))[1] == {"aborted": 1}
    status, answer = await asyncio.wait_for(running, 5.0)
    assert (status, "cancelled" in answer["error"]["message"], app.disconnects) == (400, True, 1)
    assert (await http.counters())["cancelled"] == 1


@pytest.mark.parametrize(
    "path", ["/trl_gym/rollouts/records", "/trl_gym/rollouts/take", "/trl_gym/rollouts/cancel", "/trl_gym/sampling"]
)
async def test_the_control_plane_says_what_it_wants(http: Http, path: str) -> None:
    for body in (b"nonsense", b"[1]", b'{"rollouts": "r0", "sampling": 1}'):
        status, answer = await http("POST", path, body)
        assert status == 400
        assert answer["error"]["message"]


async def test_sampling_can_be_pinned_for_rollouts_that_bring_none(http: Http, app: FakeVllm) -> None:
    assert (await http("POST", "/trl_gym/sampling", {"sampling": {"temperature": 0.3}}))[0] == 200
    await http.chat([USER], temperature=0.9, trl_gym={"rollout": "r"})
    await http.chat([USER], temperature=0.9, trl_gym=TAG)
    await http.chat([USER], temperature=0.9)
    assert [chat["temperature"] for chat in app.chats()] == [0.3, 0.7, 0.9]


async def test_a_streamed_turn_is_answered_whole_as_a_stream(http: Http, app: FakeVllm) -> None:
    body = {"messages": [USER], "trl_gym": TAG, "stream": True, "stream_options": {"include_usage": True}}
    status, text = await http("POST", "/v1/chat/completions", body)
    *chunks, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    delta, finish, usage = map(json.loads, chunks)
    assert (status, done) == (200, "[DONE]")
    assert delta["choices"][0]["delta"]["content"] == "ok"
    (handle,) = delta["choices"][0]["delta"]["generation_token_ids"]
    [record] = http.middleware._chat.book.calls("r0").records
    assert record.tokens is not None and record.tokens.handle == handle and sampled_ids(record.tokens) == app.reply
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] == 3
    assert app.chats()[-1]["stream"] is False and "stream_options" not in app.chats()[-1]
    assert len(await http.records("r0")) == 1


async def test_the_weight_version_follows_an_update(http: Http, app: FakeVllm) -> None:
    assert (await http.chat([USER]))["weight_version"] == "default"
    await http("POST", "/finish_weight_update", {"weight_version": "7"})
    assert (await http.chat([USER]))["weight_version"] == "7"
    assert sum(path == "/weight_info" for path, _ in app.requests) == 2  # cached in between


async def test_a_call_that_spans_two_versions_says_so(http: Http, app: FakeVllm) -> None:
    sent, release = asyncio.Event(), asyncio.Event()
    app.change_answer = lambda answer: answer.pop("metrics")  # known is when it was sent and answered

    async def held(scope: Json, receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/chat/completions":
            sent.set()
            await release.wait()
        await app(scope, receive, send)

    http.middleware = guarded(held)
    assert (await http("GET", "/trl_gym/info"))[1]["weight_version"] == "default"

    async def push(version: str, call: asyncio.Task[Any], *, ends_first: bool) -> None:
        await sent.wait()
        if ends_first:
            release.set()
            await call
        assert (await http("POST", "/pause"))[0] == 200
        assert (await http("POST", "/finish_weight_update", {"weight_version": version}))[0] == 200
        assert (await http("POST", "/resume"))[0] == 200
        release.set()
        await call
        sent.clear()
        release.clear()

    for version, ends_first in (("7", False), ("8", True)):
        await push(version, asyncio.create_task(http.chat([USER], trl_gym=TAG)), ends_first=ends_first)
    release.set()
    assert (await http.chat([USER], trl_gym=TAG))["weight_version"] == "8"
    spans = [(one.weight_version, one.last_version) for one in await http.take("r0")]
    assert spans == [("default", "7"), ("7", None), ("8", None)]


async def test_an_update_whose_client_hangs_up_ends_all_the_same(http: Http, app: FakeVllm) -> None:
    async def cancellable(scope: Json, receive: Any, send: Any) -> None:
        """As vLLM's routes, of which some look out for a client that is gone."""
        first = await receive()
        listening = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        if not listening.done():
            await app(scope, partial(asyncio.sleep, 0, first), send)
        listening.cancel()

    http.middleware = guarded(cancellable)
    assert (await http.chat([USER]))["weight_version"] == "default"
    messages = [
        {"type": "http.request", "body": b'{"weight_version": "7"}', "more_body": False},
        *[{"type": "http.disconnect"}] * 2,
    ]

    async def receive() -> Json:
        return messages.pop(0)

    async def send(message: Json) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/finish_weight_update", "headers": [BEARER]}
    await http.middleware(scope, receive, send)
    assert app.weight_version == "7" == (await http.chat([USER]))["weight_version"]


async def test_with_a_key_every_route_but_health_demands_it(app: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_GYM_SERVER_API_KEYS", "first\nsecond")
    http = Http(app)
    http.middleware = OnPolicyMiddleware(app)
    for path in ("/trl_gym/info", "/v1/models", "/weight_info", "/metrics"):
        assert (await http("GET", path))[0] == 401
        assert (await http("GET", path, headers={b"authorization": b"Bearer wrong"}))[0] == 401
    assert (await http("GET", "/weight_info", headers={b"authorization": b"Bearer second"}))[0] == 200
    assert (await http("GET", "/trl_gym/info", headers={b"authorization": b"Bearer first"}))[0] == 200
    assert (await http("GET", "/health"))[0] == 200


async def test_the_first_class_field_is_used_where_there_is_one(
    app: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_GYM_PROMPT_FIELD", "1")
    await converse(Http(app), 2)
    assert "kv_transfer_params" not in app.chats()[-1]
    assert app.chats()[-1]["prompt_token_ids"]


ODD_ARGUMENTS = {
    "half a surrogate": '{"a": "\\udbea"}',
    "digits": '{"a": ' + "9" * 5000 + "}",
    "depth": "[" * 3000 + "]" * 3000,
    "no JSON": '{"a": ',
    "NaN": '{"a": NaN}',
    "1e999": '{"a": 1e999}',
}


def calling(arguments: str) -> Callable[[Json], None]:
    def change(answer: Json) -> None:
        [choice] = answer["choices"]
        choice["message"]["tool_calls"] = [{"id": "c", "function": {"name": "f", "arguments": arguments}}]
        choice["message"] |= {"content": None, "reasoning": "hm"}
        choice["finish_reason"] = "tool_calls"

    return change


@pytest.mark.parametrize("arguments", [*ODD_ARGUMENTS.values(), '{"a": "\udbea"}'], ids=[*ODD_ARGUMENTS, "raw half"])
@pytest.mark.parametrize("end", [True, False])
async def test_a_call_that_not_everyone_can_read_is_text(http: Http, app: FakeVllm, arguments: str, end: bool) -> None:
    """It is the policy's fault: the turn is answered, goes on from exact tokens, and the verifier sees it."""
    app.change_answer, app.reply = calling(arguments), [*map(ord, "so"), *([END] if end else [])]
    answer = await http.slim_chat([USER], trl_gym=TAG, tools=[TOOL], max_tokens=10 if end else 2)
    [choice] = answer["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("so", "stop" if end else "length")
    assert not choice["message"].get("tool_calls") and "reasoning" not in choice["message"]
    json.dumps(answer, ensure_ascii=False).encode()
    app.change_answer = lambda answer: None
    await http.chat([USER, choice["message"], USER], trl_gym=TAG, tools=[TOOL])
    first, second = await http.take("r0")
    assert second.tokens is not None and (second.tokens.parent, second.drift) == (0, None)
    assert sampled_ids(first.tokens) == app.reply


@pytest.mark.parametrize("arguments", ['{"a": "\\ud83d\\ude00 é"}', "", "[1]", "null", '{"a": "\\\\udbea"}'])
async def test_other_calls_are_passed_on_as_they_are(http: Http, app: FakeVllm, arguments: str) -> None:
    app.change_answer = calling(arguments)
    [choice] = (await http.slim_chat([USER], trl_gym=TAG, tools=[TOOL]))["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == arguments
    assert all(path != "/detokenize" for path, _ in app.requests)


@pytest.mark.parametrize(
    "text", ["'utf-8' codec can't encode '\\udbea': surrogates not allowed", "Internal Server Error"]
)
async def test_what_a_server_cannot_send_is_sampled_again_as_text(http: Http, app: FakeVllm, text: str) -> None:
    """One that is not ours has lost what it sampled. The prompt is the same, with its tools."""
    chat = app.chat
    app.chat = lambda request: chat(request) if request.get("tool_choice") == "none" else (500, {"detail": text})
    message = (await http.chat([USER], trl_gym=TAG, tools=[TOOL]))["choices"][0]["message"]
    assert message["content"] == "ok"
    assert [record["status"] for record in await http.records("r0")] == [200]
    status, _ = await http("POST", "/v1/chat/completions", {"messages": [USER], "trl_gym": TAG})
    assert status == 500  # without tools nothing is read, so that is not the reason


async def test_a_half_surrogate_that_a_tool_returns_is_sent_on_as_text(http: Http, app: FakeVllm) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "a \ud83d b"}], "trl_gym": TAG}).encode()
    assert (await http("POST", "/v1/chat/completions", body))[0] == 200
    assert app.chats()[-1]["messages"][0]["content"] == "a \\ud83d b"
