"""The run itself, in small: NeMo Gym, policy server, one weight sync with its probe, one rollout for each environment.

Servers are started as the trainer starts them and end with the examination. The run's own folder is not written to.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import secrets
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from trl_gym import compat
from trl_gym.dataset import ROW_COLUMN, first_with_tools
from trl_gym.doctor.context import LEFT_OUT, Context, Finding, failed, from_error, ok, skipped, warning
from trl_gym.errors import FailureKind, PolicyServerError, ServerError
from trl_gym.given import split_urls
from trl_gym.gym.config import expand_overrides, resolve_configs, single_process_reasons
from trl_gym.gym.discovery import look_at_head, new_http_session
from trl_gym.gym.install import TESTED_GYM, find_installation
from trl_gym.gym.servers import choose_processes
from trl_gym.policy_server.client import PolicyClient, PolicyResponseError, server_urls
from trl_gym.policy_server.command import KEY_VARIABLE, api_key_from_environment
from trl_gym.policy_server.middleware.identity import gym_key
from trl_gym.policy_server.parsers import choose
from trl_gym.policy_server.server import PolicyBackend, find_cause, remedy_for
from trl_gym.policy_server.splice_probe import check_sampling, check_splice, check_tools, unusable
from trl_gym.policy_server.transformers_engine.server import TransformersServer
from trl_gym.processes import ServerState
from trl_gym.train import load_as_told

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trl_gym.config import GymGRPOConfig
    from trl_gym.rollouts.collector import RolloutCollector
    from trl_gym.rollouts.request import RolloutRequest
    from trl_gym.rollouts.rollout import Rollout
    from trl_gym.run.servers import RunServers

_TIMEOUT_S = 10.0
_PARSE_TIMEOUT_S = 120.0  # importing vLLM takes long on a cold disk
# The server's own reading of its flags, in a process of its own: importing vLLM changes environment and logging.
_PARSE = """
import json, sys
from trl_gym.policy_server.engine.entry import parse_args
parse_args(json.loads(sys.argv[1]))
"""
UNTOUCHED = "default"  # weight version of a vLLM server that has the weights it loaded when it started
EXAMINED = "doctor"  # version of weights that the doctor has sent to a server that runs on
_MAX_DEADLINE_S = 300.0  # of a single rollout on servers that do nothing else
_RECONNECT_S = 5.0  # a server that is gone is not waited for
_NOBODY = "http://127.0.0.1:9/v1"  # for a Gym that is started although there is no policy server
_ROLLOUT_REMEDIES = {
    FailureKind.INFRASTRUCTURE: "Look into the logs of NeMo Gym and of the policy server.",
    FailureKind.DEADLINE: "Raise `gym_deadline`, or look into the environment's log for what it waits for.",
    FailureKind.ENVIRONMENT: "Fix the environment: its verifier must return a finite `reward`.",
    FailureKind.POLICY: "Look into the policy server's log.",
}


# -- NeMo Gym ---------------------------------------------------------------------------------------------------------


def interpreter(context: Context) -> Iterator[Finding]:
    """Find an interpreter with a supported nemo-gym."""
    found = find_installation(context.args.gym_python)
    context.installation = found
    yield ok(f"nemo-gym {found.version} at {found.python} (tested: {TESTED_GYM})")


def configs(context: Context) -> Iterator[Finding]:
    """Find configs in the working directory or in the installed nemo-gym, with all that they include."""
    if not context.args.gym_config_paths:
        yield failed("`gym_config_paths` is not set", "Name the YAML of at least one environment.")
        return
    args = context.args
    found = resolve_configs(args.gym_config_paths, context.installation.root)
    context.agents = agents = found.agents
    overrides = expand_overrides(args.gym_overrides if isinstance(args.gym_overrides, dict) else {})
    choose_processes(args.gym_processes, args.gym_mode, single_process_reasons(found, overrides), 1)
    if not agents:
        yield failed(
            "the configs define no agent (a server of the kind `responses_api_agents`)",
            "Add the config of an agent to `gym_config_paths`.",
        )
    else:
        yield ok(f"{', '.join(map(str, args.gym_config_paths))}: {_agents_text(agents)}")


def head_server(context: Context) -> Iterator[Finding]:
    """Ask a running Gym for its agents."""
    for url in (url.rstrip("/") for url in split_urls(str(context.args.gym_head_url))):
        with new_http_session() as session:
            context.agents = tuple(sorted(look_at_head(session, url, timeout_s=_TIMEOUT_S).agents()))
        if not context.agents:
            yield failed(f"{url} has no agents", "Start that Gym with the config of an agent.")
        else:
            yield ok(f"{url}: {_agents_text(context.agents)}")


def _agents_text(agents: tuple[str, ...]) -> str:
    return f"agent {agents[0]}" if len(agents) == 1 else f"agents {', '.join(agents)}"


# -- policy server ----------------------------------------------------------------------------------------------------


def flags(context: Context) -> Iterator[Finding]:
    """Let the installed vLLM parse the flags that the run would give it."""
    from trl_gym.policy_server.command import flags_from

    wanted = run_options(context)[0]
    _, given = choose(context.model, flags_from(wanted))  # with the parsers that are guessed
    command = [sys.executable, "-c", _PARSE, json.dumps([context.model, *given])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PARSE_TIMEOUT_S)
    if done.returncode == 0:
        yield ok(shown_flags(context.model, wanted))
        return
    cause = find_cause(done.stderr) or (done.stderr.strip().splitlines() or ["no message"])[-1]
    remedy = remedy_for(cause) or "Run `vllm serve --help=all`, which describes every flag."
    yield failed(f"`gym_vllm_args`: {cause}", f"Correct `gym_vllm_args`. {remedy}")


def shown_flags(model: str, options: Mapping[str, Any]) -> str:
    """Return a server's command line, as `choose` completes it, without keys and passwords.

    Args:
        model: Model folder, or name on the hub.
        options: As for `flags_from`.
    """
    from trl_gym.policy_server.command import flags_from
    from trl_gym.redaction import Redactor

    return " ".join(choose(model, flags_from(Redactor()(options)))[1])


def run_options(context: Context) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Return flags and environment that the trainer starts the server with."""
    from trl import get_peft_config

    from trl_gym.run.servers import server_options

    with contextlib.redirect_stdout(io.StringIO()):  # the memory plan, which is a check of its own
        return server_options(context.args, context.model, get_peft_config(context.model_options))


