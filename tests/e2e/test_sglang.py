"""The whole loop on a real SGLang on the CPU: rollouts through NeMo Gym, weights from disk, cancel, versions, death.

Skipped unless `TRL_GYM_SGLANG_PYTHON` names an interpreter that has SGLang, which pins packages that conflict with
ours: CI has none, and its stand-in (`tests/policy_server/sglang`) answers as this one was seen to.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.e2e.servers import calls_of, random_like, tagged
from tests.e2e.training import CALCULATOR, RecordingTrainer, config, gap
from tests.weight_sync.streams import Stream
from trl_gym import load_gym_dataset
from trl_gym.errors import PolicyServerLostError
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError
from trl_gym.policy_server.sglang.server import PYTHON_VARIABLE
from trl_gym.rollouts.journal import read_journal
from trl_gym.weight_sync import sglang_transfer
from trl_gym.weight_sync.transports.nccl import NcclTransport

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get(PYTHON_VARIABLE), reason=f"{PYTHON_VARIABLE} names no SGLang"),
]

NUM_STEPS = 3
MAX_GAP = 1e-3  # nats, in float32
Json = dict[str, Any]

USER = {"role": "user", "content": "What is 47 + 36?"}


@pytest.fixture(scope="module")
def run(
    alone: None, small_policy: Path, calculator_data: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RecordingTrainer]:
    """A trainer that starts SGLang, after a few steps of training; its servers run on."""
    data = calculator_data.generate(tmp_path_factory.mktemp("data"), num_train=64, num_validation=8, seed=0)[0]
    args = config(
        tmp_path_factory.mktemp("run"),
        gym_engine="sglang",
        gym_sglang_args={"max-total-tokens": 32768, "max-running-requests": 64},
        gym_config_paths=[str(CALCULATOR / "calculator.yaml")],
        vllm_max_model_length=512,
        vllm_gpu_memory_utilization=0.05,
        num_generations=4,
        per_device_train_batch_size=16,
        max_steps=NUM_STEPS,
        eval_strategy="no",
        gym_verify_sync_steps=1,
    )
    trainer = RecordingTrainer(model=str(small_policy), args=args, train_dataset=load_gym_dataset(data))
    try:
        trainer.train()
        yield trainer
    finally:
        trainer.close()


@pytest.fixture
def client(run: RecordingTrainer) -> PolicyClient:
    return run.policy_server.client


def test_it_is_sglang_that_samples(client: PolicyClient) -> None:
    info = client.info()
    assert (info["engine"], info["model_names"], info["max_model_len"]) == ("sglang", ["policy"], 512)
    assert info["weight_transports"] == ["file", "nccl"]


def test_every_sampled_token_is_kept_and_computed_alike(run: RecordingTrainer) -> None:
    rollouts = [rollout for batch in run.seen for rollout in batch["rollouts"]]
    assert len(rollouts) == NUM_STEPS * 16 and all(rollout.failure is None for rollout in rollouts)
    turns = [run.calls[rollout.request.rollout_id] for rollout in rollouts]
    assert max(map(len, turns)) > 1
    for calls in turns:
        for before, after in itertools.pairwise(calls):
            seen = before.prompt_ids + before.generation_ids
            assert after.prompt_ids[: len(seen)] == seen
    assert max(map(gap, run.seen)) < MAX_GAP


def test_each_step_samples_with_the_weights_of_the_last(run: RecordingTrainer, client: PolicyClient) -> None:
    recorded = list(read_journal(Path(run.args.output_dir) / "rollouts"))
    assert {(one["step"], *one["weight_versions"]) for one in recorded} == {
        (step, str(step - 1)) for step in range(1, NUM_STEPS + 1)
    }
    assert client.weight_version() == str(NUM_STEPS)
    lines = [json.loads(line) for line in (Path(run.args.output_dir) / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["weight_sync/probe_gap"] for line in lines if "weight_sync/probe_gap" in line]
    assert gaps and max(gaps) < MAX_GAP


@pytest.fixture
def calling(client: PolicyClient) -> Iterator[tuple[Json, threading.Thread]]:
    """A call of 400 tokens, which is being sampled."""
    tag, other = tagged(), PolicyClient(client.base_urls, api_key=client.api_key, timeout_s=120.0)

    def call() -> None:
        with contextlib.suppress(PolicyResponseError):  # it is told so if it is cancelled
            other.chat(messages=[USER], max_tokens=400, ignore_eos=True, trl_gym=tag)

    thread = threading.Thread(target=call)
    thread.start()
    while not running(client):
        assert thread.is_alive()
    yield tag, thread
    thread.join(120.0)
    other.close()


def running(client: PolicyClient) -> float:
    lines = "\n".join(client.prometheus()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("sglang:num_running_reqs{"))


def test_a_cancelled_rollout_ends_at_once(client: PolicyClient, calling: tuple[Json, threading.Thread]) -> None:
    tag, thread = calling
    assert client.cancel_rollouts([tag["rollout"]]) == 1
    thread.join(60.0)
    assert not thread.is_alive()
    while running(client):  # SGLang was told, too
        time.sleep(0.1)


def test_a_call_over_a_sync_tells_both_versions(
    client: PolicyClient, small_policy: Path, calling: tuple[Json, threading.Thread]
) -> None:
    tag, thread = calling
    client.pause("keep")
    before = client.weight_version()
    client.start_weight_update()
    client.update_weights({"path": str(small_policy / "model.safetensors")})
    client.finish_weight_update("later")
    client.reset_caches(running=True)
    client.resume()
    thread.join(120.0)
    [record] = client.rollout_records([tag["rollout"]])[tag["rollout"]]
    assert (record["weight_version"], record["last_version"]) == (before, "later")
    [call] = calls_of(client, tag)
    assert len(call.generation_ids) == len(call.logprobs) == 400


def test_a_broadcast_over_gloo_arrives(client: PolicyClient, small_policy: Path) -> None:
    model = random_like(small_policy, seed=3)
    transport = NcclTransport(transfer=sglang_transfer)
    transport.connect(client)
    client.pause("keep")
    client.start_weight_update()
    transport.send(Stream(dict(model.named_parameters())), client, "sent")
    client.finish_weight_update("sent")
    client.reset_caches(running=True)
    client.resume()
    transport.disconnect()
    ids = [5, 9, 300, 17, 44, 120, 8]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert client.prompt_logprobs([ids])[0] == pytest.approx(expected, abs=MAX_GAP)
    assert client.weight_version() == "sent"


def test_death_is_found_and_a_restart_has_the_address(run: RecordingTrainer, client: PolicyClient) -> None:
    server, url = run.policy_server, run.policy_server.base_url
    below = psutil.Process(server._process.pid).children(recursive=True)
    [scheduler] = [one for one in below if "scheduler" in one.name() or "scheduler" in " ".join(one.cmdline())]
    scheduler.kill()
    server._process.wait(60.0)
    with pytest.raises(PolicyServerLostError, match="policy server"):
        server.check()
    server.restart()
    assert server.base_url == url
    assert client.weight_version() == "default"  # those of the model folder
    assert client.chat(messages=[USER], max_tokens=4)["choices"][0]["message"]["content"]


def test_nothing_outlives_the_trainer(run: RecordingTrainer) -> None:
    below = psutil.Process(run.policy_server._process.pid).children(recursive=True)
    assert len(below) >= 4  # gateway, supervisor, SGLang, its processes
    run.close()
    _, alive = psutil.wait_procs(below, timeout=60.0)
    assert not alive
