"""Keys of rollouts and of Gym: what they open, whose calls they make, and how they are refused."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy_server.fake_vllm import FakeVllm, Json
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings
from trl_gym.policy_server.middleware.identity import (
    CALLER_HEADER,
    KEY_PATTERN,
    PREFIX,
    ROLLOUT_HEADER,
    Gate,
    RefusedError,
    UntaggedCalls,
    UntaggedPolicy,
    gym_key,
    identity_of,
    rollout_key,
)

API_KEY, OTHER_KEY = "the-server's-key-1", "the-server's-key-2"
TAG = {"rollout": "r0", "sampling": {"temperature": 0.7, "top_p": 0.9}, "completion_budget": 50}
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
JUDGE = {CALLER_HEADER: "resources_servers/judge"}
AGENT = {CALLER_HEADER: "responses_api_agents/agent"}

names = st.text(min_size=1, max_size=40)
secrets = st.text(max_size=40)
tags = st.fixed_dictionaries(
    {"rollout": names},
    optional={
        "sampling": st.dictionaries(st.sampled_from(["temperature", "top_p"]), st.floats(0.1, 1), min_size=1),
        "completion_budget": st.integers(1, 10**6),
    },
)


def scope(path: str = CHAT, headers: Json | None = None, *, method: str = "POST", **more: Any) -> Json:
    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    return {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": raw, **more}


def bearer(key: str) -> Json:
    return {"authorization": f"Bearer {key}"}


class Server:
    """The middleware with an API key around a server that demands the same one."""

    def __init__(self, *api_keys: str) -> None:
        self.app = FakeVllm()
        self.inner: list[Json] = []
        self.middleware = OnPolicyMiddleware(self._inner, Settings(api_keys=api_keys))

    async def _inner(self, scope: Json, receive: Any, send: Any) -> None:
        self.inner.append(scope)
        await self.app(scope, receive, send)

    async def __call__(self, path: str, headers: Json, body: Json | None = None, method: str = "POST") -> Any:
        sent: list[Json] = []

        async def receive() -> Json:
            return {"type": "http.request", "body": json.dumps(body or {}).encode(), "more_body": False}

        async def send(message: Json) -> None:
            sent.append(message)

        headers = {"content-type": "application/json", **headers}
        await self.middleware(scope(path, headers, method=method), receive, send)
        return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]) or b"null")

    async def chat(self, headers: Json, path: str = CHAT, **body: Any) -> Any:
        return await self(path, headers, {"messages": [USER], **body})

    async def records(self, rollout: str) -> list[Json]:
        _, answer = await self("/trl_gym/rollouts/records", bearer(API_KEY), {"rollouts": [rollout], "forget": False})
        return answer["records"][rollout]

    async def untagged(self) -> Json:
        return (await self("/trl_gym/info", bearer(API_KEY), method="GET"))[1]["untagged_calls"]


@pytest.fixture
def server() -> Server:
    return Server(OTHER_KEY, API_KEY)


# -- the form of a key ------------------------------------------------------------------------------------------------


@given(secrets, tags)
def test_a_key_says_what_its_tag_says(secret: str, tag: Json) -> None:
    key = rollout_key(secret, tag)
    assert KEY_PATTERN.fullmatch(key)
    for one in (scope(headers=bearer(key)), scope(f"{PREFIX}{key}{CHAT}"), scope(headers=bearer(secret))):
        if one["headers"] == [(b"authorization", f"Bearer {secret}".encode())]:
            one["headers"].append((ROLLOUT_HEADER.encode(), key.encode()))
        Gate([secret] if secret else []).admit(one)
        assert identity_of(one).tag == tag
        assert one["path"] == CHAT and one["raw_path"] == CHAT.encode()


@given(secrets.filter(bool), tags, st.data())
def test_a_changed_key_is_refused(secret: str, tag: Json, data: st.DataObject) -> None:
    key = rollout_key(secret, tag)
    place = data.draw(st.integers(len("trlgym_"), len(key) - 1))
    letter = data.draw(st.sampled_from("abcABC012-_.").filter(lambda letter: letter != key[place]))
    changed = key[:place] + letter + key[place + 1 :]
    for one in (scope(headers=bearer(changed)), scope(f"{PREFIX}{changed}{CHAT}")):
        with pytest.raises(RefusedError) as refused:
            Gate([secret]).admit(one)
        assert refused.value.status == 401
        assert key not in str(refused.value) and changed not in str(refused.value)


@given(secrets.filter(bool), secrets.filter(bool), tags)
def test_a_key_of_another_server_is_refused(secret: str, other: str, tag: Json) -> None:
    if secret != other:
        with pytest.raises(RefusedError):
            Gate([secret]).admit(scope(headers=bearer(rollout_key(other, tag))))


@given(st.sampled_from(["bearer", "header", "prefix"]), st.sampled_from(["bearer", "header", "prefix"]), names, names)
def test_keys_of_two_rollouts_are_refused_together(one: str, two: str, first: str, second: str) -> None:
    keys = dict(zip((one, two), (rollout_key(API_KEY, {"rollout": name}) for name in (first, second)), strict=True))
    headers = bearer(keys.get("bearer", API_KEY))
    if "header" in keys:
        headers[ROLLOUT_HEADER] = keys["header"]
    asked = scope(f"{PREFIX}{keys['prefix']}{CHAT}" if "prefix" in keys else CHAT, headers)
    if one == two or first == second:
        Gate([API_KEY]).admit(asked)
        return
    with pytest.raises(RefusedError) as refused:
        Gate([API_KEY]).admit(asked)
    assert refused.value.status == 403
    assert first in str(refused.value) and second in str(refused.value)


def signed(claims: Any) -> str:
    return rollout_key(API_KEY, {"rollout": "r", **claims})


@pytest.mark.parametrize(
    "key",
    [
        signed({"gym": "error"}),
        signed({"sampling": "hot"}),
        signed({"more": 1}),
        signed({"rollout": None}),
        gym_key(API_KEY, "never"),  # type: ignore[arg-type]
    ],
)
def test_a_signed_key_that_says_something_else_is_refused(key: str) -> None:
    with pytest.raises(RefusedError) as refused:
        Gate([API_KEY]).admit(scope(headers=bearer(key)))
    assert refused.value.status == 401


@pytest.mark.parametrize("key", ["", "trlgym_", "trlgym_a.b", "x" * 10_000, "trlgym_" + "a" * 10_000 + "." + "b" * 43])
def test_what_is_no_key_opens_nothing(key: str) -> None:
    for one in (scope(headers=bearer(key)), scope(headers={**bearer(API_KEY), ROLLOUT_HEADER: key})):
        with pytest.raises(RefusedError):
            Gate([API_KEY]).admit(one)


# -- what a key opens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/trl_gym/info"),
        ("POST", "/trl_gym/rollouts/records"),
        ("POST", "/trl_gym/rollouts/cancel"),
        ("POST", "/trl_gym/sampling"),
        ("POST", "/trl_gym/adapters"),
        ("POST", "/pause"),
        ("POST", "/finish_weight_update"),
        ("POST", "/v1/load_lora_adapter"),
        ("GET", "/v1/chat/completions"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "/v1/../pause"),
    ],
)
async def test_control_routes_stay_closed(server: Server, method: str, path: str) -> None:
    key = rollout_key(API_KEY, TAG)
    for asked, headers in (
        (path, bearer(key)),
        (path, bearer(gym_key(API_KEY, "warn"))),
        (f"{PREFIX}{key}{path}", {}),
        (f"{PREFIX}{key}{path}", bearer("EMPTY")),
    ):
        status, answer = await server(asked, headers, method=method)
        assert status == 403, (asked, answer)
    assert (await server(path, {ROLLOUT_HEADER: key}, method=method))[0] == 401
    assert server.inner == []


async def test_a_websocket_is_closed(server: Server) -> None:
    sent: list[Json] = []

    async def send(message: Json) -> None:
        sent.append(message)

    for headers in ({}, bearer(rollout_key(API_KEY, TAG))):
        asked = scope("/v1/realtime", headers) | {"type": "websocket"}
        del asked["method"]
        await server.middleware(asked, None, send)  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"] * 2


async def test_a_rollout_reads_what_it_needs(server: Server) -> None:
    key = rollout_key(API_KEY, TAG)
    assert (await server("/v1/models", bearer(key), method="GET"))[0] == 200
    assert (await server(f"{PREFIX}{key}/tokenize", {}, {"messages": [USER]}))[0] == 200
    assert (await server("/health", {}, method="GET"))[0] == 200


async def test_the_server_gets_its_own_key_and_none_of_ours(server: Server) -> None:
    key = rollout_key(API_KEY, TAG)
    for headers, path in (
        ({**bearer(gym_key(API_KEY, "error")), ROLLOUT_HEADER: key, **AGENT}, CHAT),
        (bearer(key), CHAT),
        (bearer("dummy"), f"{PREFIX}{key}{CHAT}"),
    ):
        assert (await server.chat(headers, path))[0] == 200
    assert {scope["path"] for scope in server.inner} >= {CHAT}
    for scope_ in server.inner:
        assert (b"authorization", f"Bearer {OTHER_KEY}".encode()) in scope_["headers"]
        assert not KEY_PATTERN.search(str({name: scope_[name] for name in ("headers", "path", "raw_path")}))


# -- whose call it is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["body", "header", "bearer", "prefix"])
async def test_a_turn_is_pinned_bounded_and_recorded_wherever_its_tag_is(server: Server, place: str) -> None:
    key = rollout_key(API_KEY, TAG)
    headers = bearer(key if place == "bearer" else gym_key(API_KEY, "error"))
    if place == "header":
        headers[ROLLOUT_HEADER] = key
    own = {"temperature": 0.1, "top_p": 0.2, "max_tokens": 150}
    path = f"{PREFIX}{key}{CHAT}" if place == "prefix" else CHAT
    status, answer = await server.chat(headers, path, **own, **({"trl_gym": TAG} if place == "body" else {}))
    assert status == 200, answer
    asked = server.app.chats()[-1]
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"]) == (0.7, 0.9, 50)
    assert "trl_gym" not in asked
    assert len(await server.records("r0")) == 1
    assert await server.untagged() == {"gym": {}, "others": 0}


@pytest.mark.parametrize("place", ["body", "bearer"])
async def test_template_options_of_the_rollout_reach_the_template(server: Server, place: str) -> None:
    """An agent that drops `metadata` drops the run's `chat_template_kwargs` with it."""
    tag = TAG | {"chat_template_kwargs": {"enable_thinking": False}}
    headers = bearer(rollout_key(API_KEY, tag) if place == "bearer" else API_KEY)
    body = {"trl_gym": tag} if place == "body" else {}
    status, answer = await server.chat(headers, chat_template_kwargs={"enable_thinking": True, "own": 1}, **body)
    assert status == 200, answer
    assert server.app.chats()[-1]["chat_template_kwargs"] == {"enable_thinking": False, "own": 1}
    assert (await server.chat(headers, trl_gym={"rollout": "r0", "chat_template_kwargs": 1}))[0] == 400


