"""One rank of a run of `tests/e2e/test_resume.py`, started by `accelerate launch`.

two_ranks.py OUTPUT_DIR POLICY_URL GYM_HEAD_URL DATA MODEL
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.e2e.test_resume import NUM_RANKS, Seeded, settings
from trl_gym import GymServers, PolicyServer, load_gym_dataset


def main(output_dir: Path, policy: str, gym_head: str, data: Path, model: Path) -> None:
    args = settings(output_dir, per_device_train_batch_size=4 // NUM_RANKS, max_steps=2, save_strategy="no")
    trainer = Seeded(
        model=str(model),
        args=args,
        train_dataset=load_gym_dataset(data),
        policy_server=PolicyServer.attach(policy),
        gym_servers=GymServers.attach(gym_head),
    )
    assert trainer.accelerator.num_processes == NUM_RANKS
    trainer.train()
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
