"""Answer as vLLM's server does, with the engine of this process: the application behind the on-policy middleware.

Only what the middleware, `PolicyClient` and weight transports ask for is here, in vLLM's form and words
(`vllm/entrypoints`), and what it cannot do is refused with status 400. `GET /version` names the engine.

    GET   /health /version /v1/models /weight_info /server_info /get_world_size /tokenizer_info /is_paused /metrics
    POST  /tokenize /detokenize /v1/chat/completions /v1/completions
          /pause /resume /abort_requests /reset_prefix_cache /reset_mm_cache /reset_encoder_cache
          /init_weight_transfer_engine /start_weight_update /update_weights /finish_weight_update
          /update_weight_version

A client that hangs up aborts its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qs

import msgspec
import transformers

from trl_gym.errors import TrlGymError
from trl_gym.policy_server.middleware import openai
from trl_gym.policy_server.middleware.http import (
    TOO_MANY_CHARS,
    AnsweredError,
    ClientGoneError,
    Receive,
    Reply,
    Scope,
    Send,
    path_of,
    read_body,
)
from trl_gym.policy_server.middleware.turn import COMPLETION_TOKENS
from trl_gym.policy_server.transformers_engine import counters
from trl_gym.policy_server.transformers_engine.engine import (
    Completion,
    Engine,
    EngineLostError,
    ModelBusyError,
    SamplingRequest,
    UnknownTokenError,
)
from trl_gym.policy_server.transformers_engine.sampling import RefusedError, overflow, read_sampling, token_ids
from trl_gym.untrusted import parse_json

logger = logging.getLogger(__name__)
T = TypeVar("T")

Json = dict[str, Any]


class Renderer(Protocol):
    """Makes prompts of chats and messages of answers; what it refuses is a `ValueError` with words for the client.

    Attributes:
        chat_template: The source of the only template; None if there is none, or several.
    """

    @property
    def chat_template(self) -> str | None: ...

    def render(self, body: Mapping[str, Any], check: Callable[[str], None] = ...) -> list[int]:
        """Return the tokens of a request's `prompt`, or of its `messages` as its template options say; `check` may
        refuse the text before it is tokenized."""

    @property
    def longest_token(self) -> int:
        """Return the number of characters of the longest token."""

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Return each token as the vocabulary spells it."""

    def text(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""

    def sampled_text(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of sampled tokens; those beyond the vocabulary have none. Raises nothing."""

    def parse(self, ids: Sequence[int], prompt_ids: Sequence[int], body: Mapping[str, Any]) -> Json:
        """Return the assistant's message of sampled tokens. Raises nothing."""


class WeightLoader(Protocol):
    """Brings new weights into a model that this process alone has. All methods may block.

    Attributes:
        backend: Its name, as vLLM's `weight_transfer_config.backend`.
    """

    backend: str

    def init(self, init_info: Mapping[str, Any]) -> None:
        """Prepare it, once per training run."""

    def update(self, model: Any, update_info: Mapping[str, Any]) -> None:
        """Load one chunk of weights into the model, of which nothing is sampled meanwhile. Raises `TrlGymError`: it
        cannot be loaded; the model may have some of it."""

    def finish(self) -> None:
        """End an update. Raises `TrlGymError` if there is none, or it lacks weights."""


class EngineApp:
    """The ASGI application.

    Args:
        weight_loader: Brings new weights; None where the model is the trainer's own, and the routes of weights change
            the version alone.
    """

    def __init__(
        self, engine: Engine, renderer: Renderer, *, model_name: str, weight_loader: WeightLoader | None = None
    ) -> None:
        self.engine = engine
        self._renderer, self._model_name, self._loader = renderer, model_name, weight_loader
        self._words: dict[int, Json] = {}  # token id → its text and bytes
        self._get: dict[str, Callable[[], Any]] = {
            "/health": self._health,
            "/version": lambda: {"version": transformers.__version__, "engine": "transformers"},
            "/v1/models": self._models,
            "/weight_info": lambda: {"weight_version": engine.weight_version},
            "/server_info": self._server_info,
            "/get_world_size": lambda: {"world_size": 1},
            "/tokenizer_info": lambda: {"chat_template": renderer.chat_template},
            "/is_paused": self._is_paused,
            "/metrics": lambda: Reply(200, engine.counters.prometheus(model_name).encode(), counters.CONTENT_TYPE),
        }
        self._post: dict[str, Callable[[Json, Mapping[str, str]], Awaitable[Any]]] = {
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completions,
            "/pause": self._pause,
            "/resume": self._resume,
            "/abort_requests": self._abort,
            "/reset_prefix_cache": self._forget,
            "/reset_mm_cache": self._nothing,
            "/reset_encoder_cache": self._nothing,
            "/init_weight_transfer_engine": self._init_transfer,
            "/start_weight_update": self._nothing,
            "/update_weights": self._update_weights,
            "/finish_weight_update": self._finish_update,
            "/update_weight_version": self._rename_version,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            body = await read_body(receive)
            reply = await self._unless_gone(receive, self._answer(scope, body))
        except ClientGoneError:
            return
        except AnsweredError as answered:
            reply = answered.reply
        await reply.send(send)

    async def _unless_gone(self, receive: Receive, answer: Awaitable[Reply]) -> Reply:
        """Return the answer. Raises `ClientGoneError`, and cancels the work, if the client hangs up before."""
        work, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_hang_up(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGoneError
            return work.result()
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.wait({work, gone})  # the engine has let go of it by then

    async def _answer(self, scope: Scope, body: bytes) -> Reply:
        """Answer one request; every error is a reply."""
        method, path = scope["method"], path_of(scope)
        try:
            if method == "GET" and path in self._get:
                answer = self._get[path]()
            elif method == "POST" and path in self._post:
                query = {key: values[-1] for key, values in parse_qs(scope["query_string"].decode()).items()}
                answer = await self._post[path](_object(body), query)
            else:
                return Reply.error(404, f"{method} {path}: the transformers engine has no such route")
        except AnsweredError as answered:
            return answered.reply
        except (RefusedError, UnknownTokenError) as error:
            return Reply.error(400, str(error))
        except ModelBusyError as error:
            return Reply.error(409, str(error))
        except EngineLostError as error:
            return Reply.error(500, str(error))
        except TrlGymError as error:
            logger.warning("%s %s: %s", method, path, error)
            return Reply.error(500, str(error))
        except Exception as error:  # of a route, as any server answers it
            logger.exception("%s %s failed", method, path)
            return Reply.error(500, f"{type(error).__name__}: {error}")
        if isinstance(answer, Reply):
            return answer
        return Reply(200, b"" if answer is None else msgspec.json.encode(answer))

    # -- what it is ---------------------------------------------------------------------------------------------------

    def _health(self) -> Reply | None:
        try:
            self.engine.check()
        except EngineLostError as error:
            return Reply.error(503, str(error))
        return None

    def _is_paused(self) -> Json:
        self.engine.check()  # who asks wants an answer of the engine
        return {"is_paused": self.engine.is_paused}

    def _models(self) -> Json:
        model = {"id": self._model_name, "object": "model", "owned_by": "trl-gym", "root": self._model_name}
        length = self.engine.options.max_model_len
        return {"object": "list", "data": [{**model, "parent": None, "max_model_len": length}]}

    def _server_info(self) -> Json:
        config = {
            "model_config": {
                "logprobs_mode": "processed_logprobs",
                "max_model_len": self.engine.options.max_model_len,
            },
            "weight_transfer_config": {"backend": "shared" if self._loader is None else self._loader.backend},
            "lora_config": None,
            "parallel_config": {"data_parallel_size": 1, "tensor_parallel_size": 1, "pipeline_parallel_size": 1},
        }
        return {"vllm_config": config, "vllm_env": {}}

    # -- texts and tokens ---------------------------------------------------------------------------------------------

    async def _tokenize(self, body: Json, _query: Mapping[str, str]) -> Json:
        self._check_model(body)
        ids = self._render(body)
        strings = self._renderer.token_strings(ids) if body.get("return_token_strs") else None
        return {
            "tokens": ids,
            "count": len(ids),
            "max_model_len": self.engine.options.max_model_len,
            "token_strs": strings,
        }

    async def _detokenize(self, body: Json, _query: Mapping[str, str]) -> Json:
        ids = token_ids("tokens", body.get("tokens"))
        with _refusing():
            return {"prompt": self._renderer.text(ids, skip_special_tokens=False)}

    def _render(self, body: Json) -> list[int]:
        with _refusing():
            return self._renderer.render(body)

    def _prompt(self, text: Json, body: Json) -> list[int]:
        """Return the tokens of a prompt that may fit beside the output that the request wants."""
        length, asked = self.engine.options.max_model_len, body.get("max_completion_tokens") or body.get("max_tokens")
        num_output = asked if isinstance(asked, int) and 0 < asked < length else 0
        most = (length - num_output) * self._renderer.longest_token

        def check(prompt: str) -> None:
            if len(prompt) > most:
                sizes = {"max_model_len": length, "num_output": num_output, "num_input": length - num_output}
                raise RefusedError(TOO_MANY_CHARS.format(**sizes, num_chars=len(prompt), most=most))

        with _refusing():
            return self._renderer.render(text, check)

    def _check_model(self, body: Json) -> None:
        name = body.get("model")
        if name is not None and name != self._model_name:
            error = {"message": f"The model `{name}` does not exist.", "type": "NotFoundError", "code": 404}
            raise AnsweredError(Reply.from_json(404, {"error": {**error, "param": "model"}}))

    # -- sampling -----------------------------------------------------------------------------------------------------

    async def _chat(self, body: Json, _query: Mapping[str, str]) -> Json | Reply:
        self._check_model(body)
        transfer = body.get("kv_transfer_params")
        forced = transfer.get("prompt_token_ids") if isinstance(transfer, dict) else None
        forced = body.get("prompt_token_ids") if forced is None else forced
        prompt = self._prompt(body, body) if forced is None else token_ids("prompt_token_ids", forced)
        completion = await self._sample(prompt, body)
        message = self._renderer.parse(completion.ids, prompt, body)
        if body.get("parallel_tool_calls") is False and message.get("tool_calls"):
            message["tool_calls"] = message["tool_calls"][:1]
        logprobs = {"content": self._logprobs(completion, body)} if body.get("logprobs") else None
        with_ids = bool(body.get("return_token_ids"))
        reason = "tool_calls" if message.get("tool_calls") else completion.finish_reason
        choice = {
            "index": 0,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": self._stop_reason(completion, body),
            "token_ids": completion.ids if with_ids else None,
        }
        answer = {
            **self._head("chatcmpl", "chat.completion"),
            "choices": [choice],
            "usage": _usage(len(prompt), len(completion.ids)),
            "prompt_token_ids": prompt if with_ids else None,
            "metrics": _timings(completion),
        }
        if not body.get("stream"):
            return answer
        options = body.get("stream_options")
        wants_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        return Reply(200, openai.events(answer, include_usage=wants_usage), openai.CONTENT_TYPE)

    async def _completions(self, body: Json, _query: Mapping[str, str]) -> Json:
        """Complete texts or tokens. With `prompt_logprobs` nothing is sampled, so that a weight sync can ask for them
        while no trainer's rollouts run; while the trainer computes they are refused, and not held: it may be long."""
        self._check_model(body)
        timings: Json = {}
        if body.get("stream"):
            raise RefusedError("stream=True is not supported by the transformers engine in completions")
        if body.get("max_tokens") is None:
            body = {**body, "max_tokens": COMPLETION_TOKENS}
        prompts = self._prompts(body)
        if body.get("prompt_logprobs") is not None:
            if body["prompt_logprobs"] != 0 or body.get("max_tokens") != 1:
                raise RefusedError("prompt_logprobs must be 0, with max_tokens=1, for the transformers engine")
            for prompt in prompts:
                self._read(prompt, body)
            entries = await _called_aside(partial(self.engine.prompt_logprobs, prompts))
            choices = [
                _scored(index, prompt, one) for index, (prompt, one) in enumerate(zip(prompts, entries, strict=True))
            ]
            num_sampled = 0
        else:
            completions = await _gathered([self._sample(prompt, body) for prompt in prompts])
            choices = [
                self._choice(index, prompt, one, body)
                for index, (prompt, one) in enumerate(zip(prompts, completions, strict=True))
            ]
            num_sampled = sum(len(one.ids) for one in completions)
            timings = {"metrics": _timings(completions[0])} if len(completions) == 1 else {}
        usage = _usage(sum(map(len, prompts)), num_sampled)
        return {**self._head("cmpl", "text_completion"), "choices": choices, "usage": usage, **timings}

    async def _sample(self, prompt: list[int], body: Json) -> Completion:
        return await self.engine.generate(prompt, self._read(prompt, body))

    def _read(self, prompt: list[int], body: Json) -> SamplingRequest:
        length = self.engine.options.max_model_len
        if not prompt:
            raise RefusedError("The decoder prompt cannot be empty")
        if len(prompt) >= length:
            raise RefusedError(overflow(length, len(prompt), 1))
        return read_sampling(body, len(prompt), length)

    def _prompts(self, body: Json) -> list[list[int]]:
        given = body.get("prompt")
        texts = [given] if isinstance(given, str) else given
        if isinstance(texts, list) and texts and all(isinstance(one, str) for one in texts):
            special = {key: body[key] for key in ("add_special_tokens",) if key in body}
            return [self._prompt({"prompt": one, **special}, body) for one in texts]
        if isinstance(given, list) and given and all(isinstance(one, list) for one in given):
            return [token_ids("prompt", one) for one in given]
        return [token_ids("prompt", given)]

    def _choice(self, index: int, prompt: list[int], completion: Completion, body: Json) -> Json:
        with_ids, logprobs = bool(body.get("return_token_ids")), None
        if body.get("logprobs") is not None:
            entries = self._logprobs(completion, body)
            tokens = [entry["token"] for entry in entries]
            logprobs = {"tokens": tokens, "token_logprobs": completion.logprobs, "top_logprobs": None}
        return {
            "index": index,
            "text": self._renderer.sampled_text(completion.ids),
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
            "stop_reason": self._stop_reason(completion, body),
            "token_ids": completion.ids if with_ids else None,
            "prompt_token_ids": prompt if with_ids else None,
        }

    def _stop_reason(self, completion: Completion, body: Json) -> int | None:
        """Return the token that the request stopped at; None for those of the model itself."""
        return completion.stop_id if completion.stop_id in (body.get("stop_token_ids") or ()) else None

    def _logprobs(self, completion: Completion, body: Json) -> list[Json]:
        as_ids = bool(body.get("return_tokens_as_token_ids"))
        entries = []
        for token, logprob in zip(completion.ids, completion.logprobs, strict=True):
            entry = {**self._word(token), "logprob": logprob, "top_logprobs": []}
            entries.append({**entry, "token": f"token_id:{token}"} if as_ids else entry)
        return entries

    def _word(self, token: int) -> Json:
        if (word := self._words.get(token)) is None:
            text = self._renderer.sampled_text([token], skip_special_tokens=False)
            word = self._words[token] = {"token": text, "bytes": list(text.encode(errors="replace"))}
        return word

    def _head(self, prefix: str, kind: str) -> Json:
        name = f"{prefix}-{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self._model_name}

    # -- pause, weights -----------------------------------------------------------------------------------------------

    async def _pause(self, _body: Json, query: Mapping[str, str]) -> Json:
        mode = query.get("mode", "abort")
        match mode:
            case "wait" | "abort" | "keep":
                await self.engine.pause(mode)
            case _:
                raise RefusedError(f"mode must be 'wait', 'abort' or 'keep', not {mode[:100]!r}")
        return {"status": "paused"}

    async def _resume(self, _body: Json, _query: Mapping[str, str]) -> Json:
        self.engine.resume()
        return {"status": "resumed"}

    async def _abort(self, body: Json, _query: Mapping[str, str]) -> Json:
        if body.get("request_ids"):
            raise RefusedError("request_ids must be empty for the transformers engine: hang up to abort one request")
        running = self.engine.counters.running
        await asyncio.to_thread(self.engine.forget, abort=True)
        return {"status": "aborted", "aborted": running}

    async def _forget(self, _body: Json, _query: Mapping[str, str]) -> Json:
        await asyncio.to_thread(self.engine.forget)
        return {"success": True}

    async def _nothing(self, _body: Json, _query: Mapping[str, str]) -> None:
        return None

    async def _init_transfer(self, body: Json, _query: Mapping[str, str]) -> None:
        if self._loader is not None:
            await asyncio.to_thread(self._loader.init, body.get("init_info") or {})

    async def _update_weights(self, body: Json, _query: Mapping[str, str]) -> None:
        if (loader := self._loader) is None:
            return

        def load() -> None:
            with self.engine.changing() as model:
                loader.update(model, body.get("update_info") or {})

        await asyncio.to_thread(load)

    async def _finish_update(self, body: Json, _query: Mapping[str, str]) -> None:
        if self._loader is not None:
            await asyncio.to_thread(self._loader.finish)
        await asyncio.to_thread(self.engine.forget)
        if body.get("weight_version") is not None:
            self.engine.weight_version = str(body["weight_version"])

    async def _rename_version(self, body: Json, _query: Mapping[str, str]) -> Json:
        if not isinstance(version := body.get("new_version"), str):
            raise RefusedError("new_version must be a text")
        self.engine.weight_version = version
        return {"success": True}


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn what a renderer refuses into a `RefusedError`."""
    try:
        yield
    except ValueError as error:
        raise RefusedError(str(error)) from error


async def _hang_up(receive: Receive) -> None:
    """Return when the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _gathered(calls: Sequence[Coroutine[Any, Any, Completion]]) -> list[Completion]:
    """Run calls side by side; if one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _object(body: bytes) -> Json:
    """Parse the body of a request; an empty one is an empty object."""
    if not body:
        return {}
    try:
        parsed = parse_json(body)
    except ValueError as error:
        raise RefusedError(f"the body is no JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise RefusedError("the body must be a JSON object")
    return parsed


def _usage(num_prompt_tokens: int, num_sampled: int) -> Json:
    total = num_prompt_tokens + num_sampled
    return {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_sampled, "total_tokens": total}


def _timings(completion: Completion) -> Json:
    return {
        "queue_time_ms": completion.queue_s * 1000,
        "time_to_first_token_ms": completion.first_token_s * 1000,
        "generation_time_ms": completion.decode_s * 1000,
    }


def _scored(index: int, prompt: list[int], logprobs: list[float]) -> Json:
    entries: list[Json | None] = [None]  # the first token has no predecessor
    entries += [{str(token): {"logprob": one}} for token, one in zip(prompt[1:], logprobs, strict=True)]
    return {"index": index, "text": "", "prompt_logprobs": entries, "finish_reason": "length"}


async def _called_aside(call: Callable[[], T]) -> T:
    """Call in a thread that, unlike one of `asyncio.to_thread`, keeps no process from ending if it hangs."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            told = partial(future.set_result, call())
        except Exception as error:  # raised by who waits
            told = partial(future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(lambda: None if future.done() else told())

    threading.Thread(target=run, name="trl-gym prompt_logprobs", daemon=True).start()
    return await future
