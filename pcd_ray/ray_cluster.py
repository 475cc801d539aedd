"""The cluster: join the one that the environment names, or start one on this machine.

Resource names and how CPUs are shared between training workers and data tasks are decided here.
"""

import base64
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.util

from pcd_ray.errors import ClusterError, PcdError

_OBJECT_STORE_SHARE = 0.2  # of this machine's memory, when we start Ray ourselves
PASSIVE_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of every process that computes on CPUs. Torch's threads otherwise spin while they
wait for each other, which costs several times the work itself as soon as cores are shared with
data tasks; read once, when torch is loaded."""
_SMALL_CPUS = 4  # up to this many, workers reserve none of them
_CPUS_PER_ACTOR = 4  # of a pool that computes on CPUs; more threads scale badly


@dataclass(frozen=True, slots=True)
class ClusterResources:
    """What the cluster has now, all nodes together."""

    cpus: float
    gpus: float
    nodes: int


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """What one training worker gets."""

    device: str
    """``cpu`` or ``cuda``."""
    cpus: float
    """CPUs that Ray reserves for it."""
    threads: int
    """Torch threads it computes with."""

    @property
    def resources(self) -> dict[str, float]:
        """What to ask of Ray; one byte of memory, since a request for nothing is refused."""
        return {"CPU": self.cpus, "memory": 1}


def connect() -> ClusterResources:
    """Join the cluster of ``RAY_ADDRESS``, or start Ray on this machine; twice is once.

    Raises:
        ClusterError: the named cluster does not answer, or Ray does not start here.
    """
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or "local"
        alone = address == "local"
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
                "address, export RAY_AUTH_MODE=token if it asks for one, or unset RAY_ADDRESS"
            ) from error
    return resources()


def resources() -> ClusterResources:
    """Return what the cluster has now."""
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    nodes: list[dict[str, object]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node for node in nodes if node["Alive"]]
    return ClusterResources(total.get("CPU", 0.0), total.get("GPU", 0.0), len(alive))


def share_for_workers(
    have: ClusterResources,
    *,
    num_workers: int | tuple[int, int],
    device: str,
    cpus_per_worker: float,
    threads_per_worker: int,
    cpus_per_data_task: float,
) -> WorkerShare:
    """Decide what each training worker gets, such that Ray Data keeps room to work.

    Of ``[least, most]`` workers the cluster must hold the least; each gets what it would get beside
    as many as there is room for now.

    Args:
        have: the cluster.
        num_workers: ``train.num_workers``.
        device: ``train.device``.
        cpus_per_worker: ``train.cpus_per_worker``; 0 decides here.
        threads_per_worker: ``train.threads_per_worker``; 0 decides here.
        cpus_per_data_task: ``data.cpus_per_task``.

    Raises:
        ClusterError: the cluster cannot hold the workers and one data task.
    """
    chosen = ("cuda" if have.gpus >= 1 else "cpu") if device == "auto" else device
    least, most = num_workers if isinstance(num_workers, tuple) else (num_workers, num_workers)
    num_workers = max(least, min(most, int(have.gpus if chosen == "cuda" else have.cpus)))
    if chosen == "cpu" and not cpus_per_worker and num_workers > have.cpus:
        raise ClusterError(
            f"train.num_workers={num_workers} on CPUs need one each, the cluster has "
            f"{have.cpus:g}; use train.num_workers={max(1, int(have.cpus))}"
        )
    if chosen == "cuda" and have.gpus < num_workers:
        raise ClusterError(
            f"train.num_workers={num_workers} with train.device=cuda need {num_workers} GPUs, the "
            f"cluster has {have.gpus:g}; use train.num_workers={max(1, int(have.gpus))}"
            + ("" if have.gpus else " and train.device=cpu")
        )
    cpus = cpus_per_worker or _cpus_per_worker(have, num_workers, chosen, cpus_per_data_task)
    wanted = cpus * least + cpus_per_data_task
    if wanted > have.cpus + 1e-6:
        raise ClusterError(
            f"train.num_workers={least} x {cpus:g} CPUs and one data task of "
            f"data.cpus_per_task={cpus_per_data_task:g} need {wanted:g} CPUs, the cluster has "
            f"{have.cpus:g}; lower train.num_workers, train.cpus_per_worker or data.cpus_per_task"
        )
    cores = max(1, int(have.cpus / max(1, have.nodes)))
    workers_per_node = max(1, -(-num_workers // max(1, have.nodes)))
    return WorkerShare(chosen, cpus, threads_per_worker or max(1, cores // workers_per_node))


def cpus_beside_others(
    have: ClusterResources,
    *,
    groups: int,
    num_workers: int,
    device: str,
    cpus_per_data_task: float,
) -> float:
    """Return what each worker may reserve where several groups of workers run at once.

    Half of a group's part of the cluster is left to its data tasks, as for one group alone; 0: let
    `share_for_workers` decide, which reserves nothing on a small machine.

    Args:
        have: the cluster.
        groups: how many there are.
        num_workers: of each group.
        device: ``cpu`` or ``cuda``.
        cpus_per_data_task: ``data.cpus_per_task``.
    """
    if device == "cpu" and have.cpus <= _SMALL_CPUS:
        return 0.0
    half = (have.cpus / groups - cpus_per_data_task) / num_workers / 2
    return max(0.001, round(min(half, 1.0) if device == "cuda" else half, 3))


def share_for_pool(
    have: ClusterResources, *, device: str, most: int, cpus_per_data_task: float
) -> tuple[int, WorkerShare]:
    """Decide how many actors compute for Ray Data, and what each gets; its tasks keep CPUs.

    Args:
        have: the cluster.
        device: ``cpu`` or ``cuda``.
        most: actors that there is work for.
        cpus_per_data_task: ``data.cpus_per_task``.

    Raises:
        ClusterError: the cluster cannot hold one actor and one data task.
    """
    wanted = have.gpus if device == "cuda" else have.cpus / _CPUS_PER_ACTOR
    size = max(1, min(most, int(wanted)))
    return size, share_for_workers(
        have,
        num_workers=size,
        device=device,
        cpus_per_worker=0.0,
        threads_per_worker=0,
        cpus_per_data_task=cpus_per_data_task,
    )


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
        num_gpus=1 if share.device == "cuda" else 0,
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


def _cpus_per_worker(
    have: ClusterResources, num_workers: int, device: str, cpus_per_data_task: float
) -> float:
    if device == "cuda":
        return max(0.0, min(1.0, (have.cpus - cpus_per_data_task) / num_workers / 2))
    # Processes share cores through the operating system whatever Ray reserves, and back-pressure
    # keeps data tasks from running ahead: what matters is that reservations leave them room. On a
    # small machine workers reserve nothing, on larger clusters half of the CPUs together.
    if have.cpus <= _SMALL_CPUS:
        return 0.0
    return round(have.cpus / 2 / max(num_workers, have.nodes), 3)  # one must fit on a node


def _object_store_bytes() -> int:
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return int(min(8 * 2**30, _OBJECT_STORE_SHARE * pages * page))
