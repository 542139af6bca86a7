"""Rollouts that are sampled while training runs: a policy server and a NeMo Gym behind the trainer's `RolloutSource`.

collect ── server awake ── recall what an interrupted run has finished ── roll out the rest ── journal on disk

What is in flight, and what happens when the policy server is lost, is in `rollouts/queue.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_gym.errors import (
    ConfigError,
    GymServerLostError,
    PolicyServerError,
    PolicyServerLostError,
    RolloutError,
    ServerLoss,
)
from trl_gym.policy_server.middleware.identity import UntaggedCalls
from trl_gym.ranks import agree_on_loss, agreed
from trl_gym.redaction import secrets_in
from trl_gym.rollouts.admission import budgets_from_options
from trl_gym.rollouts.collector import RolloutCollector
from trl_gym.rollouts.engine_metrics import EngineCounters, engine_metrics, parse_counters
from trl_gym.rollouts.journal import Journal
from trl_gym.rollouts.ledger import Ledger
from trl_gym.rollouts.objectives import component_problem
from trl_gym.rollouts.queue import RolloutQueue, Sampler, TaskGroup
from trl_gym.rollouts.request import PolicyAccess
from trl_gym.rollouts.reuse import Policy, Recall
from trl_gym.rollouts.source import BatchInfo, Collected, Finisher, OwnSampling, TrainerHooks
from trl_gym.rollouts.trajectory import make_decoder
from trl_gym.run.weights import PolicyWeights, check_model

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from trl_gym.config import GymGRPOConfig
    from trl_gym.gym.servers import GymServers
    from trl_gym.policy_server.server import PolicyBackend
    from trl_gym.rollouts.request import RolloutRequest
    from trl_gym.rollouts.rollout import Rollout
    from trl_gym.run.servers import RunServers

logger = logging.getLogger(__name__)


class LiveSource:
    """Samples rollouts with the policy's current weights. A `RolloutSource`.

    Args:
        servers: The run's two servers, not started yet.
    """

    # What `connect` makes.
    _accelerator: Accelerator
    _hooks: TrainerHooks
    _weights: PolicyWeights
    _ledger: Ledger
    _collector: RolloutCollector[Rollout] | None = None
    _queue: RolloutQueue  # of training
    _journal: Journal | None = None
    _before: _Look  # what the policy server had counted before the batch that is collected; set with its first round

    def __init__(self, args: GymGRPOConfig, servers: RunServers) -> None:
        self._args, self._servers = args, servers
        self.folder = Path(args.output_dir) / "rollouts"
        self._version = -1  # of the weights that were pushed last; nothing is sampled before
        self._fingerprint = ""  # of those weights
        self._recall: Recall | None = None
        self._run = ""  # id of the training run
        self._engine = ""  # of the policy server, with its version
        self._looked: _Look | None = None  # what the policy server had counted when rollouts in flight began
        self._is_closed = False
        self._own_sampling = OwnSampling(logger.warning, args.rollout_options.agent_sampling_of)

    @property
    def policy_server(self) -> PolicyBackend:
        """The policy server: started by this run, or the one that was passed in."""
        return self._servers.policy

    @property
    def gym_servers(self) -> GymServers:
        """NeMo Gym: started by this run, or the one that was passed in."""
        return self._servers.gym

    def start(self) -> None:
        """Spawn both servers; they load while the model does."""
        self._servers.start()

    def connect(self, accelerator: Accelerator, model: torch.nn.Module, hooks: TrainerHooks) -> None:
        """See `RolloutSource.connect`. Raises `ConfigError`: the model's weights cannot be sent, or `gym_environments`
        names an agent that does not exist; `ServerError`: a server could not be started."""
        check_model(self._args, accelerator, model, shares_weights=self._servers.own is not None)
        self._servers.take_model(model, hooks.tokenizer, accelerator.mixed_precision)
        self._servers.wait_ready()
        self._accelerator, self._hooks = accelerator, hooks
        with agreed(accelerator):  # a full disk, or a server that does not answer this rank
            self._journal = Journal(
                self.folder,
                rank=accelerator.process_index,
                max_bytes=self._args.gym_journal_max_mb * 1e6,
                secrets=(*self._servers.secrets, *secrets_in(self._args.gym_overrides)),
            )
            info = self.policy_server.client.info()
            self._engine = f"{info.get('engine', 'vllm')} {info.get('engine_version', '')}".rstrip()
            self._weights = PolicyWeights(self._args, accelerator, self._servers, model)
            self._collector = self._new_collector()
            self._queue = self._new_queue(self._collector)

    def server_config(self) -> dict[str, Any]:
        """Return the policy server's resolved configuration."""
        return self._servers.server_config()

    def agent_of(self, row: Mapping[str, Any]) -> str:
        """See `RolloutSource.agent_of`."""
        named = (row.get("agent_ref") or {}).get("name") or self.gym_servers.sole_agent
        if named is None:
            raise ConfigError(
                "A dataset row names no agent in `agent_ref` and the running Gym has several "
                f"({', '.join(sorted(self.gym_servers.agents))}).",
                "Load the file with `load_gym_dataset(path, agent=…)`.",
            )
        return named

    def push_weights(self, model: torch.nn.Module, step: int) -> dict[str, float]:
        """Send the weights to the policy server. Return the metrics `weight_sync/…`."""
        self._require_open()
        num_recoveries = self._weights.num_recoveries
        with self._ledger.busy():
            report = self._weights.push(model, step)
        if self._weights.num_recoveries > num_recoveries:  # and with it, what was in flight during the update
            self._note_loss(self._queue.give_up_lost())
        self._version, self._fingerprint = step, report.fingerprint
        metrics = {"weight_sync/bytes": float(report.num_bytes)}
        metrics |= {f"weight_sync/seconds/{phase}": seconds for phase, seconds in report.seconds.items()}
        return metrics if report.probe is None else metrics | {"weight_sync/probe_gap": report.probe.mean_gap}

    def take_optimizer(self, optimizer: Any) -> None:
        """Note the optimizer, whose state may leave the device while the server samples."""
        self._weights.take_optimizer(optimizer)

    def collect(self, groups: Sequence[TaskGroup], number: int, batch: BatchInfo) -> Collected:
        """See `RolloutSource.collect`. The rollouts are on disk when it returns. Raises `RolloutError`: the journal
        cannot be written, a rollout drifted and `gym_drift` is `"error"`, or someone else changed the weights
        meanwhile; `ServerError`: a server was lost and did not come back."""
        assert self._collector is not None and self._journal is not None, "connect first"
        self._require_open()
        self._run = batch.run
        is_evaluation = batch.mode == "eval"
        queue = self._new_queue(self._collector, batch) if is_evaluation else self._queue
        with self._weights.sampling(self._hooks.push, again=is_evaluation or not batch.is_last):
            if batch.is_first:
                self._before = (None if is_evaluation else self._looked) or self._look()
            ended = queue.collect(
                groups, number, step=batch.step, later_steps=batch.later_steps, per_batch=batch.per_batch
            )
            with agreed(self._accelerator):
                self._journal.commit()
            now = self._look()
            metrics = self._untagged_metrics(now.untagged.since(self._before.untagged))
            metrics |= {name: [value] for name, value in engine_metrics(self._before.engine, now.engine).items()}
        if not is_evaluation:
            self._looked = now if batch.later_steps else None  # as on every rank: looking is a collective
        elif self._looked is not None:  # what this evaluation counted is none of training's
            self._looked = self._looked.moved(self._before, now)
        if self._accelerator.is_main_process:  # which counts restarts
            metrics["policy_server/restarts"] = [float(self._servers.num_restarts)]
        return Collected(groups=ended, metrics=metrics)

    @property
    def in_flight(self) -> list[TaskGroup]:
        """See `RolloutSource.in_flight`."""
        return self._queue.in_flight

    def drain(self) -> None:
        """See `RolloutSource.drain`."""
        self._queue.drain()

    def abandon(self) -> None:
        """See `RolloutSource.abandon`."""
        if self._collector is not None:
            self._queue.abandon()

    def _look(self) -> _Look:
        """Return what the policy server has counted so far, on rank 0; the other ranks wait."""
        with agreed(self._accelerator):
            if not self._accelerator.is_main_process:
                return _Look(UntaggedCalls(), EngineCounters(0.0))
            client = self.policy_server.client
            try:
                untagged = client.untagged_calls()
            except PolicyServerLostError as error:  # noticed where the server can be got back
                logger.info("what the policy server has counted is not known: %s", error)
                return _Look(UntaggedCalls(), EngineCounters(0.0))
            try:
                texts = client.prometheus()
            except PolicyServerError as error:  # a server without such metrics; a lost one is noticed elsewhere
                logger.info("no metrics of the engine: %s", error)
                texts = []
            return _Look(untagged, parse_counters(texts, time.monotonic()))

    def _untagged_metrics(self, found: UntaggedCalls) -> dict[str, list[float]]:
        """Count the batch's model calls that belong to no rollout, and say whose they are."""
        # A Gym that was not started here has the server's own key, as other clients may.
        number = found.gym.total() + (0 if self._servers.owns_gym else found.others)
        if not number:
            return {}
        logger.warning("%s", describe_untagged(found, number, self._args.gym_untagged_calls))
        return {"rollouts/untagged_calls": [float(number)]}

    def resumed(self) -> None:
        """Recall from now on what the interrupted run has recorded."""
        self._recall = Recall(self.folder)

    def before_saving(self) -> None:
        """Bring the optimizer's state back to the device, from where it is saved; put what has ended on disk."""
        self._weights.before_saving()
        with agreed(self._accelerator):
            assert self._journal is not None, "connect first"
            self._journal.commit()

    def describe(self) -> dict[str, str]:
        """Return the rows of the model card about Gym, policy server and weight sync. Also after `close`."""
        shares = self.policy_server.is_ours and self._args.gym_server_devices is None
        parsers = getattr(self.policy_server, "parsers", None)  # a server elsewhere does not tell
        told = {} if parsers is None else {"Tool parser": parsers.tool, "Reasoning parser": parsers.reasoning}
        return {
            "NeMo Gym": f"{self.gym_servers.gym_version} (`{self._args.gym_mode}`)",
            "Policy server": f"{self._engine} (`{'colocate' if shares else 'server'}`)",
            **{name: str(parser) for name, parser in told.items()},
            "Weight sync": f"`{self._weights.transport_name}`",
        }

    def close(self) -> None:
        """Stop what was started here; servers that were passed in keep running."""
        self._is_closed = True
        try:
            if self._collector is not None:
                self._queue.abandon()
                self._collector.close()
            if self._journal is not None:
                self._journal.close()
        finally:
            self._servers.stop()

    def _require_open(self) -> None:
        if self._is_closed:
            raise RolloutError("The trainer was closed, and its servers with it.", "Make a new one.")

    def _new_collector(self) -> RolloutCollector[Rollout]:
        args, policy, gym = self._args, self.policy_server, self.gym_servers
        self._ledger = Ledger(policy.base_urls, policy.client.api_key, hang_timeout_s=args.gym_server_hang_timeout)
        budgets = budgets_from_options(args.rollout_options)
        budgets.check_agents(gym.agents)
        return RolloutCollector(
            gym.agent,
            budgets=budgets,
            check=self._servers.check,
            agents_down=gym.agents_down,
            on_environment_down=args.gym_on_environment_down,
            gym_log=gym.log_end,
            ledger=self._ledger,
            access=PolicyAccess(policy.base_urls, policy.client.api_key),
            stall_timeout_s=args.gym_stall_timeout,
            gym=gym,
        )

    def _new_queue(self, collector: RolloutCollector[Rollout], evaluation: BatchInfo | None = None) -> RolloutQueue:
        """Return a queue for training, or for a batch of an evaluation."""
        args = self._args
        sampler = Sampler(
            collector=collector,
            agree=lambda error: agree_on_loss(self._accelerator, error),
            recover=self._recover,
            policy=lambda: Policy(run=self._run, version=self._version, weights=self._fingerprint),
            finisher=lambda policy: self._finisher(policy, evaluation),
            recall=self._recalled if evaluation is None else lambda requests, policy: {},
            before=self._servers.check_before_rollouts,
            after=self._check_version,
            cancel=self._end_at_server,
            progress=self._hooks.progress,
        )
        return RolloutQueue(
            sampler,
            max_staleness=0 if evaluation else args.gym_max_staleness,
            in_order=evaluation is not None or not args.gym_max_staleness or not args.has_whole_groups,
            drops=args.gym_on_stale == "drop",
        )

    def _recalled(self, requests: Sequence[RolloutRequest], policy: Policy) -> Mapping[int, Rollout]:
        return {} if self._recall is None else self._recall.take_all(requests, policy, newest=self._version)

    def _finisher(self, policy: Policy, evaluation: BatchInfo | None) -> Finisher:
        assert self._journal is not None, "connect first"
        dataset = {"dataset": evaluation.dataset} if evaluation is not None and evaluation.dataset else {}
        return Finisher(
            build=self._hooks.build,
            decode=make_decoder(self._hooks.tokenizer),
            journal=self._journal,
            tags=policy.tags() | dataset,
            drift_policy=self._args.gym_drift,
            train_calls=self._args.gym_train_calls,
            mode="train" if evaluation is None else "eval",
            weight_version=str(self._version),
            own_sampling=self._own_sampling,
            problem_of=component_problem if self._args.gym_reward_components else None,
        )

    def _recover(self, loss: ServerLoss, num_lost: int) -> None:
        """Get NeMo Gym back, or the policy server with the current weights."""
        self._note_loss(num_lost)
        if isinstance(loss, GymServerLostError):
            self._servers.recover_gym(loss)
            self._note_loss(self._queue.give_up_lost())
            return
        self._weights.recover(loss)
        self._note_loss(self._queue.give_up_lost())  # those of training, where it was an evaluation that noticed
        self._hooks.push()

    def _note_loss(self, num_lost: int) -> None:
        if num_lost:
            logger.warning("%d of this rank's rollouts are lost with the server and will run again", num_lost)

    def _end_at_server(self, given_up: list[str]) -> None:
        """Tell a policy server that came back which rollouts it must not sample for: it may know none of those that
        ended before, whose agents may call late."""
        self.policy_server.client.cancel_rollouts([*self._ledger.ended, *given_up])

    def _check_version(self) -> None:
        if not self._accelerator.is_main_process:  # which tells the others
            return
        self._servers.require_same_policy()
        now = self.policy_server.client.weight_version()
        if now != str(self._version):
            raise RolloutError(
                f"The policy server's weights changed from version {self._version} to {now} during rollouts.",
                "Let nobody else push weights to this server while it is trained with.",
            )


