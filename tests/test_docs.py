"""The documentation says what the code says: options, commands, messages, metrics, links."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from trl import GRPOConfig, ModelConfig

from tests.conftest import load
from tests.report.browser import browser
from trl_gym import GymGRPOConfig, compat
from trl_gym.cli import build_parser
from trl_gym.rollouts.evaluation import evaluation_metrics
from trl_gym.rollouts.metrics import ValueSum, completion_metrics, merge_gaps, rollout_metrics, training_metrics
from trl_gym.rollouts.rollout import RolloutFacts
from trl_gym.rollouts.trajectory import DriftCause
from trl_gym.train import ScriptArguments

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    return load("scripts_docs", ROOT / "scripts" / "docs.py")


@pytest.fixture(scope="module")
def names() -> ModuleType:
    return load("docs_names", ROOT / "scripts" / "docs_names.py")


def test_generated_blocks_are_current(docs: ModuleType) -> None:
    stale = [str(path) for path in docs.stale_pages()]
    assert not stale, f"run `make docs`: {stale}"


def test_the_docstring_describes_every_option_and_its_default(docs: ModuleType, tmp_path: Path) -> None:
    config = GymGRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    own = {field.name for field in fields(GymGRPOConfig)} - {field.name for field in fields(GRPOConfig)}
    filled_in = {"max_completion_length", "gradient_accumulation_steps"}  # of TRL, None where they are not given
    filled_in |= {"num_generations", "per_device_train_batch_size", "per_device_eval_batch_size"}
    options = docs.options()
    assert {option.name for option in options} == own | filled_in | {"logging_steps"}
    for option in options:
        told = None if option.default is None else ast.literal_eval(option.default)
        if option.name not in {"gym_log_dir", *filled_in}:  # the first is a folder of `output_dir`
            assert told == getattr(config, option.name), option.name


def test_every_message_has_a_cause_and_a_remedy(names: ModuleType) -> None:
    missing = names.unexplained_messages(ROOT)
    assert not missing, "docs/reference/failures.md has no row for:\n" + "\n".join(map(str, missing))


def test_the_failure_reference_has_no_row_for_a_message_that_is_gone(names: ModuleType) -> None:
    assert names.stale_fragments(ROOT) == []


def test_a_row_of_the_failure_reference_is_about_something(names: ModuleType) -> None:
    """A part as short as "of the" would explain every message there is."""
    fragments = names.explained(ROOT)
    assert len(fragments) > 200
    assert [fragment for fragment in fragments if len(fragment.replace("…", "").strip()) < 7] == []
    assert len(set(fragments)) == len(fragments)


def test_messages_are_found_wherever_they_are_made(names: ModuleType, tmp_path: Path) -> None:
    package = tmp_path / "trl_gym"
    package.mkdir()
    (package / "errors.py").write_text("class TrlGymError(Exception): ...\nclass MyError(TrlGymError): ...\n")
    (package / "a.py").write_text(
        "class Deeper(errors.MyError): ...\n"
        "def f(x):\n"
        "    raise Deeper(f'the value {x} is wrong' + ' indeed' if x else f'there is no value')\n"
        "def _problems(c):\n"
        "    problems = []\n"
        "    problems.append(f'`{c}` is not good enough')\n"
        "    return problems + [f'{c} is worse' for _ in c]\n"
        "def g(x):\n"
        "    raise ValueError('this one is not ours')\n"
    )
    assert [message.text for message in names.messages(tmp_path)] == [
        "the value … is wrong indeed",
        "there is no value",
        "`…` is not good enough",
    ]


def test_every_metric_has_a_row(names: ModuleType) -> None:
    assert names.undocumented_metrics(names.metric_names(ROOT), ROOT, any_field=False) == []


def fact_that_drifted(cause: str | None) -> RolloutFacts:
    """With everything that something is logged about."""
    return RolloutFacts(
        agent="calculator",
        group="a",
        task=0,
        is_valid=True,
        trained_reward=1.0,
        reward=1.0,
        success=1.0,
        failure=None,
        drift=cause,
        has_tokens=True,
        attempts=1,
        seconds=1.0,
        model_seconds=0.5,
        queue_seconds=0.1,
        components={"style": 0.5},
    )


def test_every_metric_that_is_put_together_has_a_row(names: ModuleType) -> None:
    many = [fact_that_drifted(cause) for cause in (None, *map(str, DriftCause))]
    gaps = {name: ValueSum(0.1, 2, 0.1, 0.1) for name in ("logprob_gap", "logprob_gap/turn_0", "logprob_gap/turn_8+")}
    logged = {
        *training_metrics(many),
        *completion_metrics(many),
        *merge_gaps([gaps | {"gym/calculator/logprob_gap": ValueSum(0.1, 2, 0.1, 0.1)}]),
        *(f"eval_{name}" for name in rollout_metrics(many) | evaluation_metrics(many, 4)),
        *(f"eval_hard_ones_{name}" for name in evaluation_metrics(many, 4)),
    }
    assert len(logged) > 60
    assert names.undocumented_metrics(logged, ROOT, any_field=False) == []


def test_a_metric_without_a_row_is_noticed(names: ModuleType) -> None:
    unknown = ["rollouts/nonsense", "eval_nonsense", "gym/a/b/c", "nonsense"]
    assert names.undocumented_metrics([*unknown, "gym/a/anything", "eval_x_loss"], ROOT) == sorted(unknown)


def test_tested_versions_stand_in_the_docstring_of_compat() -> None:
    for package, allowed in compat.TESTED.items():
        assert re.search(rf"^\| {package} +\| {re.escape(allowed)} ", compat.__doc__ or "", re.MULTILINE)


def test_every_extra_is_described(names: ModuleType) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    described = {cell for cells in names._first_cells(ROOT / "docs" / "getting_started.md") for cell in cells}
    assert set(extras) <= described


def blocks(language: str, pages: Iterable[Path] = PAGES) -> Iterator[tuple[str, str]]:
    """Code blocks of pages: where, and the code."""
    for page in pages:
        for number, code in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        ):
            yield f"{page.relative_to(ROOT)}, {language} block {number}", code


def test_python_in_the_pages_compiles_and_imports_what_exists() -> None:
    found = 0
    for where, code in blocks("python"):
        try:
            tree = ast.parse(code.replace("…", "..."))
        except SyntaxError as error:
            # An argument list that goes on: `f(a=1, …)`.
            tree = ast.parse(re.sub(r",\s*…", "", code)) if "…" in code else pytest.fail(f"{where}: {error}")
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl_gym"):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == [], where
                found += 1
    assert found > 5


def recipe_options() -> set[str]:
    return {option.name for kind in (ScriptArguments, GymGRPOConfig, ModelConfig) for option in fields(kind)}


def test_yaml_in_the_pages_has_options_that_exist() -> None:
    known = recipe_options()
    found = 0
    for where, code in blocks("yaml"):
        options = yaml.safe_load(code)
        if isinstance(options, dict) and known & set(options):  # else it is something of NeMo Gym's or accelerate's
            assert set(options) <= known, where
            found += 1
    assert found >= 5


def test_commands_in_the_pages_have_options_that_exist() -> None:
    known = recipe_options()
    parser = build_parser()
    [commands] = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    found = 0
    for where, code in blocks("bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = line.partition(" #")[0].split()
            flags = [word.partition("=")[0] for word in words if word.startswith("--")]
            script = next((word for word in words if word in ("recipes/grpo.py", "trl_gym.train")), None)
            if script is not None:
                flags = [word for word in words[words.index(script) :] if word.startswith("--")]
                assert {flag.lstrip("-") for flag in flags} <= known | {"config"}, where
            elif "trl-gym" in words and (name := words[words.index("trl-gym") + 1]) in commands:
                own = set(commands[name]._option_string_actions)
                if commands[name].get_default("takes_run_options"):
                    assert {flag.lstrip("-").replace("-", "_") for flag in set(flags) - own} <= known, where
                elif name != "serve":  # which takes every flag of vLLM's
                    assert set(flags) <= own, where
            else:
                continue
            found += 1
    assert found > 8


def test_files_that_the_pages_name_exist() -> None:
    # These two name files of other projects too.
    elsewhere = {"comparison.md", "migration.md"}
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        (page.name, name)
        for page in pages
        if page.name not in elsewhere
        for name in re.findall(
            r"`((?:benchmarks|docs|notebooks|recipes|scripts|tests|trl_gym)/[\w./]+)`", page.read_text()
        )
    }
    assert len(named) > 20
    assert [(page, name) for page, name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_pages_outside_of_docs_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / page).read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []


def installing(page: str) -> set[str]:
    """Commands of a page that install packages, without their comments."""
    lines = (
        line.partition(" #")[0].strip() for _, code in blocks("bash", [ROOT / page]) for line in code.splitlines()
    )
    return {line for line in lines if "pip " in line}


def test_the_readme_installs_as_the_page_that_is_tested() -> None:
    assert len(installing("README.md")) == 6
    assert installing("README.md") <= installing("docs/getting_started.md")


def test_the_readme_is_short_and_begins_with_what_to_do() -> None:
    readme = (ROOT / "README.md").read_bytes()
    assert len(readme) <= 6000
    assert readme.index(b"pip install") < 1000
    setup, training = readme.index(b"make quickstart"), readme.index(b"GymGRPOTrainer(")
    assert setup < training < readme.index(b"## I want to") and b"make test" in readme
    [picture] = re.findall(r"!\[[^]]+\]\(([^)]+)\)", readme.decode())
    assert (ROOT / picture).stat().st_size < 50_000


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_builds_without_warnings_and_loads_nothing_from_a_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    loaded = re.compile(r"""<(?:script|img|iframe|link)[^>]+(?:src|href)=["']?(https?:[^"' >]+)""")
    assert {url for page in pages for url in loaded.findall(page.read_text())} == set()


def test_the_search_of_the_site_works_from_disk(site: Path) -> None:
    query = "document.querySelector('[data-md-component=search-query]')"
    titles = "[...document.querySelectorAll('.md-search-result__item h1')].map((title) => title.innerText)"
    wanted = {"install": "Getting started", "OOM": "Out of memory (OOM)", "wandb": "Where metrics go: report_to"}
    with browser() as tab:
        tab.send("Emulation.setFocusEmulationEnabled", enabled=True)  # else a field without a window has no focus
        tab.send("Page.navigate", url=(site / "howto" / "lora.html").as_uri())
        tab.wait(f"document.readyState === 'complete' && {query}")
        tab.run(f"{query}.focus()")
        tab.wait("document.querySelector('.md-search-result__meta').innerText.startsWith('Type')")
        for word, page in wanted.items():
            tab.run(f"{query}.value = {word!r}")
            tab.press("Shift")
            tab.wait(f"{titles}[0] === {page!r}")
        assert tab.errors == []
        assert [url for url in tab.requests if not url.startswith(("file:", "data:", "about:"))] == []
