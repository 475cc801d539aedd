"""Which driver runs a sweep: a mark in the study, so that no second one takes over its trials.

A driver refreshes its mark while it runs. On its own machine it is known by its process, so that a
killed one is followed at once; elsewhere only by a mark that is no longer refreshed.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pcd_ray.errors import ConfigError
from pcd_ray.tune.study import OpenStudy

REFRESH_S = 10.0
STALE_S = 240.0
"""Age of a mark whose driver is taken for dead, seen from another machine: longer than a driver
waits for a store that is away."""
_DRIVER = "driver"  # user attribute of the study
_UNTOLD = "untold"  # when a process began, where its system does not say


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told apart from later ones of the same id."""

    host: str
    namespace: str
    """Of containers on one machine: whose process ids these are."""
    pid: int
    began: str

    @classmethod
    def of(cls, pid: int) -> "Process":
        """Return a process of this machine."""
        return cls(socket.gethostname(), _namespace(), pid, _began(pid))

    @property
    def is_near(self) -> bool:
        """Whether this process can see that one."""
        return (self.host, self.namespace) == (socket.gethostname(), _namespace())

    @property
    def lives(self) -> bool:
        """Whether it has not ended; of this machine's alone."""
        return _began(self.pid) in (self.began, _UNTOLD)


class DriverMark:
    """A driver's mark in a study."""

    def __init__(self, opened: OpenStudy, process: Process | None = None) -> None:
        self._opened = opened
        self._process = process or Process.of(os.getpid())
        self._due = 0.0

    def take(self) -> None:
        """Mark the study as run by this process.

        Raises:
            ConfigError: another driver runs it.
        """
        seen = self._seen()
        if seen is not None and seen[0] != self._process:
            self._refuse(*seen)
        self._write()

    def refresh(self) -> None:
        """Say that this driver is still there, every now and then.

        Raises:
            ConfigError: another driver has taken this one for dead and runs the sweep now.
        """
        if time.monotonic() < self._due:
            return
        seen = None
        with contextlib.suppress(Exception):  # the storage may be better the next time
            seen = self._seen()
            if seen is None or seen[0] == self._process:
                self._write()
                return
        if seen is not None and seen[0] != self._process:
            raise ConfigError(
                f"{self._opened.shown_url}: process {seen[0].pid} on {seen[0].host} runs the sweep "
                f"{self._opened.study.study_name} now, since this driver had not been heard of for "
                f"{STALE_S:.0f} s; its trials go on there"
            )

    def release(self) -> None:
        """Take the mark away, unless it is another driver's."""
        with contextlib.suppress(Exception):  # it goes stale
            seen = self._seen()
            if seen is not None and seen[0] == self._process:
                self._opened.study.set_user_attr(_DRIVER, "")

    def _seen(self) -> tuple[Process, float] | None:
        """Return whose mark there is, and when it was refreshed."""
        text = self._opened.study.user_attrs.get(_DRIVER)
        if not text:
            return None
        mark = json.loads(text)
        return Process(**mark["process"]), float(mark["time"])

    def _write(self) -> None:
        self._due = time.monotonic() + REFRESH_S
        mark = {"process": asdict(self._process), "time": time.time()}
        self._opened.study.set_user_attr(_DRIVER, json.dumps(mark))

    def _refuse(self, process: Process, refreshed: float) -> None:
        left = refreshed + STALE_S - time.time()
        if process.is_near and process.lives:
            whose, advice = "on this machine", ""
        elif not process.is_near and left > 0:
            whose = f"on {process.host}"
            advice = f"; if it was killed, give the same command again in {left + 1:.0f} s"
        else:
            return
        name = self._opened.study.study_name
        raise ConfigError(
            f"{self._opened.shown_url}: another driver runs the sweep {name}, process "
            f"{process.pid} {whose}; wait until it ends, or stop it{advice}"
        )


@contextlib.contextmanager
def driving(opened: OpenStudy) -> Iterator[DriverMark]:
    """Hold the study's mark.

    Raises:
        ConfigError: another driver runs it.
    """
    mark = DriverMark(opened)
    mark.take()
    try:
        yield mark
    finally:
        mark.release()


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
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
    return _UNTOLD
