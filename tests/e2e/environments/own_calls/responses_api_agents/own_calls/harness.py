"""Runs a harness in a subprocess, with a base URL and a key: the model server's, or its own ones of the policy."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from common import GO_ON, OwnCallsAgent, OwnCallsRunRequest, first_message, run_cli


class HarnessAgent(OwnCallsAgent):
    async def converse(self, body: OwnCallsRunRequest) -> list[dict[str, Any]]:
        url, key = (body.policy_base_url, body.policy_api_key) if body.direct else (self.model_url(), "dummy_key")
        env = {**os.environ, "OPENAI_BASE_URL": str(url), "OPENAI_API_KEY": str(key)}
        script = json.dumps({"messages": [first_message(body)], "go_on": GO_ON, "own": body.own(), "num_turns": 2})
        command = [sys.executable, str(Path(__file__).with_name("cli.py")), script]
        return json.loads(await run_cli(command, env))


if __name__ == "__main__":
    HarnessAgent.run_webserver()
