"""Replaces its history by a summary after two turns, and goes on."""

from typing import Any

from common import OwnCallsAgent, OwnCallsRunRequest, first_message


class CompactingAgent(OwnCallsAgent):
    async def converse(self, body: OwnCallsRunRequest) -> list[dict[str, Any]]:
        before = await self.chat(first_message(body), 2, body.own())
        after = await self.chat({"role": "user", "content": f"so far {len(before)}"}, 2, body.own())
        return [*before, *after]


if __name__ == "__main__":
    CompactingAgent.run_webserver()
