"""One weight sync, which all ranks agree on, and the probe that compares both sides afterwards.

    rank 0     pause ── start ──┐               ┌── finish(version) ── reset caches ── resume ──┐
    all ranks                   └── transfer ───┘                                               └── probe, sometimes

Rollouts may be in flight. While the server is paused nothing is scheduled but, with `wait`, what runs already, so that
calls without end cannot hold it up; calls that come are held by the engine. With `keep` what runs is frozen, and its
keys and values are dropped with all others: they are computed again, by the new weights, before it goes on. (vLLM
drops them when it pauses, and the reset makes sure of it.) `policy_server/middleware/versions.py` stamps such calls.

First its engine is asked whether it answers at all (`gym_server_hang_timeout`): a step of a sync may take longer than
that. One that hangs in a step is noticed when `gym_sync_timeout` is over.

A transfer that fails leaves the server paused: resuming it would serve half-updated weights. The probe comes after the
resume, because it asks the server to compute. An update can be answered with 200 and still not arrive: wrong names are
skipped, tied embeddings keep an old copy, a cache survives. So both sides compute the log-probabilities of one fixed
batch of tokens; when they differ, training stops. A transport that does not touch weights in service (`adapter`) needs
no pause.

An error on rank 0 is raised on every rank, and no rank is left in a collective: a transport walks its stream to the
end even when no one listens any more.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import requests
import torch

from trl_gym.errors import PolicyServerLostError, Problem, WeightMismatchError, WeightSyncError
from trl_gym.ranks import on_all, on_main
from trl_gym.weight_sync.source import AdapterSource, WeightSource
from trl_gym.weight_sync.sums import explain, fingerprint, sent_sums

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trl_gym.memory.sharing import DeviceSharing
    from trl_gym.policy_server.client import PolicyClient
    from trl_gym.policy_server.server import PolicyBackend
    from trl_gym.weight_sync.protocol import WeightStream, WeightTransport

T = TypeVar("T")

# 62 log-probabilities: their mean tells a gap of 1.3 times the tolerance from one within it as surely as four times as
# many do from 1.15 times (`tests/weight_sync/test_sync.py`), and each costs a forward pass on both sides.
_NUM_PROBES = 2
_PROBE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """Options of a weight sync; see those of the same names in `GymGRPOConfig`."""

    # Precision that weights are sent in, which is the one that the server computes in; None sends the trainer's.
    dtype: torch.dtype | None = None
    # `"wait"` lets requests that are being answered finish, `"keep"` freezes them.
    pause_mode: Literal["wait", "keep"] = "wait"
    only_trainable: bool = False  # whether syncs after a complete one send only what is trained
    timeout_s: float = 600.0  # for each call to the server
    hang_timeout_s: float = 300.0  # for an answer of its engine; `gym_server_hang_timeout`
    verify_every: int = 0  # steps after which a probe is made again; 0 for never
    probe_tolerance: float = 0.02  # mean absolute gap in nats that a probe may find


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Result of one comparison."""

    mean_gap: float  # mean absolute difference of log-probabilities, in nats
    max_gap: float  # largest absolute difference, in nats
    num_tokens: int  # tokens compared


@dataclass(frozen=True, slots=True)
class SyncReport:
    """Cost and outcome of one sync."""

    version: str  # weight version that the server holds now
    fingerprint: str  # of the trainer's weights, see `sums.fingerprint`
    # By phase, without a gap: `plan` (names, shapes, merging), `wake` (a server that sleeps), `connect` (of the first
    # sync, and after a restart), `pause`, `transfer`, `finish` (with the caches' reset and the resume), `probe`,
    # `fingerprint`.
    seconds: dict[str, float]
    num_bytes: int  # bytes handed over
    probe: ProbeReport | None  # comparison of log-probabilities; None when none was made


