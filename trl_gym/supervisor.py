"""Stand between us and one server, so that the server cannot outlive us. Standard library only; run as a script, or
in a process that was forked for it (`trl_gym.policy_server.engine.forking`).

    trainer ──pipe──► guard ──► supervisor ──► server (own session) ──► its own children

The trainer holds the write end of a pipe and never writes. When the trainer ends, in whatever way, the kernel closes
it; the supervisor then sends SIGINT to the server's process group, waits `grace_s`, and kills what is left. A
parent-death signal alone would not do: it is tied to the *thread* that forked, so a server started from a worker
thread would die with that thread, and it does not reach grandchildren such as vLLM's engine process. The supervisor
declares itself sub-reaper, so grandchildren that lose their parent, or leave the session, are found and killed too.
The guard is the same for the supervisor: it inherits what a killed supervisor leaves, and kills it. The supervisor
ends its server when the guard is gone, and the guard lets a supervisor go on that someone has stopped.

    python supervisor.py DEATH_FD GRACE_S ADOPTS SCRATCH [FD …] -- COMMAND [ARG …]

ADOPTS is 0 for a fork server, whose forks have supervisors of their own and outlive it; else 1. SCRATCH is a folder of
the server's own, which the last of these processes removes; empty if it has none.

Exit status: that of the command (128 + n if signal n ended it).
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
OPEN_FILES = 65_536  # as vLLM does; some programs walk through all numbers below their limit
KILL_S = 2.5  # until all are killed
REAP_S = 3.0  # for memory and devices of killed processes
POLL_S = 1.0  # how often the owner's pid is looked at, for a pipe end that leaked into a forked process


class Child(Protocol):
    """The server, a child of this process and the leader of its own session. `subprocess.Popen` is one."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


def prctl(option: int, value: int) -> None:
    """Call `prctl`. Linux only; elsewhere the pipe and the process group have to suffice."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def raise_open_files() -> int:
    """Raise the soft limit of open files of this process and its children, usually 1,024, towards the hard one.

    Returns:
        The soft limit from now on.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    while soft != resource.RLIM_INFINITY and wanted > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
        except (ValueError, OSError):  # macOS has another limit below an infinite hard one
            wanted //= 2
    return soft


def prepare_child() -> None:
    """Run in the child before exec: die with the supervisor, and undo an inherited `nohup`-style SIGINT."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def descendants(root: int) -> list[int]:
    """Return the pids of all live processes below `root`, from /proc; none where /proc does not exist."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{entry}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
                if fields[0] != "Z":
                    children.setdefault(int(fields[1]), []).append(int(entry))
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def is_stopped(pid: int) -> bool:
    """Return whether someone has stopped a process (SIGSTOP, Ctrl-Z, a debugger). False where /proc does not exist."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] in ("T", "t")
    return False


def is_tracker(pid: int) -> bool:
    """Return whether a process is Python's resource tracker, which removes shared memory of others that have ended."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as words:
        return b"multiprocessing.resource_tracker" in words.read()
    return False


