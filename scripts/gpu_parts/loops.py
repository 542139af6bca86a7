"""Parts that are whole trainings: the quickstart's recipe with other options, by the commands that users have."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from gpu_parts import ROOT, Run
from trl_gym import train

_RECIPE = ROOT / "recipes" / "quickstart.yaml"
_LAUNCH = ROOT / "recipes" / "accelerate" / "fsdp2.yaml"
_GAP = 0.02  # nats, mean; what the project promises
_PLAN = "300M"  # size of the model of `plan`
_OVER = 1.15  # a peak above so many times the plan's figure fails
# Rows that get as long as the plan takes them for, of which a GPU of 24 GB holds the activations.
_ROWS = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "max_completion_length": 384,
         "vllm_max_model_length": 512}  # fmt: skip
_DRY = {"max_steps": 2, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "use_cpu": True}
_ALWAYS = {
    "eval_strategy": "no", "eval_on_start": False, "save_strategy": "no", "gym_verify_sync_steps": 1, "bf16": True,
    "disable_tqdm": True,
}  # fmt: skip


def options(run: Run, name: str, **changes: Any) -> list[str]:
    """Return the command line of a training into a folder of this name."""
    told = {"config": _RECIPE, "output_dir": run.folder / name, **_ALWAYS, **changes, **(_DRY if run.dry else {})}
    if run.gym_python:
        told["gym_python"] = run.gym_python
    return [
        word
        for key, value in told.items()
        for word in (f"--{key}", str(value).lower() if value is True or value is False else str(value))
    ]


def _flags(run: Run) -> str:
    flags: dict[str, Any] = {"enforce-eager": True}  # compiling takes longer than the steps
    if not run.dry:  # a block of so small a policy has 8 KB: vLLM would make an object of each of some millions
        flags["num-gpu-blocks-override"] = 16384
    return json.dumps(flags | run.vllm_args)


def trained(run: Run, name: str, argv: list[str], launcher: list[str] | None = None) -> list[dict[str, Any]]:
    """Train, and return the lines of `metrics.jsonl` of its steps. Notes what must hold of every training."""
    if launcher is None:
        code = train.main(argv)
    else:
        code = subprocess.run([*launcher, str(ROOT / "recipes" / "grpo.py"), *argv], cwd=ROOT).returncode
    for log in sorted((run.folder / name / "logs").glob("*.log")) if code else ():
        print(f"{log}:\n{log.read_text(errors='replace')[-3000:]}")
    if code:
        raise RuntimeError(f"the training ended with {code}")
    lines = [json.loads(line) for line in (run.folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    for what in ("rollouts/failed_fraction", "rollouts/drift_fraction"):
        worst = max(line[what] for line in steps)
        run.expect(worst == 0, f"{name}: {what} is {worst}")
    gaps = [line.get("logprob_gap/mean", math.nan) for line in steps]
    run.expect(all(gap < _GAP for gap in gaps), f"{name}: logprob_gap/mean is {max(gaps)}")
    probes = [line["weight_sync/probe_gap"] for line in steps if "weight_sync/probe_gap" in line]
    # A probe beyond `gym_probe_tolerance` ends the training; random tokens differ more than sampled ones do.
    run.expect(bool(probes), f"{name}: no weight sync was probed")
    run.measure(**{f"{name}_probe_gap_nats": max(probes, default=math.nan)})
    return steps


def told(run: Run, steps: list[dict[str, Any]], prefix: str = "") -> None:
    """Note what a training has achieved, and how fast."""
    sampled = sum(line["rollouts/tokens_out"] * line["rollouts/count"] for line in steps[1:])
    later = steps[1:] or steps
    figures = {
        "reward_first": mean(line["reward"] for line in steps[:3]),
        "reward_last": mean(line["reward"] for line in steps[-3:]),
        "logprob_gap_nats": max(line["logprob_gap/mean"] for line in steps),
        "step_s": median(line["step_time"] for line in later),
        "tokens_per_s": sampled / sum(line["seconds/rollouts"] for line in later),
        "weight_sync_s": median(line["seconds/weight_sync"] for line in later),
    }
    memory = {
        name.partition("/")[2]: value for line in steps for name, value in line.items() if name.startswith("memory/")
    }
    run.measure(**{f"{prefix}{name}": float(value) for name, value in (figures | memory).items()})


def transformers(run: Run) -> None:
    precisions: Counter[str] = Counter()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: precisions.update([str(output.dtype)] if isinstance(module, torch.nn.Linear) else [])
    )
    try:
        steps = trained(run, "autocast", options(run, "autocast", gym_engine="transformers", max_steps=16))
    finally:
        hook.remove()
    run.expect(set(precisions) == {"torch.bfloat16"}, f"layers computed in {dict(precisions)}")
    told(run, steps)
    if run.dry:
        run.stops.append("two steps on the CPU, in bfloat16 by autocast: too few for a reward that rises")
        return
    rises = mean(line["reward"] for line in steps[-3:]) - mean(line["reward"] for line in steps[:3])
    run.expect(rises > 0.1, f"the reward rose by {rises:.3f} over {len(steps)} steps")
    argv = options(run, "weights", gym_engine="transformers", max_steps=3, dtype="bfloat16")
    told(run, trained(run, "weights", argv), "bf16_weights_")


def quickstart(run: Run) -> None:
    sharing = {} if run.dry else {"vllm_enable_sleep_mode": True, "gym_offload_optimizer": True}
    argv = options(run, "vllm", gym_engine="vllm", max_steps=5, gym_vllm_args=_flags(run), **sharing)
    started = time.perf_counter()
    told(run, trained(run, "vllm", argv))
    run.measure(total_s=time.perf_counter() - started)
    if run.dry:
        run.stops.append("two steps on the CPU, with vLLM's CPU build and weights by `file`: nothing is shared")


def fsdp2_loop(run: Run) -> None:
    if run.dry:
        from trl_gym.doctor.options import read_launch

        run.measure(sharding=str(read_launch(_LAUNCH).sharding))
        run.stops.append(f"{_LAUNCH.name} is read: accelerate trains FSDP2 on GPUs only")
        return
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(_LAUNCH),
        "--num_processes",
        "1",
    ]
    served = {"gym_engine": "vllm", "gym_vllm_args": _flags(run), "vllm_enable_sleep_mode": True}
    argv = options(run, "fsdp2", max_steps=3, **served)
    told(run, trained(run, "fsdp2", argv, launcher))


def plan(run: Run) -> None:
    from trl import get_peft_config

    from trl_gym.config import GymGRPOConfig
    from trl_gym.errors import Problem
    from trl_gym.memory.plan import GIB, ROLLOUTS, DeviceMemory, this_device, try_estimate

    folder = _random_policy(run)
    told_to = {"gym_engine": "transformers", "max_steps": 2, "model_name_or_path": folder, "learning_rate": 1e-6}
    argv = options(run, "plan", **told_to, **_ROWS)
    _, args, model = train.parse_options(argv, GymGRPOConfig)
    device = DeviceMemory(total_bytes=24 * GIB) if run.dry else this_device()
    expected = try_estimate(args, str(folder), 1, device, peft_config=get_peft_config(model))
    if isinstance(expected, Problem):
        raise RuntimeError(expected.text)
    print(expected.describe())
    items = [item for item in expected.items if item.owner in ("trainer", "engine")]
    peaks = {moment: sum(item.num_bytes for item in items if moment in item.moments) for moment in expected.peaks}
    run.measure(**{f"planned_{moment}_gb": num_bytes / 1e9 for moment, num_bytes in peaks.items() if moment != "sync"})
    run.expect(not expected.problems, f"the plan says: {'; '.join(map(str, expected.problems))}")
    if run.dry:
        run.expect(peaks[ROLLOUTS] > 0, "the plan counts nothing")
        run.stops.append("of a GPU of 24 GiB that is not here: nothing is measured")
        return
    steps = trained(run, "plan", argv)
    told(run, steps)
    measured, planned = run.measured["trainer_peak_gb"], max(peaks.values()) / 1e9
    run.measure(peak_against_plan=measured / planned)
    run.expect(measured < _OVER * planned, f"torch reserved {measured:.1f} GB, and {planned:.1f} were planned")


def _random_policy(run: Run) -> Path:
    """Make a model with random weights (none for a dry run) that speaks with the small policy's tokenizer."""
    from transformers import AutoTokenizer, Qwen3ForCausalLM
    from weight_sync import SIZES

    small = ROOT / "recipes" / "small_policy"
    tokenizer = AutoTokenizer.from_pretrained(small)
    config = SIZES[_PLAN].config()
    config.architectures = ["Qwen3ForCausalLM"]
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    folder = run.folder / "model"
    if run.dry:
        config.save_pretrained(folder)
    else:
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
