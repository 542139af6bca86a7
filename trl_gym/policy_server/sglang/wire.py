"""Ask one SGLang server what is asked in vLLM's form, and answer in vLLM's form: a `Wire` of the gateway.

Most requests become one of SGLang's (`dialect.py`). Some become several, or are answered here, because SGLang lacks
what vLLM does for them:

  * `/pause?mode=wait` lets what runs finish. SGLang would abort or freeze it: calls that come are held here instead,
    and SGLang is paused when the last one that was let through has ended. `/sleep` waits the same way: a server
    that is asked for its memory while something runs dies of it.
  * A weight update is begun, carried out and finished in three calls; SGLang replaces weights from disk in one.
  * A file of weights is not a folder with one, which is what SGLang reads: a folder with a link to it is made for the
    time of the call.
  * `/health` of SGLang samples a token, which a paused server never does. It is asked whether it answers at all; its
    process ends with its engine. Whether its scheduler answers, paused or not, is asked with `/is_paused`.
  * A token id that is not in the vocabulary ends SGLang's process: exact prompts are checked here.
  * A client that hangs up is noticed by SGLang when a token comes, by a request that waits for its turn after seconds:
    it is aborted by name as well.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import msgspec

from trl_gym.policy_server.middleware.http import AnsweredError, Reply, json_object, strict_json
from trl_gym.policy_server.sglang import dialect
from trl_gym.policy_server.upstreams import Answering, ForwardedRequest, ask, stream

_logger = logging.getLogger("trl_gym.gateway")

_ABORT_TIMEOUT_S = 10.0
_MAX_TEXTS = 2**20  # tokens whose text is kept; a vocabulary has fewer
_JSON_HEADERS = frozenset({"content-type"})
_MAX_SECRET_CHARS = 1024


@dataclass(slots=True)
class Gate:
    """Holds calls that sample while the server is paused or asleep, and knows when none is under way."""

    closed_by: set[str] = field(default_factory=set)  # of `"pause"` and `"sleep"`
    _open: asyncio.Event = field(default_factory=asyncio.Event)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _num_running: int = 0

    def __post_init__(self) -> None:
        self._open.set()
        self._idle.set()

    def close(self, why: str) -> None:
        """Let no call through from here on."""
        self.closed_by.add(why)
        self._open.clear()

    def open(self, why: str) -> None:
        """Take one reason away, and let calls through if there is none left."""
        self.closed_by.discard(why)
        if not self.closed_by:
            self._open.set()

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """Wait until the gate is open, and be under way inside of the block."""
        while not self._open.is_set():
            await self._open.wait()
        self._num_running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()

    async def drained(self) -> None:
        """Wait until no call is under way."""
        await self._idle.wait()


@dataclass(frozen=True, slots=True)
class _Call:
    """A request in vLLM's form, on its way to one server."""

    session: aiohttp.ClientSession
    url: str
    request: ForwardedRequest

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the request; empty for no body. SGLang would take NaN for a temperature. Raises
        `AnsweredError` or `UnsupportedError`: it is something else, or has fields of other types."""
        if not self.request.body.strip():
            return {}
        try:
            body = strict_json(self.request.body)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise AnsweredError(Reply.error(400, f"the body of {self.request} must be a JSON object"))
        dialect.check_request(body)
        return body

    def query(self, name: str, default: str) -> str:
        return parse_qs(urlsplit(self.request.target).query).get(name, [default])[-1]

    def queries(self, name: str) -> list[str]:
        return parse_qs(urlsplit(self.request.target).query).get(name, [])

    def of(self, method: str, path: str, payload: Mapping[str, Any] | None = None) -> ForwardedRequest:
        """Return SGLang's request, with the key and the other headers of the client's."""
        plain = ForwardedRequest.of(method, path, None if payload is None else dict(payload))
        kept = tuple(pair for pair in self.request.headers if pair[0].lower() not in _JSON_HEADERS)
        return replace(plain, headers=(*plain.headers, *kept))

    async def ask(self, method: str, path: str, payload: Mapping[str, Any] | None = None) -> Reply:
        """Return SGLang's answer. Raises `AnsweredError`, in vLLM's form, with an error; `aiohttp.ClientError`."""
        reply = await ask(self.session, self.url, self.of(method, path, payload))
        if reply.ok:
            return reply
        raise AnsweredError(dialect.error_reply(reply.status, reply.body))


_Handler = Callable[[_Call], Awaitable[Any]]


class SglangWire:
    """The way to one SGLang server. Its state is that of this server as far as our calls have made it.

    Args:
        url: Root URL, without `/v1`.
        raw_logprobs: Whether the server's log-probabilities ignore the temperature, as far as that was measured.

    Attributes:
        args: The arguments that the server was started with (`dialect.ServerArgs`); None until something needed them.
    """

    def __init__(self, url: str, *, raw_logprobs: bool | None = None) -> None:
        self._url = url
        self._raw_logprobs = raw_logprobs
        self._gate = Gate()
        self._vocabulary: int | None = None  # number of tokens; 0 if the server does not say
        self._texts: dict[int, str] = {}  # text of each token, special ones included
        self.args: dict[str, Any] | None = None
        self._adapters: frozenset[str] = frozenset()
        self._is_updating = self._has_weights = False  # since `/start_weight_update`; since `/update_weights`
        self._is_receiving = False  # since `/begin_weight_update`, which a broadcast needs
        self._asleep: set[str] = set()  # tags of memory that is given back
        self._aborting: set[asyncio.Task[None]] = set()
        self._handlers: dict[tuple[str, str], _Handler] = {
            ("GET", "/health"): self._health,
            ("GET", "/v1/models"): self._models,
            ("GET", "/version"): self._version,
            ("GET", "/server_info"): self._server_info,
            ("GET", "/get_world_size"): self._world_size,
            ("GET", "/weight_info"): self._weight_info,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/is_paused"): self._is_paused,
            ("GET", "/is_sleeping"): self._is_sleeping,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
            ("POST", "/pause"): self._pause,
            ("POST", "/resume"): self._resume,
            ("POST", "/sleep"): self._sleep,
            ("POST", "/wake_up"): self._wake_up,
            ("POST", "/reset_prefix_cache"): self._flush,
            ("POST", "/reset_mm_cache"): _nothing,
            ("POST", "/reset_encoder_cache"): _nothing,
            ("POST", "/init_weight_transfer_engine"): self._init_transfer,
            ("POST", "/start_weight_update"): self._start_update,
            ("POST", "/update_weights"): self._update_weights,
            ("POST", "/finish_weight_update"): self._finish_update,
            ("POST", "/update_weight_version"): self._set_version,
            ("POST", "/v1/load_lora_adapter"): self._load_adapter,
            ("POST", "/v1/unload_lora_adapter"): self._unload_adapter,
            ("POST", "/abort_requests"): self._abort_named,
        }

    async def ask(self, session: aiohttp.ClientSession, request: ForwardedRequest) -> Reply:
        """Return the answer to a request, in vLLM's form. Raises `aiohttp.ClientError`."""
        return await self._guarded(request, self._answer(_Call(session, self._url, request)))

    async def stream(self, session: aiohttp.ClientSession, request: ForwardedRequest, answering: Answering) -> None:
        """Pass the answer to a request on, in vLLM's form; a client's own stream of chunks as it comes. Raises
        `aiohttp.ClientError` if nothing has been answered; `UpstreamLostError` if something has."""
        call = _Call(session, self._url, request)
        if not (_samples(request) and (json_object(request.body) or {}).get("stream")):
            return await (await self.ask(session, request)).send(answering)
        async with self._gate.passing():
            asked = await self._guarded(request, self._sampling_request(call))
            if isinstance(asked, Reply):
                return await asked.send(answering)
            with self._aborted(call, asked["rid"]):
                return await stream(session, self._url, call.of("POST", request.path, asked), answering)

    async def _guarded(self, request: ForwardedRequest, work: Awaitable[Any]) -> Any:
        """Return what `work` does, or the reply that says why there is none."""
        try:
            return await work
        except AnsweredError as answered:
            return answered.reply
        except dialect.UnsupportedError as error:
            return Reply.error(400, str(error))
        except ValueError as error:
            return Reply.error(500, f"{request}: the server answers as SGLang does not ({error})")

    async def _answer(self, call: _Call) -> Reply:
        if _samples(call.request):
            async with self._gate.passing():
                return await self._sample(call)
        if (handler := self._handlers.get((call.request.method, call.request.path))) is not None:
            answer = await handler(call)
            return answer if isinstance(answer, Reply) else Reply.from_json(200, answer)
        reply = await ask(call.session, call.url, call.request)
        return reply if reply.ok else dialect.error_reply(reply.status, reply.body)

    # -- sampling -----------------------------------------------------------------------------------------------------

    async def _sample(self, call: _Call) -> Reply:
        body, path = call.body, call.request.path
        model = body.get("model") or (await self._server_args(call))["served_model_name"]
        if path == dialect.COMPLETIONS_PATH and body.get("prompt_logprobs") is not None:
            request = dialect.logprobs_request(body, adapter=await self._adapter(call, body))
            for ids in request["input_ids"]:
                await self._check_ids(call, ids)
            reply = await call.ask("POST", dialect.GENERATE_PATH, request)
            return Reply.from_json(200, dialect.logprobs_answer(reply.body, request, model))
        request = await self._sampling_request(call)
        with self._aborted(call, request["rid"]):
            reply = await call.ask("POST", path, request)
        if path == dialect.COMPLETIONS_PATH:
            return reply
        return Reply(200, msgspec.json.encode(dialect.chat_answer(reply.body, body, model)))

    async def _sampling_request(self, call: _Call) -> dict[str, Any]:
        body, rid = call.body, uuid.uuid4().hex
        adapter = await self._adapter(call, body)
        if call.request.path == dialect.COMPLETIONS_PATH:
            for ids in dialect.prompts_of_ids(body):
                await self._check_ids(call, ids)
            return dialect.completion_request(body, rid=rid, adapter=adapter)
        if not body.get("messages"):
            raise AnsweredError(Reply.error(400, "`messages` must be a list that is not empty"))
        request = dialect.chat_request(body, rid=rid, adapter=adapter)
        if (forced := request.get("input_ids")) is not None:
            await self._check_ids(call, forced)
        if (render := dialect.render_request(body)) is not None:
            request["input_ids"] = dialect.read_tokens((await call.ask("POST", "/tokenize", render)).body)["tokens"]
        return request

    async def _check_ids(self, call: _Call, ids: Sequence[Any]) -> None:
        if self._vocabulary is None:
            request = call.of("POST", dialect.GENERATE_PATH, dialect.vocabulary_request())
            self._vocabulary = dialect.vocabulary_size((await ask(call.session, call.url, request)).body) or 0
        dialect.check_ids(ids, self._vocabulary)

    async def _adapter(self, call: _Call, body: Mapping[str, Any]) -> str | None:
        """Return the adapter that a request names as its model. Raises `AnsweredError` if there is no such model."""
        model = body.get("model")
        if not model or model == (await self._server_args(call))["served_model_name"]:
            return None
        if model not in self._adapters:
            self._adapters = dialect.adapters_in(await self._models(call))
        if model not in self._adapters:
            raise AnsweredError(Reply.error(404, f"The model `{model}` does not exist."))
        return str(model)

    @contextmanager
    def _aborted(self, call: _Call, rid: str) -> Iterator[None]:
        """Abort a request by its name when the block is cancelled: its client has hung up."""
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.create_task(self._abort(call, rid))
            self._aborting.add(task)
            task.add_done_callback(self._aborting.discard)
            raise

    async def _abort(self, call: _Call, rid: str) -> None:
        try:
            async with asyncio.timeout(_ABORT_TIMEOUT_S):
                await call.ask("POST", "/abort_request", {"rid": rid})
        except (aiohttp.ClientError, TimeoutError, AnsweredError, RuntimeError) as error:  # the session may be closed
            _logger.info("%s: request %s was not aborted by name: %r", self._url, rid, error)

    async def _abort_named(self, call: _Call) -> Any:
        for rid in call.body.get("request_ids") or []:
            await call.ask("POST", "/abort_request", {"rid": rid})
        return {}

    # -- what the server is -------------------------------------------------------------------------------------------

    async def _server_args(self, call: _Call) -> dict[str, Any]:
        if self.args is None:
            self.args = (await call.ask("GET", "/server_info")).read(dialect.ServerArgs)
        return self.args

    async def _health(self, call: _Call) -> Any:
        await call.ask("GET", "/model_info")
        return {}

    async def _models(self, call: _Call) -> dict[str, Any]:
        served = (await self._server_args(call))["served_model_name"]
        return dialect.models_answer((await call.ask("GET", "/v1/models")).body, served)

    async def _version(self, call: _Call) -> Any:
        return dialect.version_answer(await self._server_args(call))

    async def _server_info(self, call: _Call) -> Any:
        return dialect.server_config(await self._server_args(call), raw_logprobs=self._raw_logprobs)

    async def _world_size(self, call: _Call) -> Any:
        return {"world_size": dialect.world_size(await self._server_args(call))}

    async def _weight_info(self, call: _Call) -> Any:
        info = (await call.ask("GET", "/model_info")).read(dialect.ModelInfo)
        return {"weight_version": info.get("weight_version")}

    async def _metrics(self, call: _Call) -> Reply:
        reply = await call.ask("GET", "/metrics")
        return replace(reply, body=dialect.metrics_answer(reply.body))

    async def _tokenize(self, call: _Call) -> Any:
        body = call.body
        answer = dialect.read_tokens((await call.ask("POST", "/tokenize", dialect.tokenize_request(body))).body)
        if body.get("return_token_strs"):
            answer["token_strs"] = await self._texts_of(call, answer["tokens"])
        return answer

    async def _texts_of(self, call: _Call, ids: list[int]) -> list[str]:
        unknown = [token for token in dict.fromkeys(ids) if token not in self._texts]
        if unknown:
            reply = await call.ask("POST", "/detokenize", dialect.texts_request(unknown))
            texts = dialect.read_texts(reply.body, len(unknown))
            if len(self._texts) + len(unknown) > _MAX_TEXTS:
                self._texts.clear()
                return await self._texts_of(call, ids)
            self._texts.update(zip(unknown, texts, strict=True))
        return [self._texts[token] for token in ids]

    async def _detokenize(self, call: _Call) -> Any:
        return dialect.detokenize_answer(
            (await call.ask("POST", "/detokenize", dialect.detokenize_request(call.body))).body
        )

    # -- pause and memory ---------------------------------------------------------------------------------------------

    async def _pause(self, call: _Call) -> Any:
        mode = call.query("mode", "abort")
        request = dialect.pause_request(mode)
        was_paused = "pause" in self._gate.closed_by
        self._gate.close("pause")
        try:
            if mode == "wait":
                await self._gate.drained()
            await call.ask("POST", "/pause_generation", request)
        except AnsweredError:
            if not was_paused:
                self._gate.open("pause")
            raise
        return {"status": "paused"}

    async def _resume(self, call: _Call) -> Any:
        if not self._asleep:
            await call.ask("POST", "/continue_generation", {})
        self._gate.open("pause")
        return {"status": "resumed"}

    async def _is_paused(self, call: _Call) -> Any:
        await call.ask("GET", "/server_info")  # which SGLang's scheduler answers: it hangs where that does
        if "pause" in self._gate.closed_by:
            return {"is_paused": True}
        # Another gateway, or this one before it was started again, may have paused it: then it is not ready.
        reply = await ask(call.session, call.url, call.of("GET", "/ready"))
        return {"is_paused": reply.status == 503}

    async def _sleep(self, call: _Call) -> Any:
        request = dialect.sleep_request(call.query("level", "1"), await self._server_args(call))
        self._gate.close("sleep")
        try:
            await self._gate.drained()
            await call.ask("POST", "/pause_generation", dialect.pause_request("wait"))  # what others sent must not run
            await call.ask("POST", "/release_memory_occupation", request)
            self._asleep.update(request["tags"])
        except AnsweredError:
            if not (self._asleep or "pause" in self._gate.closed_by):
                await call.ask("POST", "/continue_generation", {})
            raise
        finally:
            if not self._asleep:
                self._gate.open("sleep")
        return {}

    async def _wake_up(self, call: _Call) -> Any:
        tags = [tag for tag in call.queries("tags") or sorted(self._asleep) if tag in self._asleep]
        if tags:
            await call.ask("POST", "/resume_memory_occupation", {"tags": tags})
        self._asleep.difference_update(tags)
        if not self._asleep:
            if "pause" not in self._gate.closed_by:
                await call.ask("POST", "/continue_generation", {})
            self._gate.open("sleep")
        return {}

    async def _is_sleeping(self, _call: _Call) -> Any:
        return {"is_sleeping": bool(self._asleep)}

    async def _flush(self, call: _Call) -> Any:
        reply = await ask(call.session, call.url, call.of("POST", "/flush_cache"))
        if not reply.ok and reply.status != 400:
            raise AnsweredError(dialect.error_reply(reply.status, reply.body))
        return {"success": reply.ok}  # 400: requests are running

    # -- weights ------------------------------------------------------------------------------------------------------

    async def _init_transfer(self, call: _Call) -> Any:
        info = call.body.get("init_info") or {}
        if "master_address" in info:
            return await self._join_group(call, dialect.group_request(info))
        if unknown := sorted(set(info) - {"probe", "secret"}):
            raise dialect.UnsupportedError(
                f"SGLang takes weights by file or by nccl through this gateway (init_info has {', '.join(unknown)}); "
                "set `gym_weight_transport` to one of them."
            )
        if "probe" in info and _text_in(info["probe"]) != info.get("secret"):
            raise dialect.UnsupportedError(
                f"the gateway does not find in {info['probe']} what the trainer wrote there"
            )
        return {}

    async def _start_update(self, _call: _Call) -> Any:
        self._is_updating, self._has_weights = True, False
        return {}

    async def _join_group(self, call: _Call, request: dict[str, Any]) -> Any:
        """Let SGLang's workers meet a trainer; the group of one that is gone is in the way."""
        name = {"group_name": request["group_name"]}
        await ask(call.session, call.url, call.of("POST", "/destroy_weights_update_group", name))
        await call.ask("POST", "/init_weights_update_group", request)
        return {}

    async def _update_weights(self, call: _Call) -> Any:
        info = call.body.get("update_info") or {}
        path = info.get("path")
        is_updating, self._is_updating = self._is_updating, False
        if is_updating and "names" in info:
            await self._receive(call, info)
        elif is_updating and isinstance(path, str):
            with weight_folder(path) as folder:
                await call.ask("POST", "/update_weights_from_disk", dialect.disk_request(str(folder)))
        else:
            await self._end_receiving(call)
            raise AnsweredError(Reply.error(400, "no weight update was started, or its `path` is missing"))
        self._is_updating = self._has_weights = True
        return {}

    async def _receive(self, call: _Call, info: dict[str, Any]) -> None:
        if not self._is_receiving:
            await call.ask("POST", "/begin_weight_update", {})
            self._is_receiving = True
        await call.ask("POST", "/update_weights_from_distributed", dialect.distributed_request(info))

    async def _end_receiving(self, call: _Call) -> None:
        if self._is_receiving:
            self._is_receiving = False
            await call.ask("POST", "/end_weight_update", {})

    async def _finish_update(self, call: _Call) -> Any:
        if not (self._is_updating and self._has_weights):
            raise AnsweredError(Reply.error(400, "no weight update was started, or it has brought no weights"))
        await self._end_receiving(call)
        if (version := call.body.get("weight_version")) is not None:
            await call.ask("POST", "/update_weight_version", dialect.version_request(version))
        self._is_updating = False
        return {}

    async def _set_version(self, call: _Call) -> Any:
        request = dialect.version_request(call.body.get("new_version"))
        await call.ask("POST", "/update_weight_version", request)
        return {"success": True, "new_version": request["new_version"]}

    async def _load_adapter(self, call: _Call) -> Any:
        request = dialect.adapter_request(call.body)
        await call.ask("POST", "/load_lora_adapter", request)
        self._adapters |= {request["lora_name"]}
        return "Success"

    async def _unload_adapter(self, call: _Call) -> Any:
        request = dialect.adapter_request(call.body)
        await call.ask("POST", "/unload_lora_adapter", request)
        self._adapters -= {request["lora_name"]}
        return "Success"


