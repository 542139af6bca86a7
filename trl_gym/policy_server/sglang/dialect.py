"""Say in SGLang's words what is asked in vLLM's, and in vLLM's what SGLang answers: pure functions, no I/O.

SGLang's `/v1/chat/completions` is OpenAI's too; what differs is what comes on top:

| vLLM | SGLang (0.5.23) |
|---|---|
| `prompt_token_ids`, or `kv_transfer_params.prompt_token_ids` | `input_ids` |
| `return_token_ids` → `prompt_token_ids`, `choices[].token_ids` | both in `choices[]`, there `response_token_ids` |
| `stop_reason`; of the model's own stop tokens null | `matched_stop`; of those their id |
| `reasoning` of a message | `reasoning_content` |
| an adapter's name as `model` | `lora_path` |
| null for a default | nearly everywhere an error: such fields are left out |
| | `metadata.weight_versions`: which tokens were sampled under which version |

`wire.py` asks; here is what it sends and what it makes of the answers. Answers are read once, here: everything raises
`ValueError` where SGLang says what it does not say otherwise, which costs one answer.

Sources: `sglang/srt/entrypoints/openai/protocol.py` (requests, answers), `serving_chat.py`, `serving_tokenize.py`,
`http_server.py` (routes), `managers/io_struct.py` (bodies of control routes), `managers/tokenizer_manager.py` and
`managers/utils.py` (what is said of prompts that are too long).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec

from trl_gym.errors import error_body_text
from trl_gym.policy_server.middleware.http import Reply, read, strict_json
from trl_gym.policy_server.middleware.openai import read_completion
from trl_gym.untrusted import require_shape, shape_problem

CHAT_PATH, COMPLETIONS_PATH, GENERATE_PATH = "/v1/chat/completions", "/v1/completions", "/generate"

# Of a chat request in vLLM's form: what is taken away because it is said otherwise, or says nothing to SGLang.
_TRANSLATED = (
    *("prompt_token_ids", "kv_transfer_params", "return_token_ids", "return_tokens_as_token_ids", "model", "messages"),
    *("add_generation_prompt", "structured_outputs", "include_stop_str_in_output", "include_reasoning"),
    *("add_special_tokens", "request_id", "documents", "metadata", "store", "service_tier"),
)
# What would change the answer and has no counterpart. A value that asks for nothing is let through.
_UNSUPPORTED = (
    *("allowed_token_ids", "bad_words", "best_of", "chat_template", "echo", "length_penalty", "logits_processors"),
    *("media_io_kwargs", "prompt_logprobs", "thinking_token_budget", "truncate_prompt_tokens", "use_beam_search"),
    *("vllm_xargs",),
)
_RENDERED = ("tools", "chat_template_kwargs", "continue_final_message", "add_special_tokens", "prompt")
_STRUCTURES = {"regex": "regex", "grammar": "ebnf"}  # of `structured_outputs`

_TOO_LONG = re.compile(
    r"model's context length \((?P<a>\d+) tokens\)|maximum context length of (?P<b>\d+) tokens"
    r"|Input length \(\d+ tokens\) exceeds the maximum allowed length \((?P<c>\d+) tokens\)"
)


class UnsupportedError(ValueError):
    """SGLang cannot do what is asked; the text is for the client."""


# -- requests, as far as they are read --------------------------------------------------------------------------------


class Asked(TypedDict):
    """The fields of vLLM's requests that are translated."""

    model: NotRequired[str | None]
    messages: NotRequired[list[dict[str, Any]] | None]
    prompt_token_ids: NotRequired[list[int] | None]
    kv_transfer_params: NotRequired[dict[str, Any] | None]
    chat_template_kwargs: NotRequired[dict[str, Any] | None]
    structured_outputs: NotRequired[dict[str, Any] | None]
    stop_token_ids: NotRequired[list[int] | None]
    init_info: NotRequired[dict[str, Any] | None]
    update_info: NotRequired[dict[str, Any] | None]
    request_ids: NotRequired[list[str] | None]


def check_request(body: Mapping[str, Any]) -> None:
    """Check the types of the fields of a request; the functions below rely on them. SGLang checks the others. Raises
    `UnsupportedError`: one has another."""
    if (problem := shape_problem(body, Asked)) is not None:
        raise UnsupportedError(f"the request has another form ({problem})")


