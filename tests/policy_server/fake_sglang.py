"""A stand-in for SGLang's server: its routes, bodies, errors and rules (0.5.23) over HTTP, on a model of transformers.

What it does as the real one does, with where that is written (below `sglang/srt/`):

  * chat with `input_ids`, ids back, log-probabilities after temperature, errors of pydantic for null
    (`entrypoints/openai/protocol.py`, `serving_chat.py`); an assistant's message at the end becomes a user's
  * `/tokenize` that renders as it is told, `/detokenize` (`serving_tokenize.py`)
  * three ways to say that a prompt is too long (`managers/tokenizer_manager.py`, `managers/utils.py`), and five tokens
    of the context that nothing may use (`managers/tp_worker.py`)
  * pause by retract, in place and abort; a flush that is refused while something runs (`managers/scheduler.py`)
  * weights from a folder, upon which the model is called after that folder (`tokenizer_manager.py`); spans of versions
    of what was sampled across an update (`utils/weight_versions.py`)
  * a process that dies of a token id that is not in the vocabulary: here the connection breaks off
  * `/health` that samples a token and fails while paused; `/update_weight_version` that aborts unless told not to

It computes every token over the whole sequence: nothing is cached, so new weights apply from the next token on, as
they do after a retract.
"""

from __future__ import annotations

import asyncio
import copy
import json
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import uvicorn
from aiohttp import web
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_gym.policy_server.gateway import GatewayOptions, assemble, check_upstreams
from trl_gym.processes import bind_socket

Json = dict[str, Any]

_LOOK_EVERY_S = 0.002
_RESERVED = 5  # tokens of the context that no prompt may use
_NOT_NULL = ("frequency_penalty", "presence_penalty", "logprobs", "n", "stream", "parallel_tool_calls", "ignore_eos")


