"""Parse a chat completion request: whose turn it is, which tokens it has seen, and what the server is asked for it.

A sampled message carries a handle (`ledger.py`), or, from clients without a tag, its whole prompt: a request of turn
30 is a megabyte of token ids then, of which only those of the newest message count. The others are skipped, not
parsed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from trl_gym.policy_server.middleware.identity import NOBODY, Identity, agreed_rollout
from trl_gym.policy_server.middleware.sampling import PINNED, SEED, leave_out, leave_out_seed, own_sampling, pin
from trl_gym.responses import text_of
from trl_gym.rollout_options import AGENT_SAMPLING
from trl_gym.untrusted import MAX_CONTAINERS, MAX_DEPTH, check_depth, without_halves

if TYPE_CHECKING:
    from trl_gym.policy_server.middleware.ledger import RolloutCalls

TOKEN_KEYS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")
# Of chat messages, and as the Responses API names them.
_TEXT_PARTS = frozenset({"text", "refusal", "thinking", "input_text", "output_text", "summary_text", "reasoning_text"})
_TAG_KEYS = ("rollout", "sampling", "agent_sampling", "completion_budget", "chat_template_kwargs")
# Fields that decide how a chat is rendered, by their names in /tokenize.
_RENDER_KEYS = ("model", "tools", "chat_template", "chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs")
_LIMIT_KEYS = ("max_tokens", "max_completion_tokens")
_STREAM_KEYS = ("include_usage", "continuous_usage_stats")
_OBJECT_KEYS = ("chat_template_kwargs", "stream_options", "kv_transfer_params")

CHAT_PATH, COMPLETIONS_PATH = "/v1/chat/completions", "/v1/completions"
COMPLETION_TOKENS = 16  # of a completion that says no limit, as vLLM and OpenAI have it
# Fields of a completion with which it has no exact record: other tokens in its prompt, or in its answer.
_NO_TURN = ("echo", "suffix", "prompt_embeds", "prompt_logprobs", "truncate_prompt_tokens")

_MAX_TOKEN_ID = 2**31 - 1  # an engine's limit; the server itself refuses ids beyond its vocabulary

_MAX_QUOTED_CHARS = 100
_NUMERAL = re.compile(r"\s*\+?[0-9]{1,18}\s*")
_HANDLE = re.compile(rb"\[(-[0-9]{1,16})\]")

_Fields = dict[str, msgspec.Raw]
_fields = msgspec.json.Decoder(_Fields)
_messages = msgspec.json.Decoder(list[_Fields])
_ids = msgspec.json.Decoder(list[int])
_any = msgspec.json.Decoder()


class InvalidTurnError(ValueError):
    """A request contradicts the contract; the text is for its sender."""


@dataclass(slots=True)
class Turn:
    """One model call."""

    body: dict[str, Any]  # the request without `trl_gym` and messages, sampling pinned; `limit_tokens` changes it
    messages: list[dict[str, Any]]  # its messages, without token ids
    # Sampled ids of each message as JSON, or a handle in their place (`[-7]`), or None.
    sampled: list[bytes | None] = field(default_factory=list)
    prompt: str | list[int] | None = None  # of a completion, text or token ids; None for a chat
    said: str = ""  # the text of a completion's answer, once it has one
    rollout: str | None = None  # id of the rollout; None for a request without a tag
    sampling: dict[str, Any] | None = None  # sampling parameters that the tag pins; None if it pins none
    agent_sampling: str = AGENT_SAMPLING[0]  # what becomes of sampling of the agent's own, see `sampling.py`
    own_sampling: list[str] = field(default_factory=list)  # names of the fields that ask for it
    completion_budget: int | None = None  # tokens after the first prompt of each conversation of the rollout
    newest: int | None = None  # index of the newest message whose tokens are known, or None
    seen: list[int] | None = None  # prompt and sampled ids of that message, or None
    known: RolloutCalls | None = None  # the calls of its rollout so far; None for a request without a tag
    call: int | None = None  # index of the call that sampled it (`ledger.RolloutCalls.recognize`), or None
    num_first_prompt: int | None = None  # length of the prompt with which that conversation began, or None
    digests: list[bytes] = field(default_factory=list)  # hashes of the first 0, 1, 2, … messages (`ledger.digest_of`)
    # Fields of the answer that the client asked for, among those that the middleware always asks for.
    asked: frozenset[str] = field(default_factory=frozenset)
    # Options of the render other than messages and ending, as /tokenize takes them.
    render_options: dict[str, Any] = field(default_factory=dict)
    options_key: bytes = b""  # hash of `render_options`
    caller: str | None = None  # `kind/name` of the Gym server that called, if it says so
    served_model: str | None = None  # model to sample from if it is not the request's (an adapter), else None
    # When it was sent to the server, for the last time, and answered; in seconds of the weights' history.
    sent: float = 0.0
    answered: float = 0.0

    @classmethod
    def from_json(cls, raw: bytes, identity: Identity = NOBODY) -> Turn | None:
        """Parse a request body.

        Args:
            identity: What the request's keys say of its sender.

        Returns:
            None unless it is a JSON object with a list of message objects: the server has its own error for that.

        Raises:
            InvalidTurnError: If the tag, the token ids or a field that is read here is malformed, or a rollout asks
                for several answers or a beam search.
            RefusedError: If the body names another rollout than the request's keys.
        """
        try:
            _check_count(raw)
            fields = _fields.decode(raw)
            messages = _messages.decode(fields.pop("messages", b"null"))
            body = {key: _any.decode(value) for key, value in fields.items()}
            plain = [_without_token_ids(message) for message in messages]
            check_depth([body, plain])
        except msgspec.MsgspecError:
            is_tagged = identity.turn_tag is not None or b'"trl_gym"' in raw
            plain_raw = without_halves(raw) if is_tagged else raw  # an environment may repeat what the policy wrote
            return None if plain_raw == raw else cls.from_json(plain_raw, identity)
        except UnicodeDecodeError as error:
            raise InvalidTurnError(f"the body is not UTF-8 ({error})") from None
        except (ValueError, RecursionError):
            text = f"{MAX_DEPTH} levels deep, or has more than {MAX_CONTAINERS:,} lists and objects"
            raise InvalidTurnError(f"the body is nested more than {text}") from None
        if not messages:
            return None
        _check_types(body, plain)
        turn = cls(body, plain, asked=_asked(body), caller=identity.caller)
        turn._read_tag(identity)
        turn.render_options = _render_options(body)
        options = json.dumps(turn.render_options, sort_keys=True).encode()
        turn.options_key = hashlib.blake2b(options, digest_size=16).digest()
        if turn.rollout is None and identity.is_side:
            turn.sampled = [None] * len(messages)  # a judge may quote a turn; it does not go on from it
        else:
            turn._read_history(messages)
        if turn.is_ours:
            _check_is_sampled(body)
        return turn

    @classmethod
    def from_completion(cls, raw: bytes, identity: Identity) -> Turn:
        """Parse the body of a completion that is a rollout's turn. Raises as `from_json`, for any other body too."""
        try:
            _check_count(raw)
            body = _any.decode(raw)
            check_depth(body)
        except (ValueError, RecursionError) as error:
            raise InvalidTurnError(f"a turn of a rollout must be a JSON object without NaN ({error})") from None
        if not isinstance(body, dict):
            raise InvalidTurnError("a turn of a rollout must be a JSON object")
        prompt = body.pop("prompt", None)
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            [prompt] = prompt
        if not prompt or not (isinstance(prompt, str) or _are_ids(prompt)):
            raise InvalidTurnError("a turn of a rollout must have one `prompt`, a text or a list of token ids")
        if asked := [key for key in _NO_TURN if not (body.get(key) in (None, "") or body[key] is False)]:
            raise InvalidTurnError(f"a turn of a rollout must be sampled without {', '.join(asked)}")
        body.pop("max_completion_tokens", None)  # which is no field of a completion
        body.setdefault("max_tokens", COMPLETION_TOKENS)
        _check_types(body, [])
        _check_is_sampled(body)
        turn = cls(body, [{"role": "prompt", "content": str(prompt)}], [None], prompt, caller=identity.caller)
        turn._read_tag(identity)
        if body.get("model") is not None:
            turn.render_options = {"model": body["model"]}
        return turn

    @property
    def path(self) -> str:
        return CHAT_PATH if self.prompt is None else COMPLETIONS_PATH

    @property
    def tokenize_request(self) -> dict[str, Any]:
        """Return the `/tokenize` that makes the tokens which the server makes of this request."""
        if self.prompt is None:
            return {**self.render_options, "messages": self.messages, **self.ending}
        special = self.body.get("add_special_tokens", True)
        return {**self.render_options, "prompt": self.prompt, "add_special_tokens": special}

    @property
    def is_tagged(self) -> bool:
        return self.rollout is not None

    @property
    def is_ours(self) -> bool:
        """Tell whether it is part of a rollout: then an answer without an exact bundle is an error."""
        return self.is_tagged or self.seen is not None

    @property
    def is_streamed(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def hides_thinking(self) -> bool:
        return self.body.get("include_reasoning") not in (None, True)

    @property
    def asks_for_ids(self) -> bool:
        """Tell whether the client wants tokens as ids in `logprobs`, as NeMo Gym's model server does. It reads these
        for the bundle alone, and where that is on the message parses and drops them."""
        return bool(self.body.get("return_tokens_as_token_ids"))

    @property
    def asks_for_limit(self) -> bool:
        return any(self.body.get(key) is not None for key in _LIMIT_KEYS)

    @property
    def ending(self) -> dict[str, bool]:
        """Return how the render of all messages ends, as /tokenize takes it."""
        return {
            "add_generation_prompt": self.body.get("add_generation_prompt", True),
            "continue_final_message": self.body.get("continue_final_message", False),
        }

    @property
    def has_media(self) -> bool:
        """Tell whether a message holds more than text, which forced token ids would leave out."""
        contents = (message.get("content") for message in self.messages)
        parts = (part for content in contents if isinstance(content, list) for part in content)
        return any(isinstance(part, dict) and part.get("type") not in _TEXT_PARTS for part in parts)

    @property
    def num_chars(self) -> int:
        """Return a number of characters that its prompt has at least, whatever template renders it."""
        if self.prompt is not None:
            return len(self.prompt) if isinstance(self.prompt, str) else 0
        return num_chars(self.messages)

    def pin(self, parameters: Mapping[str, Any]) -> None:
        """Sample with exactly these parameters, see `sampling.pin`."""
        self.own_sampling += pin(self.body, parameters)

    def limit_tokens(self, room: int) -> None:
        """Sample at most `room` tokens, and no more than the request itself allows."""
        key = "max_completion_tokens" if self.body.get("max_completion_tokens") is not None else "max_tokens"
        asked = self.body.get(key)
        self.body[key] = room if asked is None else min(asked, room)

    def sampling_request(self, forced: list[int] | None, has_prompt_field: bool) -> dict[str, Any]:
        """Return the request for the server.

        Args:
            forced: The exact prompt, or None to let the server render.
            has_prompt_field: Whether the server takes the prompt as a field of its own. Otherwise it is passed as a
                prefill server passes it to a decode server, which uses the ids and still parses tools and reasoning.
        """
        body = {**self.body, "return_token_ids": True}
        if self.served_model is not None:
            body["model"] = self.served_model
        if self.prompt is None:
            body |= {"messages": self.messages, "logprobs": True}
        else:
            body |= {"prompt": forced or self.prompt, "logprobs": body.get("logprobs") or 0}
        if self.prompt is None and body.get("top_logprobs") is None:
            body["top_logprobs"] = 0  # an explicit null switches logprobs off
        if self.is_ours:  # vLLM leaves out all tokens where it leaves out thinking; `hides_thinking` does
            body.pop("include_reasoning", None)
        if self.is_streamed:  # the middleware streams the whole answer: only then are all its tokens known
            body["stream"] = False
            body.pop("stream_options", None)
        if forced is None or self.prompt is not None:
            return body
        if has_prompt_field:
            body["prompt_token_ids"] = forced
        else:
            body["kv_transfer_params"] = {**(body.get("kv_transfer_params") or {}), "prompt_token_ids": forced}
        return body

    def _read_tag(self, identity: Identity) -> None:
        tag = self.body.pop("trl_gym", None)
        if tag is not None:
            agreed_rollout(identity.rollout, _checked_tag(tag)["rollout"])
            tag = identity.tag or tag  # what is signed counts, and it alone
        if (tag := tag or identity.turn_tag) is not None:
            self._apply_tag(_checked_tag(tag))

    def _apply_tag(self, tag: Mapping[str, Any]) -> None:
        self.rollout = tag["rollout"]
        self.completion_budget = tag.get("completion_budget")
        self.agent_sampling = tag.get("agent_sampling") or self.agent_sampling
        self.own_sampling = own_sampling(self.body)
        if self.agent_sampling != "allow":
            leave_out(self.body, self.own_sampling)
        leave_out_seed(self.body)
        if tag.get("sampling"):
            self.sampling = tag["sampling"]
            self.pin(tag["sampling"])
        if options := tag.get("chat_template_kwargs"):
            self.body["chat_template_kwargs"] = {**(self.body.get("chat_template_kwargs") or {}), **options}

    def _read_history(self, messages: list[_Fields]) -> None:
        self.sampled = [_sampled(message) for message in messages]
        with_ids = [index for index, ids in enumerate(self.sampled) if ids is not None and handle_in(ids) is None]
        if self.rollout is None and len(with_ids) != len(messages) - self.sampled.count(None):
            raise InvalidTurnError(
                "a message has a handle in place of its token ids, and the request does not say to which rollout it "
                "belongs: send the tag of the rollout too (`trl_gym`)"
            )
        if not with_ids:
            return
        self.newest = with_ids[-1]
        newest = messages[self.newest]
        self.seen = _token_ids(newest, "prompt_token_ids") + _token_ids(newest, "generation_token_ids")
        self.num_first_prompt = len(_token_ids(messages[with_ids[0]], "prompt_token_ids"))


def _checked_tag(tag: Any) -> Mapping[str, Any]:
    if not isinstance(tag, Mapping) or not isinstance(tag.get("rollout"), str):
        raise InvalidTurnError("trl_gym must be an object with the string `rollout`")
    if unknown := sorted(set(tag) - set(_TAG_KEYS)):
        raise InvalidTurnError(f"trl_gym has unknown keys: {', '.join(unknown)}")
    budget = tag.get("completion_budget")
    if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 1):
        raise InvalidTurnError(f"trl_gym.completion_budget must be a positive integer, not {budget!r}")
    if tag.get("sampling"):
        checked_sampling(tag["sampling"], "trl_gym.sampling", SEED)  # a rollout's own makes it reproducible
    if (policy := tag.get("agent_sampling")) is not None and policy not in AGENT_SAMPLING:
        one_of = ", ".join(AGENT_SAMPLING)
        raise InvalidTurnError(f"trl_gym.agent_sampling must be one of {one_of}, not {_quoted(policy)}")
    options = tag.get("chat_template_kwargs")
    if not isinstance(options, Mapping | None):
        raise InvalidTurnError(f"trl_gym.chat_template_kwargs must be an object, not {options!r}")
    return tag


