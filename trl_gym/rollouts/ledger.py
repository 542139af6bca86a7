"""Ask the policy servers about the model calls of rollouts: their tokens when a rollout has ended, their state before.

The journal's line is written when a rollout ends, so that a crash loses nothing, and needs them: no request waits for
more rollouts to end. Those that end while one runs are in the next one, together.

The process that answers these questions goes on when its engine hangs, and rollouts would wait for that until their
deadlines: `EngineWatch` asks the engines meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp
import msgspec

from trl_gym.errors import PolicyServerError, PolicyServerLostError
from trl_gym.given import usable_key
from trl_gym.policy_server.client import ENGINE_PATH, root_url, server_urls, silence
from trl_gym.policy_server.middleware.ledger import CallRecord, CallTokens
from trl_gym.untrusted import BodyTooLongError, read_beginning, read_body, redirect_problem

TAKE_PATH = "/trl_gym/rollouts/take"
RECORDS_PATH = "/trl_gym/rollouts/records"
CANCEL_PATH = "/trl_gym/rollouts/cancel"
_TIMEOUT_S = 60.0
_PEEK_TIMEOUT_S = 5.0  # for questions that only a person waits for
_MOST_ENDED = 16_384  # whose ids are known; later calls come soon or never
_ASK_EVERY_S = 10.0  # an engine that answers
_FROZEN_S = 30.0  # nobody has looked for so long, as is done each second: this process was stopped, or its machine
_PAUSES_S = (0.1, 0.3)  # after a broken connection
# Rollouts in one request. A server keeps the newest that were taken in case its answer is lost, of all ranks together.
_MOST_TAKEN = 32


@dataclass(frozen=True, slots=True)
class CallState:
    """The model calls of a rollout that has not ended."""

    num_answered: int  # calls that were answered
    num_running: int  # calls that are being answered


class Ledger:
    """The model calls of rollouts at one policy server or several, for a running event loop.

    A rollout's calls are with the server that NeMo Gym has chosen for it, which only Gym knows, so all are asked.

    Args:
        base_urls: Base URLs; see `server_urls`.
        api_key: Their bearer token, if they demand one.
        hang_timeout_s: Seconds without an answer of an engine after which it hangs.

    Attributes:
        roots: Their addresses, without `/v1`.
        busy_until: See `busy`.
        ended: Ids of the rollouts that have ended, the last ones.
    """

    def __init__(
        self, base_urls: str | Sequence[str], api_key: str | None = None, *, hang_timeout_s: float = 300.0
    ) -> None:
        self.roots = tuple(root_url(url) for url in server_urls(base_urls))
        key = usable_key("api_key", api_key)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.hang_timeout_s = hang_timeout_s
        self.busy_until = 0.0  # an engine may be silent until then, on the clock `time.monotonic`
        self._silent: list[str] = []
        self._heard: dict[str, float] = {}  # when each server was heard last
        self._waiting: dict[str, asyncio.Future[_TakenCalls]] = {}  # by rollout, for the next request
        self._asked: dict[str, asyncio.Future[_TakenCalls]] = {}  # those of the request that runs
        self._taker: asyncio.Task[None] | None = None
        self.ended: deque[str] = deque(maxlen=_MOST_ENDED)

    async def take(self, session: aiohttp.ClientSession, rollout_id: str) -> tuple[list[CallRecord] | None, str]:
        """Fetch the calls of a rollout that has ended; the servers forget it. Returns the calls, in the order of their
        answers, or None if a server had no room for their tokens; and which processes answered, see `ping`. Raises
        `PolicyServerError`: a server cannot be reached, keeps no ledger, or contradicts itself about this rollout."""
        self.ended.append(rollout_id)
        future = self._waiting[rollout_id] = asyncio.get_running_loop().create_future()
        if self._taker is None:
            self._taker = asyncio.create_task(self._take_waiting(session))
        try:
            return await future
        except asyncio.CancelledError:
            if self._taker is not None and all(one.done() for one in (*self._asked.values(), *self._waiting.values())):
                self._taker.cancel()
            raise

    async def _take_waiting(self, session: aiohttp.ClientSession) -> None:
        """Ask for all rollouts that wait, and for those that come meanwhile, as long as someone waits."""
        try:
            while self._waiting:
                self._asked = {name: self._waiting.pop(name) for name in list(self._waiting)[:_MOST_TAKEN]}
                found = await self._take_all(session, list(self._asked))
                for name, future in self._asked.items():
                    if not future.done():
                        one = found[name]
                        future.set_exception(one) if isinstance(one, Exception) else future.set_result(one)
        finally:  # someone may have come while it was cancelled
            self._taker = asyncio.create_task(self._take_waiting(session)) if self._waiting else None

    async def _take_all(
        self, session: aiohttp.ClientSession, names: Sequence[str]
    ) -> Mapping[str, _TakenCalls | Exception]:
        """Ask for some rollouts in one request; return the calls or the error of each.

        Servers keep those that were taken last: halves of an answer that was too long can be asked for again.
        """
        try:
            bodies = await self._post_all(session, TAKE_PATH, {"rollouts": names}, _TIMEOUT_S)
            answers = [_read_answer(root, body) for root, body in zip(self.roots, bodies, strict=True)]
        except Exception as error:
            if isinstance(error.__cause__, BodyTooLongError) and len(names) > 1:
                halves = names[: len(names) // 2], names[len(names) // 2 :]
                return {name: one for half in halves for name, one in (await self._take_all(session, half)).items()}
            return dict.fromkeys(names, error)
        return {name: self._calls_of(name, answers) for name in names}

    def _calls_of(self, rollout_id: str, answers: Sequence[_Answer]) -> _TakenCalls | PolicyServerError:
        joined: list[CallRecord] = []
        is_whole = True
        for root, answer in zip(self.roots, answers, strict=True):
            try:
                records = _records.decode(answer.rollouts[rollout_id])
                _check(records or ())
            except (msgspec.MsgspecError, KeyError, ValueError) as error:
                return _no_ledger(root, error)
            num_before, is_whole = len(joined), is_whole and records is not None
            joined += [_shifted(record, num_before) for record in records or ()]
        return joined if is_whole else None, "+".join(answer.instance for answer in answers)

    async def peek(self, session: aiohttp.ClientSession, rollout_ids: Sequence[str]) -> dict[str, CallState]:
        """Return the state of rollouts that have not ended, one entry per id. Nothing is forgotten. Raises
        `PolicyServerError`: see `take`."""
        body = {"rollouts": list(rollout_ids)}
        bodies = await self._post_all(session, RECORDS_PATH, body, _PEEK_TIMEOUT_S)
        try:
            states = [_states.decode(one) for one in bodies]
        except msgspec.MsgspecError as error:
            roots = ", ".join(self.roots)
            raise PolicyServerError(f"POST {RECORDS_PATH} of {roots}: the answer is no ledger ({error}).") from error
        return {
            name: CallState(
                num_answered=sum(len(state.records.get(name, ())) for state in states),
                num_running=sum(state.running.get(name, 0) for state in states),
            )
            for name in rollout_ids
        }

    async def ping(self, session: aiohttp.ClientSession, *, timeout_s: float = _PEEK_TIMEOUT_S) -> str | None:
        """Ask which processes answer. Returns a name that differs from process to process, or `""` where one is slow,
        complains or does not say; None when nothing listens at the address of one of them any more: its rollouts
        cannot go on."""
        names = await asyncio.gather(*(self._ping(session, root, timeout_s) for root in self.roots))
        self._silent = [root for root, name in zip(self.roots, names, strict=True) if name is None]
        if self._silent:
            return None
        return "+".join(name for name in names if name) if all(names) else ""

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Let engines be silent while open: they load weights, for which a sync has limits of its own."""
        self.busy_until = math.inf
        try:
            yield
        finally:
            self.busy_until = time.monotonic()

    async def ask_engine(self, session: aiohttp.ClientSession, root: str) -> None:
        """Return when the engine of a server has answered, or that server cannot be asked: `ping` notices why."""
        timeout = aiohttp.ClientTimeout(total=None)
        with contextlib.suppress(aiohttp.ClientError, OSError):
            url = f"{root}{ENGINE_PATH}"
            async with session.get(url, headers=self._headers, timeout=timeout, allow_redirects=False):
                pass

    def hang_of(self, root: str) -> PolicyServerLostError:
        """Return the loss of a server whose engine has not answered in time."""
        heard = (
            time.monotonic() - self._heard.get(root, -math.inf) < _PEEK_TIMEOUT_S
        )  # else the last ping had no answer
        loss = PolicyServerLostError(silence(root, self.hang_timeout_s, http_answers=heard))
        loss.silent_s = self.hang_timeout_s
        return loss

    def describe_silence(self) -> str:
        return " ".join(
            f"The policy server at {root} refuses connections: it has ended, or its network is gone."
            for root in self._silent or self.roots
        )

    async def cancel(
        self, session: aiohttp.ClientSession, rollout_ids: Sequence[str], *, timeout_s: float = _TIMEOUT_S
    ) -> None:
        """End rollouts that nobody waits for. NeMo Gym before 0.7 goes on with a rollout whose client has left. Raises
        `PolicyServerError`: see `take`."""
        await self._post_all(session, CANCEL_PATH, {"rollouts": list(rollout_ids)}, timeout_s)

    async def _ping(self, session: aiohttp.ClientSession, root: str, timeout_s: float) -> str | None:
        try:
            body = await self._post_once(session, f"{root}{RECORDS_PATH}", {"rollouts": []}, timeout_s)
            self._heard[root] = time.monotonic()
            return _states.decode(body).instance
        except msgspec.MsgspecError:
            return ""
        except PolicyServerError as error:
            return None if isinstance(error.__cause__, aiohttp.ClientConnectorError) else ""

    async def _post_all(
        self, session: aiohttp.ClientSession, path: str, body: dict[str, Any], timeout_s: float
    ) -> list[bytes]:
        return await asyncio.gather(*(self._post(session, f"{root}{path}", body, timeout_s) for root in self.roots))

    async def _post(self, session: aiohttp.ClientSession, url: str, body: dict[str, Any], timeout_s: float) -> bytes:
        """Post with a few tries: a network that drops a connection now and then is no reason to give a batch up, and a
        connection that the server closed while it idled has lost nothing. All of these requests can be repeated."""
        for pause_s in _PAUSES_S:
            try:
                return await self._post_once(session, url, body, timeout_s)
            except PolicyServerError as error:
                if not isinstance(error.__cause__, aiohttp.ClientConnectionError):
                    raise
            await asyncio.sleep(pause_s)
        return await self._post_once(session, url, body, timeout_s)

    async def _post_once(self, session: aiohttp.ClientSession, url: str, body: Any, timeout_s: float) -> bytes:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            sent = {"json": body, "headers": self._headers, "timeout": timeout, "allow_redirects": False}
            async with session.post(url, **sent) as response:
                if response.status == 200:
                    return await read_body(response)
                redirect = redirect_problem(url, response.status, response.headers.get("Location"))
                text = redirect or (await read_beginning(response, 500)).decode(errors="replace")
        except TimeoutError as error:
            raise PolicyServerLostError(f"POST {url}: no answer within {timeout_s:g} s") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
            raise PolicyServerLostError(f"POST {url}: {type(error).__name__}: {error}") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise PolicyServerError(f"POST {url}: {type(error).__name__}: {error}") from error
        if response.status != 404:
            raise PolicyServerError(f"POST {url}: HTTP {response.status}: {text}")
        raise PolicyServerError(
            f"POST {url}: HTTP 404: {text}. This server keeps no ledger of model calls: another version of trl-gym "
            "started it.",
            "Restart it with the installed one (`trl-gym serve MODEL` or `trl-gym gateway --upstream URL`).",
        )


