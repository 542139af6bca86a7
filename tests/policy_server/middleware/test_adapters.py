"""Adapters: who holds which, in any order of loads, calls and ends; and the routes around a fake server."""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import until
from tests.policy_server.adapter_folder import write_adapter
from tests.policy_server.fake_vllm import FakeVllm, Json
from tests.policy_server.middleware.test_app import TAG, USER, Http
from trl_gym.policy_server.middleware.adapters import Adapter, AdapterBook

HOUR = 3600.0
NAMES = st.sampled_from(["a", "b", "c"])
STEPS = st.one_of(
    st.just(("load",)),
    st.tuples(st.just("call"), st.one_of(st.none(), NAMES)),
    st.tuples(st.just("answer"), st.integers(0, 5)),
    st.tuples(st.just("release"), NAMES),
    st.just(("unload",)),
)


def adapter(version: int) -> Adapter:
    return Adapter(f"policy@{version}", f"policy@{version}#x", str(version), f"/adapters/{version}")


@given(st.lists(STEPS, max_size=40))
def test_what_is_used_is_never_idle_and_a_rollout_keeps_its_version(steps: list[tuple]) -> None:
    book, num_loaded = AdapterBook(), 0
    began_with: dict[str, Adapter | None] = {}
    running: list[tuple[ExitStack, Adapter | None]] = []
    for now, (step, *arguments) in enumerate(steps):
        if step == "load":
            book.add(adapter(num_loaded))
            num_loaded += 1
        elif step == "call":
            stack = ExitStack()
            given_adapter = stack.enter_context(book.serving(arguments[0], float(now)))
            expected = book.current if arguments[0] is None else began_with.setdefault(arguments[0], book.current)
            assert given_adapter is expected
            running.append((stack, given_adapter))
        elif step == "answer" and running:
            running.pop(arguments[0] % len(running))[0].close()
        elif step == "release":
            book.release([arguments[0]])
            began_with.pop(arguments[0], None)
        elif step == "unload":
            for one in book.idle():
                book.remove(one)
        used = [one for _, one in running] + list(began_with.values()) + [book.current]
        idle = [one.name for one in book.idle()]
        assert sorted(idle) == sorted(one.name for one in book.held if not any(one is other for other in used))
    for stack, _ in running:
        stack.close()
    book.release(list(began_with))
    assert [one.num_running or one.num_rollouts for one in book.held] == [0] * len(book.held)


def test_a_rollout_that_is_quiet_for_an_hour_lets_go() -> None:
    book = AdapterBook()
    book.add(adapter(0))
    with book.serving("quiet", 0.0):
        pass
    with book.serving("busy", HOUR):
        pass
    with book.serving("long", 0.0):
        book.add(adapter(1))
        book.expire(HOUR + 1)
        assert book.holders(5) == {"policy@0": ["busy", "long"]}
    book.expire(HOUR + 2)
    assert book.holders(5) == {"policy@0": ["busy"]}
    assert book.idle() == []


def test_retiring_forgets_every_holder() -> None:
    book = AdapterBook()
    book.add(adapter(0))
    with book.serving("a", 0.0) as running:
        book.retire()
        assert book.idle() == []  # its call is being answered
        with book.serving("a", 0.0) as again:
            assert again is None
    assert book.idle() == [running]


def test_names_are_those_of_the_newest() -> None:
    book = AdapterBook()
    first, again = adapter(0), adapter(0)
    book.add(first)
    book.add(again)
    assert book.named("policy@0") is again
    assert book.named("policy") is None
    assert book.holders(1) == {"policy@0": []}


ADAPTERS = "/trl_gym/adapters"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


async def load(http: Http, folder: Path, version: int, **more: object) -> tuple[int, Json]:
    body = {"name": f"policy@{version}", "path": str(folder), "version": str(version), **more}
    return await http("POST", ADAPTERS, body)


async def held(http: Http) -> list[str]:
    return [adapter["name"] for adapter in (await http("GET", "/trl_gym/info"))[1]["adapters"]["held"]]


def served(app: FakeVllm) -> list[str]:
    """Names that chats were sent to, without what makes them unique."""
    return [chat.get("model", "").partition("#")[0] for chat in app.chats()]


