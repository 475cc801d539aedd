"""The nodes of the cluster: those that are there, those that the autoscaler may bring.

Ray does not tell what its autoscaler may bring. It is read from where the cluster launcher leaves
its configuration on the head, or stated in ``run.autoscaled_nodes``.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import ray.util

from pcd_ray.errors import ClusterError

HEAD = "node:__internal_head__"
"""Resource that the head alone has."""
_LAUNCHERS_FILE = "~/ray_bootstrap_config.yaml"  # as ``ray up`` writes it on the head: JSON
_LOOK_EVERY_S = 1.0
_BUSY_LOOKS = 10
_SAY_AFTER_S = (0.0, 15.0, 30.0, 60.0, 120.0)  # then as often as from the last but one to the last
_SLACK = 1e-6  # Ray counts in parts of 1e-4

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Node:
    """A node, or several that are alike."""

    cpus: float
    gpus: float = 0.0
    labels: Labels = field(default_factory=dict)
    count: int = 1
    is_head: bool = False
    """No autoscaler has brought it."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes that there are, and all that there may be."""

    now: Sequence[Node]
    most: Sequence[Node]
    """With all that the autoscaler may bring."""
    limit: float = math.inf
    """How many of ``most`` there may be at once beside the head: the launcher's total."""
    ours: bool = False
    """It was started here and ends with this process."""

    @classmethod
    def fixed(cls, *nodes: Node) -> "Cluster":
        """Return a cluster without an autoscaler."""
        return cls(nodes, nodes)


@dataclass(frozen=True, slots=True)
class Need:
    """Processes that are alike: how many, and what each reserves on which nodes."""

    what: str
    count: int
    cpus: float
    gpus: float = 0.0
    labels: Labels = field(default_factory=dict)

    def __str__(self) -> str:
        gpus = f"{self.gpus:g} GPU and " if self.gpus else ""
        return f"{self.count} {self.what} of {gpus}{self.cpus:g} CPUs{on_nodes(self.labels)}"


def on_nodes(labels: Labels) -> str:
    """Return `` on nodes with pool=data``; empty: anywhere."""
    listed = ", ".join(f"{name}={value}" for name, value in labels.items())
    return f" on nodes with {listed}" if listed else ""


def nodes_with(nodes: Sequence[Node], labels: Labels) -> list[Node]:
    """Return the nodes that have all of these labels."""
    return [node for node in nodes if labels.items() <= node.labels.items()]


def largest(
    nodes: Sequence[Node], size: Callable[[Node], float], limit: float = math.inf
) -> list[Node]:
    """Return the nodes that have most of something, ``limit`` at most and the head besides."""
    found = []
    for node in sorted(nodes, key=size, reverse=True):
        count = node.count if node.is_head else int(min(node.count, limit))
        limit -= 0 if node.is_head else count
        found.append(replace(node, count=count))
    return [node for node in found if node.count]


def cpus_of(nodes: Sequence[Node], limit: float = math.inf) -> float:
    """Return how many CPUs the nodes have, of which there may be ``limit`` at once."""
    there = largest(nodes, lambda node: node.cpus, limit)
    return sum(node.cpus * node.count for node in there)


def gpus_of(nodes: Sequence[Node], limit: float = math.inf) -> int:
    """Return how many whole GPUs the nodes have, of which there may be ``limit`` at once."""
    there = largest(nodes, lambda node: node.gpus, limit)
    return sum(int(node.gpus) * node.count for node in there)


def room_for(nodes: Sequence[Node], need: Need, limit: float = math.inf) -> int:
    """Return how many of these processes the nodes hold when they hold nothing else.

    Args:
        nodes: of which there may be ``limit`` at once beside the head.
        need: what each process reserves.
        limit: as `Cluster.limit`.
    """

    def held(node: Node) -> int:
        return _held(node, need)

    there = largest(nodes_with(nodes, need.labels), held, limit)
    return sum(held(node) * node.count for node in there)


def fits(nodes: Sequence[Node], workers: Need, task: Need, limit: float = math.inf) -> bool:
    """Say whether nodes hold all workers and, beside them, one task of Ray Data.

    Args:
        nodes: of which there may be ``limit`` at once beside the head.
        workers: processes that run at the same time.
        task: that runs beside them.
        limit: as `Cluster.limit`.
    """
    for place, node in enumerate(nodes):
        left = limit if node.is_head else limit - 1
        if left >= 0 and room_for([node], task):
            rest = replace(node, cpus=node.cpus - task.cpus, count=1)
            others = [*nodes[:place], replace(node, count=node.count - 1), *nodes[place + 1 :]]
            if room_for([rest], workers) + room_for(others, workers, left) >= workers.count:
                return True
    return False


