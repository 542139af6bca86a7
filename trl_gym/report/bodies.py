"""A line of the journal → what the page shows of one rollout: its conversation, and its tokens.

A sequence is shown token by token without a tokenizer in the browser: the pieces of text are looked up here, once per
token id. The rest is pure.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trl_gym.errors import ConfigError
from trl_gym.responses import Item, input_items, is_tool_error, model_call_indices, output_items, read_item
from trl_gym.rollouts.rollout import recorded_rows

_FRAGMENT = "\ufffd"  # how a decoder writes bytes that are no whole character
_MAX_RUN = 16  # tokens; a character has at most four bytes, longer runs are noise


class Pieces:
    """Text of single tokens.

    Args:
        file: A `tokenizer.json`; None when there is none, then every piece is empty and ids are shown.
    """

    def __init__(self, file: Path | None) -> None:
        self._tokenizer = None if file is None else _tokenizer_of(file)
        # Some decoders drop a leading space at the beginning of a text: pieces are decoded after another token.
        before = self._ids("a")
        anchor = before[-1:]
        self._anchor: list[int] = anchor
        self._whole = self._ids(f"a{_FRAGMENT}")[len(before) :]  # that character itself, which is no fragment
        self._anchor_text = self._decode([*anchor]) if anchor else ""
        self._special = frozenset() if self._tokenizer is None else _special_ids(self._tokenizer)
        self.text: dict[int, str] = {}

    @property
    def is_known(self) -> bool:
        """Tell whether there is a tokenizer."""
        return self._tokenizer is not None

    def add(self, ids: Sequence[int]) -> None:
        """Remember the pieces of these tokens."""
        if self._tokenizer is not None:
            for token in set(ids).difference(self.text):
                self.text[token] = self._piece([token]) or self._tokenizer.id_to_token(token) or f"<token {token}>"

    def special(self) -> list[int]:
        """Return those of the added tokens that are special."""
        return sorted(self._special.intersection(self.text))

    def glyphs(self, ids: Sequence[int]) -> dict[int, str]:
        """Return text by index where tokens are parts of a character: the whole character at the last part, empty text
        at the parts before. Parts that never make a character stay as they are.

        Args:
            ids: Tokens that were added.
        """
        found: dict[int, str] = {}
        if self._tokenizer is None:
            return found
        start = 0
        while start < len(ids):
            if _FRAGMENT not in self.text[ids[start]]:
                start += 1
                continue
            end = self._end_of_glyph(ids, start)
            if end is not None:
                found |= dict.fromkeys(range(start, end - 1), "")
                found[end - 1] = self._piece(ids[start:end])
            start = end or start + 1
        return found

    def _end_of_glyph(self, ids: Sequence[int], start: int) -> int | None:
        if self._whole and list(ids[start : start + len(self._whole)]) == self._whole:
            return start + len(self._whole)
        for end in range(start + 2, min(start + _MAX_RUN, len(ids)) + 1):
            if _FRAGMENT not in self._piece(ids[start:end]):
                return end
            if _FRAGMENT not in self.text[ids[end - 1]]:
                return None
        return None

    def _piece(self, ids: Sequence[int]) -> str:
        text = self._decode([*self._anchor, *ids])
        return text[len(self._anchor_text) :] if text.startswith(self._anchor_text) else self._decode(ids)

    def _ids(self, text: str) -> list[int]:
        return [] if self._tokenizer is None else self._tokenizer.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def _tokenizer_of(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no error of its own
        raise ConfigError(
            f"The tokenizer {file} cannot be read ({error}).",
            "Name another with `--tokenizer`, or leave the tokens out with `--no-tokens`.",
        ) from error


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token for token, content in added.items() if content.special)


# Significant digits of a log-probability, and of its difference to the trainer's, which is small.
_DIGITS, _GAP_DIGITS = 4, 3


class Shared:
    """Values that several rollouts of one chunk have in common, kept once: prompts, tasks, tool lists."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._index: dict[str, int] = {}

    def add(self, value: Any) -> int:
        """Return the index of an equal value, which is added if there is none."""
        text = json.dumps(value, sort_keys=True)
        if text not in self._index:
            self._index[text] = len(self.values)
            self.values.append(value)
        return self._index[text]


