"""One rank of a run of `tests/e2e/test_resume.py`.

Its arguments are OUTPUT_DIR POLICY_URL GYM_HEAD_URL DATA MODEL.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.e2e.test_resume import NUM_RANKS, Seeded, settings
from trl_gym import GymServers, PolicyServer, load_gym_dataset


def main(output_dir: str, policy: str, gym_head: str, data: str, model: str) -> None:
    args = settings(Path(output_dir), per_device_train_batch_size=4 // NUM_RANKS, max_steps=2, save_strategy="no")
    trainer = Seeded(
        model=model,
        args=args,
        train_dataset=load_gym_dataset(data),
        policy_server=PolicyServer.attach(policy),
        gym_servers=GymServers.attach(gym_head),
    )
    assert trainer.accelerator.num_processes == NUM_RANKS
    trainer.train()
    trainer.close()
    torch.distributed.destroy_process_group()
