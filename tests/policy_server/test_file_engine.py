"""The `file` weight transfer engine without a server; what it does to a model is tested in `tests/e2e`."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow  # imports vLLM

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def test_register_twice() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from trl_gym.policy_server.vllm_plugin import register

    register()
    register()
    engine = WeightTransferEngineFactory._registry["file"]()
    assert engine.__name__ == "FileWeightTransferEngine"


def test_parts_of_packed_modules_are_missed() -> None:
    from trl_gym.policy_server.file_engine import missing_parts

    whole = {f"layers.{i}.attn.{part}.weight" for i in range(2) for part in PACKED["qkv_proj"]} | {"norm.weight"}
    assert missing_parts(whole, PACKED) == []
    partial = whole - {"layers.1.attn.k_proj.weight", "layers.1.attn.v_proj.weight"}
    assert missing_parts(partial, PACKED) == ["layers.1.attn.k_proj.weight", "layers.1.attn.v_proj.weight"]
    assert missing_parts({"norm.weight"}, PACKED) == []


def test_update_info_is_one_path() -> None:
    from trl_gym.policy_server.file_engine import FileWeightTransferEngine

    engine = FileWeightTransferEngine.__new__(FileWeightTransferEngine)
    assert engine.parse_update_info({"path": "/dev/shm/w"}).path == "/dev/shm/w"
    with pytest.raises(ValueError, match="update_info"):
        engine.parse_update_info({"paths": []})
