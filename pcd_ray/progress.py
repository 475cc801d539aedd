"""What a long computation does and how far it is: a line every 10 s, none of short ones.

Parts inside parts share a line, the outermost first. A process logs to stderr unless `sending_to`
says otherwise, as Ray tasks do, whose stderr nobody sees.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

EVERY_S = 10.0
"""Seconds between two lines."""

_T = TypeVar("_T")


@dataclass(slots=True)
class Progress:
    """Counts what is done."""

    what: str
    unit: str = ""
    total: int = 0
    """0: nothing is counted."""
    clock: Callable[[], float] = time.monotonic
    """Seconds from any beginning."""
    done: int = field(default=0, init=False)
    note: str = field(default="", init=False)
    """What else the line says, e.g. the newest loss."""
    _began_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._began_s = self.clock()

    def add(self, more: int = 1) -> None:
        """Count what is done."""
        self.done += more

    @property
    def text(self) -> str:
        """What is done by now, at which rate, and how long the rest takes."""
        took = max(self.clock() - self._began_s, 1e-9)
        if not self.total:
            return f"{self.what}: {took:.0f} s so far"
        count = f"{self.what}: {self.done:,} of {self.total:,} {self.unit}"
        if not self.done:
            return f"{count}, {took:.0f} s so far"
        left = (self.total - self.done) * took / self.done
        rate = self.done / took
        text = f"{count}, {rate:,.{1 if rate >= 1 else 3}f} {self.unit}/s, {left:.0f} s left"
        return f"{text}, {self.note}" if self.note else text


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")


_listeners: list[Callable[[str], None]] = [_to_stderr]
_running: list[Progress] = []


@contextmanager
def progress(what: str, unit: str = "", total: int = 0) -> Iterator[Progress]:
    """Log a line every 10 s while the block runs.

    Args:
        what: is done, e.g. ``features of train``.
        unit: what is counted by `Progress.add`, in the plural.
        total: how many there are; 0: nothing is counted.
    """
    shown = Progress(what, unit, total)
    outermost = not _running
    _running.append(shown)
    ended = threading.Event()
    thread = threading.Thread(target=_tick, args=(ended,), daemon=True)
    if outermost:
        thread.start()
    try:
        yield shown
    finally:
        if outermost:
            ended.set()
            thread.join()
        _running.remove(shown)


def counted(
    items: Iterable[_T],
    what: str,
    unit: str,
    total: int,
    *,
    size: Callable[[_T], int] = lambda _: 1,
) -> Iterator[_T]:
    """Yield the items; log every 10 s how many have been asked for.

    Args:
        items: what is worked on.
        what, unit, total: as for `progress`.
        size: how many units an item is, e.g. ``len`` of a batch.
    """
    with progress(what, unit, total) as shown:
        for item in items:
            yield item
            shown.add(size(item))


@contextmanager
def sending_to(listener: Callable[[str], None]) -> Iterator[None]:
    """Give the lines of this process to ``listener`` while the block runs."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.pop()


def log(line: str) -> None:
    """Log a line where this process logs."""
    _listeners[-1](line)


def _tick(ended: threading.Event) -> None:
    while not ended.wait(EVERY_S):
        log("  " + " | ".join(each.text for each in list(_running)))
