"""Every chat template that TRL ships, behind a server that answers like vLLM, and the real middleware in front.

Nothing here starts an engine. `/tokenize` validates, parses and renders with vLLM's own functions; only the tokenizer
is ours: one small byte-level BPE, to which a template's own special tokens are added. `/v1/chat/completions` "samples"
whatever the test has put into `TemplateServer.next_answer`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tests.policy_server.fake_vllm import with_tokens
from trl_gym.policy_server.middleware.app import OnPolicyMiddleware, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Json = dict[str, Any]
JSON = (b"content-type", b"application/json")
MAX_MODEL_LEN = 1_000_000

# Tags that are one token where the policies that know them have a tokenizer; all other tags are plain text there too.
_TAG_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_utterance>",
    "<image>",
    "<sop>",
    "[gMASK]",
)
_BAR_TOKEN = re.compile(r"<[|｜][^<>|｜\s]{1,30}[|｜]?>|<[^<>|｜\s/]{1,30}\|>|<\|\"\|>")

# How Qwen, Llama 3 and GPT-4 split text. It lets punctuation swallow the newlines behind it, the classical seam.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = [
    "The answer is correct.\n\nThen the policy counts: one two three four five six seven eight nine ten.\n\n\n",
    'system user assistant tool function arguments {"name": "echo", "arguments": {"text": "hello world"}}\n\n',
    "thinking about this problem, hello hello world world \n \n  the the answer answer analysis final commentary",
    "<tools></tools><function=echo><parameter=text></parameter></function> [INST] [/INST] User: Assistant: \n\n",
] * 20


@dataclass(frozen=True, slots=True)
class Family:
    """What a policy's tokenizer says and its template does not.

    Attributes:
        bos: Text of `bos_token`.
        eos: Text of `eos_token`.
        ends: What the policy may end a turn with, the usual one first; the template writes these too.
        tool_end: What a turn with tool calls is ended with, if the template writes no turn end and it is another.
    """

    bos: str
    eos: str
    ends: tuple[str, ...]
    tool_end: str | None = None


# By the beginning of a template's name; the first that fits.
FAMILIES = {
    "cohere": Family("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", ("<|END_OF_TURN_TOKEN|>",)),
    "deepseek": Family("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ("<｜end▁of▁sentence｜>",)),
    "diffusion_gemma": Family("<bos>", "<eos>", ("<turn|>", "<|tool_response>")),
    "gemma4": Family("<bos>", "<eos>", ("<turn|>", "<|tool_response>")),
    "gemma": Family("<bos>", "<eos>", ("<end_of_turn>",)),
    "glm4moe": Family("[gMASK]", "<|endoftext|>", ("<|user|>", "<|observation|>"), tool_end="<|observation|>"),
    "gptoss": Family("<|startoftext|>", "<|return|>", ("<|return|>", "<|call|>", "<|end|>")),
    "idefics3": Family("<|begin_of_text|>", "<|end_of_text|>", ("<end_of_utterance>",)),
    "smolvlm": Family("<|im_start|>", "<|im_end|>", ("<end_of_utterance>",)),
    "lfm2": Family("<|startoftext|>", "<|im_end|>", ("<|im_end|>",)),
    "llama3": Family("<|begin_of_text|>", "<|end_of_text|>", ("<|eot_id|>", "<|eom_id|>")),
    "llava_next": Family("<s>", "</s>", ("</s>",)),
    "muse_glimmer": Family("<|begin_of_text|>", "<|eot|>", ("<|eot|>", "<|eom|>")),
    "nemotron": Family("<s>", "<|im_end|>", ("<|im_end|>",)),
    "phi3": Family("<s>", "<|endoftext|>", ("<|end|>",)),
    "qwen": Family("<|endoftext|>", "<|endoftext|>", ("<|im_end|>",)),
}


class TemplateError(Exception):
    """The template, or vLLM in front of it, refuses these messages."""


def template_paths() -> list[Path]:
    import trl

    return sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@cache
def _vllm() -> SimpleNamespace:
    """vLLM's request model and renderer functions; they need no engine, and 7 s to import."""
    try:  # since vLLM 0.32
        from vllm.renderers.chat_utils import parse_chat_messages
    except ImportError:
        from vllm.entrypoints.chat_utils import parse_chat_messages
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.hf import _detect_content_format, safe_apply_chat_template

    logging.getLogger("vllm").setLevel(logging.CRITICAL)  # it warns of every message that a template refuses
    return SimpleNamespace(
        parse=parse_chat_messages,
        request=TokenizeChatRequest,
        content_format=_detect_content_format,
        apply=safe_apply_chat_template,
        errors=(VLLMValidationError, ValueError),  # pydantic's are ValueErrors
        config=SimpleNamespace(multimodal_config=None, enable_prompt_embeds=False),
    )


