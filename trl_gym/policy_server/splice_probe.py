"""Does a server continue sampled tokens exactly, and if it is not ours at all, what is it? Asked by behaviour.

A stock server takes the token ids in a message, ignores them and renders the text again: everything works, and the
trained tokens are not those that were sampled. So it is given a turn whose ids are surely not how its tokenizer writes
the turn's text, and has to put exactly these in front of the next one. One render and one chat of a single token.
"""

from __future__ import annotations

import logging
import uuid
from typing import Any

from trl_gym.errors import PolicyServerError, PolicyServerLostError
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError

logger = logging.getLogger(__name__)

_FIRST = [{"role": "user", "content": "1"}]
_NUM_SAMPLED = 4  # ids of the pretended turn
REMEDY = (
    "Start it with `trl-gym serve MODEL`, or, if it may not be restarted, run `trl-gym gateway --upstream URL` in "
    "front of it and use the gateway's address"
)


def check_splice(client: PolicyClient, model_name: str) -> None:
    """Refuse a server that re-tokenizes what was sampled.

    A server that tries and says why its chat template does not allow it is only warned of: rollouts of one turn are
    exact there, and what happens to others is decided by the drift policy.

    Args:
        client: Control plane of the server.
        model_name: Served model.

    Raises:
        PolicyServerError: It does not put the tokens back, answers without token ids, or refuses such a request.
    """
    seen, answer = _ask(client, model_name)
    used = answer["choices"][0]["message"].get("prompt_token_ids")
    if used is None:
        raise _no_splice(client, "its answers carry no token ids")
    if used[: len(seen)] == seen and len(used) > len(seen):
        return
    if (drift := (answer.get("trl_gym") or {}).get("drift")) is not None:
        logger.warning(
            "The policy server at %s cannot continue a sampled turn exactly with this model's chat template (%s). "
            "Rollouts of several turns will drift; `gym_drift` decides what becomes of them.",
            client.base_url,
            drift["text"],
        )
        return
    raise _no_splice(
        client,
        "it was given the token ids of a sampled turn and prompted the model with other ones (it renders the "
        "conversation's text again)",
    )


def explain_stranger(client: PolicyClient, answer: PolicyResponseError) -> str:
    """Why a server that refused `GET /trl_gym/info` cannot be used, and what to do about it.

    Args:
        client: Control plane of the server.
        answer: How it refused.
    """
    what = f"{client.base_url} cannot be used as a policy server: "
    if answer.status in (401, 403):
        return f"{what}it demands another API key than it was given; `api_key` must be the one it was started with"
    try:
        models = [model["id"] for model in client.models()]
    except PolicyServerError as error:
        if getattr(error, "status", None) in (401, 403):
            return (
                f"{what}it is an OpenAI server without trl-gym's middleware, and demands another API key than it was "
                f"given. {REMEDY}, and set `api_key`"
            )
        return f"{what}no OpenAI server answers there ({error}). Check host and port. {REMEDY}"
    except (KeyError, TypeError):
        return (
            f"{what}no OpenAI server answers there (its /v1/models is something else). Check host and port. {REMEDY}"
        )
    return (
        f"{what}it is an OpenAI server (of {', '.join(models)}) without trl-gym's middleware, which would tokenize "
        f"sampled turns again, so that other tokens would be trained than were sampled. {REMEDY}"
    )


def _ask(client: PolicyClient, model_name: str) -> tuple[list[int], dict[str, Any]]:
    """The tokens of a pretended first turn, and the answer to a second one."""
    tag = {"rollout": f"splice-probe-{uuid.uuid4().hex[:8]}"}
    try:
        prompt = client.render(_FIRST)
        # Backwards: no tokenizer writes "0" as the end of the generation prompt in reverse.
        sampled = prompt[-_NUM_SAMPLED:][::-1]
        turn = {
            "role": "assistant",
            "content": "0",
            "prompt_token_ids": prompt,
            "generation_token_ids": sampled,
            "generation_log_probs": [0.0] * len(sampled),
        }
        messages = [*_FIRST, turn, {"role": "user", "content": "2"}]
        answer = client.chat(model=model_name, messages=messages, max_tokens=1, trl_gym=tag)
    except PolicyResponseError as error:
        raise _no_splice(client, f"it refused a conversation with sampled tokens in it ({error})") from error
    except PolicyServerLostError as error:
        raise PolicyServerLostError(
            f"{error}, asked for a single token. A server that a former run left paused answers no chat; "
            f"`curl -X POST {client.root_url}/resume` continues it."
        ) from error
    return [*prompt, *sampled], answer


def _no_splice(client: PolicyClient, reason: str) -> PolicyServerError:
    return PolicyServerError(
        f"The policy server at {client.base_url} does not continue sampled tokens exactly: {reason}. Training on it "
        f"would train other tokens than were sampled. {REMEDY}."
    )