async def test_a_load_puts_a_version_into_service(http: Http, app: FakeVllm, folder: Path) -> None:
    before = await http.chat([USER])
    assert (before["model"], before["weight_version"]) == ("policy", "default")
    status, answer = await load(http, folder, 0)
    assert status == 200 and answer["current"] == "policy@0"
    assert list(app.adapters.values()) == [str(folder)]
    after = await http.chat([USER], model="policy")
    assert (after["model"], after["weight_version"]) == ("policy", "0")
    assert served(app) == ["", "policy@0"]
    info = (await http("GET", "/trl_gym/info"))[1]
    assert (info["weight_version"], info["model_names"]) == ("0", ["policy"])
    assert info["adapters"]["held"] == [
        {"name": "policy@0", "version": "0", "path": str(folder), "rollouts": 0, "running": 0}
    ]


async def test_a_rollout_keeps_its_version_until_its_records_are_taken(
    http: Http, app: FakeVllm, folder: Path
) -> None:
    await load(http, folder, 0)
    messages = [USER, (await http.chat([USER], trl_gym=TAG))["choices"][0]["message"], USER]
    await load(http, folder, 1)
    old = await http.chat(messages, trl_gym=TAG)
    new = await http.chat([USER], trl_gym={**TAG, "rollout": "r1"})
    assert (old["weight_version"], new["weight_version"]) == ("0", "1")
    assert served(app) == ["policy@0", "policy@0", "policy@1"]
    assert [record["weight_version"] for record in await http.records("r0")] == ["0", "0"]
    assert await held(http) == ["policy@0", "policy@1"]
    await http.take("r0")
    assert await held(http) == ["policy@1"]
    assert [name.partition("#")[0] for name in app.adapters] == ["policy@1"]


async def test_a_rollout_that_began_without_an_adapter_goes_on_without(
    http: Http, app: FakeVllm, folder: Path
) -> None:
    messages = [USER, (await http.chat([USER], trl_gym=TAG))["choices"][0]["message"], USER]
    await load(http, folder, 7)
    assert (await http.chat(messages, trl_gym=TAG))["weight_version"] == "default"
    assert served(app) == ["", ""]


async def test_a_cancelled_rollout_lets_go(http: Http, app: FakeVllm, folder: Path) -> None:
    await load(http, folder, 0)
    await http.chat([USER], trl_gym=TAG)
    await load(http, folder, 1)
    await http("POST", "/trl_gym/rollouts/cancel", {"rollouts": ["r0"]})
    assert await held(http) == ["policy@1"]


@pytest.mark.parametrize("end", ["take", "cancel"])
async def test_a_late_call_is_refused_and_holds_nothing(http: Http, app: FakeVllm, folder: Path, end: str) -> None:
    """Neither one that comes when its rollout has ended, nor one that has come before and was not served yet."""
    await load(http, folder, 0)
    await http.chat([USER], trl_gym=TAG)
    num_chats, may_answer = len(app.chats()), asyncio.Event()
    http.middleware._server_info.__init__()  # so that the next call has to ask first

    async def slow(scope: Json, receive: object, send: object) -> None:
        await (app(scope, receive, send) if scope["path"] != "/v1/models" else may_answer.wait())
        if scope["path"] == "/v1/models":
            await app(scope, receive, send)

    http.middleware.app = slow
    early = asyncio.create_task(http("POST", "/v1/chat/completions", {"messages": [USER], "trl_gym": TAG}))
    await until(lambda: bool(http.middleware._chat.book.num_running(["r0"])["r0"]))
    await http("POST", f"/trl_gym/rollouts/{end}", {"rollouts": ["r0"]})
    may_answer.set()
    late = await http("POST", "/v1/chat/completions", {"messages": [USER], "trl_gym": TAG})
    for status, answer in (await early, late):
        assert status == 400 and "has ended or was cancelled" in answer["error"]["message"]
    for version in (1, 2, 3):
        assert (await load(http, folder, version))[0] == 200
    assert (await held(http), len(app.chats())) == (["policy@3"], num_chats)


async def test_the_same_version_again_is_another_adapter(http: Http, app: FakeVllm, folder: Path) -> None:
    await load(http, folder, 0)
    await load(http, folder, 0)
    loaded = [body["lora_name"] for path, body in app.requests if path == "/v1/load_lora_adapter"]
    assert len(set(loaded)) == 2
    assert await held(http) == ["policy@0"]


async def test_no_room_is_waited_for_and_then_refused(http: Http, app: FakeVllm, folder: Path) -> None:
    await load(http, folder, 0)
    await http.chat([USER], trl_gym=TAG)
    await load(http, folder, 1)
    status, answer = await load(http, folder, 2)
    assert status == 409
    assert "2 adapters are loaded" in answer["error"]["message"] and "policy@0 by r0" in answer["error"]["message"]
    assert (await http.chat([USER]))["weight_version"] == "1"
    waiting = asyncio.create_task(load(http, folder, 2, wait_s=60))
    ended, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not ended
    await http.take("r0")  # answered although a load is waiting
    assert (await waiting)[0] == 200
    assert await held(http) == ["policy@2"]


