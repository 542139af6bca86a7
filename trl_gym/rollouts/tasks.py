"""Which tasks come next: those that the epoch will bring, and further ones for groups that are replaced.

Neither needs another sampler. `LookAhead` reads the epoch's iterator further than the step takes, and hands what it
read on when its turn comes. `further_tasks` is a stream of its own over the dataset, which follows from the seed and
from the place in the run.
"""

from __future__ import annotations

import itertools
import random
import weakref
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]


class LookAhead:
    """Keeps micro-batches that were read from the epoch's iterator before their turn.

    TRL's data loader yields the whole local generation batch once per micro-step that is made with it: the rows of a
    generation batch are those of its first micro-step, whichever optimizer step that is in. Micro-batches are kept by
    micro-step, since a step may make several generation batches, and a generation batch may last for several steps.

    Reading ahead changes no gradient. An epoch's iterator draws random numbers and synchronizes generators before its
    first batch only. accelerate calls a data loader ended (`end_of_dataloader`) when its last batch is read, which is
    earlier now. Two things ask for it: `Accelerator.accumulate`, which neither transformers nor TRL uses (transformers
    counts micro-steps), and `gather_for_metrics`, by which TRL logs `aux_loss`. A dataset whose rows are drawn when
    they are read, by a transform, draws them earlier.

    Args:
        num_ahead: Generation batches that are known beside the one that is made next. With 0 nothing is read ahead.
        generate_every: Micro-steps per generation batch: `steps_per_generation` × `num_iterations`.
    """

    def __init__(self, num_ahead: int, generate_every: int) -> None:
        self._num_ahead, self._generate_every = num_ahead, generate_every
        self._iterator: weakref.ref[Iterator[list[Row]]] | None = None
        self._first = 0  # micro-step of the first micro-batch that is kept
        self._kept: deque[list[Row]] = deque()

    def read(
        self, iterator: Iterator[list[Row]], num_batches: int, *, micro_step: int, num_left: int
    ) -> Iterator[list[Row]]:
        """Read what an optimizer step takes, and as far ahead as is wanted.

        Args:
            iterator: The epoch's micro-batches, `[B]` rows each: the same object during an epoch, at its first unread
                one. A weak reference is held, since its data loader's workers live as long as it does.
            num_batches: Micro-batches that the step takes.
            micro_step: Micro-steps made before this step, in the run.
            num_left: Micro-steps from this one to the end of training; nothing behind them is read.

        Returns:
            The micro-batches of this step; where nothing is to be read ahead, the iterator itself.
        """
        if self._num_ahead == 0:
            return iterator
        if self._iterator is None or self._iterator() is not iterator:  # another epoch, or another call of `train`
            self._iterator = weakref.ref(iterator)
            self._first = micro_step
            self._kept.clear()
        while self._kept and self._first < micro_step:
            self._kept.popleft()
            self._first += 1
        newest = (micro_step + num_batches - 1) // self._generate_every + self._num_ahead
        num_wanted = max(num_batches, min(newest * self._generate_every - micro_step + 1, num_left))
        self._kept.extend(itertools.islice(iterator, max(0, num_wanted - len(self._kept))))
        return itertools.islice(self._kept, num_batches)

    def rows(self, batch: int) -> list[Row] | None:
        """Return this rank's rows `[B]` of a generation batch, as they will be handed to the trainer.

        Args:
            batch: Its number in the run, micro-step ÷ `generate_every`.

        Returns:
            None where they are not known: the batch is of another epoch, lies behind the end of training or further
            ahead than is read, or began in an earlier step.
        """
        place = batch * self._generate_every - self._first
        return self._kept[place] if 0 <= place < len(self._kept) else None


def further_tasks(
    num_tasks: int,
    *,
    seed: int,
    batch: int,
    round_index: int,
    exclude: Collection[Hashable] = (),
    identity: Callable[[int], Hashable] = lambda index: index,
) -> Iterator[int]:
    """Yield tasks for groups that are replaced, each once, in a random order that is the same on every rank.

    The order follows from `seed`, `batch` and `round_index` alone, so that a resumed run draws the same. Only as much
    of it is drawn as is asked for: a Fisher-Yates shuffle of which only the places that were swapped are stored.

    Args:
        round_index: Round of replacements in it.
        exclude: Tasks that come last, when there are no others left: those that the batch already has.
        identity: Returns the task of a row. Rows of a task that has been yielded come last too.

    Yields:
        Indices into the dataset: all of it when asked to the end.
    """
    drawn = random.Random(f"trl-gym further tasks {seed} {batch} {round_index}")
    last, swapped, postponed = set(exclude), dict[int, int](), list[int]()
    for place in range(num_tasks):
        other = drawn.randrange(place, num_tasks)
        row = swapped.get(other, other)
        swapped[other] = swapped.pop(place, place)
        if (task := identity(row)) in last:
            postponed.append(row)
        else:
            last.add(task)
            yield row
    yield from postponed


def own_share(stream: Iterable[int], counts: Sequence[int], rank: int) -> list[int]:
    """Return what a rank takes of a stream that every rank draws alike.

    Args:
        stream: Tasks, from its beginning.
        counts: How many each rank takes.

    Returns:
        `counts[rank]` tasks that no other rank takes; fewer where the stream ends.
    """
    first = sum(counts[:rank])
    return list(itertools.islice(stream, first, first + counts[rank]))
