"""Notebook helpers: rollouts from a cell, a rollout as a conversation, its tokens in colour.

    records = roll_out("validation.jsonl", policy=policy, gym=gym, output_dir="runs/look", num_generations=4)
    show_conversation(records[0])
    show_tokens(records[0], tokenizer)

Whatever a policy, a tool or a verifier wrote is escaped: it is text in a notebook, never markup. A whole run is shown
by `trl_gym.report.show`.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from trl_gym.commands.collect import collect, counted, shown_progress, speaker
from trl_gym.commands.rollout_flags import CollectOptions, NamedFile
from trl_gym.given import home_path
from trl_gym.gym.servers import GymServers
from trl_gym.policy_server.server import PolicyBackend
from trl_gym.responses import input_items, output_items, read_item
from trl_gym.rollout_options import RolloutOptions, Sampling
from trl_gym.rollouts.journal import read_journal
from trl_gym.rollouts.rollout import recorded_rows

Record = Mapping[str, Any]  # a line of the journal, see `rollouts.rollout.journal_record`

_SAMPLED, _GIVEN, _PROMPT = "#8fd3a6", "#f3c98b", "#d5d8de"  # as text colour black stays legible on each
_FRAME = "border:1px solid #8886;border-radius:6px;padding:.5em .8em;margin:.3em 0;max-width:60em"
_WHO = {"call": "policy calls", "result": "tool answers", "reasoning": "policy thinks"}
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere"


class Decoder(Protocol):
    """A tokenizer of `transformers` or `tokenizers`."""

    def decode(self, ids: list[int], /) -> str: ...


@dataclass(frozen=True, slots=True)
class HtmlView:
    """A notebook displays it as the last value of a cell."""

    document: str  # a fragment of HTML without scripts
    text: str  # the same for a terminal

    def _repr_html_(self) -> str:
        return self.document

    def __repr__(self) -> str:
        return self.text


def roll_out(
    dataset: str | Path,
    *,
    policy: PolicyBackend,
    gym: GymServers,
    output_dir: str | Path,
    num_generations: int = 1,
    limit: int | None = None,
    temperature: float = 1.0,
    max_tokens: int = 4096,
    deadline_s: float = 600.0,
) -> list[dict[str, Any]]:
    """Roll a dataset out without training, as `trl-gym rollout` does. The same cell again runs only what is missing.

    Args:
        dataset: A Gym JSONL file.
        policy: A ready server.
        gym: A ready NeMo Gym that sends its model calls to `policy`.
        output_dir: Gets the journal.
        num_generations: Rollouts per row.
        limit: Rows at most; None for all.
        temperature: Temperature of every model call.
        max_tokens: Tokens that a conversation of a rollout may have after its first prompt.
        deadline_s: Seconds that a rollout may take.

    Returns:
        The line of the journal that counts for each rollout, by task and member.

    Raises:
        ConfigError: An option or the file is wrong, or `output_dir` holds rollouts of something else.
        ServerError: A server does not answer, or died.
        InterruptedCollectionError: The cell was interrupted; what has ended is in the journal.
    """
    path = Path(home_path(dataset))
    options = CollectOptions(
        mode="rollout",
        datasets=[NamedFile(path.stem, path)],
        output_dir=Path(home_path(output_dir)),
        base_url=",".join(policy.base_urls),
        model=policy.model_name,
        api_key=policy.client.api_key,
        head_url=gym.head_url,
        limit=limit,
        num_generations=num_generations,
        rollouts=RolloutOptions(
            sampling=Sampling(temperature=temperature), max_completion_length=max_tokens, deadline=deadline_s
        ),
    )
    # Plain lines: rich's own would each be an output of their own, and a kernel says that it is a terminal.
    console = Console(force_jupyter=False, force_terminal=False)
    with shown_progress(console) as progress:
        collected = collect(options, say=speaker(console), progress=progress)
    return counted(read_journal(options.journal_dir), collected.jobs, dict)


def messages_of(record: Record) -> Iterator[tuple[str, str]]:
    """Yield the conversation of a rollout as `(who, text)`: the task's messages, then everything that happened."""
    for said in map(read_item, input_items(record["row"])):
        yield said.role, said.text
    for said in map(read_item, output_items(record)):
        yield _WHO.get(said.kind, "policy"), f"{said.name}({said.text})" if said.kind == "call" else said.text


