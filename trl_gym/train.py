"""Train with GRPO on NeMo Gym environments: the one training script; a YAML says what is trained on what.

    trl-gym train --config recipes/math.yaml                             # one process, this one
    accelerate launch -m trl_gym.train --config recipes/math.yaml        # several

Every option of `GymGRPOConfig`, TRL's `ModelConfig` and `ScriptArguments` below can stand in the YAML and be
overridden on the command line. At the end it prints a table of what the run achieved and writes `reward.png`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import yaml

from trl_gym import recipes, storage
from trl_gym.engines import started_engine, vllm_is_installed
from trl_gym.errors import ConfigError, Problem, TrlGymError
from trl_gym.given import home_paths, home_words, with_output
from trl_gym.hub import load_config
from trl_gym.policy_server.fork_server import ForkServer
from trl_gym.progress import PhaseClock, print_line, working
from trl_gym.ranks import end_with_launcher
from trl_gym.redaction import log_without_secrets
from trl_gym.threads import wait_without_spinning

if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset
    from rich.table import Table
    from transformers import TrainerState
    from trl import ModelConfig

    from trl_gym.config import GymGRPOConfig
    from trl_gym.trainer import GymGRPOTrainer

_Work = Callable[..., contextlib.AbstractContextManager[None]]  # `working`, as this process shows it

_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # where accelerate looks, in its order


@dataclass
class ScriptArguments:
    """What this script needs beside the trainer's configuration; the help of each option says what it does."""

    train_files: list[str] = field(default_factory=list, metadata={"help": "Gym JSONL files to train on."})
    eval_files: list[str] = field(default_factory=list, metadata={"help": "Gym JSONL files to evaluate on."})
    data_script: str | None = field(
        default=None,
        metadata={"help": "Script that writes train.jsonl and validation.jsonl to --output_dir <output_dir>/data."},
    )
    train_weights: list[float] | None = field(
        default=None, metadata={"help": "Share of each of the train_files, in any unit; without it, all rows of all."}
    )
    agent: str | None = field(default=None, metadata={"help": "Agent for rows that name none."})
    resume: bool = field(
        default=False,
        metadata={"help": "Continue from the newest whole checkpoint in output_dir, if any (for requeued jobs)."},
    )
    small_policy_dir: str | None = field(
        default=None, metadata={"help": "Model folder that is trained when no model is given, as in the quickstart."}
    )
    small_policy_learning_rate: float = field(  # half a million parameters want a thousand times a real model's
        default=1e-3, metadata={"help": "Learning rate of that small policy, unless `learning_rate` is given."}
    )

    def __post_init__(self) -> None:
        self.train_files, self.eval_files = [
            [*map(recipes.find, files)] for files in (self.train_files, self.eval_files)
        ]
        self.data_script = self.data_script and recipes.find(self.data_script)
        self.small_policy_dir = self.small_policy_dir and recipes.find(self.small_policy_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; return the exit status. An error of ours is one message on stderr.

    Args:
        argv: Options without the program's name, as TRL's parser takes them; default: those of this process.
    """
    words = home_words(sys.argv[1:] if argv is None else argv)
    return with_output(lambda: _main(words))


def _main(words: Sequence[str]) -> int:
    quiet()
    wait_without_spinning()
    end_with_launcher()
    try:
        argv = with_config_found(words)
    except ConfigError as error:
        sys.stderr.write(f"ConfigError: {error}\n")
        return 1
    told = told_options(argv)
    is_plain = str(told.get("disable_tqdm", "")).lower() in ("true", "1", "yes")
    work = functools.partial(working, live=not is_plain, quiet=not _is_main(os.environ) or not _runs(told))
    try:
        # vLLM is imported while this process imports torch and TRL.
        early = early_fork_server(argv, os.environ)
        folder = str(told.get("output_dir") or os.getcwd())
        with storage.told("The run", folder), early or contextlib.nullcontext() as forks:
            _train(argv, forks, work)
    except TrlGymError as error:
        sys.stderr.write(f"\n{type(error).__name__}: {error}\n")
        return 1
    except KeyboardInterrupt:
        if _is_main(os.environ):
            sys.stderr.write(f"\ninterrupted; servers are stopped\n{after_interrupt(told, os.environ)}\n")
        return 130
    return 0


def with_config_found(argv: Sequence[str]) -> list[str]:
    """Return options with the file that `--config` names as `recipes.find` finds it, in a word of its own. Raises
    `ConfigError`: there is no such file."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    for place, (word, named) in enumerate(pairwise([*words, ""])):
        if word != "--config" or not named:
            continue
        words[place + 1] = found = recipes.find(named)
        if not os.path.exists(found):
            raise ConfigError(
                f"`--config` is {named!r}, and there is no such file: it was looked for in {os.getcwd()} and, where "
                f"it begins with `recipes/`, in {recipes.root()}.",
                "Name a file that is there, or a recipe: `trl-gym recipes list` lists them, for `--config "
                "recipes/NAME.yaml`.",
            )
    return words


def early_fork_server(argv: Sequence[str], environment: Mapping[str, str]) -> ForkServer | None:
    """Return the fork server for the policy server that this run will start, not started yet; None if it starts none.

    Args:
        argv: Options, without the program's name.
        environment: Variables by which launchers tell a process its rank; rank 0 starts servers.
    """
    options = told_options(argv)
    elsewhere = options.get("vllm_mode") == "server" or options.get("gym_replay") is not None
    engine = options.get("gym_engine", "auto")
    elsewhere = elsewhere or engine not in ("auto", "vllm") or (engine == "auto" and not vllm_is_installed())
    if elsewhere or not _runs(options) or not _is_main(environment):
        return None
    devices = options.get("gym_server_devices")
    placed = {} if devices is None else {"CUDA_VISIBLE_DEVICES": str(devices)}
    return ForkServer(env=placed)


def _runs(options: Mapping[str, Any]) -> bool:
    """Return whether something is started, and not only the help shown."""
    return bool(options) and not options.keys() & {"h", "help"}


def _is_main(environment: Mapping[str, str]) -> bool:
    return next((environment[name] for name in _RANKS if name in environment), "0") == "0"


def told_options(argv: Sequence[str]) -> dict[str, Any]:
    """Read options without TRL's parser, which takes seconds to import: those of the YAML, and over them those of the
    command line, as texts. What cannot be read is left out; the parser says what is wrong with it."""
    given = {}
    for word, following in pairwise([*argv, ""]):
        name, equals, value = word.partition("=")
        if name.startswith("-"):
            given[name.lstrip("-").replace("-", "_")] = value if equals else following  # argparse takes both
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        found = yaml.safe_load(Path(given["config"]).read_text()) if "config" in given else {}
        return {**(found if isinstance(found, dict) else {}), **given}
    return {}


def _train(argv: Sequence[str], forks: ForkServer | None, work: _Work) -> None:
    clock = PhaseClock()
    with clock.phase("imports"), work("importing torch and TRL", "up to a minute where files are cold"):
        from trl_gym import GymGRPOConfig, GymGRPOTrainer, load_gym_dataset  # isort: skip  # imports the others, too
        from accelerate import PartialState
        from transformers.utils import logging as transformers_logging
        from trl import get_peft_config

        from trl_gym.rollouts.journal import journal_files

    transformers_logging.disable_progress_bar()
    script, args, model = parse_options(argv, GymGRPOConfig)
    state = PartialState()
    if state.is_main_process and (missing := plot_problem()) is not None:
        logging.getLogger(__name__).warning("%s", missing)

    with clock.phase("data"), state.main_process_first():
        if script.data_script is not None:
            with work(f"writing data with {Path(script.data_script).name}"):
                train_file, eval_file = make_data(script.data_script, args.output_dir)
            script.train_files.append(str(train_file))
            script.eval_files.append(str(eval_file))
    model.model_name_or_path = model_to_train(model.model_name_or_path, script)
    set_small_learning_rate(model.model_name_or_path, script, args, told_options(argv))
    load_as_told(model, args)
    load_config(  # before servers are started
        model.model_name_or_path, revision=model.model_revision, trust_remote_code=args.trust_remote_code
    )
    with clock.phase("data"):
        train_dataset = load_train(script, args.seed)
    args.resume_from_checkpoint = checkpoint_to_start_from(script, args, state, train_dataset)
    earlier = [] if args.resume_from_checkpoint else journal_files(Path(args.output_dir) / "rollouts")

    clock.enter("servers and model")
    with GymGRPOTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=load_gym_dataset(script.eval_files, agent=script.agent) if script.eval_files else None,
        peft_config=get_peft_config(model),
        fork_server=forks,
    ) as trainer:
        start_up = clock.take()
        if state.is_main_process:
            _tell_start(trainer)
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if script.eval_files and args.eval_strategy != "no" and not was_evaluated(trainer.state):
            trainer.evaluate()
        with work("stopping policy server and NeMo Gym"):
            trainer.close()
    if state.is_main_process:
        summarize(args.output_dir, start_up, earlier)


