"""Get a policy server back that has died or disappeared.

    ours          is restarted on the same port, after a pause that doubles, `gym_server_restarts` times in the run
    elsewhere     is waited for, `gym_server_reconnect_timeout` seconds each time
    borrowed      belongs to the caller who passed it in: neither

A server that comes back does not hold the trainer's weights until they are pushed again. A server that turns out to
be well is not replaced: what went wrong would go wrong again, and is raised. It is well when its engine has answered:
the process that answers HTTP goes on when an engine is stopped, or hangs in CUDA or NCCL. A server that is silent may
be busy, and has `gym_server_hang_timeout` seconds, less those for which it was waited for already.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import requests

from trl_gym.errors import ConfigError, PolicyServerError, PolicyServerLostError
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError
from trl_gym.policy_server.server import PolicyBackend

logger = logging.getLogger(__name__)

_MAX_PAUSE_S = 60.0  # between two restarts
_EXIT_TIMEOUT_S = 10.0  # for a process that does not answer, or answers badly, to end by itself
_LOOK_TIMEOUT_S = 5.0
_POLL_S = 0.5
_MAX_POLL_S = 10.0  # for a server elsewhere
_LOG_EVERY_S = 30.0
_MAX_RECONNECTS = 5  # times that a server may be lost and found unchanged …
_RECONNECT_WINDOW_S = 600.0  # … within this time


class PolicyRecovery:
    """Restart a run's policy server, or wait for it, as often as the configuration allows.

    Args:
        max_restarts: How often its process may be restarted, if it is ours.
        may_restart: Whether this run may restart it; a server that was passed in belongs to the caller.
        reconnect_timeout_s: How long a server elsewhere is waited for, each time.
        hang_timeout_s: How long a server may be silent before it counts as hanging.
        sync_timeout_s: Seconds that ending an interrupted weight update may take.
        sleep: For tests.

    Attributes:
        num_restarts: How often it was restarted so far.

    Raises:
        PolicyServerError: The server does not answer now.
    """

    def __init__(
        self,
        policy: PolicyBackend,
        *,
        max_restarts: int,
        may_restart: bool,
        reconnect_timeout_s: float,
        hang_timeout_s: float,
        sync_timeout_s: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._policy = policy
        self._address = ", ".join(policy.base_urls)
        self._max_restarts, self._may_restart = max_restarts, may_restart
        self._reconnect_timeout_s, self._sync_timeout_s = reconnect_timeout_s, sync_timeout_s
        self._hang_timeout_s = hang_timeout_s
        self._sleep = sleep
        self._reconnects: list[float] = []
        self._instance = answering_process(policy)
        self.num_restarts = 0

    def require_same(self) -> None:
        """Check that the process that answers is the first one, or the one that `recover` left. Raises
        `PolicyServerLostError`: another process answers, or none."""
        now = answering_process(self._policy)
        if now != self._instance and now is not None:
            raise PolicyServerLostError(
                f"The policy server at {self._address} was restarted: another process answers than before."
            )

    def recover(self, error: Exception) -> None:
        """Return when the server answers again.

        Args:
            error: What made the caller think that it is lost.

        Raises:
            Exception: `error` itself, when the server is well and its loss was not what went wrong.
            PolicyServerError: The server does not come back; caused by `error`.
        """
        if self._policy.is_ours and not self._may_restart:
            self._policy.check()
            raise error
        while True:
            if self._policy.is_ours:
                self._restart(error)
            else:
                self._wait_for_return(error)
            try:
                end_interrupted_update(self._policy.client, self._sync_timeout_s)
            except PolicyServerLostError as lost_again:
                error = lost_again
            else:
                return

    def _restart(self, error: Exception) -> None:
        death: PolicyServerError | None = self._death(error)
        if death is None:
            self._count_reconnect(error)
            return
        while True:
            if self.num_restarts >= self._max_restarts:
                raise PolicyServerError(
                    f"The policy server has died and is not restarted: it was restarted {self.num_restarts} times, "
                    f"and `gym_server_restarts` allows no more. It died of this: {death.problem}",
                    death.remedy or "Find the cause in its log before you raise `gym_server_restarts`.",
                ) from error
            self._pause_before_restart(death, error)
            started = time.monotonic()
            try:
                self._policy.restart()
                self._instance = answering_process(self._policy)
            except ConfigError as failed:
                raise PolicyServerError(
                    f"The policy server died and cannot start again: {failed.problem}", failed.remedy
                ) from error
            except PolicyServerError as failed:
                death = failed
                continue
            logger.warning("the policy server is back after %.0f s", time.monotonic() - started)
            return

    def _pause_before_restart(self, death: PolicyServerError, error: Exception) -> None:
        pause_s = min(2.0 ** (self.num_restarts - 1), _MAX_PAUSE_S) if self.num_restarts else 0.0
        self.num_restarts += 1
        logger.warning(
            "restarting the policy server in %g s (%d of %d restarts). It has died: %s\nIt was found out so: %s",
            pause_s,
            self.num_restarts,
            self._max_restarts,
            death,
            error,
        )
        self._sleep(pause_s)

    def _death(self, error: Exception) -> PolicyServerLostError | None:
        """Return how our server died; None when it is well. A server that hangs counts as dead."""
        started = time.monotonic()
        waited_s = getattr(error, "silent_s", 0.0)
        while True:
            try:
                self._policy.check()
            except PolicyServerLostError as death:
                return death
            try:
                self._look()
            except PolicyServerError as trouble:
                silent_s = getattr(trouble, "silent_s", 0.0)
                patience_s = self._hang_timeout_s - waited_s if silent_s else _EXIT_TIMEOUT_S
                passed_s = time.monotonic() - started
                if passed_s >= patience_s:
                    return self._hang(trouble, waited_s + passed_s if silent_s else 0.0)
            else:
                return None
            self._sleep(_POLL_S)

    def _look(self) -> None:
        """Return if the server is well. Raises `PolicyServerError` with what it looks like, `silent_s` set where it
        does not answer at all."""
        try:
            answering_process(self._policy)
            client = self._policy.client.patient(_LOOK_TIMEOUT_S)
            client.ask_engines()
            if not client.health():
                raise PolicyServerError("It reports that its engine is dead.")
        except PolicyServerLostError as silence:
            if isinstance(silence.__cause__, requests.Timeout):
                silence.silent_s = _LOOK_TIMEOUT_S
            raise

    def _hang(self, trouble: PolicyServerError, silent_s: float) -> PolicyServerLostError:
        """Return the death of a server whose process runs, with what is known of the culprit."""
        stopped: list[str] = getattr(self._policy, "stopped", list)()  # other backends do not tell
        culprit = f" Someone has stopped {', '.join(stopped)}." if stopped else ""
        since = f" It was silent for {silent_s:.0f} s (`gym_server_hang_timeout`)." if silent_s else ""
        return PolicyServerLostError(f"Its process runs and is of no use. {trouble.problem}{culprit}{since}")

    def _wait_for_return(self, error: Exception) -> None:
        started = time.monotonic()
        deadline = started + self._reconnect_timeout_s
        next_line, pause_s = started, _POLL_S
        while True:
            try:
                now = answering_process(self._policy)
                self._policy.client.patient(_LOOK_TIMEOUT_S).ask_engines()
                break
            except PolicyServerError as silence:
                at = time.monotonic()
                if at >= deadline:
                    raise PolicyServerError(
                        f"The policy server at {self._address} did not come back within "
                        f"{self._reconnect_timeout_s:g} s (`gym_server_reconnect_timeout`). "
                        f"The last attempt: {silence}",
                        "Start it again there, and resume this run.",
                    ) from error
                if at >= next_line:
                    next_line = at + _LOG_EVERY_S
                    logger.warning(
                        "waiting for the policy server at %s, %.0f of %g s (`gym_server_reconnect_timeout`): %s",
                        self._address,
                        at - started,
                        self._reconnect_timeout_s,
                        silence,
                    )
                self._sleep(min(pause_s, deadline - at))
                pause_s = min(2 * pause_s, _MAX_POLL_S)
        if now is None or now == self._instance:
            self._count_reconnect(error)
        else:
            self._instance = now
            logger.warning("the policy server at %s was restarted; it gets the weights again", self._address)

    def _count_reconnect(self, error: Exception) -> None:
        """Give up when a server is lost and found unchanged again and again. Raise what was not a loss at all."""
        if not isinstance(error, PolicyServerLostError):
            raise error
        now = time.monotonic()
        self._reconnects = [*(then for then in self._reconnects if now - then < _RECONNECT_WINDOW_S), now]
        if len(self._reconnects) > _MAX_RECONNECTS:
            raise PolicyServerError(
                f"The policy server at {self._address} runs and was lost {len(self._reconnects)} times within "
                f"{_RECONNECT_WINDOW_S:g} s.",
                "Find out what drops connections between it and this process (a proxy, a firewall, the network).",
            ) from error
        logger.warning("the policy server at %s answers again, unchanged: %s", self._address, error)


def answering_process(policy: PolicyBackend) -> str | None:
    """Ask over the network which process serves the policy. Returns what differs from process to process; None when a
    server does not say. Raises `PolicyServerError`: no server answers within a few seconds, or one that does not serve
    the policy; `PolicyServerLostError`: our process has died."""
    policy.check()
    instances = []
    for base_url, info in zip(policy.base_urls, policy.client.patient(_LOOK_TIMEOUT_S).infos(), strict=True):
        served = info.get("model_names", [policy.model_name])
        if policy.model_name not in served:
            raise PolicyServerError(
                f"{base_url} serves {', '.join(served)} now, and not {policy.model_name}.",
                "Start the policy there again.",
            )
        instances.append(info.get("instance"))
    known = [name for name in instances if name is not None]
    return "+".join(known) if len(known) == len(instances) else None


def end_interrupted_update(client: PolicyClient, timeout_s: float) -> bool:
    """End the weight update that a trainer left behind when it died, so that another one can begin. Returns whether
    the server is paused, as it is after such an update. Raises `PolicyServerLostError`: the server does not answer."""
    try:
        paused = client.is_paused()
    except PolicyResponseError:  # outside of vLLM's development mode there is no pause
        return False
    if paused:
        client.patient(timeout_s).abandon_weight_update()  # may repack weights, as the end of a sync does
    return paused
