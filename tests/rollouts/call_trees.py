"""Agents that call the policy in every way that the ledger knows: on the real middleware, with an engine that keeps
the tokens of each call. A plain reference says from these tokens what is trained.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.policy_server.fake_vllm import END, FakeVllm, Json
from tests.policy_server.middleware.test_app import Http
from trl_gym.policy_server.middleware.ledger import CallRecord
from trl_gym.policy_server.middleware.turn import TOKEN_KEYS

ROLLOUT = "r0"
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Reply:
    """What the policy samples: text, then a call of each tool, then its turn end unless it is cut."""

    text: str
    tools: str = ""  # a letter each
    is_cut: bool = False

    @property
    def ids(self) -> list[int]:
        return [*map(ord, self.text + self.tools), *([] if self.is_cut else [END])]

    @property
    def said(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.text.strip(), *self.tools)))


@dataclass(frozen=True)
class Sampled:
    """A call as the engine saw it."""

    name: str
    reply: Reply
    prompt: list[int]
    ids: list[int]
    logprob: float  # of all its tokens, and of no other call's

    @property
    def whole(self) -> list[int]:
        return self.prompt + self.ids


class Engine(FakeVllm):
    """Samples what `replies` has for the request's `user`, when the gate of that name is open."""

    def __init__(self) -> None:
        super().__init__(max_model_len=10_000)
        self.replies: dict[str, Reply] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.log: list[Sampled] = []  # in the order of the answers

    async def __call__(self, scope: Json, receive: Any, send: Any) -> None:
        if scope["path"] != CHAT:
            return await super().__call__(scope, receive, send)
        message = await receive()
        await self.gates[json.loads(message["body"])["user"]].wait()

        async def again() -> Any:
            return message

        return await super().__call__(scope, again, send)

    def chat(self, request: Json) -> tuple[int, Json]:
        name = request["user"]
        reply = self.replies[name]
        self.reply, self.finish_reason = reply.ids, "length" if reply.is_cut else "stop"
        logprob = -(len(self.log) + 1) / 1024
        status, answer = super().chat(request)
        assert status == 200, answer
        (choice,) = answer["choices"]
        choice["message"]["content"] = reply.text
        if reply.tools:
            functions = [{"name": tool, "arguments": '{"a": 1}'} for tool in reply.tools]
            choice["message"]["tool_calls"] = [
                {"id": f"{name}-{place}", "type": "function", "function": function}
                for place, function in enumerate(functions)
            ]
        choice["logprobs"]["content"] = [{"token": "", "logprob": logprob} for _ in reply.ids]
        self.log.append(Sampled(name, reply, answer["prompt_token_ids"], reply.ids, logprob))
        return status, answer


@dataclass
class Conversation:
    """A history that an agent keeps, and the calls whose answers are in it."""

    messages: list[Json]
    names: list[str] = field(default_factory=list)


class Agent:
    """Makes the calls of one rollout.

    Attributes:
        conversations: Its histories.
        messages: Of each call, the answer's message as it came.
    """

    def __init__(self) -> None:
        self.engine = Engine()
        self._http = Http(self.engine)
        self.conversations = [Conversation([_user("go")])]
        self.messages: dict[str, Json] = {}

    async def ask(
        self, conversation: Conversation, replies: Sequence[Reply], *, order: Sequence[int] = (0,), is_new: bool = True
    ) -> list[str]:
        """Let the policy answer a history once for each reply, at once, and in an order.

        Args:
            conversation: It gets a message of the user first if it ends with one of the assistant and `is_new`.
            replies: One for each call.
            order: Indices of `replies` in the order of the answers.
            is_new: See `conversation`.
        """
        if is_new and conversation.messages[-1]["role"] == "assistant":
            conversation.messages.append(_user("and"))
        names = [f"c{len(self.engine.replies) + place}" for place in range(len(replies))]
        tasks = []
        for name, reply in zip(names, replies, strict=True):
            self.engine.replies[name], self.engine.gates[name] = reply, asyncio.Event()
            body = {"user": name, "trl_gym": {"rollout": ROLLOUT}}
            tasks.append(asyncio.create_task(self._http.slim_chat(list(conversation.messages), **body)))
        for place in order:
            self.engine.gates[names[place]].set()
            self.messages[names[place]] = (await tasks[place])["choices"][0]["message"]
        return names

    def keep(self, conversation: Conversation, name: str, *, with_handle: bool, empty: bool) -> None:
        """Put an answer into a history, or leave it out where it says nothing and `empty` is False."""
        message = self.messages[name]
        if not self.engine.replies[name].said and not empty:
            return
        conversation.messages.append(message if with_handle else without_handle(message))
        conversation.names.append(name)

    async def take(self) -> list[CallRecord]:
        return await self._http.take(ROLLOUT)


