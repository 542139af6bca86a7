"""Several training processes with real servers: after every weight sync the server computes what the trainer computes;
and when one process dies, every other says so, ends, and leaves nothing behind.

Three processes under `accelerate launch` with tied embeddings and accelerate's DDP, four forked ones with untied
embeddings and FSDP2. That is torch's own, over gloo: accelerate has it for GPUs only. For ZeRO, with which accelerate
cannot train without a GPU either, see `tests/weight_sync/test_sharded.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.ranks import NUM_STEPS, VICTIM
from tests.e2e.training import MAX_MEAN_GAP, ROOT
from tests.fork_ranks import run_ranks

pytestmark = pytest.mark.e2e

CPU_CONFIG = ROOT / "recipes" / "accelerate" / "cpu_two_processes.yaml"
RUNS = {3: ["ddp", "killed"], 4: ["fsdp2"]}
ENDS_WITHIN_S = 180  # of the death of a rank


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(3, marks=pytest.mark.shares("small"), id="3 ranks, tied"),
        pytest.param(4, marks=pytest.mark.shares("untied"), id="4 ranks, untied"),
    ],
)
def launched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, calculator_data: Any
) -> tuple[int, Path, subprocess.CompletedProcess[str], float]:
    """Number of ranks, folder of the runs, what the launcher said and when it ended; the servers still run."""
    folder = tmp_path_factory.mktemp("ranks")
    pair = request.getfixturevalue("pair" if request.param == 3 else "untied_pair")
    model = request.getfixturevalue("small_policy" if request.param == 3 else "untied_policy")
    data = calculator_data.generate(folder / "data", num_train=8, num_validation=1, seed=0)[0]
    arguments = [str(folder), pair.policy.base_url, pair.gym.head_url, str(data), str(model), *RUNS[request.param]]
    if request.param == 3:
        launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(CPU_CONFIG)]
        launch += ["--num_processes", "3", "--main_process_port", "0", "-m", "tests.e2e.ranks", *arguments]
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"}
        environment = os.environ | environment
        done = subprocess.run(launch, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    else:
        done = run_ranks(4, "tests.e2e.ranks", *arguments)
    ended = time.time()
    assert pair.policy.client.weight_version()  # servers that were passed in are not the ranks' to stop
    return request.param, folder, done, ended


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_after_every_sync_the_server_computes_what_the_trainer_computes(
    launched: tuple[int, Path, subprocess.CompletedProcess[str], float],
) -> None:
    num_ranks, folder, done, _ = launched
    for kind in (kind for kind in RUNS[num_ranks] if kind != "killed"):
        assert len(list((folder / kind).glob("done-*"))) == num_ranks, done.stderr[-6000:]
        gaps = lines(folder / kind / "gaps.jsonl")
        assert [line["step"] for line in gaps] == list(range(NUM_STEPS + 1))
        assert all(line["gap"] < MAX_MEAN_GAP / 10 for line in gaps), (kind, gaps)
        assert all(line["learnt"] > 0 for line in gaps[1:])  # there was something to send
        metrics = lines(folder / kind / "metrics.jsonl")
        assert [line["step"] for line in metrics] == list(range(1, NUM_STEPS + 1))
        assert all(line["weight_sync/probe_gap"] < MAX_MEAN_GAP / 10 for line in metrics)


def test_a_run_ends_well_or_after_a_killed_rank_with_words_on_every_rank_and_nothing_left(
    launched: tuple[int, Path, subprocess.CompletedProcess[str], float],
) -> None:
    num_ranks, folder, done, ended = launched
    if "killed" not in RUNS[num_ranks]:
        assert done.returncode == 0, done.stderr[-6000:]
        return
    assert not list((folder / "killed").glob("done-*"))
    assert done.returncode != 0
    assert (folder / "killed" / "gaps.jsonl").exists(), done.stderr[-6000:]
    assert ended - (folder / "killed" / "gaps.jsonl").stat().st_mtime < ENDS_WITHIN_S
    for rank in set(range(num_ranks)) - {VICTIM}:
        told = f"Rank {rank} of {num_ranks} was told to end (SIGTERM) in step 2."
        lost = f"RankLostError: Rank {rank} of {num_ranks} lost the connection to another rank in step 2"
        assert told in done.stderr or lost in done.stderr, done.stderr[-6000:]
    assert "Root Cause" in done.stderr and f"Signal {int(signal.SIGKILL)} (SIGKILL)" in done.stderr
    pids = [int((folder / "killed" / f"pid-{rank}").read_text()) for rank in range(num_ranks)]
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
