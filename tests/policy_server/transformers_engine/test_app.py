"""The engine in vLLM's form: alone, and behind the middleware that Gym calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.conftest import until
from tests.policy_server.transformers_engine.conftest import MAX_MODEL_LEN
from trl_gym.errors import PolicyServerError
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings
from trl_gym.policy_server.middleware.http import App
from trl_gym.policy_server.transformers_engine.app import EngineApp
from trl_gym.policy_server.transformers_engine.engine import Engine
from trl_gym.policy_server.transformers_engine.rendering import ChatRenderer
from trl_gym.policy_server.transformers_engine.sampling import overflow

Json = dict[str, Any]
JSON = (b"content-type", b"application/json")
USER = {"role": "user", "content": "What is 47 + 36?"}
PROBE = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}


@dataclass
class Http:
    """Asks an application; `gone` is set to hang up on what runs."""

    app: App
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, method: str, path: str, body: Any = None, query: str = "") -> tuple[int, Any]:
        pending = [b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()]
        sent: list[Json] = []

        async def receive() -> Json:
            if pending:
                return {"type": "http.request", "body": pending.pop()}
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": [JSON], "query_string": query.encode()}
        await self.app(scope, receive, send)
        if not sent:
            return 0, None
        raw = b"".join(message.get("body", b"") for message in sent[1:])
        kind = dict(sent[0]["headers"])[b"content-type"]
        return sent[0]["status"], json.loads(raw or b"null") if b"json" in kind else raw.decode()

    async def post(self, path: str, query: str = "", **body: Any) -> Any:
        status, answer = await self("POST", path, body, query)
        assert status == 200, answer
        return answer

    async def get(self, path: str) -> Any:
        status, answer = await self("GET", path)
        assert status == 200, answer
        return answer

    async def chat(self, *messages: Json, **body: Any) -> Json:
        return await self.post("/v1/chat/completions", messages=messages or [USER], **body)


@pytest.fixture
def http(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> Http:
    return Http(EngineApp(engine, ChatRenderer(tokenizer), model_name="policy"))


async def test_what_it_says_about_itself(http: Http) -> None:
    assert (await http.get("/version"))["engine"] == "transformers"
    (model,) = (await http.get("/v1/models"))["data"]
    assert (model["id"], model["max_model_len"], model["parent"]) == ("policy", MAX_MODEL_LEN, None)
    assert await http.get("/weight_info") == {"weight_version": "default"}
    config = (await http.get("/server_info"))["vllm_config"]
    assert config["model_config"]["logprobs_mode"] == "processed_logprobs"
    assert config["weight_transfer_config"]["backend"] == "shared"
    assert await http.get("/get_world_size") == {"world_size": 1}
    assert await http.get("/health") is None
    assert "im_start" in (await http.get("/tokenizer_info"))["chat_template"]
    assert (await http("GET", "/v1/unheard"))[0] == (await http("POST", "/health"))[0] == 404


async def test_a_chat_completion_has_what_gym_and_the_middleware_read(http: Http) -> None:
    asked = {"return_token_ids": True, "logprobs": True, "max_tokens": 8, "ignore_eos": True}
    answer = await http.chat(**asked)
    (choice,) = answer["choices"]
    tokens = await http.post("/tokenize", messages=[USER], return_token_strs=True)
    assert answer["prompt_token_ids"] == tokens["tokens"] and len(tokens["token_strs"]) == tokens["count"]
    assert len(choice["token_ids"]) == 8 and choice["finish_reason"] == "length" and choice["stop_reason"] is None
    entries = choice["logprobs"]["content"]
    assert all(entry.keys() == {"token", "bytes", "logprob", "top_logprobs"} for entry in entries)
    assert bytes(entries[0]["bytes"]).decode() == entries[0]["token"] and entries[0]["top_logprobs"] == []
    assert answer["usage"] == {
        "prompt_tokens": tokens["count"],
        "completion_tokens": 8,
        "total_tokens": tokens["count"] + 8,
    }
    assert set(answer["metrics"]) == {"queue_time_ms", "time_to_first_token_ms", "generation_time_ms"}
    bare = (await http.chat(max_tokens=2))["choices"][0]
    assert bare["logprobs"] is None and bare["token_ids"] is None
    as_ids = (await http.chat(**asked, return_tokens_as_token_ids=True))["choices"][0]
    said = [entry["token"] for entry in as_ids["logprobs"]["content"]]
    assert said == [f"token_id:{token}" for token in as_ids["token_ids"]]


async def test_an_id_that_the_tokenizer_does_not_have_is_sampled_and_has_no_text(
    http: Http, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Models are made for a round number of ids. A small policy samples one of the others now and then."""
    unknown = len(tokenizer) + 2
    model.resize_token_embeddings(unknown + 1)

    def prefer(_module: Any, _arguments: Any, output: Any) -> Any:
        output.logits[..., unknown] = 1e4
        return output

    handle = model.register_forward_hook(prefer)
    try:
        answer = await http.chat(max_tokens=3, logprobs=True, return_token_ids=True)
    finally:
        handle.remove()
    [choice] = answer["choices"]
    assert choice["token_ids"] == [unknown] * 3 and not choice["message"]["content"]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == [""] * 3
    [completion] = (await http.post("/v1/completions", prompt=[1, 2], max_tokens=2))["choices"]
    assert isinstance(completion["text"], str)


