"""Several policy servers that hold the same weights, used as one.

    vllm_server_base_url: http://node1:8000/v1,http://node2:8000/v1

NeMo Gym gets the list: its model server keeps a rollout on one of them (0.4: by turns, 0.7: by hash of the session;
both read). What the trainer tells one it tells all, at the same time: a sync is over when the last one has finished
it, and one that refuses fails it. The servers must be ours (`trl-gym serve`); `trl-gym gateway` is the other way, for
servers that are not, and for one address in front of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from trl_gym.errors import ConfigError, PolicyServerError, PolicyServerLostError, WeightMismatchError
from trl_gym.policy_server.client import PolicyClient
from trl_gym.policy_server.middleware.calls import CallRecord
from trl_gym.policy_server.server import Placement, PolicyBackend, PolicyServer

# What one server answers for all: nothing is changed by it, and replicas answer alike.
_ASKED_OF_ONE = ("/v1/models", "/v1/chat/completions", "/v1/completions", "/tokenize", "/server_info", "/trl_gym/info")
# One process group over several servers is not made here, so transports that need one are left out.
_WITHOUT_RENDEZVOUS = ("file", "adapter")
# Of probes: replicas compute in the same precision, and differ by the order of sums at most.
_MAX_REPLICA_GAP = 0.05


def attach_policy(base_urls: str, *, api_key: str | None = None, timeout_s: float = 240.0) -> PolicyBackend:
    """Use the server, or the servers, that somebody else runs.

    Args:
        base_urls: OpenAI base URLs, separated by commas.
        api_key: The API key of all of them.
        timeout_s: How long to wait for each.

    Raises:
        ConfigError: A URL is given twice, or none at all.
        PolicyServerError: One cannot be used (see `PolicyServer.attach`), or they do not serve the same.
    """
    urls = [url.strip() for url in base_urls.split(",") if url.strip()]
    doubled = sorted({url for url in urls if urls.count(url) > 1})
    if not urls or doubled:
        raise ConfigError(
            f"`vllm_server_base_url` is {base_urls!r}; it must name one server, or several different ones separated "
            f"by commas{f' (twice: {doubled[0]})' if doubled else ''}."
        )
    servers = [PolicyServer.attach(url, api_key=api_key, timeout_s=timeout_s) for url in urls]
    return servers[0] if len(servers) == 1 else PolicyFleet(servers)


class PolicyFleet:
    """Attached servers as one `PolicyBackend`.

    Args:
        servers: At least two, ready.

    Raises:
        PolicyServerError: They serve different models, or contexts of different length.
    """

    is_ours = False

    def __init__(self, servers: Sequence[PolicyServer]) -> None:
        self.servers = tuple(servers)
        first = servers[0]
        for other in servers[1:]:
            for what in ("model_name", "max_model_len"):
                if getattr(first, what) != getattr(other, what):
                    raise PolicyServerError(
                        f"{first.base_url} and {other.base_url} are to serve the same policy, and differ in {what}: "
                        f"{getattr(first, what)!r} and {getattr(other, what)!r}"
                    )
        self.model_name = first.model_name
        self.model = first.model
        self.max_model_len = first.max_model_len
        self.placement: Placement = "server"
        self.keeps_records = all(server.keeps_records for server in servers)
        self.client: PolicyClient = FleetClient([server.client for server in servers])

    @property
    def weight_transports(self) -> tuple[str, ...]:
        """What all of them accept, as far as it can be done for several.

        Raises:
            ConfigError: There is nothing.
        """
        accepted = [server.weight_transports for server in self.servers]
        shared = set(_WITHOUT_RENDEZVOUS).intersection(*accepted)
        if not shared:
            listed = "; ".join(
                f"{s.base_url}: {', '.join(names)}" for s, names in zip(self.servers, accepted, strict=True)
            )
            raise ConfigError(
                f"Several policy servers can be sent weights by {' or '.join(_WITHOUT_RENDEZVOUS)} only, and these "
                f"were started for others ({listed}). Start each with --weight-transfer-config "
                """'{"backend": "file"}' and set `gym_weight_dir` to a folder that all of them see, or run one """
                "server with --data-parallel-size."
            )
        return tuple(name for name in accepted[0] if name in shared)

    @property
    def state(self) -> str:
        return self.servers[0].state if len({server.state for server in self.servers}) == 1 else "starting"

    @property
    def base_url(self) -> str:
        """All base URLs, separated by commas."""
        return ",".join(server.base_url for server in self.servers)

    def start(self) -> PolicyFleet:
        """Attached servers run already; nothing to do."""
        return self

    def wait_ready(self) -> PolicyFleet:
        """They answered when they were attached to; nothing to wait for."""
        return self

    def check(self) -> None:
        for server in self.servers:
            server.check()

    def restart(self) -> None:
        raise PolicyServerError("servers that run elsewhere cannot be restarted from here")

    def look(self) -> str | None:
        instances = [server.look() for server in self.servers]
        return None if None in instances else "+".join(map(str, instances))

    def stop(self) -> None:
        """Close the connections; the servers run on."""
        for server in self.servers:
            server.stop()


class FleetClient(PolicyClient):
    """The control plane of several servers. Reads ask the first; everything else is told to all of them side by side,
    and returns the first's answer when all have succeeded.

    Args:
        clients: One per server.
    """

    def __init__(self, clients: Sequence[PolicyClient]) -> None:
        super().__init__(clients[0].base_url, api_key=clients[0].api_key, timeout_s=clients[0].timeout_s)
        self.clients = tuple(clients)

    def close(self) -> None:
        for client in self.clients:
            client.close()

    def health(self) -> bool:
        return all(client.patient(self.timeout_s).health() for client in self.clients)

    def is_paused(self) -> bool:
        """Whether any is."""
        return any(answer["is_paused"] for answer in self._ask_all("GET", "/is_paused"))

    def weight_version(self) -> str:
        """
        Raises:
            PolicyServerError: They hold different versions.
        """
        versions = [str(answer["weight_version"]) for answer in self._ask_all("GET", "/weight_info")]
        if len(set(versions)) > 1:
            told = ", ".join(f"{c.root_url}: {v!r}" for c, v in zip(self.clients, versions, strict=True))
            raise PolicyServerError(f"the policy servers hold different weight versions ({told})")
        return versions[0]

    def rollout_records(self, rollouts: Sequence[str], *, forget: bool = True) -> dict[str, list[CallRecord]]:
        answers = self._ask_all(
            "POST", "/trl_gym/rollouts/records", json={"rollouts": list(rollouts), "forget": forget}
        )
        return {name: [record for answer in answers for record in answer["records"][name]] for name in rollouts}

    def cancel_rollouts(self, rollouts: Sequence[str]) -> int:
        answers = self._ask_all("POST", "/trl_gym/rollouts/cancel", json={"rollouts": list(rollouts)})
        return sum(answer["aborted"] for answer in answers)

    def load_adapter(self, name: str, path: str, version: str, *, max_adapters: int, wait_s: float) -> list[str]:
        """The folders that any of them needs."""
        body = {"name": name, "path": path, "version": version, "max_adapters": max_adapters, "wait_s": wait_s}
        answers = self._ask_all("POST", "/trl_gym/adapters", json=body, timeout_s=self.timeout_s + wait_s)
        return sorted({adapter["path"] for answer in answers for adapter in answer["held"]})

    def abandon_weight_update(self) -> bool:
        """Each has its own state: one may have finished what another has not begun."""
        complete = [client.abandon_weight_update() for client in self.clients]
        return all(complete)

    def prompt_logprobs(
        self, token_ids: Sequence[Sequence[int]], *, model: str | None = None, timeout_s: float | None = None
    ) -> list[list[float]]:
        """The first server's; asks each in turn.

        Raises:
            WeightMismatchError: Another one computes something else.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        first, *others = self.clients
        expected = first.prompt_logprobs(token_ids, model=model, timeout_s=timeout_s)
        for client in others:
            gap = _mean_gap(expected, client.prompt_logprobs(token_ids, model=model, timeout_s=timeout_s))
            if gap > _MAX_REPLICA_GAP:
                raise WeightMismatchError(
                    f"{first.base_url} and {client.base_url} hold different weights: their log-probabilities differ "
                    f"by {gap:.4f} nats on average ({_MAX_REPLICA_GAP} is allowed)."
                )
        return expected

    def _call(
        self,
        method: Literal["GET", "POST"],
        path: str,
        *,
        json: dict[str, Any] | None = None,
        params: dict[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        if path in _ASKED_OF_ONE:
            return self.clients[0]._call(method, path, json=json, params=params, timeout_s=timeout_s)
        return self._ask_all(method, path, json=json, params=params, timeout_s=timeout_s)[0]

    def _ask_all(self, method: Literal["GET", "POST"], path: str, **arguments: Any) -> list[Any]:
        """The answers by server.

        Raises:
            PolicyServerError: One or more have failed; names each. It is a loss if one was lost: the others may have
                failed because of that.
        """
        arguments.setdefault("timeout_s", self.timeout_s)
        with ThreadPoolExecutor(len(self.clients)) as pool:
            calls = [pool.submit(client._call, method, path, **arguments) for client in self.clients]
        errors = [call.exception() for call in calls]
        failures = [error for error in errors if error is not None]
        if not failures:
            return [call.result() for call in calls]
        others = [error for error in failures if not isinstance(error, PolicyServerError)]
        if others or len(failures) == 1:
            raise [*others, *failures][0]
        text = f"{len(failures)} of {len(calls)} policy servers failed: " + "; ".join(map(str, failures))
        if any(isinstance(error, PolicyServerLostError) for error in failures):
            raise PolicyServerLostError(text)
        raise PolicyServerError(text)


def _mean_gap(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float:
    gaps = [abs(a - b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)]
    return sum(gaps) / max(len(gaps), 1)
