"""Start the two servers of a run on rank 0, attach every other rank to them, and get the policy server back.

    rank 0     start() ── both spawn and load side by side ── wait_ready() ── tell the addresses
    others                                                     wait_ready() ── attach to them

With the engine in the training processes every rank starts its own policy server (`in_process.py`).

Whoever starts a server stops it: one that was passed in running is borrowed and keeps running, one that was passed in
unstarted is started, and stopped, here. What fails on one rank is raised on all of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedModel

from trl_gym import compat, engines
from trl_gym.config import GymGRPOConfig
from trl_gym.config_checks import biased_ratio, context_problem, small_batch_notes
from trl_gym.errors import ConfigError, GymServerError, GymServerLostError, Problem
from trl_gym.gym.servers import GymServers
from trl_gym.memory.plan import this_device, try_estimate
from trl_gym.policy_server.command import api_key_from_environment, default_key, new_key
from trl_gym.policy_server.fork_server import ForkServer
from trl_gym.policy_server.middleware.identity import gym_key
from trl_gym.policy_server.server import PolicyBackend, PolicyServer
from trl_gym.policy_server.sglang import server as sglang
from trl_gym.policy_server.splice_probe import check_sampling, check_splice, check_tools
from trl_gym.policy_server.transformers_engine.server import TransformersServer
from trl_gym.processes import ServerState
from trl_gym.ranks import agreed, on_main
from trl_gym.run import in_process
from trl_gym.run.recovery import PolicyRecovery, end_interrupted_update
from trl_gym.weight_sync.transports.plan import TransportPlan, plan_transport

logger = logging.getLogger(__name__)

_INITIAL_POLICY = "initial_policy"  # folder for a model that was given as an object without a folder of its own


def servers_for(
    args: GymGRPOConfig,
    model: str | PreTrainedModel,
    *,
    processing_class: Any = None,
    policy: PolicyBackend | None = None,
    gym: GymServers | None = None,
    peft_config: Any = None,
    quantization_config: Any = None,
    fork_server: ForkServer | None = None,
    agent_with_tools: str | None = None,
) -> RunServers:
    """Return the two servers of a run, not started yet. For the arguments see `RunServers`."""
    return RunServers(
        args,
        lambda: servable(model, processing_class, args),
        policy,
        gym,
        lambda: server_options(args, model, peft_config, quantization_config, PartialState().num_processes),
        fork_server,
        agent_with_tools,
        lambda key: in_process.new_server(args, model, processing_class, quantization_config, api_key=key),
    )


class RunServers:
    """Policy server and NeMo Gym of one trainer. Every rank has one and calls its methods in step.

    Args:
        servable: Makes the folder or hub id that the policy server loads; called on rank 0 when one is started.
        start_options: Makes flags and environment of the server; called on rank 0 when one is started. See
            `server_options`.
        fork_server: Forks the policy server when one is started. Default: one of its own, for restarts.
        agent_with_tools: Agent of a dataset row with tools, for which the policy server needs a tool parser.
        new_own: Makes, with a key, a policy server in this process; called on every rank when one is wanted.

    Attributes:
        own: This rank's policy server, where the engine is in the training processes; None elsewhere.

    Raises:
        ConfigError: The configuration names no policy server, or no NeMo Gym.
    """

    def __init__(
        self,
        args: GymGRPOConfig,
        servable: Callable[[], str],
        policy: PolicyBackend | None = None,
        gym: GymServers | None = None,
        start_options: Callable[[], tuple[dict[str, Any], Mapping[str, str]]] = lambda: ({}, {}),
        fork_server: ForkServer | None = None,
        agent_with_tools: str | None = None,
        new_own: Callable[[str], TransformersServer] = lambda key: TransformersServer(api_key=key),
    ) -> None:
        self._args = args
        self._new_own = new_own
        self.own: TransformersServer | None = None
        self._agent_with_tools = agent_with_tools
        self._servable = servable
        self._start_options = start_options
        self._fork_server = fork_server
        self._own_fork_server: ForkServer | None = None
        self._owns_policy = policy is None or policy.state is ServerState.NEW
        self._owns_gym = gym is None or gym.state is ServerState.NEW
        self._process = PartialState()
        self._splice_checked = self._found_paused = False
        self._recovery: PolicyRecovery | None = None
        self._num_gym_restarts = 0
        _check_sources(args, policy, gym)
        # None until `start` (until `wait_ready` on ranks above 0); nothing uses them before.
        self.policy: PolicyBackend = policy  # type: ignore[assignment]
        self.gym: GymServers = gym  # type: ignore[assignment]

    def start(self) -> None:
        """Spawn both on rank 0; return before they are ready. Every rank calls it in step. Raises `ConfigError` or
        `ServerError`: on every rank, when rank 0 could not start them."""
        self._start_own()
        on_main(self._process, self._start)

    def take_model(self, model: torch.nn.Module, tokenizer: Any, mixed_precision: str) -> None:
        """Let this rank's policy server serve the model that the trainer has loaded, where the engine is in this
        process. Every rank calls it in step, before `wait_ready`.

        Args:
            model: The trainer's, wrapped.
            mixed_precision: Accelerate's.

        Raises:
            ConfigError: It cannot be sampled from in this process.
        """
        with agreed(self._process):
            if self.own is not None:
                self.own.take_model(model, tokenizer, autocast=in_process.precision_of(mixed_precision))

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Let this rank's engine sample while open, and training have the model afterwards, whatever happens. Every
        rank enters and leaves it in step. Does nothing where the engine is elsewhere."""
        if self.own is None:
            yield
            return
        with self.own.sampling():
            yield

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Keep this rank's engine from the model while open, also inside of `sampling`; see there."""
        if self.own is None:
            yield
            return
        with self.own.resting():
            yield

    def wait_ready(self) -> None:
        """Wait for both on rank 0, then attach to them on the other ranks. Every rank calls it in step. Raises
        `ServerError`: on every rank, when one rank could not get them."""
        with self.sampling():  # what is checked samples a token
            base_urls, api_key, head_url = on_main(self._process, self._wait_ready)
        with agreed(self._process):
            if not self._process.is_main_process:
                if self.own is None:
                    self.policy = PolicyServer.attach(base_urls, api_key=api_key)
                given: Any = {"hang_timeout_s": self._args.gym_server_hang_timeout, "is_ours": self._starts_gym}
                self.gym = GymServers.attach(head_url, **given).wait_ready()

    def check(self) -> None:
        """Raise when the policy server, or the whole Gym that we started, has died. The collector deals with a single
        environment that is down: it may be skipped."""
        self.policy.check()
        self.gym.check_process()

    def check_before_rollouts(self) -> None:
        """Check on rank 0, once weights were pushed, that the server is the one that got all of them, and that it
        continues sampled tokens exactly where it was paused when that should have been checked.

        Raises:
            PolicyServerLostError: It was restarted, and may have a part of the weights; or it does not answer.
            PolicyServerError: It cannot be used.
        """
        if not self._process.is_main_process:
            return
        self.require_same_policy()
        if not self._splice_checked:
            self._check_answers()

    def require_same_policy(self) -> None:
        """Check on rank 0 that the policy server is the process that got our weights, or that we restarted last.
        Raises `PolicyServerLostError`: another process answers, or none."""
        if self._recovery is not None:
            self._recovery.require_same()

    def recover(self, error: Exception) -> None:
        """Get a policy server back that died or disappeared. Every rank calls it in step, and pushes the weights next.

        Args:
            error: What made this rank, or another one, think that it is lost.

        Raises:
            Exception: `error`, when the server is well and something else went wrong.
            PolicyServerError: On every rank, when it does not come back; says why.
        """

        def on_rank_0() -> None:
            assert self._recovery is not None, "made by `wait_ready`"
            self._recovery.recover(error)

        if self.own is not None:
            in_process.restart_others(self._process, self.own)
        on_main(self._process, on_rank_0)
        self.policy.client.close()  # what is left of connections to the old process

    def recover_gym(self, error: GymServerLostError) -> None:
        """Start a NeMo Gym again that died or hangs. Every rank calls it in step. Raises `GymServerError`: on every
        rank, when it was not started here, or as often as allowed; says how it was lost."""

        def on_rank_0() -> str:
            if not self._starts_gym:
                raise error
            death: GymServerError = error
            while True:
                self._count_gym_restart(death)
                try:
                    return self.gym.restart().head_url
                except GymServerError as failed:  # it was lost again while it started
                    death = failed

        head_url = on_main(self._process, on_rank_0)
        with agreed(self._process):
            if not self._process.is_main_process:
                self.gym.attach_again(head_url)

    @property
    def _starts_gym(self) -> bool:
        return self.owns_gym and self._args.gym_mode != "attach"

    def _count_gym_restart(self, death: GymServerError) -> None:
        allowed = self._args.gym_server_restarts
        if self._num_gym_restarts >= allowed:
            raise GymServerError(
                f"NeMo Gym is lost and is not restarted: it was restarted {self._num_gym_restarts} times, and "
                f"`gym_server_restarts` allows no more. {death.problem}",
                death.remedy or "Find the cause in its log before you raise `gym_server_restarts`.",
            ) from death
        self._num_gym_restarts += 1
        logger.warning("restarting NeMo Gym (%d of %d restarts): %s", self._num_gym_restarts, allowed, death)

    def stop(self) -> None:
        """Stop what was started here. Idempotent."""
        try:
            if self._owns_gym and self.gym is not None:
                self.gym.stop()
        finally:
            if self._owns_policy and self.policy is not None:
                self.policy.stop()
            if self._own_fork_server is not None:
                self._own_fork_server.stop()

    @property
    def secrets(self) -> tuple[str, ...]:
        """The policy server's API key, and keys in NeMo Gym's configuration, which no file may contain."""
        return (*filter(None, [self.policy.client.api_key]), *self.gym.secrets)

    @property
    def owns_gym(self) -> bool:
        """Whether NeMo Gym was started here, with a key by which the policy server knows its calls."""
        return self._owns_gym

    @property
    def num_restarts(self) -> int:
        """How often the policy server was restarted; known on rank 0."""
        return 0 if self._recovery is None else self._recovery.num_restarts

    def server_config(self) -> dict[str, Any]:
        """Return the policy server's resolved configuration."""
        return self.policy.client.server_config()

    def new_policy(self) -> PolicyBackend:
        """Return the policy server that the configuration names: one to start, or one that runs."""
        args = self._args
        if args.vllm_mode == "server":
            key, timeout_s = api_key_from_environment(), args.vllm_server_timeout
            said = f"waiting for the policy server at {args.vllm_server_base_url} (at most {timeout_s:g} s)"
            Console().print(said, markup=False, highlight=False, soft_wrap=True)
            return PolicyServer.attach(args.vllm_server_base_url, api_key=key, timeout_s=timeout_s)
        flags, environment = self._start_options()
        if engines.started_engine(args) == "sglang":
            python = sglang.find_python(args.gym_sglang_python)
            command = sglang.SglangCommand(model := self._servable(), sglang.flags_from(flags), python, environment)
            return PolicyServer(model, serving=command, **self._placement)
        if self._fork_server is None:
            devices = args.gym_server_devices
            placed = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
            self._fork_server = self._own_fork_server = ForkServer(env={**environment, **placed})
        return PolicyServer(
            self._servable(), vllm_args=flags, env=environment, fork_server=self._fork_server, **self._placement
        )

    @property
    def _placement(self) -> dict[str, Any]:
        """Arguments of a `PolicyServer` of any engine."""
        return {
            "log_dir": self._args.gym_log_dir,
            "start_timeout_s": self._args.gym_server_start_timeout,
            "api_key": default_key(),
            "devices": self._args.gym_server_devices,
        }

    def new_gym(self) -> GymServers:
        """Return the NeMo Gym that the configuration names: one to start, or one that runs."""
        args = self._args
        if args.gym_mode == "attach":
            hang_timeout_s = args.gym_server_hang_timeout
            return GymServers.attach(
                args.gym_head_url, timeout_s=args.gym_start_timeout, hang_timeout_s=hang_timeout_s
            )
        return GymServers(
            args.gym_config_paths,
            mode=args.gym_mode,
            python=args.gym_python,
            overrides=args.gym_overrides or {},
            log_dir=args.gym_log_dir,
            start_timeout_s=args.gym_start_timeout,
            processes=args.gym_processes,
            rollouts_in_flight=args.rollouts_in_flight(self._process.num_processes),
            hang_timeout_s=args.gym_server_hang_timeout,
        )

    def _start_own(self) -> None:
        """Start a policy server on every rank, where the engine is in the training processes."""
        key = on_main(self._process, self._own_key)
        if key is None:
            return
        with agreed(self._process):
            if self.policy is None:
                self.policy = self._new_own(key)
            assert isinstance(self.policy, TransformersServer)
            self.own = self.policy
            if self.own.state is ServerState.NEW:
                self.own.start()
        in_process.join(self.own)

    def _own_key(self) -> str | None:
        """Return the key of all ranks' servers; None where the engine is elsewhere."""
        if self.policy is None and self._args.vllm_mode == "colocate":
            if (said := engines.describe_choice(self._args)) is not None:
                Console().print(f"default: {said}", markup=False, highlight=False, soft_wrap=True)
            is_own = engines.started_engine(self._args) == "transformers"
        else:
            is_own = isinstance(self.policy, TransformersServer)
        return new_key() if is_own else None

    def _start(self) -> None:
        if self.policy is None:
            self.policy = self.new_policy()
        if self.policy.state is ServerState.NEW:
            if engines.started_engine(self._args) == "vllm":
                compat.check_versions(("vllm",))
            self._show_parsers()
            if self._own_fork_server is not None:
                self._own_fork_server.start()
            self.policy.start()
        elif self.own is not None:
            self._show_parsers()
        elif self.policy.state is ServerState.READY:  # refused before a model is loaded for nothing
            _check_engine(self._args.gym_engine, self.policy)
            self._check_splice_unless_paused()
        if self.gym is None:
            self.gym = self.new_gym()
        key = gym_key(self.policy.client.api_key, self._args.gym_untagged_calls)
        self.gym.connect_policy(self.policy.base_urls, self.policy.model_name, key)
        if self.gym.state is ServerState.NEW:
            self.gym.start()

    def _wait_ready(self) -> tuple[tuple[str, ...], str | None, str]:
        self.gym.wait_ready()
        self.policy.wait_ready()
        self._check_splice_unless_paused()
        self._recovery = PolicyRecovery(
            self.policy,
            max_restarts=self._args.gym_server_restarts,
            may_restart=self._owns_policy,
            reconnect_timeout_s=self._args.gym_server_reconnect_timeout,
            hang_timeout_s=self._args.gym_server_hang_timeout,
            sync_timeout_s=self._args.gym_sync_timeout,
        )
        return self.policy.base_urls, self.policy.client.api_key, self.gym.head_url

    def _check_splice_unless_paused(self) -> None:
        """A server that a trainer left in the middle of a sync samples nothing until the first push resumes it."""
        if self._splice_checked or self._found_paused:
            return
        if end_interrupted_update(self.policy.client, self._args.gym_sync_timeout):
            logger.warning(
                "The policy server at %s is paused: a trainer was probably killed during a weight sync. It resumes "
                "with this run's first weight sync.",
                self.policy.client.base_url,
            )
            self._found_paused = True
            return
        self._check_answers()

    def _check_answers(self) -> None:
        check_splice(self.policy.client, self.policy.model_name)
        for one in self.policy.client.singly():  # one that runs elsewhere may be of this engine, too
            if one.info().get("engine") == "transformers":
                check_sampling(one, self.policy.model_name, self._args.probe_tolerance)
        parsers = getattr(self.policy, "parsers", None)  # other backends, and servers elsewhere, do not tell
        if self._agent_with_tools is not None and (parsers is None or parsers.tool.name is None):
            check_tools(self.policy.client, self.policy.model_name, self._agent_with_tools)
        self._splice_checked = True

    def _show_parsers(self) -> None:
        """Say which parsers are guessed for the server that is started next. Raises `ConfigError`: it would have no
        tool parser, and there are rows with tools."""
        parsers = getattr(self.policy, "parsers", None)
        if parsers is None:
            return
        problem = None if self._agent_with_tools is None else parsers.problem(self._agent_with_tools)
        if problem is not None:
            raise ConfigError(problem.text, problem.remedy)
        for line in parsers.lines():
            Console().print(line, markup=False, highlight=False, soft_wrap=True)


