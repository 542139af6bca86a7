"""The policy server: flags of one that the run starts, and what a running one is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from trl_gym import compat
from trl_gym.doctor.checks import Finding, failed, from_error, ok, split_remedy, warning
from trl_gym.doctor.context import API_KEY_VARIABLE, Subject
from trl_gym.errors import PolicyServerError
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError
from trl_gym.policy_server.diagnosis import find_cause, hint_for
from trl_gym.policy_server.splice_probe import check_splice, explain_stranger

_PARSE_TIMEOUT_S = 120.0  # importing vLLM takes long on a cold disk
# The server's own reading of its flags, in a process of its own: importing vLLM changes environment and logging.
_PARSE = """
import json, sys
from trl_gym.policy_server.engine.entry import parse_args
parse_args(json.loads(sys.argv[1]))
"""
UNTOUCHED = "default"  # weight version of a server that nobody has sent weights to


def flags(subject: Subject) -> Iterator[Finding]:
    """The installed vLLM takes the flags that the run would give it."""
    from trl_gym.policy_server.command import flags_from

    if not subject.starts_policy:
        return
    given = flags_from(run_flags(subject))
    command = [sys.executable, "-c", _PARSE, json.dumps([subject.model, *given])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PARSE_TIMEOUT_S)
    if done.returncode == 0:
        yield ok(" ".join(given))
        return
    cause = find_cause(done.stderr) or (done.stderr.strip().splitlines() or ["no message"])[-1]
    remedy = hint_for(cause) or "`vllm serve --help=all` describes every flag"
    yield failed(f"`gym_vllm_args`: {cause}", f"Correct `gym_vllm_args`: {remedy}.")


def run_flags(subject: Subject) -> dict[str, Any]:
    """What the trainer starts the server with."""
    import contextlib
    import io

    from trl import get_peft_config

    from trl_gym.server_flags import server_flags

    with contextlib.redirect_stdout(io.StringIO()):  # the memory plan, which is a check of its own
        return server_flags(subject.args, subject.model, get_peft_config(subject.model_options))


def remote(subject: Subject) -> Iterator[Finding]:
    """A running server can be reached, takes our key, is one of ours, generates, and has a version that is known."""
    args = subject.args
    if not subject.serves or subject.starts_policy or not args.vllm_server_base_url:
        return
    for url in filter(None, (part.strip() for part in args.vllm_server_base_url.split(","))):
        yield from _look_at(subject, url)


def _look_at(subject: Subject, url: str) -> Iterator[Finding]:
    client = subject.remote_client(url)
    try:
        info = client.info()
    except PolicyResponseError as error:
        yield _stranger(client, error)
        return
    except PolicyServerError as error:
        served = subject.model_options.model_name_or_path or "MODEL"
        yield failed(str(error), f"Start it with `trl-gym serve {served} --host HOST --port PORT`, or check the URL.")
        return
    yield from _facts(subject, client, info)


def _stranger(client: PolicyClient, error: PolicyResponseError) -> Finding:
    explanation = explain_stranger(client, error)
    if error.status in (401, 403):
        return failed(explanation, f"`export {API_KEY_VARIABLE}=KEY` with the key that the server was started with.")
    text, _, remedy = explanation.partition(". Start it")
    return failed(text, f"Start it{remedy}." if remedy else split_remedy(explanation)[1])


def _facts(subject: Subject, client: PolicyClient, info: dict[str, Any]) -> Iterator[Finding]:
    length, wanted = info.get("max_model_len"), subject.args.vllm_max_model_length
    served = f"{client.base_url} serves {', '.join(info.get('model_names', []))}"
    yield ok(f"{served}, vLLM {info.get('vllm_version')}, context {length}, weights {info.get('weight_version')}")
    if length is not None and wanted is not None and length < wanted:
        yield failed(
            f"{client.base_url} has a context of {length} and `vllm_max_model_length` is {wanted}",
            f"Start it with `--max-model-len {wanted}`, or lower `vllm_max_model_length`.",
        )
    version = str(info.get("vllm_version") or "")
    supported = compat.SUPPORTED["vllm"]
    if version and not _contains(supported, version):
        yield warning(
            f"{client.base_url} runs vLLM {version} and trl-gym knows {supported}",
            f"`pip install 'vllm{supported}'` where the server runs.",
        )
    if client.is_paused():
        yield warning(
            f"{client.base_url} is paused, as a trainer leaves it that is killed while it sends weights",
            f"`curl -X POST {client.root_url}/resume`; the first weights of a run do it too.",
        )
    elif subject.args.vllm_server_base_url:
        try:
            check_splice(client, info["model_names"][0])
        except PolicyServerError as error:
            yield from from_error(error, "Start it with `trl-gym serve MODEL`.")
            return
        if not subject.logged:
            yield ok(f"{client.base_url} continues sampled tokens exactly")


def _contains(supported: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(supported).contains(version, prereleases=True)
    except InvalidVersion:
        return False