def _tell_start(trainer: GymGRPOTrainer) -> None:
    logs = {"policy server log": trainer.policy_server, "NeMo Gym log": trainer.gym_servers}
    for label, server in logs.items():
        if (path := getattr(server, "log_path", None)) is not None:  # one that runs elsewhere has none here
            others = getattr(server, "num_processes", 1) - 1
            beside = f" (beside it those of {others} further processes)" if others else ""
            sys.stdout.write(f"{label + ':':<18} {path}{beside}\n")
    sys.stdout.write(f"{'threads:':<18} {trainer.threads}\n")
    sys.stdout.flush()


def was_evaluated(state: TrainerState) -> bool:
    """Return whether the weights that training ended with have been evaluated, as transformers does by itself where
    `eval_strategy` is 'steps'."""
    rows = (row for row in state.log_history if row["step"] == state.global_step)
    return any(name.startswith("eval_") and name.endswith("_runtime") for row in rows for name in row)


def parse_options(
    argv: Sequence[str] | None, config: type[GymGRPOConfig]
) -> tuple[ScriptArguments, GymGRPOConfig, ModelConfig]:
    """Read the options of a run with TRL's parser.

    Args:
        argv: Options, as for `main`.

    Raises:
        ConfigError: The file cannot be read, or options are unknown or wrong.
    """
    from trl import ModelConfig, TrlParser

    words = with_config_found(home_words(sys.argv[1:] if argv is None else argv))
    parser = TrlParser((ScriptArguments, config, ModelConfig))
    try:
        script, args, model = parser.parse_args_and_config(words)
    except TrlGymError:
        raise
    except (OSError, ValueError) as error:  # a file that cannot be read, options that nobody knows
        raise ConfigError(f"{error}.", "Correct them; `trl-gym doctor` lists every mistake in options.") from error
    model.model_name_or_path = home_paths(model.model_name_or_path)
    return script, args, model


