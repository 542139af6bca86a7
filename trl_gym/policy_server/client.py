"""Call a policy server's control routes: health, pause and resume, weights, versions, rollouts, some ways to sample.

Several servers that hold the same weights are used as one: reads ask the first, everything that changes a server is
sent to all of them side by side, and has succeeded when all have done it.

Every call has a timeout and every failure is a `PolicyServerError` that names the operation, the URL, the status and
the server's own words; so is an answer of another form than the call is answered with. Redirects are not followed: the
key is for this server. Nothing is retried here: a weight update that was sent twice is worse than one that failed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import requests

from trl_gym.errors import (
    ConfigError,
    PolicyServerError,
    PolicyServerLostError,
    Problem,
    WeightMismatchError,
    error_body_text,
)
from trl_gym.given import checked_urls, usable_key
from trl_gym.policy_server.middleware.identity import UntaggedCalls
from trl_gym.untrusted import (
    MAX_ERROR_BYTES,
    BodyTooLongError,
    parse_json,
    read_response,
    redirect_problem,
    shape_problem,
)

_CONNECT_TIMEOUT_S = 10.0

_MAX_QUOTED_CHARS = 2000
_MAX_REPLICA_GAP = 0.05  # nats; replicas compute in the same precision and differ by the order of sums at most


# The forms of answers, as far as they are read.


class _Untagged(TypedDict):
    gym: dict[str, int]
    others: int


class _Adapter(TypedDict):
    max_lora_rank: int
    target_modules: NotRequired[list[str] | None]


class _Config(TypedDict):
    weight_transfer_config: NotRequired[dict[str, str | None] | None]
    lora_config: NotRequired[_Adapter | None]
    parallel_config: NotRequired[dict[str, Any]]


class _Model(TypedDict):
    id: str


class _Drift(TypedDict):
    text: str


class _Extra(TypedDict):
    drift: NotRequired[_Drift | None]


class _Message(TypedDict):
    prompt_token_ids: NotRequired[list[int] | None]


class _Answer(TypedDict):
    message: _Message


class _Chat(TypedDict):
    choices: Annotated[list[_Answer], msgspec.Meta(min_length=1)]
    trl_gym: NotRequired[_Extra | None]


class _Info(TypedDict):
    model_names: Annotated[list[str], msgspec.Meta(min_length=1)]
    max_model_len: Annotated[int, msgspec.Meta(ge=1)]
    engine: NotRequired[str]  # servers of earlier trl-gym versions, which were all vLLM, do not say
    engine_version: NotRequired[str]
    untagged_calls: NotRequired[_Untagged]
    has_key: NotRequired[bool]
    instance: NotRequired[str | None]
    weight_version: NotRequired[str | int | None]
    weight_transports: NotRequired[list[str] | None]


class _Held(TypedDict):
    path: str


class _Logprob(TypedDict):
    logprob: float | None


class _Choice(TypedDict):
    index: int
    prompt_logprobs: list[dict[str, _Logprob] | None] | None


@functools.cache
def _with(name: str, kind: Any) -> Any:
    """Return the form of an answer that has a field of this type."""
    return TypedDict("_Answer", {name: kind})  # type: ignore[operator]


ENGINE_PATH = "/is_paused"  # a question that is passed on to the engine


def silence(url: str, silent_s: float, *, http_answers: bool) -> str:
    """Say which part of a server does not answer.

    Args:
        silent_s: Seconds that were waited for its engine.
        http_answers: Whether the process that answers HTTP answered meanwhile what it can answer alone.
    """
    which = "its HTTP process answers, and its engine does not" if http_answers else "nothing answers"
    return f"The policy server at {url} hangs: {which} (waited for {silent_s:g} s)."


def root_url(url: str) -> str:
    """Return the address of a server from its URL with or without `/v1`."""
    return url.strip().rstrip("/").removesuffix("/v1").rstrip("/")


def server_urls(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return OpenAI base URLs, ending in `/v1`.

    Args:
        given: URLs with or without `/v1`, as for `given.split_urls`.

    Raises:
        ConfigError: No URL is given, or one of them twice, or one is no URL of HTTP.
    """
    urls = tuple(f"{root_url(url)}/v1" for url in checked_urls("vllm_server_base_url", given))
    if (twice := next((url for url in urls if urls.count(url) > 1), None)) is not None:
        raise ConfigError(
            f"`vllm_server_base_url` is {given!r}, which names {twice} twice.",
            "Name one server, or several different ones separated by commas.",
        )
    return urls


