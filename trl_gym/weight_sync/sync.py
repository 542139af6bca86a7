"""One weight sync, agreed on by all ranks:

    rank 0     pause ── start ──┐               ┌── finish(version) ── reset caches ── resume ──┐
    all ranks                   └── transfer ───┘                                               └── probe, sometimes

A transfer that fails leaves the server paused: resuming it would serve half-updated weights. The probe comes after the
resume, because it asks the server to compute; when it finds a mismatch, training stops. A transport that does not
touch weights in service (`adapter`) needs no pause.

Whatever fails on rank 0 is raised on every rank, and no rank is left in a collective: a transport walks its stream to
the end even when nobody listens any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from accelerate.utils import gather_object

from trl_gym.errors import WeightMismatchError, WeightSyncError
from trl_gym.ranks import agree, on_main
from trl_gym.weight_sync.source import WeightSource
from trl_gym.weight_sync.sums import explain, sent_sums
from trl_gym.weight_sync.transports.adapter import AdapterSource

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from trl_gym.memory.sharing import DeviceSharing
    from trl_gym.policy_server.client import PolicyClient
    from trl_gym.policy_server.server import PolicyBackend
    from trl_gym.weight_sync.transports import WeightStream, WeightTransport


# --------------------------------------------------------------------------------------------------------------------
# Does the server compute what the trainer computes? Asked by behaviour, not by status codes.
#
# An update can be answered with 200 and still not arrive: wrong names are skipped, tied embeddings keep an old copy, a
# cache survives. So the log-probabilities of one fixed batch of tokens are computed on both sides and compared.

_NUM_PROBES = 4
_PROBE_TOKENS = 48


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Result of one comparison.

    Attributes:
        mean_gap: Mean absolute difference of log-probabilities, in nats.
        max_gap: Largest absolute difference, in nats.
        num_tokens: Tokens compared.
    """

    mean_gap: float
    max_gap: float
    num_tokens: int


def probe_batch(vocab_size: int, prompts: Sequence[Sequence[int]] = (), seed: int = 0) -> list[list[int]]:
    """A fixed batch of token sequences, `[4][48]`.

    Args:
        vocab_size: Ids are drawn below it.
        prompts: Token sequences to begin with (real prompts exercise the part of the weights that matters); cut or
            filled up with random ids.
        seed: For the random ids.
    """
    import random

    rng = random.Random(seed)
    batch = []
    for index in range(_NUM_PROBES):
        start = list(prompts[index][:_PROBE_TOKENS]) if index < len(prompts) else []
        batch.append(start + [rng.randrange(vocab_size) for _ in range(_PROBE_TOKENS - len(start))])
    return batch


def trainer_logprobs(model: torch.nn.Module, batch: Sequence[Sequence[int]]) -> list[list[float]]:
    """log p(token t | tokens before it) at temperature 1, `[N][T - 1]`. Every rank calls it (FSDP gathers inside)."""
    import torch

    ids = torch.tensor(batch, device=next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    finally:
        model.train(was_training)
    return torch.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None]).squeeze(2).tolist()


def compare(trainer: Sequence[Sequence[float]], server: Sequence[Sequence[float]]) -> ProbeReport:
    """Differences between the two sides; both `[N][T - 1]`."""
    gaps = [abs(a - b) for left, right in zip(trainer, server, strict=True) for a, b in zip(left, right, strict=True)]
    return ProbeReport(mean_gap=sum(gaps) / len(gaps), max_gap=max(gaps), num_tokens=len(gaps))


