"""An OpenAI server without a model: answers at once, with tool calls and the token bundle that Gym trains on.

It behaves as the policy server does where it matters to Gym: a prompt of a later turn starts with every token seen
before, `choices[0].message` carries `prompt_token_ids`, `generation_token_ids` and `generation_log_probs`. The first
turn calls the first tool with made-up arguments that fit its schema; the turn after a tool result answers in words.

    python tests/gym/fake_policy.py PORT        # 0: a free one; prints the base URL
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

from aiohttp import web

ANSWER = "The answer is \\boxed{A}."
NUM_FRESH_TOKENS = 24  # tokens of a prompt, or of its tail after a tool result
NUM_GENERATED_TOKENS = 12


def example_value(schema: dict[str, Any]) -> Any:
    """The smallest value that a JSON schema accepts, as far as tool schemas of examples need it."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "string")
    if isinstance(kind, list):
        kind = kind[0]
    if kind == "object":
        return {name: example_value(schema["properties"][name]) for name in schema.get("required", [])}
    if kind == "array":
        return [example_value(schema.get("items", {}))]
    return {"integer": 1, "number": 1.0, "boolean": True, "null": None}.get(kind, "x")


def prompt_ids(messages: list[dict[str, Any]]) -> list[int]:
    """Token ids [T] that start with those of the newest message that carries any."""
    for message in reversed(messages):
        if message.get("generation_token_ids"):
            seen = message["prompt_token_ids"] + message["generation_token_ids"]
            return seen + list(range(len(seen), len(seen) + NUM_FRESH_TOKENS))
    return list(range(NUM_FRESH_TOKENS))


def reply(body: dict[str, Any]) -> dict[str, Any]:
    """The assistant message, bundle included."""
    messages, tools = body["messages"], body.get("tools") or []
    prompt = prompt_ids(messages)
    generated = list(range(len(prompt), len(prompt) + NUM_GENERATED_TOKENS))
    message: dict[str, Any] = {
        "role": "assistant",
        "content": ANSWER,
        "prompt_token_ids": prompt,
        "generation_token_ids": generated,
        "generation_log_probs": [-0.5] * len(generated),
    }
    if tools and not any(m["role"] == "tool" for m in messages):
        function = tools[0]["function"]
        arguments = json.dumps(example_value(function.get("parameters") or {"type": "object"}))
        message["content"] = None
        message["tool_calls"] = [
            {"id": "call_0", "type": "function", "function": {"name": function["name"], "arguments": arguments}}
        ]
    return message


class FakePolicy:
    """Async context manager around a running fake.

    Args:
        port: 0 for a free one.
        reply: From the body of a chat completion to the assistant message, with or without the token bundle.

    Attributes:
        requests: Bodies of the chat completions received so far.
        base_url: What Gym's `policy_base_url` has to be.
    """

    def __init__(self, port: int = 0, reply: Callable[[dict[str, Any]], dict[str, Any]] = reply) -> None:
        self.requests: list[dict[str, Any]] = []
        self.base_url = ""
        self._port = port
        self._reply = reply

    async def __aenter__(self) -> FakePolicy:
        app = web.Application(client_max_size=64 * 1024**2)
        app.router.add_post("/v1/chat/completions", self._chat_completions)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        port = self._runner.addresses[0][1]
        self.base_url = f"http://127.0.0.1:{port}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _chat_completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        message = self._reply(body)
        num_prompt, num_generated = (len(message.get(f"{part}_token_ids", ())) for part in ("prompt", "generation"))
        usage = {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
        }
        finish_reason = "tool_calls" if "tool_calls" in message else "stop"
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        return web.json_response(
            {
                "id": "chatcmpl-fake",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [choice],
                "usage": usage,
                "weight_version": "0",
            }
        )


async def serve(port: int) -> None:
    async with FakePolicy(port) as policy:
        sys.stdout.write(f"{policy.base_url}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