class WeightSync:
    """Pushes the trainer's weights to the policy server. Every rank has one and calls `push` in step.

    Args:
        server: The policy server; its control plane is used on rank 0 only.
        options: How weights are pushed.
        sharing: Gives the server its memory before weights come; None where the server never sleeps.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        server: PolicyBackend,
        transport: WeightTransport,
        options: SyncOptions | None = None,
        sharing: DeviceSharing | None = None,
    ) -> None:
        self.transport = transport
        self._accelerator = accelerator
        self._server = server
        self._options = options or SyncOptions()
        self._sharing = sharing
        self._connected = False
        self._complete = False  # whether the server has had every parameter from us
        self._is_open = False  # whether an update was begun and not ended, because Ctrl-C came in between
        self._verified_at: int | None = None

    def disconnect(self) -> None:
        """Forget the server: the next push connects to another one, sends everything and is verified."""
        self.transport.disconnect()
        self._connected = self._complete = self._is_open = False
        self._verified_at = None

    def push(self, model: torch.nn.Module, step: int) -> SyncReport:
        """Send the model's weights, after which the server samples with them.

        Args:
            model: The trainer's model, wrapped or not.
            step: Optimizer steps in it; the weight version stamped on everything that is sampled from here on.

        Raises:
            PolicyServerError: The server refused, died or did not answer; it is not resumed.
            WeightSyncError: The weights could not be sent, or the server reports another version afterwards.
            WeightMismatchError: The weights arrived, and the server computes something else.
        """
        version = str(step)
        watch = _Stopwatch()
        partial = self._options.only_trainable and self._complete and self.transport.replaces
        weights = self._weights(model, partial)
        self._complete = False
        watch.lap("plan")
        is_due = self._prepare(step, watch)
        try:
            with self._located("the transfer", version):
                num_bytes = on_all(self._accelerator, lambda: self.transport.send(weights, self._client, version))
            watch.lap("transfer")
            with self._located("its end", version):
                self._on_main(lambda client: self._install(client, version))
            if self._sharing is not None:
                self._sharing.pushed()
                self._sharing.before_sampling()
            if self.transport.replaces:
                self._on_main(lambda client: client.resume())
                self._is_open = False
            watch.lap("finish")
        finally:
            self.transport.release()
        self._complete = True
        probe = self._verify(model, version) if is_due else None
        if is_due:
            self._verified_at = step
            if self._sharing is not None:
                self._sharing.verified()
            watch.lap("probe")
        digits = fingerprint(model, self._accelerator)
        watch.lap("fingerprint")
        return SyncReport(version, digits, watch.seconds, num_bytes, probe)

    def _prepare(self, step: int, watch: _Stopwatch) -> bool:
        """Make the server ready to receive. Return whether a probe is due, which a server that slept may need."""
        is_due = self._is_due(step)
        self._on_main(lambda client: client.patient(self._options.hang_timeout_s).ask_engines())
        if self._sharing is not None:
            self._sharing.before_sync()
            watch.lap("wake")
        if not self._connected:  # the same on every rank
            self._on_main(self.transport.connect)
            self._connected = True
            watch.lap("connect")
        if self.transport.replaces:
            if self._is_open:
                self._on_main(lambda client: client.abandon_weight_update())
            self._is_open = True
            with self._located("the pause", str(step)):
                self._on_main(self._begin)
            watch.lap("pause")
        return is_due

    @contextmanager
    def _located(self, phase: str, version: str) -> Iterator[None]:
        """Say of a loss in which part of the sync it was found, and that the engine was waited for."""
        try:
            yield
        except (PolicyServerLostError, WeightSyncError) as error:
            silent_s = self._options.timeout_s if isinstance(error.__cause__, requests.Timeout) else error.silent_s
            if isinstance(error, WeightSyncError) and not silent_s:
                raise  # refused, not lost
            kind = WeightSyncError if isinstance(error, WeightSyncError) else PolicyServerLostError
            where = f"The weight sync of version {version} was lost in {phase} (transport `{self.transport.name}`)"
            lost = kind(f"{where}: {error.problem}", error.remedy, error.problems)
            lost.silent_s = silent_s
            raise lost from error

    def _weights(self, model: torch.nn.Module, partial: bool) -> WeightStream:
        if self.transport.name == "adapter":
            return AdapterSource(model, self._accelerator)
        return WeightSource(model, self._accelerator, dtype=self._options.dtype, only_trainable=partial)

    def _begin(self, client: PolicyClient) -> None:
        try:
            client.pause(self._options.pause_mode)
        except PolicyServerLostError as error:
            if self._options.pause_mode != "wait":
                raise
            client.patient(self._options.hang_timeout_s).ask_engines()
            raise PolicyServerLostError(
                f"{error.problem} It is well: model calls in flight have not ended, and `gym_pause_mode` is 'wait'.",
                "Raise `gym_sync_timeout` above what the longest answer takes, or set `gym_pause_mode` to 'keep'.",
            ) from error
        client.start_weight_update()

    def _install(self, client: PolicyClient, version: str) -> None:
        if self.transport.replaces:
            client.finish_weight_update(version)
            client.reset_caches(running=self._options.pause_mode == "keep")
        held = client.weight_version()
        if held != version:
            raise WeightSyncError(
                f"Weight version {version} was sent and the policy server says that it holds {held!r}.",
                "Look into its log: the update did not end as it should"
                + ("; the server stays paused." if self.transport.replaces else "."),
            )

    def _is_due(self, step: int) -> bool:
        if self._sharing is not None and self._sharing.needs_probe:
            return True
        every = self._options.verify_every
        return self._verified_at is None or (every > 0 and step - self._verified_at >= every)

    def _verify(self, model: torch.nn.Module, version: str) -> ProbeReport:
        unwrapped = self._accelerator.unwrap_model(model)
        batch = probe_batch(unwrapped.config.get_text_config().vocab_size)
        ours = on_all(self._accelerator, lambda: trainer_logprobs(model, batch))  # a server may compute in a rank

        def ask(client: PolicyClient) -> ProbeReport:
            report = compare(ours, client.prompt_logprobs(batch))
            require_agreement(report, self._options.probe_tolerance, version=version)
            return report

        try:
            return self._on_main(ask)
        except WeightMismatchError as error:
            if not self.transport.replaces:
                raise
            raise WeightMismatchError(error.problem, error.remedy, self._explain(model, unwrapped)) from error

    def _explain(self, model: torch.nn.Module, unwrapped: torch.nn.Module) -> list[Problem]:
        """Name the parameters that differ, as far as that can be found out. Every rank calls it in step."""
        dtype = self._options.dtype or next(unwrapped.parameters()).dtype
        sums = sent_sums(WeightSource(model, self._accelerator, dtype=dtype))
        return [] if self._client is None else explain(self._client, sums, dtype)

    @property
    def _client(self) -> PolicyClient | None:
        """The control plane with the sync's timeout on rank 0, None on others."""
        if not self._accelerator.is_main_process:
            return None
        return self._server.client.patient(self._options.timeout_s)

    def _on_main(self, work: Callable[[PolicyClient], T]) -> T:
        """Ask the server for something on rank 0, with the sync's timeout."""
        return on_main(self._accelerator, lambda: work(self._server.client.patient(self._options.timeout_s)))


