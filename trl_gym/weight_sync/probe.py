"""Does the server compute what the trainer computes? Asked by behaviour, not by status codes.

An update can be answered with 200 and still not arrive: wrong names are skipped, tied embeddings keep an old copy, a
cache survives. So the log-probabilities of one fixed batch of tokens are computed on both sides and compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trl_gym.errors import WeightMismatchError

if TYPE_CHECKING:
    import torch

_NUM_PROBES = 4
_PROBE_TOKENS = 48


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Result of one comparison.

    Attributes:
        mean_gap: Mean absolute difference of log-probabilities, in nats.
        max_gap: Largest absolute difference, in nats.
        num_tokens: Tokens compared.
    """

    mean_gap: float
    max_gap: float
    num_tokens: int


def probe_batch(vocab_size: int, prompts: Sequence[Sequence[int]] = (), seed: int = 0) -> list[list[int]]:
    """A fixed batch of token sequences, `[4][48]`.

    Args:
        vocab_size: Ids are drawn below it.
        prompts: Token sequences to begin with (real prompts exercise the part of the weights that matters); cut or
            filled up with random ids.
        seed: For the random ids.
    """
    import random

    rng = random.Random(seed)
    batch = []
    for index in range(_NUM_PROBES):
        start = list(prompts[index][:_PROBE_TOKENS]) if index < len(prompts) else []
        batch.append(start + [rng.randrange(vocab_size) for _ in range(_PROBE_TOKENS - len(start))])
    return batch


def trainer_logprobs(model: torch.nn.Module, batch: Sequence[Sequence[int]]) -> list[list[float]]:
    """log p(token t | tokens before it) at temperature 1, `[N][T - 1]`. Every rank calls it (FSDP gathers inside)."""
    import torch

    ids = torch.tensor(batch, device=next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    finally:
        model.train(was_training)
    return torch.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None]).squeeze(2).tolist()


def compare(trainer: Sequence[Sequence[float]], server: Sequence[Sequence[float]]) -> ProbeReport:
    """Differences between the two sides; both `[N][T - 1]`."""
    gaps = [abs(a - b) for left, right in zip(trainer, server, strict=True) for a, b in zip(left, right, strict=True)]
    return ProbeReport(mean_gap=sum(gaps) / len(gaps), max_gap=max(gaps), num_tokens=len(gaps))


def require_agreement(report: ProbeReport, tolerance: float, *, version: str) -> None:
    """Stop when the server does not hold what was sent.

    Raises:
        WeightMismatchError: The mean gap is above `tolerance` (nats).
    """
    if report.mean_gap <= tolerance:
        return
    raise WeightMismatchError(
        f"After weight version {version} was sent, the policy server's log-probabilities differ from the trainer's by "
        f"{report.mean_gap:.4f} nats on average (at most {report.max_gap:.3f}, {report.num_tokens} tokens); "
        f"{tolerance} is allowed. The weights did not arrive as they were sent, or the two compute in different "
        "precisions. Check that the server serves this model (architecture, tokenizer, no quantization), compare its "
        "dtype with the trainer's, and raise `gym_probe_tolerance` only if the gap is explained by precision."
    )