async def test_exact_prompts_in_both_forms(http: Http) -> None:
    forced = [5, 6, 7, 8]
    for given in ({"prompt_token_ids": forced}, {"kv_transfer_params": {"prompt_token_ids": forced}}):
        answer = await http.chat(max_tokens=2, return_token_ids=True, **given)
        assert answer["prompt_token_ids"] == forced


async def test_stops(http: Http) -> None:
    first = await http.chat(max_tokens=1, temperature=0, return_token_ids=True)
    (token,) = first["choices"][0]["token_ids"]
    stopped = (await http.chat(max_tokens=9, temperature=0, stop_token_ids=[token]))["choices"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", token)


async def test_tool_calls(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    class Calling(ChatRenderer):
        def parse(self, ids: Sequence[int], prompt_ids: Sequence[int], body: Mapping[str, Any]) -> Json:
            call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
            return {"role": "assistant", "content": None, "tool_calls": [call, call]}

    http = Http(EngineApp(engine, Calling(tokenizer), model_name="policy"))
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    choice = (await http.chat(max_tokens=1, tools=[tool]))["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and len(choice["message"]["tool_calls"]) == 2
    choice = (await http.chat(max_tokens=1, tools=[tool], parallel_tool_calls=False))["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1


async def test_a_stream_is_the_whole_answer_in_vllms_chunks(http: Http) -> None:
    body = await http.chat(max_tokens=3, ignore_eos=True, stream=True, stream_options={"include_usage": True})
    *chunks, last = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    deltas = [json.loads(chunk) for chunk in chunks]
    assert last == "[DONE]" and deltas[0]["choices"][0]["delta"]["role"] == "assistant"
    assert deltas[1]["choices"][0]["finish_reason"] == "length" and deltas[2]["usage"]["completion_tokens"] == 3


async def test_completions(http: Http) -> None:
    answer = await http.post(
        "/v1/completions", prompt=["What", [][:0] or "Who"], max_tokens=3, ignore_eos=True, logprobs=0
    )
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(len(choice["logprobs"]["token_logprobs"]) == 3 for choice in answer["choices"])
    by_ids = await http.post("/v1/completions", prompt=[5, 6], max_tokens=3, ignore_eos=True, return_token_ids=True)
    unlimited = await http.post("/v1/completions", prompt=[5, 6], max_tokens=None, ignore_eos=True)
    assert unlimited["usage"]["completion_tokens"] == 16  # as of vLLM, which has it from OpenAI
    assert len(by_ids["choices"][0]["token_ids"]) == 3 and by_ids["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/chat/completions", {"messages": [USER], "seed": 5}, 400, "seed='5' is not supported"),
        ("/v1/chat/completions", {"messages": [USER], "model": "other"}, 404, "The model `other` does not exist."),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}, 400, "must be a text or a list"),
        ("/detokenize", {"tokens": [10**6]}, 400, "token ids must be integers from 0"),
        ("/v1/chat/completions", {"messages": [USER], "prompt_token_ids": []}, 400, "cannot be empty"),
        ("/v1/chat/completions", {"messages": [USER], "prompt_token_ids": [10**6]}, 400, "out of vocabulary"),
        ("/v1/chat/completions", {"messages": [USER], "prompt_token_ids": "5"}, 400, "must be a list of token ids"),
        ("/v1/completions", {"prompt": [5] * 256}, 400, overflow(MAX_MODEL_LEN, 256, 1)),
        ("/v1/completions", {"prompt": [5, 6], "max_tokens": 255}, 400, overflow(MAX_MODEL_LEN, 2, 255)),
        ("/v1/completions", {"prompt": [5], "max_tokens": 2, "prompt_logprobs": 0}, 400, "prompt_logprobs must be 0"),
        ("/v1/completions", {"prompt": [], **PROBE}, 400, "The decoder prompt cannot be empty"),
        ("/v1/completions", {"prompt": "", **PROBE}, 400, "The decoder prompt cannot be empty"),
        ("/v1/completions", {"prompt": [[5], []], **PROBE}, 400, "The decoder prompt cannot be empty"),
        ("/v1/completions", {"prompt": [[5], [5] * 256], **PROBE}, 400, overflow(MAX_MODEL_LEN, 256, 1)),
        ("/v1/completions", {"prompt": [5], "stream": True}, 400, "stream=True is not supported"),
        ("/tokenize", b"[1]", 400, "must be a JSON object"),
        ("/tokenize", b"{", 400, "no JSON"),
        ("/abort_requests", {"request_ids": ["a"]}, 400, "hang up to abort one"),
    ],
)
async def test_refusals(http: Http, path: str, body: Any, status: int, said: str) -> None:
    answered, error = await http("POST", path, body)
    assert (answered, error["error"]["code"]) == (status, status) and said in error["error"]["message"]