def _check_engine(wanted: str, policy: PolicyBackend) -> None:
    """Refuse a server that runs already and is of another engine than the one that is named."""
    if wanted == "auto":
        return
    for url, info in zip(policy.base_urls, policy.client.infos(), strict=True):
        if (found := info.get("engine", "vllm")) != wanted:
            raise ConfigError(
                f"`gym_engine` is {wanted!r}, and the policy server at {url} is of the engine {found!r}.",
                "Leave the option at 'auto', or name the server that you mean.",
            )


def _check_sources(args: GymGRPOConfig, policy: PolicyBackend | None, gym: GymServers | None) -> None:
    if gym is None and args.gym_mode != "attach" and not args.gym_config_paths:
        raise ConfigError(
            "There is no NeMo Gym: neither `gym_config_paths` nor `gym_head_url` is set.",
            "Set `gym_config_paths` to start one, `gym_head_url` to attach to a running one, or pass `gym_servers`.",
        )
    if policy is None and args.vllm_mode == "server" and args.vllm_server_base_url is None:
        raise ConfigError(
            "`vllm_mode` is 'server' and `vllm_server_base_url` is not set.",
            "Set it to a running server (start one with `trl-gym serve MODEL`), or pass `policy_server`.",
        )


# -- what a policy server is started with -----------------------------------------------------------------------------