def with_autoscaled(now: Sequence[Node], kinds: Sequence[Node]) -> list[Node]:
    """Return all nodes that there may be: those that the autoscaler has brought count once.

    Args:
        now: nodes that are there, one by one.
        kinds: what the autoscaler may bring, and how many of each.
    """
    kinds = [kind for kind in kinds if kind.count > 0]
    to_come = [kind.count for kind in kinds]
    others = []
    for node in now:
        of = [place for place, kind in enumerate(kinds) if to_come[place] and _is_of(node, kind)]
        if of:  # the kind with most labels, which fewer other nodes are of
            to_come[max(of, key=lambda place: len(kinds[place].labels))] -= 1
        else:
            others.append(node)
    return others + kinds


def launchers_nodes(text: str) -> tuple[list[Node], int]:
    """Return the kinds of nodes that a configuration of the cluster launcher may bring.

    How many of each, and how many of all; kinds whose resources it does not say are left out.
    """
    config: dict[str, Any] = json.loads(text)
    limit = config.get("max_workers", 2)  # the launcher's own default
    found = []
    for name, kind in config.get("available_node_types", {}).items():
        resources = kind.get("resources") or {}
        count = 0 if name == config.get("head_node_type") else limit
        count = min(limit, kind.get("max_workers", count))
        if count > 0 and (resources.get("CPU") or resources.get("GPU")):
            cpus, gpus = float(resources.get("CPU", 0)), float(resources.get("GPU", 0))
            found.append(Node(cpus, gpus, kind.get("labels") or {}, count))
    return found, limit


def cluster_nodes(stated: Sequence[Node], *, ours: bool) -> Cluster:
    """Look at the cluster that this process has joined.

    Args:
        stated: what the autoscaler may bring; empty: what the cluster launcher says.
        ours: the cluster was started here, so that nothing brings nodes.
    """
    now = nodes_now()
    kinds, limit = list(stated), math.inf
    if not kinds and not ours:
        kinds, limit = _of_launcher()
    limit = max(limit, sum(not node.is_head for node in now))
    return Cluster(now, with_autoscaled(now, kinds) if kinds else now, limit, ours)


def nodes_now() -> list[Node]:
    """Return the nodes that are alive."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [
        Node(
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            node.get("Labels") or {},
            is_head=HEAD in node["Resources"],
        )
        for node in nodes
        if node["Alive"]
    ]


def object_store_bytes(labels: Labels) -> float:
    """Return the size of the object stores of the nodes that are alive and have these labels."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    stores = [
        node["Resources"].get("object_store_memory", 0.0)
        for node in nodes
        if node["Alive"] and labels.items() <= (node.get("Labels") or {}).items()
    ]
    return float(sum(stores))


def wait_for_nodes(
    workers: Need, task: Need, *, limit_s: float, say: Callable[[str], None]
) -> None:
    """Ask the autoscaler for nodes that hold workers and a task, and wait until they are there.

    What is asked is gone when this returns, or when the process that called it ends.

    Args:
        workers: processes that are reserved together.
        task: one task of Ray Data.
        limit_s: longest wait.
        say: is given a line at once and then now and then.

    Raises:
        ClusterError: they have not come in time.
    """
    if fits(nodes_now(), workers, task):
        return
    needs = [need for need in (workers, task) if need.count]
    group = ray.util.placement_group(
        [_bundle(need) for need in needs for _ in range(need.count)],
        bundle_label_selector=[dict(need.labels) for need in needs for _ in range(need.count)],
    )
    try:
        _wait(needs, lambda: fits(nodes_now(), workers, task), limit_s=limit_s, say=say)
    finally:
        ray.util.remove_placement_group(group)


@dataclass(slots=True)
class Standstill:
    """What workers wait for, at the start and after a loss, which nobody may wait out.

    Ray Train waits for as long as it takes, without a word: for nodes that are not there, and for
    room on those that are there and busy.
    """

    need: Need
    clock: Callable[[], float] = time.monotonic
    """Seconds from any beginning."""
    _since_s: float | None = field(default=None, init=False)  # None: the workers are there
    _said: int = field(default=1, init=False)

    def begin(self) -> None:
        """Note that there are no workers."""
        if self._since_s is None:
            self._since_s, self._said = self.clock(), 1

    def end(self) -> None:
        """Note that they are there."""
        self._since_s = None

    def line(
        self,
        nodes: Callable[[], Sequence[Node]] = nodes_now,
        busy: Callable[[Need], str] | None = None,
    ) -> str:
        """Return what is missing, now and then; empty: nothing, or it was said a moment ago.

        Args:
            nodes: those that are there.
            busy: as `busy_line`, which it is if it is not given.
        """
        if self._since_s is None:
            return ""
        waited = self.clock() - self._since_s
        if waited < _said_at(self._said):
            return ""
        self._said += 1
        there = nodes()
        if room_for(there, self.need) < self.need.count:
            return _waiting_line([self.need], there, waited)
        line = (busy or busy_line)(self.need)
        return f"{line}; {waited:.0f} s" if line else ""


