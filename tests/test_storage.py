"""What the operating system refuses is said in words, whoever writes: Python, safetensors, tokenizers or torch."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from trl_gym.errors import ConfigError, RolloutError, StorageError
from trl_gym.storage import refusal, told, writing


@pytest.mark.parametrize(
    ("number", "cause", "remedy"),
    [
        (errno.ENOSPC, r"the disk is full \(No space left on device; [0-9.]+ MB of [0-9]+ MB are free\)", "Make room"),
        (errno.EDQUOT, "quota is used up", "quota raised"),
        (errno.EFBIG, r"files may have -?[0-9]+ bytes at most", "ulimit -f"),
        (errno.EROFS, "the file system is read-only", "Mount it writable"),
        (errno.EACCES, f"user {os.geteuid()} may not write there", "Give that right"),
        (errno.EMFILE, r"this process has [0-9]+ files open, as many as it may", "ulimit -n"),
        (errno.ENFILE, "this machine has too many files open", "fs.file-max"),
        (errno.EIO, "the disk, or the server that it is mounted from, failed", "kernel's log"),
        (errno.ENOTDIR, "the name cannot be one of a file there", "Choose another folder"),
    ],
)
def test_each_refusal_has_its_words(tmp_path: Path, number: int, cause: str, remedy: str) -> None:
    with pytest.raises(RolloutError, match=cause) as caught, writing("The records", tmp_path, safe="They are whole."):
        raise OSError(number, os.strerror(number))
    assert remedy in caught.value.remedy and os.strerror(number) in caught.value.problem
    assert caught.value.problem.startswith(f"The records cannot be written to {tmp_path}: ")
    assert caught.value.problem.endswith("). They are whole.")


@contextlib.contextmanager
def limited(which: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(which)
    resource.setrlimit(which, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda path: path.write_text("x" * 100_000),
    "safetensors": lambda path: save_file({"a": torch.zeros(100_000)}, path),
    "tokenizers": lambda path: Tokenizer(models.BPE()).save(str(path)),
    "torch": lambda path: torch.save({"a": torch.zeros(100_000)}, path),
}
about_checkpoint = partial(writing, "The checkpoint", safe="The one before is whole.", kind=StorageError)


@pytest.mark.parametrize("writer", ["python", "safetensors", "tokenizers"])
def test_a_limit_of_this_process_is_named_whoever_writes(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "file"
    words = f"The checkpoint cannot be written to {path}: files may have 100 bytes at most"
    with pytest.raises(StorageError, match=words), limited(resource.RLIMIT_FSIZE, 100), about_checkpoint(path):
        WRITERS[writer](path)


@pytest.mark.parametrize(
    ("writer", "free", "cause"),
    [("python", 9**9, "the disk is full"), ("torch", 0, "the disk is full"), ("torch", 9**9, "failed")],
)
def test_a_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, free: int, cause: str) -> None:
    """torch does not say why its writer failed: then the disk is looked at."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free, total=9**9))
    (path := tmp_path / "file").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=cause), about_checkpoint(path):
        WRITERS[writer](path)


def test_the_limit_of_open_files(tmp_path: Path) -> None:
    words = r"this process has 3 files open, as many as it may.*Raise that limit \(`ulimit -n`\)"
    with pytest.raises(StorageError, match=words), limited(resource.RLIMIT_NOFILE, 3), about_checkpoint(tmp_path):
        WRITERS["python"](tmp_path / "file")


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (ValueError("a shape"), ConnectionRefusedError(errno.ECONNREFUSED, "refused"), ConfigError("ours")):
        with pytest.raises(type(error)) as caught, told("Training", tmp_path):
            raise error
        assert caught.value is error
    with pytest.raises(ValueError), writing("The records", tmp_path, safe=""):
        raise ValueError("a shape")
    assert refusal(OSError("without a number"), tmp_path) is None


def test_an_error_that_names_a_descriptor_is_told_of_the_path(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=f"cannot be written to {tmp_path}: "), writing("It", tmp_path, safe="No."):
        raise OSError(errno.EIO, os.strerror(errno.EIO), 7)
    with pytest.raises(StorageError, match=f"{tmp_path} could not be used"), told("Training", tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), 7)


def test_what_nobody_has_explained_names_the_file_and_what_is_safe(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = rf"Training ended, since {tmp_path}/file/x could not be used: the name"
    with pytest.raises(StorageError, match=words), told("Training", "elsewhere"):
        (tmp_path / "file" / "x").write_text("")
