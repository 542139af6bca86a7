"""A small ASGI application that answers like vLLM, for tests of the middleware.

Characters are tokens (code points below 0x1000), `END` closes a turn. It samples `reply`, whatever the prompt.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trl_gym.policy_server.middleware.http import TOO_MANY_CHARS
from trl_gym.policy_server.middleware.ledger import sampled_ids, token_ids

END = 2
Json = dict[str, Any]


def render(messages: list[Json], add_generation_prompt: bool = True, **_: Any) -> list[int]:
    """`<role initial>content END`; assistant turns are written upper case, so that they re-tokenize differently.

    All but z, q and x: the middleware's marker consists of them, and no template writes it differently.
    """
    ids: list[int] = []
    for message in messages:
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        upper = "".join(letter if letter in "zqx" else letter.upper() for letter in content)
        text = upper if message["role"] == "assistant" else content
        ids += [*map(ord, message["role"][0] + text), END]
    return [*ids, ord("a")] if add_generation_prompt else ids


@dataclass
class FakeVllm:
    """What it was asked is in `requests`; `change_answer` lets a test corrupt what it says."""

    max_model_len: int = 200
    weight_version: str = "default"
    engine: str | None = None  # what it calls itself in `/version`; vLLM says nothing
    chat_status: int = 200
    finish_reason: str | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)  # more headers of its answers
    longest_token: int | None = None  # characters; None for a server that does not count them
    hangs: bool = False  # a chat is never answered; the client must hang up
    disconnects: int = 0
    reply: list[int] = field(default_factory=lambda: [ord("o"), ord("k"), END])
    render: Callable[..., list[int]] = render
    chat_template: str | None = None  # what it says of `render`; None if it has no such route
    change_answer: Callable[[Json], None] = lambda answer: None
    requests: list[tuple[str, Json]] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)  # name -> path
    adapter_error: tuple[int, Json] | None = None  # what loading one answers

    def chats(self) -> list[Json]:
        return [body for path, body in self.requests if path == "/v1/chat/completions"]

    async def __call__(self, scope: Json, receive: Any, send: Any) -> None:
        assert scope["type"] == "http", scope
        body = (await receive())["body"] if scope["method"] == "POST" else b""
        if self.hangs and scope["path"] == "/v1/chat/completions":
            self.requests.append((scope["path"], json.loads(body)))
            assert (await receive())["type"] == "http.disconnect"
            self.disconnects += 1
            return
        headers = dict(scope["headers"])
        assert int(headers.get(b"content-length", len(body))) == len(body)
        status, payload = self.answer(scope["path"], body)
        headers = [(b"content-type", b"application/json"), *self.headers]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(payload).encode()})

    def answer(self, path: str, body: bytes) -> tuple[int, Json]:
        try:
            request = json.loads(body) if body else {}
        except ValueError:
            return 422, {"detail": "no JSON"}
        self.requests.append((path, request))
        match path:
            case "/v1/models":
                adapters = [{"id": name, "parent": "policy"} for name in self.adapters]
                return 200, {"data": [{"id": "policy", "max_model_len": self.max_model_len}, *adapters]}
            case "/tokenizer_info" if self.chat_template is not None:
                return 200, {"chat_template": self.chat_template, "tokenizer_class": "Letters"}
            case "/version":
                return 200, {"version": "0.31.0"} | ({} if self.engine is None else {"engine": self.engine})
            case "/weight_info":
                return 200, {"weight_version": self.weight_version}
            case "/finish_weight_update":
                self.weight_version = request["weight_version"]
                return 200, {"message": "ok"}
            case "/update_weight_version":
                self.weight_version = request["new_version"]
                return 200, {"success": True}
            case "/v1/load_lora_adapter":
                if self.adapter_error is not None:
                    return self.adapter_error
                self.adapters[request["lora_name"]] = request["lora_path"]
                return 200, "Success"
            case "/v1/unload_lora_adapter":
                del self.adapters[request["lora_name"]]
                return 200, "Success"
            case "/v1/completions" if (said := self.too_long(request)) is not None:
                return 400, {"error": {"message": said}}
            case "/v1/completions" if request.get("return_token_ids"):
                return self.complete(request)
            case "/v1/completions":
                return 200, {"model": request.get("model", "policy"), "prompt": request["prompt"]}
            case "/tokenize" if "prompt" in request:
                return 200, {"tokens": tokens_of(request["prompt"])}
            case "/detokenize":
                return 200, {"prompt": "".join(map(chr, request["tokens"]))}
            case "/tokenize":
                tokens = self.render(**request)
                return 200, {"tokens": tokens, "token_strs": [chr(token) for token in tokens]}
            case "/v1/chat/completions":
                return self.chat(request)
            case "/health" | "/pause" | "/resume":
                return 200, {}
        return 404, {"detail": "Not Found"}

    def chat(self, request: Json) -> tuple[int, Json]:
        if not request.get("messages"):
            return 400, {"error": {"message": "messages missing"}}
        model = request.get("model", "policy")
        if model != "policy" and model not in self.adapters:
            return 404, {"error": {"message": f"The model `{model}` does not exist."}}
        forced = (request.get("kv_transfer_params") or {}).get("prompt_token_ids") or request.get("prompt_token_ids")
        prompt = forced or self.render(**request)
        asked = request.get("max_completion_tokens") or request.get("max_tokens")
        if asked is None and len(prompt) == self.max_model_len:  # vLLM limits itself to the room, and refuses that
            return 400, {"error": {"message": "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)"}}
        limit = asked or 1
        if len(prompt) + limit > self.max_model_len:
            return 400, {"error": {"message": f"This model's maximum context length is {self.max_model_len} tokens."}}
        content = [{"token": chr(t), "logprob": -0.5} for t in self.reply]
        answer: Json = {
            "model": model,
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": "".join(chr(t) for t in self.reply if t != END)},
                    "logprobs": {"content": content} if request.get("logprobs") is not None else None,
                    "token_ids": self.reply if request.get("return_token_ids") else None,
                    "finish_reason": self.finish_reason or ("stop" if self.reply[-1] == END else "length"),
                    "stop_reason": None,
                }
                for index in range(request.get("n") or 1)
            ],
            "prompt_token_ids": prompt if request.get("return_token_ids") else None,
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(self.reply),
                "prompt_tokens_details": {"cached_tokens": len(prompt) - 1},
            },
            "metrics": {"queue_time_ms": 1.0, "time_to_first_token_ms": 2.0, "generation_time_ms": 3.0},
        }
        self.change_answer(answer)
        return self.chat_status, answer

    def too_long(self, request: Json) -> str | None:
        """What vLLM says of a prompt with more characters than its tokens can have."""
        num_output = request.get("max_tokens") or 0
        how = {"max_model_len": self.max_model_len, "num_output": num_output, "num_chars": len(request["prompt"])}
        how |= {"num_input": self.max_model_len - num_output}
        most = how["num_input"] * (self.longest_token or 0)
        return TOO_MANY_CHARS.format(**how, most=most) if self.longest_token and how["num_chars"] > most else None

    def complete(self, request: Json) -> tuple[int, Json]:
        """Answer a completion of one text as a chat that was rendered to its tokens."""
        prompt = request["prompt"]
        ids = tokens_of(prompt) if isinstance(prompt, str) else prompt
        chat = {**request, "messages": [{}], "prompt_token_ids": ids}
        status, answer = self.chat(chat)
        if status != 200:
            return status, answer
        [choice] = answer["choices"]
        choice |= {"text": choice.pop("message")["content"], "prompt_token_ids": answer.pop("prompt_token_ids")}
        logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]] if "logprobs" in request else None
        choice["logprobs"] = {"tokens": [chr(token) for token in self.reply], "token_logprobs": logprobs}
        return 200, {**answer, "object": "text_completion"}


def tokens_of(text: str) -> list[int]:
    """The tokens of a text, in which `|` is the turn's end."""
    return [END if letter == "|" else ord(letter) for letter in text]


def with_tokens(middleware: Any, rollout: str, answer: Json) -> Json:
    """A tagged answer with the tokens that the ledger has in place of its handle, as untagged clients get them."""
    (choice,) = answer["choices"]
    records = middleware._chat.book.calls(rollout).records
    (handle,) = choice["message"]["generation_token_ids"]
    (index,) = [place for place, one in enumerate(records) if one.tokens and one.tokens.handle == handle]
    ids = sampled_ids(records[index].tokens)
    bundle = {
        "prompt_token_ids": token_ids(records, index)[: -len(ids)],
        "generation_token_ids": ids,
        "generation_log_probs": array("d", records[index].tokens.logprobs).tolist(),
    }
    return {**answer, "choices": [{**choice, "message": {**choice["message"], **bundle}}]}
