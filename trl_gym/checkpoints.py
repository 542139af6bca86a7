"""Which checkpoint a run continues from: the one that is named, or the newest that is whole.

transformers writes `trainer_state.json` last, so that a checkpoint without it was interrupted. Files can be cut all
the same: by a copy that stopped, a disk that was full, a machine that lost power. Their own form says where they
should end, and is looked at without reading them: the header of safetensors, the directory at the end of torch's
archives, the metadata of sharded states. A folder that is not whole is never deleted here.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from trl_gym.errors import ConfigError
from trl_gym.ranks import Gather
from trl_gym.untrusted import parse_json

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
MADE_WITH = "trl_gym_made_with.json"
INCOMPLETE = "checkpoint-is-incomplete.txt"  # stands in the folder while transformers' JIT checkpoint is written
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_OF_RANK = re.compile(r"(?:rng_state_|trl_gym_state\.rank-)(\d+)\.\w+")
# Files of weights, and folders of FSDP's and DeepSpeed's shards.
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*", "*/adapter_model.*")
_SHARDED = ("pytorch_model_fsdp_*", "global_step*")
_JSON_NAMES = ("config.json", "adapter_config.json", TRAINER_STATE, MADE_WITH)  # read when a run is resumed
_METADATA = ".metadata"  # of a folder of shards
_ZIP, _PICKLE = b"PK", b"\x80"  # how files of torch begin; the second those of before 1.6


def checkpoint_to_resume(
    asked: str | bool | None, output_dir: str | Path, rank: int = 0, gather: Gather = list
) -> str | None:
    """Return the folder of the checkpoint that a run continues from; None where it starts from the beginning. Every
    rank calls it in step, and looks at the files that it reads itself.

    Args:
        asked: `resume_from_checkpoint`: a folder, or whether the newest whole checkpoint is meant.
        output_dir: Folder of the run.
        rank: This one.
        gather: Collective of the ranks; by default there is one rank.

    Raises:
        ConfigError: The checkpoint that is named is not whole, or the newest is meant and there is none.
    """
    if asked in (True, "true", "True"):
        if not _candidates(output_dir):
            raise ConfigError(
                f"`resume_from_checkpoint` is true, and {output_dir} has no checkpoint.",
                "Leave it out to start from the beginning; the option `resume` of `trl-gym train` is for both cases.",
            )
        return last_whole_checkpoint(output_dir, rank, gather)
    if not asked:
        return None
    found = _damage_on_ranks(Path(str(asked)), rank, gather)
    if found:
        newest = last_whole_checkpoint(Path(str(asked)).parent, rank, gather, is_told=False)
        raise ConfigError(
            f"{asked}, which `resume_from_checkpoint` names, is not whole: {found}.",
            "Leave `resume_from_checkpoint` out to start again: no checkpoint beside it is whole."
            if newest is None
            else f"Resume from {newest}, the newest one beside it that is whole.",
        )
    return str(asked)


def last_whole_checkpoint(
    output_dir: str | Path, rank: int = 0, gather: Gather = list, *, is_told: bool = True
) -> str | None:
    """Return the newest checkpoint that is whole; None when there is none. Every rank calls it in step.

    Args:
        output_dir: Folder of the run.
        rank: This one; the first says what is passed over.
        gather: Collective of the ranks; by default there is one rank.
        is_told: Whether it does.
    """
    # As the first rank sees them: it may be a step ahead of what another host sees of a shared disk.
    candidates = gather([_candidates(output_dir)])[0]
    is_told = is_told and rank == 0
    for path in candidates:
        damage = _damage_on_ranks(path, rank, gather)
        if not damage:
            return str(path)
        if is_told:
            logger.warning("%s is not whole, and is passed over as it is: %s", path, damage)
    if candidates and is_told:
        logger.warning(
            "no checkpoint in %s is whole: the run starts from the beginning, and writes over them when it comes to "
            "their steps",
            output_dir,
        )
    return None


def damage(folder: Path, rank: int = 0) -> Iterator[str]:
    """Say what is wrong with the files of a checkpoint that a rank reads; nothing about a whole one."""
    if not folder.is_dir():
        yield "there is no such folder"
        return
    if (folder / INCOMPLETE).exists():
        yield f"it was interrupted while it was written ({INCOMPLETE} is in it)"
    if not (folder / TRAINER_STATE).exists():
        yield f"{TRAINER_STATE}, which is written last, is missing"
    if not any(next(folder.glob(pattern), None) for pattern in (*_WEIGHTS, *_SHARDED)):
        yield "it has no weights"
    for path in sorted(folder.rglob("*")):
        of_rank = _OF_RANK.fullmatch(path.name)
        if of_rank is not None and int(of_rank[1]) != rank:
            continue
        name = path.relative_to(folder)
        try:
            problem = _problem(path)
        except Exception as error:  # whatever the reader of a form comes to with a file that has another one
            problem = f"cannot be read ({type(error).__name__}: {str(error)[:200]})"
        if problem is not None:
            yield f"{name} {problem}"


def lost_state(folder: Path, rank: int, num_ranks: int) -> list[str]:
    """Return the names of what a whole checkpoint does not have of the state of training: with `save_only_model`, or
    where files were removed. transformers goes on without, and says nothing.

    Args:
        folder: The checkpoint.
        rank: Rank whose random numbers are looked for.
        num_ranks: Ranks of the run.
    """
    names = [path.name for path in folder.iterdir()]
    has_deepspeed = any(name.startswith("global_step") for name in names)
    lost = []
    if not has_deepspeed and not any("optimizer" in name for name in names):
        lost.append("optimizer.pt")
    if not has_deepspeed and "scheduler.pt" not in names:
        lost.append("scheduler.pt")
    random_state = "rng_state.pth" if num_ranks == 1 else f"rng_state_{rank}.pth"
    return lost if random_state in names else [*lost, random_state]


def best_of(folder: Path) -> Path | None:
    """Return the best checkpoint so far, of which a checkpoint has the path at that time: where it is no longer there,
    it is the one of that name beside. None where there is none so far."""
    best = parse_json((folder / TRAINER_STATE).read_text()).get("best_model_checkpoint")
    if not isinstance(best, str):
        return None
    beside = folder.parent / Path(best).name
    return beside if beside.is_dir() and not Path(best).is_dir() else Path(best)


def lost_best(folder: Path) -> str | None:
    """Say that the best checkpoint so far, which `load_best_model_at_end` loads, is gone or not whole."""
    best = best_of(folder)
    found = "; ".join(damage(best)) if best is not None else ""
    return f"{best}, the best checkpoint so far (`load_best_model_at_end`), is not whole: {found}" if found else None


def _candidates(output_dir: str | Path) -> list[Path]:
    """Return the folders of checkpoints, the newest first."""
    found = [
        (int(match[1]), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if path.is_dir() and (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def _damage_on_ranks(folder: Path, rank: int, gather: Gather) -> str:
    """Return what a rank finds wrong, the first that does: files of a rank may be on its own host."""
    return next(filter(None, gather(["; ".join(damage(folder, rank))])), "")


def _problem(path: Path) -> str | None:
    """Say that a file is cut or lacks others; None for one that is whole, or of which nothing is known."""
    if path.suffix == ".safetensors":
        return _cut_safetensors(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return _cut_archive(path)
    if path.name.endswith(".index.json"):
        shards = sorted(set(parse_json(path.read_text())["weight_map"].values()))
        missing = [shard for shard in shards if not (path.parent / shard).exists()]
        return f"names files that are missing: {', '.join(missing)}" if missing else None
    if path.name in _JSON_NAMES:
        return _cut_json(path)
    if path.is_dir() and ((path / _METADATA).exists() or any(path.glob("*.distcp"))):
        return _cut_shards(path)
    return None


def _cut_json(path: Path) -> str | None:
    text = path.read_text()
    try:
        content = parse_json(text)
    except ValueError:
        return f"is cut: its {len(text):,} characters are no JSON" if text else "is empty"
    is_whole = isinstance(content, dict) and (path.name != TRAINER_STATE or "global_step" in content)
    return None if is_whole else "is damaged: it has other content than a checkpoint's"


def _cut_safetensors(path: Path) -> str | None:
    try:
        with safe_open(path, "numpy"):  # compares its size with what its header says
            return None
    except SafetensorError as error:
        return f"is cut: it has {path.stat().st_size:,} bytes ({error})"


def _cut_archive(path: Path) -> str | None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        begin = file.read(2)
    if begin[:1] == _PICKLE:
        return None
    if begin != _ZIP:
        return f"is empty ({size:,} bytes)" if size == 0 else f"is damaged: it is no file of torch ({size:,} bytes)"
    try:
        with zipfile.ZipFile(path):  # reads the directory at its end
            return None
    except zipfile.BadZipFile:
        return f"is cut: it has {size:,} bytes, and ends within its data"


def _cut_shards(folder: Path) -> str | None:
    """Compare files of `torch.distributed.checkpoint`, with which FSDP saves shards, with what they should have."""
    from torch.distributed.checkpoint import FileSystemReader

    if not (folder / _METADATA).exists():
        return f"is not whole: its {_METADATA} is missing"
    ends: dict[str, int] = {}
    for stored in (FileSystemReader(folder).read_metadata().storage_data or {}).values():
        ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, end in ends.items():
        file = folder / name
        size = file.stat().st_size if file.exists() else None
        if size is None or size < end:
            return f"is not whole: {name} " + ("is missing" if size is None else f"has {size:,} bytes of {end:,}")
    return None
