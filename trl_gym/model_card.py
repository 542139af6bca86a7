"""The model card: a section about environments, servers and results, and names for what TRL calls "None".

TRL writes the card, at each checkpoint and in `push_to_hub`; `GymGRPOTrainer.create_model_card` completes it. All that
this takes is known after `close`, when servers are gone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trl_gym
from trl_gym.rollout_options import Sampling

if TYPE_CHECKING:
    from transformers import TrainerState

    from trl_gym.config import GymGRPOConfig

_BEFORE = "### Framework versions"  # TRL's heading; the section stands in front of it, or at the end
_NO_BASE = "[None](https://huggingface.co/None)"  # TRL's words for a base model that is not on the Hub
_NO_REPOSITORY = 'model="None"'  # and for a model that has not been pushed
_ENVIRONMENT = re.compile(r"(?:eval_)?gym/(?P<agent>[^/]+)/reward")
_SHOWN = ("temperature", "top_p")  # of the sampling, also where they are as by default
# Beside the reward and success of every environment and every evaluation.
_RESULTS = ("reward", "success", "rollouts/failed_fraction", "rollouts/drift_fraction", "logprob_gap/mean")
_RESULT = re.compile(r"(?:eval_(?:\w+_)?)?(?:gym/[^/]+/)?(?:reward|success|pass@\d+|mean@\d+|reward_components/.+)")


def complete(args: GymGRPOConfig, state: TrainerState, *, base: str, source: Mapping[str, str]) -> None:
    """Rewrite the card that TRL has written into `output_dir`."""
    output_dir = Path(args.output_dir)
    checkpoint, path = output_dir / f"checkpoint-{state.global_step}", output_dir / "README.md"
    card = completed(
        path.read_text(encoding="utf-8"),
        describe(settings_of(args, num_steps=state.global_step, source=source), state.log_history),
        base=base,
        folder=str(checkpoint if checkpoint.exists() else output_dir),
    )
    path.write_text(card, encoding="utf-8")


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


def completed(card: str, section: str, *, base: str, folder: str) -> str:
    """Return a card of TRL with the section, in front of the versions, or at the end of a card that has none.

    Args:
        card: The card. TRL names the base model and the repository only where they are on the Hub.
        section: The value of `describe`.
        base: Hub id or folder that the base model was loaded from; may be empty.
        folder: What loads the model as long as it is in no repository.
    """
    own = f"the local model `{Path(base).name}`" if base else "a model that was made from a configuration"
    card = card.replace(_NO_BASE, own).replace(_NO_REPOSITORY, f'model="{folder}"')
    before, heading, after = card.partition(_BEFORE)
    return f"{before}{section}{heading}{after}" if heading else f"{card.rstrip()}\n\n{section}"


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
        num_steps: Optimizer steps that were made.
        source: What the source of rollouts says about itself (`RolloutSource.describe`).
    """
    sampling = asdict(args.rollout_options.sampling)
    shown = {name: value for name, value in sampling.items() if name in _SHOWN or value != asdict(Sampling())[name]}
    limit = f"at most {args.max_completion_length} tokens after the first prompt"
    drawn = {"Sampling": ", ".join([*(f"{name} {value:g}" for name, value in shown.items()), limit])}
    return {
        "Optimizer steps": str(num_steps),
        "Rollouts per task": str(args.num_generations),
        **(drawn if args.gym_replay is None else {}),  # recorded rollouts were drawn as their own run says
        **_rewarded(args),
        "Drift policy": f"`{args.gym_drift}`",
        **source,
        "trl-gym": trl_gym.__version__,
    }


def _rewarded(args: GymGRPOConfig) -> dict[str, str]:
    if not args.gym_reward_components:
        return {}
    weights: dict[str, float] = args.reward_weights if isinstance(args.reward_weights, dict) else {}
    named = ", ".join(f"`{name}` {weight:g}" for name, weight in weights.items()) or "1 for each"
    return {"Rewards": f"components, `{args.multi_objective_aggregation}`, weights {named}"}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
