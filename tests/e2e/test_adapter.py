"""LoRA adapters on one real server: versions that rollouts keep, adapters that cannot be served, and a training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.e2e.servers import calls_of
from tests.e2e.training import CALCULATOR, MAX_MEAN_GAP, RecordingTrainer, config, gap
from trl_gym import load_gym_dataset
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError
from trl_gym.policy_server.middleware.turn import TOKEN_KEYS
from trl_gym.policy_server.server import PolicyServer
from trl_gym.rollouts.trajectory import ModelCall
from trl_gym.weight_sync.source import AdapterSource
from trl_gym.weight_sync.sync import compare, probe_batch, trainer_logprobs
from trl_gym.weight_sync.transports.adapter import AdapterTransport
from trl_gym.weight_sync.transports.plan import lora_flags, plan_adapter, server_problem

pytestmark = pytest.mark.e2e

USER = {"role": "user", "content": "What is 47 + 36?"}
LORA = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
NUM_STEPS = 3

Json = dict[str, Any]


def adapted(model: Path, seed: int) -> PeftModel:
    """The policy with an adapter that changes it a lot."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), LORA).eval()
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.05)
    return peft_model


@pytest.fixture(scope="module")
def policy(
    alone: None, warm: None, small_policy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PolicyServer]:
    """Started for the adapter of `LORA`, with the flags of a managed server."""
    plan = plan_adapter(str(small_policy), LORA)
    flags = {"max-model-len": 512, "enforce-eager": True, "dtype": "float32", "tool-call-parser": "hermes"}
    server = PolicyServer(
        small_policy,
        vllm_args=flags | lora_flags(plan, max_adapters=2),
        log_dir=tmp_path_factory.mktemp("logs"),
        start_timeout_s=400.0,
        api_key="secret",
    )
    with server:
        yield server


@pytest.fixture(scope="module")
def models(small_policy: Path) -> list[PeftModel]:
    return [adapted(small_policy, seed) for seed in range(3)]


@pytest.fixture
def transport(policy: PolicyServer, tmp_path: Path) -> Iterator[AdapterTransport]:
    transport = AdapterTransport(tmp_path, max_adapters=2)
    transport.connect(policy.client)
    yield transport
    policy.client.clear_adapters()


def send(transport: AdapterTransport, client: PolicyClient, model: PeftModel, version: int) -> int:
    try:
        return transport.send(AdapterSource(model), client.patient(2.0), str(version))
    finally:
        transport.release()


def turn(client: PolicyClient, rollout: str, messages: list[Json]) -> Json:
    tag = {"rollout": rollout, "sampling": {"temperature": 1.0, "top_p": 1.0}}
    answer = client.chat(model="policy", messages=messages, max_tokens=12, trl_gym=tag, timeout_s=120.0)
    assert answer["model"] == "policy"
    return answer


def sampling_gap(model: PeftModel, call: ModelCall) -> float:
    """Largest difference in nats between the logprobs of a call and those of a model's own forward pass."""
    expected = trainer_logprobs(model, [call.prompt_ids + call.generation_ids])[0][len(call.prompt_ids) - 1 :]
    return max(abs(a - b) for a, b in zip(expected, call.logprobs, strict=True))


def held(client: PolicyClient) -> list[str]:
    return [adapter["name"] for adapter in client.info()["adapters"]["held"]]


def test_the_server_can_serve_it(policy: PolicyServer, models: list[PeftModel]) -> None:
    assert server_problem(plan_adapter(models[0]), policy.client.server_config()) is None


def test_rollouts_keep_the_version_that_they_began_with(
    policy: PolicyServer, models: list[PeftModel], transport: AdapterTransport, tmp_path: Path
) -> None:
    client = policy.client
    batch = probe_batch(models[0].config.vocab_size)
    assert client.weight_version() == "default"
    num_bytes = send(transport, client, models[0], 0)
    assert 0 < num_bytes < 200_000
    assert client.weight_version() == "0"
    assert compare(trainer_logprobs(models[0], batch), client.prompt_logprobs(batch)).max_gap < 1e-4
    # The same long prompt under every version: a block of the prefix cache that two shared would show in the gaps.
    user = {"role": "user", "content": "What is 47 + 36? " * 12}
    first = turn(client, "old", [user])
    send(transport, client, models[1], 1)
    assert held(client) == ["policy@0", "policy@1"]
    assert client.models()[0]["id"] == client.info()["model_names"][0] == "policy"
    new = turn(client, "new", [user])
    second = turn(client, "old", [user, first["choices"][0]["message"], USER])
    assert (first["weight_version"], second["weight_version"], new["weight_version"]) == ("0", "0", "1")
    assert compare(trainer_logprobs(models[1], batch), client.prompt_logprobs(batch)).max_gap < 1e-4

    with pytest.raises(PolicyResponseError, match=r"HTTP 409: policy@2 .*`gym_max_adapters`.*policy@0 by old"):
        send(transport, client, models[2], 2)
    assert client.weight_version() == "1"
    records = client.rollout_records(["old", "new"])
    assert [[record["weight_version"] for record in records[name]] for name in ("old", "new")] == [["0", "0"], ["1"]]
    (before, last), [other] = (calls_of(client, {"rollout": name}) for name in ("old", "new"))
    assert (
        last.prompt_ids[: len(before.prompt_ids + before.generation_ids)] == before.prompt_ids + before.generation_ids
    )
    assert sampling_gap(models[0], before) < 1e-3 < sampling_gap(models[1], before)
    assert sampling_gap(models[0], last) < 1e-3
    assert sampling_gap(models[1], other) < 1e-3
    assert held(client) == ["policy@1"]
    send(transport, client, models[2], 2)
    assert (held(client), client.weight_version()) == (["policy@2"], "2")
    assert compare(trainer_logprobs(models[2], batch), client.prompt_logprobs(batch)).max_gap < 1e-4
    assert compare(trainer_logprobs(models[1], batch), client.prompt_logprobs(batch)).max_gap > 0.01
    send(transport, client, models[0], 3)  # folders of adapters that were unloaded two syncs ago are gone
    folders = {path.name.rpartition("-")[0] for path in next(tmp_path.iterdir()).iterdir()}
    assert folders == {"policy@1", "policy@2", "policy@3"} - {"policy@1"}