def exists(pid: int) -> bool:
    """Return whether there is such a process; one that has ended and is not waited for is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"
    return True


def kill_everything(group: int | None, *, adopts: bool) -> None:
    """SIGKILL the group, if there is one, and, if this process adopts them, every descendant until none is left.

    Trackers have the first half of the time to end by themselves, once those whose memory they track are gone.
    """
    deadline = time.monotonic() + KILL_S
    while (now := time.monotonic()) < deadline:
        alive = descendants(os.getpid()) if adopts else []
        spared = [pid for pid in alive if now < deadline - KILL_S / 2 and is_tracker(pid)]
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if group is not None and not spared:
                os.killpg(group, signal.SIGKILL)
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                if pid not in spared:
                    os.kill(pid, signal.SIGKILL)
        if not alive:
            return
        time.sleep(0.05)


def reap_everything() -> None:
    """Wait for what was killed. Zombies that this process has adopted would be the next sub-reaper's, which may live
    long and reaps none. A process whose first thread has ended looks like one before the kernel gives it up."""
    deadline = time.monotonic() + REAP_S
    with contextlib.suppress(ChildProcessError):  # none is left
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)


def remove(scratch: str) -> None:
    """Remove the folder of a server that has ended: of one that was killed, its sockets are there. Idempotent."""
    if scratch and os.path.isdir(scratch):
        import shutil  # not needed before, and a supervisor is to start at once

        shutil.rmtree(scratch, ignore_errors=True)


def guard(
    pass_fds: Sequence[int], tell: Callable[[int], None] = lambda status: None, *, scratch: str = ""
) -> int | None:
    """Fork, and return in the new process, which is to be the supervisor. The old one stays behind: it waits for the
    supervisor, kills all that a killed one leaves, tells the exit status, and exits with it.

    Args:
        pass_fds: Descriptors for the server; closed in the process that stays.
        tell: Called with the exit status, in the process that stays.
        scratch: Folder that is removed in the process that stays, at the end; empty for none.

    Returns:
        Pid of the process that stays; None outside of Linux, where nothing is inherited and this does nothing.
    """
    if sys.platform != "linux":
        return None
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    awaited = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, statuses are lost
    before = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    stays = os.getpid()
    pid = os.fork()
    if pid == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return stays
    for fd in pass_fds:
        os.close(fd)  # what the owner gave the server is closed when the server has ended
    while (status := _status_of(pid)) is None:
        if signal.sigwait(awaited) != signal.SIGCHLD:
            os.kill(pid, signal.SIGTERM)
    if status < 0:
        status = 128 - status
        kill_everything(None, adopts=True)
        reap_everything()
    remove(scratch)
    tell(status)
    os._exit(status)


def let_go_on(pid: int | None) -> None:
    """Undo a SIGSTOP, if there was one."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _status_of(pid: int) -> int | None:
    """Return the exit status of a child, None while it runs; let it go on if it was stopped."""
    ended, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
    if not ended:
        return None
    if os.WIFSTOPPED(status):
        let_go_on(pid)
        return None
    return os.waitstatus_to_exitcode(status)


def supervise(
    death_fd: int,
    grace_s: float,
    start: Callable[[], Child],
    *,
    owner: int,
    guarded_by: int | None = None,
    adopts: bool = True,
    scratch: str = "",
) -> int:
    """Start the server, and end it when the pipe closes, or a signal asks for it, or the owner ends.

    Args:
        death_fd: Read end of the pipe whose write end the owner holds.
        grace_s: Seconds from SIGINT to SIGKILL.
        start: Starts the server; called once, in the main thread.
        owner: Pid of the owner.
        guarded_by: Pid from `guard`.
        adopts: Whether the server's descendants end with it, those too that have left its process group.
        scratch: Folder of the server's own, removed at the end: the guard may be gone. Empty for none.

    Returns:
        The server's exit status, or 128 + n if signal n ended it.
    """
    prctl(PR_SET_CHILD_SUBREAPER, int(adopts))
    raise_open_files()
    asked_to_stop = False

    def on_signal(_signum: int, _frame: object) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    wakeup_read, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    signal.set_wakeup_fd(wakeup_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    child = start()
    while child.poll() is None and not asked_to_stop and exists(owner) and guarded_by in (None, os.getppid()):
        ready, _, _ = select.select([death_fd, wakeup_read], [], [], POLL_S)
        if death_fd in ready:
            break
        if wakeup_read in ready:
            os.read(wakeup_read, 4096)
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=grace_s)
    kill_everything(child.pid, adopts=adopts)
    status = child.wait()
    reap_everything()
    remove(scratch)
    let_go_on(guarded_by)  # it tells the status
    return status if status >= 0 else 128 - status


def main(death_fd: int, grace_s: float, adopts: bool, scratch: str, pass_fds: list[int], command: list[str]) -> int:
    owner = os.getppid()
    guarded_by = guard(pass_fds, scratch=scratch) if adopts else None

    def start() -> Child:
        child = subprocess.Popen(command, start_new_session=True, pass_fds=pass_fds, preexec_fn=prepare_child)
        for fd in pass_fds:
            os.close(fd)
        return child

    return supervise(death_fd, grace_s, start, owner=owner, guarded_by=guarded_by, adopts=adopts, scratch=scratch)


if __name__ == "__main__":
    separator = sys.argv.index("--")
    death, grace, adopting, own, *fds = sys.argv[1:separator]
    command = sys.argv[separator + 1 :]
    sys.exit(main(int(death), float(grace), adopting == "1", own, [int(fd) for fd in fds], command))
