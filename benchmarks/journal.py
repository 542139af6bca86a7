"""What a rollout costs the trainer, from Gym's answer to the line on disk: CPU, bytes of journal, memory.

    .venv/bin/python benchmarks/journal.py [--sizes 2x500 30x16000] [--rollouts 16] [--folder DIR]

A size is turns x tokens of the whole rollout; half of the tokens are sampled. The rollouts are made up as NeMo Gym and
the policy server answer them: items with handles and about four characters of text per token, the ledger's calls with
ids of a vocabulary of 150,000 and `float32` log-probabilities. Each goes through the trainer's own code:

    answer      Gym's answer to `/run`, JSON → a checked dictionary
    ledger      the policy server's calls, MessagePack → records
    finish      calls that count, trajectories, the journal's record
    append      redaction, the line's bytes, one write
    numbers     what every rank gets of it, and rows of TRL's batch

"fsync" is wall time per batch, since the disk works. "kB in memory" is what stays of a rollout until its batch has
been trained (tracemalloc, without its request, which the dataset has anyway). There are no sockets in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trl_gym.gym.client import GymAnswer, _read_answer
from trl_gym.policy_server.middleware.ledger import CallRecord, CallTokens, Taken
from trl_gym.responses import said_in_item
from trl_gym.rollouts.attempts import RolloutResult
from trl_gym.rollouts.journal import Journal, journal_files, read_lines
from trl_gym.rollouts.request import RolloutRequest, Sampling, stamp
from trl_gym.rollouts.rollout import Rollout, facts_of
from trl_gym.rollouts.rows import rows_of, training_rows
from trl_gym.rollouts.source import Finisher
from trl_gym.rollouts.trajectory import from_calls

T = TypeVar("T")
_WORDS = ("the", "sum", "of", "twelve", "and", "ninety", "is", "hundred", "what", "remains", "must", "be", "less")
_VOCABULARY = 150_000
_taken = msgspec.msgpack.Decoder(Taken)


@dataclass(frozen=True)
class Wire:
    """A rollout as it comes over the network."""

    request: RolloutRequest
    answer: bytes
    ledger: bytes


def made_up(index: int, num_turns: int, num_tokens: int) -> Wire:
    rng, rollout_id = random.Random(index), f"run-s0-r0-g{index}-m0-a0"
    per_turn = num_tokens // (2 * num_turns)  # put by the environment, and sampled

    def ids(number: int) -> list[int]:
        return [min(int(rng.paretovariate(0.35)) + 100, rng.randrange(1000, _VOCABULARY)) for _ in range(number)]

    def text(number: int) -> str:
        return " ".join(rng.choice(_WORDS) for _ in range(max(1, number * 4 // 5)))

    items: list[dict[str, Any]] = []
    records: list[CallRecord] = []
    for turn in range(num_turns):
        handle = -1 - rng.randrange(2**52)
        item: dict[str, Any] = {
            "type": "function_call",
            "id": f"fc_{rng.getrandbits(64):x}",
            "call_id": f"chatcmpl-tool-{rng.getrandbits(128):x}",
            "name": "calculate",
            "arguments": json.dumps({"expression": text(per_turn)}),
            "status": "completed",
        }
        if turn == num_turns - 1:
            content = [{"type": "output_text", "text": text(per_turn), "annotations": [], "logprobs": None}]
            item = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": content}
        said = said_in_item(item)
        assert said is not None
        item |= {"prompt_token_ids": [handle], "generation_token_ids": [handle], "generation_log_probs": [0.0]}
        items.append(item)
        if item["type"] == "function_call":
            output = {"type": "function_call_output", "call_id": item["call_id"], "output": text(per_turn)}
            items.append(output | {"id": None, "status": "completed"})
        logprobs = array("f", [-rng.expovariate(2.0) for _ in range(per_turn)])
        tokens = CallTokens(
            handle=handle,
            parent=turn - 1 if turn else None,
            prompt=array("i", ids(per_turn)).tobytes(),
            sampled=array("i", ids(per_turn)).tobytes(),
            logprobs=array("d", logprobs).tobytes(),
            said=(said,),
        )
        records.append(
            CallRecord(
                status=200, prompt="exact", prompt_tokens=(2 * turn + 1) * per_turn, completion_tokens=per_turn,
                cached_tokens=turn * per_turn, finish_reason="stop", weight_version="0", seconds=0.7312,
                queue_s=0.0123, prefill_s=0.0456, decode_s=0.6789, caller="responses_api_agents/agent", tokens=tokens,
            )
        )  # fmt: skip
    row = {"responses_create_params": {"input": [{"role": "user", "content": text(per_turn)}]}, "expected": 102}
    identity: dict[str, Any] = {"rollout_id": rollout_id, "task_index": index, "member": 0}
    stamped = stamp(row, **identity, sampling=Sampling(), completion_budget=60_000)
    request = RolloutRequest(**identity, group=index, attempt=0, agent="agent", row=stamped)
    response = {"id": "resp_1", "created_at": 1e9, "model": "policy", "object": "response", "output": items}
    answer = {"responses_create_params": stamped["responses_create_params"], "response": response, "reward": 1.0}
    taken = msgspec.msgpack.encode(Taken("instance", {rollout_id: records}))
    return Wire(request, json.dumps({**stamped, **answer}).encode(), taken)


def milliseconds(work: Callable[[Wire], T], wires: list[Wire], repeats: int = 5) -> tuple[float, list[T]]:
    """Median over repeats of the mean CPU milliseconds of one; the results of the last repeat."""
    means, found = [], []
    for _ in range(repeats):
        started = time.process_time()
        found = [work(wire) for wire in wires]
        means.append(1e3 * (time.process_time() - started) / len(wires))
    return statistics.median(means), found


def read_answer(wire: Wire) -> dict[str, Any]:
    answer = _read_answer(wire.answer, 1.0, "agent /run")
    assert isinstance(answer, GymAnswer), answer
    return answer.result


def read_ledger(wire: Wire) -> list[CallRecord]:
    records = _taken.decode(wire.ledger).rollouts[wire.request.rollout_id]
    assert records is not None
    return records


class NoJournal:
    """Stands for a journal while everything but it is measured."""

    def append(self, record: Any) -> None:
        pass


def finisher(journal: Any) -> Finisher:
    return Finisher(
        build=lambda _answer, _request, calls: from_calls(calls), decode=str, journal=journal, drift_policy="exclude",
        mode="train", weight_version="0", tags={"run": "r", "weights": "w"},
    )  # fmt: skip


def finish(wire: Wire, end: Finisher) -> Rollout:
    result = RolloutResult(
        request=wire.request, answer=read_answer(wire), failure=None, seconds=1.0, records=read_ledger(wire)
    )
    rollout = end(result)
    assert rollout.failure is None, rollout.failure
    return rollout


def into_rows(rollouts: list[Rollout]) -> object:
    facts = [facts_of(rollout, rollout.reward, "b") for rollout in rollouts]
    rows = rows_of(rollouts, [0] * len(rollouts), len(rollouts), pad_id=0, eos_id=1)
    rewards = [rollout.reward for rollout in rollouts]
    return facts, training_rows(rows, rollouts, rewards, mask_truncated=False, with_logprobs=True)


def kilobytes_each(wires: list[Wire]) -> float:
    """What stays in memory of a rollout."""
    end = finisher(NoJournal())
    finish(wires[0], end)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = [finish(wire, end) for wire in wires]
    gc.collect()
    size = (tracemalloc.get_traced_memory()[0] - before) / 1e3 / len(kept)
    tracemalloc.stop()
    return size


def measure(num_turns: int, num_tokens: int, num_rollouts: int, folder: Path | None) -> dict[str, float]:
    wires = [made_up(index, num_turns, num_tokens) for index in range(num_rollouts)]
    answer, _ = milliseconds(read_answer, wires)
    ledger, _ = milliseconds(read_ledger, wires)
    end = finisher(NoJournal())
    finished, rollouts = milliseconds(lambda wire: finish(wire, end), wires)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        journal = Journal(place)
        end = finisher(journal)
        whole, _ = milliseconds(lambda wire: finish(wire, end), wires)
        started = time.perf_counter()
        journal.commit()
        fsync = time.perf_counter() - started
        journal.close()
        files = journal_files(place)
        size = sum(path.stat().st_size for path in files) / sum(1 for path in files for _ in path.open("rb"))
        started = time.process_time()
        num_lines = sum(1 for _ in read_lines(place))
        reading = 1e3 * (time.process_time() - started) / num_lines
    numbers, _ = milliseconds(lambda _: into_rows(rollouts), wires[:1])
    numbers /= num_rollouts
    return {
        "answer": answer,
        "ledger": ledger,
        "finish": finished - answer - ledger,
        "append": whole - finished,
        "numbers": numbers,
        "CPU ms in all": whole + numbers,
        "fsync ms": 1e3 * fsync,
        "reading a line": reading,
        "kB of journal": size / 1e3,
        "kB in memory": kilobytes_each(wires),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["2x500", "30x16000"], help="turns x tokens")
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=None, help="where to write")
    options = parser.parse_args()
    for size in options.sizes:
        figures = measure(*map(int, size.split("x")), options.rollouts, options.folder)
        print(f"{size}: CPU milliseconds per rollout, and sizes")
        for name, value in figures.items():
            print(f"{value:12.3f}  {name}")


if __name__ == "__main__":
    main()
