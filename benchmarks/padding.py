"""What padding costs: CPU seconds of scoring and update, as TRL pads, and as trl-gym computes rows of unequal length.

    .venv/bin/python benchmarks/padding.py [--policy small larger] [--rows 32] [--micro-batch 4] [--steps 2]

Without servers: a generation batch is prepared, with prompts of one length and completions between 1 and 10 times 60
tokens. "long tail": as many rows between 60 and 120 tokens as between 300 and 600. "even": every length alike. Each
trainer makes the same optimizer steps on it; the first is not counted. Two random policies: that of the tests, and one
with 5 times as many parameters. All figures are ratios in one run, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOTrainer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.gradient import Case, PaddedTrainer, PreparedSource, PreparedTrainer, tasks  # noqa: E402
from tests.policy_server.tiny_model import build_random_policy, build_tokenizer  # noqa: E402
from trl_gym import GymGRPOConfig  # noqa: E402
from trl_gym.rollouts.rollout import Rollout  # noqa: E402
from trl_gym.rollouts.source import Collected  # noqa: E402
from trl_gym.rollouts.trajectory import Trajectory  # noqa: E402

SHORTEST, LONGEST, NUM_PROMPT_TOKENS = 60, 600, 60
NUM_MEMBERS = 8


def lengths(kind: str, num_rows: int) -> list[int]:
    """Completion lengths of a batch, in random order: quantiles of their distribution."""
    quantiles = [(row + 0.5) / num_rows for row in range(num_rows)]
    if kind == "long tail":
        found = [round(SHORTEST * (LONGEST / SHORTEST) ** quantile) for quantile in quantiles]
    else:
        found = [round(SHORTEST + (LONGEST - SHORTEST) * quantile) for quantile in quantiles]
    random.Random(0).shuffle(found)
    return found


class Source(PreparedSource):
    """Rollouts of given lengths."""

    def __init__(self, kind: str, folder: Path) -> None:
        super().__init__(Case(name=kind, failed=()), folder)
        self.kind = kind

    def collect(self, requests: Any, batch: Any) -> Collected:
        draw = random.Random(0)
        rollouts = []
        for request, length in zip(requests, lengths(self.kind, len(requests)), strict=True):
            trajectory = Trajectory(
                prompt_ids=[draw.randrange(10, 400) for _ in range(NUM_PROMPT_TOKENS)],
                completion_ids=[draw.randrange(10, 400) for _ in range(length)],
                env_mask=[1] * length,
                logprobs=[-6.3] * length,
                num_turns=1,
                turn_ends=[length],
            )
            answer = {"reward": draw.random(), "response": {"output": []}}
            rollouts.append(
                Rollout(request=request, answer=answer, failure=None, trajectories=[trajectory], seconds=1.0)
            )
        return Collected(rollouts=rollouts)


class Unpadded(PreparedTrainer):
    def _new_source(self, args: GymGRPOConfig, *_: Any) -> Source:
        return Source(self._case.name, Path(args.output_dir))


class Padded(PaddedTrainer):
    _new_source = Unpadded._new_source


class Unsorted(Unpadded):
    _prepare_inputs = GRPOTrainer._prepare_inputs


VARIANTS = {"padded": Padded, "trimmed": Unsorted, "trimmed, sorted": Unpadded}


class Meter(TrainerCallback):
    """CPU seconds of each optimizer step, rollouts excepted (they are there), and columns that were computed."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.columns = 0
        self._started = 0.0

    def count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.columns += kwargs["input_ids"].numel()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.columns = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.process_time()
        self.seconds.append(now - self._started)
        self._started = now


def measure(variant: str, model: Path, kind: str, folder: Path, given: argparse.Namespace) -> tuple[float, int]:
    """Median CPU seconds of a step, and token positions that the model computed in the last one."""
    args = GymGRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, model_init_kwargs={"dtype": "auto"}, beta=0.0,
        num_generations=NUM_MEMBERS, per_device_train_batch_size=given.micro_batch,
        gradient_accumulation_steps=given.rows // given.micro_batch, max_completion_length=LONGEST,
        max_steps=given.steps + 1, learning_rate=1e-6, gradient_checkpointing=False, save_strategy="no",
        report_to=[], disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = VARIANTS[variant](
        Case(name=kind, failed=()), model=str(model), args=args, train_dataset=tasks(range(given.rows // NUM_MEMBERS))
    )
    meter = Meter()
    trainer.add_callback(meter)
    trainer.model.register_forward_pre_hook(meter.count, with_kwargs=True)
    trainer.train()
    return statistics.median(meter.seconds[1:]), meter.columns


def larger_policy(folder: Path) -> Path:
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=3,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=1024, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


POLICIES = {"small": build_random_policy, "larger": larger_policy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--rows", type=int, default=32, help="rows of a generation batch, which is one optimizer step")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps that are counted")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in given.policy:
            model = POLICIES[size](folder / size)
            for kind in ("long tail", "even"):
                num_tokens = sum(lengths(kind, given.rows)) + given.rows * NUM_PROMPT_TOKENS
                found = {variant: measure(variant, model, kind, folder / "run", given) for variant in VARIANTS}
                padded, _ = found["padded"]
                for variant, (seconds, columns) in found.items():
                    ratio, share = padded / seconds, 2 * num_tokens / columns  # scoring and update
                    print(
                        f"{size} policy, {kind}, {variant}: {seconds:.2f} CPU s per step, {ratio:.2f} times as fast "
                        f"as padded; {share:.0%} of the computed positions are tokens",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
