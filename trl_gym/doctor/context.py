"""The input and output of a check: the run that is examined, what earlier checks have found out, and findings."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gym.engines import started_engine
from trl_gym.errors import Problem, TrlGymError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase
    from trl import ModelConfig

    from trl_gym.config import GymGRPOConfig
    from trl_gym.gym.install import GymInstallation
    from trl_gym.gym.servers import GymServers
    from trl_gym.policy_server.fork_server import ForkServer
    from trl_gym.policy_server.server import PolicyBackend
    from trl_gym.run.servers import RunServers
    from trl_gym.train import ScriptArguments


class Status(StrEnum):
    """The outcome of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "not checked"


QUICK = "--quick"  # leaves out what would start a server


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found: what and where, and what to do about it."""

    status: Status
    text: str
    remedy: str = ""
    because: tuple[str, ...] = ()  # checks that something could not be checked without, or `QUICK`


def ok(text: str) -> Finding:
    return Finding(Status.OK, text)


def warning(text: str, remedy: str = "") -> Finding:
    return Finding(Status.WARNING, text, remedy)


def failed(text: str, remedy: str) -> Finding:
    return Finding(Status.FAILED, text, remedy)


def skipped(text: str, remedy: str = "", because: tuple[str, ...] = ()) -> Finding:
    return Finding(Status.SKIPPED, text, remedy, because)


LEFT_OUT = skipped(f"left out by {QUICK}", because=(QUICK,))


def from_error(error: TrlGymError, remedy: str = "See docs/reference/failures.md.") -> list[Finding]:
    """Turn an error into findings, one for each of its problems.

    Args:
        remedy: Remedy of a problem that has none.
    """
    problems = error.problems or (Problem(error.problem, error.remedy),)
    return [failed(problem.text, problem.remedy or error.remedy or remedy) for problem in problems]


@dataclass(slots=True, kw_only=True)
class Context:
    """The run that is examined. A context manager: servers that checks have started end with it."""

    argv: Sequence[str]  # options as the training script takes them
    quick: bool = False  # whether no server is started
    # File for `accelerate launch --config_file`; accelerate's own default when None.
    accelerate_config: Path | None = None
    fork_server: ForkServer | None = None  # started before the checks, stopped after them
    # Options of the training script; valid once "options file" has passed, like the next two.
    script: ScriptArguments = field(init=False)
    args: GymGRPOConfig = field(init=False)  # options of the trainer; may hold values that "options" complains of
    model_options: ModelConfig = field(init=False)  # options of TRL's `ModelConfig`
    # Options that are unknown, of a wrong type or of a wrong value.
    problems: list[Problem] = field(default_factory=list)
    installation: GymInstallation = field(init=False)  # neMo Gym's; after "gym interpreter"
    agents: tuple[str, ...] | None = None  # names that the configs, or a running Gym, know; after "gym configs"
    # Examples of the datasets that can be read; after "dataset rows".
    train_rows: list[dict[str, Any]] = field(default_factory=list)
    model: str = field(init=False)  # folder or hub id; after "model", like the next two
    model_config: PretrainedConfig = field(init=False)  # architecture of the model
    num_params: int = field(init=False)  # number of parameters of the model
    tokenizer: PreTrainedTokenizerBase = field(init=False)  # after "tokenizer"
    policy: PolicyBackend = field(init=False)  # after "policy server"
    trained: Any = None  # the model as it is trained, once something needed it
    gym: GymServers = field(init=False)  # after "gym servers"
    servers: RunServers = field(init=False)  # both of them; after "token continuation"
    logged: list[str] = field(default_factory=list)  # warnings that trl-gym has logged during the check that runs now
    resources: ExitStack = field(default_factory=ExitStack)
    _work_dir: Path | None = None

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir or "trainer_output")

    @property
    def serves(self) -> bool:
        """True if the run has servers: training from a journal has none."""
        return self.args.gym_replay is None

    @property
    def starts_policy(self) -> bool:
        """True if the run starts its policy server itself."""
        return self.serves and self.args.vllm_mode != "server"

    @property
    def engine(self) -> str | None:
        """The engine that the run starts, one of `engines.NAMES`; None where it starts none."""
        return started_engine(self.args) if self.starts_policy else None

    @property
    def starts_gym(self) -> bool:
        """True if the run starts its NeMo Gym itself."""
        return self.serves and self.args.gym_mode != "attach"

    @property
    def attaches_policy(self) -> bool:
        """True if the run uses a policy server that runs elsewhere."""
        return self.serves and not self.starts_policy and bool(self.args.vllm_server_base_url)

    @property
    def attaches_gym(self) -> bool:
        """True if the run uses a NeMo Gym that runs elsewhere."""
        return self.serves and not self.starts_gym and bool(self.args.gym_head_url)

    def work_dir(self) -> Path:
        """Return a folder for logs, a journal and data of this examination; the run's own is not touched."""
        if self._work_dir is None:
            self._work_dir = Path(tempfile.mkdtemp(prefix="trl-gym-doctor-"))
        return self._work_dir

    def forget(self) -> None:
        """Remove that folder, when no message names a log in it."""
        if self._work_dir is not None:
            shutil.rmtree(self._work_dir)
            self._work_dir = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.resources.close()
