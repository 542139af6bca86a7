"""What the agents have in common: they answer with the texts that they got, without token ids."""

import asyncio
from typing import Any

from nemo_gym.base_resources_server import BaseRunRequest, BaseVerifyRequest, BaseVerifyResponse
from nemo_gym.base_responses_api_agent import BaseResponsesAPIAgentConfig, SimpleResponsesAPIAgent
from nemo_gym.config_types import ModelServerRef, ResourcesServerRef
from nemo_gym.openai_utils import NeMoGymResponse
from nemo_gym.server_utils import get_first_server_config_dict, get_response_json, raise_for_status
from pydantic import ConfigDict

GO_ON = {"role": "user", "content": "go on"}


class OwnCallsConfig(BaseResponsesAPIAgentConfig):
    resources_server: ResourcesServerRef
    model_server: ModelServerRef


class OwnCallsRunRequest(BaseRunRequest):
    model_config = ConfigDict(extra="allow")
    policy_base_url: str | None = None
    policy_api_key: str | None = None
    direct: bool = False  # whether the harness calls the policy itself
    call_limit: int | None = None  # tokens of one model call

    def own(self) -> dict[str, Any]:
        """Parameters of the agent's own, of which the policy server replaces the first two."""
        return {"temperature": 0.1, "top_p": 0.2} | ({"max_tokens": self.call_limit} if self.call_limit else {})


class OwnCallsVerifyRequest(BaseVerifyRequest):
    model_config = ConfigDict(extra="allow")


class OwnCallsVerifyResponse(BaseVerifyResponse):
    model_config = ConfigDict(extra="allow")


class OwnCallsAgent(SimpleResponsesAPIAgent):
    config: OwnCallsConfig

    async def converse(self, body: OwnCallsRunRequest) -> list[dict[str, Any]]:
        """Return the conversation after the row's own messages."""
        raise NotImplementedError

    async def responses(self) -> NeMoGymResponse:
        raise NotImplementedError

    async def run(self, body: OwnCallsRunRequest) -> OwnCallsVerifyResponse:
        messages = await self.converse(body)
        verify = await self.server_client.post(
            server_name=self.config.resources_server.name,
            url_path="/verify",
            json=body.model_dump() | {"response": as_response(messages)},
        )
        await raise_for_status(verify)
        return OwnCallsVerifyResponse.model_validate(await get_response_json(verify))

    def model_url(self) -> str:
        servers = self.server_client.global_config_dict
        config = get_first_server_config_dict(servers, self.config.model_server.name)
        return f"{self.server_client._build_server_base_url(config)}/v1"

    async def ask(self, messages: list[dict[str, Any]], own: dict[str, Any]) -> str:
        """Make one model call with Gym's client."""
        answer = await self.server_client.post(
            server_name=self.config.model_server.name,
            url_path="/v1/chat/completions",
            json={"model": "policy", "messages": messages, **own},
        )
        await raise_for_status(answer)
        return (await get_response_json(answer))["choices"][0]["message"]["content"] or ""

    async def chat(self, first: dict[str, Any], num_turns: int, own: dict[str, Any]) -> list[dict[str, Any]]:
        """Have a conversation of so many turns; return it without its first message."""
        messages = [first]
        for turn in range(num_turns):
            messages += [GO_ON] if turn else []
            messages.append({"role": "assistant", "content": await self.ask(messages, own)})
        return messages[1:]


def first_message(body: OwnCallsRunRequest) -> dict[str, Any]:
    [message] = body.responses_create_params.input
    return {"role": message.role, "content": message.content}


def as_response(messages: list[dict[str, Any]]) -> dict[str, Any]:
    output = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            output.append({"type": "message", **message})
            continue
        content = [{"type": "output_text", "text": message["content"], "annotations": []}]
        item = {"id": f"msg_{index}", "type": "message", "role": "assistant", "status": "completed"}
        output.append(item | {"content": content})
    choice = {"parallel_tool_calls": False, "tool_choice": "auto", "tools": []}
    return {"id": "resp", "created_at": 0, "model": "policy", "object": "response", "output": output, **choice}


async def run_cli(command: list[str], env: dict[str, str]) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await process.communicate()
    if process.returncode:
        raise RuntimeError(errors.decode()[-2000:])
    return out.decode()
