"""A resources server whose tool and verifier do what the row's `fault` says."""

import asyncio
import json
from typing import Any

from fastapi import FastAPI, Request, Response
from nemo_gym.base_resources_server import (
    BaseResourcesServerConfig,
    BaseSeedSessionRequest,
    BaseSeedSessionResponse,
    BaseVerifyRequest,
    BaseVerifyResponse,
    SimpleResourcesServer,
)
from nemo_gym.server_utils import SESSION_ID_KEY
from pydantic import Field

SLOW_S = 6.0


class FaultySeedRequest(BaseSeedSessionRequest):
    fault: str | None = None


class FaultyVerifyRequest(BaseVerifyRequest):
    fault: str | None = None


class FaultyServer(SimpleResourcesServer):
    config: BaseResourcesServerConfig
    fault_of: dict[str, str | None] = Field(default_factory=dict)

    def setup_webserver(self) -> FastAPI:
        app = super().setup_webserver()
        app.post("/add")(self.use_tool)
        app.post("/subtract")(self.use_tool)
        return app

    async def seed_session(self, request: Request, body: FaultySeedRequest) -> BaseSeedSessionResponse:
        self.fault_of[request.session[SESSION_ID_KEY]] = body.fault
        if body.fault == "hang":  # every time, whatever the policy samples
            await asyncio.Event().wait()
        return BaseSeedSessionResponse()

    async def use_tool(self, request: Request) -> Any:
        fault = self.fault_of.get(request.session[SESSION_ID_KEY])
        if fault == "sleep":
            await asyncio.Event().wait()
        if fault == "slow":
            await asyncio.sleep(SLOW_S)
        return 83

    async def verify(self, request: Request, body: FaultyVerifyRequest) -> BaseVerifyResponse:
        answer = body.model_dump()
        if body.fault == "raise":
            raise ValueError("the verifier tripped")
        if body.fault == "garbage":
            return Response(b"<html>garbage", media_type="application/json")
        if body.fault == "missing":
            return Response(json.dumps({"fine": True}), media_type="application/json")
        if body.fault == "nan":
            return Response(json.dumps(answer | {"reward": float("nan")}), media_type="application/json")
        if body.fault == "mask":
            return Response(json.dumps(answer | {"reward": 1.0, "mask_sample": True}), media_type="application/json")
        return BaseVerifyResponse(**answer, reward=0.25)


if __name__ == "__main__":
    FaultyServer.run_webserver()