def _samples(request: ForwardedRequest) -> bool:
    return request.method == "POST" and request.path in (dialect.CHAT_PATH, dialect.COMPLETIONS_PATH)


async def _nothing(_call: _Call) -> Any:
    return {}


def _text_in(path: Any) -> str | None:
    try:
        return Path(str(path)).read_text(errors="replace")[:_MAX_SECRET_CHARS]
    except OSError:
        return None


@contextmanager
def weight_folder(path: str) -> Iterator[Path]:
    """Yield a folder with weights as checkpoints have them: `path` itself, or one with a link to that file.

    The folder of a file is made beside it, so that whoever sees the file sees the folder; that of a file without a
    name (`/proc/7/fd/3`) in shared memory.

    Raises:
        UnsupportedError: There is no such file, or no folder can be made.
    """
    if os.path.isdir(path):
        yield Path(path)
        return
    place = Path("/dev/shm") if path.startswith("/proc/") else Path(path).parent
    try:
        os.stat(path)
        folder = Path(tempfile.mkdtemp(prefix="trl-gym-", dir=place))
        folder.chmod(0o755)
        (folder / "model.safetensors").symlink_to(path)
    except OSError as error:
        raise dialect.UnsupportedError(f"the weights at {path} cannot be handed to SGLang: {error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