def require_agreement(report: ProbeReport, tolerance: float, *, version: str) -> None:
    """Stop when the server does not hold what was sent.

    Raises:
        WeightMismatchError: The mean gap is above `tolerance` (nats).
    """
    if report.mean_gap <= tolerance:
        return
    raise WeightMismatchError(
        f"After weight version {version} was sent, the policy server's log-probabilities differ from the trainer's by "
        f"{report.mean_gap:.4f} nats on average (at most {report.max_gap:.3f}, {report.num_tokens} tokens); "
        f"{tolerance} is allowed. The weights did not arrive as they were sent, or the two compute in different "
        "precisions. Check that the server serves this model (architecture, tokenizer, no quantization), compare its "
        "dtype with the trainer's, and raise `gym_probe_tolerance` only if the gap is explained by precision."
    )


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """How weights are pushed; see the options of the same names in `GymGRPOConfig`.

    Attributes:
        dtype: Precision that the server computes in; None sends the trainer's.
        pause_mode: What happens to requests that are being answered.
        only_trainable: Whether syncs after a complete one send only what is trained.
        timeout_s: For each call to the server.
        verify_every: Steps after which a probe is made again; 0 for never.
        probe_tolerance: Mean absolute gap in nats that a probe may find.
    """

    dtype: torch.dtype | None = None
    pause_mode: Literal["wait", "keep"] = "wait"
    only_trainable: bool = False
    timeout_s: float = 600.0
    verify_every: int = 0
    probe_tolerance: float = 0.02


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one sync cost.

    Attributes:
        version: Weight version that the server holds now.
        seconds: By phase: `pause`, `transfer`, `finish` (with the caches' reset and the resume), `probe`.
        num_bytes: Bytes handed over.
        probe: Behavioural comparison; None when none was made, and on ranks other than 0.
    """

    version: str
    seconds: dict[str, float]
    num_bytes: int
    probe: ProbeReport | None


class WeightSync:
    """Pushes the trainer's weights to the policy server. Every rank has one and calls `push` in step.

    Args:
        accelerator: The trainer's.
        server: The policy server; its control plane is used on rank 0 only.
        transport: How the weights travel.
        options: See there.
        sharing: Puts the server's memory in place before weights come; None where the server never sleeps.
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
        self._verified_at: int | None = None

    def disconnect(self) -> None:
        """The server is another one now: the next push agrees with it anew, sends everything and is verified."""
        self.transport.disconnect()
        self._connected = self._complete = False
        self._verified_at = None

    def push(self, model: torch.nn.Module, step: int) -> SyncReport:
        """Send the model's weights and have the server sample with them.

        Args:
            model: The trainer's model, wrapped or not.
            step: Optimizer steps in it; the weight version stamped on everything that is sampled from here on.

        Raises:
            PolicyServerError: The server refused, died or did not answer; it is not resumed.
            WeightSyncError: The weights could not be sent, or the server reports another version afterwards.
            WeightMismatchError: The weights arrived and the server computes something else.
        """
        version = str(step)
        seconds: dict[str, float] = {}
        is_due = self._is_due(step)
        partial = self._options.only_trainable and self._complete and self.transport.sends_part
        weights = self._weights(model, partial)
        with self._phase("pause", seconds):
            if self._sharing is not None:
                self._sharing.before_sync()
            self._on_main(self._begin)
        try:
            with self._phase("transfer", seconds):
                num_bytes = self._transfer(weights, version)
            with self._phase("finish", seconds):
                self._on_main(lambda client: self._install(client, version))
                if self._sharing is not None:
                    self._sharing.pushed()
                    self._sharing.before_sampling()
                self._on_main(self._resume)
        finally:
            self.transport.release()
        self._complete = True
        probe = None
        if is_due:
            with self._phase("probe", seconds):
                probe = self._verify(model, version)
            self._verified_at = step
            if self._sharing is not None:
                self._sharing.verified()
        return SyncReport(version, seconds, num_bytes, probe)

    def _weights(self, model: torch.nn.Module, partial: bool) -> WeightStream:
        if self.transport.name == "adapter":
            return AdapterSource(model, self._accelerator)
        return WeightSource(model, self._accelerator, dtype=self._options.dtype, only_trainable=partial)

    def _begin(self, client: PolicyClient) -> None:
        if not self._connected:
            self.transport.connect(client)
            self._connected = True
        if self.transport.replaces:
            client.pause(self._options.pause_mode)
            client.start_weight_update()

    def _transfer(self, weights: WeightStream, version: str) -> int:
        error: Exception | None = None
        num_bytes = 0
        try:
            num_bytes = self.transport.send(weights, self._client, version)
        except Exception as caught:  # raised below, once the other ranks know
            error = caught
        self._agree(error)
        return num_bytes

    def _install(self, client: PolicyClient, version: str) -> None:
        if self.transport.replaces:
            client.finish_weight_update(version)
            client.reset_caches(running=self._options.pause_mode == "keep")
        held = client.weight_version()
        if held != version:
            stays = "; it stays paused" if self.transport.replaces else ""
            raise WeightSyncError(
                f"Weight version {version} was sent and the policy server says that it holds {held!r}{stays}."
            )

    def _resume(self, client: PolicyClient) -> None:
        if self.transport.replaces:
            client.resume()

    def _is_due(self, step: int) -> bool:
        if self._sharing is not None and self._sharing.needs_probe:
            return True
        every = self._options.verify_every
        return self._verified_at is None or (every > 0 and step - self._verified_at >= every)

    def _verify(self, model: torch.nn.Module, version: str) -> ProbeReport | None:
        unwrapped = self._accelerator.unwrap_model(model)
        batch = probe_batch(unwrapped.config.get_text_config().vocab_size)
        ours = trainer_logprobs(model, batch)
        reports = []

        def ask(client: PolicyClient) -> None:
            report = compare(ours, client.prompt_logprobs(batch))
            require_agreement(report, self._options.probe_tolerance, version=version)
            reports.append(report)

        try:
            self._on_main(ask)
        except WeightMismatchError as error:
            if not self.transport.replaces:
                raise
            raise WeightMismatchError(f"{error}{self._explain(model, unwrapped)}") from error
        return reports[0] if reports else None

    def _explain(self, model: torch.nn.Module, unwrapped: torch.nn.Module) -> str:
        """Which parameters differ, as far as it can be told. Every rank calls it in step."""
        dtype = self._options.dtype or next(unwrapped.parameters()).dtype
        sums = sent_sums(WeightSource(model, self._accelerator, dtype=dtype))
        return "" if self._client is None else f"\n{explain(self._client, sums, dtype)}"

    # -- ranks --------------------------------------------------------------------------------------------------------

    @property
    def _client(self) -> PolicyClient | None:
        """The control plane with the sync's timeout on rank 0, None on others."""
        if not self._accelerator.is_main_process:
            return None
        return self._server.client.patient(self._options.timeout_s)

    def _on_main(self, work: Callable[[PolicyClient], None]) -> None:
        """Ask the server for something, with the sync's timeout."""
        on_main(self._accelerator, lambda: work(self._server.client.patient(self._options.timeout_s)))

    def _agree(self, error: Exception | None) -> None:
        agree(error, self._accelerator.process_index, gather_object)

    @contextmanager
    def _phase(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        started = time.monotonic()
        yield
        seconds[name] = time.monotonic() - started
