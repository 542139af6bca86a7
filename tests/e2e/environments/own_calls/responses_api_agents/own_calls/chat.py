"""Calls `/v1/chat/completions` of the model server itself."""

from typing import Any

from common import OwnCallsAgent, OwnCallsRunRequest, first_message


class ChatAgent(OwnCallsAgent):
    async def converse(self, body: OwnCallsRunRequest) -> list[dict[str, Any]]:
        return await self.chat(first_message(body), 2, body.own())


if __name__ == "__main__":
    ChatAgent.run_webserver()
