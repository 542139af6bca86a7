"""When a policy server is restarted, waited for, or given up, and what is said then."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from trl_gym.errors import (
    ConfigError,
    PolicyServerError,
    PolicyServerLostError,
    WeightSyncError,
)
from trl_gym.policy_server.client import PolicyResponseError
from trl_gym.run.recovery import PolicyRecovery, end_interrupted_update


def silence(what: str, silent_s: float = 0.0) -> PolicyServerLostError:
    """As a client reports it."""
    error = PolicyServerLostError(f"The policy server hangs: {what}.")
    error.__cause__, error.silent_s = requests.ReadTimeout(), silent_s
    return error


LOSS = PolicyServerLostError("POST /trl_gym/rollouts/records: connection refused")
DEATH = PolicyServerLostError("policy server ended (was ended by signal SIGKILL). Last lines of its log: …")


class Client:
    """Of a server whose trainer may have left it paused."""

    server: Server

    def __init__(self, *, paused: bool = False, has_pause: bool = True, healthy: bool = True) -> None:
        self.paused, self.has_pause, self.healthy = paused, has_pause, healthy
        self.num_abandoned = 0
        self.timeout_s = 60.0

    def patient(self, timeout_s: float) -> Client:
        self.timeout_s = timeout_s
        return self

    def health(self) -> bool:
        return self.healthy

    def ask_engines(self) -> None:
        if self.server.num_silent:
            self.server.num_silent -= 1
            raise silence("its engine does not")

    def infos(self) -> list[dict[str, Any]]:
        return [{"instance": self.server.look()}]

    def is_paused(self) -> bool:
        if not self.has_pause:
            raise PolicyResponseError("GET /is_paused: HTTP 404", 404)
        return self.paused

    def abandon_weight_update(self) -> bool:
        self.num_abandoned += 1
        return True


class Server:
    """Dies when told to. Restarts end as `restarts` says (None: well), looks as `looks` says, then well.

    Time passes in `sleep` only.
    """

    base_urls = ("http://node7:8000/v1",)
    model_name = "policy"

    def __init__(
        self,
        *,
        is_ours: bool,
        death: PolicyServerLostError | None = None,
        restarts: Iterable[PolicyServerError | ConfigError | None] = (),
        looks: Iterable[PolicyServerError | str] = (),
    ) -> None:
        self.is_ours, self.death = is_ours, death
        self.instance = "first"
        self.client: Any = Client()
        self.num_restarts = self.num_silent = 0  # so often its engine does not answer
        self.pauses: list[float] = []
        self._restarts, self._looks = iter(restarts), iter(["first", *looks])

    def check(self) -> None:
        if self.death is not None:
            raise self.death

    def restart(self) -> None:
        self.num_restarts += 1
        failure = next(self._restarts, None)
        if failure is not None:
            raise failure
        self.death, self.num_silent = None, 0
        self.instance = f"restarted {self.num_restarts} times"
        self._looks = iter(())

    def stopped(self) -> list[str]:
        return ["VLLM::EngineCor (pid 7)"] if self.num_silent else []

    def look(self) -> str:
        seen = next(self._looks, self.instance)
        if isinstance(seen, PolicyServerError):
            raise seen
        self.instance = seen
        return seen

    def recovery(self, **options: Any) -> PolicyRecovery:
        limits: dict[str, Any] = {
            "max_restarts": 3,
            "may_restart": True,
            "reconnect_timeout_s": 600.0,
            "hang_timeout_s": 300.0,
            "sync_timeout_s": 500.0,
        }
        self.client.server = self
        death, self.death = self.death, None
        made = PolicyRecovery(self, **limits | options, sleep=self.pauses.append)  # looks at it before it dies
        self.death = death
        return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds that pass only when someone looks: a second each time."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr("trl_gym.run.recovery.time", SimpleNamespace(monotonic=monotonic))  # other threads look, too
    yield now


# -- ours -------------------------------------------------------------------------------------------------------------


def test_a_dead_server_is_restarted_and_the_reason_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(is_ours=True, death=DEATH)
    recovery = server.recovery()
    with caplog.at_level(logging.WARNING):
        recovery.recover(LOSS)
    assert (server.num_restarts, recovery.num_restarts, server.pauses) == (1, 1, [0.0])
    assert "SIGKILL" in caplog.text and "1 of 3 restarts" in caplog.text


def test_pauses_double_and_the_budget_is_of_the_whole_run() -> None:
    server = Server(is_ours=True, death=DEATH)
    recovery = server.recovery(max_restarts=4)
    for _ in range(4):
        server.death = DEATH
        recovery.recover(LOSS)
    assert server.pauses == [0.0, 1.0, 2.0, 4.0]
    server.death = DEATH
    with pytest.raises(
        PolicyServerError, match=r"4 times, and `gym_server_restarts` allows no more(.|\n)*SIGKILL"
    ) as caught:
        recovery.recover(LOSS)
    assert caught.value.__cause__ is LOSS and server.num_restarts == 4


def test_a_restart_that_fails_counts_and_is_tried_again() -> None:
    failed = PolicyServerError("the policy server was not ready after 600 s")
    server = Server(is_ours=True, death=DEATH, restarts=[failed, None])
    recovery = server.recovery()
    recovery.recover(LOSS)
    assert recovery.num_restarts == 2
    server = Server(is_ours=True, death=DEATH, restarts=[failed] * 9)
    with pytest.raises(PolicyServerError, match=r"3 times(.|\n)*was not ready after 600 s"):
        server.recovery().recover(LOSS)


def test_what_would_happen_again_is_not_tried_again() -> None:
    server = Server(is_ours=True, death=DEATH, restarts=[ConfigError("unrecognized arguments: --x")])
    with pytest.raises(PolicyServerError, match="cannot start again: unrecognized arguments: --x"):
        server.recovery().recover(LOSS)
    assert server.num_restarts == 1


def test_a_server_that_is_well_is_not_replaced() -> None:
    server = Server(is_ours=True)
    full = WeightSyncError("No space left in /dev/shm")
    with pytest.raises(WeightSyncError) as caught:
        server.recovery().recover(full)
    assert caught.value is full and server.num_restarts == 0


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("hangs", [True, False])
def test_one_that_hangs_or_whose_engine_is_dead_is_replaced(hangs: bool) -> None:
    server = Server(is_ours=True, looks=[LOSS] * 50 if hangs else [])
    server.client.healthy = hangs
    server.recovery().recover(WeightSyncError("HTTP 500: EngineCore encountered an issue"))
    assert server.num_restarts == 1


@pytest.mark.parametrize(
    ("waited_s", "num_silent", "replaced"),
    [
        (0.0, 200, True),  # seconds, on this clock
        (0.0, 100, False),  # a long prompt, a compilation
        (300.0, 30, True),  # who noticed it has waited already
        (600.0, 0, False),
        (140.0, 5, False),
    ],
)
def test_an_engine_that_is_silent_is_replaced_when_its_time_is_over(
    waited_s: float, num_silent: int, replaced: bool, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(is_ours=True)
    recovery = server.recovery(hang_timeout_s=150.0)
    server.num_silent = num_silent
    recovery.recover(silence("its engine does not", waited_s))
    assert server.num_restarts == replaced and clock[0] < (20 if waited_s else 160)
    assert ("Someone has stopped VLLM::EngineCor (pid 7)" in caplog.text) == replaced
    assert "answers again, unchanged" in caplog.text or "its engine does not" in caplog.text


def test_a_process_that_belongs_to_somebody_else_is_not_restarted() -> None:
    server = Server(is_ours=True, death=DEATH)
    with pytest.raises(PolicyServerLostError, match="SIGKILL"):
        server.recovery(may_restart=False).recover(LOSS)
    assert server.num_restarts == 0


# -- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clock")
def test_one_elsewhere_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(is_ours=False, looks=[LOSS] * 6 + ["second"])
    recovery = server.recovery()
    with caplog.at_level(logging.WARNING):
        recovery.recover(LOSS)
        recovery.recover(LOSS)  # compared with the second now
    assert server.pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0]
    assert f"waiting for the policy server at {server.base_urls[0]}" in caplog.text and "was restarted" in caplog.text
    assert caplog.text.count("was restarted") == 1 and "answers again, unchanged" in caplog.text


def test_a_server_of_another_model_is_not_the_policy() -> None:
    server = Server(is_ours=False)
    recovery = server.recovery()
    server.client.infos = lambda: [{"instance": "first", "model_names": ["big"]}]
    with pytest.raises(PolicyServerError, match="serves big now, and not policy"):
        recovery.require_same()


@pytest.mark.usefixtures("clock")
def test_another_process_at_the_same_address_is_noticed() -> None:
    server = Server(is_ours=False, looks=["first", "second", "second", "second"])
    recovery = server.recovery()
    recovery.require_same()
    with pytest.raises(PolicyServerLostError, match="was restarted"):
        recovery.require_same()
    recovery.recover(LOSS)
    recovery.require_same()
    ours = Server(is_ours=True)
    recovery = ours.recovery()
    ours.death = DEATH
    with pytest.raises(PolicyServerLostError, match="SIGKILL"):
        recovery.require_same()
    recovery.recover(LOSS)
    recovery.require_same()


def test_not_forever(clock: list[float]) -> None:
    server = Server(is_ours=False, looks=[LOSS] * 1000)
    with pytest.raises(
        PolicyServerError, match=r"did not come back within 20 s \(`gym_server_reconnect_timeout`\)"
    ) as caught:
        server.recovery(reconnect_timeout_s=20.0).recover(LOSS)
    assert caught.value.__cause__ is LOSS and clock[0] < 60


@pytest.mark.usefixtures("clock")
def test_an_engine_elsewhere_that_hangs_is_waited_for_and_named() -> None:
    server = Server(is_ours=False)
    recovery = server.recovery(reconnect_timeout_s=20.0)
    server.num_silent = 3
    recovery.recover(LOSS)
    server.num_silent = 1000
    with pytest.raises(PolicyServerError, match=r"did not come back within 20 s(.|\n)*its engine does not"):
        recovery.recover(LOSS)


def test_a_refusal_by_the_same_process_is_not_a_loss() -> None:
    refusal = PolicyResponseError("POST /update_weights: HTTP 500: bad", 500)
    with pytest.raises(PolicyResponseError) as caught:
        Server(is_ours=False).recovery().recover(refusal)
    assert caught.value is refusal
    Server(is_ours=False, looks=["second"]).recovery().recover(refusal)  # of another one it says nothing


def test_a_network_that_drops_connections_again_and_again_ends_it() -> None:
    recovery = Server(is_ours=False).recovery()
    for _ in range(5):
        recovery.recover(LOSS)
    with pytest.raises(PolicyServerError, match="was lost 6 times within 600 s"):
        recovery.recover(LOSS)


def test_an_interrupted_update_is_ended_before_the_next_one() -> None:
    assert not end_interrupted_update(Client(), 500.0)
    assert not end_interrupted_update(Client(has_pause=False), 500.0)
    paused = Client(paused=True)
    assert end_interrupted_update(paused, 500.0) and paused.num_abandoned == 1
    assert paused.timeout_s == 500.0  # as long as any other step of a weight sync
    server = Server(is_ours=False)
    server.client = Client(paused=True)
    server.recovery().recover(LOSS)
    assert server.client.num_abandoned == 1


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_server_lost_right_after_its_return_is_recovered_again(is_ours: bool) -> None:
    class Flaky(Client):
        def is_paused(self) -> bool:
            if self.num_losses:
                self.num_losses -= 1
                server.death = DEATH if is_ours else None
                raise LOSS
            return False

    server = Server(is_ours=is_ours, death=DEATH if is_ours else None)
    server.client = Flaky()
    server.client.num_losses = 2
    server.recovery().recover(LOSS)
    assert server.num_restarts == (3 if is_ours else 0)