@dataclass(frozen=True, slots=True)
class _Look:
    """What the policy server has counted so far."""

    untagged: UntaggedCalls
    engine: EngineCounters

    def moved(self, first: _Look, last: _Look) -> _Look:
        """Return a look since which nothing counts that was counted between two later ones.

        What a server that has restarted in between had counted before is lost: then it is `last`.
        """
        before, after = first.engine.values, last.engine.values
        found = {series: after[series] - before[series] for series in before.keys() & after.keys()}
        untagged = last.untagged.since(first.untagged)
        has_restarted = last.untagged.others < first.untagged.others or bool(first.untagged.gym - last.untagged.gym)
        if has_restarted or min(found.values(), default=0.0) < 0:
            return last
        values = {series: value + found[series] for series, value in self.engine.values.items() if series in found}
        return _Look(
            UntaggedCalls(self.untagged.gym + untagged.gym, self.untagged.others + untagged.others),
            EngineCounters(self.engine.at + last.engine.at - first.engine.at, values),
        )


def describe_untagged(found: UntaggedCalls, number: int, policy: str) -> str:
    """Return a warning about model calls of NeMo Gym that belong to no rollout.

    Args:
        found: Their counts.
        number: How many of them are Gym's.
        policy: The value of `gym_untagged_calls`.
    """
    whose = found.names() or "a NeMo Gym with the policy server's own API key, or another client of that server"
    served = "served, with sampling parameters of their own" if policy == "warn" or not found.gym else "refused"
    return (
        f"{number} model calls of this batch belong to no rollout ({whose}). They were {served}, and are not trained. "
        "Let the agent keep `metadata.extra_body`, or call the policy with a client that `gym_mode: host` reaches. "
        f"`gym_untagged_calls` is {policy!r}."
    )
