"""What is examined: options, and what checks have found out for those that come after them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gym.policy_server.client import PolicyClient
from trl_gym.policy_server.command import api_key_from_environment

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase
    from trl import ModelConfig

    from trl_gym.config import GymGRPOConfig
    from trl_gym.doctor.checks import Finding
    from trl_gym.doctor.options import ScriptOptions
    from trl_gym.gym.config import ResolvedConfigs
    from trl_gym.gym.install import GymInstallation
    from trl_gym.gym.servers import GymServers
    from trl_gym.policy_server.server import PolicyBackend
    from trl_gym.run.servers import RunServers


@dataclass(slots=True, kw_only=True)
class Subject:
    """A context manager: servers that checks have started end with it.

    Attributes:
        argv: Options as the training script takes them.
        quick: Whether no server is started.
        accelerate_config: Of `accelerate launch --config_file`; accelerate's own default when None.
        script: Of the training script itself; valid once "options file" has passed, like the next two.
        args: Of the trainer; may hold values that "options" complains of.
        model_options: TRL's.
        problems: What is wrong with the values of `args`.
        unread: Options that are unknown or of a wrong type.
        installation: NeMo Gym's; after "gym interpreter".
        configs: NeMo Gym's; after "gym configs".
        agents: Names that the configs, or a running Gym, know; after "gym configs".
        train_rows: Examples of the datasets that can be read; after "dataset rows".
        model: Folder or hub id; after "model", like the next two.
        model_config: Its architecture.
        num_params: All parameters.
        tokenizer: After "tokenizer".
        policy: After "policy server".
        gym: After "gym servers".
        run: Both of them; after "token continuation".
        logged: Warnings that trl-gym has logged during the check that runs now.
    """

    argv: Sequence[str]
    quick: bool = False
    accelerate_config: Path | None = None
    script: ScriptOptions = field(init=False)
    args: GymGRPOConfig = field(init=False)
    model_options: ModelConfig = field(init=False)
    problems: list[str] = field(default_factory=list)
    unread: list[Finding] = field(default_factory=list)
    installation: GymInstallation = field(init=False)
    configs: ResolvedConfigs | None = None
    agents: tuple[str, ...] | None = None
    train_rows: list[dict[str, Any]] = field(default_factory=list)
    model: str = field(init=False)
    model_config: PretrainedConfig = field(init=False)
    num_params: int = field(init=False)
    tokenizer: PreTrainedTokenizerBase = field(init=False)
    policy: PolicyBackend = field(init=False)
    gym: GymServers = field(init=False)
    run: RunServers = field(init=False)
    logged: list[str] = field(default_factory=list)
    resources: ExitStack = field(default_factory=ExitStack)
    _work_dir: Path | None = None

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir or "trainer_output")

    @property
    def serves(self) -> bool:
        """Whether the run has servers: training from a journal has none."""
        return self.args.gym_replay is None

    @property
    def starts_policy(self) -> bool:
        """Whether the run starts its policy server itself."""
        return self.serves and self.args.vllm_mode != "server"

    @property
    def starts_gym(self) -> bool:
        """Whether the run starts its NeMo Gym itself."""
        return self.serves and self.args.gym_mode != "attach"

    def work_dir(self) -> Path:
        """For logs, a journal and data of this examination; the run's own folder is not touched."""
        if self._work_dir is None:
            self._work_dir = Path(tempfile.mkdtemp(prefix="trl-gym-doctor-"))
        return self._work_dir

    def remote_client(self, url: str) -> PolicyClient:
        """Control plane of a server that runs elsewhere."""
        client = PolicyClient(url, api_key=api_key_from_environment(), timeout_s=30.0)
        self.resources.callback(client.close)
        return client

    def forget(self) -> None:
        """Remove that folder, when no message names a log in it."""
        if self._work_dir is not None:
            shutil.rmtree(self._work_dir)
            self._work_dir = None

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self.resources.close()