def _check_count(raw: bytes) -> None:
    """Raise `ValueError` for more lists and objects than a chat has, each of which takes 60 times its 2 bytes."""
    if raw.count(b"{") + raw.count(b"[") > MAX_CONTAINERS:
        raise ValueError(f"more than {MAX_CONTAINERS:,} lists and objects")


def _check_types(body: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    """Check the fields that are read before the server checks them; make whole numbers of token limits, in place."""
    for key in _OBJECT_KEYS:
        if not isinstance(body.get(key), dict | None):
            raise InvalidTurnError(f"{key} must be an object, not {_quoted(body[key])}")
    for key in _STREAM_KEYS:
        if not isinstance(value := (body.get("stream_options") or {}).get(key), bool | None):
            raise InvalidTurnError(f"stream_options.{key} must be true or false, not {_quoted(value)}")
    for key in _LIMIT_KEYS:
        if body.get(key) is not None:
            body[key] = _limit(body[key], key)
    for key in ("top_logprobs", "logprob_token_ids"):  # the server is asked for `logprobs` in any case
        if body.get(key) not in (None, 0, []) and not body.get("logprobs"):
            raise InvalidTurnError(f"when using `{key}`, `logprobs` must be set to true.")
    for message in messages:
        if not isinstance(message.get("tool_calls"), list | None):
            raise InvalidTurnError(f"tool_calls must be a list, not {_quoted(message['tool_calls'])}")


def _limit(value: Any, key: str) -> int:
    """Return a token limit. vLLM takes 8, 8.0 and "8" for the same."""
    number = int(value) if isinstance(value, str) and _NUMERAL.fullmatch(value) else value
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise InvalidTurnError(f"{key} must be a positive integer, not {_quoted(value)}")
    return min(number, _MAX_TOKEN_ID)


def _check_is_sampled(body: dict[str, Any]) -> None:
    """Check that a turn asks for one sampled answer: a beam search decodes greedily, and the best of several answers
    is drawn from another distribution than each of them."""
    for key in ("n", "best_of"):
        if body.get(key) not in (None, 1):
            raise InvalidTurnError(f"{key} must be 1 for a turn of a rollout, not {_quoted(body[key])}")
    if body.get("use_beam_search"):
        raise InvalidTurnError("use_beam_search must be false for a turn of a rollout, whose tokens must be sampled")
    if not isinstance(stream := body.get("stream"), bool | None):  # the server does not see it
        raise InvalidTurnError(f"stream must be true or false, not {_quoted(stream)}")


def num_chars(messages: Any) -> int:
    """Return how many characters messages have at least, once rendered: templates leave thinking of answers out."""
    total = 0
    for message in messages if isinstance(messages, list) else ():
        text = text_of(message.get("content")) if isinstance(message, dict) else ""
        total += len(text.rpartition("</think>")[2] if "</think>" in text else text)
    return total


def _quoted(value: Any) -> str:
    return repr(value)[:_MAX_QUOTED_CHARS]


def checked_sampling(parameters: Any, name: str, *more: str) -> dict[str, Any]:
    """Return `parameters` if they are an object of sampling parameters that can be pinned, those of `more` among them.
    Raises `InvalidTurnError` if it is anything else."""
    if isinstance(parameters, dict) and not (unknown := sorted(set(parameters) - {*PINNED, *more})):
        return parameters
    names = f": {', '.join(unknown)}" if isinstance(parameters, dict) else ""
    raise InvalidTurnError(f"{name} must be an object of {', '.join(PINNED)}{names}")


def _without_token_ids(message: _Fields) -> dict[str, Any]:
    """Return a message without its bundle, which the server does not know."""
    return {key: _any.decode(value) for key, value in message.items() if key not in TOKEN_KEYS}


def _sampled(message: _Fields) -> bytes | None:
    """Return the sampled ids as JSON without blanks; None if there are none."""
    raw = message.get("generation_token_ids")
    ids = b"" if raw is None else bytes(raw).translate(None, b" \n\r\t")
    return ids if ids not in (b"", b"null", b"[]") else None


def handle_in(ids: bytes) -> int | None:
    """Return the handle that stands in place of sampled ids; None for ids."""
    match = _HANDLE.fullmatch(ids)
    return None if match is None else int(match[1])


def _render_options(body: dict[str, Any]) -> dict[str, Any]:
    options = {key: body[key] for key in _RENDER_KEYS if body.get(key) is not None}
    # These two are fields of a chat request, and template arguments in /tokenize.
    extra = {key: body[key] for key in ("documents", "reasoning_effort") if body.get(key) is not None}
    if "reasoning_effort" in extra:
        extra["enable_thinking"] = extra["reasoning_effort"] != "none"
    if extra:
        options["chat_template_kwargs"] = {**extra, **options.get("chat_template_kwargs", {})}
    return options


def _asked(body: dict[str, Any]) -> frozenset[str]:
    asked = {key for key in ("logprobs", "return_token_ids") if body.get(key)}
    if "top_logprobs" in body and body["top_logprobs"] is None:
        asked.discard("logprobs")  # vLLM returns none in that case
    return frozenset(asked)


def _are_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(type(token) is int and 0 <= token <= _MAX_TOKEN_ID for token in prompt)


def _token_ids(message: _Fields, key: str) -> list[int]:
    try:
        ids = _ids.decode(message[key])
    except (KeyError, msgspec.MsgspecError):
        ids = []
    if not ids or min(ids) < 0 or max(ids) > _MAX_TOKEN_ID:
        raise InvalidTurnError(f"a message with generation_token_ids needs {key} as a non-empty list of token ids")
    return ids
