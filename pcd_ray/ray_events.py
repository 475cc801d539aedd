"""From the workers to the driver: a mailbox actor that costs a training step nothing."""

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@dataclass(frozen=True, slots=True)
class Event:
    """Something that rank 0, or the process that looks after the workers, tells the driver."""

    kind: str
    """``reserved``, ``resumed``, ``metrics``, ``checkpoint``, ``lost`` or ``say``."""
    step: int
    epoch: float
    values: dict[str, float]
    text: str = ""


class _Mailbox:
    def __init__(self) -> None:
        self._events: list[Event] = []

    def put(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        taken, self._events = self._events, []
        return taken


class EventReceiver:
    """The driver's end; it owns the mailbox, which ends with it."""

    def __init__(self, name: str) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(num_cpus=0)(_Mailbox)  # not on a node that may be taken away
        self._mailbox: Any = actor.options(name=name, scheduling_strategy=here).remote()

    def take(self) -> list[Event]:
        """Return what has arrived since the last call."""
        events: list[Event] = ray.get(self._mailbox.take.remote())
        return events

    def close(self) -> None:
        """End the mailbox."""
        ray.kill(self._mailbox)


class EventSender:
    """A worker's end; without ``name`` it sends nothing (ranks other than 0)."""

    def __init__(self, name: str | None) -> None:
        self._mailbox: Any = ray.get_actor(name) if name else None

    def reserved(self, reservation: str) -> None:
        """Say what the workers hold, so that it can be freed when the driver is ended."""
        self._put(Event("reserved", 0, 0.0, {}, reservation))

    def resumed(self, step: int) -> None:
        """Say from which step training starts."""
        self._put(Event("resumed", step, 0.0, {}))

    def metrics(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Send a line of metrics."""
        self._put(Event("metrics", step, epoch, values))

    def checkpoint(self, step: int) -> None:
        """Say that a checkpoint of this step is under way."""
        self._put(Event("checkpoint", step, 0.0, {}))

    def lost(self, text: str) -> None:
        """Say which workers were lost."""
        self._put(Event("lost", 0, 0.0, {}, text))

    def say(self, text: str) -> None:
        """Send a line of text."""
        self._put(Event("say", 0, 0.0, {}, text))

    def _put(self, event: Event) -> None:
        if self._mailbox is not None:
            self._mailbox.put.remote(event)  # not waited for
