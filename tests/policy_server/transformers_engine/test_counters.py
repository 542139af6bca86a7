"""An engine's counts are read like vLLM's."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from trl_gym.policy_server.transformers_engine.counters import EngineCounters
from trl_gym.policy_server.transformers_engine.engine import Completion
from trl_gym.rollouts.engine_metrics import engine_metrics, parse_counters


@given(st.text(alphabet='a/-"\\\n{},', max_size=8))
def test_the_metrics_of_a_phase(model_name: str) -> None:
    counters = EngineCounters()
    before = parse_counters([counters.prometheus(model_name)], at=1.0)
    counters.add(30, Completion([1] * 20, [0.0] * 20, "stop", 1, queue_s=1.0, first_token_s=0.5, decode_s=1.5))
    counters.generation_tokens += 20
    after = parse_counters([counters.prometheus(model_name)], at=11.0)
    assert engine_metrics(before, after) == {  # what transformers does not tell is missing
        "engine/prompt_tokens_per_second": 3.0,
        "engine/generation_tokens_per_second": 2.0,
        "engine/running": 0.2,
        "engine/waiting": 0.1,
    }
