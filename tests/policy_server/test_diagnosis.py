"""The line of vLLM's log that says why it ended. The logs are excerpts of real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_gym.policy_server.server import find_cause, remedy_for, would_die_again

ENGINE = """
(EngineCore pid=7) ERROR 11-22 13:10:48 [core.py:1433] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-22 13:10:48 [core.py:1433] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-22 13:10:48 [core.py:1433]     raise ValueError(
(EngineCore pid=7) ERROR 11-22 13:10:48 [core.py:1433] ValueError: No available memory for the cache blocks. Try more.
Traceback (most recent call last):
    raise RuntimeError(
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
ARGPARSE = """
                                       [--dtype {auto,half}]
python -m trl_gym.policy_server: error: unrecognized arguments: --no-such-flag 3
"""
PYDANTIC = """
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, Model architectures ['FooForCausalLM'] are not supported for now. [type=value_error, input_value=X]
    For further information visit https://errors.pydantic.dev/2.14/v/value_error
"""


@pytest.mark.parametrize(
    ("log", "cause", "remedy"),
    [
        (ENGINE, "ValueError: No available memory for the cache blocks. Try more.", "give the KV cache more memory"),
        (ARGPARSE, "unrecognized arguments: --no-such-flag 3", "this engine does not know"),
        (
            PYDANTIC,
            "Model architectures ['FooForCausalLM'] are not supported for now.",
            "cannot serve the architecture",
        ),
        ("error: invalid tool call parser: nope (chose from { hermes })", "nope", "--tool-parser-plugin"),
        ("OSError: [Errno 98] Address already in use", "Address already in use", "leave it at 0"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", "CUDA out of memory", "gpu-memory-utilization"),
        ("ValueError: Invalid weight transfer backend: file. Available", "backend: file", "VLLM_PLUGINS"),
        ("KeyError: 'something new'", "KeyError: 'something new'", ""),
        (f"json.decoder.JSONDecodeError: {{\nvllm.EngineDeadError: {(ends := 'EngineCore encountered')}", ends, ""),
    ],
)
def test_cause_and_remedy(log: str, cause: str, remedy: str) -> None:
    found = find_cause(log)
    assert cause in found
    assert "[type=" not in found
    assert remedy in remedy_for(found) if remedy else remedy_for(found) == ""


def test_a_log_without_an_error_has_no_cause() -> None:
    assert find_cause("INFO all is well\nno Error here\njson.decoder.JSONDecodeError: a call\n") == ""


@pytest.mark.parametrize(
    ("log", "lasts"),
    [
        (ARGPARSE, True),
        (PYDANTIC, True),
        (ENGINE, False),
        ("OSError: [Errno 98] Address already in use", False),
        ("torch.OutOfMemoryError: CUDA out of memory. Model and tokenizer use 70 GiB", False),
        ("killed, without a word", False),
    ],
)
def test_memory_and_ports_may_be_free_again_and_flags_stay_wrong(tmp_path: Path, log: str, lasts: bool) -> None:
    path = tmp_path / "log"
    path.write_text(f"INFO loading tokenizer\n{log}\n")
    assert would_die_again(path) is lasts
