"""What threads cost and bring on a CPU: the trainer's update and scoring, and the engine's sampling.

    .venv/bin/python benchmarks/threads.py                        # both models, trainer and engine
    .venv/bin/python benchmarks/threads.py --models small --parts trainer --repeats 3

For 1 thread and for all cores, each with threads that spin while they wait (OpenMP's default) and with threads that
sleep (what `trl_gym.threads` chooses). Wall time is the best of the repeats, CPU time is that of the process (of the
server and all its children for the engine). Compare CPU times where the machine has other work: `load` is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SMALL = ROOT / "recipes/small_policy"
POLICIES = {"spin": "ACTIVE", "sleep": "PASSIVE"}
SHAPES = {"small": (32, 300), "135M": (4, 96)}  # sequences and tokens of a micro-batch
REQUESTS = {"small": (128, 24), "135M": (16, 16)}  # completions, and tokens sampled in each
PROMPT_TOKENS = 100


def measured(work: Callable[[], object], cpu: Callable[[], float] = time.process_time) -> tuple[float, float]:
    wall, used = time.perf_counter(), cpu()
    work()
    return time.perf_counter() - wall, cpu() - used


def load(name: str) -> Any:
    """The model in float32, as the trainer has it."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.weight_sync import SIZES, build

    if name != "small":
        return build(SIZES[name], torch.float32)
    return AutoModelForCausalLM.from_pretrained(SMALL)


def trainer(name: str, repeats: int) -> dict[str, tuple[float, float]]:
    """Best wall and CPU seconds of an update and of scoring. The threads are those of the environment."""
    import torch

    model = load(name)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = torch.randint(3, model.config.vocab_size, SHAPES[name])

    def logprobs() -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])

    def update() -> None:
        (-logprobs().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def score() -> None:
        with torch.no_grad():
            logprobs()

    update()
    times = {
        "update": [measured(update) for _ in range(repeats)],
        "scoring": [measured(score) for _ in range(repeats)],
    }
    return {part: (min(wall for wall, _ in own), min(cpu for _, cpu in own)) for part, own in times.items()}


def server_seconds(pid: int) -> Callable[[], float]:
    """A clock of the CPU time of a process and its descendants."""
    import psutil

    def seconds() -> float:
        process = psutil.Process(pid)
        times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
        return sum(one.user + one.system for one in times)

    return seconds


def engine(name: str, repeats: int, env: dict[str, str]) -> dict[str, tuple[float, float]]:
    """Best wall and CPU seconds per 1,000 sampled tokens."""
    from tests.policy_server.tiny_model import build_tokenizer
    from trl_gym.policy_server.server import PolicyServer

    count, tokens = REQUESTS[name]
    flags: dict[str, Any] = {"max-model-len": 1024, "enforce-eager": True, "max-num-seqs": count}
    with tempfile.TemporaryDirectory() as folder:
        if name == "small":
            model = SMALL
            flags |= {"dtype": "float32"}
        else:
            from benchmarks.weight_sync import SIZES

            model = Path(folder)
            build_tokenizer().save_pretrained(folder)
            config = SIZES[name].config().to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
            (model / "config.json").write_text(json.dumps(config))
            flags |= {"dtype": "bfloat16", "load-format": "dummy"}
        with PolicyServer(model, vllm_args=flags, env=env, log_dir=Path(folder) / "logs") as server:
            clients = [server.client.__class__(server.base_urls, api_key=server.client.api_key) for _ in range(count)]

            def sample(index: int) -> None:
                prompt = [3 + (31 * index + 7 * place) % 60 for place in range(PROMPT_TOKENS)]
                body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "logprobs": 0}
                clients[index]._call("POST", "/v1/completions", json={"model": "policy", **body})

            def batch() -> None:
                with ThreadPoolExecutor(count) as pool:
                    list(pool.map(sample, range(count)))

            assert server._process is not None and server._process.pid is not None
            clock = server_seconds(server._process.pid)
            batch()
            times = [measured(batch, clock) for _ in range(repeats)]
    scale = 1000 / (count * tokens)
    return {"1,000 tokens": (min(wall for wall, _ in times) * scale, min(cpu for _, cpu in times) * scale)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="small,135M")
    parser.add_argument("--parts", default="trainer,engine")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the trainer's part of one model, in this process
    args = parser.parse_args()
    if args.one:
        print(json.dumps(trainer(args.one, args.repeats)))
        return
    cores = len(os.sched_getaffinity(0))
    for name in args.models.split(","):
        for threads in sorted({1, cores}):
            for how, policy in POLICIES.items():
                env = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": policy}
                found: dict[str, tuple[float, float]] = {}
                if "trainer" in args.parts:
                    command = [sys.executable, __file__, "--one", name, "--repeats", str(args.repeats)]
                    done = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, check=True)
                    found |= json.loads(done.stdout)
                if "engine" in args.parts:
                    found |= engine(name, args.repeats, env)
                said = "   ".join(f"{part} {wall:6.2f} s, CPU {cpu:6.2f} s" for part, (wall, cpu) in found.items())
                print(f"{name:>6}  {threads} threads, {how:<5}  {said}   load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
