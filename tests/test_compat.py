from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.fork_ranks import run
from trl_gym import compat
from trl_gym.errors import UnsupportedVersionError

ROOT = Path(__file__).parents[1]


def test_the_installed_versions_are_supported() -> None:
    compat.check_versions(("trl", "transformers", "vllm"))


def test_ranges_are_the_ones_in_pyproject_and_on_the_page() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["vllm"]]
    declared = {r.name: r.specifier for r in map(Requirement, wanted)}
    page = (ROOT / "docs" / "reference" / "versions.md").read_text()
    for package, tested in compat.TESTED.items():
        if package == "transformers":
            assert declared[package] == SpecifierSet(compat.ENGINE)
        elif package != "nemo-gym":  # lives in another interpreter
            assert declared[package] == SpecifierSet(tested), package
        assert f"`{tested}`" in page, package


def test_every_unsupported_version_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"trl": "1.9.0", "transformers": "5.17.0", "vllm": None}
    monkeypatch.setattr(compat, "installed_version", versions.__getitem__)
    with pytest.raises(UnsupportedVersionError) as caught:
        compat.check_versions(tuple(versions))
    message = str(caught.value)
    assert "trl 1.9.0 is installed and trl-gym needs >=1.16" in message
    assert "vllm is not installed" in message
    assert "pip install 'trl" in message
    assert "transformers" not in message


def test_a_newer_version_that_has_every_name_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "installed_version", {"trl": "1.99.0", "transformers": "5.17.0"}.__getitem__)
    _, [told] = compat.version_problems()
    compat.check_versions()
    [line] = caplog.messages
    assert line == f"{told.text} {told.remedy}"
    assert (
        "trl 1.99.0 is newer than the versions that trl-gym was tested with (>=1.16,<1.17). It has every name" in line
    )
    assert "pip install 'trl>=1.16,<1.17'` if" in line


def test_a_newer_version_is_told_before_another_package_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "installed_version", {"trl": "1.99.0", "transformers": "5.1.0"}.__getitem__)
    with pytest.raises(UnsupportedVersionError, match=r"transformers 5\.1\.0 is installed"):
        compat.check_versions()
    assert [line.split(" that")[0] for line in caplog.messages] == ["trl 1.99.0 is newer than the versions"]


def test_a_newer_version_without_a_name_that_is_used_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newer = tmp_path / "vllm" / "entrypoints" / "launchers"
    newer.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.setattr(compat, "installed_version", {"vllm": "0.99.0"}.__getitem__)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UnsupportedVersionError, match=r"vllm 0\.99\.0 is installed, which is newer") as caught:
        compat.check_versions(("vllm",))
    assert "vllm.v1.engine.async_llm.AsyncLLM (policy_server/engine/entry.py)" in str(caught.value)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("version", "tested", "newer"),
    [
        *(("5.12.1", False, False), ("5.13.0", True, False), ("5.24.3", True, False), ("5.25.0.dev0", False, True)),
        *(("6.0", False, True), ("main", False, False)),
    ],
)
def test_older_tested_and_newer_versions_are_told_apart(version: str, tested: bool, newer: bool) -> None:
    assert compat.is_tested("transformers", version) == tested
    assert compat.is_newer("transformers", version) == newer


def test_a_transformers_that_cannot_be_the_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.engine_problem() is None
    monkeypatch.setattr(compat, "installed_version", {"transformers": "5.25.0"}.__getitem__)
    problem = compat.engine_problem()
    assert (
        problem is not None and "transformers 5.25.0 is installed and the engine 'transformers' needs" in problem.text
    )
    assert "pip install 'transformers>=5.16.1,<5.25'`, or set `gym_engine` to 'vllm'" in problem.remedy


@pytest.mark.parametrize(
    ("torch", "vision", "fits"),
    [
        ("2.13.0+cpu", "0.28.0+cu130", False),  # PyPI's beside PyTorch's own for CPUs
        ("2.13.0+cu130", "0.28.0+cu126", False),
        ("2.13.0+cu130", "0.28.0+cu132", True),  # of one major version
        ("2.13.0+cpu", "0.28.0+cpu", True),
        ("2.13.0+cu130", "0.28.0+cpu", True),  # slow, and it can be imported
        ("2.13.0", "0.28.0+cu130", True),  # not known
        ("2.13.0+cpu", None, True),
    ],
)
def test_a_torchvision_for_another_torch_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str, vision: str | None, fits: bool
) -> None:
    for name, version in (("torch", torch), ("torchvision", vision)):
        if version is not None:
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms')")
            (tmp_path / name / "version.py").write_text(f"__version__ = '{version}'\ncuda: str | None = None\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("torch", "torchvision"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    problem = compat.torchvision_problem()
    assert (problem is None) == fits
    if problem is not None:
        assert f"torchvision {vision} is installed beside torch {torch}" in problem.text
        assert "pip uninstall -y torchvision" in problem.remedy
        with pytest.raises(UnsupportedVersionError, match="built for another one"):
            compat.check_versions(("transformers",))


def test_vllm_is_found_under_either_name() -> None:
    assert compat.installed_version("vllm") is not None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("no-such-package")
    assert compat.installed_version("no-such-package") is None


def test_the_swapped_backend_is_put_back_even_after_an_error() -> None:
    import trl.trainer.grpo_trainer as upstream

    original = upstream.VLLMGeneration
    with pytest.raises(RuntimeError), compat.generation_backend(lambda **_: "ours"):
        assert upstream.VLLMGeneration() == "ours"
        raise RuntimeError
    assert upstream.VLLMGeneration is original


def trl_alone(model: str, output_dir: str) -> None:
    from trl_gym import GymGRPOTrainer  # noqa: F401

    assert "vllm" not in sys.modules
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url="http://127.0.0.1:9",
        vllm_server_timeout=0.0,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    data = Dataset.from_list([{"prompt": "Hello"}])
    try:
        GRPOTrainer(model, lambda **_: [0.0], args=args, train_dataset=data)
    except OSError as error:  # TRL's own client says so
        sys.stdout.write(f"asked the server: {error}")
    import trl.generation.vllm_generation as theirs
    import trl.trainer.grpo_trainer as trainer

    assert trainer.VLLMGeneration is theirs.VLLMGeneration and theirs.SamplingParams and "vllm" in sys.modules


def test_a_trainer_of_trl_finds_vllm_after_ours_was_imported(tmp_path: Path) -> None:
    """In a process of its own: others have imported TRL here, with vLLM."""
    done = run(trl_alone, str(ROOT / "recipes" / "small_policy"), str(tmp_path))
    assert done.returncode == 0 and "asked the server:" in done.stdout, done.stderr


def test_where_trl_was_imported_with_vllm_it_stays_as_it_is() -> None:
    import trl.generation.vllm_generation as theirs

    with compat.without_vllm():
        assert sys.modules["trl.generation.vllm_generation"] is theirs
    assert sys.modules["trl.generation.vllm_generation"] is theirs
