"""One driver at a time: a lock on a run's folder, a folder of shards or a sweep's study.

No atomic operation of the storage is needed. Each driver writes a mark of its own and then reads
all marks; one that sees the mark of another live driver withdraws its own and looks again. Of two
that start together, at least one sees the other, so they never both continue.

A driver refreshes its mark while it runs. On its own machine it is known by its process, so that a
killed one is followed at once; elsewhere a mark that is no longer refreshed counts as stale. It is
watched for a while, whatever its age: clocks of machines differ.
"""

import contextlib
import json
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from pcd_ray import storage
from pcd_ray.errors import InUseError

REFRESH_S = 10.0
STALE_S = 240.0
"""Age of a mark whose driver counts as dead, seen from another machine: longer than a driver waits
for storage that is unavailable."""
_WATCH_S = 3 * REFRESH_S  # how long a mark is watched at least, however old it claims to be
_PAUSE_S = (0.5, 1.5)  # random, so that two that withdrew together do not return together
_UNKNOWN = "unknown"  # when a process began, where its system does not say
_FILE = re.compile(r"driver-([0-9a-f]{12})\.json")


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told apart from later ones of the same id."""

    host: str
    machine: str
    """Of which start of which machine, and of which container on it, this is a process id."""
    pid: int
    began: str

    @classmethod
    def of(cls, pid: int) -> "Process":
        """Return a process of this machine."""
        return cls(socket.gethostname(), _machine(), pid, _began(pid))

    @property
    def is_near(self) -> bool:
        """Whether this process can see that one."""
        return (self.host, self.machine) == (socket.gethostname(), _machine())

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended; for processes of this machine only."""
        return _began(self.pid) in (self.began, _UNKNOWN)


@dataclass(frozen=True, slots=True)
class Mark:
    """What a driver says of itself."""

    process: Process
    since: float
    """When it began, in s since 1970."""
    refreshed: float
    """When it was last seen alive, in s since 1970."""

    @classmethod
    def parse(cls, text: str) -> "Mark":
        """Return the mark that a text is.

        Raises:
            ValueError, TypeError, KeyError: it is none.
        """
        values = storage.parse_json(text)
        return cls(Process(**values["process"]), float(values["since"]), float(values["refreshed"]))

    @property
    def is_dead(self) -> bool:
        """Whether its driver is seen to have ended; of another machine's, nothing is seen."""
        return self.process.is_near and not self.process.is_alive


class Marks(Protocol):
    """Where marks are kept."""

    name: str
    """What is locked, for messages."""
    option: str
    """The option that chooses another."""

    def read(self) -> dict[str, str]:
        """Return each mark's text, by its token."""

    def write(self, token: str, text: str) -> None:
        """Store a mark."""

    def clear(self, token: str) -> None:
        """Remove a mark; an absent one is no error."""


class FolderMarks:
    """Marks as files in the folder that is locked."""

    def __init__(self, uri: str, option: str) -> None:
        self.name, self.option = storage.absolute(uri), option
        self._existed = storage.exists(self.name)

    def read(self) -> dict[str, str]:
        """Return each mark's text, by its token."""
        found = {}
        for file in storage.list_files(self.name, recursive=False):
            name = storage.name_of(storage.split_query(file.uri)[0])
            if match := _FILE.fullmatch(name):
                with contextlib.suppress(storage.GoneError, storage.NotTextError):
                    found[match[1]] = storage.read_text(file.uri)
        return found

    def write(self, token: str, text: str) -> None:
        """Store a mark."""
        storage.write_text(self._file(token), text)

    def clear(self, token: str) -> None:
        """Remove a mark, and the folder if there is nothing else in it that was not there."""
        storage.delete_file(self._file(token))
        if not (self._existed or storage.is_remote(self.name)):
            with contextlib.suppress(OSError):
                os.rmdir(self.name)

    def _file(self, token: str) -> str:
        return storage.join(self.name, f"driver-{token}.json")


