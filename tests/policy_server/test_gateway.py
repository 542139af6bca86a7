"""`trl-gym gateway`: what it refuses, what it finds out about its upstreams, and the process itself."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest

from tests.conftest import until
from tests.policy_server.fake_upstream import FakeUpstream
from tests.policy_server.fake_vllm import END, render
from trl_gym.cli import main
from trl_gym.errors import ConfigError, PolicyServerError
from trl_gym.policy_server import gateway
from trl_gym.policy_server.gateway import UpstreamFacts, check_upstreams, shared_replicas, takes_prompt_field
from trl_gym.policy_server.middleware.identity import KEY_PATTERN, PREFIX, ROLLOUT_HEADER, rollout_key
from trl_gym.processes import bind_socket

CHAT = {"messages": [{"role": "user", "content": "0"}], "max_tokens": 1}


def test_help_is_instant_and_the_gateway_needs_no_engine() -> None:
    imports_nothing = (
        "import sys; from trl_gym.cli import main\n"
        "try: main(['gateway', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'aiohttp', 'uvicorn', 'requests'} & set(sys.modules)\n"
    )
    needs_no_engine = (
        "import sys, trl_gym.policy_server.gateway\n"
        "assert not {'vllm', 'torch', 'transformers', 'trl'} & set(sys.modules)\n"
    )
    for code in (imports_nothing, needs_no_engine):
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_urls_are_taken_with_and_without_v1(url: str) -> None:
    assert gateway.upstream_urls([url, "https://h:2/proxy/v1"]) == ["http://h:1", "https://h:2/proxy"]


def test_every_wrong_url_is_named_and_no_password() -> None:
    given = ["localhost:8000", "http://h:x", "http://", "http://me:secret@h:1", "http://h:1?x=1", "http://a/v1"]
    with pytest.raises(ConfigError) as caught:
        gateway.upstream_urls([*given, "http://a"])
    message = str(caught.value)
    assert message.count("\n") == 6
    assert "`--upstream` is 'localhost:8000', which does not begin with http" in message
    assert "--upstream http://a is given twice" in message
    assert "secret" not in message and "--upstream-api-key" in message


def test_beyond_loopback_a_key_is_needed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "not demanded")
    assert main(["gateway", "--upstream", "http://127.0.0.1:1", "--host", "0.0.0.0", "--no-key"]) == 1
    assert "--host 0.0.0.0 can be reached from other machines" in capsys.readouterr().err


def test_a_busy_port_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    with bind_socket() as taken:
        port = taken.getsockname()[1]
        assert main(["gateway", "--upstream", "http://127.0.0.1:1", "--port", str(port)]) == 1
    captured = capsys.readouterr()
    assert f"Port {port} on 127.0.0.1 is in use" in captured.err and captured.out == ""


def test_answers_do_not_wait_for_acknowledgements() -> None:
    with gateway._bind("127.0.0.1", 0) as sock, socket.create_connection(sock.getsockname()):
        accepted, _ = sock.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# -- checks -----------------------------------------------------------------------------------------------------------


async def facts_of(
    *fakes: FakeUpstream, api_key: str | None = None, notes: list[str] | None = None, timeout_s: float = 60.0
) -> list[UpstreamFacts]:
    for fake in fakes:
        await fake.start()
    try:
        note = (notes if notes is not None else []).append
        return await check_upstreams([fake.url for fake in fakes], api_key=api_key, timeout_s=timeout_s, note=note)
    finally:
        for fake in fakes:
            await fake.stop()


async def refusal(*fakes: FakeUpstream, **how: Any) -> str:
    with pytest.raises(PolicyServerError) as caught:
        await facts_of(*fakes, **how)
    message = str(caught.value)
    assert message.startswith("The gateway cannot be started:\n")
    assert any(fake.url in message for fake in fakes)
    return message


async def test_what_is_found_out() -> None:
    fake = FakeUpstream()
    [facts] = await facts_of(fake, api_key="k")
    assert facts == UpstreamFacts(fake.url, ("policy",), 200, "0.31.0", False, True, False)
    assert {headers["authorization"] for *_, headers in fake.requests} == {"Bearer k"}


async def test_replicas_are_counted_where_all_upstreams_have_as_many() -> None:
    engines = [
        b"".join(b'vllm:num_requests_running{engine="%d",model_name="p"} 0.0\n' % n for n in range(k)) for k in (2, 4)
    ]
    fakes = [FakeUpstream(answers={"GET /metrics": (200, engines[place])}) for place in (0, 0, 1)]
    facts = await facts_of(*fakes)
    assert [fact.num_replicas for fact in facts] == [2, 2, 4]
    assert (shared_replicas(facts[:2]), shared_replicas(facts)) == (2, 1)


@pytest.mark.parametrize(
    ("exact", "has_field"),
    [
        (("kv_transfer_params",), False),
        (("prompt_token_ids",), True),
        (("kv_transfer_params", "prompt_token_ids"), True),
    ],
)
async def test_how_exact_prompts_are_taken_is_found_by_trying(exact: tuple[str, ...], has_field: bool) -> None:
    assert takes_prompt_field(await facts_of(FakeUpstream(exact=exact))) is has_field


async def test_upstreams_with_one_way_in_common_use_that_one() -> None:
    new = FakeUpstream(exact=("kv_transfer_params", "prompt_token_ids"))
    assert not takes_prompt_field(await facts_of(FakeUpstream(), new))
    message = await refusal(FakeUpstream(), FakeUpstream(exact=("prompt_token_ids",)))
    assert "accept exact prompts in different ways" in message


async def test_an_upstream_without_exact_prompts_is_refused() -> None:
    message = await refusal(FakeUpstream(exact=()))
    assert "asked for 5 given tokens, it (vLLM 0.31.0) answered on its own render of 4. Run vLLM 0.27" in message


async def test_raw_logprobs_are_a_warning() -> None:
    fake, notes = FakeUpstream(raw_logprobs=True), []
    [facts] = await facts_of(fake, notes=notes)
    assert facts.raw_logprobs is True
    assert len(notes) == 1 and fake.url in notes[0] and "--logprobs-mode processed_logprobs" in notes[0]


async def test_logprobs_that_cannot_be_measured_are_a_warning() -> None:
    fake, notes = FakeUpstream(num_top_logprobs=0), []
    [facts] = await facts_of(fake, notes=notes)
    assert facts.raw_logprobs is None
    assert len(notes) == 1 and "could not be measured" in notes[0]


async def test_nobody_there() -> None:
    with bind_socket() as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    notes: list[str] = []
    with pytest.raises(PolicyServerError, match=f"{url} cannot be reached: .*Start it"):
        await check_upstreams([url], api_key=None, timeout_s=0.0, note=notes.append)
    message = await refusal(FakeUpstream(hangs={"/v1/models"}), timeout_s=0.1)
    assert "cannot be reached: GET /v1/models: no answer within 1 s" in message


async def test_an_upstream_that_is_still_loading_is_waited_for() -> None:
    fake = await FakeUpstream(answers={"GET /v1/models": (503, {"detail": "loading"})}).start()
    notes: list[str] = []
    checking = asyncio.create_task(check_upstreams([fake.url], api_key=None, timeout_s=120.0, note=notes.append))
    await until(lambda: notes)
    assert notes[0].startswith(f"waiting for {fake.url}: GET /v1/models: HTTP 503")
    fake.answers.clear()
    [facts] = await checking
    assert facts.version == "0.31.0" and len(notes) == 1
    await fake.stop()


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (
            {"GET /v1/models": (404, "nothing")},
            "it is not an OpenAI server made by vLLM or SGLang: GET /v1/models answered HTTP 404",
        ),
        ({"GET /v1/models": (200, {"data": [{"id": "gpt"}]})}, "it is not an OpenAI server made by vLLM"),
        ({"GET /version": (404, {"detail": "x"})}, "an OpenAI server, but neither vLLM's nor SGLang's"),
        ({"GET /trl_gym/info": (200, {"package_version": "1"})}, "trl-gym server already, .* Use its URL directly"),
        ({"POST /tokenize": (400, {"error": "no chat template"})}, "does not render chats.*no chat template"),
        ({"POST /v1/chat/completions": (500, {"error": "broken"})}, "answered HTTP 500: .*broken"),
        ({"POST /v1/chat/completions": (400, {"error": "extra"})}, "takes exact prompts neither"),
        ({"POST /v1/chat/completions": (200, ["no", "object"])}, "is answered as vLLM does not"),
    ],
)
async def test_what_cannot_be_an_upstream(answers: dict[str, Any], words: str) -> None:
    assert re.search(words, await refusal(FakeUpstream(answers=answers)))


ODD = [
    None,
    5,
    "x",
    [],
    [1],
    {},
    {"x": 1},
    b"<html>",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    {"tokens": [-1]},
    {"tokens": "a"},
]
ODD += [{"data": None}, {"data": [1]}, {"data": [{"id": 5}]}, {"data": [{"id": "a", "max_model_len": "9"}]}]
ODD += [{"version": 5}, {"version": "1", "engine": []}, {"prompt_token_ids": "a"}, {"choices": [{"logprobs": {}}]}]
ODD += [{"choices": [{"logprobs": {"content": [{"top_logprobs": [odd]}]}}]} for odd in (1, {}, {"logprob": "x"})]
ROUTES = ("GET /v1/models", "GET /version", "POST /tokenize", "POST /v1/chat/completions", "GET /trl_gym/info")


@pytest.mark.parametrize("route", [*ROUTES, "GET /metrics", "GET /model_info", "GET /server_info", "GET /weight_info"])
async def test_an_odd_answer_ends_in_facts_or_in_words(route: str) -> None:
    fake = await FakeUpstream().start()
    for odd in ODD:
        fake.answers[route] = (200, odd)
        try:
            await check_upstreams([fake.url], api_key=None, timeout_s=0.0, note=lambda _: None)
        except PolicyServerError as error:
            assert fake.url in str(error)
    fake.answers[route] = (307, {})
    if route == "GET /v1/models":
        with pytest.raises(PolicyServerError, match="HTTP 307: it redirects to nowhere"):
            await check_upstreams([fake.url], api_key=None, timeout_s=60.0, note=lambda _: None)
    await fake.stop()


@pytest.mark.parametrize(("key", "words"), [(None, "it demands a key"), ("wrong-key", "the upstream key is wrong")])
async def test_a_missing_or_wrong_key(key: str | None, words: str) -> None:
    message = await refusal(FakeUpstream(answers={"GET /v1/models": (401, {"error": "no"})}), api_key=key)
    assert words in message and "TRL_GYM_UPSTREAM_API_KEY" in message
    assert "wrong-key" not in message


@pytest.mark.parametrize("other", [{"name": "other"}, {"max_model_len": 100}])
async def test_upstreams_must_be_replicas(other: dict[str, Any]) -> None:
    message = await refusal(FakeUpstream(), FakeUpstream(**other))
    assert "different models" in message and "max_model_len 200" in message


async def test_all_problems_are_named_at_once() -> None:
    fakes = [FakeUpstream(exact=()), FakeUpstream(answers={"GET /v1/models": (401, {})})]
    message = await refusal(*fakes)
    assert all(fake.url in message for fake in fakes)


# -- the process ------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    process: asyncio.subprocess.Process
    base_url: str

    @property
    def root(self) -> str:
        return self.base_url.removesuffix("/v1")


KEY = "the-gateway's-key"
AUTH = {"Authorization": f"Bearer {KEY}"}


@asynccontextmanager
async def running(*fakes: FakeUpstream, flags: tuple[str, ...] = (), **env: str) -> AsyncIterator[Running]:
    argv = [part for fake in fakes for part in ("--upstream", fake.url)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "trl_gym.cli", "gateway", "--port", "0", "--start-timeout", "100", *argv, *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "VLLM_API_KEY": KEY, **env},
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = (await asyncio.wait_for(process.stdout.readline(), 120.0)).decode()
        assert line.startswith("ready http://127.0.0.1:"), (await process.stderr.read()).decode()
        yield Running(process, line.split()[1])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_it_answers_with_the_bundle_and_ends_on_ctrl_c() -> None:
    fakes = [await FakeUpstream().start(), await FakeUpstream(weight_version="default").start()]
    env = {"VLLM_API_KEY": "our-key", "TRL_GYM_UPSTREAM_API_KEY": "their-key"}
    async with running(*fakes, flags=("--log-level", "debug"), **env) as gate, aiohttp.ClientSession() as session:
        async with session.post(f"{gate.base_url}/chat/completions", json=CHAT) as answer:
            assert answer.status == 401
        async with session.get(f"{gate.root}/health") as answer:
            assert answer.status == 200
        session.headers["Authorization"] = "Bearer our-key"
        async with session.post(f"{gate.base_url}/chat/completions", json=CHAT) as answer:
            message = (await answer.json())["choices"][0]["message"]
        assert message["prompt_token_ids"] == render(CHAT["messages"])
        assert message["generation_token_ids"] == [ord("x"), END]
        turns = [*CHAT["messages"], message, {"role": "user", "content": "1"}]
        async with session.post(f"{gate.base_url}/chat/completions", json={"messages": turns}) as answer:
            prompt = (await answer.json())["choices"][0]["message"]["prompt_token_ids"]
        seen = message["prompt_token_ids"] + message["generation_token_ids"]
        assert prompt == seen + render(turns[2:])  # the template alone would have written X
        async with session.get(f"{gate.root}/trl_gym/info") as answer:
            info = await answer.json()
        assert (info["model_names"], info["max_model_len"]) == (["policy"], 200)
        assert (info["vllm_version"], info["weight_version"], info["nonce"]) == ("0.31.0", "default", None)
        gate.process.send_signal(signal.SIGINT)
        output, log = await asyncio.wait_for(gate.process.communicate(), 60.0)
        assert gate.process.returncode == 130
    assert output == b"" and b"Traceback" not in log
    assert b"our-key" not in log and b"their-key" not in log
    keys = {headers.get("authorization") for fake in fakes for *_, headers in fake.requests}
    assert keys == {"Bearer their-key"}
    for fake in fakes:
        await fake.stop()


async def test_without_a_key_one_is_made_and_shown() -> None:
    fake = await FakeUpstream().start()
    async with running(fake, VLLM_API_KEY="") as gate, aiohttp.ClientSession() as session:
        async with session.get(f"{gate.base_url}/models") as answer:
            assert answer.status == 401
        assert gate.process.stderr is not None
        shown = [(await gate.process.stderr.readline()).decode() for _ in range(4)]
        key = shown[0].removeprefix("key: ").strip()
        assert f"export VLLM_API_KEY={key}\n" in shown[2] and f"Authorization: Bearer {key}\n" in shown[3]
        async with session.get(f"{gate.base_url}/models", headers={"Authorization": f"Bearer {key}"}) as answer:
            assert answer.status == 200
    await fake.stop()


async def test_without_any_key_programs_of_this_machine_sample_and_pages_do_not() -> None:
    fake = await FakeUpstream().start()
    async with running(fake, flags=("--no-key",)) as gate, aiohttp.ClientSession() as session:
        url, page = f"{gate.base_url}/chat/completions", {"Origin": "http://evil.example"}
        statuses = []
        for headers in ({}, page, {"Host": "evil.example"}):
            async with session.post(url, json=CHAT, headers=headers) as answer:
                statuses.append(answer.status)
                assert not any(name.lower().startswith("access-control") for name in answer.headers)
        async with session.options(url, headers={**page, "Access-Control-Request-Method": "POST"}) as answer:
            statuses.append(answer.status)
        async with session.post(f"{gate.root}/pause") as answer:
            statuses.append(answer.status)
        assert statuses == [200, 403, 403, 403, 403]
    assert fake.asked("/pause") == 0
    await fake.stop()


async def test_the_key_of_a_rollout_is_in_no_log_and_at_no_upstream() -> None:
    fake = await FakeUpstream().start()
    key = rollout_key("our-key", {"rollout": "r0", "sampling": {"temperature": 0.7}})
    env = {"VLLM_API_KEY": "our-key", "TRL_GYM_UPSTREAM_API_KEY": "their-key"}
    async with running(fake, flags=("--log-level", "debug"), **env) as gate, aiohttp.ClientSession() as session:
        prefixed = f"{gate.root}{PREFIX}{key}/v1/chat/completions"
        ways: tuple[tuple[str, dict[str, str]], ...] = (
            (prefixed, {}),
            (f"{gate.base_url}/chat/completions", {"Authorization": f"Bearer {key}"}),
            (f"{gate.base_url}/chat/completions", {"Authorization": "Bearer our-key", ROLLOUT_HEADER: key}),
        )
        for url, headers in ways:
            async with session.post(url, json=CHAT, headers=headers) as answer:
                assert answer.status == 200, await answer.text()
        async with session.post(prefixed.replace("/v1/chat/completions", "/pause"), json={}) as answer:
            assert answer.status == 403
        gate.process.send_signal(signal.SIGINT)
        _, log = await asyncio.wait_for(gate.process.communicate(), 60.0)
    await fake.stop()
    assert log.count(b"POST /v1/chat/completions") >= 3, "it logs requests"
    assert not KEY_PATTERN.search(log.decode())
    chats = [request for request in fake.requests if request[1] == "/v1/chat/completions"]
    assert [json.loads(body).get("temperature") for _, _, body, _ in chats][-3:] == [0.7] * 3
    assert not KEY_PATTERN.search(str(fake.requests)) and "x-trl-gym" not in str(fake.requests)
    assert {headers["authorization"] for *_, headers in chats} == {"Bearer their-key"}


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_cuts_running_requests_off(end: signal.Signals) -> None:
    fake = await FakeUpstream().start()
    async with running(fake) as gate, aiohttp.ClientSession(headers=AUTH) as session:
        fake.hangs.add("/v1/chat/completions")
        num_asked = fake.asked("/v1/chat/completions")
        waiting = asyncio.create_task(session.post(f"{gate.base_url}/chat/completions", json=CHAT))
        stream = await session.get(f"{gate.root}/sse")
        assert await stream.content.readline() == b"data: 1\n"
        await until(lambda: fake.asked("/v1/chat/completions") > num_asked)
        gate.process.send_signal(end)
        answer = await waiting
        assert answer.status == 500 and "shutting down" in await answer.text()
        with pytest.raises(aiohttp.ClientPayloadError):
            await stream.read()
        _, log = await asyncio.wait_for(gate.process.communicate(), 60.0)
        assert gate.process.returncode == (130 if end == signal.SIGINT else -signal.SIGTERM)
        assert b"Traceback" not in log
    await until(lambda: fake.cancelled)
    await fake.stop()


async def test_an_answer_that_breaks_off_breaks_off_for_the_client_too() -> None:
    fake = await FakeUpstream().start()
    async with running(fake) as gate, aiohttp.ClientSession(headers=AUTH) as session:
        fake.breaks_off |= {"/v1/completions", "/v1/chat/completions"}
        with pytest.raises(aiohttp.ClientPayloadError):
            async with session.post(f"{gate.base_url}/completions", json={}) as answer:
                await answer.read()
        # The middleware has sent nothing yet when it notices: that is an error with words.
        async with session.post(f"{gate.base_url}/chat/completions", json=CHAT) as answer:
            assert answer.status == 500
            assert "broke off its answer" in json.loads(await answer.text())["error"]["message"]
    await fake.stop()
