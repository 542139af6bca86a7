"""Rollouts over `templates.py`, each of their prompts judged.

What a prompt has to be is found on text, with renders of the whole chat only; the middleware works on token ids and
knows neither the template's source nor its turn ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tests.policy_server.middleware.template_chats import TOOLS, Chat, Sampled, common_start, sample
from tests.policy_server.middleware.templates import Answer, Client, Json, Template, TemplateError

_LITERAL = re.compile(r"\{special (\d+)\}")  # stands for one of the template's special tokens, as text
_MARKS = ("Xmarkone7Y", "Vmarktwo8W")  # they share neither beginning nor end
_MOVED = "Umarkthree9Z"  # the text next to calls


@dataclass(frozen=True)
class Expected:
    """What has to follow the tokens seen.

    Attributes:
        tails: Any of these texts; empty if the template does not write the turn at all.
        lost: Texts of new messages that the template writes, but not in the tail.
        doubt: Why it is also right to say that this cannot be known; empty if it is not.
        rendered: What the server would render.
    """

    tails: tuple[str, ...]
    lost: tuple[str, ...] = ()
    doubt: str = ""
    rendered: str = ""

    @property
    def obstacle(self) -> str:
        """Why the prompt may be served as rendered; empty if it may not."""
        if not self.tails:
            return "the template does not write the turn"
        return "a later system message goes to the front of the chat" if self.lost else self.doubt


@dataclass(frozen=True)
class Step:
    """One forced prompt, judged.

    Attributes:
        outcome: "exact"; "drift" (served as rendered); "refused" (status 400); or "wrong".
        expected: From `expect`; None if the template itself refuses the messages.
        reason: The server's words for "drift" and "refused".
        detail: What was expected and seen, for whoever reads a failure.
        thinking: Whether the policy has thought in the newest turn and the template would not write it again.
    """

    outcome: Literal["exact", "drift", "refused", "wrong"]
    expected: Expected | None
    reason: str = ""
    detail: str = ""
    thinking: bool = False

    @property
    def is_justified(self) -> bool:
        """Whether nothing better could have been answered."""
        if self.outcome == "refused":
            return self.expected is None
        if self.expected is None or self.outcome == "wrong":
            return False
        if self.outcome == "drift":
            return bool(self.expected.obstacle)
        return bool(self.expected.tails) and not self.expected.lost


# -- what the next prompt has to be -----------------------------------------------------------------------------------


def expect(
    template: Template, messages: list[Json], newest: int, tools: list[Json] | None, answer: Answer
) -> Expected:
    """What has to follow the tokens seen when `messages[newest]` is the sampled turn.

    Raises:
        TemplateError: If the template refuses the chat.
    """
    full = template.text(messages, tools)
    turn = messages[newest]
    then = _after(template, messages[: newest + 1], newest, tools, add_generation_prompt=False)
    now = _after(template, messages, newest, tools)
    if now is None or then is None:
        return Expected(())
    own = _own(template, then)
    if turn.get("tool_calls") and turn.get("content") and not now.startswith(own):
        return _expect_moved(template, messages, newest, tools, answer)
    tails = _tails(template, then, now, answer)
    keys = [key for later in messages[newest + 1 :] for key in _keys(later.get("content") or "")]
    lost = tuple(key for key in keys if key in full and not all(key in tail for tail in tails))
    return Expected(tails, lost, _doubt(template, messages[newest + 1 :], own != then, now.removeprefix(own), answer))


def _keys(content: str) -> list[str]:
    """The words by which `Rollout` can tell its messages apart."""
    return re.findall(r"k\d+k", content)


def _expect_moved(
    template: Template, messages: list[Json], newest: int, tools: list[Json] | None, answer: Answer
) -> Expected:
    """For templates that write the text of a turn with calls behind the results (Gemma 4): it is not written twice.

    Whether they then close the turn depends on that text, so both ways are right, and so is saying so.
    """
    tails: list[str] = []
    for content in (_MOVED, None):
        changed = [*messages[:newest], {**messages[newest], "content": content}, *messages[newest + 1 :]]
        then = _after(template, changed[: newest + 1], newest, tools, add_generation_prompt=False) or ""
        now = _after(template, changed, newest, tools) or ""
        tails += _tails(template, then.replace(_MOVED, ""), now.replace(_MOVED, ""), answer)
    doubt = CUT_CALL if answer.is_cut else "text next to tool calls goes behind their results"
    return Expected(tuple(tails), doubt=doubt)


CUT_CALL = "cut off right behind a tool call"


def _doubt(template: Template, new: list[Json], is_closed: bool, after: str, answer: Answer) -> str:
    if answer.message.get("tool_calls") and answer.is_cut:
        return CUT_CALL  # how turns with calls end may never have been seen
    if is_closed and not after.startswith(template.family.ends):
        return f"in front of a message of role {new[0]['role']} a turn is closed in another way" if new else ""
    later = [message["content"] for message in new if message["role"] == "system"]
    if later and not all(_keys(content)[0] in after for content in later):
        return "a later system message is left out"
    return ""


def _after(
    template: Template, messages: list[Json], newest: int, tools: list[Json] | None, **options: Any
) -> str | None:
    """The text behind what the newest turn says; None if the template does not write that."""
    for marked in (_marked, _marked_content):
        texts = []
        for mark in _MARKS:
            changed = [*messages[:newest], marked(messages[newest], mark), *messages[newest + 1 :]]
            texts.append(template.text(changed, tools, **options))
        if all(mark in text for mark, text in zip(_MARKS, texts, strict=True)):
            return common_start([text[::-1] for text in texts])[::-1]
    return None


def _marked(message: Json, mark: str) -> Json:
    """The turn with a mark as the last thing that it says: its text, or the argument of its calls."""
    marked = {key: value for key, value in message.items() if "token_ids" not in key and "log_probs" not in key}
    if not message.get("tool_calls"):
        thought, closed, _ = (message.get("content") or "").rpartition("</think>")
        return {**marked, "content": f"{thought}{closed}{mark}"}
    arguments = json.dumps({"text": mark})  # of all calls, because some templates write the first one only
    calls = [{**call, "function": {**call["function"], "arguments": arguments}} for call in message["tool_calls"]]
    return {**marked, "content": message.get("content") and _MOVED, "tool_calls": calls}


def _marked_content(message: Json, mark: str) -> Json:
    """For templates that leave the calls out."""
    return {**_marked(message, mark), "content": mark}


def _own(template: Template, rest_then: str) -> str:
    """What the policy itself writes after the mark, such as the end of a tool call; up to the turn end."""
    places = [place for end in template.family.ends if (place := rest_then.find(end)) >= 0]
    return rest_then[: min(places)] if places else rest_then


def _tails(template: Template, rest_then: str, rest: str, answer: Answer) -> tuple[str, ...]:
    """The rest of the render without what the policy has written itself."""
    own, sampled = _own(template, rest_then), template.decode(answer.ids[-1:])
    if not answer.is_whole:
        # Cut off right behind a token that also ends turns (gpt-oss: its thinking): nobody can say which it was.
        return (rest, rest.removeprefix(sampled)) if sampled in template.family.ends else (rest,)
    if not rest.startswith(own):
        return ()
    after = rest.removeprefix(own)
    if answer.is_cut:
        return (after,)
    if own == rest_then:  # the next turn's opening token is what the policy has ended this one with
        return (after.removeprefix(sampled),)
    end_then = next(end for end in template.family.ends if rest_then.startswith(end, len(own)))
    written = next((end for end in template.family.ends if after.startswith(end)), "")
    without = after.removeprefix(written)
    # A stop token that the template never writes here may stand for the template's or be followed by it.
    return (without,) if sampled in (written, end_then) else (without, after)


# -- a whole rollout --------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """A rollout in progress, as an agent and NeMo Gym keep it."""

    client: Client
    chat: Chat
    messages: list[Json] = field(default_factory=list)
    num_texts: int = 0

    def play(self) -> Iterator[Step]:
        """Sample every turn and judge every prompt after the first.

        Raises:
            TemplateError: If the template refuses the chat before the first answer.
        """
        template, tools = self.client.server.template, TOOLS if self.chat.tools else None
        if self.chat.system is not None:
            self._add("system", self.chat.system)
        self._add("user", self.chat.user)
        newest, previous = -1, Answer([], {})
        self.client.num_rollouts += 1
        name = f"r{self.client.num_rollouts}"
        for turn in (*self.chat.turns, Sampled("end")):
            expected = None
            if newest >= 0:
                try:
                    rendered = template.text(self.messages, tools)
                    expected = replace(expect(template, self.messages, newest, tools, previous), rendered=rendered)
                except TemplateError as error:
                    status, body = self.client.chat(name, self.messages, tools, Answer([0], {"content": ""}))
                    yield _judged_refusal(status, body, str(error))
                    return
            try:
                answer = sample(template, self.messages, tools, turn)
            except TemplateError:
                return  # a turn that cannot be written in this template, such as a tool call
            status, body = self.client.chat(name, self.messages, tools, answer)
            if expected is not None:
                yield replace(
                    _judge(template, self.messages[newest], expected, status, body),
                    thinking=self._is_thinking_gone(self.messages[newest], tools),
                )
            if status != 200:
                return
            newest, previous = len(self.messages), answer
            self._add_turn(template, turn, body["choices"][0]["message"])

    def _is_thinking_gone(self, turn: Json, tools: list[Json] | None) -> bool:
        """Whether the policy thought in this turn, the agent sends that back, and the template leaves it out."""
        template, thought = self.client.server.template, turn.get("reasoning")
        if not thought or thought not in template.decode(turn["generation_token_ids"]):
            return False
        return thought not in template.text(self.messages, tools)

    def _add(self, role: str, text: str, **fields: Any) -> None:
        """The text, its literals replaced, with a word in it that no other message has."""
        self.num_texts += 1
        specials = self.client.server.template.specials
        text = _LITERAL.sub(lambda match: specials[int(match[1]) % len(specials)], text)
        half = len(text) // 2
        self.messages.append({"role": role, "content": f"{text[:half]}k{self.num_texts}k{text[half:]}", **fields})

    def _add_turn(self, template: Template, turn: Sampled, message: Json) -> None:
        thought = message.get("reasoning")
        if thought and turn.resent != "field":
            message = {key: value for key, value in message.items() if key != "reasoning"}
            if turn.resent == "inline" and "<think>" in template.source:
                message["content"] = f"<think>{thought}</think>{message['content'] or ''}"
        self.messages.append(message)
        calls = list(message.get("tool_calls") or [])
        for role, text in turn.then:
            if role == "tool":
                if not calls:
                    continue
                self._add("tool", text, tool_call_id=calls.pop(0)["id"])
            elif calls:  # every call is answered before anybody speaks
                while calls:
                    self._add("tool", text, tool_call_id=calls.pop(0)["id"])
                self._add(role, text)
            else:
                self._add(role, text)
        for call in calls:
            self._add("tool", "done", tool_call_id=call["id"])


def _judged_refusal(status: int, body: Json, reason: str) -> Step:
    if status == 400:
        return Step("refused", None, reason)
    drift = body.get("trl_gym")
    return Step("wrong", None, reason, f"the template refuses this chat ({reason}), the server answered ({drift})")


def _judge(template: Template, newest: Json, expected: Expected, status: int, body: Json) -> Step:
    if status != 200:
        return Step("refused", expected, body.get("error", {}).get("message", ""), "the template renders this chat")
    seen = newest["prompt_token_ids"] + newest["generation_token_ids"]
    prompt = body["choices"][0]["message"]["prompt_token_ids"]
    drift = (body.get("trl_gym") or {}).get("drift")
    if drift:
        return Step("drift", expected, drift["text"], _shown(template, seen, expected, prompt))
    tail = prompt[len(seen) :]
    if prompt[: len(seen)] == seen and any(tail == template.ids(text) for text in expected.tails):
        return Step("exact", expected)
    if expected.obstacle and prompt[: len(seen)] == seen and prompt == template.ids(expected.rendered):
        return Step("drift", expected, "as rendered, which happens to start with the tokens seen")
    return Step("wrong", expected, detail=_shown(template, seen, expected, prompt))


def _shown(template: Template, seen: list[int], expected: Expected, prompt: list[int]) -> str:
    starts = prompt[: len(seen)] == seen
    tail = template.decode(prompt[len(seen) :] if starts else prompt)
    wanted = " or ".join(map(repr, expected.tails)) or "(the template does not write the turn)"
    return (
        f"seen ends in {template.decode(seen[-25:])!r}\n  expected tail: {wanted}\n  "
        f"actual {'tail' if starts else 'PROMPT'}: {tail!r}\n  lost {expected.lost}"
    )
