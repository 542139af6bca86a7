"""`GymGRPOTrainer`: TRL's GRPO with rollouts from NeMo Gym.

TRL's loop is not touched. Five of its methods are extended, none is copied:

    _generate_and_score_completions   keeps the batch's rows at hand while TRL works on their prompts
    _generate                         the rollouts themselves, through TRL's `rollout_func`; completions as messages
    log                               seconds per phase, memory
    _save_checkpoint                  makes room first, where the policy server shares the devices

What is trained, logged and evaluated is in `trl_gym.accounting`, exact resuming in `trl_gym.resume`.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel
from trl import GRPOTrainer

from trl_gym import compat
from trl_gym import ranks as rank_agreement
from trl_gym.accounting import AccountingGRPOTrainer
from trl_gym.callbacks import MetricsCallback, OptimizerCallback, PhaseCallback, ProgressCallback, WeightSyncCallback
from trl_gym.config import GymGRPOConfig, checked_args
from trl_gym.dataset import gym_row
from trl_gym.errors import ConfigError, RolloutError
from trl_gym.gym.servers import GymServers
from trl_gym.memory.offload import measured_peak
from trl_gym.model_card import CardGRPOTrainer, RunFacts, settings_of
from trl_gym.policy_server.server import PolicyBackend
from trl_gym.progress import PhaseClock, make_progress
from trl_gym.resume import ResumableGRPOTrainer
from trl_gym.rollouts.batch import completion, describe_drift, training_rows
from trl_gym.rollouts.collection import CollectionStatus
from trl_gym.rollouts.journal import Journal
from trl_gym.rollouts.request import RolloutRequest, stamp
from trl_gym.rollouts.reuse import Policy, Recall, SurvivingCollector, collect_missing
from trl_gym.rollouts.rollout import Rollout
from trl_gym.rollouts.source import Finisher, ReplayCollector, live_collector
from trl_gym.rollouts.trajectory import Trajectory, from_gym, make_decoder
from trl_gym.run import servers
from trl_gym.run.weights import PolicyWeights, check_model
from trl_gym.weight_sync.sums import fingerprint

logger = logging.getLogger(__name__)


def gym(*, gym_reward: list[float | None], **_: Any) -> list[float]:
    """The environment's reward as a TRL reward function; its name is the metric's name.

    A failed rollout is 0 here and NaN after `_calculate_rewards`, which also takes other reward functions out.
    """
    return [0.0 if reward is None else reward for reward in gym_reward]


class GymGRPOTrainer(ResumableGRPOTrainer, AccountingGRPOTrainer, CardGRPOTrainer):
    """
    Trainer for GRPO on NVIDIA NeMo Gym environments.

    Example:

    ```python
    >>> from trl_gym import GymGRPOConfig, GymGRPOTrainer, load_gym_dataset

    >>> trainer = GymGRPOTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=GymGRPOConfig(output_dir="out", gym_config_paths=["my_environment.yaml"]),
    ...     train_dataset=load_gym_dataset("train.jsonl"),
    ... )
    >>> trainer.train()
    ```

    To change which tasks are rolled out, how rows become requests, how answers become trajectories or how rewards are
    formed, override [`choose_task`], [`build_request`], [`build_trajectories`] or [`compute_rewards`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As for [`~trl.GRPOTrainer`].
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Reward functions added to the environment's reward. They get the conversation as `completions`, and
            `gym_reward` and `gym_result` (Gym's answer, `None` for a failed rollout) as keyword arguments.
            `args.reward_weights`, when set, begins with the weight of the environment's reward.
        args ([`GymGRPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`], *optional*):
            From [`load_gym_dataset`].
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            From [`load_gym_dataset`].
        policy_server ([`PolicyServer`], *optional*):
            A server to use instead of one that the trainer starts and stops itself.
        gym_servers ([`GymServers`], *optional*):
            A NeMo Gym to use instead of one that the trainer starts and stops itself.
        kwargs:
            Everything else that [`~trl.GRPOTrainer`] takes, except `tools`, `environment_factory` and `rollout_func`:
            a Gym environment brings its own tools.

    Raises:
        ConfigError: Options contradict each other, a file is missing, a version is not supported.
        ServerError: A server could not be started.
    """

    _tag_names = ["trl", "grpo", "trl-gym", "nemo-gym"]  # noqa: RUF012 - as in TRL

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: GymGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        policy_server: PolicyBackend | None = None,
        gym_servers: GymServers | None = None,
        **kwargs: Any,
    ) -> None:
        compat.check_versions()
        args = checked_args(args, model, kwargs)
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # about `rollout_func`; compat.py watches it for users
        rewards = [] if reward_funcs is None else reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]

        self._run_id = uuid.uuid4().hex[:8]
        self._rows: list[dict[str, Any]] = []
        self._rollouts: list[Rollout] = []
        self._num_batches = 0
        self._served_weights = ""  # fingerprint; weights are pushed before anything is sampled
        self._progress = make_progress(live=not args.disable_tqdm)
        self._clocks = {mode: PhaseClock(self._progress.phase) for mode in ("train", "eval")}
        self._recall: Recall | None = None
        self._supply: PolicyWeights | None = None  # there is none where rollouts come from a journal
        self._servers = servers.servers_for(
            args,
            model,
            kwargs.get("processing_class"),
            policy_server,
            gym_servers,
            kwargs.get("peft_config"),
            kwargs.get("quantization_config"),
        )
        servers.close_previous(args.output_dir, self)  # before a second server is started beside the first
        try:
            self._servers.start()  # they load while the model does
            with compat.generation_backend(self._generation_backend):
                super().__init__(
                    model=model,
                    reward_funcs=[gym, *rewards],
                    args=args,
                    train_dataset=train_dataset,
                    eval_dataset=eval_dataset,
                    rollout_func=self._roll_out,
                    **kwargs,
                )
            check_model(args, self.accelerator, self.model_wrapped)
            self._servers.wait_ready()
            self._connect(args)
        except BaseException:
            self._servers.stop()
            raise

    # ------------------------------------------------------------------------------------- what subclasses override

    def choose_task(self, example: dict[str, Any], group: int) -> dict[str, Any]:
        """Which task a group rolls out: the place for a curriculum over tasks or environments.

        Args:
            example: The dataset's example whose turn it is.
            group: Index of the group in this generation batch, over all ranks.

        Returns:
            That example, or another one of the dataset. It is asked once per member, on whatever rank that runs: the
            choice must depend on nothing but `group`, `self.state` and what all ranks know alike.
        """
        return example

    def build_request(self, row: dict[str, Any], request: RolloutRequest) -> dict[str, Any]:
        """How a row becomes what is posted to `/run`.

        Args:
            row: The Gym row of the dataset.
            request: Identity of the rollout; its `row` is what this method returns by default: the dataset's row with
                ids, sampling parameters and token budget stamped into it.

        Returns:
            The body of the request. Keep the stamps: without them the policy server cannot pin the sampling.
        """
        return request.row

    def build_trajectories(self, answer: dict[str, Any], request: RolloutRequest) -> list[Trajectory]:
        """How Gym's answer becomes token sequences.

        Args:
            answer: Gym's answer to `/run`.
            request: What was asked.

        Returns:
            One trajectory (several, sharing one reward, are a seam for rewritten histories and not trained yet).

        Raises:
            TrajectoryError: There is nothing to train on; the rollout counts as failed.
        """
        return from_gym(answer, drift=self.args.gym_drift)

    def compute_rewards(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """How rewards are formed, one per rollout; None takes a rollout out of the loss and of the group baseline.

        Args:
            rollouts: This rank's rollouts of one generation batch, failed ones included. Those without trajectories
                stay out whatever reward they get: they have no token to train.
        """
        return [rollout.reward for rollout in rollouts]

    # ----------------------------------------------------------------------------------------------- life of servers

    @property
    def policy_server(self) -> PolicyBackend:
        """The policy server: started by the trainer, or the one that was passed in."""
        return self._servers.policy

    @property
    def gym_servers(self) -> GymServers:
        """NeMo Gym: started by the trainer, or the one that was passed in."""
        return self._servers.gym

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. When one of several processes ends, the others say so, and end too."""
        ranks = self.accelerator.process_index, self.accelerator.num_processes
        try:
            with rank_agreement.explained(*ranks, lambda: f"in step {self.state.global_step}"):
                return super().train(*args, **kwargs)
        finally:
            self._progress.stop()  # also when a notebook's cell is interrupted

    def close(self) -> None:
        """Stop what the trainer started; servers that were passed in run on. Also done at interpreter exit."""
        try:
            for attribute in ("_collector", "_journal"):
                if (resource := getattr(self, attribute, None)) is not None:
                    resource.close()
        finally:
            self._servers.stop()

    def __enter__(self) -> GymGRPOTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generation_backend(self, **_: Any) -> compat.ServedGeneration:
        return compat.ServedGeneration(self._sync_before_generating, lambda: self._servers.server_config())

    def _connect(self, args: GymGRPOConfig) -> None:
        """Everything that needs the accelerator and running servers."""
        self._run = broadcast_object_list([self._run_id])[0]
        self._journal = Journal(
            Path(args.output_dir) / "rollouts",
            rank=self.accelerator.process_index,
            max_bytes=args.gym_journal_max_mb * 1e6,
            secrets=self._servers.secrets,
        )
        if args.gym_replay is not None:
            self._collector: ReplayCollector | SurvivingCollector = ReplayCollector(
                args.gym_replay, lambda: int(self.state.epoch or 0)
            )
        else:
            self._supply = PolicyWeights(args, self.accelerator, self._servers, self.model_wrapped)
            self._collector = live_collector(
                args, self._servers, self._recover, version=self._served_version, after=self._check_served_version
            )
        for callback in compat.default_progress_callbacks():
            self.remove_callback(callback)
        # Order matters: the clock stops before weights are pushed, which counts its own time.
        self.add_callback(PhaseCallback(self._clocks["train"]))
        if self._supply is not None:
            self.add_callback(WeightSyncCallback(self._push_weights, self._generates_next))
            self.add_callback(OptimizerCallback(self._supply.take_optimizer))
        self.add_callback(MetricsCallback(Path(args.output_dir) / "metrics.jsonl"))
        self.add_callback(ProgressCallback(self._progress))

    # --------------------------------------------------------------------------------------------------- weight sync

    def _sync_before_generating(self) -> None:
        """TRL's own sync, reached when weights changed and no callback has pushed them: at the start, on resume."""
        self._push_weights(self.state.global_step)

    def _push_weights(self, step: int) -> None:
        if self._supply is None:
            return
        with self._clock.phase("weight_sync"):
            report = self._supply.push(self.model_wrapped, step)
            self._served_weights = fingerprint(self.model_wrapped, self.accelerator)
        self._last_loaded_step = step
        metrics = self._metrics[self._mode]
        metrics["weight_sync/bytes"].append(float(report.num_bytes))
        for phase, seconds in report.seconds.items():
            metrics[f"weight_sync/seconds/{phase}"].append(seconds)
        if report.probe is not None:
            metrics["weight_sync/probe_gap"].append(report.probe.mean_gap)

    def _generates_next(self) -> bool:
        return self._step % (self.args.steps_per_generation * self.num_iterations) == 0

    # ------------------------------------------------------------------------------------------------------ rollouts

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        groups = (group for group, _ in self._places(len(inputs)))
        self._rows = [self.choose_task(example, group) for example, group in zip(inputs, groups, strict=True)]
        try:
            with self._clock.phase("scoring"):
                return super()._generate_and_score_completions(self._rows)
        finally:
            self._rows = []

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        prompt_ids, completion_ids, tool_mask, _, *rest = super()._generate(prompts)
        # TRL decodes the merged token sequence as if it were one assistant turn; Gym has the real conversation.
        completions = [completion(rollout) for rollout in self._rollouts]
        return prompt_ids, completion_ids, tool_mask, completions, *rest

    def _roll_out(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """TRL's `rollout_func`: one rollout per row. TRL repeats rows `num_generations` times before it calls."""
        with self._server_awake():
            version = self._served_version()
            with self._clock.phase("rollouts"):
                self._rollouts = self._collect(self._requests(), version)
                self._journal.commit()
        for line in describe_drift(self._rollouts):
            logger.warning(line)
        rewards = self._settle(
            self.compute_rewards(self._rollouts),
            f"Each is recorded in {self._journal.folder}; server logs are in {self.args.gym_log_dir}.",
        )
        return training_rows(
            self._rollouts,
            rewards,
            pad_id=self._tokenizer.pad_token_id,
            eos_id=self._tokenizer.eos_token_id,
            mask_truncated=self.args.mask_truncated_completions,
            with_logprobs=not self._samples_differently,
        )

    def _server_awake(self) -> AbstractContextManager[None]:
        """The policy server has its memory, and the trainer has it back afterwards."""
        if self._supply is None:
            return nullcontext()
        return self._supply.sampling(self._sync_before_generating, again=self._mode == "eval")

    def _collect(self, requests: list[RolloutRequest], version: str) -> list[Rollout]:
        """Rollouts from a journal, from the interrupted run that is resumed, or from NeMo Gym."""
        step = self.state.global_step
        if isinstance(self._collector, ReplayCollector):
            rollouts, metrics = self._collector.replay(requests, mode=self._mode, step=step)
            for name, values in metrics.items():
                self._pending_metrics[name] += values
            return rollouts
        policy = Policy(run=self._run, step=step, weights=self._served_weights)
        recall = self._recall if self._mode == "train" else None
        finish = self._finisher(version, policy)
        rollouts = collect_missing(self._collector, requests, policy, recall, finish, self._show_progress)
        self._metrics[self._mode]["policy_server/restarts"].append(float(self._servers.num_restarts))
        return rollouts

    def _recover(self, error: Exception | None, lost: Sequence[RolloutRequest]) -> bool:
        """After rollouts: whether a rank has lost the policy server, which is back now and holds the current weights.
        Every rank calls it in step; `error` ended the rollouts of this one."""
        loss = rank_agreement.agree_on_loss(self.accelerator, error)
        if loss is None:
            return False
        logger.warning("%d of this rank's rollouts are lost with the policy server and will run again", len(lost))
        self._supply.recover(loss)
        self._push_weights(self.state.global_step)
        return True

    def _resumed(self) -> None:
        self._recall = Recall(self._journal.folder)

    def _served_version(self) -> str:
        """Of the weights that were pushed last, which are what rollouts are sampled with."""
        return "recorded" if self._servers.policy is None else str(self._last_loaded_step)

    def _check_served_version(self) -> None:
        if not self.accelerator.is_main_process:  # which tells the others
            return
        self._servers.require_same_policy()
        version, now = self._served_version(), self._servers.policy.client.weight_version()
        if now != version:
            raise RolloutError(f"The policy server's weights changed from version {version} to {now} during rollouts.")

    def _requests(self) -> list[RolloutRequest]:
        batch = f"{self._run_id}-{self._mode}{self.state.global_step}-b{self._num_batches}"
        self._num_batches += 1
        return [
            self._request(example, batch, group, member)
            for example, (group, member) in zip(self._rows, self._places(len(self._rows)), strict=True)
        ]

    def _places(self, num_rows: int) -> list[tuple[int, int]]:
        """Group and member of each row of this rank's part of a generation batch."""
        num_members = self.num_generations if self._mode == "train" else self.num_generations_eval
        first = self.accelerator.process_index * num_rows
        return [divmod(first + index, num_members) for index in range(num_rows)]

    def _request(self, example: dict[str, Any], batch: str, group: int, member: int) -> RolloutRequest:
        row = gym_row(example)
        identity: dict[str, Any] = {
            "rollout_id": f"{batch}-g{group}-m{member}-a0",
            "task_index": int(example.get("task_index", group)),
            "member": member,
        }
        stamped = stamp(
            row,
            **identity,
            sampling=self._sampling,
            completion_budget=self.max_completion_length,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        request = RolloutRequest(**identity, group=group, attempt=0, agent=self._agent_name(row), row=stamped)
        sent = self.build_request(row, request)
        return RolloutRequest(**identity, group=group, attempt=0, agent=request.agent, row=sent)

    def _agent_name(self, row: dict[str, Any]) -> str:
        named = (row.get("agent_ref") or {}).get("name")
        if named is not None:
            return named
        if self._servers.gym is None:
            return "recorded"
        sole = self._servers.gym.sole_agent
        if sole is None:
            raise ConfigError(
                "A dataset row names no agent in `agent_ref` and the running Gym has several "
                f"({', '.join(sorted(self._servers.gym.agents))}); load the file with "
                "`load_gym_dataset(path, agent=…)`."
            )
        return sole

    def _evaluated_set(self) -> dict[str, str]:
        """Name of the set, where there are several."""
        name = "" if self._evaluation is None else self._evaluation.name
        return {"dataset": name} if name else {}

    def _finisher(self, version: str, policy: Policy) -> Finisher:
        return Finisher(
            build=self.build_trajectories,
            decode=make_decoder(self._tokenizer),
            journal=self._journal.tagged(**policy.tags(), **self._evaluated_set()),
            drift_policy=self.args.gym_drift,
            step=self.state.global_step,
            mode=self._mode,
            weight_version=version,
        )

    # ------------------------------------------------------------------------------------------------------- metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_runtime" not in logs:
            for phase, seconds in self._clock.take().items():
                self._metrics[self._mode][f"seconds/{phase}"] = [round(seconds, 4)]
            for name, gigabytes in measured_peak().items():
                self._metrics[self._mode][name] = [gigabytes]
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._supply is not None:
            self._supply.before_saving()
        super()._save_checkpoint(*args, **kwargs)

    def _card_facts(self) -> RunFacts:
        policy, gym = self._servers.policy, self._servers.gym
        settings = settings_of(
            self.args,
            num_steps=self.state.global_step,
            gym_version=None if gym is None else gym.gym_version,
            placement=None if policy is None else policy.placement,
            transport=None if self._supply is None else self._supply.transport_name,
        )
        return RunFacts(settings=settings, history=self.state.log_history)

    def _show_progress(self, status: CollectionStatus) -> None:
        if self.accelerator.is_main_process:  # every rank collects; one line tells how far the first is
            self._progress.rollouts(status)

    @property
    def _clock(self) -> PhaseClock:
        return self._clocks[self._mode]