async def test_a_bad_adapter_is_refused_before_the_server_sees_it(http: Http, app: FakeVllm, tmp_path: Path) -> None:
    status, answer = await load(http, write_adapter(tmp_path / "dora", use_dora=True), 0)
    assert status == 400 and "use_dora" in answer["error"]["message"]
    assert all(path != "/v1/load_lora_adapter" for path, _ in app.requests)
    for body in ({}, {"name": "x", "path": 3, "version": "1"}, {"name": "", "path": "/", "version": "1"}):
        assert (await http("POST", ADAPTERS, body))[0] == 400
    assert (await load(http, tmp_path, 0, max_adapters=True))[0] == 400


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        ((500, {"error": {"message": "rank 16 is greater"}}), 400, "rank 16 is greater"),
        ((404, {"detail": "Not Found"}), 400, "--enable-lora"),
        ((404, {"error": {"message": "Loading lora failed"}}), 400, "Loading lora failed"),
    ],
)
async def test_what_the_server_refuses_changes_nothing(
    http: Http, app: FakeVllm, folder: Path, error: tuple[int, Json], status: int, text: str
) -> None:
    await load(http, folder, 0)
    app.adapter_error = error
    answered, answer = await load(http, folder, 1)
    assert answered == status and text in answer["error"]["message"]
    assert (await http.chat([USER]))["weight_version"] == "0"
    assert app.weight_version == "0"


async def test_a_dead_server_is_no_bad_adapter(http: Http, app: FakeVllm, folder: Path, monkeypatch) -> None:
    answer = app.answer
    monkeypatch.setattr(app, "answer", lambda path, body: (503, {}) if path == "/health" else answer(path, body))
    app.adapter_error = (500, {"error": {"message": "EngineCore encountered an issue"}})
    assert (await load(http, folder, 0))[0] == 500


async def test_other_routes_and_names(http: Http, app: FakeVllm, folder: Path) -> None:
    await load(http, folder, 0)
    await load(http, folder, 1)
    for model, expected in (({}, "policy@1"), ({"model": "policy"}, "policy@1"), ({"model": "other"}, "other")):
        _, answer = await http("POST", "/v1/completions", {"prompt": [[1, 2]], **model})
        assert answer == {"model": model.get("model", "policy"), "prompt": [[1, 2]]}
        assert app.requests[-1][1]["model"].partition("#")[0] == expected
    assert (await http("POST", "/v1/completions", b"no JSON"))[0] == 422  # the server's own words
    status, answer = await http("POST", "/v1/chat/completions", {"messages": [USER], "model": "policy@1"})
    assert (status, answer["model"], answer["weight_version"]) == (200, "policy@1", "1")
    assert (await http("POST", "/v1/chat/completions", {"messages": [USER], "model": "policy@0"}))[
        0
    ] == 404  # unloaded
    await http("POST", "/v1/chat/completions", {"messages": [USER], "stream": True})
    assert served(app)[-1] == "policy@1"


async def test_a_whole_weight_update_ends_them_all(http: Http, app: FakeVllm, folder: Path) -> None:
    await load(http, folder, 3)
    await http("POST", "/finish_weight_update", {"weight_version": "9"})
    assert app.adapters == {}
    answer = await http.chat([USER], trl_gym=TAG)
    assert (answer["weight_version"], served(app)[-1]) == ("9", "")


async def test_clearing_gives_the_servers_own_version_back(http: Http, app: FakeVllm, folder: Path) -> None:
    await load(http, folder, 3)
    status, answer = await http("POST", f"{ADAPTERS}/clear")
    assert (status, answer) == (200, {"current": None, "held": []})
    assert app.weight_version == "default"
    assert (await http.chat([USER]))["weight_version"] == "default"


async def test_prompts_are_rendered_under_the_name_that_was_asked_for(http: Http, app: FakeVllm, folder: Path) -> None:
    await load(http, folder, 0)
    message = (await http.chat([USER], model="policy", trl_gym=TAG))["choices"][0]["message"]
    await http.chat([USER, message, USER], model="policy", trl_gym=TAG)
    rendered = {json.dumps(body.get("model")) for path, body in app.requests if path == "/tokenize"}
    assert rendered == {'"policy"'}