@pytest.mark.parametrize("place", ["header", "bearer", "prefix"])
async def test_a_key_and_the_body_must_name_one_rollout(server: Server, place: str) -> None:
    key = rollout_key(API_KEY, TAG)
    headers = bearer(key) if place == "bearer" else bearer(API_KEY)
    if place == "header":
        headers[ROLLOUT_HEADER] = key
    path = f"{PREFIX}{key}{CHAT}" if place == "prefix" else CHAT
    status, answer = await server.chat(headers, path, trl_gym={"rollout": "r1"})
    assert status == 403
    assert "r0" in answer["error"]["message"] and "r1" in answer["error"]["message"]
    assert server.app.chats() == []
    # The same rollout is fine; what is signed counts.
    assert (await server.chat(headers, path, trl_gym={"rollout": "r0", "sampling": {"temperature": 0.1}}))[0] == 200
    assert server.app.chats()[-1]["temperature"] == 0.7


async def test_calls_of_a_judge_belong_to_their_rollout_and_are_no_turns(server: Server) -> None:
    headers = {**bearer(gym_key(API_KEY, "error")), ROLLOUT_HEADER: rollout_key(API_KEY, TAG), **JUDGE}
    status, _ = await server.chat(headers, temperature=0.1, max_tokens=150)
    assert status == 200
    asked = server.app.chats()[-1]
    assert (asked["temperature"], asked["max_tokens"]) == (0.1, 150)
    assert await server.records("r0") == []
    assert await server.untagged() == {"gym": {}, "others": 0}
    assert (await server("/v1/completions", headers, {"prompt": "x", "model": "policy"}))[0] == 200
    # It may quote a turn as it got it, handle and all.
    quoted = {"role": "assistant", "content": "ok", "prompt_token_ids": [-5], "generation_token_ids": [-5]}
    assert (await server.chat(headers, messages=[USER, quoted, USER]))[0] == 200
    assert server.app.chats()[-1]["messages"] == [USER, {"role": "assistant", "content": "ok"}, USER]
    # One that passes the tag on says itself that it makes a turn.
    assert (await server.chat(headers, trl_gym=TAG))[0] == 200
    assert len(await server.records("r0")) == 1
    assert (await server.chat(headers, trl_gym={"rollout": "r1"}))[0] == 403