# -- answers, as far as they are read ---------------------------------------------------------------------------------


class _Span(TypedDict):
    version: str
    start: int
    end: int


class _Metadata(TypedDict):
    weight_version: NotRequired[str | None]
    weight_versions: NotRequired[list[_Span] | None]


class _Versions(TypedDict):
    metadata: NotRequired[_Metadata | None]


class ModelInfo(TypedDict):
    """`GET /model_info`, by which SGLang is known."""

    model_path: str
    is_generation: bool
    weight_version: NotRequired[str | None]


_Size = Annotated[int, msgspec.Meta(ge=1)]


class ServerArgs(TypedDict):
    """`GET /server_info`: the arguments that the server was started with, and more."""

    version: str
    served_model_name: str
    tp_size: NotRequired[_Size]
    pp_size: NotRequired[_Size]
    dp_size: NotRequired[_Size]
    enable_dp_attention: NotRequired[bool]
    enable_lora: NotRequired[bool | None]
    max_lora_rank: NotRequired[int | None]
    lora_target_modules: NotRequired[list[str] | None]
    enable_weights_cpu_backup: NotRequired[bool]


class _Card(TypedDict):
    id: str
    parent: NotRequired[str | None]


class _Cards(TypedDict):
    data: Annotated[list[_Card], msgspec.Meta(min_length=1)]


class _Tokens(TypedDict):
    tokens: list[int]


class _Texts(TypedDict):
    text: list[str]


class _Text(TypedDict):
    text: str


class _Meta(TypedDict):
    input_token_logprobs: list[tuple[float | None, int, Any]]
    prompt_tokens: NotRequired[int]
    completion_tokens: NotRequired[int]


class _Generated(TypedDict):
    text: NotRequired[str]
    meta_info: _Meta


# -- chat completions -------------------------------------------------------------------------------------------------


def chat_request(body: Mapping[str, Any], *, rid: str, adapter: str | None) -> dict[str, Any]:
    """Return SGLang's request for a chat completion.

    Args:
        body: vLLM's, with `messages`.
        rid: Name of the request, by which it can be aborted. SGLang aborts every request whose name begins so.
        adapter: Name of the LoRA adapter that answers; None for the model itself.

    Raises:
        UnsupportedError: SGLang has no such parameter.
    """
    _refuse_unsupported(body)
    request = {
        key: value for key, value in body.items() if key not in (*_TRANSLATED, *_UNSUPPORTED) and value is not None
    }
    request["messages"] = [_message(message) for message in body["messages"]]
    if (ids := forced_prompt(body)) is not None:
        request["input_ids"] = ids
    if body.get("return_token_ids") and not body.get("stream"):  # SGLang refuses both together
        request |= {"return_token_ids": True, "return_prompt_token_ids": True}
    if body.get("top_k") == 0:  # vLLM's other way to say: all
        request["top_k"] = -1
    if body.get("include_stop_str_in_output"):
        request["no_stop_trim"] = True
    request |= _structure(body.get("structured_outputs") or {})
    if documents := body.get("documents"):
        request["chat_template_kwargs"] = {**(body.get("chat_template_kwargs") or {}), "documents": documents}
    return request | {"rid": rid} | ({} if adapter is None else {"lora_path": adapter})


def vocabulary_request() -> dict[str, Any]:
    """Return a `/generate` that is refused with the size of the vocabulary, which no route tells."""
    sampling = {"max_new_tokens": 1}
    return {"input_ids": [0], "sampling_params": sampling, "return_logprob": True, "token_ids_logprob": [2**31 - 1]}


def vocabulary_size(raw: bytes) -> int | None:
    """Return the size from that refusal; None if it says something else."""
    found = re.search(r"valid range is \[0, (\d+)\)", raw.decode(errors="replace"))
    return int(found[1]) if found else None


def check_ids(ids: Sequence[Any], size: int | None) -> None:
    """Check the ids of a prompt: one that is not in the vocabulary ends SGLang's process. Raises `UnsupportedError`:
    it has others."""
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < (size or 2**31):
            raise UnsupportedError(f"a prompt of token ids has {token!r}, which is not in the vocabulary")


