"""What a server says about itself, asked once; and which weights it holds, asked again when they change."""

from __future__ import annotations

import asyncio
from typing import Any

from trl_gym.policy_server.inner import AnsweredError, Inner

_NOT_FOUND = 404


class ServerFacts:
    """Cached facts about the wrapped server."""

    def __init__(self) -> None:
        self._facts: dict[str, Any] | None = None
        self._version: str | None = None
        self._has_versions = True
        self._num_changes = 0

    async def all(self, inner: Inner) -> dict[str, Any]:
        """`vllm_version`, `max_model_len` and `model_names` (of the model itself, adapters have others)."""
        if self._facts is None:
            models, version = await asyncio.gather(
                inner.ask_json("GET", "/v1/models"), inner.ask_json("GET", "/version")
            )
            self._facts = {
                "vllm_version": version["version"],
                "max_model_len": models["data"][0]["max_model_len"],
                "model_names": [model["id"] for model in models["data"] if model.get("parent") is None],
            }
        return self._facts

    async def max_model_len(self, inner: Inner) -> int:
        return (await self.all(inner))["max_model_len"]

    async def weight_version(self, inner: Inner) -> str | None:
        """The version of the weights; None for a server that has none (stock vLLM outside development mode)."""
        if self._version is not None or not self._has_versions:
            return self._version
        changes = self._num_changes
        try:
            version = str((await inner.ask_json("GET", "/weight_info"))["weight_version"])
        except AnsweredError as answered:
            if answered.reply.status != _NOT_FOUND:
                raise
            self._has_versions = False
            return None
        if changes == self._num_changes:  # else it may be the old one: an update ended while we asked
            self._version = version
        return version

    def weights_changed(self) -> None:
        """Ask for the version again before anybody can hear that the new one is there."""
        self._version = None
        self._num_changes += 1
