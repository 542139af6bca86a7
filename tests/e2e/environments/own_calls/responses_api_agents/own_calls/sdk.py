"""Calls the model server with OpenAI's SDK, from a thread, by the address in the config, with one client for all."""

import asyncio
from typing import Any

import openai
from common import GO_ON, OwnCallsAgent, OwnCallsRunRequest, first_message
from nemo_gym.server_utils import get_first_server_config_dict
from pydantic import PrivateAttr


class SdkAgent(OwnCallsAgent):
    _client: openai.OpenAI | None = PrivateAttr(default=None)

    async def converse(self, body: OwnCallsRunRequest) -> list[dict[str, Any]]:
        return await asyncio.get_running_loop().run_in_executor(None, self._talk, first_message(body), body.own())

    def _talk(self, first: dict[str, Any], own: dict[str, Any]) -> list[dict[str, Any]]:
        servers = self.server_client.global_config_dict
        config = get_first_server_config_dict(servers, self.config.model_server.name)
        url = f"http://localhost:{config.port}/v1"
        self._client = self._client or openai.OpenAI(base_url=url, api_key="dummy_key", max_retries=0)
        messages = [first]
        for turn in range(2):
            messages += [GO_ON] if turn else []
            answer = self._client.chat.completions.create(model="policy", messages=messages, **own)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
        return messages[1:]


if __name__ == "__main__":
    SdkAgent.run_webserver()