def completion_request(body: Mapping[str, Any], *, rid: str, adapter: str | None) -> dict[str, Any]:
    """Return SGLang's request for a completion of a text; see `chat_request`. Raises `UnsupportedError`: SGLang has no
    such parameter."""
    _refuse_unsupported({key: value for key, value in body.items() if key != "echo"})
    if body.get("return_token_ids"):
        raise UnsupportedError(
            "SGLang has no return_token_ids of /v1/completions, which a turn of a rollout needs; send it to "
            f"{CHAT_PATH}."
        )
    dropped = ("model", "structured_outputs", "return_token_ids", "return_tokens_as_token_ids", "add_special_tokens")
    request = {key: value for key, value in body.items() if key not in dropped and value is not None}
    request |= _structure(body.get("structured_outputs") or {}) | {"rid": rid}
    return request if adapter is None else {**request, "lora_path": adapter}


def forced_prompt(body: Mapping[str, Any]) -> list[int] | None:
    """Return the ids of the exact prompt that a request gives; None if the server is to render it."""
    ids = body.get("prompt_token_ids")
    if ids is None:
        ids = (body.get("kv_transfer_params") or {}).get("prompt_token_ids")
    return ids or None


def render_request(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `/tokenize` that renders a chat whose prompt SGLang would render in another way than vLLM; else None.

    SGLang makes a user's message of an assistant's at the end, and knows no chat without a generation prompt; its
    `/tokenize` renders messages as they are. Pictures stay with the messages: a prompt of ids would lose them.
    """
    if forced_prompt(body) is not None or body.get("continue_final_message"):
        return None
    ends_with_answer = body["messages"][-1].get("role") == "assistant"
    if not ends_with_answer and body.get("add_generation_prompt", True) and not body.get("add_special_tokens"):
        return None
    return tokenize_request({"add_generation_prompt": True, **body})


def chat_answer(raw: bytes, request: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return vLLM's answer for SGLang's chat completion.

    Returns:
        The answer, for `msgspec.json.encode`, with SGLang's `metadata.weight_versions` as `weight_versions`.

    Raises:
        ValueError: It is no chat completion.
    """
    answer = read_completion(raw)
    require_shape({"metadata": answer.get("metadata")}, _Versions)
    stop_ids = request.get("stop_token_ids") or ()
    as_ids = bool(request.get("return_tokens_as_token_ids"))
    for choice in answer["choices"]:
        _translate_choice(choice, stop_ids, as_ids=as_ids)
    answer |= {"model": model, "prompt_token_ids": answer["choices"][0].pop("prompt_token_ids", None)}
    for other in answer["choices"][1:]:
        other.pop("prompt_token_ids", None)
    if spans := (answer.pop("metadata", None) or {}).get("weight_versions"):
        answer["weight_versions"] = spans
    return answer


def _translate_choice(choice: dict[str, Any], stop_ids: Sequence[int], *, as_ids: bool) -> None:
    choice["token_ids"] = choice.pop("response_token_ids", None)
    matched = choice.pop("matched_stop", None)
    own_stop = isinstance(matched, int) and matched not in stop_ids
    choice["stop_reason"] = matched if isinstance(matched, int | str) and not own_stop else None
    message = choice["message"]
    if thought := message.get("reasoning_content"):
        message["reasoning"] = thought
    message["tool_calls"] = message.get("tool_calls") or []
    for call in message["tool_calls"]:
        call.pop("index", None)  # of a stream
    if message["tool_calls"]:
        message["content"] = message.get("content") or None
    if as_ids and choice["token_ids"] is not None and choice.get("logprobs") is not None:
        choice["logprobs"] = _with_ids(choice["logprobs"], choice["token_ids"])


def _with_ids(logprobs: Any, ids: Sequence[int]) -> Any:
    """Write tokens as `token_id:7`, as vLLM does on demand."""
    logprobs = msgspec.json.decode(logprobs)
    entries = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("logprobs of a choice are no list of objects")
    for entry, token in zip(entries, ids, strict=False):
        entry["token"] = f"token_id:{token}"
    return logprobs


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    said = {key: value for key, value in message.items() if value is not None or key == "content"}
    thought = said.pop("reasoning", None)
    return said if thought is None else {"reasoning_content": thought, **said}


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    given = ((key, body.get(key)) for key in _UNSUPPORTED)
    nothing = (("best_of", 1), ("length_penalty", 1.0))
    if asked := [
        key for key, one in given if not (one is None or one is False or one in ([], {}) or (key, one) in nothing)
    ]:
        raise UnsupportedError(f"SGLang has no {', '.join(asked)}; leave it out of the request.")


def _schema(value: Any) -> Any:
    try:
        return strict_json(value.encode()) if isinstance(value, str) else value
    except ValueError as error:
        raise UnsupportedError(f"structured_outputs.json is no JSON ({error})") from error


def _structure(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return SGLang's fields for vLLM's `structured_outputs`."""
    given = {key: value for key, value in wanted.items() if value is not None and value is not False}
    request: dict[str, Any] = {}
    for key, value in given.items():
        if key in _STRUCTURES:
            request[_STRUCTURES[key]] = value
        elif key == "choice" and isinstance(value, list) and all(isinstance(one, str) for one in value):
            request["regex"] = "|".join(f"({re.escape(one)})" for one in value)
        elif key == "json":
            schema = _schema(value)
            schema_format = {"name": "answer", "schema": schema}
            request["response_format"] = {"type": "json_schema", "json_schema": schema_format}
        elif key == "json_object":
            request["response_format"] = {"type": "json_object"}
        else:
            raise UnsupportedError(f"SGLang has no structured_outputs.{key}; leave it out of the request.")
    return request


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def tokenize_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return SGLang's request for `/tokenize`.

    With `add_generation_prompt` it renders messages as they are given; with `continue_final_message` it must open the
    turn itself.

    Raises:
        UnsupportedError: The request brings its own chat template.
    """
    if body.get("chat_template"):
        raise UnsupportedError("SGLang has no chat_template of a request; start it with --chat-template.")
    request = {key: body[key] for key in _RENDERED if body.get(key) is not None}
    if body.get("messages") is not None:
        request["messages"] = [_message(message) for message in body["messages"]]
        if not body.get("continue_final_message"):
            request["add_generation_prompt"] = body.get("add_generation_prompt", True) is not False
    return request


def read_tokens(raw: bytes) -> dict[str, Any]:
    """Return the answer of `/tokenize`, whose `tokens` are ids. Raises `ValueError`."""
    return read(raw, _Tokens)


def texts_request(ids: Iterable[int]) -> dict[str, Any]:
    """Return the `/detokenize` that tells the text of each of these tokens alone."""
    return {"tokens": [[token] for token in ids], "skip_special_tokens": False}


def read_texts(raw: bytes, num_tokens: int) -> list[str]:
    """Return the texts of tokens. Raises `ValueError` if there is not one for each."""
    texts: list[str] = read(raw, _Texts)["text"]
    if len(texts) != num_tokens:
        raise ValueError(f"{len(texts)} texts for {num_tokens} tokens")
    return texts


def detokenize_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return SGLang's request for vLLM's `/detokenize`, which shows special tokens."""
    return {"tokens": body.get("tokens"), "skip_special_tokens": False}


def detokenize_answer(raw: bytes) -> dict[str, Any]:
    """Return vLLM's answer of `/detokenize`. Raises `ValueError`."""
    return {"prompt": read(raw, _Text)["text"]}


# -- what the server is -----------------------------------------------------------------------------------------------


def models_answer(raw: bytes, served: str) -> dict[str, Any]:
    """Return `/v1/models` with the name that the server was started with: weights from disk rename it. Raises
    `ValueError`: there is no model."""
    answer = read(raw, _Cards)
    for card in answer["data"]:
        if card.get("parent") is None:
            card |= {"id": served, "root": served}
        else:
            card["parent"] = served
    return answer


def adapters_in(models: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the adapters in `/v1/models`."""
    return frozenset(card["id"] for card in models["data"] if card.get("parent") is not None)


def version_answer(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return `/version`, from `ServerArgs`."""
    return {"version": args["version"], "engine": "sglang"}


def world_size(args: Mapping[str, Any]) -> int:
    """Return how many workers hold weights. With data-parallel attention the replicas share those of a tensor-parallel
    group."""
    workers = args.get("tp_size", 1) * args.get("pp_size", 1)
    return workers if args.get("enable_dp_attention") else workers * args.get("dp_size", 1)


def num_replicas(args: Mapping[str, Any]) -> int:
    """Return how many replicas a request may name in `X-data-parallel-rank`."""
    return args.get("dp_size", 1)


def weight_transports(args: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the ways in which the server takes weights, by their names in `gym_weight_transport`."""
    return ("adapter",) if args.get("enable_lora") else ("file", "nccl")


def server_config(args: Mapping[str, Any], *, raw_logprobs: bool | None) -> dict[str, Any]:
    """Return what our trainer reads of vLLM's `/server_info`."""
    lora = {"max_lora_rank": args.get("max_lora_rank") or 0, "target_modules": args.get("lora_target_modules")}
    config = {
        "model_config": {"logprobs_mode": "raw_logprobs" if raw_logprobs else "processed_logprobs"},
        "lora_config": lora if args.get("enable_lora") else None,
        "parallel_config": {
            "tensor_parallel_size": args.get("tp_size", 1),
            "pipeline_parallel_size": args.get("pp_size", 1),
            "data_parallel_size": args.get("dp_size", 1),
        },
    }
    return {"vllm_config": config, "vllm_env": {}}


# -- log-probabilities of given sequences -----------------------------------------------------------------------------


def prompts_of_ids(body: Mapping[str, Any]) -> list[list[Any]]:
    """Return the prompts of a `/v1/completions` that are lists of token ids."""
    prompts = body.get("prompt")
    if isinstance(prompts, list) and prompts and isinstance(prompts[0], int):
        return [prompts]
    return [one for one in prompts if isinstance(one, list)] if isinstance(prompts, list) else []


def logprobs_request(body: Mapping[str, Any], *, adapter: str | None) -> dict[str, Any]:
    """Return the `/generate` for a `/v1/completions` with `prompt_logprobs`. Raises `UnsupportedError`: the prompts
    are not lists of token ids, or more is asked than the tokens' own log-probabilities."""
    prompts, given = prompts_of_ids(body), body.get("prompt")
    if not prompts or not all(prompts) or (given != prompts and [given] != prompts):
        raise UnsupportedError("With prompt_logprobs, `prompt` must be a list of lists of token ids for SGLang.")
    if body["prompt_logprobs"] != 0:
        raise UnsupportedError("For SGLang prompt_logprobs must be 0: it tells those of the given tokens alone.")
    sampling = {"max_new_tokens": body.get("max_tokens") or 1, "temperature": body.get("temperature", 1.0)}
    request: dict[str, Any] = {
        "input_ids": prompts,
        "sampling_params": sampling,
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    return request if adapter is None else {**request, "lora_path": [adapter] * len(prompts)}


def logprobs_answer(raw: bytes, request: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return vLLM's completion for the answer of that `/generate`.

    Args:
        request: What it was asked.

    Raises:
        ValueError: It is no such answer, or one of other sequences.
    """
    answers = read(raw, list[_Generated])
    prompts = request["input_ids"]
    if len(answers) != len(prompts):
        raise ValueError(f"{len(answers)} answers for {len(prompts)} prompts")
    choices = []
    for index, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        told = answer["meta_info"]["input_token_logprobs"]
        if [token for _, token, *_ in told] != ids:
            raise ValueError(f"the input_token_logprobs of prompt {index} are those of other tokens")
        entries = [{str(token): {"logprob": logprob}} for logprob, token, *_ in told]
        text = answer.get("text", "")
        choices.append(
            {"index": index, "text": text, "finish_reason": "length", "prompt_logprobs": [None, *entries[1:]]}
        )
    return {"object": "text_completion", "model": model, "choices": choices}


# -- pause, memory, weights, adapters ---------------------------------------------------------------------------------


def pause_request(mode: str) -> dict[str, Any]:
    """Return SGLang's `/pause_generation` for a mode of vLLM's `/pause`.

    `keep` is `retract`: keys and values are dropped and computed again by the new weights; `in_place` keeps the old
    ones. After `wait` nothing of ours runs any more; what others have sent is kept.

    Raises:
        UnsupportedError: vLLM has no such mode.
    """
    modes: dict[str, Literal["abort", "retract"]] = {"abort": "abort", "wait": "retract", "keep": "retract"}
    if mode not in modes:
        raise UnsupportedError(f"mode must be one of {', '.join(modes)}, not {mode!r}")
    return {"mode": modes[mode]}


def sleep_request(level: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Return SGLang's `/release_memory_occupation` for a level of vLLM's `/sleep`.

    Level 1 must not lose the weights: SGLang keeps a copy on the host with --enable-weights-cpu-backup alone.

    Raises:
        UnsupportedError: vLLM has no such level.
    """
    if level not in ("1", "2"):
        raise UnsupportedError(f"level must be 1 or 2, not {level!r}")
    keeps_weights = level == "1" and not args.get("enable_weights_cpu_backup")
    return {"tags": ["kv_cache"] if keeps_weights else ["weights", "kv_cache"]}


def disk_request(folder: str) -> dict[str, Any]:
    """Return `/update_weights_from_disk` from a folder with safetensors. The caches go with the old weights; the
    version comes with `version_request`."""
    return {"model_path": folder, "flush_cache": True, "abort_all_requests": False}


def group_request(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return `/init_weights_update_group` for the `init_info` of a broadcast; its caller is rank 0."""
    names = ("master_address", "master_port", "rank_offset", "world_size")
    return {
        **{name: info.get(name) for name in names},
        "group_name": info.get("group_name", "trl_gym"),
        "backend": info.get("backend", "nccl"),
    }


def distributed_request(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return `/update_weights_from_distributed` for the `update_info` of a broadcast. The caches go with the old
    weights; the version comes with `version_request`."""
    names = ("names", "dtypes", "shapes")
    return {**{name: info.get(name) for name in names}, "group_name": "trl_gym", "flush_cache": True}


def version_request(version: Any) -> dict[str, Any]:
    """Return `/update_weight_version`, which would abort what runs if it were not told otherwise."""
    return {"new_version": version if isinstance(version, str) else str(version), "abort_all_requests": False}


def adapter_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return `/load_lora_adapter`, or with a name alone `/unload_lora_adapter`."""
    return {key: body[key] for key in ("lora_name", "lora_path") if key in body}


# -- metrics and errors -----------------------------------------------------------------------------------------------

# As `rollouts/engine_metrics.py` reads them. SGLang tells how long requests were queued, not how long they ran.
_METRICS = {
    b"sglang:prompt_tokens_total": (b"vllm:prompt_tokens_total", b"vllm:prefix_cache_queries_total"),
    b"sglang:cached_tokens_total": (b"vllm:prefix_cache_hits_total",),
    b"sglang:generation_tokens_total": (b"vllm:generation_tokens_total",),
    b"sglang:num_retracted_requests_total": (b"vllm:num_preemptions_total",),
    b"sglang:num_running_reqs": (b"vllm:num_requests_running",),
    b"sglang:queue_time_seconds_sum": (b"vllm:request_queue_time_seconds_sum",),
}


def metrics_answer(text: bytes) -> bytes:
    """Return SGLang's metrics, followed by those that vLLM has too under vLLM's names."""
    lines = text.splitlines()
    also = []
    for line in lines:
        name = re.split(rb"[{ ]", line, maxsplit=1)[0]
        also += [other + line[len(name) :] for other in _METRICS.get(name, ())]
    return b"\n".join([*lines, *also]) + b"\n"


def error_reply(status: int, body: bytes) -> Reply:
    """Return an error in vLLM's form, from any of SGLang's; a prompt that is too long is said in vLLM's words."""
    text = error_body_text(body)
    try:
        parsed = strict_json(body)
    except ValueError:
        parsed = None
    if isinstance(parsed, dict):
        told = (parsed.get(key) for key in ("message", "error_message"))
        text = next((one for one in told if isinstance(one, str) and one), text)
    text = text.partition("\n\n  File ")[0]  # of pydantic; the rest is about SGLang's own code
    if status == 400 and (found := _TOO_LONG.search(text)):
        longest = next(filter(None, found.groups()))
        text = f"This model's maximum context length is {longest} tokens. {text}"
    return Reply.error(status, text)
