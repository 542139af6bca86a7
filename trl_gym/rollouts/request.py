"""One dataset row → the request that NeMo Gym gets. Pure functions.

The sampling parameters travel twice: in the places of the Responses API that Gym knows, and under
`metadata.extra_body`, which Gym's `vllm_model` merges into the body of every model call of the rollout. The second is
what the policy server's middleware pins: an agent that sets its own temperature cannot take the rollout off policy.

Agents that drop `metadata` are reached by `PolicyAccess`: the same tag as a key, in a header of the request and, where
an agent takes a policy of its own per `/run`, in its body.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trl_gym.dataset import json_object, row_problem
from trl_gym.errors import DatasetError
from trl_gym.gym.discovery import AgentInfo
from trl_gym.policy_server.client import root_url
from trl_gym.policy_server.middleware.identity import PREFIX, ROLLOUT_HEADER, rollout_key
from trl_gym.rollout_options import AGENT_SAMPLING, Sampling

_REMEDY = "Load Gym datasets with `load_gym_dataset`, which names the line, and return such rows from `choose_task`."
_ATTEMPT = re.compile(r"-a\d+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """One rollout to run.

    Attributes:
        rollout_id: Unique over all steps, ranks and attempts; safe in a URL path and as a file name.
        task_index: Index of the dataset row.
        step: Number, from 1, of the optimizer step that it is sampled for; in an evaluation, the steps made before.
        batch: Number, in the run, of the generation batch that the task was drawn for; evaluations count their own.
        group: Index, in this generation batch over all ranks, of the group the rollout belongs to.
        member: Index in its group.
        agent: Name of the Gym agent that runs it.
        row: The row that is posted to `/run`.
    """

    rollout_id: str
    task_index: int
    group: int
    member: int
    attempt: int
    agent: str
    row: dict[str, Any]
    step: int = 0
    batch: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """The arguments of `RolloutFailure.of`."""
        return {name: getattr(self, name) for name in ("agent", "task_index", "rollout_id", "attempt")}

    @property
    def described(self) -> str:
        """The rollout, for messages."""
        return f"rollout {self.rollout_id} of {self.agent}, task {self.task_index}"

    @property
    def tag(self) -> dict[str, Any] | None:
        """The tag that `stamp` wrote; None for a row without one, whose model calls are nobody's."""
        metadata = (self.row.get("responses_create_params") or {}).get("metadata") or {}
        return json_object(metadata.get("extra_body")).get("trl_gym")


@dataclass(frozen=True, slots=True)
class PolicyAccess:
    """Makes the key of a rollout, which lets its agent call the policy as that rollout and nothing else."""

    base_urls: tuple[str, ...]  # OpenAI base URLs of the policy, as NeMo Gym calls them
    api_key: str | None = field(default=None, repr=False)  # of the policy server

    def of(self, request: RolloutRequest, agent: AgentInfo) -> tuple[dict[str, str], dict[str, str]]:
        """Return headers for `/run`, and fields for its body, which no file may contain.

        An agent that declares `policy_base_url` for its `/run` calls the policy there, past Gym's model server. A row
        that names another policy keeps it.
        """
        if (tag := request.tag) is None:
            return {}, {}
        key = rollout_key(self.api_key, tag)
        base_url = self.base_urls[zlib.crc32(request.rollout_id.encode()) % len(self.base_urls)]
        fields = {}
        if "policy_api_key" in agent.run_fields:
            fields = {"policy_base_url": base_url, "policy_api_key": key}
        elif "policy_base_url" in agent.run_fields:
            fields = {"policy_base_url": f"{root_url(base_url)}{PREFIX}{key}/v1"}
        has_own = request.row.get("policy_base_url") is not None or "policy_base_url" not in agent.run_fields
        return {ROLLOUT_HEADER: key}, {} if has_own else fields


