"""A resources server that asks the policy itself before it gives a reward."""

from nemo_gym.base_resources_server import (
    BaseResourcesServerConfig,
    BaseVerifyRequest,
    BaseVerifyResponse,
    SimpleResourcesServer,
)
from nemo_gym.config_types import ModelServerRef
from nemo_gym.server_utils import raise_for_status
from pydantic import ConfigDict

QUESTION = "is this good?"


class JudgedConfig(BaseResourcesServerConfig):
    model_server: ModelServerRef


class JudgedRequest(BaseVerifyRequest):
    model_config = ConfigDict(extra="allow")


class JudgedResponse(BaseVerifyResponse):
    model_config = ConfigDict(extra="allow")


class JudgedServer(SimpleResourcesServer):
    config: JudgedConfig

    async def verify(self, body: JudgedRequest) -> JudgedResponse:
        judgement = await self.server_client.post(
            server_name=self.config.model_server.name,
            url_path="/v1/responses",
            json={
                "input": [{"role": "user", "content": QUESTION}],
                "temperature": 0.4,
                "max_output_tokens": 8,  # a random policy would go on to the end of its context
            },
        )
        await raise_for_status(judgement)
        return JudgedResponse(**body.model_dump(), reward=1.0)


if __name__ == "__main__":
    JudgedServer.run_webserver()
