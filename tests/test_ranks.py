"""What fails on one rank is raised on all of them, as the same kind of error."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from trl_gym.errors import PolicyServerError, ServerError, TrlGymError, WeightMismatchError, WeightSyncError
from trl_gym.ranks import agree


class Ranks:
    """A `gather_object` for threads that play ranks."""

    def __init__(self, number: int) -> None:
        self._barrier = threading.Barrier(number)
        self._given: dict[int, list[Any]] = {}
        self.number = number

    def gather(self, rank: int) -> Any:
        def gather(values: list[Any]) -> list[Any]:
            self._given[rank] = values
            self._barrier.wait(10)
            return [value for place in range(self.number) for value in self._given[place]]

        return gather


def outcomes(errors: list[Exception | None]) -> list[Exception | None]:
    """What every rank ends with when they agree on these."""
    ranks = Ranks(len(errors))

    def play(rank: int) -> Exception | None:
        try:
            agree(errors[rank], rank, ranks.gather(rank))
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(len(errors)) as pool:
        return list(pool.map(play, range(len(errors))))


def test_nothing_happens_when_nothing_went_wrong() -> None:
    assert outcomes([None, None, None]) == [None, None, None]


@pytest.mark.parametrize("kind", [PolicyServerError, WeightSyncError, WeightMismatchError, ServerError])
def test_every_rank_raises_the_same_kind(kind: type[TrlGymError]) -> None:
    own = kind("it is gone")
    first, second, third = outcomes([None, own, None])
    assert second is own
    assert type(first) is type(third) is kind
    assert str(first) == "rank 1: it is gone"


def test_a_subclass_that_cannot_be_sent_is_raised_as_what_it_is_kind_of() -> None:
    class Refused(PolicyServerError):
        def __init__(self, status: int, detail: str) -> None:
            super().__init__(f"{status}: {detail}")

    first, second = outcomes([Refused(500, "no"), None])
    assert isinstance(first, Refused)
    assert type(second) is PolicyServerError and str(second) == "rank 0: 500: no"


def test_an_error_of_another_kind_reaches_the_others_too() -> None:
    first, second = outcomes([ZeroDivisionError(), None])
    assert isinstance(first, ZeroDivisionError)
    assert type(second) is TrlGymError and "ZeroDivisionError" in str(second)


def test_of_several_failures_each_rank_raises_its_own_and_others_the_first() -> None:
    own = [PolicyServerError("a"), None, WeightSyncError("b")]
    ended = outcomes(own)
    assert ended[0] is own[0] and ended[2] is own[2]
    assert str(ended[1]) == "rank 0: a"