def servable(model: str | PreTrainedModel, processing_class: Any, args: GymGRPOConfig) -> str:
    """Return the folder or hub id that the policy server loads. The trainer's weights are pushed before anything is
    sampled, so only architecture and tokenizer have to be the same; a model without a folder is saved to one."""
    name = model if isinstance(model, str) else compat.model_id(model)
    if name and (processing_class is None or isinstance(model, str)):
        return name
    if processing_class is None:
        raise ConfigError(
            "`model` was not loaded from a folder or hub id, so the policy server needs a tokenizer.",
            "Pass `processing_class`.",
        )
    folder = Path(args.output_dir) / _INITIAL_POLICY
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.save_pretrained(folder)
    processing_class.save_pretrained(folder)
    return str(folder)


def server_options(
    args: GymGRPOConfig,
    model: str | PreTrainedModel,
    peft_config: Any = None,
    quantization_config: Any = None,
    num_processes: int = 1,
) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Return flags and environment of the server: what TRL's options say, what the placement and the adapter demand,
    and what `gym_vllm_args` says, which comes last. On GPUs it prints how their memory will be used.

    Args:
        peft_config: Adapter that the trainer will put on it.
        quantization_config: Quantization with which the trainer will load it.

    Raises:
        ConfigError: Weights cannot reach such a server, or `gym_gpu_memory` is 'auto' and leaves it too little.
    """
    on_cuda = torch.cuda.is_available() and not args.use_cpu
    transport = plan_transport(args, model, peft_config, quantization_config, on_cuda=on_cuda)
    if engines.started_engine(args) == "sglang":
        gpus = _gpu_flags(args, model, peft_config, quantization_config, num_processes) if on_cuda else None
        return _sglang_options(args, transport, gpus)
    flags: dict[str, Any] = {"dtype": args.serving_dtype, **transport.server_flags()}
    flags["max-model-len"] = args.vllm_max_model_length or "auto"  # as long as memory allows, instead of no start
    if args.trust_remote_code:
        flags["trust-remote-code"] = True
    if torch.cuda.is_available():
        flags |= _gpu_flags(args, model, peft_config, quantization_config, num_processes)
    else:
        flags["enforce-eager"] = True  # compiling for a CPU takes longer than it saves
    return flags | _flags_of(args.gym_vllm_args), transport.server_environment()


# Flags of vLLM and what they are called by SGLang, where they mean the same. vLLM's share of a GPU is of everything
# that the server has there, SGLang's of weights and cache.
_SGLANG_NAMES = {
    "tensor-parallel-size": "tp-size",
    "gpu-memory-utilization": "mem-fraction-static",
    "enable-sleep-mode": "enable-memory-saver",
}


def _sglang_options(
    args: GymGRPOConfig, transport: TransportPlan, gpus: Mapping[str, Any] | None
) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Return flags and environment of SGLang's server.

    Args:
        gpus: vLLM's flags for the GPUs; None where there are none.
    """
    flags: dict[str, Any] = {"dtype": args.serving_dtype, **transport.sglang_flags()}
    if args.vllm_max_model_length is not None:
        flags["context-length"] = args.vllm_max_model_length
    if args.trust_remote_code:
        flags["trust-remote-code"] = True
    if gpus is None:
        flags |= sglang.CPU_FLAGS
    else:
        flags |= {_SGLANG_NAMES[name]: value for name, value in gpus.items()}
    return flags | _flags_of(args.gym_sglang_args), sglang.CPU_ENVIRONMENT if gpus is None else {}


