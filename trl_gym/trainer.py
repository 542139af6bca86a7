"""`GymGRPOTrainer`: TRL's GRPO with rollouts from NeMo Gym.

TRL's loop is not touched, and no method of it is copied. The overrides call TRL's own method and one of these objects:

    RolloutSource    rollouts/source.py    where rollouts come from, and everything that needs servers
    Accounting       accounting.py         what is trained of a batch, what is logged and evaluated
    resume.py                              what a checkpoint needs for exact resuming, and which one is resumed
    model_card.py                          the section of the model card

`docs/architecture.md` lists every name of TRL and transformers that is overridden or private.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from trl_gym import compat, made_with, resume
from trl_gym import ranks as rank_agreement
from trl_gym.accounting import Accounting
from trl_gym.batches import GenerationBatch, batches_of, plan_group, step_of_batch
from trl_gym.callbacks import MetricsCallback, PhaseCallback, ProgressCallback, WeightSyncCallback
from trl_gym.config import GymGRPOConfig, checked_args
from trl_gym.config_checks import check_datasets, check_refill
from trl_gym.dataset import agent_with_tools
from trl_gym.errors import naming
from trl_gym.folder_owner import take_for
from trl_gym.given import home_path
from trl_gym.gym.servers import GymServers
from trl_gym.memory.offload import measured_peak
from trl_gym.model_card import complete
from trl_gym.policy_server.fork_server import ForkServer
from trl_gym.policy_server.server import PolicyBackend
from trl_gym.progress import PhaseClock, clocks_of, loading_model, progress_of, waiting_for_servers
from trl_gym.ranks import agreed
from trl_gym.rollouts.batch import checked_rewards, describe_drift, table_columns
from trl_gym.rollouts.evaluation import emptied
from trl_gym.rollouts.journal import TOKENIZER
from trl_gym.rollouts.metrics import oversample_metrics
from trl_gym.rollouts.objectives import Objectives, check_rewards_are_gyms, fill_table, gym, unnamed_weights
from trl_gym.rollouts.padding import TOKEN_WEIGHT, Results, compute_rows
from trl_gym.rollouts.queue import TaskGroup
from trl_gym.rollouts.request import RolloutRequest
from trl_gym.rollouts.rollout import Rollout, RolloutFacts, conversation
from trl_gym.rollouts.rows import ROW_COUNTS, joined, training_rows, weighted
from trl_gym.rollouts.source import BatchInfo, JournalSource, RolloutSource, TrainerHooks, check_build, check_replay
from trl_gym.rollouts.tasks import LookAhead
from trl_gym.rollouts.trajectory import ModelCall, Trajectory, from_calls
from trl_gym.run import servers
from trl_gym.run.live import LiveSource
from trl_gym.storage import told
from trl_gym.threads import use_threads

with compat.without_vllm():
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


class GymGRPOTrainer(GRPOTrainer):
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
    formed, override [`choose_task`], [`build_request`], [`build_trajectories`] or [`compute_rewards`]. To learn from
    rollouts, and keep that in checkpoints, override [`on_rollouts`], [`checkpoint_state`] and
    [`restore_checkpoint_state`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As for [`~trl.GRPOTrainer`].
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Reward functions added to the environment's reward. They get the conversation as `completions`, and
            `gym_reward` and `gym_result` (Gym's answer, `None` for a failed rollout) as keyword arguments.
            `args.reward_weights`, when set, begins with the weight of the environment's reward, or names weights.
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
        fork_server ([`ForkServer`], *optional*):
            Process that imports vLLM and forks the trainer's policy server. By default the trainer starts one.
        kwargs:
            Everything else that [`~trl.GRPOTrainer`] takes, except `tools`, `environment_factory` and `rollout_func`:
            a Gym environment brings its own tools.

    Raises:
        ConfigError: Options contradict each other, a file is missing, a version is not supported.
        ServerError: A server could not be started.
    """

    _tag_names = ["trl", "grpo", "trl-gym", "nemo-gym"]  # noqa: RUF012 - as in TRL
    _train_sampler: Any = None
    _buffered_inputs: list[dict[str, Any]] | None

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
        fork_server: ForkServer | None = None,
        **kwargs: Any,
    ) -> None:
        compat.check_versions()
        rank_agreement.end_with_launcher()
        model = home_path(model) if isinstance(model, str) else model
        args = checked_args(args, model, kwargs)
        check_build(self.build_trajectories)
        check_rewards_are_gyms(args, type(self).compute_rewards, GymGRPOTrainer.compute_rewards)
        rewards = [] if reward_funcs is None else reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        check_refill(args, len(rewards), train_dataset)
        check_datasets(args, train_dataset, eval_dataset)
        self.threads = use_threads(model, on_gpu=torch.cuda.is_available() and not args.use_cpu)
        self._prepare(args)
        given = {name: kwargs.get(name) for name in ("processing_class", "peft_config", "quantization_config")}
        given |= {"policy": policy_server, "gym": gym_servers, "fork_server": fork_server}
        tools = agent_with_tools(train_dataset, eval_dataset)
        self._source = self._new_source(args, model, given | {"agent_with_tools": tools})
        self._folder = take_for(self, args.output_dir)  # before a second server is started beside the first
        servers.show_notes(args, adapts=kwargs.get("peft_config") is not None)
        try:
            self._source.start()  # servers load while the model does
            with loading_model(args), compat.generation_backend(self._generation_backend), unnamed_weights(args):
                super().__init__(
                    model=model,
                    reward_funcs=[gym, *rewards],
                    args=args,
                    train_dataset=train_dataset,
                    eval_dataset=eval_dataset,
                    rollout_func=lambda *_: self._columns,
                    **kwargs,
                )
            servers.show_context(args, self.model)
            self._connect()
        except BaseException:
            self.close()
            raise

    def _prepare(self, args: GymGRPOConfig) -> None:
        """Set what TRL's `__init__` may ask for."""
        self._run_id = uuid.uuid4().hex[:8]
        self._completions: list[list[dict[str, Any]]] = []
        self._columns: dict[str, list[Any]] = {}
        self._num_eval_batches = 0
        self._first_micro_step = 0  # of the optimizer step
        self._look_ahead = LookAhead(args.most_batches_ahead, args.generate_every)
        self._progress = progress_of(args)
        self._clocks = clocks_of(self._progress)

    def _connect(self) -> None:
        """Wait for the servers, and build on what TRL's `__init__` has made."""
        # TRL would look at the last token. `training_rows` masks what Gym reports as cut.
        self.mask_truncated_completions = False
        self._run = broadcast_object_list([self._run_id])[0]
        self._accounting = Accounting(self.args, self.accelerator)
        self._objectives = Objectives.of(self.args, self, tells=self.accelerator.is_main_process)
        hooks = TrainerHooks(
            build=self.build_trajectories,
            tokenizer=self._tokenizer,
            push=self._push_weights,
            progress=self._progress.rollouts,  # every rank collects; the first one's shows how far it is
        )
        with waiting_for_servers(self.args, quiet=self._source.policy_server is None):
            self._source.connect(self.accelerator, self.model_wrapped, hooks)
        self._batches = batches_of(
            self.args,
            self.accelerator,
            self._source,
            self.train_dataset,
            choose=self._choose,
            plan=self._plan,
            reward=self._rewards,
            apart=self._objectives.apart if self.args.gym_reward_components else None,
        )
        self._set_callbacks()
        with agreed(self.accelerator):
            if self.accelerator.is_main_process:  # the text of the journal's tokens, before the first checkpoint
                self._tokenizer.save_pretrained(os.path.join(self.args.output_dir, TOKENIZER))

    # ------------------------------------------------------------------------------------- what subclasses override

    def choose_task(self, example: dict[str, Any], group: int) -> dict[str, Any]:
        """Return the task that a group rolls out: the place for a curriculum over tasks or environments.

        Args:
            example: The dataset's example whose turn it is.
            group: Index of the group in this generation batch, over all ranks.

        Returns:
            That example, or another one of the dataset. It is asked once per group, on every rank that has members of
            it: the choice must depend on nothing but `group`, `self.state` and what all ranks know alike, which
            includes what `on_rollouts` is told. It is asked when rollouts begin: with `gym_max_staleness`, up to so
            many optimizer steps before the group is trained, when the batches before it have not been, either.
        """
        return example

    def build_request(self, row: dict[str, Any], request: RolloutRequest) -> dict[str, Any]:
        """Return what is posted to `/run` for a row.

        Args:
            row: The Gym row of the dataset.
            request: Identity of the rollout. Its `row`, which this method returns by default, is the dataset's row
                with ids, sampling parameters and token budget stamped into it.

        Returns:
            The body of the request. Keep the stamps: without them the policy server cannot pin the sampling.
        """
        return request.row

    def build_trajectories(
        self, answer: dict[str, Any], request: RolloutRequest, calls: Sequence[ModelCall]
    ) -> list[Trajectory]:
        """Return the token sequences that are trained of a rollout.

        Args:
            answer: Gym's answer to `/run`. It has handles in place of token ids.
            request: The request that it answers.
            calls: The model calls that count, with their tokens, each behind the one that it continues.

        Returns:
            One trajectory, or several for a history that was rewritten and for sub-agents. Each becomes a row of the
            batch; they share the rollout's reward and advantage, and the rollout weighs what it would in one row.
            Mask (`env_mask`) a sampled token in all of them but one: what is in several is trained several times.

        Raises:
            TrajectoryError: There is nothing to train on; the rollout counts as failed.
        """
        return from_calls(calls, drift=self.args.gym_drift)

    def compute_rewards(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return one reward per rollout; None takes a rollout out of the loss and of the group baseline.

        Args:
            rollouts: This rank's rollouts of one generation batch, failed ones included. Those without trajectories
                stay out whatever reward they get: they have no token to train. With `gym_refill_rounds` it is called
                again in each round, with the rollouts that take the place of others.
        """
        return [rollout.reward for rollout in rollouts]

    def on_rollouts(self, facts: Sequence[RolloutFacts]) -> None:
        """Learn from a generation batch of training; does nothing by default.

        It is called once it is decided what is trained of the batch. Tasks of later batches are chosen after that;
        with `gym_max_staleness`, of those that are not in flight yet.

        Args:
            facts: Of the rollouts of all ranks, failed and replaced ones included; the same in the same order on every
                rank.
        """

    def checkpoint_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps for `restore_checkpoint_state`, as plain data: text, numbers, lists,
        mappings, tensors. It is called on every rank; what the main process returns is kept."""
        return {}

    def restore_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Continue from what `checkpoint_state` has returned; does nothing by default.

        It is called on every rank before the first task of a resumed run is chosen, if the checkpoint has a state.
        """

    def log_metric(self, name: str, value: float) -> None:
        """Log a number with those of the generation batch, as TRL's `log_metric` of reward functions does.

        Call it from `choose_task`, `compute_rewards` and `on_rollouts`; not from `build_trajectories`, which runs in
        another thread. During an evaluation `eval_` comes before the name.

        Args:
            name: As it will be in `metrics.jsonl` and for `report_to`.
            value: What is logged is the mean of all values of the batch and all ranks, then of the batches since the
                last log.
        """
        self._pending_metrics[name].append(value)

    # ----------------------------------------------------------------------------------------------- life of servers

    @property
    def policy_server(self) -> PolicyBackend:
        """The policy server: started by the trainer, or the one that was passed in."""
        return self._source.policy_server

    @property
    def gym_servers(self) -> GymServers:
        """NeMo Gym: started by the trainer, or the one that was passed in."""
        return self._source.gym_servers

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as in transformers. True means the newest checkpoint in `output_dir` that is whole.

        When one of several processes ends, the others say so, and end too.

        Raises:
            ConfigError: The checkpoint is not whole, or was made in another way than this run would go on.
        """
        ranks = self.accelerator.process_index, self.accelerator.num_processes
        of_model = made_with.of_model(self.accelerator, self.model, self.reward_func_names)
        facts = made_with.facts(self.args, self.train_dataset, ranks[1], **of_model)
        self._start = resume.begin(resume_from_checkpoint, self.args, self.accelerator, facts)
        try:
            where = rank_agreement.explained(*ranks, lambda: f"in step {self._current_step}")
            with where, told("Training", self.args.output_dir):
                return super().train(self._start.checkpoint, *args, **kwargs)
        finally:
            self._progress.stop()  # also when a notebook's cell is interrupted
            self._source.abandon()

    def close(self) -> None:
        """Stop what the trainer started; servers that were passed in keep running. Also done at interpreter exit."""
        self._source.close()
        self._folder.release()

    def __enter__(self) -> GymGRPOTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_source(self, args: GymGRPOConfig, model: str | PreTrainedModel, given: dict[str, Any]) -> RolloutSource:
        """Choose where rollouts come from: the one place that knows which sources there are. `servers_for` is `given`
        what else the servers of a run depend on."""
        if args.gym_replay is not None:
            check_replay(args, has_servers=given["policy"] is not None or given["gym"] is not None)
            return JournalSource(args.gym_replay)
        return LiveSource(args, servers.servers_for(args, model, **given))

    def _generation_backend(self, **_: Any) -> compat.ServedGeneration:
        """Its weight sync is reached when weights changed and no callback has pushed them: at the start, on resume."""
        return compat.ServedGeneration(self._push_weights, self._source.server_config)

    def _set_callbacks(self) -> None:
        for callback in compat.default_progress_callbacks():
            self.remove_callback(callback)
        self._checkpoints = resume.CheckpointCallback(
            self._begin, lambda: self._save_checkpoint(self.model, None), lambda: self._step
        )
        # Order matters: the state is put back first. A checkpoint is on disk before weights are pushed, which takes
        # time that a process that was told to end may not have. The clock stops before that push counts its own time.
        self.add_callback(self._checkpoints)
        self.add_callback(PhaseCallback(self._clocks["train"]))
        self.add_callback(WeightSyncCallback(self._push_weights, lambda: self._step % self.args.generate_every == 0))
        self.add_callback(MetricsCallback(Path(self.args.output_dir) / "metrics.jsonl"))
        self.add_callback(ProgressCallback(self._progress))

    def _push_weights(self) -> None:
        step = self.state.global_step
        with self._clock.phase("weight_sync"):
            metrics = self._source.push_weights(self.model_wrapped, step)
        self._last_loaded_step = step
        for name, value in metrics.items():
            self._metrics[self._mode][name].append(value)

    # ------------------------------------------------------------------------------------------------------ rollouts

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.state.global_step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
        with self._clock.phase("rollouts"):
            batch = self._next_batch(inputs)
        pending = dict(batch.metrics)
        if self._mode == "train" and self.args.gym_oversample:
            pending |= oversample_metrics((group.rollouts, group.surplus) for group in batch.ended)
        for name, values in pending.items():
            self._pending_metrics[name] += values
        self._settle(batch)
        with self._clock.phase("scoring"):
            scored = super()._generate_and_score_completions(batch.examples)
            metrics, step, same = self._metrics[self._mode], self._current_step, self._draws_as_trained
            self._accounting.correct_scores(scored, metrics, mode=self._mode, step=step, same=same)
            return self._accounting.mark(scored, self._mode)

    def _next_batch(self, inputs: list[dict[str, Any]]) -> GenerationBatch:
        """Return rollouts for a generation batch: of its tasks, or of those whose rollouts have ended first.

        Args:
            inputs: `[B]`; TRL has repeated each example for every member of its group.
        """
        info = BatchInfo(
            run=self._run,
            step=self._current_step,
            mode=self._mode,
            epoch=int(self.state.epoch or 0),
            dataset=self._accounting.dataset,
        )
        if self._mode == "eval":
            self._num_eval_batches += 1
            return self._batches.evaluate(inputs, self.num_generations_eval, number=self._num_eval_batches, info=info)
        number = self._step // self.args.generate_every
        return self._batches.train(inputs, self.num_generations, number=number, info=info, ahead=self._ahead)

    def _ahead(self, number: int) -> tuple[list[dict[str, Any]], int] | None:
        """Return the examples of a generation batch to come, and the step that trains it first."""
        if (rows := self._look_ahead.rows(number)) is None:
            return None
        return rows, step_of_batch(
            number,
            generate_every=self.args.generate_every,
            accumulation=self.args.gradient_accumulation_steps,
            num_steps=self.state.global_step,
            num_micro_steps=self._first_micro_step,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Read the micro-batches of an optimizer step, as in transformers, and those whose turn comes later."""
        self._first_micro_step = self._step
        num_left = (self.state.max_steps - self.state.global_step) * self.args.gradient_accumulation_steps
        micro_batches = self._look_ahead.read(epoch_iterator, num_batches, micro_step=self._step, num_left=num_left)
        return super().get_batch_samples(micro_batches, num_batches, device)

    def _settle(self, batch: GenerationBatch) -> None:
        """Decide with all ranks what is trained of a batch, and make of it what TRL asks its `rollout_func` for."""
        rollouts = batch.rollouts
        with agreed(self.accelerator):
            for line in describe_drift([*rollouts, *(rollout for rollout, _ in batch.replaced_rollouts)]):
                logger.warning(line)
            self._completions = [conversation(rollout) for rollout in rollouts]
        rewards = self._accounting.settle(
            rollouts,
            batch.rewards,
            replaced=batch.replaced_rollouts,
            mode=self._mode,
            step=self._current_step,
            where=f"Read the rollouts in {self._source.folder} and the servers' logs in {self.args.gym_log_dir}.",
            pad_id=self._tokenizer.pad_token_id,
            eos_id=self._tokenizer.eos_token_id,
        )
        if self._mode == "train":
            facts, step = self._accounting.shared.finished, self._current_step
            with agreed(self.accelerator), naming("on_rollouts", f"the {len(facts)} rollouts of step {step}"):
                self.on_rollouts(facts)
        self._columns = training_rows(
            self._accounting.rows,
            rollouts,
            rewards,
            mask_truncated=self.args.mask_truncated_completions,
            with_logprobs=self._draws_as_trained,
        )

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        # TRL wants as many prompts as completions.
        num_tokens, num_rows = self.state.num_input_tokens_seen, len(self._accounting.rows)
        prompt_ids, completion_ids, tool_mask, _, *rest = super()._generate(prompts[:1] * num_rows)
        num_tokens += self._accounting.correct_lengths(self._metrics[self._mode])
        if self._mode == "train":
            self.state.num_input_tokens_seen = num_tokens
            self._metrics["train"]["num_tokens"] = [num_tokens]
        for column, values in table_columns(self._accounting.rollouts).items():
            self._log_completion_extra(column, values)
        # TRL decodes the merged token sequence as if it were one assistant turn; Gym has the real conversation.
        return prompt_ids, completion_ids, tool_mask, self._completions, *rest

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        # TRL has `[R]` completions here, and `[B]` of all else: one reward per rollout, and so one advantage.
        completion_ids_list = joined(self._accounting.rows, len(prompts), eos_id=self._tokenizer.eos_token_id)
        if self.args.gym_reward_components:
            facts, table = self._accounting.shared.facts, self._logs
            self._objectives.columns(facts).give(self)
            num_logged, names = len(table["prompt"]), self.reward_func_names
            fill_table(table["rewards"], names, num_logged=num_logged, num_rollouts=len(facts))
        with naming("reward_funcs", f"the rollouts of step {self._current_step}"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._accounting.exclude_failures(rewards)

    def _choose(self, example: dict[str, Any], group: int) -> dict[str, Any]:
        with naming("choose_task", f"group {group} of step {self._current_step}"):
            return self.choose_task(example, group)

    def _plan(
        self, example: dict[str, Any], *, step: int, batch: int, group: int, members: Sequence[int]
    ) -> TaskGroup:
        """Make the requests of a group; see `batches.Plan`."""
        num_further = self.args.gym_oversample if self._mode == "train" else 0
        return plan_group(
            example,
            f"{self._run_id}-{self._mode}{step}-b{batch}-g{group}",
            step=step,
            batch=batch,
            group=group,
            members=(*members, *range(self.num_generations, self.num_generations + num_further)),
            num_wanted=len(members),
            agent_of=self._source.agent_of,
            build=self.build_request,
            sampling=self.args.sampling_in(self._mode),
            completion_budget=self.max_completion_length,
            agent_sampling=self.args.rollout_options.agent_sampling_of,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def _rewards(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        with naming("compute_rewards", f"the {len(rollouts)} rollouts of step {self._current_step}"):
            given = self.compute_rewards(rollouts)
        return checked_rewards(given, len(rollouts))

    # ------------------------------------------------------------------------------------------------- scoring, update

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if self._mode == "train" and self._buffered_inputs is before:  # TRL has generated nothing
            return inputs
        generated = self._buffered_inputs or [] if self._mode == "train" else [inputs]  # TRL keeps none of evaluation
        split = self._accounting.arrange(generated, has_router_loss=self.aux_loss_enabled)
        self._buffered_inputs = split if self._mode == "train" else before
        return split[self._step % len(split)]

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Results:
        theirs = super()._get_per_token_logps_and_entropies
        options = compute_entropy, compute_aux_loss
        if any(value is not None for value in (*args, *kwargs.values())):  # images, whose places are in the columns
            rows = input_ids, attention_mask, logits_to_keep
            images: Results = theirs(model, *rows, batch_size, *options, *args, **kwargs)
            return images
        return compute_rows(
            lambda *rows: theirs(model, *rows, None, *options),
            input_ids,
            attention_mask,
            logits_to_keep,
            num_rows=batch_size or len(input_ids),
            multiple=self.args.pad_to_multiple_of or 1,
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        rows, weight = weighted(inputs, self.loss_type)
        token_weight, counts = rows.pop(TOKEN_WEIGHT, None), rows.pop(ROW_COUNTS, None)
        beta, self.beta = self.beta, self.beta * weight
        try:
            loss = super().compute_loss(model, rows, return_outputs, num_items_in_batch)
        finally:
            self.beta = beta
        self._accounting.weigh_means(self._metrics[self._mode], token_weight, counts)
        return loss

    # -------------------------------------------------------------------------------------- evaluation, what is logged

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate, as in transformers: one dataset, or several by name, whose metrics are `eval_<name>_…`.

        Raises:
            RolloutError: Fewer of the rollouts than `gym_min_valid_fraction` have a reward.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):  # transformers comes back here with each of them
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        num_rollouts = len(dataset) * self.num_generations_eval if hasattr(dataset, "__len__") else None
        if self.args.gym_eval_overlap == "drain":
            with self._clock.phase("rollouts"):
                self._source.drain()
        step, has_table = self.state.global_step, self.log_completions and self.accelerator.is_main_process
        # A completions table of its own: TRL would mix its rows with training's.
        training, self._logs = self._logs, emptied(self._logs)
        try:
            with self._accounting.evaluating(metric_key_prefix, num_rollouts, step=step, has_table=has_table):
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._logs = training

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, as in TRL, with the metrics of rollouts, seconds per phase and memory."""
        metrics = self._metrics[self._mode]
        if "train_runtime" not in logs:
            seconds = {f"seconds/{phase}": round(spent, 4) for phase, spent in self._clock.take().items()}
            for name, value in (seconds | measured_peak()).items():
                metrics[name] = [value]
        self._accounting.take(metrics, mode=self._mode, num_attempts=self.num_generations_eval)
        super().log(logs, start_time)

    def create_model_card(self, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Write the card, as in TRL, with a section about environments, servers and results."""
        super().create_model_card(model_name or Path(self.args.output_dir).resolve().name, *args, **kwargs)
        if self.is_world_process_zero():
            base = compat.model_id(self.accelerator.unwrap_model(self.model))
            complete(self.args, self.state, base=base, source=self._source.describe())

    # ------------------------------------------------------------------------------------------- checkpoints, resuming

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        if self._checkpoints.postpones(step):
            return
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        self._source.before_saving()
        with agreed(self.accelerator):
            resume.prepare_folder(folder, self._start.made_with, writes=self.args.should_save)
        if not self.args.save_only_model:
            with agreed(self.accelerator), naming("checkpoint_state", f"the checkpoint of step {step}"):
                user = self.checkpoint_state()
            state = resume.RunState(
                run=self._run,
                num_micro_steps=self._step,
                num_ranks=self.accelerator.num_processes,
                buffered=self._buffered_inputs if self._step % self.args.generate_every else None,
                queue=self._batches.state(),
                user=user or None if self.accelerator.is_main_process else None,
            )
            with agreed(self.accelerator):
                resume.save_state(folder, self.accelerator.process_index, state)
        with self._checkpoints.saving(step, self.args.output_dir):
            super()._save_checkpoint(model, trial)

    def _begin(self) -> None:
        self._source.take_optimizer(self.optimizer)  # as wrapped by accelerate; there is none before training begins
        self._last_loaded_step = -1  # the policy server's weights are not known
        # `train` may be called again, as in a notebook after Ctrl-C: the policy server refuses names of rollouts that
        # have ended, and what was in flight or left of a generation batch is gone.
        self._run_id = uuid.uuid4().hex[:8]
        if self._start.checkpoint is not None:
            self._restore()
        else:
            self._step += -self._step % self.args.generate_every
            self._batches.restore(resume.QueueState())
        if self.args.gym_max_staleness and self.args.save_strategy != "no" and hasattr(self.train_dataset, "__len__"):
            resume.require_plain_tasks(self.train_dataset[0])  # not hours later, at the first checkpoint

    def _restore(self) -> None:
        """Put back what transformers does not restore, before anything is sampled."""
        num_steps = self.state.global_step
        resume.find_best(self.state, self._start)
        state = resume.read_back(self._start, self.accelerator, self.args, run=self._run, num_steps=num_steps)
        self._run, self._step, self._buffered_inputs = state.run, state.num_micro_steps, state.buffered
        with agreed(self.accelerator):
            self._batches.restore(state.queue)
        if state.user is not None:
            with agreed(self.accelerator), naming("restore_checkpoint_state", f"{self._start.checkpoint}"):
                self.restore_checkpoint_state(state.user)
        if self._train_sampler is not None:
            resume.draw_orders(self._train_sampler, int(self.state.epoch or 0))
        self._source.resumed()

    # ---------------------------------------------------------------------------------------------- where the run is

    @property
    def _draws_as_trained(self) -> bool:
        """Whether this batch's tokens are drawn from the distribution whose log-probabilities TRL computes."""
        return bool(self.args.sampling_in(self._mode) == self.args.sampling_in("train"))

    @property
    def _current_step(self) -> int:
        """The number by which a batch is told: of the optimizer step that it trains, or after which it evaluates."""
        return self.state.global_step + (self._mode == "train")

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _clock(self) -> PhaseClock:
        return self._clocks[self._mode]
