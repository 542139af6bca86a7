"""Seconds of a training step of the quickstart: ours, and TRL's own tool loop on the same task with the same policy.

    .venv/bin/python benchmarks/trl_loop.py [--steps 8] [--rounds 1] [--arms ours,trl] [--json FILE]

    ours   `recipes/grpo.py --config recipes/quickstart.yaml`: NeMo Gym and vLLM
    trl    TRL's `environment_factory`: the calculator as a Python class in the trainer's process, and transformers'
           `generate` on the same prompts, token for token

Both do 128 rollouts a step with the options of the quickstart, without evaluation and checkpoints. The arms take
turns, each a process of its own. Compare seconds per step (median, from the second on) and CPU seconds per step;
"first step" is from the command to the end of the first one, everything cached.

A policy of half a million parameters costs `generate` next to nothing; with a real one vLLM earns its overhead.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from measure import ROOT, cpu_seconds, machine

sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

CONFIG = ROOT / "recipes" / "quickstart.yaml"
POLICY = ROOT / "runs" / "small_policy"
NUM_TASKS = 1024
_POLL_S = 0.02
# Of the quickstart's configuration, those that TRL has as well.
SHARED_OPTIONS = (
    *("num_generations", "per_device_train_batch_size", "gradient_accumulation_steps", "max_completion_length"),
    *("temperature", "chat_template_kwargs", "adam_beta2", "max_grad_norm", "scale_rewards", "beta", "seed"),
    *("lr_scheduler_type", "warmup_steps", "gradient_checkpointing"),
)


@dataclass
class Run:
    """One training run, watched from outside."""

    ends: list[float] = field(default_factory=list)  # seconds from the command to the end of each step
    cpu: list[Counter[str]] = field(default_factory=list)  # at these times, by process

    @property
    def steps(self) -> list[float]:
        """Seconds of each step but the first."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]

    def cpu_per_step(self) -> dict[str, float]:
        number = len(self.ends) - 1
        spent = {role: (self.cpu[-1][role] - self.cpu[0][role]) / number for role in self.cpu[-1]}
        return {role: round(seconds, 3) for role, seconds in spent.items() if seconds >= 0.0005}


def watch(command: list[str], folder: Path) -> Run:
    """Run a training; a line of `metrics.jsonl` is a step."""
    run, metrics = Run(), folder / "metrics.jsonl"
    started = time.perf_counter()
    with (folder / "output.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        while process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") > len(run.ends):
                run.ends.append(time.perf_counter() - started)
                run.cpu.append(cpu_seconds(root=process.pid))
            time.sleep(_POLL_S)
    if process.returncode or len(run.ends) < 2:
        raise SystemExit(f"{' '.join(command)} failed:\n{(folder / 'output.log').read_text()[-3000:]}")
    return run


def command_of(arm: str, steps: int, folder: Path) -> list[str]:
    if arm == "trl":
        return [sys.executable, __file__, "--train_with_trl", str(folder), "--steps", str(steps)]
    options = {"output_dir": folder, "max_steps": steps, "eval_strategy": "no", "eval_on_start": False}
    options |= {"save_strategy": "no", "small_policy_dir": POLICY}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "recipes" / "grpo.py"), "--config", str(CONFIG), *flags]


# -- TRL's own loop ---------------------------------------------------------------------------------------------------


class Calculator:
    """The environment, as TRL has them: public methods are tools."""

    def reset(self, expected_tool: str = "", a: int = 0, b: int = 0, **_: Any) -> None:
        self._want, self._calls = (expected_tool, a, b), []

    def add(self, a: int, b: int) -> str:
        """
        a + b

        Args:
            a: first
            b: second

        Returns:
            The result.
        """
        self._calls.append(("add", a, b))
        return str(a + b)

    def subtract(self, a: int, b: int) -> str:
        """
        a - b

        Args:
            a: first
            b: second

        Returns:
            The result.
        """
        self._calls.append(("subtract", a, b))
        return str(a - b)


def reward(completions: list[Any], environments: list[Any], expected_answer: list[str], **_: Any) -> list[float]:
    """Half for the right call, and nothing else called; half for the right answer."""
    rewards = []
    for completion, environment, wanted in zip(completions, environments, expected_answer, strict=True):
        is_called = environment._calls == [environment._want]
        is_solved = is_called and (completion[-1].get("content") or "").strip() == wanted
        rewards.append(0.5 * is_called + 0.5 * is_solved)
    return rewards