async def test_a_client_that_hangs_up_aborts_its_request(http: Http, engine: Engine) -> None:
    call = asyncio.ensure_future(
        http("POST", "/v1/completions", {"prompt": [5, 6], "max_tokens": 250, "ignore_eos": True})
    )
    await until(lambda: engine.counters.running == 1)
    http.gone.set()
    assert await call == (0, None)
    assert engine.counters.running == 0 and engine.counters.aborted == 1


async def test_pause_resume_and_new_weights(http: Http, engine: Engine, model: PreTrainedModel) -> None:
    asked = {"prompt": [5, 6], "max_tokens": 200, "ignore_eos": True}
    running = asyncio.ensure_future(http.post("/v1/completions", **asked))
    await until(lambda: engine.counters.running == 1)
    await http.post("/pause", "mode=keep")
    assert await http.get("/is_paused") == {"is_paused": True}
    for path in ("/init_weight_transfer_engine", "/start_weight_update", "/update_weights"):
        await http.post(path)
    await http.post("/finish_weight_update", weight_version="3")
    assert await http.post("/reset_prefix_cache", "reset_running_requests=true") == {"success": True}
    await http.post("/reset_mm_cache")
    await http.post("/reset_encoder_cache")
    assert await http.get("/weight_info") == {"weight_version": "3"} and not running.done()
    await http.post("/resume")
    assert (await running)["usage"]["completion_tokens"] == 200
    await http.post("/update_weight_version", new_version="4")
    assert engine.weight_version == "4"
    assert (await http("POST", "/pause", query="mode=never"))[0] == 400


async def test_all_requests_are_aborted(http: Http, engine: Engine) -> None:
    asked = {"prompt": [5, 6], "max_tokens": 250, "ignore_eos": True}
    running = asyncio.ensure_future(http.post("/v1/completions", **asked))
    await until(lambda: engine.counters.running == 1)
    assert await http.post("/abort_requests") == {"status": "aborted", "aborted": 1}
    assert (await running)["choices"][0]["finish_reason"] == "abort"


