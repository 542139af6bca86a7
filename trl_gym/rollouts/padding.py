"""Rows of unequal length: compute them without most of their padding, and choose which of them share a micro-batch.
Pure functions.

TRL pads all prompts of a generation batch on the left to the longest prompt, all completions on the right to the
longest completion, and computes every column of it. But the model is asked about a few rows at a time, and no token
depends on padding: attention masks it, and TRL sets the results there to 0. So (`compute_rows`)

- rows that are scored are computed beside rows of their length, whatever their places in the batch;
- as many columns are computed as the longest of the rows that are computed together has tokens. Each row begins in the
  first one: its tokens have the positions that they had on the policy server, whichever rows are beside it;
- results go back to the places and the width that TRL expects. Divisors, masks and metrics see no difference;
- rows that are hidden whole, as those that fill a batch up are in the loss (`rows.weighted`), are not computed.

A loss that is a sum over rows does not depend on which micro-batch of an optimizer step a row is in, as long as all
have the same number of rows (`rows.py` has the table). There, rows are sorted (`by_length`). Otherwise they stay where
TRL shuffled them:

    bnpo                          divides by the tokens that a micro-batch has
    top_entropy_quantile < 1      a quantile of the entropies in a micro-batch
    entropy_coef                  a mean over the tokens that a micro-batch has
    router loss                   products of means over the tokens that a micro-batch has

An optimizer step, of which there may be several per generation batch, keeps the rows that TRL has drawn for it.
Gradients are equal but for rounding: of sums, and of the angles of positions. TRL counts padding on the left as
positions; a model that has learned them, rather than rotations, is computed here as the policy server computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trl_gym.rollouts.rows import MEAN_OVER_MICRO_BATCH

Results = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Log-probabilities `[B, T]`, entropies `[B, T]`, router loss `[]`."""
Compute = Callable[[torch.Tensor, torch.Tensor, int], Results]
"""(input ids `[B, P + T]`, attention mask `[B, P + T]`, `T`) → results."""


# -- columns ----------------------------------------------------------------------------------------------------------