class Refused(Exception):
    """An error answer of the OpenAI routes."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


@dataclass
class Running:
    """One request that is being sampled."""

    prompt: list[int]
    sampling: Json
    lora: str | None
    output: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, list[tuple[float, int]]]] = field(default_factory=list)
    events: list[tuple[str, int]] = field(default_factory=list)  # versions that were, and tokens sampled by then
    finish: Json | None = None


class FakeSglang:
    """The server. Its attributes may be changed while it runs.

    Attributes:
        requests: What it was asked: method, path, JSON.
        answers: `"METHOD /path"` → status and JSON (or bytes), instead of what it would say.
        hold_at: A request that has sampled so many tokens stands still; None for none.
        aborted: Names of the requests that were aborted, by name or because their client hung up.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_model_len: int = 256,
        lora: bool = False,
        api_key: str | None = None,
        raw_logprobs: bool = False,
    ) -> None:
        self.folder, self.max_model_len, self.lora, self.api_key = folder, max_model_len, lora, api_key
        self.raw_logprobs = raw_logprobs  # as with $SGLANG_RETURN_ORIGINAL_LOGPROB
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.served_name = self.started_name = str(folder)
        self.scheduler_hangs = False
        self.version, self.paused, self.ready = "default", "", asyncio.Event()
        self.requests: list[tuple[str, str, Json]] = []
        self.answers: dict[str, tuple[int, Any]] = {}
        self.aborted: list[str] = []
        self.hold_at: int | None = None
        self.running: dict[str, Running] = {}
        self.adapters: dict[str, tuple[str, Any]] = {}
        self.asleep: set[str] = set()
        self.group: Any = None  # of a weight update from a trainer's process
        self.is_updating = False
        self.num_generated = self.num_prompted = self.port = 0
        self.ready.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def asked(self, path: str) -> list[Json]:
        return [body for _, asked, body in self.requests if asked == path]

    async def start(self) -> FakeSglang:
        app = web.Application(client_max_size=2**28)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05, access_log=None)
        await self._runner.setup()
        self._loop = asyncio.get_running_loop()
        sock = bind_socket(port=self.port)
        self.port = sock.getsockname()[1]
        await web.SockSite(self._runner, sock).start()
        return self

    async def stop(self) -> None:
        await self._runner.cleanup()

    def die(self) -> None:
        """End as a killed process does. Called from another thread."""
        asyncio.run_coroutine_threadsafe(self.stop(), self._loop).result(10.0)

    # -- HTTP ---------------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        try:
            body = json.loads(raw) if raw else {}
            json.dumps(body, ensure_ascii=False).encode()  # pydantic takes no half surrogate
        except ValueError:
            return _flat_error(400, "1 validation error: JSON decode error")
        self.requests.append((request.method, request.path, body))
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if (given := self.answers.get(f"{request.method} {request.path}")) is not None:
            status, payload = given
            is_text = isinstance(payload, bytes)
            return web.Response(body=payload, status=status) if is_text else web.json_response(payload, status=status)
        handler = _ROUTES.get((request.method, request.path))
        if handler is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        try:
            answer = getattr(self, handler)(body)
            if asyncio.iscoroutine(answer):
                answer = await answer
        except Refused as error:
            return _flat_error(error.status, str(error))
        except IndexError:
            assert request.transport is not None
            request.transport.abort()
            raise
        if isinstance(answer, web.StreamResponse):
            return answer
        try:  # FastAPI writes what it is given in UTF-8
            return web.json_response(body=json.dumps(answer, ensure_ascii=False).encode())
        except UnicodeEncodeError:
            return web.Response(status=500, text="Internal Server Error")

    # -- what it is ---------------------------------------------------------------------------------------------------

    def _health(self, _: Json) -> Any:
        return web.Response(status=503 if self.paused or self.asleep else 200)  # its token does not come

    def _ready(self, _: Json) -> Any:
        return web.Response(status=503 if self.paused else 200)

    def _models(self, _: Json) -> Json:
        base = {"object": "model", "owned_by": "sglang", "max_model_len": self.max_model_len, "parent": None}
        adapters = [
            {**base, "id": name, "root": path, "parent": self.served_name, "max_model_len": None}
            for name, (path, _) in self.adapters.items()
        ]
        return {"object": "list", "data": [{**base, "id": self.served_name, "root": self.served_name}, *adapters]}

    def _model_info(self, _: Json) -> Json:
        return {"model_path": self.served_name, "is_generation": True, "weight_version": self.version}

    async def _server_info(self, _: Json) -> Json:
        while self.scheduler_hangs:  # it has a part in the answer
            await asyncio.sleep(0.01)
        args = {"served_model_name": self.started_name, "tp_size": 1, "pp_size": 1, "dp_size": 1}
        lora = {"max_lora_rank": 16, "lora_target_modules": ["q_proj", "v_proj"]} if self.lora else {}
        return {**args, **lora, "enable_lora": self.lora, "version": "0.5.23"}

    def _metrics(self, _: Json) -> Any:
        labels = f'{{engine_type="unified",model_name="{self.served_name}"}}'
        values = {
            "num_running_reqs": len(self.running),
            "prompt_tokens_total": self.num_prompted,
            "generation_tokens_total": self.num_generated,
        }
        return web.Response(text="".join(f"sglang:{name}{labels} {value}.0\n" for name, value in values.items()))

    # -- the tokenizer ------------------------------------------------------------------------------------------------

    def _tokenize(self, body: Json) -> Json:
        if (body.get("prompt") is None) == (body.get("messages") is None):
            raise Refused("Exactly one of 'prompt' or 'messages' must be provided.")
        if body.get("messages") is not None:
            ids = self._render(body)
        else:
            ids = self.tokenizer.encode(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))
        return {"tokens": ids, "count": len(ids), "max_model_len": self.max_model_len}

    def _detokenize(self, body: Json) -> Json:
        tokens, skip = body["tokens"], body.get("skip_special_tokens", True)
        if tokens and isinstance(tokens[0], list):
            return {"text": [self.tokenizer.decode(ids, skip_special_tokens=skip) for ids in tokens]}
        return {"text": self.tokenizer.decode(tokens, skip_special_tokens=skip)}

    def _render(self, body: Json) -> list[int]:
        if not all(isinstance(message, dict) for message in body["messages"]):
            raise Refused("1 validation error: {'loc': ('body', 'messages'), 'msg': 'Input should be a dictionary'}")
        messages = [{**message, "content": message.get("content") or ""} for message in body["messages"]]
        opened, prefix = body.get("add_generation_prompt"), []
        if (opened is None or body.get("continue_final_message")) and messages[-1]["role"] == "assistant":
            if opened is False:
                raise Refused("continue_final_message needs add_generation_prompt to open the assistant turn.")
            last = messages.pop()
            if body.get("continue_final_message"):
                prefix = self.tokenizer.encode(last["content"], add_special_tokens=False)
            else:
                messages.append({"role": "user", "content": last["content"]})
        tools = body.get("tools") if body.get("tool_choice") != "none" else None
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=opened is not False,
                **(body.get("chat_template_kwargs") or {}),
            )
        except Exception as error:
            raise Refused(str(error)) from error
        return [*self.tokenizer.encode(text, add_special_tokens=False), *prefix]

    # -- sampling -----------------------------------------------------------------------------------------------------

    async def _chat(self, body: Json) -> Any:
        if wrong := [key for key in _NOT_NULL if key in body and body[key] is None]:
            raise Refused(f"1 validation error: {{'loc': ('body', '{wrong[0]}'), 'msg': 'Input should be valid'}}")
        if not body.get("messages"):
            raise Refused("Messages cannot be empty.")
        if (body.get("temperature") or 0.0) < 0.0:
            raise Refused(f"temperature must be non-negative, got {body['temperature']}.")
        for name in ("return_prompt_token_ids", "return_token_ids"):
            if body.get("stream") and body.get(name):
                raise Refused(f"{name} is not supported with streaming. Please set stream=false when using it.")
        prompt = body["input_ids"] if body.get("input_ids") is not None else self._render(body)
        sampling = {**body, "max_new_tokens": body.get("max_completion_tokens") or body.get("max_tokens")}
        rid = body.get("rid") or uuid.uuid4().hex
        done = [await self._sample(f"{rid}{place or ''}", prompt, sampling) for place in range(body.get("n", 1))]
        choices = [self._choice(place, body, prompt, one) for place, one in enumerate(done)]
        sampled = sum(len(one.output) for one in done)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": sampled, "total_tokens": len(prompt) + sampled}
        answer = {
            "id": rid,
            "object": "chat.completion",
            "created": 1,
            "model": body.get("model", "default"),
            "choices": choices,
            "usage": {**usage, "prompt_tokens_details": None, "reasoning_tokens": 0},
            "metadata": self._versions(done[0]),
        }
        return _as_stream(answer) if body.get("stream") else answer

    def _choice(self, index: int, body: Json, prompt: list[int], one: Running) -> Json:
        assert one.finish is not None
        finish, kept = dict(one.finish), one.output
        if isinstance(finish.get("matched"), int) and not body.get("no_stop_trim"):
            kept = kept[:-1]
        skip = body.get("skip_special_tokens", True) and not body.get("tools")
        text = self.tokenizer.decode(kept, skip_special_tokens=skip)
        if isinstance(finish.get("matched"), str) and not body.get("no_stop_trim"):
            text = text[: text.index(finish["matched"])]
        text, calls = _tool_calls(text) if body.get("tools") and body.get("tool_choice") != "none" else (text, None)
        if calls and finish["type"] == "stop":
            finish = {"type": "tool_calls"}
        message = {"role": "assistant", "content": text, "reasoning_content": None}
        entries = [
            {**self._entry(token, logprob), "top_logprobs": [self._entry(other, value) for value, other in top]}
            for token, (logprob, top) in zip(one.output, one.logprobs, strict=True)
        ]
        choice = {
            "index": index,
            "message": message | ({"tool_calls": calls} if calls else {}),
            "logprobs": {"content": entries} if body.get("logprobs") else None,
            "finish_reason": finish["type"],
            "matched_stop": finish.get("matched"),
        }
        if body.get("return_token_ids") or body.get("return_prompt_token_ids"):
            choice["prompt_token_ids"] = prompt
        if body.get("return_token_ids"):
            choice["response_token_ids"] = one.output
        return choice

    def _entry(self, token: int, logprob: float) -> Json:
        text = self.tokenizer.decode([token])
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}

    async def _generate(self, body: Json) -> Any:
        ids, sampling = body["input_ids"], body.get("sampling_params") or {}
        if body.get("token_ids_logprob"):
            (token,), size = body["token_ids_logprob"], self.model.config.vocab_size
            text = f"token_ids_logprob contains out-of-vocabulary token id {token}; valid range is [0, {size})."
            return web.json_response({"error": {"message": text}}, status=400)
        prompts = ids if ids and isinstance(ids[0], list) else [ids]
        lora = body.get("lora_path")
        loras = lora if isinstance(lora, list) else [lora] * len(prompts)
        answers = []
        try:
            for prompt, name in zip(prompts, loras, strict=True):
                one = await self._sample(uuid.uuid4().hex, prompt, {**sampling, "lora_path": name})
                meta = {"id": "1", "finish_reason": one.finish, "prompt_tokens": len(prompt), **self._versions(one)}
                if body.get("return_logprob"):
                    given = (
                        self._logits(prompt, name).log_softmax(-1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])
                    )
                    values = [None, *given[:, 0].tolist()]
                    start = max(body.get("logprob_start_len", -1), 0)
                    pairs = [[value, token, None] for value, token in zip(values, prompt, strict=True)]
                    meta["input_token_logprobs"] = pairs[start:]
                    sampled = zip(one.logprobs, one.output, strict=True)
                    meta["output_token_logprobs"] = [[value, token, None] for (value, _), token in sampled]
                answers.append(
                    {"text": self.tokenizer.decode(one.output), "output_ids": one.output, "meta_info": meta}
                )
        except Refused as error:
            return web.json_response({"error": {"message": str(error)}}, status=400)
        return answers if ids and isinstance(ids[0], list) else answers[0]

    async def _sample(self, rid: str, prompt: list[int], sampling: Json) -> Running:
        if (lora := sampling.get("lora_path")) and lora not in self.adapters:
            raise Refused(
                f"The following requested LoRA adapters are not loaded: {lora}\nLoaded adapters: dict_keys([])."
            )
        limit = sampling.get("max_new_tokens")
        while self.paused:
            self.ready.clear()
            await self.ready.wait()
        _check_length(len(prompt), limit, self.max_model_len)
        room = self.max_model_len - 1 - len(prompt) - 1
        one = self.running[rid] = Running(prompt, sampling, lora)
        self.num_prompted += len(prompt)
        try:
            while one.finish is None:
                await asyncio.sleep(0)
                while self.hold_at is not None and len(one.output) >= self.hold_at and one.finish is None:
                    await asyncio.sleep(_LOOK_EVERY_S)
                while self.paused and one.finish is None:
                    self.ready.clear()
                    await self.ready.wait()
                if one.finish is None:
                    self._advance(one, min(limit or room, room))
        except asyncio.CancelledError:
            self.aborted.append(rid)
            raise
        finally:
            del self.running[rid]
        return one

    def _advance(self, one: Running, limit: int) -> None:
        """Sample one token."""
        logits = self._logits([*one.prompt, *one.output], one.lora)[-1]
        temperature = one.sampling.get("temperature")
        temperature = 1.0 if temperature is None else temperature
        logprobs = (logits / (temperature or 1.0)).log_softmax(-1)
        kept = _truncated(logprobs, one.sampling)
        token = int(logprobs.argmax() if temperature == 0 else torch.multinomial(kept, 1))
        if self.raw_logprobs:
            logprobs = logits.log_softmax(-1)
        top = logprobs.topk(one.sampling.get("top_logprobs") or 0)
        one.logprobs.append(
            (float(logprobs[token]), list(zip(top.values.tolist(), top.indices.tolist(), strict=True)))
        )
        one.output.append(token)
        self.num_generated += 1
        text, stops = self.tokenizer.decode(one.output), one.sampling.get("stop") or []
        found = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop in text]
        ends = [*(one.sampling.get("stop_token_ids") or []), *self._own_stops(one)]
        if token in ends:
            one.finish = {"type": "stop", "matched": token}
        elif found:
            one.finish = {"type": "stop", "matched": found[0]}
        elif len(one.output) >= limit:
            one.finish = {"type": "length", "length": limit}

    def _own_stops(self, one: Running) -> list[int]:
        return [] if one.sampling.get("ignore_eos") else [self.tokenizer.eos_token_id]

    def _logits(self, ids: list[int], lora: str | None) -> torch.Tensor:
        model = self.model if lora is None else self.adapters[lora][1]
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0].float()

    def _versions(self, one: Running) -> Json:
        spans: list[Json] = []
        for version, end in [*one.events, (self.version, len(one.output))]:
            if spans and end <= spans[-1]["end"]:
                continue
            if spans and spans[-1]["version"] == version:
                spans[-1]["end"] = end
                continue
            spans.append({"version": version, "start": spans[-1]["end"] if spans else 0, "end": end})
        return {"weight_version": spans[-1]["version"], "weight_versions": spans}

    # -- pause, weights, adapters, memory -----------------------------------------------------------------------------

    async def _pause(self, body: Json) -> Json:
        mode = body.get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise Refused("1 validation error: Input should be 'abort', 'retract' or 'in_place'")
        self.paused = mode
        self.ready.clear()
        if mode == "abort":
            self._abort({"abort_all": True})
            while self.running:
                await asyncio.sleep(_LOOK_EVERY_S)
        return {"message": "Generation paused successfully.", "status": "ok"}

    def _continue(self, _: Json) -> Json:
        self.paused = ""
        self.ready.set()
        return {"message": "Generation continued successfully.", "status": "ok"}

    def _abort(self, body: Json) -> Any:
        rid = body.get("rid") or ""
        for name, one in self.running.items():
            if body.get("abort_all") or (rid and name.startswith(rid)):
                one.finish = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
                self.aborted.append(name)
        if self.paused:  # the scheduler drops what waits
            self.ready.set()
        return web.Response()

    def _flush(self, _: Json | None = None) -> Any:
        if self.running and self.paused != "retract":
            return web.Response(text="Flush cache failed.\n", status=400)
        return web.Response(text="Cache flushed.\n")

    async def _update_from_disk(self, body: Json) -> Any:
        while not self.paused and self.running:  # it takes the writer's lock
            await asyncio.sleep(_LOOK_EVERY_S)
        try:
            files = sorted(Path(body["model_path"]).glob("*.safetensors"))
            if not files:
                raise FileNotFoundError(f"Cannot find any model weights with `{body['model_path']}`")
            tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
            state = self.model.state_dict()
            if unknown := sorted(set(tensors) - set(state)):
                raise KeyError(unknown[0])
            for name, tensor in tensors.items():
                state[name].copy_(tensor)
        except (OSError, KeyError, RuntimeError) as error:
            failure = {
                "success": False,
                "message": f"Failed to update weights: {error}.\nRolling back to original weights.",
            }
            return web.json_response({**failure, "num_paused_requests": 0}, status=400)
        self.served_name = body["model_path"]
        if body.get("weight_version") is not None:
            self._change_version(body["weight_version"])
        if body.get("flush_cache", True) and self._flush().status != 200:
            failed = (
                "Weights were updated, but the cache was not flushed because requests are still running or queued."
            )
            return web.json_response({"success": False, "message": failed, "num_paused_requests": 0}, status=400)
        return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}

    def _change_version(self, version: str) -> None:
        if version != self.version:
            for one in self.running.values():
                if one.output:
                    one.events.append((self.version, len(one.output)))
        self.version = version

    async def _join_group(self, body: Json) -> Json:
        """As `init_custom_process_group` (`utils/common.py`): its prefixes of the store's keys are torch's own."""
        wait = timedelta(seconds=30)
        port, size, name = body["master_port"], body["world_size"], body["group_name"]

        def join() -> dist.ProcessGroup:
            keys: Any = dist.TCPStore(body["master_address"], port, size, False, wait)
            for prefix in (name, f"{name}/", "cpu/"):
                keys = dist.PrefixStore(prefix, keys)
            return dist.ProcessGroupGloo(keys, body["rank_offset"], size, wait)

        assert body["backend"] == "gloo"
        self.group = await asyncio.to_thread(join)
        return {"success": True, "message": "Succeeded to initialize custom process group."}

    def _leave_group(self, body: Json) -> Any:
        gone, self.group = self.group, None
        return web.json_response({"success": gone is not None, "message": ""}, status=200 if gone else 400)

    def _begin_update(self, _: Json) -> Any:
        was, self.is_updating = self.is_updating, True
        return web.json_response({"success": not was, "message": "already open"}, status=400 if was else 200)

    async def _receive(self, body: Json) -> Any:
        if not self.is_updating:
            return web.json_response({"success": False, "message": "must run between begin and end"}, status=400)
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        state, received = self.model.state_dict(), {}
        for name, kind, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, kind))
            await asyncio.to_thread(lambda one: self.group.broadcast([one], options).wait(), tensor)
            received[name] = tensor
        if unknown := set(received) - set(state):
            return web.json_response({"success": False, "message": f"unknown: {unknown}"}, status=400)
        self.model.load_state_dict(state | received)
        return {"success": True, "message": "Succeeded to update parameter online."}

    def _end_update(self, _: Json) -> Any:
        was, self.is_updating = self.is_updating, False
        return web.json_response({"success": was, "message": "none is open"}, status=200 if was else 400)

    def _update_version(self, body: Json) -> Json:
        if body.get("abort_all_requests", True):
            self._abort({"abort_all": True})
        self._change_version(body["new_version"])
        told = f"Weight version updated to {body['new_version']}"
        return {"success": True, "message": told, "new_version": body["new_version"]}

    def _load_adapter(self, body: Json) -> Any:
        try:
            if not self.lora:
                raise ValueError("LoRA is not enabled. Please set `--enable-lora` to enable LoRA.")
            from peft import PeftModel

            merged = PeftModel.from_pretrained(copy.deepcopy(self.model), body["lora_path"]).merge_and_unload()
        except (ValueError, OSError, RuntimeError) as error:
            failed = {"success": False, "error_message": str(error), "loaded_adapters": None}
            return web.json_response(failed, status=400)
        self.adapters[body["lora_name"]] = (body["lora_path"], merged.eval())
        return self._loaded()

    def _unload_adapter(self, body: Json) -> Any:
        if self.adapters.pop(body["lora_name"], None) is None:
            failed = {"success": False, "error_message": f"LoRA with name {body['lora_name']} does not exist."}
            return web.json_response(failed, status=400)
        return self._loaded()

    def _loaded(self) -> Json:
        loaded = {name: path for name, (path, _) in self.adapters.items()}
        return {"success": True, "error_message": "", "loaded_adapters": loaded}

    def _release(self, body: Json) -> Any:
        if self.running and not self.paused:
            raise Refused("release_memory_occupation should be called only when server is idle.", 500)
        self.asleep |= set(body.get("tags") or ("weights", "kv_cache"))
        return None

    def _take_back(self, body: Json) -> Any:
        self.asleep -= set(body.get("tags") or self.asleep)
        return None


