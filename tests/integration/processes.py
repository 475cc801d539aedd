"""Processes of this machine, by what /proc says; for tests that end some of them."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path


def train_workers(ancestor: int) -> list[int]:
    """Return the Ray Train workers that descend from a process: other runs' are left alone."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and "RayTrainWorker" in _title(folder):
            pid = int(folder.name)
            if ancestor in _ancestors(pid):
                found.append(pid)
    return sorted(found)


def of_session(session: int) -> dict[int, list[str]]:
    """Return the command lines of the processes of a session, by process id."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found[int(folder.name)] = _title(folder).rstrip("\0").split("\0")
    return found


def parent_of(pid: int) -> int:
    """Return the parent of a process; 0: it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(status.partition("PPid:")[2].split()[0])


def end_session(session: int) -> None:
    """End all processes of a session, and those that they start meanwhile."""
    while alive := of_session(session):
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        threading.Event().wait(0.05)


def wait_for(happened: Callable[[], bool], *, timeout_s: float) -> None:
    """Look again and again, until something has happened; a look at all processes costs 10 ms.

    Raises:
        TimeoutError: it did not.
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened within {timeout_s} s")
        pause.wait(0.05)


def _title(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().decode(errors="replace")
    except OSError:  # it has ended
        return ""


def _ancestors(pid: int) -> list[int]:
    found: list[int] = []
    while pid > 1:
        pid = parent_of(pid)
        found.append(pid)
    return found