@pytest.mark.parametrize("place", ["bearer", "prefix"])
@pytest.mark.parametrize("has_key", [True, False])
async def test_whoever_has_a_rollouts_key_makes_turns_of_it_and_nothing_else(place: str, has_key: bool) -> None:
    server = Server(API_KEY) if has_key else Server()
    key = rollout_key(API_KEY, TAG)
    headers, prefix = (bearer(key), "") if place == "bearer" else (bearer("dummy"), PREFIX + key)
    own = {"temperature": 0.1, "max_tokens": 150}
    assert (await server.chat({**headers, **JUDGE}, prefix + CHAT, **own))[0] == 200
    asked = server.app.chats()[-1]
    assert (asked["temperature"], asked["max_tokens"]) == (0.7, 50)
    [record] = await server.records("r0")
    assert record["caller"] is None
    for path in ("/v1/responses", "/v1/messages"):
        assert (await server(prefix + path, {**headers, **JUDGE}, {"prompt": "x"}))[0] == 400
    assert (await server(prefix + "/v1/completions", {**headers, **JUDGE}, {"prompt": "x"}))[0] == 200
    assert len(await server.records("r0")) == 2
    assert (await server.chat({**headers, **AGENT}, prefix + CHAT))[0] == 200
    assert (await server.records("r0"))[-1]["caller"] == "responses_api_agents/agent"


