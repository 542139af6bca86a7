"""The prefix rule under every chat template that TRL ships: the real middleware, real renders, odd tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.conftest import load
from tests.policy_server.middleware.template_chats import Chat, Sampled, with_other_history
from tests.policy_server.middleware.template_rollouts import CUT_CALL, Rollout, Step
from tests.policy_server.middleware.templates import Client, Template, load_template, template_paths
from trl_gym.policy_server.middleware import splice

template_table = load("template_table", Path(__file__).resolve().parents[3] / "scripts" / "template_table.py")
row_of = cache(template_table.row_of)

_WORDS = ["hello", " world", " the answer", " is", " 42", "12345", "call", "{}", '"quoted"', "a, b; c."]
_ODD = [
    "\n",
    "\n\n",
    "  ",
    "\t",
    "!",
    "...",
    "<",
    "}}",
    "\\",
    "'",
    "👩‍👩‍👧",
    "🏳️‍🌈",
    "e\u0301",
    "\u0327",
    "שלום",
    "مرحبا",
    "漢字かな",
    "한국어",
    "\u200b",
    "\u2028",
    "ﬁ",
    "ß",
]
plain = st.lists(st.sampled_from(_WORDS + _ODD), max_size=6).map("".join) | st.text(max_size=8)
literal = st.lists(
    st.sampled_from(_WORDS + _ODD) | st.integers(0, 40).map("{{special {}}}".format), min_size=1, max_size=5
).map("".join)
thoughts = st.sampled_from(["", "let me think", "hm.\n\nso: 漢字 \n1 + 1", "x"])


@st.composite
def turns(draw: st.DrawFn, texts: st.SearchStrategy[str], *, tools: bool) -> Sampled:
    calls = draw(st.sampled_from([0, 0, 1, 1, 2])) if tools else 0
    then = draw(st.lists(st.tuples(st.just("user"), texts), min_size=0 if calls else 1, max_size=1))
    return Sampled(
        text=draw(plain),
        thought=draw(thoughts),
        calls=calls,
        cut=draw(st.sampled_from([None, None, None, 0.1, 0.5, 0.9, 1.0])),
        other_end=draw(st.sampled_from([False, False, True])),
        resent=draw(st.sampled_from(["field", "inline", "dropped"])),
        then=(*(("tool", draw(texts)) for _ in range(calls)), *draw(interludes(texts)), *then),
        seed=draw(st.integers(0, 1000)),
    )


def interludes(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[tuple[str, str]]]:
    """Messages that few agents send: another user message, a late system message, an answer that nobody sampled."""
    roles = st.sampled_from([None, None, None, None, "user", "assistant", "system"])
    return st.tuples(roles, texts).map(lambda message: [message] if message[0] else [])


@st.composite
def chats(draw: st.DrawFn, texts: st.SearchStrategy[str] = plain) -> Chat:
    tools = draw(st.booleans())
    return Chat(
        system=draw(st.none() | texts),
        user=draw(texts),
        tools=tools,
        turns=tuple(draw(st.lists(turns(texts, tools=tools), min_size=1, max_size=4))),
    )


def stable(max_examples: int) -> settings:
    """The same chats on every machine and in every run. A failure is told, not shrunk: that would take minutes."""
    return settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=max_examples,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


every_template = pytest.mark.parametrize("path", template_paths(), ids=lambda path: path.stem)


def template_named(name: str) -> Template:
    return next(load_template(path) for path in template_paths() if path.stem == name)


def told(step: Step) -> str:
    return f"{step.outcome}: {step.reason}\n  {step.detail}"


@every_template
@stable(max_examples=4)
@given(chat=chats(), other=chats(), order=st.randoms(use_true_random=False))
def test_every_prompt_is_what_was_seen_and_what_the_template_adds(
    path: Path, chat: Chat, other: Chat, order: random.Random
) -> None:
    template = load_template(path)
    client, known = Client(template), {*row_of(template).obstacles, CUT_CALL}
    rollouts = [Rollout(client, variant).play() for variant in (chat, with_other_history(chat), other)]
    while rollouts:  # all at once: nothing that one of them teaches the server may be wrong for another
        rollout = order.choice(rollouts)
        if (step := next(rollout, None)) is None:
            rollouts.remove(rollout)
            continue
        assert step.is_justified, told(step)
        assert step.outcome != "drift" or step.expected.obstacle in known, f"not in the docs: {told(step)}"


@every_template
@stable(max_examples=2)
@given(chat=chats(literal))
def test_special_tokens_as_text_never_make_a_prompt_wrong(path: Path, chat: Chat) -> None:
    for step in Rollout(Client(load_template(path)), chat).play():
        assert step.is_justified or step.outcome == "drift", told(step)


def test_the_table_in_the_docs_is_current() -> None:
    rows = [row_of(load_template(path)) for path in template_paths()]
    assert not [row for row in rows if row.wrong]
    page = template_table.PAGE.read_text(encoding="utf-8")
    assert template_table.with_table(page, template_table.table(rows)) == page, "run scripts/template_table.py"


def no_boundary(*_: object) -> list[int]:
    raise splice.NoBoundaryError("always")


@pytest.mark.parametrize(
    "broken",
    [
        lambda seen, tail, *_: [*seen, *tail],  # doubles the turn end
        lambda seen, tail, *_: [*seen, *tail[2:]],  # forgets the newline behind it
        lambda seen, tail, *_: [*seen[:-1], *tail],  # unsamples a token
        no_boundary,
    ],
)
def test_a_broken_splice_is_noticed(broken: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splice, "splice", broken)
    assert template_table.row_of(template_named("qwen3")).wrong


def test_the_sampled_tokens_are_not_the_tokenizers_own() -> None:
    template = template_named("qwen3")
    rollout = Rollout(
        Client(template), Chat(turns=tuple(Sampled("the answer is hello world", seed=i) for i in range(9)))
    )
    assert [step.outcome for step in rollout.play()] == ["exact"] * 9
    sampled = [message["generation_token_ids"] for message in rollout.messages if "generation_token_ids" in message]
    canonical = [template.ids(template.decode(ids)) for ids in sampled]
    assert sum(ids != own for ids, own in zip(sampled, canonical, strict=True)) > 4
    assert [template.decode(own) for own in canonical] == [template.decode(ids) for ids in sampled]
