"""The section of the model card about environments, servers and results.

TRL writes the card, at each checkpoint and in `push_to_hub`; `GymGRPOTrainer.create_model_card` puts the section into
it. Everything in it is known after `close`, when servers are gone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trl_gym

if TYPE_CHECKING:
    from trl_gym.config import GymGRPOConfig

_BEFORE = "### Framework versions"  # TRL's heading; the section stands in front of it, or at the end
_ENVIRONMENT = re.compile(r"(?:eval_)?gym/(?P<agent>[^/]+)/reward")
# Beside the reward and success of every environment and every evaluation.
_RESULTS = ("reward", "success", "rollouts/failed_fraction", "rollouts/drift_fraction", "logprob_gap/mean")
_RESULT = re.compile(r"(?:eval_(?:\w+_)?)?(?:gym/[^/]+/)?(?:reward|success|pass@\d+|mean@\d+)")


def describe(settings: Mapping[str, str], history: Sequence[Mapping[str, Any]]) -> str:
    """Return the section as Markdown, ending with an empty line.

    Args:
        settings: Rows of the first table, in order.
        history: Logged objects with `step`, in order, as `TrainerState.log_history`.
    """
    environments = ", ".join(f"`{name}`" for name in environments_of(history))
    rows = {"Environments": environments or "none logged", **settings}
    lines = ["### Environments and rollouts", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    if results := list(_results(history)):
        lines += ["", "| metric | first | last | at step |", "|---|---|---|---|"]
        lines += [f"| `{name}` | {first:.4g} | {last:.4g} | {step} |" for name, first, last, step in results]
    return "\n".join([*lines, "", ""])


def add_section(path: Path, section: str) -> None:
    """Put the section into a card of TRL: in front of the versions, or at the end of a card that has none."""
    card = path.read_text(encoding="utf-8")
    before, heading, after = card.partition(_BEFORE)
    card = f"{before}{section}{heading}{after}" if heading else f"{card.rstrip()}\n\n{section}"
    path.write_text(card, encoding="utf-8")


def environments_of(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the agents that rewards were logged of, by name."""
    matches = (_ENVIRONMENT.fullmatch(name) for logged in history for name in logged)
    return sorted({match["agent"] for match in matches if match is not None})


def _results(history: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float, float, int]]:
    """Yield metric, first and last number and step of the last for what tells how a run went; training first."""
    series: dict[str, list[tuple[float, int]]] = {}
    for logged in history:
        for name, value in logged.items():
            is_shown = name in _RESULTS or _RESULT.fullmatch(name)
            if is_shown and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, []).append((float(value), int(logged.get("step", 0))))
    for name in sorted(series, key=lambda name: (name.startswith("eval_"), name)):
        values = series[name]
        yield name, values[0][0], values[-1][0], values[-1][1]


def settings_of(args: GymGRPOConfig, *, num_steps: int, source: Mapping[str, str]) -> dict[str, str]:
    """Return the rows of the first table.

    Args:
        args: The run's configuration.
        num_steps: Optimizer steps that were made.
        source: What the source of rollouts says about itself (`RolloutSource.describe`).
    """
    return {
        "Optimizer steps": str(num_steps),
        "Rollouts per task": str(args.num_generations),
        "Sampling": f"temperature {args.temperature:g}, top_p {args.top_p:g}, "
        f"at most {args.max_completion_length} tokens after the first prompt",
        "Drift policy": f"`{args.gym_drift}`",
        **source,
        "trl-gym": trl_gym.__version__,
    }


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
