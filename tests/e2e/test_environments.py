"""Real environments that nobody here wrote, mixed in one batch, through the trainer's own collector."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.servers import FLAGS
from tests.e2e.training import MAX_MEAN_GAP, ROOT, RecordingTrainer, config, gap
from tests.policy_server.tiny_model import build_random_policy
from trl_gym import PolicyServer, load_gym_dataset

pytestmark = pytest.mark.e2e

ENVIRONMENTS = (
    "example_single_tool_call",
    "example_multi_step",
    "example_session_state_mgmt",
    "example_multi_turn_gymnasium",
    "workplace_assistant",
    "reasoning_gym",
    "mcqa",
)


GYM = ROOT / ".gym-venv-0.7"
OWN_CALLS = Path(__file__).parent / "environments" / "own_calls" / "own_calls.yaml"
TRAINED = ("example_single_tool_call", "reasoning_gym")  # short prompts: a forward pass over them is cheap
AGENTS = {name: f"{name}_simple_agent" for name in ENVIRONMENTS} | {
    "example_multi_turn_gymnasium": "example_multi_turn_gymnasium_agent"
}


def example_rows(path: Path, installation: Path, names: tuple[str, ...], num_rows: int) -> Path:
    """The first rows that each environment ships, with the agent that its config defines."""
    with open(path, "w") as out:
        for name in names:
            lines = (installation / name / "data" / "example.jsonl").read_text().splitlines()
            for row in map(json.loads, lines[:num_rows]):
                row["agent_ref"] = {"type": "responses_api_agents", "name": AGENTS[name]}
                out.write(json.dumps(row) + "\n")
    return path


def long_context_policy(folder: Path) -> Path:
    model = build_random_policy(folder)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 40960}))
    return model


@pytest.fixture(scope="module")
def policy(alone: None, warm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyServer]:
    folder = tmp_path_factory.mktemp("long")
    flags = FLAGS | {"max-model-len": 40960, "max-num-seqs": 16}
    with PolicyServer(long_context_policy(folder / "policy"), vllm_args=flags, log_dir=folder) as server:
        yield server


@pytest.mark.slow
def test_they_roll_out_through_the_trainer(tmp_path: Path, policy: PolicyServer) -> None:
    """All seven in one Gym and one batch; then one step of training on two of them mixed.

    `test_gym_servers.py` has all seven on both versions of Gym, `test_token_fidelity.py` three of the older on vLLM.
    """
    installation = next((GYM / "lib").glob("python*/site-packages/resources_servers"))
    every = load_gym_dataset(example_rows(tmp_path / "every.jsonl", installation, ENVIRONMENTS, 2))
    args = config(
        tmp_path / "out",
        gym_config_paths=[f"resources_servers/{name}/configs/{name}.yaml" for name in ENVIRONMENTS],
        gym_python=str(GYM / "bin" / "python"),
        max_completion_length=48,
        per_device_train_batch_size=8,
        num_generations=2,
        max_steps=1,
        eval_strategy="no",
        gym_deadline=300,
    )
    with RecordingTrainer(
        model=str(policy.model),
        args=args,
        policy_server=policy,
        train_dataset=load_gym_dataset(example_rows(tmp_path / "two.jsonl", installation, TRAINED, 2)),
    ) as trainer:
        trainer._push_weights()  # as TRL does
        trainer._settle(trainer._next_batch([example for example in every for _ in range(2)]))
        rows = trainer._columns
        rollouts = trainer._accounting.rollouts
        assert [(r.request.agent, r.failure.text) for r in rollouts if r.failure is not None] == []
        assert {rollout.request.agent for rollout in rollouts} == set(AGENTS.values())
        assert all(sum(mask) > 0 for mask in rows["env_mask"])

        trainer.train()
    [batch] = trainer.seen
    assert {rollout.request.agent for rollout in batch["rollouts"]} == {AGENTS[name] for name in TRAINED}
    assert all(rollout.failure is None for rollout in batch["rollouts"])
    assert gap(batch) < MAX_MEAN_GAP


@pytest.mark.slow
def test_agents_that_make_their_own_calls_train(tmp_path: Path, policy: PolicyServer) -> None:
    """They lose `metadata.extra_body` and every token id; two of them make two rows of a rollout. What they send on
    both versions of Gym is in `test_identity.py`."""
    num_turns = {"chat_agent": 2, "harness_agent": 2, "sdk_agent": 2, "parallel_agent": 4, "compacting_agent": 4}
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as out:
        for agent in num_turns:
            parameters = {"input": [{"role": "user", "content": f"say something, {agent}"}]}
            reference = {"type": "responses_api_agents", "name": agent}
            row = {"responses_create_params": parameters, "agent_ref": reference, "call_limit": 8}
            out.write(json.dumps(row) + "\n")
    args = config(
        tmp_path / "out",
        gym_config_paths=[str(OWN_CALLS)],
        gym_python=str(GYM / "bin" / "python"),
        gym_drift="split",
        max_completion_length=200,
        per_device_train_batch_size=10,
        num_generations=2,
        max_steps=1,
        eval_strategy="no",
    )
    dataset = load_gym_dataset(rows)
    with RecordingTrainer(model=str(policy.model), args=args, policy_server=policy, train_dataset=dataset) as trainer:
        trainer.train()
        assert "rollouts/untagged_calls" not in trainer.state.log_history[0]
    [batch] = trainer.seen
    assert [rollout.failure.text for rollout in batch["rollouts"] if rollout.failure is not None] == []
    assert {rollout.request.agent for rollout in batch["rollouts"]} == set(num_turns)
    for rollout in batch["rollouts"]:
        expected = num_turns[rollout.request.agent]
        assert [row.num_turns for row in rollout.trajectories] == ([2, 2] if expected == 4 else [2])
        assert sum(sum(row.env_mask) for row in rollout.trajectories) > 0
    assert gap(batch) < MAX_MEAN_GAP
