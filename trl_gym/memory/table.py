"""A memory plan as a table that people read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_gym.memory.shapes import GIB

if TYPE_CHECKING:
    from trl_gym.memory.plan import MemoryPlan

_MOMENTS = ("rollouts", "sync", "update")


def render(plan: MemoryPlan) -> str:
    """One line per item and moment, in GiB; then the result, TRL's default beside it, and the warnings."""
    fraction = plan.given_utilization if plan.utilization is None else plan.utilization
    kv_tokens = plan.given_tokens if plan.utilization is None else plan.kv_tokens
    header = f"{'memory of one GPU, GiB':<30}" + "".join(f"{moment:>10}" for moment in _MOMENTS)
    lines = [header]
    for item in plan.items:
        if item.num_bytes:
            cells = "".join(_cell(item.num_bytes if moment in item.moments else 0) for moment in _MOMENTS)
            lines.append(f"{item.owner:<8} {item.name:<21}{cells}   {item.formula}")
    kv = kv_tokens * plan.kv_bytes_per_token
    listed = {moment: sum(i.num_bytes for i in plan.items if moment in i.moments) for moment in _MOMENTS}
    cells = "".join(_cell(plan.peaks[moment] - listed[moment]) for moment in _MOMENTS)
    lines.append(f"{'server':<8} {'KV cache':<21}{cells}   {kv_tokens} tokens × {plan.kv_bytes_per_token} B")
    lines.append(f"{'sum':<30}" + "".join(_cell(plan.peaks[moment]) for moment in _MOMENTS))
    lines.append(f"{'of':<30}" + _cell(plan.device.total_bytes) * len(_MOMENTS))
    server = sum(i.num_bytes for i in plan.items if i.owner == "server" and "rollouts" in i.moments) + kv
    if plan.utilization is None:
        lines.append(f"No fraction fits; the KV cache above is that of the given {fraction:g}.")
    else:
        lines.append(
            f"vllm_gpu_memory_utilization = {server / GIB:.1f} / {plan.device.total_bytes / GIB:.1f} = {fraction:.3f}"
            f": {kv_tokens} tokens, {plan.sequences} sequences of {plan.sequence} "
            f"(wanted: {plan.wanted_tokens // plan.sequence})."
        )
    lines.append(
        f"Given: {plan.given_utilization:g}, {plan.given_tokens} tokens. "
        f"TRL's default 0.3: {plan.default_tokens} tokens, {plan.default_tokens // plan.sequence} sequences."
    )
    return "\n".join([*lines, *(f"Warning: {warning}" for warning in plan.warnings)])


def _cell(num_bytes: int) -> str:
    return f"{num_bytes / GIB:>10.2f}" if num_bytes else f"{'·':>10}"