def test_other_ways_to_sample_get_the_newest(
    policy: PolicyServer, models: list[PeftModel], transport: AdapterTransport
) -> None:
    client = policy.client
    send(transport, client, models[0], 0)
    greedy = {"messages": [USER], "temperature": 0.0, "max_tokens": 8, "logprobs": True}
    whole = client.chat(**greedy)
    assert (whole["model"], whole["weight_version"]) == ("policy", "0")
    ids = [whole["choices"][0]["message"][key] for key in TOKEN_KEYS]
    assert sampling_gap(models[0], ModelCall(prompt_ids=ids[0], generation_ids=ids[1], logprobs=ids[2])) < 1e-3
    response = client._sessions[0].post(f"{client.base_url}/chat/completions", json={**greedy, "stream": True})
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert {event["model"] for event in events} == {"policy"}
    entries = [
        entry for event in events for entry in ((event["choices"][0].get("logprobs") or {}).get("content") or [])
    ]
    assert [entry["logprob"] for entry in entries] == pytest.approx(
        whole["choices"][0]["message"]["generation_log_probs"]
    )
    assert client.chat(**greedy, model="policy@0")["choices"] == whole["choices"]  # an adapter by its name
    client.clear_adapters()
    assert (held(client), client.weight_version()) == ([], "default")


def test_an_adapter_that_cannot_be_served_is_refused_and_the_server_lives(
    policy: PolicyServer, models: list[PeftModel], transport: AdapterTransport, tmp_path: Path
) -> None:
    client = policy.client
    send(transport, client, models[0], 0)
    good = Path(client.info()["adapters"]["held"][0]["path"])

    def refused(change: Any, text: str) -> None:
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        change(bad)
        with pytest.raises(PolicyResponseError, match=text) as error:
            client.load_adapter("policy@1", str(bad), "1", max_adapters=2, wait_s=0)
        assert error.value.status == 400

    def cut(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    def unknown_module(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({k.replace("q_proj", "x_proj"): v for k, v in tensors.items()}, folder / "adapter_model.safetensors")

    def rank(folder: Path) -> None:
        save_file(
            {
                k: torch.zeros((16, v.shape[1]) if "lora_A" in k else (v.shape[0], 16))
                for k, v in load_file(folder / "adapter_model.safetensors").items()
            },
            folder / "adapter_model.safetensors",
        )
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"r": 16}))

    refused(shutil.rmtree, "does not exist on the policy server")
    refused(cut, "its header says")
    refused(unknown_module, r"vLLM did not load policy@1 .*x_proj")  # found by vLLM, in its engine
    refused(rank, "LoRA rank 16 is greater than max_lora_rank 8")
    assert client.health() and held(client) == ["policy@0"] and client.weight_version() == "0"
    turn(client, "after", [USER])
    [call] = calls_of(client, {"rollout": "after"})
    assert sampling_gap(models[0], call) < 1e-3


def test_training(policy: PolicyServer, small_policy: Path, tmp_path: Path, calculator_data: Any) -> None:
    """GRPO of a LoRA model: every version is sampled from exactly, and nothing but the adapter is sent."""
    train, _ = calculator_data.generate(tmp_path / "data", num_train=64, num_validation=8, seed=0)
    args = config(
        tmp_path / "run",
        max_steps=NUM_STEPS,
        eval_strategy="no",
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        gym_config_paths=[str(CALCULATOR / "calculator.yaml")],
        gym_weight_transport="adapter",
        gym_verify_sync_steps=1,
    )
    trainer = RecordingTrainer(
        model=str(small_policy),
        args=args,
        train_dataset=load_gym_dataset(train),
        policy_server=policy,
        peft_config=LORA,
    )
    with trainer:
        trainer.train()
        assert held(policy.client) == [f"policy@{NUM_STEPS}"]
    assert [batch["step"] for batch in trainer.seen] == list(range(NUM_STEPS))
    assert all(gap(batch) < MAX_MEAN_GAP for batch in trainer.seen)
    for batch in trainer.seen:
        versions = {record.weight_version for rollout in batch["rollouts"] for record in rollout.records}
        assert versions == {str(batch["step"])}
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["weight_sync/probe_gap"] for line in logged if "weight_sync/probe_gap" in line]
    assert gaps and all(gap < 1e-4 for gap in gaps)
    assert {line["weight_sync/bytes"] for line in logged if "weight_sync/bytes" in line}.issubset(range(200_000))
