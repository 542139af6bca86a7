"""Build a small policy for an environment that `trl-gym new-environment` made: to see it learn without a GPU.

    python recipes/environments/small_policy.py --environment counter --output_dir runs/counter_policy

As the quickstart's (`recipes/tiny_policy.py` on `recipes/environments/calculator`, whose parts these are), it has seen
demonstrations with two systematic mistakes: it gives up without a tool, and it takes the other tool. It knows this one
environment as it was made, and nothing else; what you change in the environment, it has not seen.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_policy
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

GIVE_UP_RATE = 0.25  # per demonstration
OTHER_TOOL_RATE = 0.3  # per call
NUM_STEPS, BATCH_SIZE = 300, 32


def load(folder: Path) -> ModuleType:
    """The environment's `generate_data.py`."""
    spec = importlib.util.spec_from_file_location("environment_data", folder / "generate_data.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {folder / 'generate_data.py'}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def demonstration(data: ModuleType, row: dict[str, Any], rng: random.Random) -> list[dict[str, Any]]:
    """One flawed episode, as chat messages."""
    messages = list(row["responses_create_params"]["input"])
    if rng.random() < GIVE_UP_RATE:
        return [*messages, {"role": "assistant", "content": tiny_policy.GIVE_UP}]
    shown = row["start"]
    for tool, a in row["operations"]:
        if rng.random() < OTHER_TOOL_RATE:
            tool = rng.choice([other for other in data.OPERATIONS if other != tool])
        shown = data.OPERATIONS[tool][1](shown, a)
        call = {"type": "function", "function": {"name": tool, "arguments": {"a": a}}}
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": str(shown)},
        ]
    return [*messages, {"role": "assistant", "content": str(shown)}]


def build_tokenizer(demos: list[list[dict[str, Any]]], tools: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """The quickstart's tokenizer, with merges learned from these demonstrations: long pieces, short prompts."""
    base = tiny_policy.build_tokenizer(tiny_policy.load_calculator_data())
    texts = base.apply_chat_template(demos, tools=tools, tokenize=False)
    markers = (tiny_policy.PAD, tiny_policy.TURN_START, tiny_policy.TURN_END, *tiny_policy.TOOL_MARKERS)
    parts = (part for text in texts for part in re.split("|".join(map(re.escape, markers)), text) if part)
    tokenizer = base.train_new_from_iterator(parts, vocab_size=tiny_policy.SETTINGS.vocab_size, show_progress=False)
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in tiny_policy.TOOL_MARKERS])
    tokenizer.chat_template = tiny_policy.CHAT_TEMPLATE
    return tokenizer


def build(environment: Path, output_dir: Path, seed: int = 0) -> None:
    """Write the model folder."""
    data, rng = load(environment), random.Random(seed)
    tools = tiny_policy.chat_tools(data)
    rows = data.sample_rows(NUM_STEPS * BATCH_SIZE, held_out=False, rng=rng)
    demos = [demonstration(data, row, rng) for row in rows]
    tokenizer = build_tokenizer(demos[:400], tools)
    ids, written = tiny_policy.encode(tokenizer, demos, tools)
    torch.manual_seed(seed)
    model = tiny_policy.build_model(tokenizer)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations: a second thread waits more than it helps
    torch.set_flush_denormal(True)
    try:
        train(model, ids, written)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(num_threads)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def train(model: Any, ids: torch.Tensor, written: torch.Tensor) -> None:
    """One pass over the demonstrations, with the optimizers and learning rates of the quickstart's policy.

    Args:
        model: From `tiny_policy.build_model`.
        ids: `[N, T]`, token ids.
        written: `[N, T]`, true where the policy wrote the token.
    """
    settings = tiny_policy.SETTINGS
    hidden = {name for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name}
    optimizers = [
        torch.optim.Muon(
            [p for name, p in model.named_parameters() if name in hidden], lr=settings.muon_lr, weight_decay=0.0
        ),
        torch.optim.AdamW(
            [p for name, p in model.named_parameters() if name not in hidden], lr=settings.adamw_lr, weight_decay=0.0
        ),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / settings.warmup_steps, max(0.05, 1 - step / NUM_STEPS))
        )
        for optimizer in optimizers
    ]
    model.train()
    for step in range(NUM_STEPS):
        batch = slice(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
        loss = -tiny_policy.written_logprobs(model, ids[batch], written[batch]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 50 == 49:
            print(f"warm start: step {step + 1}/{NUM_STEPS}, loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a small policy for a new environment.")
    parser.add_argument("--environment", type=Path, required=True, help="folder that `trl-gym new-environment` made")
    parser.add_argument("--output_dir", type=Path, required=True, help="model folder to write")
    parser.add_argument("--seed", type=int, default=0, help="initial weights and demonstrations (default: 0)")
    args = parser.parse_args()
    build(args.environment, args.output_dir, args.seed)
    print(args.output_dir)


if __name__ == "__main__":
    main()