_ROUTES = {
    ("GET", "/health"): "_health",
    ("GET", "/ready"): "_ready",
    ("GET", "/v1/models"): "_models",
    ("GET", "/model_info"): "_model_info",
    ("GET", "/server_info"): "_server_info",
    ("GET", "/metrics"): "_metrics",
    ("POST", "/tokenize"): "_tokenize",
    ("POST", "/detokenize"): "_detokenize",
    ("POST", "/v1/chat/completions"): "_chat",
    ("POST", "/generate"): "_generate",
    ("POST", "/pause_generation"): "_pause",
    ("POST", "/continue_generation"): "_continue",
    ("POST", "/abort_request"): "_abort",
    ("POST", "/flush_cache"): "_flush",
    ("POST", "/update_weights_from_disk"): "_update_from_disk",
    ("POST", "/init_weights_update_group"): "_join_group",
    ("POST", "/destroy_weights_update_group"): "_leave_group",
    ("POST", "/begin_weight_update"): "_begin_update",
    ("POST", "/update_weights_from_distributed"): "_receive",
    ("POST", "/end_weight_update"): "_end_update",
    ("POST", "/update_weight_version"): "_update_version",
    ("POST", "/load_lora_adapter"): "_load_adapter",
    ("POST", "/unload_lora_adapter"): "_unload_adapter",
    ("POST", "/release_memory_occupation"): "_release",
    ("POST", "/resume_memory_occupation"): "_take_back",
}


