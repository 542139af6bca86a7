"""What each part of `gpu_check.py` does, in a process of its own: `alone.py` without a server, `server.py` with one of
vLLM, `loops.py` whole trainings.

A part is a function of a `Run`: it measures, expects and, on a CPU, says where it stops. Nothing of trl-gym is written
again here: models and rates are those of `benchmarks/`, comparisons those of the tests that run them on a CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import gpu_check  # noqa: E402

_FREE_SHARE, _FREE_WAIT_S = 0.9, 15.0  # what the part before has left of the device


class CannotRun(Exception):
    """Something that the part needs is not there; says what."""


@dataclass
class Run:
    """One part that runs.

    Attributes:
        dry: Whether it goes only as far as it does without CUDA.
        folder: Its own, empty.
        gym_python: Interpreter that has nemo-gym, if one was named.
        vllm_args: Flags of vLLM's server beside those of the part.
        measured: Figures by name, their unit in the name.
        stops: Where a dry run stops, and why.
    """

    dry: bool
    folder: Path
    gym_python: str | None = None
    vllm_args: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cpu" if self.dry else "cuda:0")

    def expect(self, holds: bool, otherwise: str) -> None:
        """Note what is wrong unless it holds; the part goes on and has failed."""
        if not holds:
            self.wrong.append(otherwise)

    def measure(self, **figures: float | str) -> None:
        """Note figures, rounded to four digits."""
        for name, value in figures.items():
            self.measured[name] = float(f"{value:.4g}") if isinstance(value, float) else value


def run_part(name: str, *, dry: bool, folder: Path, **options: Any) -> int:
    """Run a part and write its result to `folder/result.json`. Returns 0 unless the process itself fails.

    Args:
        name: Of the part, or `"facts"`.
        dry, folder: See `Run`.
        options: Further fields of a `Run`.
    """
    run = Run(dry, folder, **options)
    try:
        if name == "facts":
            facts(run)
        else:
            [part] = [part for part in gpu_check.PARTS if part.name == name]
            require(part, run)
            if dry:
                import torch

                torch.set_num_threads(1)  # models are small, and cores shared
            getattr(importlib.import_module(f"gpu_parts.{part.module}"), name)(run)
        result, reason = (gpu_check.FAILED, "; ".join(run.wrong)) if run.wrong else (gpu_check.PASSED, "")
    except CannotRun as error:
        result, reason = gpu_check.NOT_RUN, str(error)
    except Exception as error:  # of anything that is tried here; it is the result
        traceback.print_exc()
        result, reason = gpu_check.FAILED, f"{type(error).__name__}: {error}"[:2000]
    told = {key: value for key, value in asdict(run).items() if key in ("measured", "stops")}
    output = folder / "output.log"
    if result == gpu_check.FAILED and output.exists():
        told["output"] = output.read_text(errors="replace")[-2000:]
    (folder / "result.json").write_text(json.dumps({"result": result, "reason": reason, **told}))
    return 0


def require(part: gpu_check.Part, run: Run) -> None:
    """Raise `CannotRun` where something is missing; wait for memory that the part before has not given back, and note
    what is free where it stays away."""
    lacking = [name for name in (*gpu_check.BASE, *part.needs) if importlib.util.find_spec(name) is None]
    if lacking:
        raise CannotRun(f"not installed: {', '.join(lacking)}")
    if "vllm" in part.needs and "trl_gym" not in metadata.entry_points(group="vllm.general_plugins").names:
        raise CannotRun("trl-gym itself is not installed, and vLLM's processes would not find its plugin")
    if part.gym:
        from trl_gym.errors import TrlGymError
        from trl_gym.gym.install import find_installation

        try:
            run.measure(nemo_gym=find_installation(run.gym_python).version)
        except TrlGymError as error:
            raise CannotRun(str(error)) from error
    if not run.dry:
        import torch

        until = time.monotonic() + _FREE_WAIT_S
        while (memory := torch.cuda.mem_get_info())[0] < _FREE_SHARE * memory[1] and time.monotonic() < until:
            time.sleep(0.5)
        if memory[0] < _FREE_SHARE * memory[1]:  # a part that fails for want of memory is explained by it
            run.measure(free_at_start_gb=memory[0] / 1e9)


def facts(run: Run) -> None:
    """Note the machine and the versions."""
    import os
    import platform

    run.measure(python=platform.python_version(), cores=len(os.sched_getaffinity(0)))
    import torch

    run.measure(torch=torch.__version__)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        run.measure(
            gpu=properties.name,
            memory_gib=properties.total_memory / 2**30,
            compute_capability=f"{properties.major}.{properties.minor}",
            cuda=str(torch.version.cuda),
        )
    from trl_gym.compat import TESTED, installed_version

    run.measure(**{name: installed_version(name) or "none" for name in TESTED if name != "nemo-gym"})