@cache
def _base_tokenizer() -> str:
    """The BPE as JSON: trained once, loaded for every template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return bpe.to_str()


def _byte_level() -> list[str]:
    """Byte → the character that byte-level BPE writes it as."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


@dataclass(frozen=True)
class Template:
    """One chat template, with a tokenizer that has its special tokens."""

    path: Path

    @cached_property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def family(self) -> Family:
        return next(family for start, family in FAMILIES.items() if self.name.startswith(start))

    @cached_property
    def specials(self) -> tuple[str, ...]:
        family = self.family
        named = {tag for tag in _TAG_TOKENS if tag in self.source}
        written = {token for token in _BAR_TOKEN.findall(self.source) if "{" not in token}
        return tuple(sorted(named | written | {family.bos, family.eos, *family.ends}))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        from tokenizers import AddedToken, Tokenizer
        from transformers import PreTrainedTokenizerFast

        bpe = Tokenizer.from_str(_base_tokenizer())
        bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in self.specials])
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token=self.family.bos,
            eos_token=self.family.eos,
            clean_up_tokenization_spaces=False,
        )

    @cached_property
    def special_ids(self) -> dict[str, int]:
        return {text: self.tokenizer.convert_tokens_to_ids(text) for text in self.specials}

    @cached_property
    def byte_ids(self) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(char) for char in _byte_level()]

    @cached_property
    def _rendered(self) -> dict[str, str]:
        """Request → text: of five requests, two were made before."""
        return {}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special)

    def text(self, messages: list[Json], tools: list[Json] | None = None, **options: Any) -> str:
        """What vLLM would render for these messages.

        Raises:
            TemplateError: If vLLM would answer 400.
        """
        return self.render_request({"messages": messages, "tools": tools, **options})

    def render_request(self, body: Json) -> str:
        key = json.dumps(body)
        if key not in self._rendered:
            self._rendered[key] = self._render(body)
        return self._rendered[key]

    def _render(self, body: Json) -> str:
        vllm = _vllm()
        try:
            request = vllm.request.model_validate(body)
            template = request.chat_template or self.source
            tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
            params = request.build_chat_params(template, "auto").with_defaults({"tools": tools, "tokenize": False})
            conversation, _, _ = vllm.parse(
                request.messages, vllm.config, content_format=vllm.content_format(template, default="string")
            )
            kwargs = params.get_apply_chat_template_kwargs()
            return vllm.apply(vllm.config, self.tokenizer, conversation, **kwargs)
        except vllm.errors as error:
            raise TemplateError(str(error)) from error


@cache
def load_template(path: Path) -> Template:
    return Template(path)


@dataclass
class Answer:
    """What the policy samples next, and the message that the server's parsers make of it.

    Attributes:
        ids: With the token that ended the turn, unless the token limit did.
        message: Without its role.
        is_cut: Whether the token limit ended it.
        is_whole: Whether nothing but the turn end can be missing.
        stop_reason: As vLLM gives it: a stop token, unless it is the tokenizer's `eos_token`.
    """

    ids: list[int]
    message: Json
    is_cut: bool = False
    is_whole: bool = True
    stop_reason: int | None = None

    @property
    def finish_reason(self) -> str:
        if self.message.get("tool_calls"):
            return "tool_calls"  # whatever the end: vLLM 0.31 says so as soon as its parser found a call
        return "length" if self.is_cut else "stop"