def conversation_body(record: Mapping[str, Any], shared: Shared) -> dict[str, Any]:
    """Return what was said, as JSON.

    Returns:
        `input`, `tools`: indices into `shared`. `output`: items `{role, kind, text, turn, …}`. `turns`, `failure`,
        `drift`, `verify`, `components`: as recorded.
    """
    row = record.get("row") or {}
    parameters = row.get("responses_create_params") or {}
    task = {key: value for key, value in row.items() if key != "responses_create_params"}
    return {
        "input": shared.add([_shown(item) for item in input_items(row)]),
        "tools": shared.add(parameters.get("tools") or []),
        "task": shared.add({key: value for key, value in task.items() if not key.startswith("_ng_")}),
        "request": {key: parameters.get(key) for key in ("temperature", "top_p", "max_output_tokens")},
        "output": list(_output(record)),
        "turns": record.get("turns") or [],
        "failure": record.get("failure"),
        "drift": record.get("drift"),
        "verify": record.get("verify"),
        "components": record.get("reward_components") or {},
    }


def token_bodies(
    record: Mapping[str, Any], shared: Shared, pieces: Pieces, training: Sequence[Sequence[float]] = ()
) -> list[dict[str, Any]]:
    """Return what was trained, as JSON, row by row; nothing for a rollout without tokens.

    Args:
        training: `[T]` of each row, the trainer's log-probabilities; shorter or empty where they are not recorded.

    Returns:
        For each row `prompt`: index into `shared` of `[P]` ids. `ids` `[T]`. `mask`: lengths of runs, the first of
        tokens that the environment put there, then alternating. `logprobs` `[S]`, of the sampled tokens alone, and
        `gaps`, by how much the trainer's are higher (null where they are not finite), or null. `ends`: see
        `Trajectory.turn_ends`. `glyphs`, `prompt_glyphs`: text by index where tokens are parts of characters.
    """
    known = itertools.chain(training, itertools.repeat(()))
    return [_token_body(row, shared, pieces, own) for row, own in zip(recorded_rows(record), known, strict=False)]


def _token_body(row: Mapping[str, Any], shared: Shared, pieces: Pieces, training: Sequence[float]) -> dict[str, Any]:
    ids, mask = row["completion_ids"], row.get("env_mask") or []
    prompt, logprobs = row.get("prompt_ids") or [], row.get("logprobs") or []
    gaps = None
    if training and len(training) == len(logprobs):
        gaps = _sampled([ours - theirs for ours, theirs in zip(training, logprobs, strict=True)], mask, _GAP_DIGITS)
    pieces.add(prompt)
    pieces.add(ids)
    return {
        "prompt": shared.add(prompt),
        "ids": ids,
        "mask": run_lengths(mask),
        "logprobs": _sampled(logprobs, mask, _DIGITS),
        "gaps": gaps,
        "ends": row.get("turn_ends") or [],
        "glyphs": pieces.glyphs(ids),
        "prompt_glyphs": pieces.glyphs(prompt),
    }


def run_lengths(mask: Sequence[int]) -> list[int]:
    """Return the lengths of runs of equal values, the first of zeros (0 when the mask starts with a one)."""
    runs = [(value, sum(1 for _ in run)) for value, run in itertools.groupby(mask)]
    lengths = [length for _, length in runs]
    return [0, *lengths] if runs and runs[0][0] == 1 else lengths


def _sampled(values: Sequence[float], mask: Sequence[int], digits: int) -> list[float | None]:
    """Round the values of sampled tokens; None stands for one that is not finite, as in a run that diverged."""
    return [
        float(f"{value:.{digits}g}") if math.isfinite(value) else None
        for value, kept in zip(values, mask, strict=True)
        if kept
    ]


def _output(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the items of the answer, each with the index of the model call that it came from, or None."""
    items = output_items(record)
    for item, turn in zip(items, model_call_indices(items), strict=True):
        yield {**_shown(item), "turn": turn}


def _shown(item: Item) -> dict[str, Any]:
    said = read_item(item)
    shown = {name: value for name, value in asdict(said).items() if value or name == "text"}
    return {**shown, "error": is_tool_error(said.text)} if said.kind == "result" else shown
