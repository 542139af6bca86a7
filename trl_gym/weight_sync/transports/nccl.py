"""Transport `nccl`: the server runs on other GPUs, here or elsewhere, and weights are broadcast to its workers.

    rank 0, main thread    walks the stream (collectives stay here), copies each tensor into a bounded queue
    rank 0, a thread       takes them from there, packs and broadcasts
    rank 0, a thread       waits for the answer of /update_weights
    other ranks            walk the stream

A collective with a peer that died never returns. So the side that fails first, or the timeout, ends the send with an
error. A thread that hangs is a daemon: it is left behind and does not keep the process from ending. `disconnect`
aborts the communicator.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

import torch

from trl_gym.errors import TrlGymError, WeightSyncError
from trl_gym.policy_server.client import PolicyClient
from trl_gym.processes import bind_socket
from trl_gym.weight_sync import vllm_transfer

if TYPE_CHECKING:
    from trl_gym.weight_sync.protocol import WeightMeta, WeightStream


T = TypeVar("T")


class Link(Protocol):
    """A connection to the server's workers.

    Attributes:
        device: Index of our GPU.
    """

    @property
    def device(self) -> Any: ...
    def abort(self) -> None:
        """End collectives that hang. Returns at once."""


class Transfer(Protocol):
    """What the engine of the server decides: `vllm_transfer` and `sglang_transfer` are two, and say the rest."""

    def own_device(self) -> Any: ...
    def nccl_init_info(self, *, address: str, port: int, world_size: int, buffer_bytes: int) -> dict[str, Any]: ...
    def nccl_update_infos(self, parameters: Iterable[WeightMeta], buffer_bytes: int) -> list[dict[str, Any]]: ...
    def join_nccl(self, listener: socket.socket, *, device: Any, world_size: int, timeout_s: float) -> Any: ...
    def staged(self, tensor: torch.Tensor, device: Any) -> Any: ...
    def broadcast(self, link: Any, tensors: Iterable[tuple[str, Any]], buffer_bytes: int) -> None: ...


class ThreadGroup:
    """Runs several pieces of work side by side; the first failure, or the deadline, ends the wait for all of them.

    Args:
        timeout_s: Seconds from now until all of them must be done.
        on_failure: Called from any thread when one has failed, or time is up.
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
        """Start a thread; its name says in messages what is being waited for."""

        def run() -> None:
            try:
                self._outcomes.put((name, work(), None))
            except Exception as error:  # raised by `wait`
                self._outcomes.put((name, None, error))  # before the others fail because of this one
                self._on_failure()

        self._running.add(name)
        threading.Thread(target=run, name=f"trl-gym: {name}", daemon=True).start()

    def wait(self) -> dict[str, Any]:
        """Wait for all threads. Returns their results by name. Raises `WeightSyncError`: time is up; `Exception`: the
        error of the first that failed."""
        results = {}
        while self._running:
            try:
                name, result, error = self._outcomes.get(timeout=self.remaining_s)
            except queue.Empty:
                self._on_failure()
                late = WeightSyncError(
                    f"Weights did not arrive within {self._timeout_s:g} s; still waiting for: "
                    f"{', '.join(sorted(self._running))}.",
                    "Set `gym_sync_timeout` higher if the transfer is only slow.",
                )
                late.silent_s = self._timeout_s
                raise late from None
            self._running.remove(name)
            if error is not None:
                raise error
            results[name] = result
        return results


class QueueClosedError(Exception):
    """Raised to the consumer: nothing more will come, and what came is not all."""


