"""One rank of the runs of `tests/e2e/test_ranks.py`, started by `accelerate launch` or forked.

ranks.py OUTPUT_DIR POLICY_URL GYM_HEAD_URL DATA MODEL RUN [RUN …]

Runs are `ddp`, `fsdp2` and `killed`, each in a folder of its own, one after the other: importing takes longest.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.e2e.training import RecordingTrainer, config
from trl_gym import GymServers, PolicyServer, load_gym_dataset
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.rollout import Rollout
from trl_gym.weight_sync.sharding import find_slots
from trl_gym.weight_sync.sync import compare, probe_batch, trainer_logprobs

NUM_STEPS = 2
VICTIM = 1
HELD_OUT = ("What is 12 times 34?", "Add 5 and 67.", "calculator", "Is 8 * 9 larger than 70?")


class Checked(RecordingTrainer):
    """After every sync: the server's log-probabilities of held-out prompts beside the trainer's, to `gaps.jsonl`."""

    before: list[list[float]] | None = None

    def compute_rewards(self, rollouts: list[Rollout]) -> list[float | None]:
        """Differ within every group, whatever was sampled: each step has something to learn."""
        return [None if r.reward is None else r.reward + 0.1 * r.request.member for r in rollouts]

    def _push_weights(self) -> None:
        super()._push_weights()
        step = self.state.global_step
        tokenizer = AutoTokenizer.from_pretrained(self.model.config._name_or_path)
        probe = probe_batch(len(tokenizer), seed=7)
        length = len(probe[0])
        batch = [*probe, *((tokenizer(text).input_ids * length)[:length] for text in HELD_OUT)]
        ours = trainer_logprobs(self.model_wrapped, batch)  # every rank: FSDP gathers
        if not self.accelerator.is_main_process:
            return
        gap = compare(ours, self.policy_server.client.prompt_logprobs(batch))
        learnt = 0.0 if self.before is None else compare(ours, self.before).mean_gap
        self.before = ours
        with open(Path(self.args.output_dir) / "gaps.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "gap": gap.mean_gap, "learnt": learnt}) + "\n")


class Sharded(Checked):
    """Trains what torch's FSDP2 has sharded already. On a CPU accelerate would take an FSDP config without a word and
    train whole parameters under DDP."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accelerator.prepare_model = lambda model, **_: model


class Killed(Checked):
    """One rank dies without notice in the middle of the rollouts of the second step."""

    def build_trajectories(self, answer: dict[str, Any], request: RolloutRequest, calls: Any) -> Any:
        if self.accelerator.process_index == VICTIM and self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().build_trajectories(answer, request, calls)


def sharded(name: str) -> PreTrainedModel:
    policy = AutoModelForCausalLM.from_pretrained(name)
    for layer in policy.model.layers:
        fully_shard(layer)
    fully_shard(policy)
    assert all(isinstance(parameter.data, DTensor) for parameter in policy.parameters())
    return policy


def run(kind: str, folder: Path, policy: str, gym_head: str, data: Path, model: str) -> None:
    num_ranks = int(os.environ["WORLD_SIZE"])
    trainer = {"ddp": Checked, "fsdp2": Sharded, "killed": Killed}[kind](
        model=sharded(model) if kind == "fsdp2" else model,
        args=config(
            folder,
            num_generations=8,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            max_steps=NUM_STEPS,
            eval_strategy="no",
            gym_verify_sync_steps=1,
        ),
        train_dataset=load_gym_dataset(data),
        policy_server=PolicyServer.attach(policy),
        gym_servers=GymServers.attach(gym_head),
    )
    assert trainer.accelerator.num_processes == num_ranks
    (folder / f"pid-{trainer.accelerator.process_index}").write_text(str(os.getpid()))
    trainer.train()
    assert all(slot.is_sharded is (kind == "fsdp2") for slot in find_slots(trainer.model_wrapped))
    assert isinstance(trainer.model_wrapped, DistributedDataParallel) is (kind == "ddp")
    trainer.close()
    (folder / f"done-{trainer.accelerator.process_index}").touch()


def main(folder: str, policy: str, gym_head: str, data: str, model: str, *kinds: str) -> None:
    for kind in kinds:
        own = Path(folder) / kind
        own.mkdir(exist_ok=True)
        run(kind, own, policy, gym_head, Path(data), model)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