@pytest.mark.parametrize("caller", [JUDGE, AGENT, {}], ids=str)
async def test_a_key_and_a_tag_of_one_rollout_are_the_key(server: Server, caller: Json) -> None:
    key = rollout_key(API_KEY, TAG)
    headers = {**bearer(gym_key(API_KEY, "error")), ROLLOUT_HEADER: key, **caller}
    tag = {"rollout": "r0", "sampling": {"temperature": 0.1, "top_k": 1}, "completion_budget": 150}
    assert (await server.chat(headers, trl_gym=tag, max_tokens=150))[0] == 200
    asked = server.app.chats()[-1]
    assert (asked["temperature"], "top_k" in asked, asked["max_tokens"]) == (0.7, False, 50)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("end", ["cancel", "take"])
async def test_a_rollout_that_has_ended_makes_no_calls_at_all(server: Server, path: str, end: str) -> None:
    key = rollout_key(API_KEY, TAG)
    judge = {**bearer(gym_key(API_KEY, "warn")), ROLLOUT_HEADER: key, **JUDGE}
    body = {"messages": [USER], "prompt": "x"}
    if path in (CHAT, "/v1/completions"):  # which the fake has
        assert (await server(path, judge, body))[0] == 200
    ending = {"type": "http.request", "body": json.dumps({"rollouts": ["r0"]}).encode(), "more_body": False}

    async def receive() -> Json:
        return ending

    async def send(_message: Json) -> None:
        pass

    await server.middleware(
        scope(f"/trl_gym/rollouts/{end}", {**bearer(API_KEY), "content-type": "application/json"}), receive, send
    )
    num_asked = len(server.inner)
    status, answer = await server(path, judge, body)
    assert status == 400 and "has ended or was cancelled" in answer["error"]["message"]
    assert len(server.inner) == num_asked


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/invocations"])
async def test_turns_on_other_routes_are_refused(server: Server, path: str) -> None:
    key = rollout_key(API_KEY, TAG)
    for headers in (bearer(key), {**bearer(API_KEY), ROLLOUT_HEADER: key}):
        status, answer = await server(path, headers, {"prompt": "x"})
        if path == "/invocations" and headers == bearer(key):
            assert status == 403  # which the key does not open
            continue
        assert status == 400 and CHAT in answer["error"]["message"]
    assert server.inner == []