class BoundedQueue(Generic[T]):
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
        """Wait for room, then add the item. Returns false when the queue was closed, or there was no room in time: no
        one takes items any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(num_bytes), timeout_s)
            if self._closed or not self._has_room(num_bytes):
                return False
            self._items.append((item, num_bytes))
            self._num_bytes += num_bytes
            self._changed.notify_all()
            return True

    def finish(self) -> None:
        """End the queue after the items that it holds."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def close(self) -> None:
        """Give up: nothing is added or taken any more, and the items that it holds are dropped. Idempotent."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._num_bytes = 0
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        """Take items until the last one. Raises `QueueClosedError` when the queue is closed before."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._finished or self._items)
                if self._closed:
                    raise QueueClosedError
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
        transfer: The engine's part.
    """

    name = "nccl"
    replaces = True

    def __init__(self, buffer_mb: int = 512, transfer: Transfer = vllm_transfer) -> None:
        self._buffer_bytes = buffer_mb * 10**6
        self._transfer = transfer
        self._link: Link | None = None

    def connect(self, client: PolicyClient) -> None:
        """Meet the server's workers. Raises `WeightSyncError`: they did not come within the client's timeout, or NCCL
        failed; `PolicyServerError`: the server refused."""
        device = self._device()
        world_size = client.world_size() + 1
        address = local_address(client.root_url)
        listener = bind_socket(address)
        port = listener.getsockname()[1]
        info = self._transfer.nccl_init_info(
            address=address, port=port, world_size=world_size, buffer_bytes=self._buffer_bytes
        )
        threads = ThreadGroup(client.timeout_s)
        server = _own_client(client)
        threads.start("the server, to join the NCCL group", lambda: server.init_weight_transfer(info))
        join = "the trainer, to join the NCCL group"
        threads.start(
            join,
            lambda: self._transfer.join_nccl(
                listener, device=device, world_size=world_size, timeout_s=client.timeout_s
            ),
        )
        self._link = _named(threads, f"The NCCL group of {world_size} at {address}:{port} could not be formed")[join]

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
        outgoing: BoundedQueue[Any] = BoundedQueue(self._buffer_bytes)
        threads = ThreadGroup(client.timeout_s, on_failure=outgoing.close)
        stream = iter(weights)
        try:
            link = self._start(threads, outgoing, parameters, client)
            is_wanted = True
            for name, tensor in stream:
                num_bytes = tensor.numel() * tensor.element_size()
                is_wanted = is_wanted and outgoing.put(
                    (name, self._transfer.staged(tensor, link.device)), num_bytes, threads.remaining_s
                )
            outgoing.finish()
            _named(threads, "The broadcast of weights failed")
        except BaseException:
            outgoing.close()
            self.disconnect()  # one side is in a collective that the other one left
            for _ in stream:  # no one listens any more; the other ranks walk it to its end
                pass
            raise
        return sum(one.num_bytes for one in parameters)

    def release(self) -> None:
        """The buffers are freed when `send` returns."""

    def _start(
        self, threads: ThreadGroup, outgoing: BoundedQueue[Any], parameters: list[Any], client: PolicyClient
    ) -> Link:
        link = self._link
        if link is None:
            raise WeightSyncError("The NCCL group was given up after a failure.", "Restart the policy server.")
        infos = self._transfer.nccl_update_infos(parameters, self._buffer_bytes)
        server = _own_client(client)

        def load() -> None:
            for info in infos:
                server.update_weights(info)

        threads.start("the server, to load the weights", load)
        threads.start("the broadcast", lambda: self._transfer.broadcast(link, outgoing, self._buffer_bytes))
        return link

    def _device(self) -> Any:
        try:
            return self._transfer.own_device()
        except (AssertionError, RuntimeError) as error:
            raise WeightSyncError(
                f"`nccl` needs a CUDA device in the trainer's process ({error}).", "Use `gym_weight_transport: file`."
            ) from error


def local_address(url: str) -> str:
    """Return the address of this machine under which a server sees it: that of the interface which leads there.

    Args:
        url: URL of the server, e.g. `"http://10.0.0.7:8000"`.

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
        raise WeightSyncError(
            f"No way leads from here to the policy server at {url} ({error}).", "Check the network of the two hosts."
        ) from error


def _own_client(client: PolicyClient) -> PolicyClient:
    """Make a client for another thread: connections are not shared between threads."""
    return PolicyClient(client.base_urls, api_key=client.api_key, timeout_s=client.timeout_s)


def _named(threads: ThreadGroup, what: str) -> dict[str, Any]:
    """Wait, and turn an error of NCCL or torch into one of ours."""
    try:
        return threads.wait()
    except TrlGymError:
        raise
    except Exception as error:
        raise WeightSyncError(f"{what}: {error}", "Look into the policy server's log.") from error
