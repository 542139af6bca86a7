"""`UpstreamApp` in front of real HTTP servers on loopback; the client's side is plain ASGI."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import until
from tests.policy_server.adapter_folder import write_adapter
from tests.policy_server.fake_upstream import Call, FakeUpstream, ask, serving, without_way_out
from trl_gym.policy_server.gateway import build_app
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings
from trl_gym.policy_server.upstreams import CONTROL_PATHS, UpstreamApp, UpstreamLostError
from trl_gym.rollouts.engine_metrics import engine_metrics, parse_counters

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "0"}]}).encode()
JSON = (b"content-type", b"application/json")
RETRIED_FOREVER = {429, 502, 503, 504, 520}


def served_by(call: Call) -> int:
    return int(call.headers[b"X-Served-By"])


# -- one upstream -----------------------------------------------------------------------------------------------------


async def test_a_request_and_its_answer_pass_unchanged() -> None:
    fake = FakeUpstream()
    async with serving(fake) as app:
        headers = [
            *((b"host", b"gateway"), (b"content-length", b"3"), (b"content-type", b"text/x"), (b"x-request-id", b"7")),
            *((b"connection", b"keep-alive, x-hop"), (b"x-hop", b"1"), (b"accept-encoding", b"gzip"), (b"te", b"x")),
        ]
        call = await ask(app, "PUT", "/a%2Fb/c?d=%20e&f", body=b"xyz", headers=headers)
        method, target, body, seen = fake.requests[-1]
        assert (method, target, body) == ("PUT", "/a%2Fb/c?d=%20e&f", b"xyz")
        assert (seen["host"], seen["content-type"], seen["x-request-id"]) == (fake.url[7:], "text/x", "7")
        assert seen["accept-encoding"] == "identity"
        assert not {"x-hop", "te", "authorization", "user-agent"} & set(seen)
        assert call.status == 200 and served_by(call) == fake.port
        assert not {b"x-private", b"connection"} & {name.lower() for name in call.headers}


async def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    without_way_out(monkeypatch)
    fake = FakeUpstream()
    async with serving(fake) as app:
        assert (await ask(app, "POST", CHAT, body=BODY)).status == 200 and fake.asked(CHAT) == 1


@pytest.mark.parametrize("status", [400, 404, 418, 429, 500, 502, 503, 504])
async def test_what_an_upstream_answers_is_passed_unchanged(status: int) -> None:
    fake = FakeUpstream(answers={"POST /v1/completions": (status, {"error": {"message": "so"}})})
    async with serving(fake) as app:
        call = await ask(app, "POST", "/v1/completions", body=b"{}")
        assert (call.status, call.json()) == (status, {"error": {"message": "so"}})
        assert app.upstreams[0].in_rotation and fake.asked("/v1/completions") == 1


async def test_one_whose_engine_hangs_is_out_of_rotation_until_it_answers() -> None:
    first, second = (FakeUpstream(answers={"GET /is_paused": (200, {"is_paused": False})}) for _ in range(2))
    async with serving(first, second, engine_timeout_s=1.0) as app:
        assert (await ask(app, "GET", "/is_paused")).json() == {"is_paused": False}
        first.hangs.add("/is_paused")
        await until(lambda: app.upstreams[0].down is not None)
        assert app.upstreams[0].down == "its engine has not answered for 1 s"
        asked = first.asked("/health")
        await until(lambda: first.asked("/health") > asked + 1)
        assert [one.in_rotation for one in app.upstreams] == [False, True], "its `/health` is not enough"
        second.answers["GET /is_paused"] = (200, {"is_paused": True})
        assert (await ask(app, "GET", "/is_paused")).json() == {"is_paused": True}
        first.hangs.clear()
        app.upstreams[0].mark_down("so that it is asked now")
        await until(lambda: app.upstreams[0].in_rotation)
        first.answers["GET /is_paused"] = (404, {})
        assert (await ask(app, "GET", "/is_paused")).status == 404, "one of them does not say"


async def test_a_question_to_all_and_a_control_call_wait_no_longer_for_one_that_hangs() -> None:
    first, second = (FakeUpstream(answers={"GET /is_paused": (200, {"is_paused": False})}) for _ in range(2))
    first.hangs |= {"/is_paused", "/pause"}
    async with serving(first, second, engine_timeout_s=1.0) as app:
        answers = await asyncio.gather(ask(app, "GET", "/is_paused"), ask(app, "GET", "/is_paused"))
        assert [answer.json() for answer in answers] == [{"is_paused": False}] * 2, "the other one has answered"
        assert app.upstreams[0].down == "its engine has not answered for 1 s"
        paused = await ask(app, "POST", "/pause")
        assert (
            paused.status == 500 and f"upstream {first.url} gave no answer to POST /pause: its engine" in paused.text
        )
        assert app.upstreams[0].excluded is not None and app.upstreams[1].in_rotation
        assert (await ask(app, "GET", "/is_paused")).status == 200


def completion(message: Any = None, logprob: Any = -1, **fields: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "x"} if message is None else message
    choice = {"message": message, "token_ids": [1], "logprobs": {"content": [{"logprob": logprob}]}}
    return {"prompt_token_ids": [1], "choices": [choice], **fields}


ODD: dict[str, tuple[int, Any]] = {
    "HTML": (200, b"<html>"),
    "garbage": (200, b"\xff\xfe\x00"),
    "a list": (200, [1]),
    "text": (200, "x"),
    "nested": (200, b"[" * 100_000),
    "no choices": (200, {"prompt_token_ids": [1]}),
    "choices are null": (200, {"prompt_token_ids": [1], "choices": None}),
    "a choice is text": (200, {"prompt_token_ids": [1], "choices": ["x"]}),
    "a message is a number": (200, completion(5)),
    "ids are text": (200, completion(prompt_token_ids=["a"])),
    "a logit": (200, completion(logprob=3.5)),
    "a number of 400 digits": (200, completion(logprob=-int("9" * 400))),
    "a logprob is text": (200, completion(logprob="-1")),
    "204": (204, b""),
    "206": (206, completion()),
    "307": (307, {}),
    "429": (429, {"error": {"message": "busy"}}),
    "503 of HTML": (503, b"<h1>no</h1>"),
}


@pytest.mark.parametrize("odd", ODD)
async def test_an_odd_answer_to_a_turn_is_an_error_with_its_cause(odd: str) -> None:
    fake = FakeUpstream()
    async with serving(fake) as app:
        front = build_app(app, Settings(api_keys=("k",)))
        fake.answers["POST /v1/chat/completions"] = ODD[odd]
        body = {"messages": [{"role": "user", "content": "hi"}], "trl_gym": {"rollout": "r0"}}
        headers = [JSON, (b"authorization", b"Bearer k")]
        call = await ask(front, "POST", "/v1/chat/completions", body=json.dumps(body).encode(), headers=headers)
        assert call.status == 500
        assert re.search("as vLLM does not|neither an answer|redirects|logprob|busy|<h1>no", call.text)


async def test_a_redirect_of_an_upstream_is_neither_followed_nor_passed_on() -> None:
    there, fake = await FakeUpstream().start(), FakeUpstream()
    async with serving(fake) as app:
        fake.redirects_to = there.url
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/pause")):
            call = await ask(app, method, path)
            assert call.status == 500 and f"redirects to 127.0.0.1:{there.port}" in call.text
            assert b"location" not in {name.lower() for name in call.headers}
    assert there.requests == []
    await there.stop()


@pytest.mark.parametrize("key", ["upstream-key", None])
async def test_the_clients_key_is_replaced(key: str | None) -> None:
    fake = FakeUpstream()
    async with serving(fake, api_key=key) as app:
        await ask(app, "GET", "/v1/models", headers=[(b"authorization", b"Bearer client-key")])
        assert fake.requests[-1][3].get("authorization") == (f"Bearer {key}" if key else None)


async def test_events_arrive_as_they_are_sent() -> None:
    fake = FakeUpstream()
    async with serving(fake) as app:
        call = Call(app, "GET", "/sse")
        await until(lambda: call.chunks)
        assert call.text == "data: 1\n\n" and not call.is_complete
        assert call.headers[b"Content-Type"] == b"text/event-stream"
        fake.go_on.set()
        await call.done()
        assert call.text == "data: 1\n\ndata: 2\n\n" and call.is_complete


@pytest.mark.parametrize("path", [CHAT, "/pause"])
async def test_a_client_that_hangs_up_cancels_the_upstreams_work(path: str) -> None:
    fake = FakeUpstream(hangs={path})
    async with serving(fake) as app:
        call = Call(app, "POST", path, body=BODY)
        await until(lambda: fake.asked(path))
        call.hang_up()
        await call.done()
        await until(lambda: fake.cancelled)
        assert call.status is None and app.upstreams[0].num_running == 0
        assert app.upstreams[0].in_rotation == (path == CHAT)  # nobody knows whether it is paused


async def test_cutting_off_answers_whoever_waits() -> None:
    fake = FakeUpstream(hangs={CHAT})
    async with serving(fake) as app:
        waiting, streaming = Call(app, "POST", CHAT, body=BODY), Call(app, "GET", "/sse")
        await until(lambda: fake.asked(CHAT) and streaming.chunks)
        app.cut_off()
        await waiting.done()
        assert waiting.status == 500 and "shutting down" in waiting.text
        with pytest.raises(UpstreamLostError, match="shutting down"):
            await streaming.done()
        assert (await ask(app, "POST", CHAT)).status == 500
        await until(lambda: fake.cancelled)


async def test_an_answer_that_breaks_off_is_never_completed() -> None:
    fake = FakeUpstream(breaks_off={CHAT})
    async with serving(fake) as app:
        call = Call(app, "POST", CHAT, body=BODY)
        with pytest.raises(UpstreamLostError, match="broke off its answer to POST /v1/chat/completions"):
            await call.done()
        assert not call.is_complete and fake.asked(CHAT) == 1


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/update_weights"])
async def test_an_answer_without_end_is_not_passed_on(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_gym.policy_server.upstreams.MAX_BODY_BYTES", 10_000)
    fake = FakeUpstream(answers={f"{method} {path}": (200, {"x": "y" * 2_000_000}) for method in ("GET", "POST")})
    async with serving(fake) as app:
        call = Call(app, "GET" if path == "/v1/models" else "POST", path, body=BODY)
        if path in CONTROL_PATHS:
            assert "longer than 10,000 bytes" in (await call.done()).text and call.status == 500
        else:
            with pytest.raises(UpstreamLostError, match="longer than 10,000 bytes"):
                await call.done()


async def test_a_request_without_end_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_gym.policy_server.upstreams.MAX_REQUEST_BYTES", 1000)
    fake = FakeUpstream()
    async with serving(fake) as app:
        assert (await ask(app, "POST", CHAT, body=bytes(3000))).status == 413
        assert fake.asked(CHAT) == 0


async def test_what_is_no_path_never_becomes_a_host_name() -> None:
    async with serving(FakeUpstream()) as app:
        assert (await ask(app, "OPTIONS", "*")).status == 400
        assert (await ask(app, "GET", "@elsewhere/")).status == 400


async def test_a_websocket_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    await UpstreamApp(["http://127.0.0.1:1"])({"type": "websocket", "path": "/"}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_lifespan_starts_and_closes_it() -> None:
    fake = await FakeUpstream().start()
    app = UpstreamApp([fake.url])
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    life = asyncio.create_task(app({"type": "lifespan"}, inbox.get, send))
    inbox.put_nowait({"type": "lifespan.startup"})
    await until(lambda: sent)
    assert (await ask(app, "GET", "/version")).json() == {"version": "0.31.0"}
    inbox.put_nowait({"type": "lifespan.shutdown"})
    await life
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    await fake.stop()


# -- routing ----------------------------------------------------------------------------------------------------------


async def test_a_rollout_stays_where_it_is_and_only_the_lost_upstreams_rollouts_move() -> None:
    fakes = [FakeUpstream() for _ in range(3)]
    async with serving(*fakes) as app:

        async def homes() -> dict[str, int]:
            keys = [f"rollout-{i}" for i in range(60)]
            calls = await asyncio.gather(*(ask(app, "POST", CHAT, body=BODY, affinity=key) for key in keys))
            assert {call.status for call in calls} == {200}
            return dict(zip(keys, map(served_by, calls), strict=True))

        before = await homes()
        assert before == await homes()
        assert set(Counter(before.values())) == {fake.port for fake in fakes}
        assert min(Counter(before.values()).values()) >= 3  # their ports, which are others each time, decide
        await fakes[1].stop()
        after = await homes()
        moved = {key for key in before if before[key] != after[key]}
        assert moved == {key for key, home in before.items() if home == fakes[1].port}
        await fakes[1].start()
        await until(lambda: app.upstreams[1].in_rotation)
        assert await homes() == before
        # The order of the upstreams on the command line decides nothing.
        app.upstreams.reverse()
        assert await homes() == before


async def test_without_affinity_the_least_busy_one_is_asked() -> None:
    fakes = [FakeUpstream(hangs={CHAT}) for _ in range(3)]
    async with serving(*fakes) as app:
        calls = [Call(app, "POST", CHAT, body=BODY) for _ in range(6)]
        await until(lambda: sum(fake.asked(CHAT) for fake in fakes) == 6)
        assert [fake.asked(CHAT) for fake in fakes] == [2, 2, 2]
        for call in calls:
            call.hang_up()
            await call.done()
        one_after_the_other = [served_by(await ask(app, "POST", "/detokenize", body=b"{}")) for _ in range(3)]
        assert len(set(one_after_the_other)) == 3
        assert len({served_by(await ask(app, "GET", "/version")) for _ in range(3)}) == 1


# -- failover ---------------------------------------------------------------------------------------------------------


async def test_an_upstream_that_dies_under_a_request_is_replaced() -> None:
    fakes = [FakeUpstream(hangs={CHAT}), FakeUpstream(hangs={CHAT})]
    async with serving(*fakes) as app:
        call = Call(app, "POST", CHAT, body=BODY)
        await until(lambda: fakes[0].asked(CHAT) + fakes[1].asked(CHAT))
        dead, other = fakes if fakes[0].asked(CHAT) else fakes[::-1]
        other.hangs.clear()
        await dead.stop()
        await call.done()
        assert call.status == 200 and served_by(call) == other.port
        assert other.requests[-1][2] == BODY
        await dead.start()
        await until(lambda: all(upstream.in_rotation for upstream in app.upstreams))


async def test_a_reset_connection_is_tried_elsewhere_and_the_live_upstream_stays() -> None:
    fakes = [FakeUpstream(breaks={CHAT}), FakeUpstream()]
    async with serving(*fakes) as app:
        for _ in range(4):
            assert served_by(await ask(app, "POST", CHAT, body=BODY)) == fakes[1].port
        assert fakes[0].asked(CHAT) and all(upstream.in_rotation for upstream in app.upstreams)


async def test_a_request_that_kills_servers_does_not_kill_them_all() -> None:
    fakes = [FakeUpstream(breaks={CHAT}) for _ in range(4)]
    async with serving(*fakes) as app:
        call = await ask(app, "POST", CHAT, body=BODY, affinity="poison")
        assert call.status == 500 and "it may be what ended them" in call.text
        assert sum(fake.asked(CHAT) for fake in fakes) == 2


async def test_a_single_upstream_is_asked_again_after_a_lost_connection() -> None:
    fake = FakeUpstream(breaks={CHAT})
    async with serving(fake) as app:
        assert (await ask(app, "POST", CHAT, body=BODY)).status == 500
        assert fake.asked(CHAT) == 2
        fake.breaks.clear()
        assert (await ask(app, "POST", CHAT, body=BODY)).status == 200


async def test_nobody_left_is_a_500_that_names_them_and_they_come_back() -> None:
    fakes = [FakeUpstream(), FakeUpstream()]
    async with serving(*fakes) as app:
        for fake in fakes:
            await fake.stop()
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/weight_info"), ("POST", "/pause")):
            call = await ask(app, method, path, body=b"{}")
            assert call.status == 500
            assert all(fake.url in call.text for fake in fakes) or path == "/pause"
        assert "down (" in (await ask(app, "POST", CHAT)).text or "excluded (" in (await ask(app, "POST", CHAT)).text
        assert (await ask(app, "GET", "/health")).status == 503


async def test_health() -> None:
    fakes = [FakeUpstream(), FakeUpstream()]
    async with serving(*fakes) as app:
        fakes[0].health = 503  # its engine is dead
        await until(lambda: not app.upstreams[0].in_rotation)
        assert (await ask(app, "GET", "/health")).status == 200
        assert {served_by(await ask(app, "POST", CHAT, body=BODY)) for _ in range(4)} == {fakes[1].port}
        fakes[1].health = 500
        await until(lambda: not app.upstreams[1].in_rotation)
        call = await ask(app, "GET", "/health")
        assert call.status == 503 and "GET /health: HTTP 503" in call.text
        fakes[0].health = 200
        await until(lambda: app.upstreams[0].in_rotation)
        assert (await ask(app, "GET", "/health")).status == 200


async def test_a_hanging_upstream_does_not_keep_the_others_from_answering() -> None:
    fakes = [FakeUpstream(hangs={CHAT}), FakeUpstream()]
    async with serving(*fakes) as app:
        stuck = Call(app, "POST", CHAT, body=BODY)
        await until(lambda: fakes[0].asked(CHAT) or stuck.status)
        calls = await asyncio.gather(*(ask(app, "POST", "/detokenize", body=b"{}") for _ in range(20)))
        assert {call.status for call in calls} == {200}
        stuck.hang_up()
        await stuck.done()


# -- control calls ----------------------------------------------------------------------------------------------------


async def control(app: UpstreamApp, *paths: str, version: str = "1") -> list[int | None]:
    body = json.dumps({"weight_version": version}).encode()
    return [(await ask(app, "POST", path, body=body)).status for path in paths]


UPDATE = ("/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume")


@pytest.mark.parametrize("path", sorted(CONTROL_PATHS))
async def test_a_control_call_reaches_all(path: str) -> None:
    fakes = [FakeUpstream() for _ in range(3)]
    async with serving(*fakes) as app:
        call = await ask(app, "POST", f"{path}?mode=wait", body=b'{"weight_version": "9"}')
        assert call.status == 200
        for fake in fakes:
            asked = [(body, target) for _, target, body, _ in fake.requests if target.startswith(path)]
            assert asked == [(b'{"weight_version": "9"}', f"{path}?mode=wait")]


async def test_a_prefix_cache_that_one_upstream_could_not_reset_is_reported() -> None:
    answers = {"POST /reset_prefix_cache": (200, {"success": False})}
    async with serving(FakeUpstream(), FakeUpstream(answers=answers)) as app:
        assert (await ask(app, "POST", "/reset_prefix_cache")).json() == {"success": False}


async def test_the_worst_answer_is_a_500_and_excludes_until_a_whole_update_has_succeeded() -> None:
    fakes = [FakeUpstream() for _ in range(3)]
    async with serving(*fakes) as app:
        fakes[1].answers["POST /update_weights"] = (503, {"error": {"message": "no such file"}})
        await control(app, "/pause", "/start_weight_update")
        call = await ask(app, "POST", "/update_weights", body=b"{}")
        assert call.status == 500
        assert f"upstream {fakes[1].url} answered HTTP 503 to POST /update_weights" in call.text
        assert "no such file" in call.text and fakes[1].asked("/update_weights") == 1
        assert not app.upstreams[1].in_rotation
        fakes[1].answers.clear()
        # The rest of the update that failed does not make its weights whole.
        assert await control(app, "/finish_weight_update", "/resume") == [200, 200]
        assert {served_by(await ask(app, "POST", CHAT, body=BODY)) for _ in range(6)} == {
            fakes[0].port,
            fakes[2].port,
        }
        assert await control(app, *UPDATE, version="2") == [200] * 5
        assert all(upstream.in_rotation for upstream in app.upstreams)


async def test_an_upstream_that_missed_an_update_never_serves_old_weights() -> None:
    fakes = [FakeUpstream(), FakeUpstream()]
    async with serving(*fakes) as app:
        await fakes[0].stop()
        call = await ask(app, "POST", "/start_weight_update", body=b"{}")
        assert call.status == 500 and f"{fakes[0].url} gave no answer" in call.text
        await fakes[0].start()
        await until(lambda: app.upstreams[0].down is None)
        probes = fakes[0].asked("/health") + 3
        await until(lambda: fakes[0].asked("/health") >= probes)
        assert not app.upstreams[0].in_rotation
        assert {served_by(await ask(app, "POST", CHAT, body=BODY)) for _ in range(4)} == {fakes[1].port}


async def test_a_restarted_upstream_is_excluded_by_its_weight_version() -> None:
    fakes = [FakeUpstream(), FakeUpstream()]
    async with serving(*fakes) as app:
        assert await control(app, *UPDATE, version="7") == [200] * 5
        await fakes[0].stop()
        await until(lambda: app.upstreams[0].down)
        fakes[0].weight_version = "default"
        await fakes[0].start()
        await until(lambda: app.upstreams[0].down is None)
        assert "restarted and holds weights 'default' where it held '7'" in (app.upstreams[0].excluded or "")
        assert (await ask(app, "GET", "/weight_info")).json() == {"weight_version": "7"}
        assert await control(app, *UPDATE, version="8") == [200] * 5
        assert app.upstreams[0].in_rotation


async def load_adapter(app: UpstreamApp, folder: Path, version: int) -> Call:
    """Through the gateway's middleware, which is what the trainer asks."""
    body = json.dumps({"name": f"policy@{version}", "path": str(folder), "version": str(version)}).encode()
    front, headers = OnPolicyMiddleware(app, Settings(api_keys=("k",))), [JSON, (b"authorization", b"Bearer k")]
    call = await ask(front, "POST", "/trl_gym/adapters", body=body, headers=headers)
    assert call.status == 200, call.text
    return call


