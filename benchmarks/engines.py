"""A step of the quickstart on each engine, and in TRL's own tool loop on the same task with the same policy.

    .venv/bin/python benchmarks/engines.py [--steps 6] [--rounds 1] [--arms trl,vllm,transformers,sglang] [--json FILE]

    trl            TRL's `environment_factory`: the calculator as a Python class in the trainer's process, and
                   transformers' `generate` on the same prompts, token for token, with the same scoring
    trl-batching   the same with transformers' continuous batching (`use_transformers_continuous_batching`)
    vllm, transformers, sglang
                   `recipes/grpo.py --config recipes/quickstart.yaml --gym_engine …`: NeMo Gym and this engine

All do 128 rollouts a step with the options of the quickstart, without evaluation and checkpoints. The arms take
turns, each a process of its own; one whose engine is not installed is named and left out. "Ready" is from the command
to the first rollout, "first step" to the end of the first step, everything cached; all else is of the steps after it.
Compare CPU seconds where the machine has other work, and ratios to TRL's loop of the same run.

A policy of half a million parameters costs `generate` next to nothing; with a real one an engine earns its overhead.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from types import ModuleType
from typing import Any

from measure import CALCULATOR, ROLES, ROOT, cpu_seconds, machine

sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

CONFIG = ROOT / "recipes" / "quickstart.yaml"
SCORING = CALCULATOR / "resources_servers" / "calculator" / "calculator_scoring.py"
POLICY = ROOT / "runs" / "small_policy"
NUM_TASKS = 1024
ARMS = ("trl", "trl-batching", "vllm", "transformers", "sglang")
READY = "first rollouts"  # what a run says when its engine is about to sample
_POLL_S = 0.02
# Memory for keys and values; on a CPU, SGLang takes all that there is if it is not told.
_SGLANG = {"max-total-tokens": 65536, "max-running-requests": 128}
# Of the quickstart's configuration, those that TRL has as well.
SHARED_OPTIONS = (
    *("num_generations", "per_device_train_batch_size", "gradient_accumulation_steps", "max_completion_length"),
    *("temperature", "chat_template_kwargs", "adam_beta2", "max_grad_norm", "scale_rewards", "beta", "seed"),
    *("lr_scheduler_type", "warmup_steps", "gradient_checkpointing"),
)
ROLLOUTS = 128  # of a step


@dataclass
class Run:
    """One training run, watched from outside."""

    ready: float = 0.0  # seconds from the command to the first rollout
    ends: list[float] = field(default_factory=list)  # to the end of each step
    cpu: list[Counter[str]] = field(default_factory=list)  # at these times, by process
    metrics: list[dict[str, Any]] = field(default_factory=list)  # of each step

    @property
    def steps(self) -> list[float]:
        """Seconds of each step but the first."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]

    @property
    def rollout_seconds(self) -> float:
        """Seconds of these steps in which there were rollouts."""
        return sum(line["seconds/rollouts"] for line in self.metrics[1:])

    @property
    def tokens(self) -> float:
        """Tokens that were sampled in these steps."""
        return ROLLOUTS * sum(line["completions/mean_length"] for line in self.metrics[1:])

    def cpu_per_step(self) -> dict[str, float]:
        number = len(self.ends) - 1
        spent = {role: (self.cpu[-1][role] - self.cpu[0][role]) / number for role in self.cpu[-1]}
        return {role: round(seconds, 3) for role, seconds in spent.items() if seconds >= 0.0005}


def watch(command: list[str], folder: Path) -> Run | None:
    """Run a training; a line of `metrics.jsonl` is a step. Return None, and say why, if it fails."""
    run, metrics, output = Run(), folder / "metrics.jsonl", folder / "output.log"
    roles = (("sglang", "engine"), *ROLES)
    started = time.perf_counter()
    with output.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        while process.poll() is None:
            if not run.ready and READY in output.read_text():
                run.ready = time.perf_counter() - started
            if metrics.exists() and metrics.read_bytes().count(b"\n") > len(run.ends):
                run.ends.append(time.perf_counter() - started)
                run.cpu.append(cpu_seconds(roles, root=process.pid))
            time.sleep(_POLL_S)
    if process.returncode or len(run.ends) < 2:
        print(f"{' '.join(command)} failed:\n{output.read_text()[-3000:]}", flush=True)
        return None
    run.metrics = [json.loads(line) for line in metrics.read_text().splitlines()][: len(run.ends)]
    return run


