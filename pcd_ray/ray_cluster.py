"""The cluster: join the one that the environment names, or start one on this machine.

Resource names, on which nodes work runs, and how CPUs are shared between training workers and data
tasks are decided here: by all nodes that there may be, of which the autoscaler may have some.
"""

import base64
import logging
import math
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import ray.util

from pcd_ray.errors import ClusterError, PcdError
from pcd_ray.ray_nodes import (
    Cluster,
    Labels,
    Need,
    Node,
    cluster_nodes,
    fits,
    nodes_with,
    on_nodes,
)

_OBJECT_STORE_SHARE = 0.2  # of this machine's memory, when we start Ray ourselves
PASSIVE_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of every process that computes on CPUs. Torch's threads otherwise spin while they
wait for each other, which costs several times the work itself as soon as cores are shared with
data tasks; read once, when torch is loaded."""
_SMALL_CPUS = 4  # up to this many on a single machine, workers reserve none of them
_JOB_FOLDERS = "/runtime_resources/working_dir_files/"  # where Ray unpacks ``--working-dir``
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


def connect(autoscaled: Sequence[Node] = ()) -> Cluster:
    """Join the cluster of ``RAY_ADDRESS``, or start Ray on this machine; twice is once.

    Args:
        autoscaled: nodes that the autoscaler may bring; empty: as far as the launcher says.

    Raises:
        ClusterError: the named cluster does not answer, or Ray does not start here.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    alone = address == "local"
    if not ray.is_initialized():
        if address.startswith(("http://", "https://")):
            raise ClusterError(
                f"RAY_ADDRESS={address!r} is a dashboard's: it takes jobs (ray job submit "
                f"--address {address} --working-dir . -- python jobs/train.py ...); unset "
                "RAY_ADDRESS to run on this machine"
            )
        if alone:
            # a cluster of one machine that dies with this process needs no token
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        try:
            ray.init(
                address=address,
                logging_level=logging.WARNING,
                log_to_driver=False,
                include_dashboard=False if alone else None,
                object_store_memory=_object_store_bytes() if alone else None,
            )
        except Exception as error:  # Ray's own kinds, and bare ones when it starts too slowly
            if alone:
                raise ClusterError(
                    f"Ray cannot be started on this machine ({error}); it may be too busy or short "
                    "of memory or disk: free some and try again"
                ) from error
            raise ClusterError(
                f"the Ray cluster at RAY_ADDRESS={address!r} does not answer ({error}); check the "
                "address, export RAY_AUTH_MODE=token if it asks for one (~/.ray/auth_token must "
                "hold the cluster's), or unset RAY_ADDRESS"
            ) from error
    return cluster_nodes(autoscaled, ours=alone)


def check_outlives_job(option: str, uri: str) -> None:
    """Refuse to store anything in the copy of the working folder that Ray makes for a job.

    Args:
        option: what asks for the place.
        uri: the place, absolute.

    Raises:
        ClusterError: it would go with the job, or lie on a node where nobody finds it.
    """
    if _JOB_FOLDERS in uri:
        raise ClusterError(
            f"{option}={uri} lies in this job's own copy of the working folder, which Ray deletes; "
            f"give a place that all nodes share, e.g. {option}=s3://bucket/folder"
        )