def remote(context: Context) -> Iterator[Finding]:
    """Check that a running server can be reached, takes our key, is one of ours and generates."""
    for url in server_urls(context.args.vllm_server_base_url):
        with closing(PolicyClient(url, api_key=api_key_from_environment(), timeout_s=30.0)) as client:
            try:
                info = client.info()
            except PolicyResponseError as error:
                told = unusable(client, error)
                key = f"`export {KEY_VARIABLE}=KEY` with the key that the server was started with."
                yield failed(told.problem, key if error.status in (401, 403) else told.remedy)
            except PolicyServerError as error:
                served = context.model_options.model_name_or_path or "MODEL"
                start = f"Start it with `trl-gym serve {served} --host HOST --port PORT`, or check the URL."
                yield from from_error(error, start)
            else:
                yield from _facts(context, client, info)


def _facts(context: Context, client: PolicyClient, info: dict[str, Any]) -> Iterator[Finding]:
    length, wanted = info.get("max_model_len"), context.args.vllm_max_model_length
    served = f"{client.base_url} serves {', '.join(info.get('model_names', []))}"
    engine, version = str(info.get("engine", "vllm")), str(info.get("engine_version") or "")
    yield ok(f"{served}, {engine} {version}, context {length}, weights {info.get('weight_version')}")
    if context.args.gym_engine not in ("auto", engine):
        yield failed(
            f"{client.base_url} is of the engine {engine} and `gym_engine` is {context.args.gym_engine!r}",
            "Leave `gym_engine` at 'auto', or name the server that you mean.",
        )
    if length is not None and wanted is not None and length < wanted:
        yield failed(
            f"{client.base_url} has a context of {length} and `vllm_max_model_length` is {wanted}",
            f"Start it with `--max-model-len {wanted}`, or lower `vllm_max_model_length`.",
        )
    tested = compat.TESTED["vllm"]
    if engine == "vllm" and version and not compat.is_tested(engine, version):
        yield warning(
            f"{client.base_url} runs vLLM {version} and trl-gym was tested with {tested}",
            f"`pip install 'vllm{tested}'` where the server runs, if something behaves otherwise than documented.",
        )
    if client.is_paused():
        yield warning(
            f"{client.base_url} is paused: a trainer was probably killed during a weight sync",
            f'`curl -X POST -H "Authorization: Bearer ${KEY_VARIABLE}" {client.root_url}/resume`; the first weights '
            "of a run do it too.",
        )
        return
    check_splice(client, info["model_names"][0])
    if not context.logged:
        yield ok(f"{client.base_url} continues sampled tokens exactly")
    if engine == "transformers":
        check_sampling(client, info["model_names"][0], context.args.probe_tolerance)
    agent = first_with_tools(record[ROW_COLUMN] for record in context.train_rows)
    if agent is not None and check_tools(client, info["model_names"][0], agent):
        yield ok(f"{client.base_url} answers a chat with a tool")