def _check_length(num_prompt: int, limit: int | None, longest: int) -> None:
    if num_prompt >= longest:
        raise Refused(f"The input ({num_prompt} tokens) is longer than the model's context length ({longest} tokens).")
    if limit is not None and num_prompt + limit > longest:
        raise Refused(
            f"Requested token count exceeds the model's maximum context length of {longest} tokens. You requested "
            f"a total of {num_prompt + limit} tokens: {num_prompt} tokens from the input messages and {limit} tokens "
            "for the completion. Please reduce the number of tokens in the input messages or the completion to fit "
            "within the limit."
        )
    if num_prompt >= (allowed := longest - 1 - _RESERVED):
        raise Refused(
            f"Input length ({num_prompt} tokens) exceeds the maximum allowed length ({allowed} tokens). Use a shorter "
            "input or enable --allow-auto-truncate."
        )


def _truncated(logprobs: torch.Tensor, sampling: Json) -> torch.Tensor:
    """Return the probabilities after `top_k`, `top_p` and `min_p`."""
    probabilities = logprobs.exp()
    top_k, top_p, min_p = sampling.get("top_k"), sampling.get("top_p"), sampling.get("min_p")
    if top_k is not None and top_k > 0:
        probabilities[probabilities < probabilities.topk(min(top_k, len(probabilities))).values[-1]] = 0.0
    if top_p is not None and top_p < 1.0:
        ordered, places = probabilities.sort(descending=True)
        probabilities[places[(ordered.cumsum(0) - ordered) >= top_p * probabilities.sum()]] = 0.0
    if min_p:
        probabilities[probabilities < min_p * probabilities.max()] = 0.0
    return probabilities