@dataclass
class TemplateServer:
    """An ASGI application with the routes of vLLM that the middleware uses."""

    template: Template
    next_answer: Answer = field(default_factory=lambda: Answer([], {}))

    async def __call__(self, scope: Json, receive: Any, send: Any) -> None:
        body = (await receive()).get("body") if scope["method"] == "POST" else None
        try:
            status, payload = 200, self.answer(scope["path"], json.loads(body) if body else {})
        except TemplateError as error:
            status, payload = 400, {"error": {"message": str(error), "type": "BadRequestError", "code": 400}}
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(payload).encode()})

    def answer(self, path: str, request: Json) -> Json:
        match path:
            case "/v1/models":
                return {"data": [{"id": "policy", "max_model_len": MAX_MODEL_LEN}]}
            case "/tokenizer_info":
                return {"chat_template": self.template.source}
            case "/version":
                return {"version": "0.31.0"}
            case "/weight_info":
                return {"weight_version": "default"}
            case "/tokenize":
                return self.tokenize(request)
            case "/detokenize":
                return {"prompt": self.template.decode(request["tokens"])}
            case "/v1/chat/completions":
                return self.chat(request)
        raise AssertionError(f"the middleware asked for {path}, which this server does not have")

    def tokenize(self, request: Json) -> Json:
        if "prompt" in request:
            ids = self.template.tokenizer(request["prompt"])["input_ids"]
        else:
            ids = self.template.ids(self.template.render_request(request))
        strings = self.template.tokenizer.convert_ids_to_tokens(ids) if request.get("return_token_strs") else None
        return {"tokens": ids, "token_strs": strings, "count": len(ids), "max_model_len": MAX_MODEL_LEN}

    def chat(self, request: Json) -> Json:
        forced = (request.get("kv_transfer_params") or {}).get("prompt_token_ids")
        rendered = {key: value for key, value in request.items() if key not in ("max_tokens", "kv_transfer_params")}
        for message in rendered["messages"]:  # vLLM does so in chat requests only
            if (thought := message.pop("reasoning_content", None)) is not None:
                message.setdefault("reasoning", thought)
        prompt = forced or self.template.ids(self.template.render_request(rendered))
        answer = self.next_answer
        tokens = self.template.tokenizer.convert_ids_to_tokens(answer.ids)
        logprobs = [{"token": token, "logprob": -0.5} for token in tokens]
        choice = {
            "index": 0,
            "message": {"role": "assistant", **answer.message},
            "logprobs": {"content": logprobs} if request.get("logprobs") else None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            "token_ids": answer.ids if request.get("return_token_ids") else None,
        }
        return {
            "choices": [choice],
            "prompt_token_ids": prompt if request.get("return_token_ids") else None,
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(answer.ids)},
        }


class Client:
    """Asks the real middleware in front of a `TemplateServer`, in process."""

    def __init__(self, template: Template) -> None:
        self.server = TemplateServer(template)
        self.middleware = OnPolicyMiddleware(self.server, Settings())
        self.num_rollouts = 0

    def chat(self, rollout: str, messages: list[Json], tools: list[Json] | None, answer: Answer) -> tuple[int, Json]:
        """Status and body of one model call of a rollout, in which `answer` is sampled."""
        self.server.next_answer = answer
        tag = {"rollout": rollout, "sampling": {"temperature": 1.0}}
        body: Json = {"messages": messages, "trl_gym": tag, **({"tools": tools} if tools else {})}
        if answer.is_cut:
            body["max_tokens"] = len(answer.ids)
        status, answered = asyncio.run(self._post("/v1/chat/completions", body))
        return status, with_tokens(self.middleware, rollout, answered) if status == 200 else answered

    async def _post(self, path: str, body: Json) -> tuple[int, Json]:
        pending = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        sent: list[Json] = []

        async def receive() -> Json:
            if not pending:
                await asyncio.Event().wait()
            return pending.pop(0)

        async def send(message: Json) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": [JSON], "query_string": b""}
        await self.middleware(scope, receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"])