class HangWatch:
    """Asks servers whether they still answer, one question at a time each, as long as a collection runs.

    Args:
        ask: Returns when the server at a URL has answered, or cannot be asked, which others notice.
        timeout_s: Seconds without an answer after which it hangs.
    """

    def __init__(self, ask: Callable[[str], Coroutine[Any, Any, None]], timeout_s: float) -> None:
        self._ask, self._timeout_s = ask, timeout_s
        self._asked: dict[str, tuple[asyncio.Task[None], float]] = {}  # by server: the newest question, and its time
        self._looked_at = self._awake_since = -math.inf

    def look(self, urls: Iterable[str], busy_until: float = 0.0) -> list[str]:
        """Ask what is due, and return those that hang. Waits for no answer.

        Args:
            busy_until: They may have been silent until then, on the clock `time.monotonic`.
        """
        now, hung = time.monotonic(), []
        if now - self._looked_at > _FROZEN_S:  # answers of that time are read after this look
            self._awake_since = now
        self._looked_at = now
        for url in urls:
            question, since = self._asked.get(url, (None, -math.inf))
            if question is not None and not question.done():
                if now - max(since, busy_until, self._awake_since) > self._timeout_s:
                    hung.append(url)
            elif now - since >= min(_ASK_EVERY_S, self._timeout_s / 4):
                self._asked[url] = asyncio.create_task(self._ask(url)), now
        return hung

    def close(self) -> None:
        """Forget the questions that are open."""
        for question, _ in self._asked.values():
            question.cancel()