async def test_a_malformed_turn_is_refused_whoever_says_that_it_is_one(server: Server) -> None:
    status, _ = await server(CHAT, bearer(rollout_key(API_KEY, TAG)), {"messages": "hi"})
    assert status == 400
    assert server.app.chats() == []


# -- calls without a rollout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_gyms_calls_without_a_rollout_are_counted_and_refused(server: Server, path: str) -> None:
    headers = bearer(gym_key(API_KEY, "error"))
    for more in (AGENT, AGENT, {}):
        status, answer = await server(path, {**headers, **more}, {"messages": [USER], "prompt": "x"})
        assert status == 400
        assert "gym_untagged_calls" in answer["error"]["message"]
        assert ("responses_api_agents/agent" in answer["error"]["message"]) == bool(more)
        assert "context length" not in answer["error"]["message"]  # which ends a rollout gracefully
    assert await server.untagged() == {"gym": {"responses_api_agents/agent": 2, "": 1}, "others": 0}
    assert server.app.chats() == []


async def test_gyms_calls_without_a_rollout_are_served_where_that_is_chosen(server: Server) -> None:
    status, _ = await server.chat({**bearer(gym_key(API_KEY, "warn")), **AGENT}, temperature=0.1)
    assert status == 200
    assert server.app.chats()[-1]["temperature"] == 0.1
    assert await server.untagged() == {"gym": {"responses_api_agents/agent": 1}, "others": 0}


async def test_calls_of_others_are_served_as_ever(server: Server) -> None:
    assert (await server.chat(bearer(API_KEY), temperature=0.1))[0] == 200
    assert await server.untagged() == {"gym": {}, "others": 1}


async def test_names_of_callers_take_bounded_memory(server: Server) -> None:
    for number in range(100):
        await server.chat({**bearer(gym_key(API_KEY, "warn")), CALLER_HEADER: f"responses_api_agents/a{number}"})
    await server.chat({**bearer(gym_key(API_KEY, "warn")), CALLER_HEADER: "no\nname" * 100})
    counts = (await server.untagged())["gym"]
    assert sum(counts.values()) == 101 and len(counts) <= 65


@pytest.mark.parametrize("untagged", ["error", "warn"])
async def test_a_server_without_a_key_reads_keys_and_checks_none(untagged: UntaggedPolicy) -> None:
    server = Server()
    for key in (rollout_key(None, TAG), rollout_key("any", TAG)):
        assert (await server.chat(bearer(key)))[0] == 200
        assert server.app.chats()[-1]["temperature"] == 0.7
        assert (await server.chat(bearer(key), trl_gym={"rollout": "r1"}))[0] == 403
    assert (await server.chat({}))[0] == 200
    assert (await server.chat(bearer("EMPTY")))[0] == 200
    assert ((await server.chat(bearer(gym_key(None, untagged))))[0] == 200) == (untagged == "warn")