def stamp(
    row: Mapping[str, Any],
    *,
    rollout_id: str,
    task_index: int,
    member: int,
    sampling: Sampling,
    completion_budget: int,
    agent_sampling: str = AGENT_SAMPLING[0],
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a copy of a Gym row with identity, sampling and budget written into it.

    Args:
        completion_budget: Tokens that each conversation of the rollout may have after its first prompt; a compaction
            begins a new one. A single model call gets at most this many, or what the row asks for when that is less.
        agent_sampling: What the policy server does with a model call that asks for another distribution.
        chat_template_kwargs: Passed to the chat template by the policy server.

    Raises:
        DatasetError: The row cannot be sent, see `dataset.row_problem`.
    """
    if (problem := row_problem(row)) is not None:
        raise DatasetError(f"The row of task {task_index} cannot be sent to NeMo Gym: {problem}.", _REMEDY)
    stamped = copy.deepcopy(dict(row))
    params = stamped["responses_create_params"]
    asked = params.get("max_output_tokens")
    params["max_output_tokens"] = completion_budget if asked is None else min(asked, completion_budget)
    params["temperature"] = sampling.temperature
    params["top_p"] = sampling.top_p
    metadata = dict(params.get("metadata") or {})
    tag: dict[str, Any] = {"rollout": rollout_id, "sampling": asdict(sampling), "completion_budget": completion_budget}
    if agent_sampling != AGENT_SAMPLING[0]:  # servers of other versions need not know it
        tag["agent_sampling"] = agent_sampling
    if options := dict(chat_template_kwargs or {}) | json_object(metadata.get("chat_template_kwargs")):
        metadata["chat_template_kwargs"] = json.dumps(options)
        tag["chat_template_kwargs"] = options  # for agents that drop `metadata`
    metadata["extra_body"] = json.dumps(json_object(metadata.get("extra_body")) | {"trl_gym": tag})
    params["metadata"] = metadata
    stamped["_ng_task_index"] = task_index
    stamped["_ng_rollout_index"] = member
    stamped["_ng_rollout_id"] = rollout_id
    return stamped


def next_attempt(request: RolloutRequest) -> RolloutRequest:
    """Return a request for the same rollout once more, under an id of its own: `…-a0` becomes `…-a1`.

    The id is replaced in every place where `stamp` wrote it, so that calls which the failed attempt still makes are
    not taken for calls of this one. Whatever else is in the row stays as it is.
    """
    attempt = request.attempt + 1
    rollout_id = f"{_ATTEMPT.sub('', request.rollout_id)}-a{attempt}"
    row = dict(request.row)
    if "_ng_rollout_id" in row:
        row["_ng_rollout_id"] = rollout_id
    params = row.get("responses_create_params")
    metadata = params.get("metadata") if isinstance(params, Mapping) else None
    if isinstance(params, Mapping) and isinstance(metadata, Mapping) and metadata.get("extra_body"):
        extra_body = json_object(metadata["extra_body"])
        if isinstance(tag := extra_body.get("trl_gym"), dict):
            extra_body["trl_gym"] = tag | {"rollout": rollout_id}
        row["responses_create_params"] = {**params, "metadata": {**metadata, "extra_body": json.dumps(extra_body)}}
    return dataclasses.replace(request, rollout_id=rollout_id, attempt=attempt, row=row)


# -- which rollouts are of the same task, and which of the same request -----------------------------------------------

# Fields that `stamp` writes, over those that the dataset's row may have.
_STAMPED_PARAMETERS = ("max_output_tokens", "temperature", "top_p")
_STAMPED_METADATA = ("extra_body", "chat_template_kwargs")


def task_hash(row: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that are the same for two rows, stamped or not, that ask the same.

    Ids, sampling parameters, token budgets and the agent's name do not count; everything else does.
    """
    plain = {key: value for key, value in row.items() if not key.startswith("_ng_") and key != "agent_ref"}
    parameters = dict(plain.get("responses_create_params") or {})
    for name in _STAMPED_PARAMETERS:
        parameters.pop(name, None)
    metadata = parameters.pop("metadata", None) or {}
    kept = {key: value for key, value in metadata.items() if key not in _STAMPED_METADATA}
    if kept:
        parameters["metadata"] = kept
    return _digest({**plain, "responses_create_params": parameters})


def request_hash(row: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that are the same for two rows if everything that shapes the answer is: the task,
    the agent, sampling parameters, token budget.

    Only the rollout's own identity (`_ng_*` and the rollout id in the stamp) does not count.
    """
    plain = {key: value for key, value in row.items() if not key.startswith("_ng_")}
    parameters = dict(plain.get("responses_create_params") or {})
    metadata = dict(parameters.get("metadata") or {})
    extra = metadata.get("extra_body")
    if isinstance(extra, str) and extra:
        body = json_object(extra)
        tag = {key: value for key, value in body.get("trl_gym", {}).items() if key != "rollout"}
        metadata["extra_body"] = {**body, "trl_gym": tag}
    return _digest({**plain, "responses_create_params": {**parameters, "metadata": metadata}})


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
