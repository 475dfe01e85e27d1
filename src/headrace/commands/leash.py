"""A small process between a supervisor and its command: when the one is gone, so is the other.

Run by path with ``python -I -S`` and nothing but the standard library, so that it starts in
milliseconds and holds a few megabytes:

    leash.py FD GRACE_S COMMAND...

``FD`` is one end of a socket pair. The command gets a process group of its own. When the other end
closes, because the supervisor asks for a stop or because it was killed in whatever way, the group
gets SIGTERM and, after the grace, SIGKILL. This needs no cooperation from the command and works on
Linux and macOS alike. On Linux the command also gets PR_SET_PDEATHSIG, in case the leash itself is
killed, and orphans become children of the leash: those that left the group (Prefect's flow runs do)
are stopped too, and none stays a zombie that looks alive.
Told over the socket: ``pid N`` at the start, ``exit CODE`` when nothing is left.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.02  # only while a group is being stopped
_AFTERMATH_S = 1.0  # helpers that outlive the command (resource trackers) may clean up this long


def die_with_parent_linux() -> None:
    """Ask the kernel for SIGTERM when the parent thread ends (Linux; elsewhere nothing)."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> int:
    """Run the command on the leash and return 0; the command's own code goes over the socket."""
    supervisor = socket.socket(fileno=int(sys.argv[1]))
    grace_s = float(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, _stay)  # a handler, not SIG_IGN: the command must not inherit it
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = subprocess.Popen(
            sys.argv[3:],
            process_group=0,
            preexec_fn=die_with_parent_linux,
            stdin=subprocess.DEVNULL,
        )
    except OSError as error:
        _tell(supervisor, f"error {error}")
        return 1
    _tell(supervisor, f"pid {child.pid}")
    while _reap(child) is None:
        ready, _, _ = select.select([supervisor, woken], [], [])
        if woken in ready:
            woken.recv(64)
        if supervisor in ready and _is_closed(supervisor):
            _clear(child, patience_s=0.0, grace_s=grace_s)
    _clear(child, patience_s=_AFTERMATH_S, grace_s=grace_s)
    code = child.returncode
    _tell(supervisor, f"exit {code if code >= 0 else 128 - code}")
    return 0


def _stay(*_: object) -> None:
    """Outlive the signal: the command is stopped through the socket, in order."""


def _is_closed(supervisor: socket.socket) -> bool:
    try:
        return not supervisor.recv(64)
    except OSError:
        return True


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _reap(child: "subprocess.Popen[bytes]") -> int | None:
    """Collect every ended process, orphans included; return the command's code once it has one."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child.pid:
                child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode


def _clear(child: "subprocess.Popen[bytes]", *, patience_s: float, grace_s: float) -> None:
    """Return when nothing is left: SIGTERM after the patience, SIGKILL after the grace on top."""
    started = time.monotonic()
    asked: set[int] = set()
    while True:
        _reap(child)
        left = _left(child)
        if not left:
            return
        waited = time.monotonic() - started
        for target in left:
            if waited > patience_s + grace_s:
                _signal(target, signal.SIGKILL)
            elif waited >= patience_s and target not in asked:
                asked.add(target)
                _signal(target, signal.SIGTERM)
                _signal(target, signal.SIGCONT)  # a stopped process cannot take the hint
        time.sleep(_POLL_S)


def _left(child: "subprocess.Popen[bytes]") -> list[int]:
    """The group, as a negative number, if it is not empty; orphans that left it."""
    group = [-child.pid] if _signal(-child.pid, 0) else []
    return [*group, *(pid for pid in _adopted() if pid != child.pid)]


def _adopted() -> list[int]:
    """Processes whose parent we are: the command, and what its descendants left behind (Linux)."""
    found = []
    for name in os.listdir("/proc") if sys.platform == "linux" else ():  # noqa: PTH208  # no pathlib
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:  # noqa: PTH123
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
    return found


def _signal(target: int, number: int) -> bool:
    try:
        os.kill(target, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _tell(supervisor: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):
        supervisor.sendall(f"{text}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
