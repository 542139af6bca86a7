"""Find out what an OpenAI endpoint can do for a rollout."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from trl_gym.errors import ConfigError, PolicyServerError, PolicyServerLostError
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError
from trl_gym.policy_server.command import KEY_VARIABLE

_TIMEOUT_S = 30.0


class EndpointKind(StrEnum):
    """What an OpenAI endpoint can do for a rollout."""

    OURS = "ours"
    """`trl-gym serve`, `trl-gym gateway`: exact prompts, the tokens of every answer, records, cancellation."""

    VLLM = "vllm"
    """Stock vLLM: tokens, though NeMo Gym has to tokenize the prompts once more."""

    PLAIN = "plain"
    """Anything else: text only."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint that has answered.

    Attributes:
        kind: What it can do.
        weight_version: Version of the policy's weights; empty when the endpoint does not say.
    """

    kind: EndpointKind
    weight_version: str = ""

    @property
    def note(self) -> str | None:
        """What a user should know about the tokens that will be recorded."""
        if self.kind is EndpointKind.OURS:
            return None
        remedy = "`trl-gym gateway --upstream URL` in front of a vLLM server gives exact ones."
        if self.kind is EndpointKind.VLLM:
            return f"token ids are recorded, with prompts that NeMo Gym tokenizes itself: rollouts may drift. {remedy}"
        return f"the endpoint gives no token ids; rollouts are recorded without. {remedy}"


def look_at(base_url: str, model: str, api_key: str | None) -> Endpoint:
    """Find out what answers.

    Args:
        base_url: OpenAI base URL, with or without `/v1`.
        model: Name of the model.
        api_key: Bearer token.

    Raises:
        PolicyServerError: Nothing answers.
        ConfigError: The endpoint wants another key, or does not serve the model.
    """
    client = PolicyClient(base_url, api_key=api_key, timeout_s=_TIMEOUT_S)
    try:
        _check_model(client, model)
        try:
            client.rollout_records([], forget=False)
        except PolicyResponseError:
            return Endpoint(EndpointKind.VLLM if _tokenizes(client) else EndpointKind.PLAIN)
        return Endpoint(EndpointKind.OURS, str(client.info().get("weight_version") or ""))
    finally:
        client.close()


def _check_model(client: PolicyClient, model: str) -> None:
    try:
        served = [entry["id"] for entry in client.models()]
    except PolicyResponseError as error:
        if error.status in (401, 403):
            raise ConfigError(
                f"{client.base_url} wants another key ({error.problem}).", f"Set `--api-key`, or {KEY_VARIABLE}."
            ) from error
        if error.status == 404:  # an endpoint need not list its models
            return
        raise
    if model not in served:
        raise ConfigError(
            f"`--model` is {model!r} and {client.base_url} serves {', '.join(map(repr, served)) or 'nothing'}.",
            "Set `--model` to a name that is served.",
        )


def _tokenizes(client: PolicyClient) -> bool:
    """Whether it has vLLM's `/tokenize`."""
    try:
        return bool(client.render([{"role": "user", "content": "a"}]))
    except PolicyServerLostError:
        raise
    except (PolicyServerError, KeyError, TypeError):  # an error, or something else than tokens
        return False