def command_of(arm: str, steps: int, folder: Path) -> list[str]:
    if arm.startswith("trl"):
        return [sys.executable, __file__, "--train_with_trl", str(folder), "--steps", str(steps), "--arms", arm]
    options = {"output_dir": folder, "max_steps": steps, "eval_strategy": "no", "eval_on_start": False}
    options |= {"save_strategy": "no", "small_policy_dir": POLICY, "gym_engine": arm}
    if arm == "sglang":
        options |= {"gym_sglang_args": json.dumps(_SGLANG), "vllm_gpu_memory_utilization": 0.05}
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "recipes" / "grpo.py"), "--config", str(CONFIG), *flags]


def missing(arm: str) -> str:
    """Return why an arm cannot run here; empty if it can."""
    from trl_gym.errors import ConfigError
    from trl_gym.policy_server.sglang.server import find_python, sglang_version

    if arm == "vllm" and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    if arm == "sglang":
        try:
            sglang_version(find_python())
        except ConfigError as error:
            return str(error)
    return ""


# -- TRL's own loop ---------------------------------------------------------------------------------------------------


def load_scoring() -> ModuleType:
    """Import what the calculator's server computes and scores with."""
    spec = importlib.util.spec_from_file_location("calculator_scoring", SCORING)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Calculator:
    """The environment, as TRL has them: public methods are tools."""

    def reset(self, **_: Any) -> None:
        """Begin; nothing is kept."""

    def add(self, a: int, b: int) -> str:
        """
        a + b

        Args:
            a: first
            b: second

        Returns:
            The result.
        """
        return json.dumps(sys.modules["calculator_scoring"].run_tool("add", {"a": a, "b": b}))

    def subtract(self, a: int, b: int) -> str:
        """
        a - b

        Args:
            a: first
            b: second

        Returns:
            The result.
        """
        return json.dumps(sys.modules["calculator_scoring"].run_tool("subtract", {"a": a, "b": b}))


