# Copyright 2026 The trl-gym Authors
# SPDX-License-Identifier: Apache-2.0
"""Write the tasks of the calculator environment as NeMo Gym rows.

    python generate_data.py --output_dir runs/calculator

writes `train.jsonl` and `validation.jsonl`. Standard library only, so that any interpreter runs it.

The two files never share a pair of operands: whether a pair is held out is a property of the pair alone
([`is_held_out`]), not of the seed. Validation therefore measures generalization, and a policy that was trained on
`train.jsonl` of one seed can be validated on `validation.jsonl` of another.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

AGENT = "calculator_simple_agent"  # top-level key of the agent in calculator.yaml
MIN_OPERAND, MAX_OPERAND = 10, 99  # inclusive
OPERATORS = {"add": "+", "subtract": "-"}  # tool name -> sign in the question

# Short on purpose: the schemas are part of every prompt. Gym's row format wants `strict`; its model server drops it.
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "name": name,
        "description": f"a {operator} b",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
        "strict": True,
    }
    for name, operator in OPERATORS.items()
]


def is_held_out(a: int, b: int) -> bool:
    """Whether the operand pair `(a, b)` is for validation only: one pair in ten, for either tool."""
    return (31 * a + 17 * b) % 10 == 0


def operand_pairs(*, held_out: bool) -> list[tuple[int, int]]:
    """All operand pairs of one side of the split, in a fixed order: 7,290 for training, 810 held out."""
    operands = range(MIN_OPERAND, MAX_OPERAND + 1)
    return [(a, b) for a in operands for b in operands if is_held_out(a, b) == held_out]


def question(tool: str, a: int, b: int) -> str:
    """The user's message, for example `"What is 47 + 36?"`."""
    return f"What is {a} {OPERATORS[tool]} {b}?"


def result(tool: str, a: int, b: int) -> int:
    """What the tool answers."""
    return a + b if tool == "add" else a - b


def make_row(tool: str, a: int, b: int) -> dict[str, Any]:
    """One task in Gym's row format: what the model sees, which agent runs it, and what only the verifier sees."""
    return {
        "responses_create_params": {
            "input": [{"role": "user", "content": question(tool, a, b)}],
            "tools": TOOLS,
        },
        "agent_ref": {"type": "responses_api_agents", "name": AGENT},
        "expected_tool": tool,
        "expected_arguments": {"a": a, "b": b},
        "expected_answer": str(result(tool, a, b)),
    }


def sample_rows(num_rows: int, *, held_out: bool, rng: random.Random) -> list[dict[str, Any]]:
    """`num_rows` different tasks of one side of the split, in random order."""
    tasks = [(tool, a, b) for tool in OPERATORS for a, b in operand_pairs(held_out=held_out)]
    if not 0 <= num_rows <= len(tasks):
        side = "validation" if held_out else "training"
        raise ValueError(f"there are {len(tasks)} different {side} tasks; {num_rows} were asked for")
    return [make_row(*task) for task in rng.sample(tasks, num_rows)]


def generate(
    output_dir: str | Path, num_train: int = 4000, num_validation: int = 256, seed: int = 0
) -> tuple[Path, Path]:
    """Write `train.jsonl` and `validation.jsonl` into `output_dir` and return their paths.

    Args:
        output_dir: Folder, made if missing.
        num_train: Number of training tasks, at most 14,580.
        num_validation: Number of validation tasks, at most 1,620.
        seed: The same arguments always give the same bytes.
    """
    folder = Path(output_dir)
    rows = {
        "train": sample_rows(num_train, held_out=False, rng=random.Random(f"train-{seed}")),
        "validation": sample_rows(num_validation, held_out=True, rng=random.Random(f"validation-{seed}")),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {split: folder / f"{split}.jsonl" for split in rows}
    for split, path in paths.items():
        # Written aside and renamed: a reader never sees half a file.
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows[split]), encoding="utf-8")
        partial.replace(path)
    return paths["train"], paths["validation"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the calculator tasks as train.jsonl and validation.jsonl.")
    parser.add_argument("--output_dir", required=True, help="folder for the two files; made if missing")
    parser.add_argument("--num_train", type=int, default=4000, help="training tasks, at most 14580 (default 4000)")
    parser.add_argument("--num_validation", type=int, default=256, help="validation tasks, at most 1620 (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="which tasks are drawn, and their order (default 0)")
    args = parser.parse_args(argv)
    try:
        paths = generate(args.output_dir, args.num_train, args.num_validation, args.seed)
    except ValueError as error:
        parser.error(str(error))
    for path in paths:
        print(path)


if __name__ == "__main__":
    main()