def _tool_calls(text: str) -> tuple[str, list[Json] | None]:
    """What SGLang's parser `qwen` makes of a text; a call that is not whole stays text."""
    before, opened, rest = text.partition("<tool_call>\n")
    inside, closed, _ = rest.partition("\n</tool_call>")
    try:
        call = json.loads(inside) if opened and closed else None
        function = (
            {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)} if call else None
        )
    except (ValueError, KeyError, TypeError):
        function = None
    if function is None:
        return text, None
    return before.strip(), [
        {"id": f"call_{uuid.uuid4().hex[:24]}", "index": 0, "type": "function", "function": function}
    ]


def _flat_error(status: int, text: str) -> web.Response:
    kind = "BadRequest" if status == 400 else "InternalServerError"
    error = {"object": "error", "message": text, "type": kind, "param": None, "code": status}
    return web.json_response(error, status=status)


def _as_stream(answer: Json) -> web.Response:
    choice = answer["choices"][0]
    head = {key: answer[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    chunks = [
        {**head, "choices": [{"index": 0, "delta": choice["message"], "finish_reason": None}]},
        {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]},
    ]
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return web.Response(text="".join([*lines, "data: [DONE]\n\n"]), content_type="text/event-stream")


@asynccontextmanager
async def running(folder: Path, **how: Any) -> AsyncIterator[FakeSglang]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is tiny, and threads that wait for each other on busy cores are slow
    server = await FakeSglang(folder, **how).start()
    try:
        yield server
    finally:
        await server.stop()
        torch.set_num_threads(num_threads)


@contextmanager
def behind_gateway(folder: Path, *, gateway_key: str | None = None, **how: Any) -> Iterator[tuple[FakeSglang, str]]:
    """The stand-in and the base URL of a gateway before it, both in a thread of this process."""
    started: Future[tuple[FakeSglang, str, uvicorn.Server]] = Future()

    async def serve() -> None:
        async with running(folder, **how) as fake:
            facts = await check_upstreams([fake.url], api_key=fake.api_key, timeout_s=60.0, note=lambda _: None)
            options = GatewayOptions(upstreams=[fake.url], upstream_api_key=fake.api_key, api_key=gateway_key)
            config = uvicorn.Config(assemble(facts, options)[1], lifespan="on", ws="none", log_config=None)
            server, sock = uvicorn.Server(config), bind_socket()
            answering = asyncio.create_task(server.serve(sockets=[sock]))
            while not (server.started or answering.done()):
                await asyncio.sleep(0.01)
            started.set_result((fake, f"http://127.0.0.1:{sock.getsockname()[1]}/v1", server))
            await answering

    thread = threading.Thread(target=_run, args=(serve, started), daemon=True)
    thread.start()
    fake, base_url, server = started.result(60.0)
    try:
        yield fake, base_url
    finally:
        server.should_exit = True
        thread.join(30.0)


def _run(serve: Callable[[], Coroutine[Any, Any, None]], started: Future[Any]) -> None:
    try:
        asyncio.run(serve())
    except BaseException as error:
        if not started.done():
            started.set_exception(error)
        raise
