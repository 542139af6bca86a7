"""What a run writes, and to whom it reports."""

from __future__ import annotations

import importlib.util
import netrc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from trl_gym.doctor.checks import Finding, failed, ok, skipped, warning
from trl_gym.doctor.context import Subject
from trl_gym.doctor.static import can_connect

_BYTES_PER_PARAMETER = 16  # of a checkpoint at most: float32 weights, two moments, and once more while it is replaced
_WANDB_URL = "https://api.wandb.ai"
_HUB_URL = "https://huggingface.co"
_FEW_BYTES = 10**9  # for journal and logs


def folders(subject: Subject) -> Iterator[Finding]:
    """Every folder that the run writes to can be written; those that are missing can be made."""
    args = subject.args
    targets = {"output_dir": subject.output_dir, "gym_log_dir": Path(args.gym_log_dir or subject.output_dir / "logs")}
    journal = subject.output_dir / "rollouts"
    if journal.exists():
        targets["journal"] = journal
    if args.gym_weight_dir is not None and Path(args.gym_weight_dir).is_dir():
        targets["gym_weight_dir"] = Path(args.gym_weight_dir)
    for name, folder in targets.items():
        problem = why_not_writable(folder)
        if problem is None:
            yield ok(f"`{name}` {folder}")
        else:
            there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
            yield failed(
                f"`{name}` {folder} cannot be written: {problem}",
                f"`ls -ld {there}` shows whose it is; give yourself the right, or choose another folder.",
            )


def why_not_writable(folder: Path) -> str | None:
    """Tried, not asked: permissions, read-only file systems and quotas say no in their own ways."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        return f"{there} is not a folder"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".trl-gym-doctor-"):
            return None
    except OSError as error:
        return error.strerror or str(error)


def space(subject: Subject) -> Iterator[Finding]:
    """Room for the journal and for checkpoints."""
    args = subject.args
    there = next(one for one in (subject.output_dir, *subject.output_dir.absolute().parents) if one.is_dir())
    free = shutil.disk_usage(there).free
    kept = 0 if str(args.save_strategy).endswith("no") else (args.save_total_limit or 1)
    needed = _FEW_BYTES + kept * _BYTES_PER_PARAMETER * subject.num_params
    text = (
        f"{there} has {free / 1e9:,.1f} GB free; {kept} checkpoint(s) and a journal need up to {needed / 1e9:,.1f} GB"
    )
    if free < needed:
        yield failed(
            text, "Free some space, set `save_only_model` or `save_total_limit`, or choose another `output_dir`."
        )
    else:
        yield ok(text)


def reporting(subject: Subject) -> Iterator[Finding]:
    """Trackers that `report_to` asks for are installed and can be reached. Nothing is sent to them."""
    wanted = subject.args.report_to or []
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if name in ("none", "all"):
            continue
        if importlib.util.find_spec("torch.utils.tensorboard" if name == "tensorboard" else name) is None:
            yield failed(f"`report_to` names {name}, which is not installed", f"`pip install {name}`")
        elif name == "wandb":
            yield from _wandb()
        elif name == "trackio" and getattr(subject.args, "trackio_space_id", None):
            yield _reachable(name, _HUB_URL, "leave `trackio_space_id` out to keep the numbers on this machine")
        else:
            yield ok(f"{name} is installed")
    if not names or names == ["none"]:
        yield ok("`report_to` asks for no tracker")


def _wandb() -> Iterator[Finding]:
    mode = os.environ.get("WANDB_MODE", "online")
    if mode in ("offline", "disabled", "dryrun"):
        yield ok(f"wandb is installed, WANDB_MODE is {mode}")
        return
    url = os.environ.get("WANDB_BASE_URL", _WANDB_URL)
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(urlsplit(url).hostname or ""):
        yield failed("wandb has no key: a run would ask for one", "`wandb login`, or `export WANDB_MODE=offline`")
    yield _reachable("wandb", url, "`export WANDB_MODE=offline` keeps the numbers on this machine")


def _in_netrc(host: str) -> bool:
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return path.is_file() and netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False  # as wandb takes it


def _reachable(name: str, url: str, otherwise: str) -> Finding:
    parts = urlsplit(url)
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return skipped(f"{name}: {url} is behind a proxy, which is not asked")
    problem = can_connect(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    if problem is None:
        return ok(f"{name}: {url} can be reached")
    return warning(f"{name}: {url} cannot be reached ({problem})", f"Check the network; {otherwise}.")