class PolicyResponseError(PolicyServerError):
    """The server answered with an error."""

    def __init__(self, problem: str, status: int) -> None:
        super().__init__(problem)
        self.status = status


class PolicyClient:
    """Control plane of a policy server, or of several. Not thread-safe: use one client per thread.

    Args:
        base_urls: OpenAI base URLs, as for `server_urls`.
        timeout_s: Timeout of calls that are given none, in seconds.

    Attributes:
        base_urls: OpenAI base URLs, ending in `/v1`.

    Raises:
        ConfigError: See `server_urls`; or the key cannot be sent.
    """

    def __init__(self, base_urls: str | Sequence[str], *, api_key: str | None = None, timeout_s: float = 60.0) -> None:
        self.base_urls = server_urls(base_urls)
        self.api_key = usable_key("api_key", api_key)
        self.timeout_s = timeout_s
        self._sessions = tuple(_new_session(self.api_key) for _ in self.base_urls)

    @property
    def base_url(self) -> str:
        """The base URLs in one text, for messages."""
        return ", ".join(self.base_urls)

    @property
    def root_url(self) -> str:
        """The addresses without `/v1` in one text, for messages."""
        return ", ".join(map(root_url, self.base_urls))

    def patient(self, timeout_s: float) -> PolicyClient:
        """Return this client with another timeout for calls that are given none; it shares the connections."""
        other = copy.copy(self)
        other.timeout_s = timeout_s
        return other

    def singly(self) -> list[PolicyClient]:
        """Return one client per server; they share the connections."""
        clients = []
        for base_url, session in zip(self.base_urls, self._sessions, strict=True):
            clients.append(copy.copy(self))
            clients[-1].base_urls, clients[-1]._sessions = (base_url,), (session,)
        return clients

    def close(self) -> None:
        """Close the connections. The client can still be used afterwards."""
        for session in self._sessions:
            session.close()

    # -- what it is and how it does -----------------------------------------------------------------------------------

    def health(self) -> bool:
        """Return whether every server answers and says that its engine is alive. Raises nothing where one does not.
        An engine that hangs says nothing: see `ask_engines`."""
        try:
            answers = [
                session.get(f"{root_url(url)}/health", timeout=self._timeouts(None), allow_redirects=False)
                for url, session in zip(self.base_urls, self._sessions, strict=True)
            ]
        except requests.RequestException:
            return False
        return all(answer.status_code == 200 for answer in answers)

    def ask_engines(self) -> None:
        """Return when the engine of every server has answered a question that its HTTP process alone cannot: an engine
        does so between two forward passes, also while it is paused or asleep. One of a server that has no such
        question (stock vLLM outside of its development mode) is taken for well.

        Raises:
            PolicyServerLostError: One has not answered in time.
            PolicyServerError: One has failed.
        """
        for client in self.singly():
            try:
                client._call("GET", ENGINE_PATH)
            except PolicyResponseError as error:
                if error.status not in (404, 405):
                    raise
            except PolicyServerLostError as error:
                if not isinstance(error.__cause__, requests.Timeout):
                    raise
                raise client._silence() from error

    def _silence(self) -> PolicyServerLostError:
        http_answers = self.patient(min(self.timeout_s, _CONNECT_TIMEOUT_S)).health()
        lost = PolicyServerLostError(silence(self.root_url, self.timeout_s, http_answers=http_answers))
        lost.silent_s = self.timeout_s
        return lost

    def info(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """`GET /trl_gym/info`: nonce, engine, versions, `weight_version`, `max_model_len`, `model_names`, counters."""
        return self._call("GET", "/trl_gym/info", timeout_s=timeout_s, shape=_Info)

    def infos(self) -> list[dict[str, Any]]:
        """Return `info` of every server."""
        return self._call_all("GET", "/trl_gym/info", shape=_Info)

    def untagged_calls(self) -> UntaggedCalls:
        """Return the sampled calls, since the servers' start, that belong to no rollout."""
        counts = UntaggedCalls()
        for info in self.infos():
            counts.gym.update(info["untagged_calls"]["gym"])
            counts.others += info["untagged_calls"]["others"]
        return counts

    def prometheus(self, *, timeout_s: float = 10.0) -> list[str]:
        """Return what each server counts (`GET /metrics`), in Prometheus' text format."""
        bodies = self._call_all("GET", "/metrics", timeout_s=timeout_s, raw=True)
        return [body.decode(errors="replace") for body in bodies]

    def models(self) -> list[dict[str, Any]]:
        """Return the models that the server serves, adapters included."""
        return self._call("GET", "/v1/models", shape=_with("data", list[_Model]))["data"]

    def server_config(self) -> dict[str, Any]:
        """Return vLLM's resolved configuration as a tree, e.g. `["model_config"]["logprobs_mode"]`."""
        return self._server_info("vllm_config", _Config)

    def server_environment(self) -> dict[str, Any]:
        """Return vLLM's environment variables as the server process has them, without keys and tokens."""
        return self._server_info("vllm_env", dict[str, Any])

    def _server_info(self, part: str, kind: Any) -> dict[str, Any]:
        shape = _with(part, kind)
        return self._call("GET", "/server_info", params={"config_format": "json"}, shape=shape)[part]

    def world_size(self) -> int:
        """Return how many workers of the server hold weights: tensor × pipeline × data parallel."""
        return self._call("GET", "/get_world_size", shape=_with("world_size", int))["world_size"]

    def collective_rpc(self, method: str, args: Sequence[str] = ()) -> list[Any]:
        """Call a method of every worker, e.g. one that `--worker-extension-cls` adds. Return an answer per worker.
        Raises `PolicyResponseError`: also if the workers have no such method."""
        body = {"method": method, "args": list(args)}
        return self._tell("/collective_rpc", json=body, shape=_with("results", list[Any]))["results"]

    # -- pause, sleep, caches -----------------------------------------------------------------------------------------

    def pause(self, mode: Literal["abort", "wait", "keep"] = "wait") -> None:
        """Stop generating. New requests are accepted and held until `resume`.

        Args:
            mode: What happens to running requests: `"wait"` lets them finish (the call returns when they have),
                `"abort"` ends them with the tokens they have, `"keep"` freezes them.
        """
        self._tell("/pause", params={"mode": mode})

    def is_paused(self) -> bool:
        """Return whether any server generates nothing until `resume`."""
        answers = self._call_all("GET", ENGINE_PATH, shape=_with("is_paused", bool))
        return any(answer["is_paused"] for answer in answers)

    def resume(self) -> None:
        """Generate again."""
        self._tell("/resume")

    def sleep(self, level: int = 1) -> None:
        """Free GPU memory: 1 moves the weights to the host, 2 drops them; the KV cache is dropped. No-op on CPU."""
        self._tell("/sleep", params={"level": level})

    def wake_up(self, tags: Sequence[str] = ()) -> None:
        """Take memory again: all of it, or only that of `tags` (`"weights"`, `"kv_cache"`)."""
        self._tell("/wake_up", params={"tags": list(tags)})

    def reset_caches(self, *, running: bool = False) -> None:
        """Forget everything computed with the old weights: prefix, multimodal and encoder cache.

        Args:
            running: Whether frozen requests forget theirs too, and compute it again when they continue.

        Raises:
            PolicyServerError: Also if requests still hold blocks of the prefix cache. Pause first.
        """
        flags = {"reset_running_requests": "true"} if running else None
        answers = self._call_all("POST", "/reset_prefix_cache", params=flags)
        if any(isinstance(answer, dict) and answer.get("success") is False for answer in answers):
            raise PolicyServerError(
                f"The prefix cache of {self.root_url} could not be reset: requests are still running.",
                "Pause the server first.",
            )
        self._tell("/reset_mm_cache")
        self._tell("/reset_encoder_cache")

    # -- weights ------------------------------------------------------------------------------------------------------

    def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Prepare the transfer, once per training run; `init_info` is the engine's (empty for `file`)."""
        self._tell("/init_weight_transfer_engine", json={"init_info": init_info})

    def start_weight_update(self) -> None:
        self._tell("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one chunk of weights; `{"path": …}` for `file`. After an error the server must be considered dead."""
        self._tell("/update_weights", json={"update_info": update_info})

    def finish_weight_update(self, version: str) -> None:
        """Put the new weights into service under the name `version`."""
        self._tell("/finish_weight_update", json={"weight_version": version})

    def abandon_weight_update(self) -> bool:
        """End an update whose trainer is gone, so that another one can be started; the server stays paused.

        vLLM has no route for it. An update that is complete can be finished, under the version that the server has
        (it is replaced before anything is sampled). One that is not refuses to be, and is ended by an
        `/update_weights` that the engine refuses too, before it touches a weight.

        Returns:
            Whether the update was complete (on every server). Otherwise layers that had begun to load keep what
            arrived, and the next update must bring all weights.

        Raises:
            PolicyServerLostError: The server does not answer.
        """
        complete = [client._abandon_weight_update() for client in self.singly()]  # each is where it is
        return all(complete)

    def _abandon_weight_update(self) -> bool:
        try:
            self._tell("/finish_weight_update", json={})
        except PolicyResponseError:  # there is none, or it lacks weights
            with contextlib.suppress(PolicyResponseError):
                self._tell("/update_weights", json={"update_info": {}})
            return False
        return True

    def set_weight_version(self, version: str) -> None:
        """Give the weights that are in service another version."""
        self._tell("/update_weight_version", json={"new_version": version})

    def weight_version(self) -> str:
        """Return the version of the weights in service. Raises `PolicyServerError`: several servers hold different
        versions."""
        shape = _with("weight_version", str | int | None)
        versions = [str(answer["weight_version"]) for answer in self._call_all("GET", "/weight_info", shape=shape)]
        if len(set(versions)) > 1:
            held = ", ".join(f"{url}: {version!r}" for url, version in zip(self.base_urls, versions, strict=True))
            raise PolicyServerError(
                f"The policy servers hold different weight versions ({held}).",
                "Restart the one that missed an update; the next weight sync brings all to one version.",
            )
        return versions[0]

    # -- adapters -----------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, path: str, version: str, *, max_adapters: int, wait_s: float) -> list[str]:
        """Make a LoRA adapter the policy of every rollout that begins from here on.

        Args:
            name: E.g. `"policy@12"`.
            path: Its folder, as the server sees it.
            max_adapters: How many the server may keep, this one included.
            wait_s: How long it may wait for rollouts that hold an old one.

        Returns:
            Paths of the folders that the server needs (or any of several).

        Raises:
            PolicyResponseError: 400: it cannot be served; 409: no room. The server goes on as before.
        """
        body = {"name": name, "path": path, "version": version, "max_adapters": max_adapters, "wait_s": wait_s}
        timeout_s, shape = self.timeout_s + wait_s, _with("held", list[_Held])
        answers = self._call_all("POST", "/trl_gym/adapters", json=body, timeout_s=timeout_s, shape=shape)
        return list(dict.fromkeys(adapter["path"] for answer in answers for adapter in answer["held"]))

    def clear_adapters(self) -> None:
        """Make the server's own weights the policy again."""
        self._tell("/trl_gym/adapters/clear")

    # -- rollouts -----------------------------------------------------------------------------------------------------

    def rollout_records(self, rollouts: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Return the model calls of rollouts that have not ended, in the order in which they were answered.

        Args:
            rollouts: Rollout ids, as in `trl_gym.rollout` of their requests.

        Returns:
            One list per id, of `ledger.CallRecord` without tokens; empty for a rollout that has made no call.
        """
        body, shape = {"rollouts": list(rollouts)}, _with("records", dict[str, list[dict[str, Any]]])
        answers = self._call_all("POST", "/trl_gym/rollouts/records", json=body, shape=shape)
        return {
            name: [record for answer in answers for record in answer["records"].get(name, ())] for name in rollouts
        }

    def cancel_rollouts(self, rollouts: Sequence[str]) -> int:
        """End rollouts that nobody waits for: what they sample now is aborted, and every later call of theirs is told
        that the context is full, upon which agents end the rollout by themselves. Returns how many calls were
        aborted."""
        body = {"rollouts": list(rollouts)}
        answers = self._call_all("POST", "/trl_gym/rollouts/cancel", json=body, shape=_with("aborted", int))
        return sum(answer["aborted"] for answer in answers)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def chat(self, *, timeout_s: float | None = None, **body: Any) -> dict[str, Any]:
        """Ask for one chat completion; `body` is the JSON of the request, `trl_gym` included."""
        return self._call("POST", "/v1/chat/completions", json=body, timeout_s=timeout_s, shape=_Chat)

    def complete(self, *, timeout_s: float | None = None, **body: Any) -> dict[str, Any]:
        """Ask for completions of texts or tokens; `body` is the JSON of the request."""
        shape = _with("choices", list[dict[str, Any]])
        return self._call("POST", "/v1/completions", json=body, timeout_s=timeout_s, shape=shape)

    def prompt_logprobs(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return log-probabilities of given sequences at temperature 1: what a trainer's forward pass computes.

        Args:
            token_ids: `[N][T_i]` sequences of at least one token, shorter than the server's maximum length (it samples
                one token more, which is thrown away).

        Returns:
            `[N][T_i - 1]`: `log p(token t | tokens < t)` for t = 1 … T_i - 1. Of several servers, the first's.

        Raises:
            WeightMismatchError: Several servers compute different ones.
        """
        sequences = [list(ids) for ids in token_ids]
        if not sequences:
            return []
        first, *others = [(one, one._prompt_logprobs(sequences)) for one in self.singly()]
        for one, logprobs in others:
            gap = _mean_gap(first[1], logprobs)
            if gap > _MAX_REPLICA_GAP:
                raise WeightMismatchError(
                    f"{first[0].base_url} and {one.base_url} hold different weights: their log-probabilities differ "
                    f"by {gap:.4f} nats on average ({_MAX_REPLICA_GAP} is allowed).",
                    "Restart the one that missed an update.",
                )
        return first[1]

    def _prompt_logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        body = {"prompt": sequences, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        answer = self._call("POST", "/v1/completions", json=body, shape=_with("choices", list[_Choice]))
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(sequences):
            raise PolicyServerError(
                f"{self.base_url}/completions answered {len(choices)} of {len(sequences)} prompts."
            )
        return [
            self._token_logprobs(ids, choice["prompt_logprobs"])
            for ids, choice in zip(sequences, choices, strict=True)
        ]

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids `[T]` of a chat as the server's template renders it."""
        body: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        if tools is not None:
            body["tools"] = list(tools)
        if chat_template_kwargs is not None:
            body["chat_template_kwargs"] = chat_template_kwargs
        return self._call("POST", "/tokenize", json=body, shape=_with("tokens", list[int]))["tokens"]

    # -- plumbing -----------------------------------------------------------------------------------------------------

    def _call(self, method: Literal["GET", "POST"], path: str, **arguments: Any) -> Any:
        """Ask the (first) server; see `_request`."""
        return self._request(self.base_urls[0], self._sessions[0], method, path, **arguments)

    def _tell(self, path: str, **arguments: Any) -> Any:
        """Send a `POST` to every server, and return the first's answer when all have succeeded; see `_call_all`."""
        return self._call_all("POST", path, **arguments)[0]

    def _call_all(self, method: Literal["GET", "POST"], path: str, **arguments: Any) -> list[Any]:
        """Send a request to every server side by side, and return their answers in order. Raises `PolicyServerError`:
        one or several have failed; names each. It is a loss if one was lost: the others may have failed because of
        that."""
        if len(self.base_urls) == 1:
            return [self._call(method, path, **arguments)]
        with ThreadPoolExecutor(len(self.base_urls)) as pool:
            calls = [
                pool.submit(self._request, url, session, method, path, **arguments)
                for url, session in zip(self.base_urls, self._sessions, strict=True)
            ]
        failures = [error for call in calls if (error := call.exception()) is not None]
        unexpected = [error for error in failures if not isinstance(error, PolicyServerError)]
        if unexpected or len(failures) == 1:
            raise [*unexpected, *failures][0]
        if failures:
            is_loss = any(isinstance(error, PolicyServerLostError) for error in failures)
            raise (PolicyServerLostError if is_loss else PolicyServerError)(
                f"{len(failures)} of {len(calls)} policy servers failed.", "", [Problem(str(e)) for e in failures]
            )
        return [call.result() for call in calls]

    def _request(
        self,
        base_url: str,
        session: requests.Session,
        method: Literal["GET", "POST"],
        path: str,
        *,
        json: dict[str, Any] | None = None,
        params: dict[str, Any] | None = None,
        timeout_s: float | None = None,
        shape: Any = Any,
        raw: bool = False,
    ) -> Any:
        """Send one request. Return the parsed JSON, which has the given shape, or `None` for an empty answer; with
        `raw`, the body. Raises `PolicyServerError`: see the module's docstring."""
        url, timeouts = f"{root_url(base_url)}{path}", self._timeouts(timeout_s)
        sent = {"json": json, "params": params, "timeout": timeouts, "allow_redirects": False, "stream": True}
        try:
            response = session.request(method, url, **sent)  # type: ignore[arg-type]
            body = read_response(response)
        except requests.Timeout as error:
            raise PolicyServerLostError(f"{method} {url}: no answer within {timeouts[1]:g} s.") from error
        except requests.RequestException as error:
            raise PolicyServerLostError(f"{method} {url}: the server cannot be reached ({error}).") from error
        except BodyTooLongError as error:
            raise PolicyServerError(f"{method} {url}: {error}.") from error
        status = response.status_code
        if status != 200:
            session.close()  # after an exception in a route the server hangs up; the next call must not find out
            redirect = redirect_problem(url, status, response.headers.get("Location"))
            said = redirect or f"HTTP {status}: {_quote(error_body_text(body[:MAX_ERROR_BYTES]))}"
            raise PolicyResponseError(f"{method} {url}: {said}", status)
        if raw:
            return body
        try:
            answer = parse_json(body) if body else None
        except ValueError as error:
            said = _quote(body.decode(errors="replace"))
            raise PolicyServerError(f"{method} {url}: the answer is not JSON ({error}): {said}") from error
        if (problem := shape_problem(answer, shape)) is not None:
            said = _quote(body.decode(errors="replace"))
            raise PolicyServerError(f"{method} {url}: the answer has another form ({problem}): {said}")
        return answer

    def _timeouts(self, timeout_s: float | None) -> tuple[float, float]:
        total = self.timeout_s if timeout_s is None else timeout_s
        return min(_CONNECT_TIMEOUT_S, total), total

    def _token_logprobs(self, ids: list[int], entries: list[dict[str, Any] | None] | None) -> list[float]:
        if entries is None or len(entries) != len(ids):
            raise PolicyServerError(f"{self.base_url}/completions returned no prompt_logprobs for {len(ids)} tokens.")
        # The first token has no predecessor; its entry is null.
        logprobs = [
            (entry or {}).get(str(token), {}).get("logprob") for token, entry in zip(ids, entries, strict=True)
        ]
        for place, logprob in enumerate(logprobs[1:], start=1):
            if logprob is None or not math.isfinite(logprob):
                raise PolicyServerError(
                    f"{self.base_url}/completions: prompt token {place} has the logprob {logprob}."
                )
        return logprobs[1:]


def _new_session(api_key: str | None) -> requests.Session:
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"
    session.trust_env = False  # a proxy for the outer world (HTTP_PROXY) would swallow requests to our own nodes
    if api_key:
        session.headers["Authorization"] = f"Bearer {api_key}"
    return session


def _mean_gap(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float:
    gaps = [abs(a - b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)]
    return sum(gaps) / max(len(gaps), 1)


def _quote(text: str) -> str:
    return text if len(text) <= _MAX_QUOTED_CHARS else f"{text[:_MAX_QUOTED_CHARS]} …"