def busy_line(need: Need) -> str:
    """Return who waits for room on nodes that are there, and what is free; empty: nobody does.

    Workers that have got their room, and start, wait for nothing, though nothing may be left free.
    """
    job = ray.get_runtime_context().get_job_id()
    bundle = _bundle(need)
    groups = ray.util.placement_group_table().values()
    states = {
        group["state"]
        for group in groups
        if group["placement_group_id"].endswith(job)
        and any(_alike(each, bundle) for each in group["bundles"].values())
    }
    waits = bool(states & {"PENDING", "RESCHEDULING"})  # of a sweep's trials others may have theirs
    if not waits and ("CREATED" in states or not _lacks(need)):
        return ""
    return f"the nodes are there but busy: {need} ask for room, {_free_line(need)}"


def say_if_busy(need: Need, say: Callable[[str], None]) -> None:
    """Log a line if the nodes have had no room for these processes for ten seconds.

    Ray begins them when there is room, and says nothing until then.
    """
    for _ in range(_BUSY_LOOKS):
        if not _lacks(need):
            return
        time.sleep(_LOOK_EVERY_S)
    say(f"the nodes are there but busy: {need} wait for room, {_free_line(need)}")


def _lacks(need: Need) -> bool:
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    wanted = _bundle(need)
    wanted.pop("memory", None)
    return any(free.get(name, 0.0) + _SLACK < n * need.count for name, n in wanted.items())


def _free_line(need: Need) -> str:
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    names = [name for name in _bundle(need) if name != "memory"]
    parts = [f"{free.get(name, 0.0):g} of {total.get(name, 0.0):g} {name}s" for name in names]
    return f"free on all nodes are {' and '.join(parts)}"


def _wait(
    needs: Sequence[Need],
    there: Callable[[], bool],
    *,
    limit_s: float,
    say: Callable[[str], None],
) -> None:
    begun, said = time.monotonic(), 0
    while not there():
        waited = time.monotonic() - begun
        if waited >= limit_s:
            raise ClusterError(
                f"the autoscaler has not brought the nodes within run.wait_for_nodes_s={limit_s:g}:"
                f" {_rooms(needs, nodes_now())}; look at `ray status` for its reason (quota, spot),"
                " or wait longer"
            )
        if waited >= _said_at(said):
            say(_waiting_line(needs, nodes_now(), waited))
            said += 1
        time.sleep(min(_LOOK_EVERY_S, limit_s - waited))


def _waiting_line(needs: Sequence[Need], nodes: Sequence[Node], waited: float) -> str:
    story = _rooms(needs, nodes)
    return f"waiting for nodes that the autoscaler will bring: {story}; {waited:.0f} s"


def _rooms(needs: Sequence[Need], nodes: Sequence[Node]) -> str:
    return "; ".join(f"room for {room_for(nodes, each)} of {each}" for each in needs)


def _said_at(number: int) -> float:
    """Return after how many seconds a line of this number is due."""
    over = number - len(_SAY_AFTER_S) + 1
    if over <= 0:
        return _SAY_AFTER_S[number]
    return _SAY_AFTER_S[-1] + over * (_SAY_AFTER_S[-1] - _SAY_AFTER_S[-2])


def _bundle(need: Need) -> dict[str, float]:
    wanted = {"CPU": need.cpus, "GPU": need.gpus}
    return {name: amount for name, amount in wanted.items() if amount} or {"memory": 1}


def _alike(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return one.keys() == other.keys() and all(
        math.isclose(one[name], other[name], abs_tol=1e-3) for name in one
    )


def _held(node: Node, need: Need) -> int:
    """Return how many of these processes one node holds."""
    pairs = ((node.cpus, need.cpus), (node.gpus, need.gpus))
    return min((int(has / each + _SLACK) for has, each in pairs if each), default=need.count)


def _is_of(node: Node, kind: Node) -> bool:
    same = (node.cpus, node.gpus) == (kind.cpus, kind.gpus)
    return not node.is_head and same and kind.labels.items() <= node.labels.items()


def _of_launcher() -> tuple[list[Node], float]:
    """Return `launchers_nodes` if this process is on the head that the launcher started."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    here = ray.get_runtime_context().get_node_id()
    on_head = any(node["NodeID"] == here and HEAD in node["Resources"] for node in nodes)
    place = Path(_LAUNCHERS_FILE).expanduser()
    if not on_head or not place.is_file():
        return [], math.inf
    try:
        return launchers_nodes(place.read_text())
    except (AttributeError, TypeError, ValueError) as error:
        raise ClusterError(
            f"{place} is no configuration of the cluster launcher ({error}); mend it, or state "
            "what the autoscaler may bring in run.autoscaled_nodes"
        ) from error
