"""Transport `nccl`: the server runs on other GPUs, here or elsewhere, and weights are broadcast to its workers.

    rank 0, main thread    walks the stream (collectives stay here), copies each tensor into the handover
    rank 0, a thread       packs and broadcasts
    rank 0, a thread       waits for the answer of /update_weights
    other ranks            walk the stream

A collective with a peer that died never returns. So whichever side fails first, or the timeout, ends the send with an
error; what hangs is left to its daemon thread, and `disconnect` aborts the communicator.
"""

from __future__ import annotations

import ipaddress
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlsplit

from trl_gym.errors import TrlGymError, WeightSyncError
from trl_gym.policy_server.client import PolicyClient
from trl_gym.weight_sync import vllm_transfer

if TYPE_CHECKING:
    from trl_gym.weight_sync.protocol import WeightStream


# --------------------------------------------------------------------------------------------------------------------
# Work that has two ends, here and in the server, and must not hang when one of them fails.
#
#     main thread    walks the stream of weights, puts each tensor into the `Handover`, waits
#     thread         takes tensors from the `Handover` and sends them
#     thread         waits for the server's answer
#
# Threads are daemons: one that is stuck in a collective with a dead peer is left behind, and does not keep the process
# from ending.

T = TypeVar("T")


class Together:
    """Runs several pieces of work side by side; the first failure, or the deadline, ends the wait for all of them.

    Args:
        timeout_s: From now until all of them must be done.
        on_failure: Called once, from any thread, when one has failed.
    """

    def __init__(self, timeout_s: float, on_failure: Callable[[], None] = lambda: None) -> None:
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._on_failure = on_failure
        self._running: set[str] = set()
        self._outcomes: queue.SimpleQueue[tuple[str, Any, Exception | None]] = queue.SimpleQueue()

    @property
    def remaining_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def start(self, name: str, work: Callable[[], Any]) -> None:
        """Begin `work`; `name` says in messages what is being waited for."""

        def run() -> None:
            try:
                self._outcomes.put((name, work(), None))
            except Exception as error:  # raised by `wait`
                self._outcomes.put((name, None, error))  # before the others fail because of this one
                self._on_failure()

        self._running.add(name)
        threading.Thread(target=run, name=f"trl-gym: {name}", daemon=True).start()

    def wait(self) -> dict[str, Any]:
        """Wait for all that was started.

        Returns:
            What each returned, by name.

        Raises:
            WeightSyncError: Time is up.
            Exception: Of the first that failed.
        """
        results = {}
        while self._running:
            try:
                name, result, error = self._outcomes.get(timeout=self.remaining_s)
            except queue.Empty:
                self._on_failure()
                raise WeightSyncError(
                    f"Weights did not arrive within {self._timeout_s:g} s (`gym_sync_timeout`); still waiting for: "
                    f"{', '.join(sorted(self._running))}."
                ) from None
            self._running.remove(name)
            if error is not None:
                raise error
            results[name] = result
        return results


class HandoverClosedError(Exception):
    """Whoever takes from it is told that nothing more will come, and that what came is not all."""