class EngineWatch:
    """Asks the engine of each policy server."""

    def __init__(self, ledger: Ledger, session: aiohttp.ClientSession) -> None:
        self._ledger = ledger
        self._watch = HangWatch(partial(ledger.ask_engine, session), ledger.hang_timeout_s)

    def look(self) -> None:
        """Ask what is due. Waits for no answer. Raises `PolicyServerLostError`: an engine has not answered for too
        long."""
        for root in self._watch.look(self._ledger.roots, self._ledger.busy_until):
            raise self._ledger.hang_of(root)

    def close(self) -> None:
        """Forget the questions that are open."""
        self._watch.close()


_TakenCalls = tuple[list[CallRecord] | None, str]


class _Answer(msgspec.Struct):
    """See `middleware.ledger.Taken`; each rollout is read by itself."""

    instance: str
    rollouts: dict[str, msgspec.Raw]


_answer = msgspec.msgpack.Decoder(_Answer)
_records = msgspec.msgpack.Decoder(list[CallRecord] | None)


def _read_answer(root: str, body: bytes) -> _Answer:
    try:
        return _answer.decode(body)
    except msgspec.MsgspecError as error:
        raise _no_ledger(root, error) from error


def _no_ledger(root: str, error: Exception) -> PolicyServerError:
    return PolicyServerError(f"POST {root}{TAKE_PATH}: the answer is no ledger ({error}).")