def compute_rows(
    compute: Compute,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_kept: int,
    *,
    num_rows: int,
    multiple: int = 1,
) -> Results:
    """Return what `compute` returns for all rows, from calls with a few rows of about one length each.

    Args:
        compute: Its results of a token depend on nothing but the tokens before it that the mask shows, and are 0 where
            the mask is 0.
        input_ids: `[B, P + T]`, prompts padded on the left and completions padded on the right.
        attention_mask: `[B, P + T]`. Rows of which it shows nothing are not computed; where there are no others, the
            first is, since every rank computes something.
        num_kept: `T`, width of the completions.
        multiple: Calls have a multiple of so many columns.

    Returns:
        Log-probabilities and entropies `[B, T]`, 0 where the mask is 0; the mean of the router losses.
    """
    width, found = input_ids.shape[1] - num_kept, []
    is_shown = attention_mask.any(1)
    if not is_shown.any():
        is_shown[0] = True
        attention_mask = attention_mask.clone()
        attention_mask[0, width - 1 : width + 1] = 1
    firsts, ends = _ends(attention_mask, width)
    order = sorted(is_shown.nonzero()[:, 0].tolist(), key=lambda row: firsts[row] - ends[row])
    for start in range(0, len(order), num_rows):
        rows = order[start : start + num_rows]
        longest = max(ends[row] - firsts[row] for row in rows)
        size = -(-longest // multiple) * multiple
        prompts = [width - firsts[row] for row in rows]
        at = torch.tensor(rows, device=input_ids.device)[:, None]
        columns = _columns([firsts[row] for row in rows], size, input_ids.device)
        is_inside = columns < input_ids.shape[1]
        columns = columns.clamp(max=input_ids.shape[1] - 1)
        kept = size - min(prompts)
        results = compute(input_ids[at, columns], attention_mask[at, columns] * is_inside, kept)
        found.append([_put_back(values, prompts, num_kept) for values in results[:2]] + [results[2]])
    parts = zip(*found, strict=True)
    logprobs, entropies, router_losses = ([part for part in own if part is not None] for own in parts)
    places = torch.tensor(order, device=input_ids.device)
    return (
        _in_places(logprobs, places, len(is_shown)),
        _in_places(entropies, places, len(is_shown)) if entropies else None,
        torch.stack(router_losses).mean() if router_losses else None,
    )


def _in_places(parts: Sequence[torch.Tensor], places: torch.Tensor, num_rows: int) -> torch.Tensor:
    rows = torch.cat(list(parts))
    return rows.new_zeros(num_rows, rows.shape[1]).index_copy(0, places, rows)


def _ends(attention_mask: torch.Tensor, width: int) -> tuple[list[int], list[int]]:
    """Return the first column of each row that the mask shows, and the one behind the last: a column of the prompt and
    one of the completion, also where those are masked, since TRL slices by the negative width of the completions."""
    shown = (attention_mask != 0).long()
    firsts, behind = shown.argmax(1), attention_mask.shape[1] - shown.flip(1).argmax(1)
    return firsts.clamp(max=width - 1).tolist(), behind.clamp(min=width + 1).tolist()


def _columns(firsts: Sequence[int], size: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(firsts, device=device)[:, None] + torch.arange(size, device=device)


def _put_back(values: torch.Tensor | None, prompts: Sequence[int], num_kept: int) -> torch.Tensor | None:
    """Return `[B, T]` of the last columns of rows that begin with prompts of so many tokens."""
    if values is None:
        return None
    columns = _columns([prompt - min(prompts) for prompt in prompts], num_kept, values.device)
    is_known = columns < values.shape[1]
    return values.gather(1, columns.clamp(max=values.shape[1] - 1)).masked_fill(~is_known, 0)


# -- micro-batches ----------------------------------------------------------------------------------------------------

TOKEN_WEIGHT = "token_weight"


def is_sum_over_rows(
    loss_type: str, *, top_entropy_quantile: float, has_entropy_bonus: bool, has_router_loss: bool
) -> bool:
    """Return whether the loss of an optimizer step is the same whichever of its micro-batches a row is in."""
    of_one_micro_batch = loss_type in MEAN_OVER_MICRO_BATCH or top_entropy_quantile < 1
    return not (of_one_micro_batch or has_entropy_bonus or has_router_loss)


def by_length(micro_batches: Sequence[dict[str, Any]], num_together: int) -> list[dict[str, Any]]:
    """Return micro-batches whose rows are sorted by tokens, longest first, over each `num_together` of them.

    The first one needs the most memory: a run that does not fit fails at once. Ranks have short rows at the same time.

    Args:
        micro_batches: As TRL splits a generation batch: `B` rows each; what is no row has no dimension. With images,
            of which a row may have several, they are returned as they are.
        num_together: How many in succession belong to one optimizer step.
    """
    if any("num_images" in batch for batch in micro_batches):
        return list(micro_batches)
    found = []
    for start in range(0, len(micro_batches), num_together):
        together = micro_batches[start : start + num_together]
        lengths = torch.cat([batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1) for batch in together])
        order = lengths.argsort(descending=True, stable=True).split(len(lengths) // len(together))
        joined = {name: _joined([batch[name] for batch in together]) for name in together[0]}
        found += [{name: _taken(values, rows) for name, values in joined.items()} for rows in order]
    return found


def _joined(values: Sequence[Any]) -> Any:
    if isinstance(values[0], list):
        return [value for own in values for value in own]
    return values[0] if values[0] is None or not values[0].dim() else torch.cat(list(values))


def _taken(values: Any, rows: torch.Tensor) -> Any:
    if isinstance(values, list):
        return [values[row] for row in rows.tolist()]
    return values if values is None or not values.dim() else values[rows]


def num_loss_tokens(micro_batch: dict[str, Any]) -> torch.Tensor:
    """Return how many tokens of a micro-batch are in the loss, `[]`."""
    mask = micro_batch["completion_mask"]
    return (mask if micro_batch.get("tool_mask") is None else mask * micro_batch["tool_mask"]).sum()


def token_weights(num_tokens: torch.Tensor, num_together: int) -> torch.Tensor:
    """Return by how much a mean over a micro-batch's tokens counts, so that the mean of them is one over all tokens.

    Args:
        num_tokens: `[M]`, tokens of each micro-batch, over all ranks.
        num_together: How many in succession belong to one optimizer step.

    Returns:
        `[M]`, 1 on average in each step.
    """
    together = num_tokens.double().view(-1, num_together)
    means = together.mean(1, keepdim=True)
    return torch.where(means > 0, together / means, torch.ones_like(together)).flatten()
