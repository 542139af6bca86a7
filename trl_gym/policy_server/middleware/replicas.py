"""Choose the replica of a data-parallel engine for a rollout, and keep all its turns there.

vLLM sends each request to the replica with the fewest running ones. A rollout's next turn then often finds its prefix
in the cache of another replica, and the whole context is computed again. The header `X-data-parallel-rank`, which vLLM
takes from routers in front of it, names the replica: it is set on the inner request of a rollout's turn.

Two things are wanted of the choice, which a rollout makes with its first call: as many rollouts on one replica as on
another, and rollouts of one task together, for their prompts are the same. So a rollout follows the newest one that
began with the same messages, as long as its replica has fewer than four rollouts more than the emptiest one; otherwise
it goes there. Of eight members of a group four come together, which computes a long prompt twice instead of up to
eight times, and no replica has more than four rollouts more than another until rollouts end. (A hash of the task would
leave the busiest of 8 replicas with about twice the mean of 16 groups; a hash of the rollout shares no prompt.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from trl_gym.policy_server.middleware.http import Scope, header

RANK_HEADER = b"x-data-parallel-rank"
TOGETHER = 4  # how many rollouts a replica may have more than the emptiest one for the sake of a common prompt
_MAX_ROLLOUTS = 16_384  # that have not ended; as in the ledger
_MAX_STARTS = 4096  # first messages


def choose(loads: Sequence[int], followed: int | None) -> int:
    """Return the index of a replica. Pure.

    Args:
        loads: Rollouts on each, `[N]`.
        followed: The replica of the newest rollout that began alike; None if there is none.
    """
    least = min(loads)
    if followed is not None and loads[followed] - least < TOGETHER:
        return followed
    return loads.index(least)


class Replicas:
    """The replicas behind one server, and the rollouts on each.

    Args:
        count: Number of replicas; with one there is nothing to choose.
    """

    def __init__(self, count: int) -> None:
        self.loads = [0] * count
        self._places: OrderedDict[str, int] = OrderedDict()
        self._starts: OrderedDict[bytes, int] = OrderedDict()

    def placed(self, scope: Scope, rollout: str, begins_with: Callable[[], bytes]) -> Scope:
        """Return the scope of a turn with the header that names its replica, unless its client has named one.

        Args:
            scope: Of the client's request; not changed.
            begins_with: Makes a digest of its messages; called for the first turn of a rollout only.
        """
        if len(self.loads) < 2 or header(scope, RANK_HEADER) is not None:
            return scope
        place = self._places.get(rollout)
        if place is None:
            place = self._place(rollout, begins_with())
        return {**scope, "headers": [*scope["headers"], (RANK_HEADER, str(place).encode())]}

    def release(self, rollouts: Iterable[str]) -> None:
        """Forget rollouts that have ended."""
        for rollout in rollouts:
            place = self._places.pop(rollout, None)
            if place is not None:
                self.loads[place] -= 1

    def _place(self, rollout: str, start: bytes) -> int:
        place = choose(self.loads, self._starts.get(start))
        self._places[rollout] = self._starts[start] = place
        self._starts.move_to_end(start)
        self.loads[place] += 1
        if len(self._starts) > _MAX_STARTS:
            self._starts.popitem(last=False)
        if len(self._places) > _MAX_ROLLOUTS:
            self.release([next(iter(self._places))])
        return place
