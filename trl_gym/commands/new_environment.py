"""`trl-gym new-environment NAME`: a NeMo Gym environment with tools and state that works at once.

The files are those of `trl_gym/scaffold`, with three words replaced: `my_environment` (the name), `MyEnvironment` (the
prefix of classes) and `ENVIRONMENT_DIR` (the new folder, as the commands in the files name it).
"""

from __future__ import annotations

import argparse
import keyword
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from trl_gym.errors import ConfigError
from trl_gym.gym.install import find_installation

DESCRIPTION = (
    "Make the folder DIR/NAME with a NeMo Gym environment: configuration, resources server (two tools, state, a "
    "verifier with reward components), data script, tests, and options to train on it. It works as it is; the "
    "README in it says what to change."
)
SCAFFOLD = Path(__file__).resolve().parents[1] / "scaffold"
_SUFFIX = ".template"
# YAML reads these as something other than text, and the name becomes a key.
_YAML_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})
# Top-level keys of a NeMo Gym config (0.4.0 to 0.7.0) that mean something to Gym, or to trl-gym.
# fmt: off
_GYM_KEYS = frozenset({
    "allow_openai_version_skew", "allow_unsupported_pairing", "cache_dir", "component_name", "config_paths",
    "default_host", "disallowed_ports", "dry_run", "entrypoint", "environment_routing_mode",
    "environment_server_name", "environment_server_routes", "head_server", "head_server_deps", "hf_token", "json",
    "model_call_capture_dir", "model_endpoint_readiness_timeout_seconds", "nemo_gym_log_dir",
    "observability_enabled", "pip_install_verbose", "policy_api_key", "policy_base_url", "policy_model",
    "policy_model_name", "port_range_high", "port_range_low", "python_version", "query", "ray_head_node_address",
    "results_dir", "server_spinup_timeout_seconds", "skip_venv_if_present", "skip_verification",
    "skip_verification_reward", "telemetry", "token_id_capture", "trl_gym_nonce", "use_absolute_ip",
    "uv_cache_dir", "uv_lock_timeout_seconds", "uv_pip_set_python", "uv_venv_dir", "verbose"
})
# fmt: on


@dataclass(frozen=True, slots=True)
class NewEnvironment:
    """Say what is made, and where."""

    name: str  # name that `check_name` accepts
    folder: Path  # `DIR/NAME`, relative when DIR was
    gym_python: str  # interpreter with nemo-gym, as the commands name it

    @property
    def commands(self) -> str:
        """Commands to run next, in order, ready for a shell."""
        files = (f"test_{self.name}.py", "generate_data.py", "train.yaml", "data", "data/validation.jsonl")
        test, data, config, tasks, rows = (shlex.quote(str(self.folder / file)) for file in files)
        return f"""\
# test it
{shlex.quote(self.gym_python)} {test}

# write its tasks
python {data} --output_dir {tasks}

# roll a model out on it, without training; `serve` runs in another terminal, with the same key
export VLLM_API_KEY=my-secret
trl-gym serve Qwen/Qwen3-0.6B
trl-gym rollout --dataset {rows} --gym-config-paths {shlex.quote(str(self.folder / self.name))}.yaml \\
    --base-url http://127.0.0.1:8000/v1 --model policy --num-generations 4 --max-completion-length 256 \\
    --output-dir runs/{self.name}_rollouts

# train on it
trl-gym train --config {config} --model-name-or-path Qwen/Qwen3-0.6B"""

    def files(self) -> dict[Path, str]:
        """Return the content of every file by its path below `folder`."""
        return {
            Path(self._filled(str(path.relative_to(SCAFFOLD)).removesuffix(_SUFFIX))): self._filled(path.read_text())
            for path in sorted(SCAFFOLD.rglob(f"*{_SUFFIX}"))
        }

    def _filled(self, text: str) -> str:
        # Commands first: they hold none of the other words, and the name may be one of them.
        words = {
            "COMMANDS": self.commands,
            "ENVIRONMENT_DIR": str(self.folder),
            "MyEnvironment": "".join(part.capitalize() for part in self.name.split("_")),
            "my_environment": self.name,
        }
        return re.sub("|".join(words), lambda match: words[match.group()], text)


def check_name(name: str) -> None:
    """Check that a name can be a folder, a part of Python modules and classes, and a key of a NeMo Gym config. Raises
    `ConfigError`: it cannot; the remedy suggests one."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
        suggestion = re.sub(r"^[\d_]+", "", "_".join(words).lower()) or "my_environment"
        raise ConfigError(
            f"NAME is {name!r}, which cannot be a folder, a Python module and a key of a YAML file.",
            f"Use lower-case words joined by single underscores, beginning with a letter, for example `{suggestion}`.",
        )
    taken = (
        "a keyword of Python"
        if keyword.iskeyword(name) or keyword.issoftkeyword(name)
        else "no text to YAML"
        if name in _YAML_WORDS
        else "a key with a meaning of its own in NeMo Gym's configs"
        if name in _GYM_KEYS
        else "the name of another file of the environment"
        if name == "train"
        else None
    )
    if taken is not None:
        raise ConfigError(f"NAME is {name!r}, which is {taken}.", f"Choose another, for example `{name}_environment`.")


def create(environment: NewEnvironment) -> list[Path]:
    """Write the environment; nothing is written when something is in its way. Returns the paths of its files. Raises
    `ConfigError`: the folder exists or cannot be made."""
    check_name(environment.name)
    files = environment.files()
    if environment.folder.exists() or environment.folder.is_symlink():
        raise ConfigError(
            f"{environment.folder} exists already.", "Remove it, or choose another NAME or `--directory`."
        )
    try:
        for path, content in files.items():
            (environment.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (environment.folder / path).write_text(content)
    except OSError as error:
        raise ConfigError(
            f"`--directory` {environment.folder.parent} cannot be written to: {error}.", "Choose another."
        ) from error
    return [environment.folder / path for path in files]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="name of the environment, e.g. my_environment")
    parser.add_argument("--directory", default=".", metavar="DIR", help="where its folder is made (default: here)")


def run(options: argparse.Namespace) -> int:
    """Make the environment and print what to do next; return exit status 0. Raises `ConfigError`: see `create`."""
    from rich.console import Console

    console, errors = Console(), Console(stderr=True)
    check_name(options.name)
    gym_python, problem = _gym_python()
    environment = NewEnvironment(options.name, Path(options.directory) / options.name, gym_python)
    for path in create(environment):
        console.print(path, highlight=False, soft_wrap=True, markup=False)
    console.print(f"\n{environment.commands}", highlight=False, soft_wrap=True, markup=False)
    if problem is not None:
        errors.print(f"\nthe tests need NeMo Gym: {problem}", highlight=False, soft_wrap=True, markup=False)
    return 0


def _gym_python() -> tuple[str, str | None]:
    """Return the interpreter as a command names it; where none is found, a name to replace, and why."""
    try:
        python = find_installation().python
    except ConfigError as error:
        return "GYM_PYTHON", str(error)
    here = Path.cwd()
    return str(python.relative_to(here) if python.is_relative_to(here) else python), None