class CurrentStderr:
    """Writes to what `sys.stderr` is at that time: a live display takes it over, and prints above itself."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def quiet() -> None:
    """Keep libraries from talking over the progress bar; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, stream=cast("TextIO", CurrentStderr()))
    log_without_secrets()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    for name in ("transformers", "trl", "datasets", "accelerate", "httpx", "vllm.triton_utils.importing"):
        logging.getLogger(name).setLevel(logging.ERROR)


def make_data(script: str, output_dir: str) -> tuple[Path, Path]:
    """Run a data script; it is deterministic, so running it again changes nothing. Returns `train.jsonl` and
    `validation.jsonl`. Raises `ConfigError`: the script fails."""
    folder = Path(output_dir) / "data"
    command = [sys.executable, script, "--output_dir", str(folder)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ConfigError(
            f"`data_script` {script} ended with exit code {done.returncode}:\n{done.stderr.strip()}\n",
            f"Run it by itself: `{' '.join(command)}`.",
        )
    return folder / "train.jsonl", folder / "validation.jsonl"


def load_train(script: ScriptArguments, seed: int) -> Dataset:
    """Load what is trained on: the files mixed by weight, or one after the other. Raises `DatasetError`: a file is
    missing or broken, or there are more or fewer weights than files."""
    from trl_gym import load_gym_dataset, mix_gym_datasets

    if script.train_weights is None:
        return load_gym_dataset(script.train_files, agent=script.agent)
    parts = [load_gym_dataset(file, agent=script.agent) for file in script.train_files]
    return mix_gym_datasets(parts, script.train_weights, seed=seed)


def model_to_train(named: str | None, script: ScriptArguments) -> str:
    """Return the model that is trained: the one that is named, else the small policy.

    Args:
        named: `model_name_or_path`.

    Raises:
        ConfigError: Neither is given, or the small policy is not there.
    """
    if named is not None:
        return recipes.find(named)
    if script.small_policy_dir is None:
        raise ConfigError(
            "`model_name_or_path` is not set.",
            "Set it to a model folder or a name on the Hugging Face Hub; `trl-gym quickstart` has a small one.",
        )
    if not (Path(script.small_policy_dir) / "config.json").is_file():
        raise ConfigError(
            f"`small_policy_dir` is {script.small_policy_dir}, which has no config.json.",
            f"Set it to {recipes.SMALL_POLICY}, which comes with trl-gym, or name a model with `model_name_or_path`.",
        )
    return script.small_policy_dir


def checkpoint_to_start_from(
    script: ScriptArguments, args: GymGRPOConfig, state: PartialState, train_dataset: Dataset
) -> str | None:
    """Return the checkpoint that the run continues from, if any. Every rank calls it in step. The trainer compares
    again, with its model: what can be refused before servers are started is refused here. Raises `ConfigError`: see
    `resume.begin`."""
    from accelerate.utils import gather_object

    from trl_gym import made_with, resume
    from trl_gym.checkpoints import last_whole_checkpoint

    asked = args.resume_from_checkpoint
    if script.resume and asked is None:
        asked = last_whole_checkpoint(args.output_dir, state.process_index, gather_object)
    if not asked:
        return None
    facts = made_with.facts(args, train_dataset, state.num_processes)
    return resume.begin(asked, args, state, facts, is_told=False).checkpoint


def set_small_learning_rate(model: str, script: ScriptArguments, args: GymGRPOConfig, told: Mapping[str, Any]) -> None:
    """Give the small policy the learning rate of its size, where none is given."""
    if model == script.small_policy_dir and "learning_rate" not in told:
        args.learning_rate = script.small_policy_learning_rate


def load_as_told(model: ModelConfig, args: GymGRPOConfig) -> None:
    """Hand on what TRL's `ModelConfig` says about loading; `model_init_kwargs` wins where both do."""
    from trl import get_quantization_config

    told = {
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        "revision": None if model.model_revision == "main" else model.model_revision,
        "quantization_config": get_quantization_config(model),
    }
    args.model_init_kwargs = {name: value for name, value in told.items() if value is not None} | (
        args.model_init_kwargs or {}
    )
    if told["revision"] is not None and args.vllm_mode == "colocate" and started_engine(args) == "vllm":
        assert not isinstance(args.gym_vllm_args, str)  # parsed by `GymGRPOConfig`
        args.gym_vllm_args = {"revision": told["revision"], **(args.gym_vllm_args or {})}


# -- what a run achieved ----------------------------------------------------------------------------------------------


def summarize(output_dir: str | Path, start_up: Mapping[str, float], earlier: Sequence[Path] = ()) -> None:
    """Print a table of what a run achieved and write `reward.png`. Reads only what is on disk.

    Args:
        output_dir: Folder of the run, with `metrics.jsonl` and `rollouts/`.
        start_up: Seconds of the phases before training, by name.
        earlier: Files of the journal that an earlier run left in this folder: its rollouts are not of this one.
    """
    from rich.console import Console

    from trl_gym.rollouts.journal import read_objects

    folder = Path(output_dir)
    metrics = list(read_objects(folder / "metrics.jsonl"))
    console = Console()
    console.print(_table(metrics, _count(folder / "rollouts", earlier), start_up))
    picture = plot_reward(metrics, folder / "reward.png")
    for name, text in (
        ("checkpoint", newest_checkpoint(folder)),
        ("reward curve", picture),
        ("look at it", look_command(folder)),
    ):
        if text is not None:
            print_line(console, f"{name + ':':<14} {text}")


def look_command(folder: Path) -> str:
    """Return the command that shows a run, as it can be typed where `trl-gym` may not be on the path."""
    beside = Path(sys.executable).with_name("trl-gym")
    near = beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside
    is_found = shutil.which("trl-gym") is not None or not beside.exists()
    return shlex.join(["trl-gym" if is_found else str(near), "view", str(folder)])


def after_interrupt(options: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """Say what to do with a run that was interrupted, from what it has on disk.

    Args:
        environment: Variables; `make` sets one, and takes further options in another way.
    """
    folder = Path(str(options.get("output_dir", ""))).expanduser()
    if "output_dir" not in options or not any((folder / "rollouts").glob("*.jsonl")):
        return "Nothing was rolled out yet: the same command starts again."
    from trl_gym.checkpoints import last_whole_checkpoint

    checkpoint = last_whole_checkpoint(folder, is_told=False)
    further = "`ARGS=--resume`" if "MAKELEVEL" in environment else "`--resume`"
    go_on = (
        "No whole checkpoint was written yet (`save_steps`): the same command starts with the first step."
        if checkpoint is None
        else f"The same command with {further} continues from {checkpoint}."
    )
    return f"{go_on}\nFinished rollouts are in the journal: {look_command(folder)}"


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the last step, if one was saved."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def plot_problem() -> Problem | None:
    """Say why no picture can be drawn at the end of a run, before it begins; None where one can."""
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    return Problem(
        "matplotlib is not installed: the run will write metrics.jsonl and no reward.png.",
        "Run `pip install 'trl-gym[plot]'`.",
    )


def plot_reward(metrics: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Draw reward and success over optimizer steps, as a PNG; None without matplotlib, or metrics."""
    if plot_problem() is not None or not metrics:  # the first is told before the run
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label, style in (
        ("reward", "training reward", {"color": "#76b900", "alpha": 0.7}),
        ("eval_reward", "validation reward", {"color": "#1a1a1a", "marker": "o"}),
        ("eval_success", "validation success", {"color": "#1a1a1a", "marker": "s", "linestyle": "--"}),
    ):
        points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="optimizer step", ylabel="mean over rollouts", ylim=(-0.02, 1.02), title=path.parent.name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _count(rollouts: Path, earlier: Sequence[Path]) -> Counter[str]:
    from trl_gym.rollouts.journal import Attempt, LineState, journal_files, lines_of
    from trl_gym.rollouts.rollout import recorded_rows

    counted: Counter[str] = Counter()
    files = [path for path in journal_files(rollouts) if path not in earlier]
    for rollout in (line.record for path in files for line in lines_of(path)):
        if Attempt.of(rollout).state is LineState.COUNTED:
            counted["rollouts"] += 1
            counted["failed"] += rollout["failure"] is not None
        for row in recorded_rows(rollout):
            counted["sampled tokens"] += sum(row["env_mask"])
            counted["tokens"] += len(row["prompt_ids"]) + len(row["completion_ids"])
    return counted


def _table(metrics: Sequence[Mapping[str, Any]], counted: Mapping[str, int], start_up: Mapping[str, float]) -> Table:
    from rich.table import Table

    table = Table(title="before → after", title_justify="left", show_header=False)
    evaluated = [row for row in metrics if row.get("eval_reward") is not None]
    trained = [row for row in metrics if row.get("reward") is not None]
    for label, name, rows in (
        ("validation success", "eval_success", evaluated),
        ("validation reward", "eval_reward", evaluated),
        ("training reward", "reward", trained),
    ):
        if rows and rows[0].get(name) is not None:
            table.add_row(label, f"{rows[0][name]:.3f} → {rows[-1][name]:.3f}")
    if metrics:  # with `logging_steps` above the number of steps there are none
        table.add_row("optimizer steps", f"{metrics[-1]['step']}")
    table.add_row("rollouts", f"{counted['rollouts']:,} ({counted['failed']:,} failed)")
    table.add_row("tokens", f"{counted['tokens']:,} ({counted['sampled tokens']:,} sampled by the policy)")
    phases = Counter(start_up)
    for row in metrics:
        for name, value in row.items():
            prefix, _, phase = name.partition("seconds/")
            if phase and value is not None and not prefix.endswith("/"):  # not `weight_sync/seconds/…`, parts of one
                phases["evaluation" if prefix else phase.replace("_", " ")] += value
    for phase, seconds in phases.items():
        table.add_row(f"seconds: {phase}", f"{seconds:.1f}")
    table.add_row("seconds: total", f"{sum(phases.values()):.1f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
