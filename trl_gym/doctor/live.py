"""The run itself, in small: servers, one weight sync with its probe, one rollout for each environment. Servers are
started as the trainer starts them and end with the examination; nothing is written to the run's own folder."""

from __future__ import annotations

import copy
import json
import math
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from trl_gym.dataset import ROW_COLUMN
from trl_gym.doctor.checks import Finding, failed, from_error, ok, skipped, warning
from trl_gym.doctor.context import Subject
from trl_gym.doctor.policy import UNTOUCHED, run_flags
from trl_gym.errors import FailureKind, ServerError, WeightSyncError

if TYPE_CHECKING:
    from trl_gym.config import GymGRPOConfig
    from trl_gym.rollouts.collector import RolloutCollector
    from trl_gym.rollouts.finish import Finisher
    from trl_gym.rollouts.request import RolloutRequest
    from trl_gym.rollouts.rollout import Rollout
    from trl_gym.run.servers import RunServers

_QUICK = "left out by --quick: no server is started"
_MAX_DEADLINE_S = 300.0  # of a single rollout on servers that do nothing else
_RECONNECT_S = 5.0  # a server that is gone is not waited for
_NOBODY = "http://127.0.0.1:9/v1"  # for a Gym that is started although there is no policy server
_ROLLOUT_REMEDIES = {
    FailureKind.INFRASTRUCTURE: "Look into the logs of NeMo Gym and of the policy server.",
    FailureKind.DEADLINE: "Raise `gym_deadline`, or look into the environment's log for what it waits for.",
    FailureKind.ENVIRONMENT: "Mend the environment: its verifier must return a finite `reward`.",
    FailureKind.POLICY: "Look into the policy server's log.",
}


def policy_server(subject: Subject) -> Iterator[Finding]:
    """The policy server starts, or the running one is attached to."""
    if not subject.serves:
        return
    if subject.quick and subject.starts_policy:
        yield skipped(_QUICK)
        return
    run = _new_run(subject)
    policy = run.new_policy()
    subject.policy = policy
    if subject.starts_policy:
        subject.resources.callback(policy.stop)
        policy.start()
    try:
        policy.wait_ready()
    except ServerError as error:
        yield from from_error(error, _hint(str(error)) or "Look into the log that is named.")
        return
    yield ok(f"{policy.base_url}, takes weights by {', '.join(policy.weight_transports) or 'nothing'}")


def gym_servers(subject: Subject) -> Iterator[Finding]:
    """NeMo Gym starts, with every server of the configs; or the running one is attached to."""
    if not subject.serves:
        return
    if subject.quick and subject.starts_gym:
        yield skipped(_QUICK)
        return
    gym = _new_run(subject).new_gym()
    subject.gym = gym
    if subject.starts_gym:
        subject.resources.callback(gym.stop)
        policy = getattr(subject, "policy", None)
        if policy is not None and policy.state == "ready":
            gym.connect_policy(policy.base_url, policy.model_name, policy.client.api_key or "EMPTY")
        else:
            gym.connect_policy(_NOBODY, "policy")
        gym.start()
    try:
        gym.wait_ready()
    except ServerError as error:
        yield from from_error(error, "Look into the log that is named.")
        return
    yield ok(f"{len(gym.servers)} servers, agents {', '.join(sorted(gym.agents))}")


def continuation(subject: Subject) -> Iterator[Finding]:
    """The server continues sampled tokens exactly; both servers know of each other."""
    if not subject.serves:
        return
    args = _own_args(subject)
    from trl_gym.run.servers import RunServers

    subject.run = RunServers(args, lambda: subject.model, subject.policy, subject.gym)
    subject.run.start()
    subject.run.wait_ready(lambda message: None)
    yield ok(
        "NeMo Gym calls this policy server" + ("" if subject.logged else ", which continues sampled tokens exactly")
    )


def weight_sync(subject: Subject) -> Iterator[Finding]:
    """Weights (or the adapter) reach the server, which then computes what the trainer computes."""
    if not subject.serves:
        return
    if subject.quick:
        yield skipped(_QUICK.replace("no server is started", "no weights are sent"))
        return
    held = subject.policy.client.weight_version()
    if not subject.starts_policy and held != UNTOUCHED:
        yield skipped(
            f"{subject.policy.base_url} holds weights of a run (version {held}), which would be replaced",
            "Restart that server if no run uses it.",
        )
        return
    from accelerate import Accelerator

    from trl_gym.run.weights import PolicySupply

    accelerator = Accelerator(cpu=subject.args.use_cpu)
    model = _load_model(subject).to(accelerator.device)
    supply = PolicySupply(_own_args(subject), accelerator, subject.run, model)
    try:
        report = supply.push(model, 0)
    except WeightSyncError as error:
        yield from from_error(error, "Try another `gym_weight_transport`.")
        return
    kind = supply.transport_name
    seconds = sum(report.seconds.values())
    gap = "" if report.probe is None else f"; log-probabilities differ by {report.probe.mean_gap:.1e} nats"
    yield ok(f"{report.num_bytes / 1e6:,.1f} MB by {kind} in {seconds:.1f} s{gap}")


