# Copyright 2026 The trl-gym Authors
# SPDX-License-Identifier: Apache-2.0
"""Resources server of the calculator environment: two tools and the verifier.

NeMo Gym starts this file with its own folder on `sys.path`. Per episode, the agent calls `/seed_session` (inherited:
this environment has no state to prepare), `/<tool>` once per tool call of the model, and `/verify` once at the end.
"""

from typing import Annotated, Any

from calculator_scoring import run_tool, score
from fastapi import Body, FastAPI
from nemo_gym.base_resources_server import (
    BaseResourcesServerConfig,
    BaseVerifyRequest,
    BaseVerifyResponse,
    SimpleResourcesServer,
)


class CalculatorConfig(BaseResourcesServerConfig):
    """Keys of `calculator.yaml` beyond Gym's own: none."""


class CalculatorVerifyRequest(BaseVerifyRequest):
    """The dataset row as written by `generate_data.py`, plus the finished `response`."""

    expected_tool: str
    expected_arguments: dict[str, int]
    expected_answer: str


class CalculatorVerifyResponse(CalculatorVerifyRequest, BaseVerifyResponse):
    """The request, plus the reward and its parts. Numeric fields are what Gym and trl-gym average as metrics."""

    success: float
    call_correct: float


class CalculatorServer(SimpleResourcesServer):
    config: CalculatorConfig

    def setup_webserver(self) -> FastAPI:
        app = super().setup_webserver()
        app.post("/add")(self.add)
        app.post("/subtract")(self.subtract)
        return app

    # The body of a tool's answer, as it is, becomes the tool message that the model reads. Arguments are typed `Any`
    # and checked by `run_tool`: a pydantic model here would answer a malformed call with a long 422 that repeats
    # whatever the model wrote, and Gym would log each one.

    async def add(self, arguments: Annotated[Any, Body()] = None) -> Any:
        return run_tool("add", arguments)

    async def subtract(self, arguments: Annotated[Any, Body()] = None) -> Any:
        return run_tool("subtract", arguments)

    async def verify(self, body: CalculatorVerifyRequest) -> CalculatorVerifyResponse:
        result = score(
            [item.model_dump() for item in body.response.output],
            body.expected_tool,
            body.expected_arguments,
            body.expected_answer,
        )
        return CalculatorVerifyResponse(
            **body.model_dump(), reward=result.reward, success=result.success, call_correct=result.call_correct
        )


if __name__ == "__main__":
    CalculatorServer.run_webserver()
