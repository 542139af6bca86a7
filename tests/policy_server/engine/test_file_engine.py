"""The `file` weight transfer engine without a server; what it does to a model is tested in `tests/e2e`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # imports vLLM

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def new_engine() -> Any:
    from trl_gym.policy_server.engine.file_engine import FileWeightTransferEngine

    return FileWeightTransferEngine.__new__(FileWeightTransferEngine)


def test_register_twice() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from trl_gym.policy_server.engine.plugin import register

    register()
    register()
    engine = WeightTransferEngineFactory._registry["file"]()
    assert engine.__name__ == "FileWeightTransferEngine"


def test_parts_of_packed_modules_are_missed() -> None:
    from trl_gym.policy_server.engine.file_engine import missing_parts

    whole = {f"layers.{i}.attn.{part}.weight" for i in range(2) for part in PACKED["qkv_proj"]} | {"norm.weight"}
    assert missing_parts(whole, PACKED) == []
    partial = whole - {"layers.1.attn.k_proj.weight", "layers.1.attn.v_proj.weight"}
    assert missing_parts(partial, PACKED) == ["layers.1.attn.k_proj.weight", "layers.1.attn.v_proj.weight"]
    assert missing_parts({"norm.weight"}, PACKED) == []


def test_an_update_is_a_path_and_whether_it_is_a_part() -> None:
    engine = new_engine()
    assert engine.parse_update_info({"path": "/dev/shm/w"}).partial is False
    assert engine.parse_update_info({"path": "/dev/shm/w", "partial": True}).partial is True
    for wrong in ({}, {"paths": []}):  # the first one ends an update that was begun, see `abandon_weight_update`
        with pytest.raises(ValueError, match="update_info"):
            engine.parse_update_info(wrong)


def test_only_the_file_with_the_secret_proves_that_it_is_the_trainers(tmp_path: Path) -> None:
    engine = new_engine()
    probe = tmp_path / "probe"
    probe.write_text("secret")

    def connect(**info: str) -> None:
        engine.init_transfer_engine(engine.parse_init_info(info))

    connect()  # nothing to prove
    connect(probe=str(probe), secret="secret")
    with pytest.raises(ValueError, match="is another file here"):
        connect(probe=str(probe), secret="other.")
    with pytest.raises(FileNotFoundError):
        connect(probe=str(tmp_path / "missing"), secret="secret")


def test_a_part_must_have_whole_modules() -> None:
    from trl_gym.policy_server.engine.file_engine import _whole_modules

    expected = {"layers.0.norm.weight", "layers.0.proj.weight", "layers.0.proj.bias", "layers.1.proj.weight"}
    assert _whole_modules(expected, {"layers.0.proj.weight"}) == {"layers.0.proj.weight", "layers.0.proj.bias"}
    assert _whole_modules(expected, set()) == set()
