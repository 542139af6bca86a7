"""`trl-gym recipes list|show|copy` and `trl-gym quickstart`: the recipes for those who have no checkout."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from trl_gym import recipes
from trl_gym.errors import ConfigError

DESCRIPTION = (
    "The recipes that come with trl-gym: options of training runs, and what they need. They are used as they are, "
    "`trl-gym train --config recipes/NAME.yaml`, from any folder; one of the same path in the working directory wins."
)
QUICKSTART_DESCRIPTION = (
    "Train the small policy that comes with trl-gym to use a calculator: on this machine, without GPU and model hub. "
    "The same as `trl-gym train --config recipes/quickstart.yaml`; options given here win over those of the recipe."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `trl-gym recipes` can do."""
    parser.add_argument(
        "action",
        metavar="ACTION",
        choices=("list", "show", "copy"),
        help="list: names, and what they do; show: print the file; copy: that file and all it needs, to change them",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="recipe to show or to copy, as `list` prints it")
    parser.add_argument(
        "--to", default=".", metavar="DIR", help="the copied files come to lie in DIR/recipes (default: here)"
    )


def run(options: argparse.Namespace) -> int:
    """Do it; return exit status 0. Raises `ConfigError`: there is no such recipe, or it cannot be copied."""
    if options.action == "list":
        _print_list()
        return 0
    if options.name is None:
        raise ConfigError(f"`trl-gym recipes {options.action}` needs the NAME of a recipe.", recipes.choose_one())
    if options.action == "show":
        sys.stdout.write(recipes.recipe(options.name).read_text(encoding="utf-8"))
    else:
        _copy(options.name, Path(options.to))
    return 0


def _print_list() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for name in recipes.names():
        table.add_row(name, recipes.summary(name))
    console = Console()
    console.print(table, markup=False, highlight=False)
    console.print(
        "\nread one:  trl-gym recipes show NAME\nuse it:    trl-gym train --config recipes/NAME.yaml\n"
        "change it: trl-gym recipes copy NAME",
        highlight=False,
    )


def _copy(name: str, to: Path) -> None:
    new = recipes.copy(name, to)
    for path in new:
        sys.stdout.write(f"{path}\n")
    if not new:
        sys.stdout.write(f"{name} and what it needs are in {to / recipes.FOLDER} already\n")
    own = recipes.recipe(name)
    if own.parent == recipes.root() / recipes.FOLDER and own.suffix == ".yaml":
        there = f"cd {shlex.quote(str(to))} && " if to != Path(".") else ""
        sys.stdout.write(f"\ntrain with it: {there}trl-gym train --config {recipes.FOLDER}/{own.name}\n")


def add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    """Add none: `trl-gym quickstart` takes every training option."""


def quickstart(options: argparse.Namespace) -> int:
    """Train; return the exit status."""
    from trl_gym.train import main

    return main(["--config", f"{recipes.FOLDER}/quickstart.yaml", *options.run_options])
