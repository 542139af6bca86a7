"""Count what an engine does, and show it as vLLM shows its counts: in Prometheus' text format, under vLLM's names.

`rollouts/engine_metrics.py` reads them. What transformers does not tell (tokens found in the prefix cache, requests
that gave up their memory for others) is left out, not shown as zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_gym.policy_server.transformers_engine.engine import Completion

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
# Name without `vllm:`, kind, what it says, and the field of `EngineCounters` that has it.
_METRICS = (
    ("num_requests_running", "gauge", "Requests that are sampled or wait for a place in the batch.", "running"),
    ("num_requests_waiting", "gauge", "Requests held by a pause.", "held"),
    ("prompt_tokens_total", "counter", "Tokens of prompts.", "prompt_tokens"),
    ("generation_tokens_total", "counter", "Sampled tokens.", "generation_tokens"),
    ("request_success_total", "counter", "Requests that were answered.", "requests"),
    ("request_aborted_total", "counter", "Requests whose caller has gone.", "aborted"),
    ("request_queue_time_seconds_sum", "counter", "Seconds until requests were begun.", "queue_s"),
    ("request_queue_time_seconds_count", "counter", "Requests in that sum.", "requests"),
    ("request_inference_time_seconds_sum", "counter", "Seconds from their begin to their last token.", "inference_s"),
    ("request_inference_time_seconds_count", "counter", "Requests in that sum.", "requests"),
)


@dataclass(slots=True)
class EngineCounters:
    """Counts since the engine was made."""

    running: int = 0  # requests that are being sampled now
    held: int = 0  # requests that wait now for the end of a pause
    requests: int = 0  # that were answered
    aborted: int = 0  # that were cancelled
    prompt_tokens: int = 0
    generation_tokens: int = 0
    queue_s: float = 0.0
    inference_s: float = 0.0

    def add(self, num_prompt_tokens: int, completion: Completion) -> None:
        """Count a request that was answered."""
        self.requests += 1
        self.prompt_tokens += num_prompt_tokens
        self.queue_s += completion.queue_s
        self.inference_s += completion.first_token_s + completion.decode_s

    def prometheus(self, model_name: str) -> str:
        """Return them as text."""
        label = model_name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        lines = []
        for name, kind, text, field in _METRICS:
            lines += [
                f"# HELP vllm:{name} {text}",
                f"# TYPE vllm:{name} {kind}",
                f'vllm:{name}{{engine="0",model_name="{label}"}} {float(getattr(self, field))!r}',
            ]
        return "\n".join(lines) + "\n"
