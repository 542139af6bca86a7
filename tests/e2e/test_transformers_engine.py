"""Training with the engine in the trainer's own process, on a real NeMo Gym, with vLLM that cannot be imported.

One Gym serves all runs of one process, which follow each other at one address. Two ranks are forked from a process in
which vLLM was hidden before anything was imported; they start everything themselves, as a user's run does.
"""

from __future__ import annotations

import _thread
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from tests.e2e.training import CALCULATOR, ROOT, RecordingTrainer, config
from tests.e2e.training import gap as mean_gap
from tests.fork_ranks import free_port
from trl_gym import GymServers, load_gym_dataset
from trl_gym.cli import main as main_of_cli
from trl_gym.policy_server.transformers_engine.server import TransformersServer
from trl_gym.processes import bind_socket
from trl_gym.rollouts.journal import read_journal

pytestmark = [pytest.mark.e2e, pytest.mark.no_policy]

KEY = "a-key-of-the-tests"
MAX_GAP = 1e-4  # nats, of any trained token in float32
NUM_STEPS = 4
NUM_RANKS = 2
BATCH: dict[str, Any] = {"num_generations": 4, "per_device_train_batch_size": 16, "max_steps": NUM_STEPS}
HIDDEN = "import sys; sys.modules['vllm'] = None; from tests.fork_ranks import main; "


@pytest.fixture(scope="module", autouse=True)
def _without_vllm() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", None)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, calculator_data: Any) -> tuple[Path, Path]:
    return calculator_data.generate(tmp_path_factory.mktemp("data"), num_train=64, num_validation=16, seed=0)


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def gym(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GymServers]:
    url, logs = f"http://127.0.0.1:{port}/v1", tmp_path_factory.mktemp("gym")
    with GymServers(
        [CALCULATOR / "calculator.yaml"], policy_base_url=url, policy_api_key=KEY, log_dir=logs
    ) as started:
        yield started


@pytest.fixture(scope="module")
def new_trainer(
    small_policy: Path, gym: GymServers, port: int, data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RecordingTrainer]:
    def make(folder: Path | None = None, peft_config: LoraConfig | None = None, **options: Any) -> RecordingTrainer:
        return RecordingTrainer(
            model=str(small_policy),
            args=config(folder or tmp_path_factory.mktemp("run"), **BATCH | {"gym_verify_sync_steps": 1} | options),
            train_dataset=load_gym_dataset(data[0]),
            eval_dataset=load_gym_dataset(data[1]),
            policy_server=TransformersServer(port=port, api_key=KEY, max_model_len=512),
            gym_servers=gym,
            peft_config=peft_config,
        )

    return make


@pytest.fixture(scope="module")
def run(new_trainer: Callable[..., RecordingTrainer]) -> Iterator[RecordingTrainer]:
    """Steps with an evaluation after every second one, and a fifth rollout for each group of four."""
    with new_trainer(eval_steps=2, gym_oversample=1) as trainer:
        trainer.train()
        yield trainer


class LosesGym(RecordingTrainer):
    """Stops its NeMo Gym forever in the rollouts of the first step, and kills the next one between two steps."""

    pids: tuple[int, ...] = ()

    def build_trajectories(self, *args: Any) -> Any:
        if not self.pids:
            self.pids = (self.gym_servers.servers[0].pid or 0,)
            os.kill(self.pids[0], signal.SIGSTOP)
        return super().build_trajectories(*args)

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(self.pids) == 1:
            self.pids += (self.gym_servers.servers[0].pid or 0,)
            os.kill(self.pids[1], signal.SIGKILL)
        return super().compute_loss(*args, **kwargs)


