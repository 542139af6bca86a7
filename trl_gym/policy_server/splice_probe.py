"""Find out whether a server continues sampled tokens exactly, parses tool calls and samples from its model, and if it
is not ours, what it is; by what it does.

A stock server takes the token ids in a message, ignores them and renders the text again: everything works, and the
trained tokens are not those that were sampled. So it is given a turn whose ids are certainly not how its tokenizer
writes the turn's text, and has to put exactly these in front of the next turn. That takes one render and one chat of a
single token.
"""

from __future__ import annotations

import logging
from typing import Any

from trl_gym.errors import ConfigError, PolicyServerError, PolicyServerLostError
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError
from trl_gym.policy_server.command import KEY_VARIABLE

logger = logging.getLogger(__name__)

_FIRST = [{"role": "user", "content": "1"}]
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
_NUM_SAMPLED = 4  # ids of the pretended turn
_TEXTS = ("1", "What is 2?", "3 + 3 = 6")  # of different lengths
_NUM_COMPARED = 8  # tokens of each
REMEDY = (
    "Start it with `trl-gym serve MODEL`, or, if it may not be restarted, run `trl-gym gateway --upstream URL` in "
    "front of it and use the gateway's address."
)


def check_splice(client: PolicyClient, model_name: str) -> None:
    """Refuse a server that re-tokenizes what was sampled.

    A server that tries and says why its chat template does not allow it gets a warning only: rollouts of one turn are
    exact there, and `gym_drift` decides about the others.

    Raises:
        PolicyServerError: A server does not put the tokens back, answers without token ids, or refuses such a request.
        PolicyServerLostError: A server does not answer.
    """
    for one in client.singly():
        _check_one(one, model_name)


def _check_one(client: PolicyClient, model_name: str) -> None:
    seen, answer = _ask(client, model_name)
    used = answer["choices"][0]["message"].get("prompt_token_ids")
    if used is None:
        raise _no_splice(client, "its answers carry no token ids")
    if used[: len(seen)] == seen and len(used) > len(seen):
        return
    drift = (answer.get("trl_gym") or {}).get("drift")
    if drift is None:
        raise _no_splice(
            client,
            "it was given the token ids of a sampled turn and prompted the model with other ones (it renders the "
            "conversation's text again)",
        )
    logger.warning(
        "The policy server at %s cannot continue a sampled turn exactly with this model's chat template (%s). "
        "Rollouts of several turns will drift; `gym_drift` decides what becomes of them.",
        client.base_url,
        drift["text"],
    )


def check_tools(client: PolicyClient, model_name: str, agent: str) -> bool:
    """Refuse a server that was started without a tool parser: it answers no request with tools.

    Args:
        agent: Agent of a dataset row with tools.

    Returns:
        Whether all servers answered; one that refuses in another way is warned of.

    Raises:
        PolicyServerError: A server has no tool parser.
        PolicyServerLostError: A server does not answer.
    """
    answered = True
    for one in client.singly():
        try:
            one.chat(model=model_name, messages=_FIRST, tools=[_TOOL], tool_choice="auto", max_tokens=1)
        except PolicyResponseError as error:
            if error.status == 400 and "tool-call-parser" in str(error):
                raise PolicyServerError(
                    f"Rows of `{agent}` have tools, and the policy server at {one.base_url} was started without a "
                    "parser for tool calls.",
                    "Start it with --tool-call-parser NAME (a stock vLLM also with --enable-auto-tool-choice); "
                    "`trl-gym serve MODEL` guesses it for most models.",
                ) from error
            logger.warning(
                "whether %s parses tool calls is not checked: it refused a chat with a tool (%s)", one.base_url, error
            )
            answered = False
    return answered


def check_sampling(client: PolicyClient, model_name: str, tolerance: float) -> None:
    """Refuse a server that samples from something else than its model.

    An engine computes attention otherwise than the model's code does: with a cache, and many sequences in a batch.
    Where the two do not fit, nothing fails. So short answers are sampled side by side, and their log-probabilities are
    compared with those of the same tokens in one ordinary forward pass.

    Args:
        client: Control plane of one or several servers of the engine "transformers".
        tolerance: Mean absolute difference in nats that is allowed.

    Raises:
        ConfigError: A server computes something else.
        PolicyServerError: A server refuses such a request.
    """
    for one in client.singly():
        prompts = [one.render([{"role": "user", "content": text}]) for text in _TEXTS]
        limits = {"max_tokens": _NUM_COMPARED, "ignore_eos": True}
        answer = one.complete(model=model_name, prompt=prompts, logprobs=0, return_token_ids=True, **limits)
        sampled = [choice["token_ids"] for choice in answer["choices"]]
        told = [choice["logprobs"]["token_logprobs"] for choice in answer["choices"]]
        whole = one.prompt_logprobs([[*prompt, *ids] for prompt, ids in zip(prompts, sampled, strict=True)])
        computed = [logprobs[-len(ids) :] for logprobs, ids in zip(whole, sampled, strict=True)]
        gaps = [abs(a - b) for pair in zip(told, computed, strict=True) for a, b in zip(*pair, strict=True)]
        if not (gap := sum(gaps) / len(gaps)) <= tolerance:
            raise ConfigError(
                f"The engine 'transformers' at {one.base_url} does not compute what its model does: log-probabilities "
                f"of tokens that it has sampled differ by {gap:.3f} nats on average ({tolerance:g} is allowed).",
                "Set `gym_engine` to 'vllm'; raise `gym_probe_tolerance` only if precision explains the gap.",
            )


def unusable(client: PolicyClient, answer: PolicyResponseError) -> PolicyServerError:
    """Return the error for a server that refused `GET /trl_gym/info`: why it cannot be used, and what to do."""
    what = f"{client.base_url} cannot be used as a policy server:"
    if answer.status in (401, 403):
        return PolicyServerError(
            f"{what} it demands another API key than it was given.", "Set `api_key` to the one it was started with."
        )
    try:
        models = [model["id"] for model in client.models()]
    except PolicyServerError as error:
        if getattr(error, "status", None) in (401, 403):
            return PolicyServerError(
                f"{what} it is an OpenAI server without trl-gym's middleware, and demands another API key than it was "
                "given.",
                f"{REMEDY} Set `api_key`.",
            )
        return PolicyServerError(f"{what} no OpenAI server answers there ({error}).", f"Check host and port. {REMEDY}")
    return PolicyServerError(
        f"{what} it is an OpenAI server (of {', '.join(models)}) without trl-gym's middleware, which would tokenize "
        "sampled turns again, so that other tokens would be trained than were sampled.",
        REMEDY,
    )


def _ask(client: PolicyClient, model_name: str) -> tuple[list[int], dict[str, Any]]:
    """Return the tokens of a pretended first turn, and the answer to a second one."""
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
        answer = client.chat(model=model_name, messages=messages, max_tokens=1)
    except PolicyResponseError as error:
        raise _no_splice(client, f"it refused a conversation with sampled tokens in it ({error})") from error
    except PolicyServerLostError as error:
        raise PolicyServerLostError(
            f"{error} It was asked for a single token, which a server that a former run left paused does not answer.",
            f'Continue it with `curl -X POST -H "Authorization: Bearer ${KEY_VARIABLE}" {client.root_url}/resume` if '
            "it is paused.",
        ) from error
    return [*prompt, *sampled], answer


def _no_splice(client: PolicyClient, reason: str) -> PolicyServerError:
    return PolicyServerError(
        f"The policy server at {client.base_url} does not continue sampled tokens exactly: {reason}. Training on it "
        "would train other tokens than were sampled.",
        REMEDY,
    )
