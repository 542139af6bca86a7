"""Who holds which adapter: any order of loads, calls and ends."""

from __future__ import annotations

from contextlib import ExitStack

from hypothesis import given
from hypothesis import strategies as st

from trl_gym.policy_server.middleware.adapters import Adapter, AdapterBook

HOUR = 3600.0
NAMES = st.sampled_from(["a", "b", "c"])
STEPS = st.one_of(
    st.just(("load",)),
    st.tuples(st.just("call"), st.one_of(st.none(), NAMES)),
    st.tuples(st.just("answer"), st.integers(0, 5)),
    st.tuples(st.just("release"), NAMES),
    st.just(("unload",)),
)


def adapter(version: int) -> Adapter:
    return Adapter(f"policy@{version}", f"policy@{version}#x", str(version), f"/adapters/{version}")


@given(st.lists(STEPS, max_size=40))
def test_what_is_used_is_never_idle_and_a_rollout_keeps_its_version(steps: list[tuple]) -> None:
    book, num_loaded = AdapterBook(), 0
    began_with: dict[str, Adapter | None] = {}
    running: list[tuple[ExitStack, Adapter | None]] = []
    for now, (step, *arguments) in enumerate(steps):
        if step == "load":
            book.add(adapter(num_loaded))
            num_loaded += 1
        elif step == "call":
            stack = ExitStack()
            given_adapter = stack.enter_context(book.serving(arguments[0], float(now)))
            expected = book.current if arguments[0] is None else began_with.setdefault(arguments[0], book.current)
            assert given_adapter is expected
            running.append((stack, given_adapter))
        elif step == "answer" and running:
            running.pop(arguments[0] % len(running))[0].close()
        elif step == "release":
            book.release([arguments[0]])
            began_with.pop(arguments[0], None)
        elif step == "unload":
            for one in book.idle():
                book.remove(one)
        used = [one for _, one in running] + list(began_with.values()) + [book.current]
        idle = [one.name for one in book.idle()]
        assert sorted(idle) == sorted(one.name for one in book.held if not any(one is other for other in used))
    for stack, _ in running:
        stack.close()
    book.release(list(began_with))
    assert [one.num_running or one.num_rollouts for one in book.held] == [0] * len(book.held)


def test_a_rollout_that_is_quiet_for_an_hour_lets_go() -> None:
    book = AdapterBook()
    book.add(adapter(0))
    with book.serving("quiet", 0.0):
        pass
    with book.serving("busy", HOUR):
        pass
    with book.serving("long", 0.0):
        book.add(adapter(1))
        book.expire(HOUR + 1)
        assert book.holders(5) == {"policy@0": ["busy", "long"]}
    book.expire(HOUR + 2)
    assert book.holders(5) == {"policy@0": ["busy"]}
    assert book.idle() == []


def test_retiring_forgets_every_holder() -> None:
    book = AdapterBook()
    book.add(adapter(0))
    with book.serving("a", 0.0) as running:
        book.retire()
        assert book.idle() == []  # its call is being answered
        with book.serving("a", 0.0) as again:
            assert again is None
    assert book.idle() == [running]


def test_names_are_those_of_the_newest() -> None:
    book = AdapterBook()
    first, again = adapter(0), adapter(0)
    book.add(first)
    book.add(again)
    assert book.named("policy@0") is again
    assert book.named("policy") is None
    assert book.holders(1) == {"policy@0": []}
