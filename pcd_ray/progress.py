"""Lines that say how far a long computation is, no more often than a reader wants them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

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
