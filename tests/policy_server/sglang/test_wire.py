"""The gateway in front of SGLang's stand-in: a real model behind SGLang's routes, and our own client before it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import wait_for
from tests.policy_server.adapter_folder import write_adapter
from tests.policy_server.fake_sglang import FakeSglang, behind_gateway, running
from tests.policy_server.fake_upstream import FakeUpstream
from tests.policy_server.tiny_model import build_model, build_random_policy
from tests.weight_sync.streams import Stream
from trl_gym.errors import PolicyServerError, PolicyServerLostError, WeightSyncError
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError
from trl_gym.policy_server.gateway import check_upstreams
from trl_gym.policy_server.middleware.ledger import CallRecord, Taken
from trl_gym.policy_server.sglang.dialect import UnsupportedError
from trl_gym.policy_server.sglang.wire import SglangWire, weight_folder
from trl_gym.policy_server.upstreams import CONTROL_PATHS
from trl_gym.rollouts.trajectory import model_calls
from trl_gym.weight_sync import sglang_transfer
from trl_gym.weight_sync.transports.nccl import NcclTransport

Json = dict[str, Any]

KEY = "the-gateway's-key"
USER = {"role": "user", "content": "What is 47 + 36?"}
SEQUENCES = [[1, 87, 85, 262, 201, 444], [5, 6, 7]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def served(policy: Path) -> Iterator[tuple[FakeSglang, PolicyClient]]:
    with behind_gateway(policy, gateway_key=KEY) as (fake, url):
        client = PolicyClient(url, api_key=KEY, timeout_s=30.0)
        yield fake, client
        client.close()


@pytest.fixture
def fake(served: tuple[FakeSglang, PolicyClient]) -> Iterator[FakeSglang]:
    yield served[0]
    served[0].hold_at = None
    served[0].answers.clear()


@pytest.fixture
def client(served: tuple[FakeSglang, PolicyClient]) -> PolicyClient:
    return served[1]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def ask(client: PolicyClient, rollout: str, *messages: Json, **body: Any) -> Json:
    body = {"max_tokens": 6, "ignore_eos": True, **body}
    tag = {"rollout": rollout, "sampling": {"temperature": 1.0}}
    other = PolicyClient(client.base_urls, api_key=KEY, timeout_s=30.0)  # one per thread
    try:
        return other.chat(messages=list(messages or (USER,)), trl_gym=tag, **body)["choices"][0]["message"]
    finally:
        other.close()


def records(client: PolicyClient, rollout: str) -> list[CallRecord]:
    body = client._call("POST", "/trl_gym/rollouts/take", json={"rollouts": [rollout]}, raw=True)
    taken = msgspec.msgpack.decode(body, type=Taken).rollouts[rollout]
    assert taken is not None
    return taken


def model_logprobs(fake: FakeSglang, ids: list[int]) -> list[float]:
    with torch.no_grad():
        logits = fake.model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def update(client: PolicyClient, path: str, version: str, mode: Any = "wait") -> None:
    client.pause(mode)
    client.start_weight_update()
    client.update_weights({"path": path})
    client.finish_weight_update(version)
    client.reset_caches(running=True)
    client.resume()


# -- what the gateway finds out ---------------------------------------------------------------------------------------


async def test_what_an_upstream_is_is_found_out_by_asking(policy: Path) -> None:
    notes: list[str] = []
    async with running(policy, api_key="k") as fake:
        [facts] = await check_upstreams([fake.url], api_key="k", timeout_s=60.0, note=notes.append)
        with pytest.raises(PolicyServerError, match="authentication failed"):
            await check_upstreams([fake.url], api_key="other", timeout_s=60.0, note=notes.append)
        other = await FakeUpstream(name=str(policy), max_model_len=256).start()
        fake.api_key = None
        with pytest.raises(PolicyServerError, match=r"servers of different kinds \(.*SGLang 0.5.23.*vLLM 0.31.0"):
            await check_upstreams([fake.url, other.url], api_key=None, timeout_s=60.0, note=notes.append)
        await other.stop()
    assert (facts.engine, facts.version, facts.has_prompt_field) == ("sglang", "0.5.23", True)
    assert (facts.raw_logprobs, facts.weight_transports, notes) == (False, ("file", "nccl"), [])


async def test_raw_logprobs_are_measured(policy: Path) -> None:
    notes: list[str] = []
    async with running(policy, raw_logprobs=True) as fake:
        [facts] = await check_upstreams([fake.url], api_key=None, timeout_s=60.0, note=notes.append)
    assert facts.raw_logprobs is True
    assert "raw logprobs" in notes[0] and "without $SGLANG_RETURN_ORIGINAL_LOGPROB" in notes[0]


def test_what_it_says_of_itself(client: PolicyClient, policy: Path) -> None:
    info = client.info()
    assert (info["engine"], info["engine_version"], info["max_model_len"]) == ("sglang", "0.5.23", 256)
    assert info["model_names"] == [str(policy)] and "vllm_version" not in info
    assert client.server_config()["model_config"] == {"logprobs_mode": "processed_logprobs"}
    assert client.world_size() == 1 and client.health() and not client.is_paused()
    assert "vllm:num_requests_running" in client.prometheus()[0]


def test_a_scheduler_that_hangs_is_noticed_though_its_server_answers(fake: FakeSglang, client: PolicyClient) -> None:
    client.ask_engines()
    client.pause()
    client.ask_engines()  # where it would sample no token
    fake.scheduler_hangs = True
    assert client.health()
    with pytest.raises(PolicyServerLostError, match="its HTTP process answers, and its engine does not"):
        client.patient(1.0).ask_engines()
    fake.scheduler_hangs = False
    client.resume()


# -- exact prompts ----------------------------------------------------------------------------------------------------


def test_turns_are_exact_and_logprobs_are_those_of_the_model(fake: FakeSglang, client: PolicyClient) -> None:
    first = ask(client, "exact", temperature=3.0)  # another than the pinned one
    ask(client, "exact", USER, first, {"role": "user", "content": "and 1?"})
    one, two = model_calls(records(client, "exact"))
    assert two.parent == 0 and two.drift is None
    assert two.prompt_ids[: len(one.prompt_ids) + 6] == one.prompt_ids + one.generation_ids
    for call in (one, two):
        expected = model_logprobs(fake, call.prompt_ids + call.generation_ids)[len(call.prompt_ids) - 1 :]
        assert call.logprobs == pytest.approx(expected, abs=1e-4)
    assert fake.asked("/v1/chat/completions")[-1]["input_ids"] == two.prompt_ids


def test_renders(client: PolicyClient, fake: FakeSglang) -> None:
    answer = {"role": "assistant", "content": "83"}
    opened = client.render([USER, answer])
    closed = client.render([USER, answer], add_generation_prompt=False)
    assert opened[: len(closed)] == closed and len(opened) > len(closed)
    client.chat(messages=[USER, answer], max_tokens=1)  # SGLang alone would make a user's message of it
    assert fake.asked("/v1/chat/completions")[-1]["input_ids"] == opened


def test_a_stream_is_a_stream(client: PolicyClient) -> None:
    body = {"messages": [USER], "max_tokens": 2, "stream": True}
    text = client._call("POST", "/v1/chat/completions", json=body, raw=True).decode()
    assert text.startswith("data: ") and text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(("field", "words"), [("bad_words", "SGLang has no bad_words"), ("model", "does not exist")])
def test_what_is_refused(client: PolicyClient, field: str, words: str) -> None:
    with pytest.raises(PolicyResponseError, match=words):
        client.chat(messages=[USER], max_tokens=1, **{field: ["x"] if field == "bad_words" else "x"})


def test_a_token_that_would_end_the_server_is_refused(client: PolicyClient, fake: FakeSglang) -> None:
    size = fake.model.config.vocab_size
    client.chat(messages=[USER], max_tokens=1, prompt_token_ids=[size - 1])
    for ids in ([size], [-1]):
        with pytest.raises(PolicyResponseError, match=r"HTTP 400: .*not in the vocabulary"):
            client.chat(messages=[USER], max_tokens=1, prompt_token_ids=ids)
    with pytest.raises(PolicyResponseError, match=r"HTTP 400: .*not in the vocabulary"):
        client.prompt_logprobs([[1, size]])


@pytest.mark.parametrize("num_left", [-9, 0, 3])  # SGLang's three ways to say it
def test_an_overflow_is_said_in_vllms_words(client: PolicyClient, fake: FakeSglang, num_left: int) -> None:
    filler = 256 - num_left - len(client.render([{"role": "user", "content": ""}]))
    message = {"role": "user", "content": "é" * (filler // 2) + "0" * (filler % 2)}
    assert len(client.render([message])) == 256 - num_left
    with pytest.raises(PolicyResponseError, match=r"HTTP 400: .*maximum context length"):
        ask(client, f"long{num_left}", message, max_tokens=None)


@pytest.mark.parametrize(
    "odd", [{"choices": 5}, [1], "text", {"choices": [{"message": {}, "index": 0}], "metadata": 3}]
)
def test_an_odd_answer_costs_one_call(client: PolicyClient, fake: FakeSglang, odd: Any) -> None:
    fake.answers["POST /v1/chat/completions"] = (200, odd)
    with pytest.raises(PolicyResponseError, match="HTTP 500"):
        ask(client, "odd")
    fake.answers.clear()
    ask(client, "even")


@pytest.mark.parametrize("body", [[], "x", {"messages": 5}, {"update_info": []}, {"init_info": 1}, {"model": 3}, {}])
def test_an_odd_request_is_refused(client: PolicyClient, fake: FakeSglang, body: Any) -> None:
    """Whoever sends it, and whichever route it is sent to, it has an answer."""
    calls = [route for route in SglangWire(fake.url)._handlers if route[0] == "POST" and route[1] not in CONTROL_PATHS]
    calls += [("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/update_weights")]
    for method, path in (*calls, ("POST", "/init_weight_transfer_engine")):
        answer = client._sessions[0].request(method, f"{client.root_url}{path}", json=body, timeout=60.0)
        assert answer.status_code in (200, 400, 404, 500) and answer.json() is not None, (path, answer.text)


# -- weights and versions ---------------------------------------------------------------------------------------------


def test_the_probe(client: PolicyClient, fake: FakeSglang) -> None:
    for ids, logprobs in zip(SEQUENCES, client.prompt_logprobs(SEQUENCES), strict=True):
        assert logprobs == pytest.approx(model_logprobs(fake, ids), abs=1e-4)


@pytest.mark.parametrize("nameless", [False, True])
def test_weights_from_a_file(client: PolicyClient, fake: FakeSglang, tmp_path: Path, nameless: bool) -> None:
    state = build_model(fake.tokenizer, tie=True, seed=1 + nameless).state_dict()
    file = tmp_path / "weights.safetensors"
    save_file({name: tensor.clone() for name, tensor in state.items() if name != "lm_head.weight"}, file)
    with file.open("rb") as opened:
        path = f"/proc/{os.getpid()}/fd/{opened.fileno()}" if nameless else str(file)
        before, names = client.prompt_logprobs(SEQUENCES), client.info()["model_names"]
        update(client, path, "7")
    after = client.prompt_logprobs(SEQUENCES)
    assert after != before and after[0] == pytest.approx(model_logprobs(fake, SEQUENCES[0]), abs=1e-4)
    assert torch.equal(fake.model.state_dict()["model.norm.weight"], state["model.norm.weight"])
    assert client.weight_version() == "7"
    assert client.models()[0]["id"] == names[0]  # SGLang calls it after the folder now
    assert list(tmp_path.iterdir()) == [file]
    ask(client, f"file{nameless}")
    assert [one.weight_version for one in records(client, f"file{nameless}")] == ["7"]


def test_weights_by_broadcast(client: PolicyClient, fake: FakeSglang) -> None:
    """Over gloo, in several calls of a buffer's size; the second trainer finds the first one's group."""
    for version in ("10", "11"):
        state = build_model(fake.tokenizer, tie=True, seed=int(version)).state_dict()
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
        transport = NcclTransport(buffer_mb=1, transfer=sglang_transfer)
        transport._buffer_bytes = 100_000
        transport.connect(client)
        client.pause("keep")
        client.start_weight_update()
        num_bytes = transport.send(Stream(state), client, version)
        client.finish_weight_update(version)
        client.reset_caches(running=True)
        client.resume()
        assert num_bytes == sum(tensor.nbytes for tensor in state.values())
        assert all(torch.equal(fake.model.state_dict()[name], tensor) for name, tensor in state.items())
        assert client.weight_version() == version
    assert len(fake.asked("/update_weights_from_distributed")) > 4
    client.pause("keep")
    client.start_weight_update()
    with pytest.raises(WeightSyncError, match="The NCCL group was given up"):
        transport.disconnect()
        transport.send(Stream({}), client, "12")
    assert not client.abandon_weight_update()
    client.resume()
    assert client.weight_version() == "11"


def test_a_broadcast_that_fails_is_ended_at_the_server_before_the_next_one(
    client: PolicyClient, fake: FakeSglang
) -> None:
    """SGLang would refuse to begin another one."""
    path, info = "POST /update_weights_from_distributed", {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]]}
    fake.answers[path] = (400, {"success": False, "message": "a rank is gone"})
    num_ended = len(fake.asked("/end_weight_update"))
    client.start_weight_update()
    with pytest.raises(PolicyResponseError, match="a rank is gone"):
        client.update_weights(info)
    assert fake.is_updating
    assert not client.abandon_weight_update()
    assert not fake.is_updating and len(fake.asked("/end_weight_update")) == num_ended + 1
    fake.answers[path] = (200, {"success": True, "message": ""})
    client.start_weight_update()
    client.update_weights(info)
    client.finish_weight_update("12")
    assert not fake.is_updating and client.weight_version() == "12"


def test_weights_that_cannot_be_loaded(client: PolicyClient, tmp_path: Path) -> None:
    save_file({"other": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(PolicyResponseError, match="no weight update was started"):
        client.update_weights({"path": str(tmp_path / "weights.safetensors")})
    client.start_weight_update()
    with pytest.raises(PolicyResponseError, match="Failed to update weights"):
        client.update_weights({"path": str(tmp_path / "weights.safetensors")})
    with pytest.raises(PolicyResponseError, match="it has brought no weights"):
        client.finish_weight_update("9")
    with pytest.raises(UnsupportedError), weight_folder(str(tmp_path / "missing")):
        pass
    assert not client.abandon_weight_update()
    with pytest.raises(PolicyResponseError, match="by file or by nccl"):
        client.init_weight_transfer({"packed": True})
    secret = tmp_path / "secret"
    secret.write_text("s")
    client.init_weight_transfer({"probe": str(secret), "secret": "s"})
    with pytest.raises(PolicyResponseError, match="does not find"):
        client.init_weight_transfer({"probe": str(secret), "secret": "t"})


def test_a_call_across_an_update_has_both_versions(
    client: PolicyClient, fake: FakeSglang, policy: Path, pool: ThreadPoolExecutor
) -> None:
    client.set_weight_version("8")
    fake.hold_at = 3
    call = pool.submit(ask, client, "across")
    wait_for(lambda: any(len(one.output) == 3 for one in list(fake.running.values())))
    update(client, str(policy), "9", mode="keep")
    fake.hold_at = None
    call.result(60.0)
    [record] = records(client, "across")
    assert (record.weight_version, record.last_version) == ("8", "9")


# -- pause, cancel, memory --------------------------------------------------------------------------------------------


def test_a_pause_that_waits_lets_what_runs_finish_and_holds_what_comes(
    client: PolicyClient, fake: FakeSglang, pool: ThreadPoolExecutor
) -> None:
    fake.hold_at, num_asked = 2, len(fake.asked("/v1/chat/completions"))
    running_call = pool.submit(ask, client, "running")
    wait_for(lambda: len(fake.running) == 1)
    pausing = pool.submit(PolicyClient(client.base_urls, api_key=KEY).pause, "wait")
    wait_for(client.is_paused)
    held = pool.submit(ask, client, "held")
    with pytest.raises(PolicyServerError, match="could not be reset"):  # something still runs
        client.reset_caches()
    assert not pausing.done()
    fake.hold_at = None
    pausing.result(60.0)
    assert running_call.result(60.0) and fake.paused == "retract" and client.health()
    assert len(fake.asked("/v1/chat/completions")) == num_asked + 1 and not held.done()
    client.reset_caches()
    client.resume()
    assert held.result(60.0) and not client.is_paused()
    records(client, "running"), records(client, "held")


def test_an_abort_ends_what_runs_with_what_it_has(
    client: PolicyClient, fake: FakeSglang, pool: ThreadPoolExecutor
) -> None:
    fake.hold_at = 2
    call = pool.submit(ask, client, "aborted")
    wait_for(lambda: any(len(one.output) == 2 for one in list(fake.running.values())))
    client.pause("abort")
    client.resume()
    call.result(60.0)
    [one] = model_calls(records(client, "aborted"))
    assert len(one.generation_ids) == 2


def test_a_cancelled_rollout_is_aborted_by_name(
    client: PolicyClient, fake: FakeSglang, pool: ThreadPoolExecutor
) -> None:
    fake.hold_at = 2
    call = pool.submit(ask, client, "cancelled")
    wait_for(lambda: len(fake.running) == 1)
    [rid] = fake.running
    assert client.cancel_rollouts(["cancelled"]) == 1
    wait_for(lambda: not fake.running and rid in [body.get("rid") for body in fake.asked("/abort_request")])
    with pytest.raises(PolicyResponseError, match="maximum context length"):
        call.result(60.0)


def test_a_sleep_that_fails_is_none(client: PolicyClient, fake: FakeSglang) -> None:
    fake.answers["POST /release_memory_occupation"] = (400, {"error": {"message": "no memory saver"}})
    try:
        with pytest.raises(PolicyResponseError, match="no memory saver"):
            client.sleep(1)
    finally:
        fake.answers.clear()
    assert not fake.paused and ask(client, "awake")


def test_memory_is_given_back_and_taken(client: PolicyClient, fake: FakeSglang, pool: ThreadPoolExecutor) -> None:
    client.sleep(1)
    assert fake.asleep == {"kv_cache"}, "weights have no copy on the host"
    client.wake_up()
    client.sleep(2)
    assert fake.asleep == {"weights", "kv_cache"} and fake.paused and client.health()
    held = pool.submit(ask, client, "held2")
    client.wake_up(["weights"])
    assert fake.asleep == {"kv_cache"} and not held.done()
    client.wake_up(["kv_cache"])
    assert held.result(60.0) and not fake.asleep and not fake.paused


def test_adapters(policy: Path, tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    torch.manual_seed(0)
    tensors = {
        f"base_model.model.{module}.lora_A.weight": torch.randn(4, 128),
        f"base_model.model.{module}.lora_B.weight": torch.randn(128, 4),
    }
    folder = write_adapter(tmp_path / "adapter", tensors=tensors, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with behind_gateway(policy, lora=True, gateway_key=KEY) as (fake, url):
        client = PolicyClient(url, api_key=KEY, timeout_s=30.0)
        assert client.info()["weight_transports"] == ["adapter"]
        assert client.server_config()["lora_config"] == {"max_lora_rank": 16, "target_modules": ["q_proj", "v_proj"]}
        plain = client.prompt_logprobs(SEQUENCES)
        client.load_adapter("policy@3", str(folder), "3", max_adapters=2, wait_s=1.0)
        assert client.weight_version() == "3"
        assert client.prompt_logprobs(SEQUENCES) != plain
        ask(client, "adapted")
        [record] = records(client, "adapted")
        assert record.weight_version == "3"
        assert fake.asked("/v1/chat/completions")[-1]["lora_path"].startswith("policy@3#")
        client.clear_adapters()
        assert client.prompt_logprobs(SEQUENCES) == plain and not fake.adapters
        with pytest.raises(PolicyResponseError, match="was not loaded"):
            client.load_adapter("policy@4", str(tmp_path), "4", max_adapters=2, wait_s=1.0)