async def test_an_adapter_reaches_every_upstream_and_admits_one_that_was_restarted(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    fakes = [FakeUpstream(), FakeUpstream()]
    async with serving(*fakes) as app:
        await load_adapter(app, folder, 1)
        assert [fake.weight_version for fake in fakes] == ["1", "1"]
        loaded = [body for fake in fakes for _, path, body, _ in fake.requests if path == "/v1/load_lora_adapter"]
        assert len(loaded) == 2 and loaded[0] == loaded[1] and str(folder).encode() in loaded[0]
        await fakes[0].stop()
        await until(lambda: app.upstreams[0].down)
        fakes[0].weight_version = "default"
        await fakes[0].start()
        await until(lambda: app.upstreams[0].down is None)
        assert not app.upstreams[0].in_rotation
        await load_adapter(app, folder, 2)
        assert app.upstreams[0].in_rotation


async def test_an_adapter_does_not_admit_what_is_half_updated(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter")
    fakes = [FakeUpstream(answers={"POST /update_weights": (500, {"error": {"message": "disk"}})}), FakeUpstream()]
    async with serving(*fakes) as app:
        assert await control(app, "/start_weight_update", "/update_weights") == [200, 500]
        assert app.upstreams[0].excluded
        await load_adapter(app, folder, 1)
        assert app.upstreams[0].excluded


async def test_a_restart_is_noticed_by_a_control_call_too() -> None:
    fakes = [FakeUpstream(), FakeUpstream()]
    async with serving(*fakes) as app:
        assert await control(app, *UPDATE, version="7") == [200] * 5
        app.upstreams[0].down = "seen from a test"
        fakes[0].weight_version = "default"
        assert await control(app, "/pause") == [200]
        assert app.upstreams[0].down is None and app.upstreams[0].excluded


async def test_a_refusal_by_all_alike_excludes_nobody() -> None:
    refuse = {"POST /pause": (404, {"detail": "Not Found"})}
    fakes = [FakeUpstream(answers=dict(refuse)), FakeUpstream(answers=dict(refuse))]
    async with serving(*fakes) as app:
        call = await ask(app, "POST", "/pause")
        assert call.status == 500 and "HTTP 404" in call.text and "Not Found" in call.text
        assert all(upstream.in_rotation for upstream in app.upstreams)
        fakes[0].answers.clear()
        assert (await ask(app, "POST", "/pause")).status == 500
        assert [upstream.in_rotation for upstream in app.upstreams] == [True, False]


async def test_versions() -> None:
    fakes = [FakeUpstream(), FakeUpstream()]
    async with serving(*fakes) as app:
        assert (await ask(app, "GET", "/weight_info")).json() == {"weight_version": "default"}
        fakes[1].weight_version = "3"
        call = await ask(app, "GET", "/weight_info")
        assert call.status == 500 and "different weights" in call.text
        assert all(fake.url in call.text for fake in fakes) and "default" in call.text and "3" in call.text
        fakes[0].weight_version = fakes[1].weight_version = None
        assert (await ask(app, "GET", "/weight_info")).status == 404


async def test_nothing_made_up_here_is_retried_for_ever() -> None:
    fakes = [FakeUpstream(breaks={CHAT, "/pause"}), FakeUpstream(breaks={CHAT, "/pause"})]
    async with serving(*fakes) as app:
        calls: list[Awaitable[Call]] = [ask(app, "POST", path, body=b"{}") for path in (CHAT, "/pause")]
        statuses = {call.status for call in await asyncio.gather(*calls)}
        for fake in fakes:
            await fake.stop()
        statuses |= {(await ask(app, "POST", CHAT)).status, (await ask(app, "GET", "/weight_info")).status}
        assert not statuses & RETRIED_FOREVER
        for fake in fakes:
            await fake.start()


async def test_metrics_are_those_of_all_upstreams_or_none() -> None:
    fakes = FakeUpstream(), FakeUpstream()
    async with serving(*fakes) as app:
        for fake, preemptions in zip(fakes, (3, 4), strict=True):
            said = f'# TYPE x counter\nvllm:num_preemptions_total{{engine="0"}} {preemptions}.0\nup 1\n'
            fake.answers["GET /metrics"] = (200, said.encode())
        text = (await ask(app, "GET", "/metrics")).text
        first, second = (fake.url for fake in fakes)
        assert text.splitlines() == [
            f'up{{upstream="{first}"}} 1',
            f'up{{upstream="{second}"}} 1',
            f'vllm:num_preemptions_total{{upstream="{first}",engine="0"}} 3.0',
            f'vllm:num_preemptions_total{{upstream="{second}",engine="0"}} 4.0',
        ]
        looks = [parse_counters([text.replace(" 3.0", f" {number}.0")], at=float(number)) for number in (3, 5)]
        assert engine_metrics(*looks) == {"engine/preemptions": 2.0}
        fakes[1].answers["GET /metrics"] = (404, {"detail": "Not Found"})
        assert (await ask(app, "GET", "/metrics")).status == 404
