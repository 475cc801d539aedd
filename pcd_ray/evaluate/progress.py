"""Lines that say how far a long computation is, no more often than a reader wants them."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

_EVERY_S = 10.0


@dataclass(slots=True)
class Progress:
    """Counts what is done."""

    what: str
    unit: str
    total: int
    clock: Callable[[], float] = time.monotonic
    """Seconds from any beginning."""
    _done: int = field(default=0, init=False)
    _began_s: float = field(default=0.0, init=False)
    _said_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._began_s = self._said_s = self.clock()

    def line(self, more: int) -> str:
        """Count ``more``; return a line, or nothing where one was given a moment ago."""
        self._done += more
        now = self.clock()
        if self._done < self.total and now - self._said_s < _EVERY_S:
            return ""
        self._said_s = now
        took = max(now - self._began_s, 1e-9)
        left = (self.total - self._done) * took / max(self._done, 1)
        ending = f"{took:.0f} s" if self._done >= self.total else f"{left:.0f} s left"
        rate = self._done / took
        count = f"{self._done:,} of {self.total:,} {self.unit}"
        return f"  {self.what}: {count}, {rate:.1f} {self.unit}/s, {ending}"


_Item = TypeVar("_Item")
Say = Callable[[str], None]


class Watch:
    """Says, on a thread, what goes on in its ``with`` block and how far it is.

    First after ten seconds (what ends sooner is not mentioned), later once a minute.
    """

    def __init__(
        self,
        what: str,
        say: Say,
        *,
        total: int = 0,
        done: int = 0,
        unit: str = "images",
        every_s: float = _EVERY_S,
    ) -> None:
        self._what, self._say, self._every_s = what, say, every_s
        self._total, self._unit, self._done = total, unit, done
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Say no more."""
        self._over.set()
        self._thread.join()

    def counted(
        self, items: Iterable[_Item], size: Callable[[_Item], int], *, each: int = 1
    ) -> Iterator[_Item]:
        """Yield items, counting ``each`` times the size of one when it has been worked on."""
        for item in items:
            yield item
            self._done = min(self._total, self._done + each * size(item))

    def _tell(self) -> None:
        began = time.monotonic()
        wait_s = self._every_s
        while not self._over.wait(wait_s):
            wait_s = min(2 * wait_s, 6 * self._every_s)
            count = f"{self._done:,} of {self._total:,} {self._unit}, " if self._total else ""
            self._say(f"  {self._what}: {count}{time.monotonic() - began:.0f} s so far")