class DriverLock:
    """A process's lock; another one of the same process does not count as another driver."""

    def __init__(
        self,
        marks: Marks,
        process: Process | None = None,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._marks = marks
        self._process = process or Process.of(os.getpid())
        self._clock, self._sleep = clock, sleep
        self._token = uuid.uuid4().hex[:12]
        self._since = clock()
        self.is_lost = False
        """Whether another driver has taken over, since this one had not been seen for long."""

    def take(self, say: Callable[[str], None]) -> None:
        """Take the lock, once a driver that may be dead has turned out to be so.

        Args:
            say: receives a line before this waits.

        Raises:
            InUseError: another driver is alive.
        """
        self._write()
        while others := self._others():
            self._marks.clear(self._token)
            self._wait_for(others, say)
            self._write()

    def keep(self, ended: threading.Event, on_loss: Callable[[], None]) -> None:
        """Refresh the mark until ``ended`` or until another driver has taken over."""
        while not ended.wait(REFRESH_S):
            with contextlib.suppress(Exception):  # the storage may be better the next time
                self.refresh()
            if self.is_lost:
                on_loss()
                return

    def refresh(self) -> None:
        """Show that this driver is alive, or note that another has taken over."""
        if self._token in self._marks.read():
            self._write()
        else:
            self.is_lost = True

    def release(self) -> None:
        """Remove the mark."""
        with contextlib.suppress(Exception):  # it goes stale
            self._marks.clear(self._token)

    def _write(self) -> None:
        mark = Mark(self._process, self._since, self._clock())
        self._marks.write(self._token, json.dumps(asdict(mark)))

    def _others(self) -> dict[str, Mark]:
        """Return the marks of other drivers; those of dead ones are removed."""
        found = {}
        for token, text in self._marks.read().items():
            try:
                mark = Mark.parse(text)
            except (ValueError, TypeError, KeyError):
                self._marks.clear(token)
                continue
            if mark.is_dead:
                self._marks.clear(token)
            elif mark.process != self._process:
                found[token] = mark
        return found

    def _wait_for(self, others: dict[str, Mark], say: Callable[[str], None]) -> None:
        """Return once these drivers have gone; remove their marks if they prove to be stale.

        Raises:
            InUseError: one of them is alive.
        """
        patience, waited, left = 0.0, 0.0, others
        for mark in others.values():
            if not mark.process.is_near:
                age = max(0.0, self._clock() - mark.refreshed)
                patience = max(patience, STALE_S - age, _WATCH_S)
                say(
                    f"{self._marks.name}: process {mark.process.pid} on {mark.process.host} was "
                    f"working here {age:.0f} s ago; waiting up to {patience:.0f} s to see whether "
                    "it still is"
                )
        while left and waited <= patience:
            pause = random.uniform(*_PAUSE_S)
            self._sleep(pause)
            waited += pause
            left = {token: mark for token, mark in self._others().items() if token in others}
            for token, mark in left.items():
                if mark.process.is_near or mark != others[token]:
                    raise self._in_use(mark)
        for token in left:
            self._marks.clear(token)

    def _in_use(self, mark: Mark) -> InUseError:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(mark.since))
        return InUseError(
            f"{self._marks.name} is in use: process {mark.process.pid} on {mark.process.host} has "
            f"been working here since {since} UTC; wait until it ends, stop it, or choose another "
            f"{self._marks.option}"
        )


@contextlib.contextmanager
def driving(marks: Marks, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock of a folder or study.

    Args:
        marks: where drivers leave their marks.
        say: receives a line before this waits; stderr without.

    Raises:
        InUseError: another driver is alive, or this one's mark was removed, as by a driver that
            took over while this one could not be seen.
    """
    lock, ended = DriverLock(marks), threading.Event()
    is_main = threading.current_thread() is threading.main_thread()
    on_loss = _interrupt_main if is_main else lambda: None  # else it ends with the error
    keeper = threading.Thread(target=lock.keep, args=(ended, on_loss), daemon=True)
    own = is_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if own:
        signal.signal(signal.SIGTERM, _exit)  # until Ray, which has one like it, has started
    try:
        lock.take(say or _to_stderr)
        keeper.start()
        yield
    finally:
        if own and signal.getsignal(signal.SIGTERM) is _exit:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        ended.set()
        if keeper.is_alive():
            keeper.join()
        lock.release()
        if lock.is_lost:
            raise InUseError(
                f"{marks.name}: the mark of this driver is gone, so it has stopped: another driver "
                f"took over, as this one had not been seen for {STALE_S:.0f} s, or the mark was "
                "deleted; the same command continues from what is stored"
            )


def _interrupt_main() -> None:
    """End what the main thread does; a job in the background may ignore SIGINT."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def _exit(number: int, frame: object) -> None:
    """End the process by SIGTERM as Ray does: its blocks are left in order."""
    del frame
    sys.exit(number)


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _began(pid: int) -> str:
    """Return when a process of this machine began; empty: it has ended."""
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]  # proc(5): starttime; a zombie has ended
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return _UNKNOWN
