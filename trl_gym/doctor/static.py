"""The machine: devices, memory, ports."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trl_gym.doctor.checks import Finding, failed, ok, warning
from trl_gym.doctor.context import Subject
from trl_gym.processes import bind_socket

_GIB = 1 << 30
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
SHARED_MEMORY = Path("/dev/shm")


def devices(_: Subject) -> Iterator[Finding]:
    """GPUs as torch sees them, or the processors and memory of the host."""
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


def memory_plan(subject: Subject) -> Iterator[Finding]:
    """How the GPU's memory will be divided, by the planner's arithmetic."""
    from trl import get_peft_config

    from trl_gym.memory.estimate import from_trainer, this_device

    device = this_device()
    if device is None or not subject.starts_policy or subject.args.gym_server_devices is not None:
        return
    processes = max(1, int(os.environ.get("WORLD_SIZE", "1")))
    plan = from_trainer(
        subject.args, subject.model, processes, device, peft_config=get_peft_config(subject.model_options)
    )
    say = failed if plan.utilization is None and subject.args.gym_gpu_memory == "auto" else warning
    for line in plan.warnings:
        what, _, remedy = line.partition(" What helps: ")
        yield say(what, remedy and f"What helps: {remedy}")
    if not plan.warnings:
        share = plan.utilization if subject.args.gym_gpu_memory == "auto" else plan.given_utilization
        yield ok(f"the policy server takes {share:g} of the GPU: {plan.given_tokens} tokens of KV cache")


def shared_memory(subject: Subject) -> Iterator[Finding]:
    """Room for one copy of the weights, which the transport `file` keeps in shared memory."""
    args = subject.args
    if not subject.serves or args.gym_weight_dir is not None or not _sends_files(subject):
        return
    needed = subject.num_params * _BYTES[args.serving_dtype]
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


def _sends_files(subject: Subject) -> bool:
    import torch

    wanted = subject.args.gym_weight_transport
    return wanted == "file" or (wanted == "auto" and (subject.args.use_cpu or not torch.cuda.is_available()))


def ports(subject: Subject) -> Iterator[Finding]:
    """Ports that the options fix are free; the others are chosen by the operating system."""
    given = list(_given_ports(subject))
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


def _given_ports(subject: Subject) -> Iterator[tuple[str, str, int]]:
    """(where it is set, host, port)."""
    overrides = subject.args.gym_overrides
    if subject.starts_gym and isinstance(overrides, Mapping):
        host = _dig(overrides, "default_host") or "127.0.0.1"
        for name, value in _leaves(overrides):
            if name.rpartition(".")[2] == "port" and str(value).isdigit() and int(value):
                own = _dig(overrides, f"{name.rpartition('.')[0]}.host") or host
                yield f"`gym_overrides` {name}", str(own), int(value)
    if int(os.environ.get("RANK", "0")) == 0 and (port := os.environ.get("MASTER_PORT", "")).isdigit():
        yield "MASTER_PORT", "127.0.0.1", int(port)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _dig(tree: Mapping[str, Any], dotted: str) -> Any:
    return dict(_leaves(tree)).get(dotted)


def can_connect(host: str, port: int, timeout_s: float = 3.0) -> str | None:
    """Why a TCP connection cannot be made; None when it can. Nothing is sent."""
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        return str(error)
    return None