class _Stopwatch:
    """Seconds by phase: all that pass between two laps belong to the later one, so that none is missing."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.seconds[phase] = now - self._since
        self._since = now


def probe_batch(vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Make a fixed batch of random token sequences, `[2][32]`, with ids below `vocab_size`."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(_PROBE_TOKENS)] for _ in range(_NUM_PROBES)]


def trainer_logprobs(model: torch.nn.Module, batch: Sequence[Sequence[int]]) -> list[list[float]]:
    """Compute log p(token t | tokens before it) at temperature 1, `[N][T - 1]`. Every rank calls it: FSDP gathers
    inside. Each submodule is in the mode (train or eval) afterwards in which it was before."""
    ids = torch.tensor(batch, device=next(model.parameters()).device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    finally:
        for module, training in modes:  # not `model.train()`: that also reaches what the user keeps in eval mode
            module.training = training
    return torch.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None]).squeeze(2).tolist()


def compare(trainer: Sequence[Sequence[float]], server: Sequence[Sequence[float]]) -> ProbeReport:
    """Measure the differences between the two sides; both `[N][T - 1]`."""
    gaps = [abs(a - b) for left, right in zip(trainer, server, strict=True) for a, b in zip(left, right, strict=True)]
    return ProbeReport(mean_gap=sum(gaps) / len(gaps), max_gap=max(gaps), num_tokens=len(gaps))


def require_agreement(report: ProbeReport, tolerance: float, *, version: str) -> None:
    """Stop when the server does not hold what was sent. Raises `WeightMismatchError`: the mean gap is above
    `tolerance` (nats)."""
    if report.mean_gap <= tolerance:
        return
    raise WeightMismatchError(
        f"After weight version {version} was sent, the policy server's log-probabilities differ from the trainer's by "
        f"{report.mean_gap:.4f} nats on average (at most {report.max_gap:.3f}, {report.num_tokens} tokens); "
        f"{tolerance} is allowed. The weights did not arrive as they were sent, or the two compute in different "
        "precisions.",
        "Check that the server serves this model (architecture, tokenizer, no quantization), compare its dtype with "
        "the trainer's, and raise `gym_probe_tolerance` only if the gap is explained by precision.",
    )