class _States(msgspec.Struct):
    """The answer to `POST /trl_gym/rollouts/records`, as far as it is needed."""

    records: dict[str, list[Any]]
    running: dict[str, int] = {}
    instance: str = ""


_states = msgspec.json.Decoder(_States)


def _check(records: Sequence[CallRecord]) -> None:
    """Check what the types do not say. Raises `ValueError`."""
    for index, record in enumerate(records):
        tokens = record.tokens
        if tokens is None:
            continue
        if len(tokens.prompt) % 4 or len(tokens.sampled) % 4 or len(tokens.logprobs) != 2 * len(tokens.sampled):
            raise ValueError(f"call {index} has token ids and log-probabilities of other lengths")
        if tokens.parent is not None and not (0 <= tokens.parent < index and records[tokens.parent].tokens):
            raise ValueError(f"call {index} continues call {tokens.parent}, which is none before it")


def _shifted(record: CallRecord, num_before: int) -> CallRecord:
    """Return a record whose parent counts the records of other servers in front of its own."""
    tokens: CallTokens | None = record.tokens
    if not num_before or tokens is None or tokens.parent is None:
        return record
    return msgspec.structs.replace(record, tokens=msgspec.structs.replace(tokens, parent=tokens.parent + num_before))


def weight_versions(records: Sequence[CallRecord]) -> list[str]:
    """Return the versions that answered a rollout's calls, each once, in order of use."""
    answered = (record for record in records if record.status == 200)
    versions = (version for record in answered for version in (record.weight_version, record.last_version))
    return list(dict.fromkeys(version for version in versions if version is not None))
