"""Which model calls of a rollout count: agents that retry, fork, compact and edit, on the real middleware."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from tests.rollouts.call_trees import Agent, Conversation, Json, Reference, Reply, Sampled, items_of, result
from tests.rollouts.sampled import record
from trl_gym.responses import said_in_message
from trl_gym.rollouts.counted_calls import DishonestAnswerError, counted_calls
from trl_gym.rollouts.trajectory import DriftError, ModelCall, Trajectory, from_calls, model_calls

REPLIES = st.builds(
    Reply,
    text=st.sampled_from(["", "ok", "no", "ok ", "Ok"]),
    tools=st.sampled_from(["", "", "", "f", "g", "fg", "ff"]),
    is_cut=st.sampled_from([False, False, False, True]),
)
MODES = st.sampled_from(["handles", "texts", "mixed"])
PLACEHOLDER: Json = {"prompt_token_ids": [0], "generation_token_ids": [0], "generation_log_probs": [0.0]}


@dataclass(frozen=True)
class Tree:
    """A rollout: its calls as the policy server has them and as the engine saw them."""

    agent: Agent
    calls: list[ModelCall]
    reference: Reference


async def grow(draw: Any) -> Tree:
    """Let an agent do up to ten things."""
    agent = Agent()
    sends = draw(MODES)
    for _ in range(draw(st.integers(1, 10))):
        conversations = agent.conversations
        own = conversations[draw(st.integers(0, len(conversations) - 1))]
        match draw(st.sampled_from(["ask", "ask", "ask", "retry", "parallel", "begin", "compact", "fork", "edit"])):
            case "ask":
                (name,) = await agent.ask(own, [draw(REPLIES)], is_new=draw(st.booleans()))
                _keep(agent, draw, own, name, sends)
            case "retry":
                first = await agent.ask(own, [draw(REPLIES)])
                _keep(agent, draw, own, draw(st.sampled_from(first + await agent.ask(own, [draw(REPLIES)]))), sends)
            case "parallel":
                replies = draw(st.lists(REPLIES, min_size=2, max_size=3))
                order = draw(st.permutations(range(len(replies))))
                others = [Conversation(list(own.messages), list(own.names)) for _ in replies[1:]]
                names = await agent.ask(own, replies, order=order)
                for one, name in zip([own, *others], names, strict=True):
                    _keep(agent, draw, one, name, sends)
                conversations += others
            case "begin":
                conversations.append(Conversation([{"role": "user", "content": draw(st.sampled_from(["go", "sub"]))}]))
            case "compact":
                kept = draw(st.integers(0, 2))
                summary = {"role": "user", "content": "so far"}
                conversations.append(Conversation([summary, *own.messages[len(own.messages) - kept :]], own.names))
            case "fork":
                conversations.append(Conversation(list(own.messages), list(own.names)))
            case "edit":
                place = draw(st.integers(0, len(own.messages) - 1))
                own.messages[place] = {**own.messages[place], "content": draw(st.sampled_from(["go", "ok", "new"]))}
    return Tree(agent, model_calls(await agent.take()), Reference(agent.engine.log))


def _keep(agent: Agent, draw: Any, conversation: Conversation, name: str, sends: str) -> None:
    with_handle = sends == "handles" or (sends == "mixed" and draw(st.booleans()))
    agent.keep(conversation, name, with_handle=with_handle, empty=draw(st.booleans()))


def answer_of(draw: Any, tree: Tree, names: Sequence[str], with_handles: Sequence[bool]) -> Json:
    """Gym's answer with these calls, as one of its agents may write it."""
    shape = {"in_front": draw(st.booleans()), "with_results": draw(st.booleans())}
    output: list[Json] = []
    for name, with_handle in zip(names, with_handles, strict=True):
        output += items_of(tree.agent.messages[name], with_handle=with_handle, **shape)
        output.append({"type": "message", "role": "user", "content": "and"})
    output += [item("", **PLACEHOLDER)] * draw(st.integers(0, 1))
    return {"reward": 1.0, "response": {"output": output}}


