"""Lets two sub-agents work side by side, and answers with what both said."""

import asyncio
from typing import Any

from common import OwnCallsAgent, OwnCallsRunRequest, first_message


class ParallelAgent(OwnCallsAgent):
    async def converse(self, body: OwnCallsRunRequest) -> list[dict[str, Any]]:
        task = first_message(body)
        parts = [{**task, "content": f"{name}: {task['content']}"} for name in ("one", "two")]
        first, second = await asyncio.gather(*(self.chat(part, 2, body.own()) for part in parts))
        return [*first, *second]


if __name__ == "__main__":
    ParallelAgent.run_webserver()
