"""The model card's section, and that `push_to_hub` uploads the folder with it. Rollouts come from a journal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from peft import LoraConfig

from tests.policy_server.tiny_model import build_model, build_tokenizer
from tests.rollouts.recorded import request, rollout, write
from trl_gym import GymGRPOConfig, GymGRPOTrainer, __version__, load_gym_dataset
from trl_gym.model_card import completed, describe, environments_of, settings_of
from trl_gym.policy_server.parsers import Parser, Parsers
from trl_gym.run.live import LiveSource

HISTORY = [
    {"step": 0, "eval_gym/calculator/reward": 0.25, "eval_reward": 0.25},
    {"step": 1, "gym/calculator/reward": 0.5, "reward": 0.5, "loss": 0.1, "reward_std": 0.2},
    {"step": 2, "gym/calculator/reward": 0.75, "reward": 0.75, "gym/search/reward": float("nan"), "loss": 0.0},
    {"step": 2, "eval_gym/calculator/reward": 1.0, "eval_reward": 1.0, "eval_runtime": 3.0},
    {"step": 2, "train_runtime": 9.0},
]


def test_the_section_has_first_and_last_numbers_of_what_tells_how_it_went() -> None:
    section = describe({"Optimizer steps": "2"}, HISTORY)
    assert "| Environments | `calculator`, `search` |" in section
    assert "| Optimizer steps | 2 |" in section
    results = section.split("| metric |")[1].splitlines()[2:]
    assert [line for line in results if line] == [
        "| `gym/calculator/reward` | 0.5 | 0.75 | 2 |",
        "| `reward` | 0.5 | 0.75 | 2 |",
        "| `eval_gym/calculator/reward` | 0.25 | 1 | 2 |",
        "| `eval_reward` | 0.25 | 1 | 2 |",
    ]


def test_a_run_that_logged_nothing_says_so() -> None:
    section = describe({}, [])
    assert "| Environments | none logged |" in section and "| metric |" not in section
    assert environments_of([]) == []


def test_the_section_stands_before_trls_versions_or_at_the_end() -> None:
    names = {"base": "someone/base", "folder": "out"}
    card = completed("# a\n\n### Framework versions\n\n- x", "S\n\n", **names)
    assert card == "# a\n\nS\n\n### Framework versions\n\n- x"
    assert completed("# a\n", "S\n\n", **names) == "# a\n\nS\n\n"


def test_a_live_run_names_gym_policy_server_and_transport(tmp_path: Path) -> None:
    args = GymGRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], gym_drift="exclude", top_k=20)
    source = LiveSource(args, None)
    parsers = Parsers(Parser("hermes", "guessed"), Parser(None, "no thinking"))
    policy = SimpleNamespace(is_ours=True, parsers=parsers)
    source._servers = SimpleNamespace(gym=SimpleNamespace(gym_version="0.4.0"), policy=policy)
    source._weights = SimpleNamespace(transport_name="file")
    source._engine = "sglang 0.5.23"  # as the server tells when it is connected to
    rows = settings_of(args, num_steps=3, source=source.describe())
    assert rows["NeMo Gym"] == "0.4.0 (`host`)"
    assert rows["Policy server"] == "sglang 0.5.23 (`colocate`)"
    assert (rows["Tool parser"], rows["Reasoning parser"]) == ("`hermes` (guessed)", "none (no thinking)")
    assert (rows["Weight sync"], rows["Drift policy"], rows["Optimizer steps"]) == ("`file`", "`exclude`", "3")
    assert rows["trl-gym"] == __version__
    assert rows["Sampling"] == "temperature 1, top_p 1, top_k 20, at most 2048 tokens after the first prompt"


# -- the card of a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal of two tasks, `<folder>/rollouts`, and their rows, `<folder>/train.jsonl`."""
    folder = tmp_path_factory.mktemp("recorded")
    asked = [request(task, member) for task in range(2) for member in range(2)]
    write(folder / "rollouts", [rollout(one, reward=float(one.member)) for one in asked])
    rows = [{"responses_create_params": {"input": f"{task} + 1?"}, "expected": task + 1} for task in range(2)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_trainer(
    recorded: Path, output_dir: Path, callbacks: Any = None, model: Any = None, peft_config: Any = None, **changes: Any
) -> GymGRPOTrainer:
    """Two steps on the recorded rollouts, without any server."""
    tokenizer = build_tokenizer()
    args = GymGRPOConfig(
        output_dir=str(output_dir),
        gym_replay=str(recorded / "rollouts"),
        use_cpu=True,
        num_generations=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **({"max_completion_length": 8, "max_steps": 2, "report_to": [], "save_strategy": "no"} | changes),
    )
    return GymGRPOTrainer(
        model=model or build_model(tokenizer, tie=True, seed=0),
        peft_config=peft_config,
        processing_class=tokenizer,
        args=args,
        train_dataset=load_gym_dataset(recorded / "train.jsonl"),
        callbacks=callbacks,
    )


def trained(recorded: Path, output_dir: Path, **changes: Any) -> GymGRPOTrainer:
    trainer = make_trainer(recorded, output_dir, **changes)
    trainer.train()
    return trainer


def test_a_context_that_ends_before_the_rollout_is_warned_of(
    recorded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(recorded, tmp_path / "short").close()
    assert "the context of" not in caplog.text
    make_trainer(recorded, tmp_path / "long", max_completion_length=10**6).close()
    assert "`max_completion_length` 1000000 and a prompt are more than the context of" in caplog.text


def test_every_checkpoint_has_a_card_with_the_facts_so_far(recorded: Path, tmp_path: Path) -> None:
    trainer = trained(recorded, tmp_path, save_strategy="steps", save_steps=2)
    card = (tmp_path / "README.md").read_text()
    assert "| Optimizer steps | 2 |" in card
    assert "recorded by an earlier run, not sampled" in card
    assert "| Environments | `recorded` |" in card
    logged = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert f"| `reward` | {logged[0]:.4g} | {logged[-1]:.4g} |" in card
    assert card.index("### Environments and rollouts") < card.index("### Framework versions")
    metadata = huggingface_hub.ModelCard(card).data
    assert {"trl", "grpo", "trl-gym", "nemo-gym"} <= set(metadata.tags)
    assert "None" not in card and "fine-tuned version of a model that was made from a configuration." in card
    assert "Sampling" not in card, "who rolled out decided that"


def test_a_card_names_a_local_base_model_and_where_the_adapter_is(recorded: Path, tmp_path: Path) -> None:
    build_model(build_tokenizer(), tie=True, seed=0).save_pretrained(tmp_path / "small")
    base, out = str(tmp_path / "small"), tmp_path / "out"
    lora = LoraConfig(r=2, target_modules="all-linear")
    made = trained(recorded, out, model=base, peft_config=lora, save_strategy="steps", save_steps=1, max_steps=1)
    card = (out / "README.md").read_text()
    assert "None" not in card and "# Model Card for out\n" in card
    assert "a fine-tuned version of the local model `small`." in card and f'model="{out}/checkpoint-1"' in card
    shutil.rmtree(out / "checkpoint-1")
    made.create_model_card()  # by hand
    card = (out / "README.md").read_text()
    assert "None" not in card and "# Model Card for out\n" in card and f'model="{out}"' in card


def test_push_to_hub_uploads_model_and_card(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faked at the calls that reach the network; nothing of the trainer or of transformers is."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self: Any, repo_id: str, **options: Any) -> Any:
        asked.append(("create", {"repo_id": repo_id}))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self: Any, **options: Any) -> str:
        sent = {str(path.relative_to(options["folder_path"])) for path in Path(options["folder_path"]).rglob("*")}
        asked.append(("upload", {**options, "sent": sent, "card": Path(tmp_path, "README.md").read_text()}))
        return "committed"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    trainer = trained(recorded, tmp_path, hub_model_id="someone/calculator-policy")
    trainer.close()  # servers may be gone when a model is pushed
    assert trainer.push_to_hub(dataset_name="someone/tasks", blocking=True) == "committed"
    assert [kind for kind, _ in asked] == ["create", "upload"]
    upload = asked[-1][1]
    assert upload["repo_id"] == "someone/calculator-policy"
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= upload["sent"]
    assert "# Model Card for calculator-policy" in upload["card"]
    assert "### Environments and rollouts" in upload["card"]
    assert "someone/tasks" in upload["card"]
