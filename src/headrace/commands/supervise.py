"""Run a command so that nothing of it outlives us, and so that a stop is orderly.

Every command gets a leash (see ``leash.py``): a process group of its own that is stopped when we
ask, when we fail, and when we are killed with SIGKILL. Output goes to a log file, of which the tail
is kept for messages. Cost: one small process and about 30 ms per command.

SIGINT, SIGTERM and SIGHUP become ``Stopped`` in the main thread (``stop_on_signals``), so that one
``finally`` serves a Ctrl-C, a scheduler's stop and an error alike.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from headrace.commands import leash
from headrace.errors import DependencyError, ResourceError, Stopped

GRACE_S = 15.0  # a stage may take 10 s to write its checkpoint
_TAIL_LINES = 40
_LEASH_MARGIN_S = 5.0  # beyond the grace, before the leash itself is taken for dead
_PARENT_POLL_S = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Finished:
    """How a supervised command ended; ``exit_code`` is 128 + the signal's number if killed."""

    exit_code: int
    seconds: float
    tail: str
    log: Path


class Child:
    """A command on its leash; ``wait`` and ``stop`` may be called from any thread, repeatedly."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        log: Path,
        env: Mapping[str, str],
        grace_s: float = GRACE_S,
        held: Sequence[int] = (),
    ) -> None:
        """Start ``command``.

        Args:
            command: program and arguments; no shell.
            cwd: its working directory.
            log: where its output is appended.
            env: its whole environment.
            grace_s: seconds between SIGTERM and SIGKILL.
            held: descriptors (a lock, another's ``hold``) kept open until the group is gone.
        """
        self.log = log
        self.command = tuple(command)
        self.pid: int | None = None  # of the command, once the leash has told it
        self._started = time.monotonic()
        self._grace_s = grace_s
        self._exit_code: int | None = None
        self._fault = ""
        self._ended = threading.Event()
        log.parent.mkdir(parents=True, exist_ok=True)
        self._socket, far_end = socket.socketpair()
        with far_end, log.open("ab") as output:
            self._log_start = output.tell()
            leashed = [sys.executable, "-I", "-S", leash.__file__]
            self._leash = subprocess.Popen(
                [*leashed, str(far_end.fileno()), str(grace_s), *command],
                cwd=cwd,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches us alone; we stop it in order
                pass_fds=(far_end.fileno(), *held),
            )
        threading.Thread(target=self._listen, name="leash", daemon=True).start()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Return the exit code once the whole group is gone, or None after ``timeout_s``.

        Raises:
            DependencyError: if the program could not be started at all.
        """
        if not self._ended.wait(timeout_s):
            return None
        if self._fault:
            raise DependencyError(f"cannot start {self.command[0]}: {self._fault}")
        return self._exit_code

    def stop(self) -> None:
        """Stop the group: SIGTERM, the grace, SIGKILL; returns when it is gone."""
        if self._ended.is_set():
            return
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)  # the leash takes this as the request
        if not self._ended.wait(self._grace_s + _LEASH_MARGIN_S):
            self._kill()
            self._ended.wait(_LEASH_MARGIN_S)

    def tail(self, num_lines: int = _TAIL_LINES) -> str:
        """Return the last lines that this command wrote to its log."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            lines = deque(file, maxlen=num_lines)
        return b"".join(lines).decode(errors="replace")

    @property
    def hold(self) -> int:
        """A descriptor that keeps this command running: as ``held`` of another, until that ends."""
        return self._socket.fileno()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def _listen(self) -> None:
        """Take in what the leash says, until it is gone."""
        with self._socket, self._socket.makefile("r", encoding="utf-8") as told:
            for line in told:
                word, _, rest = line.rstrip("\n").partition(" ")
                if word == "pid":
                    self.pid = int(rest)
                elif word == "exit":
                    self._exit_code = int(rest)
                elif word == "error":
                    self._fault = rest
            if self._exit_code is None and not self._fault:  # the leash itself was killed
                self._kill()
                self._exit_code = 128 + signal.SIGKILL
            self._leash.wait()
        self._ended.set()

    def _kill(self) -> None:
        for group in (self.pid, self._leash.pid):
            if group is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signal.SIGKILL)


def run(
    command: Sequence[str],
    *,
    cwd: Path,
    log: Path,
    env: Mapping[str, str],
    timeout_s: float | None = None,
    grace_s: float = GRACE_S,
    held: Sequence[int] = (),
    group: "Group | None" = None,
) -> Finished:
    """Run ``command`` to its end; whatever is raised here, its process group is gone first.

    Raises:
        ResourceError: if it takes longer than ``timeout_s``.
        DependencyError: if the program cannot be started.
        Stopped: if ``group`` was stopped meanwhile.
    """
    with (group or Group()).start(
        command, cwd=cwd, log=log, env=env, grace_s=grace_s, held=held
    ) as child:
        code = child.wait(timeout_s)
        if code is None:
            raise ResourceError(
                f"`{' '.join(command)}` did not end within {timeout_s:g} s and was stopped; "
                f"raise its timeout, or see {log}"
            )
    if group is not None and group.is_stopped:
        raise Stopped("stopped; run again to resume")
    return Finished(exit_code=code, seconds=child.seconds, tail=child.tail(), log=log)


class Group:
    """The commands that one run has going, in whatever threads; stopped together."""

    def __init__(self) -> None:
        self.is_stopped = False
        self._children: set[Child] = set()
        self._guard = threading.Lock()

    @contextlib.contextmanager
    def start(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        log: Path,
        env: Mapping[str, str],
        grace_s: float = GRACE_S,
        held: Sequence[int] = (),
    ) -> Iterator[Child]:
        """Start ``command`` and stop it at the end of the block, if it still runs.

        Raises:
            Stopped: if the group was stopped before.
        """
        with self._guard:
            if self.is_stopped:
                raise Stopped("stopped; run again to resume")
            child = Child(command, cwd=cwd, log=log, env=env, grace_s=grace_s, held=held)
            self._children.add(child)
        try:
            yield child
        finally:
            child.stop()
            with self._guard:
                self._children.discard(child)

    def stop(self) -> None:
        """Stop all commands at once, and let none start any more."""
        with self._guard:
            self.is_stopped = True
            children = list(self._children)
        stoppers = [threading.Thread(target=child.stop) for child in children]
        for stopper in stoppers:
            stopper.start()
        for stopper in stoppers:
            stopper.join()


@contextlib.contextmanager
def stop_on_signals(message: str) -> Iterator[None]:
    """Within the block the first SIGINT, SIGTERM or SIGHUP raises ``Stopped(message)``.

    Later ones are ignored, so that impatience does not cut the orderly stop short. For the main
    thread only.
    """
    is_stopping = False

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal is_stopping
        if not is_stopping:
            is_stopping = True
            sys.stderr.write("\nstopping: stages get some seconds to keep their checkpoints\n")
            raise Stopped(message)

    before = {number: signal.signal(number, on_signal) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """Make this process get SIGTERM when its parent ends, however it ends.

    Linux does it in the kernel; elsewhere a thread watches the parent's id.
    """
    if sys.platform == "linux":
        leash.die_with_parent_linux()
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