def rollouts(subject: Subject) -> Iterator[Finding]:
    """One rollout for each agent: model calls, tools, verifier, reward."""
    if not subject.serves:
        return
    if subject.quick:
        yield skipped(_QUICK)
        return
    requests = list(_requests(subject))
    from trl_gym.rollouts.journal import Journal

    journal = Journal(subject.work_dir() / "rollouts", secrets=subject.run.secrets)
    with closing(journal), closing(_collector(subject)) as collector:
        for request in requests:
            # One after another: what one environment does must not hide what another one does.
            try:
                rollout = collector.collect([request], _finisher(subject, journal))[0]
            except ServerError as error:
                yield from from_error(error, "Look into the log that is named.")
                continue
            yield judge(rollout)


def judge(rollout: Rollout) -> Finding:
    """What a finished rollout says about its environment."""
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


def _own_args(subject: Subject) -> GymGRPOConfig:
    """The run's options, with logs in our own folder."""
    args = copy.copy(subject.args)
    args.gym_log_dir = str(subject.work_dir() / "logs")
    args.gym_server_reconnect_timeout = _RECONNECT_S
    args.vllm_server_timeout = min(args.vllm_server_timeout, 30.0)
    return args


def _new_run(subject: Subject) -> RunServers:
    from trl_gym.run.servers import RunServers

    return RunServers(_own_args(subject), lambda: subject.model, flags=lambda: run_flags(subject))


def _load_model(subject: Subject) -> Any:
    """As the training script loads it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging
    from trl import get_peft_config, get_quantization_config

    transformers_logging.disable_progress_bar()
    options = subject.model_options
    told = {
        "dtype": options.dtype or "float32",
        "attn_implementation": options.attn_implementation,
        "quantization_config": get_quantization_config(options),
    }
    given = subject.args.model_init_kwargs or {}
    model = AutoModelForCausalLM.from_pretrained(
        subject.model, **{name: value for name, value in told.items() if value is not None} | dict(given)
    )
    if (adapter := get_peft_config(options)) is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, adapter)


def _requests(subject: Subject) -> Iterator[RolloutRequest]:
    """The first row of each agent."""
    from trl_gym.rollouts.request import RolloutRequest, Sampling, stamp

    args, session = subject.args, uuid.uuid4().hex[:8]
    first: dict[str, dict[str, Any]] = {}
    for record in subject.train_rows:
        agent = record["agent"] or subject.gym.sole_agent
        if agent is not None:
            first.setdefault(agent, record)
    for index, (agent, record) in enumerate(first.items()):
        identity: dict[str, Any] = {
            "rollout_id": f"{session}-doctor-t{index}-m0-a0",
            "task_index": index,
            "member": 0,
        }
        row = stamp(
            json.loads(record[ROW_COLUMN]),
            **identity,
            sampling=Sampling(temperature=args.temperature, top_p=args.top_p),
            completion_budget=args.max_completion_length or 1,
            chat_template_kwargs=args.chat_template_kwargs,
        )
        yield RolloutRequest(**identity, group=index, attempt=0, agent=agent, row=row)


def _collector(subject: Subject) -> RolloutCollector[Rollout]:
    from trl_gym.rollouts.budgets import budgets_from_options
    from trl_gym.rollouts.call_records import ledger_for
    from trl_gym.rollouts.collector import RolloutCollector

    policy, gym = subject.policy, subject.gym
    return RolloutCollector(
        gym.agent,
        budgets=budgets_from_options(
            deadline_s=min(subject.args.gym_deadline, _MAX_DEADLINE_S), max_inflight=1, retries={}
        ),
        check=subject.run.check,
        agents_down=gym.agents_down,
        gym_log=gym.log_end,
        ledger=ledger_for(policy.base_url, policy.client.api_key) if policy.keeps_records else None,
    )


def _finisher(subject: Subject, journal: Any) -> Finisher:
    from trl_gym.rollouts.drift import make_decoder
    from trl_gym.rollouts.finish import Finisher
    from trl_gym.rollouts.trajectory import from_gym

    return Finisher(
        build=lambda answer, request: from_gym(answer),
        decode=make_decoder(subject.tokenizer),
        journal=journal,
        drift_policy="truncate",
        step=0,
        mode="doctor",
        weight_version="0",
    )


def _hint(message: str) -> str | None:
    """`diagnosis.explain` puts what to do behind this word."""
    line = next((line for line in message.splitlines() if line.startswith("Hint: ")), None)
    return None if line is None else line.removeprefix("Hint: ")