def show_notes(args: GymGRPOConfig, *, adapts: bool) -> None:
    """Say on rank 0 what was set since it was not given, and what biases a run or lets it learn little.

    Args:
        adapts: Whether an adapter is trained.
    """
    process = PartialState()
    if not process.is_main_process:
        return
    if (bias := biased_ratio(args)) is not None:
        logger.warning("%s", bias)
    for note in args.notes:
        Console().print(f"default: {note}", markup=False, highlight=False, soft_wrap=True)
    for note in small_batch_notes(args, process.num_processes, adapts=adapts):
        logger.warning("%s", note)


def show_context(args: GymGRPOConfig, model: PreTrainedModel) -> None:
    """Warn on rank 0 of rollouts that end where the model's context does, before `max_completion_length`."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    problem = context_problem(args, args.vllm_max_model_length or most)
    if problem is not None and PartialState().is_main_process:
        logger.warning("%s", problem)


def _flags_of(given: Mapping[str, Any] | None) -> dict[str, Any]:
    return {flag.lstrip("-").replace("_", "-"): value for flag, value in (given or {}).items()}


def _gpu_flags(
    args: GymGRPOConfig, model: str | PreTrainedModel, peft_config: Any, quantization_config: Any, num_processes: int
) -> dict[str, Any]:
    flags = {
        "tensor-parallel-size": args.vllm_tensor_parallel_size,
        "gpu-memory-utilization": args.vllm_gpu_memory_utilization,
    }
    if args.gym_server_devices is not None:
        return flags  # those GPUs are the server's alone
    training = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if (problem := workers_problem(args, training, torch.cuda.device_count())) is not None:
        logger.warning("%s", problem)
    if args.vllm_enable_sleep_mode:
        flags["enable-sleep-mode"] = True
    device = this_device()
    assert device is not None  # there is CUDA
    plan = try_estimate(
        args, model, num_processes, device, peft_config=peft_config, quantization_config=quantization_config
    )
    if isinstance(plan, Problem):
        logger.warning("%s The policy server takes the given %g of it.", plan.text, args.vllm_gpu_memory_utilization)
        return flags
    Console().print(plan.describe(), markup=False, highlight=False, soft_wrap=True)
    if args.gym_gpu_memory == "auto":
        if plan.utilization is None:
            raise ConfigError(
                "`gym_gpu_memory` is 'auto', and nothing useful is left for the policy server.", problems=plan.problems
            )
        flags["gpu-memory-utilization"] = plan.utilization
    return flags


def num_workers(args: GymGRPOConfig) -> int:
    """Return the number of GPUs that the policy server of a run uses."""
    flags = _flags_of(args.gym_sglang_args if args.gym_engine == "sglang" else args.gym_vllm_args)
    replicas = flags.get("data-parallel-size", flags.get("dp-size", 1))  # SGLang has both names
    return args.vllm_tensor_parallel_size * int(replicas)


def workers_problem(args: GymGRPOConfig, training: int, gpus: int) -> Problem | None:
    """Say that a policy server that shares GPUs with training has not as many workers as there are of these; None
    where each training process serves its own model."""
    if engines.started_engine(args) == "transformers":
        return None
    served = num_workers(args)
    option = "gym_sglang_args" if args.gym_engine == "sglang" else "gym_vllm_args"
    fitting = max(1, min(training, gpus) // args.vllm_tensor_parallel_size)
    remedy = f"""Set `{option}` to {{"data-parallel-size": {fitting}}} to sample on all of them."""
    if served > gpus:
        return Problem(
            f"The policy server has {served} workers (tensor parallel × data parallel) and the host {gpus} GPUs.",
            f"{remedy} Lower `vllm_tensor_parallel_size` where that is not enough.",
        )
    if served < training:
        return Problem(f"Training uses {training} GPUs of this host and the policy server {served} of them.", remedy)
    return None
