"""What vLLM loads in each of its processes (entry point `vllm.general_plugins`): the `file` weight transfer engine."""

from __future__ import annotations

from trl_gym.policy_server.orphans import end_with_parent

ENGINE_NAME = "file"


def register() -> None:
    """Register the engine. vLLM may call this several times in one process."""
    end_with_parent()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    # `_registry` is private; the public function has no "if not there yet", and its ValueError does not say which
    # engine is registered under the name.
    if ENGINE_NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            ENGINE_NAME, "trl_gym.policy_server.engine.file_engine", "FileWeightTransferEngine"
        )
