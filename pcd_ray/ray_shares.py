"""Who gets how much of the cluster: device, CPUs and threads of workers, pools and data tasks.

Decided by all nodes that there may be, of which the autoscaler may have some; plain arithmetic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pcd_ray.errors import ClusterError
from pcd_ray.ray_nodes import (
    Cluster,
    Labels,
    Need,
    Node,
    cpus_of,
    fits,
    gpus_of,
    largest,
    nodes_with,
    on_nodes,
    room_for,
)

_SMALL_CPUS = 4  # up to this many on a single machine, workers reserve none of them
_CPUS_PER_ACTOR = 4  # of a pool that computes on CPUs; more threads scale badly


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a configuration asks of the cluster."""

    num_workers: int | tuple[int, int] = 1
    """``train.num_workers``; a pair: the least and the most."""
    device: str = "auto"
    """``train.device``."""
    cpus_per_worker: float = 0.0
    """``train.cpus_per_worker``; 0 decides here."""
    threads_per_worker: int = 0
    """``train.threads_per_worker``; 0 decides here."""
    worker_labels: Labels = field(default_factory=dict)
    """``train.node_labels``."""
    cpus_per_data_task: float = 0.5
    """``data.cpus_per_task``."""
    data_labels: Labels = field(default_factory=dict)
    """``data.node_labels``."""

    @property
    def least(self) -> int:
        """The fewest workers that do."""
        return min(self.num_workers) if isinstance(self.num_workers, tuple) else self.num_workers

    @property
    def most(self) -> int:
        """The most workers that there may be."""
        return max(self.num_workers) if isinstance(self.num_workers, tuple) else self.num_workers


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """What one training worker gets."""

    device: str
    """``cpu`` or ``cuda``."""
    cpus: float
    """CPUs that Ray reserves for it."""
    threads: int
    """Torch threads it computes with."""
    labels: Labels = field(default_factory=dict)
    """Of the nodes that it may run on; empty: anywhere."""

    @property
    def gpus(self) -> int:
        """GPUs that Ray reserves for it."""
        return 1 if self.device == "cuda" else 0

    @property
    def resources(self) -> dict[str, float]:
        """What to ask of Ray besides GPUs; a byte where that is nothing, which Ray refuses."""
        return {"CPU": self.cpus} if self.cpus or self.gpus else {"CPU": 0.0, "memory": 1}