def test_a_gym_that_is_stopped_forever_or_dies_is_started_again(
    small_policy: Path, data: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"max_steps": 2, "eval_strategy": "no", "gym_config_paths": [str(CALCULATOR / "calculator.yaml")]}
    args = config(tmp_path, **BATCH | options, gym_engine="transformers", vllm_max_model_length=512, gym_retries=0)
    with LosesGym(model=str(small_policy), args=args, train_dataset=load_gym_dataset(data[0])) as run:
        run.train()
        assert run.gym_servers.servers[0].pid not in run.pids
    require_sound(run)
    assert re.search(r"restarting NeMo Gym \(1 of 3 restarts\): .*was stopped by someone \(SIGSTOP\)", caplog.text)
    assert re.search(r"restarting NeMo Gym \(2 of 3 restarts\): .*\(signal SIGKILL\)", caplog.text)
    assert sorted(path.name for path in (tmp_path / "logs").glob("gym*.log")) == [
        *("gym-restart1.log", "gym-restart2.log", "gym.log")
    ]
    counted = [line for line in read_journal(tmp_path / "rollouts") if line["failure"] is None and not line["retried"]]
    assert len(counted) == 2 * 16 and len({line["rollout_id"] for line in counted}) == 32
    assert all(not psutil.pid_exists(pid) for pid in run.pids)


def largest_gap(batch: dict[str, Any]) -> float:
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    return (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[mask].abs().max().item()


def lines(run: RecordingTrainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run.args.output_dir) / "metrics.jsonl").read_text().splitlines()]


def require_sound(run: RecordingTrainer) -> None:
    """Every trained token was sampled, by weights that give it the same probability in the trainer."""
    assert run.seen
    for batch in run.seen:
        assert largest_gap(batch) < MAX_GAP
        for row, rollout in enumerate(batch["rollouts"]):
            assert rollout.failure is None, rollout.failure
            calls = run.calls[rollout.request.rollout_id]
            for before, after in itertools.pairwise(calls):
                assert after.prompt_ids[: len(before.prompt_ids + before.generation_ids)] == [
                    *before.prompt_ids,
                    *before.generation_ids,
                ]
            [trajectory] = rollout.trajectories
            sampled = [token for call in calls for token in call.generation_ids]
            mask = trajectory.env_mask
            assert [token for token, own in zip(trajectory.completion_ids, mask, strict=True) if own] == sampled
            length = len(trajectory.completion_ids)
            assert batch["completion_ids"][row, :length].tolist() == trajectory.completion_ids
            assert batch["tool_mask"][row, :length].tolist() == mask


def test_what_is_trained_was_sampled_and_no_weights_were_sent(run: RecordingTrainer) -> None:
    require_sound(run)
    assert any(len(run.calls[rollout.request.rollout_id]) == 2 for rollout in run.seen[0]["rollouts"])
    metrics = [line for line in lines(run) if "loss" in line]
    assert [line["weight_sync/bytes"] for line in metrics] == [0.0] * NUM_STEPS
    assert all(line["weight_sync/probe_gap"] < MAX_GAP for line in metrics)
    assert run.policy_server.client.info()["engine"] == "transformers"
    assert sys.modules["vllm"] is None


def test_evaluation_between_steps_samples_with_the_weights_of_its_step(run: RecordingTrainer) -> None:
    modes = [batch["mode"] for batch in run.seen]
    assert modes == ["train", "train", "eval", "train", "train", "eval"]
    recorded = list(read_journal(Path(run.args.output_dir) / "rollouts"))
    counted = [one for one in recorded if one["failure"] is None]
    expected = {("train", step, step - 1) for step in range(1, NUM_STEPS + 1)} | {("eval", 2, 2), ("eval", 4, 4)}
    assert {(one["mode"], one["step"], one["version"]) for one in counted} == expected
    assert all(one["weight_versions"] == [str(one["version"])] for one in counted)
    assert any(line["grad_norm"] > 0 for line in lines(run) if "grad_norm" in line)  # 0 where all rewards are equal