async def test_weights_come_by_a_loader(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    class Loader:
        backend = "file"
        seen: ClassVar[list[Any]] = []

        def init(self, init_info: Mapping[str, Any]) -> None:
            self.seen.append(init_info)

        def update(self, model: Any, update_info: Mapping[str, Any]) -> None:
            if "path" not in update_info:
                raise PolicyServerError("There is no path.")
            self.seen.append(type(model).__name__)

        def finish(self) -> None:
            self.seen.append("finished")

    http = Http(EngineApp(engine, ChatRenderer(tokenizer), model_name="policy", weight_loader=Loader()))
    assert (await http.get("/server_info"))["vllm_config"]["weight_transfer_config"]["backend"] == "file"
    await http.post("/init_weight_transfer_engine", init_info={"a": 1})
    await http.post("/update_weights", update_info={"path": "folder"})
    status, error = await http("POST", "/update_weights", {"update_info": {}})
    assert status == 500 and "There is no path." in error["error"]["message"]
    await http.post("/finish_weight_update", weight_version="1")
    assert Loader.seen == [{"a": 1}, "Qwen3ForCausalLM", "finished"]


async def test_a_lost_engine_says_so_on_every_route_that_needs_it(
    http: Http, engine: Engine, model: PreTrainedModel
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no memory left")

    with model.register_forward_pre_hook(fail):
        status, error = await http("POST", "/v1/completions", {"prompt": [5, 6], "max_tokens": 5})
    assert status == 500 and "no memory left" in error["error"]["message"]
    status, error = await http("GET", "/health")
    assert status == 503 and "no memory left" in error["error"]["message"]


async def test_turns_behind_the_middleware_are_exact(http: Http, engine: Engine, model: PreTrainedModel) -> None:
    behind = Http(OnPolicyMiddleware(http.app, Settings()))
    info = await behind.get("/trl_gym/info")
    assert (info["engine"], info["max_model_len"], info["weight_version"]) == (
        "transformers",
        MAX_MODEL_LEN,
        "default",
    )
    assert "vllm_version" not in info and info["turn_end_token_id"] is not None

    async def converse(rollout: str) -> list[Json]:
        messages: list[Json] = [USER]
        for _ in range(3):
            tag = {"rollout": rollout, "sampling": {"temperature": 1.0}}
            answer = await behind.chat(*messages, trl_gym=tag, max_tokens=12)
            messages += [answer["choices"][0]["message"], {"role": "user", "content": "and now?"}]
        return (await behind.post("/trl_gym/rollouts/records", rollouts=[rollout]))["records"][rollout]

    rollouts = await asyncio.gather(*(converse(f"r{i}") for i in range(8)))
    for calls in rollouts:
        assert [(call["status"], call["prompt"], call["drift"]) for call in calls[1:]] == [(200, "exact", None)] * 2
        assert all(call["decode_s"] is not None and call["weight_version"] == "default" for call in calls)


async def test_the_middleware_cancels_what_runs(http: Http, engine: Engine) -> None:
    behind = Http(OnPolicyMiddleware(http.app, Settings()))
    body = {"messages": [USER], "trl_gym": {"rollout": "r1"}, "ignore_eos": True}
    call = asyncio.ensure_future(behind("POST", "/v1/chat/completions", body))
    await until(lambda: engine.counters.running == 1)
    assert await behind.post("/trl_gym/rollouts/cancel", rollouts=["r1"]) == {"aborted": 1}
    status, error = await call
    assert status == 400 and "maximum context length" in error["error"]["message"]
    assert engine.counters.running == 0 and engine.counters.aborted == 1


async def test_prompt_logprobs_as_the_weight_sync_asks_for_them(
    http: Http, engine: Engine, model: PreTrainedModel
) -> None:
    engine.park()
    ids = list(range(20, 40))
    body = {"prompt": [ids, ids[:5]], **PROBE}
    status, error = await http("POST", "/v1/completions", body)
    assert status == 409 and "the trainer computes with its model" in error["error"]["message"]
    with engine.lent():
        choices = (await http.post("/v1/completions", **body))["choices"]
    entries = choices[0]["prompt_logprobs"]
    expected = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
    assert entries[0] is None and len(choices[1]["prompt_logprobs"]) == 5
    for place, token in enumerate(ids[1:]):
        assert entries[place + 1] == {str(token): {"logprob": pytest.approx(expected[place, token].item(), abs=1e-4)}}
