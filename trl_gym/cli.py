"""`trl-gym`: the command line. Each subcommand is one function that adds its arguments and one that runs it.

Nothing heavy is imported here, so that `trl-gym --help` is instant; subcommands import what they need when they run.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import trl_gym
from trl_gym.errors import TrlGymError
from trl_gym.given import home_words, usable_key, with_output
from trl_gym.storage import told

_CHECK_EVERY_S = 0.5
_FLAG = re.compile(r"--[a-z][a-z0-9_-]*")
_UPSTREAM_KEY = "TRL_GYM_UPSTREAM_API_KEY"
_KEY_HELP = (
    "bearer token to demand on every route but /health (default: $VLLM_API_KEY, else one that is made and shown)"
)
_NO_KEY_HELP = "demand none: whatever runs on this machine can sample, and nobody can change weights or settings"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line."""
    from trl_gym.commands import doctor, new_environment, plan, recipes, rollout, rollout_flags, setup_gym, view

    parser = argparse.ArgumentParser(
        prog="trl-gym", description="Train language models with TRL's GRPO on NVIDIA NeMo Gym environments."
    )
    parser.add_argument("--version", action="version", version=f"trl-gym {trl_gym.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str,
        help_text: str,
        description: str,
        add_arguments: Callable[[argparse.ArgumentParser], None],
        run: Callable[[argparse.Namespace], int],
        usage: str | None = None,
        trains: bool = False,  # takes every training option too
    ) -> None:
        usage = usage and f"trl-gym {name} {usage}{' [any training option]' if trains else ''}"
        command = commands.add_parser(
            name, help=help_text, description=description, usage=usage, allow_abbrev=not trains
        )
        add_arguments(command)
        command.set_defaults(run=run, takes_run_options=trains, mode=name, parser=command)

    text = "make the interpreter that NeMo Gym runs in, or repair it: once, before everything else"
    add("setup-gym", text, setup_gym.DESCRIPTION, setup_gym.add_arguments, setup_gym.run)
    text = "train a small policy on a calculator: to see that everything works"
    quick = (recipes.QUICKSTART_DESCRIPTION, recipes.add_quickstart_arguments, recipes.quickstart)
    add("quickstart", text, *quick, "[--help]", True)
    text = "train with GRPO; the same as `accelerate launch -m trl_gym.train`, in one process"
    add("train", text, _TRAIN_DESCRIPTION, _add_train_options, _train, "--config YAML", True)
    add("recipes", "list, show or copy the recipes", recipes.DESCRIPTION, recipes.add_arguments, recipes.run)
    text, usage = "serve a policy: an OpenAI server with token-exact prompts and weight updates", "MODEL [options]"
    add("serve", text, _SERVE_DESCRIPTION, _add_serve, _serve, f"{usage} [any flag of `vllm serve`]")
    text = "token-exact prompts in front of vLLM servers that someone else started"
    add("gateway", text, _GATEWAY_DESCRIPTION, _add_gateway, _gateway)
    text = "collect rollouts without training, from any OpenAI endpoint"
    add("rollout", text, rollout.DESCRIPTION, rollout_flags.add_arguments, rollout.run)
    text = "mean@k and pass@k on named sets, from any OpenAI endpoint"
    add("eval", text, rollout.EVAL_DESCRIPTION, rollout_flags.add_arguments, rollout.run)
    text = "make a NeMo Gym environment to start from: tools, state, verifier, data, tests"
    add("new-environment", text, new_environment.DESCRIPTION, new_environment.add_arguments, new_environment.run)
    add("view", "a run as one HTML file, from its journal", view.DESCRIPTION, view.add_arguments, view.run)
    text = "examine everything that a run needs, before the run; each failure with its remedy"
    usage = "[--config YAML] [--json] [--quick]"
    add("doctor", text, doctor.DESCRIPTION, doctor.add_arguments, doctor.run, usage, True)
    text = "estimate the GPU memory of a run, for this machine or another one"
    usage = "--config YAML [--gpus N] [--gpu-memory GIB]"
    add("plan", text, plan.DESCRIPTION, plan.add_arguments, plan.run, usage, True)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; flags may be spelled with `_`, and as in earlier versions.

    Args:
        argv: Without the program's name; default: that of this process.

    Returns:
        The options, with `run_options`: those that are left to TRL's parser (`train`, `doctor`), as it spells them.
    """
    from trl_gym.commands.rollout_flags import OLD_FLAGS

    words = home_words(sys.argv[1:] if argv is None else argv)
    if words[:1] != ["serve"]:  # whose flags are vLLM's, which takes both spellings
        old = OLD_FLAGS if words[:1] in (["rollout"], ["eval"]) else {}
        words = [_respelled(word, "_", "-", old) for word in words]
    parser = build_parser()
    options, rest = parser.parse_known_args(words)
    if rest and not options.takes_run_options:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.run_options = [_respelled(word, "-", "_") for word in rest]
    return options


def _respelled(word: str, before: str, after: str, renamed: Mapping[str, str] = MappingProxyType({})) -> str:
    """Spell a flag's name with other separators; leave values alone, also one behind `=`."""
    name, equals, value = word.partition("=")
    if not _FLAG.fullmatch(name):
        return word
    name = f"--{name[2:].replace(before, after)}"
    return f"{renamed.get(name, name)}{equals}{value}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `trl-gym`; return the exit status. An error of ours is one message on stderr and status 1."""
    return with_output(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    options = parse_args(argv)
    try:
        with told("The command", os.getcwd()):
            return options.run(options)
    except TrlGymError as error:
        print(f"trl-gym: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


# -- serve ------------------------------------------------------------------------------------------------------------


_SERVE_DESCRIPTION = (
    "Serve a policy in the foreground. Prints `ready URL` once it answers; everything else that the server says goes "
    "to a log file. Ctrl-C ends it. The server is vLLM's and takes any flag of `vllm serve`; with `--engine "
    "transformers` it is one on transformers, needs no vLLM, and takes --dtype, --device, --max-model-len, "
    "--max-num-seqs and --response-template (a name of TRL's, a JSON file, or none); with `--engine sglang` it is "
    "SGLang's behind our gateway, from the interpreter in $TRL_GYM_SGLANG_PYTHON, and takes any flag of "
    "`sglang.launch_server`."
)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder or name; comes first")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    _add_serve_options(parser)


def _add_serve_options(parser: argparse.ArgumentParser) -> None:
    from trl_gym.engines import NAMES

    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port, or 0 for a free one (default: %(default)s)")
    parser.add_argument(
        "--engine", choices=NAMES, help="what samples (default: vllm where it is installed, else transformers)"
    )
    parser.add_argument("--served-model-name", default="policy", help="name of the model (default: %(default)s)")
    parser.add_argument("--log-dir", default="trl_gym_logs", help="folder for the log file (default: %(default)s)")
    parser.add_argument(
        "--start-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="give up when it is not ready by then (default: %(default)g)",
    )
    _add_key_options(parser)


def _add_key_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--api-key", metavar="KEY", help=_KEY_HELP)
    parser.add_argument("--no-key", action="store_true", help=_NO_KEY_HELP)


def _serve(options: argparse.Namespace) -> int:
    # Of what comes after MODEL, ours are picked out and the engine gets the rest. Before MODEL only ours are allowed:
    # which of its flags take a value, and so what is the model, is known only to its parser.
    own = argparse.ArgumentParser(prog="trl-gym serve", usage=options.parser.usage, add_help=False, allow_abbrev=False)
    _add_serve_options(own)
    serve, flags = own.parse_known_args(options.flags, namespace=options)
    if "-h" in flags or "--help" in flags:
        options.parser.print_help()
        return 0
    from trl_gym.engines import vllm_is_installed
    from trl_gym.policy_server.command import demanded_key
    from trl_gym.policy_server.server import PolicyServer
    from trl_gym.policy_server.sglang.server import SglangCommand, find_python, flags_from

    is_sglang = serve.engine == "sglang"
    key, told = demanded_key(serve.api_key, keyless=serve.no_key)
    server = PolicyServer(
        options.model,
        served_model_name=serve.served_model_name,
        host=serve.host,
        port=serve.port,
        vllm_args=None if is_sglang else flags,
        log_dir=serve.log_dir,
        start_timeout_s=serve.start_timeout,
        api_key=key or "",
        engine=serve.engine or ("vllm" if vllm_is_installed() else "transformers"),
        serving=SglangCommand(options.model, flags_from(flags), find_python()) if is_sglang else None,
    )
    try:
        server.start()
        told += server.parsers.lines() if server.parsers is not None else []
        print(*told, f"loading {options.model}; log: {server.log_path}", sep="\n", file=sys.stderr, flush=True)
        server.wait_ready()
        print(f"ready {server.base_url}", flush=True)
        while True:
            time.sleep(_CHECK_EVERY_S)
            server.check()
    finally:
        server.stop()


# -- gateway ----------------------------------------------------------------------------------------------------------


_GATEWAY_DESCRIPTION = (
    "Serve one URL for one or more servers of vLLM or SGLang that hold the same model, and add to them what "
    "`trl-gym serve` has: token-exact prompts and the tokens of every answer. Turns of a rollout stay on one "
    "upstream; when it is lost, the others take over. Prints `ready URL` once it answers. Ctrl-C ends it."
)


def _add_gateway(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--upstream",
        action="append",
        required=True,
        metavar="URL",
        help="server of vLLM or SGLang, e.g. http://10.0.0.5:8000; repeat for replicas",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8001, help="port, or 0 for a free one (default: %(default)s)")
    _add_key_options(parser)
    parser.add_argument(
        "--upstream-api-key", help=f"bearer token to send to the upstreams (default: ${_UPSTREAM_KEY})"
    )
    parser.add_argument(
        "--start-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="give up when an upstream does not answer by then (default: %(default)g)",
    )
    parser.add_argument(
        "--log-level",
        choices=("critical", "error", "warning", "info", "debug"),
        default="warning",
        help="what is logged to stderr; debug logs every request (default: %(default)s)",
    )


def _gateway(options: argparse.Namespace) -> int:
    from trl_gym.policy_server import gateway
    from trl_gym.policy_server.command import demanded_key

    def note(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    key, told = demanded_key(options.api_key, keyless=options.no_key)
    for line in told:
        note(line)
    gateway.run(
        gateway.GatewayOptions(
            upstreams=options.upstream,
            host=options.host,
            port=options.port,
            api_key=key,
            upstream_api_key=options.upstream_api_key or usable_key(_UPSTREAM_KEY, os.environ.get(_UPSTREAM_KEY)),
            start_timeout_s=options.start_timeout,
            log_level=options.log_level,
        ),
        ready=lambda url: print(f"ready {url}", flush=True),
        note=note,
    )
    return 0


# -- train ------------------------------------------------------------------------------------------------------------

_TRAIN_DESCRIPTION = (
    "Train in this process, on what the YAML names; options given here win over it. Options are those of "
    "GymGRPOConfig, of TRL's ModelConfig and of the script (train_files, eval_files, data_script, train_weights, "
    "agent, resume). For several processes: `accelerate launch --config_file ACCELERATE_YAML -m trl_gym.train "
    "--config YAML`, with the same options."
)


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="YAML", help="options of the run, e.g. recipes/math.yaml")


def _train(options: argparse.Namespace) -> int:
    from trl_gym.train import main as train

    return train([*(("--config", options.config) if options.config else ()), *options.run_options])


if __name__ == "__main__":
    sys.exit(main())
