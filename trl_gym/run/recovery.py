"""Getting a policy server back that died or disappeared.

    ours          restarted on the same port, after a pause that doubles, `gym_server_restarts` times in the run
    elsewhere     waited for, `gym_server_reconnect_timeout` seconds at a time
    borrowed      belongs to whoever passed it in: neither

Whichever it is, its weights are not the trainer's until they are pushed again. A server that is well after all is not
replaced: what went wrong would go wrong again, and is raised.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from trl_gym.errors import ConfigError, PolicyServerError, PolicyServerLostError
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError
from trl_gym.policy_server.server import PolicyBackend

logger = logging.getLogger(__name__)

_MAX_PAUSE_S = 60.0  # between two restarts
_DYING_S = 10.0  # for a process that answers no more, or badly, to end by itself
_LOOK_EVERY_S = 0.5
_MAX_LOOK_EVERY_S = 10.0  # for a server elsewhere
_TELL_EVERY_S = 30.0
_MAX_BLIPS = 5  # times that a server may be lost and there again, unchanged …
_BLIP_WINDOW_S = 600.0  # … within this time


class Reviver:
    """Gets one policy server back, as often as it may.

    Args:
        policy: The server.
        max_restarts: How often its process may be started again, if it is ours.
        may_restart: Whether it is ours to restart; a server that was passed in belongs to somebody else.
        reconnect_timeout_s: How long a server elsewhere is waited for, each time.
        sleep: For tests.

    Attributes:
        num_restarts: How often it was started again so far.

    Raises:
        PolicyServerError: It does not answer now.
    """

    def __init__(
        self,
        policy: PolicyBackend,
        *,
        max_restarts: int,
        may_restart: bool,
        reconnect_timeout_s: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._policy = policy
        self._max_restarts, self._may_restart = max_restarts, may_restart
        self._reconnect_timeout_s = reconnect_timeout_s
        self._sleep = sleep
        self._blips: list[float] = []
        self._instance = policy.look()
        self.num_restarts = 0

    def require_same(self) -> None:
        """Raise `PolicyServerLostError` when the server is another process than the one that was left by `revive`, or
        the first: somebody else has restarted it."""
        now = self._policy.look()
        if now != self._instance and now is not None:
            raise PolicyServerLostError(
                f"the policy server at {self._policy.base_url} was restarted: another process answers than before"
            )

    def revive(self, error: Exception) -> None:
        """Return when the server answers again.

        Args:
            error: What made the caller think that it does not.

        Raises:
            Exception: `error` itself, when the server is well and its loss was not what went wrong.
            PolicyServerError: The server does not come back; caused by `error`.
        """
        if self._policy.is_ours and self._may_restart:
            self._revive_ours(error)
        elif self._policy.is_ours:
            self._policy.check()
            raise error
        else:
            self._wait_for_return(error)
        end_interrupted_update(self._policy.client)

    def _revive_ours(self, error: Exception) -> None:
        death = self._death()
        if death is None:
            self._count_blip(error)
            return
        while True:
            if self.num_restarts >= self._max_restarts:
                raise PolicyServerError(
                    f"The policy server has died and is not started again: it has been {self.num_restarts} times, and "
                    f"`gym_server_restarts` allows no more. Look for the cause first.\n\n{death}"
                ) from error
            pause_s = min(2.0 ** (self.num_restarts - 1), _MAX_PAUSE_S) if self.num_restarts else 0.0
            self.num_restarts += 1
            logger.warning(
                "restarting the policy server in %g s (%d of %d restarts). It has died: %s",
                pause_s,
                self.num_restarts,
                self._max_restarts,
                death,
            )
            self._sleep(pause_s)
            started = time.monotonic()
            try:
                self._policy.restart()
                self._instance = self._policy.look()
            except ConfigError as failed:
                raise PolicyServerError(f"The policy server died and does not start again: {failed}") from error
            except PolicyServerError as failed:
                death = failed
                continue
            logger.warning("the policy server is back after %.0f s", time.monotonic() - started)
            return

    def _death(self) -> PolicyServerError | None:
        """How our server died; None when it is well. One that only hangs counts as dead."""
        deadline = time.monotonic() + _DYING_S
        while True:
            try:
                self._policy.check()
            except PolicyServerLostError as death:
                return death
            try:
                self._policy.look()
            except PolicyServerError as silence:
                if time.monotonic() >= deadline:
                    return PolicyServerLostError(f"its process runs and does not answer ({silence})")
                self._sleep(_LOOK_EVERY_S)
                continue
            if self._policy.client.patient(_DYING_S).health():
                return None
            if time.monotonic() >= deadline:
                return PolicyServerLostError("its process runs and says that its engine is dead")
            self._sleep(_LOOK_EVERY_S)

    def _wait_for_return(self, error: Exception) -> None:
        started = time.monotonic()
        deadline = started + self._reconnect_timeout_s
        next_line, pause_s = started, _LOOK_EVERY_S
        while True:
            try:
                now = self._policy.look()
                break
            except PolicyServerError as silence:
                at = time.monotonic()
                if at >= deadline:
                    raise PolicyServerError(
                        f"The policy server at {self._policy.base_url} did not come back within "
                        f"{self._reconnect_timeout_s:g} s (`gym_server_reconnect_timeout`). Start it again there, and "
                        f"resume this run. The last attempt: {silence}"
                    ) from error
                if at >= next_line:
                    next_line = at + _TELL_EVERY_S
                    logger.warning(
                        "waiting for the policy server at %s, %.0f of %g s (`gym_server_reconnect_timeout`): %s",
                        self._policy.base_url,
                        at - started,
                        self._reconnect_timeout_s,
                        silence,
                    )
                self._sleep(min(pause_s, deadline - at))
                pause_s = min(2 * pause_s, _MAX_LOOK_EVERY_S)
        if now is None or now == self._instance:
            self._count_blip(error)
        else:
            self._instance = now
            logger.warning("the policy server at %s was restarted; it gets the weights again", self._policy.base_url)

    def _count_blip(self, error: Exception) -> None:
        """It is there, and the same. If it could not be reached, that was the network; if that goes on, give up."""
        if not isinstance(error, PolicyServerLostError):
            raise error
        now = time.monotonic()
        self._blips = [*(then for then in self._blips if now - then < _BLIP_WINDOW_S), now]
        if len(self._blips) > _MAX_BLIPS:
            raise PolicyServerError(
                f"The policy server at {self._policy.base_url} runs and was lost {len(self._blips)} times within "
                f"{_BLIP_WINDOW_S:g} s: something between it and this process drops connections."
            ) from error
        logger.warning("the policy server at %s answers again, unchanged: %s", self._policy.base_url, error)


def end_interrupted_update(client: PolicyClient) -> bool:
    """After a trainer that died in the middle of a weight sync: let the next one begin. Returns whether the server
    is paused, as it is then.

    Raises:
        PolicyServerLostError: The server does not answer.
    """
    try:
        paused = client.is_paused()
    except PolicyResponseError:  # outside of vLLM's development mode there is no pause
        return False
    if paused:
        client.abandon_weight_update()
    return paused