def test_rewards_are_those_of_what_was_sampled(run: RecordingTrainer, calculator_scoring: ModuleType) -> None:
    """The call and the answer are read from the sampled tokens here, and scored once more."""
    tokenizer = AutoTokenizer.from_pretrained(run.args.output_dir + "/tokenizer")
    found: Counter[float] = Counter()
    for rollout in (one for batch in run.seen for one in batch["rollouts"]):
        output: list[dict[str, Any]] = []
        for call in run.calls[rollout.request.rollout_id]:
            if output:
                output.append({"type": "function_call_output"})
            text = tokenizer.decode(call.generation_ids, skip_special_tokens=True)
            told = re.search(r"<tool_call>\s*({.*})\s*</tool_call>", text, re.DOTALL)
            try:
                made = json.loads(told[1]) if told else {}
                output.append(
                    {"type": "function_call", "name": made["name"], "arguments": json.dumps(made["arguments"])}
                )
            except (ValueError, LookupError):  # text, as an answer is, or a call that cannot be read
                output.append({"type": "message", "role": "assistant", "content": text})
        row = rollout.request.row
        expected = row["expected_tool"], row["expected_arguments"], row["expected_answer"]
        assert rollout.reward == calculator_scoring.score(output, *expected).reward, output
        found[rollout.reward] += 1
    assert len(found) > 1, found


def test_rollouts_beyond_the_group_are_cancelled_at_the_engine(run: RecordingTrainer) -> None:
    kept, trained = lines(run), [batch for batch in run.seen if batch["mode"] == "train"]
    assert all(set(Counter(r.request.group for r in batch["rollouts"]).values()) == {4} for batch in trained)
    assert any("oversample/cancelled_fraction" in line for line in kept)
    text = run.policy_server.client.prometheus()[0]
    running = re.search(r"^vllm:num_requests_running\S* (\S+)$", text, re.MULTILINE)
    assert running is not None and float(running[1]) == 0