def share_for_workers(have: Cluster, asked: Asked) -> WorkerShare:
    """Decide what each training worker gets, such that Ray Data keeps room to work.

    Of the least and the most workers the cluster must hold the least; each gets what it would get
    beside as many as there is room for.

    Raises:
        ClusterError: the cluster can never hold the workers and one data task.
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
        per_node = -(-count // max(1, sum(node.count for node in usable)))
    cpus = asked.cpus_per_worker or _cpus_per_worker(have, asked, usable, device, per_node)
    threads = asked.threads_per_worker or max(1, int(cores) // per_node)
    share = WorkerShare(device, cpus, threads, asked.worker_labels)
    workers, task = needs_of(share, asked, count=least)
    if not fits(have.most, workers, task):
        raise ClusterError(
            f"train.num_workers={least} x {cpus:g} CPUs{on_nodes(workers.labels)} and one data "
            f"task of data.cpus_per_task={task.cpus:g}{on_nodes(task.labels)} need "
            f"{cpus * least + task.cpus:g} CPUs{_and_gpus(workers)}, {_nodes_of(have)}; lower "
            f"train.num_workers, train.cpus_per_worker or data.cpus_per_task{_hint(have)}"
        )
    return share


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
    cpus = sum(node.cpus * node.count for node in there) / groups
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
    if not fits(have.most, nobody, task):
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


def call_in_task(work: Callable[..., Any], *args: Any, share: WorkerShare) -> Any:
    """Call a function in a Ray task that gets a worker's share; return its result.

    Raises:
        PcdError: as `call_in_tasks`.
    """
    return call_in_tasks(work, [args], share=share)[0]


def call_in_tasks(
    work: Callable[..., Any], arguments: Sequence[Sequence[Any]], *, share: WorkerShare
) -> list[Any]:
    """Call a function once for each tuple of arguments, in Ray tasks; return results in order.

    The first failure cancels what has not begun.

    Args:
        work: the function.
        arguments: of each call.
        share: what each task gets.

    Raises:
        PcdError: ``work`` raised it.
        ClusterError: a task's process or node died, or a device has no memory left.
    """
    threads = {"OMP_NUM_THREADS": str(share.threads)}
    task = ray.remote(
        num_cpus=share.cpus,
        num_gpus=share.gpus,
        label_selector=dict(share.labels),
        runtime_env={"env_vars": PASSIVE_THREADS | threads},
    )(work)
    begun = [task.remote(*each) for each in arguments]
    try:
        return fetched(begun)
    except Exception:
        for each in begun:
            ray.cancel(each)
        raise


def fetched(begun: Sequence[Any]) -> list[Any]:
    """Return the results of calls that have begun, in order.

    Raises:
        PcdError: as `call_in_tasks`.
    """
    try:
        return list(ray.get(list(begun)))
    except ray.exceptions.RayError as error:
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
        if isinstance(cause, PcdError):
            raise cause from None
        explained = explained_death(cause or error)
        if explained is None:
            raise
        raise explained from error


def explained_death(error: BaseException) -> ClusterError | None:
    """Return what a process died of, in words; None: the error is none of Ray's nor of memory."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ClusterError(
            f"there was not enough memory ({line}); use smaller batches or images, more workers, "
            "or a larger machine: the same command goes on from what is stored"
        )
    if isinstance(error, ray.exceptions.RayError) and not isinstance(
        error, ray.exceptions.RayTaskError
    ):
        return ClusterError(
            f"a process that computes died ({line}); it may have run out of memory: give the same "
            "command again, on a larger machine if need be"
        )
    return None


def current_reservation(owner: str) -> str:
    """Return what is reserved for this process's group of workers, as text; empty: nothing is.

    Args:
        owner: name of an actor that lives as long as the process that runs the workers.
    """
    group = ray.util.get_current_placement_group()
    return "" if group is None else base64.b64encode(pickle.dumps((owner, group))).decode()


def free_reservation(reservation: str) -> bool:
    """Give back what `current_reservation` named, once its owner is gone; return whether it is.

    Ray Train leaves it reserved when the process that runs it is ended by somebody else, unless a
    dashboard answers. While the owner lives it would only reserve anew.
    """
    if not reservation:
        return True
    owner, group = pickle.loads(base64.b64decode(reservation))
    try:
        ray.get_actor(owner)
    except ValueError:
        ray.util.remove_placement_group(group)
        return True
    return False


def _counts(have: Cluster, asked: Asked, usable: Sequence[Node], device: str) -> tuple[int, int]:
    """Return the least workers, and as many as there is room for.

    Raises:
        ClusterError: there are fewer GPUs, or CPUs, than the least.
    """
    least = asked.least
    where = on_nodes(asked.worker_labels)
    if device == "cuda":
        room = sum(int(node.gpus) * node.count for node in usable)
        if room < least:
            raise ClusterError(
                f"train.num_workers={least} with train.device=cuda need {least} GPUs{where}, the "
                f"cluster has {room}; use train.num_workers={max(1, room)}"
                + ("" if room else " and train.device=cpu")
                + _hint(have)
            )
    else:
        room = int(sum(node.cpus * node.count for node in usable))
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
    return math.floor(cpus * 1000) / 1000  # down: the last one must fit as well


def _nodes_of(have: Cluster) -> str:
    """Say which nodes there may be at most, and how many of them are there now."""
    kinds = [
        f"{node.count} x {f'{node.gpus:g} GPU and ' if node.gpus else ''}{node.cpus:g} CPUs"
        + on_nodes(_own(node.labels)).replace(" on nodes", "")
        for node in have.most
    ]
    counted = f"the cluster has {sum(node.cpus * node.count for node in have.most):g}"
    now = "" if have.most == have.now else f" at most, {len(have.now)} nodes of it now"
    return f"{counted}{now} (nodes: {', '.join(kinds)})"


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


def _object_store_bytes() -> int:
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return int(min(8 * 2**30, _OBJECT_STORE_SHARE * pages * page))
