"""The contract of a policy server, part 2: weights, pause, errors and health. See `test_answers.py`."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.conftest import wait_for
from tests.e2e.contract.engines import (
    MAX_GAP,
    MAX_TOKEN_GAP,
    PROBE,
    USER,
    Engine,
    gap,
    in_thread,
    logprobs_of,
    prompt_of,
)
from tests.e2e.servers import MAX_MODEL_LEN, Json, calls_of, is_running, tagged
from trl_gym.errors import PolicyServerError, PolicyServerLostError
from trl_gym.policy_server.middleware.app import UNSAMPLED_PATHS
from trl_gym.policy_server.middleware.http import MAX_REQUEST_BYTES
from trl_gym.policy_server.middleware.identity import rollout_key

# Routes that the middleware handles itself.
OUR_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/tokenize", "/wake_up"})

# -- W: weights and versions ------------------------------------------------------------------------------------------


def test_w1_pushed_weights_are_what_it_computes_with(
    engine: Engine, push: Callable[[torch.nn.Module, int], None]
) -> None:
    """After an update the probe is what the trainer's own forward pass gives, and answers have the new version.

    `POST /start_weight_update`, `/update_weights` (as often as the transport needs) and `/finish_weight_update` with
    `weight_version`; `GET /weight_info` and `/trl_gym/info` tell it. The probe is `POST /v1/completions` with
    prompts of token ids, `prompt_logprobs: 0` and `max_tokens: 1`: log-probabilities at temperature 1, none for the
    first token.
    """
    assert gap(engine, engine.original) < MAX_GAP
    for step in (1, 2):
        model = engine.random(seed=10 + step)
        assert gap(engine, model) > 0.1
        push(model, step)
        assert gap(engine, model) < MAX_GAP
        assert engine.client.weight_version() == engine.client.info()["weight_version"] == str(step)
        tag = tagged()
        assert engine.chat([USER], max_tokens=4, trl_gym=tag)["weight_version"] == str(step)
        [record] = engine.client.rollout_records([tag["rollout"]])[tag["rollout"]]
        assert (record["weight_version"], record["last_version"]) == (str(step), None)
        [call] = calls_of(engine.client, tag)
        assert call.logprobs == pytest.approx(logprobs_of(model, call), abs=MAX_TOKEN_GAP)
    longest = MAX_MODEL_LEN - engine.reserved - 1
    rows = engine.client.prompt_logprobs([[5], [5, 9], [7] * longest])
    assert [len(row) for row in rows] == [0, 1, longest - 1]


def test_w2_nothing_of_old_weights_is_kept(engine: Engine, push: Callable[[torch.nn.Module, int], None]) -> None:
    """After an update and the reset of the caches nothing that the old weights have computed is used.

    `POST /reset_prefix_cache`, `/reset_mm_cache`, `/reset_encoder_cache`. A conversation that has begun before goes on
    in tokens of the new weights.
    """
    long = [{"role": "user", "content": "1 + 2 = 3. " * 20}]
    tag, new = tagged(), engine.random(seed=30)
    first = engine.message(long, max_tokens=16, ignore_eos=True, trl_gym=tag)
    push(new, 3)
    again = engine.turn(long, max_tokens=16, ignore_eos=True, trl_gym=tagged())
    engine.message([*long, first, USER], max_tokens=16, ignore_eos=True, trl_gym=tag)
    before, after = calls_of(engine.client, tag)
    assert again.prompt_ids == before.prompt_ids
    for call, model in ((before, engine.original), (again, new), (after, new)):
        assert call.logprobs == pytest.approx(logprobs_of(model, call), abs=MAX_TOKEN_GAP)


def test_w3_an_update_that_fails_changes_nothing(
    engine: Engine, push: Callable[[torch.nn.Module, int], None], tmp_path: Path
) -> None:
    """An update whose weights cannot be read is an error that says why; it changes neither weights nor version.

    It can be abandoned (`PolicyClient.abandon_weight_update`), and another one can follow. `/finish_weight_update`
    is an error where no update was started.
    """
    client, model = engine.client, engine.random(seed=50)
    push(engine.random(seed=49), 4)
    held = client.prompt_logprobs(PROBE)

    def is_as_before() -> bool:
        return client.weight_version() == "4" and client.prompt_logprobs(PROBE) == held

    client.pause()
    client.start_weight_update()
    with pytest.raises(PolicyServerError, match=r"update_weights: HTTP [45]00: .*No such file"):
        client.update_weights({"path": str(tmp_path / "missing.safetensors")})
    client.resume()
    assert is_as_before()
    assert client.abandon_weight_update() is False
    with pytest.raises(PolicyServerError, match=r"finish_weight_update: HTTP [45]00"):
        client.finish_weight_update("5")
    assert is_as_before()
    engine.push(model, 6)
    assert client.weight_version() == "6" and gap(engine, model) < MAX_GAP


@pytest.mark.parametrize("mode", ["wait", "keep"])
def test_w4_weights_are_pushed_while_calls_run(
    engine: Engine, push: Callable[[torch.nn.Module, int], None], mode: str
) -> None:
    """Calls that run during an update are stamped with the versions of their first and of their last token.

    With `/pause?mode=wait` they end first. With `mode=keep` they are frozen and go on with the new weights; what they
    have computed is computed again (`/reset_prefix_cache?reset_running_requests=true`). Each token has the
    log-probability of the weights that it was sampled with. A call that arrives during the pause is answered after it,
    by the new weights.
    """
    client, num_tokens = engine.client, engine.call_tokens
    old, new = engine.random(seed=60), engine.random(seed=61)
    sync = engine.sync(pause_mode=mode)
    sync.push(old, 20)
    tags, late, pauses = [tagged() for _ in range(4)], tagged(), []

    def long_call(tag: Json) -> Future[Json]:
        message = {"role": "user", "content": tag["rollout"]}
        return in_thread(pool, engine, message, max_tokens=num_tokens, ignore_eos=True, trl_gym=tag)

    def while_paused() -> None:
        calls.append(long_call(late))
        wait_for(lambda: is_running(client, late), "a call arrives during the pause")
        pauses.append(engine.num_sampled() - before)

    before = engine.num_sampled()
    with ThreadPoolExecutor(5) as pool, interrupted(sync.transport, while_paused):
        client.pause("keep")
        calls = [long_call(tag) for tag in tags]
        wait_for(lambda: is_running(client, *tags), "all calls have arrived")
        sample_a_little(engine, before + 4 * 10)
        client.resume()
        sync.push(new, 21)
        answers = [call.result(120.0) for call in calls]
    sync.disconnect()
    assert not client.is_paused()
    records = client.rollout_records([*(tag["rollout"] for tag in tags), late["rollout"]])
    versions = [(record["weight_version"], record["last_version"]) for own in records.values() for record in own]
    assert versions == [("20", "21" if mode == "keep" else None)] * 4 + [("21", None)]
    assert [answer["weight_version"] for answer in answers] == ["20"] * 4 + ["21"]
    made = [call for tag in (*tags, late) for call in calls_of(client, tag)]
    assert max(gaps(new, made.pop())) < MAX_TOKEN_GAP
    switches = []  # between which tokens each call changed weights: earliest and latest place
    for call in made:
        by_old, by_new = (torch.tensor(gaps(model, call)) < MAX_TOKEN_GAP for model in (old, new))
        switches.append(
            (len(by_new) - int(by_new.flip(0).long().cumprod(0).sum()), int(by_old.long().cumprod(0).sum()))
        )
    earliest, latest = (sum(places) for places in zip(*switches, strict=True))
    assert all(first <= last for first, last in switches)
    if mode == "wait":
        assert latest == 4 * num_tokens == pauses[0]
    else:  # all tokens of before the pause, and no other, are of the old weights
        assert all(first > 0 and last < num_tokens for first, last in switches)
        assert earliest <= pauses[0] <= latest


@contextlib.contextmanager
def interrupted(transport: Any, while_paused: Callable[[], None]) -> Iterator[None]:
    """Do something when the server is paused, before anything is sent."""
    send = transport.send

    def first(*given: Any) -> int:
        while_paused()
        return send(*given)

    transport.send = first
    try:
        yield
    finally:
        del transport.send


def gaps(model: torch.nn.Module, call: Any) -> list[float]:
    return [abs(a - b) for a, b in zip(call.logprobs, logprobs_of(model, call), strict=True)]


def test_w5_the_version_in_service_can_be_renamed(
    engine: Engine, push: Callable[[torch.nn.Module, int], None]
) -> None:
    """`POST /update_weight_version` with `new_version` renames the weights in service, and changes none."""
    push(engine.original, 8)
    held = engine.client.prompt_logprobs(PROBE)
    engine.client.set_weight_version("renamed")
    assert engine.client.weight_version() == engine.chat([USER], max_tokens=1)["weight_version"] == "renamed"
    assert engine.client.prompt_logprobs(PROBE) == held


# -- P: pause ---------------------------------------------------------------------------------------------------------


def test_p1_a_call_during_a_pause_waits_for_the_resume(engine: Engine) -> None:
    """`POST /pause` stops sampling until `POST /resume`; `GET /is_paused` tells. Both can be sent twice.

    A chat that arrives meanwhile is accepted, held, and answered after it. It can be cancelled. The probe may
    be answered at once.
    """
    client, tag, cancelled = engine.client, tagged(), tagged()
    client.pause()
    client.pause()
    before = engine.progress()
    with ThreadPoolExecutor(2) as pool:
        held = [in_thread(pool, engine, max_tokens=8, ignore_eos=True, trl_gym=one) for one in (tag, cancelled)]
        wait_for(lambda: is_running(client, tag) and is_running(client, cancelled), "both have arrived")
        client.cancel_rollouts([cancelled["rollout"]])
        with pytest.raises(PolicyServerError, match="was cancelled"):
            held[1].result(60.0)
        assert client.is_paused() and client.health() and client.info()["counters"]
        assert not held[0].done() and engine.progress() == before
        client.resume()
        client.resume()
        assert held[0].result(60.0)["usage"]["completion_tokens"] == 8
    assert not client.is_paused()


@pytest.mark.parametrize("mode", ["wait", "keep", "abort"])
def test_p2_what_runs_ends_is_frozen_or_is_aborted(engine: Engine, mode: Any) -> None:
    """`/pause?mode=…` decides about calls that run: `wait` returns when they have ended, `keep` freezes them,
    `abort` ends them at once with the tokens that they have (`finish_reason` is `abort`)."""
    client, tag, num_tokens = engine.client, tagged(), engine.call_tokens
    before = engine.num_sampled()
    with ThreadPoolExecutor(1) as pool:
        client.pause("keep")
        call = in_thread(pool, engine, max_tokens=num_tokens, ignore_eos=True, trl_gym=tag)
        wait_for(lambda: is_running(client, tag), "it has arrived")
        sample_a_little(engine, before + 10)
        client.resume()
        client.pause(mode)
        try:
            sampled = engine.num_sampled() - before
            assert sampled == num_tokens if mode == "wait" else 10 < sampled < num_tokens
            if mode == "keep":
                assert not call.done() and engine.num_sampled() - before == sampled
            else:
                assert call.result(60.0)["usage"]["completion_tokens"] == sampled
        finally:
            client.resume()
        [choice] = call.result(60.0)["choices"]
    assert choice["finish_reason"] == ("abort" if mode == "abort" else "length")
    [made] = calls_of(client, tag)
    assert len(made.generation_ids) == (sampled if mode == "abort" else num_tokens)
    assert max(gaps(engine.original, made)) < MAX_TOKEN_GAP


def sample_a_little(engine: Engine, num_tokens: float) -> None:
    """Let a paused engine sample until it has so many tokens, for as long as a request takes at a time: what waits for
    an answer here cannot end meanwhile, whatever the load."""

    def has_sampled() -> bool:
        engine.client.resume()
        engine.client.pause("keep")
        return engine.num_sampled() > num_tokens

    wait_for(has_sampled, "it samples")


# -- E: errors, load and health ---------------------------------------------------------------------------------------


def test_e1_it_says_what_it_is(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """`GET /trl_gym/info`, `/version` and `/v1/models` say what it is.

    The name of the engine and its version, the served model's names, `max_model_len`, the token that ends a turn, the
    weight version, counters, and `instance`, which is another after a restart. `GET /get_world_size`: how many workers
    hold weights.
    """
    info = engine.client.info()
    assert MAX_MODEL_LEN - engine.reserved <= info["max_model_len"] <= MAX_MODEL_LEN
    assert info["turn_end_token_id"] == tokenizer.eos_token_id
    assert info["engine"] == engine.name and info["engine_version"] == engine.ask("GET", "/version").json()["version"]
    assert info["instance"] and info["package_version"] and info["weight_version"] is not None
    [model] = engine.client.models()
    assert ([model["id"]], model["max_model_len"]) == (info["model_names"], info["max_model_len"])
    assert engine.client.world_size() == 1


def test_e2_nothing_is_served_without_the_key(engine: Engine) -> None:
    """Without the server's key every route but `/health` is a 401 in OpenAI's error form; a rollout's key opens chats.

    `Authorization: Bearer KEY`. The error is `{"error": {"message", "type", "param", "code"}}`.
    """
    routes = [("GET", "/trl_gym/info"), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/chat/completions")]
    routes += [("POST", "/pause"), ("POST", "/update_weights"), ("POST", "/tokenize"), ("GET", "/nothing")]
    for method, path in routes:
        for key in (None, "wrong", rollout_key("another key", tagged())):
            headers = {"authorization": None if key is None else f"Bearer {key}"}
            answer = engine.ask(method, path, headers=headers)
            assert answer.status_code == 401, (path, answer.text)
            error = answer.json()["error"]
            assert error["type"] == "AuthenticationError" and error["code"] == 401 and error["message"]
    assert engine.ask("GET", "/health", headers={"authorization": None}).status_code == 200
    assert not engine.client.is_paused()
    tag = tagged()
    own = {"authorization": f"Bearer {rollout_key(engine.client.api_key, tag)}"}
    body = {"messages": [USER], "max_tokens": 2}
    assert engine.ask("POST", "/v1/chat/completions", json=body, headers=own).status_code == 200
    assert engine.ask("POST", "/pause", headers=own).status_code == 403
    assert len(calls_of(engine.client, tag)) == 1


def test_e3_a_mistake_is_a_4xx_that_says_what_it_is(engine: Engine) -> None:
    """A request that is wrong is a 4xx with `error.message` that says what is wrong, and the server lives.

    404: an unknown route or model. 400: no JSON, no messages, a limit that is none, ids that the vocabulary lacks, a
    bundle that is broken, a body that is not said to be JSON, a turn of a rollout on another route. 413: a body of
    more than 64 MiB.
    """
    chat, sent = "/v1/chat/completions", {"content-type": "application/json"}
    body = {"messages": [USER], "max_tokens": 2}
    ids = {"prompt_token_ids": [5], "generation_token_ids": [6]}
    probe = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}

    def turn(**fields: Any) -> Json:
        return {"json": {**body, "trl_gym": tagged(), "messages": [{**USER, **ids, **fields}]}}

    for path, how, status, words in (
        ("/nothing", {}, 404, None),
        ("/trl_gym/nothing", {}, 404, None),
        (chat, {"json": {**body, "model": "another"}}, 404, "another"),
        (chat, {"data": b"{", "headers": sent}, 400, "JSON"),
        (chat, {"data": b"[1]", "headers": sent}, 400, None),
        (chat, {"json": {"max_tokens": 2}}, 400, "message"),
        (chat, {"json": {**body, "messages": "hi"}}, 400, "messages"),
        (chat, {"json": {**body, "messages": []}}, 400, "message"),
        (chat, {"json": {**body, "messages": [{"role": "assistant", "content": {"no": "text"}}]}}, 400, None),
        (chat, {"json": {**body, "max_tokens": "many"}}, 400, "max_tokens must be a positive integer"),
        (chat, {"json": {**body, "max_tokens": 0}}, 400, "max_tokens must be a positive integer"),
        (chat, {"json": {**body, "temperature": -1.0}}, 400, "temperature"),
        (chat, {"json": {**body, "trl_gym": {"rollout": 7}}}, 400, "trl_gym must be an object"),
        (chat, {"data": json.dumps({**body, "temperature": math.nan}), "headers": sent}, 400, None),
        (chat, turn(generation_token_ids=[10**6]), 400, "vocab"),
        (chat, turn(prompt_token_ids=[5] * 600), 400, "maximum context length"),
        (chat, turn(prompt_token_ids=None), 400, "needs prompt_token_ids"),
        (chat, turn(generation_token_ids=["6"]), 400, "needs generation_token_ids"),
        (chat, {"data": b" " * (MAX_REQUEST_BYTES + 1), "headers": sent}, 413, "longer than"),
        ("/nothing", {"data": b" " * (MAX_REQUEST_BYTES + 1)}, 413, "longer than"),
        (chat, {"data": json.dumps(body), "headers": {"content-type": "text/plain"}}, 400, "application/json"),
        (chat, {"json": {**body, "top_logprobs": 2}}, 400, "`logprobs` must be set to true"),
        (f"{chat}/", turn(), 400, "must be sent to /v1/chat/completions"),
        ("/v1/responses", {"json": {"input": "hi", "trl_gym": tagged()}}, 400, "must be sent to /v1/chat/completions"),
        ("/tokenize", {"json": {"messages": "hi"}}, 400, None),
        ("/v1/completions", {"json": {"prompt": [[5, 10**6]], **probe}}, 400, "vocab"),
        ("/v1/completions", {"json": {"prompt": [[5] * 600], **probe}}, 400, "maximum context length"),
    ):
        answer = engine.ask("POST", path, **how)
        assert answer.status_code == status, (path, how if len(str(how)) < 999 else "", answer.text)
        message = "" if words is None else answer.json()["error"]["message"]
        assert words is None or words in message, (path, message)
    assert engine.turn([USER], max_tokens=2, trl_gym=tagged()).generation_ids


def test_e4_no_number_in_an_answer_is_nan(engine: Engine, push: Callable[[torch.nn.Module, int], None]) -> None:
    """No answer has NaN or an infinity. Weights that compute NaN give an error, and good ones can follow.

    Where they end the engine, it says so (E7).
    """
    broken = deepcopy(engine.original)
    with torch.no_grad():
        broken.get_decoder().norm.weight.fill_(math.nan)
    with pytest.raises(PolicyServerError, match=r"logprob|HTTP [45]00"):  # by the probe, once they are in service
        push(broken, 9)
    assert engine.client.weight_version() == "9"
    body = {"messages": [USER], "max_tokens": 3, "trl_gym": tagged()}
    answer = engine.ask("POST", "/v1/chat/completions", json=body)
    assert answer.status_code in (400, 500) and answer.json()["error"]["message"]
    probe = {"prompt": PROBE, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    msgspec.json.decode(engine.ask("POST", "/v1/completions", json=probe).content)  # which takes no NaN
    engine.restart()
    push(engine.original, 10)
    assert gap(engine, engine.original) < MAX_GAP
    assert engine.turn([USER], max_tokens=2, trl_gym=tagged()).generation_ids


def test_e5_sixty_four_calls_at_once(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sixty-four calls at once are all answered, each with the tokens and log-probabilities of its own prompt."""
    model, end = engine.original, tokenizer.eos_token_id
    texts = [f"{number} " * (1 + number % 8) for number in range(64)]
    limits = [engine.call_tokens // 16 + number % 5 for number in range(64)]
    tags = [tagged(1.5) for _ in texts]
    with ThreadPoolExecutor(64) as pool:
        running = []
        for number, tag in enumerate(tags):
            body = {"max_tokens": limits[number], "ignore_eos": number % 2 == 0, "trl_gym": tag}
            running.append(in_thread(pool, engine, {"role": "user", "content": texts[number]}, **body))
        answers = [call.result(120.0) for call in running]
    for number, (tag, answer) in enumerate(zip(tags, answers, strict=True)):
        [call] = calls_of(engine.client, tag)
        assert call.prompt_ids == prompt_of(tokenizer, [{"role": "user", "content": texts[number]}])
        ids, reason = call.generation_ids, answer["choices"][0]["finish_reason"]
        if number % 2 == 0 or end not in ids:
            assert len(ids) == limits[number] and reason == "length"
        else:
            assert ids.index(end) == len(ids) - 1 and reason == "stop"
        if number % 8 == 0:
            assert call.logprobs == pytest.approx(logprobs_of(model, call, 1.5), abs=MAX_TOKEN_GAP)
    assert engine.num_running() == 0


def test_e6_metrics_count(engine: Engine) -> None:
    """`GET /metrics` counts in Prometheus' text form, with the names of vLLM, which the trainer's metrics are made of.

    `vllm:generation_tokens_total`, `vllm:prompt_tokens_total` and the gauge `vllm:num_requests_running`.
    """

    def counted() -> dict[str, float]:
        [text] = engine.client.prometheus()
        lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith("vllm:")]
        return {line[0].partition("{")[0]: float(line[2]) for line in lines}

    before = counted()
    usage = engine.chat([USER], max_tokens=7, ignore_eos=True)["usage"]
    after = counted()
    for kind, more in (("generation", 7), ("prompt", usage["prompt_tokens"])):
        assert after[f"vllm:{kind}_tokens_total"] - before[f"vllm:{kind}_tokens_total"] == more
    assert after["vllm:num_requests_running"] == 0