def break_sampling(run: RecordingTrainer, after: int, fault: Callable[[], None]) -> Callable[[], None]:
    """Call `fault` once, in the engine's thread, in a forward pass of sampling. Return what takes it out again."""
    calls, model = itertools.count(), run.accelerator.unwrap_model(run.model)

    def hook(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread() and next(calls) == after:
            fault()

    return model.register_forward_pre_hook(hook).remove


def test_training_goes_on_after_ctrl_c_and_after_the_engine_has_died(
    run: RecordingTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    remove = break_sampling(run, 3, _thread.interrupt_main)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    remove()
    model = run.accelerator.unwrap_model(run.model)
    with torch.no_grad():
        assert math.isfinite(model(torch.tensor([[1, 2, 3]])).logits.sum())  # an ordinary model again
    assert model.config._attn_implementation == "sdpa"

    def die() -> None:
        raise RuntimeError("a fault of the tests")

    run.seen.clear()
    remove = break_sampling(run, 5, die)
    run.train()
    remove()
    require_sound(run)
    assert [batch["mode"] for batch in run.seen].count("train") == NUM_STEPS
    assert "restarting the policy server" in caplog.text and "a fault of the tests" in caplog.text
    assert lines(run)[-2]["policy_server/restarts"] == 1 or lines(run)[-1].get("policy_server/restarts") == 1


def test_rollouts_that_use_up_their_budget_are_cut_and_trained(run: RecordingTrainer) -> None:
    run.seen.clear()
    run.max_completion_length = 8
    run.train()
    require_sound(run)
    rollouts = [rollout for batch in run.seen for rollout in batch["rollouts"]]
    assert all(len(rollout.trajectories[0].completion_ids) <= 8 for rollout in rollouts)
    assert any(rollout.is_truncated for rollout in rollouts)


def test_after_close_nothing_serves_and_the_model_is_an_ordinary_one(
    run: RecordingTrainer, port: int, gym: GymServers
) -> None:
    run.close()
    assert not [thread for thread in threading.enumerate() if "policy server" in thread.name]
    with bind_socket(port=port):
        pass  # the port is free
    assert gym.agents  # it was passed in, and is not ours to stop


def test_the_doctor_examines_a_run_without_vllm(
    small_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    run = ["--config", "recipes/quickstart.yaml", "--gym_engine", "auto", "--output_dir", str(tmp_path / "run")]
    assert main_of_cli(["doctor", "--json", *run, "--small_policy_dir", str(small_policy)]) == 0
    told = {check["name"]: check["text"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert "since vLLM is not installed" in told["engine"]
    assert "by shared" in told["weight sync"] and "nats" in told["weight sync"]
    assert "calculator_simple_agent: reward" in told["rollouts"]
    assert not (tmp_path / "run").exists()


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
ADAPTER: dict[str, Any] = {
    "gradient_checkpointing": True,
    "learning_rate": 1e-2,
    "max_steps": 2,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 1,
    "gym_refill_rounds": 1,
}


def test_an_adapter_is_trained_unmerged_and_resumed_with_what_was_sampled(
    new_trainer: Callable[..., RecordingTrainer], tmp_path: Path
) -> None:
    with new_trainer(tmp_path, LORA, **ADAPTER) as first:
        first.train()
        require_sound(first)
        assert [p for name, p in first.model.named_parameters() if "lora_B" in name and p.abs().sum() > 0]
    with new_trainer(tmp_path, LORA, **ADAPTER) as resumed:
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        [again] = resumed.seen
    before = first.seen[1]["rollouts"]
    assert [r.request.group for r in again["rollouts"]] == [r.request.group for r in before]
    assert all(
        ours.trajectories[0].completion_ids == theirs.trajectories[0].completion_ids
        for ours, theirs in zip(again["rollouts"], before, strict=True)
    ), "what was on disk is not sampled again"
    assert largest_gap(again) < MAX_GAP, "weights, adapter and tokens are those of before"


def test_a_model_in_float32_is_trained_under_autocast(new_trainer: Callable[..., RecordingTrainer]) -> None:
    with new_trainer(bf16=True, max_steps=2, eval_strategy="no") as trainer:
        trainer.train()
        assert all(batch["rollouts"] and math.isfinite(largest_gap(batch)) for batch in trainer.seen)
        assert max(map(mean_gap, trainer.seen)) < 0.01  # sums of bfloat16 in another order


# -- two ranks --------------------------------------------------------------------------------------------------------


def main(output_dir: str, data: str, model: str) -> None:
    """One rank: everything is started by the trainer; the engine of the last rank dies once."""
    trainer = RecordingTrainer(
        model=model,
        args=config(
            Path(output_dir),
            **BATCH | {"per_device_train_batch_size": 8, "max_steps": 3, "eval_strategy": "no"},
            gym_config_paths=[str(CALCULATOR / "calculator.yaml")],
            vllm_max_model_length=512,
            gym_verify_sync_steps=1,
        ),
        train_dataset=load_gym_dataset(data),
    )
    rank = trainer.accelerator.process_index
    assert trainer.accelerator.num_processes == NUM_RANKS

    def die() -> None:
        raise RuntimeError("a fault of the tests")

    if rank == NUM_RANKS - 1:
        break_sampling(trainer, 5, die)
    trainer.train()
    require_sound(trainer)
    facts = {
        "urls": list(trainer.policy_server.base_urls),
        "weights": sum(p.double().sum().item() for p in trainer.model.parameters()),
        "restarts": trainer._source._servers.num_restarts,  # type: ignore[attr-defined]
        "calls": trainer.policy_server._engine.counters.requests,  # type: ignore[attr-defined]
        "vllm": [name for name, module in sys.modules.items() if name.split(".")[0] == "vllm" and module is not None],
    }
    (Path(output_dir) / f"rank-{rank}.json").write_text(json.dumps(facts))
    trainer.close()
    torch.distributed.destroy_process_group()


def test_two_ranks_serve_their_copies_as_one_policy(
    tmp_path: Path, data: tuple[Path, Path], small_policy: Path
) -> None:
    arguments = [str(tmp_path), str(data[0]), str(small_policy)]
    code = f"{HIDDEN} sys.exit(main({NUM_RANKS}, 'tests.e2e.test_transformers_engine', {arguments!r}))"
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(NUM_RANKS))
    assert first["urls"] == second["urls"] and len(set(first["urls"])) == NUM_RANKS
    assert first["weights"] == second["weights"]
    assert first["restarts"] == 1
    assert first["calls"] > 0 and second["calls"] > 0
    assert first["vllm"] == second["vllm"] == []
    assert "since vLLM is not installed" in done.stdout
