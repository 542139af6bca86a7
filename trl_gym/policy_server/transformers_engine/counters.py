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
_HELP = {
    "num_requests_running": ("gauge", "Requests that are sampled or wait for a place in the batch."),
    "num_requests_waiting": ("gauge", "Requests held by a pause."),
    "prompt_tokens_total": ("counter", "Tokens of prompts."),
    "generation_tokens_total": ("counter", "Sampled tokens."),
    "request_success_total": ("counter", "Requests that were answered."),
    "request_aborted_total": ("counter", "Requests whose caller has gone."),
    "request_queue_time_seconds_sum": ("counter", "Seconds until requests were begun."),
    "request_queue_time_seconds_count": ("counter", "Requests in that sum."),
    "request_inference_time_seconds_sum": ("counter", "Seconds from their begin to their last token."),
    "request_inference_time_seconds_count": ("counter", "Requests in that sum."),
}


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
        values = {
            "num_requests_running": self.running,
            "num_requests_waiting": self.held,
            "prompt_tokens_total": self.prompt_tokens,
            "generation_tokens_total": self.generation_tokens,
            "request_success_total": self.requests,
            "request_aborted_total": self.aborted,
            "request_queue_time_seconds_sum": self.queue_s,
            "request_queue_time_seconds_count": self.requests,
            "request_inference_time_seconds_sum": self.inference_s,
            "request_inference_time_seconds_count": self.requests,
        }
        label = model_name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        lines = []
        for name, value in values.items():
            kind, text = _HELP[name]
            lines += [
                f"# HELP vllm:{name} {text}",
                f"# TYPE vllm:{name} {kind}",
                f'vllm:{name}{{engine="0",model_name="{label}"}} {float(value)!r}',
            ]
        return "\n".join(lines) + "\n"