def policy_server(context: Context) -> Iterator[Finding]:
    """Start the policy server, or attach to the running one."""
    if context.quick and context.starts_policy:
        yield LEFT_OUT
        return
    in_process = context.engine == "transformers"
    policy = context.policy = _new_in_process(context) if in_process else _new_run(context).new_policy()
    if context.starts_policy:
        context.resources.callback(policy.stop)
        policy.start()
    if isinstance(policy, TransformersServer):
        _give_model(context, policy)
    policy.wait_ready()
    yield ok(f"{policy.client.base_url}, takes weights by {', '.join(policy.weight_transports) or 'nothing'}")


def _new_in_process(context: Context) -> PolicyBackend:
    from trl_gym.run.in_process import new_server

    return new_server(context.args, context.model, api_key=secrets.token_urlsafe())


def _give_model(context: Context, server: TransformersServer) -> None:
    """Let it serve the model that a run would train, loaded as its script loads it."""
    from trl_gym.run.in_process import precision_of

    autocast = precision_of(_accelerator(context).mixed_precision)
    server.take_model(_trained(context), context.tokenizer, autocast=autocast)


def gym_servers(context: Context) -> Iterator[Finding]:
    """Start NeMo Gym, with every server of the configs, or attach to the running one."""
    if context.quick and context.starts_gym:
        yield LEFT_OUT
        return
    gym = context.gym = _new_run(context).new_gym()
    if context.starts_gym:
        context.resources.callback(gym.stop)
        policy = getattr(context, "policy", None)
        if policy is not None and policy.state is ServerState.READY:
            key = gym_key(policy.client.api_key, context.args.gym_untagged_calls)
            gym.connect_policy(policy.base_urls, policy.model_name, key)
        else:
            gym.connect_policy(_NOBODY, "policy")
        gym.start()
    gym.wait_ready()
    processes = "" if gym.num_processes == 1 else f" in {gym.num_processes} processes"
    yield ok(f"{len(gym.servers)} servers{processes}, agents {', '.join(sorted(gym.agents))}")


def continuation(context: Context) -> Iterator[Finding]:
    """Check that the policy server continues sampled tokens exactly and that Gym calls it."""
    from trl_gym.run.servers import RunServers

    context.servers = RunServers(_own_args(context), lambda: context.model, context.policy, context.gym)
    with contextlib.redirect_stdout(io.StringIO()):  # parsers, which are a check of their own
        context.servers.start()
    context.servers.wait_ready()
    exactly = "" if context.logged else ", which continues sampled tokens exactly"
    yield ok(f"NeMo Gym calls this policy server{exactly}")


def weight_sync(context: Context) -> Iterator[Finding]:
    """Send weights (or the adapter) to the server and compare its log-probabilities with the trainer's."""
    if context.quick:
        yield LEFT_OUT
        return
    client = context.policy.client
    held = client.weight_version()
    if not context.starts_policy and held not in (UNTOUCHED, EXAMINED):
        yield skipped(
            f"{client.base_url} holds weights of a run (version {held}), which would be replaced",
            "Restart that server if no run uses it.",
        )
        return
    from trl_gym.run.weights import PolicyWeights

    model = _trained(context)
    weights = PolicyWeights(_own_args(context), _accelerator(context), context.servers, model)
    try:
        report = weights.push(model, 0)
    finally:
        if not context.starts_policy:
            leave(client, weights.transport_name, held)
    seconds = sum(report.seconds.values())
    gap = "" if report.probe is None else f"; log-probabilities differ by {report.probe.mean_gap:.1e} nats"
    yield ok(f"{report.num_bytes / 1e6:,.1f} MB by {weights.transport_name} in {seconds:.1f} s{gap}")


def leave(client: PolicyClient, transport: str, held: str) -> None:
    """Leave a server that runs on so that nobody takes the doctor's weights for those of step 0 of a run.

    An adapter is unloaded, and the server is as it was. Weights cannot be brought back: their version says whose they
    are.

    Args:
        transport: Name of the transport that sent the weights.
        held: Version that the server held before.
    """
    with contextlib.suppress(PolicyServerError):  # the error of the sync itself is told
        if transport == "adapter":
            client.clear_adapters()
        elif client.weight_version() != held:
            client.set_weight_version(EXAMINED)


def rollouts(context: Context) -> Iterator[Finding]:
    """Run one rollout for each agent: model calls, tools, verifier, reward."""
    if context.quick:
        yield LEFT_OUT
        return
    from trl_gym.rollouts.journal import Journal
    from trl_gym.rollouts.source import Finisher
    from trl_gym.rollouts.trajectory import from_calls, make_decoder

    requests = list(_requests(context))
    journal = Journal(context.work_dir() / "rollouts", secrets=context.servers.secrets)
    finish = Finisher(
        build=lambda answer, request, calls: from_calls(calls),
        decode=make_decoder(context.tokenizer),
        journal=journal,
        drift_policy="truncate",
        mode="doctor",
        weight_version="0",
    )
    with closing(journal), closing(_collector(context)) as collector, context.servers.sampling():
        for request in requests:
            # One after another: what one environment does must not hide what another one does.
            try:
                yield judge(collector.collect([request], finish)[0])
            except ServerError as error:
                yield from from_error(error)