def trained(rows: Sequence[Trajectory], reference: Reference) -> list[str]:
    """The calls that rows train, in their order. Checks that rows are exactly what the engine saw, with masks."""
    names: list[str] = []
    for row in rows:
        start = 0
        ids = row.prompt_ids + row.completion_ids
        assert len(row.turn_ends) == row.num_turns and row.turn_ends[-1] == len(row.completion_ids)
        for end in row.turn_ends:
            mask = row.env_mask[start:end]
            num = sum(mask)
            call = _by_logprob(reference, row.logprobs[end - 1])
            assert mask == [0] * (len(mask) - num) + [1] * num
            assert row.logprobs[start:end] == [0.0] * (len(mask) - num) + [call.logprob] * num
            assert call.ids == row.completion_ids[end - num : end]
            assert call.whole == ids[: len(row.prompt_ids) + end]
            names.append(call.name)
            start = end
    assert len(set(names)) == len(names), "a token is trained twice"
    return names


def _said(names: Sequence[str], reference: Reference) -> Counter[str]:
    return Counter(words for name in names for words in reference.calls[name].reply.said)


def _by_logprob(reference: Reference, logprob: float) -> Sampled:
    (call,) = [one for one in reference.calls.values() if one.logprob == logprob]
    return call


@settings(max_examples=150, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_a_tree_of_calls_trains_exactly_what_its_answer_contains(data: Any) -> None:
    tree = asyncio.run(grow(data.draw))
    reference, calls = tree.reference, tree.calls
    assume(not reference.is_ambiguous)  # the ledger knows by its handle which of the two a prompt continues
    assert trained(from_calls(calls, "split"), reference) if calls else not reference.calls  # `gym_train_calls: all`
    assert sorted(trained(from_calls(calls, "split"), reference) if calls else []) == sorted(reference.calls)
    # The answer has the turns of some of the histories, one history after another.
    chosen = data.draw(st.lists(st.sampled_from(tree.agent.conversations), max_size=3))
    names = list(dict.fromkeys(name for one in chosen for name in one.names if name in reference.calls))
    mode = data.draw(MODES)
    with_handles = [mode == "handles" or (mode == "mixed" and data.draw(st.booleans())) for _ in names]
    answer = answer_of(data.draw, tree, names, with_handles)
    spoken = [
        name for name, has in zip(names, with_handles, strict=True) if has or reference.calls[name].reply.said
    ]  # the others left no trace in the answer
    expected = reference.counted(spoken)
    if expected is None:
        if all(with_handles):
            check_all(answer, tree, spoken)
            with pytest.raises(DishonestAnswerError, match=r"leaves out|comes behind"):
                counted_calls(answer, calls)
            return
        try:
            counted = counted_calls(answer, calls)
        except DishonestAnswerError:
            return
    else:
        counted = counted_calls(answer, calls)
    if not counted:
        return
    check_rows(counted, reference, expected if names and all(with_handles) else None)
    found = trained(from_calls(counted, "split"), reference)
    assert _said(spoken, reference) == _said(found, reference)
    named = {name for name, has in zip(names, with_handles, strict=True) if has}
    assert named <= set(found)


def check_all(answer: Json, tree: Tree, names: Sequence[str]) -> None:
    """With `gym_train_calls: all` turns may be missing, and not be in another order."""
    if tree.reference.counted(names, may_leave_out=True) is not None:
        assert counted_calls(answer, tree.calls, may_leave_out=True)
    else:
        with pytest.raises(DishonestAnswerError, match="comes behind"):
            counted_calls(answer, tree.calls, may_leave_out=True)


def check_rows(counted: Sequence[ModelCall], reference: Reference, expected: list[str] | None) -> None:
    """Every drift policy trains what the reference says."""
    rows = from_calls(counted, "split")
    order = [_by_logprob(reference, call.logprobs[0]).name for call in counted]
    assert sorted(trained(rows, reference)) == sorted(order)
    if expected is not None:  # of calls with the same tokens any
        wholes = [Counter(tuple(reference.calls[name].whole) for name in names) for names in (order, expected)]
        assert wholes[0] == wholes[1]
    assert reference.counted(order) == order
    head = reference.head(order)
    assert trained(from_calls(counted, "truncate"), reference) == head
    if head == order:
        assert trained(from_calls(counted, "exclude"), reference) == head
    else:
        with pytest.raises(DriftError):
            from_calls(counted, "exclude")


# -- single answers ---------------------------------------------------------------------------------------------------


def call(
    index: int, text: str, parent: int | None = None, prompt: Sequence[int] = (), tools: Sequence[str] = ()
) -> ModelCall:
    said = said_in_message({"content": text, "tool_calls": [{"function": {"name": name}} for name in tools]})
    ids = [100 + index]
    return ModelCall(
        prompt_ids=list(prompt) or [index],
        generation_ids=ids,
        logprobs=[-0.5],
        index=index,
        parent=parent,
        handle=-1 - index,
        said=said,
    )


def item(text: str, handle: int | None = None, **changes: Any) -> Json:
    said: Json = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
    return said | _ids(handle) | changes


def tool(name: str, handle: int | None = None) -> Json:
    return {"type": "function_call", "call_id": f"of {name}", "name": name, **_ids(handle)}


def _ids(handle: int | None) -> Json:
    if handle is None:
        return {}
    return {"prompt_token_ids": [handle], "generation_token_ids": [handle], "generation_log_probs": [0.0]}


def counted(items: Sequence[Json], calls: Sequence[ModelCall], **options: Any) -> list[int]:
    return [one.index for one in counted_calls({"response": {"output": list(items)}}, calls, **options)]


def test_equal_texts_are_told_apart_by_what_follows() -> None:
    """A sub-agent that began later said the same first; only one of the two went on with "y"."""
    calls = [call(0, "x"), call(1, "y", 0), call(2, "x", 1), call(3, "x"), call(4, "x", 3)]
    assert counted(map(item, "xyx"), calls) == [0, 1, 2]


def test_of_tries_with_the_same_prompt_the_newest_counts() -> None:
    assert counted([item("x")], [call(0, "x", prompt=[7]), call(1, "x", prompt=[7]), call(2, "x")]) == [1]


def test_a_turn_that_is_left_out_is_missed_unless_all_calls_are_trained() -> None:
    calls = [call(0, "x"), call(1, "y", 0)]
    with pytest.raises(DishonestAnswerError, match="leaves out model call 0, which model call 1 continues"):
        counted([item("y")], calls)
    assert counted([item("y")], calls, may_leave_out=True) == [1]
    with pytest.raises(DishonestAnswerError, match="model call 0 comes behind model call 1, which continues it"):
        counted([item("y", -2), item("x", -1)], calls)


def test_an_edited_handle_is_seen() -> None:
    calls = [call(0, "x")]
    assert counted([item("x", -1)], calls) == counted([item("x", -1, generation_log_probs=None)], calls) == [0]
    for name, value in (("generation_log_probs", [-3.0]), ("prompt_token_ids", [5])):
        with pytest.raises(
            DishonestAnswerError, match="model call 0, and its prompt or log-probabilities were edited"
        ):
            counted([item("x", -1, **{name: value})], calls)


def test_an_item_of_the_environment_ends_a_call() -> None:
    said = (*said_in_message({"content": "x"}), *said_in_message({"content": "y"}))
    both = replace(call(0, "x"), said=said)
    assert counted([item("x"), item("y")], [both]) == [0]
    with pytest.raises(DishonestAnswerError, match="nobody sampled"):
        counted([item("x"), {"type": "function_call_output", "output": "3"}, item("y")], [both])


@pytest.mark.parametrize("handle", [None, -1])
def test_results_between_the_tool_calls_of_one_model_call_do_not_end_it(handle: int | None) -> None:
    """Gym's `opencode_agent` and `claude_code_agent` write the result of each tool call behind it."""
    calls = [call(0, "x", tools=["a", "b", "c"]), call(1, "y", 0)]
    answer = [item("x"), tool("a"), result("of a"), tool("b"), tool("c", handle), result("of c"), result("of b")]
    assert counted([*answer, item("y")], calls) == [0, 1]
    between: list[list[Json]] = [
        [result("of another")],
        [result("")],
        [result("of b")],
        [result("of a"), {"type": "message", "role": "user", "content": "and"}],
    ]
    for items in between:
        with pytest.raises(DishonestAnswerError, match=r"says something else|nobody sampled"):
            counted([item("x"), tool("a"), *items, tool("b"), tool("c", handle), item("y")], calls)


def test_a_text_behind_a_result_is_a_call_of_its_own() -> None:
    said = (*said_in_message({"tool_calls": [{"function": {"name": "a"}}]}), *said_in_message({"content": "x"}))
    both = replace(call(0, ""), said=said)
    assert counted([tool("a"), item("x", -1)], [both]) == [0]
    for handle in (None, -1):
        with pytest.raises(DishonestAnswerError, match=r"says something else|nobody sampled"):
            counted([tool("a"), result("of a"), item("x", handle)], [both])


def test_tool_calls_with_results_between_them_are_rather_one_call_each() -> None:
    calls = [call(0, "", prompt=[7], tools="ab"), call(1, "", prompt=[7], tools="a"), call(2, "", 1, tools="b")]
    answer = [tool("a"), result("of a"), tool("b"), result("of b")]
    assert counted(answer, calls) == [1, 2] and counted(answer, calls[:2]) == [0]
    assert counted([tool("a"), tool("b")], calls) == [0]


def test_a_handle_may_be_on_the_message_in_front_of_the_tool_calls() -> None:
    """Gym's `hermes_agent` writes the ids there; the message may be empty."""
    calls = [call(0, "", tools="ab"), call(1, "x", 0, tools="ab"), call(2, "y", 1)]
    results = [result("of a"), result("of b")]
    turns = [item("", -1), tool("a"), tool("b"), *results, item("x", -2), tool("a"), tool("b"), *results]
    assert counted([*turns, item("y", -3)], calls) == [0, 1, 2]
    assert counted([tool("a"), tool("b"), *results, *turns[5:], item("y")], calls) == [0, 1, 2]
    for left in ([item("x", -2), tool("a")], [item("x", -2), tool("a"), item("y"), tool("b")], [item("x", -2)]):
        with pytest.raises(DishonestAnswerError, match="says something else than model call 1"):
            counted([*turns[:5], *left], calls)
    with pytest.raises(DishonestAnswerError, match=r"'c\(\)'.* nobody sampled"):
        counted([*turns[:8], tool("c"), *results], calls)
    with pytest.raises(DishonestAnswerError, match="says something else than model call 1"):
        counted([*turns[:5], item("x", -2), tool("a", -3), tool("b")], calls)


def test_a_silent_handle_is_not_of_the_same_tool_calls_before_their_results() -> None:
    calls = [call(0, "", tools="a"), call(1, "", 0, tools="a")]
    answer = [tool("a"), result("of a"), item("", -2), tool("a"), result("of a")]
    assert counted(answer, calls) == [0, 1]


def test_a_placeholder_is_no_turn() -> None:
    """Gym's `verifiers_agent` and `hermes_agent` add one where the agent got no token ids."""
    calls = [call(0, "x"), call(1, "y", 0)]
    nothing = item("", **PLACEHOLDER)
    assert counted([item("x"), nothing, item("y", -2), nothing], calls) == [0, 1]
    assert counted([nothing], calls) == []
    with pytest.raises(DishonestAnswerError, match=r"output item 2 \('timeout'\) is a turn that nobody sampled"):
        counted([item("x"), item("y"), item("timeout", **PLACEHOLDER)], calls)
    for name, value in (("generation_token_ids", [0, 0]), ("generation_log_probs", [-0.5]), ("prompt_token_ids", [1])):
        with pytest.raises(DishonestAnswerError, match="token ids that no model call of the rollout sampled"):
            counted([item("x"), item("", **PLACEHOLDER | {name: value})], calls)


@pytest.mark.parametrize("text", ["", "connection lost"])
def test_a_failure_says_that_an_answer_may_be_padded_with_an_error(text: str) -> None:
    """Gym's `hermes_agent` does so with the ids of the last turn that it has."""
    words = f"{text!r}.* something else than model call 0 sampled.*an agent that broke off may have put an error there"
    for turns in ([], [item("x", -1)]):
        with pytest.raises(DishonestAnswerError, match=words):
            counted([*turns, item(text, -1)], [call(0, "x")])


def test_many_equal_texts_do_not_make_the_search_endless() -> None:
    same = [call(index, "x") for index in range(60)]
    calls = [*same, call(60, "w"), call(61, "y", 60)]
    assert len(counted([*map(item, "x" * 30), item("w"), item("y")], calls)) == 32
    with pytest.raises(DishonestAnswerError, match="model call 60 comes behind model call 61"):
        counted([*map(item, "x" * 30), item("y"), item("w")], calls)  # 60 over 30 ways lead to "y"


def test_calls_that_sampled_nothing_are_no_calls_and_no_parents() -> None:
    records = [record([], [1], [2])]
    records.append(record(records, [1, 2, 3], []))
    records.append(record(records, [1, 2, 3, 4], [5]))
    assert [(one.index, one.parent) for one in model_calls(records)] == [(0, None), (2, 0)]