LOCAL = ("localhost", "LocalHost:8000", "a.localhost:1", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "10.0.0.5:80")
OPENED = (("GET", "/trl_gym/info"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/health"))


@pytest.mark.parametrize("host", LOCAL)
async def test_a_server_without_a_key_samples_for_programs_of_its_machine(host: str) -> None:
    server, headers = Server(), {"host": host}
    assert (await server.chat(headers))[0] == 200
    assert (await server.chat({**headers, "origin": f"http://{host}"}))[0] == 200  # a page that it serves itself
    for method, path in OPENED:
        assert (await server(path, headers, method=method))[0] in (200, 404), path
    _, answer = await server("/trl_gym/rollouts/records", headers, {"rollouts": ["r0"]})
    assert answer["records"] == {"r0": []}


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"host": "rebound.example:8000"}, "it is asked as 'rebound.example:8000'"),
        ({"host": "localhost.evil.example"}, "it is asked as"),
        ({"host": "127.0.0.1.evil.example:80"}, "it is asked as"),
        ({"host": "[::1"}, "it is asked as"),
        ({"host": ""}, "it is asked as ''"),
        ({"host": "127.0.0.1:8000", "origin": "https://evil.example"}, "a web page of 'https://evil.example' asks"),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:9000"}, "a web page of"),
        ({"host": "127.0.0.1:8000", "origin": "null"}, "a web page of 'null' asks"),
        ({"origin": "http://evil.example"}, "a web page of"),
    ],
)
async def test_a_server_without_a_key_answers_no_web_page(headers: Json, words: str) -> None:
    server = Server()
    for path, method in ((CHAT, "POST"), ("/v1/models", "GET"), (CHAT, "OPTIONS"), ("/health", "GET")):
        status, answer = await server(path, headers, method=method)
        assert status == 403 and words in answer["error"]["message"]
    assert server.inner == []
    keyed = Server(API_KEY)
    assert (await keyed.chat({**headers, **bearer(API_KEY)}))[0] == 200  # which no page knows


CONTROL = (
    "/pause",
    "/resume",
    "/sleep",
    "/collective_rpc",
    "/update_weights",
    "/trl_gym/adapters",
    "/trl_gym/sampling",
)


@pytest.mark.parametrize("path", [*CONTROL, "/reset_prefix_cache", "/v1/load_lora_adapter", "/pause/", "//pause"])
async def test_a_server_without_a_key_has_no_route_that_changes_it(path: str) -> None:
    server = Server()
    for headers in ({}, bearer("EMPTY"), bearer(gym_key(None, "warn")), bearer(rollout_key(None, TAG))):
        for method in ("POST", "PUT"):
            status, answer = await server(path, headers, method=method)
            assert status == 403 and path in answer["error"]["message"]
    assert server.inner == []
    assert (await server("/trl_gym/info", {}, method="GET"))[1]["has_key"] is False
    assert (await Server(API_KEY)("/trl_gym/info", bearer(API_KEY), method="GET"))[1]["has_key"] is True


counts = st.dictionaries(st.sampled_from(["", "a/b", "c/d"]), st.integers(1, 9))


@given(counts, st.integers(0, 9), counts, st.integers(0, 9))
def test_what_was_counted_meanwhile(first: Json, others: int, more: Json, more_others: int) -> None:
    before, meanwhile = UntaggedCalls(Counter(first), others), UntaggedCalls(Counter(more), more_others)
    after = UntaggedCalls(before.gym + meanwhile.gym, others + more_others)
    assert after.since(before) == meanwhile
    if first or others:
        assert UntaggedCalls().since(before) == UntaggedCalls(), "it has restarted"