def share_for_workers(have: Cluster, asked: Asked) -> WorkerShare:
    """Decide what each training worker gets, such that Ray Data keeps room to work.

    Of the least and the most workers the cluster must hold the least; each gets what it would get
    beside as many as there is room for.

    Raises:
        ClusterError: the cluster can never hold the workers and one data task, or Ray would count
            room for elastic workers where they may not run.
    """
    there = nodes_with(have.most, asked.worker_labels)
    device = asked.device
    if device == "auto":
        device = "cuda" if any(node.gpus >= 1 for node in there) else "cpu"
    usable = [node for node in there if (node.gpus >= 1 if device == "cuda" else node.cpus > 0)]
    least, count = _counts(have, asked, usable, device)
    cores = min((node.cpus for node in usable), default=0.0)
    if device == "cuda":  # Ray fills a node before it takes another
        per_node = min(count, min(int(node.gpus) for node in usable))
    else:
        together = largest(usable, lambda node: node.cpus, have.limit)
        per_node = -(-count // max(1, sum(node.count for node in together)))
    cpus = asked.cpus_per_worker or _cpus_per_worker(have, asked, usable, device, per_node)
    threads = asked.threads_per_worker or max(1, int(cores) // per_node)
    share = WorkerShare(device, cpus, threads, asked.worker_labels)
    workers, task = needs_of(share, asked, count=least)
    if not fits(have.most, workers, task, have.limit):
        raise ClusterError(
            f"train.num_workers={least} x {cpus:g} CPUs{on_nodes(workers.labels)} and one data "
            f"task of data.cpus_per_task={task.cpus:g}{on_nodes(task.labels)} need "
            f"{cpus * least + task.cpus:g} CPUs{_and_gpus(workers)}, {_nodes_of(have)}; lower "
            f"train.num_workers, train.cpus_per_worker or data.cpus_per_task{_hint(have)}"
        )
    if asked.least < asked.most:
        _check_labels_of_elastic(have, workers)
    return share


def _check_labels_of_elastic(have: Cluster, workers: Need) -> None:
    """Refuse labels that Ray Train's count of the workers that there could be is wrong about.

    It counts by resources on all nodes: it would wait for workers that no node with the labels can
    hold, and stop a healthy group to start a larger one.

    Raises:
        ClusterError: nodes without the labels could hold a worker too.
    """
    others = [node for node in have.most if not nodes_with([node], workers.labels)]
    room = room_for(others, replace(workers, labels={}))
    if room:
        raise ClusterError(
            f"train.num_workers is elastic{on_nodes(workers.labels)}, but Ray counts the room on "
            f"all nodes, and the others hold {replace(workers, count=room, labels={})}, "
            f"{_nodes_of(have)}; give train.num_workers one number, or train.node_labels that all "
            "nodes with such resources have"
        )


def cpus_beside_others(have: Cluster, asked: Asked, *, groups: int) -> float:
    """Return what each worker may reserve where several groups of workers run at once.

    Where data tasks share the workers' nodes, half of a group's part is left to them, as for one
    group alone; 0: let `share_for_workers` decide, which reserves nothing on a small machine.

    Args:
        have: the cluster.
        asked: what one group asks for, on its device (not ``auto``).
        groups: how many there are.
    """
    there = nodes_with(have.most, asked.worker_labels)
    cpus = cpus_of(there, have.limit) / groups
    if asked.device == "cpu" and _is_small(have):
        return 0.0
    if nodes_with(there, asked.data_labels):
        cpus = (cpus - asked.cpus_per_data_task) / 2
    each = cpus / asked.most
    return max(0.001, _rounded(min(each, 1.0) if asked.device == "cuda" else each))


def needs_of(share: WorkerShare, asked: Asked, *, count: int) -> tuple[Need, Need]:
    """Return what so many workers and one task of Ray Data reserve."""
    return (
        Need("workers", count, share.cpus, share.gpus, share.labels),
        Need("data task", 1, asked.cpus_per_data_task, 0.0, asked.data_labels),
    )


def check_data_task(have: Cluster, asked: Asked) -> Need:
    """Return what one task of Ray Data reserves.

    Raises:
        ClusterError: no node can ever hold it.
    """
    nobody, task = needs_of(WorkerShare("cpu", 0.0, 1), asked, count=0)
    if not fits(have.most, nobody, task, have.limit):
        raise ClusterError(
            f"one data task of data.cpus_per_task={task.cpus:g}{on_nodes(task.labels)} fits on no "
            f"node, {_nodes_of(have)}; lower data.cpus_per_task or give other data.node_labels"
            + _hint(have)
        )
    return task


def share_for_pool(have: Cluster, asked: Asked, *, most: int) -> tuple[int, WorkerShare]:
    """Decide how many actors compute for Ray Data, and what each gets; its tasks keep CPUs.

    They are as many as the nodes that are there hold; where none are, the autoscaler is asked for
    the nodes of one.

    Args:
        have: the cluster.
        asked: where, on which device (not ``auto``) and beside which data tasks they compute.
        most: actors that there is work for.

    Raises:
        ClusterError: the cluster can never hold one actor and one data task.
    """
    asked = replace(asked, num_workers=1, cpus_per_worker=0.0, threads_per_worker=0)
    there = nodes_with(have.now, asked.worker_labels)
    if asked.device == "cuda":
        wanted = sum(int(node.gpus) * node.count for node in there)
    else:
        wanted = int(sum(node.cpus * node.count for node in there) / _CPUS_PER_ACTOR)
    share = share_for_workers(have, asked)
    if not fits(have.now, *needs_of(share, asked, count=1)):
        return 1, share
    size = max(1, min(most, wanted))
    return size, share_for_workers(replace(have, most=have.now), replace(asked, num_workers=size))


def _counts(have: Cluster, asked: Asked, usable: Sequence[Node], device: str) -> tuple[int, int]:
    """Return the least workers, and as many as there is room for.

    Raises:
        ClusterError: there are fewer GPUs, or CPUs, than the least.
    """
    least = asked.least
    where = on_nodes(asked.worker_labels)
    if device == "cuda":
        room = gpus_of(usable, have.limit)
        if room < least:
            raise ClusterError(
                f"train.num_workers={least} with train.device=cuda need {least} GPUs{where}, the "
                f"cluster has {room}; use train.num_workers={max(1, room)}"
                + ("" if room else " and train.device=cpu")
                + _hint(have)
            )
    else:
        room = int(cpus_of(usable, have.limit))
        if room < least and not asked.cpus_per_worker:
            raise ClusterError(
                f"train.num_workers={least} on CPUs need one each{where}, the cluster has {room}; "
                f"use train.num_workers={max(1, room)}{_hint(have)}"
            )
    return least, max(least, min(asked.most, room))


def _cpus_per_worker(
    have: Cluster, asked: Asked, usable: Sequence[Node], device: str, per_node: int
) -> float:
    """Return what each of so many workers on a node reserves; data tasks that share it have half.

    Processes share cores through the operating system whatever Ray reserves, and back-pressure
    keeps data tasks from running ahead: what matters is that reservations leave them room. On a
    single small machine workers reserve nothing.
    """
    shared = bool(nodes_with(usable, asked.data_labels))
    cpus = min((node.cpus for node in usable), default=0.0)
    if device == "cuda":
        rest = cpus - asked.cpus_per_data_task if shared else cpus
        return max(0.0, min(1.0, _rounded(rest / per_node / (2 if shared else 1))))
    if shared and _is_small(have):
        return 0.0
    return _rounded(cpus / per_node / (2 if shared else 1))


def _is_small(have: Cluster) -> bool:
    """Say whether it is one small machine, on which workers reserve nothing."""
    return len(have.most) == 1 == have.most[0].count and have.most[0].cpus <= _SMALL_CPUS


def _rounded(cpus: float) -> float:
    """Round down, for the last one must fit as well: to sixteenths, which add up exactly.

    Ray Train divides what several workers have reserved by what one reserves, in floats: of
    3 x 1.333 it would count 2.
    """
    return math.floor(cpus * 16) / 16 or math.floor(cpus * 1000) / 1000


def _nodes_of(have: Cluster) -> str:
    """Say which nodes there may be at most, and how many of them are there now."""
    kinds = [
        f"{node.count} x {f'{node.gpus:g} GPU and ' if node.gpus else ''}{node.cpus:g} CPUs"
        + on_nodes(_own(node.labels)).replace(" on nodes", "")
        for node in have.most
    ]
    counted = f"the cluster has {cpus_of(have.most, have.limit):g}"
    now = "" if have.most == have.now else f" at most, {len(have.now)} nodes of it now"
    beside = sum(node.count for node in have.most if not node.is_head)
    limit = f"; max_workers: {have.limit:g} of them at once" if have.limit < beside else ""
    return f"{counted}{now} (nodes: {', '.join(kinds)}{limit})"


def _own(labels: Labels) -> Labels:
    """Leave out the labels that Ray gives to every node."""
    return {name: value for name, value in labels.items() if not name.startswith("ray.io/")}


def _and_gpus(need: Need) -> str:
    return f" and {need.gpus * need.count:g} GPUs" if need.gpus else ""


def _hint(have: Cluster) -> str:
    if have.ours:
        return ""
    if have.most != have.now:
        return "; that is all that the autoscaler may bring"
    return "; if an autoscaler brings more, say so in run.autoscaled_nodes"