def items(completion: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages of a completion as the items that the environment scores."""
    found: list[dict[str, Any]] = []
    for message in completion:
        if message["role"] == "tool":
            found.append({"type": "function_call_output", "output": message["content"]})
            continue
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        if message.get("content") or not calls:
            found.append({"type": "message", "role": "assistant", "content": message.get("content") or ""})
        found += [
            {"type": "function_call", "name": one["name"], "arguments": json.dumps(one["arguments"])} for one in calls
        ]
    return found


def reward(completions: list[Any], **columns: Any) -> list[float]:
    """Score as the environment does."""
    score = sys.modules["calculator_scoring"].score
    expected = ("expected_tool", "expected_arguments", "expected_answer")
    rows = zip(*(columns[name] for name in expected), strict=True)
    return [score(items(one), *row).reward for one, row in zip(completions, rows, strict=True)]


def task(row: dict[str, Any]) -> dict[str, Any]:
    kept = {name: row[name] for name in ("expected_tool", "expected_arguments", "expected_answer")}
    return {"prompt": row["responses_create_params"]["input"], **kept}


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


def train_with_trl(folder: Path, steps: int, *, batching: bool) -> None:
    """Train with TRL's own loop; append a line to `metrics.jsonl` after each step."""
    import torch
    import yaml
    from datasets import Dataset
    from tiny_policy import load_calculator_data
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Timed(GRPOTrainer):
        rollout_seconds = 0.0

        def _generate(self, *args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return super()._generate(*args, **options)
            finally:
                self.rollout_seconds += time.perf_counter() - started

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            print(READY, flush=True)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "reward" in logs:  # else those of the whole run
                line = {"step": state.global_step, **logs, "seconds/rollouts": trainer.rollout_seconds}
                trainer.rollout_seconds = 0.0
                with (folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")

    load_scoring()
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
        logging_steps=1,
        use_transformers_continuous_batching=batching,
        **{name: config[name] for name in SHARED_OPTIONS},
    )
    trainer = Timed(
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
            run = watch(command_of(arm, steps, folder), folder)
            runs[arm] += [] if run is None else [run]
            print(f"{arm} has {'run' if run else 'failed'}; {machine()}", flush=True)
    return {arm: those for arm, those in runs.items() if those}


def figures_of(runs: list[Run]) -> dict[str, float]:
    """Return the figures of an arm's runs; seconds of a step are the mean, those of the start the median."""
    number, seconds = sum(len(run.steps) for run in runs), sum(sum(run.steps) for run in runs)
    tokens = sum(run.tokens for run in runs)
    return {
        "ready s": median(run.ready for run in runs),
        "first step s": median(run.ends[0] for run in runs),
        "first step CPU s": median(sum(run.cpu[0].values()) for run in runs),
        "step s": seconds / number,
        "fastest s": min(one for run in runs for one in run.steps),
        "step CPU s": mean(sum(run.cpu_per_step().values()) for run in runs),
        "rollouts/s": ROLLOUTS * number / seconds,
        "tokens/s": tokens / seconds,
        "tokens/s of rollouts": tokens / sum(run.rollout_seconds for run in runs),
        "reward, last step": mean(run.metrics[-1]["reward"] for run in runs),
    }


def tell(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Print a table of all arms, their CPU seconds by process, and ratios to TRL's loop; return the figures."""
    figures = {arm: figures_of(those) for arm, those in runs.items()}
    names = list(next(iter(figures.values())))
    print(f"\n{'':20}", *(f"{arm:>13}" for arm in figures))
    for name in names:
        print(f"{name:20}", *(f"{one[name]:13.2f}" for one in figures.values()))
    print("\nCPU seconds of a step, by process (the engine of `transformers` and TRL's are in the trainer's)")
    shares: dict[str, dict[str, float]] = {}
    for arm, those in runs.items():
        cpu: Counter[str] = Counter()
        for run in those:
            cpu.update({role: seconds / len(those) for role, seconds in run.cpu_per_step().items()})
        shares[arm] = {"trainer" if role == "client" else role: seconds for role, seconds in cpu.items()}
        print(f"{arm:14}", ", ".join(f"{role} {seconds:.2f}" for role, seconds in shares[arm].items()))
    if base := figures.get("trl"):
        print("\nagainst trl; seconds of a step: 1.5 is the goal of `transformers`")
        for arm in figures.keys() - {"trl"}:
            compared = ("step s", "fastest s", "step CPU s", "ready s", "first step s", "first step CPU s")
            print(f"{arm:14}", ", ".join(f"{name} {figures[arm][name] / base[name]:.2f}" for name in compared))
    return {arm: {**figures[arm], "CPU s by process": shares[arm]} for arm in figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a run; at least 2")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--arms", default="trl,vllm,transformers,sglang", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--train_with_trl", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    arms = options.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"--arms names {unknown[0]!r}, which is none of {', '.join(ARMS)}")
    if options.train_with_trl is not None:
        train_with_trl(options.train_with_trl, options.steps, batching=arms == ["trl-batching"])
        return
    from tiny_policy import build_tiny_policy

    build_tiny_policy(POLICY)
    for arm in list(arms):
        if reason := missing(arm):
            print(f"{arm} is left out: {reason}")
            arms.remove(arm)
    begun = machine()
    print(f"{begun}; {options.rounds} × {options.steps} steps", flush=True)
    if not (runs := compare(arms, options.steps, options.rounds)):
        sys.exit("no arm has run")
    figures = tell(runs)
    if options.json is not None:
        facts = {"machine": begun, "at its end": machine(), "steps": options.steps, "rounds": options.rounds}
        options.json.write_text(json.dumps({**facts, "arms": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
