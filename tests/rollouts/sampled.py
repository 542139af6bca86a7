"""The ledger of rollouts that tests write down as Gym's answers, with the tokens of each model call in them."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

from trl_gym.policy_server.middleware.ledger import CallDrift, CallRecord, CallTokens, token_ids
from trl_gym.responses import output_items, said_in_item
from trl_gym.rollouts.trajectory import ModelCall, model_calls


def record(
    before: list[CallRecord],
    prompt: list[int],
    sampled: list[int],
    logprobs: list[float] | None = None,
    said: tuple[bytes, ...] = (),
    **fields: Any,
) -> CallRecord:
    """A call that was answered, after those `before` it in the same rollout; its handle is `-1 - len(before)`."""
    seen = [token_ids(before, index) if one.tokens else None for index, one in enumerate(before)]
    parents = [index for index, ids in enumerate(seen) if ids is not None and prompt[: len(ids)] == ids]
    parent = max(parents, key=lambda index: (len(seen[index] or ()), index), default=None)
    start = 0 if parent is None else len(seen[parent] or ())
    tokens = CallTokens(
        handle=-1 - len(before),
        parent=parent,
        prompt=array("i", prompt[start:]).tobytes(),
        sampled=array("i", sampled).tobytes(),
        logprobs=array("d", [-0.5] * len(sampled) if logprobs is None else logprobs).tobytes(),
        said=said,
    )
    given = {"status": 200, "prompt": "exact", "seconds": 0.1, "weight_version": "3", "finish_reason": "stop"}
    counts = {"prompt_tokens": len(prompt), "completion_tokens": len(sampled)}
    return CallRecord(**{**given, **counts, "tokens": tokens, **fields})


def records_of(answer: Mapping[str, Any], drift: Mapping[int, CallDrift] | None = None) -> list[CallRecord]:
    """The calls whose tokens are in the items of an answer, and what the items said."""
    records: list[CallRecord] = []
    said: list[bytes] = []
    for item in output_items(answer):
        if (digest := said_in_item(item)) is not None:
            said.append(digest)
        if item.get("generation_token_ids"):
            ids = item["prompt_token_ids"], item["generation_token_ids"], item["generation_log_probs"]
            records.append(record(records, *ids, said=tuple(said), drift=(drift or {}).get(len(records))))
            said = []
    return records


def calls_in(answer: Mapping[str, Any]) -> list[ModelCall]:
    """The calls whose tokens are in the items of an answer."""
    return model_calls(records_of(answer))