def judge(rollout: Rollout) -> Finding:
    """Turn a finished rollout into a finding about its environment."""
    agent = rollout.request.agent
    if rollout.failure is not None:
        kind = rollout.failure.kind
        return failed(
            f"{agent}: {kind}: {rollout.failure.text} ({rollout.failure.where})",
            _ROLLOUT_REMEDIES.get(kind, "Look into the log of NeMo Gym."),
        )
    if rollout.reward is None or not math.isfinite(rollout.reward):
        return failed(f"{agent}: the reward is {rollout.reward}", _ROLLOUT_REMEDIES[FailureKind.ENVIRONMENT])
    sampled = sum(sum(trajectory.env_mask) for trajectory in rollout.trajectories)
    turns = len(rollout.records or [])
    told = f"{agent}: reward {rollout.reward:g}, {turns} turns, {sampled} sampled tokens, {rollout.seconds:.1f} s"
    if not sampled:
        return failed(f"{told}: there is nothing to train on", "Let the agent pass the policy server's answers on.")
    if rollout.drift is not None:
        return warning(
            f"{told}; it drifted: {rollout.drift.text}", "`gym_drift` decides what becomes of such rollouts."
        )
    return ok(told)


def _own_args(context: Context) -> GymGRPOConfig:
    """Return the run's options, with logs in our own folder."""
    args = copy.copy(context.args)
    args.gym_log_dir = str(context.work_dir() / "logs")
    args.gym_server_reconnect_timeout = _RECONNECT_S
    args.vllm_server_timeout = min(args.vllm_server_timeout, 30.0)
    return args


def _new_run(context: Context) -> RunServers:
    from trl_gym.run.servers import RunServers

    options, forks = lambda: run_options(context), context.fork_server
    return RunServers(_own_args(context), lambda: context.model, start_options=options, fork_server=forks)


def _accelerator(context: Context) -> Accelerator:
    from accelerate import Accelerator

    return Accelerator(cpu=context.args.use_cpu)


def _trained(context: Context) -> Any:
    """Return the model on the trainer's device, loaded once."""
    if context.trained is None:
        context.trained = _load_model(context).to(_accelerator(context).device)
    return context.trained


def _load_model(context: Context) -> Any:
    """Load the model as the training script does."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging
    from trl import get_peft_config

    transformers_logging.disable_progress_bar()
    args = copy.copy(context.args)
    load_as_told(context.model_options, args)
    model = AutoModelForCausalLM.from_pretrained(context.model, **{"dtype": "float32", **args.model_init_kwargs})
    if (adapter := get_peft_config(context.model_options)) is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, adapter)


def _requests(context: Context) -> Iterator[RolloutRequest]:
    """Make a request from the first row of each agent."""
    from trl_gym.rollouts.request import RolloutRequest, stamp

    args, session = context.args, uuid.uuid4().hex[:8]
    first: dict[str, dict[str, Any]] = {}
    for record in context.train_rows:
        agent = record["agent"] or context.gym.sole_agent
        if agent is not None:
            first.setdefault(agent, record)
    for index, (agent, record) in enumerate(first.items()):
        identity: dict[str, Any] = {"rollout_id": f"{session}-doctor-t{index}-m0-a0", "task_index": index, "member": 0}
        row = stamp(
            json.loads(record[ROW_COLUMN]),
            **identity,
            sampling=args.rollout_options.sampling,
            completion_budget=args.max_completion_length or 1,
            agent_sampling=args.rollout_options.agent_sampling_of(agent),
            chat_template_kwargs=args.chat_template_kwargs,
        )
        yield RolloutRequest(**identity, group=index, attempt=0, agent=agent, row=row)


def _collector(context: Context) -> RolloutCollector[Rollout]:
    from trl_gym.rollout_options import RolloutOptions
    from trl_gym.rollouts.admission import budgets_from_options
    from trl_gym.rollouts.collector import RolloutCollector
    from trl_gym.rollouts.ledger import Ledger
    from trl_gym.rollouts.request import PolicyAccess

    policy, gym = context.policy, context.gym
    return RolloutCollector(
        gym.agent,
        budgets=budgets_from_options(
            RolloutOptions(deadline=min(context.args.gym_deadline, _MAX_DEADLINE_S), max_inflight=1, retries={})
        ),
        check=context.servers.check,
        agents_down=gym.agents_down,
        gym_log=gym.log_end,
        ledger=Ledger(policy.base_urls, policy.client.api_key),
        access=PolicyAccess(policy.base_urls, policy.client.api_key),
    )
