"""What makes two rollouts rollouts of the same task: the row that was sent, without what is stamped into it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Written by `requests.stamp`, over what the dataset's row may have had there.
_STAMPED_PARAMETERS = ("max_output_tokens", "temperature", "top_p")
_STAMPED_METADATA = ("extra_body", "chat_template_kwargs")


def task_hash(row: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that are the same for two rows, stamped or not, that ask the same.

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
    """The same for everything that shapes the answer: the task, the agent, sampling parameters, token budget.

    Only the rollout's own identity (`_ng_*` and the rollout id in the stamp) does not count.
    """
    plain = {key: value for key, value in row.items() if not key.startswith("_ng_")}
    parameters = dict(plain.get("responses_create_params") or {})
    metadata = dict(parameters.get("metadata") or {})
    extra = metadata.get("extra_body")
    if isinstance(extra, str) and extra:
        body = json.loads(extra)
        tag = {key: value for key, value in body.get("trl_gym", {}).items() if key != "rollout"}
        metadata["extra_body"] = {**body, "trl_gym": tag}
    return _digest({**plain, "responses_create_params": {**parameters, "metadata": metadata}})


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
