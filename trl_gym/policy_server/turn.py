"""One chat completion request, understood: whose it is, which tokens it has seen, and what goes on to the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
TOKEN_KEYS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")
_TEXT_PARTS = ("text", "refusal", "thinking")
_TAG_KEYS = ("rollout", "sampling", "completion_budget")


class InvalidTurnError(ValueError):
    """The request contradicts the contract; the text is for whoever sent it."""


@dataclass(slots=True)
class Turn:
    """One model call.

    Attributes:
        body: The request without `trl_gym`, sampling pinned; changed by `limit_tokens`.
        messages: Its messages, as sent.
        rollout: Whose turn it is; `None` for a request without a tag.
        completion_budget: Tokens that the rollout may have after its first prompt.
        newest: Index of the newest message that carries sampled ids, or `None`.
        seen: Prompt and sampled ids of that message, or `None`.
        num_first_prompt: Length of the rollout's first prompt, or `None` on its first turn.
        asked: What the client itself wants to see of what we always ask for.
    """

    body: dict[str, Any]
    messages: list[dict[str, Any]]
    rollout: str | None = None
    completion_budget: int | None = None
    newest: int | None = None
    seen: list[int] | None = None
    num_first_prompt: int | None = None
    asked: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def from_request(cls, request: dict[str, Any]) -> Turn:
        """Read a request and pin its sampling.

        Args:
            request: Parsed JSON with a non-empty list of message objects.

        Raises:
            InvalidTurnError: If the tag or the token ids are malformed, or a rollout asks for `n` > 1 or a stream.
        """
        body = dict(request)
        tag = body.pop("trl_gym", None)
        turn = cls(body, body["messages"], asked=_asked(body))
        if tag is not None:
            turn._apply_tag(tag)
        turn._read_history()
        if turn.is_ours and body.get("n") not in (None, 1):
            raise InvalidTurnError(f"n must be 1 for a turn of a rollout, not {body['n']!r}")
        return turn

    @property
    def is_tagged(self) -> bool:
        return self.rollout is not None

    @property
    def is_ours(self) -> bool:
        """Part of a rollout: the bundle is a promise then, not a courtesy."""
        return self.is_tagged or self.seen is not None

    @property
    def ending(self) -> dict[str, bool]:
        """How the render of all messages ends, as /tokenize wants it."""
        return {
            "add_generation_prompt": self.body.get("add_generation_prompt", True),
            "continue_final_message": self.body.get("continue_final_message", False),
        }

    @property
    def continues_newest(self) -> bool:
        """Whether the sampled turn itself is to be continued, instead of a new one being started."""
        return bool(self.body.get("continue_final_message")) and self.newest == len(self.messages) - 1

    @property
    def has_media(self) -> bool:
        """Whether a message carries something other than text, which forced token ids would leave out."""
        contents = (message.get("content") for message in self.messages)
        parts = (part for content in contents if isinstance(content, list) for part in content)
        return any(isinstance(part, dict) and part.get("type") not in _TEXT_PARTS for part in parts)

    def limit_tokens(self, room: int) -> None:
        """Sample at most `room` tokens, and no more than the request itself allows."""
        key = "max_completion_tokens" if self.body.get("max_completion_tokens") is not None else "max_tokens"
        asked = self.body.get(key)
        if asked is None and self.completion_budget is None:
            return  # the server stops at its maximum length by itself
        if asked is None or (isinstance(asked, int) and asked > room):
            self.body[key] = room

    def sampling_request(self, forced: list[int] | None, has_prompt_field: bool) -> dict[str, Any]:
        """What is sent to the server.

        Args:
            forced: The exact prompt, or `None` to let the server render.
            has_prompt_field: Whether the server takes the prompt as a field of its own. Otherwise it travels the way a
                prefill server hands it to a decode server, which uses the ids and still parses tools and reasoning.
        """
        body = {**self.body, "messages": without_token_ids(self.messages), "logprobs": True, "return_token_ids": True}
        if body.get("top_logprobs") is None:
            body["top_logprobs"] = 0  # an explicit null switches logprobs off
        if forced is not None and has_prompt_field:
            body["prompt_token_ids"] = forced
        elif forced is not None:
            body["kv_transfer_params"] = {**(body.get("kv_transfer_params") or {}), "prompt_token_ids": forced}
        return body

    def _apply_tag(self, tag: Any) -> None:
        if not isinstance(tag, dict) or not isinstance(tag.get("rollout"), str):
            raise InvalidTurnError("trl_gym must be an object with the string `rollout`")
        if unknown := sorted(set(tag) - set(_TAG_KEYS)):
            raise InvalidTurnError(f"trl_gym has unknown keys: {', '.join(unknown)}")
        self.rollout = tag["rollout"]
        budget = tag.get("completion_budget")
        if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 1):
            raise InvalidTurnError(f"trl_gym.completion_budget must be a positive integer, not {budget!r}")
        self.completion_budget = budget
        if self.body.get("stream"):
            raise InvalidTurnError("a turn of a rollout cannot be streamed: its tokens come with the whole answer")
        self._pin_sampling(tag.get("sampling") or {})

    def _pin_sampling(self, sampling: Any) -> None:
        if not isinstance(sampling, dict) or (unknown := sorted(set(sampling) - set(SAMPLING_KEYS))):
            names = f": {', '.join(unknown)}" if isinstance(sampling, dict) else ""
            raise InvalidTurnError(f"trl_gym.sampling must be an object of {', '.join(SAMPLING_KEYS)}{names}")
        for key, value in sampling.items():
            if value is None:
                self.body.pop(key, None)  # the server's own default, whatever the agent wanted
            else:
                self.body[key] = value

    def _read_history(self) -> None:
        with_ids = [i for i, message in enumerate(self.messages) if message.get("generation_token_ids")]
        if not with_ids:
            return
        self.newest = with_ids[-1]
        newest = self.messages[self.newest]
        self.seen = _ids(newest, "prompt_token_ids") + _ids(newest, "generation_token_ids")
        self.num_first_prompt = len(_ids(self.messages[with_ids[0]], "prompt_token_ids"))


def without_token_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as they were before the bundle was attached; the server neither knows nor needs the ids."""
    return [{key: value for key, value in message.items() if key not in TOKEN_KEYS} for message in messages]


def _asked(body: dict[str, Any]) -> frozenset[str]:
    asked = {key for key in ("logprobs", "return_token_ids") if body.get(key)}
    if "top_logprobs" in body and body["top_logprobs"] is None:
        asked.discard("logprobs")  # vLLM answers none then
    return frozenset(asked)


def _ids(message: dict[str, Any], key: str) -> list[int]:
    ids = message.get(key)
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise InvalidTurnError(f"a message with generation_token_ids needs {key} as a non-empty list of integers")
    return ids
