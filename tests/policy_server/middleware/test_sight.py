"""What a chat template can see of a text, and what is left out of it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy_server.middleware.templates import template_paths
from trl_gym.policy_server.middleware.sight import Sight, sight_of

FILLER = "zqx1"
LONG = "it was a long day, and nobody said a word of it"


def each(body: str, before: str = "") -> str:
    return "{% set ns = namespace(n=0, all='') %}" + before + "{% for m in messages %}" + body + "{% endfor %}"


# -- abbreviating -----------------------------------------------------------------------------------------------------

SEARCHED = ("</think>", "<tool_response>", "\nObservation:", "ab", "aba", "?")
_pieces = [*SEARCHED, "</th", "ink>", "Observation:", "b", "a", "\n", "  \n" * 9, " ", LONG, "words " * 9, "x" * 40]
texts = st.lists(st.sampled_from(_pieces), max_size=6).map("".join)


@given(texts, texts, st.sampled_from(SEARCHED))
def test_a_template_cannot_tell_the_short_text_from_the_long(one: str, other: str, searched: str) -> None:
    sight = Sight(SEARCHED)
    short, then = sight.text(one, FILLER), sight.text(other, FILLER)
    assert len(short) <= len(one)
    assert short.count(searched) == one.count(searched)
    assert short.startswith(searched) == one.startswith(searched)
    assert short.endswith(searched) == one.endswith(searched)
    assert (short.strip() == searched) == (one.strip() == searched)
    assert (searched in short + then) == (searched in one + other)
    pieces, whole = short.split(searched), one.split(searched)
    assert [bool(piece.strip()) for piece in pieces] == [bool(piece.strip()) for piece in whole]
    for strip in (str.lstrip, str.rstrip, str.strip):
        assert len(short) - len(strip(short)) == len(one) - len(strip(one))
    # What differs shows: a render that repeats it cannot pass for the whole chat's.
    assert all(piece == long or FILLER in piece for piece, long in zip(pieces, whole, strict=True))


def test_what_is_kept_of_a_message() -> None:
    name, arguments = (
        "a_name_that_is_longer_than_most_of_them",
        json.dumps({"text": LONG, "n": [1, LONG], "": "short"}),
    )
    message = {
        "role": "assistant",
        "content": [{"type": "text", "text": LONG}],
        "reasoning": f"  {LONG}\n",
        "tool_calls": [{"id": LONG, "type": "function", "function": {"name": name, "arguments": arguments}}],
    }
    [short] = Sight(()).abbreviate([message], FILLER)
    assert short["content"] == [{"type": "text", "text": FILLER}]
    assert short["reasoning"] == f"  {FILLER}\n"
    assert (short["tool_calls"][0]["id"], short["tool_calls"][0]["function"]["name"]) == (LONG, name)
    assert json.loads(short["tool_calls"][0]["function"]["arguments"]) == {
        "text": FILLER,
        "n": [1, FILLER],
        "": "short",
    }


@pytest.mark.parametrize("arguments", [f'{{"text": "{LONG}"', f"not JSON: {LONG}", "[" * 100_000, {"text": 5}, None])
def test_arguments_that_are_no_json_are_kept(arguments: object) -> None:
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    assert Sight(()).abbreviate([message], FILLER) == [message]


def test_calls_that_are_no_list_are_kept() -> None:
    assert Sight(()).abbreviate([{"role": "assistant", "tool_calls": LONG}], FILLER)[0]["tool_calls"] == LONG


# -- proving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "searched"),
    [
        (each("{{ m.role ~ m.content|trim }}{{ loop.index0 + messages|length }}"), []),
        (each("{% if m.content is not string %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"), []),
        (each("{% if '</t>' in m.content %}{{ m['content'].split('</t>')[-1].lstrip('\n') }}{% endif %}"), ["</t>"]),
        (each("{% if m.content in ['a', 'b'] or m.get('content') == 'b' or m.content == 3%}!{% endif %}"), ["a", "b"]),
        (each("{% if m.content.startswith('x') and m.content|replace('y', 'z') %}!{% endif %}"), ["x", "y"]),
        (each("{% if m.content|trim|length > 0 and m.tool_calls|length > 1 %}!{% endif %}"), []),
        (each("{% if m.tool_call_id == messages[loop.index0 - 1].tool_calls[0].id %}!{% endif %}"), []),
        (each("{% if loop.index0 > ns.n %}{% set ns.n = loop.index0 %}{% endif %}"), []),
        (each("{{ said(m.content) }}", "{% macro said(c) %}{{ c if 'x' in c }}{% endmacro %}"), ["x"]),
        (each("{% generation %}{{ m.content }}{% endgeneration %}"), []),
        (each("{% for k, v in m.arguments|items %}{{ v|tojson if k in ['key'] }}{% endfor %}"), []),
        (each("{% for t in tools %}{{ t.description|upper }}{{ t.description[:9] }}{% endfor %}"), []),
    ],
)  # fmt: skip
def test_a_template_that_asks_little_of_texts(source: str, searched: list[str]) -> None:
    sight = sight_of(source)
    assert sight is not None
    assert list(sight.searched) == searched


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content[:9] }}",
        "{{ m.content[0] }}",
        "{{ m.content[ns.n] }}",
        "{{ m[m.content] }}",
        "{{ m.content|length }}",
        "{% if m.content|length > 20 %}!{% endif %}",
        "{% set ns.n = ns.n + m.content|length %}{{ ns.n }}",
        "{% set c = m.content|length %}{% if c == 9 %}!{% endif %}",
        "{% if m.content == messages[0].content %}!{% endif %}",
        "{% if m.content in messages[0].content %}!{% endif %}",
        "{% if bos_token in m.content %}!{% endif %}",
        "{% if m.content < 'm' %}!{% endif %}",
        "{% if 'a' < m.content < 'm' %}!{% endif %}",
        "{% if m.content in 'yes or no' %}!{% endif %}",
        "{% if m.content is filter %}!{% endif %}",
        "{% for c in m.content %}!{% endfor %}",
        "{% if m.content is string %}{% for c in m.content %}!{% endfor %}{% endif %}",
        "{% if m.content is iterable %}{% for c in m.content %}!{% endfor %}{% endif %}",
        "{{ m.content|upper }}",
        "{{ m.content|int }}",
        "{{ m.content|join('-') }}",
        "{{ m.content|list }}",
        "{{ m.content.find('x') }}",
        "{{ m.content.count('x') }}",
        "{{ m.content.split() }}",
        "{{ m.content.strip('abc') }}",
        "{{ '%s' % m.content }}",
        "{{ m.content * 2 }}",
        "{{ m.content|replace(m.role, 'x') }}",
        "{{ range(m.content) }}",
        "{{ joiner(m.content) }}",
        "{{ loop.changed(m.content) }}",
        "{{ loop.previtem.content|length }}",
        "{% filter upper %}{{ m.content }}{% endfilter %}",
        "{% set x %}{{ m.content }}{% endset %}{{ x|length }}",
        "{% with x = m.content %}{{ x|length }}{% endwith %}",
        "{% set a = namespace(b=m.content) %}{{ a.b|upper }}",
        "{% set a = ns %}{{ a.n }}",
        "{% set ns = m %}{{ ns.content }}",
        "{% for ns in messages %}{{ ns.content|upper }}{% endfor %}",
        "{{ again(m.content) }}",
        "{{ again(x=m.content) }}",
        "{{ again('', m.content) }}",
        "{{ again(*[m.content]) }}",
        "{% include m.content %}",
    ],
)
def test_a_template_that_may_see_more_is_not_proven(body: str) -> None:
    macro = "{% macro again(c) %}{{ c|upper }}{{ kwargs }}{{ varargs }}{% endmacro %}"
    assert sight_of(each("{{ m.content }}", macro)) is not None
    assert sight_of(each(body, macro)) is None


@pytest.mark.parametrize("source", ["tool_use", "{{ 1 }}", "", "{% for m in messages %}", "{{ " + "(" * 5000])
def test_what_is_no_template_is_not_proven(source: str) -> None:
    assert sight_of(source) is None


_UNPROVEN = ("cohere2", "idefics3", "lfm2_2_5", "llava_next", "muse_glimmer", "smolvlm")


def test_most_templates_are_proven() -> None:
    unproven = {path.stem for path in template_paths() if sight_of(path.read_text(encoding="utf-8")) is None}
    assert {name for name in unproven if not name.startswith(_UNPROVEN)} == set()
    assert len(unproven) <= 13