class Handover(Generic[T]):
    """A queue between two threads that holds a bounded number of bytes.

    Args:
        max_bytes: Held at a time; a single item may be bigger, and is then alone.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._items: deque[tuple[T, int]] = deque()
        self._num_bytes = 0
        self._finished = self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T, num_bytes: int, timeout_s: float) -> bool:
        """Wait for room, then add the item.

        Returns:
            False when it was closed, or there was no room in time: nobody takes items any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(num_bytes), timeout_s)
            if self._closed or not self._has_room(num_bytes):
                return False
            self._items.append((item, num_bytes))
            self._num_bytes += num_bytes
            self._changed.notify_all()
            return True

    def finish(self) -> None:
        """That was the last item."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def close(self) -> None:
        """Give up: nothing is added or taken from here on, and what it holds is let go. Idempotent."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._num_bytes = 0
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        """Take items until the last one. Raises `HandoverClosedError` when it is closed before."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._finished or self._items)
                if self._closed:
                    raise HandoverClosedError
                if not self._items:
                    return
                item, num_bytes = self._items.popleft()
                self._num_bytes -= num_bytes
                self._changed.notify_all()
            yield item

    def _has_room(self, num_bytes: int) -> bool:
        return not self._items or self._num_bytes + num_bytes <= self._max_bytes


class NcclTransport:
    """Packed broadcast from rank 0's GPU to every worker of the server.

    Args:
        buffer_mb: Size of a packed buffer, in MB; two of them are in use at a time on each side, and as much again is
            held back for the thread that sends.
    """

    name = "nccl"
    replaces = True
    sends_part = True

    def __init__(self, buffer_mb: int = 512) -> None:
        self._buffer_bytes = buffer_mb * 10**6
        self._link: vllm_transfer.NcclLink | None = None

    def connect(self, client: PolicyClient) -> None:
        """Meet the server's workers.

        Raises:
            WeightSyncError: They did not come within the client's timeout, or NCCL failed.
            PolicyServerError: The server refused.
        """
        device = _device()
        world_size = client.world_size() + 1
        address = local_address(client.root_url)
        listener = socket.create_server((address, 0), family=_family(address))
        port = listener.getsockname()[1]
        info = vllm_transfer.nccl_init_info(
            address=address, port=port, world_size=world_size, buffer_bytes=self._buffer_bytes
        )
        both = Together(client.timeout_s)
        server = _own_client(client)
        both.start("the server, to join the NCCL group", lambda: server.init_weight_transfer(info))
        join = "the trainer, to join the NCCL group"
        both.start(
            join,
            lambda: vllm_transfer.join_nccl(
                listener, device=device, world_size=world_size, timeout_s=client.timeout_s
            ),
        )
        self._link = _named(both, f"The NCCL group of {world_size} at {address}:{port} could not be formed")[join]

    def disconnect(self) -> None:
        if self._link is not None:
            self._link.abort()
            self._link = None

    def send(self, weights: WeightStream, client: PolicyClient | None, version: str) -> int:
        if client is None:
            for _ in weights:
                pass
            return 0
        parameters = weights.metadata()
        handover: Handover[Any] = Handover(self._buffer_bytes)
        both = Together(client.timeout_s, on_failure=handover.close)
        stream = iter(weights)
        try:
            link = self._start(both, handover, parameters, client)
            is_wanted = True
            for name, tensor in stream:
                num_bytes = tensor.numel() * tensor.element_size()
                is_wanted = is_wanted and handover.put(
                    (name, vllm_transfer.staged(tensor, link.device)), num_bytes, both.remaining_s
                )
            handover.finish()
            _named(both, "The broadcast of weights failed")
        except BaseException:
            handover.close()
            self.disconnect()  # one side is in a collective that the other one left
            for _ in stream:  # nobody listens any more; the other ranks walk it to its end
                pass
            raise
        return sum(one.num_bytes for one in parameters)

    def release(self) -> None:
        """The buffers are freed when `send` returns."""

    def _start(
        self, both: Together, handover: Handover[Any], parameters: list[Any], client: PolicyClient
    ) -> vllm_transfer.NcclLink:
        link = self._link
        if link is None:
            raise WeightSyncError("The NCCL group was given up after a failure; the policy server must be restarted.")
        info = vllm_transfer.nccl_update_info(parameters)
        server = _own_client(client)
        both.start("the server, to load the weights", lambda: server.update_weights(info))
        both.start("the broadcast", lambda: vllm_transfer.broadcast(link, handover, self._buffer_bytes))
        return link


def local_address(url: str) -> str:
    """The address of this machine under which a server sees it: that of the interface which leads there.

    Args:
        url: The server's, e.g. `"http://10.0.0.7:8000"`.

    Raises:
        WeightSyncError: The name cannot be resolved, or no route leads there.
    """
    parts = urlsplit(url)
    try:
        target = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(target[0], socket.SOCK_DGRAM) as probe:
            probe.connect(target[4])  # sends nothing; chooses the interface
            return str(probe.getsockname()[0])
    except OSError as error:
        raise WeightSyncError(f"No way leads from here to the policy server at {url} ({error}).") from error


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET


def _device() -> int:
    import torch

    try:
        return int(torch.cuda.current_device())
    except (AssertionError, RuntimeError) as error:
        raise WeightSyncError(f"`nccl` needs a CUDA device in the trainer's process ({error}).") from error


def _own_client(client: PolicyClient) -> PolicyClient:
    """For another thread: connections are not shared between threads."""
    return PolicyClient(client.base_url, api_key=client.api_key, timeout_s=client.timeout_s)


def _named(both: Together, what: str) -> dict[str, Any]:
    """Wait; an error of NCCL or torch becomes one of ours."""
    try:
        return both.wait()
    except TrlGymError:
        raise
    except Exception as error:
        raise WeightSyncError(f"{what}: {error}") from error