def task(row: dict[str, Any]) -> dict[str, Any]:
    kept = {name: row[name] for name in ("expected_tool", "expected_answer")}
    return {"prompt": row["responses_create_params"]["input"], **kept, **row["expected_arguments"]}


def load_tokenizer(tools: list[dict[str, Any]]) -> Any:
    """Load the policy's tokenizer. It writes the tools as Gym sends them, whatever TRL makes of the methods, so that
    prompts have as many tokens as ours; and TRL learns how to read its tool calls."""
    from transformers import AutoTokenizer
    from trl import chat_template_utils

    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    names = ("name", "description", "parameters")
    written = "".join("\n" + json.dumps({name: tool[name] for name in names}) for tool in tools)
    template, begin, end = tokenizer.chat_template, "{%- for tool in tools %}", "{%- endfor %}"
    start = template.index(begin)
    stop = template.index(end, start) + len(end)
    tokenizer.chat_template = f"{template[:start]}{{{{- {json.dumps(written)} }}}}{template[stop:]}"
    if getattr(chat_template_utils, "_SUPPORTS_RESPONSE_TEMPLATE", False):
        tokenizer.response_template = chat_template_utils.qwen3_template
    else:
        tokenizer.response_schema = chat_template_utils.qwen3_schema
    return tokenizer


def train_with_trl(folder: Path, steps: int) -> None:
    """Train with TRL's own loop; append a line to `metrics.jsonl` after each step."""
    import torch
    import yaml
    from datasets import Dataset
    from tiny_policy import load_calculator_data
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": state.global_step}) + "\n")

    data, config = load_calculator_data(), yaml.safe_load(CONFIG.read_text())
    rows = data.sample_rows(NUM_TASKS, held_out=False, rng=random.Random(0))
    torch.set_num_threads(1)  # as `accelerate launch`; with more, most of them wait in models as small as this one
    args = GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=config["small_policy_learning_rate"],
        max_tool_calling_iterations=2,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        disable_tqdm=True,
        **{name: config[name] for name in SHARED_OPTIONS},
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32),
        processing_class=load_tokenizer(data.TOOLS),
        reward_funcs=[reward],
        args=args,
        train_dataset=Dataset.from_list([task(row) for row in rows]),
        environment_factory=Calculator,
        callbacks=[Steps()],
    )
    trainer.train()


# -- the comparison ---------------------------------------------------------------------------------------------------


def compare(arms: list[str], steps: int, rounds: int) -> dict[str, list[Run]]:
    """Run every arm once per round, in another order each round."""
    runs: dict[str, list[Run]] = {arm: [] for arm in arms}
    for number in range(rounds):
        first = number % len(arms)
        for arm in arms[first:] + arms[:first]:
            folder = Path(tempfile.mkdtemp(prefix=f"trl-gym-benchmark-{arm}-"))
            runs[arm].append(watch(command_of(arm, steps, folder), folder))
    return runs


def tell(runs: dict[str, list[Run]]) -> dict[str, dict[str, float]]:
    """Print each arm's figures, and ratios to TRL's; return them."""
    figures = {}
    for arm, those in runs.items():
        cpu: Counter[str] = Counter()
        for run in those:
            cpu.update({role: seconds / len(those) for role, seconds in run.cpu_per_step().items()})
        figures[arm] = {
            "step s": median(seconds for run in those for seconds in run.steps),
            "step CPU s": sum(cpu.values()),
            "first step s": median(run.ends[0] for run in those),
            "first step CPU s": median(sum(run.cpu[0].values()) for run in those),
        }
        shares = ", ".join(f"{'trainer' if role == 'client' else role} {seconds:.2f}" for role, seconds in cpu.items())
        print(f"{arm:6}", ", ".join(f"{name} {value:.2f}" for name, value in figures[arm].items()), f"({shares})")
    if {"ours", "trl"} <= figures.keys():
        ratios = {name: figures["ours"][name] / value for name, value in figures["trl"].items()}
        print("ours ÷ trl:", ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a run; at least 2")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--arms", default="ours,trl")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--train_with_trl", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train_with_trl is not None:
        train_with_trl(options.train_with_trl, options.steps)
        return
    from tiny_policy import build_tiny_policy

    build_tiny_policy(POLICY)
    print(f"{machine()}; {options.rounds} × {options.steps} steps", flush=True)
    figures = tell(compare(options.arms.split(","), options.steps, options.rounds))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
