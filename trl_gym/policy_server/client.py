"""The trainer's side of a policy server: health, pause and resume, weights, versions, and a few ways to sample.

Every call has a timeout and every failure is a `PolicyServerError` that names the operation, the URL, the status and
the server's own words. Nothing is retried here: a weight update that was sent twice is worse than one that failed.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import requests

from trl_gym.errors import PolicyServerError, PolicyServerLostError, error_body_text
from trl_gym.policy_server.middleware.calls import CallRecord

_CONNECT_TIMEOUT_S = 10.0
_MAX_QUOTED_CHARS = 2000


class PolicyResponseError(PolicyServerError):
    """The server answered with an error.

    Attributes:
        status: HTTP status, e.g. 404.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class PolicyClient:
    """Control plane of one policy server. Not thread-safe: use one per thread.

    Args:
        base_url: OpenAI base URL, e.g. `"http://127.0.0.1:8000/v1"`. The `/v1` may be left out.
        api_key: Sent as bearer token with every request.
        timeout_s: How long one call may take, where the call itself has no `timeout_s`.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout_s: float = 60.0) -> None:
        self.root_url = base_url.rstrip("/").removesuffix("/v1")
        self.base_url = f"{self.root_url}/v1"
        self.timeout_s = timeout_s
        self._session = requests.Session()
        # A proxy for the outer world (HTTP_PROXY) would swallow requests to our own node.
        self._session.trust_env = False
        self.api_key = api_key
        if api_key:
            self._session.headers["Authorization"] = f"Bearer {api_key}"

    def patient(self, timeout_s: float) -> PolicyClient:
        """This client with another timeout for calls that have none of their own; the connections are shared."""
        other = copy.copy(self)
        other.timeout_s = timeout_s
        return other

    def close(self) -> None:
        """Close the connections. The client can still be used afterwards."""
        self._session.close()

    # -- what it is and how it does -----------------------------------------------------------------------------------

    def health(self) -> bool:
        """Whether the server answers and its engine is alive. Never raises for a server that is not."""
        try:
            return self._session.get(f"{self.root_url}/health", timeout=self._timeouts(None)).status_code == 200
        except requests.RequestException:
            return False

    def info(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """`GET /trl_gym/info`: nonce, versions, `weight_version`, `max_model_len`, `model_names`, counters."""
        return self._call("GET", "/trl_gym/info", timeout_s=timeout_s)

    def models(self) -> list[dict[str, Any]]:
        """The models that the server serves, adapters included."""
        return self._call("GET", "/v1/models")["data"]

    def server_config(self) -> dict[str, Any]:
        """vLLM's resolved configuration as a tree, e.g. `["model_config"]["logprobs_mode"]`."""
        return self._call("GET", "/server_info", params={"config_format": "json"})["vllm_config"]

    def server_environment(self) -> dict[str, Any]:
        """vLLM's environment variables as the server process has them, keys and tokens left out."""
        return self._call("GET", "/server_info", params={"config_format": "json"})["vllm_env"]

    def world_size(self) -> int:
        """Workers of the server that hold weights: tensor × pipeline × data parallel."""
        return int(self._call("GET", "/get_world_size")["world_size"])

    def collective_rpc(self, method: str, args: Sequence[str] = ()) -> list[Any]:
        """Call a method of every worker, e.g. one that `--worker-extension-cls` has added; one answer per worker.

        Raises:
            PolicyResponseError: Also if the workers have no such method.
        """
        return self._call("POST", "/collective_rpc", json={"method": method, "args": list(args)})["results"]

    # -- pause, sleep, caches -----------------------------------------------------------------------------------------

    def pause(self, mode: Literal["abort", "wait", "keep"] = "wait", *, timeout_s: float | None = None) -> None:
        """Stop generating. New requests are accepted and held until `resume`.

        Args:
            mode: What happens to running requests: `"wait"` lets them finish (the call returns when they have),
                `"abort"` ends them with the tokens they have, `"keep"` freezes them.
            timeout_s: With `"wait"`, at least as long as the longest generation.
        """
        self._call("POST", "/pause", params={"mode": mode}, timeout_s=timeout_s)

    def is_paused(self) -> bool:
        """Whether it generates nothing until `resume`."""
        return bool(self._call("GET", "/is_paused")["is_paused"])

    def resume(self) -> None:
        """Generate again."""
        self._call("POST", "/resume")

    def sleep(self, level: int = 1) -> None:
        """Free GPU memory: 1 moves the weights to the host, 2 drops them; the KV cache is dropped. No-op on CPU."""
        self._call("POST", "/sleep", params={"level": level})

    def wake_up(self, tags: Sequence[str] = ()) -> None:
        """Take memory again: all of it, or only that of `tags` (`"weights"`, `"kv_cache"`)."""
        self._call("POST", "/wake_up", params={"tags": list(tags)})

    def is_sleeping(self) -> bool:
        """Whether anything sleeps, or the scheduler is paused."""
        return bool(self._call("GET", "/is_sleeping")["is_sleeping"])

    def reset_caches(self, *, running: bool = False) -> None:
        """Forget everything computed with the old weights: prefix, multimodal and encoder cache.

        Args:
            running: Whether frozen requests forget theirs too, and compute it anew when they go on.

        Raises:
            PolicyServerError: Also if requests still hold blocks of the prefix cache. Pause first.
        """
        flags = {"reset_running_requests": "true"} if running else None
        answer = self._call("POST", "/reset_prefix_cache", params=flags)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise PolicyServerError(
                f"the prefix cache of {self.root_url} could not be reset: requests are still running. "
                "Pause the server first"
            )
        self._call("POST", "/reset_mm_cache")
        self._call("POST", "/reset_encoder_cache")

    # -- weights ------------------------------------------------------------------------------------------------------

    def init_weight_transfer(self, init_info: dict[str, Any], *, timeout_s: float | None = None) -> None:
        """Once per training run; `init_info` is the engine's (empty for `file`)."""
        self._call("POST", "/init_weight_transfer_engine", json={"init_info": init_info}, timeout_s=timeout_s)

    def start_weight_update(self) -> None:
        self._call("POST", "/start_weight_update")

    def update_weights(self, update_info: dict[str, Any], *, timeout_s: float | None = None) -> None:
        """One chunk of weights; `{"path": …}` for `file`. After an error the server must be considered dead."""
        self._call("POST", "/update_weights", json={"update_info": update_info}, timeout_s=timeout_s)

    def finish_weight_update(self, version: str, *, timeout_s: float | None = None) -> None:
        """Put the new weights into service under the name `version`."""
        self._call("POST", "/finish_weight_update", json={"weight_version": version}, timeout_s=timeout_s)

    def abandon_weight_update(self) -> bool:
        """End an update whose trainer is gone, so that another one can be started; the server stays paused.

        vLLM has no route for it. An update that is complete can be finished, under the version that the server has
        (it is replaced before anything is sampled). One that is not refuses to be, and is ended by an
        `/update_weights` that the engine refuses too, before it touches a weight.

        Returns:
            Whether the update was complete. Otherwise layers that had begun to load keep what arrived, and the next
            update must bring all weights.

        Raises:
            PolicyServerLostError: The server does not answer.
        """
        try:
            self._call("POST", "/finish_weight_update", json={})
        except PolicyResponseError:  # there is none, or it lacks weights
            with contextlib.suppress(PolicyResponseError):
                self._call("POST", "/update_weights", json={"update_info": {}})
            return False
        return True

    def set_weight_version(self, version: str) -> None:
        """Give the weights that are in service another version."""
        self._call("POST", "/update_weight_version", json={"new_version": version})

    def weight_version(self) -> str:
        return str(self._call("GET", "/weight_info")["weight_version"])

    # -- adapters -----------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, path: str, version: str, *, max_adapters: int, wait_s: float) -> list[str]:
        """A LoRA adapter is the policy from here on, for every rollout that begins.

        Args:
            name: E.g. `"policy@12"`.
            path: Its folder, as the server sees it.
            version: Weight version of what it samples.
            max_adapters: How many the server may keep, this one included.
            wait_s: How long it may wait for rollouts that hold an old one.

        Returns:
            Paths of the folders that the server needs.

        Raises:
            PolicyResponseError: 400: it cannot be served; 409: no room. The server goes on as before.
        """
        body = {"name": name, "path": path, "version": version, "max_adapters": max_adapters, "wait_s": wait_s}
        answer = self._call("POST", "/trl_gym/adapters", json=body, timeout_s=self.timeout_s + wait_s)
        return [adapter["path"] for adapter in answer["held"]]

    def clear_adapters(self) -> None:
        """The server's own weights are the policy again."""
        self._call("POST", "/trl_gym/adapters/clear")

    # -- rollouts -----------------------------------------------------------------------------------------------------

    def rollout_records(self, rollouts: Sequence[str], *, forget: bool = True) -> dict[str, list[CallRecord]]:
        """The model calls of rollouts, in the order in which they were answered.

        Args:
            rollouts: Rollout ids, as in `trl_gym.rollout` of their requests.
            forget: Whether the server may drop what it returns.

        Returns:
            One list per id; empty for a rollout that has made no call (or was forgotten).
        """
        body = {"rollouts": list(rollouts), "forget": forget}
        return self._call("POST", "/trl_gym/rollouts/records", json=body)["records"]

    def cancel_rollouts(self, rollouts: Sequence[str]) -> int:
        """End rollouts that nobody waits for: what they sample now is aborted, and every later call of theirs is told
        that the context is full, upon which agents end the rollout by themselves.

        Returns:
            How many calls were aborted.
        """
        return self._call("POST", "/trl_gym/rollouts/cancel", json={"rollouts": list(rollouts)})["aborted"]

    def set_sampling(self, sampling: dict[str, Any] | None) -> None:
        """Pin the sampling of rollouts whose calls bring none (`trl_gym.sampling`); `None` pins nothing."""
        self._call("POST", "/trl_gym/sampling", json={"sampling": sampling or {}})

    # -- sampling -----------------------------------------------------------------------------------------------------

    def chat(self, *, timeout_s: float | None = None, **body: Any) -> dict[str, Any]:
        """One chat completion; `body` is the JSON of the request, `trl_gym` included."""
        return self._call("POST", "/v1/chat/completions", json=body, timeout_s=timeout_s)

    def prompt_logprobs(
        self, token_ids: Sequence[Sequence[int]], *, model: str | None = None, timeout_s: float | None = None
    ) -> list[list[float]]:
        """Log-probabilities of given sequences, at temperature 1: what a trainer's forward pass computes.

        Args:
            token_ids: `[N][T_i]` sequences of at least one token, shorter than the server's maximum length (it samples
                one token more, which is thrown away).
            model: Served model or adapter; the server's first when not given.

        Returns:
            `[N][T_i - 1]`: `log p(token t | tokens < t)` for t = 1 … T_i - 1.
        """
        sequences = [list(ids) for ids in token_ids]
        if not sequences:
            return []
        body: dict[str, Any] = {"prompt": sequences, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        if model is not None:
            body["model"] = model
        answer = self._call("POST", "/v1/completions", json=body, timeout_s=timeout_s)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != len(sequences):
            raise PolicyServerError(f"{self.base_url}/completions answered {len(choices)} of {len(sequences)} prompts")
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
        """Token ids `[T]` of a chat as the server's template renders it."""
        body: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        if tools is not None:
            body["tools"] = list(tools)
        if chat_template_kwargs is not None:
            body["chat_template_kwargs"] = chat_template_kwargs
        return self._call("POST", "/tokenize", json=body)["tokens"]

    # -- plumbing -----------------------------------------------------------------------------------------------------

    def _call(
        self,
        method: Literal["GET", "POST"],
        path: str,
        *,
        json: dict[str, Any] | None = None,
        params: dict[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """One request. Returns the parsed JSON, or `None` for an empty answer.

        Raises:
            PolicyServerError: See the module's docstring.
        """
        url, timeouts = f"{self.root_url}{path}", self._timeouts(timeout_s)
        try:
            response = self._session.request(method, url, json=json, params=params, timeout=timeouts)
        except requests.Timeout as error:
            raise PolicyServerLostError(f"{method} {url}: no answer within {timeouts[1]:g} s") from error
        except requests.RequestException as error:
            raise PolicyServerLostError(f"{method} {url}: the server cannot be reached ({error})") from error
        if response.status_code != 200:
            self._session.close()  # after an exception in a route the server hangs up; the next call must not find out
            raise PolicyResponseError(
                f"{method} {url}: HTTP {response.status_code}: {_quote(error_body_text(response.content))}",
                response.status_code,
            )
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError as error:
            raise PolicyServerError(f"{method} {url}: the answer is not JSON: {_quote(response.text)}") from error

    def _timeouts(self, timeout_s: float | None) -> tuple[float, float]:
        total = self.timeout_s if timeout_s is None else timeout_s
        return min(_CONNECT_TIMEOUT_S, total), total

    def _token_logprobs(self, ids: list[int], entries: list[dict[str, Any] | None] | None) -> list[float]:
        if entries is None or len(entries) != len(ids):
            raise PolicyServerError(f"{self.base_url}/completions returned no prompt_logprobs for {len(ids)} tokens")
        # The first token has no predecessor; its entry is null.
        logprobs = [
            (entry or {}).get(str(token), {}).get("logprob") for token, entry in zip(ids, entries, strict=True)
        ]
        for place, logprob in enumerate(logprobs[1:], start=1):
            if logprob is None or not math.isfinite(logprob):
                raise PolicyServerError(f"{self.base_url}/completions: prompt token {place} has the logprob {logprob}")
        return logprobs[1:]


def _quote(text: str) -> str:
    return text if len(text) <= _MAX_QUOTED_CHARS else f"{text[:_MAX_QUOTED_CHARS]} …"