def show_conversation(record: Record) -> HtmlView:
    """Show one rollout as a conversation, with its reward, or the reason why it has none.

    Args:
        record: A line of the journal.
    """
    failure = record.get("failure")
    verdict = f"failed ({failure['kind']}): {failure['text']}" if failure else f"reward {record['reward']:g}"
    parts = record.get("reward_components") or {}
    if parts:
        verdict += "  (" + ", ".join(f"{name} {_shown(value)}" for name, value in parts.items()) + ")"
    said = [*messages_of(record), ("verifier", verdict)]
    rows = "".join(
        f'<div style="{_TEXT};background:{_background(who)};color:black;padding:.2em .5em;margin:.2em 0">'
        f"<b>{html.escape(who)}</b> {html.escape(text)}</div>"
        for who, text in said
    )
    return HtmlView(f'<div style="{_FRAME}">{rows}</div>', "\n".join(f"{who}: {text}" for who, text in said))


def show_tokens(record: Record, tokenizer: Decoder) -> HtmlView:
    """Show the token sequences that are trained on, one for each row, coloured by the environment mask.

    Green tokens were sampled by the policy and are trained, orange ones were put there by the environment, grey ones
    are the prompt. The tooltip of a green one is its id and its sampling log-probability in nats.

    Args:
        record: A line of the journal. One that failed has no tokens.
        tokenizer: The policy's tokenizer.
    """
    rows = recorded_rows(record)
    masks = [mask for row in rows for mask in row["env_mask"]]
    num_prompt = sum(len(row["prompt_ids"]) for row in rows)
    counts = f"{num_prompt} prompt, {masks.count(1)} sampled (trained), {masks.count(0)} environment"
    legend = " ".join(
        f'<span style="background:{colour};color:black;padding:0 .4em">{name}</span>'
        for name, colour in (("prompt", _PROMPT), ("sampled, trained", _SAMPLED), ("environment", _GIVEN))
    )
    bodies = [_row(row, tokenizer) for row in rows] or ["no tokens: this rollout is not trained on"]
    style = f"{_TEXT};font-family:monospace;line-height:1.9;margin-top:.5em"
    body = "".join(f'<div style="{style}">{own}</div>' for own in bodies)
    text = "\n".join(tokenizer.decode([*row["prompt_ids"], *row["completion_ids"]]) for row in rows)
    return HtmlView(f'<div style="{_FRAME}"><div>{legend} &nbsp; {counts}</div>{body}</div>', f"{counts}: {text}")


def _row(row: Record, tokenizer: Decoder) -> str:
    pieces = [_token(tokenizer.decode([token]), _PROMPT, f"{token}: prompt") for token in row["prompt_ids"]]
    for token, mask, logprob in zip(row["completion_ids"], row["env_mask"], row["logprobs"], strict=True):
        told = f"{token}: sampled, log p = {logprob:.4f}" if mask else f"{token}: environment"
        pieces.append(_token(tokenizer.decode([token]), _SAMPLED if mask else _GIVEN, told))
    return "".join(pieces)


def _token(text: str, colour: str, told: str) -> str:
    shown = html.escape(text).replace("\n", "↵\n")
    return f'<span style="background:{colour};color:black;margin-right:1px" title="{html.escape(told)}">{shown}</span>'


def _background(who: str) -> str:
    if who == "verifier":
        return "#c9d8f5"
    return _SAMPLED if who.startswith("policy") else _GIVEN if who.startswith("tool") else _PROMPT


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
