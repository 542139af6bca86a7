"""What an OpenAI endpoint can do for a rollout. Three kinds:

ours    `trl-gym serve`, `trl-gym gateway`    exact prompts, the tokens of every answer, records, cancellation
vllm    stock vLLM                            tokens, though NeMo Gym has to tokenize the prompts once more
plain   anything else                         text only
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import requests

from trl_gym.errors import ConfigError, PolicyServerError
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError

_TIMEOUT_S = 30.0


class EndpointKind(StrEnum):
    OURS = "ours"
    VLLM = "vllm"
    PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint that has answered.

    Attributes:
        kind: See the module.
        weight_version: Of the policy; empty when it does not say.
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
        ConfigError: It wants another key, or does not serve the model.
    """
    client = PolicyClient(base_url, api_key=api_key, timeout_s=_TIMEOUT_S)
    try:
        _check_model(client, model)
        try:
            client.rollout_records([], forget=False)
        except PolicyResponseError:
            return Endpoint(EndpointKind.VLLM if _tokenizes(client, model) else EndpointKind.PLAIN)
        return Endpoint(EndpointKind.OURS, str(client.info().get("weight_version") or ""))
    finally:
        client.close()


def _check_model(client: PolicyClient, model: str) -> None:
    try:
        served = [entry["id"] for entry in client.models()]
    except PolicyResponseError as error:
        if error.status in (401, 403):
            raise ConfigError(f"{client.base_url} wants another key ({error}); set --api_key.") from error
        if error.status == 404:  # an endpoint need not list its models
            return
        raise
    if model not in served:
        raise ConfigError(
            f"--model is {model!r} and {client.base_url} serves {', '.join(map(repr, served)) or 'nothing'}."
        )


def _tokenizes(client: PolicyClient, model: str) -> bool:
    """Whether it has vLLM's `/tokenize`."""
    headers = {"Authorization": f"Bearer {client.api_key}"} if client.api_key else {}
    try:
        body = {"model": model, "prompt": "a"}
        answer = requests.post(f"{client.root_url}/tokenize", json=body, headers=headers, timeout=_TIMEOUT_S)
        return answer.status_code == 200 and "tokens" in answer.json()
    except ValueError:  # 200 and no JSON: something else
        return False
    except requests.RequestException as error:
        raise PolicyServerError(f"{client.root_url} does not answer any more: {error}") from error
