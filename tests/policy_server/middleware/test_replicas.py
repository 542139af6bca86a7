"""Rollouts on a data-parallel engine: all turns of one on the same replica, a prompt on few, and as many on each."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.policy_server.fake_vllm import FakeVllm
from tests.policy_server.middleware.test_app import USER, Http
from trl_gym.policy_server.command import ENV_REPLICAS
from trl_gym.policy_server.middleware.replicas import RANK_HEADER, TOGETHER, Replicas, choose

# Rollouts that begin and end, in any order; those with the same start are members of a group.
events = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5), st.booleans()), max_size=200)


def rank(replicas: Replicas, rollout: object, start: object = "", headers: Any = ()) -> str | None:
    scope = {"headers": list(headers)}
    placed = replicas.placed(scope, str(rollout), lambda: str(start).encode())
    assert scope == {"headers": list(headers)}
    found = [value.decode() for key, value in placed["headers"] if key == RANK_HEADER]
    assert len(found) <= 1
    return found[0] if found else None


@given(loads=st.lists(st.integers(0, 50), min_size=1, max_size=8), data=st.data())
def test_a_rollout_goes_to_the_emptiest_replica_or_follows_one_that_is_not_much_fuller(
    loads: list[int], data: st.DataObject
) -> None:
    followed = data.draw(st.none() | st.integers(0, len(loads) - 1))
    chosen = choose(loads, followed)
    assert loads[chosen] == min(loads) or (chosen == followed and loads[chosen] < min(loads) + TOGETHER)


@given(count=st.integers(2, 8), events=events)
def test_turns_stay_and_what_has_ended_counts_no_more(count: int, events: list[tuple[int, int, bool]]) -> None:
    replicas, places = Replicas(count), {}
    for rollout, start, ends in events:
        if ends:
            replicas.release([str(rollout)])
            places.pop(rollout, None)
            continue
        place = rank(replicas, rollout, start)
        assert places.setdefault(rollout, place) == place
    assert replicas.loads == [sum(place == str(index) for place in places.values()) for index in range(count)]


@given(count=st.integers(2, 8), groups=st.integers(1, 20), members=st.integers(1, 16))
def test_a_batch_is_spread_evenly_and_a_prompt_over_few(count: int, groups: int, members: int) -> None:
    replicas = Replicas(count)
    for group in range(groups):
        places = {rank(replicas, (group, member), group) for member in range(members)}
        assert len(places) <= -(-members // TOGETHER) + 1  # the first may be nearly full
    assert max(replicas.loads) - min(replicas.loads) <= TOGETHER


def test_a_client_that_names_a_replica_gets_it_and_one_replica_needs_no_name() -> None:
    assert rank(Replicas(2), "r0", headers=[(RANK_HEADER, b"1")]) == "1"
    assert rank(Replicas(1), "r0") is None


class Listening(FakeVllm):
    """Notes the replica that each chat names."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/chat/completions":
            self.ranks.append(dict(scope["headers"]).get(RANK_HEADER))
        await super().__call__(scope, receive, send)


async def test_the_turns_of_a_rollout_name_its_replica_and_other_calls_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_REPLICAS, "2")
    server = Listening()
    server.ranks = []
    http = Http(server)
    for rollout in ("a", "b", "c", "d", "e"):
        messages = [USER]
        for _ in range(2):
            answer = await http.chat(messages, trl_gym={"rollout": rollout})
            messages = [*messages, answer["choices"][0]["message"], USER]
    await http.chat([USER])
    assert server.ranks == [*[b"0"] * 8, *[b"1"] * 2, None]  # four begin together, the fifth would be one too many
    await http("POST", "/trl_gym/rollouts/take", {"rollouts": ["a", "b", "c"]})
    await http("POST", "/trl_gym/rollouts/cancel", {"rollouts": ["d"]})
    await http.chat([{"role": "user", "content": "another"}], trl_gym={"rollout": "f"})
    assert server.ranks[-1] == b"0"  # where all have ended