def without_handle(message: Json) -> Json:
    return {key: value for key, value in message.items() if key not in TOKEN_KEYS}


def items_of(message: Json, *, with_handle: bool, in_front: bool = False, with_results: bool = False) -> list[Json]:
    """The items of Gym's answer for a message.

    Args:
        message: An answer's.
        with_handle: Whether one of the items has the handle.
        in_front: Whether that is the first item, a message even if it is empty (Gym's `hermes_agent`); else the last.
        with_results: Whether each tool call is followed by its result (Gym's `opencode_agent`).
    """
    items: list[Json] = []
    if message["content"] or in_front or not message.get("tool_calls"):
        content = [{"type": "output_text", "text": message["content"]}]
        items.append({"type": "message", "role": "assistant", "content": content})
    for call in message.get("tool_calls") or ():
        items.append({"type": "function_call", "call_id": call["id"], **call["function"]})
    if with_handle:
        items[0 if in_front else -1] |= {key: message[key] for key in TOKEN_KEYS}
    if not with_results:
        return items
    results = {one["id"]: result(one["id"]) for one in message.get("tool_calls") or ()}
    return [one for item in items for one in (item, *filter(None, [results.get(item.get("call_id"))]))]


def result(call_id: str) -> Json:
    return {"type": "function_call_output", "call_id": call_id, "output": "3"}


def _user(text: str) -> Json:
    return {"role": "user", "content": text}


# -- the reference ----------------------------------------------------------------------------------------------------


class Reference:
    """Which calls continue which, from the engine's tokens alone."""

    def __init__(self, log: Sequence[Sampled]) -> None:
        self.calls = {one.name: one for one in log if one.ids}
        self.order = list(self.calls)
        # Where a turn in which nothing was sampled, and which the template ended, looks like one that only ended.
        nothing = {tuple(one.prompt) for one in log if not one.ids}
        self.is_ambiguous = any(one.ids == [END] and tuple(one.prompt) in nothing for one in log)

    def before(self, name: str) -> str | None:
        """The call that a call continues: of those answered before it the longest whose tokens its prompt has."""
        earlier = [self.calls[one] for one in self.order[: self.order.index(name)]]
        prompt = self.calls[name].prompt
        behind = [one for one in earlier if prompt[: len(one.whole)] == one.whole]
        return max(behind, key=lambda one: len(one.whole)).name if behind else None

    def has(self, names: Sequence[str], before: str, name: str) -> bool:
        """Whether a call, or one that says the same and that `name` continues as well, is among some."""
        said, prompt = self.calls[before].reply.said, self.calls[name].prompt
        same = [self.calls[one] for one in names if self.calls[one].reply.said == said]
        return any(prompt[: len(one.whole)] == one.whole for one in same)

    def counted(self, names: Sequence[str], *, may_leave_out: bool = False) -> list[str] | None:
        """The calls that count of an answer that has these, in its order; None if it leaves one out, has one twice or
        in another order."""
        counted: list[str] = []
        for place, name in enumerate(names):
            empty = []
            before = self.before(name)
            while before is not None and not self.has(counted, before, name):
                if self.has(names[place + 1 :], before, name):
                    return None
                if not self.calls[before].reply.said:
                    empty.append(before)
                elif not may_leave_out:
                    return None
                before = self.before(before)
            if name in counted:
                return None
            counted += [*reversed(empty), name]
        return counted

    def head(self, counted: Sequence[str]) -> list[str]:
        """The calls up to the first whose prompt does not have the tokens of the one before."""
        head = list(counted[:1])
        for name in counted[1:]:
            whole = self.calls[head[-1]].whole
            if self.calls[name].prompt[: len(whole)] != whole:
                break
            head.append(name)
        return head