def test_e8_no_route_that_may_sample_passes_a_turn_by(engine: Engine) -> None:
    """On every other route that takes a body a turn of a rollout is a 400, also on those that are not known yet.

    But for routes of which it is known that they sample nothing.
    """
    answer = engine.ask("GET", "/openapi.json")  # vLLM's, which lists its routes
    spec = answer.json() if answer.ok else {"paths": {}}
    routes = {path: ways["post"] for path, ways in spec["paths"].items() if "post" in ways}
    assert engine.name != "vllm" or {"/v1/completions", "/v1/responses", "/invocations"} <= routes.keys()
    for path in {"/v1/chat/completions/", "/of/tomorrow", "/generate", *routes.keys()} - OUR_PATHS - UNSAMPLED_PATHS:
        answer = engine.ask("POST", path, json={"trl_gym": tagged(), "messages": [USER], "prompt": "a", "input": "a"})
        assert answer.status_code == 400 and f"not to {path}:" in answer.text, path
    for path in routes.keys() & (OUR_PATHS | UNSAMPLED_PATHS) - {"/v1/chat/completions", "/v1/completions"}:
        taken = json.dumps(_schemas(routes[path], spec))
        assert '"temperature"' not in taken and '"max_tokens"' not in taken, f"{path} samples"


def _schemas(part: Any, spec: Json, depth: int = 4) -> Any:
    """A part of an OpenAPI document with what it refers to."""
    if isinstance(part, list):
        return [_schemas(one, spec, depth) for one in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _schemas(spec["components"]["schemas"][part["$ref"].split("/")[-1]], spec, depth - 1) if depth else None
    return {key: _schemas(one, spec, depth) for key, one in part.items() if key != "responses"}


def test_e7_a_dead_engine_is_told(mortal: Engine) -> None:
    """A server whose engine has died says so: `GET /health` is no 200, or nothing answers there any more.

    A call that runs, and every later one, fails with an error at once: a 500 or a closed connection, never silence.
    Nor is a pause that has come before silent, which a weight sync would wait for. An engine that hangs, in a process
    of its own, leaves `GET /is_paused` without an answer; `GET /health` may have one.
    """
    client = mortal.another_client()
    pausing = HTTPConnection(urlsplit(client.root_url).netloc, timeout=60.0)
    with ThreadPoolExecutor(1) as pool:
        running = in_thread(pool, mortal, max_tokens=400, ignore_eos=True, trl_gym=tagged())
        wait_for(lambda: mortal.num_running() > 0, "it samples")
        if mortal.hang():
            with pytest.raises(PolicyServerLostError, match="its HTTP process answers, and its engine does not"):
                mortal.another_client().patient(2.0).ask_engines()
        pausing.request("POST", "/pause?mode=wait", headers={"Authorization": f"Bearer {client.api_key}"})
        client.info()  # so that the pause has arrived
        mortal.kill()
        with pytest.raises(PolicyServerError):
            running.result(60.0)
    with contextlib.closing(pausing), contextlib.suppress(ConnectionError):  # a timeout is none
        pausing.getresponse()
    wait_for(lambda: not mortal.client.health(), "it is told")
    with pytest.raises(PolicyServerError, match=r"HTTP 500|cannot be reached"):
        mortal.another_client().chat(messages=[USER], max_tokens=2, timeout_s=60.0)
